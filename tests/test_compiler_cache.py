"""What Inductor compiled is found again on the disk, by a key that knows all of our text."""

from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import kvcompile
from kvcompile import registry
from kvcompile.backend import template
from kvcompile.backend.inductor import compile_graph
from kvcompile.ir import LINEAR
from kvcompile.rewrite import copy_graph


def step(x, w0, w1):
    return (LINEAR(x, [w0, w1], [None, None]),)


def compiled(gate: str = "") -> dict[str, int]:
    """How many graphs were found when a copied one is compiled, and how many were not."""
    counters.clear()
    given = [torch.ones(1, 32), torch.ones(4, 32), torch.ones(4, 32)]
    gm = copy_graph(torch.fx.symbolic_trace(step))
    node = next(n for n in gm.graph.nodes if n.target is LINEAR)
    node.kwargs = {"gate": gate}
    got, *_ = compile_graph(gm, given, [[]] * 3)(*given)
    torch.testing.assert_close(got, LINEAR(given[0], given[1:], [None, None], gate=gate))
    found = counters["inductor"]
    return {what: found[f"fxgraph_cache_{what}"] for what in ("hit", "miss", "bypass")}


def test_compiled_graphs_are_found_again_unless_a_text_changed(monkeypatch):
    with fresh_cache(), torch.no_grad():
        assert compiled() == {"hit": 0, "miss": 1, "bypass": 0}
        assert compiled() == {"hit": 1, "miss": 0, "bypass": 0}
        assert compiled("silu") == {"hit": 0, "miss": 1, "bypass": 0}  # another option of an op
        monkeypatch.setattr(template, "digest", lambda: "other text")
        assert compiled() == {"hit": 0, "miss": 1, "bypass": 0}


def test_the_key_knows_every_file():
    known = {file.resolve() for file in registry._sources()}
    root = Path(kvcompile.__file__).resolve().parent.parent
    for folder in ("kvcompile", "passes", "kernels", "models"):
        assert {f for f in (root / folder).rglob("*") if f.suffix in (".py", ".h")} <= known
