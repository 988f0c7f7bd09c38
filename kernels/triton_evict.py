"""The Triton text of compaction: tokens take the places of those that were dropped, in every plane.

A format says where a token's share of a plane lies (`StepPlane`), and what is stored by itself is
moved as it is: no reader or writer is asked. A program handles TOKENS places of one (layer, row, kv
head).
"""

from functools import cache
from hashlib import sha256
from math import prod

import torch

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE
from kvcompile.kernels import triton_source as ts
from kvcompile.kernels.evict import movable, tables
from kvcompile.store import Store

TOKENS = 16


def unsupported(store: Store) -> str | None:
    """Why tokens of a store cannot be moved one by one; None if they can."""
    if not store.slots:
        return "nothing is known of its tokens beside K and V"
    if not movable(store):
        return "whole pages leave: the page tables change, and nothing is moved"
    return None


def name(store: Store, dims: tuple[int, int], dtype: torch.dtype) -> str:
    """A name of its own for every kernel."""
    return "move_" + sha256(repr((str(store), dims, dtype)).encode()).hexdigest()[:12]


def arguments(store: Store, dims: tuple[int, int], dtype: torch.dtype) -> list[str]:
    """The kernel's parameters in order; a table's rows are those of `sources`."""
    names = ["sources", "slots"]
    for table, planes in tables(store, dims, dtype).items():
        names += [table, f"{table}.pages", *planes]
    return [n.replace(".", "_") for n in names]


@cache
def source(store: Store, dims: tuple[int, int], dtype: torch.dtype) -> str:
    """The module's text; RecipeError where there is no kernel."""
    why = unsupported(store)
    if why:
        raise RecipeError(f"{store}: {why}")
    body = []
    for table, planes in tables(store, dims, dtype).items():
        own = table.replace(".", "_")
        body += [f"to = tl.load({own} + head * {own}_pages + number // {PAGE}, mask=keep, other=0)",
                 f"origin = tl.load({own} + head * {own}_pages + source // {PAGE}, mask=keep, "
                 "other=0)"]
        for plane, spec in planes.items():
            numbers = prod(spec.shape)
            body.append(
                f"move_tokens({plane.replace('.', '_')}, to.to(tl.int64), number % {PAGE}, "
                f"origin.to(tl.int64), source % {PAGE}, keep, {numbers}, "
                f"{1 << (numbers - 1).bit_length()}, {spec.lanes}, {prod(spec.shape[spec.at:])})")
    lines = ["head = tl.program_id(0).to(tl.int64)",
             f"number = tl.program_id(1) * {TOKENS} + tl.arange(0, {TOKENS})",
             "source = tl.load(sources + head * slots + number, mask=number < slots, other=-1)",
             "keep = source >= 0",
             "source = tl.maximum(source, 0)",
             "if tl.max(keep.to(tl.int32), 0) > 0:", *ts.indent(body)]
    head = f"def {name(store, dims, dtype)}({', '.join(arguments(store, dims, dtype))}):"
    return "\n".join([ts.HEAD, f"# {store}", "@triton.jit", head, *ts.indent(lines)]) + "\n"
