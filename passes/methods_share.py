"""Methods by which layers attend to the K or the V of earlier ones, and store none: axes `owner.k`
and `owner.v`; or compute their own from what an earlier one is given: axis `input`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvcompile.calibration.samples import Samples
from kvcompile.errors import RecipeError
from kvcompile.method import Axes, Method, Param
from kvcompile.recipe import Recipe, Term
from kvcompile.store import SIDES

log = logging.getLogger(__name__)


def _axes(layers: Sequence[int], owners: Sequence[int], align: bool, side: str = "both"
          ) -> list[Axes]:
    """`owners[i]` stores K and V, or one `side`, for layer `layers[i]`."""
    return [{} if i == owner else {**_owned(owner, side), **({"align": owner} if align else {})}
            for i, owner in zip(layers, owners, strict=True)]


def _owned(owner: int, side: str = "both") -> Axes:
    return {f"owner.{s}": owner for s in SIDES if side in (s, "both")}


def _by_place(first: Callable[[int, int, Mapping[str, Any]], int]
              ) -> Callable[[Mapping[str, Any]], list[Axes]]:
    """The i-th of n claimed layers attends to what the `first(i, n, parameters)`-th stores."""
    def axes(p: Mapping[str, Any]) -> list[Axes]:
        layers = p["layers"]
        return _axes(layers, [layers[first(i, len(layers), p)] for i in range(len(layers))],
                     p["align"])
    return axes


def _map(p: Mapping[str, Any]) -> list[Axes]:
    layers = p["layers"]
    owners = p["map"] or layers  # nothing shared, or still to be found
    if len(owners) != len(layers):
        raise RecipeError(f"{Term('map', (('map', owners),))}: names the owners of {len(owners)} "
                          f"layers, but {len(layers)} are claimed")
    return _axes(layers, owners, p["align"], p.get("side", "both"))


def _pod(p: Mapping[str, Any]) -> list[Axes]:
    layers, size = p["layers"], p["factor"]
    own = {**({"sinks": p["sinks"]} if p["sinks"] else {}),
           **({"lag.k": p["recent"]} if p["recent"] else {})}
    firsts = [layers[i // size * size] for i in range(len(layers))]
    return [{**own, **({} if i == j else {"owner.far": j, **({"align": j} if p["align"] else {})})}
            for i, j in zip(layers, firsts, strict=True)]


def _swiftkv(p: Mapping[str, Any]) -> list[Axes]:
    layers, first = p["layers"], round(p["start"] * len(p["layers"]))
    later, size = layers[first:], p["across"]
    owners = [later[i // size * size] for i in range(len(later))]
    return [*({} for _ in layers[:first]), *({
        **({"input": later[0]} if i != later[0] else {}), **(_owned(j) if i != j else {})}
        for i, j in zip(later, owners, strict=True))]


def _calibrate(p: Mapping[str, Any], samples: Samples) -> Axes:
    """Algorithm 1: the least alike pairs first, each kept if the last hidden states stay alike.

    A layer that others attend to stays an owner; one that attends to another is none. Fewer than
    `shared` layers may be found.
    """
    layers = samples.layers
    wanted = p["shared"] or max(1, len(layers) // 4)
    seen = samples.attention
    means = [torch.cat([x.float().mean(0).flatten() for x in (s.k, s.v)]) for s in seen]
    kinds = [(s.window, *s.k.shape, *s.v.shape) for s in seen]
    fit = [(i, j) for i, j in combinations(range(len(layers)), 2) if kinds[i] == kinds[j]]
    pairs = sorted(fit, key=lambda pair: -float((means[pair[0]] - means[pair[1]]).norm()))
    exact, owner, recipe = samples.hidden("full"), dict[int, int](), partial(_recipe, p["align"])
    for first, later in pairs:
        if later in owner or later in owner.values() or first in owner:
            continue
        trial = {**owner, later: first}
        if _alike(samples.hidden(recipe(layers, trial)), exact) > p["threshold"]:
            owner = trial
        if len(owner) == wanted:
            break
    else:
        log.warning("kvsharer: %d layers of the %d asked for attend to another one's K and V: no "
                    "other pair leaves a cosine above %g", len(owner), wanted, p["threshold"])
    return {"map": _owners(layers, owner)}


def _recipe(align: bool, layers: Sequence[int], owner: Mapping[int, int]) -> Recipe:
    """share(...) by which layer i of `layers` attends to what layer owner[i] of them stores."""
    return Recipe((Term("share", (("layers", tuple(layers)), ("map", _owners(layers, owner)),
                                  ("align", align))),))


def _owners(layers: Sequence[int], owner: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(layers[owner.get(i, i)] for i in range(len(layers)))


def _alike(a: Tensor, b: Tensor) -> float:
    """Mean cosine of two runs' hidden states [N, T, hidden]."""
    return float(cosine_similarity(a.float(), b.float(), dim=-1).mean())


