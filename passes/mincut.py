"""What to cache of each token: a minimum cut between what cannot be computed again and K and V.

Every tensor u of a token becomes an edge u_in -> u_out with the bits that caching it takes; what
must not be cached is infinite. The source stands before tensors that cannot be computed again when
they are read, by an infinite edge, and before those that can, by what that costs; u_out -> w_in is
infinite for every w that is computed from u; K and V of all layers are the sinks. So a tensor that
several layers read is paid for once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import networkx as nx
from torch.fx import Node

INFINITE = float("inf")


@dataclass
class Network:
    """Tensors, what they are computed from, and what caching or computing them again costs."""

    inputs: Callable[[Node], list[Node] | None]  # None: cannot be computed again at read
    store: Callable[[Node], float]               # bits of a token, or infinite
    again: Callable[[Node], float]               # of computing it again
    graph: nx.DiGraph = field(default_factory=nx.DiGraph)

    def cut(self, sinks: Iterable[Node]) -> set[Node]:
        """The tensors to cache so that all `sinks` can be had: those of the cheapest cut."""
        self.graph.add_node("source")
        todo = list(dict.fromkeys(sinks))
        for node in todo:
            self.graph.add_edge((node, "out"), "sink")
        seen = set(todo)
        while todo:
            node = todo.pop()
            before = self.inputs(node)
            cost = self.store(node)
            self.graph.add_edge((node, "in"), (node, "out"),
                                **({} if cost == INFINITE else {"capacity": cost}))
            if before is None:
                self.graph.add_edge("source", (node, "in"))
            elif cost := self.again(node):
                self.graph.add_edge("source", (node, "in"), capacity=cost)
            for other in before or ():
                self.graph.add_edge((other, "out"), (node, "in"))
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        _, (behind, _) = nx.minimum_cut(self.graph, "source", "sink")
        return {n for n in seen if (n, "in") in behind and (n, "out") not in behind}
