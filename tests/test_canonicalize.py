"""canonicalize: rope nodes where models rotate q and k, with equal values; elsewhere reasons."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import kvcompile.kernels.eager  # noqa: F401 (the bodies of the ops)
from kvcompile.capture import export
from kvcompile.ir import ROPE, argument, attention_nodes
from kvcompile.models.tiny import tiny
from kvcompile.passes import canonicalize
from kvcompile.passes.canonicalize import PASS
from kvcompile.rewrite import Outcome, Refused, Rewritten, copy_graph
from kvcompile.verify import verify

HEADS, DIM = 4, 8

# architecture -> (what becomes of a layer that rotates, number of layers that do not)
MODELS = {
    "cohere": ("rope interleaved q,k", 0),
    "cohere2": ("rope interleaved q,k", 1),
    "deepseek_v2": ("rope interleaved q,k, 8 of 24 channels", 0),
    "deepseek_v3": ("rope half q,k, 8 of 24 channels", 0),
    "gemma2": ("rope half q,k", 0),
    "gemma3_text": ("rope half q,k", 0),
    "glm4": ("rope interleaved q,k, 8 of 16 channels", 0),
    "gpt2": ("", 2),
    "gpt_neox": ("rope half q,k, 4 of 16 channels", 0),
    "gpt_oss": ("rope half q,k", 0),
    "llama": ("rope half q,k", 0),
    "mistral": ("rope half q,k", 0),
    "mixtral": ("rope half q,k", 0),
    "olmo2": ("rope half q,k", 0),
    "phi": ("rope half q,k, 8 of 16 channels", 0),
    "phi3": ("rope half q,k", 0),
    "qwen2": ("rope half q,k", 0),
    "qwen3": ("rope half q,k", 0),
    "smollm3": ("rope half q,k", 1),
    "stablelm": ("rope half q,k, 4 of 16 channels", 0),
    "starcoder2": ("rope half q,k", 0),
}
QUICK = {"gpt2", "llama"}
ROUNDED = {"deepseek_v2"}  # torch rounds products of complex numbers differently


def ropes(gm: GraphModule) -> list[torch.fx.Node]:
    return [n for n in gm.graph.nodes if n.target is ROPE]


def canonical(gm: GraphModule) -> tuple[GraphModule, list[Outcome]]:
    """A rewritten copy, checked: it verifies, and a second run changes nothing."""
    gm = copy_graph(gm)
    outcomes = PASS.run(gm, ())
    gm.recompile()
    verify(gm)
    code = gm.code
    again = PASS.run(gm, ())
    gm.recompile()
    assert gm.code == code
    assert not any(isinstance(o, Rewritten) for o in again)
    return gm, outcomes


@cache
def captured(arch: str, dtype: torch.dtype) -> GraphModule:
    layers = 4 if MODELS[arch][1] == 1 else 2
    return export(tiny(arch, dtype=dtype, num_hidden_layers=layers))


def inputs(tokens: int = 13) -> tuple[Tensor, ...]:
    """Two rows, the second with padding on the left and positions that start elsewhere."""
    ids = torch.randint(3, 128, (2, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens) + torch.tensor([[0], [100]])
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, :3] = False
    return ids, positions, valid, torch.arange(tokens)


@pytest.mark.parametrize("arch", [
    arch if arch in QUICK else pytest.param(arch, marks=pytest.mark.slow) for arch in MODELS])
def test_models_keep_their_logits_and_get_rope_nodes(arch: str) -> None:
    what, without = MODELS[arch]
    before = captured(arch, torch.float32)
    after, outcomes = canonical(before)
    sites = attention_nodes(after.graph)
    refused = [o for o in outcomes if isinstance(o, Refused)]
    assert [o.layer for o in outcomes] == list(range(len(sites)))
    assert {o.what for o in outcomes if isinstance(o, Rewritten)} == ({what} if what else set())
    assert len(refused) == without
    assert all("no rotary embedding between" in o.reason for o in refused)
    assert len(ropes(after)) == 2 * (len(sites) - without)
    for node in after.graph.nodes:
        assert "val" in node.meta or node.op in ("output", "get_attr"), node
    assert all(n.meta.get("stack_trace") for n in ropes(after))
    with torch.no_grad():
        want, got = before(*inputs()), after(*inputs())
    if arch in ROUNDED:
        assert (want - got).abs().max() <= 1e-5
    else:
        assert torch.equal(want, got)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["cohere", "gemma3_text", "gpt_oss", "llama", "olmo2"])
def test_bfloat16_casts_stay_where_they_are(arch: str) -> None:
    before = captured(arch, torch.bfloat16)
    after, _ = canonical(before)
    assert ropes(after)
    with torch.no_grad():
        assert torch.equal(before(*inputs()), after(*inputs()))


# Ways to write a rotation of x [B, H, S, D] by cos and sin [B, 1, S, D / 2], and its style.

def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def twice(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)


def half(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return rotate_half(x) * twice(s) + twice(c) * x


def half_backward(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return x * twice(c) - rotate_half(x) * twice(s)


def halves_apart(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = x.split(DIM // 2, -1)
    return torch.cat([a * c - b * s, a * s + b * c], -1)


def pairs(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return x * c.repeat_interleave(2, -1) + rotate_pairs(x) * s.repeat_interleave(2, -1)


def pairs_apart(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)


def as_complex(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    z = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * torch.polar(torch.ones_like(c), torch.atan2(s, c))).flatten(-2)


def tokens_first(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return pairs_apart(x.transpose(1, 2), c.transpose(1, 2), s.transpose(1, 2)).transpose(1, 2)


def sorted_before(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return half(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), c, s)


def sorted_meanwhile(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def prefix(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    r = DIM // 2
    return torch.cat([half(x[..., :r], c[..., : r // 2], s[..., : r // 2]), x[..., r:]], -1)


def suffix(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    r = DIM // 2
    return torch.cat([x[..., r:], pairs(x[..., :r], c[..., : r // 2], s[..., : r // 2])], -1)


def normed_after(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return F.rms_norm(half(x, c, s), (DIM,)) * 0.5


SPELLINGS: dict[Callable[..., Tensor], str] = {
    half: "half", half_backward: "half", halves_apart: "half", pairs: "interleaved",
    pairs_apart: "interleaved", as_complex: "interleaved", tokens_first: "interleaved",
    sorted_before: "half", sorted_meanwhile: "half", prefix: "half", suffix: "interleaved",
    normed_after: "half",
}


def angles(positions: Tensor) -> Tensor:
    return positions[:, None, :, None] * 0.01 ** (torch.arange(DIM // 2) / (DIM // 2))


class OneLayer(nn.Module):
    """x [B, S, HEADS * DIM] -> attention, whose q and k are turned by `turn`."""

    def __init__(self, turn: Callable[..., Tensor],
                 angles: Callable[..., Tensor] = angles, of: str = "qk") -> None:
        super().__init__()
        self.turn, self.angles, self.of = turn, angles, of
        self.q, self.k, self.v = (nn.Linear(HEADS * DIM, HEADS * DIM) for _ in range(3))

    def forward(self, x: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
                   for f in (self.q, self.k, self.v))
        turn = self.angles(positions)
        q, k = (self.turn(y, turn.cos(), turn.sin()) if n in self.of else y
                for y, n in ((q, "q"), (k, "k")))
        o: Tensor = torch.ops.kvc.attention(q, k, v, positions, valid, None, scale=0.3)
        return o


def traced(model: nn.Module, dtype: torch.dtype = torch.float32
           ) -> tuple[GraphModule, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    args = (torch.randn(2, 9, HEADS * DIM).to(dtype), torch.arange(9) + torch.tensor([[0], [40]]),
            torch.ones(2, 9, dtype=torch.bool))
    model.requires_grad_(False).to(dtype)
    graph = make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    return graph, args


@pytest.mark.parametrize("turn", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings_become_one_node(turn: Callable[..., Tensor]) -> None:
    before, args = traced(OneLayer(turn))
    after, outcomes = canonical(before)
    assert [argument(n, "style") for n in ropes(after)] == [SPELLINGS[turn]] * 2, outcomes
    rotated = {argument(n, "cos").meta["val"].shape[-1] for n in ropes(after)}
    assert rotated == {DIM // 2 if turn in (prefix, suffix) else DIM}
    left = {n.target for n in after.graph.nodes}
    assert not left & {torch.ops.aten.neg.default, torch.ops.aten.view_as_complex.default} or (
        turn is half_backward)
    want, got = before(*args), after(*args)
    if turn is as_complex:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    else:
        assert torch.equal(want, got)


@pytest.mark.parametrize("turn", [half, pairs, sorted_meanwhile, suffix], ids=lambda f: f.__name__)
def test_half_precision_turned_in_float32(turn: Callable[..., Tensor]) -> None:
    def mixed(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return turn(x.float(), c, s).to(x.dtype)

    before, args = traced(OneLayer(mixed), torch.bfloat16)
    after, _ = canonical(before)
    assert [n.meta["val"].dtype for n in ropes(after)] == [torch.float32] * 2
    assert torch.equal(before(*args), after(*args))


def stretched(positions: Tensor) -> Tensor:
    """Angles that shrink as the row grows, as in dynamic NTK scaling."""
    return angles(positions) / positions.amax()


def counted(positions: Tensor) -> Tensor:
    return angles(torch.arange(positions.shape[1])[None])


def rounded(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Its products are rounded one by one."""
    return (x * twice(c)).bfloat16() + (rotate_half(x) * twice(s)).bfloat16()


