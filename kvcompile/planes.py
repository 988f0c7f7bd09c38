"""One layer's planes: pools of pages and their tables, grown and rearranged by the runtime."""

import torch
from torch import Tensor

from kvcompile.format import PAGE
from kvcompile.program import Site
from kvcompile.store import SIDES

SLACK = 8  # a tier that must grow while decoding grows by an eighth more


class Layer:
    """One layer's planes, in `Store.planes` order, and how many pages each row has of each tier.

    The pages of a row lie together in the pool, head by head; tables say so to the kernels.
    """

    def __init__(self, site: Site, batch: int, device: torch.device) -> None:
        self.site = site
        self.specs = site.store.planes(site.dims, site.dtype)
        self.planes: list[Tensor] = []
        for spec in self.specs:
            shape: tuple[int, ...] = (0, *spec.shape)
            if not spec.shape:
                shape = (batch, site.heads) if spec.name == "count" else (batch, site.heads, 0)
            self.planes.append(torch.zeros(shape, dtype=spec.dtype, device=device))
        self.pages = {(s, t): [0] * batch for s in SIDES for t in site.store.tiers(s)}

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
        self.planes[0] = self.planes[0][torch.tensor(rows, device=self.planes[0].device)]

    def _lay(self, side: str, tier: str, rows: list[int], pages: list[int]) -> None:
        """Lay a tier out anew: row i becomes what rows[i] was, with pages[i] pages a head."""
        have, heads, prefix = self.pages[side, tier], self.site.heads, f"{side}.{tier}."
        starts = [heads * sum(have[:row]) for row in range(len(have))]
        for i, spec in enumerate(self.specs):
            old = self.planes[i]
            if not spec.name.startswith(prefix):
                continue
            if spec.shape:
                new, at = old.new_zeros(heads * sum(pages), *old.shape[1:]), 0
                for row, n in zip(rows, pages, strict=True):
                    source = old[starts[row] : starts[row] + heads * have[row]]
                    kept = min(n, have[row])
                    new[at : at + heads * n].unflatten(0, (heads, n))[:, :kept] = (
                        source.unflatten(0, (heads, have[row]))[:, :kept])
                    at += heads * n
            else:
                new, at = old.new_zeros(len(rows), heads, max(pages, default=0)), 0
                for row, n in enumerate(pages):
                    ids = torch.arange(at, at + heads * n, dtype=old.dtype, device=old.device)
                    new[row, :, :n] = ids.view(heads, n)
                    at += heads * n
            self.planes[i] = new
        self.pages[side, tier] = list(pages)
