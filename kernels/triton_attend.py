"""The Triton text of kvc.attend, printed from a store's formats, and what it is launched with.

A program handles a share of the tiles of one (row, kv head): tiles of N tokens of the queue, of the
sinks, and of the call's own tokens. Query heads of a kv head, and up to QUERIES tokens, are the
rows of one tile, 16 at least, so that products run on tensor cores. Tiles that lie wholly in both
bodies come first, in a loop of their own without branches. The parts are merged by their
log-sum-exps (`merge`).
"""

from functools import cache
from hashlib import sha256

import torch

from kvcompile.checks.rounding import Arithmetic
from kvcompile.errors import RecipeError
from kvcompile.kernels import triton_source as ts
from kvcompile.kernels import triton_tiles as tiles
from kvcompile.kernels.triton_attend_shape import (
    Shape,
    Tile,
    operands,
    rows,
    shape_of,
    tile,
    turns,
    unsupported,
    width,
)
from kvcompile.store import Store

__all__ = ["Shape", "Tile", "arguments", "arithmetic", "name", "operands", "rows", "shape_of",
           "source", "tile", "turns", "unsupported", "width"]


def arithmetic(dtype: torch.dtype) -> Arithmetic:
    """How the kernels compute. For 16-bit models K, V and the weights (and q where a format turns
    it) are rounded to the model's type; Triton's interpreter cuts bf16 off: a whole step."""
    if dtype is torch.float32:
        return Arithmetic()
    eps = torch.finfo(dtype).eps
    return Arithmetic(stored=2 * eps, weights=eps, out=eps)


def name(store: Store, shape: Shape, cut: Tile, what: str = "attend") -> str:
    """A name of its own for every kernel; `what`: attend, or mass, which follows it."""
    return f"{what}_" + sha256(repr((str(store), shape, cut)).encode()).hexdigest()[:12]


def arguments(store: Store, shape: Shape, what: str = "attend") -> list[str]:
    """The kernel's parameters in order."""
    results = ["part", "stats"] if what == "attend" else ["mass", "lse", "places"]
    made = [*operands(shape), *(["cos_row"] if "cos" in operands(shape) else [])]
    return ["q", "k", "v", "numbers", *made, *ts.parameters(store, shape.dims, shape.dtype),
            *results, "slot", *(["member"] if store.members > 1 else []), "batch", "tokens",
            "splits",
            *(f"{x}_{d}" for x in "qkv" for d in ("row", "head", "token")),
            *ts.sizes(store, shape.dims, shape.dtype)]


@cache
def source(store: Store, shape: Shape, cut: Tile, what: str = "attend") -> str:
    """The module's text; RecipeError where there is no kernel."""
    why = unsupported(store, shape)
    if why:
        raise RecipeError(f"{store}: {why}")
    body = [*tiles.begin(store, shape, cut), *tiles.plan(store, shape, cut)]
    if what == "attend":
        body += [*tiles.sums(store, shape, cut), *tiles.bodies(store, shape),
                 *tiles.others(store, shape, cut), *tiles.finish(store, shape)]
    else:
        body += tiles.masses(store, shape, cut)
    head = f"def {name(store, shape, cut, what)}({', '.join(arguments(store, shape, what))}):"
    return "\n".join([ts.HEAD, f"# {store}", "@triton.jit", head, *ts.indent(body)]) + "\n"
