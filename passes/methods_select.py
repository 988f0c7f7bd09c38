"""Named methods that choose among tokens by a score. Each is an entry over the axes `keep.*`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompile.errors import RecipeError
from kvcompile.method import Axes, Method, Param
from kvcompile.passes.entries import PROTECT, WINDOW, chosen, keep, term, window
from kvcompile.recipe import Term


def _snapkv(p: Mapping[str, Any]) -> Axes:
    return keep(window(p), p)


def _pyramidkv(p: Mapping[str, Any]) -> Axes:
    return keep(window(p), p, "pyramid", ("window", p["window"]), ("beta", p["beta"]))


def _h2o(p: Mapping[str, Any]) -> Axes:
    return keep(term("received", how=p["how"]), p, recent=p["recent"], every=1)


def _tova(p: Mapping[str, Any]) -> Axes:
    return keep(Term("last"), p, recent=1, every=1)


def _scissorhands(p: Mapping[str, Any]) -> Axes:
    return keep(term("ignored", history=p["history"]), p, recent=p["recent"], every=p["every"])


def _rkv(p: Mapping[str, Any]) -> Axes:
    score = term("redundant", mix=p["mix"], window=p["window"], kernel=p["kernel"],
                 alike=p["alike"])
    return keep(score, p, recent=p["window"], every=p["every"])


def _knorm(p: Mapping[str, Any]) -> Axes:
    return keep(Term("keynorm"), p, every=1 if p["decode"] else 0)


def _random(p: Mapping[str, Any]) -> Axes:
    return keep(term("random", seed=p["seed"]), p)


def _keydiff(p: Mapping[str, Any]) -> Axes:
    return keep(Term("keydiff"), p, every=p["every"])


def _expected(p: Mapping[str, Any]) -> Axes:
    return keep(term("expected", future=p["future"], sinks=p["sinks"], covariance=p["covariance"],
                     values=p["values"], eps=p["eps"]), p)


def _lagkv(p: Mapping[str, Any]) -> Axes:
    score, length = term("lag", length=p["length"], sinks=p["sinks"]), p["length"]
    if not p["decode"]:
        return keep(score, p)
    if p["budget"] is not None:
        raise RecipeError("lagkv: decode=true keeps a share of every part: give ratio=, not "
                          "budget=")
    least = length - max(1, int(length * p["ratio"] + 1e-9))           # the rank of those that stay
    return {"keep.score": score, "keep.every": 1,
            "keep.budget": term("threshold", at=(least - 0.5) / length)}


def _finch(p: Mapping[str, Any]) -> Axes:
    score = term("window", window=p["window"], kernel=1, visible=True)
    options = {"length": p["length"], "ratio": p["ratio"]}
    return {"keep.score": term("parts", of=score, **options),
            "keep.budget": term("parts", **options), "keep.positions": p["positions"]}


def _cake(p: Mapping[str, Any]) -> Axes:
    score = term("window", window=p["window"], kernel=p["kernel"], pool=p["pool"],
                 gamma=p["gamma"])
    return keep(score, p, "cake", ("window", p["window"]), ("t1", p["t1"]), ("t2", p["t2"]))


def _simlayerkv(p: Mapping[str, Any]) -> Axes:
    options = tuple((name, p[name]) for name in ("sinks", "recent", "above", "queries"))
    return {"keep.score": Term("recency"), "keep.budget": Term("lazy", options),
            "keep.sinks": p["sinks"], "keep.recent": p["recent"], "keep.every": 1}


def _kvzip(p: Mapping[str, Any]) -> Axes:
    return keep(Term("repeat"), p, "everywhere", ("floor", p["floor"]), sinks=p["sinks"])


def _streaming(p: Mapping[str, Any]) -> Axes:
    return keep(Term("recency"), p, sinks=p["sinks"], positions=p["positions"])


METHODS: tuple[Method, ...] = (
    chosen(
        "snapkv", 2048, *WINDOW,
        title="SnapKV", paper="arXiv:2404.14469",
        axes=_snapkv,
        note="after the prompt each head keeps what its last queries look at; what follows is all "
        "kept",
    ),
    chosen(
        "pyramidkv", 2048, *WINDOW, Param("beta", 20.0, minimum=1.0,
                help="the mean budget over the smallest, the windows left out"),
        title="PyramidKV", paper="arXiv:2406.02069",
        axes=_pyramidkv, note="SnapKV's scores; lower layers keep more than higher ones",
    ),
    chosen(
        "h2o", 0.2, Param("recent", 0.5, minimum=0.0, maximum=1.0,
                help="share of the budget that the newest tokens take"),
        Param("how", "sum", choices=("sum", "mean"),
              help="weights are added up, or divided by the queries that see the token"),
        title="H2O, heavy hitters", paper="arXiv:2306.14048",
        axes=_h2o,
        note="half the newest tokens, half those that received most attention; every step adds its "
        "own and evicts one",
    ),
    chosen(
        "tova", 512,
        title="TOVA", paper="arXiv:2401.06104",
        axes=_tova,
        note="every step evicts the token that its query attends to least, mean over the heads",
    ),
    chosen(
        "scissorhands", 512, Param("history", 400, minimum=1, help="queries that are counted"),
        Param("recent", 10, minimum=1, help="newest tokens that stay"),
        Param("every", 256, minimum=1, help="tokens over the budget that are dropped "
              "together"),
        title="Scissorhands", paper="arXiv:2305.17118",
        axes=_scissorhands,
        note="what got less than its share of attention most often leaves, many tokens at a time",
    ),
    chosen(
        "r-kv", 1024, Param("every", 128, minimum=1, help="tokens between compressions"),
        Param("mix", 0.1, minimum=0.0, maximum=1.0,
              help="weight of importance against redundancy"),
        Param("window", 8, minimum=1, help="newest tokens, which look and stay"),
        Param("kernel", 7, minimum=1, help="neighbours that importance is smoothed over"),
        Param("alike", 0.5, help="cosine above which a later key is a duplicate"),
        title="R-KV", paper="arXiv:2505.24133",
        axes=_rkv,
        note="for long reasoning: redundant keys leave first. While decoding, importance is a "
        "running mean of the steps' attention",
    ),
    chosen(
        "knorm", 0.5, Param("decode", False, help="evict while decoding, too"),
        title="L2 norm", paper="arXiv:2406.11430",
        axes=_knorm, note="keys of small norm stay; layers=2: is the paper's choice",
    ),
    chosen(
        "random", 0.5, Param("seed", 0, minimum=0, help="of the draw"),
        title="Random eviction", paper="arXiv:2404.14469",
        axes=_random, note="no method at all: what the others have to beat",
    ),
    chosen(
        "keydiff", 0.5, Param("every", 0, minimum=0, help="tokens over the budget that are dropped "
              "together, while decoding, too; 0: choose once, of the prompt"),
        title="KeyDiff", paper="arXiv:2504.15364",
        axes=_keydiff, note="keys unlike the mean key stay",
    ),
    chosen(
        "expected_attention", 0.5, Param("future", 512, minimum=1,
                help="positions that queries are expected from"), *PROTECT,
        Param("covariance", True, help="use the queries' covariance"),
        Param("values", True, help="times the norm of V"),
        Param("eps", 0.0, minimum=0.0, help="added before that"),
        title="Expected attention", paper="arXiv:2510.00636",
        axes=_expected, note="query-agnostic: attention expected from queries yet to come",
    ),
    chosen(
        "lagkv", 0.5, Param("length", 128, minimum=2, help="tokens of a part"),
        *PROTECT, Param("decode", False, help="cut every part to its share when the next one is "
                        "complete, while decoding, too"),
        title="LagKV", paper="arXiv:2504.04704",
        axes=_lagkv, note="tokens unlike those of the next part stay; no attention is needed",
    ),
    Method(
        name="finch", title="FINCH", paper="arXiv:2408.00167", family="selection",
        params=(Param("ratio", 0.5, minimum=0.001, maximum=1.0, help="share that is kept"),
        Param("window", 64, minimum=1, help="last tokens, unless question_length says"),
        Param("length", 512, minimum=1, help="tokens of a part that is cut by itself"),
        Param("positions", "rerotated", choices=("rerotated", "original"),
              help="of kept keys: side by side, or where they were")),
        axes=_finch,
        note="what the question looks at stays, the best of every part",
    ),
    chosen(
        "cake", 1024, *WINDOW, Param("gamma", 200.0, minimum=0.0,
                help="weight of the variance over the queries"),
        Param("t1", 1.6, minimum=0.01, help="temperature of the entropy"),
        Param("t2", 0.4, minimum=0.01, help="temperature of the variance"),
        title="CAKE", paper="arXiv:2503.12491",
        axes=_cake, note="layers share one budget by how widely and how changeably they attend",
    ),
    Method(
        name="simlayerkv", title="SimLayerKV", paper="arXiv:2410.13846", family="selection",
        params=(Param("above", 0.9, minimum=0.0, maximum=1.0, help="mass that makes a layer lazy"),
        *PROTECT, Param("recent", 1024, minimum=1, help="newest tokens of a lazy layer"),
        Param("queries", 1, minimum=1, help="last queries that are asked")),
        axes=_simlayerkv, note="lazy layers, found for every prompt, keep first and newest tokens",
    ),
    chosen(
        "kvzip", 0.3, *PROTECT, Param("floor", 0.0, minimum=0.0, maximum=1.0,
                help="share of its budget that each head is sure of"),
        title="KVzip", paper="arXiv:2505.23416",
        axes=_kvzip,
        note="query-agnostic: what the prompt, read again, looks at stays, over all "
        "heads and layers; costs a second, longer prefill",
    ),
    chosen(
        "streamingllm-slots", 1024, *PROTECT, Param("positions", "rerotated",
                choices=("rerotated", "original"), help="of kept keys: side by side, or original"),
        title="StreamingLLM, positions in the cache",
        paper="arXiv:2309.17453", family="streaming",
        axes=_streaming,
        note="first and newest tokens of a prompt, the keys turned to lie side by "
        "side",
    ),
)
