"""Statements of kvc.attend's kernels: which tiles there are, what they hold, and their logits."""

import re

from kvcompile.format import Side
from kvcompile.kernels import triton_source as ts
from kvcompile.kernels.triton_attend_shape import (
    Shape,
    Tile,
    operands,
    rows,
    turns,
    width,
)
from kvcompile.store import SIDES, Store

LOG2E = 1.4426950408889634


def begin(store: Store, shape: Shape, cut: Tile) -> list[str]:
    """The queries of this program."""
    g, dk, m = shape.queries, shape.key, rows(shape, cut)
    dtype = ts.TRITON[shape.dtype]
    lines = [
        f"N: tl.constexpr = {cut.tokens}",
        "split = tl.program_id(0)",
        f"row, head = tl.program_id(1) // {shape.heads}, tl.program_id(1) % {shape.heads}",
        f"place = ((slot * batch + row) * {shape.heads} + head).to(tl.int64)",
        *ts.own_constants(store),
        f"first_query = tl.program_id(2) * {cut.queries}",
        f"lanes = tl.arange(0, {m})",
        f"column, group_head = first_query + lanes // {g}, lanes % {g}",
        f"mine = (lanes < {cut.queries * g}) & (column < tokens)",
        "number = tl.load(numbers + row * tokens + column, mask=mine, other=-1)",
        "live = number >= 0",
        "n = tl.load(count + place)",
        f"channel = tl.arange(0, {ts.padded(dk)})",
        f"q_at = q + row * q_row + (head * {g} + group_head)[:, None] * q_head + "
        "column[:, None] * q_token + channel[None, :]",
        _load_query(shape),
    ]
    size = _turns(store, shape, "k")
    if size:
        lines.append(f"turned_query = turn(query.to(tl.float32), {m}, {ts.padded(dk)}, {size})"
                     f".to({dtype})")
    if shape.made and shape.made.rotary:
        lines += ["cos += row * cos_row", "sin += row * cos_row"]
    return lines


def _turns(store: Store, shape: Shape, side: Side) -> int:
    """As `turns`; keys that are rebuilt are turned back before that."""
    return 0 if shape.made and side == "k" else turns(store, side, shape.dims[SIDES.index(side)])


def sums(store: Store, shape: Shape, cut: Tile) -> list[str]:
    """Maxima, sums and weighted values of no tokens."""
    dv, m = shape.dims[1], rows(shape, cut)
    lines = [f'm = tl.full(({m},), -float("inf"), tl.float32)',
             f"l = tl.zeros(({m},), tl.float32)",
             f"o = tl.zeros(({m}, {ts.padded(dv)}), tl.float32)"]
    if _turns(store, shape, "v"):
        lines.append(f"turned = tl.zeros(({m}, {ts.padded(dv)}), tl.float32)")
    return lines


def _load_query(shape: Shape, again: bool = False) -> str:
    """Loaded `again` where it is used: kept beside a turned query it would cost registers."""
    policy = ', eviction_policy="evict_last"' if again else ""
    return (f"query = tl.load(q_at, mask=live[:, None] & (channel < {shape.key})[None, :], "
            f"other=0.0{policy})")


def plan(store: Store, shape: Shape, cut: Tile) -> list[str]:
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
    dim, side = shape.dims[SIDES.index(side)], ts.source_of(store, side)
    fmt, planes = store.format(side, tier), ts.names(store, side, tier, dim, shape.dtype)
    if tier == "body" and _turns(store, shape, side):
        fmt = fmt.inner  # type: ignore[attr-defined]
    lines = ["page = " + ts.page(side, tier, None if tier == "sinks" else store.ring(side, tier),
                                 "base"), "at = base % 128"]
    text = ts.reader(store, fmt, dim, shape.dtype, side, planes)
    return lines, f"{text}.to({ts.TRITON[shape.dtype]})"


def _logits(shape: Shape, keys: str, query: str) -> str:
    scale, made = shape.scale if shape.softcap else shape.scale * LOG2E, shape.made
    products = f"dot({query}, tl.trans({keys}), {ts.interpreted()})"
    if made:
        given = {n: n if n in operands(shape) else "numbers" for n in ("basis", "offset", "cos",
                                                                       "sin")}
        products = (f"made_logits({query}, {keys}, {', '.join(given.values())}, head * {made.keys},"
                    f" turned_at, keep, group_head // {shape.queries // made.keys}, {made.keys}, "
                    f"{shape.dims[0]}, {ts.padded(shape.dims[0])}, {made.dim}, "
                    f"{ts.padded(made.dim)}, {made.rotary}, {made.style == 'half'}, {made.basis}, "
                    f"{made.offset}, {ts.interpreted()})")
    return f"capped({products} * {scale!r}, {float(shape.softcap)!r})"


