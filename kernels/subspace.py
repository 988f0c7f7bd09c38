"""subspace: 128 tokens as mixtures of a few vectors, which layers that lie together share."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, Planes, Side, StepPlane
from kvcompile.kernels.dense import CPP
from kvcompile.kernels.triton_source import TRITON, inside, interpreted
from kvcompile.kernels.wrapper import Wrapper
from kvcompile.recipe import Term

ROUGH = 2.0**-16  # of sums of at most 128 products in fp32, twice


@dataclass(frozen=True)
class Subspace(Wrapper):
    """x [128, dim] -> u b: u [128, rank] orthonormal, stored by the format inside; b = u^T x.

    xKV (arXiv:2503.18893, section 4): x = u s v^T cut at `rank`, x being a token's channels in
    several layers side by side, so that the layers have u in common and each its columns of b.
    There u is a whole prompt's; here every 128 tokens have their own, with b in 8 bits (`basis=
    int8`, a scale a row) or in the model's type (`same`). Of every 128 tokens the largest error is
    kept: no other bound follows from what is stored.
    """

    of: Term = Term("dense")
    rank: int = 32
    basis: str = "int8"
    block: ClassVar[int] = PAGE  # type: ignore[misc]
    name: ClassVar[str] = "subspace"
    examples: ClassVar[tuple[str, ...]] = ("subspace", "subspace(rank=128, basis=same)",
        "subspace(of=int(bits=4, axis=channel), rank=16)")

    def __post_init__(self) -> None:
        if self.rank % 16 or not 0 < self.rank <= PAGE:
            raise RecipeError(f"subspace(rank={self.rank}): rank must be a multiple of 16 up to "
                              f"{PAGE}")
        if self.basis not in ("int8", "same"):
            raise RecipeError(f"subspace(basis={self.basis}): basis must be int8 or same")

    def ranks(self, dim: int) -> int:
        """Vectors that are mixed; never more than there are channels."""
        return min(self.rank, dim)

    def own(self, dim: int) -> Planes:
        return {"worst": StepPlane(torch.float32, (1,))}

    def planes(self, dim: int, dtype: torch.dtype, side: Side) -> Planes:
        rank = self.ranks(dim)
        inside, steps = self.inner.planes(rank, dtype, side), PAGE // self.inner.step
        if inside.keys() & {"basis", "unit", "worst"}:
            raise RecipeError("subspace cannot wrap itself")
        whole = self.basis == "int8"
        basis = {"basis": StepPlane(torch.int8 if whole else dtype, (rank, dim))}
        unit = {"unit": StepPlane(torch.float32, (rank,))} if whole else {}
        return {**{name: spec.coarser(steps) for name, spec in inside.items()}, **basis, **unit,
                **self.own(dim)}

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        dim, blocks = x.shape[-1], x.unflatten(-2, (-1, PAGE))           # [..., n, 128, dim]
        if not blocks.numel():
            like = self.encode(x.new_zeros(*x.shape[:-2], PAGE, dim), side)
            return {name: y.narrow(x.dim() - 2, 0, 0) for name, y in like.items()}
        flat = blocks.double().reshape(-1, PAGE, dim)
        # one by one: a block is stored as it is alone, bit by bit
        both = [_factors(block, self.ranks(dim)) for block in flat]
        u, b = (torch.stack(each).view(*blocks.shape[:-2], *each[0].shape)
                for each in zip(*both, strict=True))
        rank = self.ranks(dim)
        specs = self.inner.planes(rank, x.dtype, side)
        inside = self.inner.encode(u.float().flatten(-3, -2), side)
        planes = self.join({n: y.to(specs[n].dtype) for n, y in inside.items()}, rank, side)
        if self.basis == "int8":
            unit = (b.abs().amax(-1) / 127).float()
            codes = b / torch.where(unit == 0, 1, unit).double()[..., None]
            planes |= {"basis": codes.round().clamp(-127, 127).to(torch.int8), "unit": unit}
        else:
            planes["basis"] = b.to(x.dtype)
        seen, least = self._mixed(planes, dim, side)
        worst = (seen.double() - blocks.double()).abs().amax((-1, -2)) + ROUGH * least
        return {**planes, "worst": worst.float()[..., None] * (1 + ROUGH)}

    def _mixed(self, planes: dict[str, Tensor], dim: int, side: Side) -> tuple[Tensor, Tensor]:
        """x' [..., n, 128, dim] in fp32, and the largest sum of magnitudes in each block."""
        rank = self.ranks(dim)
        u = self.inner.decode(self.split(planes, rank, side), rank, torch.float32, side)
        u, b = u.unflatten(-2, (-1, PAGE)), planes["basis"].float()
        if "unit" in planes:
            b = b * planes["unit"][..., None]
        return u @ b, (u.abs().double() @ b.abs().double()).amax((-1, -2))

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        return self._mixed(planes, dim, side)[0].flatten(-3, -2).to(dtype)

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        worst = planes["worst"][..., None].expand(*planes["worst"].shape[:-1], PAGE, dim)
        return worst.flatten(-3, -2)

    def limit(self, dtype: torch.dtype) -> float:
        """A row of b is at most the root of 128 numbers."""
        kept = torch.float32 if self.basis == "int8" else dtype
        return torch.finfo(kept).max / 16

    def cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the planes (`kernels/cpp/subspace.h`)."""
        return self.cpp_member(dim, 1, dtype, side)[0]

    def cpp_member(self, dim: int, members: int, dtype: torch.dtype, side: Side
                   ) -> tuple[str, list[int]]:
        """The C++ type that reads `dim` channels of one of the `members` that lie side by side, and
        how far they are apart in each plane."""
        rank = self.ranks(dim * members)
        inside = self.inner_cpp(rank, dtype, side)
        number = "int8_t" if self.basis == "int8" else CPP[dtype]
        apart = [0] * len(self.inner.planes(rank, dtype, side))
        return (f"Subspace<{inside}, {dim}, {rank}, {dim * members}, {number}>",
                [*apart, dim, *([0] if self.basis == "int8" else []), 0])

    def triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of all `dim` channels (`kernels/triton/wrapper.py`)."""
        return self._triton(dim, 1, dtype, side, planes, "0")

    def triton_member(self, dim: int, members: int, dtype: torch.dtype, side: Side,
                      planes: list[str]) -> str:
        """The tile of `dim` channels of one of the `members` that lie side by side."""
        return self._triton(dim, members, dtype, side, planes, f"member * {dim}")

    def _triton(self, dim: int, members: int, dtype: torch.dtype, side: Side, planes: list[str],
                first: str) -> str:
        rank, scaled = self.ranks(dim * members), self.basis == "int8"
        at = len(self.inner.planes(rank, dtype, side))
        tile = inside(self.inner_triton(rank, dtype, side, planes[:at]), rank)
        return (f"mixed({tile}, {planes[at]}, {planes[at + scaled]}, page, {first}, {rank}, "
                f"{dim * members}, {dim}, DP, {scaled}, {TRITON[dtype]}, {interpreted()})")


def _factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """u [128, rank], orthonormal, and b [rank, dim] with u b nearest to x [128, dim], in fp64."""
    q, r = torch.linalg.qr(x) if x.shape[1] < PAGE else (None, x)  # the smaller of two problems
    u = torch.linalg.eigh(r @ r.T).eigenvectors[:, -rank:].flip(-1)
    u = u if q is None else q @ u
    return u, u.T @ x


FORMAT = Subspace
