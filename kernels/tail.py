"""tail: the last channels of every token, in another format; the first ones are left out."""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.format import Planes, Side, StepPlane, term_of
from kvcompile.kernels.triton_source import TRITON, inside, interpreted, padded
from kvcompile.kernels.wrapper import Wrapper
from kvcompile.recipe import Term
from kvcompile.store import SIDES, Store


@dataclass(frozen=True)
class Tail(Wrapper):
    """x -> (0, of(x[drop:])): what only the newest tokens keep lies in front.

    Where a layer stores [K - B z, z] of a token, z being a latent, recent tokens are exact and
    older ones are B z (CSKV, arXiv:2409.10593). Of each step the power of two above all that is
    left out is kept: no other bound follows from what is stored.
    """

    of: Term = Term("dense")
    drop: int = 16
    name: ClassVar[str] = "tail"
    triton_span: ClassVar[int] = 16  # wider tiles spill where keys are rebuilt
    examples: ClassVar[tuple[str, ...]] = ("tail", "tail(drop=8)",
        "tail(of=int(bits=4, axis=channel, group=32))")

    def __post_init__(self) -> None:
        if self.drop < 1:
            raise RecipeError(f"tail(drop={self.drop}): drop must be at least 1")

    def left(self, dim: int) -> int:
        """How many channels are stored; RecipeError if none is."""
        if dim <= self.drop:
            raise RecipeError(f"tail(drop={self.drop}): nothing is left of {dim} channels")
        return dim - self.drop

    def own(self, dim: int) -> Planes:
        return {"above": StepPlane(torch.int8, (1,))}

    def planes(self, dim: int, dtype: torch.dtype, side: Side) -> Planes:
        return super().planes(self.left(dim), dtype, side)

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        head, rest = x.tensor_split([self.drop], -1)
        peak = head.float().abs().unflatten(-2, (-1, self.step)).amax((-1, -2))
        above = torch.where(peak == 0, -127, torch.frexp(peak)[1].clamp(-126, 127))
        inside = self.join(self.inner.encode(rest, side), self.left(x.shape[-1]), side)
        return {**inside, "above": above[..., None].to(torch.int8)}

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        left = self.left(dim)
        rest = self.inner.decode(self.split(planes, left, side), left, dtype, side)
        return torch.nn.functional.pad(rest, (self.drop, 0))

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        left = self.left(dim)
        inside = self.inner.error_bound(self.split(planes, left, side), left, side).float()
        above = planes["above"].repeat_interleave(self.step, -2)
        peak = torch.ldexp(torch.ones_like(above, dtype=torch.float32), above.int())
        return torch.cat([peak.expand(*inside.shape[:-1], self.drop), inside], -1)

    def limit(self, dtype: torch.dtype) -> float:
        return min(self.inner.limit(dtype), 2.0**126)

    def cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the planes (`kernels/cpp/tail.h`)."""
        if self.drop % 16 or dim % 16:
            raise RecipeError(f"{self.drop} channels of {dim} are no multiples of 16")
        return f"Tail<{self.inner_cpp(self.left(dim), dtype, side)}, {dim}, {self.drop}>"

    def cpp_writer(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that writes the planes; RecipeError if none does."""
        inside = self.inner_writer(self.left(dim), dtype, side)
        return (f"TailWriter<{inside}, {self.cpp(dim, dtype, side)}, {dim}, {self.drop}, "
                f"{self.step}>")

    def triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of what is stored behind zeros (`kernels/triton/wrapper.py`)."""
        left = self.left(dim)
        tile = inside(self.inner_triton(left, dtype, side, planes[:-1]), left)
        return f"behind({tile}, N, {left}, {self.drop}, DP, {TRITON[dtype]}, {interpreted()})"

    def triton_writer(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
                      ) -> list[str]:
        """Statements that store the tile `x`."""
        left = self.left(dim)
        lines = self.inner_triton_writer(left, dtype, side, planes[:-1])
        return [f"last = without_front({planes[-1]}, page, at, keep, x, N, {left}, {padded(left)}, "
                f"{self.drop}, DP, {self.step}, {TRITON[dtype]}, {interpreted()})",
                *(re.sub(r"\bx\b", "last", inside(line, left)) for line in lines)]


def dropped(store: Store) -> tuple[int, int]:
    """How many of the first channels of K and of V the body has lost."""
    k, v = (f.drop if isinstance(f := store.side(name).format, Tail) else 0 for name in SIDES)
    return k, v


def without(store: Store, drops: tuple[int, int]) -> Store:
    """`store`, whose body has lost so many of the first channels of K and of V."""
    k, v = (side if not drop else replace(side, format=Tail(term_of(side.format), drop))
            for side, drop in zip((store.k, store.v), drops, strict=True))
    return replace(store, k=k, v=v)


FORMAT = Tail
