"""What a storage format is: planes, encode, decode, error bound and bits, in one frozen dataclass.

A format stores tokens in **steps**: `step` consecutive tokens of one kv head are encoded together
and never again (1 for per-token formats, the group size for per-channel ones). Planes are declared
per step; the cache keeps `PAGE // step` steps in a page.
"""

from dataclasses import fields
from functools import cache
from math import prod
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvcompile.errors import RecipeError, nearest
from kvcompile.recipe import Term
from kvcompile.registry import plugins

PAGE = 128  # tokens in a page; every step divides it

Planes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@runtime_checkable
class Format(Protocol):
    """One storage format. The dataclass fields are its options, with their legal values."""

    name: ClassVar[str]

    @property
    def step(self) -> int:
        """Tokens that are encoded together."""
        ...

    def planes(self, dim: int, dtype: torch.dtype) -> Planes:
        """name -> (dtype, shape) of one step of one head; raises RecipeError where `dim` fails."""
        ...

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [..., n * step, dim] -> plane name -> [..., n, *shape]."""
        ...

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype) -> Tensor:
        """Inverse of encode: [..., n * step, dim] in `dtype`."""
        ...

    def error_bound(self, planes: dict[str, Tensor], dim: int) -> Tensor:
        """[..., n * step, dim]: |decode(encode(x)) - x| <= bound, before rounding to `dtype`."""
        ...

    def limit(self, dtype: torch.dtype) -> float:
        """The largest magnitude that can be stored."""
        ...


def step_bytes(fmt: Format, dim: int, dtype: torch.dtype) -> int:
    """Bytes that one step of one kv head takes."""
    return sum(prod(shape) * dt.itemsize for dt, shape in fmt.planes(dim, dtype).values())


def bits_per_element(fmt: Format, dim: int, dtype: torch.dtype) -> float:
    """Bits that one stored number takes, scales included."""
    return 8 * step_bytes(fmt, dim, dtype) / (fmt.step * dim)


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
