"""KVCache: the planes of every layer, allocated by pages, behind transformers' Cache interface."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvcompile.errors import CacheFullError, KVCompileError
from kvcompile.format import PAGE
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


class KVCache(Cache):
    """The compressed KV cache of one batch of sequences.

    `get_seq_length()` counts input columns, padding included; padding is never stored. Rows of a
    batch may hold different numbers of tokens. `copy.deepcopy` gives an independent cache.
    """

    is_compileable = False

    def __init__(self, sites: tuple[Site, ...], recipe: str, owner: str,
                 max_length: int | None = None) -> None:
        super().__init__(layers=[])
        self.sites, self.recipe, self.owner, self.max_length = sites, recipe, owner, max_length
        self.reset()

    # ---- what is in it -------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that have been given to the cache, padding included."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """`max_length`, or -1 if the cache may grow."""
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._columns + query_length, 0

    def __len__(self) -> int:
        return len(self.sites)

    def __repr__(self) -> str:
        return (f"KVCache({self.recipe!r}, {len(self.sites)} layers, {self._columns} tokens, "
                f"{self.nbytes} bytes)")

    @property
    def batch_size(self) -> int:
        return len(self.rows) if self.stores else -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.stores)

    @property
    def is_croppable(self) -> bool:
        return not any(s.store.first(n) for s in self.sites for n in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes: pages, page tables and counts."""
        return sum(p.nbytes for layer in self.stores for p in layer.planes)

    def stored_tokens(self, layer: int) -> Tensor:
        """int64 [batch, kv heads]: how many tokens the layer holds."""
        site = self.sites[layer]
        kept = [site.store.stored(n) for n in self.rows]
        return torch.tensor(kept, dtype=torch.int64)[:, None].expand(-1, site.heads).clone()

    def positions(self, layer: int) -> Tensor:
        """int64 [batch, kv heads, most tokens of a row]: their position ids, oldest first; -1 pads."""
        site = self.sites[layer]
        numbers = [site.store.numbers(n) for n in self.rows]
        most = max(map(len, numbers), default=0)
        out = torch.full((len(self.rows), site.heads, most), -1, dtype=torch.int64)
        for row, kept in enumerate(numbers):
            own = self._positions[row, : self._columns][self._valid[row, : self._columns]]
            out[row, :, : len(kept)] = own[torch.tensor(kept, dtype=torch.int64)]
        return out

    # ---- what a forward does with it -----------------------------------------------------

    def begin(self, valid: Tensor, positions: Tensor) -> list[Tensor]:
        """Make room for a call's tokens (valid, positions [B, S]); the flat planes of all layers.

        Raises CacheFullError before anything is changed, and KVCompileError for another batch size.
        """
        batch, tokens = valid.shape
        if self._torn:
            raise KVCompileError("the cache was left half-written by an interrupted call; "
                                 "reset() it or start a new one")
        if self.stores and batch != len(self.rows):
            raise KVCompileError(f"the cache holds a batch of {len(self.rows)}, the call has "
                                 f"{batch} rows")
        if self.max_length is not None and self._columns + tokens > self.max_length:
            raise CacheFullError(f"{self._columns} cached and {tokens} new tokens exceed "
                                 f"max_length={self.max_length}")
        if not self.stores:
            self.rows = [0] * batch
            self.stores = [Layer(s, batch, valid.device) for s in self.sites]
            self._valid = torch.zeros(batch, 0, dtype=torch.bool)
            self._positions = torch.zeros(batch, 0, dtype=torch.int32)
        self._new = valid.sum(1).tolist()
        counts = [max(n + m, self.max_length or 0)
                  for n, m in zip(self.rows, self._new, strict=True)]
        for layer in self.stores:
            layer.reserve(counts)
        self._note(valid, positions)
        self._torn = True
        return [p for layer in self.stores for p in layer.planes]

    def commit(self, tokens: int) -> None:
        """The call's tokens have been stored."""
        self.rows = [n + m for n, m in zip(self.rows, self._new, strict=True)]
        self._columns += tokens
        self._torn = False

    def rollback(self) -> None:
        """The call stored nothing that counts: every layer's count is put back."""
        for layer in self.stores:
            count = torch.tensor(self.rows, dtype=torch.int32)[:, None]
            layer.planes[0].copy_(count.expand_as(layer.planes[0]))
        self._torn = False

    def _note(self, valid: Tensor, positions: Tensor) -> None:
        """Remember the columns' validity and positions, for `positions` and `crop`."""
        end = self._columns + valid.shape[1]
        if end > self._valid.shape[1]:
            grown = max(end, 2 * self._valid.shape[1], PAGE) - self._valid.shape[1]
            self._valid = torch.nn.functional.pad(self._valid, (0, grown))
            self._positions = torch.nn.functional.pad(self._positions, (0, grown))
        self._valid[:, self._columns : end] = valid
        self._positions[:, self._columns : end] = positions

    def same_columns(self, mask: Tensor) -> bool:
        """Whether `mask` [B, columns] agrees with the padding that the cache was given."""
        return torch.equal(mask.bool().cpu(), self._valid[:, : self._columns])

    # ---- transformers' operations --------------------------------------------------------

    def reset(self) -> None:
        """Empty the cache and free its planes."""
        self.stores: list[Layer] = []
        self.rows: list[int] = []
        self._new: list[int] = []
        self._columns = 0
        self._torn = False
        self._valid = torch.zeros(0, 0, dtype=torch.bool)
        self._positions = torch.zeros(0, 0, dtype=torch.int32)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` columns; a positive number is the length to keep.

        Dense tiers crop exactly; of a quantized block that is cut, the kept tokens go back to the
        recent tier as they were decoded. Refused once tokens have been evicted.
        """
        keep = tokens_to_remove if tokens_to_remove > 0 else self._columns + tokens_to_remove
        if keep >= self._columns:
            return
        if keep < 0:
            raise KVCompileError(f"crop({tokens_to_remove}): the cache holds {self._columns} "
                                 "columns")
        if keep == 0:
            self.reset()
            return
        counts = self._valid[:, :keep].sum(1).tolist()
        for layer in self.stores:
            store = layer.site.store
            if any(store.first(n) for n in self.rows):
                raise KVCompileError(f"crop({tokens_to_remove}): layer {layer.site.layer} has "
                                     "already dropped tokens, which cannot come back")
        from kvcompile.registry import module

        for layer in self.stores:
            module("kernels", "pages").crop(layer.site.store, layer.site.dims, layer.site.dtype,
                                            layer.planes, self.rows, counts)
        self.rows, self._columns = counts, keep
        self.rollback()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order, repeated ones copied."""
        rows = torch.as_tensor(indices).tolist()
        if not self.stores:
            return
        for layer in self.stores:
            layer.select(rows)
        self.rows = [self.rows[r] for r in rows]
        self._valid, self._positions = self._valid[rows], self._positions[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on from what row beam_idx[i] holds."""
        rows = beam_idx.tolist()
        if rows != list(range(len(self.rows))):
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Assisted decoding crops what it must take back; nothing needs to be recorded."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise KVCompileError("this cache belongs to an optimized model; pass it to that model's "
                             "forward or generate()")

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        new = copy.copy(self)
        memo[id(self)] = new
        new.stores = []
        for layer in self.stores:
            twin = copy.copy(layer)
            twin.planes = [p.clone() for p in layer.planes]
            twin.pages = {key: list(n) for key, n in layer.pages.items()}
            new.stores.append(twin)
        new.rows, new._new = list(self.rows), list(self._new)
        new._valid, new._positions = self._valid.clone(), self._positions.clone()
        return new
