"""The table of low-rank methods in docs/methods.md: SmolLM2's perplexity against numbers stored.

    python tests/lowrank_table.py [recipe ...]

Four times 512 tokens, each read from its start by the stateless graph, which computes what decoding
token by token would; factors are found on eight times 512 other tokens.
"""

import math
import sys

import torch
from torch.nn.functional import cross_entropy

import kvcompile
from kvcompile.kernels.tail import dropped
from kvcompile.models.smollm2 import smollm2, topics_ids

TOKENS, TEXTS, CALIBRATION = 512, 4, 8
RECIPES = (
    "full", *(f"palu(ratio={r})" for r in (0.9, 0.7, 0.5, 0.3)),
    *(f"palu(ratio={r}, ranks=calibrated)" for r in (0.7, 0.5)),
    *(f"matryoshkakv(ratio={r})" for r in (0.75, 0.5)), "mha2mla(rope=0.5, ratio=0.75)", "mha2mla",
    *(f"transmla(ratio={r}, fold={n})" for r, n in ((0.67, 1), (0.67, 4), (0.375, 1), (0.375, 4))),
    "gqa(heads=3)", "gqa(heads=3, align=true)", "gqa(heads=3, by=svd)",
    *(f"cskv(ratio=0.5{more})" for more in ("", ", window=128", ", by=whiten", ", by=svd")))


@torch.no_grad()
def perplexity(program: kvcompile.Program, ids: torch.Tensor) -> float:
    at = torch.arange(TOKENS)
    nats = [cross_entropy(program.graph_module(row[None], at[None], torch.ones(1, TOKENS).bool(),
                                               at)[0, :-1], row[1:]) for row in ids]
    return math.exp(sum(map(float, nats)) / len(nats))


def main(recipes: tuple[str, ...]) -> None:
    model, tokenizer = smollm2(torch.float32)
    ids = topics_ids(tokenizer, (TEXTS + CALIBRATION) * TOKENS).view(-1, TOKENS)
    start = kvcompile.capture(model)
    print("| recipe | numbers stored of a token and layer | perplexity |\n|---|---|---|")
    for recipe in recipes:
        program = start.lower(recipe, calibration=ids[TEXTS:])
        numbers = sum(s.exact_bytes_per_token / 4 - s.heads * sum(dropped(s.store))
                      for s in program.sites) / len(program.sites)
        print(f"| `{recipe}` | {numbers:g} | {perplexity(program, ids[:TEXTS]):.2f} |", flush=True)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or RECIPES)
