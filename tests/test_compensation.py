"""One slot that stands for all that a head has dropped: RazorAttention's compensation token."""

import pytest
import torch
from support import greedy, optimized, plain, prompt

import kvcompile
from kvcompile import RecipeError
from kvcompile.checks.audit import audit
from kvcompile.checks.view import REST, slots
from kvcompile.ir import BESIDE
from kvcompile.ir import REST as DROPPED
from kvcompile.method import Method, register_method
from kvcompile.recipe import Term

RAZOR = "razorattention(heads=[[1, 0], [0, 1]], sinks=2, recent=10, share=0{})"


def beside(q, k, v, own, count, scale, softcap):
    """[Hq, S, Dv]: attention over exact tokens and `count` copies of one more, in fp64."""
    out = []
    for i, queries in enumerate(q.double()):
        h = i // (len(q) // len(k))
        keys, values = (torch.cat([x[h].double(), y[h].double().expand(int(count[h]), -1)])
                        for x, y in zip((k, v), own, strict=True))
        logits = queries @ keys.T * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        out.append(logits.softmax(-1) @ values)
    return torch.stack(out)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_slot_counts_as_that_many_tokens(softcap):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 16, generator=g) for h, n in ((6, 3), (2, 20), (2, 20)))
    own = [torch.randn(2, 1, 2, 16, generator=g) for _ in "kv"]          # two layers
    count = torch.tensor([[[0, 0]], [[7, 0]]], dtype=torch.int32)
    alone = beside(q[0], k[0], v[0], [x[1, 0] for x in own], [0, 0], 0.25, softcap)
    logits = q[0].double() @ k[0].double().repeat_interleave(3, 0).mT * 0.25
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    given = [q, alone[None].float(), logits.logsumexp(-1)[None].float(), *own, count]
    want = beside(q[0], k[0], v[0], [x[1, 0] for x in own], count[1, 0], 0.25, softcap)
    for place in ({"slot": 1}, {"at": torch.tensor([1, 0], dtype=torch.int32)}):
        got = BESIDE(*given, scale=0.25, softcap=softcap, **place)
        assert (got[0] - want).abs().max() < 1e-5
        assert (got[0, 3:] - alone[3:]).abs().max() < 1e-5 < (got[0, :3] - alone[:3]).abs().max()
    given[2][:, :, 1] = -torch.inf                                       # padding
    given[1][:, :, 1] = 0
    assert not BESIDE(*given, scale=0.25, softcap=softcap, slot=1)[:, :, 1].any()


def test_of_a_prompt_the_mean_of_what_is_not_kept():
    g = torch.Generator().manual_seed(1)
    k, v = (torch.randn(2, 2, 14, 16, generator=g) for _ in "kv")
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[1, :5] = False
    columns = torch.tensor([[[0, 3, 9], [1, -1, -1]], [[5, 6, 7], [5, 11, -1]]])
    keys, values, count = DROPPED(k, v, columns.int(), valid, torch.tensor([2, 0]))
    for row in range(2):
        for head in range(2):
            gone = [t for t in range(12) if valid[row, t] and t not in columns[row, head]]
            assert int(count[row, head]) == len(gone)
            for got, x in ((keys, k), (values, v)):
                assert (got[row, head] - x[row, head, gone].mean(0)).abs().max() < 1e-6


@pytest.mark.parametrize("recipe, exact", [("", True), ("+int8", False),
                                           ("+kivi(bits=4, residual=32)", False)])
