"""kvc.attend and kvc.append by the Triton kernels: what is launched, with which arguments.

Everything that depends on the tokens' number lies in tensors, so that nothing waits for the device
and a decode step can be captured in a CUDA graph.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels import (
    evict,
    rebuild,
    triton_append,
    triton_attend,
    triton_evict,
    triton_tune,
)
from kvcompile.kernels.triton_attend_shape import Tile
from kvcompile.kernels.triton_source import WIDEST, helpers, kernel, padded, parameters
from kvcompile.store import Store

SPLITS = 64      # parts of a head's tokens at most
ABREAST = 16     # parts that are merged at a time
PROGRAMS = 2     # programs for each multiprocessor


def attend(q: Tensor, k: Tensor, v: Tensor, planes: list[Tensor], positions: Tensor,
           valid: Tensor, sinks: Tensor | None, basis: Tensor | None = None,
           offset: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None, *,
           scale: float, window: int = 0, softcap: float = 0.0, store: str, slot: int = 0,
           layer: int = 0, mass: bool = False, looks: int = 0, member: int = 0, style: str = "",
           ) -> tuple[Tensor, Tensor, Tensor]:
    """As kvc.attend: o [B, Hq, S, Dv], the log-sum-exp [B, Hq, S], and what tokens weigh."""
    batch, hq, tokens, _ = q.shape
    heads, dk, dv = k.shape[1], k.shape[3], v.shape[3]
    parsed = Store.parse(store)
    shape = triton_attend.shape_of(parsed, heads, hq, (dk, dv), q.dtype, scale, window, softcap,
                                   _one(tokens), rebuild.made(q.shape[3], heads, basis, offset, cos,
                                                              style))
    v = k if parsed.v_in_k else v
    splits = parts(batch, heads, q.device)
    numbers = numbered(valid)
    width = triton_attend.width(parsed, shape)
    part = q.new_empty((batch, heads, tokens, hq // heads, splits, width), dtype=torch.float32)
    stats = q.new_empty((batch, heads, tokens, hq // heads, splits, 2), dtype=torch.float32)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    made: list[Any] = [x.contiguous() for x in (basis, offset, cos, sin) if x is not None]
    if cos is not None:
        made.append(cos.shape[2] * cos.shape[3] if cos.shape[0] > 1 else 0)
    given = [q, k, v, numbers, *made, *_held(parsed, planes, shape.dims, q.dtype), part, stats,
             slot, *([member] if parsed.members > 1 else []), batch, tokens, splits,
             *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
             *(p.shape[3] for p in tables(parsed, planes, (dk, dv), q.dtype))]
    names = triton_attend.arguments(parsed, shape)

    def run(cut: Tile, what: str = "attend") -> None:
        text = triton_attend.source(parsed, shape, cut, what)
        grid = (splits, batch * heads, -(-tokens // cut.queries))
        start(kernel(text, triton_attend.name(parsed, shape, cut, what)), grid,
              dict(zip(names, given, strict=True)), num_warps=cut.warps, num_stages=cut.stages)

    cut = triton_tune.chosen(parsed, shape, triton_tune.target(q.device), _timer(run, q))
    run(cut)
    o = q.new_empty((batch, tokens, hq, dv)).transpose(1, 2)
    lse = q.new_empty((batch, hq, tokens), dtype=torch.float32)
    start(helpers()["merge"], (batch * hq * tokens,), dict(
        part=part, stats=stats, numbers=numbers, sinks=stats if sinks is None else sinks, out=o,
        lse=lse, tokens=tokens, G=hq // heads, H=heads, DV=shape.dims[1],
        DVP=padded(shape.dims[1]), OUT=dv, WIDTH=width, SPLITS=splits,
        TURN=triton_attend.turns(parsed, "v", shape.dims[1]), SINKS=sinks is not None,
        ABREAST=ABREAST), num_warps=1 if dv <= WIDEST // 2 else 2)
    places = parsed.places((dk, dv), q.dtype, [p.shape for p in planes]) + tokens if mass else 0
    weights = q.new_zeros((batch, heads, places), dtype=torch.float32)
    if mass:
        at = names.index("part")
        names = triton_attend.arguments(parsed, shape, "mass")
        given[at : at + 2] = [weights, _looking(lse, valid, looks), places]
        run(cut, "mass")
    return o, lse, weights


def _looking(lse: Tensor, valid: Tensor, looks: int) -> Tensor:
    """Log-sum-exps [B, Hq, S] under which only the last `looks` queries of a row have weights."""
    if not looks or valid.shape[1] == 1:
        return lse
    left = valid.flip(1).cumsum(1).flip(1)
    return lse.masked_fill((left > looks)[:, None], torch.inf)


def append(planes: list[Tensor], k: list[Tensor], v: list[Tensor], positions: Tensor,
           valid: Tensor, *, store: str, slots: list[int]) -> None:
    """As kvc.append. Single tokens of all layers are stored at once, others layer by layer."""
    parsed, dims = Store.parse(store), (k[0].shape[3], v[0].shape[3])
    batch, tokens, members = valid.shape[0], valid.shape[-1], parsed.members
    lines = 1 if valid.dim() == 2 else valid.shape[1]  # or each head stores tokens of its own
    new = valid.sum(-1, dtype=torch.int32)
    columns = new - 1 if _one(tokens) else torch.argsort(
        valid.logical_not(), dim=-1, stable=True).to(torch.int32)
    spec = triton_append.Shape(k[0].shape[1], dims, k[0].dtype)
    sizes = [p.shape[3] for p in tables(parsed, planes, dims, k[0].dtype)]
    together = len(slots) if _one(tokens) else 1
    for at, many in _neighbours(slots, together):
        own = slice(at * members, (at + many) * members)
        keys, values = (torch.stack(list(x[own])) if many * members > 1 else x[at][None]
                        for x in (k, v))
        keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
        for phase in triton_append.PHASES:  # the first reads what the second may overwrite
            text = triton_append.source(parsed, spec, phase)
            if not text:
                continue
            grid = (triton_append.chunks(parsed, spec, phase, tokens), batch * spec.heads * many,
                    len(parsed.sides))
            given = [keys, values, columns, new,
                     *_held(parsed, planes, dims, k[0].dtype), slots[at], batch, tokens, lines,
                     *keys.stride()[:4], *values.stride()[:4], *sizes]
            names = triton_append.arguments(parsed, spec)
            start(kernel(text, triton_append.name(parsed, spec, phase)), grid,
                  dict(zip(names, given, strict=True)),
                  num_warps=triton_append.warps(parsed, spec, phase))
    for slot in slots:
        planes[0].select(0, slot).add_(new.unsqueeze(1) if new.dim() == 1 else new)


def move(heads: Any, dims: tuple[int, int], dtype: torch.dtype, sources: Tensor) -> None:
    """As kernels.evict.move: tokens take the places of those that were dropped."""
    store, (rows, slots) = heads.store, sources.shape
    given = [sources.contiguous(), slots]
    for table, planes in evict.tables(store, dims, dtype).items():
        given += [heads.named[table], heads.named[table].shape[1],
                  *(heads.named[plane] for plane in planes)]
    run = kernel(triton_evict.source(store, dims, dtype), triton_evict.name(store, dims, dtype))
    names = triton_evict.arguments(store, dims, dtype)
    start(run, (rows, -(-slots // triton_evict.TOKENS)), dict(zip(names, given, strict=True)))


def tables(store: Store, planes: Sequence[Tensor], dims: tuple[int, int], dtype: torch.dtype
           ) -> list[Tensor]:
    """The page tables among a kernel's planes."""
    return [p for name, p in zip(parameters(store, dims, dtype), planes, strict=False)
            if name.endswith("_table")]


