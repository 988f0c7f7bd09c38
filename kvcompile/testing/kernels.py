"""Laws of kernels: on every target a step reads and stores what the plain bodies do.

Stores are those that the registered methods make, and those of every format that has a kernel, with
random parameters, GQA ratios, head sizes and dtypes; keys are what is stored, or made of that at
read: as a method's passes do it, or at random. The C++ kernels are compiled as a step compiles
them; Triton's run by its interpreter (TRITON_INTERPRET=1 from the start of the process), or on a
GPU if there is one.
"""

from __future__ import annotations

from functools import cache
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompile.backend.inductor import compile_graph
from kvcompile.ir import APPEND, ATTEND
from kvcompile.planes import Group
from kvcompile.registry import module
from kvcompile.rows import fused
from kvcompile.testing.law import law
from kvcompile.testing.step import LENGTHS, STEPS, Step, drawn_step, operands, walk

COST = 20


def same_bits(both: Walked, free: set[str]) -> None:
    """Plane by plane, but for those that are `free`."""
    group = both.want
    for spec, want, got in zip(group.specs, group.planes, both.got.planes, strict=True):
        if spec.name.rpartition(".")[2] in free:
            continue
        a, b = (x.contiguous().view(torch.uint8) for x in (want, got))
        assert torch.equal(a, b), f"{spec.name}: {int((a != b).sum())} of {a.numel()} bytes differ"


def reads_alike(step: Step, both: Walked) -> None:
    """What is read of the same tokens differs by the rounding of fp16 numbers."""
    for row in range(len(LENGTHS)):
        for want, got in zip(step.read(both.want, row), step.read(both.got, row), strict=True):
            off, most = (want - got).abs().max(), float(want.abs().max()) * 2.0**-9
            assert off <= most, f"row {row}: off by {float(off):.3g}, allowed {most:.3g}"


def free_on_a_gpu(fmt: Any) -> set[str]:
    """Planes that Triton's writer of a format, or of one inside, may fill with other numbers of
    the same meaning: its `triton_free`."""
    inner = getattr(fmt, "inner", None)
    return {*getattr(fmt, "triton_free", ())} | (free_on_a_gpu(inner) if inner else set())


class Ran(TorchDispatchMode):
    """The kvc ops whose plain bodies run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kvc":
            self.ops.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


class Walked(NamedTuple):
    """Both groups after the steps, and what ran as a plain body."""

    want: Group
    got: Group
    plain: set[str]


@cache
def compiled(step: Step) -> Walked:
    """The steps by what Inductor makes of kvc.attend and kvc.append."""
    want, got, ran = step.group(), step.group(), Ran()
    q, k, v = step.tokens(1, 2)
    valid = torch.ones(len(LENGTHS), 1, dtype=torch.bool)
    made = operands(step)
    flat, members, graph = [q, *k, *v, *got.planes, valid.long(), valid], len(k), Graph()
    x = [graph.placeholder(f"x{i}") for i in range(len(flat))]
    keys, values, planes = x[1 : 1 + members], x[1 + members : 1 + 2 * members], x[1 + 2 * members:]
    at, ok, (_, options) = planes.pop(-2), planes.pop(), step.attend(q, k, v, [], valid)
    more = {name: graph.placeholder(name) for name in made}
    both = graph.call_function(
        ATTEND, (x[0], keys[-1], values[-1], planes, at, ok, None), options | more)
    o = graph.call_function(getitem, (both, 0))
    graph.call_function(APPEND, (planes, keys, values, at, ok),
                        dict(store=str(step.store), slots=[1]))
    graph.output((o,))
    flat += made.values()
    run = compile_graph(GraphModule({}, graph), flat, [[]] * len(flat))

    def one(q: Tensor, k: list[Tensor], v: list[Tensor], valid: Tensor) -> Tensor:
        with torch.no_grad(), ran:
            o: Tensor = run(q, *k, *v, *got.planes, valid.long(), valid, *made.values())[0]
        return o

    name = "eager" if "attend" in fused(step.site) else "cpp_attend"
    walk(step, one, want, module("kernels", name).arithmetic(step.dtype), STEPS["C++"])
    return Walked(want, got, ran.ops)


@cache
def launched(step: Step) -> Walked:
    """The steps by Triton's kernels, as far as there are any."""
    launch, lacks = module("kernels", "triton_launch"), lacking(step)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    want, got = step.group(), step.group()
    planes = [p.to(device) for p in got.planes]
    made = {name: x.to(device) for name, x in operands(step).items()}

    def one(q: Tensor, k: list[Tensor], v: list[Tensor], valid: Tensor) -> Tensor:
        q, valid, *both = (x.to(device) for x in (q, valid, *k, *v))
        k, v = both[: len(k)], both[len(k):]
        given, options = step.attend(q, k, v, planes, valid)
        run = ATTEND if "attend" in lacks else launch.attend
        o: Tensor = run(*given, **options, **made)[0]
        (APPEND if "append" in lacks else launch.append)(
            planes, k, v, valid.long(), valid, store=str(step.store), slots=[1])
        return o.cpu()

    arithmetic = module("kernels", "triton_attend").arithmetic(step.dtype)
    walk(step, one, want, arithmetic, STEPS["Triton"])
    got.planes = [p.cpu() for p in planes]
    return Walked(want, got, set(lacks))


def lacking(step: Step) -> dict[str, str]:
    """For ops that have no Triton kernel, the reason."""
    attend, append = module("kernels", "triton_attend"), module("kernels", "triton_append")
    (q_heads, heads, dim), store = step.shape, step.store
    shape = attend.shape_of(store, heads, q_heads, (dim, dim), step.dtype, step.dim**-0.5,
                            made=step.made)
    found = {"attend": attend.unsupported(store, shape),
             "append": append.unsupported(store, (dim, dim), step.dtype)}
    return {op: reason for op, reason in found.items() if reason}


@law("format", lambda cls: hasattr(cls, "cpp"), COST, "C++")
@law("method", cost=COST, target="C++")
def a_compiled_step_attends_as_the_body(thing: Any, data: Any) -> None:
    """kvc.attend's C++ kernel is within rounding of its body, and runs unless explain says why."""
    step = drawn_step(thing, data)
    assert ("attend" in compiled(step).plain) == ("attend" in fused(step.site))


@law("format", lambda cls: hasattr(cls, "cpp"), COST, "C++")
@law("method", cost=COST, target="C++")
def a_compiled_step_stores_the_same_bits(thing: Any, data: Any) -> None:
    """kvc.append's C++ kernel writes what its body does, and runs unless explain says why."""
    step = drawn_step(thing, data)
    same_bits(compiled(step), set())
    assert ("append" in compiled(step).plain) == ("append" in fused(step.site))


@law("format", lambda cls: hasattr(cls, "triton"), COST, "Triton")
@law("method", cost=COST, target="Triton")
def a_step_on_a_gpu_attends_as_the_body(thing: Any, data: Any) -> None:
    """kvc.attend's Triton kernel is within rounding of its body, or there is a reason for none."""
    launched(drawn_step(thing, data))


@law("format", lambda cls: hasattr(cls, "triton"), COST, "Triton")
@law("method", cost=COST, target="Triton")
def a_step_on_a_gpu_stores_the_same_bits(thing: Any, data: Any) -> None:
    """kvc.append's Triton kernel writes what its body does, or there is a reason for none."""
    step = drawn_step(thing, data)
    free = {name for side in step.store.sides for name in free_on_a_gpu(
        step.store.side(side).format)}
    same_bits(launched(step), free)
    reads_alike(step, launched(step))
