"""Triton kernels as text: from a store's formats to Python source, and from source to kernels.

A format names what reads its pages by `triton(dim, dtype, side, planes)`, an expression that is the
tile [N, DP] of the N tokens from `at` on of page `page` (`planes`: the names of the pointers to its
planes; `keep` [N]: which tokens count; `constants`: to the
layer's, `kvcompile/constants.py`), and what writes them by `triton_writer`, statements that
store the tile `x` [N, DP] of fp32 numbers there. Of layers that lie together `triton_member` reads
one, and `triton_member_writer` stores the tiles `x0`, `x1`, ... A writer of whole blocks may take
them in tiles of `triton_tile` tokens, several times over (`TILES`). N and DP are put in by the
skeletons: DP is `padded(dim)`, or fewer channels where a format says with `triton_pieces` that they
can be written by themselves. No tile that is read passes a multiple of `triton_span` tokens.
`triton_free` are planes for which the writer may find other numbers of the same meaning than
`encode`. The functions that all may call lie in `kernels/triton/`.
"""

import importlib
import linecache
import os
import re
from dataclasses import fields
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from math import lcm
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kvcompile.errors import RecipeError
from kvcompile.format import Format, Side, term_of
from kvcompile.store import SIDES, Store

FEW = 2048  # numbers of a tile that is encoded
TILES = "tiles"  # a writer's statement: what follows is done for each tile of the block, up to the
#                  next; the tiles are loaded each time, as more than one is too much for registers
HELPERS = tuple(sorted(file.stem for file in (Path(__file__).parent / "triton").glob("*.py")))
TRITON = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.float32: "tl.float32"}
WIDEST = 256  # channels of a head
# fields of a Store; one that has others set is refused
UNDERSTOOD = ("k", "v", "sinks", "window", "members", "v_in_k", "slots", "rest",
              "side_by_side", "lent")
HEAD = "import triton\nimport triton.language as tl\n"


def padded(dim: int) -> int:
    """Channels of a tile: `dim` rounded up to a power of two, 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())


def installed() -> bool:
    """Whether there is a Triton to print for."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def missing(store: Store, dims: tuple[int, int], dtype: torch.dtype, what: str) -> str | None:
    """Why a tier has no Triton reader or writer, `what`; or None."""
    if dtype not in TRITON:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    other = next((f.name for f in fields(store) if f.name not in UNDERSTOOD
                  and getattr(store, f.name) != f.default), None)
    if other:
        return f"no Triton {what} for a store with {other}"
    for side, dim in zip(store.sides, dims, strict=False):
        if dim % 4 or not 8 <= dim <= WIDEST:
            return f"head dimension {dim} is not a multiple of 4 from 8 to {WIDEST}"
        for *_, fmt, planes in tiers(store, dims, dtype, side):
            try:
                (reader if what == "reader" else writer)(store, fmt, dim, dtype, side, planes)
            except RecipeError as error:
                text = str(error)
                return text if text.startswith("format ") else f"{term_of(fmt)}: {text}"
    return None


def reader(store: Store, fmt: Format, dim: int, dtype: torch.dtype, side: Side, planes: list[str],
           width: int = 0) -> str:
    """The tile of one layer's `dim` channels; `member` says which of several that lie together."""
    if store.members == 1:
        text = of(fmt, "triton", "reader")(dim, dtype, side, planes)
    else:
        text = of(fmt, "triton_member", "reader of several layers")(
            dim, store.members, dtype, side, planes)
    return _wide(text, width or padded(dim))


def writer(store: Store, fmt: Format, dim: int, dtype: torch.dtype, side: Side, planes: list[str],
           width: int = 0) -> list[str]:
    """Statements that store the `tiles` of the layers that lie together."""
    if store.members == 1:
        lines = of(fmt, "triton_writer", "writer")(dim, dtype, side, planes)
    else:
        lines = of(fmt, "triton_member_writer", "writer of several layers")(
            dim, store.members, dtype, side, planes)
    return [_wide(line, width or padded(dim)) for line in lines]


def inside(text: str, dim: int) -> str:
    """A reader's or writer's text for the `dim` channels of a format inside another."""
    return _wide(text, padded(dim))


def _wide(text: str, width: int) -> str:
    return re.sub(r"\bDP\b", str(width), text)


