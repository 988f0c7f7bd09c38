"""Equal layers of a decode step are compiled once: they become calls of one subgraph.

Between two of a graph's attends lies the rest of a layer and the beginning of the next one. Such
stretches are alike but for their weights and slots, and Inductor needs most of its time for
lowering, scheduling and printing each of them. In the code that it writes, the subgraph is a
function that is called for each layer.

Private API of torch 2.13: torch._higher_order_ops.invoke_subgraph, the one call that Inductor
compiles once however often it stands in a graph.
"""

from collections import defaultdict
from collections.abc import Container, Iterable
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from kvcompile.ir import ATTEND, BESIDE


def outline(gm: GraphModule) -> None:
    """Replace, in place, stretches of `gm` between attends that occur at least twice."""
    for i, stretches in enumerate(alike(gm.graph, ATTEND)):
        name = f"kvc_region_{i}"
        gm.add_submodule(name, stretches[0].region())
        same = set.intersection(*(set(s.given) for s in stretches))
        for stretch in stretches:
            stretch.call(gm, name, same)
    gm.graph.lint()
    gm.recompile()


def alike(graph: Graph, op: OpOverload, without: Container[Any] = ()) -> list[list["Stretch"]]:
    """The stretches between `op`s that occur at least twice, those that are alike together.

    They begin with the `op`; nodes with a target in `without` are never among them.
    """
    found: dict[tuple, list[Stretch]] = defaultdict(list)
    for nodes in _between(graph, op):
        stretch = Stretch([n for n in nodes if not _is_one(n, without)])
        if stretch.in_one_place():
            found[stretch.signature()].append(stretch)
    return [stretches for stretches in found.values() if len(stretches) > 1]


def _between(graph: Graph, op: OpOverload) -> list[list[Node]]:
    """What `op`s need that depends on n others of them, for each n but 0."""
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        if _is_one(node, (op,)) or any(user in needed for user in node.users):
            needed.add(node)
    depth: dict[Node, int] = {}
    nodes: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        before = max((depth[n] for n in node.all_input_nodes), default=0)
        depth[node] = before + (node.target is op)
        if node.op == "call_function" and node in needed:
            nodes[depth[node]].append(node)
    return [nodes[n] for n in sorted(nodes) if n]


def _is_one(node: Node, targets: Container[Any]) -> bool:
    """Whether `node` calls one of `targets`, or is a result of such a call."""
    called = node.all_input_nodes[0] if node.target is getitem else node
    return called.target in targets


