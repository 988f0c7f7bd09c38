"""place: what is cached is a minimum cut; found without a model's name, and exact."""

from functools import cache
from pathlib import Path

import pytest
import torch
from support import greedy, optimized, plain, prompt

import kvcompile
from kvcompile.ir import argument, attention_nodes
from kvcompile.models.tiny import tiny
from kvcompile.plan import LayerPlan
from kvcompile.rewrite import Rewritten, copy_graph, passes, run_passes
from kvcompile.rows import bytes_per_token
from kvcompile.site import sites

GOLDEN = Path(__file__).parent / "golden"
LATENT = ("deepseek_v2:2", "deepseek_v3:1")
OTHERS = ("llama", "qwen3", "gpt2", "phi3", "gemma2",
          pytest.param("gpt_oss", marks=pytest.mark.slow))


@cache
def program(arch: str):
    return optimized(arch).kvcompile.program


def stateless(gm, ids):
    positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    with torch.no_grad():
        return gm(ids, positions, torch.ones_like(ids, dtype=torch.bool), positions[0])


@pytest.mark.parametrize("arch", LATENT)
def test_a_latent_and_its_rotary_key_are_found(arch):
    config, made = plain(arch).config, program(arch)
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    for site in made.sites:
        assert (site.heads, site.dims, site.store.v_in_k) == (1, (rank + rope, rank), True)
    assert all(isinstance(o, Rewritten) for o in made.outcomes["place"])
    assert "40 numbers a token instead of 160, V is 32 of them" in made.outcomes["place"][0].what


@pytest.mark.parametrize("arch", LATENT)
def test_absorbed_attention_is_expanded_attention(arch):
    """Rounding of some hundred operations on the logits' scale; decoding too (`test_exact`)."""
    made, ids = program(arch), prompt(60, batch=2)
    expanded = stateless(made.after("canonicalize").graph_module, ids)
    absorbed = stateless(made.graph_module, ids)
    assert not torch.equal(expanded, absorbed), "the same graph: the test could not fail"
    bound = 256 * torch.finfo(torch.float32).eps * expanded.abs().max()
    assert (absorbed - expanded).abs().max() <= bound


