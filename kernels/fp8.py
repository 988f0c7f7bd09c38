"""fp8: 8-bit floats (e4m3 or e5m2) with one power of two per token and head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError

KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Fp8:
    """x -> code * 2**exponent; the exponent, an int8 per token, puts the largest |x| in range.

    The scale is a power of two (as OCP MX's E8M0), so that scaling itself is exact.
    """

    kind: str = "e4m3"
    name: ClassVar[str] = "fp8"
    step: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"fp8(kind={self.kind}): kind must be one of {', '.join(KINDS)}")

    def planes(self, dim: int, dtype: torch.dtype) -> dict:
        return {"codes": (torch.uint8, (dim,)), "exponent": (torch.int8, (1,))}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        x = x.float()
        most = torch.finfo(KINDS[self.kind]).max
        peak = x.abs().amax(-1, keepdim=True)
        exponent = torch.frexp(peak / most)[1]  # peak / most < 2**exponent
        exact = torch.ldexp(torch.full_like(peak, most), exponent - 1) >= peak
        exponent = torch.where(exact, exponent - 1, exponent).clamp(-100, 120)
        exponent = torch.where(peak == 0, 0, exponent)
        codes = torch.ldexp(x, -exponent).clamp(-most, most).to(KINDS[self.kind])
        return {"codes": codes.view(torch.uint8), "exponent": exponent.to(torch.int8)}

    def _floats(self, planes: dict[str, Tensor]) -> Tensor:
        return planes["codes"].view(KINDS[self.kind]).float()

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype) -> Tensor:
        return torch.ldexp(self._floats(planes), planes["exponent"].int()).to(dtype)

    def error_bound(self, planes: dict[str, Tensor], dim: int) -> Tensor:
        info = torch.finfo(KINDS[self.kind])
        half = self._floats(planes).abs() * info.eps / 2 + info.smallest_normal * info.eps / 2
        return torch.ldexp(half, planes["exponent"].int())

    def limit(self, dtype: torch.dtype) -> float:
        return torch.finfo(KINDS[self.kind]).max * 2.0**100


FORMAT = Fp8
