"""Methods around weights of attention, and those that read keys through random projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompile.errors import RecipeError
from kvcompile.method import Axes, Method, Param
from kvcompile.passes.entries import PROTECT, chosen, keep, term
from kvcompile.passes.methods_heads import scorer, wrapped
from kvcompile.rule import named


def weights(p: Mapping[str, Any]) -> dict[str, Any]:
    """The axes of the method that `scorer` names, whose scores are weights of attention."""
    axes = wrapped(p)
    if not getattr(named("scorer", axes["keep.score"]), "weighs", False):
        raise RecipeError(f"{p['scorer'].name}: its scores are not weights of attention, which "
                          "values could be weighed by")
    return axes


def _vatp(p: Mapping[str, Any]) -> Axes:
    axes = weights(p)
    return axes | {"keep.score": term("weighed", of=axes["keep.score"]), "keep.sinks": p["sinks"]}


def _caote(p: Mapping[str, Any]) -> Axes:
    axes = weights(p)
    return axes | {"keep.score": term("weighed", of=axes["keep.score"], by="output")}


def _topp(p: Mapping[str, Any]) -> Axes:
    axes = weights({**p, "budget": None, "ratio": 1.0})
    return axes | {"keep.budget": term("topp", p=p["p"]), "keep.sinks": p["sinks"],
                   "keep.every": 0}


def _a2sf(p: Mapping[str, Any]) -> Axes:
    return keep(term("received", decay=p["decay"]), p, recent=p["recent"], every=1)


def _compactor(p: Mapping[str, Any]) -> Axes:
    ends = {"sinks": p["sinks"], "window": p["recent"]}
    share = p["blend"]
    if share is None:
        share = 0.35 if p["budget"] is not None else 1 - p["ratio"]
    return keep(term("blend", of=term("mutual", chunk=p["chunk"], **ends), by=term(
        "leverage", sketch=p["sketch"], seed=p["seed"], **ends), share=share), p)


def _hashevict(p: Mapping[str, Any]) -> Axes:
    return keep(term("hashed", bits=p["bits"], seed=p["seed"]), p, sinks=p["sinks"],
                recent=p["recent"])


METHODS: tuple[Method, ...] = (
    chosen(
        "vatp", 0.5, scorer("h2o"), Param("sinks", 20, minimum=0, help="first tokens that stay"),
        title="VATP", paper="arXiv:2406.12335", axes=_vatp,
        note="weights of attention times the L1 norm of the value, around any method whose scores "
        "are such weights",
    ),
    chosen(
        "caote", 0.5, scorer("h2o"),
        title="CAOTE", paper="arXiv:2504.14051", axes=_caote,
        note="how far the output moves if a token leaves, around any method whose scores are "
        "weights of attention",
    ),
    Method(
        name="topp", title="Top-p", paper="arXiv:2502.02770", family="selection",
        params=(scorer(), Param("p", 0.9, minimum=0.0, maximum=1.0,
                                help="share of a head's scores that stays"), *PROTECT),
        axes=_topp,
        note="each head keeps the fewest tokens with the share p of its scores, once. The paper, "
        "Twilight, chooses so for every query what is read, and drops nothing",
    ),
    chosen(
        "a2sf", 0.2, Param("decay", 0.3, minimum=0.0, maximum=1.0,
                           help="what a weight counts a query later; 1: H2O"),
        Param("recent", 0.5, minimum=0.0, maximum=1.0,
              help="share of the budget that the newest tokens take"),
        title="A2SF", paper="arXiv:2407.20485", axes=_a2sf,
        note="H2O with forgetting, so that old tokens have no start over new ones",
    ),
    chosen(
        "compactor", 0.5, Param("chunk", 256, minimum=1, help="tokens that attend to each other"),
        Param("sketch", 48, minimum=0, help="columns that keys are projected to; 0: none"),
        Param("blend", None, minimum=0.0, help="weight of the leverage (the share that is dropped; "
              "0.35 of a budget in tokens)"),
        Param("sinks", 8, minimum=0, help="first tokens that always stay"),
        Param("recent", 4, minimum=0, help="newest tokens that always stay"),
        Param("seed", 0, minimum=0, help="of the projection"),
        title="Compactor", paper="arXiv:2507.08143", axes=_compactor,
        note="query-agnostic: leverage of the keys, and attention within chunks, also to later "
        "tokens, times |v|",
    ),
    chosen(
        "hashevict", 0.5, Param("bits", 16, minimum=1, help="random hyperplanes"), *PROTECT,
        Param("recent", 10, minimum=0, help="newest tokens that always stay"),
        Param("seed", 0, minimum=0, help="of the hyperplanes"),
        title="HashEvict", paper="arXiv:2412.16187", axes=_hashevict,
        note="keys whose hash is far from the last query's leave, at the end of the prompt; the "
        "paper evicts one before every step",
    ),
)
