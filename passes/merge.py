"""merge: the tokens of two layers become one direction and two lengths when they are stored.

    attention_i(store), attention_j(store) -> attention_i(store'), attention_j(store')

where store' holds both layers side by side, and its body what kernels/direction.py makes of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch.fx import GraphModule, Node

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, format_of, term_of
from kvcompile.ir import argument, attention_nodes
from kvcompile.plan import LayerPlan
from kvcompile.recipe import Term
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.site import Site, sites
from kvcompile.store import Side, Store


@dataclass(frozen=True)
class Merge:
    """Store layers i and j together, where axis `merge` of each is the number of the other.

    `merge.t` is where between the two the common direction lies, `merge.kept` how many of 128
    tokens stay as they are. Tokens are merged once, in blocks of 128, when they leave the recent
    tier, which exists for that; a call attends to its own tokens exactly. Layers whose windows,
    heads or storage differ stay as they are.
    """

    name: ClassVar[str] = "merge"
    order: ClassVar[int] = 70
    axes: ClassVar[tuple[str, ...]] = ("merge", "merge.t", "merge.kept")

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        nodes, known = attention_nodes(gm.graph), sites(gm.graph)
        outcomes: list[Outcome] = []
        for later, node in enumerate(nodes):
            first = plan[later].get("merge", later)
            if type(first) is not int or not 0 <= first < len(nodes):
                raise RecipeError(f"{plan[later].origin['merge']}: layer {later} cannot be merged "
                                  f"with {first}: there are {len(nodes)} layers")
            if first >= later or known[later].members:
                continue
            why = "" if plan[first].get("merge") == later else f"layer {first} is kept by itself"
            why = why or _difference(known[first], known[later])
            why = why or next(filter(None, map(_rebuilt, (nodes[first], node))), "")
            if why:
                outcomes += [Refused(i, why, node.name) for i in (first, later)]
                continue
            options = {"t": plan[later].get("merge.t"), "kept": plan[later].get("merge.kept")}
            try:
                _merge([nodes[first], node], known[later], (first, later), options)
            except RecipeError as error:
                origin = plan[later].origin["merge"]
                raise RecipeError(f"{origin.name}: layer {later}: {error}") from error
            outcomes += [Rewritten(a, f"one direction with layer {b}")
                         for a, b in ((first, later), (later, first))]
        return outcomes


def _merge(nodes: Sequence[Node], site: Site, members: tuple[int, int],
           options: dict[str, Any]) -> None:
    k, v = (_side(side, options) for side in (site.store.k, site.store.v))
    store = replace(site.store, k=k, v=v, members=2)
    store.planes(site.dims, site.dtype)  # raises RecipeError for what does not fit
    for node in nodes:
        node.kwargs = cast(Any, {**node.kwargs, "store": str(store), "members": list(members)})


def _side(side: Side, options: dict[str, Any]) -> Side:
    """Whole pages leave together, behind no more tokens than before (but at most a page)."""
    given = tuple((name, value) for name, value in options.items() if value is not None)
    fmt = format_of(Term("direction", (("of", term_of(side.format)), *given)))
    lag = max(0, (side.lag + side.block) // PAGE - 1) * PAGE
    return Side(fmt, max(side.block, PAGE) // PAGE * PAGE, lag)


def _rebuilt(node: Node) -> str:
    """What is stored instead of a layer's K and V, if anything is."""
    layer = f"layer {argument(node, 'layer')}"
    if Store.parse(argument(node, "store")).v_in_k:
        return f"{layer} stores one latent for K and V"
    if argument(node, "rule"):
        return f"which tokens {layer} keeps is decided by scores"
    if any(argument(node, name) is not None for name in ("basis", "cos")):
        return f"the keys of {layer} are rebuilt when they are read"
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
