"""What kvc.attend's Triton kernels are printed for, and how they are cut into tiles."""

from math import gcd, prod
from typing import NamedTuple

import torch

from kvcompile.format import PAGE, Side
from kvcompile.kernels import triton_source as ts
from kvcompile.kernels.rebuild import Made
from kvcompile.store import SIDES, Store


class Shape(NamedTuple):
    """What a kernel is printed for, beside the store."""

    heads: int                  # kv heads
    queries: int                # query heads that share a kv head
    dims: tuple[int, int]       # Dk, Dv
    dtype: torch.dtype          # of q, k, v and the output
    scale: float
    window: int = 0
    softcap: float = 0.0
    one: bool = True            # one query token a row
    made: Made | None = None    # where keys are rebuilt at read; Dk is that of what is stored

    @property
    def key(self) -> int:
        """Channels of a query and of the keys that it meets."""
        return self.made.dim if self.made else self.dims[0]


def shape_of(store: Store, heads: int, q_heads: int, dims: tuple[int, int], dtype: torch.dtype,
             scale: float, window: int = 0, softcap: float = 0.0, one: bool = True,
             made: Made | None = None) -> Shape:
    """The shape of a site's kernels. Where V is a part of K the sums have all channels of K: a tile
    is decoded once for both, and the results' other channels are left out (`merge`)."""
    dims = (dims[0], dims[0]) if store.v_in_k else dims
    return Shape(heads, q_heads // heads, dims, dtype, scale, window, softcap, one,
                 made)


class Tile(NamedTuple):
    """How a kernel is cut: tokens and query tokens of a tile, warps of a program, stages."""

    tokens: int
    queries: int
    warps: int = 4
    stages: int = 2


def tile(store: Store, shape: Shape) -> Tile:
    """What needs no tuning: decoded tiles that fit four warps' registers, and codes that come 16
    bytes a load."""
    wide = max(map(ts.padded, (*shape.dims, shape.key)))
    held = [s for s in SIDES if "body" in store.tiers(s)]
    thin = min((_bits(store, shape, side) for side in held), default=16)
    many = max((len(ts.names(store, s, "body", shape.dims[SIDES.index(s)], shape.dtype))
                for s in held), default=1)
    span = gcd(*(getattr(store.side(s).format, "triton_span", PAGE) for s in held), PAGE)
    parts = 1 if span == PAGE else 2  # of a page, with planes of their own; a tile is of one
    wider = thin * parts <= 2 and not shape.made
    room = 2048 if shape.dtype is torch.float32 else 8192 if wider else 4096
    queries = 1 if shape.one else max(1, min(16, 32 // shape.queries))
    turned = any(turns(store, s, shape.dims[SIDES.index(s)]) for s in held)
    tiers = store.sinks and thin in (4, 8) and any(store.side(s).delayed for s in held)
    tight = wide <= 64 and (tiers or store.v_in_k and thin == 2)  # ptxas halts at 128, and spills
    heavy = many > 4 * parts or turned or store.members > 2 or tight or bool(
        shape.made and shape.made.basis)
    return Tile(min(span, max(16, room // wide)), queries, 8 if heavy else 4)


def _bits(store: Store, shape: Shape, side: Side) -> float:
    """Bits that a number takes in the largest plane of a body."""
    fmt, dim = store.side(side).format, shape.dims[SIDES.index(side)]
    wide = dim * store.members
    planes = fmt.planes(wide, shape.dtype, side).values()
    return max(8 * prod(p.shape) * p.dtype.itemsize / (fmt.step * wide) for p in planes)


def operands(shape: Shape) -> list[str]:
    """The operands that keys are made with."""
    made = shape.made or Made(shape.dims[0])
    has = {"basis": made.basis, "offset": made.offset, "cos": made.rotary, "sin": made.rotary}
    return [name for name, given in has.items() if given]


def rows(shape: Shape, cut: Tile) -> int:
    """Rows of a tile of queries."""
    return max(16, 1 << (shape.queries * cut.queries - 1).bit_length())


def unsupported(store: Store, shape: Shape) -> str | None:
    """Why no kernel can be printed; None if one can."""
    if shape.queries > 64:
        return f"{shape.queries} query heads share a kv head; at most 64 can"
    if shape.key > ts.WIDEST:
        return f"keys of {shape.key} channels; {ts.WIDEST} is the most"
    return ts.missing(store, shape.dims, shape.dtype, "reader")


def turns(store: Store, side: Side, dim: int) -> int:
    """The block of channels by which a body wants queries, or outputs, turned; 0: it does not."""
    fmt = store.side(side).format
    held = "body" in store.tiers(ts.source_of(store, side))
    return int(fmt.turn_size(dim)) if held and hasattr(fmt, "turn_size") else 0


def width(store: Store, shape: Shape) -> int:
    """Numbers of a part of an output: turned ones are summed apart."""
    return shape.dims[1] * (2 if turns(store, "v", shape.dims[1]) else 1)
