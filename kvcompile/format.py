"""What a storage format is: planes, encode, decode, error bound and bits, in one frozen dataclass.

A format stores tokens in **steps**: `step` consecutive tokens of one kv head are encoded together
and never again (1 for per-token formats, the group size for per-channel ones). Planes are declared
per step; the cache keeps `PAGE // step` steps in a page.
"""

from dataclasses import fields
from functools import cache
from math import prod
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvcompile.errors import RecipeError, nearest
from kvcompile.recipe import Term
from kvcompile.registry import plugins

PAGE = 128  # tokens in a page; every step divides it

Side = Literal["k", "v"]


class StepPlane(NamedTuple):
    """One tensor of a format: what a step takes of it, and how a page arranges its steps.

    In a page `lanes` neighbouring steps lie interleaved in front of axis `at` of `shape`, so that
    a kernel reads the same number of that many steps at once.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    lanes: int = 1
    at: int = 0

    def page(self, step: int) -> tuple[int, ...]:
        """The shape of a page: (steps / lanes, *shape[:at], lanes, *shape[at:])."""
        steps = PAGE // step
        if self.lanes == 1:
            return (steps, *self.shape)
        return (steps // self.lanes, *self.shape[: self.at], self.lanes, *self.shape[self.at :])

    def steps(self, pages: Tensor) -> Tensor:
        """View pages [..., *page] as [..., steps / lanes, lanes, *shape]."""
        first = -len(self.shape) - 1
        if self.lanes == 1:
            return pages.unsqueeze(first)
        return pages.movedim(first + self.at, first)

    def coarser(self, steps: int) -> "StepPlane":
        """The same memory in steps of `steps` of these."""
        if steps == 1:
            return self
        wide = min(steps, self.lanes)  # steps that lie abreast in a coarser one
        inside = (*self.shape[: self.at], wide, *self.shape[self.at :])
        outer = () if steps <= self.lanes else (steps // wide,)
        return StepPlane(self.dtype, (*outer, *inside), self.lanes // wide, self.at)

    def join(self, x: Tensor, steps: int) -> Tensor:
        """[..., n * steps, *shape] -> [..., n, *coarser(steps).shape]."""
        if steps == 1:
            return x
        wide, rest = min(steps, self.lanes), len(self.shape)
        x = x.unflatten(-rest - 1, (-1, steps // wide, wide))
        x = x.movedim(-rest - 1, -rest - 1 + self.at)
        return x.squeeze(-rest - 2) if steps <= self.lanes else x

    def split(self, x: Tensor, steps: int) -> Tensor:
        """Inverse of `join`."""
        if steps == 1:
            return x
        rest = len(self.shape)
        if steps <= self.lanes:
            x = x.unsqueeze(-rest - 2)
        return x.movedim(-rest - 1 + self.at, -rest - 1).flatten(-rest - 3, -rest - 1)


Planes = dict[str, StepPlane]


@runtime_checkable
class Format(Protocol):
    """One storage format. The dataclass fields are its options, with their legal values.

    A class may also have `examples`, texts of it that show its options at work (the laws are
    tried on all their combinations, `kvcompile/testing`), `exempt`: law -> why not for it, and
    `per_layer`: options, lists of numbers, that layers differ in (`kvcompile/constants.py`).
    """

    name: ClassVar[str]

    @property
    def step(self) -> int:
        """Tokens that are encoded together."""
        ...

    def planes(self, dim: int, dtype: torch.dtype, side: Side) -> Planes:
        """name -> plane of one kv head; raises RecipeError where `dim` fails.

        `side` is what is stored: K is read by dot products, several tokens abreast, V by weighted
        sums, several channels abreast, and a format may lie in memory accordingly.
        """
        ...

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        """x [..., n * step, dim] -> plane name -> [..., n, *shape]."""
        ...

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        """Inverse of encode: [..., n * step, dim] in `dtype`."""
        ...

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        """[..., n * step, dim]: |decode(encode(x)) - x| <= bound, before rounding to `dtype`."""
        ...

    def limit(self, dtype: torch.dtype) -> float:
        """The largest magnitude that can be stored."""
        ...


def step_bytes(fmt: Format, dim: int, dtype: torch.dtype, side: Side) -> int:
    """Bytes that one step of one kv head takes."""
    planes = fmt.planes(dim, dtype, side).values()
    return sum(prod(p.shape) * p.dtype.itemsize for p in planes)


def bits_per_element(fmt: Format, dim: int, dtype: torch.dtype, side: Side) -> float:
    """Bits that one stored number takes, scales included."""
    return 8 * step_bytes(fmt, dim, dtype, side) / (fmt.step * dim)


@cache
def formats() -> dict[str, type[Format]]:
    """name -> format class, from `kernels/*.py` (`FORMAT`) and entry points `kvcompile.formats`."""
    return {f.name: f for f in plugins("kernels", "FORMAT", "kvcompile.formats")}


@cache
def format_of(term: Term) -> Format:
    """The format that `term` spells, e.g. `int(bits=4, axis=token, group=32)`."""
    known = formats()
    if term.name not in known:
        raise RecipeError(
            f"unknown format {term.name!r}{nearest(term.name, known)}; known: {', '.join(known)}"
        )
    cls = known[term.name]
    legal = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key, _ in term.args:
        if key not in legal:
            raise RecipeError(
                f"unknown option {key!r} of format {term.name}{nearest(key, legal)}; "
                f"known: {', '.join(legal)}"
            )
    return cls(**dict(term.args))


def term_of(fmt: Format) -> Term:
    """The term that spells `fmt`; options at their defaults are left out."""
    args = tuple(
        (f.name, getattr(fmt, f.name))
        for f in fields(fmt)  # type: ignore[arg-type]
        if getattr(fmt, f.name) != f.default
    )
    return Term(fmt.name, args)
