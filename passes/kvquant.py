"""KVQuant: codebooks for K and V of each layer, fitted to what the loss is sensitive to."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor

from kvcompile.calibration.samples import Samples
from kvcompile.errors import RecipeError
from kvcompile.method import Axes, Method, Param
from kvcompile.recipe import Value

BINS = 1024


def _axes(p: Mapping[str, Any]) -> Axes | Sequence[Axes]:
    if p["k"] is None or p["v"] is None:
        return _layer(p, "", "")  # an example: the tables are still to be found
    return [_layer(p, f"table=[{', '.join(map(str, k))}], ", f"table=[{', '.join(map(str, v))}], ")
            for k, v in zip(p["k"], p["v"], strict=True)]


def _layer(p: Mapping[str, Any], k: str, v: str) -> Axes:
    axes: dict[str, Value] = {"block.k": 128, "lag.k": 0, "block.v": 1, "lag.v": 0}
    for side, table, axis in (("k", k, "channel"), ("v", v, "token")):
        code = f"nuq({table}axis={axis}, group=128)"
        if p["outliers"]:
            code = f"outliers(of={code}, fraction={p['outliers']})"
        axes[f"format.{side}"] = code
    axes |= {"recompute": "turned"} if p["pre_rope"] else {}
    return {**axes, "sinks": p["sinks"]} if p["sinks"] else axes


def _calibrate(p: Mapping[str, Any], samples: Samples) -> Axes:
    """Sections 3.3 and 3.4: the diagonal of the Fisher information weighs each number."""
    samples = samples.under("prerope") if p["pre_rope"] else samples
    tables: dict[str, list[tuple[float, ...]]] = {"k": [], "v": []}
    tokens = samples.ids.shape[1]
    if tokens < p["sinks"] + 32:
        raise RecipeError(f"kvquant(sinks={p['sinks']}): calibration texts of {tokens} tokens "
                          f"leave too few after the sinks; give at least {p['sinks'] + 32}")
    for sample, gradients in zip(samples.attention, samples.gradients, strict=True):
        for side, x, g in zip("kv", (sample.k, sample.v), gradients, strict=True):
            x, g = (t[..., p["sinks"]:, :].float() for t in (x, g))
            if side == "k":
                size = min(128, x.shape[-2])
                count = x.shape[-2] // size * size
                x, g = (t[..., :count, :].unflatten(-2, (-1, size)).mT for t in (x, g))
            tables[side].append(_fitted(x, g.square(), p["outliers"], 2 ** p["bits"]))
    return {side: tuple(found) for side, found in tables.items()}


def _fitted(x: Tensor, weight: Tensor, outliers: float, size: int) -> tuple[float, ...]:
    """The table of `size` numbers for vectors x [..., n], without their outliers, over [-1, 1]."""
    if outliers:
        far = (x - x.mean(-1, keepdim=True)).abs()
        taken = far.topk(ceil(outliers * x.shape[-1] - 1e-9), -1).indices
        inside = torch.ones_like(x).scatter(-1, taken, 0)
        mean = (x * inside).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True)
        x, weight = torch.where(inside > 0, x, mean), weight * inside
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    half = ((high - low) / 2).clamp_min(1e-12)
    return kmeans((x - (low + high) / 2) / half, weight * half.square(), size)


def kmeans(x: Tensor, weight: Tensor, size: int) -> tuple[float, ...]:
    """The centres of weighted k-means of numbers in [-1, 1]: the best of all, over BINS bins.

    In one dimension clusters are intervals, so dynamic programming finds where they end.
    """
    x, weight = x.flatten().double(), weight.flatten().double() + 1e-12 * float(weight.mean())
    at = ((x + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    moments = [torch.zeros(BINS, dtype=torch.float64, device=x.device).index_add(0, at, weight * y)
               for y in (torch.ones_like(x), x, x * x)]
    mass, first, second = (torch.cat([m.new_zeros(1), m.cumsum(0)]).cpu() for m in moments)

    def between(m: Tensor) -> Tensor:
        return m[None, :] - m[:, None]  # [start, end]

    cost = between(second) - between(first).square() / between(mass).clamp_min(1e-300)
    cost = cost.clamp_min(0).masked_fill(~torch.ones_like(cost).triu(1).bool(), torch.inf)
    best, starts = cost[0], list[Tensor]()
    for _ in range(size - 1):
        best, start = (best[:, None] + cost).min(0)
        starts.append(start)
    ends = [BINS]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    edges = [0, *reversed(ends)]
    numbers = []
    for a, b in pairwise(edges):
        low, high = (2 * n / BINS - 1 for n in (a, b))
        held = float(mass[b] - mass[a])
        centre = float(first[b] - first[a]) / held if held > 0 else (low + high) / 2
        numbers.append(round(min(max(centre, low + 2e-4), high - 2e-4), 4))  # all different
    return tuple(numbers)


METHODS = (Method(
    name="kvquant",
    title="KVQuant",
    paper="arXiv:2401.18079",
    family="quantization",
    params=(
        Param("bits", 4, choices=(2, 4), help="bits of a stored number"),
        Param("outliers", 0.01, minimum=0, maximum=0.25, help="share of each group that is stored "
              "apart, exactly"),
        Param("sinks", 1, minimum=0, help="first tokens kept in full precision"),
        Param("pre_rope", False, choices=(False, True), help="K is stored before RoPE, as in the "
              "paper, and turned at every read, by no fused kernel"),
        Param("k", None, calibrated=True, help="codebook of K, 4 or 16 numbers for each layer"),
        Param("v", None, calibrated=True, help="codebook of V, 4 or 16 numbers for each layer"),
    ),
    axes=_axes,
    calibrate=_calibrate,
    note="K per channel in blocks of 128 tokens, V per token, codebooks by k-means weighted with "
    "squared gradients of the loss. By default K is stored after RoPE, in the paper before it, and "
    "its ranges are those of each block, in the paper fixed offline; no 3 bits, no Q-Norm",
),)
