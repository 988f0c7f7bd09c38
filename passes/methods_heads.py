"""Methods around a method, and those that give every head a budget of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvcompile.errors import RecipeError
from kvcompile.method import Axes, Method, Param, find_method
from kvcompile.passes.entries import PROTECT, WINDOW, chosen, keep, sized, term, window
from kvcompile.recipe import Term

if TYPE_CHECKING:
    from kvcompile.calibration.samples import Sample, Samples


def scorer(default: str = "snapkv") -> Param:
    return Param("scorer", Term(default), help="the method that scores tokens, as a term")


def wrapped(p: Mapping[str, Any]) -> dict[str, Any]:
    """The axes of the method that `scorer` names, with this one's budget."""
    inner = p["scorer"]
    method = find_method(inner)
    given = [name for name in ("budget", "ratio") if inner.get(name) is not None]
    if given:
        raise RecipeError(f"{inner}: {given[0]} belongs to the method around it")
    (_, value), = sized(p)
    size = "ratio" if p["budget"] is None else "budget"
    if size not in method.defaults:
        known = [n for n in ("budget", "ratio") if n in method.defaults]
        why = f"takes {known[0]}= only" if known else "has no budget that another could set"
        raise RecipeError(f"{inner.name} {why}")
    axes = method.axes(method.bind(Term(inner.name, (*inner.args, (size, value)))))
    if not isinstance(axes, Mapping):
        raise RecipeError(f"{inner.name} says for each layer what it keeps, and cannot be wrapped "
                          "yet")
    if "keep.score" not in axes:
        raise RecipeError(f"{inner.name} does not score tokens")
    return dict(axes)


def _adakv(p: Mapping[str, Any]) -> Axes:
    axes = wrapped(p)
    blend = {"blend": True} if p["safeguard"] == "mean" else {}
    return axes | {"keep.budget": term("pooled", of=axes["keep.budget"], floor=p["floor"], **blend)}


def _criticalkv(p: Mapping[str, Any]) -> Axes:
    axes = wrapped(p)
    return axes | {"keep.score": term("critical", of=axes["keep.score"], count=axes["keep.budget"],
                                      first=p["first"], eps=p["eps"]), "keep.every": 0}


def _chunkkv(p: Mapping[str, Any]) -> Axes:
    axes, length = wrapped(p), p["length"]
    return axes | {"keep.score": term("chunks", of=axes["keep.score"], length=length),
                   "keep.budget": Term("chunks", (*sized(p), ("length", length))), "keep.every": 0}


def _dms(p: Mapping[str, Any]) -> Axes:
    axes = wrapped({**p, "budget": None, "ratio": 1.0})
    return axes | {"keep.budget": term("threshold", at=p["threshold"]), "keep.recent": p["delay"],
                   "keep.every": 1}


def _streams(heads: Sequence[int], p: Mapping[str, Any]) -> Axes:
    """Heads that are 0 keep first and newest tokens, those that are 1 everything."""
    each = tuple(0 if full else p["sinks"] + p["recent"] for full in heads)
    budget = Term("byhead", (("of", each), *((("share", p["share"]),) if "share" in p else ())))
    return {"keep.score": Term("recency"), "keep.budget": budget, "keep.sinks": p["sinks"],
            "keep.every": 1, **({"keep.merge": Term("rest")} if p.get("compensate") else {})}


def _duoattention(p: Mapping[str, Any]) -> list[Axes]:
    """Before calibration, as an example, every second head streams."""
    return [_streams(heads, p) for heads in p["heads"] or [(1, 0)] * len(p["layers"])]


def retrieval(samples: Sequence[Sample], sinks: int, recent: int) -> list[torch.Tensor]:
    """[H] for each layer: the mean attention mass that the last half of the text gives to tokens
    that are neither among the first `sinks` nor the newest `recent`."""
    from kvcompile.prompt import Prompt

    out = []
    for s in samples:
        total, queries = torch.zeros(s.k.shape[1]), 0
        for q, k, v in zip(s.q, s.k, s.v, strict=True):
            tokens = k.shape[1]
            x = Prompt(q, k, v, torch.arange(tokens), s.scale, s.softcap, tokens)
            row = tokens // 2
            for w in x.weights(row):
                rows = torch.arange(row, row + w.shape[2])[:, None]
                at = torch.arange(tokens)
                far = (at >= sinks) & (at <= rows - recent)
                total += (w.mean(1) * far).sum((1, 2)).cpu()
                row += w.shape[2]
            queries += tokens - tokens // 2
        out.append(total / queries)
    return out


