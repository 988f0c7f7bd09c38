"""lowrank: C++ stores the bits of the plain body, and both fit what the format inside loses."""

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from kvcompile.backend.inductor import compile_graph
from kvcompile.format import format_of
from kvcompile.ir import APPEND
from kvcompile.planes import Group
from kvcompile.recipe import parse_term
from kvcompile.site import Site
from kvcompile.store import Store

STORES = {
    "gear": "store(k=lowrank(of=outliers(of=int(bits=2, axis=channel, group=64), fraction=0.02)), "
            "k_block=128, v=lowrank(of=outliers(of=int(bits=2, group=64), fraction=0.02)), "
            "v_block=128)",
    "around": "store(k=lowrank(of=centered(of=scaled(of=nf4)), rank=2), v=hadamard(of=lowrank("
              "of=fp8, rank=1, block=16)), v_lag=3, sinks=3, window=150)",
    "inside": "store(k=lowrank(of=int(bits=4, symmetric=true), rank=16, block=32), v=centered("
              "of=lowrank(of=dense(dtype=bf16), rank=3, block=64)))",
}


@pytest.mark.parametrize("name, dtype, dim", [
    ("gear", torch.bfloat16, 64), pytest.param("gear", torch.float32, 128, marks=pytest.mark.slow),
    ("around", torch.float32, 128), ("inside", torch.bfloat16, 96)], ids=str)
def test_appending_stores_the_same_bits(name, dtype, dim):
    """A prompt of 100 tokens, then one by one over two flushes; a row of padding stays as it is.
    Head sizes whose root is no power of two, too, which a Hadamard matrix is divided by."""
    store, rows, every = Store.parse(STORES[name]), 3, 270
    site = Site(0, 2, 2, (dim, dim), dtype, 0, store)
    body, kernel = (Group([site], rows, torch.device("cpu")) for _ in range(2))
    x = torch.randn(2, rows, 2, every, dim, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 40
    x, before = x.to(dtype), torch.tensor([0, 100, 37])
    options = dict(store=STORES[name], slots=[0])
    for group in (body, kernel):
        group.reserve([every] * rows)
        at = torch.arange(100).expand(rows, -1)
        APPEND(group.planes, [x[0, ..., :100, :]], [x[1, ..., :100, :]], at, at < before[:, None],
               **options)
    valid = torch.tensor([[True], [True], [False]])
    flat = [*x[..., :1, :].contiguous(), *kernel.planes, before[:, None], valid]
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(flat))]
    graph.call_function(APPEND, (nodes[2:-2], nodes[:1], nodes[1:2], *nodes[-2:]), options)
    graph.output((nodes[-1],))
    gm = torch.fx.GraphModule({}, graph)
    with torch.no_grad(), config.patch(force_disable_caches=True):
        run, texts = run_and_get_code(lambda: compile_graph(gm, flat, [[]] * len(flat)))
    assert "kvc::append_one" in "".join(texts)
    for t in range(100, every):
        k, v = x[..., t : t + 1, :].contiguous()
        APPEND(body.planes, [k], [v], torch.full((rows, 1), t), valid, **options)
        run(k, v, *kernel.planes, torch.full((rows, 1), t), valid)
    for spec, a, b in zip(body.specs, body.planes, kernel.planes, strict=True):
        assert torch.equal(a, b), spec.name
    assert body.planes[0][0, :, 0].tolist() == [170, 270, 37]


def split(fmt, x):
    """x's error inside of the format and after the correction, [..., n, block, D] in fp64."""
    planes = fmt.encode(x, "k")
    inside = fmt.inner.decode(fmt.split(planes, 64, "k"), 64, torch.float32, "k")
    after = fmt.decode(planes, 64, torch.float32, "k")
    return [(x - y).double().unflatten(-2, (-1, fmt.step)) for y in (inside, after)], planes


@pytest.mark.parametrize("rank, block", [(1, 16), (4, 128), (16, 32)])
def test_the_correction_is_three_steps_of_subspace_iteration(rank, block):
    """E Q Q^T, where Q spans (E^T E)^3 S, in fp64 by Householder's QR."""
    fmt = format_of(parse_term(f"lowrank(of=int(bits=2), rank={rank}, block={block})"))
    x = torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(0))
    (error, after), planes = split(fmt, x)
    q = torch.tensor([[(c * r * 40503 % 65536 - 32768) / 65536 for r in range(1, 2 * rank, 2)]
                      for c in range(1, 65)], dtype=torch.float64)
    for _ in range(3):
        q = torch.linalg.qr(error.mT @ (error @ q)).Q
    want = error @ q @ q.mT
    each = planes["a"].abs().double().mT @ planes["b"].abs().double()
    assert ((error - after - want).abs() <= 2.0**-9 * each.max()).all()
    best = torch.linalg.svdvals(error)[..., rank:].square().sum(-1).sqrt()
    assert (after.norm(dim=(-2, -1)) <= 1.1 * best).all()  # for noise, whose values lie close


@pytest.mark.parametrize("many", [0, 1, 2])
def test_an_error_of_lower_rank_is_corrected_whole(many):
    """Tokens that repeat `many` rows lose as many directions, fewer than the rank."""
    rows = torch.randn(max(many, 1), 64, generator=torch.Generator().manual_seed(1)) * (many > 0)
    x = rows[torch.arange(128) % max(many, 1)][None]
    (error, after), planes = split(format_of(parse_term("lowrank(of=int(bits=2))")), x)
    assert after.abs().max() <= 2.0**-9 * error.abs().max()
    used = planes["b"].float().norm(dim=-1)
    assert ((used == 0) | ((used - 1).abs() < 2.0**-9)).all()
    assert int((used > 0).sum()) == many
