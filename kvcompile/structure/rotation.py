"""Rotary embedding, however it is spelled: result channel = +-x[a] * cos[i] +- x[b] * sin[j].

rotate_half, strided slices and stack, products of complex numbers, halves computed one by one and
concatenated: all of them compute a sum of this form in each channel, with a, b, i, j fixed. So the
ops between a candidate x and its result are run on such sums (`Terms`), and what comes out is
compared with the rotation of each style. There is no pattern for each spelling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from kvcompile.structure.movement import CASTS, Planes, Probe, feeds, is_tensor, moves, packet

aten = torch.ops.aten


class Column(NamedTuple):
    """A channel of a table of cosines or sines; of part 0 (real) or 1 where it is complex."""

    table: Node
    part: int | None
    channel: int


Channels = list[dict[int, tuple[int, Column | None]]]  # per channel: channel of x -> sign, column


class Style(NamedTuple):
    """A rotation: result channel i is x[order[i]] * cos +- x[order[partner[i]]] * sin."""

    name: str
    order: tuple[int, ...]
    partner: tuple[int, ...]
    first: tuple[bool, ...]  # which channel of a pair has the minus sign


@dataclass(frozen=True)
class Rotation:
    """`top` is rope(x, cos, sin), with sin negated where `backward`."""

    top: Node
    x: Node
    style: Style
    cos: tuple[Column, ...]
    sin: tuple[Column, ...]
    backward: bool


def styles(r: int) -> tuple[Style, ...]:
    """The known rotations of r channels; the last also sorts even channels before odd ones."""
    each, n = tuple(range(r)), r // 2
    across, halves = tuple((i + n) % r for i in each), tuple(i < n for i in each)
    return (
        Style("half", each, across, halves),
        Style("interleaved", each, tuple(i ^ 1 for i in each), tuple(i % 2 == 0 for i in each)),
        Style("half", each[::2] + each[1::2], across, halves),
    )


def find_rotation(top: Node, x: Node, content: set[Node], probe: Probe) -> Rotation | None:
    """`top` as a rotation of `x`: a prefix of the channels turned, the others passed through.

    `content` are the nodes that depend on tokens; all others may be tables.
    """
    channels = Terms(top, x, content, probe).channels()
    if channels is None:
        return None
    r = next((i for i, c in enumerate(channels) if len(c) != 2), len(channels))
    if r == 0 or r % 2 or any(c != {i: (1, None)} for i, c in enumerate(channels[r:], r)):
        return None
    for style in styles(r):
        pairs = [(i, style.order[p]) for i, p in zip(style.order, style.partner)]
        if any(set(c) != set(pair) for c, pair in zip(channels, pairs)):
            continue
        cos, sin = ([c[pair[i]] for c, pair in zip(channels, pairs)] for i in (0, 1))
        minus = {(sign < 0) is first for (sign, _), first in zip(sin, style.first)}
        tables = [tuple(column for _, column in each if column) for each in (cos, sin)]
        if all(sign > 0 for sign, _ in cos) and len(minus) == 1 and all(
                len(t) == r and width(t, style) for t in tables):
            return Rotation(top, x, style, tables[0], tables[1], backward=minus == {False})
    return None


def halves(columns: Sequence[Column], style: Style) -> list[list[Column]]:
    """The columns of the channels that come first in their pairs, and those of the others."""
    return [[c for c, first in zip(columns, style.first) if first is which]
            for which in (True, False)]


def width(columns: Sequence[Column], style: Style) -> int:
    """Channels of the node or nodes that `columns` are: all, half of them each, or 0 for neither.
    """
    def whole(part: Sequence[Column]) -> bool:
        node, complex_part, _ = part[0]
        every = [Column(node, complex_part, i) for i in range(node.meta["val"].shape[-1])]
        return list(part) == every

    if whole(columns):
        return len(columns)
    parts = halves(columns, style)
    fits = all(map(whole, parts)) and (style.name == "half" or parts[0] == parts[1])
    return len(parts[0]) if fits else 0


@dataclass(frozen=True)
class _Complex:
    re: Planes
    im: Planes


Value = Planes | _Complex | None  # None: not a sum of the form


@dataclass
class Terms:
    """Runs ops on sums of terms +-x[a] * table[i]: planes a, i, a, i, ... of numbers.

    x's elements count from 2 and carry the sign; a = 1 is a term without x, a = 0 no term, i = 0
    no table.
    """

    top: Node
    x: Node
    content: set[Node]
    probe: Probe
    known: dict[Node, Value] = field(default_factory=dict)
    tables: list[tuple[Node, int | None, int]] = field(default_factory=list)  # and first number
    free: int = 1

    def channels(self) -> Channels | None:
        """What every channel of `top` is made of, if it is the same in all rows."""
        planes = self.value(self.top)
        if not isinstance(planes, tuple):
            return None
        size = planes[0].shape[-1]
        row = torch.arange(planes[0].numel() // max(size, 1)).view(*planes[0].shape[:-1], 1)
        out: Channels = [{} for _ in range(size)]
        for a, i in zip(planes[::2], planes[1::2]):
            at = a.abs() - 2
            signed = (a.sign() * (at % size + 1)).flatten(0, -2)  # channels, counted from 1
            own = (a == 0) | ((at >= 0) & (at // size == row))
            columns = self.columns(i)
            if columns is None or not bool(own.all()) or bool((signed != signed[0]).any()):
                return None
            for made, n, column in zip(out, signed[0].tolist(), columns):
                if abs(n) - 1 in made:
                    return None
                if n:
                    made[abs(n) - 1] = (1 if n > 0 else -1), column
        return out

    def columns(self, plane: Tensor) -> list[Column | None] | None:
        """The table column that each channel uses, if every row uses its own element of it."""
        first, want = plane.flatten(0, -2)[0], torch.zeros_like(plane)
        out: list[Column | None] = [None] * len(first)
        for node, part, start in self.tables:
            numbers = self.probe.numbers(node, start)
            here = ((first >= start) & (first < start + numbers.numel())).nonzero().flatten()
            if not len(here):
                continue
            channels = (first[here] - start) % numbers.shape[-1]
            try:
                rows = numbers.broadcast_to(*plane.shape[:-1], numbers.shape[-1])
            except RuntimeError:
                return None
            want[..., here] = rows[..., channels]
            for at, channel in zip(here.tolist(), channels.tolist()):
                out[at] = Column(node, part, channel)
        return out if torch.equal(plane, want) else None

    def value(self, node: Node) -> Value:
        if node not in self.known:
            self.known[node] = self.run(node)
        return self.known[node]

    def run(self, node: Node) -> Value:
        if node is self.x:
            numbers = self.probe.numbers(node, 2)
            return numbers, torch.zeros_like(numbers)
        if node not in self.content:
            return self.table(node) if is_tensor(node) else None
        op = packet(node)
        if node.op != "call_function":
            return None
        if moves(node):
            return self.move(node, [self.value(n) for n in feeds(node)])
        if op in CASTS:
            return self.cast(node, self.value(feeds(node)[0]))
        if op in RULES and not node.kwargs:
            if op in ROUNDING and node.meta["val"].dtype.to_real() != self.top.meta["val"].dtype:
                return None
            values = [self.value(n) if isinstance(n, Node) else None for n in node.args]
            return None if None in values else RULES[op](*values)
        return None

    def table(self, node: Node) -> Value:
        def planes(part: int | None) -> Planes:
            numbers = self.probe.numbers(node, self.free)
            self.tables.append((node, part, self.free))
            self.free += numbers.numel()
            return torch.ones_like(numbers), numbers

        return _Complex(planes(0), planes(1)) if node.meta["val"].is_complex() else planes(None)

    def move(self, node: Node, values: list[Value]) -> Value:
        if values and all(isinstance(v, tuple) for v in values):
            return self.probe.move(node, values)  # type: ignore[arg-type]
        if values and all(isinstance(v, _Complex) for v in values):
            re, im = ([getattr(v, part) for v in values] for part in ("re", "im"))
            return _Complex(self.probe.move(node, re), self.probe.move(node, im))
        return None

    def cast(self, node: Node, value: Value) -> Value:
        """A cast that rounds nothing and comes before the products changes nothing."""
        before, after = (n.meta["val"].dtype for n in (feeds(node)[0], node))
        if before == after:
            return value
        exact = torch.promote_types(before, after) == after
        early = isinstance(value, tuple) and not any(bool(i.any()) for i in value[1::2])
        return value if exact and early else None


def _neg(a: Value) -> Value:
    if isinstance(a, _Complex):
        return _complex(_neg(a.re), _neg(a.im))
    return a and tuple(-p if i % 2 == 0 else p for i, p in enumerate(a))


def _add(a: Value, b: Value) -> Value:
    if isinstance(a, _Complex) and isinstance(b, _Complex):
        return _complex(_add(a.re, b.re), _add(a.im, b.im))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return tuple(torch.broadcast_tensors(*a, *b))
    return None


def _sub(a: Value, b: Value) -> Value:
    return _add(a, _neg(b))


def _mul(a: Value, b: Value) -> Value:
    if isinstance(a, _Complex) and isinstance(b, _Complex):
        return _complex(_sub(_mul(a.re, b.re), _mul(a.im, b.im)),
                        _add(_mul(a.re, b.im), _mul(a.im, b.re)))
    if not isinstance(a, tuple) or not isinstance(b, tuple):
        return None
    out: list[Tensor] = []
    for x, i in zip(a[::2], a[1::2]):
        for y, j in zip(b[::2], b[1::2]):
            x, i, y, j = torch.broadcast_tensors(x, i, y, j)
            both_x, both_tables = (x.abs() > 1) & (y.abs() > 1), (i > 0) & (j > 0)
            if bool((both_x | both_tables).any()):
                return None
            out += [x * y, torch.where((x != 0) & (y != 0), i + j, 0)]
    return tuple(out)


def _complex(re: Value, im: Value) -> Value:
    return _Complex(re, im) if isinstance(re, tuple) and isinstance(im, tuple) else None


def _view_as_complex(a: Value) -> Value:
    parts = [tuple(p[..., i] for p in a) for i in (0, 1)] if isinstance(a, tuple) else [None, None]
    return _complex(*parts)


def _view_as_real(a: Value) -> Value:
    if not isinstance(a, _Complex):
        return None
    return tuple(torch.stack(pair, -1) for pair in zip(a.re, a.im))


RULES: dict[Any, Callable[..., Value]] = {
    aten.neg: _neg,
    aten.add: _add,
    aten.sub: _sub,
    aten.mul: _mul,
    aten.view_as_complex: _view_as_complex,
    aten.view_as_real: _view_as_real,
}
ROUNDING = {aten.add, aten.sub, aten.mul}
