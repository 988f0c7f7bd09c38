"""What the storage of a layer promises: contracts from the data, and keys that are made at read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.ir import ROPE
from kvcompile.laws import Contract, View, projected, rotated
from kvcompile.prompt import Prompt
from kvcompile.store import Store


def contract(store: Store, k: Tensor, v: Tensor, member: int = 0) -> Contract:
    """What `store` promises of tokens k [H, T, Dk], v [H, T, Dv] that it was given, from them.

    Of a store with members k and v are those of all of them side by side, and the promise is of
    the one of number `member`. Tokens of exact tiers are as they were; those of the body within
    their format's bound, and 16 roundings of the sums that decoding makes itself; others may be
    absent.
    """
    eps: dict[str, Tensor] = {}
    for side, x in zip(store.sides, (k, v), strict=False):
        span = store.spans(side, x.shape[1])["body"]
        eps[side] = torch.zeros(x.shape, dtype=torch.float64)
        if span.end:
            fmt, at = store.side(side).format, slice(store.sinks, store.sinks + span.end)
            body = x[:, at]                # formats may store some numbers in the model's type
            planes = fmt.encode(body, side)
            bound = fmt.error_bound(planes, x.shape[-1], side).double()
            if bool(bound.any()):
                bound += 16 * 2.0**-23 * (body.float().abs().amax((1, 2), keepdim=True) + bound)
            eps[side][:, at] = bound
        dim = x.shape[-1] // store.members
        eps[side] = eps[side].narrow(-1, member * dim, dim)
    if store.v_in_k:
        eps["v"] = eps["k"][..., : v.shape[-1]]
    kept = torch.tensor(store.numbers(k.shape[1]), dtype=torch.long)
    dropped = torch.ones(k.shape[:2], dtype=torch.bool).index_fill(1, kept, False)
    return Contract(eps["k"], eps["v"], dropped)


def selected(store: Store, held: Tensor, ids: Tensor, k: Tensor, v: Tensor) -> Contract:
    """`contract` where each head was given tokens of its own choice.

    `held` [H, N] are the position ids of a head's slots (-1 fills), `ids` [T] those of all tokens k
    [H, T, Dk], v [H, T, Dv].
    """
    out = Contract.exact(k, v)
    out.dropped[:] = True
    for head, slots in enumerate(held if len(ids) else ()):
        at = (slots[slots >= 0][:, None] == ids[None]).int().argmax(1)
        own = contract(store, k[head : head + 1, at], v[head : head + 1, at])
        for every, mine in zip((out.k, out.v, out.dropped), (own.k, own.v, own.dropped),
                               strict=True):
            every[head, at] = mine[0]
        if store.rest:
            _compensate(out, head, contract(store, k[head : head + 1], v[head : head + 1]), k, v)
    return out


def _compensate(out: Contract, head: int, stored: Contract, k: Tensor, v: Tensor) -> None:
    """Dropped tokens of a head are seen as their mean, of numbers within `stored` of their own,
    summed in fp32."""
    gone = out.dropped[head].clone()
    for eps, own, x in ((out.k, stored.k, k[head]), (out.v, stored.v, v[head])):
        there = x[gone].double()
        if len(there):
            slack = own[0, gone].mean(0) + 2 * len(there) * 2.0**-23 * there.abs().amax(0)
            eps[head, gone] = (there - there.mean(0)).abs() + slack
    out.dropped[head] = False


def declared(view: View, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V that a store was given where kept tokens are changed (others merged into them, or
    channels pruned): what it shows of these, and the others as they are. The distance from k and v
    is what the change declares.
    """
    at, kept = view.where.clamp_min(0), (view.where >= 0)[..., None]
    new = (torch.where(kept, slots.gather(1, at[..., None].expand(-1, -1, x.shape[-1])), x.double())
           if slots.shape[1] else x.double()
           for slots, x in ((view.k, k), (view.v, v)))
    return next(new), next(new)


