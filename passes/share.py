"""share: layers attend to the K and V of an earlier one. attention(q, k, v) -> attention(q, k', v')

The consumer's own k and v, and their projections with them, are dead code then and leave the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from kvcompile.errors import RecipeError
from kvcompile.ir import argument, attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.store import SIDES


@dataclass(frozen=True)
class Share:
    """attention_i(q, k_i, v_i) -> attention_i(q, k_j, v_j), where axis `owner` of layer i is j.

    K is shared after its rotation. A layer whose window or heads differ from its owner's keeps its
    own K and V. Raises RecipeError for an owner that does not come earlier.
    """

    name: ClassVar[str] = "share"
    order: ClassVar[int] = 40
    axes: ClassVar[tuple[str, ...]] = ("owner",)

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        nodes = attention_nodes(gm.graph)
        for index, node in enumerate(nodes):
            owner = plan[index].get("owner", index)
            if owner == index:
                continue
            if type(owner) is not int or not 0 <= owner < index:
                raise RecipeError(f"{plan[index].origin['owner']}: layer {index} cannot attend to "
                                  f"the K and V of {owner}: it must be an earlier layer")
            different = _difference(node, nodes[owner])
            if different:
                outcomes.append(Refused(index, f"layer {owner} has {different}", node.name))
                continue
            k, v = (argument(nodes[owner], side) for side in SIDES)
            node.args = (node.args[0], k, v, *node.args[3:])
            outcomes.append(Rewritten(index, f"K and V of layer {owner}"))
        gm.graph.eliminate_dead_code()
        return outcomes


def _difference(node: Node, owner: Node) -> str:
    """What of `owner` does not fit `node`: its window, or the shape of its K or V."""
    if argument(node, "window") != argument(owner, "window"):
        return f"a window of {argument(owner, 'window')}, not {argument(node, 'window')} tokens"
    for side in SIDES:
        own, other = (tuple(argument(n, side).meta["val"].shape[1::2]) for n in (node, owner))
        if own != other:
            return "{} heads of {} channels in {}, not {} of {}".format(*other, side.upper(), *own)
    return ""


PASS = Share()
