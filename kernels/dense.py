"""dense: numbers as they are, in the model's dtype or a given one."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.format import Planes, Side, StepPlane

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CPP = {torch.bfloat16: "bf16", torch.float16: "half", torch.float32: "float"}


@dataclass(frozen=True)
class Dense:
    """x -> x, in `dtype` (bf16, fp16, fp32, or `same`: the dtype of the model's K and V)."""

    dtype: str = "same"
    name: ClassVar[str] = "dense"
    examples: ClassVar[tuple[str, ...]] = ("dense", "dense(dtype=bf16)", "dense(dtype=fp16)")
    step: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.dtype != "same" and self.dtype not in DTYPES:
            raise RecipeError(f"dense(dtype={self.dtype}): dtype must be one of same, bf16, "
                              "fp16, fp32")

    def planes(self, dim: int, dtype: torch.dtype, side: Side) -> Planes:
        return {"data": StepPlane(DTYPES.get(self.dtype, dtype), (dim,))}

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        return {"data": x.to(DTYPES.get(self.dtype, x.dtype))}

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        return planes["data"].to(dtype)

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        x = planes["data"]
        if self.dtype == "same":
            return torch.zeros_like(x)
        info = torch.finfo(x.dtype)  # round to nearest: half an ulp, or half the smallest step
        return x.float().abs() * info.eps / 2 + info.smallest_normal * info.eps / 2

    def limit(self, dtype: torch.dtype) -> float:
        return torch.finfo(DTYPES.get(self.dtype, dtype)).max

    def cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the plane (`kernels/cpp/dense.h`)."""
        return f"Dense{side.upper()}<{dim}, {CPP[DTYPES.get(self.dtype, dtype)]}>"

    def cpp_in_k(self, dim: int, values: int, dtype: torch.dtype) -> str:
        """The C++ type that reads V, the first `values` channels of K (`kernels/cpp/latent.h`)."""
        return f"DenseInK<{values}, {dim}, {CPP[DTYPES.get(self.dtype, dtype)]}>"

    def cpp_member(self, dim: int, members: int, dtype: torch.dtype, side: Side
                   ) -> tuple[str, list[int]]:
        """The C++ type that reads `dim` channels of one of the `members` that lie side by side, and
        how far they are apart in the plane."""
        number = CPP[DTYPES.get(self.dtype, dtype)]
        return f"Dense{side.upper()}<{dim}, {number}, {members}>", [dim]

    def cpp_writer(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that writes the plane (`kernels/cpp/append.h`)."""
        return f"DenseWriter<{dim}, {CPP[DTYPES.get(self.dtype, dtype)]}>"

    def triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of numbers (`kernels/triton_source.py`)."""
        return f"dense({planes[0]}, page, at, keep, N, {dim}, DP)"

    def triton_member(self, dim: int, members: int, dtype: torch.dtype, side: Side,
                      planes: list[str]) -> str:
        """The tile of `dim` channels of one of the `members` that lie side by side."""
        return (f"dense_member({planes[0]}, member, page, at, keep, N, {dim}, DP, "
                f"{members})")

    def triton_writer(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
                      ) -> list[str]:
        """Statements that store the tile `x`."""
        return [f"dense_store({planes[0]}, page, at, keep, x, N, {dim}, DP)"]

    def triton_pieces(self, dim: int, side: Side) -> tuple[int, list[int]]:
        """Channels that can be written by themselves, and how much of the plane is theirs."""
        return 4, [4]

    def triton_member_writer(self, dim: int, members: int, dtype: torch.dtype, side: Side,
                             planes: list[str]) -> list[str]:
        """Statements that store the tiles `x0`, `x1`, ... of `dim` channels side by side."""
        return [f"dense_member_store({planes[0]}, {i}, page, at, keep, x{i}, N, {dim}, "
                f"DP, {members})" for i in range(members)]


FORMAT = Dense
