"""Storing tokens by the fused kernel in graphs that run eagerly: prompts and later turns."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from kvcompile.backend.inductor import compile_graph
from kvcompile.ir import APPEND
from kvcompile.registry import module
from kvcompile.rewrite import copy_graph
from kvcompile.store import Store


class Storing:
    """kvc.append, compiled by itself: once for a store, its head dimensions and a batch of one or
    of more rows. What the kernel cannot store, and one-token calls, go to the plain body, and
    everything does without `compile`."""

    def __init__(self, compile: bool) -> None:
        self.compile = compile
        self._compiled: dict[tuple, Callable] = {}
        self.seconds = 0.0  # spent in `append` so far

    def into(self, gm: GraphModule) -> GraphModule:
        """`gm` storing by the kernel."""
        def append(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            self.append(*args, **kwargs)
            self.seconds += time.perf_counter() - start

        gm = copy_graph(gm)
        for node in gm.graph.nodes:
            if node.target is APPEND:
                node.target = append
        gm.recompile()
        return gm

    def append(self, planes: list[Tensor], k: list[Tensor], v: list[Tensor], positions: Tensor,
               valid: Tensor, *, store: str, slots: Sequence[int]) -> None:
        """As the op."""
        dims, dtype = (k[0].shape[-1], v[0].shape[-1]), k[0].dtype
        parsed = Store.parse(store)
        if (not self.compile or valid.device.type != "cpu" or valid.shape[-1] == 1
                or module("kernels", "cpp_append").unsupported(parsed, dims, dtype)):
            APPEND(planes, k, v, positions, valid, store=store, slots=slots)
            return
        specs = parsed.planes(dims, dtype)
        for slot, keys, values in zip(slots, k, v, strict=True):
            own = [p if spec.shape else p[slot : slot + 1]
                   for spec, p in zip(specs, planes, strict=True)]
            key = (store, dims, k[0].shape[1], dtype, valid.shape[0] > 1, valid.dim())
            if key not in self._compiled:
                self._compiled[key] = _compile(store, own, keys, values, valid)
            self._compiled[key](*own, keys.contiguous(), values.contiguous(),
                                positions.contiguous(), valid.contiguous())


def _compile(store: str, planes: list[Tensor], k: Tensor, v: Tensor, valid: Tensor) -> Callable:
    """A graph of one kvc.append for one layer, any number of tokens and pages."""
    rows, specs = valid.shape[0], Store.parse(store).planes((k.shape[-1], v.shape[-1]), k.dtype)
    batch, tokens = (rows, 5) if rows == 1 else (7, 5)
    inputs: list[Tensor] = []
    dynamic: list[list[int]] = []

    def add(like: Tensor, shape: Sequence[int], dims: list[int]) -> None:
        inputs.append(torch.empty(*shape, dtype=like.dtype))
        dynamic.append([d for d in dims if shape[d] > 1])

    for number, (spec, plane) in enumerate(zip(specs, planes, strict=True)):
        if spec.shape:
            add(plane, (11 + number, *spec.shape), [0])
        else:
            pages = (11 + number,) if spec.name.endswith(".table") else ()
            add(plane, (1, batch, k.shape[1], *pages), [1, 3] if pages else [1])
    add(k, (batch, k.shape[1], tokens, k.shape[3]), [0, 2])
    add(v, (batch, v.shape[1], tokens, v.shape[3]), [0, 2])
    heads = k.shape[1 : valid.dim() - 1]
    for like in (torch.empty(0, dtype=torch.int64), valid):
        add(like, (batch, *heads, tokens), [0, 1 + len(heads)])
    graph = Graph()
    nodes: list[Any] = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    held, (keys, values, positions, ok) = nodes[: len(planes)], nodes[len(planes):]
    graph.call_function(APPEND, (held, [keys], [values], positions, ok),
                        {"store": store, "slots": [0]})
    graph.output((ok,))
    return compile_graph(GraphModule({}, graph), inputs, dynamic)
