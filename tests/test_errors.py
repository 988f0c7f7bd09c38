"""Bad input gets one clear line, and the model and its cache stay usable."""

import pytest
import torch
from support import greedy, optimized, plain, prompt
from torch import nn
from transformers import BertConfig, BertModel, DynamicCache

import kvcompile
from kvcompile import CacheFullError, KVCompileError, RecipeError, UnsupportedModelError
from kvcompile.models.tiny import tiny


def line(info) -> str:
    text = str(info.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("recipe", "text"), [
    ("kivvi", "unknown method 'kivvi' at column 1; did you mean 'kivi'? known: "
              + ", ".join(kvcompile.methods())),
    ("full+kivi(bit=2)", "unknown parameter 'bit' of kivi at column 11; did you mean 'bits'?"),
    ("kivi(bits=3)", "kivi(bits=3): column 1: bits must be one of 2, 4"),
    ("kivi+int8", "'kivi' and 'int8' both set format.k of layers 0-"),
    ("kivi(", "column 6"),
])
def test_recipes(recipe, text):
    with pytest.raises(RecipeError) as info:
        kvcompile.optimize(optimized("llama"), recipe)
    assert text in line(info)


def test_a_group_that_does_not_fit_the_head():
    with pytest.raises(RecipeError) as info:
        kvcompile.optimize(kvcompile.optimize(tiny("llama", head_dim=48), "full", compile=False),
                           "kivi(group=32)")
    assert line(info) == ("kivi: layer 0: int(bits=2): head dimension 48 is not a multiple of "
                          "group=32; use group=16 or 48")


def test_no_compiler(monkeypatch):
    from torch._inductor import config, cpp_builder

    monkeypatch.setenv("CXX", "no-such-compiler")
    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        none = config.patch({"cpp.cxx": ("no-such-compiler",)})
        with none, pytest.raises(KVCompileError) as info:
            kvcompile.optimize(optimized("llama"), "kivi")
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    assert line(info) == ("no working C++ compiler (no-such-compiler): install g++ or set CXX, or "
                          "pass compile=False for the slow plain bodies")


def test_not_a_decoder():
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=32, vocab_size=50))
    with pytest.raises(UnsupportedModelError) as info:
        kvcompile.optimize(bert, "full")
    assert line(info).startswith("BertModel")


FEW = {"falcon_h1": dict(num_hidden_layers=1),  # layers take half a minute each to trace
       "qwen3_next": dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])}


@pytest.mark.parametrize(("arch", "words"), [
    ("bloom", ("BloomForCausalLM", "softmax", "modeling_bloom.py")),
    ("mpt", ("MptForCausalLM", "modeling_mpt.py")),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("falcon_h1", ("FalconH1ForCausalLM", "mixes tokens", "modeling_falcon_h1.py")),
        ("qwen3_next", ("Qwen3NextForCausalLM", "mixes tokens", "modeling_qwen3_next.py")),
        ("minimax", ("MiniMaxForCausalLM", "mixes tokens", "modeling_minimax.py")))),
])
def test_models_that_would_decode_wrongly_are_refused(arch, words):
    with pytest.raises(UnsupportedModelError) as info:
        kvcompile.optimize(tiny(arch, **FEW.get(arch, {})), "full", compile=False)
    for word in words:
        assert word in line(info)


def test_a_capture_that_fails_names_the_line():
    model = tiny("llama")

    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    model.model.norm = Odd()
    with pytest.raises(UnsupportedModelError) as info:
        kvcompile.optimize(model, "full")
    assert "test_errors.py" in line(info)


def test_cache_full_before_anything_is_written():
    model = kvcompile.optimize(optimized("llama"), "kivi(bits=4)", compile=False, max_length=64)
    cache = model(prompt(60), use_cache=True).past_key_values
    before = [p.clone() for group in cache.groups for p in group.planes]
    with pytest.raises(CacheFullError) as info:
        model(prompt(5), past_key_values=cache)
    assert line(info) == "60 cached and 5 new tokens exceed max_length=64"
    after = [p for group in cache.groups for p in group.planes]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model(prompt(4), past_key_values=cache).past_key_values.get_seq_length() == 64


