"""A decoder in plain PyTorch, which kvcompile captures by its structure alone."""

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DecoderConfig:
    """The variants of a decoder, one field each; the defaults are a tiny Llama."""

    vocab: int = 128
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 128
    rope: Literal["half", "interleaved", "partial", "none"] = "half"
    rope_theta: float = 10_000.0
    partial: float = 0.5  # the share of each head that rope="partial" rotates
    norm: Literal["rms", "layer"] = "rms"
    placement: Literal["pre", "post"] = "pre"  # x + f(norm(x)), or x + norm(f(x))
    attention: Literal["sdpa", "sdpa_gqa", "eager", "eager_fp32softmax"] = "sdpa"
    fused_qkv: bool = False
    qk_norm: bool = False
    bias: bool = False
    tied: bool = False
    window: int = 0  # tokens that a query sees, itself included; 0: all
    learned_positions: bool = False
    max_positions: int = 2048

    @property
    def rotated(self) -> int:
        """Channels of each head that carry a position."""
        return int(self.head_dim * self.partial) if self.rope == "partial" else self.head_dim


class Characters:
    """The tokenizer of a decoder whose tokens are the first characters of ASCII; 0 is special."""

    all_special_ids = (0,)

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Decoder(nn.Module):
    """Causal; input_ids, position_ids `[B, S]` -> logits `[B, S, vocab]`; mask 0 is padding."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config, self.tokenizer = config, Characters(config.vocab)
        self.embed = nn.Embedding(config.vocab, config.hidden)
        if config.learned_positions:
            self.positions = nn.Embedding(config.max_positions, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = _norm(config, config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        x = self.embed(input_ids)
        if self.config.learned_positions:
            x = x + self.positions(position_ids)
        turn = None if self.config.rope == "none" else _turn(self.config, position_ids, x.dtype)
        mask = _mask(self.config, attention_mask, x)
        for layer in self.layers:
            x = layer(x, turn, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @classmethod
    def tiny(cls, seed: int = 0, **overrides: Any) -> Self:
        """A seeded decoder whose attention is peaked, so that a wrong cache changes its output."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = cls(DecoderConfig(**overrides))
            for name, weight in model.named_parameters():
                if weight.ndim == 2:
                    nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
                else:
                    weight.add_(torch.randn_like(weight), alpha=0.1)
                if name.endswith(("q.weight", "k.weight", "qkv.weight", "q_norm.weight")):
                    weight.mul_(2.0)
            model.norm.weight.mul_(torch.randint(0, 2, model.norm.weight.shape) * 2.0 - 1.0)
        return model.eval()


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.pre = config.placement == "pre"
        self.attention, self.mlp = Attention(config), MLP(config)
        self.attention_norm = _norm(config, config.hidden)
        self.mlp_norm = _norm(config, config.hidden)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        if self.pre:
            x = x + self.attention(self.attention_norm(x), turn, mask)
            return x + self.mlp(self.mlp_norm(x))
        x = x + self.attention_norm(self.attention(x, turn, mask))
        return x + self.mlp_norm(self.mlp(x))


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        if config.fused_qkv:
            self.qkv = nn.Linear(config.hidden, q + 2 * kv, bias=config.bias)
        else:
            self.q = nn.Linear(config.hidden, q, bias=config.bias)
            self.k = nn.Linear(config.hidden, kv, bias=config.bias)
            self.v = nn.Linear(config.hidden, kv, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (_norm(config, config.head_dim) for _ in range(2))
        self.o = nn.Linear(q, config.hidden, bias=config.bias)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        c, (batch, tokens) = self.config, x.shape[:2]
        if c.fused_qkv:
            sizes = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
            q, k, v = self.qkv(x).split(sizes, -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (t.view(batch, tokens, -1, c.head_dim).transpose(1, 2) for t in (q, k, v))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = _rotate(c, q, *turn), _rotate(c, k, *turn)
        out = _attend(c, q, k, v, mask)
        y: Tensor = self.o(out.transpose(1, 2).reshape(batch, tokens, -1))
        return y


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.intermediate, bias=config.bias)
        self.up = nn.Linear(config.hidden, config.intermediate, bias=config.bias)
        self.down = nn.Linear(config.intermediate, config.hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def _norm(config: DecoderConfig, width: int) -> nn.RMSNorm | nn.LayerNorm:
    return (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(width, eps=1e-5)


def _turn(config: DecoderConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency `[B, 1, S, rotated]`, as `_rotate` pairs channels."""
    steps = torch.arange(0, config.rotated, 2, device=positions.device) / config.rotated
    angles = positions[:, None, :, None].float() * config.rope_theta**-steps
    if config.rope == "interleaved":
        angles = angles.repeat_interleave(2, -1)
    else:
        angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(config: DecoderConfig, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of channels (a, b) -> (a cos - b sin, b cos + a sin)."""
    x, rest = x[..., : config.rotated], x[..., config.rotated :]
    if config.rope == "interleaved":
        swapped = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        a, b = x.chunk(2, -1)
        swapped = torch.cat((-b, a), -1)
    turned = x * cos + swapped * sin
    return torch.cat((turned, rest), -1) if config.rope == "partial" else turned


def _mask(config: DecoderConfig, attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """What is added to the scores, `[B or 1, 1, S, S]`; None leaves it to SDPA's is_causal."""
    if attention_mask is None and config.attention.startswith("sdpa") and not config.window:
        return None
    tokens = x.shape[1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()[None, None]
    if config.window:
        seen = seen.triu(1 - config.window)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].bool()
    lowest = max(torch.finfo(x.dtype).min, torch.finfo(torch.float32).min)  # survives the upcast
    return torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, lowest)


def _attend(config: DecoderConfig, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v, written in each of the ways found in the wild."""
    if config.attention == "sdpa_gqa":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
    group = config.heads // config.kv_heads
    if group > 1:
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    if config.attention == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    scores = torch.matmul(q, k.transpose(-1, -2)) * config.head_dim**-0.5 + mask
    if config.attention == "eager":
        return torch.matmul(scores.softmax(-1), v)
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
