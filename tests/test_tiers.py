"""Tiers by score: which tokens are salient, what each tier loses, and what cannot be combined.

`Head` states ZipCache (arXiv:2405.14256), and with sums in place of means MiKV (arXiv:2402.18096)
with H2O's scores, for one kv head as lists of tokens, in fp64.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import gcd

import pytest
import torch
from support import greedy, optimized, plain, prompt
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import kvcompile
from kvcompile.checks.audit import Run
from kvcompile.checks.tapped import read
from kvcompile.checks.view import slots
from kvcompile.errors import KVCompileError, RecipeError
from kvcompile.format import format_of
from kvcompile.ir import APPEND, RANK
from kvcompile.kernels.rank import entering, one_token, rank
from kvcompile.measure.kernel_table import fallbacks
from kvcompile.method import _discovered, methods
from kvcompile.passes.scorers_attention import Normalized
from kvcompile.planes import Group
from kvcompile.recipe import parse_term
from kvcompile.rule import named

BLOCK = 128


@dataclass
class Token:
    id: int
    k: Tensor
    v: Tensor
    got: float = 0.0        # weight, summed over the queries that looked
    looked: int = 0         # how many of them saw it


@dataclass
class Head:
    salient: int
    total: bool = False     # whether scores are sums and not means
    blocks: list[tuple[list[Token], list[Token]]] = field(default_factory=list)
    waiting: list[Token] = field(default_factory=list)

    def call(self, q: Tensor, new: list[Token], seen: Tensor, scale: float, looking: Sequence[int]
             ) -> None:
        """Queries q [G, S, D] see `seen` [N, D], stored keys, and those of their own call."""
        self.score(q, new, torch.cat([seen, *(t.k[None] for t in new)]), len(seen), scale, looking)
        tokens = self.waiting + new
        full = len(tokens) // BLOCK * BLOCK
        best = sorted(tokens[:full], key=lambda t: -t.got / (1 if self.total else t.looked))
        chosen = {t.id for t in best[: full // BLOCK * self.salient]}
        both = [[t for t in tokens[:full] if (t.id in chosen) == own] for own in (True, False)]
        for b in range(full // BLOCK):
            self.blocks.append(tuple(x[b * n : (b + 1) * n] for x, n in  # type: ignore[arg-type]
                                     zip(both, (self.salient, BLOCK - self.salient), strict=True)))
        self.waiting = tokens[full:]

    def score(self, q: Tensor, new: list[Token], keys: Tensor, before: int, scale: float,
              looking: Sequence[int]) -> None:
        for i in looking:
            logits = q[:, i] @ keys[: before + i + 1].T * scale
            weights = logits.softmax(-1).mean(0).tolist()
            tokens = [*self.waiting, *new[: i + 1]]
            for token, weight in zip(tokens, weights[len(weights) - len(tokens):], strict=True):
                token.got, token.looked = token.got + weight, token.looked + 1
        if len(looking) < len(new):                # those that looked stand for all
            for age, token in enumerate(reversed(new), 1):
                token.got, token.looked = token.got / token.looked * age, age

    def ids(self) -> list[int]:
        return [t.id for block in (*(h + l for h, l in self.blocks), self.waiting) for t in block]


class Windowed(Head):
    """SnapKV's scores (arXiv:2404.14469) of a prompt, then means of about the last 8 queries."""

    def score(self, q: Tensor, new: list[Token], keys: Tensor, before: int, scale: float,
              looking: Sequence[int]) -> None:
        every = [(q[:, i] @ keys[: before + i + 1].T * scale).softmax(-1) for i in range(len(new))]
        if not before:
            first = len(new) - 8
            mean = sum(w[:, :first] for w in every[first:]) / 8
            for i, token in enumerate(new[:first]):
                token.got = float(mean[:, max(0, i - 2) : i + 3].sum(1).mean()) / 5
            for token in new[first:]:
                token.got = float("inf")
            return
        weights = sum(torch.nn.functional.pad(w.mean(0), (0, keys.shape[0] - w.shape[1]))
                      for w in every).tolist()
        n = min(len(new), 8)
        for token, w in zip([*self.waiting, *new], weights[before - len(self.waiting):],
                            strict=True):
            begins = token.got == float("inf") or any(token is t for t in new)
            token.got = w / n if begins else token.got * (1 - n / 8) + w / 8


