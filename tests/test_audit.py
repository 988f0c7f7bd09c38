"""optimize(verify=True): the laws on a run of the model, and what breaks them is named."""

import logging
from functools import cache

import pytest
import torch
from support import EVERY, greedy, optimized, plain, prompt

import kvcompile
from kvcompile.checks.audit import audit, unchecked
from kvcompile.errors import LawError
from kvcompile.kernels import eager, pages
from kvcompile.kernels.rebuild import Rebuild
from kvcompile.models.tiny import tiny


@pytest.mark.parametrize("arch, recipe", [
    *(pytest.param("llama:2", *p.values, marks=p.marks, id=p.id) if hasattr(p, "values")
      else ("llama:2", p) for p in EVERY),
    ("gemma2:2", "streamingllm(sinks=4, window=32)+int8")])     # a soft cap and windows
def test_every_layer_is_within_its_bound(arch, recipe):
    """In padded rows, and in chunks; windows of the model's own hide tokens from the exact side."""
    program = optimized(arch).kvcompile.program.lower(recipe)
    ids = prompt(150, 2)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :40] = False
    found = audit(program, ids, valid=valid, steps=4, chunk=61, compile=False)
    assert [x.layer for x in found.layers] == [0, 1]
    assert all(x.error <= x.bound and x.kernel == "eager body" for x in found.layers)
    sizes = [s.store.nbytes(s.dims, s.dtype, s.heads, [150, 110]) if s.leads else 0
             for s in program.sites]
    assert [x.bytes for x in found.layers] == sizes
    kept = [s.store.stored(149) for s in program.sites]
    assert all((x.mass > 0) == (n < 149) or s.window for x, n, s in
               zip(found.layers, kept, program.sites, strict=True))


def test_several_tokens_on_a_filled_cache_in_a_model_that_views_its_output():
    """gpt-oss takes attention's output as [tokens, heads * dim] by a view; it has sinks too."""
    program = optimized("gpt_oss:2").kvcompile.program
    found = audit(program, prompt(40, 2), steps=1, chunk=30, compile=False)
    assert all(x.error <= x.bound < 1e-2 for x in found.layers)


@pytest.mark.parametrize("arch, recipe", [
    ("qwen2:2", "palu(ratio=0.6, whiten=false)+int8"),          # with an offset
    ("gpt_neox:2", "xquant"),                                   # V in K; a quarter is turned
    ("llama:2", "streamingllm-slots(budget=40)+int8"), ("llama:2", "finch(ratio=0.4, window=8)"),
    ("llama:2", "cam(budget=40)"), ("llama:2", "d2o(budget=40)+int8"),
    ("gemma2:2", "kvzip(ratio=0.4)")])
def test_keys_that_are_made_at_read_turned_or_merged(arch, recipe):
    """Each by its own law (docs/laws.md)."""
    program = optimized(arch).kvcompile.program.lower(recipe)
    ids = prompt(150, 2)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :40] = False
    found = audit(program, ids, valid=valid, steps=3, compile=False)
    assert all(x.error <= x.bound for x in found.layers) and found.logits.error > 1e-3
    assert any(x.mass > 0 for x in found.layers) != any(s.rebuilt for s in program.sites)


def test_a_prompt_read_twice_is_stored_once():
    """Layers beside those that read the prompt again stored it twice."""
    program = optimized("llama:2").kvcompile.program.lower("kvzip(ratio=0.5, layers=0)")
    found = audit(program, prompt(100), steps=2, compile=False)
    site = program.sites[1]
    assert found.layers[1].bytes == site.store.nbytes(site.dims, site.dtype, site.heads, [100])
    assert found.layers[1].error < 1e-5 and not found.layers[1].mass


@pytest.mark.parametrize("recipe", ["full", "kivi(bits=4)", "palu(whiten=false)",
                                    "snapkv(budget=40)+int8"])
def test_a_16_bit_model(recipe):
    model = kvcompile.optimize(half(), recipe, compile=False, verify=True)
    model(prompt(150, 2), use_cache=True)
    found = model.kvcompile.audit
    assert all(0 < x.error <= x.bound for x in found.layers)
    assert 1e-3 < found.logits.error < (0.2 if recipe == "full" else 10)


