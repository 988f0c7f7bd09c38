"""Methods of the axis `rank`: projections of lower rank, whose latents are cached instead of K, V.

Axes set here: see `passes/project.py`; `recompute=rope` lets `place` rebuild keys from their
latents at read, since the rotation stands between the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvcompile.calibration.fisher import fisher, shares
from kvcompile.calibration.greedy import LEVELS, costs, greedy
from kvcompile.calibration.samples import Samples
from kvcompile.errors import RecipeError
from kvcompile.ir import attention_nodes
from kvcompile.method import Axes, Method, Param
from kvcompile.passes.targets import Target, target
from kvcompile.recipe import Term
from kvcompile.store import SIDES


def _palu(p: Mapping[str, Any]) -> Axes | list[Axes]:
    if p["energy"] is not None and p["ranks"] != ():
        raise RecipeError("energy= and ranks= both say how much layers keep: give one of them")
    axes = {"rank.heads": p["heads"], "rank.k": p["ratio"], "rank.v": p["ratio"],
            "rank.text": p["whiten"], "rank.rotate": p["hadamard"], "rank.multiple": p["multiple"],
            "recompute": "rope"}
    if p["energy"] is not None:
        axes["rank.energy"] = p["energy"]
    return _by_layer(axes, p)


def _recalkv(p: Mapping[str, Any]) -> Axes | list[Axes]:
    return _by_layer({
        "heads.group": p["heads"], "heads.by": "cka", "rank.heads": p["heads"],
        "rank.heads.v": WHOLE, "rank.k": p["ratio"], "rank.v": p["ratio"], "rank.text": True,
        "rank.multiple": p["multiple"], "recompute": "rope"}, p)


def _matryoshka(p: Mapping[str, Any]) -> Axes | list[Axes]:
    return _by_layer({
        "rank.heads": 1, "rank.k": p["ratio"], "rank.v": p["ratio"], "rank.text": True,
        "rank.after": True, "rank.multiple": p["multiple"], **_file(p)}, p)


def _by_layer(axes: Axes, p: Mapping[str, Any]) -> Axes | list[Axes]:
    """`axes`, with K's and V's ranks of each claimed layer where there are any."""
    ranks = p["ranks"] or ()
    if not ranks:
        return axes
    if any(not isinstance(own, tuple) or len(own) != 2 or not all(
            type(x) in (int, float) and 0 < x <= 1 for x in own) for own in ranks):
        raise RecipeError(f"{Term('ranks', (('of', ranks),))}: must be a list of [K, V], the "
                          "fractions of its channels that each claimed layer keeps")
    return [{**axes, "rank.k": float(k), "rank.v": float(v)} for k, v in ranks]


def _by_fisher(p: Mapping[str, Any], samples: Samples) -> Axes:
    """Fractions of K's and V's channels in proportion to the projections' Fisher information."""
    gm = samples.under("full").gm
    nodes = attention_nodes(gm.graph)
    found = {(i, side): target(gm, nodes[i], side, i) for i in samples.layers for side in SIDES}
    targets = {key: t for key, t in found.items() if isinstance(t, Target)}
    known = fisher(gm, samples.ids, {key: t.linear for key, t in targets.items()})
    sizes = [t.linear.rows.numel() for t in targets.values()]
    kept = dict(zip(targets, shares(list(known.values()), sizes, p["ratio"]), strict=True))
    return {"ranks": tuple(tuple(max(0.01, round(kept.get((i, side), 1.0), 4)) for side in SIDES)
                           for i in samples.layers)}


def _by_greed(p: Mapping[str, Any], samples: Samples) -> Axes:
    """Fractions of K's and V's channels by greedy search."""
    if p["ratio"] < 1 / LEVELS:
        raise RecipeError(f"matryoshkakv(ratio={p['ratio']}): ranks=calibrated keeps at least 1 / "
                          f"{LEVELS} of the channels")
    sizes = {(i, side): x.shape[1] * x.shape[-1] for i, s in zip(
        samples.layers, samples.attention, strict=True)
        for side, x in zip(SIDES, (s.k, s.v), strict=True)}
    kept = greedy(costs(samples), sizes, p["ratio"])
    return {"ranks": tuple(tuple(kept[i, side] for side in SIDES) for i in samples.layers)}


def _lorc(p: Mapping[str, Any]) -> Axes:
    return {"rank.heads": WHOLE, "rank.k": p["most"], "rank.v": p["most"],
            "rank.least": p["least"], "rank.multiple": p["multiple"], "recompute": "rope"}


