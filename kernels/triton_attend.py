"""The Triton text of kvc.attend, printed from a store's formats, and what it is launched with.

A program handles a share of the tiles of one (row, kv head): tiles of N tokens of the queue, of the
sinks, and of the call's own tokens. Query heads of a kv head, and up to QUERIES tokens, are the
rows of one tile, 16 at least, so that products run on tensor cores. Tiles that lie wholly in both
bodies come first, in a loop of their own without branches. The parts are merged by their
log-sum-exps (`merge`).
"""

import re
from functools import cache
from hashlib import sha256
from math import prod
from typing import NamedTuple

import torch

from kvcompile.errors import RecipeError
from kvcompile.format import Side
from kvcompile.kernels import triton_source as ts
from kvcompile.store import SIDES, Store

LOG2E = 1.4426950408889634


class Shape(NamedTuple):
    """What a kernel is printed for, beside the store."""

    heads: int                  # kv heads
    queries: int                # query heads that share a kv head
    dims: tuple[int, int]       # Dk, Dv
    dtype: torch.dtype          # of q, k, v and the output
    scale: float
    window: int = 0
    softcap: float = 0.0
    one: bool = True            # one query token a row


class Tile(NamedTuple):
    """How a kernel is cut: tokens and query tokens of a tile, warps of a program, stages."""

    tokens: int
    queries: int
    warps: int = 4
    stages: int = 2


