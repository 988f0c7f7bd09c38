"""Methods that store layers as one: axes `merge`, `merge.k`, `merge.v`."""

from collections.abc import Mapping, Sequence
from typing import Any

import networkx
from torch import Tensor

from kvcompile.calibration.alignment import Rotary, align
from kvcompile.calibration.samples import Sample, Samples
from kvcompile.calibration.similarity import similarity
from kvcompile.errors import RecipeError
from kvcompile.format import PAGE
from kvcompile.method import Axes, Method, Param
from kvcompile.recipe import Term


def _minicache(p: Mapping[str, Any]) -> list[Axes]:
    layers = p["layers"]
    pairs = p["pairs"] or neighbours(free(layers, p["start"]))
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise RecipeError(f"pairs={pairs}: must be a list of lists of two layers")
    return together("pairs", pairs, layers, dict.fromkeys("kv", Term(
        "direction", (("t", p["t"]), ("kept", round(p["retained"] * PAGE))))), p["align"])


def together(name: str, groups: Sequence[tuple[int, ...]], layers: Sequence[int],
             around: Mapping[str, Term], align: bool = False) -> list[Axes]:
    """The axes of `layers` of which `groups`, the parameter `name`, are stored together in the
    formats `around` (k, v); with `align` in the basis of their group's first."""
    of = {i: tuple(sorted(group)) for group in groups for i in group}
    if len(of) != sum(map(len, groups)):
        kind = name.removesuffix("s")
        raise RecipeError(f"{name}={groups}: each layer can be in one {kind} only")
    if missing := sorted(set(of) - set(layers)):
        raise RecipeError(f"{name}={groups}: layer {missing[0]} is not among those claimed")
    formats = {f"merge.{side}": term for side, term in around.items()}
    return [{} if i not in of else {"merge": of[i], **formats, **(
                {"align": of[i][0]} if align and of[i][0] < i else {})} for i in layers]


def _xkv(p: Mapping[str, Any]) -> list[Axes]:
    layers, size = p["layers"], p["group"]
    groups = p["groups"] or [tuple(layers[i : i + size]) for i in range(0, len(layers), size)]
    if any(not isinstance(group, tuple) for group in groups):
        raise RecipeError(f"groups={groups}: must be a list of lists of layers")
    around = {side: Term("subspace", (("rank", p[f"rank_{side}"]), ("basis", p["basis"])))
              for side in "kv"}
    turned = {"recompute": "turned"} if p["prerope"] else {}
    lag = p["window"] + PAGE - 1  # tokens wait for whole pages (passes/merge.py)
    more = {**turned, **({f"lag.{side}": lag for side in "kv"} if p["window"] else {})}
    least = min(size, 2)
    return [{**axes, **more} if axes else axes for axes in together(
        "groups", [group for group in groups if len(group) >= least], layers, around)]


def free(layers: Sequence[int], start: float) -> Sequence[int]:
    """The layers after the share `start` of all."""
    return layers[round(start * len(layers)) :]


def neighbours(layers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Pairs of neighbouring layers, from the last one back."""
    layers = layers[len(layers) % 2 :]
    return tuple(zip(layers[::2], layers[1::2], strict=True))


def matched(layers: Sequence[int], alike: Tensor) -> tuple[tuple[int, int], ...]:
    """The pairs of layers whose similarities have the largest sum, of as many as there can be:
    `alike` [layers, layers], NaN for those that cannot be merged."""
    graph = networkx.Graph()
    for i, a in enumerate(layers):
        for j, b in enumerate(layers[:i]):
            if not alike[i, j].isnan():
                graph.add_edge(b, a, weight=float(alike[i, j]))
    pairs = networkx.max_weight_matching(graph, maxcardinality=True)
    return tuple(sorted((min(pair), max(pair)) for pair in pairs))


def _calibrate(p: Mapping[str, Any], samples: Samples) -> Axes:
    layers = free(samples.layers, p["start"])
    seen = samples.of(layers).attention
    alike = similarity(seen, "k") + similarity(seen, "v")
    return {"pairs": matched(layers, alike if not p["align"] else aligned(seen, alike))}


def aligned(samples: Sequence[Sample], alike: Tensor) -> Tensor:
    """`alike` of layers whose V is turned towards each other's, heads matched; K as it is."""
    k, v = ([x.transpose(0, 1).flatten(1, 2) for x in side] for side in
            ([s.k for s in samples], [s.v for s in samples]))
    out = alike.clone()
    for i in range(len(samples)):
        for j in range(i):
            if not alike[i, j].isnan():
                out[i, j] = out[j, i] = sum(align(
                    (k[i], k[j]), (v[i], v[j]), Rotary(0, "half")).cosine[1])
    return out


RANKS = (16, 32, 64, 96, 128)
METHODS = (Method(
    name="minicache",
    title="MiniCache",
    paper="arXiv:2405.14366",
    family="sharing",
    params=(
        Param("start", 0.5, minimum=0, maximum=1, help="share of the layers, from the first, that "
              "stay by themselves"),
        Param("t", 0.6, minimum=0, maximum=1, help="where the direction lies between that of the "
              "earlier (0) and the later layer (1)"),
        Param("retained", 0.05, minimum=0, maximum=1, help="share of each 128 tokens, those whose "
              "vectors differ most in angle, that stay unmerged"),
        Param("pairs", (), calibrated=True, help="pairs of layers to merge; neighbours unless "
              "given or calibrated, which matches layers by the cosines of their K and V"),
        Param("align", False, help="first give the later layer of a pair the basis of the earlier "
              "one, as far as heads can be turned without a change to what it computes"),
    ),
    axes=_minicache,
    calibrate=_calibrate,
    note="neighbours from the last layer back to the middle, per kv head, K and V by themselves; "
    "retained tokens are a fixed share of each block, in the paper those beyond a share of the "
    "largest distance",
), Method(
    name="xkv",
    title="xKV",
    paper="arXiv:2503.18893",
    family="sharing",
    params=(
        Param("group", 4, minimum=1, help="neighbouring layers that are factored together; 1: each "
              "by itself"),
        Param("rank_k", 32, choices=RANKS, help="vectors that K of 128 tokens of a kv head is "
              "mixed of, in all layers of a group"),
        Param("rank_v", 64, choices=RANKS, help="those of V"),
        Param("basis", "int8", choices=("int8", "same"), help="what these vectors are stored in: 8 "
              "bits or the model's type"),
        Param("prerope", True, help="K is stored before its rotation and turned at every read"),
        Param("window", 0, choices=(0, 128, 256, 512, 1024), help="newest tokens, at least, that "
              "stay exact; 0: those that wait in the recipe's own recent tier"),
        Param("groups", (), help="the groups of layers by hand"),
    ),
    axes=_xkv,
    note="the SVD of the layers' K, or V, side by side, by kv head and 128 tokens; the paper's is "
    "of all heads and a whole prompt, and leaves later tokens as they are. Layers left over by "
    "`group` are a smaller group",
))
