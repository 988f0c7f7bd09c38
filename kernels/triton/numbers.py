# mypy: ignore-errors
"""What codes stand for, and the codes of numbers, as `kernels/values.py` has them."""

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """x rounded to a whole number, half to even; |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def whole(codes, OFFSET: tl.constexpr):
    return (codes - OFFSET).to(tl.float32)


@triton.jit
def whole_code(x, BITS: tl.constexpr, OFFSET: tl.constexpr):
    MOST: tl.constexpr = (1 << BITS) - 1
    y = nearest(tl.minimum(tl.maximum(x, -1048576.0), 1048576.0)) + OFFSET
    return tl.minimum(tl.maximum(y, 0.0), MOST).to(tl.int32)


@triton.jit
def float8(codes, EXPONENT: tl.constexpr):
    """8-bit floats by their bits: no target needs to know the type."""
    MANTISSA: tl.constexpr = 7 - EXPONENT
    BIAS: tl.constexpr = (1 << (EXPONENT - 1)) - 1
    LEAST: tl.constexpr = 2.0 ** (1 - BIAS)                   # the smallest normal number
    size = ((codes & 0x7F) << (23 - MANTISSA)) + ((127 - BIAS) << 23)
    x = size.to(tl.float32, bitcast=True)
    x = tl.where(x < LEAST, (x - LEAST / 2) * 2, x)           # subnormal: no implicit one
    bits = x.to(tl.int32, bitcast=True) | ((codes & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def float8_code(x, EXPONENT: tl.constexpr, MOST: tl.constexpr):
    MANTISSA: tl.constexpr = 7 - EXPONENT
    BIAS: tl.constexpr = (1 << (EXPONENT - 1)) - 1
    DROP: tl.constexpr = 23 - MANTISSA
    SMALL: tl.constexpr = 2.0 ** (BIAS - 1 + MANTISSA)        # subnormals: multiples of 1 / SMALL
    bits = tl.minimum(tl.maximum(x, -MOST), MOST).to(tl.int32, bitcast=True)
    sign, size = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    tiny = nearest(tl.minimum(size.to(tl.float32, bitcast=True) * SMALL, 256.0)).to(tl.int32)
    rounded = size + ((1 << (DROP - 1)) - 1) + ((size >> DROP) & 1)
    large = (rounded >> DROP) - ((127 - BIAS) << MANTISSA)
    return sign | tl.where(size < ((128 - BIAS) << 23), tiny, large)


@triton.jit
def choose(codes, low, high, BIT: tl.constexpr):
    return tl.where((codes & BIT) != 0, high, low)


@triton.jit
def table4(codes, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    return choose(codes, choose(codes, A, B, 1), choose(codes, C, D, 1), 2)


@triton.jit
def table16(codes, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
            E: tl.constexpr, F: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
            I: tl.constexpr, J: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
            M: tl.constexpr, N: tl.constexpr, O: tl.constexpr, P: tl.constexpr):
    low = choose(codes, table4(codes, A, B, C, D), table4(codes, E, F, G, H), 4)
    high = choose(codes, table4(codes, I, J, K, L), table4(codes, M, N, O, P), 4)
    return choose(codes, low, high, 8)


@triton.jit
def given4(codes, numbers):
    """The numbers of a table in memory."""
    low = choose(codes, tl.load(numbers), tl.load(numbers + 1), 1)
    return choose(codes, low, choose(codes, tl.load(numbers + 2), tl.load(numbers + 3), 1), 2)


@triton.jit
def given16(codes, numbers):
    low = choose(codes, given4(codes, numbers), given4(codes, numbers + 4), 4)
    high = choose(codes, given4(codes, numbers + 8), given4(codes, numbers + 12), 4)
    return choose(codes, low, high, 8)


@triton.jit
def given_code(x, numbers, MANY: tl.constexpr):
    """How many of the middles of neighbours in a table in memory x lies above."""
    code = (x > (tl.load(numbers) + tl.load(numbers + 1)) * 0.5).to(tl.int32)
    for i in tl.static_range(1, MANY - 1):
        code += (x > (tl.load(numbers + i) + tl.load(numbers + i + 1)) * 0.5).to(tl.int32)
    return code


@triton.jit
def above(x, HALF_WAY: tl.constexpr):
    """1 where x lies above the middle of two neighbours of a table."""
    return (x > HALF_WAY).to(tl.int32)


# fp16 by its bits

@triton.jit
def neighbour(h, UP: tl.constexpr):
    """The next fp16 number above or below h."""
    bits = h.to(tl.int16, bitcast=True)
    away = ((bits >= 0) == UP).to(tl.int16)                   # larger in magnitude
    moved = bits + away * 2 - 1
    zero = (bits & 0x7FFF) == 0
    if UP:
        moved = tl.where(zero, 1, moved)
    else:
        moved = tl.where(zero, -32767, moved)
    return moved.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def round_up(x):
    """x >= 0 as the nearest fp16 that is not smaller, 65504 at most."""
    x = tl.minimum(x, 65504.0)
    near = x.to(tl.float16)
    return tl.where(near.to(tl.float32) < x, neighbour(near, True), near)


# How a group's scale and low follow from its numbers g, along AXIS, where `inside`.

@triton.jit
def extremes(g, inside, AXIS: tl.constexpr):
    low = tl.min(tl.where(inside, g, float("inf")), AXIS)
    return low, tl.max(tl.where(inside, g, -float("inf")), AXIS)


@triton.jit
def peak_of(g, inside, AXIS: tl.constexpr):
    return tl.max(tl.where(inside, tl.abs(g), 0.0), AXIS)


@triton.jit
def fit_range(g, inside, AXIS: tl.constexpr, MOST: tl.constexpr, CUT: tl.constexpr):
    """low rounded down, and scale to nearest, so that codes 0 .. MOST span the range."""
    least, most = extremes(g, inside, AXIS)
    least, most = least + 0.0, most + 0.0  # no -0
    if CUT > 0:
        cut = (most - least) * CUT
        least, most = least + cut, most - cut
    low = least.to(tl.float16)
    low = tl.where(low.to(tl.float32) > least, neighbour(low, False), low)
    want = tl.div_rn(most - low.to(tl.float32), MOST * 1.0)
    scale = tl.minimum(want, 65504.0).to(tl.float16)
    short = (scale.to(tl.float32) < want) & (want < 6.103515625e-05)  # fp16's smallest normal
    return tl.where(short, neighbour(scale, True), scale), low


@triton.jit
def fit_peak(g, inside, AXIS: tl.constexpr, DIVISOR: tl.constexpr):
    scale = round_up(tl.div_rn(peak_of(g, inside, AXIS), DIVISOR * 1.0))
    return scale, scale


@triton.jit
def fit_middle(g, inside, AXIS: tl.constexpr):
    """The range of the numbers becomes [-1, 1]."""
    least, most = extremes(g, inside, AXIS)
    low = ((least + most) * 0.5).to(tl.float16)
    base = low.to(tl.float32)
    return round_up(tl.maximum(most - base, base - least)), low


@triton.jit
def fit_power(g, inside, AXIS: tl.constexpr, MOST: tl.constexpr):
    """The exponent of the least power of two, times MOST, that is not below the peak."""
    peak = peak_of(g, inside, AXIS)
    ratio = tl.div_rn(peak, MOST * 1.0)
    bits = ratio.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126                             # ratio < 2**exponent
    half = (tl.maximum(exponent + 126, 1) << 23).to(tl.float32, bitcast=True)
    exponent = tl.where(half * MOST >= peak, exponent - 1, exponent)
    exponent = tl.minimum(tl.maximum(exponent, -100), 120)
    scale = tl.where(peak == 0.0, 0, exponent).to(tl.int8)
    return scale, scale


@triton.jit
def number_of(scale):
    """A stored scale, fp16 or the exponent of a power of two, as fp32."""
    if scale.dtype == tl.int8:
        return ((scale.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    else:
        return scale.to(tl.float32)