def tile(store: Store, shape: Shape) -> Tile:
    """What needs no tuning: decoded tiles that fit four warps' registers, and codes that come 16
    bytes a load."""
    wide = max(map(ts.padded, shape.dims))
    held = [s for s in SIDES if "body" in store.tiers(s)]
    thin = min((_bits(store, shape, side) for side in held), default=16)
    many = max((len(store.side(s).format.planes(shape.dims[SIDES.index(s)], shape.dtype, s))
                for s in held), default=1)
    room = 2048 if shape.dtype is torch.float32 else 8192 if thin <= 2 else 4096
    queries = 1 if shape.one else max(1, min(16, 32 // shape.queries))
    return Tile(min(128, max(16, room // wide)), queries, 8 if many > 4 else 4)


def _bits(store: Store, shape: Shape, side: Side) -> float:
    """Bits that a number takes in the largest plane of a body."""
    fmt, dim = store.side(side).format, shape.dims[SIDES.index(side)]
    planes = fmt.planes(dim, shape.dtype, side).values()
    return max(8 * prod(p.shape) * p.dtype.itemsize / (fmt.step * dim) for p in planes)


def rows(shape: Shape, cut: Tile) -> int:
    """Rows of a tile of queries."""
    return max(16, 1 << (shape.queries * cut.queries - 1).bit_length())


def unsupported(store: Store, shape: Shape) -> str | None:
    """Why no kernel can be printed; None if one can."""
    if shape.queries > 64:
        return f"{shape.queries} query heads share a kv head; at most 64 can"
    return ts.missing(store, shape.dims, shape.dtype, "triton", "reader")


def turns(store: Store, side: Side, dim: int) -> int:
    """The block of channels by which a body wants queries, or outputs, turned; 0: it does not."""
    fmt = store.side(side).format
    held = "body" in store.tiers(side)
    return int(fmt.turned(dim)) if held and hasattr(fmt, "turned") else 0


def width(store: Store, shape: Shape) -> int:
    """Numbers of a part of an output: turned ones are summed apart."""
    return shape.dims[1] * (2 if turns(store, "v", shape.dims[1]) else 1)


def name(store: Store, shape: Shape, cut: Tile) -> str:
    """A name of its own for every kernel."""
    return "attend_" + sha256(repr((str(store), shape, cut)).encode()).hexdigest()[:12]


def arguments(store: Store, shape: Shape) -> list[str]:
    """The kernel's parameters in order."""
    return ["q", "k", "v", "numbers", *ts.parameters(store, shape.dims, shape.dtype), "part",
            "stats", "slot", "batch", "tokens", "splits",
            *(f"{x}_{d}" for x in "qkv" for d in ("row", "head", "token")),
            *ts.sizes(store, shape.dims, shape.dtype)]


@cache
def source(store: Store, shape: Shape, cut: Tile) -> str:
    """The module's text; RecipeError where there is no kernel."""
    why = unsupported(store, shape)
    if why:
        raise RecipeError(f"{store}: {why}")
    body = [*_begin(store, shape, cut), *_plan(store, shape, cut), *_bodies(store, shape),
            *_others(store, shape, cut), *_finish(store, shape)]
    head = f"def {name(store, shape, cut)}({', '.join(arguments(store, shape))}):"
    return "\n".join([ts.HEAD, f"# {store}", "@triton.jit", head, *ts.indent(body)]) + "\n"


def _begin(store: Store, shape: Shape, cut: Tile) -> list[str]:
    """The queries of this program."""
    g, (dk, dv), m = shape.queries, shape.dims, rows(shape, cut)
    dtype = ts.TRITON[shape.dtype]
    lines = [
        f"N: tl.constexpr = {cut.tokens}",
        "split = tl.program_id(0)",
        f"row, head = tl.program_id(1) // {shape.heads}, tl.program_id(1) % {shape.heads}",
        f"place = ((slot * batch + row) * {shape.heads} + head).to(tl.int64)",
        f"first_query = tl.program_id(2) * {cut.queries}",
        f"lanes = tl.arange(0, {m})",
        f"column, member = first_query + lanes // {g}, lanes % {g}",
        f"mine = (lanes < {cut.queries * g}) & (column < tokens)",
        "number = tl.load(numbers + row * tokens + column, mask=mine, other=-1)",
        "live = number >= 0",
        "n = tl.load(count + place)",
        f"channel = tl.arange(0, {ts.padded(dk)})",
        f"q_at = q + row * q_row + (head * {g} + member)[:, None] * q_head + "
        "column[:, None] * q_token + channel[None, :]",
        _load_query(shape),
    ]
    size = turns(store, "k", dk)
    if size:
        lines.append(f"turned_query = turn(query.to(tl.float32), {m}, {ts.padded(dk)}, {size})"
                     f".to({dtype})")
    width_v = ts.padded(dv)
    lines += [f'm = tl.full(({m},), -float("inf"), tl.float32)',
              f"l = tl.zeros(({m},), tl.float32)",
              f"o = tl.zeros(({m}, {width_v}), tl.float32)"]
    if turns(store, "v", dv):
        lines.append(f"turned = tl.zeros(({m}, {width_v}), tl.float32)")
    return lines


def _load_query(shape: Shape, again: bool = False) -> str:
    """Loaded `again` where it is used: kept beside a turned query it would cost registers."""
    policy = ', eviction_policy="evict_last"' if again else ""
    return (f"query = tl.load(q_at, mask=live[:, None] & (channel < {shape.dims[0]})[None, :], "
            f"other=0.0{policy})")


def _plan(store: Store, shape: Shape, cut: Tile) -> list[str]:
    """Which tiles there are, in which order, and which of them are this program's."""
    lines = []
    for side in SIDES:
        lines += ts.span(store, "n", side, f"{side}_")
    lines += ["queued = k_queued", "first = k_first"]
    if shape.window:
        oldest = "tl.min(tl.where(live, number, 1073741824), 0)"
        lines += [f"low = tl.maximum(n + {oldest} - {shape.window - 1}, 0)",
                  f"first = tl.maximum(first, low - {store.sinks})"]
    lines += ["begin = first // N",
              "queue = tl.maximum((queued + N - 1) // N - begin, 0)"]
    delayed = [s for s in SIDES if store.side(s).delayed]
    if delayed:
        end = "k_end" if delayed == ["k"] else "v_end" if delayed == ["v"] else \
            "tl.minimum(k_end, v_end)"
        lines.append(f"pure = tl.minimum(tl.maximum({end} // N - begin, 0), queue)")
    else:
        lines.append("pure = queue")
    sinks = "0"
    if store.sinks:
        sinks = f"(tl.minimum(n, {store.sinks}) + N - 1) // N"
        if shape.window:
            sinks = f"tl.where(low < {store.sinks}, {sinks}, 0)"
    return [*lines, f"sunk = {sinks}",
            f"own = (tl.minimum(tokens, first_query + {cut.queries}) + N - 1) // N",
            "total = queue + sunk + own",
            "each = (total + splits - 1) // splits",
            "start = split * each",
            "stop = tl.minimum(start + each, total)"]


def _read(store: Store, shape: Shape, side: Side, tier: str) -> tuple[list[str], str]:
    """Statements that find the page of the token `base`, and the tile of the tokens from it on."""
    fmt, dim = store.format(side, tier), shape.dims[SIDES.index(side)]
    if tier == "body" and turns(store, side, dim):
        fmt = fmt.inner  # type: ignore[attr-defined]
    planes = ts.names(fmt, dim, shape.dtype, side, f"{side}_{tier}")
    lines = ["page = " + ts.page(side, tier, None if tier == "sinks" else store.ring(side, tier),
                                 "base"), "at = base % 128"]
    text = fmt.triton(dim, shape.dtype, side, planes)  # type: ignore[attr-defined]
    return lines, f"{text}.to({ts.TRITON[shape.dtype]})"


def _logits(shape: Shape, keys: str, query: str) -> str:
    scale = shape.scale if shape.softcap else shape.scale * LOG2E
    return (f"capped(dot({query}, tl.trans({keys}), {ts.interpreted()}) * {scale!r}, "
            f"{float(shape.softcap)!r})")


def _add(shape: Shape, to: str, weights: str, values: str) -> str:
    return (f"{to} = dot_add({weights}.to({ts.TRITON[shape.dtype]}), {values}, {to}, "
            f"{ts.interpreted()})")


def _query(store: Store, shape: Shape) -> str:
    return "turned_query" if turns(store, "k", shape.dims[0]) else "query"


def _sum(store: Store, shape: Shape) -> str:
    return "turned" if turns(store, "v", shape.dims[1]) else "o"


def _weigh(store: Store, shape: Shape) -> list[str]:
    """From the logits s of the tokens `position` [N] to weights p; the sums so far shrink."""
    lines = ["seen = live[:, None] & keep[None, :] & (position[None, :] <= n + number[:, None])"]
    if shape.window:
        lines.append(f"seen &= position[None, :] > n + number[:, None] - {shape.window}")
    lines += ['s = tl.where(seen, s, -float("inf"))', "p, m, l, kept = weigh(s, m, l)",
              "o = o * kept[:, None]"]
    if turns(store, "v", shape.dims[1]):
        lines.append("turned = turned * kept[:, None]")
    return lines


def _bodies(store: Store, shape: Shape) -> list[str]:
    """The loop over tiles that lie wholly in the bodies of K and V."""
    if any("body" not in store.tiers(side) for side in SIDES):
        return ["pure = 0"]
    k_page, keys = _read(store, shape, "k", "body")
    v_page, values = _read(store, shape, "v", "body")
    lines = ["base = (begin + tile) * N", "index = base + tl.arange(0, N)",
             "keep = (index >= first) & (index < queued)", f"position = index + {store.sinks}",
             *k_page, f"s = {_logits(shape, keys, _query(store, shape))}", *_weigh(store, shape),
             *v_page, _add(shape, _sum(store, shape), "p", values)]
    return ["for tile in range(start, tl.minimum(stop, pure)):", *ts.indent(lines)]


def _others(store: Store, shape: Shape, cut: Tile) -> list[str]:
    """The loop over all other tiles, those of many tokens in halves: each asks which tiers its
    tokens lie in."""
    halves = 2 if cut.tokens >= 64 else 1
    lines = [
        f"tile = piece // {halves}",
        "is_queue, is_own = tile < queue, tile >= queue + sunk",
        "is_sink = (tile >= queue) & (tile < queue + sunk)",
        "base = tl.where(is_queue, begin + tile, tl.where(is_own, tile - queue - sunk, "
        f"tile - queue)) * {cut.tokens} + piece % {halves} * N",
        "index = base + tl.arange(0, N)",
        f"upper = tl.where(is_queue, queued, tl.where(is_own, tokens, tl.minimum(n, "
        f"{store.sinks})))",
        "keep = (index >= tl.where(is_queue, first, 0)) & (index < upper)",
        "own_number = tl.load(numbers + row * tokens + index, mask=keep & is_own, other=-1)",
        "keep = keep & ((own_number >= 0) | (is_own == 0))",
        f"position = index + tl.where(is_queue, {store.sinks}, 0)",
        "position = tl.where(is_own, n + own_number, position)",
        "s = tl.zeros((m.shape[0], N), tl.float32)",
    ]
    for tier, test in _tests(store, "k"):
        query = _query(store, shape) if tier == "body" else "query"
        if tier == "own":
            found, tile = _own(shape, "k")
        else:
            found, tile = _read(store, shape, "k", tier)
        if tier != "body" and turns(store, "k", shape.dims[0]):
            found = [_load_query(shape, again=True), *found]
        inner = [*found, f"logits = {_logits(shape, tile, query)}"]
        if tier == "recent":
            inner.append("s = tl.where((index >= k_end)[None, :], logits, s)")
        elif tier == "body" and store.k.delayed:
            inner.append("s = tl.where((index < k_end)[None, :], logits, s)")
        else:
            inner.append("s = logits")
        lines += [f"if {test}:", *ts.indent(inner)]
    lines += _weigh(store, shape)
    for tier, test in _tests(store, "v"):
        weights, held = "p", ""
        if tier == "recent":
            held = "index >= v_end"
        elif tier == "body" and store.v.delayed:
            held = "index < v_end"
        if held:
            weights = f"tl.where(({held})[None, :], p, 0.0)"
        if tier == "own":
            found, tile = _own(shape, "v")
        else:
            found, tile = _read(store, shape, "v", tier)
        to = _sum(store, shape) if tier == "body" else "o"
        lines += [f"if {test}:", *ts.indent([*found, _add(shape, to, weights, tile)])]
    lines = [re.sub(r"\bN\b", str(cut.tokens // halves), line) for line in lines]
    return [f"for piece in range(tl.maximum(start, pure) * {halves}, stop * {halves}):",
            *ts.indent(lines)]


def _tests(store: Store, side: Side) -> list[tuple[str, str]]:
    """(where tokens lie, whether a tile has some there)."""
    found = [("own", "is_own")]
    for tier in store.tiers(side):
        if tier == "sinks":
            found.append((tier, "is_sink"))
        elif tier == "recent":
            found.append((tier, f"is_queue & (base + N > {side}_end)"))
        else:
            found.append((tier, f"is_queue & (base < {side}_end)"
                          if store.side(side).delayed else "is_queue"))
    return found


def _own(shape: Shape, side: Side) -> tuple[list[str], str]:
    """The call's own tokens."""
    dim = shape.dims[SIDES.index(side)]
    return [], (f"own_tokens({side} + row * {side}_row + head * {side}_head, {side}_token, index, "
                f"keep, {dim}, {ts.padded(dim)})")


def _finish(store: Store, shape: Shape) -> list[str]:
    """Parts [place, token, query head, split, width] and their maxima and sums."""
    dv, all_ = shape.dims[1], width(store, shape)
    lines = [f"at = ((tl.program_id(1).to(tl.int64) * tokens + column) * {shape.queries} + member) "
             "* splits + split",
             f"c = tl.arange(0, {ts.padded(dv)})",
             f"where = part + at[:, None] * {all_} + c[None, :]",
             f"both = mine[:, None] & (c < {dv})[None, :]",
             "tl.store(where, o, mask=both)"]
    if all_ > dv:
        lines.append(f"tl.store(where + {dv}, turned, mask=both)")
    return [*lines, "tl.store(stats + at * 2, m, mask=mine)",
            "tl.store(stats + at * 2 + 1, l, mask=mine)"]
