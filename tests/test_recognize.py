"""Attention recognized by its structure: every spelling gives the same node and numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import kvcompile.kernels.eager  # noqa: F401  (the ops' bodies)
from kvcompile.capture_module import export_module
from kvcompile.engine import Engine
from kvcompile.errors import UnsupportedModelError
from kvcompile.ir import argument, attention_nodes
from kvcompile.models.decoder import Decoder
from kvcompile.models.tiny import WINDOW, tiny
from kvcompile.own_cache import OwnCache
from kvcompile.program import Program
from kvcompile.recipe import Recipe
from kvcompile.rewrite import Refused, Rewritten
from kvcompile.structure.recognize import recognize
from kvcompile.verify import verify

VOCAB, WIDTH, HEADS, DIM = 128, 32, 4, 8
EPS = torch.finfo(torch.float32).eps


def close(got: Tensor, want: Tensor) -> int:
    """Equal up to the rounding of a few hundred fp32 operations on the logits' scale: the numbers
    compared."""
    assert (got - want).abs().max() <= 64 * EPS * (1 + want.abs().max())
    return got.numel()


def text(batch: int, tokens: int, pads: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, positions, valid), the last row padded on the left."""
    ids = torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[-1, :pads] = False
    return ids, (valid.long().cumsum(-1) - 1).clamp(min=0), valid


LENGTHS = [(1, 0), (7, 0), (33, 0), (7, 3), (33, 20)]  # (tokens, pads)


def sites(gm: GraphModule) -> list[dict[str, Any]]:
    """What each kvc.attention says of itself, shapes as (heads, head dimension)."""
    verify(gm)
    found = []
    for node in attention_nodes(gm.graph):
        heads = [tuple(argument(node, n).meta["val"].shape[1::2]) for n in "qkv"]
        assert "val" in node.meta and node.meta["stack_trace"]
        found.append({"heads": heads, "scale": argument(node, "scale"),
                      **{n: argument(node, n) for n in ("window", "softcap", "layer")}})
    return found


# --- the reference decoder ---------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "sdpa": {"attention": "sdpa"},
    "sdpa_gqa interleaved fused": {"attention": "sdpa_gqa", "rope": "interleaved",
                                   "fused_qkv": True},
    "eager partial qk_norm": {"attention": "eager", "rope": "partial", "qk_norm": True},
    "eager_fp32softmax learned": {"attention": "eager_fp32softmax", "rope": "none", "norm": "layer",
                                  "learned_positions": True, "tied": True, "bias": True},
    "sdpa post mha": {"attention": "sdpa", "placement": "post", "kv_heads": 4},
}


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=pytest.mark.slow if n == "sdpa post mha" else ()) for n in VARIANTS])
def test_the_decoder_in_every_variant(name: str) -> None:
    model = Decoder.tiny(**VARIANTS[name])
    gm = export_module(model)
    c = model.config
    assert [s["heads"] for s in sites(gm)] == c.layers * [
        [(c.heads, c.head_dim), (c.kv_heads, c.head_dim), (c.kv_heads, c.head_dim)]]
    assert [s["layer"] for s in sites(gm)] == [0, 1]
    assert not any("softmax" in str(n.target) or "scaled_dot" in str(n.target)
                   for n in gm.graph.nodes)
    with torch.no_grad():
        for tokens, pads in LENGTHS:
            ids, positions, valid = text(2, tokens, pads)
            want = model(ids, positions, valid)[valid]
            every = gm(ids, positions, valid, torch.arange(tokens))
            assert close(every[valid], want)
            keep = torch.tensor([tokens - 1, tokens // 2])
            assert close(gm(ids, positions, valid, keep), every[:, keep])
    assert dict(gm.named_parameters())[_name(gm, model)] is model.head.weight  # shared, not copied


def _name(gm: GraphModule, model: Decoder) -> str:
    return next(n for n, p in gm.named_parameters() if p is model.head.weight)


def test_capture_leaves_the_module_and_recognized_graphs_as_they_are() -> None:
    model = Decoder.tiny(layers=1).train()
    model.norm.eval()
    gm = export_module(model)
    assert model.training and model.layers[0].training and not model.norm.training
    before = str(gm.graph)
    assert recognize(gm) == [] and str(gm.graph) == before


# --- one spelling a layer ----------------------------------------------------------------------

def causal(q: Tensor) -> Tensor:
    return torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()


def merged(*tensors: Tensor) -> Iterator[Tensor]:
    """[B, S, H, D] -> [B * H, S, D]"""
    return (t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3]) for t in tensors)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bshd,bthd->bhst", q, k) / DIM**0.5
    weights = scores.masked_fill(~causal(q), -torch.inf).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, v)


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(*q.shape[:2], 2, 2, DIM)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q * 0.3, k)
    weights = torch.where(causal(k), scores, -1e9).softmax(-1)
    return torch.einsum("bhgqk,bkhd->bqhgd", weights, v)


