"""align: a layer's heads in the basis of another one's. linear(x, W) -> linear(x, T W)

    v' = T v,  o = W_o v = (W_o T^T) v'             T orthogonal, one for each kv head
    k' = R k,  q' = R q,  q' . k' = q . k           R commutes with the rotary embedding

and kv heads in another order, with their query heads. The layer computes what it did.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule

from kvcompile.calibration.alignment import Alignment, align
from kvcompile.calibration.samples import Sample, Samples
from kvcompile.errors import RecipeError
from kvcompile.ir import attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.structure.heads import HeadWeights, Stop


@dataclass(frozen=True)
class Align:
    """Layer i is given the basis of the earlier layer that axis `align` names.

    What makes both layers' K and V nearest to each other on the calibration text is found for each
    pair of heads, and heads are matched. The weights are rewritten in buffers of the graph. Where a
    norm stands between W_k (or W_q) and attention, K and the order of heads stay.
    """

    name: ClassVar[str] = "align"
    order: ClassVar[int] = 20
    axes: ClassVar[tuple[str, ...]] = ("align",)

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        wanted = {i: p.get("align") for i, p in enumerate(plan) if p.get("align") is not None}
        if not wanted or gm.meta.get("aligned"):
            return []
        if "text" not in gm.meta:
            raise RecipeError("aligning layers needs a text, and a graph that arrives through the "
                              "torch.compile backend has none")
        nodes, seen = attention_nodes(gm.graph), Samples(gm, gm.meta["text"]()).attention
        now: dict[int, tuple[Tensor, Tensor]] = {}  # K, V [H, N, D] as they are by now
        outcomes: list[Outcome] = []
        for layer, other in sorted(wanted.items()):
            if type(other) is not int or not 0 <= other < layer:
                raise RecipeError(f"{plan[layer].origin['align']}: layer {layer} cannot be aligned "
                                  f"with {other}: it must be an earlier layer")
            try:
                own = HeadWeights(gm, nodes[layer])
            except Stop as stop:
                outcomes.append(Refused(layer, str(stop), nodes[layer].name))
                continue
            x, y = ([t.shape for t in (s.k, s.v)] for s in (seen[layer], seen[other]))
            if x != y:
                outcomes.append(Refused(layer, f"layer {other} has other heads",
                                        nodes[layer].name))
                continue
            (k, v), (k0, v0) = _flat(seen[layer]), now.get(other, _flat(seen[other]))
            found = align((k, k0), (v, v0), own.rotary, own.fixed)
            own.rewrite(found.heads, found.k, found.v, f"layer{layer}_aligned")
            heads = list(found.heads)
            now[layer] = (k if found.k is None else k[heads] @ found.k.mT, v[heads] @ found.v.mT)
            outcomes.append(Rewritten(layer, _told(found, other)))
        gm.meta["aligned"] = True
        return outcomes


def _flat(sample: Sample) -> tuple[Tensor, Tensor]:
    """K, V [H, N, D] of all tokens, in fp64."""
    k, v = (x.transpose(0, 1).flatten(1, 2).double() for x in (sample.k, sample.v))
    return k, v


def _told(found: Alignment, other: int) -> str:
    before, after = ([f"{x:.2f}" for x in pair] for pair in found.cosine)
    what = "K and V" if found.k is not None else "V, not K (a norm stands before it),"
    order = "" if found.heads == tuple(range(len(found.heads))) else \
        f", heads {', '.join(map(str, found.heads))}"
    return (f"{what} in the basis of layer {other}{order}: cosines {before[0]}, {before[1]} -> "
            f"{after[0]}, {after[1]}")


PASS = Align()
