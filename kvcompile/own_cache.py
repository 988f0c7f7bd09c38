"""OwnCache: the KVCache of an optimized model, which knows padding, positions and failures."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompile.cache import KVCache
from kvcompile.errors import CacheFullError, KVCompileError
from kvcompile.format import PAGE
from kvcompile.planes import Group
from kvcompile.registry import module
from kvcompile.rule import Rule
from kvcompile.site import Site, groups


class OwnCache(KVCache):
    """Filled by an optimized model's graphs between `begin` and `commit` or `rollback`.

    `get_seq_length()` counts input columns, padding included; padding is never stored, so rows of
    a batch may hold different numbers of tokens.
    """

    is_compileable = False

    def __init__(self, sites: tuple[Site, ...], recipe: str, owner: str,
                 max_length: int | None = None) -> None:
        super(KVCache, self).__init__(layers=[])
        self._rows: list[int] = []
        self._new: list[int] = []
        self._torn = False
        self.recipe, self.owner, self.max_length = recipe, owner, max_length
        self._sites = sites
        self.windows = [s.window for s in sites]
        self.plan_stores = [s.store for s in sites]
        self.reset()

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._sites

    @property
    def rows(self) -> list[int]:
        return self._rows

    @property
    def new(self) -> list[int]:
        """Tokens that the last call gave to each row."""
        return self._new

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._columns + query_length, 0

    def _position_ids(self, row: int) -> Tensor:
        return self._ids[row, : self._columns][self._valid[row, : self._columns]]

    def begin(self, valid: Tensor, positions: Tensor) -> list[Tensor]:
        """Make room for a call's tokens (valid, positions [B, S]); the planes of all groups, flat,
        and, where keys are rotated at read and some are stored, their position ids by number.

        Raises CacheFullError before anything is changed, and KVCompileError for another batch size.
        """
        batch, tokens = valid.shape
        if self._torn:
            raise KVCompileError("the cache was left half-written by an interrupted call; "
                                 "reset() it or start a new one")
        if self.groups and batch != self._batch:
            raise KVCompileError(f"the cache holds a batch of {self._batch}, the call has "
                                 f"{batch} rows")
        if self.max_length is not None and self._columns + tokens > self.max_length:
            raise CacheFullError(f"{self._columns} cached and {tokens} new tokens exceed "
                                 f"max_length={self.max_length}")
        if not self.groups:
            self._batch, self._rows = batch, [0] * batch
            self.groups = [Group([self._sites[i] for i in layers], batch, valid.device)
                           for layers in groups(self._sites)]
            self._valid = torch.zeros(batch, 0, dtype=torch.bool)
            self._ids = torch.zeros(batch, 0, dtype=torch.int32)
        self._new = valid.sum(1).tolist()
        counts = [max(n + m, self.max_length or 0)
                  for n, m in zip(self._rows, self._new, strict=True)]
        for group in self.groups:
            if not group.site.rule:
                group.reserve(counts)
            elif self._columns:  # a prompt's tokens are stored when it is known which
                self._reserve(group, group.counts + torch.tensor(self._new)[:, None])
        self._note(valid, positions)
        self._torn = True
        planes = [p for group in self.groups for p in group.planes]
        if self._columns and any(site.rotated for site in self._sites):
            planes.append(self._positions_by_number().to(valid.device))
        return planes

    def commit(self, tokens: int) -> None:
        """The call's tokens have been stored."""
        self._rows = [n + m for n, m in zip(self._rows, self._new, strict=True)]
        self._columns += tokens
        self._torn = False

    def rollback(self) -> None:
        """The call stored nothing that counts: a prompt's cache is emptied."""
        if self._columns:  # such a call stores nothing in any layer
            self._torn = False
        else:
            self.reset()

    def _reserve(self, group: Group, counts: Tensor) -> None:
        """Have pages for these tokens, and with `max_length` for those that may follow."""
        if self.max_length:
            most = counts + (self.max_length - self._columns - max(self._new))
            if group.site.store.slots:  # a head is brought back to its limit before it has more
                slack = max(PAGE, *(Rule.parse(s.rule).every for s in group.sites))
                most = most.minimum(group.plane("limit").long().cpu() + slack)
            counts = counts.maximum(most)
        group.reserve(counts)

    def store(self, kept: Sequence[Sequence[Tensor]], append: Callable[..., None], tokens: int,
              whole: Sequence[int] = ()) -> None:
        """Store what the layers with a rule keep of a prompt of so many columns (K, V, columns and
        scores of each, as kvc.keep gives them, and kvc.score's measures), by `append`, which is
        kvc.append's. `whole`: the tokens of each row's prompt, of which these are the first piece.
        """
        given = dict(zip((s.layer for s in self._sites if s.rule), kept, strict=True))
        self._prompt = tokens
        for group in (g for g in self.groups if g.site.rule):
            site = group.site
            store, places = group.store, [given[s.layer][2] for s in group.sites]
            counts = torch.stack([(at >= 0).sum(-1) for at in places]).cpu()
            if store.slots:
                budgets = [Rule.parse(s.rule).budgeter for s in group.sites]
                measures = [given[s.layer][4].tolist() for s in group.sites]
                group.plane("limit").copy_(torch.tensor([
                    [(b.told(m) if whole else b).limit(n, m, told)
                     for n, m, told in zip(own, whole or self._new, each, strict=True)]
                    for b, own, each in zip(budgets, counts.tolist(), measures, strict=True)]))
            self._reserve(group, counts)
            for slot, (own, at) in enumerate(zip(group.sites, places, strict=True)):
                k, v, _, scores, _, *rest = given[own.layer]
                ids = self._ids[:, None, :tokens].expand(-1, site.heads, -1).to(at.device).gather(
                    2, at.clamp(min=0).long())
                append(group.planes, [k], [v], ids, at >= 0, store=str(store), slots=[slot])
                if store.slots:
                    module("kernels", "evict").fill(store, site.dims, site.dtype, group.planes,
                                                    slot, at, ids, scores)
                for name, x in zip(("k", "v", "count") if rest else (), rest, strict=True):
                    group.plane(f"rest_{name}")[slot] = x
                self._kept[own.layer] = at.cpu()

    def _held(self, layer: int) -> list[list[Tensor]]:
        site = self.sites[layer]
        if site.owner is not None:
            return self._held(site.owner)
        if site.store.slots:
            group = next(g for g in self.groups if site in g.sites)
            flat = module("kernels", "evict").slot_positions(
                group.store, site.dims, site.dtype, group.planes, group.sites.index(site))
            return [flat[i : i + site.heads] for i in range(0, len(flat), site.heads)]
        if not site.rule:
            return super()._held(layer)
        out = []
        for row, heads in enumerate(self._kept[layer]):
            later = self._valid[row, self._prompt : self._columns].nonzero().flatten()
            out.append([self._ids[row, torch.cat([at[at >= 0].long(), later + self._prompt])]
                        .long() for at in heads])
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """As KVCache's; of a prompt of which only some tokens were kept, nothing comes back."""
        keep = tokens_to_remove if tokens_to_remove > 0 else self._columns + tokens_to_remove
        ruled = next((s for s in self._sites if s.rule), None) if self.groups else None
        if ruled and 0 < keep < self._columns and (ruled.store.slots or keep < self._prompt):
            what = ("put its tokens in another order" if ruled.salient else
                    "dropped tokens, which cannot come back")
            raise KVCompileError(
                f"crop({tokens_to_remove}): layer {ruled.layer} has already {what}")
        super().crop(tokens_to_remove)

    def _note(self, valid: Tensor, positions: Tensor) -> None:
        """Remember the columns' validity and positions, for `positions` and `crop`."""
        end = self._columns + valid.shape[1]
        if end > self._valid.shape[1]:
            grown = max(end, 2 * self._valid.shape[1], PAGE) - self._valid.shape[1]
            self._valid = torch.nn.functional.pad(self._valid, (0, grown))
            self._ids = torch.nn.functional.pad(self._ids, (0, grown))
        self._valid[:, self._columns : end] = valid
        self._ids[:, self._columns : end] = positions
        self._last = valid.shape[1]

    def _positions_by_number(self) -> Tensor:
        """int64 [B, N]: the position ids of a call's tokens and of all before them, by number."""
        end = self._columns + self._last
        rows = [ids[:end][valid[:end]].long()
                for ids, valid in zip(self._ids, self._valid, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def same_columns(self, mask: Tensor) -> bool:
        """Whether `mask` [B, columns] agrees with the padding that the cache was given."""
        return torch.equal(mask.bool().cpu(), self._valid[:, : self._columns])

    def reset(self) -> None:
        super().reset()
        self._rows, self._new = [], []
        self._torn = False
        self._kept: dict[int, Tensor] = {}  # columns [B, H, S'] that were stored of the prompt
        self._prompt = 0                    # the prompt's columns
        self._valid = torch.zeros(0, 0, dtype=torch.bool)
        self._ids = torch.zeros(0, 0, dtype=torch.int32)

    def _shorten(self, columns: int) -> None:
        self._columns = columns
        self._rows = self._valid[:, :columns].sum(1).tolist()

    def _select(self, rows: list[int]) -> None:
        super()._select(rows)
        self._rows = [self._rows[r] for r in rows]
        self._valid, self._ids = self._valid[rows], self._ids[rows]
        self._kept = {layer: at[rows] for layer, at in self._kept.items()}

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise KVCompileError("this cache belongs to an optimized model; pass it to that model's "
                             "forward or generate(), or make a KVCache(config, recipe)")

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        new = super().__deepcopy__(memo)
        assert isinstance(new, OwnCache)
        new._rows, new._new = list(self._rows), list(self._new)
        new._kept = dict(self._kept)
        new._valid, new._ids = self._valid.clone(), self._ids.clone()
        return new