def _add(shape: Shape, to: str, weights: str, values: str) -> str:
    return (f"{to} = dot_add({weights}.to({ts.TRITON[shape.dtype]}), {values}, {to}, "
            f"{ts.interpreted()})")


def _query(store: Store, shape: Shape) -> str:
    return "turned_query" if _turns(store, shape, "k") else "query"


def _sum(store: Store, shape: Shape) -> str:
    return "turned" if _turns(store, shape, "v") else "o"


def _seen(shape: Shape) -> list[str]:
    """Logits s of tokens at `position` [N] that a query does not see become -inf."""
    lines = ["seen = live[:, None] & keep[None, :] & (position[None, :] <= n + number[:, None])"]
    if shape.window:
        lines.append(f"seen &= position[None, :] > n + number[:, None] - {shape.window}")
    return [*lines, 's = tl.where(seen, s, -float("inf"))']


def _weigh(store: Store, shape: Shape) -> list[str]:
    """From logits s to weights p; the sums so far shrink."""
    lines = [*_seen(shape), "p, m, l, kept = weigh(s, m, l)", "o = o * kept[:, None]"]
    if _turns(store, shape, "v"):
        lines.append("turned = turned * kept[:, None]")
    return lines


def bodies(store: Store, shape: Shape) -> list[str]:
    """The loop over tiles that lie wholly in the bodies of K and V."""
    if any("body" not in store.tiers(side) for side in store.sides):
        return ["pure = 0"]
    k_page, keys = _read(store, shape, "k", "body")
    v_page, values = _read(store, shape, "v", "body")
    if store.v_in_k:
        k_page, keys, v_page, values = [*k_page, f"keys = {keys}"], "keys", [], "keys"
    lines = ["base = (begin + tile) * N", "index = base + tl.arange(0, N)",
             "keep = (index >= first) & (index < queued)", f"position = index + {store.sinks}",
             *(["turned_at = position"] if shape.made else []), *k_page,
             f"s = {_logits(shape, keys, _query(store, shape))}", *_weigh(store, shape),
             *v_page, _add(shape, _sum(store, shape), "p", values)]
    return ["for tile in range(start, tl.minimum(stop, pure)):", *ts.indent(lines)]


def halves(shape: Shape, cut: Tile) -> int:
    """Into how many pieces tiles of several tiers are cut: their code takes more registers, and
    where heads are not of a power of two the masks of their channels take some more."""
    masked = any(ts.padded(dim) != dim for dim in shape.dims)
    return 2 if cut.tokens >= (32 if masked else 64) else 1


def _piece(store: Store, shape: Shape, cut: Tile) -> list[str]:
    """The logits s of a piece of any tile, whatever tiers its tokens lie in."""
    lines = [
        f"tile = piece // {halves(shape, cut)}",
        "is_queue, is_own = tile < queue, tile >= queue + sunk",
        "is_sink = (tile >= queue) & (tile < queue + sunk)",
        "base = tl.where(is_queue, begin + tile, tl.where(is_own, tile - queue - sunk, "
        f"tile - queue)) * {cut.tokens} + piece % {halves(shape, cut)} * N",
        "index = base + tl.arange(0, N)",
        "upper = tl.where(is_queue, queued, tl.where(is_own, tokens, tl.minimum(n, "
        f"{store.sinks})))",
        "keep = (index >= tl.where(is_queue, first, 0)) & (index < upper)",
        "own_number = tl.load(numbers + row * tokens + index, mask=keep & is_own, other=-1)",
        "keep = keep & ((own_number >= 0) | (is_own == 0))",
        f"position = index + tl.where(is_queue, {store.sinks}, 0)",
        "position = tl.where(is_own, n + own_number, position)",
        f"s = tl.zeros(({rows(shape, cut)}, N), tl.float32)",
    ]
    if shape.made:
        lines.append("turned_at = position" + " + tl.where(is_sink, k_first, 0)" *
                     store.side_by_side)
    for tier, test in _tests(store, "k"):
        found, tile = _tile(store, shape, "k", tier)
        query = _query(store, shape) if tier == "body" else "query"
        if tier != "body" and _turns(store, shape, "k"):
            found = [_load_query(shape, again=True), *found]
        logits = "logits"
        if store.k.delayed and tier in ("body", "recent"):
            side = "<" if tier == "body" else ">="
            logits = f"tl.where((index {side} k_end)[None, :], logits, s)"
        lines += [f"if {test}:", *ts.indent(
            [*found, f"logits = {_logits(shape, tile, query)}", f"s = {logits}"])]
    return lines


