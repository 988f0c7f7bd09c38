"""Dropping tokens while decoding, step by step, against lists of tokens; and what is left in place.
"""

import copy
from functools import partial

import pytest
import selection_references as refs
import torch
from support import greedy, optimized, plain, prompt, slow_but
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import kvcompile
from kvcompile import KVCompileError, Recipe, RecipeError
from kvcompile.calibration.samples import Samples
from kvcompile.format import PAGE
from kvcompile.ir import APPEND, ATTEND, EVICT
from kvcompile.kernels import evict, pages
from kvcompile.passes.select import rule_of
from kvcompile.plan import plan
from kvcompile.planes import Group
from kvcompile.site import Site
from kvcompile.store import SIDES, Store

HEADS, GROUP, DIM = refs.HEADS, refs.Q_HEADS // refs.HEADS, 32
CPU = torch.device("cpu")


class Stepper:
    """A group of two layers of one row that holds no tokens at first."""

    def __init__(self, recipe: str, store: str, limit: int, seed: int = 0):
        self.rule = str(rule_of(plan(recipe, 1)[0].values, 0, 1))
        self.store = Store.parse(store)
        site = Site(0, refs.Q_HEADS, HEADS, (DIM, DIM), torch.float32, 0, self.store,
                    rule=self.rule)
        self.group = Group([site, site], 1, CPU)
        self.group.plane("limit").fill_(limit)
        self.random, self.tokens = torch.Generator().manual_seed(seed), 0
        self.given = []                       # (q, k, v) of every token, layers stacked

    def step(self, tokens: int = 1, valid: bool = True):
        """attend, append and evict as the extend graph does, or on padding."""
        q = torch.randn(2, 1, refs.Q_HEADS, tokens, DIM, generator=self.random) * 2
        k, v = (torch.randn(2, 1, HEADS, tokens, DIM, generator=self.random) for _ in range(2))
        self.given.append((q, k, v))
        at = torch.arange(self.tokens, self.tokens + tokens)[None]
        valid = torch.full_like(at, valid, dtype=torch.bool)
        self.group.reserve(self.group.counts + tokens)
        planes, store = self.group.planes, str(self.store)
        every = [ATTEND(q[i], k[i], v[i], planes, at, valid, None, scale=refs.SCALE, store=store,
                        slot=i, layer=i, mass=True) for i in range(2)]
        APPEND(planes, [*k], [*v], at, valid, store=store, slots=[0, 1])
        EVICT(planes, [e[2] for e in every], [*k], [*v], at, valid, store=store,
              rules=[self.rule] * 2, slots=[0, 1], group=GROUP)
        self.tokens += tokens

    def held(self, layer: int):
        """[head]: the tokens that a layer holds, by slot."""
        site = self.group.site
        return [p.tolist() for p in evict.slot_positions(site.store, site.dims, site.dtype,
                                                         self.group.planes, layer)]

    def stored(self, side: str, layer: int):
        """[head]: what is decoded of the tokens that a layer holds, by slot."""
        named = pages.named(self.group.specs, self.group.planes, [layer])
        tiers = pages.tiers(self.store, side, named, DIM, torch.float32)
        return [pages.stored(self.store, side, tiers, 0, slice(h, h + 1), n)[0]
                for h, n in enumerate(self.group.counts[layer, 0].tolist())]

    def all(self, which: int, layer: int):
        """Everything that was given: q, k or v [H, T, D]."""
        return torch.cat([g[which][layer, 0] for g in self.given], 1)


class Lists:
    """The same policies over a list of tokens per head, in fp64."""

    def __init__(self, policy: str, limit: int, slack: int, recent: int):
        self.policy, self.limit, self.slack, self.recent = policy, limit, slack, recent
        self.kept = [[] for _ in range(HEADS)]
        self.score = [{} for _ in range(HEADS)]

    def weights(self, q, k, head: int, token: int):
        tokens = [*self.kept[head], token]
        logits = q[head * GROUP : (head + 1) * GROUP, token].double() @ (
            k[head, tokens].double().T) * refs.SCALE
        return dict(zip(tokens, logits.softmax(-1).mean(0).tolist(), strict=True))

    def step(self, q, k, token: int):
        every = [self.weights(q, k, head, token) for head in range(HEADS)]
        for head, given in enumerate(every):
            score, kept = self.score[head], self.kept[head]
            kept.append(token)
            for t, w in given.items():
                if self.policy == "h2o":
                    score[t] = score.get(t, 0.0) + w
                elif self.policy == "a2sf":
                    score[t] = 0.6 * score.get(t, 0.0) + w
                elif self.policy == "tova":
                    score[t] = sum(e[t] for e in every) / HEADS
                elif self.policy == "scissorhands":
                    score[t] = score.get(t, 0) - (w < 1 / len(given))
                else:
                    score[t] = -float(k[head, t].double().norm())
        for head, kept in enumerate(self.kept):
            if len(kept) >= self.limit + self.slack:
                free = sorted((self.score[head][t], t) for t in kept if t <= token - self.recent)
                for _, t in free[: len(kept) - self.limit]:
                    kept.remove(t)


