"""The machine's streaming bandwidth: what reading memory once takes, and nothing else."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcompile.backend.inductor import compile_graph
from kvcompile.backend.template import contiguous, kernel, lowering, threads
from kvcompile.bench.timing import seconds
from kvcompile.ir import LIB, body

MIB = 512  # several times any last-level cache that a few cores have
LIB.define("read(Tensor x) -> Tensor")
READ = torch.ops.kvc.read.default


@torch.library.register_fake("kvc::read", lib=LIB)
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty(1)


@body("read")
def read(x: Tensor) -> Tensor:
    """The sum of x [N], int64 and modulo 2**64, as [1]."""
    return x.sum()[None]


@cache
def _lower() -> None:
    """Not at import: what is lowered is part of the key of Inductor's caches."""
    lowering(READ)(_read)


def _read(x: Any) -> Any:
    """Every thread adds up its part."""
    text = (f"int64_t sum = 0;\n#pragma omp parallel for simd num_threads({threads()}) "
            "reduction(+:sum)\nfor (int64_t i = 0; i < x_size[0]; i++) sum += x[i];\nout[0] = sum;")
    return kernel("", text, {"x": contiguous(x)}, [1], torch.int64)


class Bandwidth:
    """A probe to call between timed things; `samples` are GB/s of reading by all threads."""

    def __init__(self, mib: int = MIB) -> None:
        self.samples: list[float] = []
        self.buffer = torch.ones(mib * 2**17, dtype=torch.int64)
        _lower()
        graph = torch.fx.Graph()
        graph.output((graph.call_function(READ, (graph.placeholder("x"),)),))
        self.run = compile_graph(torch.fx.GraphModule({}, graph), [self.buffer], [[]])
        self.run(self.buffer)

    def __call__(self) -> None:
        """Take one sample."""
        took = seconds(lambda: self.run(self.buffer))
        self.samples.append(self.buffer.nbytes / took / 1e9)

    def since(self, start: int) -> list[float]:
        """The samples after the first `start`."""
        return self.samples[start:]
