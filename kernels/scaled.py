"""scaled: each channel is divided by a scale of its own before another format stores it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.format import Planes, Side, StepPlane
from kvcompile.kernels.int_group import F16_MAX, round_up
from kvcompile.kernels.triton_source import of
from kvcompile.kernels.wrapper import Wrapper, root
from kvcompile.recipe import Term


@dataclass(frozen=True)
class Scaled(Wrapper):
    """x -> of(x / c) * c, c = sqrt(max |x|) of a channel in a block, in fp16.

    The channel-separable tokenwise quantization of ZipCache (arXiv:2405.14256, section 4.1): per
    token formats then do not lose small channels beside large ones.
    """

    of: Term = Term("int")
    block: int = 128
    name: ClassVar[str] = "scaled"
    examples: ClassVar[tuple[str, ...]] = ("scaled(of=int(bits=4, group=64))",
        "scaled(of=nf4(axis=channel, group=32), block=16)")

    def __post_init__(self) -> None:
        self.check_block()

    def own(self, dim: int) -> Planes:
        return {"channel": StepPlane(torch.float16, (dim,))}

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        blocks = x.float().unflatten(-2, (-1, self.step))
        scale = round_up(root(blocks.abs().amax(-2))).clamp_min(2.0**-12)
        rest = (blocks / scale.float()[..., None, :]).flatten(-3, -2)
        inside = self.join(self.inner.encode(rest, side), x.shape[-1], side)
        return {**inside, "channel": scale}

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        rest = self.inner.decode(self.split(planes, dim, side), dim, torch.float32, side)
        return (rest * self._scale(planes)).to(dtype)

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        inside = self.inner.error_bound(self.split(planes, dim, side), dim, side)
        return inside * self._scale(planes)

    def limit(self, dtype: torch.dtype) -> float:
        return min(F16_MAX**2, self.inner.limit(dtype))

    def _scale(self, planes: dict[str, Tensor]) -> Tensor:
        return planes["channel"].float().repeat_interleave(self.step, -2)

    def cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the planes (`kernels/cpp/wrapper.h`)."""
        return f"Scaled<{self.inner_cpp(dim, dtype, side)}, {dim}, {self.step}>"

    def cpp_writer(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that writes the planes; RecipeError if none does."""
        inside = self.inner_writer(dim, dtype, side)
        return f"ScaledWriter<{inside}, {self.cpp(dim, dtype, side)}, {dim}, {self.step}>"

    def triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of decoded numbers (`kernels/triton/wrapper.py`)."""
        inside = self.inner_triton(dim, dtype, side, planes[:-1])
        return f"scaled({inside}, {planes[-1]}, page, at, N, {dim}, DP, {self.step})"

    def triton_writer(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
                      ) -> list[str]:
        """Statements that store the tile `x`."""
        given = f"{planes[-1]}, page, at, keep, x, N, {dim}, DP, {self.step}"
        return [f"x = scale_down({given})",
                *self.inner_triton_writer(dim, dtype, side, planes[:-1])]

    def triton_pieces(self, dim: int, side: Side) -> tuple[int, list[int]]:
        """Channels that can be written by themselves, and how much of each plane is theirs."""
        many, inside = of(self.inner, "triton_pieces", "writer of some channels")(dim, side)
        return many, [*inside, many]


FORMAT = Scaled
