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
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from kvcompile.errors import KVCompileError


class Forced(NamedTuple):
    """Of every decode step: nats per token of the token that follows, and milliseconds."""

    nll: list[float]
    ms: list[float]

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
    results = [Forced([], []) for _ in models]
    for steps in zip(*(_steps(model, ids, context) for model in models), strict=True):
        for result, (nll, ms) in zip(results, steps, strict=True):
            result.nll.append(nll)
            result.ms.append(ms)
    return results


def _steps(model: PreTrainedModel, ids: Tensor, context: int) -> Iterator[tuple[float, float]]:
    ids = ids.to(model.device)
    one = "logits_to_keep" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        prompt = model(input_ids=ids[:, :context], use_cache=True,
                       **({"logits_to_keep": 1} if one else {}))
    cache = prompt.past_key_values
    for at in range(context, ids.shape[1] - 1):
        start = time.perf_counter()
        with torch.no_grad():
            out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1].float().cpu()  # waits for the device
        ms = (time.perf_counter() - start) * 1e3
        yield cross_entropy(logits, ids[:, at + 1].cpu()).item(), ms