def piece(store: Store, dim: int, side: Side, tokens: int) -> int:
    """Channels of a head that are encoded at a time: the most that make no more than `FEW` numbers
    where the format can store some by themselves; else all."""
    most = max(16, FEW // tokens)
    try:
        units = [of(store.format(side, tier), "triton_pieces", "")(dim, side)[0]
                 for tier in ("body", "recent")]
    except RecipeError:
        return padded(dim)
    width = padded(lcm(*units))
    while width * 2 <= most and dim % (width * 2) == 0:
        width *= 2
    return padded(dim) if store.members > 1 or dim % width or width >= dim else width


def moved(store: Store, fmt: Format, dim: int, side: Side, planes: list[str], width: int
          ) -> list[str]:
    """The pointers to a piece of `width` channels; `piece` is its number."""
    if width >= dim:
        return planes
    many, each = fmt.triton_pieces(dim, side)  # type: ignore[attr-defined]
    return [f"({name} + piece * {step * width // many})"
            for name, step in zip(planes, each, strict=True)]


def tiles(store: Store) -> list[str]:
    """The names of what is written: a tile of each layer."""
    return ["x"] if store.members == 1 else [f"x{i}" for i in range(store.members)]


def names(store: Store, side: Side, tier: str, dim: int, dtype: torch.dtype) -> list[str]:
    """Names of the pointers to a tier's planes."""
    planes = store.format(side, tier).planes(dim * store.members, dtype, side)
    return [f"{side}_{tier}_{plane}" for plane in planes]


def of(fmt: Any, attribute: str, what: str) -> Any:
    """`attribute` of a format; RecipeError if it has none."""
    if not hasattr(fmt, attribute):
        raise RecipeError(f"format {fmt.name} has no Triton {what}")
    return getattr(fmt, attribute)


@cache
def helpers() -> dict[str, Any]:
    """The functions that printed kernels may call."""
    found: dict[str, Any] = {}
    for name in HELPERS:
        found |= {key: value for key, value in _module(name).__dict__.items()
                  if callable(value) and hasattr(value, "fn")}
    return found


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"kvcompile.kernels.triton.{name}")


@cache
def kernel(text: str, name: str) -> Any:
    """The kernel `name` of a printed module; its source can be inspected, as Triton needs."""
    file = f"<kvcompile {sha256(text.encode()).hexdigest()[:16]}.py>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    space: dict[str, Any] = {**helpers(), "__name__": "kvcompile_kernel"}
    exec(compile(text, file, "exec"), space)
    return space[name]


def tiers(store: Store, dims: tuple[int, int], dtype: torch.dtype, only: Side | None = None
          ) -> list[tuple[Side, str, Format, list[str]]]:
    """(side, tier, format, names of the pointers to its planes), as the planes are ordered."""
    return [(side, tier, store.format(side, tier), names(store, side, tier, dim, dtype))
            for side, dim in zip(SIDES, dims, strict=True) if only in (None, side)
            for tier in store.tiers(side)]


def parameters(store: Store, dims: tuple[int, int], dtype: torch.dtype) -> list[str]:
    """A kernel's parameters for a store's planes: the count, then tables and planes, and constants.
    What is known of slots beside K and V follows them, and is no kernel's."""
    return ["count", *(name for side, tier, _, planes in tiers(store, dims, dtype)
                       for name in (f"{side}_{tier}_table", *planes)),
            *(["constants"] if store.constants else [])]


def sizes(store: Store, dims: tuple[int, int], dtype: torch.dtype) -> list[str]:
    """Parameters for the pages of a head that each table has room for."""
    return [f"{side}_{tier}_pages" for side, tier, *_ in tiers(store, dims, dtype)]


def source_of(store: Store, side: Side) -> Side:
    """Whose planes hold K, or V: V may be the first channels of K."""
    return "k" if store.v_in_k else side


def own_constants(store: Store) -> list[str]:
    """The statement that moves `constants` to those of `place`."""
    return [f"constants += place * {store.constants}"] if store.constants else []


def page(side: str, tier: str, ring: int | None, number: str) -> str:
    """The page of a tier that holds the token `number`; `place`: the table's layer, row, head."""
    index = f"({number}) // 128" + (f" % {ring // 128}" if ring is not None else "")
    return (f"tl.load({side}_{tier}_table + place * {side}_{tier}_pages + {index})"
            ".to(tl.int64)")


def span(store: Store, count: str, side: Side, prefix: str) -> list[str]:
    """Statements: the closed form of `count` (Store.spans) as <prefix>queued, first and end."""
    how = store.side(side)
    lines = [f"{prefix}queued = tl.maximum({count} - {store.sinks}, 0)"]
    first = "0"
    if store.window:
        first = (f"tl.maximum({count} - {store.sinks + store.window}, 0) // {store.grain} "
                 f"* {store.grain}")
    return [*lines, f"{prefix}first = {first}",
            f"{prefix}end = tl.maximum({prefix}queued - {how.lag}, 0) // {how.block} * {how.block}"]


def indent(lines: list[str], by: int = 1) -> list[str]:
    return ["    " * by + line for line in lines]
