"""Methods that store two layers as one: axes `merge`, `merge.t`, `merge.kept`."""

from collections.abc import Mapping
from typing import Any

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE
from kvcompile.method import Axes, Method, Param


def _minicache(p: Mapping[str, Any]) -> list[Axes]:
    layers = p["layers"]
    pairs = p["pairs"] or neighbours(layers, p["start"])
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise RecipeError(f"pairs={pairs}: must be a list of lists of two layers")
    other = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    if len(other) != 2 * len(pairs):
        raise RecipeError(f"pairs={pairs}: each layer can be in one pair only")
    if missing := sorted(set(other) - set(layers)):
        raise RecipeError(f"pairs={pairs}: layer {missing[0]} is not among those claimed")
    options = {"merge.t": p["t"], "merge.kept": round(p["retained"] * PAGE)}
    return [{"merge": other[i], **options} if i in other else {} for i in layers]


def neighbours(layers: tuple[int, ...], start: float) -> tuple[tuple[int, int], ...]:
    """Pairs of neighbouring layers, from the last one back to the share `start` of all."""
    free = layers[round(start * len(layers)) :]
    free = free[len(free) % 2 :]
    return tuple(zip(free[::2], free[1::2], strict=True))


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
        Param("pairs", (), help="pairs of layers to merge; neighbours unless given"),
    ),
    axes=_minicache,
    note="neighbours from the last layer back to the middle, per kv head, K and V by themselves; "
    "retained tokens are a fixed share of each block, in the paper those beyond a share of the "
    "largest distance",
),)
