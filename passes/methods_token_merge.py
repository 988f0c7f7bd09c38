"""Methods in which tokens that are not kept live on in others. Counts are 1, as published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompile.method import Axes, Method, Param
from kvcompile.passes.entries import chosen, keep, term
from kvcompile.passes.methods_heads import scorer, wrapped
from kvcompile.recipe import Term


def _cam(p: Mapping[str, Any]) -> Axes:
    return {**wrapped(p), "keep.merge": term("cam", next=p["next"], seed=p["seed"]),
            "keep.every": 0}


def _d2o(p: Mapping[str, Any]) -> Axes:
    name = "dense" if p["layers_by_variance"] else "uniform"
    return keep(Term("received"), p, name, recent=p["recent"], merge=Term("nearest"))


def _kvmerger(p: Mapping[str, Any]) -> Axes:
    score = term("pivots", of=Term("received"), alike=p["alike"], heavy=p["heavy"],
                 recent=p["recent"])
    return {"keep.score": score, "keep.budget": term("threshold", at=0.5),
            "keep.merge": term("runs", alike=p["alike"])}


METHODS: tuple[Method, ...] = (
    chosen(
        "cam", 0.5, scorer("h2o"),
        Param("next", 32, minimum=1, help="kept tokens that a dropped V is shared among"),
        Param("seed", 0, minimum=0, help="of the draw"),
        title="CaM, cache merging", paper="https://openreview.net/forum?id=LCTmppB165",
        family="merging", axes=_cam,
        note="V of dropped tokens is added to the next kept ones, with a probability; at the end "
        "of the prompt",
    ),
    chosen(
        "d2o", 0.2, Param("recent", 0.25, minimum=0.0, maximum=1.0,
                          help="share of the budget that the newest tokens take"),
        Param("layers_by_variance", True, help="layers share their budgets"),
        title="D2O", paper="arXiv:2406.13035", family="merging", axes=_d2o,
        note="heavy hitters stay; dropped tokens go into the kept one of the most similar key. At "
        "the end of the prompt",
    ),
    Method(
        name="kvmerger", title="KVMerger", paper="arXiv:2407.08454", family="merging",
        params=(Param("alike", 0.75, minimum=-1.0, maximum=1.0, help="cosine of neighbours in a "
                      "run"),
                Param("heavy", 0.1, minimum=0.0, maximum=1.0, help="share that is never merged"),
                Param("recent", 32, minimum=0, help="newest tokens that are never merged")),
        axes=_kvmerger,
        note="runs of alike keys become one, by Gaussian weights; the threshold "
        "decides how much is kept",
    ),
)