@cache
def half():
    return kvcompile.optimize(tiny("llama", num_hidden_layers=2, dtype=torch.bfloat16), "full",
                              compile=False)


def test_logits_are_measured():
    """Against the exact model; no law bounds them."""
    program = optimized("llama:2").kvcompile.program
    exact = audit(program, prompt(140, 2), compile=False).logits
    assert exact.error < 1e-4 and exact.kl < 1e-8 and exact.same == 1.0
    found = audit(program.lower("kivi(bits=2)"), prompt(140, 2), compile=False)
    assert found.logits.error > 0.05 and found.logits.kl > 1e-4
    assert f"off by {found.logits.error:.2g} at most" in str(found)
    assert found.as_dict()["logits"]["same"] == found.logits.same


def test_gpu_kernels_are_not_passed_over_in_silence():
    assert not unchecked(torch.device("cpu"))
    assert unchecked(torch.device("cuda:0")).startswith("NOT CHECKED: kernels on cuda")


def test_the_first_prompt_is_verified(caplog):
    model = kvcompile.optimize(optimized("llama:2"), "kivi(bits=4)", compile=False, verify=True)
    assert model.kvcompile.audit is None
    with caplog.at_level(logging.INFO, logger="kvcompile"):
        greedy(model, prompt(140), 2)
    found = model.kvcompile.audit
    assert found.tokens == 132 and found.steps == 8
    assert "the laws hold:\nrecipe kivi(bits=4): 8 steps after 132 tokens" in caplog.text
    assert found.as_dict()["layers"][1]["kernel"] == "eager body"
    greedy(model, prompt(9), 2)
    assert model.kvcompile.audit is found


def broken(monkeypatch, recipe="kivi(bits=4)"):
    model = kvcompile.optimize(optimized("llama:2"), recipe, compile=False, verify=True)
    with pytest.raises(LawError) as error:
        model(prompt(150), use_cache=True)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_wrong_kernel_is_named(monkeypatch):
    attend = eager.decode
    monkeypatch.setattr(eager, "decode", lambda q, k, v, *rest: attend(q, k, v.roll(1, 1), *rest))
    told = broken(monkeypatch)
    assert told.startswith("layer 0, store(k=int(bits=4, axis=channel), k_block=128, ")
    assert "kvc.attend (eager body): the output of query head" in told
    assert "from what the cache shows, allowed" in told and "(row 0, 142 tokens stored)" in told


def test_wrong_storage_names_the_pass(monkeypatch):
    write = pages.Tier.write
    monkeypatch.setattr(pages.Tier, "write", lambda self, row, heads, start, x: write(
        self, row, heads, start, x.roll(32, -2) if x.shape[1] == 128 else x))
    told = broken(monkeypatch)
    assert "layer 0" in told and "the cache breaks its contract: K of token" in told
    assert "passes: quantize" in told


def test_wrongly_rebuilt_keys_are_named(monkeypatch):
    keys = Rebuild.keys
    monkeypatch.setattr(Rebuild, "keys", lambda self, x: keys(self, x).roll(1, -2))
    told = broken(monkeypatch, "palu(whiten=false)")
    assert told.startswith("layer 0, store, kvc.attend (eager body): the output of query head")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full", "streamingllm(sinks=4, window=200)+kivi(bits=2)"])
def test_the_compiled_step_of_a_16_bit_model(recipe):
    model = kvcompile.optimize(half(), recipe, verify=True)
    model(prompt(300), use_cache=True)
    assert {x.kernel for x in model.kvcompile.audit.layers} == {"fused C++"}


@pytest.mark.slow
def test_the_compiled_step_is_verified():
    model = kvcompile.optimize(plain("llama:2"), "streamingllm(sinks=4, window=200)+kivi(bits=2)",
                               verify=True)
    model(prompt(300), use_cache=True)
    assert {x.kernel for x in model.kvcompile.audit.layers} == {"fused C++"}
