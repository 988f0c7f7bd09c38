"""merge: the tokens of several layers are encoded together when they are stored.

    attention_i(store), attention_j(store) -> attention_i(store'), attention_j(store')

where store' holds the layers side by side, and its body what a format makes of them: one direction
(kernels/direction.py) or mixtures of a few vectors (kernels/subspace.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch.fx import GraphModule, Node

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, format_of, term_of
from kvcompile.ir import argument, attention_nodes
from kvcompile.kernels.tail import dropped
from kvcompile.plan import LayerPlan
from kvcompile.recipe import Term
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.site import Site, halves, sites
from kvcompile.store import Side, Store


@dataclass(frozen=True)
class Merge:
    """Store layers together, where axis `merge` of each is the numbers of them all, in order.

    `merge.k` and `merge.v` are the formats of what lies side by side, around the recipe's own.
    Tokens are encoded once, in blocks of 128, when they leave the recent tier, which exists for
    that; a call attends to its own tokens exactly. Layers whose windows, heads or storage differ
    stay as they are.
    """

    name: ClassVar[str] = "merge"
    order: ClassVar[int] = 70
    axes: ClassVar[tuple[str, ...]] = ("merge", "merge.k", "merge.v")

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        nodes, known = attention_nodes(gm.graph), sites(gm.graph)
        outcomes: list[Outcome] = []
        said = dict.fromkeys(own.values["merge"] for own in plan if "merge" in own.values)
        for members in cast(list[tuple[int, ...]], list(said)):
            last = max(members)
            own = next(own for own in plan if own.get("merge") == members)
            if beyond := [i for i in members if not 0 <= i < len(nodes)]:
                raise RecipeError(f"{own.origin['merge']}: layer {beyond[0]} cannot be merged: "
                                  f"there are {len(nodes)} layers")
            if known[last].members == members:
                continue
            why = next((f"layer {i} is kept by itself" for i in members
                        if plan[i].get("merge") != members), "")
            why = why or next(filter(None, (_difference(known[i], known[last])
                                            for i in members[:-1])), "")
            why = why or next((f"layer {i} reads {side.upper()} of layer {j}"
                               for i, side, j in halves(nodes) if {i, j} & {*members}), "")
            why = why or next(filter(None, (_rebuilt(nodes[i]) for i in members)), "")
            if why:
                outcomes += [Refused(i, why, nodes[last].name) for i in members]
                continue
            try:
                what = _merge([nodes[i] for i in members], known[last], members, own)
            except RecipeError as error:
                raise RecipeError(f"{own.origin['merge'].name}: layer {last}: {error}") from error
            for i in members:
                others = ", ".join(str(j) for j in members if j != i)
                outcomes.append(Rewritten(i, f"one {what} with layer {others}" if others else
                                          f"{what} of its own"))
        return outcomes


def _merge(nodes: Sequence[Node], site: Site, members: tuple[int, ...], own: LayerPlan) -> str:
    """Give the layers one store; the name of the format that holds them."""
    k, v = (_side(side, cast(Term, own.get(f"merge.{name}")))
            for name, side in (("k", site.store.k), ("v", site.store.v)))
    store = replace(site.store, k=k, v=v, members=len(members))
    store.planes(site.dims, site.dtype)  # raises RecipeError for what does not fit
    for node in nodes:
        node.kwargs = cast(Any, {**node.kwargs, "store": str(store), "members": list(members)})
    return k.format.name


def _side(side: Side, around: Term) -> Side:
    """Whole pages leave together, behind no more tokens than before (but at most a page)."""
    fmt = format_of(Term(around.name, (("of", term_of(side.format)), *around.args)))
    lag = max(0, (side.lag + side.block) // PAGE - 1) * PAGE
    return Side(fmt, max(side.block, PAGE) // PAGE * PAGE, lag)


def _rebuilt(node: Node) -> str:
    """What is stored instead of a layer's K and V, if anything is."""
    layer = f"layer {argument(node, 'layer')}"
    if Store.parse(argument(node, "store")).v_in_k:
        return f"{layer} stores one latent for K and V"
    if argument(node, "rule"):
        return f"which tokens {layer} keeps is decided by scores"
    if any(dropped(Store.parse(argument(node, "store")))):
        return f"only the newest tokens of {layer} are kept whole"
    if argument(node, "basis") is not None:
        return f"the keys of {layer} are rebuilt from latents when they are read"
    return ""


def _difference(a: Site, b: Site) -> str:
    """What keeps two layers from being stored together."""
    for site in (a, b):
        if site.owner is not None:
            return f"layer {site.layer} stores nothing"
        if site.members:
            return f"layer {site.layer} is merged with another one"
    for what in ("window", "heads", "dims", "dtype", "store"):
        one, other = (getattr(site, what) for site in (a, b))
        if one != other:
            return f"the {what} of layers {a.layer} and {b.layer} differ: {one}, {other}"
    return ""


PASS = Merge()