def scaled_alone(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return x * twice(c) + x * twice(s)


def plain(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return x


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "arange": ({"turn": half, "angles": counted}, "do not come from positions"),
    "dynamic": ({"turn": half, "angles": stretched}, "depend on other tokens' positions"),
    "rounded": ({"turn": rounded}, "positions enter otherwise than by a rotary embedding"),
    "not a turn": ({"turn": scaled_alone}, "positions enter otherwise"),
    "k alone": ({"turn": half, "of": "k"}, "q: no rotary embedding between 'addmm' and"),
    "q alone": ({"turn": half, "of": "q"}, "k: no rotary embedding between 'addmm_1' and"),
    "none": ({"turn": plain}, "q: no rotary embedding between 'addmm' and attention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_reason_and_a_node(case: str) -> None:
    options, reason = REFUSED[case]
    model = OneLayer(**options)
    before, args = traced(model, torch.bfloat16 if case == "rounded" else torch.float32)
    code = before.code
    after, (outcome,) = canonical(before)
    assert isinstance(outcome, Refused) and reason in outcome.reason
    assert outcome.node in {n.name for n in after.graph.nodes}
    assert after.code == code and not ropes(after)


def test_fixed_sizes_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = traced(OneLayer(half))
    monkeypatch.setattr(canonicalize, "LARGE", 100)
    _, (outcome,) = canonical(before)
    assert isinstance(outcome, Refused) and "trace with symbolic sizes" in outcome.reason
