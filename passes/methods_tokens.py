"""Methods that keep tokens of some classes: separators, punctuation, special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from string import punctuation
from typing import TYPE_CHECKING, Any

from kvcompile.calibration.tokens import checked_ids, ids_where, tokenizer_of
from kvcompile.method import Axes, Method, Param
from kvcompile.passes.entries import PROTECT, term

if TYPE_CHECKING:
    from kvcompile.calibration.samples import Samples

SEPARATORS = {"", ".", ",", "?", "!", ";", ":", "\t", "\n"}  # or after a space


def ids(name: str, what: str) -> Param:
    return Param(name, None, calibrated=True, by="tokenizer=tokenizer",
                 help=f"token ids of {what}, which a tokenizer tells")


def separates(text: str) -> bool:
    return bool(text) and text.removeprefix(" ") in SEPARATORS


def punctuates(text: str) -> bool:
    mark = text.removeprefix(" ")
    return len(mark) == 1 and mark in punctuation


def _sepllm(p: Mapping[str, Any]) -> Axes:
    known = checked_ids("sepllm", "separators", p["separators"] or ())
    return {"keep.score": term("listed", ids=known),
            "keep.budget": term("threshold", at=0.0, tokens=p["most"]),
            "keep.sinks": p["sinks"], "keep.recent": p["recent"], "keep.every": p["every"]}


def _separators(p: Mapping[str, Any], samples: Samples) -> Axes:
    return {"separators": ids_where(tokenizer_of(samples, "sepllm", "separators"), separates)}


def _fastgen(p: Mapping[str, Any]) -> Axes:
    known = {name: checked_ids("fastgen", name, p[name] or ()) for name in CLASSES}
    score = term("policies", **known, **{n: p[n] for n in ("frequent", "local", "recover")})
    return {"keep.score": score, "keep.budget": term("policies", of=score),
            "keep.every": p["every"]}


CLASSES = ("special", "punctuation")


def _classes(p: Mapping[str, Any], samples: Samples) -> Axes:
    missing = next(name for name in CLASSES if p[name] is None)
    tokenizer = tokenizer_of(samples, "fastgen", missing)
    return {"special": tuple(sorted({*tokenizer.all_special_ids})),
            "punctuation": ids_where(tokenizer, punctuates)}


METHODS: tuple[Method, ...] = (
    Method(
        name="sepllm", title="SepLLM", paper="arXiv:2412.12094", family="selection",
        params=(*PROTECT, ids("separators", "punctuation and white space that end a segment"),
                Param("recent", 256, minimum=1, help="newest tokens that stay"),
                Param("most", 0, minimum=0, help="separators that stay, the newest; 0: all"),
                Param("every", 1, minimum=0, help="tokens that leave together while decoding; 0: "
                      "what follows the prompt is all kept")),
        axes=_sepllm, calibrate=_separators,
        note="first tokens, separators and newest tokens stay. The prompt itself is read whole, "
        "positions are the original ones",
    ),
    Method(
        name="fastgen", title="FastGen", paper="arXiv:2310.01801", family="selection",
        params=(Param("recover", 0.95, minimum=0.0, maximum=1.0,
                      help="share of the prompt's attention that a head's policy must show"),
                Param("frequent", 0.3, minimum=0.0, maximum=1.0,
                      help="share of the tokens so far that heavy hitters take"),
                Param("local", 0.3, minimum=0.0, maximum=1.0,
                      help="share that the newest tokens take"),
                ids("special", "special tokens"), ids("punctuation", "punctuation marks"),
                Param("every", 1, minimum=0, help="tokens that leave together while decoding; 0: "
                      "what follows the prompt is all kept")),
        axes=_fastgen, calibrate=_classes,
        note="each head keeps special tokens; these and punctuation; these and heavy hitters; "
        "these and the newest; or all: the first that recovers enough of the prompt's attention. "
        "While decoding it goes on so",
    ),
)
