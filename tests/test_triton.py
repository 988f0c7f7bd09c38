"""Triton's kernels without a GPU: what they compute (interpreted), and what they compile to."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support import EVERY, optimized, plain

import kvcompile
from kvcompile.backend import gpu, offline
from kvcompile.engine import Engine
from kvcompile.errors import KVCompileError
from kvcompile.format import formats
from kvcompile.ir import APPEND, ATTEND, EVICT, RANK
from kvcompile.kernels import (
    evict,
    triton_append,
    triton_attend,
    triton_launch,
    triton_source,
    triton_tune,
)
from kvcompile.measure import kernel_table
from kvcompile.planes import Group
from kvcompile.site import Site
from kvcompile.store import Store

HERE = Path(__file__).parent
KIVI = ("store(k=int(bits={0}, axis=channel, group=32), k_block=128, v=int(bits={0}), v_lag=128)")
needs_triton = pytest.mark.skipif(not triton_source.installed(), reason="pip install triton")


def interpret(*args):
    """Run tests/interpreted in a process of its own, since Triton decides when it is imported: how
    many tests passed there."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         str(HERE / "interpreted"), *args], cwd=HERE.parent, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr
    return int(done.stdout.split(" passed")[0].split()[-1])


@needs_triton
def test_the_kernels_are_the_bodies():
    assert interpret("-m", "not slow", "-k", "not registered")


@needs_triton
@pytest.mark.slow
def test_the_kernels_are_the_bodies_at_every_head_size():
    assert interpret("-m", "slow")


def test_skeletons_know_no_format():
    words = ("int", "channels")  # a type of Python too, and a word for what a head has
    names = [n for n in formats() if n not in words]
    files = [*(HERE.parent / "kernels").glob("triton_*.py"),
             HERE.parent / "kernels/triton/softmax.py", HERE.parent / "kvcompile/backend/gpu.py",
             HERE.parent / "kvcompile/backend/offline.py"]
    assert len(files) >= 8
    for file in files:
        found = re.findall(rf"\b(?:{'|'.join(names)})\b|\b(?:int|channels)\((?:bits|of)|"
                           r"\"(?:int|channels)\"", file.read_text())
        assert not found, (file.name, found)


def test_every_format_has_a_reader():
    assert all(hasattr(cls, "triton") or hasattr(cls, "triton_member")
               for cls in formats().values())


def shape_of(dims=(128, 128), dtype=torch.bfloat16, heads=8, queries=4, **options):
    return triton_attend.Shape(heads, queries, dims, dtype, dims[0] ** -0.5, **options)


@needs_triton
def test_resources_of_a_decode_step_on_sm_90():
    found, missing = offline.kernels(Store.parse(KIVI.format(4)), shape_of())
    assert not missing and [k.name.split("_")[0] for k in found] == ["attend", "encode", "keep"]
    for one in found:
        made = offline.compiled(one, "cuda:90")
        assert not made.failed and made.spills == made.local == 0, made.as_dict()
        assert 0 < made.registers <= 255 and made.shared <= 227 * 1024
        if one.name.startswith("attend"):
            assert made.code_load == 16, "codes are not read 16 bytes at a time"
            assert made.mma > 0, "products do not run on tensor cores"
            assert {"ptx", "cubin"} <= made.assembly.keys()


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("recipe", [*EVERY, "zipcache", "mikv", "mikv(bits=8)"])
def test_nothing_spills(recipe, dim, target):
    stores = {s.store for s in kvcompile.explain(plain("llama:2"), recipe).program.sites}
    for store in stores:
        for one in offline.kernels(store, shape_of((dim, dim)), target)[0]:
            made = offline.compiled(one, target)
            assert not made.failed and made.spills == made.local == 0, made.as_dict()


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", offline.TARGETS)
def test_every_target(target):
    for one in offline.kernels(Store.parse(KIVI.format(4)), shape_of(), target)[0]:
        made = offline.compiled(one, target)
        assert not made.failed and made.spills == 0, made.as_dict()


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_whatever_tuning_tries_fits(target):
    found, _ = offline.kernels(Store.parse(KIVI.format(4)), shape_of(), target, tried=True)
    attends = [k for k in found if k.name.startswith("attend")]
    assert len(attends) == len(triton_tune.tiles(Store.parse(KIVI.format(4)), shape_of(), target))
    for one in attends:
        made = offline.compiled(one, target)
        assert not made.failed and made.spills == made.local == 0, (one.warps, made.as_dict())


