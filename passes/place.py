"""place: what is cached is a minimum cut between what cannot be computed again and K and V.

    attention(q, W_k z, W_v z)  ->  W_v attention(q W_k, z, z)

The tensors that are cached are those of the cheapest cut (`passes/mincut.py`) in bits of a token as
the recipe stores them, over all layers at once. By default only what q and W_o can absorb may be
computed again at read: linears between the cached tensors and K or V. So multi-head latent
attention caches its latent and one rotary key, and a factored projection its latent, whatever the
model is called. The axis `recompute` allows more: `rope` rebuilds keys at read, `turned` does not
cache keys that are rotated already, `hidden` caches tensors that queries are made of as well, and
`keys` makes V of K (`passes/slim.py`). K and V that are the cheapest cut stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from kvcompile.errors import RecipeError
from kvcompile.format import bits_per_element
from kvcompile.ir import ATTENTION, ROPE, argument, attention_nodes
from kvcompile.kernels.tail import without
from kvcompile.passes.absorb import Absorber
from kvcompile.passes.mincut import INFINITE, Network
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Outcome, Refused, Rewritten
from kvcompile.store import SIDES, Store
from kvcompile.structure.elements import Mixed, per_token, same_dtype, width
from kvcompile.structure.layout import Layout, Made, lay, linear_input, made_of
from kvcompile.structure.movement import CASTS, feeds, moves, packet
from kvcompile.structure.sources import is_linear

AGAIN = ("rope", "hidden", "keys")  # under which whatever is rotated may be rotated at read
CHOICES = ("absorbed", "rope", "turned", "hidden", "keys")
UNBOUND = ("hidden", "keys")  # at the cost of any number of multiplications


@dataclass(frozen=True)
class Place:
    """attention(q, W_k z, W_v z) -> W_v attention(q W_k, z, z), where z takes fewer bits.

    `work` bounds the multiplications at read, at most this many times those of K and V, unless a
    recipe asks for hidden states or for V from K.
    """

    work: float = 24.0
    name: ClassVar[str] = "place"
    order: ClassVar[int] = 45
    axes: ClassVar[tuple[str, ...]] = ("recompute",)

    def run(self, gm: GraphModule, plan: Sequence[LayerPlan]) -> list[Outcome]:
        nodes = attention_nodes(gm.graph)
        far = {argument(node, "far") for node in nodes}  # older keys of other layers too
        regions = [_Region(node, own, argument(node, "k") in far)
                   for node, own in zip(nodes, plan, strict=True)]
        every = _merge(regions)
        network = Network(every.inputs.get, every.store, every.again)
        cut = network.cut([n for r in regions for n in (r.k, r.v)])
        order = {n: i for i, n in enumerate(gm.graph.nodes)}
        kept: dict[tuple, Node] = {}
        outcomes: list[Outcome] = []
        for layer, region in enumerate(regions):
            chosen = sorted(region.behind(cut), key=order.__getitem__)
            outcomes.append(self.site(gm, layer, region, chosen, kept))
        gm.graph.eliminate_dead_code()
        return outcomes

    def site(self, gm: GraphModule, layer: int, region: "_Region", chosen: list[Node],
             kept: dict[tuple, Node]) -> Outcome:
        own, node = region.numbers, region.node
        try:
            again = set(region.inputs)
            k, v = (made_of(side, chosen, again) for side in (region.k, region.v))
            if k.plain and v.plain:
                return Rewritten(layer, "caches K and V" + ", since older keys are shared as they "
                                 "are" * region.fixed)
            layout = lay(chosen, k, v)
        except Mixed as mixed:
            return Refused(layer, f"K and V stay: '{mixed.args[0].name}' mixes what is cached",
                           mixed.args[0].name)
        if reason := self.fault(region, layout, k, v):
            return Refused(layer, f"K and V stay: {reason}", chosen[0].name)
        apart = region.apart(layout)
        Absorber(gm, node).rewrite(layout, k, v, kept)
        if any(apart):
            store = without(Store.parse(argument(node, "store")), apart)
            node.kwargs = {**node.kwargs, "store": str(store)}
        names = ", ".join(n.name for n in chosen)
        inside = f", V is {layout.v.shape[1]} of them" if layout.v_in_k else ""
        rebuilt = ", K is rebuilt at read" if k.rope is not None else ""
        numbers = layout.numbers - layout.groups * sum(apart)
        return Rewritten(layer, f"caches {names}: {numbers} numbers a token instead of {own}"
                                f"{inside}{rebuilt}")

    def fault(self, region: "_Region", layout: Layout, k: Made, v: Made) -> str:
        """Why the layout cannot be taken, or nothing."""
        node, store = region.node, region.planned
        biased = [n for n in ("softcap", "sinks") if argument(node, n)]
        dims = tuple(int(x.shape[1]) - n for x, n in zip(
            (layout.k, layout.v), region.apart(layout), strict=True))
        if layout.v_in_k:
            store = store.with_v_in_k()
        for side, dim in zip(store.sides, dims, strict=False):
            try:
                bits_per_element(store.side(side).format, dim, region.dtype, side)
            except RecipeError as error:
                return f"{dim} numbers a head do not fit: {error}"
        if biased and _biased(k, v):
            return f"a bias cannot be absorbed next to {biased[0]}"
        before = k.dim + v.dim
        after = float(sum(dims))
        if k.rope is not None:
            after = k.dim + dims[0] * k.heads / region.heads + dims[1]
        if after > self.work * before and region.choice not in UNBOUND:
            return (f"reading them takes {after / before:.0f} times the multiplications of K and "
                    f"V, more than {self.work:g}")
        return ""


class _Region:
    """What lies behind one layer's K and V as far as it may be computed again at read."""

    def __init__(self, node: Node, plan: LayerPlan, fixed: bool) -> None:
        self.node, self.choice = node, str(plan.get("recompute", CHOICES[0]))
        self.fixed = fixed or argument(node, "far") is not None
        if self.choice not in CHOICES:
            raise RecipeError(f"recompute={self.choice}: must be one of {', '.join(CHOICES)}")
        self.k, self.v = argument(node, "k"), argument(node, "v")
        self.heads = int(argument(node, "q").meta["val"].shape[1])
        self.dtype = self.k.meta["val"].dtype
        given = Store.parse(argument(node, "store"))
        self.planned = given if not given.plain else Store.of(
            {a: v for a, v in plan.values.items() if a.partition(".")[0] in ("format", "block",
                                                                            "lag")})
        self.inputs: dict[Node, list[Node] | None] = {}
        self.sides: dict[Node, str] = {}
        self.queries = self._cone(argument(node, "q"))
        turned = self.choice == "turned" and not self.fixed
        self.turned = set(_whole(self.k)) if turned else set[Node]()
        done = self.fixed or not given.plain or given.v_in_k or any(
            argument(node, name) is not None for name in ("basis", "cos"))
        linears: list[Node] = []
        for side, root in zip(SIDES, (self.k, self.v), strict=True):
            linears += self._walk(root, side, not done)
        for linear in linears:
            self._walk(linear_input(linear), self.sides[linear], False)

    @property
    def numbers(self) -> int:
        """Numbers that K and V take of a token."""
        return sum(width(n) for n in {self.k, self.v})

    def _cone(self, node: Node) -> set[Node]:
        """What a query is made of."""
        seen, todo = {node}, [node]
        while todo:
            n = todo.pop()
            if n.target is not ATTENTION:
                todo += [x for x in n.all_input_nodes if x not in seen]
                seen.update(n.all_input_nodes)
        return seen

    def _walk(self, root: Node, side: str, again: bool) -> list[Node]:
        """Note the tensors behind `root`; the linears that are reached, if they may be redone."""
        todo, linears = [root], []
        while todo:
            n = todo.pop()
            if self.inputs.get(n, ()) is None or n in self.inputs and again:
                continue
            self.sides.setdefault(n, side)
            before = self._before(n, again)
            self.inputs[n] = before
            if before is not None and is_linear(n):
                linears.append(n)
            else:
                todo += [x for x in before or () if x not in self.inputs or not again]
        return linears

    def _before(self, node: Node, again: bool) -> list[Node] | None:
        """What `node` is computed from again at read; None if it cannot be."""
        if not per_token(node):
            return None
        if moves(node):
            sources = [n for n in feeds(node) if not (moves(n) and not feeds(n))]
            return sources if all(per_token(n) for n in sources) else None
        if packet(node) in CASTS and same_dtype(node):
            return feeds(node)
        if again and is_linear(node):
            return [linear_input(node)]
        if again and node.target is ROPE and (node in self.turned or self.choice in AGAIN):
            return [argument(node, "x")]
        return None

    def bits(self, node: Node) -> float:
        """What caching `node` takes of a token, or infinite where it must not be cached."""
        if node in self.turned or node not in (self.k, self.v) and (
                not per_token(node) or node in self.queries and self.choice != "hidden"):
            return INFINITE
        side = self.sides[node]
        value = (self.k if side == "k" else self.v).meta["val"]
        try:
            each = bits_per_element(self.planned.side(side).format, int(value.shape[-1]),
                                    value.dtype, "k" if side == "k" else "v")
        except RecipeError:
            each = 8.0 * value.dtype.itemsize
        first, groups = node.meta.get("apart", (0, 1))
        return (width(node) - first * groups) * each

    def apart(self, layout: Layout) -> tuple[int, int]:
        """Of K and of V, how many of the first numbers of a stored head only the newest tokens
        keep: of a node's `groups` equal parts the `first` ones, where its meta has `apart`."""
        at, lost = 0, set[int]()
        for n in layout.nodes:
            first, groups = n.meta.get("apart", (0, 1))
            each = width(n) // groups
            lost |= {at + g * each + i for g in range(groups) for i in range(first)}
            at += width(n)
        k, v = (sum(x in lost for x in side[0].tolist()) for side in (layout.k, layout.v))
        return k, v

    def behind(self, cut: set[Node]) -> list[Node]:
        """The tensors of `cut` that this layer reads."""
        found, todo, seen = [], [self.k, self.v], set()
        while todo:
            n = todo.pop()
            if n in seen:
                continue
            seen.add(n)
            if n in cut:
                found.append(n)
            else:
                todo += self.inputs[n] or ()
        return found


class _merge:
    """The regions of all layers as one; a tensor that several reach is the first one's."""

    def __init__(self, regions: Sequence[_Region]) -> None:
        self.inputs: dict[Node, list[Node] | None] = {}
        self.region: dict[Node, _Region] = {}
        for region in regions:
            for node, before in region.inputs.items():
                if node not in self.inputs or before is None:
                    self.inputs[node] = before
                self.region.setdefault(node, region)

    def store(self, node: Node) -> float:
        return self.region[node].bits(node)

    def again(self, node: Node) -> float:
        """Next to nothing: of equally small cuts the one that leaves least to do."""
        return 0.0 if moves(node) else 2.0**-10


def _whole(k: Node) -> list[Node]:
    """`k` and what it is a view or a cast of, up to the rotation of all its channels; none without
    one."""
    found = [k]
    while found[-1].target is not ROPE:
        before = feeds(found[-1]) if moves(found[-1]) or packet(found[-1]) in CASTS else []
        if len(before) != 1:
            return []
        found += before
    return found


def _biased(k: Made, v: Made) -> bool:
    from kvcompile.structure.sources import split_bias
    return any(split_bias(n)[1] for made in (k, v) for s in made.segments for n in s.linears)


PASS = Place()
