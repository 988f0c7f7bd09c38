"""Timed generate(): the text as it comes, and what the prompt and each token took."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvcompile.measure.baseline import cache_nbytes


class Clock(BaseStreamer):
    """Notes when generate() has which token, and hands it on to `inner`."""

    def __init__(self, inner: BaseStreamer | None = None) -> None:
        self.inner = inner
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.inner:
            self.inner.put(value)

    def end(self) -> None:
        if self.inner:
            self.inner.end()


@dataclass(frozen=True)
class Run:
    """One generate() of one sequence: prompt and new tokens, seconds and bytes as measured.

    `first_step` is the first decode step, which compiles where something is to be compiled;
    `ms_per_token` is the median of the steps after it. Both are None where there was no such step.
    """

    prompt: Tensor
    new: Tensor
    prefill: float
    first_step: float | None
    ms_per_token: float | None
    nbytes: int
    cached: int

    def as_dict(self) -> dict[str, Any]:
        """The figures in plain types."""
        return {"prompt_tokens": self.prompt.numel(), "new_tokens": self.new.numel(),
                "prefill_s": self.prefill, "first_step_s": self.first_step,
                "ms_per_token": self.ms_per_token, "kv_bytes": self.nbytes,
                "cached_tokens": self.cached}


def timed(model: PreTrainedModel, ids: Tensor, streamer: BaseStreamer | None = None,
          **options: Any) -> Run:
    """model.generate(ids [1, S], **options), timed token by token."""
    clock = Clock(streamer)
    generate: Any = model.generate
    out = generate(ids, attention_mask=torch.ones_like(ids), streamer=clock,
                   return_dict_in_generate=True, **options)
    start, *ends = clock.times  # the prompt, then every new token
    steps = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    tokens = ids.shape[1]
    return Run(out.sequences[0, :tokens], out.sequences[0, tokens:], ends[0] - start,
               steps[0] if steps else None,
               median(steps[1:]) * 1e3 if len(steps) > 1 else None,
               cache_nbytes(out.past_key_values), out.past_key_values.get_seq_length())
