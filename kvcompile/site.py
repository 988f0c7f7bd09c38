"""The attention layers of a graph, and which of them share one set of planes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from kvcompile.ir import argument, attention_nodes
from kvcompile.store import Store


@dataclass(frozen=True)
class Site:
    """One attention layer: its heads, head dimensions (K, V), dtype, own window and storage."""

    layer: int
    q_heads: int
    heads: int
    dims: tuple[int, int]
    dtype: torch.dtype
    window: int
    store: Store
    rule: str = ""  # which tokens stay (kvcompile/rule.py), where scores decide

    @property
    def exact_bytes_per_token(self) -> int:
        """Bytes that one token's K and V take uncompressed."""
        return self.heads * sum(self.dims) * self.dtype.itemsize


def sites(graph: Graph) -> tuple[Site, ...]:
    """The kvc.attention nodes of `graph` as sites, in order of execution."""
    return tuple(_site(i, node) for i, node in enumerate(attention_nodes(graph)))


def groups(sites: Sequence[Site]) -> list[list[int]]:
    """Layers whose planes are alike, by number, in order of the first; a slot is an index there."""
    alike: dict[tuple, list[int]] = {}
    for i, site in enumerate(sites):
        alike.setdefault((site.store, site.heads, site.dims, site.dtype, bool(site.rule)), []).append(i)
    return list(alike.values())


def _site(layer: int, node: Node) -> Site:
    q, k, v = (argument(node, n).meta["val"] for n in "qkv")
    return Site(layer, int(q.shape[1]), int(k.shape[1]), (int(k.shape[3]), int(v.shape[3])),
                k.dtype, argument(node, "window"), Store.parse(argument(node, "store")),
                argument(node, "rule"))
