"""Calibration: what attention sees in a text, and the parameters that methods find in it.

A recipe with a calibrated method, such as `kvtuner(bits=4)`, becomes one in which the parameters
that were found are written out, `kvtuner(bits=4, k=[8, 4, ...], v=[4, 2, ...])`. That text is all
there is to keep: given again, it needs no calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.functional import cross_entropy

from kvcompile.errors import KVCompileError
from kvcompile.ir import ATTENTION, ROPE, argument, attention_nodes
from kvcompile.kernels.dense_attention import causal
from kvcompile.kernels.rebuild import Rebuild
from kvcompile.kernels.rotary import rope
from kvcompile.method import find_method
from kvcompile.plan import claimed_layers, plan
from kvcompile.recipe import Recipe, Term
from kvcompile.rewrite import copy_graph, passes, run_passes

if TYPE_CHECKING:
    from kvcompile.program import Program

ROWS, TOKENS = 4, 256  # of the text that a model writes for itself


@dataclass(frozen=True)
class Sample:
    """One layer's attention on the text: q [N, Hq, T, Dk], k [N, H, T, Dk], v [N, H, T, Dv]. Of
    keys that are rebuilt at read k is what is cached of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    window: int
    softcap: float
    sinks: Tensor | None


class Samples:
    """What some layers see when the stateless graph reads `ids` [N, T] once."""

    def __init__(self, gm: GraphModule, ids: Tensor | Callable[[], Tensor],
                 layers: Sequence[int] | None = None) -> None:
        self.gm, self._given = gm, ids
        every = range(len(attention_nodes(gm.graph)))
        self.layers = list(every if layers is None else layers)

    def of(self, layers: Sequence[int]) -> Samples:
        """The same text, other layers."""
        return Samples(self.gm, self._given, layers)

    def under(self, recipe: str | Recipe) -> Samples:
        """The same text and layers by a recipe: k and v are what it would cache."""
        gm = copy_graph(self.gm)
        gm.meta["text"] = lambda: self.ids
        run_passes(passes(), gm, plan(recipe, len(attention_nodes(gm.graph))))
        return Samples(gm, self._given, self.layers)

    @cached_property
    def ids(self) -> Tensor:
        """The text; it may have to be written first."""
        return self._given if isinstance(self._given, Tensor) else self._given()

    @property
    def tokenizer(self) -> Any:
        """What tells the texts of token ids; None if it is not known."""
        return self.gm.meta.get("tokenizer")

    @cached_property
    def attention(self) -> list[Sample]:
        """q, K and V of each layer."""
        with torch.no_grad():
            run = Reader(self.gm)
            run.run(*inputs(self.ids, keep=1))
        return [run.samples[i] for i in self.layers]

    def hidden(self, recipe: str | Recipe) -> Tensor:
        """The last hidden states [N, T, hidden], which the logits' linear is given, by `recipe`."""
        gm = self.under(recipe).gm
        output = gm.graph.output_node()
        head = output.all_input_nodes[0]
        while head.target is not torch.ops.aten.linear.default and head.all_input_nodes:
            head = head.all_input_nodes[0]
        if head.all_input_nodes:
            output.args = (head.args[0],)
            gm.graph.eliminate_dead_code()
            gm.recompile()
        with torch.no_grad():
            return gm(*inputs(self.ids, keep=self.ids.shape[1]))

    @cached_property
    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer, of K and of V: the gradient of the loss on the text's next tokens."""
        with torch.enable_grad():
            run = Reader(self.gm, grad=True)
            logits = run.run(*inputs(self.ids, keep=self.ids.shape[1]))[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1).float(), self.ids[:, 1:].flatten(),
                                 reduction="sum")
            own = [x for i in self.layers for x in (run.samples[i].k, run.samples[i].v)]
            found = torch.autograd.grad(loss, own)
        return list(zip(found[::2], found[1::2], strict=True))


def inputs(ids: Tensor, keep: int) -> tuple[Tensor, ...]:
    """What the stateless graph is given to read `ids`, for results of the last `keep` tokens."""
    at = torch.arange(ids.shape[1], device=ids.device)
    return ids, at.expand(ids.shape[0], -1), torch.ones_like(ids, dtype=torch.bool), at[-keep:]