def _held(store: Store, planes: Sequence[Tensor], dims: tuple[int, int], dtype: torch.dtype
          ) -> Sequence[Tensor]:
    """The planes that kernels read and write."""
    return planes[: len(parameters(store, dims, dtype))]


def numbered(valid: Tensor) -> Tensor:
    """int32 [B, S]: how many tokens of the call come before each, padding left out; -1: padding."""
    if _one(valid.shape[1]):
        return valid.to(torch.int32) - 1
    return torch.where(valid, valid.cumsum(1) - 1, -1).to(torch.int32)


def parts(batch: Any, heads: int, device: torch.device) -> int:
    """Into how many parts a head's tokens are split: enough programs to fill the device."""
    rows = batch if isinstance(batch, int) else 4  # a graph for any batch
    return max(1, min(SPLITS, PROGRAMS * _processors(device) // (rows * heads)))


def start(run: Any, grid: tuple[Any, ...], given: dict[str, Any], **options: int) -> None:
    """Launch a kernel where tracing sees it; by the interpreter if that is what it was made for."""
    from triton.runtime.jit import JITFunction

    if isinstance(run, JITFunction):
        run = torch.library.wrap_triton(run)
    run[grid](**given, **options)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _timer(run: Callable[[Tile], None], x: Tensor) -> Callable[[Tile], float] | None:
    """Milliseconds of a kernel that is run on x's device; None where none can be: in a graph that
    is being traced, and by the interpreter."""
    if x.device.type != "cuda" or type(x) is not Tensor or torch.compiler.is_compiling() \
            or torch.cuda.is_current_stream_capturing():
        return None
    from triton.testing import do_bench

    return lambda cut: float(do_bench(lambda: run(cut)))


def _one(tokens: Any) -> bool:
    return isinstance(tokens, int) and tokens == 1


def _neighbours(slots: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Runs of slots that follow each other: (index of the first, how many)."""
    runs: list[tuple[int, int]] = []
    for i, slot in enumerate(slots):
        if runs and runs[-1][1] < most and slot == slots[i - 1] + 1:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((i, 1))
    return runs


