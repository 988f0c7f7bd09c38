"""optimize(verify=True): the laws on a run of the model, and what breaks them is named."""

import logging

import pytest
import torch
from support import EVERY, greedy, optimized, plain, prompt

import kvcompile
from kvcompile.audit import audit
from kvcompile.errors import LawError
from kvcompile.kernels import eager, pages


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


@pytest.mark.slow
def test_the_compiled_step_is_verified():
    model = kvcompile.optimize(plain("llama:2"), "streamingllm(sinks=4, window=200)+kivi(bits=2)",
                               verify=True)
    model(prompt(300), use_cache=True)
    assert {x.kernel for x in model.kvcompile.audit.layers} == {"fused C++"}
