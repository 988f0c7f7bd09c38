"""Shared by the tests: tiny models and their captures, made once a process."""

from functools import cache

import torch

import kvcompile
from kvcompile.models.tiny import tiny

RECIPES = ("full", "streamingllm(sinks=4, window=32)", "kivi(bits=2)", "kivi(bits=4)", "int8",
           "fp8")


@cache
def plain(arch: str):
    """The tiny seeded model of an architecture, fp32."""
    return tiny(arch)


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