def steps(x: Tensor, bits: int, dim: int) -> Tensor:
    """The distance of neighbouring codes, a group along `dim`."""
    return (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)).expand_as(x) / (2**bits - 1)


def total_of(recipe: str) -> bool:
    return recipe.startswith("mikv")


def within(got: Tensor, want: Tensor, step: Tensor) -> None:
    assert ((got - want).abs() <= 0.502 * step + 2e-3 * want.abs().max()).all()


def check(head: Head, ids: Tensor, k: Tensor, v: Tensor, bits: tuple[int, int]) -> None:
    """What the cache holds of a head is what the lists say."""
    assert ids.tolist() == head.ids()
    at, group = 0, gcd(head.salient, BLOCK)
    for block in head.blocks:
        every = torch.stack([t.v for part in block for t in part])
        c = every.abs().amax(0).sqrt()
        for tokens, b in zip(block, bits, strict=True):
            end = at + len(tokens)
            keys, values = (torch.stack([getattr(t, s) for t in tokens]) for s in "kv")
            if head.total:                     # per token, and exact
                for got, want in ((k, keys), (v, values)):
                    step = steps(want, b, 1) if b < 16 else torch.zeros_like(want)
                    within(got[at:end], want, step)
                    assert b < 16 or torch.equal(got[at:end], want)
                at = end
                continue
            grouped = keys.unflatten(0, (-1, group))
            within(k[at:end], keys, steps(grouped, b, 1).flatten(0, 1))
            within(v[at:end], values, steps(values / c, b, 1) * c)
            for own in k[at:end].unflatten(0, (-1, group)).transpose(1, 2).flatten(0, 1):
                assert len(own.unique()) <= 2**b
            at = end
    for i, token in enumerate(head.waiting, at):
        assert torch.equal(k[i].double(), token.k) and torch.equal(v[i].double(), token.v)


@pytest.mark.parametrize("recipe, cut, calls", [
    ("zipcache", 64, (360, *[1] * 42)),
    ("zipcache(bits=8, low=4, salient=0.25)", 32, (100, 60, 300, 1)),
    ("mikv", 32, (270, 1, 1, 100, 30)),
    ("mikv(scorer=snapkv(window=8))", 32, (270, 1, 1, *[1] * 120, 7))],
    ids=["steps", "turns", "mikv", "snapkv"])
def test_it_is_the_method(recipe, cut, calls):
    """A prompt, later turns and steps, rows of unequal length: the same tokens in each tier."""
    program = optimized("llama:2", recipe).kvcompile.program
    bits = (8, 4) if "bits=8" in recipe else (4, 2)
    bits = (16, 2) if total_of(recipe) else bits
    run, ids = Run(program, compile=False), prompt(sum(calls), 2)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :16] = False
    positions = (valid.cumsum(1) - 1).clamp_min(0)
    heads, start = {}, 0
    for tokens in calls:
        at, before = slice(start, start + tokens), copy.deepcopy(run.cache)
        run.call(ids[:, at], positions[:, at], valid[:, at])
        layers = read(run.engine.taps, run.names["extend" if start else "prefill"], run.nodes)
        for (layer, row) in [(i, b) for i in range(len(layers)) for b in range(2)]:
            x = layers[layer].row(row, valid[row, at])
            where = positions[row, at][valid[row, at]].tolist()
            looking = range(len(where)) if start or total_of(recipe) else named(
                "scorer", "normalized").probes(len(where)).tolist()
            held = slots(before, layer, row) if start else (None, x.k[:, :0], None)
            for h in range(x.k.shape[0]):
                kind = Windowed if "snapkv" in recipe else Head
                head = heads.setdefault((layer, row, h), kind(cut, total_of(recipe)))
                new = [Token(i, x.k[h, n].double(), x.v[h, n].double())
                       for n, i in enumerate(where)]
                group = x.q.shape[0] // x.k.shape[0]
                seen = held[1][h]
                count = len(head.ids())
                head.call(x.q[h * group : (h + 1) * group].double(), new, seen[:count].double(),
                          x.how.scale, looking)
        start += tokens
    for (layer, row, h), head in heads.items():
        held, k, v = slots(run.cache, layer, row)
        count = len(head.ids())
        assert head.blocks and count == int(valid[row].sum())
        check(head, held[h, :count], k[h, :count].double(), v[h, :count].double(), bits)


