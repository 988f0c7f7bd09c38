"""The table of docs/sharing.md: perplexity against bytes of SmolLM2 whose layers share K and V.

    python tests/sharing_table.py [recipe ...]

Each text is 768 tokens that are stored and 256 that read them in one call, and each other exactly;
the last are scored. Agreement counts tokens that the uncompressed model also holds likeliest.
"""

import math
import sys

import torch
from torch.nn.functional import cross_entropy

import kvcompile
from kvcompile.models.smollm2 import smollm2, topics_ids

CONTEXT, SCORED, TEXTS = 768, 256, 4
RECIPES = (
    "full", "int8", "kivi(bits=4)", "kivi(bits=2)",
    *(f"minicache(start={start})" for start in (0.9, 0.8, 0.7, 0.5)),
    "minicache(start=0.9)+kivi(bits=4)", "minicache+kivi(bits=4)", "minicache+kivi(bits=2)",
    "minicache(pairs=calibrated)", "minicache(retained=0.2)", "minicache(retained=0.5)",
    *(f"kvsharer(shared={n}, threshold=-1)" for n in (1, 2, 4)),
    "kvsharer(shared=2, threshold=-1)+int8",
    *(f"palu(ratio={r}{ranks})" for r in (0.7, 0.5) for ranks in ("", ", ranks=calibrated")),
    "palu(ratio=0.5)+kivi(bits=4)", "palu(ratio=0.5)+kivi(bits=2)", "pod", "xkv",
    "xkv+kivi(bits=4)",
    *(f"minicache(start={start}, align=true)" for start in (0.9, 0.8, 0.7, 0.5)),
    *(f"minicache(start={start}, align=true)+kivi(bits=4)" for start in (0.9, 0.8, 0.5)),
    "minicache(pairs=calibrated, align=true)", "minicache(retained=0.2, align=true)")


def texts(tokenizer) -> torch.Tensor:
    """[TEXTS, CONTEXT + SCORED + 1] from places of the topics far apart."""
    size = CONTEXT + SCORED + 1
    return torch.cat([topics_ids(tokenizer, size, 20_000 * i) for i in range(TEXTS)])


@torch.no_grad()
def score(model, ids: torch.Tensor) -> tuple[float, torch.Tensor, int]:
    """(nats per scored token, likeliest tokens, bytes of one text's cache)."""
    loss, likeliest, nbytes = 0.0, [], 0
    for text in ids:
        cache = model(text[None, :CONTEXT], use_cache=True, logits_to_keep=1).past_key_values
        nbytes = cache.nbytes
        logits = model(text[None, CONTEXT:-1], past_key_values=cache, use_cache=True).logits[0]
        loss += float(cross_entropy(logits.float(), text[CONTEXT + 1 :])) / len(ids)
        likeliest.append(logits.argmax(-1))
    return loss, torch.cat(likeliest), nbytes


def main(recipes: tuple[str, ...]) -> None:
    model, tokenizer = smollm2(torch.float32)
    ids = texts(tokenizer)
    calibration = topics_ids(tokenizer, 30 * 64, 100_000).view(30, 64)
    exact = kvcompile.optimize(model, "full", compile=False)
    _, want, _ = score(exact, ids)
    print("| recipe | of 16 bits at 4,096 tokens | perplexity | agreement |\n|---|---|---|---|")
    half = kvcompile.optimize(smollm2(torch.bfloat16)[0], "full", compile=False)
    full = kvcompile.explain(half).baseline_kv_bytes(4096)
    for recipe in recipes:
        shared = kvcompile.optimize(exact, recipe, compile=False, calibration=calibration)
        loss, got, _ = score(shared, ids)
        found = str(shared.kvcompile.program.recipe)
        share = kvcompile.explain(half, found).kv_bytes(4096) / full
        agree = float((got == want).float().mean())
        print(f"| `{recipe}` | {share:.1%} | {math.exp(loss):.2f} | {agree:.1%} |", flush=True)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or RECIPES)
