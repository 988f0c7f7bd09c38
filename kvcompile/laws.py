"""The laws that every compression of a KV cache obeys, in fp64 (docs/laws.md proves them).

One row of one layer: a query q [Hq, Dk] and the tokens that it may see, K [H, T, Dk] and
V [H, T, Dv]; query head i reads kv head i // (Hq / H). Exact attention is

    o = sum_i p_i V_i,    p_i ~ exp(f(scale q.K_i)),    f(x) = x, or c tanh(x / c) with softcap c

and a sink is one more logit, whose value is 0. A compression shows attention a `View` of the
tokens, and promises by a `Contract` how far that is from them. Then (`bound`)

    |o' - o| <= (m + tanh(d / 2)) spread(V) + max eps_v,    d = scale max_i sum_c |q_c| eps_k[i, c]

with m the exact softmax mass of the dropped tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """The logical cache: slots k [H, N, Dk] and v [H, N, Dv], of which slot where[h, i] stands for
    token i (-1: none does) and count[h, j] tokens stand in slot j."""

    k: Tensor
    v: Tensor
    where: Tensor
    count: Tensor

    @staticmethod
    def of(k: Tensor, v: Tensor, where: Tensor) -> View:
        """The view in which every slot counts the tokens that it stands for."""
        count = torch.zeros(k.shape[:2], dtype=torch.float64)
        kept = where >= 0
        count.scatter_add_(1, where.clamp_min(0), kept.double())
        return View(k.double(), v.double(), where, count)

    @staticmethod
    def exact(k: Tensor, v: Tensor) -> View:
        """Every token stands for itself."""
        return View.of(k, v, torch.arange(k.shape[1]).expand(k.shape[:2]))

    def __getitem__(self, tokens: slice) -> View:
        """What it shows of some tokens only; slots of others count none."""
        return View.of(self.k, self.v, self.where[:, tokens])

    def then(self, later: View) -> View:
        """What is seen when `later` views the slots of this view."""
        where = later.where.gather(1, self.where.clamp_min(0))
        return View.of(later.k, later.v, torch.where(self.where < 0, -1, where))


@dataclass(frozen=True)
class Contract:
    """|K'[where[i]] - K[i]| <= k[i], the same of v, elementwise; only `dropped` tokens are absent.

    k [H, T, Dk], v [H, T, Dv], dropped [H, T] bool. What a token that is dropped is off by does
    not matter. Contracts of passes that follow each other add.
    """

    k: Tensor
    v: Tensor
    dropped: Tensor

    @staticmethod
    def exact(k: Tensor, v: Tensor) -> Contract:
        """Nothing is changed and nothing dropped."""
        zero = [torch.zeros(x.shape, dtype=torch.float64) for x in (k, v)]
        return Contract(zero[0], zero[1], torch.zeros(k.shape[:2], dtype=torch.bool))

    def __add__(self, other: Contract) -> Contract:
        return Contract(self.k + other.k, self.v + other.v, self.dropped | other.dropped)

    def __getitem__(self, tokens: slice) -> Contract:
        """On some tokens only."""
        return Contract(self.k[:, tokens], self.v[:, tokens], self.dropped[:, tokens])

    def extended(self, tokens: int) -> Contract:
        """With so many exact tokens more."""
        return Contract(*(torch.cat([x, x.new_zeros(len(x), tokens, *x.shape[2:])], 1)
                          for x in (self.k, self.v, self.dropped)))

    def through(self, view: View) -> Contract:
        """This contract, on the slots of `view`, as one on the tokens that they stand for."""
        at = view.where.clamp_min(0)
        k, v = (x.gather(1, at[..., None].expand(-1, -1, x.shape[-1])) for x in (self.k, self.v))
        return Contract(k, v, self.dropped.gather(1, at) | (view.where < 0))


def fault(view: View, contract: Contract, k: Tensor, v: Tensor) -> str:
    """How `view` of the tokens k, v breaks its contract, or ``""``."""
    absent = view.where < 0
    if bool((absent & ~contract.dropped).any()):
        head, token = (absent & ~contract.dropped).nonzero()[0].tolist()
        return f"token {token} of kv head {head} is not stored"
    told = View.of(view.k, view.v, view.where)
    if not torch.equal(view.count, told.count):
        return "a slot counts other tokens than it stands for"
    at = view.where.clamp_min(0)
    for name, slots, x, eps in (("K", view.k, k, contract.k), ("V", view.v, v, contract.v)):
        own = slots.gather(1, at[..., None].expand(-1, -1, x.shape[-1])) if at.numel() else slots
        over = ((own - x.double()).abs() - eps).masked_fill(absent[..., None], -1.0)
        over = over.nan_to_num(torch.inf)
        if bool((over > 0).any()):
            head, token, c = (over == over.max()).nonzero()[0].tolist()
            return (f"{name} of token {token}, kv head {head}, channel {c} is off by "
                    f"{float((own - x)[head, token, c].abs()):.3g}, allowed "
                    f"{float(eps[head, token, c]):.3g}")
    return ""


class How(NamedTuple):
    """How a layer attends: scale, soft cap (0: none), sinks' logits [Hq] or None."""

    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None


