"""torch.compile(backend="kvcompile"): the entry point, stateless graphs, KVCache, other caches."""

import copy
import logging

import pytest
import torch
from support import greedy, optimized, plain, prompt, slow_but
from transformers import CompileConfig

import kvcompile
from kvcompile import KVCompileError, RecipeError

RECIPE = "kivi(bits=2, residual=32)"
LLAMA = "llama:1"  # one layer: these tests compile a lot


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(arch: str = LLAMA, **options):
    """A copy of the tiny model whose forward is compiled by the backend."""
    model = copy.deepcopy(plain(arch))
    model.forward = torch.compile(model.forward, backend="kvcompile", options=options)
    return model


def test_it_is_listed():
    assert "kvcompile" in torch._dynamo.list_backends()


@pytest.mark.parametrize("arch", slow_but([LLAMA], [LLAMA, "llama:2", "mistral:2"]))
def test_a_stateless_forward_sees_the_compressed_view(arch):
    model = torch.compile(plain(arch), backend="kvcompile", options={"recipe": RECIPE})
    ids = prompt(100)
    with torch.no_grad():
        got = model(input_ids=ids, use_cache=False).logits
    graph = optimized(arch, RECIPE).kvcompile.program.graph_module
    columns = torch.arange(100)
    want = graph(ids, columns[None], torch.ones_like(ids, dtype=torch.bool), columns)
    exact = plain(arch)(ids).logits
    lost = (want - exact).abs().max()
    assert lost > 0.1, "the recipe changed nothing"
    # in another order of sums a code may round the other way: one of thousands, by one step
    assert (got - want).abs().max() <= lost / 100


@pytest.mark.parametrize("arch", slow_but([LLAMA], [LLAMA, "llama:2"]))
def test_generate_over_a_kvcache_equals_optimize(arch):
    model = compiled(arch, recipe=RECIPE)
    for tokens in (60, 9):
        cache = kvcompile.KVCache(model.config, RECIPE)
        got = greedy(model, prompt(tokens), 40, past_key_values=cache)
        assert cache.get_seq_length() == tokens + 39
        own = greedy(optimized(arch, RECIPE), prompt(tokens), 40, return_dict_in_generate=True)
        assert torch.equal(got, own.sequences)
        assert torch.equal(cache.stored_tokens(0), own.past_key_values.stored_tokens(0))


def test_the_cache_is_attended_to_as_stored(monkeypatch):
    """No graph asks the cache for decoded K and V once it is compiled."""
    calls = []
    original = kvcompile.cache.Group.reserve

    def reserve(self, counts):
        calls.append(self.site.layer)
        return original(self, counts)

    monkeypatch.setattr(kvcompile.cache.Group, "reserve", reserve)
    graphs = []
    from kvcompile import backend
    monkeypatch.setattr(backend, "compile_dynamo", lambda gm, inputs: graphs.append(gm) or gm)
    model = compiled(recipe="int8")
    greedy(model, prompt(9), 5, past_key_values=kvcompile.KVCache(model.config, "int8"))
    ops = [str(n.target) for gm in graphs for n in gm.graph.nodes]
    assert "kvc.decode.default" in ops and calls
    assert not any("kvc.update" in op or "scaled_dot_product" in op for op in ops)


@pytest.mark.parametrize(("arch", "recipe"), (
    (LLAMA, "streamingllm(sinks=4, window=32)"), ("mistral", "full"), ("gemma2", "int8")))
def test_an_uncompiled_model_can_use_it_too(arch, recipe):
    cache = kvcompile.KVCache(plain(arch).config, recipe)
    got = greedy(plain(arch), prompt(60), 40, past_key_values=cache)
    assert torch.equal(got, greedy(optimized(arch, recipe), prompt(60), 40))


def test_another_cache_is_compiled_unchanged_with_one_warning(caplog):
    model = compiled(recipe=RECIPE)
    with caplog.at_level(logging.WARNING, logger="kvcompile"):
        got = greedy(model, prompt(20), 10)
    assert torch.equal(got, greedy(plain(LLAMA), prompt(20), 10))
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("kvcompile")]
    assert len(warnings) == 1 and "cache that is not a kvcompile.KVCache" in warnings[0]


@pytest.mark.parametrize("how", (
    pytest.param("model.compile", marks=pytest.mark.slow), "CompileConfig"))
def test_other_ways_to_ask_for_it(how):
    model = copy.deepcopy(plain(LLAMA))
    options = {}
    if how == "model.compile":
        model.compile(backend="kvcompile", options={"recipe": "int8"})
    else:
        config = CompileConfig(backend="kvcompile", fullgraph=False, mode=None)
        config._compile_all_devices = True
        options["compile_config"] = config
    cache = kvcompile.KVCache(model.config, "int8", max_length=128)
    got = greedy(model, prompt(30), 20, past_key_values=cache, **options)
    assert torch.equal(got, greedy(optimized(LLAMA, "int8"), prompt(30), 20))


def test_mistakes_are_named():
    model = compiled(recipe="kivi")
    with pytest.raises(Exception, match="KVCache stores by 'int8'") as info:
        greedy(model, prompt(9), 3, past_key_values=kvcompile.KVCache(model.config, "int8"))
    assert isinstance(info.value, RecipeError)
    torch._dynamo.reset()
    ids, mask = prompt(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    with pytest.raises(KVCompileError, match="use kvcompile.optimize for padded batches"):
        greedy(compiled(recipe="full"), ids, 3, attention_mask=mask,
               past_key_values=kvcompile.KVCache(plain(LLAMA).config, "full"))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="has no option 'recip'; did you mean 'recipe'"):
        compiled(recip="kivi")(prompt(5), use_cache=False)
