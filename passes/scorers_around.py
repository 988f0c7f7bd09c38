"""Scorers around a scorer: what becomes of its scores over chunks, parts and runs of tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.passes.merges import runs
from kvcompile.prompt import Prompt
from kvcompile.recipe import Term
from kvcompile.rule import Around


@dataclass(frozen=True)
class Chunks(Around):
    """ChunkKV: every token of a chunk of `length` gets the chunk's mean of all heads' scores."""

    of: Term
    length: int = 10
    name: ClassVar[str] = "chunks"

    @property
    def rest(self) -> int:
        """The chunk in which the window begins stays whole."""
        return self.length - 1 if self.window else 0

    def prompt(self, x: Prompt) -> Tensor:
        total = self.base.prompt(x).sum(0)
        means = torch.cat([part.mean().expand(len(part)) for part in total.split(self.length)])
        return means.expand(x.heads, -1)


@dataclass(frozen=True)
class Parts(Around):
    """FINCH: of every part of `length` tokens the best share `ratio`, ranked before all others."""

    of: Term
    length: int = 512
    ratio: float = 0.5
    name: ClassVar[str] = "parts"
    waits: ClassVar[str] = ("the question at a prompt's end looks at every part, and earlier "
                            "pieces do not have it")

    def prompt(self, x: Prompt) -> Tensor:
        base = self.base.prompt(x)
        out = torch.zeros_like(base)
        for start in range(0, x.tokens, self.length):
            part = base[:, start : start + self.length]
            best = part.topk(max(1, int(part.shape[1] * self.ratio)), -1).indices
            out[:, start : start + self.length].scatter_(-1, best, 1.0)
        return out.masked_fill(base.isposinf(), torch.inf)


@dataclass(frozen=True)
class Pivots(Around):
    """KVMerger: 1 for the best token of every run of alike keys, 0 for the run's others.

    The share `heavy` of the tokens with the best scores and the newest `recent` ones are in no run.
    """

    of: Term
    alike: float = 0.75
    heavy: float = 0.1
    recent: int = 32
    name: ClassVar[str] = "pivots"

    def prompt(self, x: Prompt) -> Tensor:
        base = self.base.prompt(x)
        out = torch.zeros_like(base)
        best = base.topk(int(x.tokens * self.heavy), -1).indices
        out.scatter_(-1, best, torch.inf)
        out[:, x.tokens - min(self.recent, x.tokens):] = torch.inf
        for head, scores in enumerate(base):
            run = runs(x.keys[head], out[head].isposinf(), self.alike)
            order = scores.sort(descending=True, stable=True).indices
            run, place = run[order].sort(stable=True)  # run by run, the best token first
            first = order[place[run != torch.cat([run[:1] - 1, run[:-1]])]]
            out[head, first[~out[head, first].isposinf()]] = 1.0
        return out


SCORERS = (Chunks, Parts, Pivots)
