"""The dialect's type checker: what must hold for every kvc node of a graph."""

import torch
from torch.fx import GraphModule, Node

from kvcompile.errors import KVCompileError
from kvcompile.ir import APPEND, ATTEND, ATTENTION, OPS, ROPE, STORABLE, argument
from kvcompile.store import Store


def verify(gm: GraphModule) -> None:
    """Raise KVCompileError, naming the node, for the first rule that the graph breaks."""
    gm.graph.lint()
    seen: set[tuple] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in OPS:
            continue
        problem = _problem(node)
        for what in _once(node):
            if what in seen:
                problem = f"{what[0]} {what[1]} appears twice"
            seen.add(what)
        if problem:
            raise KVCompileError(f"node '{node.name}' ({node.target}): {problem}")


def _once(node: Node) -> list[tuple]:
    """What no other node may do: attend as this layer, or store in these slots."""
    if node.target in (ATTENTION, ATTEND):
        return [("layer", argument(node, "layer"), node.target)]
    if node.target is APPEND:
        return [("slot", slot, argument(node, "planes")[0]) for slot in argument(node, "slots")]
    return []


def _shape(node: Node, name: str) -> torch.Size | None:
    value = argument(node, name)
    if isinstance(value, (list, tuple)):  # of layers of one shape
        value = value[0]
    found = value.meta.get("val") if isinstance(value, Node) else None
    return None if found is None else found.shape


def _problem(node: Node) -> str:
    if node.target is ROPE:
        style = argument(node, "style")
        return "" if style in ("half", "interleaved") else f"style {style!r} is unknown"
    if node.target in (APPEND, STORABLE):
        names = ("k", "v", "slots") if node.target is APPEND else ("k", "v", "k_limits", "v_limits")
        lengths = {name: len(argument(node, name)) for name in names}
        if node.target is APPEND:
            lengths["slots"] *= Store.parse(argument(node, "store")).members
        if len(set(lengths.values())) != 1:
            return f"{lengths} must be of one length"
        if node.target is STORABLE:
            return ""
    store = Store.parse(argument(node, "store"))
    q, k, v = (_shape(node, n) if n != "q" or node.target in (ATTENTION, ATTEND) else None
               for n in "qkv")
    if k is not None and v is not None and (len(k) != 4 or len(v) != 4 or k[1] != v[1]):
        return f"k {tuple(k)} and v {tuple(v)} must be [B, H, S, D] with the same heads"
    basis = _shape(node, "basis") if q is not None else None
    if basis is not None and k is not None and (basis[0] % k[1] or basis[2] != k[3]):
        return f"basis {tuple(basis)} does not rebuild keys from k {tuple(k)}"
    if q is not None and k is not None:
        heads, dim = (k[1], k[3]) if basis is None else (basis[0], basis[1])
        if q[1] % heads or q[3] != dim:
            return f"q {tuple(q)} does not fit k {tuple(k)}: heads must divide and Dk be equal"
    if node.target in (ATTENTION, ATTEND) and argument(node, "scale") is None:
        return "scale is missing"
    if k is not None and v is not None:
        count = len(store.planes((int(k[3]), int(v[3])), torch.float32))
        if node.target in (APPEND, ATTEND) and len(argument(node, "planes")) != count:
            return f"{store} has {count} planes, the node has {len(argument(node, 'planes'))}"
    return ""
