"""Triton's kernels of layers that differ in numbers alone, by the interpreter."""

import warnings

import pytest
import torch

from kvcompile.kernels.triton_source import installed, interpreted

if not interpreted():
    pytest.skip("run by tests/test_triton.py with TRITON_INTERPRET=1", allow_module_level=True)
if not installed():
    pytest.skip("no Triton: pip install triton", allow_module_level=True)

from kvcompile.ir import APPEND, ATTEND  # noqa: E402
from kvcompile.kernels import triton_launch  # noqa: E402
from kvcompile.planes import Group  # noqa: E402
from kvcompile.site import Site  # noqa: E402
from kvcompile.store import Store  # noqa: E402

TABLES = ([-0.9, -0.2, 0.3, 0.8], [-0.5, -0.1, 0.35, 0.95])
SIXTEEN = [[-1 + (16 * i + 15 * j) / 128 for j in range(16)] for i in range(2)]
TEXT = ("store(k=outliers(of=nuq(table={0}, axis=channel, group=128)), k_block=128, "
        "v=outliers(of=nuq(table={1}, group=32)), v_lag=5, sinks=1)")


def test_each_layer_is_stored_and_read_by_its_own_numbers():
    stores = [Store.parse(TEXT.format(*both)) for both in zip(TABLES, SIXTEEN, strict=True)]
    sites = [Site(i, 2, 1, (32, 32), torch.float32, 0, s, common=s.common)
             for i, s in enumerate(stores)]
    body, kernel = (Group(sites, 1, torch.device("cpu")) for _ in range(2))
    x = torch.randn(2, 2, 1, 1, 160, 32, generator=torch.Generator().manual_seed(0))
    options = dict(store=str(body.store))
    for group in (body, kernel):
        group.reserve([160])
    with warnings.catch_warnings():  # numpy tells of what masks leave out
        warnings.simplefilter("ignore", RuntimeWarning)
        for start, stop in ((0, 140), (140, 141), (141, 160)):
            k, v = ([*y[..., start:stop, :]] for y in x)
            valid = torch.ones(1, stop - start, dtype=torch.bool)
            for group, append in ((body, APPEND), (kernel, triton_launch.append)):
                append(group.planes, k, v, valid.long(), valid, **options, slots=[0, 1])
        for spec, a, b in zip(body.specs, body.planes, kernel.planes, strict=True):
            assert torch.equal(a, b), spec.name
        q, k, v = torch.randn(3, 1, 2, 1, 32, generator=torch.Generator().manual_seed(1))
        given = (q, k[:, :1], v[:, :1], body.planes, valid[:, :1].long(), valid[:, :1], None)
        outs = []
        for slot in range(2):
            got, want = (op(*given, **options, slot=slot, scale=32**-0.5)[0]
                         for op in (triton_launch.attend, ATTEND))
            reach = float(q.abs().max() * x.abs().max()) * 32**0.5
            logit = 2 * (32 + 4) * 2.0**-24 * reach                  # gamma(D) of sum |q||k|, twice
            share = 2 * logit + 2 * 160 * 2.0**-24 + 8e-7
            assert (got - want).abs().max() <= 2 * share * x.abs().max()
            outs.append(want)
        assert (outs[0] - outs[1]).abs().max() > 0.01
