"""What a pass is, and the driver that runs passes over a captured graph.

A pass is a frozen dataclass in `passes/<name>.py`, instantiated there as `PASS`. It changes
nothing but the graph it is given, finds its settings in the plan under the axes it declares, and
says for every site what it did or why it did not.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Protocol

from torch.fx import Graph, GraphModule, Node

from kvcompile.errors import KVCompileError
from kvcompile.ir import argument, attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.registry import plugins
from kvcompile.site import halves, owners
from kvcompile.structure.lazy import LazyGraphModule
from kvcompile.verify import verify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewritten:
    """A pass changed a site: the layer, and what it became in a few words."""

    layer: int
    what: str


@dataclass(frozen=True)
class Refused:
    """A pass left a site as it was: the layer, the reason, and the node that stood in the way."""

    layer: int
    reason: str
    node: str = ""


Outcome = Rewritten | Refused


class Pass(Protocol):
    """One rewrite. `order` places it in the sequence of design section 2.

    `phase` is empty for the passes over the stateless graph, or names the graph that the pass
    makes from a copy of it ("prefill", "extend").
    """

    name: ClassVar[str]
    order: ClassVar[int]
    axes: ClassVar[tuple[str, ...]]

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        """Rewrite `gm` in place; running it a second time changes nothing."""
        ...


Callback = Callable[[Pass, GraphModule, list[Outcome], float], None]


@cache
def passes() -> tuple[Pass, ...]:
    """Every known pass, in order: `passes/*.py` (`PASS`) and entry points `kvcompile.passes`."""
    return tuple(sorted(plugins("passes", "PASS", "kvcompile.passes"), key=lambda p: p.order))


@cache
def phases() -> dict[str, Pass]:
    """The passes that make a graph of their own at the end: phase -> pass (`PHASES`)."""
    return {name: p for phase in plugins("passes", "PHASES", "kvcompile.phases")
            for name, p in phase.items()}


def check_axes(plan: Sequence[LayerPlan]) -> None:
    """Raise KVCompileError if the plan sets an axis that no pass implements."""
    unknown = {a for layer in plan for a in layer.values} - {a for p in passes() for a in p.axes}
    if unknown:
        raise KVCompileError(f"no pass implements {', '.join(sorted(unknown))}")


def run_passes(sequence: Sequence[Pass], gm: GraphModule, plan: Sequence[LayerPlan],
               after: Callback | None = None) -> None:
    """Run and verify each pass over `gm`; `after(pass, graph, outcomes, seconds)` is called."""
    done: list[str] = []
    for p in sequence:
        start = time.perf_counter()
        outcomes = _run(p, gm, plan)
        gm.recompile()
        try:
            verify(gm)
        except KVCompileError as error:
            before = f" after {', '.join(done)}" if done else ""
            raise KVCompileError(f"pass {p.name}{before} left a broken graph: {error}") from error
        done.append(p.name)
        seconds = time.perf_counter() - start
        log.info("%s: %d sites in %.2f s", p.name, len(outcomes), seconds)
        if after:
            after(p, gm, outcomes, seconds)


def _run(p: Pass, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
    """Run `p`; then layers that attend to another one's K or V are stored as that one is."""
    before = [argument(node, "store") for node in attention_nodes(gm.graph)]
    outcomes, nodes = p.run(gm, plan), attention_nodes(gm.graph)
    whole = owners(nodes)
    shared = {**{layer: lender for layer, _, lender in reversed(halves(nodes))}, **whole}
    told: list[Outcome] = [
        Rewritten(o.layer, f"as layer {shared[o.layer]}") if o.layer in shared
        and argument(nodes[o.layer], "store") != before[o.layer] else o for o in outcomes]
    for layer, owner in sorted(shared.items()):
        for name in ("store", "members") if layer in whole else ("store",):
            value = argument(nodes[owner], name)
            if argument(nodes[layer], name) != value:
                nodes[layer].kwargs = {**nodes[layer].kwargs, name: value}
    return told


def same_graph(a: GraphModule, b: GraphModule) -> bool:
    """Whether two graphs have the same nodes, by their names, in the same order."""
    def line(node: Node) -> tuple[str, str, str]:
        return node.name, str(node.target), f"{node.args} {node.kwargs}"

    return len(a.graph.nodes) == len(b.graph.nodes) and all(
        line(x) == line(y) for x, y in zip(a.graph.nodes, b.graph.nodes, strict=True))


def copy_graph(gm: GraphModule) -> GraphModule:
    """A graph of its own over the same parameters."""
    graph = Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
    copied = LazyGraphModule(gm, graph)
    copied.meta.update(gm.meta)
    return copied
