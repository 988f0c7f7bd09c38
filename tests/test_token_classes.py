"""Methods that keep tokens of some classes, against plain statements, and where ids come from."""

import pytest
import selection_references as refs
import torch
from support import greedy, optimized, plain, prompt
from test_selection import LAYERS, TOKENS, inputs

import kvcompile
import kvcompile.kernels.select  # noqa: F401  # the ops' bodies
from kvcompile import KVCompileError, RecipeError
from kvcompile.calibration.samples import Samples
from kvcompile.ir import KEEP, SCORE
from kvcompile.models.decoder import Characters, Decoder
from kvcompile.passes.select import rule_of
from kvcompile.plan import plan

SEPARATORS = (7, 11, 20)
SEPLLM = "sepllm(separators=[7, 11, 20], sinks=2, recent=9{})"


def kept(recipe, layers, ids, valid=None):
    """[layer][row][head]: the columns that are kept."""
    batch, tokens = ids.shape
    valid = torch.ones(batch, tokens, dtype=torch.bool) if valid is None else valid
    at = (valid.cumsum(1) - 1).clamp(min=0)
    rules = [str(rule_of(p.values, i, LAYERS)) for i, p in enumerate(plan(recipe, LAYERS))]
    hints = torch.tensor([0, 0])
    both = [SCORE(*x, at, valid, hints, None, None, rule=rule, scale=refs.SCALE, ids=ids)
            for x, rule in zip(layers, rules, strict=True)]
    out = KEEP([b[0] for b in both], [b[1] for b in both], [x[1] for x in layers],
               [x[2] for x in layers], at, valid, hints, None, rules=rules)
    return [[[head[head >= 0].tolist() for head in row] for row in layer] for layer in out[2]]


