"""What layers with a rule keep of a prompt, written into the graph with a cache."""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from kvcompile.ir import KEEP, PRUNE, REST, SCORE, argument
from kvcompile.rule import Rule
from kvcompile.site import Site
from kvcompile.store import SIDES
from kvcompile.structure.beside import output_weight, rotary

aten = torch.ops.aten


class Chosen:
    """Writes what layers with a rule keep of a prompt: kvc.score at once; kvc.keep at once too, or
    where a budget spans layers at the end of the graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.found = graph, dict[int, list[Node]]()
        self.waiting: dict[str, list[tuple[Site, Node, Node]]] = {}
        self.pruned = dict[Node, Node]()
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.ids = inputs[0]
        with graph.inserting_after(inputs[-1]):
            self.hints = graph.placeholder("hints")

    def score(self, node: Node, site: Site) -> None:
        """Score a layer's tokens, before `node`, its attention."""
        rule, (angles, style) = Rule.parse(site.rule), rotary(node)
        weight = output_weight(node, self.graph) if "weight" in rule.needs else None
        given = [argument(node, n) for n in ("q", "k", "v", "positions", "valid")]
        both = self._call(SCORE, *given, self.hints, weight, angles, rule=site.rule,
                     scale=argument(node, "scale"), softcap=argument(node, "softcap"), style=style,
                     **({"ids": self.ids} if "ids" in rule.needs else {}))
        if rule.channels:
            q, k, _, positions, valid = given
            self.pruned[node] = self._call(PRUNE, q, k, positions, valid, self.hints,
                                           rule=site.rule)
        if rule.budgeter.across:
            key = str(replace(rule, layer=0, budget=rule.budgeter.name))
            self.waiting.setdefault(key, []).append((site, node, both))
        else:
            self._keep([(site, node, both)])

    def _keep(self, layers: list[tuple[Site, Node, Node]]) -> None:
        first, (angles, style) = layers[0][1], rotary(layers[0][1])
        scores, measures = ([self._call(operator.getitem, both, i) for *_, both in layers]
                            for i in (0, 1))
        k, v = ([argument(node, side) for _, node, _ in layers] for side in SIDES)
        k = [self.pruned.get(node, x) for (_, node, _), x in zip(layers, k, strict=True)]
        every = self._call(KEEP, scores, measures, k, v, argument(first, "positions"),
                      argument(first, "valid"), self.hints, angles,
                      rules=[site.rule for site, *_ in layers], style=style)
        parts = [self._call(operator.getitem, every, i) for i in range(4)]
        for i, (site, *_) in enumerate(layers):
            found = self.found[site.layer] = [self._call(operator.getitem, p, i) for p in parts]
            found.append(measures[i])
            if Rule.parse(site.rule).apart:
                dropped = self._call(REST, k[i], v[i], found[2], argument(first, "valid"),
                                     self.hints)
                found += [self._call(operator.getitem, dropped, n) for n in range(3)]

    def stored(self, valid: Node) -> Node:
        """`valid` without the columns behind the prompt, which no layer stores."""
        ones = self._call(aten.ones_like.default, valid, dtype=torch.long)
        left = self._call(aten.flip.default, self._call(aten.cumsum.default, ones, 1), [1])
        prompt = self._call(aten.gt.Tensor, left, self._call(aten.select.int, self.hints, 0, 0))
        return self._call(aten.bitwise_and.Tensor, valid, prompt)

    def kept(self) -> list[list[Node]]:
        """K, V, columns, scores and measures of each layer with a rule, in order; and what kvc.rest
        says of those that store it."""
        for layers in self.waiting.values():
            self._keep(layers)
        return [self.found[layer] for layer in sorted(self.found)]

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)
