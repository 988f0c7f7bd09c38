"""Laws of every storage format."""

from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.format import PAGE, Format, bits_per_element, format_of, term_of
from kvcompile.recipe import parse_term
from kvcompile.registry import module
from kvcompile.store import SIDES
from kvcompile.testing.law import law
from kvcompile.testing.strategies import dims, features, formats_of, plain_features


def drawn(cls: Any, data: Any, numbers: Any = None) -> tuple[Format, Any, Tensor]:
    """A format of the class, a side, and numbers [2, a page, dim] within its limit."""
    fmt, side = data.draw(formats_of(cls)), data.draw(st.sampled_from(SIDES))
    found = dims(fmt, side)
    assume(found)
    some = data.draw(features() if numbers is None else numbers)
    x = some.tensor(2, PAGE, data.draw(st.sampled_from(found)))
    return fmt, side, x.clamp(-fmt.limit(x.dtype), fmt.limit(x.dtype))


def decoded(fmt: Format, x: Tensor, side: Any) -> Tensor:
    return fmt.decode(fmt.encode(x, side), x.shape[-1], torch.float32, side)


def coded(cls: Any) -> bool:
    """Whether the format stores small codes, whose groups its fields name."""
    return issubclass(cls, module("kernels", "coded").Coded)


@law("format")
def text_round_trips(cls: Any, data: Any) -> None:
    """format_of(term_of(f)) == f, and through text."""
    fmt = data.draw(formats_of(cls))
    assert format_of(term_of(fmt)) == fmt
    assert format_of(parse_term(str(term_of(fmt)))) == fmt


@law("format")
def error_is_bounded(cls: Any, data: Any) -> None:
    """|decode(encode(x)) - x| <= error_bound, for outliers, ties, constants and denormals."""
    fmt, side, x = drawn(cls, data)
    planes = fmt.encode(x, side)
    bound = fmt.error_bound(planes, x.shape[-1], side)
    # 16 roundings of the sums that decode makes, and fp32's and the scales' smallest numbers
    slack = 16 * torch.finfo(torch.float32).eps * (x.abs().amax((-1, -2), keepdim=True) + bound)
    error = (fmt.decode(planes, x.shape[-1], torch.float32, side) - x).abs()
    assert (error <= bound + slack + 2.0**-126).all(), float((error - bound - slack).max())


@law("format")
def pages_hold_it(cls: Any, data: Any) -> None:
    """What is encoded comes back from pages bit by bit, and takes the bytes that are told."""
    fmt, side, x = drawn(cls, data)
    dim, total = x.shape[-1], 0
    encoded, specs = fmt.encode(x, side), fmt.planes(x.shape[-1], torch.float32, side)
    assert encoded.keys() == specs.keys()
    for name, spec in specs.items():
        assert encoded[name].shape == (2, PAGE // fmt.step, *spec.shape)
        pool = torch.zeros(2, *spec.page(fmt.step), dtype=spec.dtype)
        steps = spec.steps(pool)
        steps.copy_(encoded[name].reshape(steps.shape))
        assert torch.equal(spec.steps(pool).reshape(encoded[name].shape), encoded[name])
        total += pool[0].numel() * spec.dtype.itemsize
    assert 8 * total == bits_per_element(fmt, dim, torch.float32, side) * PAGE * dim


@law("format")
def sides_differ_in_layout_only(cls: Any, data: Any) -> None:
    """Stored as K or as V the same numbers come back."""
    fmt, _, x = drawn(cls, data)
    assume(x.shape[-1] in dims(fmt, "k") and x.shape[-1] in dims(fmt, "v"))
    assert torch.equal(decoded(fmt, x, "k"), decoded(fmt, x, "v"))


@law("format")
def heads_and_steps_are_independent(cls: Any, data: Any) -> None:
    """A head alone, and a step alone, are stored as among others, bit by bit."""
    fmt, side, x = drawn(cls, data)
    whole, step = fmt.encode(x, side), fmt.step
    last = fmt.encode(x[1:, -step:], side)
    for name, plane in whole.items():
        assert torch.equal(plane[1:, -1:], last[name]), name


@law("format", applies=coded)
def groups_are_independent(cls: Any, data: Any) -> None:
    """A number changes what is stored of its own group only: tokens of a channel, or channels."""
    fmt, side, x = drawn(cls, data, plain_features())
    own: Any = fmt
    token, channel = data.draw(st.integers(0, PAGE - 1)), data.draw(st.integers(0, x.shape[-1] - 1))
    before = decoded(fmt, x, side)
    x[0, token, channel] = 50.0
    changed = (decoded(fmt, x, side) != before).nonzero()
    group = own.group if own.axis == "channel" else own._group(x.shape[-1])
    for head, t, c in changed.tolist():
        near = (c == channel and t // group == token // group) if own.axis == "channel" else (
            t == token and c // group == channel // group)
        assert head == 0 and near, (t, c, token, channel)


@law("format", applies=coded)
def every_code_comes_back(cls: Any, data: Any) -> None:
    """decode(pack(code)) is the number of that code, in every field and lane of a page."""
    fmt: Any
    fmt, side, x = drawn(cls, data)
    kernel, dim = module("kernels", "coded"), x.shape[-1]
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    codes = torch.randint(0, 2**fmt.values.bits, (2, PAGE, dim), generator=g, dtype=torch.uint8)
    codes = torch.where(fmt.values.decode(codes).isfinite(), codes, 0)
    planes = fmt.encode(fmt.values.decode(codes), side)
    one = torch.ones_like(planes["scale"]) * (planes["scale"].dtype != torch.int8)  # 1 or 2^0
    planes |= {"scale": one, **({"low": one * 0} if "low" in planes else {})}
    pack = kernel.pack_k if side == "k" else kernel.pack_v
    planes["codes"] = fmt._arrange(pack(codes, fmt.values.bits), side)
    assert torch.equal(fmt.codes(planes, dim, side), codes)
    assert torch.equal(fmt.decode(planes, dim, torch.float32, side), fmt.values.decode(codes))


@law("format")
def the_limit_can_be_stored(cls: Any, data: Any) -> None:
    """Numbers up to `limit` come back finite."""
    fmt, side, x = drawn(cls, data, plain_features())
    x = x.sign() if data.draw(st.booleans()) else x / x.abs().max()
    x = x * fmt.limit(torch.float32)
    assert decoded(fmt, x, side).isfinite().all()