def test_what_leaves_while_decoding_is_added(recipe, exact):
    """In the first layer, whose keys do not depend on the cache: the mean of those not held."""
    recipe = RAZOR.format("") + recipe
    ours = kvcompile.optimize(optimized("llama:2"), recipe, compile=False)
    full = optimized("llama:2")
    ids = prompt(330, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :21] = 0
    caches = [kvcompile.prefill(m, ids[:, :40], attention_mask=mask[:, :40]) for m in (ours, full)]
    for a, b in ((40, 41), (41, 60), (60, 64), (64, 328), (328, 330)):
        for m, cache in zip((ours, full), caches, strict=True):
            at = mask[:, :b].cumsum(1) - 1
            m(ids[:, a:b], attention_mask=mask[:, :b], position_ids=at[:, a:b],
              past_key_values=cache, use_cache=True)
        for row in range(2):
            held, *means = slots(caches[0], 0, row)
            _, *every = slots(caches[1], 0, row)
            assert REST not in held[0]                                   # a retrieval head
            mine = set(held[1].tolist())
            gone = [t for t in range(int(at[row, -1]) + 1) if t not in mine]
            assert (REST in mine) == bool(gone)
            for got, x in zip(means, every, strict=True):
                if gone:
                    off = (got[1, -1] - x[1, gone].mean(0)).abs().max()
                    assert off < (1e-5 if exact else 0.05 * float(x[1].abs().max()))
    assert gone and caches[0].stored_tokens(0)[0, 0] == 330


@pytest.mark.parametrize("recipe", ["", "+int8", "+kivi(bits=4, residual=32)"])
def test_the_laws_hold(recipe):
    """Each layer's attention is that over the slot with its weight; no token is dropped."""
    program = optimized("llama:2").kvcompile.program.lower(RAZOR.format("") + recipe)
    ids = prompt(170, 2)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :40] = False
    found = audit(program, ids, valid=valid, steps=4, chunk=160, compile=False)
    assert all(x.error <= x.bound and not x.mass for x in found.layers)
    without = optimized("llama:2").kvcompile.program.lower(RAZOR.format(", compensate=false"))
    assert all(x.mass > 0 for x in audit(without, ids, steps=4, compile=False).layers)


def test_bytes_copies_and_beams():
    model = kvcompile.optimize(optimized("llama:2"), RAZOR.format(""), compile=False)
    out = greedy(model, prompt(50), 12, num_beams=2, return_dict_in_generate=True)
    cache = kvcompile.prefill(model, prompt(200, batch=2))
    least = 2 * 2 * 2 * (3 * 4 + 2 * 16 * 4)      # layers, rows, heads: count, limit, rest; K and V
    pages = sum(int((-(-cache.stored_tokens(i) // 128)).sum()) for i in range(2))
    tables = 3 * 2 * 2 * 2 * 2 * 4
    assert cache.nbytes == least + pages * 128 * (2 * 16 * 4 + 8) + tables
    assert cache.nbytes <= kvcompile.explain(model).kv_bytes(200, batch=2)
    assert out.sequences.shape == (1, 62)
    cache.batch_select_indices(torch.tensor([1, 1]))
    twice = [slots(cache, 0, row) for row in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def test_weights_of_tokens_are_not_asked_for_beside_it(monkeypatch):
    monkeypatch.setattr(kvcompile.method, "_registered", {})
    register_method(Method("both", "both", "none", "test", (), lambda p: {
        "keep.score": Term("received"), "keep.every": 1, "keep.merge": Term("rest")}))
    with pytest.raises(RecipeError, match="layer 0: received asks what each token gets"):
        kvcompile.optimize(optimized("llama:2"), "both", compile=False)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["", "+int8"])
def test_the_compiled_step(recipe):
    """The fused kernel gives the log-sum-exp; regions of alike layers know their slots."""
    recipe = RAZOR.format("").replace("[0, 1]]", "[0, 1], [0, 0], [0, 1]]") + recipe
    ours = kvcompile.optimize(plain("llama"), recipe, compile=True)
    assert "attend" not in kvcompile.explain(ours).rows[-1].why
    eager = kvcompile.optimize(ours, recipe, compile=False)
    for ids in (prompt(60), prompt(60, batch=2)):
        both = [m(ids, use_cache=True).past_key_values for m in (ours, eager)]
        for i in range(30):
            a, b = (m(prompt(1, len(ids), i), past_key_values=c, use_cache=True).logits
                    for m, c in zip((ours, eager), both, strict=True))
            assert (a - b).abs().max() < 1e-3
