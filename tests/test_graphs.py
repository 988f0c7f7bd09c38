"""Printed graphs after passes, against golden text: `pytest --update-golden` writes it anew."""

from functools import cache
from pathlib import Path

import pytest

import kvcompile
from kvcompile.models.tiny import tiny

GOLDEN = Path(__file__).parent / "golden"


@cache
def program(recipe: str):
    model = tiny("llama", num_hidden_layers=1)
    return kvcompile.optimize(model, recipe, compile=False).kvcompile.program


@pytest.mark.parametrize("name", ("capture", "canonicalize", "select", "quantize", "insert_cache"))
def test_graph_after_pass(name, request):
    text = str(program("streamingllm(window=64)+kivi(bits=4)").after(name)) + "\n"
    path = GOLDEN / f"llama-{name}.txt"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), "no golden text: run pytest --update-golden and read what it wrote"
    assert text == path.read_text()


def test_passes_run_twice_change_nothing():
    from kvcompile.plan import plan
    from kvcompile.printer import text
    from kvcompile.rewrite import copy_graph, passes, phases, run_passes

    recipe = "streamingllm(window=64)+kivi(bits=4)"
    made = program(recipe)
    settings = plan(recipe, 1)
    graph = copy_graph(made.graph_module)
    run_passes(passes(), graph, settings)
    assert text(graph) == text(made.graph_module)
    for phase, p in phases().items():
        graph = copy_graph(made.phases[phase])
        run_passes([p], graph, settings)
        assert text(graph) == text(made.phases[phase])


def test_a_broken_graph_names_the_pass():
    from kvcompile.errors import KVCompileError
    from kvcompile.ir import attention_nodes
    from kvcompile.rewrite import copy_graph, run_passes

    class Breaks:
        name, order, axes = "breaks", 1, ()

        def run(self, gm, plan):
            node = attention_nodes(gm.graph)[0]
            node.args = (node.args[0], node.args[2], node.args[0], *node.args[3:])
            return []

    with pytest.raises(KVCompileError, match="pass breaks left a broken graph: node 'attention'"):
        run_passes([Breaks()], copy_graph(program("full").graph_module), ())
