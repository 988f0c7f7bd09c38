"""A model's own position tables as functions of position_ids.

A decoder that numbers its tokens itself (arange, or the first rows of a buffer) has tensors that
depend on sizes and weights alone: tables, row s for token s. Their nodes are copied with the
positions read from position_ids, so that a call can start anywhere and rows of a batch can differ.
Every copy is compared with its table on real tensors.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from kvcompile.structure.concrete import (
    SYMBOLIC,
    Concrete,
    Inputs,
    Miss,
    argument,
    inputs_of,
    kind,
    same_size,
    value,
)
from kvcompile.structure.emit import Emitter

aten = torch.ops.aten
FIRST, COUNT = 3, 4  # the positions that are compared: FIRST, FIRST + 1, ...


def use_position_ids(gm: GraphModule, inputs: Inputs) -> None:
    """Make every table of `gm` follow `inputs.positions`; raises Miss for one that cannot."""
    small, large = (Concrete(gm, inputs, n, weights=True) for n in (COUNT, FIRST + COUNT))
    made: dict[Node, Node] = {}
    for node, user in _edges(gm, small, large):
        table = _Table(node, value(user).dim(), small, large)
        if table.axis is None:
            continue
        if torch.Tag.pointwise not in getattr(user.target, "tags", ()) or not same_size(
                value(user).shape[0], value(inputs.tokens).shape[0]):
            raise Miss(f"goes, a table of positions, into '{user.name}' without a batch", node)
        if node not in made:
            made[node] = table.copy()
            table.compare(made[node])
        user.replace_input_with(node, made[node])
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _edges(gm: GraphModule, small: Concrete, large: Concrete) -> list[tuple[Node, Node]]:
    """(table, user): tensors that sizes and weights determine, used by one that tokens do."""
    free: set[Node] = set()
    found = []
    for node in gm.graph.nodes:
        used = inputs_of(node)
        if node.op == "get_attr" or isinstance(node.meta.get("val"), SYMBOLIC) or (
                node.op == "call_function" and all(n in free for n in used)):
            free.add(node)
            continue
        found += [(n, node) for n in dict.fromkeys(used) if n in free and n.op == "call_function"
                  and isinstance(value(n), Tensor) and small.shape(n) != large.shape(n)]
    return found


@dataclass
class _Table:
    """A table that meets tensors of `rank` dimensions, in the graph seen at two token counts."""

    node: Node
    rank: int
    small: Concrete
    large: Concrete

    @property
    def axis(self) -> int | None:
        """The dimension that counts tokens; None if all rows are the same."""
        shapes = zip(self.small.shape(self.node), self.large.shape(self.node), strict=True)
        axis, *more = (i for i, (a, b) in enumerate(shapes) if a != b)
        if more:
            raise Miss("relates tokens by their places in the call", self.node)
        rows = self.large.evaluate([self.node])[0]
        return None if torch.equal(rows, rows.narrow(axis, 0, 1).expand_as(rows)) else axis

    @property
    def alone(self) -> bool:
        """Whether the first dimension is that of the batch, or 1 in its place."""
        return len(self.small.shape(self.node)) == self.rank

    def copy(self) -> Node:
        """[batch, ..] of `rank` dimensions: the table at position_ids."""
        graph, inputs = self.small.gm.graph, self.small.inputs
        shape, axis = self.small.shape(self.node), self.axis
        if len(shape) > self.rank or self.alone and (
                axis == 0 or shape[0] not in (1, self.small.batch)):
            raise Miss("is a table of positions without a dimension for the batch", self.node)
        emit = Emitter(graph, inputs)
        with graph.inserting_before(self.node.next):
            ids = inputs.positions
            flat = emit.call(aten.flatten.using_ints, ids, like=self.node)
            sizes = [emit.call(aten.sym_size.int, ids, dim) for dim in (0, 1)]
            count = emit.call(operator.mul, *sizes)
            again: dict[Node, Any] = {}
            for node in _behind(self.node):
                again[node] = self._again(emit, node, again, flat, count)
            x = emit.call(aten.unflatten.int, again[self.node], axis, sizes, like=self.node)
            x = emit.call(aten.movedim.int, x, axis, 0, like=self.node)
            if self.alone:
                return emit.call(aten.squeeze.dim, x, 1, like=self.node)
            for _ in range(self.rank - len(shape) - 1):
                x = emit.call(aten.unsqueeze.default, x, 1, like=self.node)
        return x

    def _again(self, emit: Emitter, node: Node, again: dict[Node, Any], flat: Node,
               count: Node) -> Any:
        """`node` for one row of `count` tokens at the positions `flat`."""
        if _is_size(node):
            batch, tokens = value(self.small.inputs.tokens).shape[:2]
            if same_size(value(node), tokens):
                return count
            if same_size(value(node), batch):
                return 1
            raise Miss(f"size {value(node)} does not follow from batch and tokens", node)
        if node.op == "get_attr":
            return node
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: again[n])
        if kind(node) == "arange" and args in ((count,), (0, count), (0, count, 1)):
            return emit.cast(flat, value(node).dtype, node)
        if kind(node) == "slice" and args[2:] in ((0, count), (None, count)) \
                and self.small.shape(argument(node)) == self.large.shape(argument(node)):
            return emit.call(aten.index_select.default, args[0], args[1], flat, like=node)
        return emit.call(node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]

    def compare(self, copy: Node) -> None:
        """Raise Miss unless positions FIRST, FIRST + 1, ... of the copy are those rows."""
        want = self.large.evaluate([self.node])[0]
        want = want.narrow(self.axis, FIRST, COUNT)
        ids = torch.arange(FIRST, FIRST + COUNT).expand(self.small.batch, -1)
        got = self.small.evaluate([copy], lambda n: ids.to(value(n).device))[0]
        wide = want.expand(self.small.batch, *want.shape[1:]) if self.alone else torch.stack(
            [want] * self.small.batch)
        eps = torch.finfo(got.dtype).eps if got.is_floating_point() or got.is_complex() else 0
        if not torch.allclose(got.reshape(wide.shape), wide, rtol=8 * eps, atol=8 * eps):
            raise Miss("depends on more than the position of each token", self.node)


def _is_size(node: Node) -> bool:
    """Whether the node is a size of a tensor, not a computation on sizes."""
    return isinstance(node.meta.get("val"), SYMBOLIC) and not (
        node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator")


def _behind(table: Node) -> list[Node]:
    """The table's node and those it is computed from, sizes included, in graph order."""
    seen: set[Node] = set()
    todo = [table]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [] if _is_size(node) else node.all_input_nodes
    return sorted(seen)
