"""KVCache: a compressed cache behind transformers' Cache interface, for models that take one."""

import copy
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from kvcompile.errors import CacheFullError, KVCompileError
from kvcompile.plan import plan
from kvcompile.planes import Group
from kvcompile.recipe import Recipe
from kvcompile.registry import module
from kvcompile.site import Site
from kvcompile.store import AXES, Store

_NUMBERS = count(1)
_LIVE: "WeakValueDictionary[int, KVCache]" = WeakValueDictionary()


class KVCache(Cache):
    """A compressed KV cache that a transformers model fills through `update`.

    config      the model's config, for the number of layers and their own windows
    recipe      how to store K and V
    max_length  tokens for which pages are allocated at the first call; more raise CacheFullError

    Without a compiler each call decodes what is stored and the model attends as it likes: right,
    but slow. Compiled with backend="kvcompile" the model attends to the stored form directly. Here
    padding is stored, and masked by the model, as in transformers' own caches; `optimize` stores
    none. `copy.deepcopy` gives an independent cache.
    """

    def __init__(self, config: PreTrainedConfig, recipe: str | Recipe = "full", *,
                 max_length: int | None = None) -> None:
        super().__init__(layers=[])
        self._batch = 0
        types, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        odd = sorted(set(types) - {"full_attention", "sliding_attention"})
        if odd:
            raise KVCompileError(f"{config.model_type} has layers of type {', '.join(odd)}; "
                                 "KVCache stores full and sliding-window attention")
        self.recipe, self.max_length, self.owner = str(Recipe.parse(recipe)), max_length, ""
        self.windows = [o.get("sliding_window") or 0 for o in options]
        settings = plan(recipe, len(types))
        if beyond := {axis: p.origin[axis] for p in settings for axis in p.values
                      if axis not in AXES}:
            axis, term = min(beyond.items())
            raise KVCompileError(f"{term}: {axis} changes the model's graph, which a KVCache by "
                                 "itself cannot; use kvcompile.optimize")
        self.plan_stores = [Store.of(p.values, w)
                            for p, w in zip(settings, self.windows, strict=True)]
        for own in set(self.windows):
            same = {(s.sinks, s.window, s.grain) for s, w in
                    zip(self.plan_stores, self.windows, strict=True) if w == own}
            if len(same) > 1:
                raise KVCompileError(f"{recipe}: layers that share a mask keep different tokens; "
                                     "only kvcompile.optimize can do that")
        self._register()
        self.reset()

    def _register(self) -> None:
        """Give the cache a handle: graphs name it by a tensor, so that they fit any cache."""
        number = next(_NUMBERS)
        _LIVE[number] = self
        self._handle = torch.tensor(number)

    # ---- what is in it -------------------------------------------------------------------

    @property
    def sites(self) -> tuple[Site, ...]:
        """The layers that hold something."""
        return tuple(site for group in self.groups for site in group.sites)

    @property
    def rows(self) -> list[int]:
        """Tokens that each row of the batch has been given."""
        return [self._columns] * self._batch

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that have been given to the cache, padding included."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """`max_length`, or -1 if the cache may grow."""
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(columns of K that a call sees, column of the first one)."""
        kept = self.plan_stores[layer_idx].stored(self._columns)
        return kept + query_length, self._columns - kept

    def __len__(self) -> int:
        return len(self.plan_stores)

    def __repr__(self) -> str:
        return (f"KVCache({self.recipe!r}, {len(self)} layers, {self._columns} tokens, "
                f"{self.nbytes} bytes)")

    @property
    def batch_size(self) -> int:
        return self._batch if self.groups else -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.groups)

    @property
    def is_compileable(self) -> bool:  # transformers compiles only with caches of fixed size
        return self.max_length is not None

    @property
    def is_sliding(self) -> list[bool]:
        return [bool(w) for w in self.windows]

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_croppable(self) -> bool:
        return not any(s.store.first(n) for s in self.sites for n in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes: pages, page tables and counts."""
        return sum(p.nbytes for group in self.groups for p in group.planes)

    def stored_tokens(self, layer: int) -> Tensor:
        """int64 [batch, kv heads]: how many tokens the layer holds."""
        site, counts = self.sites[layer], self._counts(layer)
        return counts.apply_(site.store.stored) if site.store.window else counts

    def _counts(self, layer: int) -> Tensor:
        """int64 [batch, kv heads]: the count of a layer."""
        layer = self.sites[layer].place[0]
        group = next(g for g in self.groups if any(s.layer == layer for s in g.sites))
        return group.counts[[s.layer for s in group.sites].index(layer)]

    def positions(self, layer: int, by_slot: bool = False) -> Tensor:
        """int64 [batch, kv heads, most tokens of a head]: position ids, oldest first; -1 fills.

        `by_slot`: in the order in which the tokens are stored, which eviction may change.
        """
        held = self._held(layer)
        if self.sites[layer].store.slots and not by_slot:
            held = [[ids.sort().values for ids in row] for row in held]
        most = max((len(p) for row in held for p in row), default=0)
        out = torch.full((len(held), self.sites[layer].heads, most), -1, dtype=torch.int64)
        for row, heads in enumerate(held):
            for head, ids in enumerate(heads):
                out[row, head, : len(ids)] = ids
        return out

    def _held(self, layer: int) -> list[list[Tensor]]:
        """The position ids that a layer's heads hold, oldest first, row by row."""
        site = self.sites[layer]
        return [[self._position_ids(row)[torch.tensor(site.store.numbers(n), dtype=torch.long)]]
                * site.heads for row, n in enumerate(self.rows)]

    def _position_ids(self, row: int) -> Tensor:
        """Position ids of the tokens that a row has been given, by number."""
        return torch.arange(self._columns)

    # ---- filled by a model's own code ----------------------------------------------------

    @staticmethod
    def of(handle: Tensor) -> "KVCache":
        """The cache whose handle this is."""
        return _LIVE[int(handle)]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any,
               **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store k [B, H, S, Dk] and v [B, H, S, Dv]; K and V that this call sees, decoded."""
        tokens = key_states.shape[2]
        seen, _ = self.get_mask_sizes(tokens, layer_idx)
        k, v = torch.ops.kvc.update(self._handle, key_states, value_states, length=seen,
                                    layer=layer_idx)
        if layer_idx == len(self.plan_stores) - 1:
            self._columns += tokens
        return k, v

    def room(self, k: Tensor, v: Tensor, layer_idx: int) -> Group:
        """The layer's planes, with pages for the tokens of k and v; made at its first call."""
        batch, heads, tokens, _ = k.shape
        if self.max_length is not None and self._columns + tokens > self.max_length:
            raise CacheFullError(f"{self._columns} cached and {tokens} new tokens exceed "
                                 f"max_length={self.max_length}")
        if self.groups and batch != self._batch:
            raise KVCompileError(f"the cache holds a batch of {self._batch}, the call has {batch} "
                                 "rows")
        self._batch = batch
        if layer_idx == len(self.groups):
            site = Site(layer_idx, heads, heads, (k.shape[3], v.shape[3]), k.dtype,
                        self.windows[layer_idx], self.plan_stores[layer_idx])
            self.groups.append(Group([site], batch, k.device))  # of its own: layers come one by one
        group = self.groups[layer_idx]
        group.reserve([max(self._columns + tokens, self.max_length or 0)] * batch)
        return group

    # ---- transformers' operations --------------------------------------------------------

    def reset(self) -> None:
        """Empty the cache and free its planes."""
        self.groups: list[Group] = []
        self._batch = self._columns = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` columns; a positive number is the length to keep.

        Dense tiers crop exactly; of a quantized block that is cut, the kept tokens go back to the
        recent tier as they were decoded. Refused once tokens have been evicted.
        """
        keep = tokens_to_remove if tokens_to_remove > 0 else self._columns + tokens_to_remove
        if keep >= self._columns:
            return
        if keep < 0:
            raise KVCompileError(f"crop({tokens_to_remove}): the cache holds only {self._columns} "
                                 "columns")
        if keep == 0:
            self.reset()
            return
        for site in self.sites:
            if any(site.store.first(n) for n in self.rows):
                raise KVCompileError(f"crop({tokens_to_remove}): layer {site.layer} has already "
                                     "dropped tokens, which cannot come back")
        before = self.rows
        self._shorten(keep)
        gone = torch.tensor([n - m for n, m in zip(before, self.rows, strict=True)])
        for group in self.groups:
            site, counts = group.site, group.counts
            module("kernels", "pages").crop(group.store, site.dims, site.dtype, group.planes,
                                            counts, counts - gone[:, None])

    def _shorten(self, columns: int) -> None:
        self._columns = columns

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order, repeated ones copied."""
        rows = torch.as_tensor(indices).tolist()
        if self.groups:
            for group in self.groups:
                group.select(rows)
            self._select(rows)

    def _select(self, rows: list[int]) -> None:
        self._batch = len(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on from what row beam_idx[i] holds."""
        if beam_idx.tolist() != list(range(self._batch)):
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.batch_select_indices(torch.arange(self._batch).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Assisted decoding crops what it must take back; nothing needs to be recorded."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        new = copy.copy(self)
        memo[id(self)] = new
        if hasattr(self, "_handle"):
            new._register()
        new.groups = []
        for group in self.groups:
            new.groups.append(group.copy())
        return new
