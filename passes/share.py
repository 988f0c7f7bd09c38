"""share: layers attend to the K or V of earlier ones. attention(q, k, v) -> attention(q, k', v')

The consumer's own k or v, and its projection with it, is dead code then and leaves the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch.fx import GraphModule, Node

from kvcompile.errors import RecipeError
from kvcompile.format import Side
from kvcompile.ir import argument, attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.store import SIDES

NAMES = {"k": "K", "v": "V", "far": "older K"}


@dataclass(frozen=True)
class Share:
    """attention_i(q, k_i, v_i) -> attention_i(q, k_j, v_j), where axes `owner.k` and `owner.v` of
    layer i are j. With one of them alone, or two owners, the other side is what it was. Where axis
    `owner.far` is j, layer i has its own keys as long as they wait in the recent tier, or among the
    sinks, and k_j of older tokens.

    K is shared after its rotation. A layer whose window or heads differ from its owner's keeps its
    own K and V. Raises RecipeError for an owner that does not come earlier.
    """

    name: ClassVar[str] = "share"
    order: ClassVar[int] = 40
    axes: ClassVar[tuple[str, ...]] = ("owner.k", "owner.v", "owner.far")

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        nodes = attention_nodes(gm.graph)
        for index, node in enumerate(nodes):
            shared: dict[int, list[str]] = {}
            for axis in self.axes:
                owner, side = plan[index].get(axis, index), axis.removeprefix("owner.")
                if owner == index:
                    continue
                if type(owner) is not int or not 0 <= owner < index:
                    raise RecipeError(
                        f"{plan[index].origin[axis]}: layer {index} cannot attend to "
                        f"the {NAMES[side]} of {owner}: it must be an earlier layer")
                shared.setdefault(owner, []).append(side)
            if both := [plan[index].origin[a] for a in ("owner.k", "owner.far")
                        if plan[index].get(a, index) != index][1:]:
                raise RecipeError(f"'{plan[index].origin['owner.k'].name}' and '{both[0].name}' "
                                  f"both say whose keys layer {index} reads")
            for owner, sides in shared.items():
                if different := _difference(node, nodes[owner]):
                    outcomes.append(Refused(index, f"layer {owner} has {different}", node.name))
                    continue
                for side in sides:
                    _share(node, nodes[owner], side)
                what = " and ".join(NAMES[side] for side in sides)
                outcomes.append(Rewritten(index, f"{what} of layer {owner}"))
        gm.graph.eliminate_dead_code()
        return outcomes


def _share(node: Node, owner: Node, side: str) -> None:
    if side == "far":
        node.kwargs = cast(Any, {**node.kwargs, "far": argument(owner, "k")})
        return
    node.update_arg(1 + SIDES.index(cast(Side, side)), argument(owner, side))
    if side == "k" and argument(owner, "far") is not None:
        node.kwargs = cast(Any, {**node.kwargs, "far": argument(owner, "far")})


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