def masses(q: Tensor, view: View, how: How) -> Tensor:
    """Softmax weights [Hq, N] of the slots, of which a sink takes its share."""
    logits = how.scale * torch.einsum("hd,hnd->hn", q.double(), heads(view.k, q))
    if how.softcap:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    logits = logits + heads(view.count, q).log()
    sinks = logits.new_full((len(q), 1), -torch.inf) if how.sinks is None else (
        how.sinks.double()[:, None])
    return torch.cat([logits, sinks], 1).softmax(-1)[:, :-1]


def oracle(q: Tensor, view: View, how: How) -> Tensor:
    """softmax(scale q K'^T + log count) V': o [Hq, Dv] in fp64."""
    return torch.einsum("hn,hnd->hd", masses(q, view, how), heads(view.v, q))


class Bound(NamedTuple):
    """How far o' may be from o [Hq, Dv], of dropped mass m and logit perturbation d [Hq]."""

    total: Tensor
    mass: Tensor
    d: Tensor


def bound(q: Tensor, k: Tensor, v: Tensor, contract: Contract, how: How) -> Bound:
    """The theorem: |oracle(q, view) - oracle(q, exact)| <= total for every view of the contract."""
    dropped = heads(contract.dropped, q)
    m = (masses(q, View.exact(k, v), how) * dropped).sum(-1)
    off = how.scale * (q.double().abs()[:, None] * heads(contract.k, q)).sum(-1)
    d = off.masked_fill(dropped, 0.0).amax(-1)
    eps_v = heads(contract.v, q).masked_fill(dropped[..., None], 0.0).amax(1)
    return Bound((m + torch.tanh(d / 2))[:, None] * spread(q, v, how) + eps_v, m, d)


def spread(q: Tensor, v: Tensor, how: How) -> Tensor:
    """[Hq, Dv]: in what range each channel of V lies; the value of a sink, 0, is one of them."""
    v = heads(v.double(), q)
    v = v if how.sinks is None else torch.cat([v, torch.zeros_like(v[:, :1])], 1)
    return v.amax(1) - v.amin(1)


def heads(x: Tensor, q: Tensor) -> Tensor:
    """x [H, ...] for the query heads of q [Hq, ...]."""
    return x.repeat_interleave(q.shape[0] // x.shape[0], 0)


def rotated(eps: Tensor, style: str = "half") -> Tensor:
    """eps [..., R] of keys before a rotation of pairs of channels by any angles, after it.

    Each of a pair (a, b) is then off by at most sqrt(eps_a^2 + eps_b^2).
    """
    a, b = eps.chunk(2, -1) if style == "half" else eps.unflatten(-1, (-1, 2)).unbind(-1)
    both = torch.sqrt(a * a + b * b)
    return torch.cat([both, both], -1) if style == "half" else both.repeat_interleave(2, -1)


def projected(eps: Tensor, basis: Tensor) -> Tensor:
    """eps [H, N, r] of numbers s, as that of basis s, where basis is [H, D, r]."""
    return eps.double() @ basis.double().abs().transpose(-1, -2)