def grouped_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(*q.shape[:2], 2, 2, DIM).permute(0, 2, 3, 1, 4)
    k, v = (t.transpose(1, 2)[:, :, None] for t in (k, v))
    return (torch.where(causal(k.mT[:, 0, 0].mT), q @ k.mT, -torch.inf).softmax(-1) @ v).permute(
        0, 3, 1, 2, 4)


def one_kv_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.transpose(1, 2) @ k.squeeze(2).unsqueeze(1).transpose(-1, -2)
    scores = torch.where(~causal(q), torch.finfo(scores.dtype).min, scores) / 8
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, tokens = q.shape[:2]
    q, k, v = merged(q, k, v)
    bias = torch.zeros(tokens, tokens).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -1e4)
    scores = torch.baddbmm(bias.expand(batch * HEADS, tokens, tokens), q, k.mT, alpha=0.3)
    out = torch.bmm(scores.softmax(-1), v).view(batch, HEADS, tokens, DIM)
    return out.transpose(1, 2)


def fp32_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, tokens = q.shape[:2]
    q, k, v = merged(q, k, v)
    scores = torch.baddbmm(torch.zeros(batch * HEADS, tokens, tokens), q, k.mT, beta=0.0, alpha=0.3)
    scores = scores.view(batch, HEADS, tokens, tokens)
    scores = scores + torch.zeros(tokens, tokens).masked_fill(~causal(q), -torch.inf)
    weights = F.dropout(scores.double().softmax(-1).type_as(v), 0.1, training=False)
    return torch.bmm(weights.view(-1, tokens, tokens), v).unflatten(0, (-1, HEADS)).transpose(1, 2)


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    scores = torch.tanh(torch.einsum("bshd,bthd->bhst", q, k) / 4 / 3) * 3
    at = torch.arange(q.shape[1])
    scores = scores.masked_fill(~causal(q), -1e9).masked_fill(at < at[:, None] - 4, -1e9)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


