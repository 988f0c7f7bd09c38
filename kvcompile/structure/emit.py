"""New nodes in a traced graph: with the values that tracing would have left on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from kvcompile.ir import ATTENTION
from kvcompile.structure.concrete import Inputs, kind, same_size, value
from kvcompile.structure.operands import MOVES, Operand

if TYPE_CHECKING:
    from kvcompile.structure.recognize import Site

aten = torch.ops.aten


class Emitter:
    """Writes kvc.attention nodes and the operands that they share."""

    def __init__(self, graph: Graph, inputs: Inputs, valid: Node | None = None) -> None:
        self.graph, self.inputs, self.valid = graph, inputs, valid
        self._made: dict[Any, Node] = {}
        self._top = next(n for n in graph.nodes if n.op == "call_function")

    def call(self, target: Callable[..., Any], *args: Any, like: Node | None = None,
             **kwargs: Any) -> Node:
        """A call before the insertion point, with meta["val"]; traced to where `like` was."""
        node = self.graph.call_function(target, args, kwargs)
        self.update(node)
        if like is not None:
            node.meta |= {k: like.meta[k] for k in ("stack_trace", "nn_module_stack")
                          if k in like.meta}
        return node

    def update(self, node: Node) -> None:
        """Give a call the meta["val"] that its operands' values lead to."""
        fakes, named = map_arg((node.args, dict(node.kwargs)), value)
        with value(self.inputs.tokens).fake_mode:
            node.meta["val"] = node.target(*fakes, **named)  # type: ignore[operator]

    def attention(self, site: Site, layer: int) -> None:
        """Put kvc.attention in the place of `site.out`."""
        positions, valid = self.positions(), self.valid or self.seen(site.mask.padding)
        out = site.out
        with self.graph.inserting_before(out):
            q, k, v = (self.operand(o, out) for o in (site.q, site.k, site.v))
            dtype = reduce(torch.promote_types, (value(x).dtype for x in (q, k, v)))
            q, k, v = (self.cast(x, dtype, out) for x in (q, k, v))
            o = self.call(ATTENTION, q, k, v, positions, valid, site.sinks, scale=site.scale,
                          window=site.mask.window, softcap=site.softcap, layer=layer, like=out)
            if len(site.batch) == 1:
                o = self.call(aten.flatten.using_ints, o, 0, 1, like=out)
            elif len(site.batch) > 2:
                o = self.call(aten.unflatten.int, o, 1, list(site.batch[1:]), like=out)
            if site.order != tuple(range(len(site.order))):
                o = self.call(aten.permute.default, o, list(site.order), like=out)
            o = self.cast(o, value(out).dtype, out)
        out.replace_all_uses_with(o)
        _free_layout(o)
        self._bury([out, site.node])

    def _bury(self, dead: list[Node]) -> None:
        """Erase `dead` and what only they used, also sdpa and dropout, which count as random."""
        erased: set[Node] = set()
        while dead:
            node = dead.pop()
            if node.op == "call_function" and not node.users and node not in erased:
                dead += node.all_input_nodes
                erased.add(node)
                self.graph.erase_node(node)

    def operand(self, o: Operand, like: Node) -> Node:
        """[batch, heads, tokens, D] as the operand says to read it."""
        x, rank = o.node, value(o.node).dim()
        if o.split is not None:
            x = self.call(aten.unflatten.int, x, o.split, [-1, o.heads], like=like)
        elif rank == 3:
            x = self.call(aten.unsqueeze.default, x, 1, like=like)
        if o.order != tuple(range(len(o.order))):
            x = self.call(aten.permute.default, x, list(o.order), like=like)
        if len(o.order) == 5:
            x = self.call(aten.flatten.using_ints, x, 1, 2, like=like)
        return x

    def cast(self, x: Node, dtype: torch.dtype, like: Node) -> Node:
        if value(x).dtype == dtype:
            return x
        return self.call(aten._to_copy.default, x, dtype=dtype, like=like)

    def positions(self) -> Node:
        """[B, S]: the graph's position ids, else 0, 1, 2, ..."""
        return self._once("positions", self._positions)

    def _positions(self) -> Node:
        batch, tokens = self._sizes()
        size = value(self.inputs.tokens).shape[0]
        given = self.inputs.positions
        if given is not None and same_size(value(given).shape[0], size):
            return given
        if given is None:
            device = value(self.inputs.tokens).device
            given = self.call(aten.arange.default, tokens, device=device)
        return self.call(aten.expand.default, given, [batch, tokens])

    def seen(self, padding: Node | None) -> Node:
        """[B, S] bool: tokens that are not padding; all of them if the mask reads no padding."""
        return self._once(padding, lambda: self._seen(padding))

    def _seen(self, padding: Node | None) -> Node:
        if padding is None:
            device = value(self.inputs.tokens).device
            return self.call(aten.ones.default, list(self._sizes()), dtype=torch.bool,
                             device=device)
        if value(padding).dtype == torch.bool:
            return padding
        return self.call(aten.ne.Scalar, padding, 0)

    def _sizes(self) -> tuple[Any, Any]:
        """Batch and tokens: numbers, or the nodes that give them."""
        def size(dim: int) -> Any:
            found = value(self.inputs.tokens).shape[dim]
            if isinstance(found, int):
                return found
            make = partial(self.call, aten.sym_size.int, self.inputs.tokens, dim)
            return self._once(("size", dim), make)

        return size(0), size(1)

    def _once(self, key: Any, make: Callable[[], Node]) -> Node:
        """A node that all sites share, made at the top of the graph."""
        if key not in self._made:
            with self.graph.inserting_before(self._top):
                self._made[key] = make()
        return self._made[key]


def _free_layout(start: Node) -> None:
    """Turn views of `start` into reshapes: they were traced for strides that are no more."""
    todo, seen = [start], {start}
    while todo:
        for user in todo.pop().users:
            if user.target is aten.view.default:
                user.target = aten.reshape.default
            pointwise = torch.Tag.pointwise in getattr(user.target, "tags", ())
            if user not in seen and kind(user) != "clone" and (kind(user) in MOVES or pointwise):
                seen.add(user)
                todo.append(user)
