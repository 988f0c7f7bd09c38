"""select: which tokens stay. attention(store) -> attention(store with sinks and window)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch.fx import GraphModule

from kvcompile.ir import argument, attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Rewritten
from kvcompile.store import Store


@dataclass(frozen=True)
class Select:
    """Keep the first `sinks` and the last `window` tokens; drop the others when one more arrives.

    Without a window none are dropped: the first ones are stored exactly, whatever the format.
    Layers with an attention window of their own keep no more than it shows (`Store.of`).
    """

    name: ClassVar[str] = "select"
    order: ClassVar[int] = 50
    axes: ClassVar[tuple[str, ...]] = ("sinks", "window")

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for index, node in enumerate(attention_nodes(gm.graph)):
            axes = {a: v for a, v in plan[index].values.items() if a in self.axes}
            kept = Store.of(axes, argument(node, "window"))
            if not kept.window and not kept.sinks:
                continue
            store = replace(Store.parse(argument(node, "store")), sinks=kept.sinks,
                            window=kept.window)
            node.kwargs = cast(Any, {**node.kwargs, "store": str(store)})
            first = f"{kept.sinks} first" if kept.sinks else ""
            last = f"{kept.window} last" if kept.window else "all others"
            outcomes.append(Rewritten(index, " and ".join(filter(None, (first, last))) + " tokens"))
        return outcomes


PASS = Select()
