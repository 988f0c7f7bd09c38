"""Which tokens methods keep, against independent statements of their algorithms."""

import selection_references as refs
import torch
from pytest import mark

from kvcompile.ir import KEEP, SCORE
from kvcompile.kernels.select import largest
from kvcompile.method import methods
from kvcompile.passes.budgets import PerPart
from kvcompile.passes.select import rule_of
from kvcompile.plan import plan

LAYERS, TOKENS = 3, 150
RATES = 10000.0 ** -(torch.arange(refs.DIM // 2, dtype=torch.float64) / (refs.DIM // 2))


def inputs(rows: int = 1, tokens: int = TOKENS, seed: int = 0):
    """q, k, v [B, H, T, D] of some layers, with a few tokens that draw attention."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(LAYERS):
        q = torch.randn(rows, refs.Q_HEADS, tokens, refs.DIM, generator=g)
        k, v = (torch.randn(rows, refs.HEADS, tokens, refs.DIM, generator=g) for _ in range(2))
        k[:, :, ::17] += q[:, :: refs.Q_HEADS // refs.HEADS, -1:] / 2
        twins = k[:, :, 4::23][:, :, : k[:, :, 5::23].shape[2]]
        k[:, :, 5::23] = twins + torch.randn(twins.shape, generator=g) / 10
        out.append((q, k, v))
    return out


def kept(recipe: str, layers, valid=None, weights=None, question: int = 0, probe: int = 0):
    """Columns that each layer and head keeps, [layer][row][head], and the layers' rules."""
    batch, _, tokens, _ = layers[0][0].shape
    valid = torch.ones(batch, tokens, dtype=torch.bool) if valid is None else valid
    at = (valid.cumsum(1) - 1).clamp(min=0)
    angles = (at[..., None] * RATES).float()
    rules = [rule_of(p.values, i, LAYERS) for i, p in enumerate(plan(recipe, LAYERS))]
    hints = torch.tensor([probe, question])
    both = [SCORE(*x, at, valid, hints, None if weights is None else weights[i], angles,
                  rule=str(rule), scale=refs.SCALE)
            for i, (x, rule) in enumerate(zip(layers, rules, strict=True))]
    given = [[b[0] for b in both], [b[1] for b in both], [x[1] for x in layers],
             [x[2] for x in layers]]
    out = KEEP(*given, at, valid, hints, angles, rules=[str(r) for r in rules])
    return [[[head[head >= 0].tolist() for head in row] for row in layer] for layer in out[2]], out


WEIGHTS = [torch.randn(24, refs.Q_HEADS * refs.DIM, generator=torch.Generator().manual_seed(i))
           for i in range(LAYERS)]
CASES = {
    "snapkv(budget=40, window=8)": lambda x: refs.snapkv(x, 40, 8),
    "snapkv(ratio=0.3, window=16, kernel=7, pool=max)":
        lambda x: refs.snapkv(x, 45, 16, kernel=7, pool="max"),
    "pyramidkv(budget=40, window=8)": lambda x: refs.pyramidkv(x, 40, 8, 20),
    "pyramidkv(budget=100, window=8)": lambda x: refs.pyramidkv(x, 100, 8, 20),
    "h2o(ratio=0.2)": lambda x: refs.h2o(x, 30),
    "tova(budget=33)": lambda x: refs.tova(x, 33),
    "scissorhands(budget=40, history=60)": lambda x: refs.scissorhands(x, 40, 60, 10),
    "r-kv(budget=40)": lambda x: refs.r_kv(x, 40, 0.1, 8, 7, 0.5),
    "knorm(ratio=0.4)": lambda x: refs.knorm(x, 60),
    "keydiff(budget=50)": lambda x: refs.keydiff(x, 50),
    "adakv(scorer=snapkv(window=8), ratio=0.25)": lambda x: refs.adakv(x, 37, 8, 0.2),
    "adakv(scorer=snapkv(window=8), budget=50, floor=0)": lambda x: refs.adakv(x, 50, 8, 0.0),
    "criticalkv(scorer=snapkv(window=8), budget=60)":
        lambda x: refs.criticalkv(x, 60, 8, WEIGHTS),
    "chunkkv(scorer=snapkv(window=8), ratio=0.3)": lambda x: refs.chunkkv(x, 0.3, 8, 10),
    "lagkv(ratio=0.6, length=32)": lambda x: refs.lagkv(x, 90, 32, 4),
    "finch(ratio=0.4, window=9, length=50)": lambda x: refs.finch(x, 0.4, 9, 50),
    "cake(budget=60, window=8)": lambda x: refs.cake(x, 60, 8, 200.0, 1.6, 0.4),
    "simlayerkv(above=0.3, sinks=2, recent=40)": lambda x: refs.simlayerkv(x, 2, 40, 0.3),
    "expected_attention(budget=50, future=64)":
        lambda x: refs.expected_attention(x, 50, RATES, 64, 4),
}


@mark.parametrize("recipe", CASES)
def test_kept_tokens_equal_the_reference(recipe):
    for seed in range(2):
        layers = inputs(seed=seed)
        got, _ = kept(recipe, layers, weights=WEIGHTS)
        want = CASES[recipe]([tuple(t[0] for t in x) for x in layers])
        assert [[set(head) for head in layer[0]] for layer in got] == want
        assert all(head == sorted(head) for layer in got for head in layer[0])


@mark.parametrize("recipe", [*CASES, "random(ratio=0.3)", "streamingllm-slots(budget=30)",
                             "cam(ratio=0.4)", "d2o(ratio=0.4)", "kvmerger"])
def test_padding_changes_nothing(recipe):
    """A row of a batch, padded on the left or with holes, keeps bit for bit what it keeps alone."""
    layers = inputs(rows=2)
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :31] = False
    valid[1, 60:63] = False
    both, out = kept(recipe, layers, valid, WEIGHTS)
    for row in range(2):
        own = valid[row].nonzero().flatten()
        alone, single = kept(recipe, [tuple(t[row : row + 1, :, own] for t in x) for x in layers],
                             weights=WEIGHTS)
        for layer in range(LAYERS):
            mapped = [[int(own[i]) for i in head] for head in alone[layer][0]]
            assert both[layer][row] == mapped
            for side in (0, 1):
                for head, tokens in enumerate(mapped):
                    n = len(tokens)
                    assert torch.equal(out[side][layer][row, head, :n],
                                       single[side][layer][0, head, :n])


MORE = {"lagkv": ", length=16", "r-kv": ", window=20",
        "headkv": f", heads={[[1.0] * refs.HEADS] * LAYERS}",
        "qfilters": f", filters={[[[1.0] * refs.DIM] * refs.HEADS] * LAYERS}"}
REST = {"lagkv": (TOKENS - 4) % 16, "chunkkv": 9}       # of a part or chunk, which stays with it


@mark.parametrize("name", [name for name, m in methods().items() if "budget" in m.defaults])
def test_budgets_that_what_stays_exceeds_are_refused_and_no_others(name):
    layers = inputs()

    def held(n: int) -> tuple[bool, float]:
        """Whether the budget is refused, and tokens that a head would hold, on average."""
        recipe = f"{name}(budget={n}{MORE.get(name, '')})"
        rules = [rule_of(p.values, i, LAYERS) for i, p in enumerate(plan(recipe, LAYERS))]
        probe = 50 if "probe" in rules[0].needs else 0
        got, _ = kept(recipe, layers, weights=WEIGHTS, probe=probe)
        return any(rule.short(refs.HEADS) for rule in rules), sum(
            len(head) for layer in got for head in layer[0]) / refs.HEADS / LAYERS

    legal = next(n for n in range(1, 80) if not held(n)[0])
    assert legal == 1 or held(legal - 1)[1] > legal - 1
    for n in (legal, legal + 1, legal + 17):
        refused, tokens = held(n)
        assert not refused and tokens <= n + REST.get(name, 0)


@mark.parametrize("recipe", ["snapkv(ratio=1)", "h2o(ratio=1)", "tova(ratio=1)", "knorm(ratio=1)",
                             "adakv(scorer=snapkv, ratio=1)", "random(budget=1000)",
                             "criticalkv(ratio=1)", "chunkkv(ratio=1)", "lagkv(ratio=1)",
                             "expected_attention(ratio=1)", "cake(ratio=1)"])
def test_everything_is_the_identity(recipe):
    layers = inputs()
    got, out = kept(recipe, layers, weights=WEIGHTS)
    assert all(head == [*range(TOKENS)] for layer in got for head in layer[0])
    for i, (_, k, v) in enumerate(layers):
        assert torch.equal(out[0][i], k) and torch.equal(out[1][i], v)


@mark.parametrize("tokens", [1, 2, 5, 9])
@mark.parametrize("recipe", [*CASES, "kvzip", "d2o", "cam", "kvmerger"])
def test_short_prompts_are_safe(recipe, tokens):
    """What is protected stays, and no head is ever emptied."""
    recipe = recipe.replace("ratio=0.3", "ratio=0.001")
    layers = [tuple(t[:, :, :tokens] for t in x) for x in inputs()]
    probe = 0
    if "kvzip" in recipe:
        layers, probe = [tuple(torch.cat([t, t], 2) for t in x) for x in layers], tokens
    got, _ = kept(recipe, layers, weights=WEIGHTS, probe=probe)
    for layer in got:
        for head in layer[0]:
            assert 1 <= len(head) <= tokens and max(head) < tokens
            if "window" in recipe:
                assert tokens - 1 in head


def test_of_equal_scores_the_earlier_token_stays():
    g = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 30):
        scores = torch.randint(-2, 3, (tokens,), generator=g).float()
        scores[::7] = torch.inf
        scores[3::7] = -torch.inf
        order = sorted(range(tokens), key=lambda t: (-scores[t], t))
        for n in range(1, tokens + 1):
            assert largest(scores, n).tolist() == sorted(order[:n])
    assert largest(torch.empty(0), 0).tolist() == []
    assert largest(torch.tensor([2, torch.nan, 1, 3]), 2).tolist() == [1, 3]
    assert largest(torch.full((4,), torch.nan), 3).tolist() == [0, 1, 2]


