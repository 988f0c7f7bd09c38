"""share: layers attend to K or V of an earlier one. attention(q, k, v) -> attention(q, k', v')

The consumer's own k or v, and its projection with it, is dead code then and leaves the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from kvcompile.errors import RecipeError
from kvcompile.format import Side
from kvcompile.ir import argument, attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.store import SIDES


@dataclass(frozen=True)
class Share:
    """attention_i(q, k_i, v_i) -> attention_i(q, k_j, v_j), where axes `owner.k` and `owner.v` of
    layer i are j. With one of them alone, or two owners, the other side is what it was.

    K is shared after its rotation. A layer whose window or heads differ from its owner's keeps its
    own K and V. Raises RecipeError for an owner that does not come earlier.
    """

    name: ClassVar[str] = "share"
    order: ClassVar[int] = 40
    axes: ClassVar[tuple[str, ...]] = tuple(f"owner.{side}" for side in SIDES)

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        nodes = attention_nodes(gm.graph)
        for index, node in enumerate(nodes):
            shared: dict[int, list[Side]] = {}
            for side in SIDES:
                owner = plan[index].get(f"owner.{side}", index)
                if owner == index:
                    continue
                if type(owner) is not int or not 0 <= owner < index:
                    raise RecipeError(
                        f"{plan[index].origin[f'owner.{side}']}: layer {index} cannot attend to "
                        f"the {side.upper()} of {owner}: it must be an earlier layer")
                shared.setdefault(owner, []).append(side)
            for owner, sides in shared.items():
                if different := _difference(node, nodes[owner]):
                    outcomes.append(Refused(index, f"layer {owner} has {different}", node.name))
                    continue
                for side in sides:
                    node.update_arg(1 + SIDES.index(side), argument(nodes[owner], side))
                what = " and ".join(side.upper() for side in sides)
                outcomes.append(Rewritten(index, f"{what} of layer {owner}"))
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
