"""The mandatory check: decoding with a cache must compute what the model computes without one."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from transformers import PreTrainedModel

from kvcompile.capture import TOKENS, evaluating, source
from kvcompile.errors import UnsupportedModelError
from kvcompile.ir import ATTENTION
from kvcompile.program import Program

PROMPT, STEPS = 7, 2


def self_check(model: PreTrainedModel, program: Program) -> None:
    """Compare the model itself, its stateless graph, and prefill(7) + 2 decode steps under `full`.

    Raises UnsupportedModelError that names the first node, other than attention, that mixes tokens.
    """
    from kvcompile.engine import Engine
    from kvcompile.own_cache import OwnCache

    exact = program.lower("full")
    device, total = model.device, PROMPT + STEPS
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (1, total), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(total, device=device)[None]
    valid = torch.ones(1, total, dtype=torch.bool, device=device)
    with torch.no_grad():
        with evaluating(model):
            want = model(input_ids=ids, use_cache=False).logits
        stateless = exact.graph_module(ids, positions, valid, torch.arange(total, device=device))
        engine, got = Engine(exact, compile=False), []
        cache = OwnCache(engine.sites, "full", "self-check")
        for start, end in [(0, PROMPT)] + [(PROMPT + i, PROMPT + i + 1) for i in range(STEPS)]:
            at = slice(start, end)
            got.append(engine.run(cache, ids[:, at], positions[:, at], valid[:, at],
                                  torch.arange(end - start, device=device)))
    name = type(model).__name__
    if not _close(want, stateless):
        raise UnsupportedModelError(
            f"{name}: its captured graph gives other logits than the model (by "
            f"{_difference(want, stateless):.2g}){mixer(exact.graph_module, model)}")
    if not _close(stateless, torch.cat(got, 1)):
        raise UnsupportedModelError(
            f"{name}: decoding with a cache gives other logits than the whole sequence (by "
            f"{_difference(stateless, torch.cat(got, 1)):.2g})"
            f"{mixer(exact.graph_module, model)}")


def _difference(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def _close(want: Tensor, got: Tensor) -> bool:
    """Within the rounding of some hundred operations in the model's dtype, on the logits' scale."""
    eps = torch.finfo(want.dtype).eps
    return _difference(want, got) <= max(256 * eps, 1e-4) * (1 + want.float().abs().max().item())


def mixer(gm: GraphModule, model: PreTrainedModel, tokens: int = TOKENS) -> str:
    """`: node 'x' (op) (file:line) mixes tokens and is not attention`, or nothing.

    Runs the graph on two prompts that differ in their first token, attention's results being taken
    from the first run, and looks for the first node whose later tokens differ.
    """
    device = model.device
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (1, tokens), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % vocab
    positions = torch.arange(tokens, device=device)[None]
    rest = (positions, torch.ones_like(positions, dtype=torch.bool), positions[0, :3])
    runs = [_Record(gm), _Record(gm)]
    with torch.no_grad():
        runs[0].run(ids.to(device), *rest)
        runs[1].attention = runs[0].attention
        runs[1].run(other.to(device), *rest)
    def differs(node: Node) -> bool | None:
        """Whether later tokens differ; None where the node has no token axis, but differs."""
        a, b = runs[0].values.get(node), runs[1].values.get(node)
        if a is None or b is None or a.dtype == torch.bool:
            return False
        axis = next((i for i, size in enumerate(a.shape) if size == tokens), None)
        if axis is None:
            return False if torch.equal(a, b) else None
        return not torch.equal(*(x.narrow(axis, 1, tokens - 1) for x in (a, b)))

    guilty = next((n for n in gm.graph.nodes if differs(n)), None)
    if guilty is None:
        return ""
    while back := [n for n in guilty.all_input_nodes if differs(n) is None]:
        guilty = back[0]  # such as a convolution over a padded sequence
    return (f": node '{guilty.name}' ({guilty.target}){source(guilty)} mixes tokens and is not "
            "attention")


class _Record(Interpreter):
    """Keeps every tensor of a run; attention's results come from `attention` if it is filled."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[Node, Tensor] = {}
        self.attention: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is ATTENTION and n in self.attention:
            return self.attention[n]
        out = super().run_node(n)
        if isinstance(out, Tensor) and n.op == "call_function":
            self.values[n] = out
            if n.target is ATTENTION:
                self.attention[n] = out
        return out