def test_tuning_is_asked_for(monkeypatch):
    args = Store.parse(KIVI.format(8)), shape_of(heads=3), "cuda:90"
    first, *others = triton_tune.tiles(*args)
    assert first == triton_attend.tile(*args[:2]) and len(others) >= 3
    assert triton_tune.tiles(*args[:2], "hip:gfx942")[0].warps == first.warps // 2
    monkeypatch.setattr(triton_tune, "_fastest", {})
    monkeypatch.setenv("KVCOMPILE_AUTOTUNE", "0")
    assert triton_tune.chosen(*args, lambda cut: pytest.fail("timed")) == first
    monkeypatch.setenv("KVCOMPILE_AUTOTUNE", "1")
    assert triton_tune.chosen(*args, None) == first
    best = others[-1]
    assert triton_tune.chosen(*args, lambda cut: float(cut != best)) == best
    assert triton_tune.chosen(*args, None) == best            # in a graph that is traced later
    assert triton_tune.chosen(*args[:2], "cuda:80", None) == first


def test_what_has_no_kernel_says_why():
    lowrank = Store.parse("store(k=lowrank, v=lowrank(block=64))")
    found, missing = offline.kernels(lowrank, shape_of())
    assert len(found) == 1 and missing == [
        "append: lowrank: the Triton writer holds 8192 numbers of a block, not 128 x 128; use "
        "block=64"]
    inner = Store.parse("store(k=scaled(of=lowrank(of=int(bits=4), block=64)), k_block=128)")
    assert triton_append.unsupported(inner, (64, 64), torch.float32).endswith(
        "format lowrank has no Triton writer of several blocks at once")
    outer = Store.parse("store(k=lowrank(of=mixed, block=128), k_block=128)")
    assert triton_append.unsupported(outer, (32, 32), torch.float32).endswith(
        "the Triton writer reads 128 tokens at once, not 64")
    merged = Store.parse("store(k=direction, k_block=128, v=direction, v_block=128, members=2)")
    assert "power of two, not of 96" in triton_append.unsupported(merged, (96, 96), torch.float32)
    assert "512" in triton_attend.unsupported(Store.parse("store"), shape_of((512, 512)))
    assert "float64" in triton_attend.unsupported(Store.parse("store"),
                                                  shape_of(dtype=torch.float64))
    with pytest.raises(KVCompileError, match="int has no Triton writer of several layers"):
        triton_source.of(formats()["int"](), "triton_member_writer", "writer of several layers")


def test_a_store_that_is_not_understood_is_refused():
    @dataclass(frozen=True)
    class Later(Store):
        merged: bool = False

    plain_store = Store.parse("store")
    later = Later(plain_store.k, plain_store.v, merged=True)
    assert triton_attend.unsupported(later, shape_of()) == (
        "no Triton reader for a store with merged")
    assert triton_attend.unsupported(replace(later, merged=False), shape_of()) is None


@needs_triton
def test_what_falls_back_on_a_gpu(monkeypatch):
    program = kvcompile.explain(plain("llama:2"), "think").program
    assert kernel_table.fallbacks(program) == [
        "layers 0-1 on a GPU: kvc.append runs its plain body: format channels has no Triton "
        "writer"]
    monkeypatch.setattr(offline, "compiled", lambda one, target: offline.Compiled(
        one.name, target, ""))
    assert kernel_table.kernels(program, ["cuda:80", "hip:gfx942"]).missing == [
        "layers 0-1: no kernel for kvc.append: format channels has no Triton writer"]
    for quick in ("kivi(bits=4)", "h2o(budget=64)", "palu+kivi"):
        assert not kernel_table.fallbacks(program.lower(quick))
    [told] = kernel_table.fallbacks(program.lower("r-kv(budget=64)"))
    assert told.endswith("kvc.evict waits for the device, so that no CUDA graph holds the step: "
                         "redundant reads keys or a list of ids")


