"""sources: K and V computed again from the weights' rows that it names equal the graph's."""

import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

import kvcompile.kernels.eager  # noqa: F401 (the bodies of the ops)
import kvcompile.structure.sources
from kvcompile.capture import export
from kvcompile.ir import ROPE, argument, attention_nodes
from kvcompile.models.tiny import tiny
from kvcompile.passes.canonicalize import PASS
from kvcompile.rewrite import Refused
from kvcompile.store import SIDES
from kvcompile.structure.norms import Norm
from kvcompile.structure.sources import Linear, Source, sources

WIDTH, HEADS, DIM = 32, 4, 8


class Values(Interpreter):
    """Runs a graph and keeps what every node computed."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)

    def of(self, *args: Tensor) -> dict[Node, Any]:
        with torch.no_grad():
            self.run(*args)
        return self.env


def parameter(gm: GraphModule, name: str) -> Tensor:
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value.detach()


def project(gm: GraphModule, linear: Linear, x: Tensor) -> Tensor:
    """`linear`'s own rows of the weight times x [..., in]: [tokens, *rows.shape], 0 elsewhere."""
    weight = parameter(gm, linear.weight)
    weight = weight.T if linear.transposed else weight
    made = linear.rows >= 0
    out = torch.zeros(x.shape[:-1].numel(), *linear.rows.shape)
    rows = linear.rows[made]
    out[:, made] = x.flatten(0, -2) @ weight[rows].T
    if linear.bias:
        out[:, made] += parameter(gm, linear.bias)[rows]
    return out


def normalize(gm: GraphModule, norm: Norm, x: Tensor) -> Tensor:
    return norm.apply(x, *(parameter(gm, n) if n else None for n in (norm.weight, norm.bias)))


def again(gm: GraphModule, source: Source, env: dict[Node, Any]) -> Tensor:
    """K or V [B, H, S, D] by what `source` says, from the inputs of the projections alone."""
    batch, heads, tokens, dim = env[source.node].shape
    out = torch.zeros(batch, heads, tokens, dim)
    for linear in source.linears:
        x = project(gm, linear, env[linear.input]).view(batch, tokens, heads, dim)
        channels = list(linear.channels)
        x = x[..., channels]
        rope_at = [linear.rope] if linear.rope else []
        for node in sorted([n.node for n in linear.norms] + rope_at):
            if node.target is ROPE:
                cos, sin = (env[argument(node, n)] for n in ("cos", "sin"))
                x = torch.ops.kvc.rope(x.transpose(1, 2), cos, sin, style=argument(node, "style"))
                x = x.transpose(1, 2)
            else:
                norm = next(n for n in linear.norms if n.node is node)
                shape = x.shape
                whole = env[norm.input].shape[-1] != len(channels)
                x = normalize(gm, norm, x.flatten(2) if whole else x).view(shape)
        out[..., channels] += x.transpose(1, 2)
    return out


def check(gm: GraphModule, args: tuple[Tensor, ...]) -> list[tuple[Source, Source]]:
    """The sources of every layer, each computed again and compared with the graph."""
    env = Values(gm).of(*args)
    out = []
    for node in attention_nodes(gm.graph):
        pair = []
        for side in SIDES:
            source = sources(argument(node, side))
            assert isinstance(source, Source), source
            torch.testing.assert_close(again(gm, source, env), env[source.node],
                                       rtol=1e-5, atol=2e-5)
            pair.append(source)
        out.append((pair[0], pair[1]))
    return out


# architecture -> K and V of layer 1, without the name of the layer, and norms of K
MODELS = {
    "cohere": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "cohere2": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "deepseek_v2": (
        "kv_b_proj.weight[0 + 32 head + 1 channel], "
        "kv_a_proj_with_mqa.weight[32 + 0 head + 1 channel]",
        "kv_b_proj.weight[16 + 32 head + 1 channel]", []),
    "deepseek_v3": (None, "kv_b_proj.weight[16 + 32 head + 1 channel]", []),
    "gemma2": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "gemma3_text": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", ["k_norm.weight"]),
    "glm4": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "gpt2": ("c_attn.weight[64:128]", "c_attn.weight[128:192]", []),
    "gpt_neox": ("query_key_value.weight[16 + 48 head + 1 channel]",
                 "query_key_value.weight[32 + 48 head + 1 channel]", []),
    "gpt_oss": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "llama": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "mistral": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "mixtral": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "olmo2": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", ["k_norm.weight"]),
    "phi": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "phi3": ("qkv_proj.weight[64:96]", "qkv_proj.weight[96:128]", []),
    "qwen2": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "qwen3": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", ["k_norm.weight"]),
    "smollm3": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "stablelm": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
    "starcoder2": ("k_proj.weight[0:32]", "v_proj.weight[0:32]", []),
}
QUICK = {"deepseek_v3", "gpt_neox", "gpt2"}


