"""Triton kernels as text: from a store's formats to Python source, and from source to kernels.

A format names what reads its pages by `triton(dim, dtype, side, planes)`, an expression that is the
tile [N, DP] of the N tokens from `at` on of page `page` (`planes`: the names of the pointers to its
planes; `keep` [N]: which tokens count), and what writes them by `triton_writer`, statements that
store the tile `x` [N, DP] of fp32 numbers there. DP is `padded(dim)`. The functions that both may
call lie in `kernels/triton/`.
"""

import importlib
import linecache
import os
from dataclasses import fields
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from kvcompile.errors import RecipeError
from kvcompile.format import Format, Side, term_of
from kvcompile.store import SIDES, Store

HELPERS = ("numbers", "coded", "wrapper", "softmax")
TRITON = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.float32: "tl.float32"}
WIDEST = 256  # channels of a head
UNDERSTOOD = ("k", "v", "sinks", "window", "members")  # of a Store; others are refused if set
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
    if store.v_in_k:
        return f"V is part of K, which has no Triton {what}"
    other = next((f.name for f in fields(store) if f.name not in UNDERSTOOD
                  and getattr(store, f.name) != f.default), None)
    if other:
        return f"no Triton {what} for a store with {other}"
    if what == "writer" and store.members > 1:
        return f"{store.members} layers that are stored together have no Triton writer"
    for side, dim in zip(SIDES, dims, strict=True):
        if dim % 4 or not 8 <= dim <= WIDEST:
            return f"head dimension {dim} is not a multiple of 4 from 8 to {WIDEST}"
        for *_, fmt, planes in tiers(store, dims, dtype, side):
            try:
                if what == "reader":
                    reader(store, fmt, dim, dtype, side, planes)
                else:
                    of(fmt, "triton_writer", what)(dim, dtype, side, planes)
            except RecipeError as error:
                text = str(error)
                return text if text.startswith("format ") else f"{term_of(fmt)}: {text}"
    return None


def reader(store: Store, fmt: Format, dim: int, dtype: torch.dtype, side: Side, planes: list[str]
           ) -> str:
    """The tile of one layer's `dim` channels; `member` says which of several that lie together."""
    if store.members == 1:
        return str(of(fmt, "triton", "reader")(dim, dtype, side, planes))
    return str(of(fmt, "triton_member", "reader of several layers")(
        dim, store.members, dtype, side, planes))


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
    """A kernel's parameters for a store's planes: the count, then tables and planes."""
    return ["count", *(name for side, tier, _, planes in tiers(store, dims, dtype)
                       for name in (f"{side}_{tier}_table", *planes))]


def sizes(store: Store, dims: tuple[int, int], dtype: torch.dtype) -> list[str]:
    """Parameters for the pages of a head that each table has room for."""
    return [f"{side}_{tier}_pages" for side, tier, *_ in tiers(store, dims, dtype)]


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