ALIGN = Param("align", False, help="first give each layer its owner's basis, as far as its heads "
              "can be turned without a change to what it computes; needs a text")
MAP = "number of the layer whose K and V it attends to, for each claimed layer"

METHODS = (
    Method(
        name="share",
        title="K and V of earlier layers, by hand",
        paper="arXiv:2405.12981",
        family="sharing",
        params=(Param("map", (), help=f"{MAP}; its own number: its own"),
                Param("side", "both", choices=("both", *SIDES), help="what of the owner's it is; "
                      "the other one stays each layer's own"), ALIGN),
        axes=_map,
        note="any map of layers to owners that come earlier; without one nothing is shared. Two "
        "terms, side=k and side=v, may have two maps",
    ),
    Method(
        name="cla",
        title="Cross-layer attention",
        paper="arXiv:2405.12981",
        family="sharing",
        params=(Param("factor", 2, minimum=1, help="neighbouring layers that attend to the K and "
                      "V of the first of them"), ALIGN),
        axes=_by_place(lambda i, n, p: i // p["factor"] * p["factor"]),
        note="CLA2 by default. For models that were trained so; others lose much",
    ),
    Method(
        name="yoco",
        title="YOCO's map",
        paper="arXiv:2405.05254",
        family="sharing",
        params=(ALIGN,),
        axes=_by_place(lambda i, n, p: min(i, n // 2)),
        note="the second half of the layers attends to what its first layer stores. For models "
        "that were trained so; the paper's first half also has a window of its own",
    ),
    Method(
        name="mlkv",
        title="Multi-layer key-value heads",
        paper="arXiv:2406.09297",
        family="sharing",
        params=(Param("owners", 2, minimum=1, help="layers that store K and V: the first of as "
                      "many equal runs"), ALIGN),
        axes=_by_place(lambda i, n, p: min(j for j in range(n)
                                           if j * p["owners"] // n == i * p["owners"] // n)),
        note="for models that were trained so; others lose much",
    ),
    Method(
        name="pod",
        title="PoD: proximal tokens over distant ones",
        paper="arXiv:2412.02252",
        family="sharing",
        params=(
            Param("factor", 2, minimum=1, help="neighbouring layers whose older keys are those of "
                  "the first of them"),
            Param("sinks", 16, minimum=0, help="first tokens whose keys stay each layer's own"),
            Param("recent", 128, minimum=0, help="newest tokens whose keys stay each layer's own; "
                  "0: those that wait in the recipe's own recent tier"),
            ALIGN,
        ),
        axes=_pod,
        note="K of distant tokens is stored once, V and the keys of proximal ones in every layer. "
        "For models that were trained so; the paper's groups are runs of unequal length, of layers "
        "with similar attention",
    ),
    Method(
        name="swiftkv",
        title="SwiftKV",
        paper="arXiv:2410.03960",
        family="sharing",
        params=(
            Param("start", 0.5, minimum=0, maximum=1, help="share of the layers, from the first, "
                  "that stay as they are"),
            Param("across", 1, minimum=1, help="later layers that attend to the K and V of the "
                  "first of them (AcrossKV)"),
        ),
        axes=_swiftkv,
        note="SingleInputKV: K and V of the later layers are projected, by each layer's own norm "
        "and weights, from what the first of them is given. For models that were distilled so; "
        "others lose much. A prompt is still computed in all layers",
    ),
    Method(
        name="kvsharer",
        title="KVSharer",
        paper="arXiv:2410.18517",
        family="sharing",
        params=(
            Param("shared", None, minimum=1, help="layers that store nothing; a quarter of those "
                  "claimed unless given"),
            Param("threshold", 0.5, minimum=-1, maximum=1, help="least cosine of the last hidden "
                  "states with those of the whole model"),
            Param("map", None, calibrated=True, help=MAP),
            ALIGN,
        ),
        axes=_map,
        calibrate=_calibrate,
        note="pairs are tried from the least alike on, by the distance of their K and V averaged "
        "over the calibration texts (the paper: 30 of Wikipedia); the later layer attends to what "
        "the earlier one stores",
    ),
)
