"""Laws of kernels: on every target a step reads and stores what the plain bodies do.

Stores are those that the registered methods make, and those of every format that has a kernel, with
random parameters, GQA ratios, head sizes and dtypes. The C++ kernels are compiled as a step
compiles them; Triton's run by its interpreter (TRITON_INTERPRET=1 from the start of the process),
or on a GPU if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import getitem
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompile.backend.inductor import compile_graph
from kvcompile.checks.rounding import Arithmetic, rounding
from kvcompile.format import Format, term_of
from kvcompile.ir import APPEND, ATTEND
from kvcompile.laws import How, View
from kvcompile.method import Method
from kvcompile.planes import Group
from kvcompile.registry import module
from kvcompile.rows import fused
from kvcompile.site import Site
from kvcompile.store import Store
from kvcompile.testing.law import law
from kvcompile.testing.stores import Shape, drawn
from kvcompile.testing.strategies import dims, formats_of

LENGTHS = (0, 80, 208)  # tokens of the rows, and SPARE more, before the steps: in those one row
SPARE = 46              # ends a step of 16, two a block of 128
STEPS = {"C++": 12, "Triton": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COST = 20


class Step(NamedTuple):
    """What a kernel is made for."""

    store: Store
    shape: Shape
    dtype: torch.dtype

    @property
    def site(self) -> Site:
        q_heads, heads, dim = self.shape
        return Site(0, q_heads, heads, (dim, dim), self.dtype, 0, self.store)

    def group(self) -> Group:
        """Planes of two layers, of which the second is used, with random tokens in its rows."""
        group, most = Group([self.site, self.site], len(LENGTHS), torch.device("cpu")), max(LENGTHS)
        group.reserve([most + SPARE + max(STEPS.values())] * len(LENGTHS))
        first = torch.arange(most)[None] < torch.tensor(LENGTHS)[:, None]
        for tokens, valid, seed in ((most, first, 0), (SPARE, torch.ones(len(LENGTHS), SPARE), 1)):
            _, k, v = self.tokens(tokens, seed)
            APPEND(group.planes, k, v, _numbers(valid), valid.bool(), store=str(self.store),
                   slots=[1])
        return group

    def tokens(self, tokens: int, seed: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """q, and k and v of every layer of the slot, with an outlier channel and a token of 0."""
        (q_heads, heads, dim), g = self.shape, torch.Generator().manual_seed(seed)
        rows, members = len(LENGTHS), self.store.members
        k, v = torch.randn(2, members, rows, heads, tokens, dim, generator=g)
        k[..., 5] *= 8
        k[..., tokens // 2, :] *= tokens == 1
        q = torch.randn(rows, q_heads, tokens, dim, generator=g).to(self.dtype)
        keys = list(k.to(self.dtype))
        return q, keys, keys if self.store.v_in_k else list(v.to(self.dtype))

    def attend(self, q: Tensor, k: list[Tensor], v: list[Tensor], planes: list[Any],
               valid: Tensor) -> tuple[Any, dict[str, Any]]:
        """The arguments of kvc.attend for the last layer of the slot."""
        options = dict(scale=self.shape.dim**-0.5, store=str(self.store), slot=1,
                       member=self.store.members - 1)
        return (q, k[-1], v[-1], planes, valid.long(), valid, None), options

    def read(self, group: Group, row: int) -> tuple[Tensor, Tensor]:
        """K and V [H, N, D] in fp32 as the plain body reads a row's for the last layer."""
        pages, dim = module("kernels", "pages"), self.shape.dim
        named = pages.named(group.specs, group.planes, [1])
        n, found = int(group.planes[0][1, row, 0]), []
        for side in self.store.sides:
            tiers = pages.tiers(self.store, side, named, dim, torch.float32)
            every = pages.stored(self.store, side, tiers, row, slice(0, self.shape.heads), n)
            found.append(every[..., (self.store.members - 1) * dim:])
        return found[0], found[-1]


def _numbers(valid: Tensor) -> Tensor:
    return (valid.long().cumsum(1) - 1).clamp_min(0)