def others(store: Store, shape: Shape, cut: Tile) -> list[str]:
    """The loop over all other tiles, in pieces."""
    lines = [*_piece(store, shape, cut), *_weigh(store, shape)]
    for tier, test in _tests(store, "v"):
        found, tile = _tile(store, shape, "v", tier)
        weights = "p"
        if store.v.delayed and tier in ("body", "recent"):
            side = "<" if tier == "body" else ">="
            weights = f"tl.where((index {side} v_end)[None, :], p, 0.0)"
        to = _sum(store, shape) if tier == "body" else "o"
        lines += [f"if {test}:", *ts.indent([*found, _add(shape, to, weights, tile)])]
    return _loop(shape, "tl.maximum(start, pure)", lines, cut)


def masses(store: Store, shape: Shape, cut: Tile) -> list[str]:
    """The loop over tiles that adds up what each token gets of the softmax weights."""
    lines = [*_piece(store, shape, cut), *_seen(shape),
             "p = tl.where(seen, tl.exp2(s - whole_sum[:, None]), 0.0)",
             "tl.atomic_add(mass + tl.program_id(1).to(tl.int64) * places + position, "
             "tl.sum(p, 0), mask=keep)"]
    g = shape.queries
    return [f"at = (row * {shape.heads * g} + head * {g} + group_head) * tokens + column",
            f"whole_sum = tl.load(lse + at, mask=mine & live, other=0.0) * {LOG2E!r}",
            *_loop(shape, "start", lines, cut)]


def _loop(shape: Shape, first: str, lines: list[str], cut: Tile) -> list[str]:
    n = halves(shape, cut)
    lines = [re.sub(r"\bN\b", str(cut.tokens // n), line) for line in lines]
    return [f"for piece in range({first} * {n}, stop * {n}):", *ts.indent(lines)]


def _tests(store: Store, side: Side) -> list[tuple[str, str]]:
    """(where tokens lie, whether a tile has some there)."""
    found = [("own", "is_own")]
    for tier in store.tiers(ts.source_of(store, side)):
        if tier == "sinks":
            found.append((tier, "is_sink"))
        elif tier == "recent":
            found.append((tier, f"is_queue & (base + N > {side}_end)"))
        else:
            found.append((tier, f"is_queue & (base < {side}_end)"
                          if store.side(side).delayed else "is_queue"))
    return found


def _tile(store: Store, shape: Shape, side: Side, tier: str) -> tuple[list[str], str]:
    """As `_read`; of `own`, the call's own tokens."""
    if tier != "own":
        return _read(store, shape, side, tier)
    dim = shape.dims[SIDES.index(side)]
    return [], (f"own_tokens({side} + row * {side}_row + head * {side}_head, {side}_token, index, "
                f"keep, {dim}, {ts.padded(dim)})")


def finish(store: Store, shape: Shape) -> list[str]:
    """Parts [place, token, query head, split, width] and their maxima and sums."""
    dv, all_ = shape.dims[1], width(store, shape)
    lines = ["at = tl.program_id(1).to(tl.int64) * tokens + column",
             f"at = (at * {shape.queries} + group_head) * splits + split",
             f"c = tl.arange(0, {ts.padded(dv)})",
             f"where = part + at[:, None] * {all_} + c[None, :]",
             f"both = mine[:, None] & (c < {dv})[None, :]",
             "tl.store(where, o, mask=both)"]
    if all_ > dv:
        lines.append(f"tl.store(where + {dv}, turned, mask=both)")
    return [*lines, "tl.store(stats + at * 2, m, mask=mine)",
            "tl.store(stats + at * 2 + 1, l, mask=mine)"]
