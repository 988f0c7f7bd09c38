"""canonicalize: rotary embedding becomes explicit. x * cos + turn(x) * sin -> rope(x, cos, sin)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from kvcompile.ir import ATTENTION, ROPE, argument, attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.structure.movement import (
    LARGE,
    Probe,
    chokepoints,
    feeds,
    is_tensor,
    origin,
    packet,
)
from kvcompile.structure.rotation import Column, Rotation, Style, find_rotation, halves, width

aten = torch.ops.aten

# where a search back from q or k ends
ENDS = {aten.linear, aten.addmm, aten.mm, aten.bmm, aten.matmul, aten.embedding}


@dataclass(frozen=True)
class Canonicalize:
    """x * cos + turn(x) * sin -> rope(x, cos, sin), for the q and k of every attention node.

    The tables keep the values that the model uses. They must come from positions alone, and each
    token's row from the token's own position, so that a key may be cached before its rotation.
    """

    name: ClassVar[str] = "canonicalize"
    order: ClassVar[int] = 10
    axes: ClassVar[tuple[str, ...]] = ()

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        finder, writer = _Finder(gm), _Writer(gm.graph)
        sites = attention_nodes(gm.graph)
        outcomes = [_site(layer, node, finder, writer) for layer, node in enumerate(sites)]
        if any(isinstance(o, Rewritten) for o in outcomes):
            gm.graph.eliminate_dead_code()
        return outcomes


def _site(layer: int, node: Node, finder: "_Finder", writer: "_Writer") -> Outcome:
    """Rewrite the q and k of one attention node, or neither."""
    found: dict[str, list[Rotation]] = {}
    for side in ("q", "k"):
        result = finder.search(argument(node, side))
        if isinstance(result, tuple):
            reason, where = result
            return Refused(layer, f"{side}: {reason}", where.name)
        if result:
            found[side] = result
    if not found:
        return Refused(layer, "q and k pass through kvc.rope already", node.name)
    rotations = [r for side in found.values() for r in side]
    for rotation in rotations:
        writer.write(rotation)
    names = "/".join(sorted({r.style.name for r in rotations}))
    turned = max(len(r.cos) for r in rotations)
    head = int(argument(node, "k").meta["val"].shape[-1])
    part = f", {turned} of {head} channels" if turned < head else ""
    return Rewritten(layer, f"rope {names} {','.join(found)}{part}")


class _Finder:
    """Finds the rotations of one graph, and knows what depends on tokens and on positions."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm, self.probe = gm, Probe()
        self.positions = {origin(argument(n, "positions")) for n in attention_nodes(gm.graph)}
        self.content: set[Node] = set()
        self.positional: set[Node] = set()  # depends on positions and not on tokens
        for n in gm.graph.nodes:
            if n in self.positions:
                self.positional.add(n)
            elif isinstance(n.meta.get("val"), (torch.SymInt, int)):
                continue
            elif n.op == "placeholder" or self.content.intersection(n.all_input_nodes):
                self.content.add(n)
            elif self.positional.intersection(n.all_input_nodes):
                self.positional.add(n)

    def search(self, node: Node) -> list[Rotation] | tuple[str, Node]:
        """The rotations between `node` and its projections that are not explicit yet.

        If there are none, and no kvc.rope either: why, and the node.
        """
        rotations: list[Rotation] = []
        explicit, last, reason = False, node, None
        frontier = {node}
        while frontier:
            last = max(frontier)
            frontier.remove(last)
            if last in self.positional:
                reason = reason or ("positions enter otherwise than by a rotary embedding", last)
            explicit |= last.target is ROPE
            if self.ends(last):
                continue
            found = self.match(last)
            if isinstance(found, Rotation):
                rotations.append(found)
                continue
            if found:
                reason = found, last
            frontier.update(n for n in last.all_input_nodes if n in self.content | self.positional)
        if rotations or explicit:
            return rotations
        return reason or (f"no rotary embedding between '{last.name}' and attention", last)

    def ends(self, node: Node) -> bool:
        """Whether nothing behind `node` is a rotation of the q or k that is searched."""
        return (node not in self.content or node.op != "call_function" or packet(node) in ENDS
                or node.target in (ROPE, ATTENTION))

    def match(self, top: Node) -> Rotation | str | None:
        """`top` as a rotation of the nearest node that it is one of; or why that is not legal."""
        if not is_tensor(top) or len(top.meta["val"].shape) < 2:
            return None

        def inputs(n: Node) -> list[Node] | None:
            return None if self.ends(n) else [x for x in feeds(n) if x in self.content]

        shape = self.probe.shape(top)
        if shape.numel() > LARGE:
            return f"'{top.name}' is fixed at {tuple(shape)}, too large to follow; trace with " \
                   "symbolic sizes"
        for x in chokepoints(top, inputs):
            if is_tensor(x) and self.probe.shape(x) == shape:
                found = find_rotation(top, x, self.content, self.probe)
                if found:
                    return self.illegal(found) or found
        return None

    def illegal(self, found: Rotation) -> str | None:
        """Why a key could not be cached before this rotation."""
        for table in sorted({c.table for c in found.cos + found.sin}):
            if table not in self.positional:
                return f"the angles ('{table.name}') do not come from positions"
            if not self.per_token(table):
                return f"a token's angles ('{table.name}') depend on other tokens' positions"
        return None

    def per_token(self, table: Node) -> bool:
        """Whether the farthest token's moving on changes one row of `table` at most."""
        known: dict[Node, Any] = {}
        for root in self.positions:
            shape, val = self.probe.shape(root), root.meta["val"]
            known[root] = torch.arange(shape.numel(), device=val.device, dtype=val.dtype)
            known[root] = known[root].view(shape)
        moved = {root: positions.clone() for root, positions in known.items()}
        for positions in moved.values():
            positions.flatten()[-1] += 100
        try:
            old, new = self.evaluate(table, known), self.evaluate(table, moved)
        except IndexError:  # a table of positions that ends before
            return False
        return int((old != new).sum()) <= old.shape[-1]

    def evaluate(self, node: Node, known: dict[Node, Any]) -> Any:
        """The value of `node`, which depends on nothing but positions."""
        if node not in known:
            if isinstance(node.meta.get("val"), (torch.SymInt, int)):
                known[node] = self.probe.size(node)
            elif node.op == "get_attr":
                value: Any = self.gm
                for name in str(node.target).split("."):
                    value = getattr(value, name)
                known[node] = value
            else:
                assert callable(node.target)
                args: Any = map_arg(node.args, lambda n: self.evaluate(n, known))
                kwargs: Any = map_arg(node.kwargs, lambda n: self.evaluate(n, known))
                known[node] = node.target(*args, **kwargs)
        return known[node]


