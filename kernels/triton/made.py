# mypy: ignore-errors
"""Keys that are made of what is stored at every read: rope(x basis^T + offset)
(kernels/rebuild.py)."""

import triton
import triton.language as tl

from kvcompile.kernels.triton.products import dot, dot_add


@triton.jit
def made_keys(x, basis, offset, cos, sin, key, number, keep, DK: tl.constexpr, DKP: tl.constexpr,
              DQ: tl.constexpr, DQP: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr,
              BASIS: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr):
    """Key `key` of the tokens x [N, DKP], in fp32 [N, DQP]; they are the row's `number` [N]."""
    c = tl.arange(0, DQP)
    if BASIS:
        PART: tl.constexpr = DKP if DKP < 32 else 32          # the whole basis is too much at once
        parts = tl.reshape(x, (x.shape[0], DKP // PART, PART))
        place = tl.arange(0, DKP // PART)[None, :, None]
        k = tl.zeros((x.shape[0], DQP), tl.float32)
        for part in range(DKP // PART):
            j = part * PART + tl.arange(0, PART)
            where = basis + (key * DQ + c[None, :]) * DK + j[:, None]
            b = tl.load(where, mask=(c < DQ)[None, :] & (j < DK)[:, None], other=0.0)
            some = tl.sum(tl.where(place == part, parts, 0.0), 1)
            k = dot_add(some.to(x.dtype), b.to(x.dtype), k, WIDE)
    else:
        k = x.to(tl.float32)
    if OFFSET:
        k += tl.load(offset + key * DQ + c, mask=c < DQ, other=0.0).to(tl.float32)[None, :]
    if R > 0:
        APART: tl.constexpr = R // 2 if HALVES else 1         # of the two channels of a pair
        first = c // APART % 2 == 0
        pair = tl.where(c < R, tl.where(first, c + APART, c - APART), c)
        turned = tl.gather(k, tl.broadcast_to(pair[None, :], k.shape), 1)
        at, mask = number[:, None] * R + c[None, :], keep[:, None] & (c < R)[None, :]
        cosine = tl.load(cos + at, mask=mask, other=1.0).to(tl.float32)
        sine = tl.load(sin + at, mask=mask, other=0.0).to(tl.float32)
        k = k * cosine + tl.where(first[None, :], -turned, turned) * sine
    return k


@triton.jit
def made_logits(query, x, basis, offset, cos, sin, first, number, keep, own, KEYS: tl.constexpr,
                DK: tl.constexpr, DKP: tl.constexpr, DQ: tl.constexpr, DQP: tl.constexpr,
                R: tl.constexpr, HALVES: tl.constexpr, BASIS: tl.constexpr, OFFSET: tl.constexpr,
                WIDE: tl.constexpr):
    """Products [M, N] of queries [M, DQP] with the keys of tokens x; query i is for key `own`[i] of
    the KEYS from `first` on."""
    s = tl.zeros((query.shape[0], x.shape[0]), tl.float32)
    for i in range(KEYS):                                     # unrolled it would spill
        k = made_keys(x, basis, offset, cos, sin, first + i, number, keep, DK, DKP, DQ, DQP, R,
                      HALVES, BASIS, OFFSET, WIDE)
        mine = dot(query, tl.trans(k.to(query.dtype)), WIDE)
        s = tl.where((own == i)[:, None], mine, s)
    return s
