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

    A layer whose own attention window is w sees w - 1 earlier tokens, so no more are kept: that is
    exact. There a recipe's sinks would be out of sight; its budget is spent on recent tokens.
    """

    name: ClassVar[str] = "select"
    order: ClassVar[int] = 50
    axes: ClassVar[tuple[str, ...]] = ("sinks", "window")

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for index, node in enumerate(attention_nodes(gm.graph)):
            own = argument(node, "window")
            sinks = cast(int, plan[index].get("sinks", 0))
            window = cast(int, plan[index].get("window", 0))
            if own:
                window = min(max(own - 1, 1), sinks + window if window else own)
                sinks = 0
            if not window:
                continue
            store = replace(Store.parse(argument(node, "store")), sinks=sinks, window=window)
            node.kwargs = cast(Any, {**node.kwargs, "store": str(store)})
            outcomes.append(Rewritten(index, f"{sinks} first and {window} last tokens" if sinks
                                      else f"{window} last tokens"))
        return outcomes


PASS = Select()
