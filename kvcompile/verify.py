"""The dialect's type checker: what must hold for every kvc node of a graph."""

import torch
from torch.fx import GraphModule, Node

from kvcompile.errors import KVCompileError
from kvcompile.ir import APPEND, ATTEND, ATTENTION, OPS, ROPE, argument
from kvcompile.store import Store


def verify(gm: GraphModule) -> None:
    """Raise KVCompileError, naming the node, for the first rule that the graph breaks."""
    gm.graph.lint()
    layers: dict[object, set[int]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in OPS:
            continue
        problem = _problem(node)
        if node.target in (ATTENTION, ATTEND, APPEND):
            layer = argument(node, "layer")
            seen = layers.setdefault(node.target, set())
            if layer in seen:
                problem = f"layer {layer} appears twice"
            seen.add(layer)
        if problem:
            raise KVCompileError(f"node '{node.name}' ({node.target}): {problem}")


def _shape(node: Node, name: str) -> torch.Size | None:
    value = argument(node, name)
    found = value.meta.get("val") if isinstance(value, Node) else None
    return None if found is None else found.shape


def _problem(node: Node) -> str:
    if node.target is ROPE:
        style = argument(node, "style")
        return "" if style in ("half", "interleaved") else f"style {style!r} is unknown"
    store = Store.parse(argument(node, "store"))
    q, k, v = (_shape(node, n) if n != "q" or node.target in (ATTENTION, ATTEND) else None
               for n in "qkv")
    if k is not None and v is not None and (len(k) != 4 or len(v) != 4 or k[1] != v[1]):
        return f"k {tuple(k)} and v {tuple(v)} must be [B, H, S, D] with the same heads"
    if q is not None and k is not None and (q[1] % k[1] or q[3] != k[3]):
        return f"q {tuple(q)} does not fit k {tuple(k)}: heads must divide and Dk be equal"
    if node.target in (ATTENTION, ATTEND) and argument(node, "scale") is None:
        return "scale is missing"
    if k is not None and v is not None:
        count = len(store.planes((int(k[3]), int(v[3])), torch.float32))
        if node.target in (APPEND, ATTEND) and len(argument(node, "planes")) != count:
            return f"{store} has {count} planes, the node has {len(argument(node, 'planes'))}"
    return ""
