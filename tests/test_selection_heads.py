"""Budgets by head, calibrated directions, thresholds and merges, against plain statements."""

import math

import pytest
import selection_references as refs
import torch
from support import optimized, prompt
from test_selection import LAYERS, TOKENS, inputs, kept

import kvcompile


def one(layers):
    return [tuple(t[0] for t in x) for x in layers]


def test_qfilters_keep_what_lies_along_the_given_direction():
    g = torch.Generator().manual_seed(5)
    u = torch.randn(LAYERS, refs.HEADS, refs.DIM, generator=g)
    text = str(u.tolist())
    got, _ = kept(f"qfilters(budget=40, filters={text})", inputs())
    for i, (_, k, _) in enumerate(one(inputs())):
        for h in range(refs.HEADS):
            scores = [-float(x @ u[i, h].double()) for x in k[h].double()]
            assert set(got[i][0][h]) == refs.best(scores, 40)


def test_qfilters_find_the_direction_that_queries_share():
    """-u, u the first right singular vector of a query head, on their mean's side."""
    model = kvcompile.optimize(optimized("llama:2"), "qfilters", compile=False)
    found = model.kvcompile.program.recipe.terms[0].get("filters")
    assert len(found) == 2 and all(len(h) == 2 and len(h[0]) == 16 for h in found)
    given = kvcompile.optimize(model, str(model.kvcompile.program.recipe), compile=False)
    a, b = (kvcompile.prefill(m, prompt(90)).positions(0) for m in (model, given))
    assert torch.equal(a, b)


def test_streaming_heads_keep_first_and_newest_tokens():
    got, _ = kept("duoattention(heads=[[1, 0], [0, 0], [0, 1]], sinks=3, recent=20)", inputs())
    stream = [0, 1, 2, *range(TOKENS - 20, TOKENS)]
    want = [[[*range(TOKENS)] if full else stream for full in heads]
            for heads in ((1, 0), (0, 0), (0, 1))]
    assert [layer[0] for layer in got] == want
    got, _ = kept("razorattention(heads=[[1, 0], [0, 0], [0, 1]], sinks=3, recent=5, share=0.2)",
                  inputs())
    assert got[0][0][1] == [0, 1, 2, *range(TOKENS - 27, TOKENS)]


def test_streaming_heads_go_on_streaming():
    model = kvcompile.optimize(optimized("llama:2"),
                               "duoattention(heads=[[1, 0], [0, 1]], sinks=2, recent=10)",
                               compile=False)
    cache = kvcompile.prefill(model, prompt(50))
    for i in range(6):
        model(prompt(1, seed=i), past_key_values=cache, use_cache=True)
    assert cache.stored_tokens(0).tolist() == [[56, 12]]
    assert cache.stored_tokens(1).tolist() == [[12, 56]]
    ids = cache.positions(0)[0, 1]
    assert ids[ids >= 0].tolist() == [0, 1, *range(46, 56)]


def test_headkv_gives_out_a_pot_by_importance():
    heads = [[0.5, 0.1], [0.2, 0.0], [0.1, 0.1]]
    got, _ = kept(f"headkv(budget=50, window=8, beta=1.25, heads={heads})", inputs())
    spare, pot, count = 42, 33, 6
    for i, layer in enumerate(one(inputs())):
        for h in range(refs.HEADS):
            n = min(8 + spare - pot + round(pot * count * heads[i][h]), TOKENS)
            want = refs.snapkv([layer], n, 8, kernel=7, pool="max")[0][h]
            assert set(got[i][0][h]) == want


def test_dms_keeps_what_is_above_and_what_is_new():
    got, _ = kept("dms(scorer=knorm, threshold=-3.9, delay=30)", inputs())
    for i, (_, k, _) in enumerate(one(inputs())):
        for h in range(refs.HEADS):
            assert got[i][0][h] == [t for t in range(TOKENS) if t >= TOKENS - 30
                                    or float(k[h, t].norm()) <= 3.9]


