"""fp8: 8-bit floats (e4m3 or e5m2) with one power of two per token and head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.kernels.coded import Coded
from kvcompile.kernels.values import FLOATS, Float8


@dataclass(frozen=True)
class Fp8(Coded):
    """x -> code * 2**exponent; the exponent, an int8 per token, puts the largest |x| in range.

    The scale is a power of two (as OCP MX's E8M0), so that scaling itself is exact.
    """

    kind: str = "e4m3"
    name: ClassVar[str] = "fp8"
    examples: ClassVar[tuple[str, ...]] = ("fp8", "fp8(kind=e5m2)")
    axis: ClassVar[str] = "token"  # type: ignore[misc]
    scale_dtype: ClassVar[torch.dtype] = torch.int8

    def __post_init__(self) -> None:
        if self.kind not in FLOATS:
            raise RecipeError(f"fp8(kind={self.kind}): kind must be one of {', '.join(FLOATS)}")

    @property
    def values(self) -> Float8:
        return Float8(self.kind)

    def _group(self, dim: int) -> int:
        return dim

    def scale(self, stored: Tensor) -> Tensor:
        return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int())

    def fit(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        most = torch.finfo(FLOATS[self.kind]).max
        peak = x.abs().amax(-1, keepdim=True)
        exponent = torch.frexp(peak / most)[1]  # peak / most < 2**exponent
        exact = torch.ldexp(torch.full_like(peak, most), exponent - 1) >= peak
        exponent = torch.where(exact, exponent - 1, exponent).clamp(-100, 120)
        return torch.where(peak == 0, 0, exponent).to(torch.int8), None

    @property
    def cpp_fit(self) -> str:
        return f"Power<{torch.finfo(FLOATS[self.kind]).max:.0f}>"

    @property
    def triton_fit(self) -> str:
        return f"fit_power(g, inside, AXIS, {torch.finfo(FLOATS[self.kind]).max})"

    def limit(self, dtype: torch.dtype) -> float:
        return torch.finfo(FLOATS[self.kind]).max * 2.0**100


FORMAT = Fp8
