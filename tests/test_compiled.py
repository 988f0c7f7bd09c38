"""The compiled decode step: the same tokens as eager, one graph, planes written in place."""

import re

import pytest
import torch
from support import EVERY, greedy, optimized, prompt
from torch._inductor.utils import run_and_get_code

import kvcompile
import kvcompile.engine

LLAMA = "llama:2"  # two layers: these tests compile a lot
ALIKE = ("kivi(bits=2)", "fp8", "int8", "streamingllm(sinks=4, window=32)")  # other readers alone


@pytest.mark.parametrize("recipe", [pytest.param(x, marks=pytest.mark.slow) if x in ALIKE else x
                                    for x in EVERY])
def test_tokens_equal_eager(recipe):
    ours = optimized(LLAMA, recipe, compile=True)
    for tokens in (1, 140):
        got = greedy(ours, prompt(tokens), 80)
        assert torch.equal(got, greedy(optimized(LLAMA, recipe), prompt(tokens), 80))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [pytest.param("gpt_oss:2", id="window and sinks in the softmax"),
                                  pytest.param("deepseek_v2:2", id="latents")])
def test_other_geometries_compile(arch):
    got = greedy(optimized(arch, "full", compile=True), prompt(30), 20)
    assert torch.equal(got, greedy(optimized(arch), prompt(30), 20))


def test_one_graph_for_all_lengths_and_any_larger_batch(monkeypatch):
    graphs = []
    original = kvcompile.engine.compile_graph

    def count(gm, inputs, dynamic):
        graphs.append(gm)
        return original(gm, inputs, dynamic)

    monkeypatch.setattr(kvcompile.engine, "compile_graph", count)
    model = kvcompile.optimize(optimized(LLAMA), "kivi(bits=4)", compile=True)
    for tokens, new in ((5, 300), (150, 20), (260, 5), (1, 2)):
        greedy(model, prompt(tokens), new)
    assert len(graphs) == 1
    for batch in (2, 3, 5):
        got = greedy(model, prompt(40, batch=batch), 10)
        eager = greedy(optimized(LLAMA, "kivi(bits=4)"), prompt(40, batch=batch), 10)
        assert torch.equal(got, eager)
    assert len(graphs) == 2


def test_planes_are_written_in_place():
    model = kvcompile.optimize(optimized(LLAMA), "kivi(bits=4)", compile=True)
    cache = model(prompt(20), use_cache=True).past_key_values
    _, codes = run_and_get_code(lambda: model(prompt(1), past_key_values=cache))
    code = "\n".join(codes)
    assert "ops.kvc." not in code, "a plain body is called"
    assert code.count("kvc::attend<Config") == 1, "one text for all layers"
    calls = re.findall(r"^ +cpp_fused_\w*append\w*\((.*)\)$", code, re.M)
    planes = max((re.findall(r"arg\d+_1", call) for call in calls), key=len)
    assert len(planes) >= len(cache.groups[0].planes), "a plane was copied"
