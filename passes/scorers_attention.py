"""Scorers that ask what attention looks at. None of them forms an N x N matrix."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvcompile.prompt import Prompt
from kvcompile.recipe import Term
from kvcompile.rule import Around, named


def pooled(x: Tensor, kernel: int, how: str = "avg") -> Tensor:
    """x [..., T] smoothed over `kernel` neighbours, zeros beyond the ends."""
    if kernel == 1 or not x.shape[-1]:
        return x
    pool = avg_pool1d if how == "avg" else max_pool1d
    flat = x.reshape(1, -1, x.shape[-1])
    return pool(flat, kernel, stride=1, padding=kernel // 2)[..., : x.shape[-1]].reshape(x.shape)


def protect(x: Prompt, scores: Tensor) -> Tensor:
    """[H, T]: `scores` of the first tokens, infinite for the others."""
    out = torch.full((x.heads, x.tokens), torch.inf, device=scores.device)
    out[:, : scores.shape[-1]] = scores
    return out


def window_of(x: Prompt, window: int) -> int:
    """Queries that look: the question if its length is known, else `window`."""
    return min(x.question or window, x.tokens)


@dataclass(frozen=True)
class Window:
    """SnapKV: mean weight that the last `window` queries give, smoothed; they stay themselves.

    The mean is over the queries and over the query heads of a kv head. `gamma` adds that much of
    the variance over the queries (CAKE); `visible` multiplies a query's weights by the tokens that
    it sees (FINCH).
    """

    window: int = 32
    kernel: int = 5
    pool: str = "avg"
    gamma: float = 0.0
    visible: bool = False
    name: ClassVar[str] = "window"
    asks: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def prompt(self, x: Prompt) -> Tensor:
        window = window_of(x, self.window)
        w = x.looked(window)
        if self.visible:
            seen = torch.arange(x.tokens - window, x.tokens, device=w.device, dtype=w.dtype)
            w = w * seen[:, None]
        s = w.mean(2)
        if self.gamma and w.numel():
            s = s + self.gamma * w.var(2, correction=int(window > 1))
        return protect(x, pooled(s, self.kernel, self.pool).mean(1))

    @property
    def looks(self) -> int:
        return self.window

    def observe(self, score: Tensor, mass: Tensor, new: Tensor) -> Tensor:
        return running(score, mass, new, self.window)


def running(score: Tensor, mass: Tensor, new: Tensor, window: int) -> Tensor:
    """A mean of the weights of about the last `window` queries: of as many at once, which gave
    `mass`, their own. What is `new`, or of a prompt's window (infinite), begins with those."""
    queries = new.sum(-1, keepdim=True).clamp(1, window)
    mean = score * (1 - queries / window) + mass / window
    return torch.where(new | score.isinf(), mass / queries, mean)


@dataclass(frozen=True)
class Received:
    """H2O: the weight that a token has received from all queries; `mean`: per query that sees it.

    While decoding, the weights that each step gives are added. A query later, a weight counts
    `decay` times as much (A2SF); of several at once each for as much as their mean.
    """

    how: str = "sum"
    decay: float = 1.0
    name: ClassVar[str] = "received"
    looks: ClassVar[int] = 0
    weighs: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def cpp(self) -> str:
        return "fresh ? mass : score + mass" if self.decay == 1 else ""  # a fused sum rounds less

    def prompt(self, x: Prompt) -> Tensor:
        total, row = torch.zeros(x.heads, x.k.shape[1], device=x.k.device), 0
        for w in x.weights(0, x.tokens):
            if self.decay != 1:
                ago = x.tokens - 1 - row - torch.arange(w.shape[2], device=w.device)
                w = w * self.decay ** ago[:, None]
                row += w.shape[2]
            total += w.sum((1, 2))
        total = total[:, : x.tokens] / x.queries.shape[1]
        if self.how == "mean":
            total = total / torch.arange(x.tokens, 0, -1, device=total.device)
        return total

    def observe(self, score: Tensor, mass: Tensor, new: Tensor) -> Tensor:
        """Scores [N, slots] after a step whose queries gave `mass` (mean over a kv head's)."""
        if self.decay == 1:
            return torch.where(new, mass, score + mass)
        queries = new.sum(-1, keepdim=True).clamp(min=1)
        far = self.decay**queries
        mass = mass * (1 - far) / (queries * (1 - self.decay))
        return torch.where(new, mass, far * score + mass)


@dataclass(frozen=True)
class Last:
    """TOVA: the weight that the last query gives, mean over all heads; all keep the same."""

    name: ClassVar[str] = "last"
    weighs: ClassVar[bool] = True
    cpp: ClassVar[str] = "mass"
    looks: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[bool] = True

    def prompt(self, x: Prompt) -> Tensor:
        w = next(x.weights(x.tokens - 1, x.tokens))[:, :, 0, : x.tokens - 1]
        return protect(x, w.mean((0, 1)).expand(x.heads, -1))

    def observe(self, score: Tensor, mass: Tensor, new: Tensor) -> Tensor:
        return mass


