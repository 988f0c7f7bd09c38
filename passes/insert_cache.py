"""insert_cache: the stateless graph becomes one that reads and fills a cache.

    prefill   o = attention(q, k, v); append(planes, k, v)         an empty cache, any S
              with a rule: keep(score(q, k, v), k, v) instead of append, to be stored afterwards
    extend    o = attend(q, k, v, planes); ...; append(planes, all k, all v)    S >= 1 tokens more

Layers of equal storage form a group, whose planes become inputs, group by group in `Store.planes`
order, after the graph's own inputs; a layer is a slot of its group's planes. A layer with the k and
v of an earlier one reads that one's slot and stores nothing. The outputs become (logits, ok):
`ok[i]` tells whether K and V of the i-th layer that stores some could be stored. Tokens are stored
only up to the first that is not ok (prefill, where each layer's K and V are freed once stored) or
only if all are (extend, which stores each group at its very end): so a call either counts or not.

Where keys are rotated at read, the extend graph has one input more, the last: the position ids of
all tokens by number, int64 [B, N], those of the call included.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from kvcompile.errors import RecipeError
from kvcompile.ir import APPEND, ATTEND, BESIDE, EVICT, RANK, STORABLE, argument, attention_nodes
from kvcompile.passes.chosen import Chosen
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Rewritten
from kvcompile.rule import Rule
from kvcompile.site import Site, groups, sites
from kvcompile.store import SIDES, Store
from kvcompile.structure.angles import Angles

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertCache:
    """attention(q, k, v) -> attend(q, k, v, planes), append(planes, k, v)."""

    phase: str
    name: ClassVar[str] = "insert_cache"
    order: ClassVar[int] = 80
    axes: ClassVar[tuple[str, ...]] = ()

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        graph, nodes = gm.graph, attention_nodes(gm.graph)
        if any(n.target is APPEND for n in graph.nodes):
            return []
        known = sites(graph)
        for site, node in zip(known, nodes, strict=True):
            lent = dict(site.lent) if site.owner is None else {"k.body": site.owner}
            if argument(node, "far") is not None and "k.body" not in lent:
                raise RecipeError(f"layer {site.layer}: its older keys are another layer's, which "
                                  "is stored in another way; give both the same storage")
        shared = [Shared(layers, _inputs(graph, number, known[layers[0]]))
                  for number, layers in enumerate(groups(known))]
        ok = (_prefill if self.phase == "prefill" else _extend)(graph, nodes, known, shared)
        output = graph.output_node()
        output.args = ((output.args[0], *ok),)
        return [Rewritten(site.layer, self.phase if site.owner is None else
                          f"{self.phase}, reads layer {site.owner}") for site in known]


class Shared(NamedTuple):
    """A group: its layers, by slot, and the inputs that are its planes."""

    layers: list[int]
    planes: list[Node]


def _prefill(graph: Graph, nodes: list[Node], sites: Sequence[Site], shared: list[Shared]
             ) -> list[Any]:
    """Store each layer right before its attention, to exact K and V; bool [layers that store].

    Layers that are stored together are stored when the last of them has its K and V. What layers
    with a rule keep is a second output: what kvc.keep returns, for each of them.
    """
    place, fine = _places(shared), list[Node]()
    chosen = Chosen(graph) if any(site.rule for site in sites) else None
    again = any("probe" in Rule.parse(site.rule).needs for site in sites if site.rule)
    for site, node in zip(sites, nodes, strict=True):
        if site.owner is None:
            with graph.inserting_before(node):
                fine.append(_storable(graph, [node], [site]))
                if len(fine) > 1:
                    fine[-1] = _call(graph, aten.logical_and.default, *fine[-2:])
                members = site.members or (site.layer,)
                if site.rule and chosen:
                    chosen.score(node, site)
                elif site.layer == members[-1]:
                    valid = argument(node, "valid")
                    if chosen and again:
                        valid = chosen.stored(valid)
                    allowed = _call(graph, aten.bitwise_and.Tensor, valid, fine[-1])
                    planes, slot = place[members[0]]
                    _append(graph, planes, [nodes[i] for i in members], [slot], allowed, site.own)
    for node in nodes:
        node.kwargs = {k: v for k, v in node.kwargs.items()
                       if k not in ("store", "members", "rule", "far")}
    with graph.inserting_before(graph.output_node()):
        return [_call(graph, aten.cat.default, fine), *([chosen.kept()] if chosen else [])]


def _extend(graph: Graph, nodes: list[Node], sites: Sequence[Site], shared: list[Shared]
            ) -> list[Any]:
    """Attend to what is stored, and store all layers of a group together at the end."""
    place, owners = _places(shared), [site for site in sites if site.owner is None]
    mass: dict[int, Node | None] = {}
    angles = Angles(graph, nodes) if any(site.rotated for site in sites) else None
    for site, node in zip(sites, nodes, strict=True):
        with graph.inserting_before(node):
            if angles and site.rotated:
                tables = {n: angles.by_number(argument(node, n)) for n in ("cos", "sin")}
                node.kwargs = {**node.kwargs, **tables}
            layer, member = site.place
            mass[site.layer] = _attend(graph, node, site.layout, *place[layer], member)
    with graph.inserting_before(graph.output_node()):
        ok = _storable(graph, [nodes[site.layer] for site in owners], owners)
        allowed = _call(graph, aten.bitwise_and.Tensor, argument(nodes[0], "valid"),
                        _call(graph, aten.all.default, ok))
        for own in shared:
            every = [i for layer in own.layers for i in sites[layer].members or (layer,)]
            layers, layout = [nodes[i] for i in every], sites[own.layers[0]].layout
            if any(sites[i].salient for i in own.layers):
                both = _rank(graph, own.planes, layers, [m for i in own.layers if (m := mass[i])],
                             allowed, layout)
                _append(graph, own.planes, layers, [*range(len(layers))], allowed, layout, both)
                continue
            for store in dict.fromkeys(sites[layer].own for layer in own.layers):
                alike = [i for i in own.layers if sites[i].own == store]
                _append(graph, own.planes, [nodes[j] for i in alike
                                            for j in sites[i].members or (i,)],
                        [own.layers.index(i) for i in alike], allowed, store)
            if layout.slots:
                _evict(graph, own.planes, layers, [m for i in own.layers if (m := mass[i])],
                       allowed, layout)
    for node in nodes:
        graph.erase_node(node)
    return [ok]


def _places(shared: list[Shared]) -> dict[int, tuple[list[Node], int]]:
    """Layer -> its group's planes and its slot, for the layers that name one."""
    return {layer: (own.planes, slot) for own in shared for slot, layer in enumerate(own.layers)}


