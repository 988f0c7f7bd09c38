"""streamingllm(positions=slot): keys are numbered by place in the cache while decoding, too."""

import pytest
import torch
from support import greedy, optimized, plain, prompt, slow_but

import kvcompile
from kvcompile import RecipeError
from kvcompile.checks.audit import audit
from kvcompile.models.decoder import Decoder
from kvcompile.program import capture

SLOTS = "streamingllm(sinks=3, window=20, positions=slot)"


@pytest.mark.parametrize("recipe, slack", [(SLOTS, 1e-4), (SLOTS + "+int8", 0.2)])
def test_a_step_sees_what_the_model_sees_of_the_kept_tokens_alone(recipe, slack):
    """With one layer K and V of a token do not depend on others: a step is then the model itself on
    the tokens that are kept, numbered 0, 1, .., as in the paper's cache."""
    model = kvcompile.optimize(optimized("llama:1"), recipe, compile=False)
    original = kvcompile.optimize(optimized("llama:1"), recipe.replace(", positions=slot", ""),
                                  compile=False)
    ids = prompt(75, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    at = (mask.cumsum(1) - 1).clamp(min=0)
    caches, apart = [None, None], 0.0
    for start, end in ((0, 40), (40, 41), (41, 42), (42, 70), (70, 71), (71, 72)):
        new = slice(start, end)
        both = []
        for i, m in enumerate((model, original)):
            out = m(ids[:, new], attention_mask=mask[:, :end], position_ids=at[:, new],
                    past_key_values=caches[i], use_cache=True)
            caches[i] = out.past_key_values
            both.append(out.logits)
        for row, pad in enumerate((0, 13)):
            own = [*range(pad, start)]
            kept = own[:3] + own[3:][-20:]
            if start:
                seen = ids[row : row + 1, [*kept, *range(start, end)]]
                want = plain("llama:1")(seen).logits[0, len(kept):]
                assert (both[0][row] - want).abs().max() < slack
                apart = max(apart, float((both[1][row] - want).abs().max()))
    assert apart > 10 * 1e-2
    assert torch.equal(caches[0].positions(0), caches[1].positions(0))


def test_nothing_changes_before_tokens_are_dropped():
    ours = kvcompile.optimize(optimized("llama:2"), "streamingllm(window=200, positions=slot)",
                              compile=False)
    assert torch.equal(greedy(ours, prompt(60), 20), greedy(plain("llama:2"), prompt(60), 20))


@pytest.mark.parametrize("recipe", [SLOTS, SLOTS + "+kivi(bits=4, residual=32)", SLOTS + "+int8"])
@pytest.mark.parametrize("arch", slow_but(["llama:2"], ["llama:2", "gemma2:2"]))
def test_the_laws_hold(arch, recipe):
    program = optimized(arch).kvcompile.program.lower(recipe)
    ids = prompt(150, 2)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :40] = False
    found = audit(program, ids, valid=valid, steps=3, chunk=61, compile=False)
    assert all(x.error <= x.bound for x in found.layers)
    assert [s.store.side_by_side for s in program.sites] == [not s.window for s in program.sites]


def test_decoding_is_the_stateless_form():
    program = optimized("llama:2").kvcompile.program.lower(SLOTS)
    ids, at = prompt(40), torch.arange(40)
    want = program.graph_module(ids, at[None], torch.ones_like(ids, dtype=torch.bool), at)
    model, cache, got = kvcompile.optimize(optimized("llama:2"), SLOTS, compile=False), None, []
    for i in range(40):
        out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache, got = out.past_key_values, [*got, out.logits]
    assert (torch.cat(got, 1) - want).abs().max() < 1e-3


def test_models_without_rotation_are_refused():
    with pytest.raises(RecipeError, match="layer 0: positions=slot: its keys are not cached"):
        capture(Decoder.tiny(rope="none"), SLOTS)
    with pytest.raises(RecipeError, match="both set recompute"):
        capture(Decoder.tiny(), SLOTS + "+palu(whiten=false)")


def test_explain_says_what_it_costs():
    row = kvcompile.explain(optimized("llama:2"), SLOTS).rows[-1]
    assert "side by side" in row.storage and "of several tokens rebuild keys" in row.why