def test_d2o_merges_into_the_nearest_key():
    """Layers share budgets by exp(-variance / mean); merged by exp(cosine), above the mean one."""
    layers = inputs()
    got, out = kept("d2o(ratio=0.4, recent=0.25)", layers)
    flat = one(layers)
    var = [float(refs.matrix(q, k).sum(2).mean((0, 1)).var(correction=0)) for q, k, _ in flat]
    share = [math.exp(-v * len(var) / sum(var)) for v in var]
    for i, (q, k, v) in enumerate(flat):
        n = min(TOKENS, 1 + int(59 * LAYERS * share[i] / sum(share)))
        scores = refs.matrix(q, k).sum((1, 2))
        for h in range(refs.HEADS):
            mine = sorted(got[i][0][h])
            # what rounding leaves is given to the first layers, one token each
            assert abs(len(mine) - n) <= 1
            assert set(mine) == refs.best(scores[h], len(mine), set(range(TOKENS - 15, TOKENS)))
            gone = [t for t in range(TOKENS) if t not in mine]
            unit = k[h].double() / k[h].double().norm(dim=-1, keepdim=True)
            near = {t: max((float(unit[t] @ unit[m]), -m) for m in mine) for t in gone}
            mean = sum(c for c, _ in near.values()) / len(near)
            for side, x in ((0, k[h]), (1, v[h])):
                for slot, m in enumerate(mine):
                    into = [(t, c) for t, (c, at) in near.items() if -at == m and c >= mean]
                    total = math.e + sum(math.exp(c) for _, c in into)
                    want = (math.e * x[m].double() + sum(
                        math.exp(c) * x[t].double() for t, c in into)) / total
                    assert (out[side][i][0, h, slot] - want).abs().max() < 1e-4


def test_cam_adds_values_to_the_next_kept_tokens():
    layers = inputs()
    got, out = kept("cam(scorer=h2o, ratio=0.4, next=7, seed=3)", layers)
    draws = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3))
    for i, (q, k, v) in enumerate(one(layers)):
        scores = refs.matrix(q, k).sum((1, 2)) / (refs.Q_HEADS // refs.HEADS)
        for h in range(refs.HEADS):
            mine, want = got[i][0][h], v[h].double().clone()
            for t in sorted(set(range(TOKENS)) - set(mine)):
                after = [m for m in mine if m > t][:7]
                if after and float(draws[t]) < float(scores[h, t]) / float(
                        scores[h, after].mean()):
                    for m in after:
                        want[m] += v[h, t].double() / len(after)
            assert torch.equal(out[0][i][0, h, : len(mine)], k[h, mine])
            assert (out[1][i][0, h, : len(mine)] - want[mine]).abs().max() < 1e-4


def test_kvmerger_makes_one_of_a_run():
    layers = inputs()
    for _, k, _ in layers:   # runs: copies of the token before, nearly
        k[:, :, 30:34] = k[:, :, 29:30] + torch.randn(k[:, :, 30:34].shape) * 0.05
    got, out = kept("kvmerger(alike=0.75, heavy=0, recent=10)", layers)
    for i, (q, k, v) in enumerate(one(layers)):
        scores = refs.matrix(q, k).sum((1, 2))
        for h in range(refs.HEADS):
            unit = k[h].double() / k[h].double().norm(dim=-1, keepdim=True)
            runs, free = [[0]], TOKENS - 10
            for t in range(1, TOKENS):
                if t < free and float(unit[t] @ unit[t - 1]) > 0.75:
                    runs[-1].append(t)
                else:
                    runs.append([t])
            pivots = [max(r, key=lambda t: (float(scores[h, t]), -t)) for r in runs]
            assert got[i][0][h] == pivots and any(len(r) > 3 for r in runs)
            for slot, (run, p) in enumerate(zip(runs, pivots, strict=True)):
                keys = k[h, run].double()
                far = (keys - k[h, p].double()).norm(dim=-1)
                sigma = float(far.sum()) / max(1, len(run) - 1)
                w = torch.exp(-far**2 / (2 * sigma**2)) if len(run) > 1 else torch.ones(1).double()
                for side, x in ((0, k[h]), (1, v[h])):
                    want = (x[run].double() * w[:, None]).sum(0) / w.sum()
                    assert (out[side][i][0, h, slot] - want).abs().max() < 1e-3


@pytest.mark.parametrize("recipe", ["duoattention", "razorattention", "headkv(budget=40)"])
def test_calibration_writes_a_map_of_the_heads(recipe):
    model = kvcompile.optimize(optimized("llama:2"), recipe, compile=False)
    heads = model.kvcompile.program.recipe.terms[0].get("heads")
    assert [len(h) for h in heads] == [2, 2]
    if recipe.startswith("duo"):
        assert sum(map(sum, heads)) == 2
    kvcompile.prefill(model, prompt(100))