@pytest.mark.parametrize(("recipe", "slack", "recent"), [
    ("h2o(budget=24)", 1, 12), ("tova(budget=24)", 1, 1),
    ("a2sf(budget=24, decay=0.6)", 1, 12), ("knorm(budget=24, decode=true)", 1, 0),
    ("scissorhands(budget=24, every=9, recent=5)", 9, 5)])
def test_every_step_evicts_as_the_policy_says(recipe, slack, recent):
    limit = 24
    ours = Stepper(recipe, "store(slots=true)", limit)
    lists = [Lists(recipe.partition("(")[0], limit, slack, recent) for _ in range(2)]
    for token in range(160):
        ours.step()
        for layer, mine in enumerate(lists):
            mine.step(ours.all(0, layer), ours.all(1, layer), token)
            assert [sorted(h) for h in ours.held(layer)] == [sorted(h) for h in mine.kept], token
    assert ours.group.planes[0].max() <= limit + slack - 1


@pytest.mark.parametrize("store", slow_but(["store(k=int, v=int(bits=4), slots=true)"], [
    "store(slots=true)", "store(k=int, v=int(bits=4), slots=true)",
    "store(k=fp8, v=nf4, slots=true)"]))
@pytest.mark.parametrize("recipe", ["h2o(budget=150)", "scissorhands(budget=150, every=40)",
                                    "r-kv(budget=150, every=30)"])
def test_moved_tokens_are_what_was_stored(recipe, store):
    """Slots are reused: every token that is left decodes bit for bit as when it was encoded."""
    ours = Stepper(recipe, store, 150)
    for tokens in (100, *[1] * 150, 20, 1):
        ours.step(tokens)
    sizes = [p.nbytes for p in ours.group.planes]
    for layer in range(2):
        for side, which in (("k", 1), ("v", 2)):
            fmt, x = ours.store.side(side).format, ours.all(which, layer)
            want = fmt.decode(fmt.encode(x, side), DIM, torch.float32, side)
            for head, (tokens, got) in enumerate(zip(ours.held(layer), ours.stored(side, layer),
                                                     strict=True)):
                assert len(set(tokens)) == len(tokens) < 200
                assert torch.equal(got, want[head, tokens])
    for _ in range(100):
        ours.step()
    assert [p.nbytes for p in ours.group.planes] == sizes


KIVI = ("store(k=int(bits=2, axis=channel), k_block={0}, v=int(bits=2, axis=token), v_lag={0}, "
        "slots=true)")


@pytest.mark.parametrize("residual", [32, pytest.param(128, marks=pytest.mark.slow)])
def test_pages_leave_where_tokens_cannot_move(residual):
    """h2o+kivi: whole pages go, of the lowest mean score, and nothing is encoded a second time."""
    ours = Stepper("h2o(budget=256, recent=0.25)", KIVI.format(residual), 256)
    twin = Stepper("h2o(budget=256, recent=0.25)", KIVI.format(residual), 10**6)
    seen = set()
    for tokens in (200, *[1] * 300, 70, *[1] * 60):
        for s in (ours, twin):
            s.step(tokens)
        assert ours.group.planes[0].max() < 256 + 128 + 70
        seen |= {t for head in ours.held(0) for t in head}
    for layer in range(2):
        for side in SIDES:
            whole = twin.stored(side, layer)
            for head, (tokens, got) in enumerate(zip(ours.held(layer), ours.stored(side, layer),
                                                     strict=True)):
                assert tokens == sorted(tokens), "pages keep their order"
                gone = set(range(ours.tokens)) - set(tokens)
                assert gone and all(len(gone & set(range(p, p + 128))) in (0, 128)
                                    for p in range(0, ours.tokens, 128))
                assert torch.equal(got, whole[head][tokens])


def test_a_threshold_waits():
    """dms: a token that scores too little leaves once `delay` newer ones have followed."""
    ours = Stepper("dms(scorer=knorm, threshold=-5.5, delay=20)", "store(slots=true)", 2**31 - 1)
    for token in range(90):
        ours.step()
        for layer in range(2):
            norms = ours.all(1, layer).norm(dim=-1)
            assert [sorted(h) for h in ours.held(layer)] == [
                [t for t in range(token + 1) if t > token - 20 or norms[h, t] <= 5.5]
                for h in range(HEADS)]


