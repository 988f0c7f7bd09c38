"""insert_cache: the stateless graph becomes one that reads and fills a cache.

    prefill   o = attention(q, k, v); append(planes, k, v)         an empty cache, any S
    extend    o = attend(q, k, v, planes); append(planes, k, v)    what is stored and S >= 1 more

Planes become inputs, layer by layer in `Store.planes` order, after the graph's own inputs. The
outputs become (logits, ok): `ok[layer]` tells whether K and V could be stored. Tokens are stored
only up to the first layer that is not ok (prefill, where each layer's K and V are freed once
stored) or only if all are (extend, which stores at its very end): so a call either counts or not.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from kvcompile.ir import APPEND, ATTEND, argument, attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Rewritten
from kvcompile.store import SIDES, Store

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertCache:
    """attention(q, k, v) -> attend(q, k, v, planes), append(planes, k, v)."""

    phase: str
    name: ClassVar[str] = "insert_cache"
    order: ClassVar[int] = 80
    axes: ClassVar[tuple[str, ...]] = ()

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        graph, sites = gm.graph, attention_nodes(gm.graph)
        if any(n.target is APPEND for n in graph.nodes):
            return []
        at = [n for n in graph.nodes if n.op == "placeholder"][-1]
        planes: list[list[Node]] = []
        for layer, node in enumerate(sites):
            planes.append([])
            for spec in _store(node).planes(_dims(node), _dtype(node)):
                with graph.inserting_after(at):
                    at = graph.placeholder(f"L{layer}_{spec.name.replace('.', '_')}")
                at.meta["plane"] = spec
                planes[-1].append(at)
        valid = argument(sites[0], "valid")
        fine: list[Node] = []
        for node, own in zip(sites, planes, strict=True):
            with graph.inserting_before(node):
                fine.append(_storable(graph, node))
                if self.phase == "prefill":
                    if len(fine) > 1:
                        fine[-1] = _call(graph, aten.logical_and.default, *fine[-2:])
                    allowed = _call(graph, aten.bitwise_and.Tensor, valid, fine[-1])
                    _append(graph, node, own, allowed)
                else:
                    _attend(graph, node, own)
        output = graph.output_node()
        with graph.inserting_before(output):
            ok = _call(graph, aten.stack.default, fine)
            if self.phase == "extend":
                allowed = _call(graph, aten.bitwise_and.Tensor, valid,
                                _call(graph, aten.all.default, ok))
                for node, own in zip(sites, planes, strict=True):
                    _append(graph, node, own, allowed)
        output.args = ((output.args[0], ok),)
        for node in sites:
            if self.phase == "extend":
                graph.erase_node(node)
            else:  # the prompt attends to its exact K and V
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "store"}
        return [Rewritten(i, self.phase) for i in range(len(sites))]


def _store(node: Node) -> Store:
    return Store.parse(argument(node, "store"))


def _dims(node: Node) -> tuple[int, int]:
    k, v = (argument(node, s).meta["val"].shape[-1] for s in SIDES)
    return int(k), int(v)


def _dtype(node: Node) -> torch.dtype:
    return argument(node, "k").meta["val"].dtype


def _call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    return graph.call_function(target, args, kwargs)


def _storable(graph: Graph, node: Node) -> Node:
    """bool []: no NaN, and nothing larger than the formats can hold."""
    checks = []
    for side in SIDES:
        peak = _call(graph, aten.amax.default, _call(graph, aten.abs.default, argument(node, side)))
        limit = _store(node).limit(side, _dtype(node))
        checks.append(_call(graph, aten.le.Scalar, peak, limit))
    return _call(graph, aten.logical_and.default, *checks)


def _append(graph: Graph, node: Node, planes: list[Node], valid: Node) -> None:
    k, v, positions = (argument(node, n) for n in ("k", "v", "positions"))
    _call(graph, APPEND, planes, k, v, positions, valid,
          store=argument(node, "store"), layer=argument(node, "layer"))


def _attend(graph: Graph, node: Node, planes: list[Node]) -> None:
    q, k, v, positions, valid, sinks = (
        argument(node, n) for n in ("q", "k", "v", "positions", "valid", "sinks"))
    options = {n: argument(node, n) for n in ("scale", "window", "softcap", "store", "layer")}
    both = _call(graph, ATTEND, q, k, v, planes, positions, valid, sinks, **options)
    o = _call(graph, operator.getitem, both, 0)
    o.meta = dict(node.meta)
    node.replace_all_uses_with(o)


PHASES = {phase: InsertCache(phase) for phase in ("prefill", "extend")}
