"""Kept tokens against an outside implementation, where there is one: pip install kvpress."""

from importlib.util import find_spec

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvcompile

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(find_spec("kvpress") is None, reason="pip install kvpress")]

CASES = {                         # recipe: a press, its options, and the press that it is around
    "snapkv(ratio=0.5)": ("SnapKVPress", {"window_size": 32}),
    "snapkv(ratio=0.25, window=64)": ("SnapKVPress", {"compression_ratio": 0.75}),
    "tova(ratio=0.5)": ("TOVAPress", {}),
    "knorm(ratio=0.5)": ("KnormPress", {}),
    "keydiff(ratio=0.5)": ("KeyDiffPress", {}),
    "expected_attention(ratio=0.5)": ("ExpectedAttentionPress", {}),
    "streamingllm-slots(ratio=0.5, positions=original)": ("StreamingLLMPress", {}),
    "adakv(scorer=snapkv, ratio=0.5)": ("AdaKVPress", {}, "SnapKVPress"),
    "criticalkv(scorer=snapkv, ratio=0.5)": ("CriticalKVPress", {}, "SnapKVPress"),
    "adakv(scorer=criticalkv(scorer=snapkv), ratio=0.5)": (
        "AdaKVPress", {}, "CriticalKVPress", "SnapKVPress"),
    "chunkkv(scorer=snapkv, ratio=0.5, length=20)": ("ChunkKVPress", {}, "SnapKVPress"),
    "chunkkv(scorer=knorm, ratio=0.5, length=20)": ("ChunkKVPress", {}, "KnormPress"),
    "finch(ratio=0.5, window=20, length=100000)": ("FinchPress", {}),
}


def press_of(name: str, options: dict, *inner: str):
    import kvpress

    made = {"compression_ratio": 0.5} | options
    if inner:
        own = {"window_size": 32} if inner == ("SnapKVPress",) else {}
        return getattr(kvpress, name)(press_of(inner[0], own, *inner[1:]))
    press = getattr(kvpress, name)(**made)
    if name == "FinchPress":
        press.window_size = 20
    return press


def theirs(model, press, ids) -> list[list[set[int]]]:
    """What each layer and head keeps: by the columns that are masked, or by the rows of V."""
    found = []

    def hook(module, inputs, given, output):
        held = given["past_key_values"].layers[module.layer_idx]
        module.masked_key_indices = None
        _, v = press.compress(module, given["hidden_states"], held.keys.clone(),
                              held.values.clone(), None, given)
        heads, tokens = held.values.shape[1:3]
        if module.masked_key_indices is None:
            found.append([{(held.values[0, h] == row).all(-1).nonzero().item() for row in v[0, h]}
                          for h in range(heads)])
            return
        gone = set(zip(*(x.tolist() for x in module.masked_key_indices[1:]), strict=True))
        found.append([{t for t in range(tokens) if (h, t) not in gone} for h in range(heads)])

    hooks = []
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
        hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(ids, past_key_values=DynamicCache(), use_cache=True)
    for own in hooks:
        own.remove()
    return found


@pytest.mark.parametrize("recipe", CASES)
def test_kept_tokens_equal_those_of_kvpress(recipe):
    for seed in range(2):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=96, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3,
            intermediate_size=64, vocab_size=2048, head_dim=16, initializer_range=0.3)).eval()
        ids = torch.randperm(2048)[None, : 300 + 7 * seed]          # no two rows of V are the same
        want = theirs(model, press_of(*CASES[recipe]), ids)
        ours = kvcompile.optimize(model, recipe, compile=False)
        cache = kvcompile.prefill(ours, ids)
        for layer, heads in enumerate(want):
            got = [set(head[head >= 0].tolist()) for head in cache.positions(layer)[0]]
            assert got == heads
