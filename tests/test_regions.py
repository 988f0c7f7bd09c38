"""Equal layers of a decode step as calls of one subgraph: the same results from a smaller graph."""

import pytest
import torch
from support import greedy, optimized, prompt
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._inductor.utils import run_and_get_code

import kvcompile
import kvcompile.engine
from kvcompile.backend.regions import outline

# stretches between two attends that share a subgraph with others, of the tiny model's four layers
CALLS = {"llama": 3, "gpt2": 3, "mixtral": 3, "gemma3_text": 3, "gpt_oss": 2, "deepseek_v2": 2}

SLOW = ("gpt_oss", "mixtral", "deepseek_v2")


@pytest.fixture
def outlined(monkeypatch):
    """The graphs of decode steps, which are then run eagerly."""
    graphs = []

    def run(gm, inputs, dynamic):
        outline(gm)
        graphs.append(gm)
        return gm

    monkeypatch.setattr(kvcompile.engine, "compile_graph", run)
    return graphs


def calls(gm):
    return [n for n in gm.graph.nodes if n.target is invoke_subgraph]


@pytest.mark.parametrize("arch", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x
                                  for x in CALLS])
def test_the_same_tokens_from_a_smaller_graph(arch, outlined):
    model = kvcompile.optimize(optimized(arch), "full", compile=True)
    model.kvcompile.engine.alone.compile = False
    assert torch.equal(greedy(model, prompt(20), 12), greedy(optimized(arch), prompt(20), 12))
    assert len(calls(outlined[0])) == CALLS[arch]


@pytest.mark.parametrize("recipe", ["kivi(bits=4)", "minicache(start=0)+int8", "h2o(budget=24)",
                                    "cla", "kivi(layers=:2)"])
def test_layers_keep_their_slots(recipe, outlined):
    model = kvcompile.optimize(optimized("llama"), recipe, compile=True)
    model.kvcompile.engine.alone.compile = False
    want = greedy(optimized("llama", recipe), prompt(30), 12)
    assert torch.equal(greedy(model, prompt(30), 12), want)
    assert len(calls(outlined[0])) >= 2 or recipe in ("cla", "kivi(layers=:2)")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_inductor_writes_one_function_for_equal_layers(batch):
    recipe = "minicache(start=0)+kivi(bits=4)"
    model, plain = optimized("llama", recipe, compile=True), optimized("llama", recipe)
    got, (*_, code) = run_and_get_code(greedy, model, prompt(30, batch), 12)
    assert torch.equal(got, greedy(plain, prompt(30, batch), 12))
    assert code.count("def repeated_subgraph0(") == 1
    assert code.count("= repeated_subgraph0(") == 3
