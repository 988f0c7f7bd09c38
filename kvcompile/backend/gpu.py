"""The kvc ops of a decode step on a GPU: Triton kernels, eagerly and inside compiled graphs.

Eagerly the ops' CUDA bodies launch the kernels. A compiled graph gets them as `torch.library.
triton_op`s, into which Inductor sees: it fuses what is around them, and CUDA graphs capture them.
What Triton has no kernel for runs its plain body.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kvcompile.ir import APPEND, ATTEND, LIB, argument
from kvcompile.kernels import (
    eager,
    evict,
    rank,
    triton_append,
    triton_attend,
    triton_launch,
    triton_source,
)
from kvcompile.kernels.rebuild import Made, made
from kvcompile.site import made_of
from kvcompile.store import Store

TENSORS = ("q", "k", "v", "planes", "positions", "valid", "sinks", "basis", "offset", "cos", "sin")
#          kvc.attend's, all of which are positional for a triton_op


def unsupported(op: Any, store: Store, heads: int, queries: int, dims: tuple[int, int],
                dtype: torch.dtype, made: Made | None = None) -> str | None:
    """Why `op` (kvc.attend or kvc.append) has no GPU kernel; None if it has one."""
    if not triton_source.installed():
        return "no Triton: pip install triton"
    if op is APPEND:
        return triton_append.unsupported(store, dims, dtype)
    shape = triton_attend.shape_of(store, heads, queries, dims, dtype, 1.0, made=made)
    return triton_attend.unsupported(store, shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, planes: Sequence[Tensor], positions: Tensor,
            valid: Tensor, sinks: Tensor | None, *, store: str, **options: Any
            ) -> tuple[Tensor, Tensor, Tensor]:
    dims = (k.shape[3], v.shape[3])
    basis, offset, cos = (options.get(name) for name in ("basis", "offset", "cos"))
    how = made(q.shape[3], k.shape[1], basis, offset, cos, options.get("style", ""))
    why = unsupported(ATTEND, Store.parse(store), k.shape[1], q.shape[1], dims, q.dtype, how)
    low = options.pop("low", False) and valid.shape[1] > 1  # else what one query gives
    run = partial(eager.attend, low=low) if why or low else triton_launch.attend
    return run(q, k, v, list(planes), positions, valid, sinks, store=store, **options)


def _append(planes: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], positions: Tensor,
            valid: Tensor, *, store: str, slots: Sequence[int]) -> None:
    dims, heads = (k[0].shape[3], v[0].shape[3]), k[0].shape[1]
    why = unsupported(APPEND, Store.parse(store), heads, heads, dims, k[0].dtype)
    run = eager.append if why else triton_launch.append
    run(list(planes), list(k), list(v), positions, valid, store=store, slots=list(slots))


def _evict(planes: Sequence[Tensor], mass: Sequence[Tensor], k: Sequence[Tensor],
           v: Sequence[Tensor], positions: Tensor, valid: Tensor, **options: Any) -> None:
    """Which tokens leave is told by torch's ops; a kernel moves the others. A step waits for the
    device only where `evict.waiting` says why."""
    mover = triton_launch.move if triton_source.installed() else None
    waits = mover is None or bool(
        evict.waiting(Store.parse(options["store"]), options["rules"], valid.shape[1]))
    evict.run(list(planes), list(mass), list(k), list(v), positions, valid, mover=mover,
              waits=waits, **options)


def _rank(planes: Sequence[Tensor], mass: Sequence[Tensor], k: Sequence[Tensor],
          v: Sequence[Tensor], positions: Tensor, valid: Tensor, **options: Any
          ) -> tuple[Tensor, Tensor]:
    """Torch's ops: those of a step look at nothing on the host."""
    run = rank.one_token if valid.shape[1] == 1 else rank.rank
    return run(list(planes), list(mass), list(k), list(v), positions, valid, **options)


LIB.impl("attend", _attend, "CUDA")
LIB.impl("append", _append, "CUDA")
LIB.impl("evict", _evict, "CUDA")
LIB.impl("rank", _rank, "CUDA")


def lower(gm: GraphModule, device: torch.device) -> None:
    """Put the Triton ops in the place of the kvc ops of a traced graph for `device`, a GPU."""
    if device.type != "cuda" or not triton_source.installed():
        return
    for node in gm.graph.nodes:
        if node.target in (ATTEND, APPEND) and not _refused(node):
            if node.target is ATTEND:
                node.args = tuple(argument(node, name) for name in TENSORS)
                node.kwargs = {n: x for n, x in node.kwargs.items()
                               if n not in (*TENSORS, "low")}
            node.target = _ops()[node.target]
    gm.recompile()


def _refused(node: Node) -> str | None:
    k, v = argument(node, "k"), argument(node, "v")
    many = node.target is APPEND
    keys, values = ((x[0] if many else x).meta.get("val") for x in (k, v))
    if keys is None or values is None:
        return "it was not traced"  # its CUDA body is launched as it is
    q = keys if many else node.args[0].meta["val"]  # type: ignore[union-attr]
    if node.kwargs.get("low") and q.shape[2] != 1:
        return "queries are counted one by one"
    return unsupported(node.target, Store.parse(argument(node, "store")), int(keys.shape[1]),
                       int(q.shape[1]), (int(keys.shape[3]), int(values.shape[3])), keys.dtype,
                       None if many else made_of(node))


_made: dict[Any, Any] = {}


def _ops() -> dict[Any, Any]:
    """kvc op -> the triton_op that does the same, with the same arguments."""
    if not _made:
        for op, mutated in ((ATTEND, ()), (APPEND, ("planes",))):
            name = op._schema.name.partition("::")[2]
            made: Any = torch.library.triton_op(f"kvc_triton::{name}", getattr(triton_launch, name),
                                           mutates_args=mutated)
            _made[op] = made._opoverload
    return _made
