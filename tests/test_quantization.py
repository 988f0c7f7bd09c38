"""Each quantization method against its algorithm, restated from the paper without our formats."""

from itertools import product
from math import sqrt

import pytest
import torch
from support import plain, prompt

import kvcompile
from kvcompile.calibration.samples import Samples, calibrated
from kvcompile.calibration.stored_attention import seen
from kvcompile.errors import KVCompileError, RecipeError
from kvcompile.measure.attention_error import attention_error
from kvcompile.passes.kvquant import kmeans
from kvcompile.passes.kvtuner import PAIRS, choose
from kvcompile.plan import plan
from kvcompile.program import capture
from kvcompile.recipe import Recipe
from kvcompile.store import Store

F16 = 2.0**-10  # what rounding scales and offsets to 16 bits may add, relative


def data(tokens=256, dim=64):
    x = torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 20                                     # an outlier channel
    x[1, 5] *= 10                                       # and an outlier token
    return x


def both(recipe, x):
    """(K, V) as the method gives them back after x, for both."""
    store = Store.of(plan(recipe, 1)[0].values)
    return [seen(store, side, x) for side in "kv"]


def minmax(x, bits, dim, low=None, high=None):
    """KIVI, equation 2: round((x - z) / s) with z the minimum and s the range over 2^b - 1."""
    low = x.amin(dim, keepdim=True) if low is None else low
    high = x.amax(dim, keepdim=True) if high is None else high
    scale = (high - low) / (2**bits - 1)
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low, scale


def close(got, want, step):
    """Equal but for the rounding of scales, which moves a few numbers by a whole step: the numbers
    compared."""
    error = (got - want).abs()
    most = want.abs().amax((-1, -2), keepdim=True)
    assert (error <= step * (1 + 2 * F16) + 8 * F16 * most).all()
    assert (error > 8 * F16 * most).float().mean() < 0.02
    return got.numel()


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi(bits):
    x = data()
    k, v = both(f"kivi(bits={bits}, group=32, residual=0)", x)
    want, step = minmax(x.unflatten(-2, (-1, 32)), bits, -2)
    assert close(k, want.flatten(-3, -2), step.expand_as(want).flatten(-3, -2))
    want, step = minmax(x.unflatten(-1, (-1, 32)), bits, -1)
    assert close(v, want.flatten(-2), step.expand_as(want).flatten(-2))


def test_nf4():
    """The nearest of QLoRA's 16 numbers, times the block's largest magnitude."""
    table = torch.tensor([-1, -.6962, -.5251, -.3949, -.2844, -.1848, -.0911, 0, .0796, .1609,
                          .2461, .3379, .4407, .5626, .7230, 1])
    x = data().unflatten(-1, (-1, 32))
    peak = x.abs().amax(-1, keepdim=True)
    want = table[((x / peak)[..., None] - table).abs().argmin(-1)] * peak
    for got in both("nf4(group=32)", data()):
        assert close(got, want.flatten(-2), (peak * 0.31).expand_as(x).flatten(-2))


def hadamard(n):
    """Sylvester's: H(2n) = [[H, H], [H, -H]]."""
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / sqrt(n)


@pytest.mark.parametrize("bits", [2, 4])
def test_quarot(bits):
    """Heads times a Hadamard matrix, asymmetric per token over 95 % of the range."""
    x, h = data(), hadamard(64)
    turned = x @ h
    low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
    cut = (high - low) * 0.025
    want, step = minmax(turned, bits, -1, low + cut, high - cut)
    # our matrix may order its rows otherwise: what comes back differs, its error does not
    error = (want @ h.T - x).norm(dim=-1)
    for got in both(f"quarot(bits={bits})", x):
        ours = (got - x).norm(dim=-1)
        assert (ours - error).abs().max() <= 8 * step.max() * sqrt(64) * F16 + 0.05 * error.max()
    outlier = data()
    outlier[..., 3] *= 5
    plain_error = (minmax(outlier, bits, -1)[0] - outlier).norm()
    assert (both(f"quarot(bits={bits})", outlier)[0] - outlier).norm() < plain_error


def without(x, count, dim):
    """x without the `count` numbers farthest from the mean along dim: their mean instead."""
    order = (x - x.mean(dim, keepdim=True)).abs().argsort(dim, descending=True)
    rank = order.argsort(dim)
    out = rank < count
    mean = (x * ~out).sum(dim, keepdim=True) / (~out).sum(dim, keepdim=True)
    return torch.where(out, mean, x), out


