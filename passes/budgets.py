"""Budgets: how many tokens each head keeps. In tokens, or as the kept share of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.prompt import Prompt
from kvcompile.recipe import Term
from kvcompile.rule import named

UNBOUNDED = 2**31 - 1


def size(tokens: int, ratio: float, of: int) -> int:
    """The budget of one head, of `of` tokens: at least one, at most all."""
    return max(1, min(of, tokens if tokens else int(of * ratio + 1e-9)))


@dataclass(frozen=True)
class Sized:
    """`tokens` for each head, or the share `ratio` of the prompt."""

    tokens: int = 0
    ratio: float = 1.0
    across: ClassVar[bool] = False

    def measure(self, x: Prompt) -> float | Tensor:
        return 0.0

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        each = size(self.tokens, self.ratio, tokens)
        return each, heads * each

    def limit(self, counts: Sequence[int], tokens: int, measures: Sequence[float]
              ) -> list[int]:
        """What the heads may hold while decoding, after a prompt of which they kept `counts` and
        said `measures`."""
        return [self.tokens or max(1, n) for n in counts]


@dataclass(frozen=True)
class Uniform(Sized):
    """Every head the same."""

    name: ClassVar[str] = "uniform"

    def told(self, tokens: int) -> Uniform:
        return self if self.tokens else replace(self, tokens=size(0, self.ratio, tokens))

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        return [[size(self.tokens, self.ratio, s.shape[1])] * len(s) for s in scores]


@dataclass(frozen=True)
class All(Sized):
    """Every token of every head, also while decoding."""

    name: ClassVar[str] = "all"

    def told(self, tokens: int) -> All:
        return self

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        return [[s.shape[1]] * len(s) for s in scores]

    def limit(self, counts: Sequence[int], tokens: int, measures: Sequence[float]
              ) -> list[int]:
        return [UNBOUNDED] * len(counts)


@dataclass(frozen=True)
class Pyramid(Sized):
    """PyramidKV: layer l of L gets max - l (max - min) / (L - 1) tokens beside its window.

    min is the mean budget beside the window over `beta`, and the mean over the layers is kept.
    Where the prompt is too short for that, every layer gets the mean.
    """

    window: int = 32
    beta: float = 20.0
    layer: int = 0
    layers: int = 1
    name: ClassVar[str] = "pyramid"

    def _tokens(self, tokens: int) -> int:
        mean = size(self.tokens, self.ratio, tokens)
        spare = mean - self.window
        low = int(spare / self.beta)
        high = 2 * spare - low
        if high > tokens - self.window:
            high = tokens - self.window
            low = 2 * spare - high
        if self.layers == 1 or not high >= low >= 0 or spare <= 0:
            return mean
        return self.window + round(high - self.layer * (high - low) / (self.layers - 1))

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        return [[self._tokens(s.shape[1])] * len(s) for s in scores]

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        each = self._tokens(tokens)
        return each, heads * each


@dataclass(frozen=True)
class Pooled(Sized):
    """Ada-KV: the heads of a layer share their budgets, and the best scores take them.

    Each head is sure of the share `floor` of its own; `of` is a budget that says what that is. It
    takes its best tokens first, or with `blend`, beside those that always stay, (1 - floor) of what
    the scores give it and `floor` of the mean.
    """

    of: Term = Term("uniform")
    floor: float = 0.2
    blend: bool = False
    name: ClassVar[str] = "pooled"

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        each = [self._each(*s.shape) for s in scores]
        if not self.blend:
            return [pool([s], n, self.floor)[0] for s, n in zip(scores, each, strict=True)]
        return [self._blended(s, n) for s, n in zip(scores, each, strict=True)]

    def _blended(self, s: Tensor, each: int) -> list[int]:
        stays = s.isposinf().sum(-1).tolist()
        return [k + round((1 - self.floor) * (own - k) + int(self.floor * (each - k)))
                for own, k in zip(pool([s], each, 0.0)[0], stays, strict=True)]

    def _each(self, heads: int, tokens: int) -> int:
        return named("budget", self.of).most(tokens, heads)[0]

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        each = self._each(heads, tokens)
        rounded = heads // 2 if self.blend else 0
        return min(tokens, heads * each), min(heads * tokens, heads * each + rounded)


@dataclass(frozen=True)
class Everywhere(Sized):
    """KVzip: all heads of all layers share their budgets."""

    floor: float = 0.0
    name: ClassVar[str] = "everywhere"
    across: ClassVar[bool] = True

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        return pool(scores, size(self.tokens, self.ratio, scores[0].shape[1]), self.floor)

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        return tokens, heads * size(self.tokens, self.ratio, tokens)


def pool(scores: Sequence[Tensor], each: int, floor: float) -> list[list[int]]:
    """Tokens per head of each layer, if `each` a head are given out to the best scores [H, T]."""
    sure = int(each * floor)
    every = torch.cat([s.clone() for s in scores])
    if sure:
        every.scatter_(-1, every.topk(sure, -1).indices, torch.inf)
    order = every.flatten().argsort(descending=True, stable=True)[: each * len(every)]
    counts = torch.bincount(order // every.shape[1], minlength=len(every))
    return [c.tolist() for c in counts.split([len(s) for s in scores])]


@dataclass(frozen=True)
class Threshold(Sized):
    """All tokens whose score is at least `at`; beside the protected ones the best `tokens` of them,
    if that is not 0."""

    at: float = 0.0
    name: ClassVar[str] = "threshold"

    def told(self, tokens: int) -> Threshold:
        return self

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        return [(s.shape[1] - self._low(s)).tolist() for s in scores]

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        return tokens, heads * tokens

    def limit(self, counts: Sequence[int], tokens: int, measures: Sequence[float]
              ) -> list[int]:
        return [UNBOUNDED] * len(counts)

    def below(self, score: Tensor, position: Tensor, newest: Tensor, limit: Tensor
              ) -> tuple[Tensor, Tensor]:
        """Scores [N, slots] by which tokens leave, and how many of each head do; those that are
        infinite do not. `position` is theirs, `newest` [N] that of the last token."""
        return score, self._low(score)

    def _low(self, score: Tensor) -> Tensor:
        low = (score < self.at).sum(1)
        if not self.tokens:
            return low
        return low + (score.isfinite().sum(1) - low - self.tokens).clamp(min=0)


@dataclass(frozen=True)
class TopP(Sized):
    """The fewest tokens of each head that have the share `p` of its scores, which are weights;
    protected ones beside them."""

    p: float = 0.95
    name: ClassVar[str] = "topp"

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        out = []
        for s in scores:
            stays = s.isposinf()
            best = s.masked_fill(stays, 0.0).clamp(min=0).double().sort(-1, descending=True).values
            need = best.cumsum(-1) - best < self.p * best.sum(-1, keepdim=True)
            out.append((stays.sum(-1) + need.sum(-1)).tolist() if self.p < 1 else
                       [s.shape[1]] * len(s))
        return out

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        return tokens, heads * tokens


@dataclass(frozen=True)
class WholeChunks(Sized):
    """ChunkKV: as many whole chunks of `length` tokens as fit; at least one."""

    length: int = 10
    name: ClassVar[str] = "chunks"

    def _chunks(self, tokens: int) -> int:
        every = -(-tokens // self.length)
        if self.tokens:
            return max(1, min(every, self.tokens // self.length))
        return max(1, int(every * self.ratio + 1e-9))

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        out = []
        for s in scores:
            starts = s[0, :: self.length]
            best = starts.argsort(descending=True, stable=True)[: self._chunks(s.shape[1])]
            held = (best + 1) * self.length
            each = int((held.clamp(max=s.shape[1]) - best * self.length).sum())
            out.append([each] * len(s))
        return out

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        each = min(tokens, self._chunks(tokens) * self.length)
        return each, heads * each


@dataclass(frozen=True)
class PerPart(Sized):
    """FINCH: the share `ratio` of every part of `length` tokens, at least one."""

    length: int = 512
    name: ClassVar[str] = "parts"

    def _tokens(self, tokens: int) -> int:
        whole, rest = divmod(tokens, self.length)
        last = max(1, int(rest * self.ratio)) if rest else 0
        return whole * max(1, int(self.length * self.ratio)) + last

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        return [[max(self._tokens(s.shape[1]), int((row > 0).sum())) for row in s] for s in scores]

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        each = self._tokens(tokens)
        return each, heads * each


@dataclass(frozen=True)
class ByHead(Sized):
    """A static map of a layer: `of[head]` tokens, 0 for all; or the share `share`, if that is more.
    """

    of: tuple[int, ...] = ()
    share: float = 0.0
    name: ClassVar[str] = "byhead"

    def told(self, tokens: int) -> ByHead:
        each = tuple(max(n, int(self.share * tokens)) if n else 0 for n in self.of)
        return replace(self, of=each, share=0.0)

    def _of(self, tokens: int) -> list[int]:
        return [max(n, int(self.share * tokens)) if n else UNBOUNDED for n in self.of]

    def unfit(self, heads: int, dim: int) -> str:
        """Why it is not for a layer of so many kv heads; ``""`` if it is."""
        return "" if len(self.of) == heads else (f"a map of {len(self.of)} heads for a layer of "
                                                 f"{heads} kv heads")

    def counts(self, scores: Sequence[Tensor], measures: Sequence[float]) -> list[list[int]]:
        return [[min(n, s.shape[1]) for n in self._of(s.shape[1])] for s in scores]

    def most(self, tokens: int, heads: int) -> tuple[int, int]:
        each = [min(n, tokens) for n in self._of(tokens)]
        return max(each), sum(each)

    def least(self, tokens: int) -> int:
        """The smallest number that a head keeps."""
        return min(min(n, tokens) for n in self._of(tokens))

    def limit(self, counts: Sequence[int], tokens: int, measures: Sequence[float]
              ) -> list[int]:
        return self._of(tokens)


BUDGETS = (Uniform, All, Pyramid, Pooled, Everywhere, Threshold, TopP, WholeChunks, PerPart,
           ByHead)