class Reader(Interpreter):
    """Runs the stateless graph and keeps what its attention is given; gradients can flow."""

    def __init__(self, gm: GraphModule, grad: bool = False) -> None:
        super().__init__(gm)
        self.grad, self.samples = grad, list[Sample]()

    def given(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a layer's attention as it reads them: for subclasses to change."""
        return k, v

    def run_node(self, n: Node) -> Any:
        if n.target is ROPE:  # by its body: gradients flow through it
            args, options = self.fetch_args_kwargs_from_env(n)
            return rope(*args, **options)
        if n.op == "placeholder" or n.target is not ATTENTION:
            return super().run_node(n)

        def given(name: str) -> Any:
            value = argument(n, name)
            return self.env[value] if isinstance(value, Node) else value

        q, k, v = (given(name) for name in "qkv")
        k, v = self.given(len(self.samples), k, v)
        if self.grad and not k.requires_grad:  # frozen weights: gradients start here
            k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
        sample = Sample(q, k, v, *(given(x) for x in ("scale", "window", "softcap", "sinks")))
        self.samples.append(sample)
        read = Rebuild(*(given(x) for x in ("basis", "offset", "cos", "sin", "style"))).keys(k)
        return causal(q, read, v, sample.scale, sample.window, sample.softcap, sample.sinks)


class Text:
    """Token ids [texts, tokens] that passes may read (a graph's `meta["text"]`): `given`, or what
    the model writes for itself when it is first asked for."""

    def __init__(self, program: Program, given: Tensor | None = None) -> None:
        self.program, self.ids = program, given

    def __call__(self) -> Tensor:
        if self.ids is None:
            self.ids = own_text(self.program)
        return self.ids


def uncalibrated(recipe: Recipe) -> bool:
    """Whether a term lacks what calibration finds. Raises RecipeError for one that cannot be."""
    return any([find_method(t).uncalibrated(find_method(t).bind(t)) is not None
                for t in recipe.terms])


def calibrated(recipe: Recipe, program: Program, ids: Tensor | Text | None = None) -> Recipe:
    """`recipe` with every parameter that calibration on `ids` finds; of the model's own text if
    None. A recipe that lacks none is returned as it is, and nothing is run."""
    text = ids if isinstance(ids, Text) else Text(program, None if ids is None else checked(ids))
    samples: Samples | None = None
    terms: list[Term] = []
    for term in recipe.terms:
        method = find_method(term)
        bound = method.bind(term)
        if method.calibrate and method.uncalibrated(bound) is not None:
            gm = program.snapshots["capture"]
            samples = samples or Samples(gm, text)
            layers = claimed_layers(term, bound["layers"], len(samples.layers))
            found = method.calibrate(bound, samples.of(layers))
            new = {name: value for name, value in found.items() if bound[name] is None}
            given = tuple((name, value) for name, value in term.args if name not in new)
            term = Term(term.name, given + tuple(new.items()))
        terms.append(term)
    return Recipe(tuple(terms)) if samples else recipe


def own_text(program: Program, rows: int = ROWS, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """[rows, tokens] that the model writes itself: sampled token by token after a random one."""
    from kvcompile.engine import Engine
    from kvcompile.own_cache import OwnCache

    engine = Engine(program.lower("full"), compile=False)
    device = next((p.device for p in program.graph_module.parameters()), torch.device("cpu"))
    random = torch.Generator().manual_seed(seed)
    keep = torch.zeros(1, dtype=torch.long, device=device)
    valid = torch.ones(rows, 1, dtype=torch.bool, device=device)

    def logits(cache: OwnCache, ids: Tensor) -> Tensor:
        at = torch.full_like(valid, cache.get_seq_length(), dtype=torch.long)
        return engine.run(cache, ids.to(device), at, valid, keep)[:, 0].float().cpu()

    def empty() -> OwnCache:
        return OwnCache(engine.sites, "full", "calibration")

    with torch.no_grad():
        vocabulary = logits(empty(), torch.zeros(rows, 1, dtype=torch.long)).shape[-1]
        text, cache = torch.randint(0, vocabulary, (rows, 1), generator=random), empty()
        for _ in range(tokens - 1):
            chances = logits(cache, text[:, -1:]).softmax(-1)
            text = torch.cat([text, torch.multinomial(chances, 1, generator=random)], 1)
    return text.to(device)


def checked(ids: Tensor) -> Tensor:
    """`ids` [texts, tokens]; KVCompileError for anything else, or fewer than 64 tokens."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or (
            ids.shape[0] < 1 or ids.shape[1] < 2 * 32):
        raise KVCompileError("calibration must be token ids [texts, tokens] of at least 64 tokens, "
                             "as tokenizer(text, return_tensors='pt').input_ids gives them")
    return ids.long()
