"""Methods that drop channels of keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompile.method import Axes, Method, Param
from kvcompile.passes.entries import term
from kvcompile.recipe import Term


def _think(p: Mapping[str, Any]) -> Axes:
    options = {name: p[name] for name in ("drop", "window", "recent")}
    return {"keep.channels": term("energy", **options),
            "format.k": term("channels", of=p["of"], drop=p["drop"]), "block.k": 128,
            "lag.k": p["recent"]}


METHODS: tuple[Method, ...] = (
    Method(
        name="think", title="ThinK", paper="arXiv:2407.21018", family="selection",
        params=(Param("drop", 0.5, minimum=0.0, maximum=0.95, help="share of K's channels that "
                      "each head drops"),
                Param("window", 32, minimum=1, help="last queries that are asked"),
                Param("recent", 32, minimum=0, help="newest keys that are kept whole"),
                Param("of", Term("dense"), help="the format of the channels that stay")),
        axes=_think,
        note="each head stores the channels of K that its last queries weigh most, and reads them "
        "with these channels of q; generated keys drop theirs, by norm, in blocks of 128",
    ),
)
