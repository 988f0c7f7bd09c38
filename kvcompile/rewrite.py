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

from torch.fx import GraphModule

from kvcompile.errors import KVCompileError
from kvcompile.plan import LayerPlan
from kvcompile.registry import plugins
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
    """One rewrite. `order` places it in the sequence of design section 2."""

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


def run_passes(gm: GraphModule, plan: Sequence[LayerPlan], after: Callback | None = None) -> None:
    """Run every pass that is needed; `after(pass, graph, outcomes, seconds)` is called each time.

    A pass with axes runs if the plan sets one of them; the graph is verified after every pass.
    """
    used = {axis for layer in plan for axis in layer.values}
    unknown = used - {axis for p in passes() for axis in p.axes}
    if unknown:
        raise KVCompileError(f"no pass implements {', '.join(sorted(unknown))}")
    done: list[str] = []
    for p in passes():
        if p.axes and not used & set(p.axes):
            continue
        start = time.perf_counter()
        outcomes = p.run(gm, plan)
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
