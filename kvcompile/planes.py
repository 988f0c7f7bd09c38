"""The planes that alike layers share: pools of pages and tables, grown and laid out anew."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.format import PAGE
from kvcompile.site import Site

SLACK = 8  # a tier that must grow while decoding grows by an eighth more


class Group:
    """The planes of alike layers, in `Store.planes` order, and how many pages each head has.

    A layer is a slot of the count [layers, batch, heads] and of the tables [layers, batch, heads,
    pages]; all layers share the pools. The pages of a head lie together in a pool, head by head,
    row by row and layer by layer; tables say so to the kernels. `pages` is, for every tier, int64
    [layers, batch, heads], 0 where a slot's tier is another one's: its table then names that one's
    pages.
    """

    def __init__(self, sites: Sequence[Site], batch: int, device: torch.device) -> None:
        self.sites, self.site, self.store = tuple(sites), sites[0], sites[0].layout
        self.specs = self.store.planes(self.site.dims, self.site.dtype)
        self.planes: list[Tensor] = []
        places = (len(sites), batch, self.site.heads)
        for spec in self.specs:
            last = (0,) if spec.name.endswith(".table") else (spec.each,) if spec.each else ()
            shape = (0, *spec.shape) if spec.shape else (*places, *last)
            self.planes.append(torch.zeros(shape, dtype=spec.dtype, device=device))
        if self.store.constants:
            rows = torch.tensor([site.store.numbers_apart for site in sites])
            self.plane("constants").copy_(rows[:, None, None])
        keys = dict.fromkeys(name.rpartition(".")[0] for name, *_ in self.specs)
        self.pages = {key: torch.zeros(places, dtype=torch.int64) for key in keys if key}
        slots = {site.layer: slot for slot, site in enumerate(sites)}
        self._lent = {key: {slot: slots[dict(site.lent)[key]] for slot, site in enumerate(sites)
                            if key in dict(site.lent)} for key in self.pages}
        self._least = {key: [0] * batch for key in self.pages}

    def reserve(self, counts: Sequence[int] | Tensor) -> None:
        """Have pages for these numbers of tokens; exactly those at first, later some to spare.

        `counts` has an entry for a row, or is int [layers, batch, heads]. Growing copies the
        tier's pools, one plane at a time.
        """
        store, rows = self.store, None if isinstance(counts, Tensor) else counts
        if rows is not None and all(
                store.pages(*key.split("."), n) <= least  # type: ignore[call-arg, arg-type]
                for key, each in self._least.items() for n, least in zip(rows, each, strict=True)):
            return
        counts = torch.as_tensor(counts, device="cpu").long()
        numbers, which = (counts[:, None] if rows else counts).unique(return_inverse=True)
        for key, have in self.pages.items():
            side, tier = key.split(".")
            each = torch.tensor([store.pages(side, tier, n) for n in numbers.tolist()])
            need = each[which].expand_as(have).clone()
            need[[*self._lent[key]]] = 0
            if bool((have >= need).all()):
                continue
            if bool(have.any()):
                ring = store.ring(side, tier)
                most = need.max() * 2 if ring is None else torch.tensor(ring // PAGE)
                need = torch.maximum(have, torch.minimum(need + need // SLACK, most))
            self._lay(key, list(range(have.shape[1])), need)

    def plane(self, name: str) -> Tensor:
        """The plane of this name."""
        return self.planes[[spec.name for spec in self.specs].index(name)]

    @property
    def counts(self) -> Tensor:
        """int64 [layers, batch, heads] on the host: tokens that each head has been given, less
        those that were evicted."""
        return self.planes[0].long().cpu()

    def copy(self) -> "Group":
        """An independent group that holds the same."""
        twin = copy.copy(self)
        twin.planes = [p.clone() for p in self.planes]
        twin.pages, twin._least = dict(self.pages), dict(self._least)
        return twin

    def select(self, rows: list[int]) -> None:
        """Keep these rows of the batch, in this order; pages of a row taken twice are copied."""
        for key, have in self.pages.items():
            self._lay(key, rows, have[:, rows])
        order = torch.tensor(rows, device=self.planes[0].device)
        for i, spec in enumerate(self.specs):
            if "." not in spec.name:
                self.planes[i] = self.planes[i].index_select(1, order)

    def _lay(self, key: str, rows: list[int], pages: Tensor) -> None:
        """Lay a tier out anew: row i becomes what rows[i] was, with pages [layers, rows, heads]."""
        own = [i for i, spec in enumerate(self.specs) if spec.name.startswith(f"{key}.")]
        table = next(i for i in own if not self.specs[i].shape)
        old, device = self.planes[table][:, rows], self.planes[table].device
        width = int(pages.max()) if pages.numel() else 0
        at = torch.arange(width, device=device)
        pages, had = pages.to(device), self.pages[key][:, rows].to(device)
        starts = (pages.flatten().cumsum(0) - pages.flatten()).view_as(pages)
        new = torch.where(at < pages[..., None], starts[..., None] + at, 0)
        for slot, lender in self._lent[key].items():
            new[slot] = new[lender]
        kept = at < torch.minimum(pages, had)[..., None]
        old = torch.nn.functional.pad(old, (0, max(0, width - old.shape[-1])))[..., :width]
        for i in own:
            if i == table:
                self.planes[i] = new.to(old.dtype)
                continue
            pool = self.planes[i].new_zeros(int(pages.sum()), *self.planes[i].shape[1:])
            for layer, mine in enumerate(kept):  # what is copied lies twice in memory
                pool[new[layer][mine]] = self.planes[i][old[layer][mine].long()]
            self.planes[i] = pool
        self.pages[key] = pages.cpu()
        stored = [slot for slot in range(len(pages)) if slot not in self._lent[key]]
        self._least[key] = pages[stored].amin((0, 2)).tolist()
