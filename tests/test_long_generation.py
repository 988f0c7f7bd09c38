"""10,000 generated tokens with eviction: the same bytes, memory, graph and time a token all along.

    python tests/test_long_generation.py [recipe ...]        prints the table of docs/selection.md
"""

import sys
import time
from pathlib import Path
from statistics import quantiles

import pytest
import torch

import kvcompile
import kvcompile.engine
from kvcompile.models.tiny import tiny

TOKENS, PART, PROMPT = 10_000, 1000, 600
RECIPES = ("h2o(budget=256)", "r-kv(budget=256)", "h2o(budget=256)+kivi(bits=2)")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def generate(recipe: str, tokens: int = TOKENS) -> tuple[list[dict[str, float]], int]:
    """What holds after every PART tokens of greedy generation, and how many graphs were compiled
    after the first token."""
    model = kvcompile.optimize(tiny("llama", num_hidden_layers=2), recipe)
    ids = torch.randint(3, 128, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    out = model(ids, use_cache=True, logits_to_keep=1)
    cache, parts, compiled = out.past_key_values, [], []
    inner = kvcompile.engine.compile_graph
    kvcompile.engine.compile_graph = lambda *a: (compiled.append(1), inner(*a))[1]
    try:
        for _ in range(tokens // PART):
            seconds = []
            for _ in range(PART):
                start = time.perf_counter()
                out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
                seconds.append(time.perf_counter() - start)
            parts.append({"nbytes": cache.nbytes, "resident": resident(),
                          "stored": int(cache.stored_tokens(0).max()),
                          "ms": 1e3 * quantiles(seconds, n=4)[0]})
    finally:
        kvcompile.engine.compile_graph = inner
    return parts, len(compiled) - 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_thousand_tokens(recipe):
    """Memory and time of the second half against the first; the best thousand tokens of each, so
    that other processes do not count."""
    parts, again = generate(recipe)
    assert again == 0
    assert len({part["nbytes"] for part in parts[1:]}) == 1
    assert max(part["stored"] for part in parts) < 256 + 128
    early, late = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    assert max(p["resident"] for p in late) - max(p["resident"] for p in early) < 2**20
    assert min(p["ms"] for p in late) < 1.25 * min(p["ms"] for p in early)



def main(recipes: tuple[str, ...]) -> None:
    for recipe in recipes:
        parts, again = generate(recipe)
        print(f"{recipe}: {again} compilations after the first token")
        print("| tokens | tokens held | KV bytes | resident, MB | ms, lower quartile |\n"
              "|---:|---:|---:|---:|---:|")
        for i, part in enumerate(parts, 1):
            print(f"| {i * PART:,} | {part['stored']} | {part['nbytes']:,} | "
                  f"{part['resident'] / 1e6:.1f} | {part['ms']:.2f} |", flush=True)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or RECIPES)
