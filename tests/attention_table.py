"""The table of docs/methods.md: error of attention's output on SmolLM2 and pydoc's topics.

    python tests/attention_table.py [tokens]
"""

import sys
import time

import torch

from kvcompile.measure.attention_error import attention_error
from kvcompile.models.smollm2 import smollm2, topics_ids

RECIPES = (
    "rtn(bits=4)", "nf4", "quarot(bits=4)", "quarot(bits=4, clip=1)", "kivi(bits=4, residual=0)",
    "zipcache(bits=4, low=4)", "zipcache(bits=4, low=4, keys=token)", "gear(bits=4)",
    "kvquant(bits=4)",
    "kvtuner(bits=4, residual=0)", "rtn(bits=2)", "rtn(bits=2, group=16)", "quarot(bits=2)",
    "quarot(bits=2, clip=1)", "kivi(bits=2, residual=0)", "kivi(bits=2, group=16, residual=0)",
    "zipcache(bits=2)", "gear(bits=2)", "gear(bits=2, rank=0)", "gear(bits=2, outliers=0)",
    "kvquant(bits=2)", "kvquant(bits=2, outliers=0)", "kvtuner(bits=3, residual=0)", "int8", "fp8")


def main(tokens: int = 4096) -> None:
    model, tokenizer = smollm2(torch.float32)
    ids, text = topics_ids(tokenizer, tokens), topics_ids(tokenizer, 1024, 30_000).view(4, 256)
    start = time.perf_counter()
    print("| recipe | bits per number | error, mean of layers | worst layer |\n|---|---|---|---|")
    for row in attention_error(model, ids, RECIPES, calibration=text):
        print(f"| `{row.recipe}` | {row.bits:.3g} | {row.mean:.4f} | {max(row.layers):.4f} |",
              flush=True)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
