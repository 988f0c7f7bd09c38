"""Scorers of values, forgetting, leverage, hashes, and top-p budgets, against plain statements."""

import math

import pytest
import selection_references as refs
import torch
from selection_references import DIM, HEADS, Q_HEADS
from test_selection import RATES, TOKENS, WEIGHTS, inputs, kept

from kvcompile.errors import RecipeError
from kvcompile.plan import plan

GROUP = Q_HEADS // HEADS


def sums(q, k, decay: float = 1.0):
    """[H][T]: the weights that a token has received, mean over a kv head's queries."""
    t = q.shape[1]
    later = torch.tensor([decay ** (t - 1 - i) for i in range(t)], dtype=torch.float64)
    return (refs.matrix(q, k) * later[:, None]).sum(2).mean(1).tolist()


def vatp(layer, n: int, recent: int, sinks: int):
    q, k, v = layer
    t = q.shape[1]
    sure = {*range(sinks), *range(t - recent, t)}
    return [refs.best([s * sum(map(abs, x)) for s, x in zip(own, mine.double().tolist(),
                                                            strict=True)], n, sure)
            for own, mine in zip(sums(q, k), v, strict=True)]


def caote(layer, n: int, recent: int):
    q, k, v = layer
    t, out = q.shape[1], []
    for own, mine in zip(sums(q, k), v.double(), strict=True):
        a = [s / sum(own) for s in own]
        o = sum(w * x for w, x in zip(a, mine, strict=True))
        moved = [w / (1 - w) * float((o - x).norm()) for w, x in zip(a, mine, strict=True)]
        out.append(refs.best(moved, n, {*range(t - recent, t)}))
    return out


def a2sf(layer, n: int, recent: int, decay: float):
    t = layer[0].shape[1]
    return [refs.best(own, n, {*range(t - recent, t)}) for own in sums(*layer[:2], decay)]


def turned(x, by):
    """x [T, D] turned by so many positions each, half-split rotary embedding, in fp64."""
    angle = torch.tensor(by, dtype=torch.float64)[:, None] * RATES
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def standard(rows):
    x = torch.stack(rows)
    return (x - x.mean()) / x.std()


def compactor(layer, index: int, n: int, chunk: int, sketch: int, share: float):
    q, k, v = layer
    first, last, t = 8, q.shape[1] - 4, q.shape[1]
    g = torch.Generator().manual_seed(index)
    drawn = torch.randn(HEADS, DIM, sketch, generator=g).double() / math.sqrt(sketch)
    leverage, looked = [], []
    for h in range(HEADS):
        x = turned(k[h], [-i for i in range(t)])[first:last]
        x = (x - x.mean(0)) @ drawn[h]
        inverse = torch.linalg.inv(x.T @ x + 0.01 * torch.eye(sketch, dtype=torch.float64))
        leverage.append(torch.stack([row @ inverse @ row for row in x]))
        total = torch.zeros(last - first, dtype=torch.float64)
        for query in q[h * GROUP : (h + 1) * GROUP].double():
            for start in range(first, last, chunk):
                part = slice(start, min(start + chunk, last))
                for row in query[part]:
                    w = (k[h, part].double() @ row).softmax(0)
                    total[part.start - first : part.stop - first] += w / GROUP
        total = (total * v[h, first:last].double().norm(dim=-1)).tolist()
        edged = [0.0, *total, 0.0]
        looked.append(torch.tensor([sum(edged[i : i + 3]) / 3 for i in range(len(total))],
                                   dtype=torch.float64))
    both = standard(looked) + share * standard(leverage)
    sure = {*range(first), *range(last, t)}
    return [refs.best([0.0] * first + s.tolist() + [0.0] * 4, n, sure) for s in both]


def hashevict(layer, index: int, n: int, bits: int, sinks: int, recent: int):
    q, k, _ = layer
    t = q.shape[1]
    planes = torch.randn(DIM, bits, generator=torch.Generator().manual_seed(index)).double()
    sides = [[bool(x @ p > 0) for p in planes.T] for x in q[:, -1].double()]
    out = []
    for h in range(HEADS):
        near = []
        for x in k[h].double():
            mine = [bool(x @ p > 0) for p in planes.T]
            near.append(sum(a == b for g in range(GROUP)
                            for a, b in zip(mine, sides[h * GROUP + g], strict=True)))
        out.append(refs.best(near, n, {*range(sinks), *range(t - recent, t)}))
    return out


def topp(layer, p: float, w: int, sinks: int):
    q, k, _ = layer
    t, out = q.shape[1], []
    for s in refs.window_scores(q, k, w):
        free = sorted(range(sinks, t - w), key=lambda i: -s[i])
        n = next(n for n in range(len(free) + 1)
                 if sum(s[i] for i in free[:n]) >= p * sum(s[i] for i in free))
        out.append({*free[:n], *range(sinks), *range(t - w, t)})
    return out


