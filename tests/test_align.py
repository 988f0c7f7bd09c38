"""Layers in one basis: the same model, more alike K and V."""

import pytest
import torch
from support import greedy, optimized, plain, prompt, slow_but
from torch._dynamo.exc import BackendCompilerFailed

import kvcompile
from kvcompile.calibration.alignment import Rotary, align, orthogonal, turn
from kvcompile.models.tiny import tiny


def rotated(x, positions, rotary, base=100.0):
    """Rotary embedding of x [N, D], said once more."""
    x = x.clone()
    for n, (i, j) in enumerate(rotary.pairs().tolist()):
        angle = positions * base ** (-2 * n / rotary.channels)
        a, b = x[:, i].clone(), x[:, j].clone()
        x[:, i], x[:, j] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return x


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_turns_commute_with_the_rotary_embedding_and_are_the_best(style):
    g = torch.Generator().manual_seed(0)
    rotary = Rotary(8, style)
    x, y = (torch.randn(200, 12, generator=g, dtype=torch.float64) for _ in range(2))
    y += x
    t = turn(x, y, rotary)
    assert torch.allclose(t @ t.mT, torch.eye(12, dtype=torch.float64))
    at = torch.arange(200.0, dtype=torch.float64)
    assert torch.allclose(rotated(x @ t.mT, at, rotary), rotated(x, at, rotary) @ t.mT)
    best = (x @ t.mT - y).square().sum()
    for i, j in rotary.pairs().tolist():
        for angle in (0.1, -0.1, 1.0):
            other, c, s = t.clone(), torch.tensor(angle).cos(), torch.tensor(angle).sin()
            other[[i, j]] = torch.stack([c * t[i] - s * t[j], s * t[i] + c * t[j]]).double()
            assert (x @ other.mT - y).square().sum() > best
    u = orthogonal(x, y)
    assert (x @ u.mT - y).square().sum() <= best
    assert torch.allclose(u @ u.mT, torch.eye(12, dtype=torch.float64))


def test_hidden_heads_are_found_again():
    """A layer that is another one, its heads exchanged and turned, is aligned to it entirely."""
    g = torch.Generator().manual_seed(1)
    k, v = (torch.randn(3, 300, 8, generator=g, dtype=torch.float64) for _ in range(2))
    order, rotary = [2, 0, 1], Rotary(8, "half")
    turns = [torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))[0]
             for _ in range(3)]
    phase = turn(torch.randn(9, 8, generator=g).double(), torch.randn(9, 8, generator=g).double(),
                 rotary)
    k2 = torch.stack([k[h] @ phase.mT for h in order])
    v2 = torch.stack([v[h] @ turns[h].mT for h in order])
    found = align((k2, k), (v2, v), rotary)
    assert found.heads == (1, 2, 0)
    assert found.cosine[1] == pytest.approx((1, 1))
    assert torch.allclose(v2[list(found.heads)] @ found.v.mT, v)


EXACT = slow_but(("llama", "gpt2", "qwen3", "phi"),
                 ("llama", "gpt2", "qwen2", "phi3", "gpt_neox", "qwen3", "phi"))


@pytest.mark.parametrize("arch", EXACT)
def test_the_aligned_model_computes_the_same(arch):
    """`retained=1` merges nothing, so that only the alignment is left."""
    model = plain(arch)
    program = kvcompile.capture(model, "minicache(align=true, retained=1.0)",
                                calibration=prompt(80, 2, seed=5))
    ids = prompt(60)
    positions = torch.arange(60)[None]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        got = program.after("align").graph_module(ids, positions, torch.ones_like(ids).bool(),
                                                  positions[0])
    assert (got - want).abs().max() <= 1e-4 + 1e-5 * want.abs().max()
    told = [o for o in program.outcomes["align"]]
    assert [o.layer for o in told] == [3] and "in the basis of layer 2" in told[0].what
    before, after = (list(map(float, x.split(", "))) for x in
                     told[0].what.split("cosines ")[1].split(" -> "))
    assert after[1] > before[1] + 0.1 and after[0] >= before[0]
    assert ("not K (a norm stands" in told[0].what) == (arch == "qwen3")


def test_alignment_brings_shared_layers_nearer():
    """Forced decode through a merged cache: nearer to the exact model than without alignment."""
    ids, text = prompt(300), prompt(128, 2, seed=3)
    want = optimized("llama")(ids, use_cache=False).logits[0, 128:]
    for recipe in ("minicache(retained=0, start=0{})", "cla(layers=2:{})"):
        off = []
        for how in ("", ", align=true"):
            model = kvcompile.optimize(optimized("llama"), recipe.format(how), compile=False,
                                       calibration=text)
            with torch.no_grad():
                cache = model(ids[:, :128], use_cache=True).past_key_values
                got = model(ids[:, 128:], past_key_values=cache).logits[0]
            off.append(float((got - want).norm() / want.norm()))
        assert off[1] < off[0], (recipe, off)


def test_the_users_model_is_left_alone_and_old_weights_are_not_used():
    model = tiny("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    shared = kvcompile.optimize(model, "cla(align=true)", compile=False)
    greedy(shared, prompt(9), 3)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert "aligned" in str(shared.kvcompile.program)


@pytest.mark.slow
def test_what_cannot_be_aligned():
    report = kvcompile.explain(optimized("deepseek_v2:2"), "cla(align=true)")
    refused = {r.layer: r.what for r in report.rows if r.name == "align"}
    assert set(refused) == {1} and all(r.status == "refused" for r in report.rows
                                          if r.name == "align")
    with pytest.raises(BackendCompilerFailed, match="RecipeError: aligning layers needs a text"):
        torch.compile(plain("llama:2"), backend="kvcompile", options={
            "recipe": "cla(align=true)"})(prompt(8), use_cache=False)
