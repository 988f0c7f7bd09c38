"""Triton's kernels of layers of which one's pages are another's, by the interpreter."""

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

TEXT = "store(k=int(bits=4, axis=channel), k_block=32, k_lag=8, v=int(bits=4), sinks=3)"


@pytest.mark.parametrize("lent", [("k.body",), ("k.sinks", "k.body", "k.recent"),
                                  ("v.sinks", "v.body")])
def test_what_is_lent_is_read_and_not_written(lent):
    store = Store.parse(TEXT)
    sites = [Site(i, 2, 1, (32, 32), torch.float32, 0, store, lent=tuple(
        (key, 0) for key in lent if i)) for i in range(2)]
    body, kernel = (Group(sites, 1, torch.device("cpu")) for _ in range(2))
    x = torch.randn(2, 2, 1, 1, 170, 32, generator=torch.Generator().manual_seed(0))
    for group in (body, kernel):
        group.reserve([170])
    with warnings.catch_warnings():  # numpy tells of what masks leave out
        warnings.simplefilter("ignore", RuntimeWarning)
        for start, stop in ((0, 140), (140, 141), (141, 170)):
            valid = torch.ones(1, stop - start, dtype=torch.bool)
            for group, append in ((body, APPEND), (kernel, triton_launch.append)):
                for slot, site in enumerate(sites):
                    k, v = ([y[slot, ..., start:stop, :]] for y in x)
                    append(group.planes, k, v, valid.long(), valid, store=str(site.own),
                           slots=[slot])
        for spec, a, b in zip(body.specs, body.planes, kernel.planes, strict=True):
            assert torch.equal(a, b), spec.name
        alone = Group(sites[:1], 1, torch.device("cpu"))  # the lender by itself
        alone.reserve([170])
        valid = torch.ones(1, 170, dtype=torch.bool)
        APPEND(alone.planes, [x[0, 0]], [x[1, 0]], valid.long(), valid, store=str(store), slots=[0])
        for key in lent:
            for name in [s.name for s in alone.specs if s.name.startswith(key) and s.shape]:
                assert torch.equal(alone.plane(name), body.plane(name)), name
        q, k, v = torch.randn(3, 1, 2, 1, 32, generator=torch.Generator().manual_seed(1))
        given = (q, k[:, :1], v[:, :1], body.planes, valid[:, :1].long(), valid[:, :1], None)
        for slot in range(2):
            got, want = (op(*given, store=str(store), slot=slot, scale=32**-0.5)[0]
                         for op in (triton_launch.attend, ATTEND))
            reach = float(q.abs().max() * x.abs().max()) * 32**0.5
            logit = 2 * (32 + 4) * 2.0**-24 * reach                  # gamma(D) of sum |q||k|, twice
            share = 2 * logit + 2 * 170 * 2.0**-24 + 8e-7
            assert (got - want).abs().max() <= 2 * share * x.abs().max()
