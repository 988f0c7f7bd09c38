"""One layer's planes: pools of pages and their tables, grown and rearranged by the runtime."""

import torch
from torch import Tensor

from kvcompile.program import Site
from kvcompile.store import SIDES

SLACK = 8  # pools that must grow while decoding grow by at least an eighth


class Layer:
    """One layer's planes, in `Store.planes` order, and how many pages each row has of each tier."""

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
        """Have pages for rows of these token counts; pools grow exactly at first, then by slack."""
        for (side, tier), have in self.pages.items():
            need = [max(h, self.site.store.pages(side, tier, n))
                    for h, n in zip(have, counts, strict=True)]
            if need != have:
                self._grow(side, tier, have, need)
                self.pages[side, tier] = need

    def _grow(self, side: str, tier: str, have: list[int], need: list[int]) -> None:
        prefix, heads = f"{side}.{tier}.", self.site.heads
        used, total = heads * sum(have), heads * sum(need)
        for i, spec in enumerate(self.specs):
            old = self.planes[i]
            if not spec.name.startswith(prefix):
                continue
            if spec.shape:
                if old.shape[0] < total:
                    size = max(total, old.shape[0] + old.shape[0] // SLACK)
                    self.planes[i] = old.new_zeros(size, *old.shape[1:])
                    self.planes[i][: old.shape[0]] = old
                continue
            if max(need) > old.shape[2]:
                self.planes[i] = old.new_zeros(*old.shape[:2], max(need))
                self.planes[i][:, :, : old.shape[2]] = old
            for row, (h, n) in enumerate(zip(have, need, strict=True)):
                ids = torch.arange(used, used + heads * (n - h), dtype=old.dtype)
                self.planes[i][row, :, h:n] = ids.view(heads, n - h).to(old.device)
                used += heads * (n - h)

    def select(self, rows: list[int]) -> None:
        """Keep these rows of the batch, in this order; pages of a row taken twice are copied."""
        for (side, tier), have in self.pages.items():
            prefix, need = f"{side}.{tier}.", [have[r] for r in rows]
            table = next(i for i, s in enumerate(self.specs) if s.name == prefix + "table")
            old = self.planes[table]
            used = torch.cat([old[r, :, : have[r]].reshape(-1) for r in rows]).long()
            for i, spec in enumerate(self.specs):
                if spec.name.startswith(prefix) and spec.shape:
                    self.planes[i] = self.planes[i].index_select(0, used)
            self.planes[table] = old.new_zeros(len(rows), old.shape[1], max(need, default=0))
            at = 0
            for row, n in enumerate(need):
                ids = torch.arange(at, at + old.shape[1] * n, dtype=old.dtype, device=old.device)
                self.planes[table][row, :, :n] = ids.view(old.shape[1], n)
                at += ids.numel()
            self.pages[side, tier] = need
        self.planes[0] = self.planes[0][torch.tensor(rows, device=self.planes[0].device)]