CASES = {
    "vatp(budget=60)": lambda x, i: vatp(x, 60, 30, 20),
    "vatp(budget=50, scorer=h2o(recent=0.2), sinks=3)": lambda x, i: vatp(x, 50, 10, 3),
    "caote(budget=40)": lambda x, i: caote(x, 40, 20),
    "a2sf(budget=40, decay=0.9)": lambda x, i: a2sf(x, 40, 20, 0.9),
    "a2sf(ratio=0.4, recent=0, decay=0.3)": lambda x, i: a2sf(x, 60, 0, 0.3),
    "compactor(ratio=0.4, chunk=50, sketch=6)": lambda x, i: compactor(x, i, 60, 50, 6, 0.6),
    "compactor(budget=70, sketch=12)": lambda x, i: compactor(x, i, 70, 256, 12, 0.35),
    "hashevict(budget=40)": lambda x, i: hashevict(x, i, 40, 16, 4, 10),
    "topp(p=0.7, scorer=snapkv(window=8))": lambda x, i: topp(x, 0.7, 8, 4),
    "topp(p=0, scorer=snapkv(window=8))": lambda x, i: topp(x, 0.0, 8, 4),
}


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_kept_tokens_equal_the_reference(recipe, seed):
    layers = inputs(seed=seed)
    got, _ = kept(recipe, layers, weights=WEIGHTS)
    for i, (layer, mine) in enumerate(zip(layers, got, strict=True)):
        assert [set(h) for h in mine[0]] == CASES[recipe](tuple(t[0] for t in layer), i)


@pytest.mark.parametrize("recipe", [*CASES, "adakv(scorer=snapkv, budget=50, safeguard=mean)",
                                    "criticalkv(scorer=adakv(scorer=snapkv), budget=50)"])
def test_padding_changes_nothing_and_short_prompts_are_safe(recipe):
    layers = inputs(rows=2)
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    for pad in (31, TOKENS - 1, TOKENS - 2, TOKENS - 9):
        valid[1] = torch.arange(TOKENS) >= pad
        both, _ = kept(recipe, layers, valid, WEIGHTS)
        alone, _ = kept(recipe, [tuple(t[1:, :, pad:] for t in x) for x in layers],
                        weights=WEIGHTS)
        for ours, single in zip(both, alone, strict=True):
            assert ours[1] == [[pad + i for i in head] for head in single[0]]
            assert all(head for head in single[0])


def test_a_head_is_drawn_towards_the_mean():
    """Ada-KV's own safeguard: n <- (1 - floor) n + floor mean, beside the window."""
    layers = inputs()
    got, _ = kept("adakv(scorer=snapkv(window=8), budget=48, floor=0.3, safeguard=mean)", layers)
    for i, (q, k, _) in enumerate(tuple(t[0] for t in x) for x in layers):
        scores = refs.window_scores(q, k, 8)
        every = sorted(((-s, h) for h, own in enumerate(scores) for s in own))[: 40 * HEADS]
        for h in range(HEADS):
            n = round(0.7 * sum(head == h for _, head in every) + int(0.3 * 40))
            assert set(got[i][0][h]) == refs.best([*scores[h], *[0.0] * 8], n + 8,
                                                  {*range(TOKENS - 8, TOKENS)})


def test_critical_tokens_of_pooled_budgets():
    """The base scores say how many tokens each head keeps, then half of them stay by these."""
    layers, w, n = inputs(), 8, 40
    got, _ = kept(f"criticalkv(scorer=adakv(scorer=snapkv(window={w})), budget={n})", layers,
                  weights=WEIGHTS)
    unequal = 0
    for i, (q, k, v) in enumerate(tuple(t[0] for t in x) for x in layers):
        sizes = [len(h) for h in refs.adakv([(q, k, v)], n, w, 0.2)[0]]
        assert [len(h) for h in got[i][0]] == sizes
        unequal += len(set(sizes)) > 1
        for h in range(HEADS):
            want = refs.criticalkv([(q, k, v)], sizes[h], w, [WEIGHTS[i]])[0][h]
            assert set(got[i][0][h]) == want
    assert unequal


@pytest.mark.parametrize("recipe", ["vatp(scorer=knorm)", "caote(scorer=keydiff)",
                                    "topp(scorer=random)", "vatp(scorer=scissorhands)"])
def test_scores_that_are_not_weights_are_refused(recipe):
    with pytest.raises(RecipeError, match="its scores are not weights of attention") as error:
        plan(recipe, 2)
    assert "\n" not in str(error.value)
