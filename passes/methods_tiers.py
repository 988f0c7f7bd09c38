"""Methods in which tokens that another method would drop are stored in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompile.method import Axes, Method, Param
from kvcompile.passes.methods import by_token
from kvcompile.passes.methods_heads import scorer, wrapped
from kvcompile.recipe import Term


def _mikv(p: Mapping[str, Any]) -> Axes:
    high, low = ("dense" if b == 16 else f"int(bits={b}, axis=token, group=128)"
                 for b in (p["bits"], p["low"]))
    salient = int(p["salient"] * 128)
    axes = by_token(f"mixed(high={high}, low={low}, salient={salient})", 0)
    score = wrapped({**p, "budget": None, "ratio": 1.0})["keep.score"]
    return {**axes, "block.k": 128, "block.v": 128, "keep.score": score,
            "keep.budget": Term("all"), "keep.every": 1, "keep.salient": salient}


METHODS: tuple[Method, ...] = (
    Method(
        name="mikv", title="MiKV", paper="arXiv:2402.18096", family="quantization",
        params=(scorer("h2o"),
                Param("bits", 16, choices=(16, 8), help="of a salient token's numbers; 16: exact"),
                Param("low", 2, choices=(2, 4), help="bits of the others', per token"),
                Param("salient", 0.25, choices=tuple(i / 8 for i in range(1, 8)),
                      help="share of every 128 tokens")),
        axes=_mikv,
        note="what H2O, or any method that scores what each step attends to, would drop is stored "
        "in fewer bits. Decided once, when 128 tokens leave the recent tier; the paper's balancing "
        "of q's and K's outlier channels is missing",
    ),
)
