"""Layers whose tokens are merged when they are stored: the merge, decoding, graphs, bytes."""

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from support import greedy, optimized, plain, prompt
from transformers import AttentionInterface

import kvcompile
from kvcompile.calibration.samples import Samples
from kvcompile.errors import KVCompileError, RecipeError
from kvcompile.kernels import pages
from kvcompile.kernels.direction import Direction
from kvcompile.models.tiny import tiny
from kvcompile.passes.methods_merge import free, matched, neighbours
from kvcompile.plan import plan

GOLDEN = Path(__file__).parent / "golden"


def slerp(a, b, t):
    """Equation (1) of the paper for one pair of vectors, in plain numbers."""
    la, lb = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
    ua, ub = [x / la for x in a], [x / lb for x in b]
    angle = math.acos(max(-1.0, min(1.0, sum(x * y for x, y in zip(ua, ub, strict=True)))))
    wa, wb = (math.sin(s * angle) / math.sin(angle) for s in (1 - t, t))
    e = [wa * x + wb * y for x, y in zip(ua, ub, strict=True)]
    return [la * x for x in e], [lb * x for x in e], angle


def merged(a, b, t=0.6, kept=6):
    """a, b [128, D] as two layers have them once they were stored."""
    a, b = a.clone(), b.clone()
    made = [slerp(x, y, t) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    order = sorted(range(128), key=lambda i: -made[i][2])
    for i in order[kept:]:
        a[i], b[i] = torch.tensor(made[i][0]), torch.tensor(made[i][1])
    return a, b


@pytest.mark.parametrize("t, kept", [(0.6, 6), (0.0, 0), (0.5, 20)])
def test_the_merge_is_the_paper_s(t, kept):
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(128, 24, generator=g) for _ in range(2))
    b[:64] += 2 * a[:64]
    got = Direction(t=t, kept=kept)
    planes = got.encode(torch.cat([a, b], -1), "k")
    assert planes["data"].numel() == 128 * 24, "one direction for both"
    back = got.decode(planes, 48, torch.float32, "k")
    want = torch.cat(merged(a, b, t, kept), -1)
    # lengths are rounded to fp16, sines and sums to fp32
    assert (back - want).abs().max() <= want.abs().max() * (2.0**-11 + 64 * 2.0**-24)
    exact = (back == torch.cat([a, b], -1)).all(-1)
    assert exact.sum() == kept


def test_vectors_without_angle_come_back():
    """Zeros, equal and opposite directions: no number is lost or NaN."""
    g = torch.Generator().manual_seed(2)
    a = torch.randn(128, 16, generator=g)
    b = a * torch.rand(128, 1, generator=g)
    b[3], a[4] = 0, 0
    a[5], b[5] = 0, 0
    fmt = Direction(kept=0)
    back = fmt.decode(fmt.encode(torch.cat([a, b], -1), "v"), 32, torch.float32, "v")
    assert (back - torch.cat([a, b], -1)).abs().max() <= 4 * 2.0**-11
    assert not back[5].any() and not back[3, 16:].any() and not back[4, :16].any()
    both = fmt.encode(torch.cat([a, -a], -1), "v")
    assert all(torch.isfinite(x).all() for x in both.values())


