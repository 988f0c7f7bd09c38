"""mixed: of every 128 tokens the first ones in one format, the others in another."""

import re
from dataclasses import dataclass
from functools import cached_property
from math import gcd, lcm, prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, Format, Planes, Side, format_of, term_of
from kvcompile.kernels.triton_source import of
from kvcompile.kernels.wrapper import check_steps
from kvcompile.recipe import Term, parse_term

PARTS = ("high", "low")
PLANES = 12  # that a C++ reader is given (`CONSTANTS` in kernels/cpp/coded.h)


@dataclass(frozen=True)
class Mixed:
    """x -> the first `salient` tokens of every 128 by `high`, the others by `low`.

    Which tokens come first is not the format's business: a rule with as many `salient` tokens puts
    them there before they are encoded (`kernels/rank.py`).
    """

    high: Term = Term("int", (("bits", 4),))
    low: Term = Term("int", (("bits", 2),))
    salient: int = 64
    name: ClassVar[str] = "mixed"
    examples: ClassVar[tuple[str, ...]] = ("mixed(salient=32)",
        "mixed(high=int(bits=4, axis=channel, group=64), low=int(bits=2, axis=channel, group=32))",
        "mixed(high=scaled(of=int(bits=8, group=128), block=32), low=nf4, salient=96)")

    def __post_init__(self) -> None:
        if self.salient % 16 or not 0 < self.salient < PAGE:
            raise RecipeError(f"mixed(salient={self.salient}): salient must be a multiple of 16 "
                              f"from 16 to {PAGE - 16}")
        for fmt, tokens in self.parts:
            if tokens % fmt.step:
                raise RecipeError(f"mixed(salient={self.salient}): {tokens} tokens are no multiple "
                                  f"of {fmt.step}, which {term_of(fmt)} encodes together")

    @cached_property
    def parts(self) -> tuple[tuple[Format, int], ...]:
        """The two formats, and how many of 128 tokens each stores."""
        high, low = (format_of(x if isinstance(x, Term) else parse_term(str(x)))
                     for x in (self.high, self.low))
        return (high, self.salient), (low, PAGE - self.salient)

    @property
    def step(self) -> int:
        return PAGE

    def planes(self, dim: int, dtype: torch.dtype, side: Side) -> Planes:
        return {f"{part}_{name}": spec.coarser(tokens // fmt.step)
                for part, (fmt, tokens) in zip(PARTS, self.parts, strict=True)
                for name, spec in _narrow(fmt, tokens, dim, dtype, side).items()}

    def encode(self, x: Tensor, side: Side) -> dict[str, Tensor]:
        blocks, planes, start = x.unflatten(-2, (-1, PAGE)), {}, 0
        for part, (fmt, tokens) in zip(PARTS, self.parts, strict=True):
            own = fmt.encode(blocks[..., start : start + tokens, :].flatten(-3, -2), side)
            for name, spec in _narrow(fmt, tokens, x.shape[-1], x.dtype, side).items():
                planes[f"{part}_{name}"] = spec.join(own[name], tokens // fmt.step)
            start += tokens
        return planes

    def decode(self, planes: dict[str, Tensor], dim: int, dtype: torch.dtype,
               side: Side) -> Tensor:
        return self._whole([fmt.decode(own, dim, dtype, side)
                            for fmt, own in self._split(planes, dim, side)])

    def error_bound(self, planes: dict[str, Tensor], dim: int, side: Side) -> Tensor:
        return self._whole([fmt.error_bound(own, dim, side).float()
                            for fmt, own in self._split(planes, dim, side)])

    def _split(self, planes: dict[str, Tensor], dim: int, side: Side
               ) -> list[tuple[Format, dict[str, Tensor]]]:
        """Each format and its planes, in its own steps."""
        return [(fmt, {name: spec.split(planes[f"{part}_{name}"], tokens // fmt.step) for name, spec
                       in _narrow(fmt, tokens, dim, torch.float32, side).items()})
                for part, (fmt, tokens) in zip(PARTS, self.parts, strict=True)]

    def _whole(self, parts: list[Tensor]) -> Tensor:
        blocks = [x.unflatten(-2, (-1, tokens))
                  for x, (_, tokens) in zip(parts, self.parts, strict=True)]
        return torch.cat(blocks, -2).flatten(-3, -2)

    def limit(self, dtype: torch.dtype) -> float:
        return min(fmt.limit(dtype) for fmt, _ in self.parts)

    def cpp(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that reads the planes (`kernels/cpp/wrapper.h`): the readers of the parts,
        each on pages that hold fewer tokens than it believes."""
        types, apart = [], []
        for fmt, tokens in self.parts:
            if getattr(fmt, "turned", False):
                raise RecipeError(f"mixed has no C++ reader around {fmt.name}")
            types.append(_named(fmt, "cpp", "reader")(dim, dtype, side))
            sizes = [spec.dtype.itemsize for spec in fmt.planes(dim, dtype, side).values()]
            apart += [size * gap for size, gap in
                      zip(sizes, _apart(fmt, tokens, dim, dtype, side), strict=True)]
        if len(apart) > PLANES:
            raise RecipeError(f"{len(apart)} planes are more than {PLANES}")
        return f"Mixed<{', '.join(types)}, {dim}, {self.salient}, {', '.join(map(str, apart))}>"

    def cpp_writer(self, dim: int, dtype: torch.dtype, side: Side) -> str:
        """The C++ type that writes the planes; RecipeError if none does."""
        types = [_named(fmt, "cpp_writer", "writer")(dim, dtype, side) for fmt, _ in self.parts]
        return (f"MixedWriter<{', '.join(types)}, {self.cpp(dim, dtype, side)}, {dim}, "
                f"{self.salient}>")

    @property
    def triton_span(self) -> int:
        """Tokens of a page that lie in one part, in tiles of a power of two."""
        return gcd(self.salient, PAGE)

    def triton(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]) -> str:
        """The tile of decoded numbers (`kernels/triton_source.py`), all of which are of one part.
        """
        high, low = (f"({of(fmt, 'triton', 'reader')(dim, dtype, side, own)}).to(tl.float32)"
                     for fmt, own in self._pointers(dim, dtype, side, planes))
        low = re.sub(r"\bat\b", f"(at - {self.salient})", low)
        return f"({high} if at < {self.salient} else {low})"

    def triton_writer(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
                      ) -> list[str]:
        """Statements that store the tile `x`, a page: by both writers, each what is its part's."""
        stored = []
        for fmt, own in self._pointers(dim, dtype, side, planes):
            check_steps(fmt)
            stored.append(of(fmt, "triton_writer", "writer")(dim, dtype, side, own))
        return [f"both_x, both, front = x, keep, at + tl.arange(0, N) < {self.salient}",
                "keep = both & front", *stored[0],
                f"x, keep, at = both_x, both & (front == 0), at - {self.salient}", *stored[1],
                f"keep, at = both, at + {self.salient}"]

    def triton_pieces(self, dim: int, side: Side) -> tuple[int, list[int]]:
        """Channels that can be written by themselves, and how much of each plane is theirs."""
        both = [of(fmt, "triton_pieces", "writer of some channels")(dim, side)
                for fmt, _ in self.parts]
        many = lcm(*(each for each, _ in both))
        return many, [size * many // each for each, sizes in both for size in sizes]

    def _pointers(self, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
                  ) -> list[tuple[Format, list[str]]]:
        """Each format and the pointers that it is to believe in, of those to all planes."""
        found, names = [], iter(planes)
        for fmt, tokens in self.parts:
            found.append((fmt, [f"({next(names)} - page * {gap})"
                                for gap in _apart(fmt, tokens, dim, dtype, side)]))
        return found


def _apart(fmt: Format, tokens: int, dim: int, dtype: torch.dtype, side: Side) -> list[int]:
    """How many numbers fewer than its reader believes a page of so many tokens has in each plane.
    """
    found = []
    for spec in fmt.planes(dim, dtype, side).values():
        if spec.lanes > tokens // fmt.step and prod(spec.shape[: spec.at]) > 1:
            raise RecipeError(f"{term_of(fmt)}: more than one group of a token is no beginning of "
                              "a page")
        full = prod(spec.page(fmt.step))
        found.append(full - full * tokens // PAGE)
    return found


def _narrow(fmt: Format, tokens: int, dim: int, dtype: torch.dtype, side: Side) -> Planes:
    """The planes of a format in pages of so many tokens."""
    steps = tokens // fmt.step
    found = fmt.planes(dim, dtype, side)
    for spec in found.values():
        if spec.lanes <= steps and steps % spec.lanes:
            raise RecipeError(f"{term_of(fmt)}: {spec.lanes} steps lie abreast, which {tokens} "
                              "tokens cut")
    return {name: spec._replace(lanes=min(spec.lanes, steps)) for name, spec in found.items()}


def _named(fmt: Format, attribute: str, what: str) -> Any:
    if not hasattr(fmt, attribute):
        raise RecipeError(f"format {fmt.name} has no C++ {what}")
    return getattr(fmt, attribute)


FORMAT = Mixed
