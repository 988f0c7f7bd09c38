"""Laws of every storage format: pages, error bound, bytes, and codes that come back exactly."""

import pytest
import torch

from kvcompile.errors import RecipeError
from kvcompile.format import PAGE, bits_per_element, format_of, formats, term_of
from kvcompile.kernels.coded import Coded
from kvcompile.recipe import parse_term

SPELLED = (
    "dense", "dense(dtype=bf16)", "dense(dtype=fp16)", "fp8", "fp8(kind=e5m2)",
    *(f"int(bits={b}, axis={a}, group={g})" for b in (2, 4, 8) for a in ("channel", "token")
      for g in (16, 32, 64, 128)),
    *(f"int(bits={b}, symmetric=true)" for b in (2, 4, 8)),
    "int(bits=4, clip=0.95)", "int(bits=8, axis=channel, clip=0.5)",
    "nuq(table=[-0.7, -0.2, 0.1, 0.6])",
    "nuq(table=[-1, -0.9, -0.8, -0.6, -0.5, -0.3, -0.2, 0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, 1], "
    "axis=channel, group=32)",
    "nf4(group=16)", "nf4(axis=channel, group=32)",
    "hadamard(of=int(bits=4))", "hadamard(of=int(bits=2, axis=channel))",
    "centered(of=int(bits=4, symmetric=true))", "centered(of=fp8, block=32)",
    "scaled(of=int(bits=4, group=64))", "scaled(of=nf4(axis=channel, group=32), block=16)",
    "outliers(of=int(bits=2, axis=channel, group=128))", "outliers(of=nf4, fraction=0.05)",
    "lowrank(of=int(bits=2, axis=channel))", "lowrank(of=int(bits=2), rank=2, block=32)",
    "lowrank(of=outliers(of=int(bits=2), fraction=0.02))",
    "hadamard(of=centered(of=scaled(of=int(bits=4))))",
    "direction", "direction(of=int(bits=4, axis=channel), kept=0)", "direction(of=fp8, t=0.2)",
)
SIDES = ("k", "v")


def test_every_format_is_tried():
    assert {parse_term(text).name for text in SPELLED} == set(formats())


def fitting(fmt, dim, side):
    try:
        return fmt.planes(dim, torch.float32, side)
    except RecipeError:
        return None


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", SPELLED)
def test_pages_hold_what_was_encoded(text, side):
    """decode(page(encode(x))) is within the bound of x; steps and pages take the bytes they say."""
    fmt = format_of(parse_term(text))
    assert format_of(term_of(fmt)) == fmt
    tried = 0
    for dim in (16, 24, 32, 48, 64, 80, 96, 128, 256):
        planes = fitting(fmt, dim, side)
        if planes is None:
            continue
        tried += 1
        x = torch.randn(2, 2 * PAGE, dim, generator=torch.Generator().manual_seed(dim))
        x[0, :, 3] *= 30                                # an outlier channel
        encoded, back = fmt.encode(x, side), {}
        for name, spec in planes.items():
            assert encoded[name].shape == (2, 2 * PAGE // fmt.step, *spec.shape)
            pool = torch.zeros(4, *spec.page(fmt.step), dtype=spec.dtype)
            steps = spec.steps(pool)
            steps.copy_(encoded[name].reshape(steps.shape))
            back[name] = spec.steps(pool).reshape(encoded[name].shape)
            assert torch.equal(back[name], encoded[name])
        got = fmt.decode(back, dim, torch.float32, side)
        bound = fmt.error_bound(back, dim, side)
        eps = torch.finfo(torch.float32).eps            # of the sums that decode makes itself
        most = x.abs().amax((-1, -2), keepdim=True)
        assert ((got - x).abs() <= bound + 16 * eps * (most + bound)).all(), dim
        pages = sum(torch.Size(s.page(fmt.step)).numel() * s.dtype.itemsize
                    for s in planes.values())
        assert 8 * pages == bits_per_element(fmt, dim, torch.float32, side) * PAGE * dim
    assert tried


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", [t for t in SPELLED
                                  if isinstance(format_of(parse_term(t)), Coded)])
def test_every_code_comes_back(text, side):
    """Codes in every field and lane of a page decode to value(code), and encode to themselves."""
    fmt, dim = format_of(parse_term(text)), 128
    codes = torch.arange(2 * PAGE * dim).remainder(2**fmt.values.bits)
    codes = codes[torch.randperm(codes.numel(), generator=torch.Generator().manual_seed(0))]
    codes = codes.view(2, PAGE, dim).to(torch.uint8)
    if "e4m3" in str(fmt):
        codes[codes & 0x7F == 0x7F] = 0                 # NaN
    elif "e5m2" in str(fmt):
        codes[codes & 0x7F > 0x7B] = 0                  # infinities and NaN
    x = fmt.values.decode(codes)
    planes = fmt.encode(x, side)
    planes["scale"] = torch.ones_like(planes["scale"]) * (planes["scale"].dtype != torch.int8)
    if "low" in planes:
        planes["low"] = torch.zeros_like(planes["low"])
    from kvcompile.kernels import coded

    pack = coded.pack_k if side == "k" else coded.pack_v
    planes["codes"] = fmt._arrange(pack(codes, fmt.values.bits), side)
    assert torch.equal(fmt.codes(planes, dim, side), codes)
    assert torch.equal(fmt.decode(planes, dim, torch.float32, side), x)


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
