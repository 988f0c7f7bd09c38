"""Layers that attend to the K and V of earlier ones: graph, storage, tokens, calibrated maps."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from support import decodes_what_the_graph_says, greedy, optimized, plain, prompt
from transformers import AttentionInterface

import kvcompile
from kvcompile.calibration.samples import Samples
from kvcompile.errors import KVCompileError, RecipeError
from kvcompile.models.tiny import tiny
from kvcompile.plan import plan

GOLDEN = Path(__file__).parent / "golden"
MAPS = {"share(map=[0, 0, 2, 0])": [0, 0, 2, 0], "cla": [0, 0, 2, 2], "yoco": [0, 1, 2, 2],
        "mlkv(owners=1)": [0, 0, 0, 0], "cla(factor=3)": [0, 0, 0, 3], "share": [0, 1, 2, 3]}


def theirs(arch, owners, ids):
    """Logits of transformers' model whose layer i attends to the k and v of layer owners[i]."""
    model, seen = tiny(arch), {}

    def attend(module, q, k, v, mask, scaling=None, **_):
        seen[module.layer_idx] = k, v
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1)
                for x in seen[owners[module.layer_idx]])
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return o.transpose(1, 2), None

    AttentionInterface.register("of_owners", attend)
    model.set_attn_implementation("of_owners")
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("recipe", MAPS)
def test_maps(recipe):
    owners = [p.get("owner.k", i) for i, p in enumerate(plan(recipe, 4))]
    assert owners == MAPS[recipe]


def test_the_same_maps_on_some_layers():
    assert [p.get("owner.v") for p in plan("cla(layers=2:)", 5)] == [None] * 3 + [2, None]
    assert [p.get("owner.v") for p in plan("share(layers=[1, 3], map=[1, 1])", 4)] == [
        None, None, None, 1]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("recipe", ["share(map=[0, 0, 2, 0])", "cla"])
def test_tokens_are_those_of_a_model_that_shares(arch, recipe):
    """Prompt and decoding steps through the cache against whole sequences in transformers."""
    model, ids = optimized(arch, recipe), prompt(150)
    out = greedy(model, ids, 20, return_dict_in_generate=True, output_logits=True)
    want = theirs(arch, MAPS[recipe], out.sequences)[0, 149:-1]
    got = torch.cat(out.logits)
    assert (got - want).abs().max() <= 1e-4 + 1e-5 * want.abs().max()
    assert (theirs(arch, range(4), out.sequences)[0, 149:-1] - want).abs().max() > 0.1


@pytest.mark.parametrize("name", ["canonicalize", "share"])
def test_the_projections_of_consumers_leave_the_graph(name, request):
    model = tiny("llama", num_hidden_layers=2)
    program = kvcompile.capture(model, "cla+kivi(bits=4)")
    text = str(program.after(name)) + "\n"
    path = GOLDEN / f"cla-{name}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text()
    for weight in ("k_proj", "v_proj"):
        assert f"layers.0.self_attn.{weight}" in text
        gone = name == "share"
        assert (f"layers.1.self_attn.{weight}" not in text) == gone
        for gm in program.phases.values():
            assert f"layers.1.self_attn.{weight}" not in gm.code.replace("_", ".").replace(
                "k.proj", "k_proj").replace("v.proj", "v_proj").replace("self.attn", "self_attn")


def test_an_identity_map_changes_nothing():
    model = plain("llama")
    shared, full = (kvcompile.capture(model, r) for r in ("share(map=[0, 1, 2, 3])", "full"))
    assert str(shared.after("share")).split("\n")[1:] == str(full.after("share")).split("\n")[1:]
    assert torch.equal(greedy(optimized("llama", "share"), prompt(9), 30),
                       greedy(plain("llama"), prompt(9), 30))


RECIPES = ("cla+kivi(bits=4, residual=32)", "share(map=[0, 0, 0, 1])+int8",
           "streamingllm(sinks=4, window=40)+cla+int8", "yoco+kivi(bits=2, group=16, residual=16)")


