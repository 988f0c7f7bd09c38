"""The cache's operations in any order, against a plain list of tokens for every row.

The model of a row is a list of (K, V, position id): what the store does to a token is done to its
numbers there, when the closed form of the count says so. Pages, rings, tables, growth, copies of
rows and padding exist on the other side only; what both hold must be equal, bit by bit.
"""

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcompile.checks.view import slots
from kvcompile.errors import CacheFullError, KVCompileError
from kvcompile.ir import APPEND
from kvcompile.own_cache import OwnCache
from kvcompile.site import Site
from kvcompile.store import SIDES, Store

HEADS, DIM, LAYERS, MOST = 2, 16, 2, 400
STORES = ("store", "store(k=int(bits=4, axis=channel, group=16), k_block=128, v=int(bits=2), "
          "v_lag=128)", "store(k=int, v=fp8, k_lag=3)", "store(sinks=3, window=20)",
          "store(k=scaled(of=int(bits=4)), v=int(bits=4, axis=channel), sinks=4, window=150)")


class Tokens:
    """What one layer holds of one row, said plainly."""

    def __init__(self, store):
        self.store, self.x, self.count = store, {"k": [], "v": []}, 0

    def append(self, k, v):
        for side, new in zip(SIDES, (k, v), strict=True):
            self.x[side] += list(new.unbind(1))                        # tokens [H, D]
        before, self.count = self.count, len(self.x["k"])
        for side in SIDES:
            # tokens that leave for the body are encoded, block by block
            fmt, size = self.store.side(side).format, self.store.side(side).block
            start, end = (self.store.spans(side, n)["body"].end for n in (before, self.count))
            for at in range(self.store.sinks + start, self.store.sinks + end, size):
                block = torch.stack(self.x[side][at : at + size], 1)
                back = fmt.decode(fmt.encode(block, side), DIM, torch.float32, side)
                self.x[side][at : at + size] = back.unbind(1)

    def crop(self, count):
        self.count = count
        for side in SIDES:
            del self.x[side][count:]

    def shown(self, side):
        return [self.x[side][i] for i in self.store.numbers(self.count)]


class Row:
    def __init__(self, stores):
        self.columns = []                                              # (valid, position id)
        self.layers = [Tokens(store) for store in stores]

    def ids(self):
        return [p for valid, p in self.columns if valid]