def test_the_question_is_the_window():
    layers = inputs()
    got, _ = kept("snapkv(budget=40)", layers, question=11)
    assert [[set(h) for h in layer[0]] for layer in got] == refs.snapkv(
        [tuple(t[0] for t in x) for x in layers], 40, 11)


def test_kvzip_keeps_what_the_second_reading_looks_at():
    """One budget for all heads of all layers, by the largest weight of any later query."""
    layers = [tuple(t[:, :, :120] for t in x) for x in inputs(seed=3)]
    got, _ = kept("kvzip(budget=15, sinks=2)", layers, probe=60)
    scores = {}
    for i, (q, k, _) in enumerate(layers):
        a = refs.matrix(q[0], k[0])[:, :, 60:, :60].amax((1, 2))
        a[:, :2] = torch.inf
        scores |= {(i, h, t): float(a[h, t]) for h in range(refs.HEADS) for t in range(60)}
    order = sorted(scores, key=lambda key: (-scores[key], key))[: 15 * LAYERS * refs.HEADS]
    assert {(i, h, t) for i, layer in enumerate(got) for h, head in enumerate(layer[0])
            for t in head} == set(order)


def test_rerotated_keys_lie_side_by_side():
    """Kept keys are what they would be at the positions that end with the prompt's last."""
    layers = inputs()
    got, out = kept("streamingllm-slots(budget=20, sinks=3)", layers)
    tokens = [0, 1, 2, *range(TOKENS - 17, TOKENS)]
    assert got[0][0][0] == tokens

    def turned(x, by):  # x [n, D] by so many positions
        angle = torch.tensor(by, dtype=torch.float64)[:, None] * RATES
        a, b = x.double().chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    for i, (_, k, _) in enumerate(layers):
        for head in range(refs.HEADS):
            slots = range(TOKENS - len(tokens), TOKENS)
            want = turned(k[0, head, tokens], [s - t for s, t in zip(slots, tokens, strict=True)])
            # fp32 of angles up to TOKENS and of two products
            assert (out[0][i][0, head] - want).abs().max() <= 4 * TOKENS * 2**-23


def test_the_share_of_every_part_is_a_closed_form():
    """It is asked of prompts of 2**30 tokens, too (`Rule.short`)."""
    for ratio in (0.01, 0.3, 1.0):
        for tokens in range(1, 40):
            parts = [min(7, tokens - start) for start in range(0, tokens, 7)]
            want = sum(max(1, int(n * ratio)) for n in parts)
            assert PerPart(ratio=ratio, length=7).most(tokens, 2) == (want, 2 * want)
