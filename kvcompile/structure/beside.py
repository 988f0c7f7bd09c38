"""What lies beside attention in a graph: the linear that follows it, the rotary angles before."""

from typing import Any

import torch
from torch.fx import Graph, Node

from kvcompile.ir import ROPE, argument
from kvcompile.structure.movement import is_tensor, packet

aten = torch.ops.aten
LAYOUT = {aten.transpose, aten.permute, aten.reshape, aten.view, aten.contiguous, aten.flatten,
          aten.clone, aten._unsafe_view, aten.to, aten._to_copy, aten.squeeze, aten.unsqueeze}
TABLE = LAYOUT | {aten.mul, aten.expand, aten.cat, aten.repeat_interleave}


def output_weight(node: Node, graph: Graph | None = None) -> Node | None:
    """The weight [hidden, Hq * Dv] of the linear that reads attention's output, or None.

    One that lies as [Hq * Dv, hidden] is turned, by a node before `graph`'s insertion point.
    """
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target is aten.linear.default:
            weight: Any = node.args[1]
            return weight if weight.op == "get_attr" else None
        if packet(node) in (aten.addmm, aten.mm):
            weight = node.args[-1]
            if not isinstance(weight, Node) or weight.op != "get_attr":
                return None
            return graph.call_function(aten.t.default, (weight,)) if graph else weight
        if packet(node) not in LAYOUT:
            return None
    return None


def rotary(node: Node) -> tuple[Node | None, str]:
    """The angles [.., S, R] (or R / 2) in fp32 that turn attention's keys, and the style."""
    key = argument(node, "k")
    while packet(key) in LAYOUT:
        key = key.args[0]
    if key.target is not ROPE:
        return None, "half"
    style, at = argument(key, "style"), argument(key, "cos")
    while isinstance(at, Node) and packet(at) in TABLE:
        at = at.args[0][0] if isinstance(at.args[0], (list, tuple)) else at.args[0]
    if not isinstance(at, Node) or packet(at) is not aten.cos:
        return None, style
    angles = at.args[0]
    fine = isinstance(angles, Node) and is_tensor(angles)
    return (angles if fine else None), style  # type: ignore[return-value]