NO_WAIT = {"h2o(budget=24)": "store(slots=true)", "tova(budget=24)": "store(k=int, slots=true)",
           "knorm(budget=24, decode=true)": "store(slots=true)",
           "scissorhands(budget=24, every=9, recent=5)": "store(slots=true)",
           "dms(scorer=knorm, threshold=-5.5, delay=20)": "store(slots=true)",
           "h2o(budget=130, recent=0.25)": KIVI.format(32)}


@pytest.mark.parametrize("recipe", NO_WAIT)
def test_without_waiting_the_same_is_left(recipe, monkeypatch):
    """What a CUDA graph holds: shapes alone decide. Padding steps in between change nothing."""
    limit = Recipe.parse(recipe).terms[0].get("budget") or 2**31 - 1
    both = [Stepper(recipe, NO_WAIT[recipe], limit) for _ in range(2)]
    assert not evict.waiting(both[0].store, [both[0].rule], 1)
    real = evict.run
    for step in range(340 if limit == 130 else 90):
        for ours, waits in zip(both, (True, False), strict=True):
            monkeypatch.setattr(evict, "run", partial(real, waits=waits))
            ours.step(valid=step % 7 != 3)
    assert both[0].group.counts.max() < 200
    for spec, a, b in zip(both[0].group.specs, *(x.group.planes for x in both), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), spec.name


@pytest.mark.parametrize("recipe", NO_WAIT)
def test_nothing_is_looked_at_on_the_host(recipe, monkeypatch):
    """Tensors without values: whatever asked for one would raise."""
    ours, real = Stepper(recipe, NO_WAIT[recipe], 24), evict.run
    ours.step()
    mode = FakeTensorMode()
    group, tokens = ours.group, torch.ones(1, 1, dtype=torch.long)
    k, v, mass = (torch.randn(2, 1, HEADS, n, DIM)[..., :d] for n, d in ((1, DIM), (1, DIM),
                                                                        (PAGE, 1)))
    given = [[*group.planes], [*mass[..., 0]], [*k], [*v], tokens, tokens.bool()]
    with mode:
        fake = [[mode.from_tensor(x) for x in g] if isinstance(g, list) else mode.from_tensor(g)
                for g in given]
        options = dict(store=str(ours.store), rules=[ours.rule] * 2, slots=[0, 1], group=GROUP,
                       mover=lambda *moved: None)
        evict._ends.cache_clear()
        real(*fake, waits=False, **options)
        with pytest.raises(DataDependentOutputException):
            real(*fake, **options)
        evict._ends.cache_clear()


EVICTING = ("h2o(budget=64)", "r-kv(budget=48, every=16)", "h2o(budget=64)+int8")


@pytest.mark.parametrize("recipe", EVICTING)
def test_memory_is_constant_while_generating(recipe):
    model = kvcompile.optimize(optimized("llama:2"), recipe, compile=False)
    out = greedy(model, prompt(100), 10, return_dict_in_generate=True)
    before = out.past_key_values.nbytes
    longer = greedy(model, prompt(100), 150, return_dict_in_generate=True)
    assert longer.past_key_values.nbytes == before
    for layer in range(2):
        stored = longer.past_key_values.stored_tokens(layer)
        assert (stored <= 64).all() and (stored >= 48).all()
        ids = longer.past_key_values.positions(layer)
        assert (ids >= 0).sum(-1).tolist() == stored.tolist()
        assert ids.max() == 248 and (ids.diff() > 0).all()


@pytest.mark.parametrize("recipe", ["snapkv(budget=40, window=8)", "h2o(budget=64)",
                                    "adakv(scorer=snapkv(window=8), ratio=0.25)+kivi(bits=2)"])