def _top(scores: Sequence[torch.Tensor], share: float) -> tuple[tuple[int, ...], ...]:
    """1 for the `share` of all heads with the largest scores, 0 for the others."""
    flat = torch.cat(list(scores))
    best = torch.zeros(len(flat), dtype=torch.int64)
    best[flat.argsort(descending=True, stable=True)[: round(share * len(flat))]] = 1
    return tuple(tuple(part.tolist()) for part in best.split([len(s) for s in scores]))


def pattern(file: str, layers: int) -> list[torch.Tensor]:
    """What a published pattern says of each layer's kv heads: a line a layer, numbers from 0, which
    streams, to 1, between tabs. Raises RecipeError for anything else."""
    where = f"duoattention: file={json.dumps(file)}"
    try:
        lines = Path(file).read_text().splitlines()
        rows = [[float(x) for x in line.split()] for line in lines if line.strip()]
    except OSError as error:
        raise RecipeError(f"{where} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"{where} is no pattern of heads: {error}") from None
    if len(rows) != layers or len({*map(len, rows)}) != 1:
        heads = " or ".join(map(str, sorted({*map(len, rows)}))) or "no"
        raise RecipeError(f"{where} is a pattern of {len(rows)} layers of {heads} kv heads, but "
                          f"{layers} layers are to have one")
    return [torch.tensor(row).clamp(0, 1) for row in rows]


def _calibrate_duo(p: Mapping[str, Any], samples: Samples) -> Axes:
    if p["file"]:
        return {"heads": _top(pattern(p["file"], len(samples.layers)), p["full"])}
    tokens = samples.ids.shape[1]
    recent = min(p["recent"], tokens // 8)
    return {"heads": _top(retrieval(samples.attention, min(p["sinks"], tokens // 16), recent),
                          p["full"])}


def _calibrate_razor(p: Mapping[str, Any], samples: Samples) -> Axes:
    """Echo and induction scores on random tokens that stand four times."""
    from kvcompile.calibration.samples import Samples as Reader

    length = min(samples.ids.shape[1], 512) // 4
    random = torch.Generator().manual_seed(0)
    once = torch.randint(int(samples.ids.max()) + 1, (1, length), generator=random)
    text = Reader(samples.gm, once.repeat(1, 4).to(samples.ids.device), samples.layers)
    both = [echoes(s, length) for s in text.attention]
    full = [_top([pair[i] for pair in both], p[name]) for i, name in enumerate(("echo",
                                                                               "induction"))]
    return {"heads": tuple(tuple(max(pair) for pair in zip(*layers, strict=True))
                           for layers in zip(*full, strict=True))}


def echoes(s: Sample, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[H] each: the mean weight on the same token earlier, and on the one after it; the largest of
    a kv head's query heads. The text repeats every `length` tokens."""
    from kvcompile.prompt import Prompt

    tokens = s.k.shape[2]
    x = Prompt(s.q[0], s.k[0], s.v[0], torch.arange(tokens), s.scale, s.softcap, tokens)
    found, row, at = [torch.zeros(x.queries.shape[:2]) for _ in range(2)], length, torch.arange(
        tokens)
    for w in x.weights(length):
        back = torch.arange(row, row + w.shape[2])[:, None] - at
        for total, off in zip(found, (0, -1), strict=True):
            total += (w * ((back + off) % length == 0).logical_and(back > 0)).sum((2, 3)).cpu()
        row += w.shape[2]
    return tuple(f.amax(1) / (tokens - length) for f in found)  # type: ignore[return-value]


def _headkv(p: Mapping[str, Any]) -> list[Axes]:
    importance = [torch.tensor(heads) for heads in p["heads"] or [(1.0, 1.0)] * len(p["layers"])]
    total, heads = float(sum(i.sum() for i in importance)) or 1.0, sum(map(len, importance))
    spare = p["budget"] - p["window"]
    pot = int(spare // p["beta"])                       # a head, given out by importance
    return [{"keep.score": window(p), "keep.budget": term("byhead", of=tuple(
        p["window"] + spare - pot + round(heads * pot * float(x) / total) for x in layer))}
        for layer in importance]


def _calibrate_headkv(p: Mapping[str, Any], samples: Samples) -> Axes:
    tokens = samples.ids.shape[1]
    scores = retrieval(samples.attention, min(4, tokens // 16), tokens // 8)
    return {"heads": tuple(tuple(round(float(x), 6) for x in layer) for layer in scores)}


def _qfilters(p: Mapping[str, Any]) -> list[Axes]:
    return [keep(term("filter", directions=layer), p)
            for layer in p["filters"] or [((1.0,),)] * len(p["layers"])]


def _calibrate_qfilters(p: Mapping[str, Any], samples: Samples) -> Axes:
    """-u of each kv head: u is the first right singular vector of a query head's queries, on the
    side of their mean; the mean over the query heads."""
    every = []
    for s in samples.attention:
        q = s.q.float().transpose(0, 1).flatten(1, 2)                       # [Hq, N T, D]
        u = torch.linalg.svd(q, full_matrices=False).Vh[:, 0]
        u = u * torch.sign((q @ u[..., None]).mean(1))
        mean = -u.unflatten(0, (s.k.shape[1], -1)).mean(1)
        every.append(tuple(tuple(round(x, 5) for x in head) for head in mean.tolist()))
    return {"filters": tuple(every)}


SMOOTH = (WINDOW[0], replace(WINDOW[1], default=7), replace(WINDOW[2], default="max"))
HEADS = Param("heads", None, calibrated=True, help="for each layer, a number for each kv head")
STREAMS = (Param("recent", 256, minimum=1, help="newest tokens that a streaming head keeps"),)

METHODS: tuple[Method, ...] = (
    chosen(
        "adakv", 1024, scorer(),
        Param("floor", 0.2, minimum=0.0, maximum=1.0, help="share of its budget that each head is "
              "sure of"),
        Param("safeguard", "first", choices=("first", "mean"), help="first: a head's best tokens "
              "up to that come before all others; mean: numbers of tokens are drawn towards their "
              "mean by that share, as in the paper"),
        title="Ada-KV", paper="arXiv:2407.11550", axes=_adakv,
        note="the heads of a layer share one budget; any method that scores tokens can be wrapped",
    ),
    chosen(
        "criticalkv", 0.5, scorer(),
        Param("first", 0.5, minimum=0.0, maximum=1.0, help="share kept by the scorer alone"),
        Param("eps", 1e-4, minimum=0.0, help="added to scores"),
        title="CriticalKV", paper="arXiv:2502.03805", axes=_criticalkv,
        note="half by the scorer, half by what would be lost in the output: score times |W_o v|",
    ),
    chosen(
        "chunkkv", 0.5, scorer(), Param("length", 10, minimum=1, help="tokens of a chunk"),
        title="ChunkKV", paper="arXiv:2502.00299", axes=_chunkkv,
        note="whole chunks stay, the same for all heads of a layer",
    ),
    Method(
        name="dms", title="Delayed threshold", paper="arXiv:2506.05345", family="selection",
        params=(scorer("knorm"), Param("threshold", 0.0, help="tokens that score less leave"),
                Param("delay", 128, minimum=1, help="tokens that follow before they do")),
        axes=_dms, note="DMS's schedule over any scorer of single tokens; its own gate is trained",
    ),
    Method(
        name="duoattention", title="DuoAttention", paper="arXiv:2410.10819", family="selection",
        params=(Param("full", 0.5, minimum=0.0, maximum=1.0, help="share of heads that keep all"),
                Param("sinks", 64, minimum=0, help="first tokens that a streaming head keeps"),
                *STREAMS, HEADS, Param("file", "", help="the authors' pattern for the model, such "
                                       "as full_attention_heads.tsv, to read heads from")),
        axes=_duoattention, calibrate=_calibrate_duo,
        note="the share `full` of all heads keeps everything, by a published pattern, or by "
        "attention mass, which calibration measures instead of training",
    ),
    Method(
        name="razorattention", title="RazorAttention", paper="arXiv:2407.15891",
        family="selection",
        params=(Param("echo", 0.01, minimum=0.0, maximum=1.0, help="share of heads, by echo score"),
                Param("induction", 0.14, minimum=0.0, maximum=1.0, help="share by induction score"),
                *PROTECT, Param("recent", 4000, minimum=1, help="newest tokens the others keep"),
                Param("share", 0.2, minimum=0.0, maximum=1.0, help="or that share, if it is more"),
                Param("compensate", True, help="one token stands for all that a head drops"),
                HEADS),
        axes=_duoattention, calibrate=_calibrate_razor,
        note="retrieval heads keep all, others first and newest tokens, and the mean of "
        "the dropped ones with their weight",
    ),
    Method(
        name="headkv", title="HeadKV", paper="arXiv:2410.19258", family="selection",
        params=(Param("budget", 1024, minimum=1, help="tokens that a head keeps, on average"),
                Param("beta", 1.2, minimum=1.005, help="the mean budget over what is given out by "
                      "importance"), *SMOOTH, HEADS),
        axes=_headkv, calibrate=_calibrate_headkv,
        note="a static share of the budget by head importance, SnapKV inside a head. Calibration "
        "measures attention mass far back, not the paper's needle task",
    ),
    chosen(
        "qfilters", 0.5, Param("filters", None, calibrated=True,
                               help="for each layer and kv head, a direction"),
        title="Q-Filters", paper="arXiv:2503.02812", axes=_qfilters, calibrate=_calibrate_qfilters,
        note="keys far along the direction that queries share stay",
    ),
)
