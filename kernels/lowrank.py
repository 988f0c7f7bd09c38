"""lowrank: what another format loses of a block is stored as a product of two thin matrices."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.format import Planes, Side, StepPlane
from kvcompile.kernels.int_group import F16_MAX
from kvcompile.kernels.wrapper import Wrapper, root, total
from kvcompile.recipe import Term

STEPS = 3  # of the iteration
MOST = 8192  # numbers of a block that a GPU's program can hold
FACTOR, MODULUS = 40503, 65536  # close to the golden ratio: multiples spread evenly


@dataclass(frozen=True)
class Lowrank(Wrapper):
    """x -> of(x) + a b: a [block, rank], b [rank, dim] in fp16, the best fit to x - of(x).

    GEAR's error feedback (arXiv:2403.05527, section 3), by subspace iteration. Every sum is made in
    one order, so that the kernels get the same bits.
    """

    of: Term = Term("int")
    rank: int = 4
    block: int = 128
    name: ClassVar[str] = "lowrank"
    triton_free: ClassVar[tuple[str, ...]] = ("a", "b")  # the signs of directions are free
    triton_alone: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = ("lowrank(of=int(bits=2, axis=channel))",
        "lowrank(of=int(bits=2), rank=2, block=32)",
        "lowrank(of=outliers(of=int(bits=2), fraction=0.02))")

    def __post_init__(self) -> None:
        self.check_block()
        if self.rank not in range(1, 17):
            raise RecipeError(f"lowrank(rank={self.rank}): rank must be 1 to 16")

    def own(self, dim: int) -> Planes:
        return {"a": StepPlane(torch.float16, (self.rank, self.step)),
                "b": StepPlane(torch.float16, (self.rank, dim))}

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        x, dim = x.float(), x.shape[-1]
        inside = self.inner.encode(x, side)
        error = (x - self.inner.decode(inside, dim, torch.float32, side)).unflatten(
            -2, (-1, self.step))
        turned, right = error.mT.contiguous(), _start(dim, self.rank).to(x.device)
        right = right.expand(*error.shape[:-2], self.rank, dim)
        for _ in range(STEPS):
            right = _orthonormal(_times(turned, _times(error, right)))
        left = _times(error, right).clamp(-F16_MAX, F16_MAX)
        return {**self.join(inside, dim, side), "a": left.to(torch.float16),
                "b": right.to(torch.float16)}

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        rest = self.inner.decode(self.split(planes, dim, side), dim, torch.float32, side)
        return (rest + self._product(planes)).to(dtype)

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        inside = self.inner.error_bound(self.split(planes, dim, side), dim, side)
        return inside + self._product(planes).abs()  # the correction shrinks the error on average

    def limit(self, dtype: torch.dtype) -> float:
        return min(self.inner.limit(dtype), 2.0**20)  # encode needs fourth powers of errors

    def _product(self, planes: dict[str, Tensor]) -> Tensor:
        return (planes["a"].float().mT @ planes["b"].float()).flatten(-3, -2)

    def cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the planes (`kernels/cpp/wrapper.h`)."""
        return f"Lowrank<{self.inner_cpp(dim, dtype, side)}, {dim}, {self.step}, {self.rank}>"

    def cpp_writer(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that writes the planes (`kernels/cpp/lowrank_writer.h`)."""
        inside = self.inner_writer(dim, dtype, side)
        return (f"LowrankWriter<{inside}, {self.cpp(dim, dtype, side)}, {dim}, {self.step}, "
                f"{self.rank}, {STEPS}, {FACTOR}, {MODULUS}>")

    def triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of decoded numbers (`kernels/triton/lowrank.py`)."""
        inside = self.inner_triton(dim, dtype, side, planes[:-2])
        return (f"lowrank({inside}, {planes[-2]}, {planes[-1]}, page, at, N, {dim}, DP, "
                f"{self.step}, {self.rank})")

    def triton_writer(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
                      ) -> list[str]:
        """Statements that store the tile `x`, what is inside first; RecipeError if none can."""
        if self.step * dim > MOST:
            raise RecipeError(f"the Triton writer holds {MOST} numbers of a block, not "
                              f"{self.step} x {dim}; use block={MOST // dim}")
        if self.triton_span < self.step:
            raise RecipeError(f"the Triton writer reads {self.step} tokens at once, not "
                              f"{self.triton_span}")
        inside = self.inner_triton(dim, dtype, side, planes[:-2])
        return ["whole_x = x", *self.inner_triton_writer(dim, dtype, side, planes[:-2]),
                "tl.debug_barrier()",
                f"fit_lowrank({planes[-2]}, {planes[-1]}, page, at, keep, whole_x - {inside}, N, "
                f"{dim}, DP, {self.rank}, {STEPS}, {FACTOR}, {MODULUS})"]


@cache
def _start(dim: int, rank: int) -> Tensor:
    """[rank, dim] where the iteration starts: fixed, so that equal tokens are stored equally; and
    whole numbers' multiples modulo another, so that a kernel starts there too."""
    many = torch.arange(1, 2 * rank, 2)[:, None] * torch.arange(1, dim + 1)
    return (many * FACTOR % MODULUS - MODULUS // 2).float() / MODULUS


def _times(m: Tensor, rows: Tensor) -> Tensor:
    """m [..., A, B], rows [..., r, B] -> [..., r, A]: m times each row."""
    return torch.stack([total(m * row[..., None, :]).squeeze(-1) for row in rows.unbind(-2)], -2)


def _orthonormal(rows: Tensor) -> Tensor:
    """The rows [..., r, D] as an orthonormal basis by Gram-Schmidt, each row twice (Kahan); a row
    that lies among those before it becomes 0."""
    done = rows[..., :0, :]
    for x in rows.split(1, -2):
        before = total(x * x)
        for _ in range(2 if done.shape[-2] else 0):
            x = x - total((done * total(done * x)).mT).mT
        size = total(x * x)
        length = root(size)
        x = torch.where(size > before * 1e-12, x / length, 0.0)
        done = torch.cat([done, x], -2)
    return done


FORMAT = Lowrank
