"""Reading and writing tokens of a tier through its page table, in plain PyTorch."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from kvcompile.constants import give
from kvcompile.format import PAGE, Format, Side
from kvcompile.store import SIDES, Plane, Span, Store

OWN = ("count", "table", "constants")  # planes of which every (layer, row, head) has a part


class Tier:
    """One tier's planes: `table` [B, H, pages] and the format's pools [pages, *page shape].

    `dim` channels of each of the store's members are read and written side by side.
    """

    def __init__(self, store: Store, side: Side, tier: str, named: dict[str, Tensor],
                 dim: int, dtype: torch.dtype) -> None:
        self.format: Format = store.format(side, tier)
        self.ring = store.ring(side, tier)
        self.dim, self.dtype, self.side = dim * store.members, dtype, side
        prefix = f"{side}.{tier}."
        self.table = named[prefix + "table"]
        self.specs = self.format.planes(self.dim, dtype, side)
        self.pools = {name: named[prefix + name] for name in self.specs}
        self.constants = named.get("constants")

    def alike(self, row: int, heads: slice) -> list[tuple[slice, Format]]:
        """Neighbouring heads of layers with the same constants, and the format that theirs is."""
        if self.constants is None:
            return [(heads, self.format)]
        found, start = [], heads.start
        for own, run in groupby(map(tuple, self.constants[row, heads].tolist())):
            end = start + len([*run])
            found.append((slice(start, end), give(self.format, own)))
            start = end
        return found

    def read(self, row: int, heads: slice, span: Span) -> Tensor:
        """The tokens numbered [start, end): [heads, end - start, dim], decoded."""
        start, end = span
        alike = self.alike(row, heads)
        if len(alike) > 1:
            return torch.cat([self.read(row, own, span) for own, _ in alike])
        fmt = alike[0][1]
        if start == end:
            pages = self.table[row, heads]
            return torch.empty(pages.shape[0], 0, self.dim, dtype=self.dtype, device=pages.device)
        if self.ring is None or end <= self.ring:
            x = self.decode(fmt, self.table[row, heads, start // PAGE : -(-end // PAGE)])
            return x[:, start % PAGE : start % PAGE + end - start]
        x = self.decode(fmt, self.table[row, heads, : self.ring // PAGE])
        return x.index_select(1, torch.arange(start, end, device=x.device) % self.ring)

    def decode(self, fmt: Format, pages: Tensor) -> Tensor:
        """pages [h, p] -> [h, p * PAGE, dim]; of dense pages that lie together, a view."""
        h, p = pages.shape
        ids = pages.tolist()
        first = ids[0][0]
        apart = ids[1][0] - first if h > 1 else p
        together = apart >= p and all(
            row == list(range(start, start + p))
            for row, start in zip(ids, range(first, first + h * apart, apart), strict=True))
        flat = pages.reshape(-1)
        planes = {}
        for name, pool in self.pools.items():
            if together and first + h * apart <= pool.shape[0]:
                own = pool[first : first + h * apart].unflatten(0, (h, apart))[:, :p]
            else:
                own = pool.index_select(0, flat).unflatten(0, (h, p))
            planes[name] = self.specs[name].steps(own).flatten(1, 3)
        return fmt.decode(planes, self.dim, self.dtype, self.side)

    def write(self, row: int, heads: slice, start: int, x: Tensor) -> None:
        """Encode x [heads, n, dim] as the tokens numbered start, start + 1, ...; whole steps."""
        step = self.format.step
        first, count = start // step, x.shape[1] // step
        if count == 0:
            return
        table, per_page = self.table[row, heads], PAGE // step
        alike = self.alike(row, heads)
        if len(alike) > 1:
            for own, _ in alike:
                self.write(row, own, start, x[own.start - heads.start : own.stop - heads.start])
            return
        encoded = alike[0][1].encode(x, self.side)
        if count == 1:  # a decode step: one place per head
            at = first if self.ring is None else first % (self.ring // step)
            page = table[:, at // per_page]
            for name, pool in self.pools.items():
                view, lanes = self._steps(name, pool)
                place = divmod(at % per_page, lanes)
                view[:, place[0], place[1]].index_copy_(0, page.long(), encoded[name][:, 0])
            return
        steps = torch.arange(first, first + count, device=x.device)
        if self.ring is not None:
            steps = steps % (self.ring // step)
        page, within = table.long().index_select(1, steps // per_page), steps % per_page
        for name, pool in self.pools.items():
            view, lanes = self._steps(name, pool)
            view.index_put_((page, within // lanes, within % lanes), encoded[name])

    def _steps(self, name: str, pool: Tensor) -> tuple[Tensor, int]:
        """The pool as [pages, steps / lanes, lanes, *shape], and lanes."""
        return self.specs[name].steps(pool), self.specs[name].lanes


def named(specs: Sequence[Plane], planes: list[Tensor], slots: Sequence[int]) -> dict[str, Tensor]:
    """name -> plane; of the count and the tables [batch, slots * heads, ...], layer by layer."""
    if len(specs) != len(planes):
        raise ValueError(f"the store has {len(specs)} planes, {len(planes)} were given")
    return {spec.name: plane if spec.shape else plane[at(slots)].transpose(0, 1).flatten(1, 2)
            for spec, plane in zip(specs, planes, strict=True)}


def at(slots: Sequence[int]) -> slice | list[int]:
    """An index of these layers; of neighbours one that makes a view."""
    first, last = slots[0], slots[-1]
    return slice(first, last + 1) if [*slots] == [*range(first, last + 1)] else [*slots]


def tiers(store: Store, side: Side, named: dict[str, Tensor], dim: int,
          dtype: torch.dtype) -> dict[str, Tier]:
    """tier name -> Tier, for K or for V."""
    return {t: Tier(store, side, t, named, dim, dtype) for t in store.tiers(side)}


def stored(store: Store, side: Side, tier: dict[str, Tier], row: int, heads: slice,
           count: int) -> Tensor:
    """All kept tokens of a row, oldest first: [heads, store.stored(count), dim]."""
    spans = store.spans(side, count)
    parts = [t.read(row, heads, spans[name]) for name, t in tier.items()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def add(store: Store, side: Side, tier: dict[str, Tier], row: int, heads: slice, count: int,
        x: Tensor) -> None:
    """Store x [heads, n, dim] after the `count` tokens that a row already has."""
    before, after = store.spans(side, count), store.spans(side, count + x.shape[1])
    if "sinks" in tier:
        taken = after["sinks"].end - before["sinks"].end
        tier["sinks"].write(row, heads, before["sinks"].end, x[:, :taken])
        x = x[:, taken:]
    queued = max(0, count - store.sinks)           # number of the first token of x in the queue
    start, end = max(before["body"].end, after["body"].start), after["body"].end
    if "body" in tier and end > start:
        leaving = x[:, max(0, start - queued) : max(0, end - queued)]
        if start < queued:                         # those that have waited go first
            waited = tier["recent"].read(row, heads, Span(start, min(end, queued)))
            leaving = torch.cat([waited, leaving], 1)
        tier["body"].write(row, heads, start, leaving)
    if "recent" in tier:
        start = max(after["recent"].start, queued)
        tier["recent"].write(row, heads, start, x[:, start - queued :])


def crop(store: Store, dims: tuple[int, int], dtype: torch.dtype, planes: list[Tensor],
         before: Tensor, after: Tensor) -> None:
    """Make heads that were given `before` tokens end after `after` of them, int64 [layers, batch,
    heads]; nothing may have been dropped from the store yet.

    Tokens of the body that the shorter head holds in its recent tier are decoded and put there.
    """
    every = named(store.planes(dims, dtype), planes, range(planes[0].shape[0]))
    counts = torch.stack([before, after], -1).transpose(0, 1).flatten(1, 2).tolist()
    for side, dim in zip(SIDES, dims, strict=True):
        own = tiers(store, side, every, dim, dtype)
        for row, heads in enumerate(counts if "recent" in own else ()):
            for (n, m), run in groupby(range(len(heads)), key=lambda h: tuple(heads[h])):
                first, *rest = run
                where = slice(first, first + 1 + len(rest))
                old, new = store.spans(side, n), store.spans(side, m)
                back = Span(new["recent"].start, min(old["body"].end, new["recent"].end))
                if back.end > back.start:
                    x = own["body"].read(row, where, back)
                    own["recent"].write(row, where, back.start, x)
    planes[0].copy_(after)
