"""What a cache shows attention, read back from its planes, and what its store promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompile.laws import Contract, View
from kvcompile.registry import module
from kvcompile.store import Store

if TYPE_CHECKING:
    from kvcompile.cache import KVCache


def slots(cache: KVCache, layer: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """(position ids [H, N], K' [H, N, Dk], V' [H, N, Dv]) that a row of a layer holds, in fp32.

    Heads that hold fewer tokens than others are filled up with position -1. A layer that stores
    nothing itself holds what its owner does.
    """
    lead, member = cache.sites[layer].place
    group, slot = next((group, group.sites.index(site)) for group in cache.groups
                       for site in group.sites if site.layer == lead)
    pages, site = module("kernels", "pages"), group.site
    named = pages.named(group.specs, group.planes, [slot])
    ids, counts = cache.positions(layer, by_slot=True)[row], named["count"][row].tolist()
    out = [torch.zeros(site.heads, ids.shape[1], dim) for dim in site.dims]
    for side, x in zip(site.store.sides, out, strict=False):
        tiers = pages.tiers(site.store, side, named, x.shape[-1], torch.float32)
        for head, count in enumerate(counts):
            own = pages.stored(site.store, side, tiers, row, slice(head, head + 1), count)[0]
            x[head, : len(own)] = own.narrow(-1, member * x.shape[-1], x.shape[-1])
    if site.store.v_in_k:
        out[1] = out[0][..., : site.dims[1]]
    return ids, out[0], out[1]


def see(held: tuple[Tensor, Tensor, Tensor], ids: Tensor, k: Tensor, v: Tensor) -> View:
    """The view of tokens with these position ids [T] while the last S of them, exact k [H, S, Dk]
    and v [H, S, Dv], are a call's own and the others those that `held` (from `slots`) shows."""
    positions, *stored = held
    own = len(ids) - k.shape[1]
    same = positions[:, None, :] == ids[None, :own, None]                  # [H, T - S, N]
    where = torch.where(same.any(-1), same.int().argmax(-1) if same.shape[-1] else -1, -1)
    last = torch.arange(positions.shape[1], positions.shape[1] + k.shape[1])
    where = torch.cat([where, last.expand(k.shape[0], -1)], 1)
    keys, values = (torch.cat([a.double(), b.double()], 1)
                    for a, b in zip(stored, (k, v), strict=True))
    return View.of(keys, values, where)


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
            body = x[:, at].float()
            planes = fmt.encode(body, side)
            bound = fmt.error_bound(planes, x.shape[-1], side).double()
            if bool(bound.any()):
                bound += 16 * 2.0**-23 * (body.abs().amax((1, 2), keepdim=True) + bound)
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
    return out
