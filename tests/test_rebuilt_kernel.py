"""kvc.attend's C++ kernel where keys are made of what is stored at read, against its plain body."""

import operator

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from kvcompile.backend.inductor import compile_graph
from kvcompile.ir import APPEND, ATTEND
from kvcompile.kernels.rebuild import Made
from kvcompile.planes import Group
from kvcompile.site import Site
from kvcompile.store import Store

LENGTHS = (0, 1, 127, 128, 300)
KIVI = "store(k=int(bits=4, axis=channel), k_block=128, v=int(bits=4), v_lag=128)"


def made(store, heads=2, keys=1, group=3, stored=32, dim=32, rotary=32, style="half", basis=False,
         offset=False, per_row=False, dtype=torch.float32, angles=None, mass=False,
         tokens=1):
    """(the op's arguments, its options) for some queries of rows of LENGTHS tokens."""
    parsed, rows, g = Store.parse(store), len(LENGTHS), torch.Generator().manual_seed(0)
    site = Site(0, heads * keys * group, heads, (stored, 32), dtype, 0, parsed, made=Made(dim))
    layers = Group([site, site], rows, torch.device("cpu"))
    layers.reserve([n + tokens for n in LENGTHS])
    valid = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    k, v = (torch.randn(rows, heads, max(LENGTHS), d, generator=g).to(dtype) for d in (stored, 32))
    APPEND(layers.planes, [k], [v], valid.long(), valid, store=store, slots=[1])
    q = torch.randn(rows, heads * keys * group, tokens, dim, generator=g).to(dtype)
    k, v = (torch.randn(rows, heads, tokens, d, generator=g).to(dtype) for d in (stored, 32))
    operands = {}
    if basis:
        operands["basis"] = (torch.randn(heads * keys, dim, stored, generator=g)
                             / stored**0.5).to(dtype)
    if offset:
        operands["offset"] = torch.randn(heads * keys, dim, generator=g).to(dtype)
    if rotary:
        angle = torch.rand(rows if per_row else 1, 1, max(LENGTHS) + tokens, rotary // 2,
                           generator=g)
        angle = (torch.cat([angle, angle], -1) if style == "half"
                 else angle.repeat_interleave(2, -1)) * 6
        operands |= {"cos": angle.cos().to(angles or dtype), "sin": angle.sin().to(angles or dtype)}
    new = torch.ones(rows, tokens, dtype=torch.bool)
    return ([q, k, v, layers.planes, torch.tensor(LENGTHS)[:, None] + torch.arange(tokens), new,
             None], operands,
            dict(scale=dim**-0.5, store=store, slot=1, style=style, mass=mass))


def fused(given, operands, options):
    """What Inductor makes of the op."""
    flat = [*given[:3], *given[3], *given[4:6], *operands.values()]
    graph, planes = torch.fx.Graph(), len(given[3])
    x = [graph.placeholder(f"x{i}") for i in range(len(flat))]
    more = dict(zip(operands, x[5 + planes:], strict=True))
    both = graph.call_function(ATTEND, (*x[:3], x[3 : 3 + planes], *x[3 + planes : 5 + planes],
                                        None), options | more)
    graph.output(tuple(graph.call_function(operator.getitem, (both, i))
                       for i in (0, 2)[: 1 + options["mass"]]))
    with torch.no_grad(), config.patch(force_disable_caches=True):
        gm = torch.fx.GraphModule({}, graph)
        run, texts = run_and_get_code(lambda: compile_graph(gm, flat, [[]] * len(flat)))
        assert "kvc::attend<" in "".join(texts), "the plain body was run"
        return run(*flat)


CASES = {
    "turned": dict(store="store"),
    "interleaved": dict(store="store(k=int, v=int)", style="interleaved", group=2),
    "partial": dict(store=KIVI, rotary=12, per_row=True),
    "side-by-side": dict(store="store(sinks=4, window=100, side_by_side=true)"),
    "sinks": dict(store="store(k=int, v=int, k_lag=9, v_lag=9, sinks=5, window=150)", group=1),
    "low-rank": dict(store=KIVI, basis=True, keys=2, group=2, dim=48, rotary=48),
    "low-rank-offset": dict(store="store", basis=True, offset=True, stored=16, dim=20, rotary=8,
                            keys=3, group=1, heads=1),
    "no-rotation": dict(store="store(k=hadamard(of=int(bits=4)), v=int)", basis=True, rotary=0,
                        group=9, heads=1),
    "mass": dict(store=KIVI, mass=True),
    "bf16": dict(store=KIVI, dtype=torch.bfloat16, basis=True, keys=2, group=1),
    "fp16-angles": dict(store="store(k=nf4, v=int)", dtype=torch.float16, angles=torch.float32),
}


def tolerance(given, operands, want):
    """(of a logit, of the output): sums of D + r products, twice, of |q||key|; then sums of T
    weights. For 16-bit models V is read as by other kernels (test_kernels.py)."""
    (q, k), eps = (x.float() for x in given[:2]), 2.0**-24
    dim, stored, tokens = q.shape[-1], k.shape[-1], max(LENGTHS) + 1
    wide = float(operands["basis"].float().norm(dim=(1, 2)).max()) if "basis" in operands else 1.0
    far = float(operands["offset"].float().norm(dim=-1).max()) if "offset" in operands else 0.0
    longest = 1.5 * float(k.norm(dim=-1).max()) * wide + far          # of 10 keys; others are alike
    logit = 2 * (dim + stored + 8) * eps * float(q.norm(dim=-1).max()) * longest * dim**-0.5
    weights = 2 * tokens * eps + 4 * 8e-8
    if given[0].dtype is not torch.float32:
        weights += 2 * 128 / 65534 + 4 * 3e-6
    last = float(want.abs().max()) * torch.finfo(given[0].dtype).eps / 2
    return logit, (torch.expm1(torch.tensor(2 * logit)).item() + weights) * 5.0 + last


SLOW = CASES.keys() - {"mass", "side-by-side", "partial"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n
                                  for n in CASES])
def test_the_kernel_is_the_body(name):
    given, operands, options = made(**CASES[name])
    got, *mass = fused(given, operands, options)
    wide = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in given]
    want, _, weights = ATTEND(*wide, **options, **{n: x.float() for n, x in operands.items()})
    logit, most = tolerance(given, operands, want)
    assert (got.float() - want).abs().max() <= most <= 0.05
    for own in mass:
        assert (own - weights).abs().max() <= 12 * (logit + 2 * max(LENGTHS) * 2.0**-24)


def test_the_body_takes_angles_of_another_type():
    """Found by the laws of kernels at night: a 16-bit model whose cos and sin are fp32."""
    given, operands, options = made(**CASES["fp16-angles"])
    wide = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in given]
    got, want = ATTEND(*given, **options, **operands)[0], ATTEND(*wide, **options, **operands)[0]
    assert got.dtype == torch.float16 and (got - want).abs().max() <= 0.01 * want.abs().max()
