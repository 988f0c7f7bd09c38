# mypy: ignore-errors
"""Formats around a format (kernels/wrapper.py): what they do to a tile [N, DP] of fp32 numbers."""

import triton
import triton.language as tl

from kvcompile.kernels.triton.coded import channel_scale, store_channel
from kvcompile.kernels.triton.numbers import round_up
from kvcompile.kernels.triton.products import dot, dot_add


@triton.jit
def turn(x, N: tl.constexpr, DP: tl.constexpr, SIZE: tl.constexpr):
    """H x in blocks of SIZE channels: log2(SIZE) steps of sums and differences of neighbours."""
    BLOCKS: tl.constexpr = DP // SIZE
    rest: tl.constexpr = SIZE
    for step in tl.static_range(10):
        if (1 << step) < SIZE:
            a, b = tl.split(tl.reshape(x, (N, BLOCKS, SIZE // 2, 2)))
            x = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
    ROOT: tl.constexpr = rest ** 0.5
    return tl.div_rn(tl.reshape(x, (N, DP)), ROOT)


@triton.jit
def centered(x, mean, page, at, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
             STEP: tl.constexpr):
    """x + mean, a mean of STEP tokens of each channel."""
    ROWS: tl.constexpr = N // STEP if N > STEP else 1
    m = channel_scale(mean, page, at, N, D, DP, STEP)[:, None, :]
    return tl.reshape(tl.reshape(x, (ROWS, N // ROWS, DP)) + m, (N, DP))


@triton.jit
def center(plane, page, at, keep, x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
           STEP: tl.constexpr):
    """Store the mean of every STEP of x's tokens; x without it."""
    g = tl.reshape(x, (N // STEP, STEP, DP))
    mean = (group_sum(g, 1, N // STEP, STEP, DP) / STEP).to(tl.float16)
    store_channel(plane, page, at, keep, tl.reshape(mean, (N // STEP, DP)), N, D, DP, STEP)
    return tl.reshape(g - mean.to(tl.float32), (N, DP))


@triton.jit
def scaled(x, channel, page, at, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
           STEP: tl.constexpr):
    """x times a scale of each channel of STEP tokens."""
    ROWS: tl.constexpr = N // STEP if N > STEP else 1
    s = channel_scale(channel, page, at, N, D, DP, STEP)[:, None, :]
    return tl.reshape(tl.reshape(x, (ROWS, N // ROWS, DP)) * s, (N, DP))


@triton.jit
def scale_down(plane, page, at, keep, x, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
               STEP: tl.constexpr):
    """Store the root of each channel's peak in every STEP of x's tokens; x in units of it."""
    g = tl.reshape(x, (N // STEP, STEP, DP))
    scale = round_up(tl.sqrt_rn(tl.max(tl.abs(g), 1)))
    scale = tl.maximum(scale.to(tl.float32), 0.000244140625)
    store_channel(plane, page, at, keep, scale.to(tl.float16), N, D, DP, STEP)
    return tl.reshape(tl.div_rn(g, tl.broadcast_to(scale[:, None, :], g.shape)), (N, DP))


# Outliers. In a page: by channel [128 / GROUP][D][TAKEN], by token [D / GROUP][TAKEN][128].

@triton.jit
def outlier_place(at, r, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                  GROUP: tl.constexpr, TAKEN: tl.constexpr, CHANNEL: tl.constexpr):
    """Where number r of each group lies, [groups.., 1, ..]; the group's axis has size 1."""
    if CHANNEL:
        ROWS: tl.constexpr = N // GROUP if N > GROUP else 1
        step = at // GROUP + tl.arange(0, ROWS)[:, None, None]
        c = tl.arange(0, DP)[None, None, :]
        return (step * D + c) * TAKEN + r, c < D
    else:
        GROUPS: tl.constexpr = 1 if GROUP == D else DP // GROUP
        t = at + tl.arange(0, N)[:, None, None]
        g = tl.arange(0, GROUPS)[None, :, None]
        return (g * TAKEN + r) * 128 + t, g < D // GROUP


@triton.jit
def outliers(x, place, rest, page, at, keep, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
             GROUP: tl.constexpr, TAKEN: tl.constexpr, CHANNEL: tl.constexpr):
    """x + what its groups' outliers miss."""
    if CHANNEL:
        ROWS: tl.constexpr = N // GROUP if N > GROUP else 1
        PAGE_SIZE: tl.constexpr = 128 // GROUP * D * TAKEN
        x = tl.reshape(x, (ROWS, N // ROWS, DP))
        index = ((at + tl.arange(0, N // ROWS)) % GROUP)[None, :, None]
        valid = tl.full((1, 1, 1), 1, tl.int1)
    else:
        GROUPS: tl.constexpr = 1 if GROUP == D else DP // GROUP
        PAGE_SIZE: tl.constexpr = D // GROUP * TAKEN * 128
        x = tl.reshape(x, (N, GROUPS, DP // GROUPS))
        index = tl.arange(0, DP // GROUPS)[None, None, :]
        valid = keep[:, None, None]
    for r in tl.static_range(TAKEN):
        where, inside = outlier_place(at, r, N, D, DP, GROUP, TAKEN, CHANNEL)
        inside = inside & valid
        p = tl.load(place + page * PAGE_SIZE + where, mask=inside, other=255).to(tl.int32)
        y = tl.load(rest + page * PAGE_SIZE + where, mask=inside, other=0.0).to(tl.float32)
        x += tl.where(index == p, y, 0.0)
    return tl.reshape(x, (N, DP))


@triton.jit
def group_sum(x, AXIS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """The sum of x [A, B, C] over AXIS, kept, halves added to halves."""
    for step in tl.static_range(7):
        if AXIS == 1:
            if (B >> step) > 1:
                x = tl.sum(tl.reshape(x, (A, 2, B >> (step + 1), C)), 1)
        else:
            if (C >> step) > 1:
                x = tl.sum(tl.reshape(x, (A, B, 2, C >> (step + 1))), 2)
    return x


@triton.jit
def take_out(g, place, page, at, keep, AXIS: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
             DP: tl.constexpr, GROUP: tl.constexpr, TAKEN: tl.constexpr):
    """Store where the TAKEN numbers farthest from the mean of each group lie; g with the mean of
    the others in their place."""
    CHANNEL: tl.constexpr = AXIS == 1
    A: tl.constexpr = g.shape[0]
    B: tl.constexpr = g.shape[1]
    C: tl.constexpr = g.shape[2]
    PAGE_SIZE: tl.constexpr = 128 // GROUP * D * TAKEN if CHANNEL else D // GROUP * TAKEN * 128
    if CHANNEL:
        index = tl.arange(0, GROUP)[None, :, None]
        kept = tl.reshape(tl.max(tl.reshape(keep.to(tl.int32), (A, GROUP)), 1), (A, 1, 1)) > 0
    else:
        index = tl.arange(0, GROUP)[None, None, :]
        kept = keep[:, None, None]
    index = tl.broadcast_to(index, g.shape)
    far = tl.abs(g - group_sum(g, AXIS, A, B, C) / GROUP)
    out = tl.zeros(g.shape, tl.int32)
    for _ in range(TAKEN):
        far = tl.where(out != 0, -1.0, far)
        peak = tl.max(far, AXIS, keep_dims=True)
        best = tl.min(tl.where(far == peak, index, GROUP), AXIS, keep_dims=True)
        out = tl.where(index == best, 1, out)
    mean = group_sum(tl.where(out != 0, 0.0, g), AXIS, A, B, C) / (GROUP - TAKEN)
    left = out
    for r in range(TAKEN):  # in order of their places
        first = tl.min(tl.where(left != 0, index, GROUP), AXIS, keep_dims=True)
        left = tl.where(index == first, 0, left)
        where, inside = outlier_place(at, r, N, D, DP, GROUP, TAKEN, CHANNEL)
        tl.store(place + page * PAGE_SIZE + where, first.to(tl.uint8), mask=inside & kept)
    return tl.where(out != 0, mean, g), out


@triton.jit
def store_rest(rest, page, at, keep, missing, out, AXIS: tl.constexpr, N: tl.constexpr,
               D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, TAKEN: tl.constexpr):
    """Store what each group's outliers miss."""
    CHANNEL: tl.constexpr = AXIS == 1
    PAGE_SIZE: tl.constexpr = 128 // GROUP * D * TAKEN if CHANNEL else D // GROUP * TAKEN * 128
    if CHANNEL:
        index = tl.arange(0, GROUP)[None, :, None]
        A: tl.constexpr = out.shape[0]
        kept = tl.reshape(tl.max(tl.reshape(keep.to(tl.int32), (A, GROUP)), 1), (A, 1, 1)) > 0
    else:
        index = tl.arange(0, GROUP)[None, None, :]
        kept = keep[:, None, None]
    index = tl.broadcast_to(index, out.shape)
    for r in tl.static_range(TAKEN):
        first = tl.min(tl.where(out != 0, index, GROUP), AXIS, keep_dims=True)
        y = tl.sum(tl.where((index == first) & (out != 0), missing, 0.0), AXIS, keep_dims=True)
        out = tl.where(index == first, 0, out)
        where, inside = outlier_place(at, r, N, D, DP, GROUP, TAKEN, CHANNEL)
        tl.store(rest + page * PAGE_SIZE + where, y.to(tl.float16), mask=inside & kept)


@triton.jit
def spread(x, place, page, at, N: tl.constexpr, LEFT: tl.constexpr, D: tl.constexpr,
           DP: tl.constexpr, STEP: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr):
    """x [N, .] of LEFT channels, rounded to T, in their places among D, other channels 0; the
    places are those of STEP tokens each. A product with ones and zeros rounds nothing else."""
    j, c = tl.arange(0, x.shape[1])[:, None], tl.arange(0, DP)[None, :]
    PARTS: tl.constexpr = N // STEP if N > STEP else 1
    part = tl.arange(0, N)[:, None] // (N // PARTS)
    out = tl.zeros((N, DP), tl.float32)
    for i in tl.static_range(PARTS):
        own = place + (page * (128 // STEP) + at // STEP + i) * LEFT + j
        here = tl.load(own, mask=j < LEFT, other=-1).to(tl.int32) == c
        moved = dot(x.to(T), tl.where(here, 1.0, 0.0).to(T), WIDE)
        out = tl.where(part == i, moved, out)
    return out


@triton.jit
def behind(x, N: tl.constexpr, LEFT: tl.constexpr, DROP: tl.constexpr, DP: tl.constexpr,
           T: tl.constexpr, WIDE: tl.constexpr):
    """x [N, .] of LEFT channels, rounded to T, behind DROP zeros; exact, as in `spread`."""
    j, c = tl.arange(0, x.shape[1])[:, None], tl.arange(0, DP)[None, :]
    return dot(x.to(T), tl.where((c == j + DROP) & (j < LEFT), 1.0, 0.0).to(T), WIDE)


@triton.jit
def without_front(plane, page, at, keep, x, N: tl.constexpr, LEFT: tl.constexpr,
                  LEFT_P: tl.constexpr, DROP: tl.constexpr, DP: tl.constexpr,
                  STEP: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr):
    """Store the power of two above the first DROP channels of every STEP of x's tokens; the LEFT
    channels after these."""
    c = tl.arange(0, DP)
    peak = tl.max(tl.where((c < DROP)[None, :], tl.abs(x), 0.0), 1)
    peak = tl.max(tl.reshape(peak, (N // STEP, STEP)), 1)
    above = tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) - 126, -126)  # 127 at most
    above = tl.where(peak == 0.0, -127, tl.minimum(above, 127)).to(tl.int8)
    kept = tl.max(tl.reshape(keep.to(tl.int32), (N // STEP, STEP)), 1) > 0
    tl.store(plane + page * (128 // STEP) + at // STEP + tl.arange(0, N // STEP), above, mask=kept)
    j = tl.arange(0, LEFT_P)[None, :]
    return dot(x.to(T), tl.where((c[:, None] == j + DROP) & (j < LEFT), 1.0, 0.0).to(T), WIDE)


@triton.jit
def mixed(x, basis, unit, page, first, RANK: tl.constexpr, ALL: tl.constexpr, D: tl.constexpr,
          DP: tl.constexpr, SCALED: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr):
    """x [N, .] times a page's basis [RANK, ALL], of whose channels D from `first` on are read.

    The basis' numbers are whole or of type T; x is multiplied as two numbers of type T.
    """
    ALONE: tl.constexpr = 16                                 # the whole basis is too much at once
    PARTS: tl.constexpr = x.shape[1] // ALONE
    parts, place = tl.reshape(x, (x.shape[0], PARTS, ALONE)), tl.arange(0, PARTS)[None, :, None]
    c, out = tl.arange(0, DP), tl.zeros((x.shape[0], DP), tl.float32)
    for part in range(PARTS):
        r = part * ALONE + tl.arange(0, ALONE)
        both = (r < RANK)[:, None] & (c < D)[None, :]
        where = basis + (page * RANK + r[:, None]) * ALL + first + c[None, :]
        b = tl.load(where, mask=both, other=0).to(T)
        some = tl.sum(tl.where((place == part) & (r < RANK)[None, None, :], parts, 0.0), 1)
        if SCALED:
            some = some * tl.load(unit + page * RANK + r, mask=r < RANK, other=0.0)[None, :]
        rough = some.to(T)
        out = dot_add(rough, b, out, WIDE)
        out = dot_add((some - rough.to(tl.float32)).to(T), b, out, WIDE)
    return out
