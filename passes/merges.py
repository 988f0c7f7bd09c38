"""Merges: what becomes of the tokens that are not kept. Counts are 1, but for `Rest`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize


def _dropped(tokens: int, kept: Tensor) -> Tensor:
    gone = torch.ones(tokens, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero().flatten()


@dataclass(frozen=True)
class CaM:
    """CaM: V of a dropped token, over `next`, is added to the next `next` kept ones.

    It happens with the probability clamp(s / mean of those tokens' scores, 0, 1); the key is
    dropped. What is drawn is the same for every head, by `seed`.
    """

    next: int = 32
    seed: int = 0
    name: ClassVar[str] = "cam"

    def into(self, k: Tensor, v: Tensor, scores: Tensor, kept: Sequence[Tensor]
             ) -> tuple[Tensor, Tensor]:
        out = v.float().clone()
        draws = torch.rand(v.shape[1], generator=torch.Generator().manual_seed(self.seed))
        for head, at in enumerate(kept):
            gone = _dropped(v.shape[1], at)
            place = torch.searchsorted(at, gone)[:, None] + torch.arange(self.next)  # [gone, next]
            there = place < len(at)
            near = scores[head, at[place.clamp(max=len(at) - 1)]]
            seen = there & near.isfinite()
            mean = torch.where(seen, near, 0.0).sum(1) / seen.sum(1).clamp(min=1)
            own = scores[head, gone]
            chance = torch.where(seen.any(1), (own / mean.clamp(min=1e-12)).clamp(0, 1), 1.0)
            there &= (draws[gone] < chance)[:, None]
            share = v[head, gone].float() / there.sum(1, keepdim=True).clamp(min=1)
            victim, column = there.nonzero(as_tuple=True)
            out[head].index_add_(0, at[place[victim, column]], share[victim])
        return k, out


@dataclass(frozen=True)
class Nearest:
    """D2O: a dropped token goes into the kept one of the most similar key, if that is similar.

    The threshold is the mean of the dropped tokens' largest cosines. Weights are exp(cosine) over
    their sum, with e for the kept token itself.
    """

    name: ClassVar[str] = "nearest"

    def into(self, k: Tensor, v: Tensor, scores: Tensor, kept: Sequence[Tensor]
             ) -> tuple[Tensor, Tensor]:
        new = [k.float().clone(), v.float().clone()]
        unit = normalize(k.float(), dim=-1)
        for head, at in enumerate(kept):
            gone = _dropped(k.shape[1], at)
            if not len(gone):
                continue
            best, where = (unit[head, gone] @ unit[head, at].T).max(-1)
            joins = best >= float(best.mean())
            weight = torch.zeros(len(at), device=k.device) + torch.e
            weight.index_add_(0, where[joins], best[joins].exp())
            for x, y in zip((k, v), new, strict=True):
                total = x[head, at].float() * torch.e
                total.index_add_(0, where[joins], x[head, gone[joins]].float()
                                 * best[joins].exp()[:, None])
                y[head, at] = total / weight[:, None]
        return new[0], new[1]


@dataclass(frozen=True)
class Runs:
    """KVMerger: every run of `runs` becomes its kept token, the pivot.

    It weighs each token of the run by exp(-|k_p - k_j|^2 / (2 sigma^2)) over the sum of these,
    sigma being the mean distance.
    """

    alike: float = 0.75
    name: ClassVar[str] = "runs"

    def into(self, k: Tensor, v: Tensor, scores: Tensor, kept: Sequence[Tensor]
             ) -> tuple[Tensor, Tensor]:
        new = [k.float().clone(), v.float().clone()]
        for head, at in enumerate(kept):
            if not len(at):
                continue
            keys, run = k[head].float(), runs(k[head], scores[head].isposinf(), self.alike)
            size, pivots = run.bincount(), run[at].bincount(minlength=int(run[-1]) + 1)
            pivot = torch.zeros_like(size)
            pivot[run[at]] = at
            far = (keys - keys[pivot[run]]).norm(dim=-1)
            sigma = _sums(far, run, size) / (size - 1).clamp(min=1)
            weight = torch.exp(-far**2 / (2 * sigma[run]**2).clamp(min=1e-12))
            weight /= _sums(weight, run, size)[run]
            own = at[((size > 1) & (pivots == 1))[run[at]]]
            for x, y in zip((k, v), new, strict=True):
                y[head, own] = _sums(x[head].float() * weight[:, None], run, size)[run[own]]
        return new[0], new[1]


@dataclass(frozen=True)
class Rest:
    """RazorAttention: one slot stands for all that a head drops, their mean, and counts them
    (`kernels/rest.py`)."""

    name: ClassVar[str] = "rest"
    apart: ClassVar[bool] = True


def runs(keys: Tensor, whole: Tensor, alike: float) -> Tensor:
    """The number [T] of the run that each token is in: of keys [T, D] in which neighbours have a
    cosine above `alike`; tokens that stay `whole` (bool [T]) are runs of their own."""
    unit = normalize(keys.float(), dim=-1)
    apart = ((unit[1:] * unit[:-1]).sum(-1) <= alike) | whole[1:] | whole[:-1]
    return torch.cat([apart.new_zeros(1), apart])[: len(keys)].cumsum(0)


def _sums(x: Tensor, run: Tensor, size: Tensor) -> Tensor:
    """[runs, ..]: the sums of x [T, ..] over each run."""
    return x.new_zeros(len(size), *x.shape[1:]).index_add_(0, run, x)


MERGES = (CaM, Nearest, Runs, Rest)
