# mypy: ignore-errors
"""Tiles of pages of small codes (`kernels/coded.py` has the layout), read and written.

A tile is `N` tokens of a page, from token `at` on, by `DP` channels: `D` of a head, rounded up to a
power of two. `keep` [N] says which tokens count; scales of others are read as 0.
"""

import triton
import triton.language as tl

from kvcompile.kernels.triton.numbers import number_of


@triton.jit
def words_of(codes, page, WORDS: tl.constexpr):
    return codes.to(tl.pointer_type(tl.int32)) + page * WORDS


@triton.jit
def k_words(at, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Where the 32-bit words [N, tiles] of K lie in a page, each 4F channels of a token."""
    WIDE: tl.constexpr = 32 // BITS
    TILES: tl.constexpr = (D + WIDE - 1) // WIDE
    t = at + tl.arange(0, N)[:, None]
    tile = tl.arange(0, DP // WIDE)[None, :]
    return (t // 16 * TILES + tile) * 16 + t % 16, tile < TILES


@triton.jit
def k_codes(codes, page, at, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            BITS: tl.constexpr):
    """[N, DP] int32."""
    WIDE: tl.constexpr = 32 // BITS
    place, inside = k_words(at, N, D, DP, BITS)
    base = words_of(codes, page, 128 * ((D + WIDE - 1) // WIDE))
    if (D + WIDE - 1) // WIDE == DP // WIDE:
        w = tl.load(base + place)
    else:
        w = tl.load(base + place, mask=inside, other=0)
    c = tl.arange(0, WIDE)
    x = w[:, :, None] >> (c % 4 * 8 + c // 4 * BITS)[None, None, :]
    return tl.reshape(x & ((1 << BITS) - 1), (N, DP))


@triton.jit
def k_store(codes, page, at, keep, x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            BITS: tl.constexpr):
    """x [N, DP] int32 codes."""
    WIDE: tl.constexpr = 32 // BITS
    place, inside = k_words(at, N, D, DP, BITS)
    base = words_of(codes, page, 128 * ((D + WIDE - 1) // WIDE))
    x = tl.where(tl.arange(0, DP)[None, :] < D, x, 0)
    c = tl.arange(0, WIDE)
    parts = tl.reshape(x, (N, DP // WIDE, WIDE)) << (c % 4 * 8 + c // 4 * BITS)[None, None, :]
    tl.store(base + place, tl.sum(parts, 2), mask=inside & keep[:, None])


@triton.jit
def v_place(at, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Where the byte of each code [N, DP] of V lies in a page, and its field there."""
    F: tl.constexpr = 8 // BITS
    FULL: tl.constexpr = D // (16 * F) * 16
    REST: tl.constexpr = (D - FULL * F + F - 1) // F
    t = at + tl.arange(0, N)[:, None]
    c = tl.arange(0, DP)[None, :]
    if REST == 0:
        byte, field = c // (16 * F) * 16 + c % 16, c % (16 * F) // 16
    else:
        rest = c - FULL * F
        byte = tl.where(rest < 0, c // (16 * F) * 16 + c % 16, FULL + rest % REST)
        field = tl.where(rest < 0, c % (16 * F) // 16, rest // REST)
    return (t // 4 * (FULL + REST) + byte) * 4 + t % 4, field, c < D


@triton.jit
def v_codes(codes, page, at, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            BITS: tl.constexpr):
    """[N, DP] int32; word by word where whole tiles make up a head, else byte by byte."""
    F: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = (D + F - 1) // F
    if D % (16 * F) == 0 or (D < 16 * F and D == DP):
        L: tl.constexpr = DP // F if DP < 16 * F else 16
        quad = at // 4 + tl.arange(0, N // 4)[:, None]
        byte = tl.arange(0, DP // F)[None, :]
        where = words_of(codes, page, 32 * BYTES) + quad * BYTES + byte
        if D == DP:
            w = tl.load(where)
        else:
            w = tl.load(where, mask=byte < BYTES, other=0)
        w = tl.reshape(w, (N // 4, 1, DP // F // L, 1, L))
        w = w >> tl.reshape(tl.arange(0, 4) * 8, (1, 4, 1, 1, 1))
        x = w >> tl.reshape(tl.arange(0, F) * BITS, (1, 1, 1, F, 1))
        return tl.reshape(x & ((1 << BITS) - 1), (N, DP))
    else:
        place, field, inside = v_place(at, N, D, DP, BITS)
        w = tl.load(codes + page * (128 * BYTES) + place, mask=inside, other=0).to(tl.int32)
        return (w >> (field * BITS)) & ((1 << BITS) - 1)


@triton.jit
def v_store(codes, page, at, keep, x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            BITS: tl.constexpr):
    """x [N, DP] int32 codes; a byte holds one token, so that no other's are touched."""
    F: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = (D + F - 1) // F
    base = codes + page * (128 * BYTES)
    if D % (16 * F) == 0 or (D < 16 * F and D == DP):
        L: tl.constexpr = DP // F if DP < 16 * F else 16
        shift = tl.reshape(tl.arange(0, F) * BITS, (1, 1, F, 1))
        bytes_ = tl.sum(tl.reshape(x, (N, DP // F // L, F, L)) << shift, 2)
        t = at + tl.arange(0, N)[:, None]
        b = tl.arange(0, DP // F)[None, :]
        where = base + (t // 4 * BYTES + b) * 4 + t % 4
        tl.store(where, tl.reshape(bytes_, (N, DP // F)).to(tl.uint8),
                 mask=keep[:, None] & (b < BYTES))
    else:
        place, field, inside = v_place(at, N, D, DP, BITS)
        inside = inside & keep[:, None]
        for f in tl.static_range(F):  # one field of each byte after another
            mine = inside & (field == f)
            old = tl.load(base + place, mask=mine & (f > 0), other=0).to(tl.int32)
            tl.store(base + place, (old | (x << (f * BITS))).to(tl.uint8), mask=mine)
            tl.debug_barrier()


# Scales. In a page: by channel [128 / GROUP][D], by token [D / GROUP][128].

@triton.jit
def channel_scale(plane, page, at, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                  GROUP: tl.constexpr):
    """[1 or N / GROUP, DP] fp32."""
    ROWS: tl.constexpr = N // GROUP if N > GROUP else 1
    step = at // GROUP + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, DP)[None, :]
    where = plane + page * (128 // GROUP * D) + step * D + c
    if D == DP:
        return number_of(tl.load(where))
    else:
        return number_of(tl.load(where, mask=c < D, other=0))


@triton.jit
def token_scale(plane, page, at, keep, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                GROUP: tl.constexpr):
    """[N, groups] fp32, 0 for tokens that do not count."""
    GROUPS: tl.constexpr = 1 if GROUP == D else DP // GROUP
    t = at + tl.arange(0, N)[:, None]
    g = tl.arange(0, GROUPS)[None, :]
    mask = keep[:, None] & (g < D // GROUP)
    where = plane + page * (D // GROUP * 128) + g * 128 + t
    return tl.where(mask, number_of(tl.load(where, mask=mask, other=0)), 0.0)


@triton.jit
def by_channel(x, scale, low, page, at, keep, N: tl.constexpr, D: tl.constexpr,
               DP: tl.constexpr, GROUP: tl.constexpr, LOW: tl.constexpr):
    """x * scale [+ low], scales along channels."""
    ROWS: tl.constexpr = N // GROUP if N > GROUP else 1
    x = tl.reshape(x, (ROWS, N // ROWS, DP))
    x = x * channel_scale(scale, page, at, N, D, DP, GROUP)[:, None, :]
    if LOW:
        x += channel_scale(low, page, at, N, D, DP, GROUP)[:, None, :]
    return tl.reshape(x, (N, DP))


@triton.jit
def by_token(x, scale, low, page, at, keep, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
             GROUP: tl.constexpr, LOW: tl.constexpr):
    """x * scale [+ low], scales along tokens."""
    GROUPS: tl.constexpr = 1 if GROUP == D else DP // GROUP
    x = tl.reshape(x, (N, GROUPS, DP // GROUPS))
    x = x * token_scale(scale, page, at, keep, N, D, DP, GROUP)[:, :, None]
    if LOW:
        x += token_scale(low, page, at, keep, N, D, DP, GROUP)[:, :, None]
    return tl.reshape(x, (N, DP))


@triton.jit
def group_channel(x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr):
    """x [N, DP] as groups along axis 1, and which numbers are a head's."""
    inside = tl.arange(0, DP)[None, None, :] < D
    return tl.reshape(x, (N // GROUP, GROUP, DP)), inside


@triton.jit
def group_token(x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr):
    """x [N, DP] as groups along axis 2, and which numbers are a head's."""
    GROUPS: tl.constexpr = 1 if GROUP == D else DP // GROUP
    inside = tl.reshape(tl.arange(0, DP) < D, (1, GROUPS, DP // GROUPS))
    return tl.reshape(x, (N, GROUPS, DP // GROUPS)), inside


@triton.jit
def normal(g, scale, low, AXIS: tl.constexpr, LOW: tl.constexpr):
    """Numbers of groups in units of their scale."""
    unit = number_of(scale)
    unit = tl.expand_dims(tl.where(unit == 0.0, 1.0, unit), AXIS)
    if LOW:
        g = g - tl.expand_dims(number_of(low), AXIS)
    return tl.div_rn(g, tl.broadcast_to(unit, g.shape))


@triton.jit
def store_channel(plane, page, at, keep, x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                  GROUP: tl.constexpr):
    """x [N / GROUP, DP]; steps are kept as a whole."""
    step = tl.arange(0, N // GROUP)[:, None]
    c = tl.arange(0, DP)[None, :]
    kept = tl.max(tl.reshape(keep.to(tl.int32), (N // GROUP, GROUP)), 1) > 0
    where = plane + page * (128 // GROUP * D) + (at // GROUP + step) * D + c
    tl.store(where, x, mask=kept[:, None] & (c < D))


@triton.jit
def store_token(plane, page, at, keep, x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                GROUP: tl.constexpr):
    """x [N, groups]."""
    GROUPS: tl.constexpr = 1 if GROUP == D else DP // GROUP
    t = at + tl.arange(0, N)[:, None]
    g = tl.arange(0, GROUPS)[None, :]
    where = plane + page * (D // GROUP * 128) + g * 128 + t
    tl.store(where, x, mask=keep[:, None] & (g < D // GROUP))


# Numbers as they are, [128, D] in a page.

@triton.jit
def dense(plane, page, at, keep, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    t = at + tl.arange(0, N)[:, None]
    c = tl.arange(0, DP)[None, :]
    where = plane + page * (128 * D) + t * D + c
    return tl.load(where, mask=keep[:, None] & (c < D), other=0.0)


@triton.jit
def dense_member(plane, member, page, at, keep, N: tl.constexpr, D: tl.constexpr,
                 DP: tl.constexpr, MEMBERS: tl.constexpr):
    """[128, MEMBERS, D] in a page."""
    t = at + tl.arange(0, N)[:, None]
    c = tl.arange(0, DP)[None, :]
    where = plane + page * (128 * MEMBERS * D) + (t * MEMBERS + member) * D + c
    return tl.load(where, mask=keep[:, None] & (c < D), other=0.0)


@triton.jit
def dense_member_store(plane, member, page, at, keep, x, N: tl.constexpr, D: tl.constexpr,
                       DP: tl.constexpr, MEMBERS: tl.constexpr):
    t = at + tl.arange(0, N)[:, None]
    c = tl.arange(0, DP)[None, :]
    where = plane + page * (128 * MEMBERS * D) + (t * MEMBERS + member) * D + c
    tl.store(where, x.to(plane.dtype.element_ty), mask=keep[:, None] & (c < D))


@triton.jit
def own_tokens(x, stride, index, keep, D: tl.constexpr, DP: tl.constexpr):
    """Tokens `index` [N] of the call's own x."""
    c = tl.arange(0, DP)[None, :]
    return tl.load(x + index[:, None] * stride + c, mask=keep[:, None] & (c < D), other=0.0)


@triton.jit
def dense_store(plane, page, at, keep, x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    t = at + tl.arange(0, N)[:, None]
    c = tl.arange(0, DP)[None, :]
    where = plane + page * (128 * D) + t * D + c
    tl.store(where, x.to(plane.dtype.element_ty), mask=keep[:, None] & (c < D))