@dataclass(frozen=True)
class Ignored:
    """Scissorhands: how often, in the last `history` queries of a call, a token got less than its
    share.

    A query that sees t tokens gives each 1 / t on average; the count is taken off.
    """

    history: int = 400
    name: ClassVar[str] = "ignored"
    cpp: ClassVar[str] = "(fresh ? 0.0f : score) - (mass < 1.0f / held ? 1.0f : 0.0f)"
    low: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def looks(self) -> int:
        return self.history

    def prompt(self, x: Prompt) -> Tensor:
        first, row = max(0, x.tokens - self.history), max(0, x.tokens - self.history)
        low = torch.zeros(x.heads, x.k.shape[1], device=x.k.device)
        at = torch.arange(x.k.shape[1], device=low.device)
        for w in x.weights(first, x.tokens):
            queries = torch.arange(row, row + w.shape[2], device=low.device)[:, None]
            low += ((w.mean(1) < 1 / (queries + 1)) & (at <= queries)).sum(1)
            row += w.shape[2]
        return -low[:, : x.tokens]

    def observe(self, score: Tensor, mass: Tensor, new: Tensor) -> Tensor:
        """`mass`: what one query gave, or of several how many gave less than a token's share."""
        held = (mass > 0).sum(-1, keepdim=True).clamp(min=1)
        several = new.sum(-1, keepdim=True) > 1
        return torch.where(new, 0.0, score) - torch.where(several, mass, (mass < 1 / held).float())


@dataclass(frozen=True)
class Repeat:
    """KVzip: the largest weight that the prompt, read a second time, gives; over queries and heads.

    The second reading is `x.tokens` columns behind the prompt, which are not stored.
    """

    name: ClassVar[str] = "repeat"
    weighs: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("probe",)

    def prompt(self, x: Prompt) -> Tensor:
        best = torch.zeros(x.heads, x.tokens, device=x.k.device)
        for w in x.weights(x.tokens):
            best = torch.maximum(best, w[..., : x.tokens].amax((1, 2)))
        return best


@dataclass(frozen=True)
class Critical(Around):
    """CriticalKV: the share `first` of the budget by another scorer, the rest by what is lost in
    the output: (score + eps) * |W_o v|_1, mean over the query heads. Where `count`, the budget,
    gives heads different numbers, the other scorer says which."""

    of: Term
    count: Term
    first: float = 0.5
    eps: float = 1e-4
    name: ClassVar[str] = "critical"
    also: ClassVar[tuple[str, ...]] = ("weight",)

    def prompt(self, x: Prompt) -> Tensor:
        assert x.weight is not None
        base = self.base.prompt(x)
        budget = named("budget", self.count)
        counts = budget.counts([base], [0.0])[0]
        group = x.queries.shape[1]
        columns = x.weight.float().view(x.weight.shape[0], x.heads, group, -1)
        norms = torch.stack([
            torch.stack([(x.values[h] @ columns[:, h, g].T).abs().sum(-1) for g in range(group)])
            .mean(0) for h in range(x.heads)])
        out = (base + self.eps) * norms
        for own, head, count in zip(out, base, counts, strict=True):
            own[head.topk(int(count * self.first)).indices] = torch.inf
            own[head.isposinf()] = torch.inf
            if not budget.across and not hasattr(budget, "told"):  # it must find the same numbers
                own[own.topk(count).indices] = torch.inf
        return out


@dataclass(frozen=True)
class Normalized:
    """ZipCache: the mean weight that a token gets from the queries that see it (arXiv:2405.14256,
    section 4.2).

    Of a prompt's queries only probes look: the share `recent` of the newest, and the share `random`
    of the others, the same for prompts of a length; they stand for all of them. While decoding
    all queries do.
    """

    recent: float = 0.05
    random: float = 0.05
    name: ClassVar[str] = "normalized"
    weighs: ClassVar[bool] = True
    looks: ClassVar[int] = 0
    needs: ClassVar[tuple[str, ...]] = ()

    def probes(self, tokens: int) -> Tensor:
        """Numbers of the queries that look, ascending; the last one always does."""
        newest = max(1, math.ceil(self.recent * tokens))
        some = min(math.ceil(self.random * tokens), tokens - newest)
        drawn = torch.randperm(tokens - newest, generator=torch.Generator().manual_seed(tokens))
        return torch.cat([drawn[:some].sort().values, torch.arange(tokens - newest, tokens)])

    def prompt(self, x: Prompt) -> Tensor:
        at = self.probes(x.tokens)
        total = torch.zeros(x.heads, x.tokens, device=x.k.device)
        for w in x.of(at):
            total += w[..., : x.tokens].mean(1).sum(1)
        return total / (at[:, None] >= torch.arange(x.tokens)).sum(0).to(total.device)

    def averaged(self, score: Tensor, mass: Tensor, seen: Tensor, queries: Tensor) -> Tensor:
        """The means [.., T] after a call that gave `mass`: `seen` [T] queries saw a token by now,
        `queries` of them in this call."""
        return (score * (seen - queries) + mass) / seen


SCORERS = (Window, Received, Last, Ignored, Repeat, Critical, Normalized)