def _call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    return graph.call_function(target, args, kwargs)


def _inputs(graph: Graph, number: int, site: Site) -> list[Node]:
    """The planes of a group as inputs of the graph, after those that it has."""
    at, planes = [n for n in graph.nodes if n.op == "placeholder"][-1], []
    for spec in site.layout.planes(site.dims, site.dtype):
        with graph.inserting_after(at):
            at = graph.placeholder(f"G{number}_{spec.name.replace('.', '_')}")
        at.meta["plane"] = spec
        planes.append(at)
    return planes


def _storable(graph: Graph, nodes: list[Node], sites: Sequence[Site]) -> Node:
    """bool [layers]: no NaN, and nothing larger than the formats can hold."""
    given = [[argument(n, side) for n in nodes] for side in SIDES]
    limits = [[s.store.limit(side, s.dtype) for s in sites] for side in SIDES]
    return _call(graph, STORABLE, *given, *limits)


def _append(graph: Graph, planes: list[Node], nodes: list[Node], slots: list[int],
            valid: Node, layout: Store, both: list[list[Node]] | None = None) -> None:
    """Store K and V of the nodes, or `both` in their place."""
    k, v = both or ([argument(n, side) for n in nodes] for side in SIDES)
    _call(graph, APPEND, planes, k, v, argument(nodes[0], "positions"), valid,
          store=str(layout), slots=slots)


def _rank(graph: Graph, planes: list[Node], nodes: list[Node], mass: list[Node], valid: Node,
          layout: Store) -> list[list[Node]]:
    """K and V of the layers in the order in which they are to be stored."""
    k, v = ([argument(n, side) for n in nodes] for side in SIDES)
    group = argument(nodes[0], "q").meta["val"].shape[1] // k[0].meta["val"].shape[1]
    every = _call(graph, RANK, planes, mass, k, v, argument(nodes[0], "positions"), valid,
                  store=str(layout), rules=[argument(n, "rule") for n in nodes],
                  slots=[*range(len(nodes))], group=int(group))
    ranked = [_call(graph, operator.getitem, every, i) for i in range(2)]
    return [[_call(graph, aten.select.int, x, 0, i) for i in range(len(nodes))] for x in ranked]


def _evict(graph: Graph, planes: list[Node], nodes: list[Node], mass: list[Node], valid: Node,
           layout: Store) -> None:
    k, v = ([argument(n, side) for n in nodes] for side in SIDES)
    group = argument(nodes[0], "q").meta["val"].shape[1] // k[0].meta["val"].shape[1]
    rules = [argument(n, "rule") for n in nodes]
    reads = any("ids" in Rule.parse(rule).needs for rule in rules)
    ids = {"ids": next(n for n in graph.nodes if n.op == "placeholder")} if reads else {}
    _call(graph, EVICT, planes, mass, k, v, argument(nodes[0], "positions"), valid,
          store=str(layout), rules=rules, slots=[*range(len(nodes))], group=int(group), **ids)


def _attend(graph: Graph, node: Node, layout: Store, planes: list[Node], slot: int, member: int
            ) -> Node | None:
    """What each token gets of the softmax weights, where the layer's scores are made of that."""
    q, k, v, positions, valid, sinks = (
        argument(node, n) for n in ("q", "k", "v", "positions", "valid", "sinks"))
    options = {n: argument(node, n) for n in ("scale", "window", "softcap")}
    options["store"] = str(layout)
    rule = argument(node, "rule")
    if rule and Rule.parse(rule).observes:
        options["mass"] = True
        if looks := getattr(Rule.parse(rule).scorer, "looks", 0):
            options["looks"] = looks
        if getattr(Rule.parse(rule).scorer, "low", False):
            options["low"] = True
    options |= {n: node.kwargs[n] for n in ("basis", "offset", "cos", "sin", "style")
                if n in node.kwargs}
    if member:
        options["member"] = member
    every = _call(graph, ATTEND, q, k, v, planes, positions, valid, sinks, **options, slot=slot,
                  layer=argument(node, "layer"))
    o = _call(graph, operator.getitem, every, 0)
    if Store.parse(options["store"]).rest:
        own = {n.meta["plane"].name: n for n in planes}
        o = _call(graph, BESIDE, q, o, _call(graph, operator.getitem, every, 1),
                  *(own[f"rest_{what}"] for what in ("k", "v", "count")), slot=slot,
                  **{n: options[n] for n in ("scale", "softcap")})
    o.meta = dict(node.meta)
    node.replace_all_uses_with(o)
    return _call(graph, operator.getitem, every, 2) if "mass" in options else None


PHASES = {phase: InsertCache(phase) for phase in ("prefill", "extend")}
