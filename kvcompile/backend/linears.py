"""For one row of input: linears become kvc.linear, those of the same input one of them.

A linear of one row is bound by reading its weight; the kernel of kvc.linear reads it once, as it
lies, and one kernel for q, k and v (or gate and up) starts its threads once.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from kvcompile.ir import LINEAR

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def merge_linears(gm: GraphModule, inputs: Sequence[Tensor]) -> None:
    """Rewrite, in place, the linears that have one row of input when `gm` gets `inputs`."""
    sizes = _sizes(gm.graph, inputs)
    groups: dict[Node, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if node.target is aten.linear.default and _fits(node, sizes):
            groups[node.args[0]].append(node)
    for nodes in groups.values():
        _merge(gm.graph, nodes)
    gm.graph.lint()
    gm.recompile()


def _sizes(graph: Graph, inputs: Sequence[Tensor]) -> dict[sympy.Expr, int]:
    """What the symbols in the shapes of the graph's inputs are for these inputs."""
    found: dict[sympy.Expr, int] = {}
    places = (n for n in graph.nodes if n.op == "placeholder")
    for place, given in zip(places, inputs, strict=True):
        if "val" in place.meta:  # a plane has none
            found.update((symbol.node.expr, size) for symbol, size
                         in zip(place.meta["val"].shape, given.shape, strict=True)
                         if isinstance(symbol, torch.SymInt))
    return found


def _fits(node: Node, sizes: dict[sympy.Expr, int]) -> bool:
    """Whether a linear has one row of input, and parameters that lie as the kernel reads them."""
    x, weight, bias = _operands(node)
    parameters = [p for p in (weight, bias) if p is not None]
    if not all(p.op == "get_attr" for p in parameters):
        return False
    rows = sympy.Integer(1)
    for size in x.meta["val"].shape[:-1]:
        rows *= size.node.expr.subs(sizes) if isinstance(size, torch.SymInt) else size
    values = [p.meta["val"] for p in (x, *parameters)]
    dtype = values[0].dtype
    return (rows == 1 and dtype in DTYPES and weight.meta["val"].dim() == 2
            and all(v.dtype == dtype and v.device.type == "cpu" for v in values)
            and all(v.is_contiguous() for v in values[1:]))


def _operands(node: Node) -> tuple[Node, Node, Any]:
    """x, weight and bias (or None) of a linear."""
    x, weight, *bias = node.args
    return x, weight, bias[0] if bias else node.kwargs.get("bias")  # type: ignore[return-value]


def _merge(graph: Graph, nodes: list[Node]) -> None:
    """One kvc.linear in place of `nodes`, linears of one input; their results are slices of it."""
    x = _operands(nodes[0])[0]
    gated = _gated(nodes)
    if gated:
        nodes = [gated.gate, gated.other]
    weights, biases = zip(*(_operands(n)[1:] for n in nodes))
    for parameter in (*weights, *biases):
        if parameter is not None and x < parameter:
            x.prepend(parameter)
    options: dict[str, Any] = {"gate": gated.name} if gated else {}
    with graph.inserting_after(x):
        merged = graph.call_function(LINEAR, (x, list(weights), list(biases)), options)
    if gated or len(nodes) == 1:
        _replace(graph, gated.product if gated else nodes[0], merged)
        return
    merged.meta["val"] = torch.cat([n.meta["val"] for n in nodes], -1)
    start = 0
    for node, weight in zip(nodes, weights):
        end = start + weight.meta["val"].shape[0]
        with graph.inserting_after(merged):
            part = graph.call_function(aten.slice.Tensor, (merged, -1, start, end))
        _replace(graph, node, part)
        start = end


def _replace(graph: Graph, old: Node, new: Node) -> None:
    """`new` in place of `old`, which goes with all that was computed for it alone."""
    new.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(new)
    _erase(graph, old)


def _erase(graph: Graph, node: Node) -> None:
    operands = node.all_input_nodes
    graph.erase_node(node)
    for operand in operands:
        if not operand.users and operand.op == "call_function":
            _erase(graph, operand)


@dataclass(frozen=True)
class Gated:
    """product = activation `name` of (linear `gate`) * linear `other`."""

    name: str
    gate: Node
    other: Node
    product: Node


def _gated(nodes: list[Node]) -> Gated | None:
    """What two linears of the same input are, if nothing else uses them."""
    if len(nodes) != 2:
        return None
    for gate, other in (nodes, nodes[::-1]):
        activation, product = _only_user(gate), _only_user(other)
        if activation is None or product is None or product.target is not aten.mul.Tensor:
            continue
        name = _activation(activation)
        if name and _only_user(activation) is product:
            return Gated(name, gate, other, product)
    return None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: Node) -> str | None:
    """The name that kvc.linear has for an activation."""
    target: Any = node.target
    if target is aten.gelu.default:
        return "tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return {aten.silu.default: "silu", aten.relu.default: "relu"}.get(target)
