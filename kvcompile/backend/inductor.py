"""The door to torch's private compiler API (torch 2.13). Only template.py beside it imports more.

    torch._inductor.compile_fx.compile_fx      compile an fx graph without Dynamo: no guards are
        evaluated per call (a decode step has hundreds of planes and weights), nothing can recompile
    CompileContext   which frame is compiled, to warn once for all of its graphs
    decompositions   to which the bodies of inlined kvc ops are added
    make_fx   Dynamo graphs as ATen ops before any decomposition
    pick_vec_isa   finds by compiling trial programs what vectors the CPU and the C++ compiler have
    get_cpp_compiler, InvalidCxxCompiler   whether there is a compiler, before a model is captured
    torch.fx._lazy_graph_module._use_lazy_graph_module   torch.export makes a score of graph modules
        on its way, whose Python nobody runs: writing it is a quarter of its time
    torch._subclasses.FakeTensorMode, ShapeEnv, StatelessSymbolicContext, DimDynamic   inputs with
        symbolic sizes
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from threading import Thread
from typing import cast

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._guards import CompileContext
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.decomposition import decompositions
from torch._inductor.exc import InvalidCxxCompiler
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

import kvcompile.backend.kernels  # noqa: F401  # what ops are lowered to
from kvcompile.backend import gpu
from kvcompile.backend.regions import outline
from kvcompile.backend.template import cache_key
from kvcompile.errors import KVCompileError
from kvcompile.ir import INLINED
from kvcompile.structure.lazy import LazyGraphModule


def compile_graph(gm: GraphModule, inputs: Sequence[Tensor],
                  dynamic: Sequence[Sequence[int]]) -> Callable[..., list[Tensor]]:
    """Compile `gm` with Inductor for inputs like `inputs`; sizes of the `dynamic` dims may vary.

    A dynamic dim must have a size of at least 2 in `inputs`; the compiled function takes any size.
    Dynamic dims of equal size in `inputs` are one symbol: they must always be equal.
    It trusts its caller with the other sizes: checking hundreds of tensors takes a millisecond.
    """
    gpu.lower(gm, inputs[0].device)
    if all(x.device.type == "cpu" for x in inputs):
        outline(gm)
    env = ShapeEnv(duck_shape=True)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    fakes = []
    for i, (x, dims) in enumerate(zip(inputs, dynamic, strict=True)):
        sizes = [DimDynamic.DUCK if d in dims else DimDynamic.STATIC for d in range(x.dim())]
        context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(mode.from_tensor(x, symbolic_context=context,
                                      source=ConstantSource(f"__kvc_{i}")))
    with torch.no_grad():
        return _compile(gm, fakes, size_asserts=False, alignment_asserts=False)


def check_compiler() -> None:
    """Raise KVCompileError where Inductor finds no C++ compiler; else see what it can do."""
    try:
        get_cpp_compiler()
        _vectors()
    except InvalidCxxCompiler:
        wanted = os.environ.get("CXX", "g++")
        raise KVCompileError(f"no working C++ compiler ({wanted}): install g++ or set CXX, or pass "
                             "compile=False for the slow plain bodies") from None


@cache
def _vectors() -> Thread:
    """A search that compiles trial programs while a model is captured. It is joined before anything
    else looks: torch changes its flags on the way, and two at a time leave them changed."""
    thread = Thread(target=pick_vec_isa)
    thread.start()
    return thread


def lazy_graphs() -> AbstractContextManager[None]:
    """Within it torch writes the Python of graph modules when they are first called."""
    return cast(AbstractContextManager[None], _use_lazy_graph_module(True))


def to_aten(gm: GraphModule) -> GraphModule:
    """A Dynamo graph as ATen ops, sdpa and linear kept whole, traced on Dynamo's fake inputs."""
    fakes = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
    mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), nullcontext())

    def run(*args: object) -> object:
        return torch.fx.Interpreter(gm).run(*args)

    with torch.no_grad(), mode:
        return make_fx(run, tracing_mode="real", pre_dispatch=True)(*fakes)


def frame() -> int:
    """The number of the Python frame that Dynamo is compiling, the same when it recompiles it."""
    current = CompileContext.current_compile_id()
    return -1 if current is None or current.frame_id is None else current.frame_id


def compile_dynamo(gm: GraphModule, inputs: Sequence) -> Callable:
    """Compile what a Dynamo backend was given, with Inductor."""
    return _compile(gm, inputs)


def _compile(gm: GraphModule, inputs: Sequence, **settings: bool) -> Callable:
    if isinstance(gm, LazyGraphModule):  # its text is in the key of Inductor's caches
        gm = GraphModule(gm, gm.graph)
    _vectors().join()
    decompositions.update(INLINED)  # `decompositions=` would keep Inductor from using its cache
    return cast(Callable, compile_fx(gm, list(inputs), config_patches=cache_key() | settings))
