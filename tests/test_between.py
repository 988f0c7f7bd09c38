"""What lies between attentions of prompts and later turns, compiled once for layers alike."""

import pytest
import torch
from support import greedy, optimized, prompt

import kvcompile
import kvcompile.between as between
from kvcompile.alone import Alone
from kvcompile.ir import APPEND, ATTEND, ATTENTION
from kvcompile.rewrite import copy_graph

# calls that stand for the layers of the tiny model, of which there are four; its first layer begins
# before any attention, its last one ends after all of them
ARCHS = {"llama": 3, "gpt2": 3, "gemma3_text": 3, "qwen3": 3, "mixtral": 3, "gpt_oss": 3,
         "deepseek_v2": 2}
SLOW = ("gpt_oss", "mixtral", "deepseek_v2", "qwen3")


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, for calls of two tokens on. They are run as they are, and kvc
    ops by their plain bodies."""
    found = []

    def run(gm, inputs, dynamic):
        found.append((gm, inputs, dynamic))
        return gm

    monkeypatch.setattr(between, "MANY", 2)
    monkeypatch.setattr(between, "compile_graph", run)
    monkeypatch.setattr(Alone, "_fits", lambda *_: False)
    return found


def turns(model, batch=1):
    """Logits of a prompt and of a later turn."""
    first = model(prompt(50, batch), use_cache=True)
    return first.logits, model(prompt(9, batch), past_key_values=first.past_key_values).logits


def calls(gm):
    gm = copy_graph(gm)
    runs = {made.run for made in between.between(gm)}
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target in runs]


@pytest.mark.parametrize("arch", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x
                                  for x in ARCHS])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_logits(arch, batch, graphs):
    model = kvcompile.optimize(optimized(arch), "full", compile=True)
    for phase in ("prefill", "extend"):
        assert len(calls(model.kvcompile.program.phases[phase])) == ARCHS[arch]
    for got, want in zip(turns(model, batch), turns(optimized(arch), batch), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2, "one graph for prompts and one for later turns"


@pytest.mark.parametrize("recipe", ["kivi(bits=2)", "h2o(budget=24)+int8", "adakv(budget=40)",
                                    "minicache(start=0)", "cla", "razorattention", "prerope+kivi"])
def test_every_way_to_store(recipe, graphs):
    model = kvcompile.optimize(optimized("llama"), recipe, compile=True)
    want = turns(optimized("llama", recipe))
    for got, right in zip(turns(model), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    assert graphs


def test_attention_and_storing_stay_outside(graphs):
    model = kvcompile.optimize(optimized("llama"), "kivi(bits=4)", compile=True)
    turns(model)
    for gm, inputs, dynamic in graphs:
        assert not {n.target for n in gm.graph.nodes} & {ATTENTION, ATTEND, APPEND}
        assert all(x.dtype.is_floating_point for x in inputs), "sizes are read off activations"
        assert sum(map(bool, dynamic)) == 4, "o, what it is added to, cos and sin vary with tokens"


def test_embeddings_instead_of_ids(graphs):
    plain = optimized("llama")
    model = kvcompile.optimize(plain, "full", compile=True)
    embeds = plain.get_input_embeddings()(prompt(50))
    torch.testing.assert_close(model(inputs_embeds=embeds, use_cache=True).logits,
                               plain(prompt(50), use_cache=True).logits, rtol=1e-4, atol=1e-5)
    assert graphs


def test_short_calls_are_not_compiled(monkeypatch):
    def refuse(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(between, "compile_graph", refuse)
    monkeypatch.setattr(Alone, "_fits", lambda *_: False)
    model = kvcompile.optimize(optimized("llama"), "full", compile=True)
    assert torch.equal(turns(model)[0].argmax(-1), turns(optimized("llama"))[0].argmax(-1))
    plain = kvcompile.optimize(optimized("llama"), "full", compile=False)
    monkeypatch.setattr(between, "MANY", 2)
    turns(plain)


def test_compiled_once_for_all_lengths_and_any_larger_batch(monkeypatch):
    found, original = [], between.compile_graph

    def count(gm, inputs, dynamic):
        found.append(gm)
        return original(gm, inputs, dynamic)

    monkeypatch.setattr(between, "MANY", 2)
    monkeypatch.setattr(between, "compile_graph", count)
    monkeypatch.setattr(Alone, "_fits", lambda *_: False)
    model = kvcompile.optimize(optimized("llama"), "kivi(bits=4)", compile=True)
    for batch, tokens in ((1, 40), (1, 7), (1, 300), (2, 30), (5, 41)):
        got = model(prompt(tokens, batch), use_cache=True).logits
        want = optimized("llama", "kivi(bits=4)")(prompt(tokens, batch), use_cache=True).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(found) == 2


def test_weights_changed_in_place_count_at_once(graphs):
    plain = optimized("llama")
    model = kvcompile.optimize(plain, "full", compile=True)
    before = turns(model)[0]
    weight = dict(plain.named_parameters())["model.layers.2.mlp.up_proj.weight"]
    with torch.no_grad():
        weight *= 2
    try:
        after = turns(model)[0]
        torch.testing.assert_close(after, turns(plain)[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, after, rtol=1e-3)
    finally:
        with torch.no_grad():
            weight /= 2


@pytest.mark.slow
def test_tokens_of_generate(monkeypatch):
    monkeypatch.setattr(between, "MANY", 2)
    model = kvcompile.optimize(optimized("llama"), "kivi(bits=4)", compile=True)
    want = greedy(optimized("llama", "kivi(bits=4)"), prompt(140, 2), 10)
    assert torch.equal(greedy(model, prompt(140, 2), 10), want)
