"""The planes that alike layers share: pools of pages and tables, grown and laid out anew."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.format import PAGE, Side
from kvcompile.site import Site
from kvcompile.store import SIDES

SLACK = 8  # a tier that must grow while decoding grows by an eighth more


class Group:
    """The planes of alike layers, in `Store.planes` order, and the pages of a head in each row.

    A layer is a slot of the count [layers, batch, heads] and of the tables [layers, batch, heads,
    pages]; all layers share the pools. The pages of a layer's row lie together in a pool, head by
    head, the rows of a layer one after the other; tables say so to the kernels.
    """

    def __init__(self, sites: Sequence[Site], batch: int, device: torch.device) -> None:
        self.sites, self.site = tuple(sites), sites[0]
        self.specs = self.site.store.planes(self.site.dims, self.site.dtype)
        self.planes: list[Tensor] = []
        for spec in self.specs:
            shape: tuple[int, ...] = (0, *spec.shape)
            if not spec.shape:
                pages = () if spec.name == "count" else (0,)
                shape = (len(sites), batch, self.site.heads, *pages)
            self.planes.append(torch.zeros(shape, dtype=spec.dtype, device=device))
        self.pages = {(s, t): [0] * batch for s in SIDES for t in self.site.store.tiers(s)}

    def reserve(self, counts: list[int]) -> None:
        """Have pages for rows of these token counts; exactly those at first, later some to spare.

        Growing copies the tier's pools, one plane at a time.
        """
        for (side, tier), have in self.pages.items():
            need = [self.site.store.pages(side, tier, n) for n in counts]
            if all(h >= n for h, n in zip(have, need, strict=True)):
                continue
            if any(have):
                ring = self.site.store.ring(side, tier)
                most = max(need) * 2 if ring is None else ring // PAGE
                need = [max(h, min(n + n // SLACK, most))
                        for h, n in zip(have, need, strict=True)]
            self._lay(side, tier, list(range(len(have))), need)

    def select(self, rows: list[int]) -> None:
        """Keep these rows of the batch, in this order; pages of a row taken twice are copied."""
        for (side, tier), have in self.pages.items():
            self._lay(side, tier, rows, [have[r] for r in rows])
        order = torch.tensor(rows, device=self.planes[0].device)
        self.planes[0] = self.planes[0].index_select(1, order)

    def _lay(self, side: Side, tier: str, rows: list[int], pages: list[int]) -> None:
        """Lay a tier out anew: row i becomes what rows[i] was, with pages[i] pages a head."""
        have, layers, heads = self.pages[side, tier], len(self.sites), self.site.heads
        starts = [heads * sum(have[:row]) for row in range(len(have))]
        for i, spec in enumerate(self.specs):
            old, at = self.planes[i], 0
            if not spec.name.startswith(f"{side}.{tier}."):
                continue
            if spec.shape:
                new = old.new_zeros(layers, heads * sum(pages), *old.shape[1:])
                every = old.unflatten(0, (layers, heads * sum(have)))
                for row, n in zip(rows, pages, strict=True):
                    source = every[:, starts[row] : starts[row] + heads * have[row]]
                    kept = min(n, have[row])
                    new[:, at : at + heads * n].unflatten(1, (heads, n))[:, :, :kept] = (
                        source.unflatten(1, (heads, have[row]))[:, :, :kept])
                    at += heads * n
                new = new.flatten(0, 1)
            else:
                new = old.new_zeros(layers, len(rows), heads, max(pages, default=0))
                first = torch.arange(layers, dtype=old.dtype, device=old.device) * (
                    heads * sum(pages))
                for row, n in enumerate(pages):
                    ids = torch.arange(at, at + heads * n, dtype=old.dtype, device=old.device)
                    new[:, row, :, :n] = first[:, None, None] + ids.view(heads, n)
                    at += heads * n
            self.planes[i] = new
        self.pages[side, tier] = list(pages)