class _Writer:
    """Writes kvc.rope nodes, and each table of cosines or sines once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.tables: dict[tuple[tuple[Column, ...], str, bool], Node] = {}

    def write(self, r: Rotation) -> None:
        cos = self.table(r.cos, r.style, False)
        sin = self.table(r.sin, r.style, r.backward)
        with self.graph.inserting_before(r.top):
            x, size, val = r.x, len(r.cos), r.top.meta["val"]
            if x.meta["val"].dtype != val.dtype:
                x = self.call(r.top, aten._to_copy.default, x, dtype=val.dtype)
            if r.style.order != tuple(range(size)):
                parts = [self.call(r.top, aten.slice.Tensor, x, -1, *at)
                         for at in ((0, size, 2), (1, size, 2), (size,))]
                x = self.call(r.top, aten.cat.default, parts[:2 + (size < val.shape[-1])], -1)
            rope = self.graph.call_function(ROPE, (x, cos, sin), {"style": r.style.name})
            rope.meta = dict(r.top.meta)
        r.top.replace_all_uses_with(rope)

    def table(self, columns: tuple[Column, ...], style: Style, negated: bool) -> Node:
        """The node that has these columns, placed right after those that it is made of."""
        key = columns, style.name, negated
        if key not in self.tables:
            with self.graph.inserting_before(max(c.table for c in columns).next):
                self.tables[key] = self.build(columns, style, negated)
        return self.tables[key]

    def build(self, columns: tuple[Column, ...], style: Style, negated: bool) -> Node:
        nodes = []
        for node, part, _ in (half[0] for half in halves(columns, style)):
            if part is not None:
                node = self.call(node, aten.view_as_real.default, node)
                node = self.call(node, aten.select.int, node, -1, part)
            nodes.append(node)
        out = nodes[0]
        if width(columns, style) < len(columns):
            if style.name == "half":
                out = self.call(out, aten.cat.default, nodes, -1)
            else:
                out = self.call(out, aten.repeat_interleave.self_int, out, 2, -1)
        return self.call(out, aten.neg.default, out) if negated else out

    def call(self, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call with its `val`, said to come from the line of the model that `like` comes from."""
        node = self.graph.call_function(target, args, kwargs)
        with like.meta["val"].fake_mode:
            values = map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta = {**like.meta, "val": target(*values[0], **values[1])}
        return node


PASS = Canonicalize()
