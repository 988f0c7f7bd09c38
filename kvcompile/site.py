"""The attention layers of a graph, and which of them share one set of planes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from kvcompile.ir import argument, attention_nodes
from kvcompile.kernels.rebuild import Made, made
from kvcompile.rule import Rule
from kvcompile.store import SIDES, Store


@dataclass(frozen=True)
class Site:
    """One attention layer: its heads, head dimensions (K, V), dtype, own window and storage.

    Layers that attend to the same K and V share what is stored: for all but the first of them
    `owner` is that first one, which stores them, and `store` is the owner's. `members` are the
    layers whose tokens one slot holds side by side; the first of them names the slot. `heads` and
    `dims` are those of what is stored.
    """

    layer: int
    q_heads: int
    heads: int
    dims: tuple[int, int]
    dtype: torch.dtype
    window: int
    store: Store
    owner: int | None = None
    members: tuple[int, ...] = ()
    made: Made | None = None  # how keys are computed from what is stored at every read
    rule: str = ""  # which tokens stay (kvcompile/rule.py), where scores decide
    common: Store | None = None  # of layers that share planes and are stored almost alike
    lent: tuple[tuple[str, int], ...] = ()  # tiers whose pages are those of another layer

    @property
    def place(self) -> tuple[int, int]:
        """The layer that names the slot in which this one's K and V lie, and their number there."""
        own = self.layer if self.owner is None else self.owner
        return (self.members[0], self.members.index(own)) if self.members else (own, 0)

    @property
    def layout(self) -> Store:
        """The store that the planes and the kernels are made for."""
        return self.common or self.store

    @property
    def own(self) -> Store:
        """The same, which says what of it has no pages of its own."""
        return replace(self.layout, lent=tuple(key for key, _ in self.lent))

    @property
    def rebuilt(self) -> bool:
        """Whether keys are computed from what is stored at every read."""
        return self.made is not None

    @property
    def rotated(self) -> bool:
        """Whether they are rotated then."""
        return self.made is not None and self.made.rotary > 0

    @property
    def salient(self) -> int:
        """Of every 128 tokens, how many by score are stored better than the others (`Rule`)."""
        return Rule.parse(self.rule).salient if self.rule else 0

    @property
    def leads(self) -> bool:
        """Whether the layer names a slot: what lies in it is counted there."""
        return self.owner is None and self.place == (self.layer, 0)

    @property
    def exact_bytes_per_token(self) -> int:
        """Bytes that one token's K and V take uncompressed."""
        dims = self.dims[: len(self.store.sides)]
        return self.heads * sum(dims) * self.dtype.itemsize


def sites(graph: Graph) -> tuple[Site, ...]:
    """The kvc.attention nodes of `graph` as sites, in order of execution."""
    nodes = attention_nodes(graph)
    owner = owners(nodes)
    found = [_site(i, node, owner.get(i)) for i, node in enumerate(nodes)]
    for layers in groups(found):
        if len({found[i].store for i in layers}) > 1:
            found = [replace(site, common=site.store.common) if site.place[0] in layers else site
                     for site in found]
    for layers in groups(found):
        seen: dict[tuple, int] = {}
        for i in layers:
            found[i] = replace(found[i], lent=tuple(_lent(nodes[i], found[i], seen)))
    return tuple(found)


def _lent(node: Node, site: Site, seen: dict[tuple, int]) -> Iterator[tuple[str, int]]:
    """The tiers that hold what those of an earlier slot of the group do, and its layer; `seen` are
    the K and V of the earlier ones."""
    if site.members or site.rule:
        return
    far = argument(node, "far")
    for side in site.store.sides:
        lender = seen.setdefault(_held(node, side), site.layer)
        if lender != site.layer:
            yield from ((f"{side}.{tier}", lender) for tier in site.store.tiers(side))
        elif side == "k" and far is not None and ("k", far, None) in seen:
            yield "k.body", seen["k", far, None]


def _held(node: Node, side: str) -> tuple[str, Node, Node | None]:
    """What of kvc.attention nodes tells whether they would store the same K, or V."""
    return side, argument(node, side), argument(node, "far") if side == "k" else None


def halves(nodes: Sequence[Node]) -> list[tuple[int, str, int]]:
    """(layer, side, lender) for kvc.attention nodes with the k or the v of an earlier one, and the
    other side not of the same; or whose older keys are those of one. `lender` is the first that has
    it."""
    first: dict[tuple, int] = {}
    found = [(i, side, first.setdefault(_held(n, side), i))
             for i, n in enumerate(nodes) for side in SIDES]
    found += [(i, "k", first["k", far, None]) for i, n in enumerate(nodes)
              if (far := argument(n, "far")) is not None]
    whole = owners(nodes)
    return [(i, side, lender) for i, side, lender in found if lender != i and i not in whole]


def owners(nodes: Sequence[Node]) -> dict[int, int]:
    """Layer -> the first one with the same k and v, for kvc.attention nodes that are not that."""
    first: dict[tuple, int] = {}
    each = enumerate((_held(n, "k"), _held(n, "v")) for n in nodes)
    return {i: owner for i, both in each if (owner := first.setdefault(both, i)) != i}


def groups(sites: Sequence[Site]) -> list[list[int]]:
    """Layers that name slots, by number, those whose planes are alike together, in order of the
    first; a slot is an index there."""
    alike: dict[tuple, list[int]] = {}
    for site in sites:
        if site.leads:
            key = (site.store.common, site.heads, site.dims, site.dtype, bool(site.rule))
            alike.setdefault(key, []).append(site.layer)
    return list(alike.values())


def _site(layer: int, node: Node, owner: int | None) -> Site:
    q, k, v = (argument(node, n).meta["val"] for n in "qkv")
    return Site(layer, int(q.shape[1]), int(k.shape[1]), (int(k.shape[3]), int(v.shape[3])),
                k.dtype, argument(node, "window"), Store.parse(argument(node, "store")), owner,
                tuple(argument(node, "members")), made_of(node), argument(node, "rule"))


def made_of(node: Node) -> Made | None:
    """How the keys of a kvc.attention or kvc.attend node are made of k, if they are."""
    q, k = (argument(node, n).meta["val"] for n in "qk")
    basis, offset, cos = (x if x is None else x.meta["val"] for x in (
        argument(node, n) for n in ("basis", "offset", "cos")))
    return made(int(q.shape[3]), int(k.shape[1]), basis, offset, cos, argument(node, "style"))