@cache
def canonical(arch: str) -> GraphModule:
    gm = export(tiny(arch, num_hidden_layers=2))
    PASS.run(gm, ())
    gm.recompile()
    return gm


def inputs(tokens: int = 11) -> tuple[Tensor, ...]:
    ids = torch.randint(3, 128, (2, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens) + torch.tensor([[0], [100]])
    return ids, positions, torch.ones(2, tokens, dtype=torch.bool), torch.arange(tokens)


def short(source: Source) -> str:
    """Its text, with only the last part of the weights' names."""
    return re.sub(r"[\w.]+\.(\w+\.weight)", r"\1", str(source))


@pytest.mark.parametrize("arch", [
    arch if arch in QUICK else pytest.param(arch, marks=pytest.mark.slow) for arch in MODELS])
def test_models(arch: str) -> None:
    gm = canonical(arch)
    want_k, want_v, norms = MODELS[arch]
    k, v = check(gm, inputs())[1]
    assert want_k is None or short(k) == want_k
    assert short(v) == want_v
    assert [n.weight.rsplit(".", 2)[-2] + ".weight" for x in k.linears for n in x.norms
            if n.weight] == norms
    assert (arch == "gpt2") == (k.linears[-1].rope is None)
    assert k.linears[0].transposed is (arch == "gpt2")


def test_latent_attention_goes_on_to_its_down_projection() -> None:
    gm = canonical("deepseek_v3")
    env = Values(gm).of(*inputs())
    for node in attention_nodes(gm.graph):
        k = sources(argument(node, "k"))
        assert isinstance(k, Source)
        up, rotary = k.linears
        assert up.channels == tuple(range(16)) and rotary.channels == tuple(range(16, 24))
        assert rotary.rows[0, 16:].tolist() == [32, 34, 36, 38, 33, 35, 37, 39]
        assert (up.rope, rotary.below) == (None, ()) and rotary.rope is not None
        (down,) = up.below
        assert (down.node, down.span) == (rotary.node, (0, 32))
        (norm,) = down.norms
        x = normalize(gm, norm, project(gm, down, env[down.input]))
        torch.testing.assert_close(x, env[up.input].flatten(0, -2), rtol=1e-5, atol=2e-5)


class OneLayer(nn.Module):
    """x [B, S, WIDTH] -> attention with k and v by `kv`; the norm's weight is not one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(DIM)
        self.down, self.up = nn.Linear(WIDTH, 6, bias=False), nn.Linear(6, 2 * WIDTH)
        self.matrix = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH))
        self.shift = nn.Parameter(torch.randn(2 * WIDTH))
        for weight in self.norm.parameters():
            nn.init.normal_(weight)
        self.requires_grad_(False)

    def forward(self, x: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        k, v = self.kv(x)
        o: Tensor = torch.ops.kvc.attention(k, k, v, positions, valid, None, scale=0.3)
        return o

    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, DIM)).transpose(1, 2)


class Chunks(OneLayer):
    """A fused projection, cut into thirds; shared kv heads; the head's channels turned around."""

    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, k, v = self.fused(x).chunk(3, -1)
        v = heads(v)[:, :2].repeat_interleave(2, 1)
        return torch.cat([heads(k)[..., 3:], heads(k)[..., :3]], -1), v


class PerHead(OneLayer):
    """q, k and v of one head after the other, and a norm with a bias on k."""

    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fused(x).view(*x.shape[:2], HEADS, 3, DIM)
        return self.norm(y[:, :, :, 1]).transpose(1, 2), y.permute(3, 0, 2, 1, 4)[2]


class Matrix(OneLayer):
    """A product and a sum, the weight [in, out]; k's norm is written out, its weight is w + 1."""

    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (x @ self.matrix + self.shift).split(WIDTH, -1)
        k = heads(k)
        k = k / (k.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * (self.norm.weight + 1.0)
        return k, heads(v)


class LowRank(OneLayer):
    """Two projections on top of each other, one rms norm over all heads."""

    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.up(self.down(x)).split(WIDTH, -1)
        return heads(F.rms_norm(k, (WIDTH,), eps=1e-3)), heads(v)


def traced(model: nn.Module) -> tuple[GraphModule, tuple[Tensor, ...]]:
    args = (torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)),
            torch.arange(5).expand(2, -1).clone(), torch.ones(2, 5, dtype=torch.bool))
    if isinstance(model, LowRank):  # keeps linear and rms_norm whole
        gm = torch.export.export(model, args).run_decompositions({}).module(check_guards=False)
        gm.graph.set_codegen(torch.fx.graph.CodeGen())
        return gm, args
    return make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(*args), args