@pytest.mark.parametrize("recipe", RECIPES)
def test_compositions_decode_what_the_graph_says(recipe):
    decodes_what_the_graph_says("llama", recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_owners_take_bytes(recipe):
    model = optimized("llama", recipe)
    report, sites = kvcompile.explain(model), model.kvcompile.program.sites
    owners = [s.layer if s.owner is None else s.owner for s in sites]
    assert len(set(owners)) < 4
    for batch in (1, 3):
        with torch.no_grad():
            cache = model(prompt(200, batch), use_cache=True).past_key_values
        assert cache.nbytes == report.kv_bytes(200, batch)
        for layer, owner in enumerate(owners):
            assert torch.equal(cache.stored_tokens(layer), cache.stored_tokens(owner))
            assert torch.equal(cache.positions(layer), cache.positions(owner))
            assert str(sites[layer].store) == str(sites[owner].store)
    lone = kvcompile.explain(model, "+".join(
        t for t in recipe.split("+") if not t.startswith(("cla", "share", "yoco"))))
    per_layer = lone.kv_bytes(200) / 4
    assert report.kv_bytes(200) == per_layer * len(set(owners))
    rows = {(r.layer, r.name): r for r in report.rows}
    for layer, owner in enumerate(owners):
        if owner != layer:
            assert rows[layer, "share"].storage == f"that of layer {owner}"
            assert rows[layer, "quantize"].what == f"as layer {owner}"
            assert rows[layer, "quantize"].after == 0


def test_padding_turns_crops_and_batches():
    model = optimized("llama", "cla+int8")
    ids = prompt(40, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    both = greedy(model, ids, 12, attention_mask=mask)
    assert torch.equal(both[1, 11:], greedy(model, ids[1:, 11:], 12)[0])
    first = greedy(model, ids[:1], 12, return_dict_in_generate=True)
    cache = first.past_key_values
    cache.crop(30)
    again = greedy(model, first.sequences[:, :40], 12, past_key_values=cache)
    assert torch.equal(again[0, :44], first.sequences[0, :44])


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_tokens():
    want = greedy(optimized("llama", "cla+kivi(bits=4)"), prompt(150), 12)
    assert torch.equal(greedy(optimized("llama", "cla+kivi(bits=4)", compile=True), prompt(150),
                              12), want)


def test_numbers_that_cannot_be_stored_name_the_owner():
    model = tiny("llama")
    shared = kvcompile.optimize(model, "cla", compile=False)
    with torch.no_grad():
        model.model.layers[3].self_attn.v_proj.weight[0, 0] = torch.nan  # a consumer's: not read
        assert torch.isfinite(shared(prompt(5)).logits).all()
        model.model.layers[2].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(KVCompileError, match="K or V of layer 2 holds NaN"):
        shared(prompt(5))


def test_other_windows_and_heads_are_refused():
    report = kvcompile.explain(optimized("gemma2"), "cla")
    refused = {r.layer: (r.what, r.node) for r in report.rows if r.status == "refused"}
    assert refused[1] == ("layer 0 has a window of 8, not 0 tokens", "attention_1")
    assert set(refused) == {1, 3}
    assert all(s.owner is None for s in report.sites)
    with pytest.raises(RecipeError, match="layer 1 cannot attend to the K of 2: it must be"):
        kvcompile.explain(optimized("llama"), "share(map=[0, 2, 2, 3])")
    with pytest.raises(RecipeError, match="names the owners of 2 layers, but 4 are claimed"):
        kvcompile.explain(optimized("llama"), "share(map=[0, 0])")
    with pytest.raises(RecipeError, match="'cla' and 'mlkv' both set owner.k of layer 3"):
        kvcompile.explain(optimized("llama"), "cla+mlkv(owners=1)")
    with pytest.raises(KVCompileError, match="cla: owner.k changes the model's graph, which a KVC"):
        kvcompile.KVCache(plain("llama").config, "cla+int8")


def test_kvsharer_ranks_pairs_by_distance_and_keeps_what_stays_alike():
    model, ids = optimized("llama"), prompt(64, 3)
    program = model.kvcompile.program
    found = program.lower("kvsharer(shared=2, threshold=-1)", calibration=ids)
    layers = Samples(program.snapshots["capture"], ids).attention
    flat = [torch.cat([s.k.mean(0).reshape(-1), s.v.mean(0).reshape(-1)]) for s in layers]
    ranked = sorted(combinations(range(4), 2), key=lambda p: -torch.dist(flat[p[0]], flat[p[1]]))
    owners = list(range(4))
    for i, j in ranked:  # every pair is accepted: owners stay owners, consumers copy once
        if owners[i] == i and owners[j] == j and j not in owners[:j] + owners[j + 1:]:
            owners[j] = i
        if sum(o != n for n, o in enumerate(owners)) == 2:
            break
    assert list(found.recipe.terms[0].get("map")) == owners
    assert [s.owner for s in found.sites] == [None if o == i else o for i, o in enumerate(owners)]
    assert "kvsharer(shared=2, threshold=-1, map=" in str(found.recipe)


def test_kvsharer_keeps_only_pairs_above_the_threshold(caplog):
    model, ids = optimized("llama"), prompt(64, 3)
    program = model.kvcompile.program
    none = program.lower("kvsharer(shared=3, threshold=1)", calibration=ids)
    assert none.recipe.terms[0].get("map") == (0, 1, 2, 3)
    assert "0 layers of the 3 asked for" in caplog.text
    exact = theirs("llama", range(4), ids)
    samples = Samples(program.snapshots["capture"], ids)
    hidden = samples.hidden("full")
    head = plain("llama").lm_head.weight
    assert (hidden @ head.mT - exact).abs().max() <= 1e-4  # what the logits are made from
    one = program.lower("kvsharer(shared=1, threshold=0.3)", calibration=ids)
    kept = one.recipe.terms[0].get("map")
    cosine = torch.nn.functional.cosine_similarity(
        samples.hidden(f"share(map={list(kept)})"), hidden, dim=-1).mean()
    assert kept != (0, 1, 2, 3) and cosine > 0.3
