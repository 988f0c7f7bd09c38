"""An example of a package that adds a storage format and a method: numbers without their low bits.

Its entry points are in kvcompile_rounded.dist-info; kvcompile finds them wherever it is installed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvcompile.errors import RecipeError
from kvcompile.format import StepPlane
from kvcompile.method import Method, Param


@dataclass(frozen=True)
class Rounded:
    """x -> x as fp32 with 23 - `bits` zeros at its end, stored in its upper 16 bits."""

    bits: int = 7
    name: ClassVar[str] = "rounded"
    step: ClassVar[int] = 1
    examples: ClassVar[tuple[str, ...]] = ("rounded", "rounded(bits=3)", "rounded(bits=0)")

    def __post_init__(self):
        if self.bits not in range(8):
            raise RecipeError(f"rounded(bits={self.bits}): bits must be from 0 to 7")

    def planes(self, dim, dtype, side):
        return {"upper": StepPlane(torch.int16, (dim,))}

    def encode(self, x, side):
        kept = x.float().view(torch.int32) >> (23 - self.bits) << (23 - self.bits)
        return {"upper": (kept >> 16).to(torch.int16)}

    def decode(self, planes, dim, dtype, side):
        return (planes["upper"].int() << 16).view(torch.float32).to(dtype)

    def error_bound(self, planes, dim, side):  # towards zero: less than the last bit kept
        return self.decode(planes, dim, torch.float32, side).abs() * 2.0**-self.bits + 2.0**-126

    def limit(self, dtype):
        return torch.finfo(torch.float32).max


METHOD = Method(
    name="rounded", title="Numbers without their low bits", paper="arXiv:1710.03740",
    family="quantization", params=(Param("bits", 7, choices=tuple(range(8))),),
    axes=lambda p: {f"format.{side}": f"rounded(bits={p['bits']})" for side in "kv"})
