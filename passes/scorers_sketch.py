"""Scorers that read keys through random projections, and Compactor's attention beside them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.passes.scorers_attention import pooled
from kvcompile.prompt import Prompt
from kvcompile.recipe import Term
from kvcompile.rule import Around, named

RIDGE = 1e-2  # added to X^T X, as in the published code


def inner(x: Prompt, sinks: int, window: int) -> slice:
    """The tokens between the first `sinks` and the newest `window`."""
    first = min(sinks, x.tokens)
    return slice(first, max(first, x.tokens - window))


def standard(x: Prompt, at: slice, scores: Tensor) -> Tensor:
    """[H, T]: `scores` [H, n] of the tokens `at`, less their mean, over their standard deviation
    (of all heads); infinite elsewhere."""
    out = torch.full((x.heads, x.tokens), torch.inf, device=x.k.device)
    if scores.numel() > 1:
        out[:, at] = (scores - scores.mean()) / scores.std().clamp(min=1e-6)
    return out


@dataclass(frozen=True)
class Leverage:
    """The statistical leverage of keys before their rotation: the diagonal of X (X^T X)^-1 X^T.

    X are a head's keys, less their mean, times a Gaussian matrix of `sketch` columns, drawn by
    `seed` for each layer (0: the keys themselves). Compared over all heads. The first `sinks` and
    the newest `window` tokens are left out, and stay.
    """

    sketch: int = 48
    sinks: int = 8
    window: int = 4
    seed: int = 0
    name: ClassVar[str] = "leverage"
    needs: ClassVar[tuple[str, ...]] = ("angles",)

    def prompt(self, x: Prompt) -> Tensor:
        at = inner(x, self.sinks, self.window)
        keys = x.unrotated(x.keys)[:, at]
        if not keys.shape[1]:
            return standard(x, at, keys[..., 0])
        keys = keys - keys.mean(1, keepdim=True)
        if self.sketch:
            keys = keys @ self.drawn(x, keys.shape[-1])
        gram = keys.mT @ keys + RIDGE * torch.eye(keys.shape[-1], device=keys.device)
        solved = torch.cholesky_solve(keys.mT, torch.linalg.cholesky(gram))
        return standard(x, at, (keys * solved.mT).sum(-1).clamp(min=0))

    def drawn(self, x: Prompt, dim: int) -> Tensor:
        """[H, dim, sketch]."""
        random = torch.Generator().manual_seed(self.seed * 1000003 + x.layer)
        return (torch.randn(x.heads, dim, self.sketch, generator=random) / self.sketch**0.5
                ).to(x.k.device)


@dataclass(frozen=True)
class Mutual:
    """Compactor's attention: the weight that a token gets from all tokens of its chunk, later ones
    too, times |v|, smoothed over 3 neighbours.

    A chunk is `chunk` tokens; logits are not scaled, as published. Protected tokens as of
    `Leverage`, and compared over all heads, too.
    """

    chunk: int = 256
    sinks: int = 8
    window: int = 4
    name: ClassVar[str] = "mutual"
    needs: ClassVar[tuple[str, ...]] = ()

    def prompt(self, x: Prompt) -> Tensor:
        at = inner(x, self.sinks, self.window)
        q, k = (t.split(self.chunk, -2) for t in (x.queries[:, :, at], x.keys[:, None, at]))
        got = [(a @ b.mT).softmax(-1).sum(2).mean(1) for a, b in zip(q, k, strict=True)]
        scores = torch.cat(got, -1) * x.values[:, at].norm(dim=-1)
        return standard(x, at, pooled(scores, 3))


@dataclass(frozen=True)
class Blend(Around):
    """The scores of `of`, and the share `share` of those of `by`."""

    of: Term
    by: Term
    share: float = 0.5
    name: ClassVar[str] = "blend"

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.base.needs, *named("scorer", self.by).needs)

    def prompt(self, x: Prompt) -> Tensor:
        both = self.base.prompt(x), named("scorer", self.by).prompt(x)
        stays = both[0].isposinf() | both[1].isposinf()
        a, b = (s.masked_fill(stays, 0.0) for s in both)
        return (a + self.share * b).masked_fill(stays, torch.inf)


@dataclass(frozen=True)
class Hashed:
    """HashEvict's similarity: of a key and the last `window` queries, how many of `bits` random
    hyperplanes have both on one side, summed over these queries and the query heads."""

    bits: int = 16
    window: int = 1
    seed: int = 0
    name: ClassVar[str] = "hashed"
    needs: ClassVar[tuple[str, ...]] = ()

    def prompt(self, x: Prompt) -> Tensor:
        random = torch.Generator().manual_seed(self.seed * 1000003 + x.layer)
        planes = torch.randn(x.k.shape[-1], self.bits, generator=random).to(x.k.device)
        q = x.queries[:, :, max(0, x.tokens - self.window) : x.tokens]
        key, query = (torch.where(t @ planes > 0, 1.0, -1.0) for t in (x.keys, q))
        out = (key @ query.sum((1, 2))[..., None])[..., 0]        # whole numbers: agreed less not
        out[:, max(0, x.tokens - self.window):] = torch.inf
        return out


SCORERS = (Leverage, Mutual, Blend, Hashed)
