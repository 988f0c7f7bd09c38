"""A graph's sizes, masks and layouts on real tensors, at chosen batch and token counts.

What a subgraph means is often easier to see than to match: a mask is evaluated and looked at, the
copies between a key and its use are followed by an index. Only the nodes a value depends on run.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from sympy import Integer
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
# ops for which one argument's values do not matter, its shape or dtype alone
LIKE = {"zeros_like": 0, "ones_like": 0, "full_like": 0, "empty_like": 0, "new_zeros": 0,
        "new_ones": 0, "new_full": 0, "new_empty": 0, "expand_as": 1, "type_as": 1, "view_as": 1}
CASTS = {"_to_copy", "to", "type_as", "float", "convert_element_type"}


class Miss(Exception):
    """Why a rule does not apply, and the node where that shows."""

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


class Failed(Miss):
    """A node that cannot be run at the chosen sizes."""


def kind(node: Any) -> str:
    """The name of the aten or prims op that `node` calls, without overload; "" for all else."""
    target = getattr(node, "target", None)
    if isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims"):
        return target.overloadpacket.__name__
    return ""


def argument(node: Node, index: int = 0) -> Node:
    """The node that a call has as positional argument `index`."""
    if index < len(node.args) and isinstance(found := node.args[index], Node):
        return found
    raise Miss(f"has no tensor as argument {index}", node)


def value(node: Node) -> Any:
    """The fake value that tracing left on `node`."""
    if "val" not in node.meta:
        raise Miss("has no meta['val']: trace with fake tensors", node)
    return node.meta["val"]


@dataclass(frozen=True)
class Inputs:
    """The roles of a graph's placeholders.

    `tokens` is [batch, tokens, ...]; `positions` and `padding` (0 for padding) are [batch, tokens];
    `values` holds what is known of others by name, such as the buffers that tracing lifted.
    """

    tokens: Node
    positions: Node | None = None
    padding: Node | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph, tokens: Node | None = None, positions: Node | None = None,
           padding: Node | None = None, values: Mapping[str, Tensor] | None = None) -> "Inputs":
        """The roles given and, for the others, what names and shapes of placeholders suggest."""
        holders = [n for n in graph.nodes if n.op == "placeholder"
                   and isinstance(n.meta.get("val"), Tensor) and n.name not in (values or {})]
        rows = [n for n in holders if n.meta["val"].dim() == 2 and not _floating(n)]
        last = [n.meta["val"].shape[1] for n in (tokens, *rows) if n is not None]
        size = next((s for s in last if isinstance(s, SYMBOLIC)), next(iter(last), None))
        rows = [n for n in rows if _alike(n.meta["val"].shape[1], size)]
        named = {part: next((n for n in rows if part in n.name), None)
                 for part in ("position", "mask")}
        positions = positions or named["position"]
        padding = padding or (named["mask"] if named["mask"] is not positions else None)
        spare = [n for n in rows if n not in (positions, padding)]
        embedded = [n for n in holders if n.meta["val"].dim() == 3 and _floating(n)]
        for choice in (tokens, *spare[:1], *embedded[:1], positions, padding):
            if choice is not None:
                return Inputs(choice, positions, padding, dict(values or {}))
        raise Miss("no placeholder holds tokens [batch, tokens]; name it with tokens=")


def _floating(node: Node) -> bool:
    return bool(node.meta["val"].is_floating_point())


def _alike(a: Any, b: Any) -> bool:
    """Whether both sizes are symbols, which calls may make equal, or are the same number."""
    symbolic = isinstance(a, SYMBOLIC)
    return symbolic if isinstance(b, SYMBOLIC) else not symbolic and a == b


class Concrete:
    """The graph at `batch` rows of `tokens` tokens, where it does not fix their number.

    What depends on weights is refused unless `weights`.
    """

    def __init__(self, gm: GraphModule, inputs: Inputs, tokens: int, batch: int = 2,
                 weights: bool = False) -> None:
        self.gm, self.inputs, self.weights = gm, inputs, weights
        self.binding: dict[Any, int] = {}
        sizes = value(inputs.tokens).shape[:2]
        self.batch, self.tokens = (self._bind(s, n) for s, n in
                                   zip(sizes, (batch, tokens), strict=True))
        for node in (n for n in gm.graph.nodes if n.op == "placeholder"):
            val = node.meta.get("val")
            if isinstance(val, Tensor) and val.dim() == 2 and (
                    node is inputs.padding or not val.is_floating_point()):
                for s, n in zip(val.shape, (self.batch, self.tokens), strict=True):
                    self._bind(s, n)

    def _bind(self, size: int | torch.SymInt, count: int) -> int:
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr
        if expr.is_Symbol:
            return self.binding.setdefault(expr, count)
        return int(expr) if expr.is_number else count

    def size(self, x: Any) -> Any:
        """The number that a size, or an expression of sizes, is here."""
        if not isinstance(x, SYMBOLIC):
            return x
        expr = x.node.expr.xreplace({s: Integer(n) for s, n in self.binding.items()})
        if expr.free_symbols:
            raise Miss(f"size {expr} does not follow from batch and tokens")
        return {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(x)](expr)

    def shape(self, node: Node) -> tuple[int, ...]:
        try:
            return tuple(self.size(s) for s in value(node).shape)
        except Miss as miss:
            raise Miss(miss.reason, node) from None

    def same_rows(self, before: Node, after: Node) -> bool:
        """Whether a view from `before` to `after` keeps the last two dimensions as they are."""
        a, b = self.shape(before), self.shape(after)
        return a[-2:] == b[-2:] and prod(a) == prod(b)

    def given(self, arg: Any, known: Mapping[Node, Any]) -> Any:
        """`arg` with its nodes replaced: by what is known, by their size, else by their value."""
        def one(node: Node) -> Any:
            if node in known:
                return known[node]
            if isinstance(node.meta.get("val"), SYMBOLIC):
                return self.size(node.meta["val"])
            return self.evaluate([node])[0]

        return map_arg(arg, one)

    def evaluate(self, nodes: Iterable[Node],
                 leaf: Callable[[Node], Any] | None = None) -> list[Any]:
        """The values of `nodes`; `leaf(placeholder)` is asked for what placeholders hold."""
        wanted = list(nodes)
        order = ancestors(wanted)
        last = {used: node for node in order for used in inputs_of(node)}
        known: dict[Node, Any] = {}
        for node in order:
            known[node] = self._run(node, known, leaf)
            for used in [u for u in inputs_of(node) if last[u] is node and u not in wanted]:
                known.pop(used, None)
        return [known[n] for n in wanted]

    def _run(self, node: Node, known: dict[Node, Any], leaf: Callable[[Node], Any] | None) -> Any:
        val = node.meta.get("val")
        if isinstance(val, SYMBOLIC):
            return self.size(val)
        if node.op == "placeholder":
            if node.name in self.inputs.values:
                return self.inputs.values[node.name]
            if isinstance(val, Tensor) and leaf is None:
                raise Miss(f"depends on the placeholder '{node.name}'", node)
            return leaf(node) if leaf and isinstance(val, Tensor) else val
        if node.op == "get_attr":
            found = operator.attrgetter(str(node.target))(self.gm)
            if isinstance(found, torch.nn.Parameter) and not self.weights:
                raise Miss(f"depends on the weight '{node.target}'", node)
            return found
        if node.op != "call_function":
            raise Miss(f"depends on '{node.name}', which is not an operator call", node)
        args = list(node.args)
        if (at := LIKE.get(kind(node))) is not None:
            like = argument(node, at)
            val = value(like)
            args[at] = torch.empty((), dtype=val.dtype, device=val.device).expand(self.shape(like))
        given = self.given((args, dict(node.kwargs)), known)
        try:
            with torch.no_grad():
                return node.target(*given[0], **given[1])  # type: ignore[operator]
        except Exception as error:
            what = (str(error) or type(error).__name__).splitlines()[0]
            raise Failed(f"fails for {self.tokens} tokens: {what}", node) from error


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression; does not make symbols equal by asking."""
    expressions = [x.node.expr if isinstance(x, SYMBOLIC) else x for x in (a, b)]
    return bool(expressions[0] == expressions[1])


def inputs_of(node: Node) -> list[Node]:
    """The nodes whose values `node` needs; sizes are known without running anything."""
    if isinstance(node.meta.get("val"), SYMBOLIC):
        return []
    args = list(node.args)
    if (at := LIKE.get(kind(node))) is not None and at < len(args):
        args.pop(at)
    found: list[Node] = []
    map_arg((args, dict(node.kwargs)), found.append)
    return found


def ancestors(nodes: Iterable[Node]) -> list[Node]:
    """`nodes` and all that their values depend on, in graph order."""
    seen: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(inputs_of(node))
    return sorted(seen)


def constant(at: Concrete, x: Any) -> float:
    """The number that `x` is in every call: a literal, or a node of one element that needs none."""
    if isinstance(x, int | float):
        return float(x)
    if not isinstance(x, Node):
        raise Miss(f"{x} is not a number")
    both = (at, Concrete(at.gm, at.inputs, at.tokens + 2))
    found = [torch.as_tensor(c.evaluate([x])[0]) for c in both]
    if found[0].numel() != 1:
        raise Miss(f"has {found[0].numel()} elements, not one number", x)
    if not torch.equal(*found):
        raise Miss("changes with the number of tokens", x)
    return float(found[0])
