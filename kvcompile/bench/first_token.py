"""From a loaded model to its first decoded token, told by a process of its own.

`python -m kvcompile.bench.first_token MODEL RECIPE THREADS` prints one line of JSON, in seconds.
"""

import json
import sys
import time

import torch

import kvcompile
from kvcompile.registry import module

PROMPT = 16


@torch.no_grad()
def measure(name: str, recipe: str) -> dict[str, float]:
    """Seconds of optimize(), of a short prompt, and of the first decode step, which compiles."""
    model, _ = module("models", "load").load(name)
    ids = torch.arange(1, PROMPT + 1)[None]
    times = [time.perf_counter()]
    optimized = kvcompile.optimize(model, recipe)
    times.append(time.perf_counter())
    out = optimized(input_ids=ids, use_cache=True, logits_to_keep=1)
    times.append(time.perf_counter())
    optimized(input_ids=out.logits.argmax(-1), past_key_values=out.past_key_values)
    times.append(time.perf_counter())
    parts = ("optimize", "prompt", "first step")
    return dict(zip(parts, (b - a for a, b in zip(times, times[1:], strict=False)), strict=True))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(measure(*sys.argv[1:3])))