def test_gear():
    """X ~ Quant(X - S) + L + S, with L the best rank-4 approximation of what is left."""
    x = data()
    for got, dim in zip(both("gear(bits=2, group=64, rank=4, outliers=0.02)", x), (-2, -1)):
        grouped = x.unflatten(dim, (-1, 64))
        dense, out = without(grouped, 2, dim)               # 2 % of 64, rounded up
        quantized = torch.where(out, grouped, minmax(dense, 2, dim)[0])
        quantized = quantized.flatten(-3, -2) if dim == -2 else quantized.flatten(-2)
        blocks = (x - quantized).unflatten(-2, (-1, 128))
        u, s, v = torch.linalg.svd(blocks, full_matrices=False)
        low = (u[..., :4] * s[..., None, :4]) @ v[..., :4, :]
        best = (blocks - low).norm()
        assert best <= (x - got).norm() * (1 + F16)          # no rank-4 matrix does better,
        assert (x - got).norm() <= 1.05 * best               # and ours hardly worse
        assert (x - got).norm() < 0.97 * blocks.norm()


def test_zipcache():
    """Divide by c = sqrt(max |X_i|) of each channel, quantize per token, multiply by c."""
    x = data()
    k, v = both("zipcache(bits=4, low=4)", x)
    want, step = minmax(x.unflatten(-2, (-1, 128)), 4, -2)
    assert close(k, want.flatten(-3, -2), step.expand_as(want).flatten(-3, -2))
    c = x.unflatten(-2, (-1, 128)).abs().amax(-2, keepdim=True).sqrt()
    c = c.expand(-1, -1, 128, -1).flatten(-3, -2)
    want, step = minmax(x / c, 4, -1)
    assert close(v, want * c, step * c)
    assert torch.equal(both("zipcache(bits=4, low=4, keys=token)", x)[0], v)


def test_kvquant():
    """Per-vector ranges over [-1, 1], outliers and the first token exact, the nearest number."""
    k_table, v_table = torch.tensor([-.8, -.3, .2, .7]), torch.tensor([-.9, -.2, .3, .8])
    recipe = (f"kvquant(bits=2, k=[[{', '.join(f'{x:g}' for x in k_table.tolist())}]], "
              f"v=[[{', '.join(f'{x:g}' for x in v_table.tolist())}]])")
    x = data(257)
    for got, table, dim, count in zip(both(recipe, x), (k_table, v_table), (-2, -1), (2, 1)):
        assert torch.equal(got[:, 0], x[:, 0])
        rest = x[:, 1:].unflatten(-2, (-1, 128))
        dense, out = without(rest, count, dim)
        low, high = dense.amin(dim, keepdim=True), dense.amax(dim, keepdim=True)
        middle, half = (low + high) / 2, (high - low) / 2
        near = table[(((dense - middle) / half)[..., None] - table).abs().argmin(-1)]
        want = torch.where(out, rest, near * half + middle)
        assert close(got[:, 1:], want.flatten(-3, -2), half.expand_as(rest).flatten(-3, -2) * 0.6)


def test_kmeans_finds_the_best_clusters():
    """Weighted k-means in one dimension against every way to cut the sorted numbers."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.rand(9, generator=g) * 2 - 1, torch.rand(9, generator=g)
    x, order = x.sort()
    w, best = w[order], (float("inf"), ())
    for cuts in product(range(1, 9), repeat=3):
        if not cuts[0] < cuts[1] < cuts[2]:
            continue
        edges, loss, centres = (0, *cuts, 9), 0.0, []
        for a, b in zip(edges, edges[1:]):
            centre = float((x[a:b] * w[a:b]).sum() / w[a:b].sum())
            loss += float((w[a:b] * (x[a:b] - centre) ** 2).sum())
            centres.append(centre)
        best = min(best, (loss, tuple(centres)))
    assert kmeans(x, w, 4) == pytest.approx(best[1], abs=2e-3)  # a bin's width
    assert len(set(kmeans(torch.zeros(3), torch.zeros(3), 16))) == 16


def test_kvtuner_chooses_the_least_error_within_the_budget():
    g = torch.Generator().manual_seed(0)
    errors = torch.rand(4, 9, generator=g).tolist()
    costs = [k + v for k, v in PAIRS]
    for budget in (16, 25, 40, 64):
        every = [c for c in product(range(9), repeat=4) if sum(costs[i] for i in c) <= budget]
        least = min(sum(e[i] for e, i in zip(errors, c)) for c in every)
        taken = choose(errors, costs, budget)
        assert sum(costs[i] for i in taken) <= budget
        assert sum(e[i] for e, i in zip(errors, taken)) == pytest.approx(least)


@pytest.fixture(scope="module")
def program():
    return capture(plain("llama:2"))


def test_samples_are_what_attention_sees(program):
    """q, K and V give the model's own attention; gradients agree with finite differences."""
    ids = prompt(70, 2)
    samples = Samples(program.snapshots["capture"], ids)
    model, grabbed = plain("llama:2"), []
    hooks = [layer.self_attn.v_proj.register_forward_hook(lambda m, i, o: grabbed.append(o))
             for layer in model.model.layers]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for sample, v in zip(samples.attention, grabbed, strict=True):
        torch.testing.assert_close(sample.v, v.unflatten(-1, (-1, sample.v.shape[-1]))
                                   .transpose(1, 2))
    grad = samples.gradients[1][1]

    def loss(step):
        def moved(m, i, o):
            return o + step * grad.transpose(1, 2).flatten(2)

        hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(moved)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, :-1].double()
        hook.remove()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(),
                                                 reduction="sum")

    h = 1e-2 / float(grad.norm())
    slope = float(loss(h) - loss(-h)) / (2 * h)
    assert slope == pytest.approx(float(grad.square().sum()), rel=2e-2)