def test_a_cache_from_another_recipe_or_model():
    cache = optimized("llama", "int8")(prompt(5), use_cache=True).past_key_values
    with pytest.raises(KVCompileError, match="made by another model or recipe"):
        optimized("llama")(prompt(1), past_key_values=cache)
    theirs = DynamicCache(config=plain("llama").config)
    plain("llama")(prompt(5), past_key_values=theirs)
    with pytest.raises(KVCompileError, match="DynamicCache that already holds tokens"):
        optimized("llama")(prompt(1), past_key_values=theirs)
    with pytest.raises(KVCompileError, match="belongs to an optimized model"):
        plain("llama")(prompt(1), past_key_values=cache)


@pytest.mark.parametrize("recipe", ("full", "kivi(bits=4)", "streamingllm(window=32)"))
def test_nan_is_named_by_layer_and_rolled_back(recipe):
    model, ids = optimized("llama", recipe), prompt(150)
    weight = plain("llama").model.layers[1].self_attn.k_proj.weight
    cache = model(ids, use_cache=True).past_key_values
    planes = [p.clone() for group in cache.groups for p in group.planes]
    kept = weight[0, 0].item()
    try:
        with torch.no_grad():
            weight[0, 0] = torch.nan
        for call in (dict(input_ids=ids[:, :1]), dict(input_ids=ids[:, :40])):
            with pytest.raises(KVCompileError, match="K or V of layer 1 holds NaN"):
                model(**call, past_key_values=cache)
        with pytest.raises(KVCompileError, match="K or V of layer 1 holds NaN"):
            model(ids, use_cache=True)
    finally:
        with torch.no_grad():
            weight[0, 0] = kept
    assert cache.get_seq_length() == 150
    now = [p for group in cache.groups for p in group.planes]
    assert all(torch.equal(a, b[: a.shape[0]] if a.dim() > 2 and a.shape[0] < b.shape[0] else b)
               for a, b in zip(planes, now, strict=True) if a.dtype != torch.int32)
    fresh = model(ids, use_cache=True).past_key_values
    one, two = (model(ids[:, :1], past_key_values=c).logits for c in (cache, fresh))
    assert torch.equal(one, two)


def test_replaced_weights_are_refused_and_changed_ones_used():
    model = tiny("llama", seed=5, num_hidden_layers=1)
    ours, ids = kvcompile.optimize(model, "full", compile=True), prompt(12)
    greedy(ours, ids, 5)
    other = tiny("llama", seed=6, num_hidden_layers=1)
    model.load_state_dict(other.state_dict())
    assert torch.equal(greedy(ours, ids, 12), greedy(other, ids, 12))
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with pytest.raises(KVCompileError) as info:
        greedy(ours, ids, 5)
    assert "weights were replaced after optimize()" in line(info)


@pytest.mark.parametrize(("options", "text"), [
    (dict(output_attentions=True), "output_attentions=True is not supported: attention weights are "
                                   "never formed"),
    (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), "the prompt is empty"),
    (dict(attention_mask=torch.ones(1, 3)), "attention_mask is [1, 3], but 0 cached and 5 new"),
    (dict(attention_mask=torch.ones(1, 1, 5, 5)), "attention_mask has 4 dimensions"),
    (dict(token_type_ids=torch.ones(1, 5)), "forward got token_type_ids"),
])
def test_calls(options, text):
    with pytest.raises(KVCompileError) as info:
        optimized("llama")(**{"input_ids": prompt(5), **options})
    assert text in line(info)


def test_generate_options_that_cannot_be_combined():
    with pytest.raises(KVCompileError, match="kvcompile brings its own cache"):
        greedy(optimized("llama"), prompt(5), 3, cache_implementation="static")
    with pytest.raises(KVCompileError, match="max_length=0: must be a positive whole number"):
        kvcompile.optimize(plain("llama"), "full", max_length=0)
