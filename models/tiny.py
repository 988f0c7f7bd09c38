"""Tiny seeded transformers models, one per architecture; attention is peaked and the text varies.

With the library's own initialization a tiny model attends uniformly and repeats one token, so that
a broken cache would pass every test.
"""

import copy
import re
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvcompile.errors import nearest

WIDTH, HEADS, KV_HEADS, LAYERS, WINDOW = 64, 4, 2, 4, 8
GAIN = 1.8

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "initializer_range": WIDTH**-0.5,
    "bos_token_id": None,
    "eos_token_id": None,  # generation never stops early
    "pad_token_id": None,
}
_LLAMA: dict[str, Any] = {
    "num_key_value_heads": KV_HEADS,
    "head_dim": WIDTH // HEADS,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 2048,
}
_ALTERNATE = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_THREE_TO_ONE = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}
_LATENT = {
    "num_key_value_heads": HEADS,
    "head_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SCALE = {"query_pre_attn_scalar": 12}  # Gemma scales logits by this ** -0.5

_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 2.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 1024,
    }
}

TINY: dict[str, dict[str, Any]] = {
    "bitnet": _LLAMA,
    "bloom": {},
    "cohere": _LLAMA,
    "cohere2": _LLAMA | _THREE_TO_ONE,
    "deepseek_v2": _LLAMA | _LATENT,
    "deepseek_v3": _LLAMA | _LATENT,
    "exaone4": _LLAMA | _THREE_TO_ONE,
    "falcon": {"ffn_hidden_size": 2 * WIDTH, "max_position_embeddings": 2048},
    "falcon_h1": _LLAMA
    | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
    | {"mamba_chunk_size": 16},
    "gemma": _LLAMA,
    "gemma2": _LLAMA | _ALTERNATE | _SCALE,
    "gemma3_text": _LLAMA | _THREE_TO_ONE | _SCALE,
    "glm4": _LLAMA,
    "gpt2": {"n_positions": 2048},
    "gpt_neox": {"intermediate_size": 2 * WIDTH, "max_position_embeddings": 2048},
    "gpt_oss": _LLAMA | _ALTERNATE | _EXPERTS | _YARN,
    "granite": _LLAMA | {"attention_multiplier": 0.25},
    "lfm2": _LLAMA | {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False},
    "llama": _LLAMA,
    "minimax": _LLAMA | _EXPERTS | {"block_size": 16},
    "mistral": _LLAMA | {"sliding_window": WINDOW},
    "mixtral": _LLAMA | _EXPERTS,
    "mpt": {},
    "nemotron": _LLAMA | {"initializer_range": WIDTH**-0.5 / 2},
    "olmo2": _LLAMA,
    "opt": {"init_std": WIDTH**-0.5, "ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH},
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "qwen3_next": _LLAMA
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"shared_expert_intermediate_size": 32, "linear_key_head_dim": 16}
    | {"linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
    "xglm": {"init_std": WIDTH**-0.5, "ffn_dim": 2 * WIDTH, "max_position_embeddings": 2048},
}

_QUERY_KEY = re.compile(
    r"\.((q|k|qkv|q_b|kv_b)_proj|kv_a_proj_with_mqa|q_a_layernorm|[qk]_(layer)?norm"
    r"|c_attn|Wqkv|query_key_value)\.weight$"
)
_MLP_OUT = re.compile(r"\.(fc2|mlp\.c_proj|dense_4h_to_h|down_proj)\.weight$")
_IN_LAYER = re.compile(r"\.\d+\.")


def tiny(
    arch: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """The tiny model of one architecture, in eval mode; equal arguments give equal weights."""
    if arch not in TINY:
        hint = nearest(arch, TINY) or f"; known: {', '.join(TINY)}"
        raise ValueError(f"unknown tiny architecture '{arch}'{hint}")
    options = copy.deepcopy(_COMMON | TINY[arch] | overrides)
    if types := options.get("layer_types"):
        layers = options["num_hidden_layers"]
        options["layer_types"] = (types * layers)[:layers]
    config = AutoConfig.for_model(arch, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _enliven(model)
    for weight in model.parameters():  # buffers such as rotary frequencies stay in float32
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    for holder in (model.config, model.generation_config):
        holder.eos_token_id = None  # some architectures insist on their own
    return model.eval()


@torch.no_grad()
def _enliven(model: PreTrainedModel) -> None:
    """Vary biases and norms, spread attention logits by 2 to 4, and keep tokens from repeating.

    A tied head would echo its input, and an MLP drifts towards one constant output: random signs on
    the norms outside the layers end the first, centring each MLP output row the second.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.add_(torch.randn_like(weight), alpha=0.1)
        if _QUERY_KEY.search(name):
            _multiply(weight, GAIN)
        elif _MLP_OUT.search(name):
            weight.sub_(weight.mean(weight.shape.index(max(weight.shape)), keepdim=True))
        elif weight.ndim == 1 and name.endswith(".weight") and not _IN_LAYER.search(name):
            _multiply(weight, torch.randint(0, 2, weight.shape) * 2.0 - 1.0)


def _multiply(weight: Tensor, factor: Tensor | float) -> None:
    """weight *= factor; a norm that computes x * (1 + weight) is recognized by weights around 0."""
    shift = 1.0 if weight.ndim == 1 and weight.mean() < 0.5 else 0.0
    weight.add_(shift).mul_(factor).sub_(shift)
