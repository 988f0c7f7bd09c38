"""On a CUDA device: python -m pytest tests/gpu -q -s

Numbers against the plain bodies, capture in a CUDA graph, kernels inside a compiled graph, and
speed beside torch's SDPA and FlexAttention at Llama-3-8B's attention geometry.
"""

import operator
from statistics import median

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from torch.nn.attention.flex_attention import flex_attention  # noqa: E402
from triton_case import MOVED, STORES, Case, moved_alike, stored_alike  # noqa: E402

from kvcompile.backend.inductor import compile_graph  # noqa: E402
from kvcompile.ir import APPEND, ATTEND  # noqa: E402
from kvcompile.kernels import triton_launch  # noqa: E402
from kvcompile.planes import Group  # noqa: E402
from kvcompile.site import Site  # noqa: E402
from kvcompile.store import Store  # noqa: E402

CUDA = torch.device("cuda")
KIVI = "store(k=int(bits=4, axis=channel, group=32), k_block=128, v=int(bits=4), v_lag=128)"
ROUNDED = {"clip", "outliers", "gear", "minicache", "minicache+kivi"}  # a GPU fuses products
FASTER = 2.0  # than the fastest peer; the bytes allow 3.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", STORES)
def test_attend_is_the_body(name, dim, dtype):
    Case(STORES[name], (0, 17, 300, 517), 2, 4, (dim, dim), dtype, device=CUDA).check()


@pytest.mark.parametrize("options", [dict(tokens=21, window=50), dict(softcap=20.0, sinks=True),
                                     dict(tokens=5, padding=True), dict(mass=True)], ids=str)
def test_attend_with_options(options):
    Case(STORES["kivi4"], (0, 17, 300), device=CUDA, **options).check()


@pytest.mark.parametrize("name", sorted(STORES.keys() - ROUNDED))
def test_append_is_the_body(name):
    assert stored_alike(STORES[name], (150, 1, 60), rows=2, slots=(0, 1), device=CUDA)


@pytest.mark.parametrize("store", MOVED)
def test_compaction_is_the_body(store):
    assert moved_alike(store, device=CUDA)


def filled(tokens, rows, heads=8, dim=128, layers=1):
    """Planes on the device of `layers` layers that hold `tokens` tokens each, and room for 64."""
    site = Site(0, 4 * heads, heads, (dim, dim), torch.bfloat16, 0, Store.parse(KIVI))
    group = Group([site] * layers, rows, CUDA)
    group.reserve([tokens + 64] * rows)
    valid = torch.ones(rows, tokens, dtype=torch.bool, device=CUDA)
    for slot in range(layers):
        k, v = (torch.randn(rows, heads, tokens, dim, device=CUDA).bfloat16() for _ in "kv")
        APPEND(group.planes, [k], [v], valid.long(), valid, store=KIVI, slots=[slot])
    new = [torch.randn(rows, h, 1, dim, device=CUDA).bfloat16() for h in (4 * heads, heads, heads)]
    one = torch.ones(rows, 1, dtype=torch.bool, device=CUDA)
    return group.planes, new, one


def step(planes, new, one):
    q, k, v = new
    o, _, _ = triton_launch.attend(q, k, v, planes, one.long(), one, None, scale=128**-0.5,
                                   store=KIVI)
    triton_launch.append(planes, [k], [v], one.long(), one, store=KIVI, slots=[0])
    return o


def test_a_step_is_captured_in_a_cuda_graph():
    planes, new, one = filled(300, 2)
    again = [p.clone() for p in planes]
    want = [step(again, new, one) for _ in range(40)]       # blocks become complete on the way
    before = [p.clone() for p in planes]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(planes, new, one)                              # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step(planes, new, one)
    for plane, old in zip(planes, before, strict=True):
        plane.copy_(old)
    for each in want:
        graph.replay()
        assert torch.equal(o, each)
    assert all(torch.equal(a, b) for a, b in zip(planes, again, strict=True))


def test_the_kernels_are_part_of_a_compiled_graph():
    planes, (q, k, v), one = filled(300, 1)
    graph = torch.fx.Graph()
    inputs = [q, k, v, one.long(), one, *planes]
    nodes = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    for node, x in zip(nodes, inputs, strict=True):
        node.meta["val"] = x
    q_, k_, v_, at, ok, *held = nodes
    both = graph.call_function(ATTEND, (q_, k_, v_, held, at, ok, None),
                               dict(scale=128**-0.5, store=KIVI))
    o = graph.call_function(operator.getitem, (both, 0))
    graph.call_function(APPEND, (held, [k_], [v_], at, ok), dict(store=KIVI, slots=[0]))
    graph.output((o,))
    again = [p.clone() for p in planes]
    want = step(again, (q, k, v), one)
    run = compile_graph(torch.fx.GraphModule({}, graph), inputs, [[] for _ in inputs])
    assert torch.equal(run(*inputs)[0], want)
    assert all(torch.equal(a, b) for a, b in zip(planes, again, strict=True))


def milliseconds(call, rounds=20):
    for _ in range(3):
        call()
    took = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(end))
    return median(took)


@pytest.mark.parametrize("rows", [1, 16])
def test_int4_at_32k_tokens_is_faster_than_dense_attention(rows):
    tokens = 32768
    planes, (q, k, v), one = filled(tokens, rows)
    ours = milliseconds(lambda: triton_launch.attend(
        q, k, v, planes, one.long(), one, None, scale=128**-0.5, store=KIVI))
    dense = [torch.randn(rows, 8, tokens, 128, device=CUDA).bfloat16() for _ in "kv"]
    flex = torch.compile(flex_attention)
    peers = {
        "SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(
            q, *dense, enable_gqa=True),
        "FlexAttention": lambda: flex(q, *dense, enable_gqa=True),
    }
    times = {name: milliseconds(call) for name, call in peers.items()}
    nbytes = sum(p.nbytes for p in planes)
    print(f"\nbatch {rows}: int4 {ours:.3f} ms ({nbytes / ours / 1e6:,.0f} GB/s), "
          + ", ".join(f"{name} {t:.3f} ms" for name, t in times.items()))
    assert min(times.values()) >= FASTER * ours