def test_a_batch_generates_what_its_rows_do(recipe):
    model = kvcompile.optimize(optimized("llama:2"), recipe, compile=False)
    ids = prompt(150, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    both = greedy(model, ids, 30, attention_mask=mask, return_dict_in_generate=True)
    for row in range(2):
        own = ids[row : row + 1, mask[row].bool()]
        alone = greedy(model, own, 30, return_dict_in_generate=True)
        assert torch.equal(alone.sequences[0], both.sequences[row, -alone.sequences.shape[1]:])
        for layer in range(2):
            a, b = (c.past_key_values.positions(layer)[i] for c, i in ((alone, 0), (both, row)))
            assert [h[h >= 0].tolist() for h in a] == [h[h >= 0].tolist() for h in b]


def test_ragged_heads_take_the_pages_that_they_need():
    """adakv: bytes follow what each head keeps; predicted bytes are never less."""
    model = kvcompile.optimize(optimized("llama:2"), "adakv(scorer=snapkv, ratio=0.25, floor=0)",
                               compile=False)
    cache = kvcompile.prefill(model, prompt(1600))
    stored = torch.stack([cache.stored_tokens(i) for i in range(2)])
    assert stored.sum((1, 2)).tolist() == [800, 800]
    held = -(-stored // 128)
    page = 128 * 2 * 16 * 4
    tables = 2 * 4 * stored.numel() * int(held.max())
    assert cache.nbytes == int(held.sum()) * page + tables + 4 * stored.numel()
    report = kvcompile.explain(model)
    assert report.bounded and cache.nbytes <= report.kv_bytes(1600) < (
        kvcompile.explain(model, "full").kv_bytes(1600) // 2)
    assert "at most" in str(report)


def test_a_uniform_budget_is_predicted_exactly():
    for recipe in ("snapkv(budget=300)", "snapkv(ratio=0.5)+kivi(bits=2)", "h2o(budget=200)+int8",
                   "pyramidkv(budget=300)"):
        model = kvcompile.optimize(optimized("llama:2"), recipe, compile=False)
        cache = kvcompile.prefill(model, prompt(900, batch=2))
        assert cache.nbytes == kvcompile.explain(model).kv_bytes(900, batch=2), recipe


def test_context_then_questions():
    """A context is compressed once; copies of its cache answer, and later turns are kept whole."""
    model = kvcompile.optimize(optimized("llama:2"), "expected_attention(ratio=0.5)", compile=False)
    context = prompt(120)
    cache = kvcompile.prefill(model, context)
    assert cache.stored_tokens(0).tolist() == [[60, 60]]
    for seed in (1, 2):
        question = torch.cat([context, prompt(7, seed=seed)], 1)
        first, again = (greedy(model, question, 10, past_key_values=copy.deepcopy(cache),
                               return_dict_in_generate=True) for _ in range(2))
        assert torch.equal(first.sequences, again.sequences)
        assert first.past_key_values.stored_tokens(0).tolist() == [[76, 76]]
    assert cache.stored_tokens(0).tolist() == [[60, 60]]


def test_the_question_is_said_to_generate():
    model = kvcompile.optimize(optimized("llama:2"), "snapkv(budget=30, window=16)",
                               compile=False)
    out = greedy(model, prompt(100), 2, question_length=9, return_dict_in_generate=True)
    cache = kvcompile.prefill(model, prompt(100), question_length=9)
    want = cache.positions(0)[..., :30]
    assert torch.equal(out.past_key_values.positions(0)[..., :30], want)
    assert (want[..., -9:] == torch.arange(91, 100)).all()
    for wrong in (-1, 100, True, 9.0):
        with pytest.raises(KVCompileError, match="question_length=.* from 0 to 99, one less than "
                                                 "the prompt's"):
            kvcompile.prefill(model, prompt(100), question_length=wrong)


@pytest.mark.parametrize(("recipe", "question", "text"), [
    ("snapkv(budget=40, window=8)", 41, "layer 0: a budget of 40 tokens a head, but 41 newest "
     "tokens always stay: give at least 41, or a shorter question"),
    ("adakv(scorer=snapkv, budget=40)", 41, "layer 0: a budget of 40 tokens a head, but 41 newest"),
    ("pyramidkv(budget=40, window=8, beta=4)", 40, "layer 1: a budget of 16 tokens")])
def test_a_question_that_exceeds_a_budget_in_tokens_is_refused(recipe, question, text):
    model = kvcompile.optimize(optimized("llama:2"), recipe, compile=False)
    with pytest.raises(KVCompileError) as info:
        kvcompile.prefill(model, prompt(100), question_length=question)
    assert f"question_length={question}: {recipe}: {text}" in str(info.value)
    assert "\n" not in str(info.value)


def test_a_question_that_exceeds_a_share_is_kept_and_said(caplog):
    model = kvcompile.optimize(optimized("llama:2"), "snapkv(ratio=0.25, window=8)", compile=False)
    assert kvcompile.prefill(model, prompt(100), question_length=25).stored_tokens(0).max() == 25
    assert not caplog.records
    for _ in range(2):
        cache = kvcompile.prefill(model, prompt(100), question_length=26)
        assert cache.positions(0)[0].tolist() == [[*range(74, 100)]] * 2
    assert [r.getMessage() for r in caplog.records] == [
        "snapkv(ratio=0.25, window=8): layer 0: a question of 26 tokens stays whole, of a prompt "
        "of 100: a budget of 25 tokens a head, but 26 newest tokens always stay: give at least 26, "
        "or a shorter question"]


def test_a_question_says_nothing_to_scores_that_do_not_look_from_one(caplog):
    model = kvcompile.optimize(optimized("llama:2"), "knorm(budget=20)", compile=False)
    a, b = (kvcompile.prefill(model, prompt(50), question_length=n) for n in (0, 30))
    assert torch.equal(a.positions(1), b.positions(1))
    assert [r.getMessage() for r in caplog.records] == [
        "knorm(budget=20): question_length=30 changes nothing: no scores look from a window of the "
        "newest tokens"]


def test_a_question_is_shorter_than_every_row_of_a_batch():
    model = kvcompile.optimize(optimized("llama:2"), "snapkv(budget=12, window=8)", compile=False)
    ids, mask = prompt(40, batch=2), torch.ones(2, 40, dtype=torch.long)
    mask[1, :30] = 0
    with pytest.raises(KVCompileError, match="from 0 to 9, one less than the shortest prompt's"):
        kvcompile.prefill(model, ids, attention_mask=mask, question_length=10)
    both = kvcompile.prefill(model, ids, attention_mask=mask, question_length=9)
    for row, start in ((0, 0), (1, 30)):
        alone = kvcompile.prefill(model, ids[row : row + 1, start:], question_length=9)
        assert torch.equal(both.stored_tokens(0)[row], alone.stored_tokens(0)[0])
        assert torch.equal(both.positions(0)[row, :, : alone.positions(0).shape[2]],
                           alone.positions(0)[0])


def test_crop_reorder_and_beams():
    model = kvcompile.optimize(optimized("llama:2"), "snapkv(budget=40, window=8)+int8",
                               compile=False)
    cache = kvcompile.prefill(model, prompt(100, batch=2))
    want = copy.deepcopy(cache)
    model(prompt(5, batch=2, seed=1), past_key_values=cache, use_cache=True)
    cache.crop(-5)
    more = [model(prompt(3, batch=2, seed=2), past_key_values=c, use_cache=True).logits
            for c in (cache, want)]
    assert torch.equal(*more)
    with pytest.raises(KVCompileError, match="already dropped tokens"):
        cache.crop(-60)
    cache.batch_select_indices(torch.tensor([1, 1]))
    assert torch.equal(cache.positions(0)[0], want.positions(0)[1])
    beams = greedy(model, prompt(100), 8, num_beams=3)
    assert beams.shape == (1, 108)
    h2o = kvcompile.optimize(model, "h2o(budget=40)", compile=False)
    with pytest.raises(KVCompileError, match="already dropped tokens"):
        kvcompile.prefill(h2o, prompt(100)).crop(-2)


def test_windows_keep_their_own_tokens():
    report = kvcompile.explain(optimized("gemma2"), "snapkv(budget=64)")
    refused = [row.layer for row in report.rows if row.status == "refused"]
    assert refused == [0, 2]
    ours = kvcompile.optimize(optimized("gemma2"), "snapkv(ratio=1)", compile=False)
    assert torch.equal(greedy(ours, prompt(60), 20), greedy(plain("gemma2"), prompt(60), 20))


@pytest.mark.parametrize(("recipe", "text"), [
    ("snapkv(budget=0)", "budget must be at least 1"),
    ("snapkv(budget=-3)", "budget must be at least 1"),
    ("snapkv(budget=31)", "snapkv(budget=31): layer 0: a budget of 31 tokens a head, but 32 newest "
     "tokens always stay: give at least 32, or a smaller window"),
    ("lagkv(budget=20, length=17)", "4 first and 17 newest tokens always stay: give at least 21, "
     "or fewer sinks and a smaller window"),
    ("adakv(budget=16)+int8", "32 newest tokens always stay"),
    ("r-kv(budget=7)", "8 newest tokens always stay"),
    ("streamingllm-slots(budget=3)", "but 4 first tokens always stay: give at least 4, or fewer "
     "sinks"),
    ("h2o(ratio=1.5)", "ratio must be at most 1.0"),
    ("h2o(ratio=0)", "ratio must be at least 0.001"),
    ("snapkv(budget=5, ratio=0.5)", "give budget= (tokens) or ratio= (a share), not both"),
    ("snapkv+h2o", "'snapkv' and 'h2o' both set keep.score of layers 0-"),
    ("snapkv+streamingllm", "'streamingllm' and 'snapkv' both say which tokens stay"),
    ("adakv(scorer=kivi)", "kivi has no budget that another could set"),
    ("adakv(scorer=snapkv(budget=3))", "budget belongs to the method around it"),
    ("adakv(scorer=snapk)", "unknown method 'snapk'; did you mean 'snapkv'?"),
    ("adakv(scorer=finch, budget=9)", "finch takes ratio= only"),
    ("dms(scorer=expected_attention)", "expected scores whole prompts, not the tokens that follow"),
    ("h2o+protect", "unknown method 'protect'"),
    ("h2o+kivi(residual=96)", "blocks of 96 tokens are encoded together"),
    ("dms+kivi", "budget threshold evicts single tokens"),
    ("lagkv(decode=true, budget=9)", "lagkv: decode=true keeps a share of every part: give ratio="),
    ("duoattention(heads=[[1, 0]])", "was calibrated for 1 layers, but claims 4"),
    ("duoattention(heads=[[1, 0, 1], [0, 0, 0], [1, 0, 1], [0, 0, 0]])",
     "layer 0: a map of 3 heads for a layer of 2 kv heads"),
    (f"qfilters(filters={[[[1.0] * 8] * 2] * 4})",
     "qfilters(filters=..): layer 0: 2 directions of 8 channels for a layer of 2 kv heads of 16"),
    (f"chunkkv(scorer=qfilters(filters={[[[1.0] * 16]] * 4}), ratio=0.5)",
     "qfilters says for each layer what it keeps, and cannot be wrapped yet"),
    ('duoattention(file="there/is/none.tsv")', 'duoattention: file="there/is/none.tsv" cannot be '
     "read: No such file or directory"),
])
def test_bad_recipes_get_one_line(recipe, text):
    with pytest.raises(RecipeError) as info:
        kvcompile.optimize(optimized("llama"), recipe, compile=False)
    assert text in str(info.value) and "\n" not in str(info.value)


def test_a_published_pattern_of_heads(tmp_path):
    """The heads of the largest numbers of all keep everything; a pattern of another model, or none,
    gets one line."""
    file = tmp_path / "full_attention_heads.tsv"
    file.write_text("0.9\t0.1\n-0.2\t1.3\n")
    recipe = f'duoattention(file="{file}", sinks=1, recent=4)'
    model = kvcompile.optimize(optimized("llama:2"), recipe, compile=False)
    cache = kvcompile.prefill(model, prompt(20))
    assert [cache.stored_tokens(i).tolist() for i in (0, 1)] == [[[20, 5]], [[5, 20]]]
    assert model.kvcompile.program.recipe.terms[0].get("heads") == ((1, 0), (0, 1))
    for text, says in (("0.9\t0.1\n" * 3, "is a pattern of 3 layers of 2 kv heads, but 2 layers"),
                       ("0.9\t0.1\n0.5\n", "is a pattern of 2 layers of 1 or 2 kv heads, but 2"),
                       ("0.9\t0.1\t0.2\n" * 2, "a map of 3 heads for a layer of 2 kv heads"),
                       ("head one", "is no pattern of heads: could not convert string to float")):
        file.write_text(text)
        with pytest.raises(RecipeError) as info:
            kvcompile.optimize(optimized("llama:2"), recipe, compile=False)
        assert says in str(info.value) and "\n" not in str(info.value)


def test_a_budget_larger_than_the_prompt_is_said(caplog):
    model = kvcompile.optimize(optimized("llama:2"), "snapkv(budget=500)", compile=False)
    kvcompile.prefill(model, prompt(100))
    kvcompile.prefill(model, prompt(100))
    assert [r.getMessage() for r in caplog.records] == [
        "snapkv(budget=500): the prompt (100 tokens) is within the budget, and all of it is kept"]


@pytest.mark.parametrize(("recipe", "text"), [
    ("snapkv", "layer 0: chooses once, among all of a prompt's tokens, which it must see at once"),
    ("lagkv", "layer 0: compares the parts of a whole prompt; with decode=true each is cut"),
    ("finch", "layer 0: the question at a prompt's end looks at every part"),
    ("keydiff", "layer 0: chooses once, among all of a prompt's tokens"),
    ("simlayerkv", "layer 0: its budget, lazy(")])
def test_chunked_prompts_are_refused(recipe, text):
    with pytest.raises(KVCompileError) as info:
        kvcompile.optimize(optimized("llama:2"), recipe, compile=False, prefill_chunk=50)
    assert text in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("recipe", [
    "knorm(budget=24, decode=true)", "knorm(ratio=0.2, decode=true)",
    "dms(scorer=knorm, threshold=-3, delay=9)+int8",
    "duoattention(heads=[[1, 0], [0, 1]], sinks=2, recent=10)",
    "sepllm(separators=[7, 11, 20], recent=9)", "lagkv(length=9, decode=true, ratio=0.3)"])
def test_what_is_scored_alone_is_kept_alike_in_pieces(recipe):
    """In the first layer, whose keys do not depend on what later pieces see."""
    whole, pieces = (kvcompile.optimize(optimized("llama:2"), recipe, compile=False,
                                        prefill_chunk=n) for n in (None, 37))
    random = torch.Generator().manual_seed(0)          # no token twice: their norms would be equal
    ids = torch.stack([torch.randperm(125, generator=random)[:120] + 3 for _ in range(2)])
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    a, b = (kvcompile.prefill(m, ids, attention_mask=mask) for m in (whole, pieces))
    assert torch.equal(a.positions(0), b.positions(0))
    assert torch.equal(a.stored_tokens(1), b.stored_tokens(1)) or "knorm" in recipe


@pytest.mark.parametrize("chunk", slow_but((None, 29), [None, 1, 29]))
def test_parts_are_cut_when_the_next_one_is_complete(chunk):
    """LagKV: however the tokens come, a head of the first layer holds the same of them."""
    model = kvcompile.optimize(optimized("llama:2"), "lagkv(length=12, ratio=0.4, sinks=3, "
                               "decode=true)", compile=False, prefill_chunk=chunk)
    ids = torch.randperm(125, generator=torch.Generator().manual_seed(0))[None] + 3
    sample = Samples(model.kvcompile.program.snapshots["capture"], ids).attention[0]
    cache = kvcompile.prefill(model, ids[:, :61])
    for tokens in range(61, 126):
        want = [refs.lagkv_parts(k, v, tokens, 4, 12, 3)
                for k, v in zip(sample.k[0], sample.v[0], strict=True)]
        assert [held.tolist() for held in cache.positions(0)[0]] == want
        if tokens < 125:
            model(ids[:, tokens : tokens + 1], past_key_values=cache, use_cache=True)
    assert len(want[0]) == 125 - 9 * 8 and want[0] != want[1]


class Pieces:
    """The first layer of a model whose prompts come in pieces, in fp64 over lists of tokens."""

    def __init__(self, ids):
        gm = optimized("llama:2").kvcompile.program.snapshots["capture"]
        sample = Samples(gm, ids).attention[0]
        self.q, self.k, self.scale = sample.q[0].double(), sample.k[0].double(), sample.scale
        self.heads, self.group = len(self.k), len(self.q) // len(self.k)

    def weights(self, head, query, seen):
        """[G, tokens]: what a query gives the tokens `seen`."""
        own = slice(head * self.group, (head + 1) * self.group)
        return (self.q[own, query] @ self.k[head, seen].T * self.scale).softmax(-1)

    def kept(self, tokens, size, limit, recent, scores, slack=1):
        """[head]: what is held after pieces of `size`; scores(held by head, piece, first?)."""
        held = [[] for _ in range(self.heads)]
        for start in range(0, tokens, size):
            new = [*range(start, min(start + size, tokens))]
            score = scores(self, held, new)
            for head in range(self.heads):
                every = [*held[head], *new]
                most = limit if not start or len(every) >= limit + slack else len(every)
                age = 1 if start else -1               # of equals the first piece keeps the older
                free = sorted(every[: len(every) - recent],
                              key=lambda j: (score[head][j], age * j))  # noqa: B023
                held[head] = sorted({*every} - {*free[: max(0, len(every) - most)]})
        return held


def added_up(total):
    def scores(x, held, new):
        for head, score in enumerate(total):
            for t in new:
                seen = [*held[head], *range(new[0], t + 1)]
                for j, w in zip(seen, x.weights(head, t, seen).mean(0).tolist(), strict=True):
                    score[j] = score.get(j, 0.0) + w
        return total
    return scores


def seldom_looked_at(total, history):
    def scores(x, held, new):
        for head, score in enumerate(total):
            score.update(dict.fromkeys(new, 0))
            for t in new[-history:]:
                seen = [*held[head], *range(new[0], t + 1)]
                for j, w in zip(seen, x.weights(head, t, seen).mean(0).tolist(), strict=True):
                    score[j] -= w < 1 / len(seen)
        return total
    return scores


def last_query(x, held, new):
    """The mean over all heads, of tokens that all heads hold."""
    every = [*held[0], *new]
    mean = torch.stack([x.weights(h, new[-1], every).mean(0) for h in range(x.heads)]).mean(0)
    return [dict(zip(every, mean.tolist(), strict=True))] * x.heads


def unlike_the_mean(x, held, new):
    out = []
    for head, kept in enumerate(held):
        keys = x.k[head, [*kept, *new]]
        mean = (keys / keys.norm(dim=-1, keepdim=True)).mean(0)
        cos = keys @ mean / keys.norm(dim=-1) / mean.norm()
        out.append(dict(zip([*kept, *new], (-cos).tolist(), strict=True)))
    return out


def redundant(x, held, new, n=4, mix=0.1, kernel=7, alike=0.5):
    """R-KV, for which the last n queries of a piece look: of the prompt's first piece the largest
    logits of a kv head's queries count and the n tokens are apart, later the mean weight."""
    out = []
    for head, kept in enumerate(held):
        every, got = [*kept, *new], {}
        for t in new[-n:]:
            seen = [*kept, *range(new[0], t + 1)]
            for j, w in zip(seen, x.weights(head, t, seen).T / n, strict=True):
                got[j] = got.get(j, 0.0) + w
        weight = [float(got[j].mean()) for j in every]
        if not kept:
            own = x.q[head * x.group : (head + 1) * x.group, new[-n] : new[-1] + 1]
            logits = (own @ x.k[head, every[:-n]].T * x.scale).max(0).values
            weight = logits.softmax(-1).mean(0).tolist()
        weight = [max(weight[max(0, i - kernel // 2) : i + kernel // 2 + 1])
                  for i in range(len(weight))]
        unit = x.k[head, every] / x.k[head, every].norm(dim=-1, keepdim=True)
        cos = unit @ unit.T
        for i, row in enumerate(cos):
            row[i] = 0.0
            row[max((row > alike).nonzero().flatten().tolist(), default=0)] = 0.0
        part = cos.mean(0).softmax(-1).tolist()
        score = [mix * a - (1 - mix) * b for a, b in zip(weight, part, strict=False)]
        out.append(dict(zip(every, [*score, *[0.0] * n], strict=False)))
    return out


@pytest.mark.parametrize(("recipe", "limit", "recent", "scores", "slack"), [
    ("h2o(budget=24)", 24, 12, lambda: added_up([{}, {}]), 1),
    ("h2o(ratio=0.2)", 26, 13, lambda: added_up([{}, {}]), 1),
    ("tova(budget=24)", 24, 1, lambda: last_query, 1),
    ("tova(ratio=0.3)", 39, 1, lambda: last_query, 1),
    ("scissorhands(budget=24, every=1, recent=5)", 24, 5,
     lambda: seldom_looked_at([{}, {}], 400), 1),
    ("scissorhands(ratio=0.2, every=9, history=7)", 26, 10,
     lambda: seldom_looked_at([{}, {}], 7), 9),
    ("keydiff(budget=24, every=1)", 24, 0, lambda: unlike_the_mean, 1),
    ("keydiff(ratio=0.1, every=30)", 13, 0, lambda: unlike_the_mean, 30),
    ("r-kv(budget=24, every=1, window=4)", 24, 4, lambda: redundant, 1)])
def test_heads_go_back_to_their_budgets_after_every_piece(recipe, limit, recent, scores, slack):
    """A ratio is of the whole prompt, however many pieces it comes in."""
    model = kvcompile.optimize(optimized("llama:2"), recipe, compile=False, prefill_chunk=40)
    random = torch.Generator().manual_seed(0)          # keys of the same token could be equal
    ids = (torch.randperm(125, generator=random)[None] + 3).repeat(1, 2)[:, :130]
    got = kvcompile.prefill(model, ids)
    want = Pieces(ids).kept(130, 40, limit, recent, scores(), slack)
    assert [p.tolist() for p in got.positions(0)[0]] == want
    padded = torch.nn.functional.pad(ids, (13, 0), value=9)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (13, 0))
    model = kvcompile.optimize(model, recipe, compile=False, prefill_chunk=50)
    padded = kvcompile.prefill(model, padded, attention_mask=mask)
    assert all(limit <= n < limit + slack for n in padded.stored_tokens(0).flatten().tolist())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["h2o(budget=64)+int8", "r-kv(budget=48, every=16)"])
def test_one_compiled_step_serves_a_long_generation(recipe, monkeypatch):
    import kvcompile.engine

    graphs, original = [], kvcompile.engine.compile_graph
    monkeypatch.setattr(kvcompile.engine, "compile_graph",
                        lambda *args: graphs.append(args) or original(*args))
    ours = kvcompile.optimize(optimized("llama:2"), recipe, compile=True)
    short = greedy(ours, prompt(100), 20, return_dict_in_generate=True)
    long = greedy(ours, prompt(100), 400, return_dict_in_generate=True)
    eager = greedy(kvcompile.optimize(ours, recipe, compile=False), prompt(100), 400)
    assert torch.equal(long.sequences, eager)
    assert len(graphs) == 1
    assert long.past_key_values.nbytes == short.past_key_values.nbytes
