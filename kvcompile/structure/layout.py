"""How one layer's K and V are made of the tensors that are cached, and how those lie in the cache.

    K[h, d] = sum over i of weight[h, d, i] cached[g, at + i] (+ bias[h, d])    segment by segment

Heads that read the same cached numbers form a group, g, which is one kv head of what is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from kvcompile.ir import ROPE, argument
from kvcompile.structure.elements import Elements, Mixed, Tracer, width
from kvcompile.structure.movement import packet
from kvcompile.structure.sources import is_linear, split_bias

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Segment:
    """Channels [start, start + len) of every head: rows of linears, or cached numbers themselves.

    `linears[h]` and `rows[h]`: head h takes the rows from there on; no linears: the numbers are
    read as they are. `reads` [heads, n]: numbers of the cached elements that are read.
    """

    start: int
    length: int
    linears: tuple[Node, ...]
    rows: tuple[int, ...]
    reads: Tensor


@dataclass(frozen=True, eq=False)
class Made:
    """How a side, K or V, is made; `rope` is what turns it after that, if read is before."""

    heads: int
    dim: int
    segments: tuple[Segment, ...]
    rope: Node | None

    @property
    def plain(self) -> bool:
        """Whether nothing has to be computed."""
        return self.rope is None and not any(s.linears for s in self.segments)


@dataclass(frozen=True, eq=False)
class Layout:
    """What is stored of a token: k and v [groups, numbers], element numbers of `nodes` in order.

    `v_in_k`: v is the first of k.
    """

    nodes: tuple[Node, ...]
    k: Tensor
    v: Tensor
    v_in_k: bool

    @property
    def groups(self) -> int:
        return self.k.shape[0]

    @property
    def numbers(self) -> int:
        """Numbers that are stored of a token."""
        return self.k.numel() + (0 if self.v_in_k else self.v.numel())


def made_of(side: Node, stored: Sequence[Node], again: set[Node]) -> Made:
    """`side` (K or V) in terms of `stored`; linears and rope in `again` are computed at read.

    Elements of `stored` are numbered one tensor after the other. Raises Mixed, also where batch or
    length is a constant of the graph: tokens could not be told from channels.
    """
    if not all(isinstance(side.meta["val"].shape[d], SymInt) for d in (0, 2)):
        raise Mixed(side)
    tracer, rope = Tracer(), None
    heads, dim = (int(side.meta["val"].shape[d]) for d in (1, 3))
    ends = {*stored, *(n for n in again if n.target is ROPE or is_linear(n))}
    found = tracer.elements(side, ends)
    if any(n.target is ROPE and n not in stored for n in found.nodes):
        rope = found.nodes[0]
        if len(found.nodes) > 1 or found.channel.flatten().tolist() != list(range(heads * dim)):
            raise Mixed(rope)
        found = tracer.elements(argument(rope, "x"), ends - {rope})
    base = dict(zip(stored, _starts([width(n) for n in stored]), strict=True))
    segments = [_segment(found, at, end, base, tracer) for at, end in _runs(found)]
    return Made(heads, dim, tuple(segments), rope)


def _starts(widths: list[int]) -> list[int]:
    return [sum(widths[:i]) for i in range(len(widths))]


def _runs(found: Elements) -> list[tuple[int, int]]:
    """Channels that follow one another in one tensor, in every head alike."""
    dim = found.owner.shape[1]
    cuts = [d for d in range(1, dim) if bool(
        ((found.owner[:, d] != found.owner[:, d - 1])
         | (found.channel[:, d] != found.channel[:, d - 1] + 1)).any())]
    return list(zip([0, *cuts], [*cuts, dim], strict=True))


def _segment(found: Elements, start: int, end: int, base: dict[Node, int], tracer: Tracer
             ) -> Segment:
    owners = [found.nodes[i] for i in found.owner[:, start].tolist()]
    rows, span = found.channel[:, start], torch.arange(end - start)
    if all(n in base for n in owners):
        first = torch.tensor([base[n] for n in owners]) + rows
        return Segment(start, end - start, (), (), first[:, None] + span)
    if any(n in base for n in owners):
        raise Mixed(next(n for n in owners if n in base))
    reads = {}
    for linear in dict.fromkeys(owners):
        x = tracer.elements(linear_input(linear), tuple(base))
        own = torch.tensor([base[n] for n in x.nodes])[x.owner] + x.channel
        reads[linear] = own.flatten()
    if len({len(r) for r in reads.values()}) > 1:
        raise Mixed(owners[0])
    return Segment(start, end - start, tuple(owners), tuple(rows.tolist()),
                   torch.stack([reads[n] for n in owners]))


def linear_input(linear: Node) -> Node:
    product, _ = split_bias(linear)
    x = product.args[1 if packet(product) is aten.addmm else 0]
    assert isinstance(x, Node)
    return x


def lay(nodes: Sequence[Node], k: Made, v: Made) -> Layout:
    """The layout for one layer: as many groups as K's and V's heads allow."""
    each = [[_unique(torch.cat([s.reads[h] for s in made.segments])) for h in range(made.heads)]
            for made in (k, v)]
    groups = _groups([own[h] for own in each for h in range(len(own))], k.heads)
    per = k.heads // groups
    sides = [[_unique(torch.cat(own[g * per : (g + 1) * per])) for g in range(groups)]
             for own in each]
    if any(len({len(x) for x in side}) > 1 for side in sides):
        groups, sides = 1, [[_unique(torch.cat(own))] for own in each]
    keys, values = sides
    inside = any(bool(torch.isin(a, b).any()) for a, b in zip(keys, values, strict=True))
    if inside:
        keys = [torch.cat([b, a[~torch.isin(a, b)]]) for a, b in zip(keys, values, strict=True)]
        if len({len(x) for x in keys}) > 1:
            raise Mixed(nodes[0])
    return Layout(tuple(nodes), torch.stack(keys), torch.stack(values), inside)


def _unique(numbers: Tensor) -> Tensor:
    """Each number once, in order of the first."""
    return torch.tensor(list(dict.fromkeys(numbers.tolist())))


def _groups(reads: list[Tensor], heads: int) -> int:
    """Into how many equal runs the heads fall so that no two runs read the same number."""
    for groups in range(heads, 1, -1):
        per = heads // groups
        if heads % groups:
            continue
        owner: dict[int, int] = {}
        mine = [(i % heads // per, n) for i, r in enumerate(reads) for n in r.tolist()]
        if all(owner.setdefault(n, group) == group for group, n in mine):
            return groups
    return 1