def halves_of_the_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q * 0.5, k / torch.full([], 4.0), v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(q.mT[:, 0].mT),
                                          scale=2.0).transpose(1, 2)


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, tokens = q.shape[:2]
    q, k, v = (t.flatten(2).transpose(0, 1).reshape(tokens, batch * HEADS, DIM).transpose(0, 1)
               for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(0, 1).reshape(tokens, batch, -1).transpose(0, 1)


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def indexed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = torch.tensor([0, 0, 1, 1])
    q, k, v = (t.transpose(1, 2) for t in (q, k[:, :, heads], v[:, :, heads]))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query head i reads kv head i % 2: no grouping that kvc.attention knows, so four kv heads."""
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bshd,bthd->bhst", q, k).masked_fill(~causal(q), -torch.inf)
    extra = torch.arange(4.0).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    both = torch.cat([scores, extra], -1)
    weights = (both - both.max(-1, keepdim=True).values).softmax(-1)[..., :-1]
    return torch.einsum("bhst,bthd->bshd", weights, v)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
ROOT = DIM**-0.5
SPELLINGS: dict[Attend, tuple[int, int, float, int, float]] = {  # kv heads (in, out), scale, ...
    einsum: (4, 4, ROOT, 0, 0.0),
    grouped_einsum: (2, 2, 0.3, 0, 0.0),
    grouped_matmul: (2, 2, 1.0, 0, 0.0),
    one_kv_head: (1, 1, 0.125, 0, 0.0),
    baddbmm: (4, 4, 0.3, 0, 0.0),
    fp32_softmax: (4, 4, 0.3, 0, 0.0),
    softcap: (2, 2, 0.25, 5, 3.0),
    halves_of_the_scale: (4, 4, 0.25, 0, 0.0),
    tokens_first: (4, 4, ROOT, 0, 0.0),
    expanded: (2, 2, ROOT, 0, 0.0),
    indexed: (2, 2, ROOT, 0, 0.0),
    repeated: (2, 4, ROOT, 0, 0.0),
    sinks: (4, 4, 1.0, 0, 0.0),
}


class Layers(nn.Module):
    """One layer for each way to attend."""

    def __init__(self, attends: list[Attend], kv_heads: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attends = attends
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.qkv = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, h * DIM) for h in (HEADS, kv, kv))
                                 for kv in kv_heads)
        self.out = nn.ModuleList(nn.Linear(HEADS * DIM, WIDTH) for _ in attends)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, None]:
        x = self.embed(input_ids) + torch.sin(position_ids[..., None] / 9)
        for attend, qkv, out in zip(self.attends, self.qkv, self.out, strict=True):
            q, k, v = (f(x).unflatten(-1, (-1, DIM)) for f in qkv)
            x = x + out(attend(q, k, v).reshape(x.shape))
        return self.head(x), None


def test_every_spelling_gives_the_same_node() -> None:
    model = Layers(list(SPELLINGS), [kv for kv, *_ in SPELLINGS.values()]).eval()
    gm = export_module(model)
    found = zip(sites(gm), SPELLINGS.items(), strict=True)
    for site, (attend, (_, kv, scale, window, cap)) in found:
        want = {"heads": [(HEADS, DIM), (kv, DIM), (kv, DIM)], "scale": pytest.approx(scale),
                "window": window, "softcap": pytest.approx(cap)}
        assert site == {**want, "layer": site["layer"]}, attend.__name__
    with torch.no_grad():
        for tokens in (1, 7, 33):
            ids, positions, valid = text(2, tokens)
            assert close(gm(ids, positions, valid, torch.arange(tokens)), model(ids, positions)[0])


# --- refusals ----------------------------------------------------------------------------------

def bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[1])
    bias = torch.zeros(at.numel(), at.numel()).masked_fill(~causal(q), -torch.inf)
    bias = bias + (at - at[:, None]) * 0.5 ** torch.arange(1, 5)[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[1])
    scores = torch.einsum("bshd,bthd->bhst", q, k)
    scores = scores.masked_fill(~causal(q) | (at // 8 != at[:, None] // 8), -torch.inf)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1).transpose(1, 2)


def shared_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bshd,bthd->bhst", q, k).masked_fill(~causal(q), -torch.inf).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, v) + weights.sum((1, 3))[..., None, None]


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bshd,bthd->bhst", q, k).square().masked_fill(~causal(q), -torch.inf)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


def masked_weakly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bshd,bthd->bhst", q, k).masked_fill(~causal(q), -9.0)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)


def capped_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bshd,bthd->bhst", q, k).masked_fill(~causal(q), -1e9)
    return torch.einsum("bhst,bthd->bshd", (5 * torch.tanh(scores / 5)).softmax(-1), v)


def to_the_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k[:, :3], v[:, :3]))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


REFUSALS: dict[Attend, str] = {
    bidirectional: "lets query 0 of 5 see the later token 1: not causal",
    alibi: "adds -0.5 for query 1 of 5 and token 0: a bias, not a mask",
    chunked: "hides token 1 from query 8 of 17: neither causal nor a window",
    dropping: "drops weights at random; put the module into eval mode",
    shared_weights: "gives weights to einsum_3, sum_1; only a product with values is known",
    squared: "'square' stands between the scores and their softmax",
    masked_weakly: "fills masked scores with -9, which does not hide them",
    capped_mask: "masks before the softcap, which leaves masked tokens visible",
    to_the_first: "has keys of 3 tokens, which are not the tokens of the call",
}


def test_other_attentions_are_refused_with_their_nodes() -> None:
    model = Layers(list(REFUSALS), [HEADS] * len(REFUSALS)).eval()
    size = torch.export.Dim.DYNAMIC(min=4)
    program = torch.export.export(model, text(2, 16)[:2], dynamic_shapes=({0: size, 1: size},) * 2,
                                  strict=False)
    gm = program.module(check_guards=False)
    for layer, (outcome, (attend, reason)) in enumerate(zip(recognize(gm), REFUSALS.items(),
                                                            strict=True)):
        assert isinstance(outcome, Refused) and outcome.layer == layer
        assert outcome.reason == reason, attend.__name__
        assert any(n.name == outcome.node for n in gm.graph.nodes)
    assert not attention_nodes(gm.graph)


def refusal(model: nn.Module) -> str:
    with pytest.raises(UnsupportedModelError) as error:
        export_module(model.eval())
    assert "\n" not in str(error.value)
    return str(error.value)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class Counting(Small):
    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(ids)


class Conditional(Small):
    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        return super().forward(ids) + memory


class Averaging(Small):
    """Attends, and takes the mean of all earlier tokens, too."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + F.scaled_dot_product_attention(*(x[:, None],) * 3, is_causal=True)[:, 0]
        mean = torch.ones(ids.shape[1], ids.shape[1]).tril()
        return self.head(x + (mean / mean.sum(-1, keepdim=True)) @ x)


def test_refused_modules_get_one_line() -> None:
    assert refusal(Small()) == "Small: no attention was found in its graph"
    assert refusal(Counting()) == "Counting changes its buffer 'module.calls' when it is called"
    assert refusal(Conditional()) == (
        "Conditional.forward needs 'memory'; known are token ids, position_ids or positions or "
        "input_pos or pos, and attention_mask or padding_mask")
    assert re.fullmatch(
        r"Averaging: node 'div' \(test_recognize.py:\d+\) relates tokens by their places in the "
        "call", refusal(Averaging()))
    assert re.fullmatch(
        r"Layers: attention 1 is not one that kvcompile can cache: node "
        r"'scaled_dot_product_attention_1' \(test_recognize.py:\d+\) lets query 0 of 5 see the "
        "later token 1: not causal", refusal(Layers([expanded, bidirectional], [2, 4])))


# --- positions that a module numbers itself ----------------------------------------------------

class Numbered(nn.Module):
    """No position_ids: learned positions by arange, rotation by rows of a complex buffer."""

    def __init__(self, length: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.places = nn.Embedding(length, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        angles = torch.outer(torch.arange(length).float(), 100.0 ** -torch.arange(0, 1, 0.25))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))
        self.register_buffer("tril", torch.ones(length, length).tril()[None, None])
        self.last = False

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        batch, tokens = idx.shape
        x = self.embed(idx) + self.places(torch.arange(0, tokens, device=idx.device))
        q, k, v = (t.view(batch, tokens, HEADS, DIM) for t in self.qkv(x).chunk(3, -1))
        turn = self.turns[:tokens].view(1, tokens, 1, DIM // 2)
        q, k = (torch.view_as_real(torch.view_as_complex(t.reshape(*t.shape[:3], -1, 2)) * turn)
                .flatten(3) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        scores = scores.masked_fill(self.tril[:, :, :tokens, :tokens] == 0, float("-inf"))
        weights = F.dropout(F.softmax(scores, -1), 0.1, self.training)
        x = x + (weights @ v).transpose(1, 2).contiguous().view(batch, tokens, WIDTH)
        return self.head(x[:, [-1]] if self.last else x), None


def test_positions_of_the_module_follow_position_ids() -> None:
    model = Numbered().eval()
    gm = export_module(model)
    assert sites(gm)[0]["heads"] == [(HEADS, DIM)] * 3
    with torch.no_grad():
        for tokens, pads in LENGTHS:
            ids, positions, valid = text(2, tokens, pads)
            got = gm(ids, positions, valid, torch.arange(tokens))
            for row in range(2):  # a row alone, without its padding
                assert close(got[row][valid[row]], model(ids[row : row + 1, valid[row]])[0][0])
        model.last = True
        ids, positions, valid = text(2, 9)
        last = export_module(model)(ids, positions, valid, torch.arange(9))
        assert close(last, gm(ids, positions, valid, torch.arange(9)))


@pytest.mark.slow
def test_captured_modules_decode_what_they_compute() -> None:
    """Prompt, single tokens and several at once over a cache, in rows with other positions."""
    for model in (Numbered(512).eval(), Layers([expanded, softcap, sinks], [2, 2, 4]).eval()):
        gm = export_module(model)
        program = Program("module", gm, Recipe.parse("full"), snapshots={"capture": gm},
                          seconds={"capture": 0.0})
        engine = Engine(program.lower("full"), compile=False)
        cache = OwnCache(engine.sites, "full", "module")
        ids, positions, valid = text(2, 12, 3)
        with torch.no_grad():
            want = gm(ids, positions, valid, torch.arange(12))
            got = [engine.run(cache, *(x[:, a:b] for x in (ids, positions, valid)),
                              torch.arange(b - a)) for a, b in ((0, 7), (7, 8), (8, 9), (9, 12))]
        assert close(torch.cat(got, 1)[valid], want[valid])


# --- Hugging Face models with their own masks --------------------------------------------------

class Bare(nn.Module):
    """A Hugging Face model with its own attention and masks."""

    def __init__(self, arch: str, attention: str, **options: Any) -> None:
        super().__init__()
        self.model = tiny(arch, num_hidden_layers=2, **options)
        self.model.set_attn_implementation(attention)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False,
                          attention_mask=attention_mask).logits


HF: dict[str, tuple[list[int], float]] = {  # windows, softcap
    "llama sdpa": ([0, 0], 0.0), "mistral sdpa": ([WINDOW, WINDOW], 0.0),
    "gemma2 eager": ([WINDOW, 0], 50.0), "mistral eager": ([WINDOW, WINDOW], 0.0),
    "llama eager": ([0, 0], 0.0), "gpt_oss eager": ([WINDOW, 0], 0.0), "gpt2 eager": ([0, 0], 0.0),
}
FAST = ("llama sdpa", "gemma2 eager")


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in HF])
def test_hugging_face_masks_are_recognized(name: str) -> None:
    windows, cap = HF[name]
    model = Bare(*name.split()).eval()
    size = torch.export.Dim.DYNAMIC(min=1)
    ids, positions, valid = text(2, 16)
    with torch.no_grad():
        program = torch.export.export(model, (ids, positions, valid.long()), strict=False,
                                      dynamic_shapes=({0: size, 1: size},) * 3)
        if name not in FAST:
            program = program.run_decompositions({})
        gm = program.module(check_guards=False)
        outcomes = recognize(gm)
        assert all(isinstance(o, Rewritten) and "padding" in o.what for o in outcomes)
        assert [s["window"] for s in sites(gm)] == windows
        assert [s["softcap"] for s in sites(gm)] == [cap, cap]
        routers = 2 if "moe" in name or "oss" in name else 0  # their softmax is over experts
        assert sum("softmax" in str(n.target) for n in gm.graph.nodes) == routers
        for tokens, pads in LENGTHS:
            ids, positions, valid = text(2, tokens, pads)
            want = model(ids, positions, valid.long())[valid]
            assert close(gm(ids, positions, valid.long())[valid], want)


