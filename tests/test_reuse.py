"""SwiftKV: later layers' K and V from one hidden state, against transformers' model with hooks."""

from pathlib import Path

import pytest
import torch
from support import greedy, optimized, prompt

import kvcompile
from kvcompile.errors import RecipeError
from kvcompile.models.tiny import tiny
from kvcompile.passes.reuse import Reuse
from kvcompile.plan import plan
from kvcompile.rewrite import copy_graph

GOLDEN = Path(__file__).parent / "golden"


def theirs(arch, first, ids):
    """Logits of transformers' model whose layers from `first` on project K and V from what layer
    `first` is given, by their own norms."""
    model, seen = tiny(arch), []

    def remember(module, args, kwargs):
        seen[:] = [args[0] if args else kwargs["hidden_states"]]

    def instead(norm, linear, args):
        return (norm(seen[0]),)

    model.model.layers[first].register_forward_pre_hook(remember, with_kwargs=True)
    for layer in model.model.layers[first + 1 :]:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.register_forward_pre_hook(
                lambda linear, args, norm=layer.input_layernorm: instead(norm, linear, args))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("arch, start, first", [
    ("llama", 0.5, 2), ("qwen3", 0.25, 1),
    pytest.param("gemma3_text", 0, 0, marks=pytest.mark.slow)])
def test_logits_are_those_of_the_hooked_model(arch, start, first):
    """The prompt and decoding steps through the cache."""
    model, ids = optimized(arch, f"swiftkv(start={start})"), prompt(40)
    out = greedy(model, ids, 8, return_dict_in_generate=True, output_logits=True)
    want, got = theirs(arch, first, out.sequences)[0, 39:-1], torch.cat(out.logits)
    assert (got - want).abs().max() <= 1e-4 + 1e-5 * want.abs().max()
    exact = tiny(arch)(out.sequences).logits[0, 39:-1]
    assert (exact - want).abs().max() > 0.1


def test_across_layers_one_stores():
    model = optimized("llama", "swiftkv(start=0.25, across=3)+int8")
    sites = model.kvcompile.program.sites
    assert [s.owner for s in sites] == [None, None, 1, 1]
    report = kvcompile.explain(model)
    alone = kvcompile.explain(optimized("llama", "int8"))
    assert report.kv_bytes(300) * 2 == alone.kv_bytes(300)
    with torch.no_grad():
        assert model(prompt(300), use_cache=True).past_key_values.nbytes == report.kv_bytes(300)


def test_axes():
    axes = plan("swiftkv(across=2)", 8)
    assert [p.get("input") for p in axes] == [None] * 5 + [4] * 3
    assert [p.get("owner.k") for p in axes] == [None] * 5 + [4, None, 6]
    assert not any(p.values for p in plan("swiftkv(start=1)", 4))


def test_the_graph(request):
    program = kvcompile.capture(tiny("llama", num_hidden_layers=2), "swiftkv(start=0)")
    text = str(program.after("reuse")) + "\n"
    path = GOLDEN / "swiftkv-reuse.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text()
    once = program.after("reuse").graph_module
    twice = copy_graph(once)
    Reuse().run(twice, plan("swiftkv(start=0)", 2))
    assert [str(n) for n in twice.graph.nodes] == [str(n) for n in once.graph.nodes]


def test_what_cannot_be_redirected():
    dense = tiny("deepseek_v2", num_hidden_layers=2, first_k_dense_replace=2)
    report = kvcompile.explain(dense, "swiftkv(start=0)")
    assert {r.layer: (r.what, r.node) for r in report.rows if r.status == "refused"} == {
        1: ("K and V of layer 1 are not projected from one norm", "attention_1")}
    later = [type(p)({"input": 1}, {"input": p.origin["input"]}) if p.get("input") else p
             for p in plan("swiftkv", 4)]
    later[0] = later[3]
    program = optimized("llama").kvcompile.program
    with pytest.raises(RecipeError, match="layer 0 cannot compute K and V from what layer 1 is "
                       "given: it must be an earlier layer"):
        Reuse().run(copy_graph(program.after("canonicalize").graph_module), later)
