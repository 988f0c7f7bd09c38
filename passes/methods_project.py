"""Methods of the axis `rank`: projections of lower rank, whose latents are cached instead of K, V.

Axes set here: see `passes/project.py`; `recompute=rope` lets `place` rebuild keys from their
latents at read, since the rotation stands between the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompile.method import Axes, Method, Param
from kvcompile.passes.methods import by_token, groups, residual


def _palu(p: Mapping[str, Any]) -> Axes:
    axes = {"rank.heads": p["heads"], "rank.k": p["ratio"], "rank.v": p["ratio"],
            "rank.text": p["whiten"], "rank.rotate": p["hadamard"], "rank.multiple": p["multiple"],
            "recompute": "rope"}
    return axes if p["energy"] is None else {**axes, "rank.energy": p["energy"]}


def _lorc(p: Mapping[str, Any]) -> Axes:
    return {"rank.heads": WHOLE, "rank.k": p["most"], "rank.v": p["most"],
            "rank.least": p["least"], "rank.multiple": p["multiple"], "recompute": "rope"}


def _joint(p: Mapping[str, Any]) -> Axes:
    return {"rank.heads": WHOLE, "rank.k": p["ratio"], "rank.v": p["ratio"], "rank.joint": True,
            "rank.text": p["whiten"], "rank.multiple": p["multiple"], "recompute": "rope"}


def _xquant(p: Mapping[str, Any]) -> Axes:
    text = f"int(bits={p['bits']}, axis=token, group={p['group']})"
    return {"recompute": "hidden", **by_token(text, p["residual"])}


WHOLE = 1 << 16  # more kv heads than a layer has
MULTIPLE = Param("multiple", 16, choices=(1, 2, 4, 8, 16, 32, 64), help="ranks are multiples")
WHITEN = Param("whiten", True, help="nearest on the calibration text, not in the weights")

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
            WHITEN,
            Param("hadamard", False, help="latents turned by a Hadamard matrix, for quantization"),
            MULTIPLE,
        ),
        axes=_palu,
        note="one rank for all layers (or one energy) instead of the paper's search by Fisher "
        "information; kv heads are grouped by as many as divide them",
    ),
    Method(
        name="lorc",
        title="LoRC",
        paper="arXiv:2410.03111",
        family="low rank",
        params=(
            Param("most", 0.8, minimum=0.01, maximum=1.0, help="fraction of the channels that the "
                  "most sensitive layer keeps"),
            Param("least", 0.4, minimum=0.01, maximum=1.0, help="that of the least sensitive one"),
            MULTIPLE,
        ),
        axes=_lorc,
        note="SVD of all heads' weights at once; layers in between by the logarithm of the product "
        "of the condition numbers that amplify their error",
    ),
    Method(
        name="jointkv",
        title="Joint latent of K and V",
        paper="arXiv:2502.14837",
        family="low rank",
        params=(
            Param("ratio", 0.5, minimum=0.01, maximum=1.0, help="rank of the latent as a fraction "
                  "of K's and V's channels together"),
            WHITEN,
            MULTIPLE,
        ),
        axes=_joint,
        note="MHA2MLA's joint SVD of K's and V's weights, balanced as TransMLA's; the rotation is "
        "kept whole and keys are rebuilt at read, where the papers rotate a part of them and "
        "fine-tune",
    ),
    Method(
        name="xquant",
        title="XQuant",
        paper="arXiv:2508.10395",
        family="low rank",
        params=(
            Param("bits", 4, choices=(2, 4, 8), help="bits of a stored number"),
            groups("channels of a token"),
            residual(default=0),
        ),
        axes=_xquant,
        note="what K and V are projected from is cached, once for both, where it is narrower than "
        "they are together (not with few kv heads, for which the paper factors the projections)",
    ),
)