@pytest.mark.parametrize("arch", LATENT)
def test_bytes_are_at_most_those_of_transformers_and_a_quarter_of_expanded_ones(arch):
    report, tokens = kvcompile.explain(optimized(arch)), 256  # whole pages
    tables = sum(4 * (1 + tokens // 128) for _ in report.sites)
    payload = report.kv_bytes(tokens) - tables
    expanded = sites(program(arch).after("canonicalize").graph_module.graph)
    assert payload == report.baseline_kv_bytes(tokens)
    assert 4 * payload <= tokens * sum(site.exact_bytes_per_token for site in expanded)
    with torch.no_grad():
        out = optimized(arch)(prompt(tokens), use_cache=True)
    assert out.past_key_values.nbytes == report.kv_bytes(tokens)


@cache
def wide(recipe: str = "full"):
    """A latent of 56 numbers, 64 with the rotary key: any group of channels fits."""
    if recipe == "full":
        model = tiny("deepseek_v2", num_hidden_layers=2, kv_lora_rank=56, qk_nope_head_dim=24)
        return kvcompile.optimize(model, "full", compile=False)
    return kvcompile.optimize(wide(), recipe, compile=False)


@pytest.mark.parametrize("recipe", [
    "kivi(bits=4, residual=32)", *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in (
        "int8", "streamingllm(sinks=4, window=32)"))])
def test_latents_are_stored_by_any_recipe_that_fits(recipe):
    model, ids = wide(recipe), prompt(200)
    assert all(site.store.v_in_k for site in model.kvcompile.engine.sites)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert cache.nbytes == kvcompile.explain(model).kv_bytes(200)
    if recipe == "int8":
        assert torch.equal(greedy(wide(), ids, 12), greedy(model, ids, 12))


def test_decoding_over_a_coded_latent_is_the_stateless_graph():
    """Token by token from a prompt of one, as the graph with the store in it says."""
    from kvcompile.measure.perplexity import forced_decode

    model, ids = wide("int8"), prompt(24)
    logits = stateless(model.kvcompile.program.graph_module, ids)
    nll = torch.nn.functional.cross_entropy(logits[0, 1:-1], ids[0, 2:], reduction="none")
    got = torch.tensor(forced_decode(model, ids, context=1).nll)
    assert ((got - nll).abs() < 0.02).float().mean() > 0.9  # rounding may tip a code


def test_a_format_that_does_not_fit_the_latent_leaves_k_and_v():
    model = tiny("deepseek_v2", num_hidden_layers=1, qk_nope_head_dim=24)
    made = kvcompile.capture(model, "rtn(bits=4, group=16)")
    outcome = made.outcomes["place"][0]
    assert outcome.reason.startswith("K and V stay: 40 numbers a head do not fit")
    assert made.sites[0].dims == (32, 16) and not made.sites[0].store.v_in_k


@pytest.mark.parametrize("arch", OTHERS)
def test_never_more_bytes_than_k_and_v(arch):
    made = program(arch)
    before = sites(made.after("canonicalize").graph_module.graph)
    for own, old, outcome in zip(made.sites, before, made.outcomes["place"], strict=True):
        assert own.exact_bytes_per_token <= old.exact_bytes_per_token
        assert outcome.what == "caches K and V"


def test_the_graph_before_and_after(request):
    made = kvcompile.optimize(tiny("deepseek_v2", num_hidden_layers=1), "full",
                              compile=False).kvcompile.program
    for name in ("canonicalize", "place"):
        lines = str(made.after(name)).splitlines()
        end = next(i for i, line in enumerate(lines) if "o_proj" in line)
        text, path = "\n".join(lines[: end + 1]) + "\n", GOLDEN / f"deepseek_v2-{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert text == path.read_text()


@cache
def many_heads():
    """As many kv heads as query heads: hidden states are half as wide as K and V together."""
    return kvcompile.capture(tiny("llama", num_hidden_layers=2, num_key_value_heads=4))


def test_hidden_states_are_cached_where_a_recipe_asks():
    """XQuant: K is rebuilt and V absorbed; exact where nothing is quantized."""
    gm = copy_graph(many_heads().snapshots["capture"])
    run_passes(passes(), gm, [LayerPlan({"recompute": "hidden"})] * 2)
    for site in sites(gm.graph):
        assert (site.heads, site.dims, site.rebuilt, site.store.v_in_k) == (1, (64, 64), True, True)
    ids = prompt(40, batch=2)
    want, got = stateless(many_heads().graph_module, ids), stateless(gm, ids)
    assert not torch.equal(want, got)
    assert (want - got).abs().max() <= 512 * torch.finfo(torch.float32).eps * want.abs().max()


def test_hidden_states_are_stored_in_the_recipe_s_bits():
    made = many_heads().lower("xquant(bits=8)")
    assert {site.dims for site in made.sites} == {(64, 64)}
    assert {bytes_per_token(site) for site in made.sites} == {64 * 9 / 8}
    want, got = (stateless(p.graph_module, prompt(30)) for p in (many_heads(), made))
    assert 0 < (want - got).norm() < 0.05 * want.norm()
    few = program("llama").lower("xquant")
    assert {o.what for o in few.outcomes["place"]} == {"caches K and V"}


def test_layers_that_share_k_and_v_share_the_latent():
    made = program("deepseek_v2:2").lower("share(map=[0, 0])")
    nodes = attention_nodes(made.graph_module.graph)
    for side in "kv":
        assert argument(nodes[0], side) is argument(nodes[1], side)
    assert [site.owner for site in made.sites] == [None, 0]
    ids = prompt(30)
    shared = made.snapshots["share"]
    want, got = stateless(shared, ids), stateless(made.graph_module, ids)
    assert (want - got).abs().max() <= 256 * 2**-23 * want.abs().max()


@pytest.mark.slow
def test_the_compiled_step_reads_latents_by_the_kernel():
    """48 numbers and a rotary key of 16: V is read from K's pages."""
    from kvcompile.rows import fused

    base = tiny("deepseek_v2", num_hidden_layers=1, kv_lora_rank=48, qk_rope_head_dim=16,
                head_dim=16)
    model = kvcompile.optimize(base, "full")
    assert [fused(site) for site in model.kvcompile.engine.sites] == [{}]
    ids = prompt(140)
    assert torch.equal(greedy(model, ids, 8), greedy(base, ids, 8))
