"""direction: vectors of two layers as one direction and two lengths, the odd ones apart."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, Planes, Side, StepPlane
from kvcompile.kernels.dense import CPP
from kvcompile.kernels.triton_source import TILES
from kvcompile.kernels.wrapper import Wrapper, root, total
from kvcompile.recipe import Term

FLAT = 1e-4  # below this sine two directions are as good as one, or opposite


@dataclass(frozen=True)
class Direction(Wrapper):
    """(a, b) -> (|a| e, |b| e), e = slerp(a / |a|, b / |b|; t), stored by the format inside.

    MiniCache (arXiv:2405.14366, section 4): x [..., 2 D] holds a token's vectors in two layers side
    by side. Of every 128 tokens the `kept` whose two vectors differ most in angle are stored as
    they are beside the others; lengths are fp16.
    """

    of: Term = Term("dense")
    t: float = 0.6
    kept: int = 6
    block: ClassVar[int] = PAGE  # type: ignore[misc]
    name: ClassVar[str] = "direction"
    examples: ClassVar[tuple[str, ...]] = ("direction",
        "direction(of=int(bits=4, axis=channel), kept=0)", "direction(of=fp8, t=0.2)")

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise RecipeError(f"direction(t={self.t}): t must be from 0 to 1")
        if not 0 <= self.kept <= PAGE:
            raise RecipeError(f"direction(kept={self.kept}): kept must be from 0 to {PAGE}")

    def own(self, dim: int) -> Planes:
        if dim % 2:
            raise RecipeError(f"direction: {dim} channels are not those of two layers")
        return {"length": StepPlane(torch.float16, (2, PAGE))}

    def planes(self, dim: int, dtype: torch.dtype, side: Side) -> Planes:
        planes = {**self._coarse(dim // 2, dtype, side), **self.own(dim)}
        if self.kept:
            planes["place"] = StepPlane(torch.uint8, (self.kept,))
            planes["exact"] = StepPlane(dtype, (2, self.kept, dim // 2))
        return planes

    def _coarse(self, dim: int, dtype: torch.dtype, side: Side) -> Planes:
        inside = self.inner.planes(dim, dtype, side)
        if inside.keys() & {"length", "place", "exact"}:
            raise RecipeError("direction cannot wrap itself")
        steps = PAGE // self.inner.step
        return {name: spec.coarser(steps) for name, spec in inside.items()}

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        a, b = x.float().unflatten(-2, (-1, PAGE)).chunk(2, -1)     # [..., n, 128, D]
        lengths = [root(total(v * v)) for v in (a, b)]
        a, b = (v / torch.where(n == 0, 1, n) for v, n in zip((a, b), lengths, strict=True))
        none = [n == 0 for n in lengths]  # zeros have no direction: the other's is the pair's
        a, b = torch.where(none[0], b, a), torch.where(none[1], a, b)
        cosine = total(a * b).clamp(-1, 1)
        first, second = self._shares(cosine)
        e, dim = (first * a + second * b).flatten(-3, -2), a.shape[-1]
        specs = self.inner.planes(dim, x.dtype, side)
        inside = {name: y.to(specs[name].dtype) for name, y in self.inner.encode(e, side).items()}
        planes = {**self.join(inside, dim, side),
                  "length": torch.cat(lengths, -1).mT.to(torch.float16)}
        if self.kept:
            place = cosine.squeeze(-1).sort(dim=-1, stable=True).indices[..., : self.kept]
            both = x.unflatten(-2, (-1, PAGE)).unflatten(-1, (2, -1))  # [..., n, 128, 2, D]
            at = place[..., None, None].expand(*place.shape, *both.shape[-2:])
            planes["place"] = place.to(torch.uint8)
            planes["exact"] = both.gather(-3, at).transpose(-3, -2).contiguous()
        return planes

    def _shares(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """What of each direction makes the one between them; sines in fp64, as in the kernel."""
        angle = cosine.double().acos()
        sine = angle.sin()
        flat, safe = sine < FLAT, sine.clamp_min(FLAT)
        first, second = (torch.where(flat, share, (share * angle).sin() / safe)
                         for share in (1 - self.t, self.t))
        return first.float(), second.float()

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        e = self.inner.decode(self.split(planes, dim // 2, side), dim // 2, torch.float32, side)
        e = e.unflatten(-2, (-1, 1, PAGE))                            # [..., n, 1, 128, D]
        x = self._replace(planes, e * planes["length"].float()[..., None])
        return x.transpose(-3, -2).flatten(-2).flatten(-3, -2).to(dtype)

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        """Of merged tokens |x| and |x'| in the worst case: the other direction is not stored."""
        e = self.inner.decode(self.split(planes, dim // 2, side), dim // 2, torch.float32, side)
        length = planes["length"].float()[..., None] * (1 + 2.0**-9) + 2.0**-24
        bound = length * (e.unflatten(-2, (-1, 1, PAGE)).abs() + 1)
        x = self._replace({**planes, "exact": torch.zeros_like(planes["exact"])}
                          if self.kept else planes, bound)
        return x.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def _replace(self, planes: dict[str, Tensor], x: Tensor) -> Tensor:
        """x [..., n, 2, 128, D] with the tokens that are stored as they were."""
        if not self.kept:
            return x
        exact = planes["exact"].to(x.dtype)
        at = planes["place"].long()[..., None, :, None].expand_as(exact)
        return x.scatter(-2, at, exact)

    def cpp_member(self, dim: int, members: int, dtype: torch.dtype, side: Side
                   ) -> tuple[str, list[int]]:
        """The C++ type that reads `dim` channels of one of two layers (`kernels/cpp/direction.h`),
        and how far from the first layer's part of each plane the second's is."""
        if members != 2:
            raise RecipeError(f"direction is of two layers, not of {members}")
        inside = self.inner_cpp(dim, dtype, side)
        apart = [0] * len(self.inner.planes(dim, dtype, side)) + [PAGE]
        return (f"Direction<{inside}, {dim}, {self.kept}, {CPP[dtype]}>",
                [*apart, 0, self.kept * dim] if self.kept else apart)

    def cpp_writer(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that writes both layers; RecipeError if none does."""
        inside, reader = self.inner_writer(dim // 2, dtype, side), self.cpp_member(
            dim // 2, 2, dtype, side)[0]
        bits = int(torch.tensor(self.t, dtype=torch.float64).view(torch.int64))
        return (f"DirectionWriter<{inside}, {reader}, {dim // 2}, {self.kept}, {CPP[dtype]}, "
                f"{bits}ull>")

    def triton_member(self, dim: int, members: int, dtype: torch.dtype, side: Side,
                      planes: list[str]) -> str:
        """The tile of `dim` channels of one of two layers (`kernels/triton/direction.py`)."""
        if members != 2:
            raise RecipeError(f"direction is of two layers, not of {members}")
        at = len(self.inner.planes(dim, dtype, side))
        inside = self.inner_triton(dim, dtype, side, planes[:at])
        length, *rest = planes[at:]
        place, exact = rest or (length, length)  # unused where no token is kept
        return (f"direction({inside}, {length}, {place}, {exact}, member, page, at, keep, N, "
                f"{dim}, DP, {self.kept})")

    def triton_member_writer(self, dim: int, members: int, dtype: torch.dtype, side: Side,
                             planes: list[str]) -> list[str]:
        """Statements that store the tiles `x0` and `x1`; RecipeError if none can."""
        if members != 2:
            raise RecipeError(f"direction is of two layers, not of {members}")
        if dim & (dim - 1):
            raise RecipeError(f"the Triton writer needs heads of a power of two, not of {dim}")
        at = len(self.inner.planes(dim, dtype, side))
        length, *rest = planes[at:]
        place, exact = rest or (length, length)  # unused where no token is kept
        inside = self.inner_triton_writer(dim, dtype, side, planes[:at])
        return [f"cosines = tl.zeros(({PAGE // self.triton_tile}, N), tl.float32)",
                TILES, "cosines = collected(cosines, cosine_between(x0, x1, N, DP), part)",
                TILES, f"x = direction_of(x0, x1, cosines, part, {length}, {place}, {exact}, page, "
                f"keep, N, {dim}, DP, {self.kept}, {self.t}, {FLAT})", *inside]

    @property
    def triton_tile(self) -> int:
        """Tokens that are merged at a time: two tiles of a whole page are more than registers."""
        return max(32, self.inner.step)

    def limit(self, dtype: torch.dtype) -> float:
        return torch.finfo(torch.float16).max / 32  # a length is at most the root of 1,024 numbers


FORMAT = Direction
