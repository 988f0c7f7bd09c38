"""For one row of input: linears become kvc.linear, those of the same input one of them.

A linear of one row is bound by reading its weight; the kernel of kvc.linear reads it once, as it
lies, and one kernel for q, k and v (or gate and up) starts its threads once.
"""

from collections import defaultdict
from collections.abc import Sequence
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
    for x, nodes in groups.items():
        _merge(gm.graph, x, nodes)
    gm.graph.lint()
    gm.recompile()


def _sizes(graph: Graph, inputs: Sequence[Tensor]) -> dict[sympy.Expr, int]:
    """What the symbols in the shapes of the graph's inputs are for these inputs."""
    found = {}
    places = (n for n in graph.nodes if n.op == "placeholder")
    for place, given in zip(places, inputs, strict=True):
        for symbol, size in zip(place.meta["val"].shape if "val" in place.meta else (), given.shape):
            if isinstance(symbol, torch.SymInt):
                found[symbol.node.expr] = size
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


def _merge(graph: Graph, x: Node, nodes: list[Node]) -> None:
    """One kvc.linear in place of `nodes`, linears of `x`; their results are slices of it."""
    weights, biases = zip(*(_operands(n)[1:] for n in nodes))
    for parameter in (*weights, *biases):
        if parameter is not None and x < parameter:
            x.prepend(parameter)
    with graph.inserting_after(x):
        merged = graph.call_function(LINEAR, (x, list(weights), list(biases)))
    merged.meta["val"] = torch.cat([n.meta["val"] for n in nodes], -1)
    start = 0
    for node, weight in zip(nodes, weights):
        part, end = merged, start + weight.meta["val"].shape[0]
        if len(nodes) > 1:
            with graph.inserting_after(merged):
                part = graph.call_function(aten.slice.Tensor, (merged, -1, start, end))
            part.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        start = end