class Theirs:
    """transformers' model, token by token, with the K and V of layers 2 and 3 merged by blocks."""

    def __init__(self, arch):
        self.model, self.stored, self.calls = tiny(arch), {}, 0
        AttentionInterface.register("merging", self.attend)
        self.model.set_attn_implementation("merging")

    def attend(self, module, q, k, v, mask, scaling=None, **_):
        layer, given = module.layer_idx, q.shape[2]
        old = self.stored.get(layer)
        now = (k, v) if old is None else tuple(torch.cat(x, 2) for x in zip(old, (k, v),
                                                                           strict=True))
        self.stored[layer] = now
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in now)
        hidden = torch.ones(given, keys.shape[2]).tril(keys.shape[2] - given).bool()
        o = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=hidden,
                                                             scale=scaling)
        return o.transpose(1, 2), None

    def __call__(self, ids):
        """Logits of the call's last token, after which whole blocks are merged."""
        before = self.calls
        self.calls += ids.shape[1]
        positions = torch.arange(before, self.calls)[None]
        with torch.no_grad():
            logits = self.model(ids, position_ids=positions, use_cache=False).logits[:, -1]
        for start in range(before // 128 * 128, self.calls - 127, 128):
            for side in range(2):
                for head in range(self.stored[2][side].shape[1]):
                    a, b = (self.stored[i][side][0, head, start : start + 128] for i in (2, 3))
                    for x, new in zip((a, b), merged(a, b), strict=True):
                        x.copy_(new)
        return logits


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_decoding_sees_what_was_merged(arch):
    """Every step's logits against transformers' model over caches that are merged by hand."""
    model, theirs = optimized(arch, "minicache"), Theirs(arch)
    out = greedy(model, prompt(120), 140, return_dict_in_generate=True, output_logits=True)
    ids, got = out.sequences, torch.cat(out.logits)
    want = [theirs(ids[:, :120]), *(theirs(ids[:, i : i + 1]) for i in range(120, 259))]
    error = (torch.cat(want) - got).abs().amax(-1)
    # rounded lengths: 2^-11 of K and V, which layers and the head multiply; measured 5e-3 at most
    assert error[:8].max() < 1e-4 < 0.02 and error.max() < 0.02
    exact = greedy(plain(arch), prompt(120), 140, return_dict_in_generate=True, output_logits=True)
    same = (exact.sequences == ids)[0, 120:].cumprod(0).bool()
    assert (torch.cat(exact.logits) - got)[9:].abs().max() > 0.1 or not same.all()


def test_retaining_all_is_exact():
    model = optimized("llama", "minicache(retained=1)")
    assert torch.equal(greedy(model, prompt(150), 20), greedy(plain("llama"), prompt(150), 20))


@pytest.mark.parametrize("name", ["quantize", "merge", "insert_cache"])
def test_the_graph_has_one_direction_for_a_pair(name, request):
    model = tiny("llama", num_hidden_layers=2)
    program = kvcompile.capture(model, "minicache(start=0)+kivi(bits=4)")
    text = str(program.after(name)) + "\n"
    path = GOLDEN / f"minicache-{name}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text()
    if name == "insert_cache":
        assert [f"g0_{s}_body_codes = input" in text for s in "kv"] == [True, True]
        assert "g1_" not in text and text.count("kvc.append(") == 1
        for layer in range(2):
            assert f"layers.{layer}.self_attn.k_proj" in text, "the merge needs both"


RECIPES = ("minicache", "minicache+kivi(bits=4)", "minicache(start=0, t=0.5)+int8",
           "minicache(pairs=[[0, 3], [1, 2]])+kivi(bits=2, group=16, residual=32)",
           "streamingllm(sinks=4, window=150)+minicache+int8")


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_rows_and_crops(recipe):
    model = optimized("llama", recipe)
    report = kvcompile.explain(model)
    for tokens, batch in ((1, 1), (129, 3), (400, 1)):
        with torch.no_grad():
            cache = model(prompt(tokens, batch), use_cache=True).past_key_values
        assert cache.nbytes == report.kv_bytes(tokens, batch)
    assert cache.stored_tokens(2).tolist() == cache.stored_tokens(3).tolist()
    ids = prompt(150, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    both = greedy(model, ids, 12, attention_mask=mask)
    assert torch.equal(both[1, 11:], greedy(model, ids[1:, 11:], 12)[0])


def merged_keys(cache, n):
    """Keys of the first n tokens of a row's merged layers, as they are stored."""
    (group,) = (g for g in cache.groups if len(g.site.members))
    store, dim = group.site.layout, group.site.dims[0]
    held = pages.tiers(store, "k", pages.named(group.specs, group.planes, [0]), dim, torch.float32)
    return pages.stored(store, "k", held, 0, slice(0, 2), int(group.planes[0][0, 0, 0]))[:, :n]


def test_a_crop_gives_back_what_was_merged():
    model = optimized("llama", "minicache")
    with torch.no_grad():
        cache = model(prompt(256), use_cache=True).past_key_values
        before = merged_keys(cache, 200)
        cache.crop(200)
    assert cache.nbytes > 0 and cache.stored_tokens(3).tolist() == [[200, 200]]
    after = merged_keys(cache, 200)
    assert torch.equal(after, before)  # a block that stays, and what is left of one, as decoded


def test_explain_says_what_became_of_the_layers():
    report = kvcompile.explain(optimized("llama"), "minicache+kivi(bits=4)")
    rows = {(r.layer, r.name): r for r in report.rows}
    assert rows[3, "merge"].what == "one direction with layer 2"
    assert rows[3, "merge"].storage.endswith("with layer 2")
    assert (1, "merge") not in rows
    assert {r.kernel for r in report.rows} == {"fused C++"}
    quarot = kvcompile.explain(optimized("llama"), "minicache+quarot")
    assert any("direction has no C++ reader around hadamard" in r.why for r in quarot.rows)


def test_the_pairs():
    for layers in (30, 32):
        pairs = tuple((i, i + 1) for i in range(16, layers, 2))
        assert neighbours(free(range(layers), 0.5)) == pairs
    assert neighbours((4, 5, 6)) == ((5, 6),)
    axes = plan("minicache(layers=2:)", 8)
    assert [p.get("merge") for p in axes] == [None] * 6 + [(6, 7)] * 2


def test_calibrated_pairs_are_the_best_matching():
    g = torch.Generator().manual_seed(0)
    alike = torch.rand(6, 6, generator=g)
    alike = alike + alike.mT
    alike[0, 1] = alike[1, 0] = torch.nan
    layers = [3, 4, 5, 8, 9, 11]
    best = max((alike[a[0], a[1]] + alike[b[0], b[1]] + alike[c[0], c[1]], {a, b, c})
               for a, b, c in combinations(combinations(range(6), 2), 3)
               if len({*a, *b, *c}) == 6 and (0, 1) not in (a, b, c))[1]
    assert set(matched(layers, alike)) == {(layers[i], layers[j]) for i, j in best}
    program = optimized("llama").kvcompile.program
    ids = prompt(80, 2)
    found = program.lower("minicache(start=0, pairs=calibrated)", calibration=ids)
    pairs = found.recipe.terms[0].get("pairs")
    seen = Samples(program.snapshots["capture"], ids).attention
    cosine = torch.nn.functional.cosine_similarity
    by_hand = {frozenset(pair): sum(float(cosine(x, y, dim=-1).mean()) for x, y in
                                    ((seen[pair[0]].k, seen[pair[1]].k),
                                     (seen[pair[0]].v, seen[pair[1]].v)))
               for pair in combinations(range(4), 2)}
    want = max(([(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 3), (1, 2)]),
               key=lambda both: sum(by_hand[frozenset(pair)] for pair in both))
    assert sorted(pairs) == want
    assert [s.members for s in found.sites] == [next(p for p in want if i in p) for i in range(4)]
    default = program.lower("minicache", calibration=ids)
    assert str(default.recipe) == "minicache", "nothing was asked for"


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_tokens():
    recipe = "minicache(start=0)+kivi(bits=4, group=16, residual=32)"
    want = greedy(optimized("llama:2", recipe), prompt(250), 12)
    assert torch.equal(greedy(optimized("llama:2", recipe, compile=True), prompt(250), 12), want)


def test_bytes_of_the_flagship():
    """SmolLM2's heads: 30 layers, of which 7 pairs are merged, at 4,096 tokens, bf16."""
    model = tiny("llama", head_dim=64, dtype=torch.bfloat16)
    full = 4096 * 2 * 2 * 64 * 2 * 30
    for bits, least in ((2, 4.8), (4, 3.3)):
        report = kvcompile.explain(model, f"minicache+kivi(bits={bits})")
        lone, pair = (s.store.nbytes(s.dims, s.dtype, s.heads, [4096]) for s in report.sites[1:3])
        assert report.sites[2].members == (2, 3)
        assert full / (16 * lone + 7 * pair) >= least
    body = dict(report.sites[2].store.k.format.planes(128, torch.bfloat16, "k"))
    assert set(body) == {"codes", "scale", "low", "length", "place", "exact"}


def test_what_cannot_be_merged():
    def refused(arch, recipe):
        report = kvcompile.explain(optimized(arch), recipe)
        return {r.layer: r.what for r in report.rows if r.status == "refused"}

    assert refused("gemma2", "minicache") == dict.fromkeys(
        (2, 3), "the window of layers 2 and 3 differ: 8, 0")
    assert refused("llama", "minicache+int8(layers=3)+fp8(layers=2)")[3].startswith(
        "the store of layers 2 and 3 differ: store(k=fp8")
    assert refused("deepseek_v2:2", "minicache(start=0)") == dict.fromkeys(
        (0, 1), "layer 0 stores one latent for K and V")
    assert refused("llama", "minicache+cla") == dict.fromkeys((2, 3), "layer 3 stores nothing")
    assert refused("llama", "minicache+full(layers=2)") == dict.fromkeys(
        (2, 3), "layer 2 is kept by itself")
    for recipe, message in (
            ("minicache(pairs=[[0, 1], [1, 2]])", "each layer can be in one pair only"),
            ("minicache(pairs=[0, 1])", "must be a list of lists of two layers"),
            ("minicache(pairs=[[0, 9]])", "layer 9 is not among those claimed"),
            ("minicache(t=2)", "t must be at most 1")):
        with pytest.raises(RecipeError, match=message):
            plan(recipe, 4)
    program = optimized("llama", "minicache").kvcompile.program
    ids = prompt(5)
    with pytest.raises(KVCompileError, match="layers 2, 3 are stored together: only decoding"):
        program.graph_module(ids, torch.arange(5)[None], torch.ones_like(ids).bool(),
                             torch.arange(5))
    with pytest.raises(KVCompileError, match="minicache: merge.* a KVCache by itself cannot"):
        kvcompile.KVCache(plain("llama").config, "minicache")