def test_calibration_is_written_into_the_recipe(program):
    ids = prompt(128, 2)
    for text in ("kvtuner(bits=3)", "kvquant(bits=2, layers=1)", "full(layers=0)+kvtuner"):
        found = program.lower(text, calibration=ids)
        again = capture(plain("llama:2"), str(found.recipe))
        assert again.recipe == found.recipe == Recipe.parse(str(found.recipe))
        assert [s.store for s in again.sites] == [s.store for s in found.sites]
        assert calibrated(found.recipe, program) is found.recipe
    k, v = (program.lower("kvtuner(bits=3)", calibration=ids).recipe.terms[0].get(x) for x in "kv")
    assert len(k) == len(v) == 2 and sum(k) + sum(v) <= 12
    assert calibrated(Recipe.parse("int8"), program) == Recipe.parse("int8")


def test_what_calibration_refuses(program):
    with pytest.raises(RecipeError, match="k comes from calibration: kvcompile.optimize"):
        plan("kvtuner", 2)
    with pytest.raises(RecipeError, match="was calibrated for 2 layers, but claims 3"):
        plan("kvtuner(k=[2, 4], v=[4, 8])", 3)
    with pytest.raises(RecipeError, match="bits must be one of 2, 4, 8"):
        program.lower("kvtuner(k=[2, 3], v=[4, 8])")
    with pytest.raises(RecipeError, match="k must be a list"):
        plan("kvtuner(k=4, v=4)", 2)
    with pytest.raises(RecipeError, match="leave too few after the sinks; give at least 96"):
        program.lower("kvquant(sinks=64)", calibration=prompt(64, 2))
    for wrong in (torch.zeros(80), torch.zeros(1, 80), torch.zeros(1, 20, dtype=torch.long), [1]):
        with pytest.raises(KVCompileError, match=r"token ids \[texts, tokens\] of at least 64"):
            program.lower("kvtuner", calibration=wrong)


@pytest.mark.slow
def test_without_text_the_model_writes_its_own():
    model = plain("llama:2")
    one, two = (kvcompile.optimize(model, "kvtuner(bits=3)", compile=False) for _ in range(2))
    assert one.kvcompile.program.recipe == two.kvcompile.program.recipe
    assert one.generate(prompt(9), max_new_tokens=3).shape == (1, 12)


def test_attention_error(program):
    """Against dense attention over K and V with all but the last tokens changed by hand."""
    ids = prompt(200, 2)
    model = kvcompile.optimize(plain("llama:2"), "full", compile=False)
    full, window, int8, two = attention_error(
        model, ids, ["full", "streamingllm(sinks=0, window=100)", "int8", "kivi(residual=0)"],
        queries=8)
    assert full.layers == (0, 0) and full.bits == 32
    assert int8.mean < 0.02 < two.mean and int8.bits == 10 and two.bits == 3.5
    sample = Samples(program.snapshots["capture"], ids).attention[1]
    heads = sample.q.shape[1] // sample.k.shape[1]
    outs = []
    for start in (0, 92):
        k, v = (x[:, :, start:].repeat_interleave(heads, 1) for x in (sample.k, sample.v))
        logits = sample.q[:, :, 192:] @ k.mT * sample.scale
        hidden = torch.arange(start, 200)[None] > torch.arange(192, 200)[:, None]
        outs.append(logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    want = (outs[1] - outs[0]).norm() / outs[0].norm()
    assert window.layers[1] == pytest.approx(float(want), rel=1e-3)
