"""kvc ops compiled by themselves, for graphs that run eagerly: prompts and later turns."""

import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from kvcompile.backend.inductor import compile_graph
from kvcompile.between import between, laid
from kvcompile.ir import APPEND, ATTEND, ATTENTION
from kvcompile.registry import module
from kvcompile.rewrite import copy_graph
from kvcompile.store import Plane, Store

ROWS, TOKENS, PAGES = 7, 5, 11  # sizes in the example that a kernel is compiled for; all may vary


_Planes = list[tuple[Plane, Tensor]]


class Alone:
    """kvc.append, kvc.attention and kvc.attend, each compiled once for a store, its heads and a
    batch of one or of more rows. What has no kernel, and calls of one token, go to the plain body;
    everything does without `compile`."""

    def __init__(self, compile: bool) -> None:
        self.compile = compile
        self._compiled: dict[tuple, Callable] = {}
        self.seconds = 0.0  # spent storing so far

    def into(self, gm: GraphModule) -> GraphModule:
        """`gm` with its attention and storing done by kernels, and what lies between compiled."""
        own = {APPEND: self._timed, ATTENTION: self.attention, ATTEND: self.attend}
        gm = copy_graph(gm)
        if self.compile:
            between(gm)
        for node in gm.graph.nodes:
            node.target = own.get(node.target, node.target)
        gm.recompile()
        return gm

    def _timed(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        self.append(*args, **kwargs)
        self.seconds += time.perf_counter() - start

    def append(self, planes: list[Tensor], k: list[Tensor], v: list[Tensor], positions: Tensor,
               valid: Tensor, *, store: str, slots: Sequence[int]) -> None:
        """As the op; layer by layer."""
        dims, dtype = (k[0].shape[-1], v[0].shape[-1]), k[0].dtype
        parsed = Store.parse(store)
        if not self._fits(valid) or module("kernels", "cpp_append").unsupported(parsed, dims,
                                                                                dtype):
            APPEND(planes, k, v, positions, valid, store=store, slots=slots)
            return
        each = parsed.members

        def call(graph: Graph, planes: list, *given: Any) -> Any:
            graph.call_function(APPEND, (planes, [*given[:each]], [*given[each : 2 * each]],
                                         *given[-2:]), {"store": store, "slots": [0]})
            return given[-1]

        for i, slot in enumerate(slots):
            own = _of_layer(parsed, dims, dtype, planes, slot)
            tokens = [laid(x) for y in (k, v) for x in y[i * each : (i + 1) * each]]
            self._run((APPEND, store, k[0].shape[1]), call, own,
                      [*tokens, positions.contiguous(), valid.contiguous()])

    def attention(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, valid: Tensor,
                  sinks: Tensor | None, *, store: str = "store", layer: int = 0, **options: Any
                  ) -> Tensor:
        """As the op."""
        parsed = Store.parse(store)
        if _rebuilt(options) or not parsed.exact or self._no_kernel(parsed, q, k, v, valid):
            return ATTENTION(q, k, v, positions, valid, sinks, store=store, **options)
        return self._attention(ATTENTION, [], q, k, v, positions, valid, sinks, options)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, planes: list[Tensor], positions: Tensor,
               valid: Tensor, sinks: Tensor | None, *, store: str, slot: int = 0, layer: int = 0,
               **options: Any) -> tuple[Tensor, ...]:
        """As the op; only o where a kernel gives it."""
        parsed, dims = Store.parse(store), (k.shape[-1], v.shape[-1])
        if options.get("mass") or parsed.rest or _rebuilt(options) or self._no_kernel(
                parsed, q, k, v, valid):
            return ATTEND(q, k, v, planes, positions, valid, sinks, store=store, slot=slot,
                          **options)
        own = _of_layer(parsed, dims, k.dtype, planes, slot)
        return (self._attention(ATTEND, own, q, k, v, positions, valid, sinks,
                                {**options, "store": store}),)

    def _fits(self, valid: Tensor) -> bool:
        return self.compile and valid.device.type == "cpu" and valid.shape[-1] > 1

    def _no_kernel(self, store: Store, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> bool:
        kernels = module("kernels", "cpp_attend")
        shape = kernels.Shape(k.shape[1], q.shape[1] // k.shape[1], (k.shape[3], v.shape[3]),
                              k.dtype, 1.0)
        return not self._fits(valid) or bool(kernels.unsupported(store, shape))

    def _attention(self, op: Any, planes: _Planes, q: Tensor, k: Tensor, v: Tensor,
                   positions: Tensor, valid: Tensor, sinks: Tensor | None, options: dict) -> Tensor:
        def call(graph: Graph, planes: list, q: Any, k: Any, v: Any, *rest: Any) -> Any:
            more = rest if sinks is not None else (*rest, None)
            held = (planes,) if planes else ()
            out = graph.call_function(op, (q, k, v, *held, *more), options)
            return graph.call_function(operator.getitem, (out, 0)) if planes else out

        given = [laid(q), laid(k), laid(v), positions, valid.contiguous()]
        given += [] if sinks is None else [sinks]
        return self._run((op, *options.items(), q.shape[1], k.shape[1], sinks is None), call,
                         planes, given)

    def _run(self, key: tuple, call: Callable, planes: _Planes, given: list[Tensor]) -> Any:
        """`call`, compiled for tensors like these: any number of pages, and of rows and tokens."""
        rows = ROWS if given[0].shape[0] > 1 else 1
        key = (*key, rows, *((x.dtype, x.dim(), x.shape[-1] if x.dim() == 4 else 0,
                              x.is_contiguous()) for x in given))
        if key not in self._compiled:
            self._compiled[key] = _compile(call, planes, given, rows)
        return self._compiled[key](*(plane for _, plane in planes), *given)[0]


def _rebuilt(options: dict[str, Any]) -> bool:
    """Whether keys are computed from what is stored, which no kernel does."""
    return options.get("basis") is not None or options.get("cos") is not None


def _of_layer(store: Store, dims: tuple[int, int], dtype: torch.dtype, planes: list[Tensor],
              slot: int) -> _Planes:
    """The planes with count and tables of one layer."""
    return [(spec, p if spec.shape else p[slot : slot + 1])
            for spec, p in zip(store.planes(dims, dtype), planes, strict=True)]


def _compile(call: Callable, planes: _Planes, given: list[Tensor], rows: int) -> Callable:
    """A graph of one op of one layer. A size of its own for whatever may vary by itself."""
    inputs: list[Tensor] = []
    dynamic: list[list[int]] = []

    def add(like: Tensor, shape: Sequence[int], dims: list[int]) -> None:
        x = torch.empty(*shape, dtype=like.dtype)
        if like.dim() == 4 and not like.is_contiguous():
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        inputs.append(x)
        dynamic.append([d for d in dims if shape[d] > 1])

    for number, (spec, plane) in enumerate(planes):
        if spec.shape:
            add(plane, (PAGES + number, *spec.shape), [0])
        else:  # the count (or limit) [1, B, H], and tables [1, B, H, pages]
            pages = [PAGES + number] * (plane.dim() - 3)
            add(plane, (1, rows, plane.shape[2], *pages), [1, 3][: plane.dim() - 2])
    for x in given:
        if x.dim() == 4:
            add(x, (rows, x.shape[1], TOKENS, x.shape[3]), [0, 2])
        elif x.dim() == 3:
            add(x, (rows, x.shape[1], TOKENS), [0, 2])
        elif x.dim() == 2:
            add(x, (rows, TOKENS), [0, 1])
        else:
            add(x, x.shape, [])
    graph = Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    graph.output((call(graph, nodes[: len(planes)], *nodes[len(planes):]),))
    return compile_graph(GraphModule({}, graph), inputs, dynamic)
