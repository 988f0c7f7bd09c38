"""centered: the mean of a block's tokens is stored apart, the rest of them by another format."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.format import Planes, Side, StepPlane
from kvcompile.kernels.triton_source import of
from kvcompile.kernels.wrapper import Wrapper, total
from kvcompile.recipe import Term


@dataclass(frozen=True)
class Centered(Wrapper):
    """x -> mean (fp16, of `block` tokens of each channel) + of(x - mean).

    Keys have a common offset that per-token formats would spend their range on.
    """

    of: Term = Term("int")
    block: int = 128
    name: ClassVar[str] = "centered"
    examples: ClassVar[tuple[str, ...]] = ("centered(of=int(bits=4, symmetric=true))",
        "centered(of=fp8, block=32)")

    def __post_init__(self) -> None:
        self.check_block()

    def own(self, dim: int) -> Planes:
        return {"mean": StepPlane(torch.float16, (dim,))}

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        blocks = x.float().unflatten(-2, (-1, self.step))
        mean = (total(blocks.mT).squeeze(-1) / self.step).to(torch.float16)
        rest = (blocks - mean.float()[..., None, :]).flatten(-3, -2)
        inside = self.join(self.inner.encode(rest, side), x.shape[-1], side)
        return {**inside, "mean": mean}

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        rest = self.inner.decode(self.split(planes, dim, side), dim, torch.float32, side)
        mean = planes["mean"].float().repeat_interleave(self.step, -2)
        return (rest + mean).to(dtype)

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        return self.inner.error_bound(self.split(planes, dim, side), dim, side)

    def limit(self, dtype: torch.dtype) -> float:
        return min(65504.0, self.inner.limit(dtype)) / 2

    def cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the planes (`kernels/cpp/wrapper.h`)."""
        return f"Centered<{self.inner_cpp(dim, dtype, side)}, {dim}, {self.step}>"

    def cpp_writer(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that writes the planes; RecipeError if none does."""
        inside = self.inner_writer(dim, dtype, side)
        return f"CenteredWriter<{inside}, {self.cpp(dim, dtype, side)}, {dim}, {self.step}>"

    def triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of decoded numbers (`kernels/triton/wrapper.py`)."""
        inside = self.inner_triton(dim, dtype, side, planes[:-1])
        return f"centered({inside}, {planes[-1]}, page, at, N, {dim}, DP, {self.step})"

    def triton_writer(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
                      ) -> list[str]:
        """Statements that store the tile `x`."""
        return [f"x = center({planes[-1]}, page, at, keep, x, N, {dim}, DP, {self.step})",
                *self.inner_triton_writer(dim, dtype, side, planes[:-1])]

    def triton_pieces(self, dim: int, side: Side) -> tuple[int, list[int]]:
        """Channels that can be written by themselves, and how much of each plane is theirs."""
        many, inside = of(self.inner, "triton_pieces", "writer of some channels")(dim, side)
        return many, [*inside, many]


FORMAT = Centered