class Stretch:
    """Nodes in the order of the graph; `taken` are those that others read."""

    def __init__(self, nodes: list[Node]) -> None:
        sizes: dict[Node, None] = {}
        for node in nodes:
            _sizes(node, sizes)
        self.nodes = [*sizes, *nodes]  # sizes are computed again
        self.own = set(self.nodes)
        self.taken = [n for n in nodes if any(user not in self.own for user in n.users)]

    @property
    def given(self) -> list[Node]:
        """Tensors that they read and are not among them."""
        seen = (n for node in self.nodes for n in node.all_input_nodes if n not in self.own)
        return list(dict.fromkeys(seen))

    def in_one_place(self) -> bool:
        """Whether one call can stand for the nodes: where the last of them is."""
        attends = sum(n.target is ATTEND for n in self.nodes)
        after = (user for n in self.taken for user in n.users if user not in self.own)
        return attends <= 1 and len(self.taken) > 0 and all(user > self.nodes[-1] for user in after)

    def signature(self) -> tuple:
        """Equal for stretches that differ only in what they are given, and in their slots."""
        given = self.given
        numbers = {n: i for i, n in enumerate([*given, *self.nodes])}

        def number(value: Any) -> Any:
            return map_arg(value, lambda n: numbers[n])

        lines = []
        for node in self.nodes:
            options = {k: v for k, v in node.kwargs.items() if k not in _OWN}
            value = node.meta.get("val")
            shape = (value.dtype, str(value.shape)) if isinstance(value, Tensor) else None
            lines.append((str(node.target), repr(number(node.args)), repr(number(options)), shape))
        kinds = tuple(_kind(n) for n in given)
        return tuple(lines), kinds, tuple(numbers[n] for n in self.taken)

    def module(self) -> GraphModule:
        """The stretch as a graph of its own: given -> taken."""
        graph = Graph()
        new = {n: graph.placeholder(f"given_{i}") for i, n in enumerate(self.given)}
        for node in self.nodes:
            new[node] = graph.node_copy(node, new.__getitem__)
        graph.output(tuple(new[n] for n in self.taken))
        return GraphModule({}, graph)

    def region(self) -> GraphModule:
        """The stretch as a subgraph for all that are alike: (place, *given) -> taken."""
        graph = Graph()
        at = graph.placeholder("at")
        new = {n: graph.placeholder(f"given_{i}") for i, n in enumerate(self.given)}
        for node in self.nodes:
            new[node] = graph.node_copy(node, new.__getitem__)
            if node.target in (ATTEND, BESIDE):
                new[node].kwargs = {**new[node].kwargs, "at": at}
        graph.output(tuple(self._fresh(graph, new, n) for n in self.taken))
        return GraphModule({}, graph)

    def _fresh(self, graph: Graph, new: dict[Node, Node], node: Node) -> Node:
        """`node` in its own memory and with the strides that what follows is always given."""
        made = node
        while str(made.target).startswith("aten.to."):  # which may return what it is given
            made = made.all_input_nodes[0]
        roots = [_root(n) for n in self.taken]
        if not _is_view(made) and made in self.own and roots.count(_root(node)) == 1:
            return new[node]
        return _contiguous(new[node])

    def call(self, gm: GraphModule, name: str, same: set[Node]) -> None:
        """Put a call of the subgraph `name` in place of the nodes; all calls are given `same`."""
        attend = next(n for n in self.nodes if n.target is ATTEND)
        place = f"{name}_{attend.name}"
        gm.register_buffer(place, torch.tensor([attend.kwargs.get(k, 0) for k in _PLACE],
                                               dtype=torch.int32))
        with gm.graph.inserting_before(self.nodes[-1]):
            at, body = gm.graph.get_attr(place), gm.graph.get_attr(name)
            given = [_contiguous(n) if n.op == "call_function" and n not in same and "region" not in
                     n.meta else n for n in self.given]
            results = gm.graph.call_function(invoke_subgraph, (body, name, at, *given))
        self.replace(results, region=name)

    def replace(self, results: Node, **meta: Any) -> None:
        """`results`, a tuple, in place of what is taken; the nodes go, as far as nothing reads
        them."""
        graph = results.graph
        with graph.inserting_after(results):
            for i, node in reversed([*enumerate(self.taken)]):
                result = graph.call_function(getitem, (results, i))
                result.meta = node.meta | meta
                node.replace_all_uses_with(result, lambda user: user not in self.own)
        for node in reversed(self.nodes):
            if not node.users:
                graph.erase_node(node)


_PLACE = ("slot", "member")
_OWN = (*_PLACE, "layer")


def _sizes(node: Node, found: dict[Node, None]) -> None:
    """Adds the integers that `node` is computed from, each after what it is computed from."""
    for n in node.all_input_nodes:
        if "val" in n.meta and isinstance(n.meta["val"], int | torch.SymInt):
            _sizes(n, found)
            found[n] = None


def _contiguous(node: Node) -> Node:
    """A copy of `node`, with the strides that every call of a subgraph must give it."""
    return node.graph.call_function(torch.ops.aten.clone.default, (node,),
                                    {"memory_format": torch.contiguous_format})


def _is_view(node: Node) -> bool:
    """Whether the result may lie in its first input's memory."""
    if node.target is getitem:
        return True
    returns: Iterable[Any] = getattr(getattr(node.target, "_schema", None), "returns", ())
    return any(r.alias_info is not None for r in returns) or "reshape" in str(node.target)


def _root(node: Node) -> Node:
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _kind(node: Node) -> Any:
    value = node.meta.get("val")
    return (value.dtype, str(value.shape), str(value.stride())) if isinstance(
        value, Tensor) else node.name
