"""channels: of each block of tokens the channels of largest norm, in another format."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.format import Planes, Side, StepPlane
from kvcompile.kernels.triton_source import TRITON, inside, interpreted
from kvcompile.kernels.wrapper import Wrapper
from kvcompile.recipe import Term


@dataclass(frozen=True)
class Channels(Wrapper):
    """x -> x[:, c] by `of`, 0 elsewhere; c: the channels of largest norm of a block of tokens.

    The share `drop` is left out, rounded down to whole channels. Reading gathers these channels of
    q (ThinK, arXiv:2407.21018, section 3.3). Of equal channels the first ones stay.
    """

    of: Term = Term("dense")
    drop: float = 0.5
    block: int = 128
    name: ClassVar[str] = "channels"
    examples: ClassVar[tuple[str, ...]] = ("channels(drop=0.3)",
        "channels(of=int(bits=4, axis=channel, group=32), block=32)")

    def __post_init__(self) -> None:
        self.check_block()
        if not 0 <= self.drop < 1:
            raise RecipeError(f"channels(drop={self.drop}): must be at least 0 and less than 1")

    def stay(self, dim: int) -> int:
        """How many channels are stored."""
        return dim - int(dim * self.drop)

    def own(self, dim: int) -> Planes:
        return {"place": StepPlane(torch.int16, (dim,)), "peak": StepPlane(torch.float32, (1,))}

    def planes(self, dim: int, dtype: torch.dtype, side: Side) -> Planes:
        return super().planes(self.stay(dim), dtype, side)

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        blocks, left = x.unflatten(-2, (-1, self.step)), self.stay(x.shape[-1])
        norms = blocks.float().square().sum(-2)
        place = norms.argsort(dim=-1, descending=True, stable=True)[..., :left].sort(-1).values
        at = place[..., None, :].expand(*blocks.shape[:-1], left)
        inside = self.join(self.inner.encode(blocks.gather(-1, at).flatten(-3, -2), side), left,
                           side)
        peak = blocks.float().abs().scatter(-1, at, 0.0).amax((-1, -2))[..., None]
        return {**inside, "place": place.to(torch.int16), "peak": peak}

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        left = self.stay(dim)
        rest = self.inner.decode(self.split(planes, left, side), left, dtype, side)
        return self._spread(planes, rest, rest.new_zeros(*rest.shape[:-1], dim))

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        left = self.stay(dim)
        inside = self.inner.error_bound(self.split(planes, left, side), left, side)
        peak = planes["peak"].repeat_interleave(self.step, -2).expand(*inside.shape[:-1], dim)
        return self._spread(planes, inside.float(), peak.clone())

    def _spread(self, planes: dict[str, Tensor], rest: Tensor, out: Tensor) -> Tensor:
        """`out` [.., tokens, D] with the stored channels [.., tokens, C] in their places."""
        at = planes["place"].long().repeat_interleave(self.step, -2)
        return out.scatter(-1, at, rest)

    def cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the planes (`kernels/cpp/wrapper.h`)."""
        left = self.stay(dim)
        if left % 16:
            raise RecipeError(f"{left} channels are left, which is no multiple of 16")
        return f"Channels<{self.inner_cpp(left, dtype, side)}, {dim}, {left}, {self.step}>"

    def triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of the channels that are stored, in their places, and zeros."""
        left = self.stay(dim)
        tile = inside(self.inner_triton(left, dtype, side, planes[:-2]), left)
        return (f"spread({tile}, {planes[-2]}, page, at, N, {left}, {dim}, DP, {self.step}, "
                f"{TRITON[dtype]}, {interpreted()})")


FORMAT = Channels
