"""Ops that only move elements, run on numbers: what lands where, whatever the op is called.

Views, transposes, splits, slices, cats and expands are not interpreted one by one: they are run on
int64 tensors that number the elements of their inputs, with symbolic sizes made concrete.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten

Planes = tuple[Tensor, ...]  # int64 tensors of one shape that move together; 0: nothing is there

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)  # what symbolic sizes become
LARGE = 2**21  # elements that are too many to number; with symbolic sizes a q has thousands
COPIES = {aten.cat, aten.clone, aten.copy, aten.new_empty, aten.repeat, aten.repeat_interleave,
          aten.slice_scatter, aten.stack, aten._unsafe_view}  # as views, but into new memory
NOT_MOVES = {aten._conj, aten._neg_view, aten.as_strided, aten.imag, aten.real,
             aten.view_as_complex, aten.view_as_real}  # views that change values or read strides
CASTS = {aten._to_copy, aten.to, aten.type_as}


class Probe:
    """Concrete sizes for the symbols of a graph, and its movement ops run on them."""

    def __init__(self) -> None:
        self.symbols: dict[Any, int] = {}
        self.known: dict[Any, int] = {}

    def size(self, value: Any) -> Any:
        """`value`; a symbolic size, or a node that computes one, becomes a number."""
        value = value.meta["val"] if isinstance(value, Node) else value
        if not isinstance(value, SymInt):
            return value
        expr = value.node.expr
        if expr not in self.known:
            for symbol in sorted(expr.free_symbols, key=str):
                self.symbols.setdefault(symbol, PRIMES[len(self.symbols) % len(PRIMES)])
            self.known[expr] = int(expr.subs(self.symbols))
        return self.known[expr]

    def shape(self, node: Node) -> torch.Size:
        """The shape of `node`, in numbers."""
        return torch.Size(self.size(n) for n in node.meta["val"].shape)

    def numbers(self, node: Node, first: int) -> Tensor:
        """The elements of `node`, numbered from `first`."""
        shape = self.shape(node)
        return torch.arange(first, first + shape.numel()).view(shape)

    def move(self, node: Node, values: Sequence[Planes]) -> Planes:
        """What `node` makes of the planes of its `feeds`; missing planes are empty."""
        op, item = _call(node)
        assert callable(op.target)
        if packet(op) is aten.new_empty:
            return (torch.zeros(self.shape(op), dtype=torch.int64),)
        out = []
        for i in range(max(map(len, values))):
            plane = {n: v[i] if i < len(v) else torch.zeros_like(v[0])
                     for n, v in zip(feeds(node), values, strict=True)}

            def concrete(n: Node, plane: dict[Node, Tensor] = plane) -> Any:
                return plane[n] if n in plane else self.size(n)

            args: Any = map_arg(op.args, concrete)
            kwargs: Any = map_arg(op.kwargs, concrete)
            result = op.target(*args, **kwargs)
            out.append(result if item is None else result[item])
        return tuple(out)


def _call(node: Node) -> tuple[Node, int | None]:
    """The op that `node` stands for, and which of its results it takes."""
    if node.target is operator.getitem:
        op, item = node.args
        assert isinstance(op, Node) and isinstance(item, int)
        return op, item
    return node, None


def packet(node: Node) -> Any:
    """The op that `node` calls, its overload aside."""
    return getattr(node.target, "overloadpacket", node.target)


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def moves(node: Node) -> bool:
    """Whether `node` only moves elements: each of its own is one of its `feeds`, or undefined."""
    op, _ = _call(node)
    if not isinstance(op.target, torch._ops.OpOverload) or packet(op) in CASTS | NOT_MOVES:
        return False
    return packet(op) in COPIES or (op.target.is_view and op.target is not aten.view.dtype)


def feeds(node: Node) -> list[Node]:
    """The tensors that `node` takes elements from."""
    op, _ = _call(node)
    if packet(op) is aten.new_empty:
        return []
    inputs = [n for n in op.all_input_nodes if is_tensor(n)]
    return inputs[:1] if packet(op) in CASTS else inputs


def origin(node: Node) -> Node:
    """Where `node`, positions, is copied from."""
    while (moves(node) or packet(node) in CASTS) and len(feeds(node)) == 1:
        node = feeds(node)[0]
    return node


def constant(node: Node) -> bool:
    """Whether `node` is a parameter or buffer, or computed from such alone."""
    todo, seen = [node], {node}
    while todo:
        n = todo.pop()
        val = n.meta.get("val")
        if n.op == "placeholder" or isinstance(val, Tensor) and (
                any(isinstance(size, SymInt) for size in val.shape)):
            return False  # parameters have no symbolic sizes
        todo += [x for x in n.all_input_nodes if x not in seen]
        seen.update(n.all_input_nodes)
    return True


def chokepoints(node: Node, inputs: Callable[[Node], Sequence[Node] | None]) -> Iterator[Node]:
    """The nodes that every path back from `node` along `inputs` meets, nearest first.

    Where `inputs` gives None the walk ends.
    """
    frontier = {node}
    while frontier:
        last = max(frontier)
        frontier.remove(last)
        if not frontier and last is not node:
            yield last
        before = inputs(last)
        if before is None:
            return
        frontier.update(before)