@pytest.mark.parametrize("model", [Chunks, PerHead, Matrix, LowRank])
def test_layouts(model: type[OneLayer]) -> None:
    (k, v), = check(*traced(model()))
    (a,), (b,) = k.linears, v.linears
    if model is Chunks:
        assert a.rows[1].tolist() == [43, 44, 45, 46, 47, 40, 41, 42] and a.affine is None
        assert b.rows[:, 0].tolist() == [64, 64, 72, 72]
    elif model is PerHead:
        assert (a.affine, b.affine) == ((DIM, 3 * DIM, 1), (2 * DIM, 3 * DIM, 1))
        assert [n.kind for n in a.norms] == ["layer"] and a.norms[0].bias
    elif model is Matrix:
        assert a.transposed and a.bias and (a.span, b.span) == ((0, WIDTH), (WIDTH, 2 * WIDTH))
        assert [(n.offset, n.eps) for n in a.norms] == [(1.0, 1e-3)]
    else:
        (down,) = a.below
        assert down.span == (0, 6) and not down.below and b.below[0].weight == down.weight


class Clamped(OneLayer):
    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = heads(self.fused(x)[..., :WIDTH].clamp(-1, 1))
        return k, k


class Shifted(OneLayer):
    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = heads(self.fused(x)[..., :WIDTH])
        k = torch.cat([k[:, :, :1], k[:, :, :-1]], 2)
        return k, k


class Computed(OneLayer):
    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = heads(x @ self.matrix[:, :WIDTH].sign())
        return k, k


class Unwritten(OneLayer):
    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = heads(self.fused(x)[..., :WIDTH])
        k = torch.slice_scatter(k.new_empty(k.shape), k[..., :3], -1, 0, 3)
        return k, k


class Residual(OneLayer):
    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self.fused(x)[..., :WIDTH]
        k = heads(k + F.layer_norm(k, (WIDTH,)))
        return k, k


class NotQuite(OneLayer):
    """Divides by the mean square instead of its root, and so is no norm."""

    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = heads(self.fused(x)[..., :WIDTH])
        k = k * (k.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt().pow(2)
        return k, k


@pytest.mark.parametrize("model, reason", [
    (Clamped, "'clamp' (aten.clamp.default) stands where a projection, a norm, rope or a view"),
    (Shifted, "mixes the tokens of 'addmm'"),
    (Computed, "the weight of 'mm' is computed by 'sign'"),
    (Unwritten, "parts of 'slice_scatter' are never written"),
    (NotQuite, "'mul' (aten.mul.Tensor) stands where"),
    (Residual, "'add' (aten.add.Tensor) stands where"),
])
def test_refusals(model: type[OneLayer], reason: str) -> None:
    gm, _ = traced(model())
    (node,) = attention_nodes(gm.graph)
    refused = sources(argument(node, "k"), layer=7)
    assert isinstance(refused, Refused) and refused.layer == 7
    assert reason in refused.reason
    assert refused.node in {n.name for n in gm.graph.nodes}


def test_fixed_sizes_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = traced(Chunks())
    monkeypatch.setattr(kvcompile.structure.sources, "LARGE", 100)
    (node,) = attention_nodes(gm.graph)
    refused = sources(argument(node, "v"))
    assert isinstance(refused, Refused) and "trace with symbolic sizes" in refused.reason
