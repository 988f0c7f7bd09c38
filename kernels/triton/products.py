# mypy: ignore-errors
"""Products of tiles, on tensor cores where these have the type."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, WIDE: tl.constexpr):
    """a b in fp32. WIDE: Triton's interpreter multiplies bf16 by its bits, so not in bf16."""
    if WIDE or a.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def dot_add(a, b, c, WIDE: tl.constexpr):
    """a b + c in fp32."""
    if WIDE or a.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)
