"""Triton's kvc.attend where keys are made of what is stored at read, by Triton's interpreter."""

import pytest
import torch

from kvcompile.kernels.triton_source import installed, interpreted

if not interpreted():
    pytest.skip("run by tests/test_triton.py with TRITON_INTERPRET=1", allow_module_level=True)
if not installed():
    pytest.skip("no Triton: pip install triton", allow_module_level=True)

from test_rebuilt_kernel import CASES, KIVI, made, tolerance  # noqa: E402

from kvcompile.ir import ATTEND  # noqa: E402
from kvcompile.kernels import triton_launch  # noqa: E402

MANY = {"many-queries": dict(store=KIVI, tokens=5, basis=True, keys=2, group=2, mass=True)}
SLOW = (CASES | MANY).keys() - {"side-by-side", "partial", "low-rank-offset"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n
                                  for n in (*CASES, *MANY)])
def test_the_kernel_is_the_body(name):
    """fp32 within the rounding of sums; in 16 bits what is stored, keys and weights are rounded
    once each, and the interpreter cuts bf16 off: a whole step."""
    given, operands, options = made(**MANY.get(name) or CASES[name])
    got, _, mass = triton_launch.attend(*given, **operands, **options)
    wide = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in given]
    want, _, weights = ATTEND(*wide, **options, **{n: x.float() for n, x in operands.items()})
    logit, most = tolerance(given, operands, want)
    if given[0].dtype is not torch.float32:
        step = torch.finfo(given[0].dtype).eps
        logit *= 1 + 3 * step / (2 * 2.0**-24 * (given[0].shape[-1] + given[1].shape[-1] + 8))
        most = (torch.expm1(torch.tensor(2 * logit)).item() + 3 * step) * 5.0
    assert got.dtype == given[0].dtype and (got.float() - want).abs().max() <= most
    if options["mass"]:
        assert (mass - weights).abs().max() <= 12 * (logit + 2 * mass.shape[-1] * 2.0**-24)
