"""Bodies of kvc.update and kvc.decode: a KVCache that a model fills by its own code."""

import torch
from torch import Tensor

from kvcompile.cache import KVCache
from kvcompile.errors import KVCompileError, RecipeError
from kvcompile.ir import APPEND, ATTEND, body
from kvcompile.kernels import pages
from kvcompile.kernels.dense_attention import visible
from kvcompile.planes import Group
from kvcompile.store import SIDES


@body("update")
def update(cache: Tensor, k: Tensor, v: Tensor, *, length: int, layer: int
           ) -> tuple[Tensor, Tensor]:
    """Store k and v [B, H, S, D]; K and V [B, H, length, D]: what was stored, decoded, then they.

    All rows hold the same number of tokens, and `length` is what is kept of them and S.
    """
    own = KVCache.of(cache).room(k, v, layer)
    store, seen = own.store, []
    named = pages.named(own.specs, own.planes, [0])
    count = int(named["count"][0, 0])
    for side, x in zip(SIDES, (k, v), strict=True):
        tiers = pages.tiers(store, side, named, x.shape[-1], x.dtype)
        rows = [pages.stored(store, side, tiers, row, slice(0, x.shape[1]), count)
                for row in range(x.shape[0])]
        seen.append(torch.cat([torch.stack(rows), x], 2))
    if seen[0].shape[2] != length:
        raise KVCompileError(f"layer {layer} of the KVCache holds {seen[0].shape[2] - k.shape[2]} "
                             f"tokens where {length - k.shape[2]} were expected: two models use it")
    _store(own, k, v, count)
    return seen[0], seen[1]


@body("decode")
def decode(cache: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float,
           recipe: str = "", layer: int) -> Tensor:
    """Attention over what is stored and, causally, this call's exact tokens, which are then stored.

    `mask` [B or 1, 1, S, T] (bool, or 0 and less) must hide later tokens and those outside the
    layer's window, and nothing else; KVCompileError for one that hides padding.
    """
    owner = KVCache.of(cache)
    if recipe and recipe != owner.recipe:
        raise RecipeError(f"the backend's recipe is {recipe!r}, but the KVCache stores by "
                          f"{owner.recipe!r}")
    own, window = owner.room(k, v, layer), owner.windows[layer]
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask >= 0
        own_window = 0 if window > mask.shape[-1] else window
        queries, tokens = mask.shape[-2:]
        want = visible(queries, tokens, own_window, 0, mask.device)
        if not bool((seen == want).all()):
            raise KVCompileError("attention_mask hides cached tokens (padding); a compiled KVCache "
                                 "takes full rows only: use kvcompile.optimize for padded batches")
    count = int(own.planes[0][0, 0, 0])
    positions, valid = _columns(k, count)
    o, *_ = ATTEND(q, k, v, own.planes, positions, valid, None, scale=scale, window=window,
                  store=str(own.store), layer=layer)
    _store(own, k, v, count)
    return o


def _columns(k: Tensor, count: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(count, count + k.shape[2], device=k.device).expand(k.shape[0], -1)
    return positions, torch.ones_like(positions, dtype=torch.bool)


def _store(own: Group, k: Tensor, v: Tensor, count: int) -> None:
    APPEND(own.planes, [k], [v], *_columns(k, count), store=str(own.store), slots=[0])
