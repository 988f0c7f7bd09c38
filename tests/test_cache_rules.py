"""The operations of a cache whose heads choose their tokens, in any order, against plain lists.

What a prompt leaves is drawn, head by head; while decoding, heads that are full go back to their
limit by the rule `keynorm`, stated here once more. Slots, holes, pages, limits and scores exist on
the other side only.
"""

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcompile.checks.view import slots
from kvcompile.errors import KVCompileError
from kvcompile.ir import APPEND, EVICT
from kvcompile.own_cache import OwnCache
from kvcompile.site import Site
from kvcompile.store import SIDES, Store

HEADS, DIM, SINKS, RECENT = 2, 16, 2, 3
STORES = ("store(slots=true)", "store(k=int, v=int(bits=4), slots=true)")


class Head:
    """What one head of one row holds: position id -> (K, V, score), and how much it may."""

    def __init__(self, limit):
        self.limit, self.tokens = limit, {}

    def put(self, store, position, k, v):
        back = []
        for side, x in zip(SIDES, (k, v), strict=True):
            fmt = store.side(side).format
            back.append(fmt.decode(fmt.encode(x[None, None], side), DIM, torch.float32, side)[0, 0])
        self.tokens[position] = (*back, -float(k.norm()))

    def evict(self, every):
        """Back to the limit: keys of large norm leave, but not the first and newest tokens."""
        if len(self.tokens) < self.limit + every:
            return
        first, last = min(self.tokens), max(self.tokens)
        free = [p for p in self.tokens if first + SINKS <= p <= last - RECENT]
        free.sort(key=lambda p: self.tokens[p][2])
        for position in free[: len(self.tokens) - self.limit]:
            del self.tokens[position]


class Machine(RuleBasedStateMachine):
    """One layer; every rule is one public operation."""

    @initialize(store=st.sampled_from(STORES), every=st.sampled_from([1, 5]),
                limit=st.sampled_from([8, 30, 127]))
    def start(self, store, every, limit):
        self.store, self.every, self.limit = Store.parse(store), every, limit
        self.rule = (f"rule(score=keynorm, budget=uniform(tokens={limit}), sinks={SINKS}, "
                     f"recent={RECENT}, every={every})")
        site = Site(0, HEADS, HEADS, (DIM, DIM), torch.float32, 0, self.store, rule=self.rule)
        self.cache, self.rows, self.ends, self.seed = OwnCache((site,), "rule", "test"), [], [], 0

    def _numbers(self, tokens):
        self.seed += 1
        g = torch.Generator().manual_seed(self.seed)
        return [torch.randn(len(self.rows), HEADS, tokens, DIM, generator=g) for _ in "kv"]

    @rule(batch=st.integers(1, 3), tokens=st.sampled_from([1, 9, 40, 140]), seed=st.integers(0, 99))
    @precondition(lambda self: not self.rows)
    def prompt(self, batch, tokens, seed):
        """Rows are padded on the left; each head keeps tokens of its own, at least one."""
        g = torch.Generator().manual_seed(seed)
        self.rows = [[Head(self.limit) for _ in range(HEADS)] for _ in range(batch)]
        valid = torch.ones(batch, tokens, dtype=torch.bool)
        for row in valid[1:]:
            row[: int(torch.randint(tokens, (), generator=g))] = False
        positions = (valid.cumsum(1) - 1).clamp(min=0)
        self.ends = valid.sum(1).tolist()
        k, v = self._numbers(tokens)
        at = torch.full((batch, HEADS, min(tokens, self.limit)), -1, dtype=torch.int32)
        for b, heads in enumerate(self.rows):
            own = valid[b].nonzero().flatten()
            for h, head in enumerate(heads):
                n = 1 + int(torch.randint(min(len(own), self.limit), (), generator=g))
                kept = own[torch.randperm(len(own), generator=g)[:n]].sort().values
                at[b, h, :n] = kept.int()
                for c in kept.tolist():
                    head.put(self.store, int(positions[b, c]), k[b, h, c], v[b, h, c])
        where = at.clamp(min=0).long()
        gathered = [x.gather(2, where[..., None].expand(-1, -1, -1, DIM)) for x in (k, v)]
        self.cache.begin(valid, positions)
        said = torch.ones(batch, HEADS)      # what a budget by policy would read
        self.cache.store([(*gathered, at, -gathered[0].norm(dim=-1), said)], APPEND, tokens)
        self.cache.commit(tokens)

    @rule(tokens=st.sampled_from([1, 1, 1, 2, 12]), times=st.integers(1, 12))
    @precondition(lambda self: self.rows)
    def step(self, tokens, times):
        valid = torch.ones(len(self.rows), tokens, dtype=torch.bool)
        for _ in range(times):
            positions = torch.tensor(self.ends)[:, None] + torch.arange(tokens)
            k, v = self._numbers(tokens)
            self.cache.begin(valid, positions)
            group, text = self.cache.groups[0], str(self.store)
            APPEND(group.planes, [k], [v], positions, valid, store=text, slots=[0])
            EVICT(group.planes, [], [k], [v], positions, valid, store=text, rules=[self.rule],
                  slots=[0])
            self.cache.commit(tokens)
            for b, heads in enumerate(self.rows):
                for h, head in enumerate(heads):
                    for s in range(tokens):
                        head.put(self.store, self.ends[b] + s, k[b, h, s], v[b, h, s])
                    head.evict(self.every)
            self.ends = [end + tokens for end in self.ends]

    @rule()
    @precondition(lambda self: self.rows and self.cache.get_seq_length() > 1)
    def crop(self):
        with pytest.raises(KVCompileError, match="cannot come back"):
            self.cache.crop(-1)

    @rule(data=st.data())
    @precondition(lambda self: self.rows)
    def select(self, data):
        order = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=3))
        self.cache.batch_select_indices(torch.tensor(order))
        self.rows = [copy.deepcopy(self.rows[i]) for i in order]
        self.ends = [self.ends[i] for i in order]

    @rule()
    @precondition(lambda self: len(self.rows) == 1)
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.rows, self.ends = [self.rows[0], copy.deepcopy(self.rows[0])], self.ends * 2

    @rule()
    @precondition(lambda self: self.rows)
    def copied(self):
        """Go on with a copy; what is done to the one that it was made from does not matter."""
        old, self.cache = self.cache, copy.deepcopy(self.cache)
        for plane in old.groups[0].planes:
            plane.zero_()
        old.reset()

    @rule()
    def reset(self):
        self.cache.reset()
        self.rows = []

    @invariant()
    def every_head_holds_what_its_list_holds(self):
        for b, heads in enumerate(self.rows if hasattr(self, "rows") else ()):
            positions, k, v = slots(self.cache, 0, b)
            assert self.cache.stored_tokens(0)[b].tolist() == [len(x.tokens) for x in heads]
            for own, keys, values, head in zip(positions.tolist(), k, v, heads, strict=True):
                held = [p for p in own if p >= 0]
                assert sorted(held) == sorted(head.tokens)
                for i, position in enumerate(held):
                    told = head.tokens[position]
                    assert torch.equal(keys[i], told[0]) and torch.equal(values[i], told[1])


Machine.TestCase.settings = settings(
    max_examples=settings.default.max_examples, stateful_step_count=10,
    deadline=None, print_blob=True)
TestAnyOrder = pytest.mark.share(100)(Machine.TestCase)