def turned(k: Tensor, held: Tensor, ids: Tensor, angles: Tensor, style: str
           ) -> tuple[Tensor, Tensor]:
    """Keys [H, T, Dk] of a prompt with position ids [T], those that are kept (ids `held` [H, N],
    -1 fills) turned to lie side by side at the prompt's end; how far fp32 may be from that.

    The rotary `angles` are [T, R], or half of them, in `style`.
    """
    rates, out, slack = Prompt(k, k, k, ids, 1.0, angles=angles.float(), style=style).rates, (
        k.double().clone()), torch.zeros(k.shape, dtype=torch.float64)
    for head, slots in enumerate(held):
        at = (slots[slots >= 0][:, None] == ids[None]).int().argmax(1).sort().values
        to = torch.arange(int(ids[-1]) - len(at) + 1, int(ids[-1]) + 1)
        by = (to - ids[at])[:, None] * rates.double()
        by = by.repeat_interleave(2, -1) if style == "interleaved" else torch.cat([by, by], -1)
        own, dim = out[head, at], by.shape[-1]
        out[head, at] = ROPE(own[None, None], by.cos(), by.sin(), style=style)[0, 0]
        slack[head, at, :dim] = rotated(own[:, :dim].abs(), style)
    return out, slack * (2.0**-20 + torch.finfo(k.dtype).eps)


class Rebuilt(NamedTuple):
    """Keys K_i = R_i (basis s_i + offset) of what is stored, s_i: basis [H', Dk, r], offset
    [H', Dk], cos and sin [B or 1, 1, N, R] of N tokens by number, or of one row [N, R].

    It shares no code with kernels/rebuild.py, so that a fault there shows.
    """

    basis: Tensor | None
    offset: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    style: str

    @property
    def idle(self) -> bool:
        """Whether keys are stored as they are read."""
        return self.basis is None and self.cos is None

    def row(self, row: int) -> Rebuilt:
        cos, sin = (None if x is None else x[row % len(x), 0] for x in (self.cos, self.sin))
        return self._replace(cos=cos, sin=sin)

    def each(self, x: Tensor) -> Tensor:
        """x [H, ...] for the heads of the keys."""
        return x if self.basis is None else x.repeat_interleave(len(self.basis) // len(x), 0)

    def keys(self, s: Tensor, at: Tensor) -> Tensor:
        """K [H', N, Dk] in fp64 of s [H, N, r], the tokens of numbers at [H, N]."""
        x = self.each(s.double())
        if self.basis is not None:
            x = x @ self.basis.double().transpose(-1, -2)
        x = x if self.offset is None else x + self.offset.double()[:, None]
        if self.cos is None or self.sin is None:
            return x
        cos, sin = (self.each(y.double()[at])[None] for y in (self.cos, self.sin))
        return ROPE(x[None], cos, sin, style=self.style)[0]

    def errors(self, eps: Tensor, offset: bool = False) -> Tensor:
        """How far keys [H', N, Dk] are off, of which what is stored is by eps [H, N, r]; with
        `offset` as if the offset were an error, too."""
        x = self.each(eps.double())
        x = x if self.basis is None else projected(x, self.basis)
        if offset and self.offset is not None:
            x = x + self.offset.double().abs()[:, None]
        if self.cos is None:
            return x
        dim = self.cos.shape[-1]
        return torch.cat([rotated(x[..., :dim], self.style), x[..., dim:]], -1)

    def rough(self, s: Tensor, dtype: torch.dtype) -> Tensor:
        """What computing keys from s rounds: sums of r products, and a few numbers in `dtype`."""
        n = s.shape[-1] + 4
        return self.errors(s.abs(), offset=True) * (
            n * 2.0**-24 / (1 - n * 2.0**-24) + 4 * torch.finfo(dtype).eps)

    def view(self, view: View, numbers: Tensor) -> View:
        """The view of keys that `view` of stored numbers gives; token i has number numbers[i]."""
        at = torch.zeros(view.k.shape[:2], dtype=torch.long)
        given = torch.where(view.where >= 0, numbers, 0)
        at.scatter_reduce_(1, view.where.clamp_min(0), given, "amax")
        return View(self.keys(view.k, at), *map(self.each, (view.v, view.where, view.count)))

    def contract(self, c: Contract) -> Contract:
        """The contract of keys that one of stored numbers gives."""
        return Contract(self.errors(c.k), self.each(c.v), self.each(c.dropped))