@needs_triton
def test_a_target_that_is_not_known():
    with pytest.raises(KVCompileError, match="unknown target 'cuda:sm90'; did you mean 'cuda:90'"):
        offline.check("cuda:sm90")


@needs_triton
def test_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "compiled", lambda one, target: offline.Compiled(
        one.name, target, "", 40, 0, 0, 1024, 16, 8, {"ptx": "text", "cubin": b"\1"}))
    program = kvcompile.explain(plain("llama:2"), "kivi(bits=4)").program
    table = kernel_table.kernels(program, ["cuda:80", "cuda:90"])
    assert len(table.rows) == 6 and table.rows[0][0] == "0-1"
    assert re.search(r"0-1 +attend_\w+ +cuda:80 +40 +0 +0 +1024 +16 +8", str(table))
    table.write(tmp_path)
    name = table.rows[0][1].kernel
    assert (tmp_path / f"{name}.py").read_text() == table.sources[name]
    assert (tmp_path / f"{name}.cuda-90.cubin").read_bytes() == b"\1"


@needs_triton
def test_compiled_graphs_see_the_kernels(caplog):
    """A graph for a GPU, on fake tensors: Triton's kernels in it, planes written in place."""
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
    from torch._subclasses.fake_tensor import FakeTensorMode

    store = Store.parse(KIVI.format(4))
    site = Site(0, 8, 2, (64, 64), torch.bfloat16, 0, store)
    graph = torch.fx.Graph()
    with FakeTensorMode() as mode:
        specs = Group([site, site], 2, torch.device("cuda")).specs
        planes = [torch.zeros((9, *s.shape) if s.shape else
                              (2, 2, 2) if s.name == "count" else (2, 2, 2, 4),
                              dtype=s.dtype, device="cuda") for s in specs]
        q = torch.zeros(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.zeros(2, 2, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        positions = torch.zeros(2, 1, dtype=torch.long, device="cuda")
        valid = torch.ones(2, 1, dtype=torch.bool, device="cuda")
        angles = torch.zeros(1, 1, 400, 64, device="cuda")
    inputs = [q, k, v, positions, valid, angles, *planes]
    nodes = []
    for i, x in enumerate(inputs):
        nodes.append(graph.placeholder(f"x{i}"))
        nodes[-1].meta["val"] = x
    q_, k_, v_, p_, ok_, angles_, *planes_ = nodes
    o = graph.call_function(ATTEND, (q_, k_, v_, planes_, p_, ok_, None),
                            dict(scale=0.125, store=str(store), slot=1, cos=angles_, sin=angles_,
                                 style="half"))
    first = graph.call_function(lambda x: x[0], (o,))
    graph.call_function(APPEND, (planes_, [k_, k_], [v_, v_], p_, ok_),
                        dict(store=str(store), slots=[0, 1]))
    graph.output((first,))
    gm = torch.fx.GraphModule({}, graph)
    gpu.lower(gm, torch.device("cpu"))
    assert any(n.target is ATTEND for n in gm.graph.nodes)
    gpu.lower(gm, torch.device("cuda"))
    assert not any(n.target in (ATTEND, APPEND) for n in gm.graph.nodes)
    seen = []
    with mode, torch.no_grad():
        aot_module_simplified(gm, inputs, fw_compiler=lambda gm, _: seen.append(gm) or gm)
    kernels = [n for n in seen[0].graph.nodes if n.target is triton_kernel_wrapper_functional]
    assert len(kernels) == 4                                # attend, merge; encode, keep
    written = len(seen[0].graph.output_node().args[0]) - 1
    assert written >= len(planes) - sum(s.name.endswith("table") for s in specs)


class OnDevice(torch.fx.Interpreter):
    """A step's graph with the bodies that a GPU has for the kvc ops."""

    BODIES = {ATTEND: gpu._attend, APPEND: gpu._append, EVICT: gpu._evict, RANK: gpu._rank}

    def call_function(self, target, args, kwargs):
        return super().call_function(self.BODIES.get(target, target), args, kwargs)


@needs_triton
@pytest.mark.parametrize("recipe, kernels", [
    ("kivi(bits=4)", {"attend", "merge", "encode", "keep"}),
    ("h2o(budget=64)", {"attend", "merge", "mass", "encode", "move"}),
    ("zipcache", {"attend", "merge", "mass", "encode", "keep"}),
    ("palu+kivi(bits=4)", {"attend", "merge", "encode", "keep"}), ("r-kv(budget=64)", None)])
def test_a_step_asks_the_device_for_nothing(recipe, kernels, monkeypatch):
    """A whole decode step on tensors without values, on which .item() and whatever else a CUDA
    graph cannot hold raise."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    step, launched = [], []
    monkeypatch.setattr("kvcompile.engine.compile_graph", lambda *given: step.append(given))
    monkeypatch.setattr(triton_launch, "start", lambda run, grid, given, **options: launched.append(
        run.__name__.split("_")[0]))
    program = optimized("llama:2").kvcompile.program.lower(recipe)
    Engine(program).step(1, torch.device("cpu"))
    [(gm, inputs, _)] = step
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = [mode.from_tensor(x) for x in inputs]
        evict._ends.cache_clear()
        if kernels is None:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                OnDevice(gm).run(*fake)
        else:
            assert OnDevice(gm).run(*fake)[0].shape[:2] == (1, 1)
            assert {*launched} == kernels and launched.count("attend") == 2
        evict._ends.cache_clear()


@needs_triton
@pytest.mark.parametrize("store", [KIVI.format(4), "store(k=hadamard(of=fp8), v=outliers(of=nf4))"])
def test_inductor_writes_whole_kernels(store):
    """What Inductor puts into its module for a kernel of ours defines all that the kernel calls."""
    from torch._inductor.codegen import wrapper

    parsed, shape = Store.parse(store), shape_of()
    cut = triton_attend.tile(parsed, shape)
    spec = triton_append.Shape(8, (128, 128), torch.bfloat16)
    for text, name in ((triton_attend.source(parsed, shape, cut),
                        triton_attend.name(parsed, shape, cut)),
                       (triton_append.source(parsed, spec, "encode"),
                        triton_append.name(parsed, spec, "encode"))):
        kernel = triton_source.kernel(text, name)
        written = wrapper.user_defined_triton_kernel_transitive_closure_source_code(kernel)
        defined = set(re.findall(r"^def (\w+)", written, re.M))
        called = set(re.findall(r"\b(\w+)\(", written)) & triton_source.helpers().keys()
        assert name in defined and len(called) > 8 and called <= defined


@needs_triton
def test_the_table_of_every_method(monkeypatch):
    monkeypatch.setattr(offline, "compiled", lambda one, target: offline.Compiled(
        one.name, target, "", 40))
    program = kvcompile.explain(plain("llama:2"), "kivi").program
    monkeypatch.setattr(kernel_table, "methods", lambda: ["snapkv", "h2o", "think", "palu", "kivi"])
    table = kernel_table.kernels(program, ["cuda:80"], True, (32, 8, 128))
    labels = [label for label, _ in table.rows]
    assert {"snapkv", "h2o", "h2o+kivi"} <= {*labels}
    assert any(label.startswith("snapkv+kivi and ") for label in labels)
    kinds = {label: [one.kernel.split("_")[0] for name, one in table.rows if name == label]
             for label in labels}
    assert kinds["h2o"] == ["attend", "encode", "move"]
    assert kinds["h2o+kivi"] == ["attend", "encode", "keep"]  # whole pages leave
    assert kinds["palu"] == ["attend", "encode"]
    assert any("think" in reason and "writer" in reason for reason in table.missing)