class Machine(RuleBasedStateMachine):
    """Layers of two stores, so that groups differ; every rule is one public operation."""

    @initialize(stores=st.lists(st.sampled_from(STORES), min_size=LAYERS, max_size=LAYERS),
                most=st.sampled_from([None, MOST]))
    def start(self, stores, most):
        self.stores = [Store.parse(text) for text in stores]
        sites = tuple(Site(i, HEADS, HEADS, (DIM, DIM), torch.float32, 0, store)
                      for i, store in enumerate(self.stores))
        self.cache, self.rows, self.seed = OwnCache(sites, "full", "test", most), [], 0

    def _numbers(self, tokens):
        self.seed += 1
        g = torch.Generator().manual_seed(self.seed)
        return [torch.randn(len(self.rows), HEADS, tokens, DIM, generator=g) for _ in "kv"]

    def _call(self, valid):
        """What a graph does between begin and commit."""
        at = len(self.rows[0].columns)
        positions = valid.cumsum(1) - 1 + torch.tensor([len(r.ids()) for r in self.rows])[:, None]
        self.cache.begin(valid, positions)
        for group in self.cache.groups:
            for slot, site in enumerate(group.sites):
                k, v = self._numbers(valid.shape[1])
                APPEND(group.planes, [k], [v], positions, valid, store=str(site.store),
                       slots=[slot])
                for b, row in enumerate(self.rows):
                    row.layers[site.layer].append(k[b][:, valid[b]], v[b][:, valid[b]])
        self.cache.commit(valid.shape[1])
        for b, row in enumerate(self.rows):
            row.columns += zip(valid[b].tolist(), positions[b].tolist(), strict=True)
        assert at + valid.shape[1] == len(self.rows[0].columns)

    @rule(data=st.data(), tokens=st.sampled_from([1, 1, 2, 15, 64, 127, 129]),
          batch=st.integers(1, 3))
    def append(self, data, tokens, batch):
        """A prompt, a chunk or a step; rows are padded on either side."""
        if not self.rows:
            self.rows = [Row(self.stores) for _ in range(batch)]
        valid = torch.ones(len(self.rows), tokens, dtype=torch.bool)
        for row in valid[1:]:
            pad = data.draw(st.integers(0, tokens))
            row[slice(0, pad) if data.draw(st.booleans()) else slice(tokens - pad, tokens)] = False
        most = self.cache.max_length
        if most and len(self.rows[0].columns) + tokens > most:
            empty = not self.rows[0].columns
            with pytest.raises(CacheFullError):
                self.cache.begin(valid, torch.zeros_like(valid, dtype=torch.long))
            self.rows = [] if empty else self.rows
            return
        self._call(valid)

    @rule(tokens=st.sampled_from([1, 130]))
    @precondition(lambda self: self.rows)
    def roll_back(self, tokens):
        """A call that failed: pages were made and planes written, nothing counts."""
        if self.cache.max_length and len(self.rows[0].columns) + tokens > self.cache.max_length:
            return
        valid = torch.ones(len(self.rows), tokens, dtype=torch.bool)
        self.cache.begin(valid, torch.zeros_like(valid, dtype=torch.long))
        for group in self.cache.groups:                                # none was allowed
            k, v = self._numbers(tokens)
            APPEND(group.planes, [k], [v], torch.zeros_like(valid, dtype=torch.long), valid & False,
                   store=str(group.site.store), slots=[0])
        self.cache.rollback()

    @rule(share=st.floats(0.01, 0.99), last=st.integers(1, 3), near=st.booleans())
    @precondition(lambda self: self.rows)
    def crop(self, share, last, near):
        columns = len(self.rows[0].columns)
        keep = max(1, columns - last if near else int(columns * share))
        if keep >= columns:
            return
        if any(store.first(len(row.ids())) for row in self.rows for store in self.stores):
            with pytest.raises(KVCompileError, match="cannot come back"):
                self.cache.crop(keep)
            return
        self.cache.crop(keep if near else keep - columns)
        for row in self.rows:
            del row.columns[keep:]
            for layer in row.layers:
                layer.crop(len(row.ids()))

    @rule(data=st.data())
    @precondition(lambda self: self.rows)
    def select(self, data):
        """Beams: rows dropped, repeated, in another order."""
        order = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=3))
        if len(order) == len(self.rows) and data.draw(st.booleans()):
            self.cache.reorder_cache(torch.tensor(order))
        else:
            self.cache.batch_select_indices(torch.tensor(order))
        self.rows = [copy.deepcopy(self.rows[i]) for i in order]

    @rule()
    @precondition(lambda self: len(self.rows) == 1)
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.rows = [self.rows[0], copy.deepcopy(self.rows[0])]

    @rule()
    @precondition(lambda self: self.rows)
    def copied(self):
        """Go on with a copy; what is done to the one that it was made from does not matter."""
        old, self.cache = self.cache, copy.deepcopy(self.cache)
        for group in old.groups:
            for plane in group.planes:
                plane.zero_()
        old.reset()

    @rule()
    def reset(self):
        self.cache.reset()
        self.rows = []

    @invariant()
    def the_cache_holds_what_the_lists_hold(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.get_seq_length() == (len(self.rows[0].columns) if self.rows else 0)
        for layer in range(LAYERS if self.rows and self.cache.groups else 0):
            told = self.cache.stored_tokens(layer)
            for b, row in enumerate(self.rows):
                own, ids = row.layers[layer], row.ids()
                kept = [ids[i] for i in own.store.numbers(own.count)]
                positions, *found = slots(self.cache, layer, b)
                assert told[b].tolist() == [len(kept)] * HEADS
                for head in range(HEADS):
                    assert [p for p in positions[head].tolist() if p >= 0] == kept
                for side, x in zip(SIDES, found, strict=True):
                    if kept:
                        assert torch.equal(x[:, : len(kept)], torch.stack(own.shown(side), 1))


Machine.TestCase.settings = settings(
    max_examples=settings.default.max_examples, stateful_step_count=14,
    deadline=None, print_blob=True)
TestAnyOrder = pytest.mark.share(100)(Machine.TestCase)