# --- graphs as Dynamo and AOTAutograd make them ------------------------------------------------

def lowered(model: nn.Module, *inputs: Tensor) -> tuple[GraphModule, list[Any]]:
    """AOTAutograd's inference graph of a compiled call, and what it was called with."""
    from torch._dynamo.backends.common import aot_autograd

    found: list[Any] = []

    def compiler(gm: GraphModule, example: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found[:] = [gm, args]
            return gm(*args)
        return run

    for x in inputs:
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(x, dim)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler)
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return found[0], list(found[1])


@pytest.mark.parametrize("attention", ["sdpa_gqa", pytest.param(
    "eager_fp32softmax", marks=pytest.mark.slow)])
def test_graphs_of_aot_autograd(attention: str) -> None:
    model = Decoder.tiny(layers=2, attention=attention)
    ids, positions, valid = text(2, 16, 5)
    gm, args = lowered(model, ids, positions, valid.long())
    holders = [n for n in gm.graph.nodes if n.op == "placeholder"]

    def of(x: Tensor) -> Node:
        return next(n for n, a in zip(holders, args, strict=True) if isinstance(a, Tensor)
                    and a.dtype == x.dtype and a.shape == x.shape and bool((a == x).all()))

    outcomes = recognize(gm, tokens=of(ids), positions=of(positions), padding=of(valid.long()))
    assert outcomes == [Rewritten(i, "4 query heads on 2 kv heads, scale 0.25, padding")
                        for i in range(2)]
    assert [s["heads"] for s in sites(gm)] == [[(4, 16), (2, 16), (2, 16)]] * 2
    with torch.no_grad():
        assert close(gm(*args)[0][valid], model(ids, positions, valid)[valid])


def test_a_graph_with_fixed_sizes() -> None:
    model = Layers([expanded, softcap], [2, 2]).eval()
    gm = torch.export.export(model, text(2, 16)[:2], strict=False).module(check_guards=False)
    assert all(isinstance(o, Rewritten) for o in recognize(gm))
    assert [s["window"] for s in sites(gm)] == [0, 5]
    with torch.no_grad():
        ids, positions, _ = text(2, 16)
        assert close(gm(ids, positions)[0], model(ids, positions)[0])
