"""Running a program: picks the graph for a call, compiles the decode graph, checks the result."""

import logging
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from kvcompile.alone import Alone
from kvcompile.backend.inductor import compile_graph
from kvcompile.backend.linears import merge_linears
from kvcompile.errors import KVCompileError
from kvcompile.own_cache import OwnCache
from kvcompile.planes import Group
from kvcompile.program import Program
from kvcompile.rewrite import copy_graph
from kvcompile.rule import Rule

log = logging.getLogger(__name__)


class Engine:
    """The graphs of a program, ready to be called.

    prefill: an empty cache, eager. extend: more tokens on a cache, eager; both attend and store by
    kernels where there are some (`kvcompile.alone`). A step of one token is the extend graph
    compiled by Inductor, once for a batch of one and once for any larger batch.
    """

    def __init__(self, program: Program, compile: bool = True) -> None:
        self.program, self.compile = program, compile
        self.sites = program.sites
        self.rules = [Rule.parse(s.rule) for s in self.sites if s.rule]
        self._decode: dict[bool, Callable] = {}
        self._graphs: dict[str, GraphModule] = {}
        self.alone = Alone(compile)
        self._said: set[str] = set()
        self.taps: list[Tensor] = []  # what a graph gives beside logits and ok (checks/audit.py)

    def run(self, cache: OwnCache, ids: Tensor, positions: Tensor, valid: Tensor,
            keep: Tensor, embeds: Tensor | None = None, question: int = 0,
            whole: Sequence[int] = ()) -> Tensor:
        """Logits [B, N, V] for the columns `keep`, and the call's tokens stored in `cache`.

        `question` is how many of a prompt's last tokens are its question, where rules ask for that;
        `whole` how many tokens each row's prompt has, of which this is the first of several pieces.
        """
        fresh = cache.get_seq_length() == 0
        planes = cache.begin(valid, positions)
        batch, tokens = valid.shape
        hints: tuple[Tensor, ...] = ()
        if fresh:
            call = self._eager("prefill", embeds)
            if self.rules:
                ids, positions, valid, probe = self._probed(ids, positions, valid)
                hints = (torch.tensor([probe, question, *whole], device=valid.device),)
        elif tokens == 1 and self.compile and embeds is None:
            call = self.step(batch, valid.device)  # compiled for rows that lie side by side
            ids, positions, valid = (x.contiguous() for x in (ids, positions, valid))
        else:
            call = self._eager("extend", embeds)
        logits, ok, *self.taps = call(ids, positions, valid, keep, *planes, *hints)
        kept: Any = self.taps.pop(0) if hints else None
        if not bool(ok.all()):
            cache.rollback()
            if fresh:
                cache.reset()
            owners = [site for site in self.sites if site.owner is None]
            layer = owners[ok.tolist().index(False)]
            limit = min(layer.store.limit(s, layer.dtype) for s in "kv")
            raise KVCompileError(f"K or V of layer {layer.layer} holds NaN or numbers above "
                                 f"{limit:g}; nothing of this call was stored")
        if kept:
            cache.store(kept, self.alone.append, tokens, whole)
            self._say_if_all(cache, kept)
        cache.commit(tokens)
        return logits

    def asked(self, length: int, valid: Tensor) -> int:
        """How many tokens at the end of prompts are their question, if that is legal: shorter than
        every prompt, and within budgets in tokens. It stays whole: where it exceeds a budget that
        is a share of the prompt, or where no scores look from it, that is said once."""
        shortest = int(valid.sum(1).min()) if length else valid.shape[1]
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length < shortest:
            which = "prompt's" if len(valid) == 1 else "shortest prompt's"
            raise KVCompileError(f"question_length={length!r}: must be a number of tokens, from 0 "
                                 f"to {max(0, shortest - 1)}, one less than the {which}")
        asking = [s for s in self.sites if length and s.rule and Rule.parse(s.rule).asks]
        for site in asking:
            rule = Rule.parse(site.rule)
            if why := rule.short(site.heads, question=length):
                raise KVCompileError(f"question_length={length}: {self.program.recipe}: layer "
                                     f"{site.layer}: {why}")
            if why := rule.short(site.heads, shortest, length):
                self._say(f"layer {site.layer}: a question of {length} tokens stays whole, of a "
                          f"prompt of {shortest}: {why}", "question")
        if length and self.rules and not asking:
            self._say(f"question_length={length} changes nothing: no scores look from a window of "
                      "the newest tokens", "question")
        return length

    def _say(self, text: str, about: str) -> None:
        """Warn once of something."""
        if about not in self._said:
            self._said.add(about)
            log.warning("%s: %s", self.program.recipe, text)

    def _say_if_all(self, cache: OwnCache, kept: Sequence[Sequence[Tensor]]) -> None:
        """Say once that a budget was larger than a prompt."""
        every = int(sum((at >= 0).sum() for _, _, at, *_ in kept))
        given = sum(s.heads for s in self.sites if s.rule) * sum(cache.new)
        if every == given and not all(r.every or r.channels for r in self.rules):
            self._say(f"the prompt ({max(cache.new)} tokens) is within the budget, and all of it "
                      "is kept", "all")

    def _probed(self, ids: Tensor, positions: Tensor, valid: Tensor
                ) -> tuple[Tensor, Tensor, Tensor, int]:
        """A prompt, and behind it, where a rule asks for it, the prompt once more."""
        if not any("probe" in rule.needs for rule in self.rules):
            return ids, positions, valid, 0
        tokens = ids.shape[1]
        again = positions + valid.sum(1, keepdim=True)
        return (torch.cat([ids, ids], 1), torch.cat([positions, again], 1),
                torch.cat([valid, valid], 1), tokens)

    def stateless(self, ids: Tensor, positions: Tensor, valid: Tensor, keep: Tensor,
                  embeds: Tensor | None = None) -> Tensor:
        """Logits of a forward without a cache, exact whatever the recipe."""
        gm = self.program.snapshots["capture"]
        run = gm if embeds is None else _with_embeddings(gm, embeds)
        return run(ids, positions, valid, keep)

    def _eager(self, phase: str, embeds: Tensor | None) -> Callable:
        if phase not in self._graphs:
            gm = self.program.phases[phase]
            self._graphs[phase] = self.alone.into(gm)
        gm = self._graphs[phase]
        return gm if embeds is None else _with_embeddings(gm, embeds)

    def step(self, batch: int, device: torch.device) -> Callable:
        """The compiled decode step for this batch size."""
        many = batch > 1
        if many not in self._decode:
            log.info("compiling the decode step for batch %s", "> 1" if many else "1")
            self._decode[many] = self._compile_step(3 if many else 1, device)
        return self._decode[many]

    def _compile_step(self, batch: int, device: torch.device) -> Callable:
        ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        inputs = [ids, ids.clone(), torch.ones_like(ids, dtype=torch.bool),
                  torch.zeros(1, dtype=torch.long, device=device)]
        rows = [0] if batch > 1 else []
        dynamic = [rows, rows, rows, []]
        sizes = count(batch + 2)  # a size of its own for whatever may vary by itself
        for layers in self.program.groups:
            group = Group([self.sites[i] for i in layers], batch, device)
            pages: dict[str, int] = {}
            for spec, plane in zip(group.specs, group.planes, strict=True):
                tier, name = spec.name.rpartition(".")[::2]
                key = f"{tier} table" if name == "table" else tier
                if key and key not in pages:
                    pages[key] = next(sizes)
                if spec.shape:
                    inputs.append(plane.new_empty(pages[key], *spec.shape))
                    dynamic.append([0])
                elif tier:
                    inputs.append(plane.new_empty(*plane.shape[:3], pages[key]))
                    dynamic.append([*(d + 1 for d in rows), 3])
                else:
                    inputs.append(plane)
                    dynamic.append([d + 1 for d in rows])
        if any(site.rotated for site in self.sites):
            inputs.append(torch.zeros(batch, next(sizes), dtype=torch.long, device=device))
            dynamic.append([*rows, 1])
        gm = copy_graph(self.program.phases["extend"])
        merge_linears(gm, inputs)
        return compile_graph(gm, inputs, dynamic)


def _with_embeddings(gm: GraphModule, embeds: Tensor) -> Callable:
    """`gm` with the embedding of its token ids replaced by `embeds` [B, S, hidden]."""
    ids = next(n for n in gm.graph.nodes if n.op == "placeholder")
    users = [n for n in ids.users if n.op == "call_function" and "embedding" in str(n.target)]
    others = [n for n in ids.users if n not in users and "sym_size" not in str(n.target)]
    if any("kvc" in str(n.target) for n in others):
        raise KVCompileError("inputs_embeds: the recipe chooses by token ids; give input_ids")
    if len(users) != 1 or others:
        raise KVCompileError("inputs_embeds: the model uses input_ids in other places than one "
                             "embedding")

    class Embedded(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            return embeds if n is users[0] else super().run_node(n)

    return Embedded(gm).run
