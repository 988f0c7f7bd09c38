"""Layers that attend to the K, or the V, of earlier ones, and keep the other side their own."""

from pathlib import Path

import pytest
import torch
from support import decodes_what_the_graph_says, greedy, optimized, plain, prompt, slow_but
from transformers import AttentionInterface

import kvcompile
from kvcompile.checks.view import slots
from kvcompile.errors import RecipeError
from kvcompile.ir import APPEND, argument
from kvcompile.models.tiny import tiny
from kvcompile.store import SIDES, Store

GOLDEN = Path(__file__).parent / "golden"
MAPS = {  # recipe -> the layers whose K, and whose V, each of four attends to
    "share(map=[0, 0, 2, 0], side=k)": ([0, 0, 2, 0], [0, 1, 2, 3]),
    "share(map=[0, 0, 2, 0], side=v)": ([0, 1, 2, 3], [0, 0, 2, 0]),
    "share(map=[0, 0, 2, 0], side=k)+share(map=[0, 1, 1, 1], side=v)": ([0, 0, 2, 0],
                                                                        [0, 1, 1, 1]),
}


def sharing(arch, owners):
    """transformers' model, for calls without a cache, whose layer i attends to k of one layer and v
    of another."""
    model, seen = tiny(arch), {}

    def attend(module, q, k, v, mask, scaling=None, **_):
        i = module.layer_idx
        seen[i] = k, v
        k, v = (seen[own[i]][side].repeat_interleave(q.shape[1] // k.shape[1], 1)
                for side, own in enumerate(owners))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return o.transpose(1, 2), None

    AttentionInterface.register("of_two_owners", attend)
    model.set_attn_implementation("of_two_owners")
    return model


def theirs(arch, owners, ids):
    """Its logits."""
    model = sharing(arch, owners)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", MAPS)
def test_tokens_are_those_of_a_model_that_shares(arch, recipe):
    """Prompt and decoding steps through the cache against whole sequences in transformers."""
    model, ids = optimized(arch, recipe), prompt(150)
    out = greedy(model, ids, 20, return_dict_in_generate=True, output_logits=True)
    want = theirs(arch, MAPS[recipe], out.sequences)[0, 149:-1]
    assert (torch.cat(out.logits) - want).abs().max() <= 1e-4 + 1e-5 * want.abs().max()
    other = theirs(arch, [range(4)] * 2, out.sequences)[0, 149:-1]
    assert (other - want).abs().max() > 0.1


def test_the_shared_projection_leaves_the_graph(request):
    model = tiny("llama", num_hidden_layers=2)
    program = kvcompile.capture(model, "share(map=[0, 0], side=k)+kivi(bits=4)")
    text = str(program.after("share")) + "\n"
    path = GOLDEN / "share-keys.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text()
    for gm in (program.after("share").graph_module, *program.phases.values()):
        weights = {n.target for n in gm.graph.nodes if n.op == "get_attr"}
        assert {f"{w}_proj" for w in "kv" for name in weights
                if str(name).endswith(f"layers.1.self_attn.{w}_proj.weight")} == {"v_proj"}
    appends = [n for n in program.phases["extend"].graph.nodes if n.target is APPEND]
    assert [(argument(n, "slots"), Store.parse(argument(n, "store")).lent) for n in appends] == [
        ([0], ()), ([1], ("k.body", "k.recent"))]


@pytest.mark.parametrize("side", SIDES)
def test_an_identity_map_changes_nothing(side):
    model = plain("llama")
    recipe = f"share(map=[0, 1, 2, 3], side={side})"
    shared, full = (kvcompile.capture(model, r) for r in (recipe, "full"))
    assert str(shared.after("share")).split("\n")[1:] == str(full.after("share")).split("\n")[1:]
    assert torch.equal(greedy(optimized("llama", recipe), prompt(9), 30),
                       greedy(plain("llama"), prompt(9), 30))


RECIPES = ("share(map=[0, 0, 2, 0], side=k)+kivi(bits=4, residual=32)",
           "share(map=[0, 0, 0, 1], side=v)+kivi(bits=2, group=16, residual=16)",
           "streamingllm(sinks=4, window=40)+share(map=[0, 0, 2, 2], side=k)+int8",
           "share(map=[0, 0, 0, 0], side=k)+prerope+int8",
           "share(map=[0, 0, 2, 2], side=k)+palu(ratio=0.5, whiten=false)",
           "share(map=[0, 0, 2, 0], side=k)+share(map=[0, 1, 1, 1], side=v)+int8")


@pytest.mark.parametrize("recipe", slow_but(RECIPES[1:3] + RECIPES[4:], RECIPES))
def test_compositions_decode_what_the_graph_says(recipe):
    decodes_what_the_graph_says("llama", recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_shared_takes_bytes_once(recipe):
    model = optimized("llama", recipe)
    report = kvcompile.explain(model)
    sites, rows = report.sites, {(r.layer, r.name): r for r in report.rows}
    borrowed = {(s.layer, key[0]): lender for s in sites for key, lender in s.lent}
    assert borrowed
    for batch in (1, 3):
        with torch.no_grad():
            cache = model(prompt(300, batch), use_cache=True).past_key_values
        assert cache.nbytes == report.kv_bytes(300, batch)
    lone = kvcompile.explain(model, "+".join(
        t for t in recipe.split("+") if not t.startswith("share"))).kv_bytes(300)
    assert report.kv_bytes(300) < lone
    group = cache.groups[0]
    for (layer, side), lender in borrowed.items():
        table = group.plane(f"{side}.body.table")
        assert torch.equal(table[layer], table[lender])
        assert group.pages[f"{side}.body"][layer].sum() == 0
        last = [r for r in rows.values() if r.layer == layer][-1]
        assert f"{side.upper()} of layer {lender}" in last.storage
        assert last.after < [r for r in rows.values() if r.layer == 0][-1].after


def test_padding_turns_crops_copies_and_batches():
    model = optimized("llama", "share(map=[0, 0, 2, 0], side=k)+kivi(bits=4, residual=32)")
    ids = prompt(200, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    both = greedy(model, ids, 12, attention_mask=mask)
    assert torch.equal(both[1, 11:], greedy(model, ids[1:, 11:], 12)[0])
    turned = greedy(model, ids.flip(0), 12, attention_mask=mask.flip(0))
    assert torch.equal(turned.flip(0), both)
    exact = optimized("llama", "share(map=[0, 0, 2, 0], side=k)")
    first = greedy(exact, ids[:1], 12, return_dict_in_generate=True)
    cache = first.past_key_values
    cache.crop(190)
    again = greedy(exact, first.sequences[:, :200], 12, past_key_values=cache)
    assert torch.equal(again, first.sequences)
    alike = sharing("llama", MAPS["share(map=[0, 0, 2, 0], side=k)"])
    beams, want = (greedy(m, ids[:1], 12, num_beams=3, num_return_sequences=3, use_cache=cached)
                   for m, cached in ((exact, True), (alike, False)))
    assert torch.equal(beams, want) and len({str(row) for row in beams.tolist()}) == 3


def test_cropping_a_quantized_block_gives_both_layers_the_same_keys():
    model = optimized("llama", "share(map=[0, 0, 0, 0], side=k)+kivi(bits=4, residual=32)")
    with torch.no_grad():
        cache = model(prompt(100), use_cache=True).past_key_values
    before = [slots(cache, layer, 0) for layer in range(4)]
    cache.crop(80)  # of the block 64 .. 95 half goes back to the recent tier, as it was decoded
    for layer, old in enumerate(before):
        ids, k, v = slots(cache, layer, 0)
        assert torch.equal(ids, old[0][:, :80])
        assert torch.equal(k, old[1][:, :80]) and torch.equal(v, old[2][:, :80])
        assert torch.equal(k, before[0][1][:, :80]) and (layer == 0 or not torch.equal(
            v, before[0][2][:, :80]))


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_tokens():
    recipe = "share(map=[0, 0, 2, 0], side=k)+kivi(bits=4)"
    want = greedy(optimized("llama", recipe), prompt(150), 12)
    assert torch.equal(greedy(optimized("llama", recipe, compile=True), prompt(150), 12), want)


def test_what_needs_tokens_or_layers_of_its_own_is_refused():
    def refused(recipe):
        report = kvcompile.explain(optimized("llama"), recipe)
        return {r.layer: r.what for r in report.rows if r.status == "refused"}

    assert refused("share(map=[0, 0, 2, 3], side=k)+snapkv(budget=32, window=8)") == {
        0: "layer 1 reads its K too: both would have to keep the same tokens",
        1: "its K is layer 0's: both would have to keep the same tokens"}
    merged = refused("share(map=[0, 1, 2, 2], side=k)+minicache")
    assert merged == {2: "layer 3 reads K of layer 2", 3: "layer 3 reads K of layer 2"}
    with pytest.raises(RecipeError, match="layer 1 cannot attend to the V of 2: it must be an ear"):
        kvcompile.explain(optimized("llama"), "share(map=[0, 2, 2, 3], side=v)")
    with pytest.raises(RecipeError, match="'share' and 'cla' both set owner.k of layer 3"):
        kvcompile.explain(optimized("llama"), "share(map=[0, 0, 2, 0], side=k)+cla")
    with pytest.raises(RecipeError, match="side"):
        kvcompile.explain(optimized("llama"), "share(map=[0, 0, 2, 0], side=q)")
