"""Methods of the axis `rank`: projections of lower rank, whose latents are cached instead of K, V.

Axes set here: see `passes/project.py`; `recompute=rope` lets `place` rebuild keys from their
latents at read, since the rotation stands between the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompile.method import Axes, Method, Param


def _palu(p: Mapping[str, Any]) -> Axes:
    axes = {"rank.heads": p["heads"], "rank.k": p["ratio"], "rank.v": p["ratio"],
            "rank.text": p["whiten"], "rank.rotate": p["hadamard"], "rank.multiple": p["multiple"],
            "recompute": "rope"}
    return axes if p["energy"] is None else {**axes, "rank.energy": p["energy"]}


METHODS = (
    Method(
        name="palu",
        title="Palu",
        paper="arXiv:2407.21118",
        family="low rank",
        params=(
            Param("ratio", 0.5, minimum=0.01, maximum=1.0, help="ranks as the kept fraction of a "
                  "group's channels"),
            Param("heads", 4, minimum=1, help="kv heads that are factored together (G-LRD)"),
            Param("energy", None, minimum=0.01, maximum=1.0, help="instead of ratio: the share of "
                  "the outputs' squares that every layer keeps"),
            Param("whiten", True, help="nearest on the calibration text, not in the weights"),
            Param("hadamard", False, help="latents turned by a Hadamard matrix, for quantization"),
            Param("multiple", 16, choices=(1, 2, 4, 8, 16, 32, 64), help="ranks are multiples"),
        ),
        axes=_palu,
        note="one rank for all layers (or one energy) instead of the paper's search by Fisher "
        "information; kv heads are grouped by as many as divide them",
    ),
)
