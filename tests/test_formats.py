"""Storage formats: published numbers and errors; their laws are in test_registered.py."""

import pytest
import torch

from kvcompile.errors import RecipeError
from kvcompile.format import format_of
from kvcompile.recipe import parse_term


def test_nf4_is_the_published_codebook():
    from kvcompile.kernels.nf4 import NORMAL

    published = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
                 -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
                 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
                 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                 0.7229568362236023, 1.0)               # arXiv:2305.14314, appendix E
    assert NORMAL == pytest.approx(published, abs=2e-6)


@pytest.mark.parametrize("text, names", [
    ("int(bits=3)", "bits must be one of 2, 4, 8"),
    ("int(axis=head)", "axis must be one of channel, token"),
    ("int(symetric=true)", "did you mean 'symmetric'?"),
    ("nf4(group=48)", "group must be one of 16, 32, 64, 128"),
    ("int(clip=0.2)", "clip must be from 0.5 to 1"),
    ("nuq(table=[0, 1])", "table must list 4 or 16 numbers"),
    ("nuq(table=[0, 1, 0.5, 0.6])", "table must ascend within -1 to 1"),
    ("fp8(kind=e3m4)", "kind must be one of e4m3, e5m2"),
    ("innt", "unknown format 'innt'"),
])
def test_errors_name_what_is_legal(text, names):
    with pytest.raises(RecipeError) as error:
        format_of(parse_term(text))
    assert names in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", [
    "lowrank(of=dense(dtype=bf16), rank=2, block=32)", "lowrank(of=int(bits=2))",
    "outliers(of=fp8, fraction=0.05)", "scaled(of=dense, block=16)"])
def test_wrappers_hold_no_more_than_their_own_planes(text):
    """Found by the laws: formats inside that hold more than the fp16 around them."""
    fmt = format_of(parse_term(text))
    for x in (torch.ones(1, 128, 64), torch.randn(1, 128, 64).sign()):
        x = x * fmt.limit(torch.float32)
        back = fmt.decode(fmt.encode(x, "k"), 64, torch.float32, "k")
        assert back.isfinite().all()