def aim(step: Step, q: Tensor, group: Group, at: int) -> None:
    """Make every query see little but one token, at an edge of a tier: the `at`th."""
    q_heads, heads, dim = step.shape
    for row in range(len(LENGTHS)):
        n, (k, _) = int(group.planes[0][1, row, 0]), step.read(group, row)
        spans = [x for side in step.store.sides for x in step.store.spans(side, n).values()]
        ends, kept = sorted({i + step.store.sinks for x in spans for i in x}), step.store.numbers(n)
        wanted = ends[at // 2 % len(ends)] - at % 2
        key = k[:, kept.index(wanted) if wanted in kept else 0]
        far = 12 * dim**0.5 / key.square().sum(-1, keepdim=True).clamp_min(1e-6)
        q[row, :, 0] = (key * far).repeat_interleave(q_heads // heads, 0).to(step.dtype)


def walk(step: Step, run: Callable[..., Tensor], group: Group, arithmetic: Arithmetic,
         steps: int) -> None:
    """Some steps by the plain bodies on `group` and by `run(q, k, v, valid)`, which stores and
    returns o: it is within the rounding of a kernel of such `arithmetic`."""
    exact = Arithmetic()
    for at in range(steps):
        q, k, v = step.tokens(1, 2 + at)
        if at % 3:
            aim(step, q, group, at)
        valid = torch.ones(len(LENGTHS), 1, dtype=torch.bool)
        valid[at % len(LENGTHS)] = at % 2 == 0                     # a row of padding
        given, options = step.attend(q.float(), [x.float() for x in k], [x.float() for x in v],
                                     group.planes, valid)
        want = ATTEND(*given, **options)[0][:, :, 0]
        got = run(q, k, v, valid).float()[:, :, 0]
        assert got.shape == want.shape and not got[~valid[:, 0]].any(), "padding is not 0"
        for row in valid[:, 0].nonzero()[:, 0].tolist():
            seen = (torch.cat([old, new[-1][row].float()], 1)
                    for old, new in zip(step.read(group, row), (k, v), strict=True))
            view, how = View.exact(*seen), How(step.shape.dim**-0.5)
            most = (rounding(q[row, :, 0], view, how, arithmetic)
                    + rounding(q[row, :, 0], view, how, exact))
            off = (got[row] - want[row]).abs().double()
            assert (off <= most).all(), (
                f"row {row}: off by {float(off.max()):.3g}, allowed {float(most.min()):.3g}")
        APPEND(group.planes, k, v, valid.long(), valid, store=str(step.store), slots=[1])


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
    flat, members, graph = [q, *k, *v, *got.planes, valid.long(), valid], len(k), Graph()
    x = [graph.placeholder(f"x{i}") for i in range(len(flat))]
    keys, values, planes = x[1 : 1 + members], x[1 + members : 1 + 2 * members], x[1 + 2 * members:]
    at, ok, (_, options) = planes.pop(-2), planes.pop(), step.attend(q, k, v, [], valid)
    both = graph.call_function(
        ATTEND, (x[0], keys[-1], values[-1], planes, at, ok, None), options)
    o = graph.call_function(getitem, (both, 0))
    graph.call_function(APPEND, (planes, keys, values, at, ok),
                        dict(store=str(step.store), slots=[1]))
    graph.output((o,))
    run = compile_graph(GraphModule({}, graph), flat, [[]] * len(flat))

    def one(q: Tensor, k: list[Tensor], v: list[Tensor], valid: Tensor) -> Tensor:
        with torch.no_grad(), ran:
            o: Tensor = run(q, *k, *v, *got.planes, valid.long(), valid)[0]
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

    def one(q: Tensor, k: list[Tensor], v: list[Tensor], valid: Tensor) -> Tensor:
        q, valid, *both = (x.to(device) for x in (q, valid, *k, *v))
        k, v = both[: len(k)], both[len(k):]
        given, options = step.attend(q, k, v, planes, valid)
        o: Tensor = (ATTEND if "attend" in lacks else launch.attend)(*given, **options)[0]
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
    shape = attend.shape_of(store, heads, q_heads, (dim, dim), step.dtype, dim**-0.5, 0, 0.0, True)
    found = {"attend": attend.unsupported(store, shape),
             "append": append.unsupported(store, (dim, dim), step.dtype)}
    return {op: reason for op, reason in found.items() if reason}


def drawn_step(thing: Method | type[Format], data: Any) -> Step:
    """A step under a method with some parameters, or with a format on both sides."""
    if isinstance(thing, type):
        both = data.draw(formats_of(thing).filter(lambda f: dims(f, "k") and dims(f, "v")))
        store = Store.parse(f"store(k={term_of(both)}, v={term_of(both)})")
    else:
        store = drawn(thing, data)
    return Step(store, Shape.drawn(store, data), data.draw(st.sampled_from(DTYPES)))


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
