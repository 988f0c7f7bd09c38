"""Time and peak memory of the prefill of a long prompt and of decoding after it.

    python tests/memory_table.py [--tokens 8000] [--model tiny] [--repeats 3] [recipe ...]

Each recipe runs in a process of its own; all is compiled on a short prompt first. Memory
is what the process takes at most during a prefill, and during the steps after the last one, beyond
what it took before. A dense copy of the cache that a step makes would be seen there.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

import kvcompile
from kvcompile.between import MANY
from kvcompile.models.smollm2 import smollm2
from kvcompile.models.tiny import tiny

RECIPES = ("full", "snapkv(budget=1024)", "kivi(bits=4)")
STEPS = 16


def proc(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{field}:")[1].split()[0])


def measure(recipe: str, name: str, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds (median), bytes at the first peak, and the cache's, of prefills of some tokens; bytes
    at the peak of steps after the last of them."""
    base = smollm2()[0] if name == "smollm2" else tiny(
        "llama", num_hidden_layers=12, head_dim=64, num_key_value_heads=4, hidden_size=256)
    model = kvcompile.optimize(base, recipe)
    ids = torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = model(ids[:, :MANY], use_cache=True, logits_to_keep=1).past_key_values
    model(ids[:, :1], past_key_values=cache)
    seconds, peaks = [], []
    for _ in range(repeats):
        del cache
        before, start = counted(), time.perf_counter()
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        seconds.append(time.perf_counter() - start)
        peaks.append(proc("VmHWM") - before)
    nbytes, before = cache.nbytes, counted()
    for _ in range(STEPS):
        model(ids[:, :1], past_key_values=cache)
    return {"seconds": median(seconds), "peak": peaks[0], "nbytes": nbytes,
            "steps": max(0, proc("VmHWM") - before)}


def counted() -> int:
    """Bytes that the process takes; its peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return proc("VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args()
    if given.one:
        print(json.dumps(measure(given.recipes[0], given.model, given.tokens, given.repeats)))
        return
    print("| recipe | KV bytes | peak of the prefill beyond the model's | seconds | of the first "
          f"| more at the peak of {STEPS} steps |\n|---|---:|---:|---:|---:|---:|")
    first = None
    for recipe in given.recipes:
        out = subprocess.run([sys.executable, __file__, "--one", "--model", given.model, "--tokens",
                              str(given.tokens), "--repeats", str(given.repeats), recipe],
                             check=True, stdout=subprocess.PIPE, text=True).stdout
        got = json.loads(out.splitlines()[-1])
        first = first or got["seconds"]
        print(f"| `{recipe}` | {got['nbytes']:,} | {got['peak'] / 1e6:.1f} MB | "
              f"{got['seconds']:.2f} | {got['seconds'] / first:.3f} | "
              f"{got['steps'] / 1e6:.1f} MB |", flush=True)


if __name__ == "__main__":
    main()
