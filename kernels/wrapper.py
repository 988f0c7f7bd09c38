"""Formats around a format: what they share is that another one stores the bulk of the numbers."""

from abc import ABC, abstractmethod
from functools import cached_property
from math import lcm
from typing import ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, Format, Planes, Side, StepPlane, format_of, term_of
from kvcompile.kernels.triton_source import of
from kvcompile.recipe import Term, parse_term


class Wrapper(ABC):
    """Base of formats with a field `of`, the term of the format inside.

    `own` gives the wrapper's planes of a step of `block` tokens; those of the format inside keep
    their layout in memory, so that its reader works on them as they are.
    """

    name: ClassVar[str]
    of: Term
    block: int = 1
    turned: ClassVar[bool] = False  # whether its reader is given turned queries

    @cached_property
    def inner(self) -> Format:
        """The format inside."""
        return format_of(self.of if isinstance(self.of, Term) else parse_term(self.of))

    def check_block(self) -> None:
        """Raise RecipeError for a block that does not divide a page."""
        if self.block not in (16, 32, 64, 128):
            raise RecipeError(f"{self.name}(block={self.block}): block must be one of 16, 32, 64, "
                              f"{PAGE}")

    @property
    def step(self) -> int:
        return lcm(self.inner.step, self.block)

    @abstractmethod
    def own(self, dim: int) -> Planes:
        """The wrapper's planes."""

    def planes(self, dim: int, dtype: torch.dtype, side: Side) -> Planes:
        inside, own = self.inner.planes(dim, dtype, side), self.own(dim)
        if inside.keys() & own.keys():
            raise RecipeError(f"{self.name} cannot wrap itself: {term_of(self)}")  # type: ignore[arg-type]
        steps = self.step // self.inner.step
        return {**{name: spec.coarser(steps) for name, spec in inside.items()}, **own}

    def join(self, encoded: dict[str, Tensor], dim: int, side: Side) -> dict[str, Tensor]:
        """What the format inside encoded, in the wrapper's steps."""
        specs, steps = self._inside(dim, side), self.step // self.inner.step
        return {name: specs[name].join(x, steps) for name, x in encoded.items()}

    def split(self, planes: dict[str, Tensor], dim: int, side: Side) -> dict[str, Tensor]:
        """The planes of the format inside, in its own steps."""
        specs, steps = self._inside(dim, side), self.step // self.inner.step
        return {name: spec.split(planes[name], steps) for name, spec in specs.items()}

    def _inside(self, dim: int, side: Side) -> dict[str, StepPlane]:
        return self.inner.planes(dim, torch.float32, side)

    def limit(self, dtype: torch.dtype) -> float:
        return self.inner.limit(dtype)

    def inner_cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the format inside; RecipeError if none does."""
        if not hasattr(self.inner, "cpp"):
            raise RecipeError(f"format {self.inner.name} has no C++ reader")
        if getattr(self.inner, "turned", False):
            raise RecipeError(f"{self.name} has no C++ reader around {self.inner.name}")
        return str(self.inner.cpp(dim, dtype, side))

    def inner_writer(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that writes the format inside; RecipeError if none does."""
        if not hasattr(self.inner, "cpp_writer"):
            raise RecipeError(f"format {self.inner.name} has no C++ writer")
        return str(self.inner.cpp_writer(dim, dtype, side))

    def inner_triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of the format inside; RecipeError if it has none."""
        return str(of(self.inner, "triton", "reader")(dim, dtype, side, planes))

    def inner_triton_writer(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
                            ) -> list[str]:
        """What stores `x` in the format inside; RecipeError if nothing does."""
        if self.inner.step < getattr(self, "triton_tile", self.step):
            check_steps(self.inner)
        return list(of(self.inner, "triton_writer", "writer")(dim, dtype, side, planes))

    @property
    def triton_alone(self) -> bool:
        """Whether its Triton writer takes one step at a time."""
        return getattr(self.inner, "triton_alone", False)

    @property
    def triton_span(self) -> int:
        """No tile that is read passes a multiple of so many tokens (`kernels/triton_source.py`)."""
        return getattr(self.inner, "triton_span", PAGE)


def check_steps(fmt: Format) -> None:
    """Raise RecipeError if the Triton writer of `fmt` cannot be given several steps at once."""
    if getattr(fmt, "triton_alone", False):
        raise RecipeError(f"format {fmt.name} has no Triton writer of several blocks at once")


def root(x: Tensor) -> Tensor:
    """The square root of fp32 x, rounded correctly, as kernels have it: torch's own is not on every
    CPU (its vector library's last bit is off for a sixth of the numbers on some)."""
    return x.double().sqrt().float()


def total(x: Tensor) -> Tensor:
    """The sum over the last dim, kept: half of it added to the other, so that every machine and
    the kernels (`kernels/cpp/wrapper_writer.h`) get the same bits."""
    while (n := x.shape[-1]) > 1:
        x = torch.cat([x[..., : n // 2] + x[..., n // 2 : n // 2 * 2], x[..., n // 2 * 2 :]], -1)
    return x
