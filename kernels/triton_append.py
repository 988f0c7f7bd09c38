"""The Triton text of kvc.append, printed from a store's formats: two kernels, one after the other.

`encode` stores the blocks that become complete, from the recent tier and the call's tokens, in the
body; `keep` then stores the call's tokens that are sinks or wait in the recent tier. A program
handles one tile of tokens of one (layer, row, kv head) and of K or V.
"""

import re
from functools import cache
from hashlib import sha256
from itertools import groupby
from typing import Any, NamedTuple

import torch

from kvcompile.errors import RecipeError
from kvcompile.format import Side
from kvcompile.kernels import triton_source as ts
from kvcompile.store import SIDES, Store

PHASES = ("encode", "keep")
MOST = 32   # tokens of a tile, unless a format encodes more together
EACH = 32   # numbers of a tile that a thread holds at most: encoding takes several copies of them


class Shape(NamedTuple):
    """What a kernel is printed for, beside the store."""

    heads: int                  # kv heads
    dims: tuple[int, int]       # Dk, Dv
    dtype: torch.dtype          # of k and v


def unsupported(store: Store, dims: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why no kernel can be printed; None if one can."""
    return ts.missing(store, dims, dtype, "writer")


def tokens(store: Store, shape: Shape, side: Side, phase: str) -> int:
    """Tokens of a tile: one step of the format, if those are of several tokens; else so many that
    a tile has no more than `ts.FEW` numbers."""
    step = store.side(side).format.step if phase == "encode" else 1
    if step > 1 or phase != "encode" or "body" not in store.tiers(side):
        return step if step > 1 else MOST
    return min(MOST, ts.FEW // ts.piece(store, shape.dims[SIDES.index(side)], side, MOST))


def tile(store: Store, shape: Shape, side: Side, phase: str) -> int:
    """Tokens that are loaded at a time, of those of `tokens`."""
    whole = tokens(store, shape, side, phase)
    return getattr(store.side(side).format, "triton_tile", whole) if phase == "encode" else whole


def warps(store: Store, shape: Shape, phase: str) -> int:
    """Warps of a program: four, or eight where the tiles that a format needs whole are larger than
    four hold."""
    if phase != "encode":
        return 4
    most = max((tile(store, shape, side, phase) * store.members
                * ts.piece(store, dim, side, tokens(store, shape, side, phase))
                for side, dim in zip(SIDES, shape.dims, strict=True)
                if "body" in store.tiers(side)), default=0)
    return 8 if most > 4 * 32 * EACH else 4


def chunks(store: Store, shape: Shape, phase: str, new: Any) -> Any:
    """Tiles that may hold what `new` tokens change, of K or of V."""
    def of(side: Side) -> Any:
        cut = tokens(store, shape, side, phase)
        most = store.side(side).block - 1 if phase == "encode" else 0
        return (new + most + cut - 1) // cut + 1

    k, v = of("k"), of("v")
    return max(k, v) if isinstance(new, int) else k + v


def name(store: Store, shape: Shape, phase: str) -> str:
    """A name of its own for every kernel."""
    return f"{phase}_" + sha256(repr((str(store), shape)).encode()).hexdigest()[:12]


def arguments(store: Store, shape: Shape) -> list[str]:
    """The kernel's parameters in order."""
    return ["k", "v", "columns", "new", *ts.parameters(store, shape.dims, shape.dtype),
            "slot", "batch", "tokens", "lines",
            *(f"{x}_{d}" for x in "kv" for d in ("layer", "row", "head", "token")),
            *ts.sizes(store, shape.dims, shape.dtype)]


@cache
def source(store: Store, shape: Shape, phase: str) -> str:
    """The module's text, empty where there is nothing to do; RecipeError without a kernel."""
    why = unsupported(store, shape.dims, shape.dtype)
    if why:
        raise RecipeError(f"{store}: {why}")
    part = _encode if phase == "encode" else _keep
    sides = {side: [re.sub(r"\bN\b", str(tile(store, shape, side, phase)), line)
                    for line in part(store, shape, side)] for side in SIDES}
    if not any(sides.values()):
        return ""
    body = [
        f"layer, rest = tl.program_id(1) // (batch * {shape.heads}), tl.program_id(1) % "
        f"(batch * {shape.heads})",
        f"row, head = rest // {shape.heads}, rest % {shape.heads}",
        f"place = (((slot + layer) * batch + row) * {shape.heads} + head).to(tl.int64)",
        *ts.own_constants(store),
        "n = tl.load(count + place)",
        "line = row * lines + head % lines",
        "after = n + tl.load(new + line)",
        f"before = tl.maximum(n - {store.sinks}, 0)",
    ]
    for side, test in zip(SIDES, ("==", "!="), strict=True):
        body += [f"if tl.program_id(2) {test} 0:", *ts.indent(sides[side] or ["pass"])]
    head = f"def {name(store, shape, phase)}({', '.join(arguments(store, shape))}):"
    return "\n".join([ts.HEAD, f"# {store}", "@triton.jit", head, *ts.indent(body)]) + "\n"


def _new(store: Store, shape: Shape, side: Side, which: str, mask: str, width: int = 0
         ) -> list[str]:
    """Tiles of the call's tokens that are number `which` [N] of the row's, in the model's dtype."""
    dim = shape.dims[SIDES.index(side)]
    lines = [
        f"mine = {mask}",
        f"rank = {which}",
        "column = tl.load(columns + line * tokens + rank, mask=mine, other=0)",
        "column = tl.maximum(column, 0)",
        f"c = tl.arange(0, {width or ts.padded(dim)})[None, :]"
        + (f" + piece * {width}" if 0 < width < dim else ""),
        f"where = {side} + layer * {store.members} * {side}_layer + row * {side}_row + "
        f"head * {side}_head + column[:, None] * {side}_token + c",
    ]
    return lines + [f"{x} = tl.load(where + {i} * {side}_layer, mask=mine[:, None] & (c < {dim}), "
                    "other=0.0)" for i, x in enumerate(ts.tiles(store))]


def _encode(store: Store, shape: Shape, side: Side) -> list[str]:
    """The tokens [start, end) of the queue go to the body."""
    if "body" not in store.written(side):
        return []
    dim, fmt = shape.dims[SIDES.index(side)], store.side(side).format
    width = ts.piece(store, dim, side, tokens(store, shape, side, "encode"))
    planes = ts.moved(store, fmt, dim, side, ts.names(store, side, "body", dim, shape.dtype), width)
    lines = [*ts.span(store, "n", side, "old_"), *ts.span(store, "after", side, "")]
    whole = tokens(store, shape, side, "encode")
    lines += ["start = tl.maximum(old_end, first)",
              f"base = (start // {whole} + tl.program_id(0)) * {whole}"]
    found = ["index = base + tl.arange(0, N)", "keep = (index >= start) & (index < end)"]
    inner = _new(store, shape, side, f"index + {store.sinks} - n", "keep & (index >= before)",
                 width)
    if "recent" in store.tiers(side):
        waiting = store.format(side, "recent")
        held = ts.moved(store, waiting, dim, side,
                        ts.names(store, side, "recent", dim, shape.dtype), width)
        inner += [
            "leaving, keep = keep, keep & (index < before)",
            "page, at = " + ts.page(side, "recent", store.ring(side, "recent"), "base")
            + ", base % 128",
            *(line for i, x in enumerate(ts.tiles(store)) for line in (
                f"member = {i}", f"{x} = tl.where(keep[:, None], "
                f"{ts.reader(store, waiting, dim, shape.dtype, side, held, width)}, {x})")),
            "keep = leaving"]
    inner += [*(f"{x} = {x}.to(tl.float32)" for x in ts.tiles(store)),
              "page, at = " + ts.page(side, "body", store.ring(side, "body"), "base")
              + ", base % 128"]
    stored = ts.writer(store, fmt, dim, shape.dtype, side, planes, width)
    if ts.TILES in stored:
        return [*lines, "if base < end:", *ts.indent(_passes([*found, *inner], stored, whole))]
    inner += stored
    if width < dim:
        inner = ["whole = keep", f"for piece in range({dim // width}):",
                 *ts.indent(["keep = whole", *inner])]
    return [*lines, *found, "if base < end:", *ts.indent(inner)]


def _passes(loaded: list[str], stored: list[str], tokens: int) -> list[str]:
    """The writer's statements, each part between `TILES` over all tiles of the block."""
    first, *passes = (list(part) for is_mark, part in
                      groupby([*stored], lambda line: line == ts.TILES) if not is_mark)
    lines = ["block = base", *first]
    for part in passes:
        lines += [f"for part in range({tokens} // N):",
                  *ts.indent(["base = block + part * N", *loaded, *part])]
    return lines


def _keep(store: Store, shape: Shape, side: Side) -> list[str]:
    """Tokens that are sinks, and those that stay in the recent tier."""
    lines = []
    if "sinks" in store.written(side):
        lines += [f"last = tl.minimum(after, {store.sinks})",
                  *_write(store, shape, side, "sinks", "n", "last", "index - n")]
    if "recent" in store.written(side):
        lines += [*ts.span(store, "after", side, ""),
                  "start = tl.maximum(tl.maximum(first, end), before)",
                  *_write(store, shape, side, "recent", "start", "queued",
                          f"index + {store.sinks} - n")]
    return lines


def _write(store: Store, shape: Shape, side: Side, tier: str, start: str, stop: str, which: str
           ) -> list[str]:
    """Store the tier's tokens [start, stop); `which` number of the call's each of them is."""
    dim, fmt = shape.dims[SIDES.index(side)], store.format(side, tier)
    ring = store.ring(side, tier) if tier == "recent" else None
    inner = [*_new(store, shape, side, which, "keep"),
             "page, at = " + ts.page(side, tier, ring, "base") + ", base % 128",
             *ts.writer(store, fmt, dim, shape.dtype, side,
                        ts.names(store, side, tier, dim, shape.dtype))]
    return [f"base = ({start} // N + tl.program_id(0)) * N", "index = base + tl.arange(0, N)",
            f"keep = (index >= {start}) & (index < {stop})", f"if base < {stop}:",
            *ts.indent(inner)]
