"""What a cache shows attention, read back from its planes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompile.laws import View
from kvcompile.registry import module
from kvcompile.store import SIDES

if TYPE_CHECKING:
    from kvcompile.cache import KVCache

REST = -2  # the position of what stands for dropped tokens


def slots(cache: KVCache, layer: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """(position ids [H, N], K' [H, N, Dk], V' [H, N, Dv]) that a row of a layer holds, in fp32.

    Heads that hold fewer tokens than others are filled up with position -1, and a slot that stands
    for all that a head has dropped has position REST. A layer that stores nothing itself holds what
    its owner does.
    """
    lead, member = cache.sites[layer].place
    group, slot = next((group, group.sites.index(site)) for group in cache.groups
                       for site in group.sites if site.layer == lead)
    pages, site = module("kernels", "pages"), group.site
    named = pages.named(group.specs, group.planes, [slot])
    ids, counts = cache.positions(layer, by_slot=True)[row], named["count"][row].tolist()
    out = [torch.zeros(site.heads, ids.shape[1], dim) for dim in site.dims]
    for side, x in zip(site.store.sides, out, strict=False):
        tiers = pages.tiers(group.store, side, named, x.shape[-1], torch.float32)
        for head, count in enumerate(counts):
            own = pages.stored(group.store, side, tiers, row, slice(head, head + 1), count)[0]
            x[head, : len(own)] = own.narrow(-1, member * x.shape[-1], x.shape[-1])
    if site.store.v_in_k:
        out[1] = out[0][..., : site.dims[1]]
    if site.store.rest:
        dropped = named["rest_count"][row, :, None].cpu() > 0
        ids = torch.cat([ids, torch.where(dropped, REST, -1)], 1)
        out = [torch.cat([x, named[f"rest_{side}"][row, :, None].cpu()], 1)
               for side, x in zip(SIDES, out, strict=True)]
    return ids, out[0], out[1]


def see(held: tuple[Tensor, Tensor, Tensor], ids: Tensor, k: Tensor, v: Tensor) -> View:
    """The view of tokens with these position ids [T] while the last S of them, exact k [H, S, Dk]
    and v [H, S, Dv], are a call's own and the others those that `held` (from `slots`) shows."""
    positions, *stored = held
    own = len(ids) - k.shape[1]
    same = positions[:, None, :] == ids[None, :own, None]                  # [H, T - S, N]
    where = torch.where(same.any(-1), same.int().argmax(-1) if same.shape[-1] else -1, -1)
    rest = positions == REST
    where = torch.where((where < 0) & rest.any(-1, keepdim=True),
                        rest.int().argmax(-1, keepdim=True) if rest.shape[-1] else -1, where)
    last = torch.arange(positions.shape[1], positions.shape[1] + k.shape[1])
    where = torch.cat([where, last.expand(k.shape[0], -1)], 1)
    keys, values = (torch.cat([a.double(), b.double()], 1)
                    for a, b in zip(stored, (k, v), strict=True))
    return View.of(keys, values, where)