def _cskv(p: Mapping[str, Any]) -> Axes:
    axes = {"rank.heads": p["heads"], "rank.k": p["ratio"], "rank.v": p["ratio"],
            "rank.text": {"asvd": "scale", "whiten": True, "svd": False}[p["by"]],
            "rank.multiple": p["multiple"], "rank.exact": True, "recompute": "rope",
            **({f"lag.{side}": p["window"] for side in SIDES} if p["window"] else {})}
    return {**axes, **_file(p)}


def _file(p: Mapping[str, Any]) -> Axes:
    """The axis of given factors, if there are any."""
    if p["factors"] is None:
        return {}
    if not isinstance(p["factors"], str):
        raise RecipeError(f"factors={p['factors']}: must name a safetensors file")
    return {"rank.factors": p["factors"]}


def _joint(p: Mapping[str, Any]) -> Axes:
    return {"rank.heads": WHOLE, "rank.k": p["ratio"], "rank.v": p["ratio"], "rank.joint": True,
            "rank.text": p["whiten"], "rank.multiple": p["multiple"], "recompute": "rope"}


WHOLE = 1 << 16  # more kv heads than a layer has
MULTIPLE = Param("multiple", 16, choices=(1, 2, 4, 8, 16, 32, 64), help="ranks are multiples")
RANKS = Param("ranks", (), calibrated=True, help="[K, V] of each claimed layer: the fractions of "
              "its channels that it keeps instead of ratio; `calibrated`: by Fisher information")
FACTORS = Param("factors", None, help="a safetensors file with factors that were trained, instead "
                "of those found here (kvcompile/calibration/given.py)")
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
            RANKS,
            WHITEN,
            Param("hadamard", False, help="latents turned by a Hadamard matrix, for quantization"),
            MULTIPLE,
        ),
        axes=_palu,
        calibrate=_by_fisher,
        note="one rank for all layers, one energy, or ranks=calibrated: the paper's, in proportion "
        "to the Fisher information of each layer's W_k and W_v and the same for all groups of a "
        "layer; kv heads are grouped by as many as divide them",
    ),
    Method(
        name="recalkv",
        title="ReCalKV",
        paper="arXiv:2505.24357",
        family="low rank",
        params=(
            Param("ratio", 0.5, minimum=0.01, maximum=1.0, help="ranks as the kept fraction of "
                  "K's groups' and V's channels"),
            Param("heads", 4, minimum=1, help="kv heads whose K is factored together"),
            RANKS,
            MULTIPLE,
        ),
        axes=_recalkv,
        calibrate=_by_fisher,
        note="heads with similar K, by linear CKA, are put into one group by reordering the "
        "weights, exactly; V's heads are factored together, whitened by the text, which is where "
        "the paper's alternating calibration of V's factors ends; W_o absorbs V's second factor",
    ),
    Method(
        name="matryoshkakv",
        title="MatryoshkaKV",
        paper="arXiv:2410.14731",
        family="low rank",
        params=(
            Param("ratio", 0.5, minimum=0.01, maximum=1.0, help="channels of each head that are "
                  "kept of its principal ones"),
            replace(RANKS, help="[K, V] of each claimed layer: the fractions of its channels that "
                    "it keeps instead of ratio; `calibrated`: by greedy search"),
            FACTORS,
            MULTIPLE,
        ),
        axes=_matryoshka,
        calibrate=_by_greed,
        note="the orthogonal projections of each head that the paper's training starts from, "
        "principal components of rotated K and of V on a text, or trained ones from a file; q and "
        "W_o absorb them. One rank for the heads of a layer; the greedy search of ranks adds up "
        "what each layer's K and V cost alone",
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
        name="cskv",
        title="CSKV",
        paper="arXiv:2409.10593",
        family="low rank",
        params=(
            Param("ratio", 0.5, minimum=0.01, maximum=1.0, help="ranks as the kept fraction of "
                  "the channels; those of given factors are theirs"),
            Param("window", 32, minimum=0, help="newest tokens that stay exact; 0: those that wait "
                  "in the recipe's own recent tier"),
            Param("by", "asvd", choices=("asvd", "whiten", "svd"), help="SVD of W_k and W_v with "
                  "columns scaled by the text, whitened by it, or as they are"),
            Param("heads", WHOLE, minimum=1, help="kv heads that are factored together; all of "
                  "them unless given"),
            FACTORS,
            MULTIPLE,
        ),
        axes=_cskv,
        note="older tokens are latents, newer ones exact; a token is stored as what the latent "
        "leaves of K and V beside the latent, of which only the latent stays. Factors are the "
        "paper's starting point, or trained ones from a file; kvcompile trains nothing",
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
        "fine-tune (mha2mla)",
    ),
)
