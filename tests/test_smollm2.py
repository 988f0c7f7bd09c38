"""The real model: exact under `full`, and as small as the recipes promise."""

from functools import cache

import pytest
import torch
from support import greedy, needs_smollm2

import kvcompile
from kvcompile.models.smollm2 import smollm2, topics_ids

pytestmark = needs_smollm2


@cache
def models(dtype: torch.dtype):
    model, tokenizer = smollm2(dtype)
    return model, kvcompile.optimize(model, "full", compile=False), tokenizer


def test_capture_leaves_the_model_alone_and_full_is_exact():
    model, _ = smollm2(torch.float32)
    config, state = model.config.to_json_string(), {k: v.clone()
                                                    for k, v in model.state_dict().items()}
    _, ours, tokenizer = models(torch.float32)
    ids = topics_ids(tokenizer, 1000)
    options = dict(return_dict_in_generate=True, output_logits=True, eos_token_id=None)
    want, got = (greedy(m, ids, 24, **options) for m in (model, ours))
    assert torch.equal(want.sequences, got.sequences)
    for a, b in zip(want.logits, got.logits, strict=True):
        assert (a - b).abs().max() <= 1e-4 + 1e-5 * a.abs().max()
    assert model.config.to_json_string() == config
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_text_generation_pipeline():
    from transformers import pipeline

    _, ours, tokenizer = models(torch.float32)
    pipe = pipeline("text-generation", model=ours, tokenizer=tokenizer)
    text = pipe("The capital of France is", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert "Paris" in text


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "factor"), [
    ("kivi(bits=4)", 2.8), ("kivi(bits=2)", 4.4), ("kivi(bits=4, group=64)", 3.05), ("int8", 1.7),
    ("fp8", 1.9), ("streamingllm(sinks=4, window=1024)", 3.5)])
def test_bytes_at_4096_tokens(recipe, factor):
    model, ours, tokenizer = models(torch.bfloat16)
    ids = topics_ids(tokenizer, 4096)
    small = kvcompile.optimize(ours, recipe, compile=False)
    cache = small(ids, use_cache=True, logits_to_keep=1).past_key_values
    config = model.config
    exact = (2 * 2 * 4096 * config.num_hidden_layers * config.num_key_value_heads
             * config.hidden_size // config.num_attention_heads)
    assert cache.nbytes * factor <= exact
    assert kvcompile.explain(small).kv_bytes(4096) == cache.nbytes
    assert kvcompile.explain(small).baseline_kv_bytes(4096) == exact