def test_a_block_takes_the_best_of_all():
    """Of equals the earlier token is salient; what fills no block stays as it came."""
    score = torch.zeros(300)
    score[[7, 140, 141, 299]] = 1
    order = entering(score[None], 16)[0].tolist()
    assert order[:16] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert order[128:144] == [*range(16, 30), 140, 141]
    assert sorted(order[:256]) == [*range(256)] and order[16:128] == sorted(order[16:128])
    assert order[256:] == [*range(256, 300)]


def test_probes():
    """The newest 5 % of the queries, and as many of the others."""
    for tokens in (1, 10, 300, 4000):
        at = Normalized().probes(tokens).tolist()
        newest = max(1, -(-tokens // 20))
        assert at[-newest:] == [*range(tokens - newest, tokens)]
        assert len(at) == len({*at}) == min(tokens, newest + -(-tokens // 20)) and at == sorted(at)


def test_bytes_are_exact():
    model = optimized("llama:2", "zipcache")
    report = kvcompile.explain(model)
    assert not report.bounded and "64 of 128" in str(report) and "kvc.rank" in str(report)
    for tokens in (5, 127, 128, 300):
        for batch in (1, 2):
            cache = model(prompt(tokens, batch), use_cache=True).past_key_values
            assert cache.nbytes == report.kv_bytes(tokens, batch)
            assert cache.stored_tokens(0).tolist() == [[tokens] * 2] * batch
    one = kvcompile.explain(model, "zipcache(low=4)")
    assert report.kv_bytes(4096) < one.kv_bytes(4096) + 8 * 4096 * 2 * 2  # position and score
    assert "mixed" not in str(one) and one.rows[-1].kernel == "fused C++"


def test_rows_of_a_batch_are_what_they_are_alone():
    model, ids = optimized("llama:2", "zipcache"), prompt(150, 2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    cache = model(ids, attention_mask=mask, position_ids=places, use_cache=True).past_key_values
    alone = model(ids[1:, 9:], use_cache=True).past_key_values
    for layer in range(2):
        held, own = slots(cache, layer, 1), slots(alone, layer, 0)
        assert torch.equal(held[0][:, :141], own[0])
        for a, b in zip(held[1:], own[1:], strict=True):
            assert torch.allclose(a[:, :141], b, atol=1e-5)
    both = greedy(model, ids, 20, attention_mask=mask)
    assert torch.equal(both[1, 9:], greedy(model, ids[1:, 9:], 20)[0])


@pytest.mark.slow
def test_a_compiled_step_ranks_too():
    ids = prompt(120, 2)
    assert torch.equal(*(greedy(optimized("llama:2", "zipcache", c), ids, 20) for c in (0, 1)))


def test_layers_without_scores_have_one_precision():
    """Windows of their own, and keys that are rebuilt: the upper tier, and explain says so."""
    for arch, recipe in (("gemma2", "zipcache"), ("llama:2", "zipcache+prerope")):
        report = kvcompile.explain(plain(arch), recipe)
        rows = [row for row in report.rows if row.layer == 0]
        assert any(row.status == "refused" for row in rows)
        assert "all tokens in the upper tier, without scores" in [row.what for row in rows]
        assert "mixed" not in rows[-1].storage and "int(bits=4" in rows[-1].storage


@pytest.mark.parametrize("recipe, what", [
    ("zipcache+kivi", "both set format.k"), ("h2o+zipcache", "both set keep.score"),
    ("mikv(scorer=keydiff)", "keydiff does not score the tokens that follow"),
    ("zipcache+streamingllm", "both say which tokens stay"),
    ("zipcache(salient=0.3)", "salient must be one of 0.125")])
def test_what_cannot_be_combined(recipe, what):
    with pytest.raises(RecipeError, match=what) as told:
        kvcompile.explain(optimized("llama:2"), recipe)
    assert "\n" not in str(told.value)


def test_what_a_cache_with_tiers_cannot():
    model = optimized("llama:2", "zipcache")
    cache = model(prompt(20), use_cache=True).past_key_values
    with pytest.raises(KVCompileError, match="layer 0 has already put its tokens in another order"):
        cache.crop(-3)
    with pytest.raises(KVCompileError, match="use kvcompile.optimize"):
        kvcompile.KVCache(model.config, "zipcache")


def ranked(recipe, lengths=(123, 5), limit=20):
    """A group of a recipe's layers, with as many waiting tokens in its rows, and a step's inputs:
    (group, planes, [mass, k, v, positions, valid], options)."""
    sites = kvcompile.explain(plain("llama:2"), recipe).program.sites
    group, g = Group(sites, len(lengths), torch.device("cpu")), torch.Generator().manual_seed(3)
    group.reserve([n + limit for n in lengths])
    options = dict(store=str(sites[0].layout), slots=[0, 1])
    rules = dict(rules=[s.rule for s in sites], group=sites[0].q_heads // sites[0].heads)

    def call(tokens, valid):
        before = group.counts[0, :, 0]
        k, v = ([torch.randn(len(lengths), sites[0].heads, tokens, d, generator=g) for _ in sites]
                for d in sites[0].dims)
        places = 128 * group.plane("k.body.table").shape[-1] + 128 * group.plane(
            "k.recent.table").shape[-1] + tokens
        mass = [torch.rand(len(lengths), sites[0].heads, places, generator=g) for _ in sites]
        own = torch.arange(places) < (before + valid.sum(1))[:, None]
        mass = [torch.where(own[:, None], m, 0.0) for m in mass]
        return [mass, k, v, before[:, None] + (valid.cumsum(1) - 1).clamp_min(0), valid]

    def store(planes, k, v, given):
        APPEND(planes, [*k], [*v], *given[3:], **options)

    first = call(max(lengths), torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    store(group.planes, *RANK(group.planes, *first, **options, **rules), first)
    return group, call, store, options | rules


@pytest.mark.parametrize("recipe", ["zipcache", "mikv", "mikv(bits=8)",
                                    "mikv(scorer=scissorhands)"])
def test_a_step_without_looking_is_the_body(recipe):
    """What a CUDA graph holds: bit for bit what the body stores, in rows of unequal length, with
    padding, before, when and after a block is full."""
    group, call, store, options = ranked(recipe)
    again = [p.clone() for p in group.planes]
    for step in range(9):
        given = call(1, torch.tensor([[step != 3], [step % 5 > 0]]))
        want = RANK(group.planes, *given, **options)
        got = one_token(again, *given, **options)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        for planes in (group.planes, again):
            store(planes, *want, given)
        for spec, a, b in zip(group.specs, group.planes, again, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (step, spec.name)
    assert group.counts[0, :, 0].tolist() == [131, 12]


def test_a_step_is_ranked_without_looking():
    """Tensors without values: whatever asked for one would raise."""
    group, call, _, options = ranked("zipcache")
    given = call(1, torch.ones(2, 1, dtype=torch.bool))
    with FakeTensorMode() as mode:
        fake = [[*map(mode.from_tensor, x)] if isinstance(x, list) else mode.from_tensor(x)
                for x in (group.planes, *given)]
        assert one_token(*fake, **options)[0].shape == (2, *given[1][0].shape)
        with pytest.raises(DynamicOutputShapeException):
            rank(*fake, **options)


def test_what_a_gpu_lacks():
    assert not fallbacks(optimized("llama:2", "zipcache").kvcompile.program)


def test_a_rule_and_a_format_agree(monkeypatch):
    """A salient share without the tiers for it, and a scorer that sees prompts only."""
    known = methods()["zipcache"]
    for axes, what in (({"keep.salient": 32}, "32 of 128 tokens are salient, but K is stored as"),
                       ({"keep.score": "keynorm"}, "keynorm does not score the tokens"),
                       ({"format.k": "int()", "block.k": 1}, "but K is stored as int, 1 tokens")):
        changed = replace(known, axes=lambda p, axes=axes: {**known.axes(p), **axes})
        monkeypatch.setitem(_discovered(), "zipcache", changed)
        with pytest.raises(RecipeError, match=what) as told:
            kvcompile.explain(optimized("llama:2"), "zipcache")
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("text, what", [
    ("mixed(salient=20)", "a multiple of 16"), ("mixed(salient=128)", "a multiple of 16"),
    ("mixed(high=int(axis=channel), salient=48)", "48 tokens are no multiple of 32")])
def test_formats_that_cannot_be(text, what):
    with pytest.raises(RecipeError, match=what):
        format_of(parse_term(text))
