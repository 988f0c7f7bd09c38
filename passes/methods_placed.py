"""Methods that change what K and V are made of, and leave it to `place` what is cached.

Axes set here: `heads.*` (`passes/heads.py`), `rope.*` (`passes/partial.py`), `rank.*`
(`passes/project.py`) and `recompute` (`passes/place.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompile.method import Axes, Method, Param
from kvcompile.passes.methods import by_token, groups, residual
from kvcompile.passes.methods_project import MULTIPLE, WHITEN, WHOLE


def _gqa(p: Mapping[str, Any]) -> Axes:
    group = {"heads.group": p["heads"], "heads.by": p["group"], "heads.turn": p["align"]}
    if p["by"] == "mean":
        return {**group, "heads.mean": True}
    moved = p["align"] or p["group"] != "place"
    return {**(group if moved else {}), "rank.heads": p["heads"], "rank.k": "head",
            "rank.v": "head", "rank.text": True, "rank.after": True}


def _mla(p: Mapping[str, Any]) -> Axes:
    return {"rope.keep": p["rope"], "rope.by": p["by"], "rank.heads": WHOLE, "rank.joint": True,
            "rank.k": p["ratio"], "rank.v": p["ratio"], "rank.text": p["whiten"],
            "rank.multiple": p["multiple"]}


def _transmla(p: Mapping[str, Any]) -> Axes:
    return {"rope.keep": 1.0, "rope.by": "mixed", "rope.fold": p["fold"], "rank.heads": WHOLE,
            "rank.joint": True, "rank.k": p["ratio"], "rank.v": p["ratio"], "rank.text": True,
            "rank.multiple": p["multiple"]}


def _xquant(p: Mapping[str, Any]) -> Axes:
    text = f"int(bits={p['bits']}, axis=token, group={p['group']})"
    return {"recompute": "hidden", **by_token(text, p["residual"])}


METHODS = (
    Method(
        name="gqa",
        title="Grouped-query attention from more kv heads",
        paper="arXiv:2305.13245",
        family="low rank",
        params=(
            Param("heads", 2, minimum=2, help="kv heads that become one, or as many as divide "
                  "them"),
            Param("by", "mean", choices=("mean", "svd"), help="what a group becomes: the mean of "
                  "its heads' weights, or the principal channels, as many as a head has, of "
                  "all its rotated keys and values on a text (arXiv:2406.07056)"),
            Param("group", "place", choices=("place", "cosine", "cka"), help="neighbours, or "
                  "heads whose K and V are alike on a text; weights are reordered exactly"),
            Param("align", False, help="first turn a group's heads into one basis, exactly, by "
                  "Procrustes on a text (arXiv:2412.20677)"),
        ),
        axes=_gqa,
        note="the published conversions train the model afterwards, kvcompile does not",
    ),
    Method(
        name="mha2mla",
        title="MHA2MLA",
        paper="arXiv:2502.14837",
        family="low rank",
        params=(
            Param("rope", 0.25, minimum=0.01, maximum=1.0, help="share of each head's rotary "
                  "pairs that stay"),
            Param("by", "norm", choices=("norm", "high", "low", "uniform"), help="which: those of "
                  "the largest |q_pair| |k_pair| on a text, of high or low frequency, or evenly "
                  "spread"),
            Param("ratio", 0.5, minimum=0.01, maximum=1.0, help="rank of the latent as a fraction "
                  "of the channels of V and of K's without rotation"),
            WHITEN,
            MULTIPLE,
        ),
        axes=_mla,
        note="cached are one latent for V and K's unrotated channels, absorbed as in DeepSeek's "
        "models, and each kv head's rotary channels; balanced as TransMLA's (arXiv:2502.07864). "
        "The paper fine-tunes afterwards; without that much is lost",
    ),
    Method(
        name="transmla",
        title="TransMLA",
        paper="arXiv:2502.07864",
        family="low rank",
        params=(
            Param("ratio", 0.5, minimum=0.01, maximum=1.0, help="rank of the latent as a fraction "
                  "of K's and V's channels"),
            Param("fold", 1, choices=(1, 2, 4, 8, 16, 32), help="neighbouring rotary pairs that "
                  "are mixed as if they had one frequency (FreqFold)"),
            MULTIPLE,
        ),
        axes=_transmla,
        note="cached are one latent, for V and what K has without rotation, and one rotary head "
        "for all kv heads, the mixture of them that carries most (RoRoPE), as in DeepSeek's "
        "models. The paper fine-tunes afterwards; its collapse of the rotary head is missing",
    ),
    Method(
        name="slim",
        title="SLIM attention",
        paper="arXiv:2503.05840",
        family="low rank",
        params=(),
        axes=lambda p: {"recompute": "keys"},
        note="only K is cached, before its rotation, and V computed from it, where W_k is square "
        "and can be inverted; errors of K, of a format for instance, come back enlarged in V",
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
