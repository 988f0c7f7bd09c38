# mypy: ignore-errors
"""Two vectors as a direction and two lengths (kernels/direction.py), read and written."""

import triton
import triton.language as tl


@triton.jit
def direction(e, length, place, exact, member, page, at, keep, N: tl.constexpr, D: tl.constexpr,
              DP: tl.constexpr, KEPT: tl.constexpr):
    """e times the length of one of two vectors, but for KEPT tokens that are stored as they were.

    In a page: length [2][128], place [KEPT], exact [2][KEPT][D].
    """
    t = at + tl.arange(0, N)
    size = tl.load(length + page * 256 + member * 128 + t, mask=keep, other=0.0)
    x = e * size.to(tl.float32)[:, None]
    c = tl.arange(0, DP)
    for r in tl.static_range(KEPT):
        p = tl.load(place + page * KEPT + r).to(tl.int32)
        row = tl.load(exact + ((page * 2 + member) * KEPT + r) * D + c, mask=c < D, other=0.0)
        x = tl.where((t == p)[:, None], row.to(tl.float32)[None, :], x)
    return x


@triton.jit
def across(x, N: tl.constexpr, DP: tl.constexpr):
    """The sum over x's DP channels, half of them added to the other half: [N]."""
    for step in tl.static_range(10):
        if (DP >> step) > 1:
            x = tl.sum(tl.reshape(x, (N, 2, DP >> (step + 1))), 1)
    return tl.reshape(x, (N,))


@triton.jit
def alternating(y, LAST: tl.constexpr, TERMS: tl.constexpr):
    """1 - y / ((a - 1) a) (1 - y / ((a + 1) (a + 2)) (...)), which ends at LAST (LAST + 1)."""
    s = tl.full(y.shape, 1.0, tl.float64)
    for i in tl.static_range(TERMS):
        s = 1.0 - y * (1.0 / ((LAST - 2 * i) * (LAST + 1 - 2 * i))) * s
    return s


@triton.jit
def sine(x):
    """sin x of an fp64 |x| <= pi / 2, by its series: the error is less than 2e-17."""
    return x * alternating(x * x, 22, 11)


@triton.jit
def cosine_of(x):
    """cos x of an fp64 |x| <= pi / 2, by its series."""
    return alternating(x * x, 23, 12)


@triton.jit
def between(cosine, T: tl.constexpr, FLAT: tl.constexpr):
    """What two directions at an angle contribute to the one at T of the way between them.

    The angle is pi / 2 + z, where sin z = -cosine; each step of the iteration cubes the error.
    """
    c = cosine.to(tl.float64)
    s = tl.sqrt((1.0 - c) * (1.0 + c))
    z = -c
    for _ in tl.static_range(4):
        z = z - s * sine(z) - c * cosine_of(z)
    HALF: tl.constexpr = 1.5707963267948966
    flat = cosine_of(z) < FLAT
    safe = tl.where(flat, 1.0, cosine_of(z))
    first = tl.where(flat, 1 - T, cosine_of((1 - T) * (z + HALF) - HALF) / safe)
    second = tl.where(flat, T, cosine_of(T * (z + HALF) - HALF) / safe)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def size_of(x, N: tl.constexpr, DP: tl.constexpr):
    """The lengths of x's tokens [N]."""
    return tl.sqrt(across(x * x, N, DP).to(tl.float64)).to(tl.float32)


@triton.jit
def unit(x, size):
    """x in units of its length."""
    safe = tl.where(size == 0.0, 1.0, size)
    return tl.div_rn(x, tl.broadcast_to(safe[:, None], x.shape))


@triton.jit
def units(a, b, first, second):
    """a and b in units of their lengths; zeros have no direction and get the other's."""
    u, v = unit(a, first), unit(b, second)
    return tl.where((first == 0.0)[:, None], v, u), tl.where((second == 0.0)[:, None], u, v)


@triton.jit
def cosine_between(a, b, N: tl.constexpr, DP: tl.constexpr):
    """The cosines [N] of the angles between a's and b's tokens."""
    u, v = units(a, b, size_of(a, N, DP), size_of(b, N, DP))
    cosine = across(u * v, N, DP)
    return tl.minimum(tl.maximum(cosine, -1.0), 1.0)


@triton.jit
def collected(all, some, part):
    """`all` [parts, N] with `some` [N] as the part of that number."""
    at = tl.arange(0, all.shape[0])
    return tl.where((at == part)[:, None], some[None, :], all)


@triton.jit
def rank_of(own, t, all):
    """How many of `all` come before each of `own`, those of the numbers t: smaller ones, and of
    equal ones the first."""
    other = tl.arange(0, all.shape[0])[None, :]
    less = (all[None, :] < own[:, None]) | ((all[None, :] == own[:, None]) & (other < t[:, None]))
    return tl.sum(less.to(tl.int32), 1)


@triton.jit
def direction_of(a, b, cosines, part, length, place, exact, page, keep, N: tl.constexpr,
                 D: tl.constexpr, DP: tl.constexpr, KEPT: tl.constexpr, T: tl.constexpr,
                 FLAT: tl.constexpr):
    """Store the lengths of a and b [N, DP], a part of a page, and whole those among the KEPT tokens
    of the page whose directions differ most; the directions between them.

    `cosines` [128 / N, N] are the whole page's.
    """
    t = part * N + tl.arange(0, N)
    c = tl.arange(0, DP)[None, :]
    first, second = size_of(a, N, DP), size_of(b, N, DP)
    tl.store(length + page * 256 + t, first.to(tl.float16), mask=keep)
    tl.store(length + page * 256 + 128 + t, second.to(tl.float16), mask=keep)
    own = cosine_between(a, b, N, DP)
    rank = rank_of(own, t, tl.reshape(cosines, (128,)))
    mine = keep & (rank < KEPT)
    tl.store(place + page * KEPT + rank, t.to(tl.uint8), mask=mine)
    row = exact + (page * 2 * KEPT + rank[:, None]) * D + c
    tl.store(row, a.to(exact.dtype.element_ty), mask=mine[:, None] & (c < D))
    tl.store(row + KEPT * D, b.to(exact.dtype.element_ty), mask=mine[:, None] & (c < D))
    u, v = between(own, T, FLAT)
    a, b = units(a, b, first, second)
    return u[:, None] * a + v[:, None] * b
