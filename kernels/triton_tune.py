"""How kvc.attend's kernels are cut on each target: what needs no tuning, and what may be tried.

With KVCOMPILE_AUTOTUNE=1 the first eager call for a shape times what may be tried and the fastest
is used from then on, in graphs that are compiled later too.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from kvcompile.kernels.triton_attend_shape import Shape, Tile, tile
from kvcompile.store import Store


class Change(NamedTuple):
    """What differs from `triton_attend_shape.tile`, whose warps have 32 threads."""

    tokens: float = 1
    warps: float = 1
    stages: int = 2


TRIED = {  # the default first; the longest prefix of a target's name counts
    "cuda:80": (Change(), Change(stages=3), Change(warps=2), Change(tokens=0.5)),
    "cuda": (Change(), Change(stages=3), Change(warps=2), Change(tokens=0.5),
             Change(tokens=0.5, stages=4)),
    "hip": (Change(warps=0.5), Change(), Change(warps=0.5, stages=1)),  # of 64 threads
}
FEWEST = 16  # tokens of a tile, for products on tensor cores

_fastest: dict[tuple[Store, Shape, str], Tile] = {}


def target(device: torch.device) -> str:
    """The name of a device's target, as `kvcompile kernels` has it."""
    if torch.version.hip:
        return "hip"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "cuda"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"


def tiles(store: Store, shape: Shape, target: str) -> list[Tile]:
    """The cuts that may be tried on a target, the default first."""
    known = max((name for name in TRIED if target.startswith(name)), key=len)
    plain, found = tile(store, shape), []
    for change in TRIED[known]:
        cut = Tile(max(FEWEST, int(plain.tokens * change.tokens)), plain.queries,
                   max(1, int(plain.warps * change.warps)), change.stages)
        if cut not in found:
            found.append(cut)
    return found


def wanted() -> bool:
    """Whether kernels are to be tuned."""
    return os.environ.get("KVCOMPILE_AUTOTUNE", "0") not in ("", "0")


def chosen(store: Store, shape: Shape, target: str, time: Callable[[Tile], float] | None) -> Tile:
    """The cut to use; `time` tells what one takes, None where nothing can be run."""
    key = store, shape, target
    if key not in _fastest and wanted() and time is not None:
        _fastest[key] = min(tiles(store, shape, target), key=time)
    return _fastest.get(key) or tiles(store, shape, target)[0]