def tokens_of(batch=1, seed=0):
    return torch.randint(0, 24, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("most", [0, 3])
def test_sepllm_keeps_first_newest_and_separating_tokens(most):
    ids = tokens_of()
    got = kept(SEPLLM.format(f", most={most}"), inputs(), ids)
    between = [t for t in range(2, TOKENS - 9) if int(ids[0, t]) in SEPARATORS]
    assert len(between) > 3
    want = [0, 1, *(between[-most:] if most else between), *range(TOKENS - 9, TOKENS)]
    assert all(head == want for layer in got for head in layer[0])


def fastgen(layers, ids, special, marks, frequent, local, recover):
    """[layer][head]: whole masked attention matrices, policy by policy."""
    out = []
    for q, k, _ in layers:
        heads = []
        for each in refs.matrix(q, k).mean(1):
            t = len(each)
            order = sorted(range(t), key=lambda j: -float(each[:, j].sum()))  # noqa: B023
            newest, policies = int(local * t), []
            sets = [{j for j in range(t) if ids[j] in special}]
            sets.append(sets[0] | {j for j in range(t) if ids[j] in marks})
            heavy = [j for j in order if j not in sets[1]][: int(frequent * t)]
            sets.append(sets[1] | {*heavy})
            for columns in sets:
                policies.append((columns, lambda i, j, c=columns: j in c))
            policies.append((sets[2] | {*range(t - newest, t)},
                             lambda i, j, c=sets[2]: j in c or j > i - newest))  # noqa: B023
            policies.append(({*range(t)}, lambda i, j: True))
            heads.append(next(
                columns for columns, sees in policies
                if sum(float(each[i, j]) for i in range(t) for j in range(i + 1) if sees(i, j))
                >= recover * t - 1e-9))
        out.append(heads)
    return out


@pytest.mark.parametrize("recover, sizes", [(0.0, 1), (0.2, 1), (0.49, 2), (0.82, 2), (1.0, 1)])
def test_fastgen_gives_each_head_the_first_policy_that_recovers_enough(recover, sizes):
    layers, ids = inputs(), tokens_of()
    for q, k, _ in layers:   # one head looks at what is near
        near = torch.arange(TOKENS)[:, None] / 4
        q[:, :3, :, :2] = torch.cat([near.cos(), near.sin()], 1) * 3
        k[:, 0, :, :2] = torch.cat([near.cos(), near.sin()], 1) * 3
    special, marks = [int(ids[0, 0]), 5], [8, 9, 10]
    got = kept(f"fastgen(special={special}, punctuation={marks}, recover={recover}, frequent=0.1)",
               layers, ids)
    want = fastgen([tuple(x[0] for x in own) for own in layers], ids[0].tolist(), special, marks,
                   0.1, 0.3, recover)
    assert [[set(head) for head in layer[0]] for layer in got] == want
    assert len({len(head) for layer in want for head in layer}) >= sizes


def fastgen_goes_on(q, k, ids, prompt, special, marks, frequent, local, recover):
    """(policy, what is held after each token from the prompt's last on) of a head, in fp64 over
    lists of tokens: q [G, T, D], scaled, and k [T, D]."""
    q, k = q.double(), k.double()

    def attends(t, seen):
        return dict(zip(seen, (q[:, t] @ k[seen].T).softmax(-1).mean(0).tolist(), strict=True))

    def stays(policy, t, held, weight):
        classes = [j for j in held if ids[j] in special or policy and ids[j] in marks]
        free = sorted(set(held) - {*classes}, key=lambda j: -weight[j])
        best = free[: int(frequent * (t + 1))] if policy in (2, 3) else free if policy == 4 else []
        near = [j for j in held if policy == 3 and j > t - int(local * (t + 1))]
        return sorted({*classes, *best, *near})

    rows = [attends(t, [*range(t + 1)]) for t in range(prompt)]
    weight = {j: sum(row.get(j, 0.0) for row in rows) for j in range(prompt)}
    for policy in range(5):
        kept = stays(policy, prompt - 1, [*range(prompt)], weight)
        shown = stays(2, prompt - 1, [*range(prompt)], weight) if policy == 3 else kept
        if sum(w for t, row in enumerate(rows) for j, w in row.items() if j in shown or policy == 3
               and j > t - int(local * prompt)) >= recover * prompt - 1e-9:
            break
    held = [kept]
    for t in range(prompt, len(ids)):
        for j, w in attends(t, [*held[-1], t]).items():
            weight[j] = weight.get(j, 0.0) + w
        held.append(stays(policy, t, [*held[-1], t], weight))
    return policy, held


@pytest.mark.parametrize(("recover", "policies"), [
    pytest.param(0.1, {0}, marks=pytest.mark.slow), (0.2, {1, 2}), (0.5, {2, 3}),
    pytest.param(0.8, {3, 4}, marks=pytest.mark.slow)])
def test_fastgen_goes_on_by_its_policies(recover, policies):
    """Prompt and 64 steps of the first layer, whose q, K and V do not depend on what is kept."""
    ids = prompt(104, batch=2)
    special, marks = [*ids[:, 0].tolist(), 5], [*range(40, 56)]
    model = kvcompile.optimize(optimized("llama:2"), f"fastgen(special={special}, punctuation="
                               f"{marks}, recover={recover}, frequent=0.1, local=0.2)",
                               compile=False)
    sample = Samples(model.kvcompile.program.snapshots["capture"], ids).attention[0]
    heads = sample.k.shape[1]
    want = [[fastgen_goes_on(q, k, own.tolist(), 40, special, marks, 0.1, 0.2, recover)
             for q, k in zip(qs.unflatten(0, (heads, -1)) * sample.scale, ks, strict=True)]
            for qs, ks, own in zip(sample.q, sample.k, ids, strict=True)]
    assert {policy for row in want for policy, _ in row} == policies
    cache = kvcompile.prefill(model, ids[:, :40])
    for step in range(65):
        assert cache.stored_tokens(0).tolist() == [[len(h[step]) for _, h in row] for row in want]
        for row, got in zip(want, cache.positions(0), strict=True):
            assert [p[p >= 0].tolist() for p in got] == [held[step] for _, held in row]
        if step < 64:
            model(ids[:, 40 + step : 41 + step], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("recipe", [SEPLLM.format(""), "fastgen(special=[3], punctuation=[8], "
                                    "recover=0.6)"])
def test_padding_changes_nothing(recipe):
    layers, ids = inputs(rows=2), tokens_of(2)
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :31] = False
    both = kept(recipe, layers, ids, valid)
    own = [tuple(x[1:, :, 31:] for x in layer) for layer in layers]
    alone = kept(recipe, own, ids[1:, 31:])
    assert [layer[1] for layer in both] == [
        [[31 + t for t in head] for head in layer[0]] for layer in alone]


@pytest.mark.parametrize("options, every", [("", 1), (", most=2", 1), (", every=6", 6)])
@pytest.mark.parametrize("arch", ["llama:2"])
def test_tokens_between_separators_leave_while_decoding(arch, options, every):
    model = kvcompile.optimize(optimized(arch), SEPLLM.format(options) + "+int8", compile=False)
    ids = prompt(90)
    cache, most = kvcompile.prefill(model, ids[:, :50]), 2 if "most" in options else 99
    kinds, held = ids[0].tolist(), [*range(50)]

    def evict(held, now, slack):
        first, last = held[:2], [t for t in held if t > now - 9]
        between = [t for t in held if t not in first and t not in last]
        stay = [t for t in between if kinds[t] in SEPARATORS][-most:]
        return [*first, *stay, *last] if len(between) - len(stay) >= slack else held

    held = evict(held, 49, 1)
    for now in range(50, 90):
        model(ids[:, now : now + 1], past_key_values=cache, use_cache=True)
        held = evict([*held, now], now, every)
        for layer in range(2):
            assert cache.positions(layer)[0].tolist() == [held, held]


def test_a_tokenizer_tells_the_ids():
    text = "".join(chr(c) for c in range(128))
    model = kvcompile.optimize(plain("llama:2"), "sepllm+int8", tokenizer=Characters(128),
                               compile=False)
    found = model.kvcompile.program.recipe
    assert sorted(text[i] for i in found.terms[0].get("separators")) == sorted(" \t\n.,;:?!")
    given = kvcompile.optimize(model, str(found), compile=False)
    assert torch.equal(greedy(model, prompt(40), 5), greedy(given, prompt(40), 5))
    again = kvcompile.optimize(model, "fastgen", compile=False).kvcompile.program.recipe.terms[0]
    assert again.get("special") == (0,) and {chr(i) for i in again.get("punctuation")} == {
        c for c in text if c.isprintable() and not c.isalnum() and c != " "}


def test_a_decoder_carries_its_tokenizer():
    program = kvcompile.capture(Decoder.tiny(), "sepllm")
    assert ord(".") in program.recipe.terms[0].get("separators")


@pytest.mark.parametrize(("recipe", "text"), [
    ("sepllm", "sepllm: separators are token ids: give optimize(..., tokenizer=tokenizer), which "
               "tells them, or separators=[...]"),
    ("fastgen(special=[0])", "fastgen: punctuation are token ids"),
    ("sepllm(separators=[1, x])", "sepllm: separators must be token ids, whole numbers from 0, not "
                                  "x"),
    ("sepllm(separators=13)", "separators must be a list"),
    ("sepllm(separators=[1])+kivi", "budget threshold evicts single tokens"),
])
def test_what_is_missing_is_said_in_one_line(recipe, text):
    with pytest.raises(RecipeError) as info:
        kvcompile.optimize(optimized("llama:2"), recipe, compile=False)
    assert text in str(info.value) and "\n" not in str(info.value)


def test_without_a_model_the_tokenizer_is_asked_for():
    with pytest.raises(RecipeError, match=r"separators comes from tokenizer: kvcompile.optimize\("
                       r"model, recipe, tokenizer=tokenizer\) finds it"):
        plan("sepllm", 2)


def test_embeddings_have_no_ids():
    model = kvcompile.optimize(optimized("llama:2"), SEPLLM.format(""), compile=False)
    with pytest.raises(KVCompileError, match="the recipe chooses by token ids; give input_ids"):
        model(inputs_embeds=torch.randn(1, 5, 64), use_cache=True)


def test_thresholds_of_layers_stay_their_own():
    """Layers of one group are evicted together only if their thresholds are the same."""
    model = kvcompile.optimize(
        optimized("llama:2"), "dms(layers=0, threshold=-100, delay=4)+"
        "dms(layers=1, threshold=100, delay=4)", compile=False)
    cache = kvcompile.prefill(model, prompt(20))
    model(prompt(1), past_key_values=cache, use_cache=True)
    assert cache.stored_tokens(0).tolist() == [[21, 21]]
    assert cache.stored_tokens(1).tolist() == [[4, 4]]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [
    SEPLLM.format(""), "fastgen(special=[3], punctuation=[8, 9, 10, 11], recover=0.7)",
    "lagkv(length=8, ratio=0.4, decode=true)"])
def test_the_compiled_step_decides_token_by_token_what_stays(recipe):
    ours = kvcompile.optimize(plain("llama:2"), recipe, compile=True)
    eager = kvcompile.optimize(ours, recipe, compile=False)
    both = [greedy(m, prompt(50), 60, return_dict_in_generate=True) for m in (ours, eager)]
    assert torch.equal(both[0].sequences, both[1].sequences)
    assert torch.equal(both[0].past_key_values.positions(1), both[1].past_key_values.positions(1))
