"""hadamard: vectors are turned before another format stores them, which spreads outliers."""

from dataclasses import dataclass
from math import log2, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.format import Planes, Side
from kvcompile.kernels.wrapper import Wrapper
from kvcompile.recipe import Term


@dataclass(frozen=True)
class Hadamard(Wrapper):
    """x -> of(H x): H a normalized Hadamard matrix, as in QuaRot (arXiv:2404.00456, section 4).

    In heads whose dimension is no power of two the largest power of two that divides it is turned,
    block by block. Reading turns q, or the output, once instead of every stored vector.
    """

    of: Term = Term("int")
    name: ClassVar[str] = "hadamard"
    examples: ClassVar[tuple[str, ...]] = ("hadamard(of=int(bits=4))",
        "hadamard(of=int(bits=2, axis=channel))")
    turned: ClassVar[bool] = True

    def own(self, dim: int) -> Planes:
        if dim % 2:
            raise RecipeError(f"hadamard: head dimension {dim} is odd")
        return {}

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        return self.inner.encode(turn(x.float()), side)

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        return turn(self.inner.decode(planes, dim, torch.float32, side)).to(dtype)

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        size = dim & -dim
        inside = self.inner.error_bound(planes, dim, side).unflatten(-1, (-1, size))
        return (inside.sum(-1, keepdim=True) / sqrt(size)).expand_as(inside).flatten(-2)

    def limit(self, dtype: torch.dtype) -> float:
        return self.inner.limit(dtype) / 32  # a coordinate grows at most by the root of 1,024

    def cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the planes (`kernels/cpp/wrapper.h`)."""
        return f"Hadamard<{self.inner_cpp(dim, dtype, side)}, {dim}, {dim & -dim}>"

    def cpp_writer(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that writes the planes; RecipeError if none does."""
        inside = self.inner_writer(dim, dtype, side)
        return f"HadamardWriter<{inside}, {self.cpp(dim, dtype, side)}, {dim}>"

    def turn_size(self, dim: int) -> int:
        """Kernels may turn q, or the output, in blocks of so many channels and read `inner`."""
        return dim & -dim

    def triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of decoded numbers (`kernels/triton/wrapper.py`)."""
        inside = self.inner_triton(dim, dtype, side, planes)
        return f"turn({inside}, N, DP, {self.turn_size(dim)})"

    def triton_writer(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
                      ) -> list[str]:
        """Statements that store the tile `x`."""
        return [f"x = turn(x, N, DP, {self.turn_size(dim)})",
                *self.inner_triton_writer(dim, dtype, side, planes)]


def turn(x: Tensor) -> Tensor:
    """H x over the last dim, in blocks of the largest power of two that divides it; H = H^-1."""
    size = x.shape[-1] & -x.shape[-1]
    x = x.unflatten(-1, (-1, size))
    for _ in range(int(log2(size))):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        x = torch.cat([a + b, a - b], -1)
    return x.flatten(-2) / sqrt(size)


FORMAT = Hadamard
