"""PoD: older keys are those of another layer; the newest and the first keys, and V, are not."""

from pathlib import Path

import pytest
import torch
from support import greedy, optimized, plain, prompt, slow_but
from transformers import AttentionInterface

import kvcompile
from kvcompile.errors import RecipeError
from kvcompile.ir import APPEND, argument
from kvcompile.measure.perplexity import forced_decode
from kvcompile.models.tiny import tiny
from kvcompile.store import Store

GOLDEN = Path(__file__).parent / "golden"


def theirs(arch, factor, sinks, recent, ids):
    """Logits of transformers' model in which query i scores keys of its own layer where they are
    among the first `sinks` or the last `recent` before it (and its own), others in the first layer
    of the block."""
    model, seen = tiny(arch), {}

    def attend(module, q, k, v, mask, scaling=None, **_):
        seen[module.layer_idx] = k
        i = torch.arange(q.shape[2])
        near = (i[None] < sinks) | (i[None] >= i[:, None] - recent)
        both = (q @ x.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scaling
                for x in (k, seen[module.layer_idx // factor * factor]))
        scores = torch.where(near, *both).masked_fill(i[None] > i[:, None], -torch.inf)
        o = scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return o.transpose(1, 2), None

    AttentionInterface.register("pod", attend)
    model.set_attn_implementation("pod")
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("arch", slow_but(["llama"], ["llama", "gpt2"]))
@pytest.mark.parametrize("factor,sinks,recent", [(2, 4, 32), (4, 16, 1), (3, 0, 20)])
def test_decoding_is_that_of_a_model_with_the_keys_of_two_layers(arch, factor, sinks, recent):
    """Token by token through the cache against whole sequences in transformers."""
    ids = prompt(90)
    model = optimized(arch, f"pod(factor={factor}, sinks={sinks}, recent={recent})")
    got = torch.tensor(forced_decode(model, ids, context=1).nll)
    want, exact = (torch.nn.functional.cross_entropy(
        theirs(arch, f, sinks, recent, ids)[0, 1:-1], ids[0, 2:], reduction="none")
        for f in (factor, 1))
    assert (got - want).abs().max() <= 1e-3
    assert (exact - want).abs().max() > 0.05
    positions = torch.arange(90)[None]
    with torch.no_grad():
        graph = model.kvcompile.program.graph_module
        logits = graph(ids, positions, torch.ones_like(ids, dtype=torch.bool), positions[0])
    stateless = torch.nn.functional.cross_entropy(logits[0, 1:-1], ids[0, 2:], reduction="none")
    assert (stateless - want).abs().max() <= 1e-3


def test_the_graph_names_the_keys_of_older_tokens(request):
    model = tiny("llama", num_hidden_layers=2)
    program = kvcompile.capture(model, "pod(sinks=4, recent=32)")
    text = str(program.after("quantize")) + "\n"
    path = GOLDEN / "pod.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text()
    weights = {n.target for n in program.phases["extend"].graph.nodes if n.op == "get_attr"}
    assert any(str(w).endswith("layers.1.self_attn.k_proj.weight") for w in weights)
    appends = [n for n in program.phases["extend"].graph.nodes if n.target is APPEND]
    assert [(argument(n, "slots"), Store.parse(argument(n, "store")).lent) for n in appends] == [
        ([0], ()), ([1], ("k.body",))]


def test_blocks_of_one_layer_change_nothing():
    recipe = "pod(factor=1, sinks=4, recent=32)"
    assert torch.equal(greedy(optimized("llama", recipe), prompt(90), 30),
                       greedy(plain("llama"), prompt(90), 30))


RECIPES = ("pod(factor=2, sinks=4, recent=32)", "pod(factor=4, sinks=0, recent=32)",
           "pod(factor=4, sinks=4, recent=0)+kivi(bits=4, residual=32)")


@pytest.mark.parametrize("recipe", slow_but(RECIPES[2:], RECIPES))
def test_bytes_batches_and_the_laws(recipe):
    model = kvcompile.optimize(plain("llama"), recipe, compile=False, verify=True)
    ids = prompt(300, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    both = greedy(model, ids, 12, attention_mask=mask)
    assert torch.equal(both[1, 11:], greedy(model, ids[1:, 11:], 12)[0])
    for batch in (1, 3):
        with torch.no_grad():
            cache = model(prompt(300, batch), use_cache=True).past_key_values
        assert cache.nbytes == kvcompile.explain(model).kv_bytes(300, batch)
    lone = recipe.replace("factor=2", "factor=1").replace("factor=4", "factor=1")
    assert cache.nbytes < kvcompile.explain(model, lone).kv_bytes(300, 3)


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_tokens():
    recipe = "pod(sinks=4, recent=32)"
    want = greedy(optimized("llama", recipe), prompt(150), 12)
    assert torch.equal(greedy(optimized("llama", recipe, compile=True), prompt(150), 12), want)


def test_what_does_not_go_with_it():
    def refused(recipe):
        report = kvcompile.explain(optimized("llama"), recipe)
        return {r.layer: r.what for r in report.rows if r.status == "refused"}

    assert refused("pod(recent=16)+snapkv(budget=64, window=8)")[1] == (
        "its K is layer 0's: both would have to keep the same tokens")
    assert refused("pod(recent=16)+minicache")[2] == "layer 3 reads K of layer 2"
    with pytest.raises(RecipeError, match="'pod' and 'kivi' both set lag.k of layers 0-3"):
        kvcompile.explain(optimized("llama"), "pod+kivi")
    with pytest.raises(RecipeError, match="'cla' and 'pod' both say whose keys layer 1 reads"):
        kvcompile.explain(optimized("llama"), "cla+pod")
    rows = kvcompile.explain(optimized("llama"), "pod+palu(whiten=false)").rows
    assert {r.what for r in rows if r.name == "place"} == {
        "caches K and V, since older keys are shared as they are"}
