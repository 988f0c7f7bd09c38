"""Perplexity by forced decode: a text is fed token by token, so that every token reads the cache.

A single forward over the text would never read what the cache stores. Here the first `context`
tokens are the prompt; then each token of the text is one decode step, whatever the model would
have said, and the step's logits are scored on the token that follows. The prompt's own logits are
left out, because they are computed from its exact K and V.
"""

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from kvcompile.errors import KVCompileError


class Forced(NamedTuple):
    """Of every decode step: nats per token of the token that follows, milliseconds, whether that
    token was the likeliest, and which one was, of every row."""

    nll: list[float]
    ms: list[float]
    hit: Sequence[bool] = ()
    likeliest: Sequence[list[int]] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.nll) / len(self.nll))

    @property
    def median_ms(self) -> float:
        """The typical step; the first one may include compilation."""
        return median(self.ms)


def forced_decode(model: PreTrainedModel, ids: Tensor, context: int) -> Forced:
    """Force `ids` [B, T] through `model`: `context` tokens at once, T - context - 1 one at a time.

    The cache is the one that the model brings (DynamicCache, or an optimized model's KVCache).
    """
    return forced_decodes([model], ids, context)[0]


def forced_decodes(models: Sequence[PreTrainedModel], ids: Tensor, context: int) -> list[Forced]:
    """`forced_decode` of several models, step by step in turn, so that they share the weather."""
    tokens = ids.shape[1]
    if not 1 <= context <= tokens - 2:
        raise KVCompileError(f"context={context}: must be from 1 to {tokens - 2}, two less than "
                             "the tokens of the text")
    steps = [_steps(model, prefill(model, ids[:, :context])[0], ids, context)
             for model in models]
    each = zip(*zip(*steps, strict=True), strict=True)  # a step of every model at a time
    return [Forced(*map(list, zip(*own, strict=True))) for own in each]


def forced_after(model: PreTrainedModel, cache: Any, ids: Tensor, context: int) -> Forced:
    """`forced_decode` from a cache that holds the first `context` tokens of `ids` already."""
    return Forced(*map(list, zip(*_steps(model, cache, ids, context), strict=True)))


def prefill(model: PreTrainedModel, ids: Tensor) -> tuple[Any, Tensor]:
    """The cache that the model brings, filled with `ids` [B, S] in one call, and the last logits
    [B, 1, V]."""
    one = "logits_to_keep" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        out = model(input_ids=ids.to(model.device), use_cache=True,
                    **({"logits_to_keep": 1} if one else {}))
    return out.past_key_values, out.logits[:, -1:]


def _steps(model: PreTrainedModel, cache: Any, ids: Tensor, context: int
           ) -> Iterator[tuple[float, float, bool, list[int]]]:
    ids = ids.to(model.device)
    for at in range(context, ids.shape[1] - 1):
        start = time.perf_counter()
        with torch.no_grad():
            out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1].float().cpu()  # waits for the device
        ms = (time.perf_counter() - start) * 1e3
        following, likeliest = ids[:, at + 1].cpu(), logits.argmax(-1)
        yield (cross_entropy(logits, following).item(), ms, bool((likeliest == following).all()),
               likeliest.tolist())
