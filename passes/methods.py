"""The table of named methods: an entry is its parameters, its axes, the paper it comes from.

Axes set here: ``format.k`` and ``format.v`` name the storage format; ``block.*`` is how many tokens
leave the full-precision residual at a time; ``lag.*`` is how many of the latest tokens stay in it
after they left; ``sinks`` and ``window`` are how many of the first and last tokens are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompile.method import Method, Param
from kvcompile.recipe import Value

_GROUPS = (16, 32, 64, 128)


def _full(p: Mapping[str, Any]) -> Mapping[str, Value]:
    return {}


def _streamingllm(p: Mapping[str, Any]) -> Mapping[str, Value]:
    return {"sinks": p["sinks"], "window": p["window"]}


def _kivi(p: Mapping[str, Any]) -> Mapping[str, Value]:
    code = f"bits={p['bits']}, axis={{}}, group={p['group']}"
    return {
        "format.k": f"int({code.format('channel')})",
        "block.k": p["residual"] or p["group"],
        "lag.k": 0,
        "format.v": f"int({code.format('token')})",
        "block.v": 1,
        "lag.v": p["residual"],
    }


def _by_token(text: str, residual: int) -> Mapping[str, Value]:
    """K and V alike in a format that stores each token by itself."""
    one: dict[str, Value] = {"format": text, "block": 1, "lag": residual}
    return {f"{axis}.{x}": value for x in "kv" for axis, value in one.items()}


def _int8(p: Mapping[str, Any]) -> Mapping[str, Value]:
    return _by_token(f"int(bits=8, axis=token, group={p['group']})", p["residual"])


def _fp8(p: Mapping[str, Any]) -> Mapping[str, Value]:
    return _by_token(f"fp8(kind={p['format']})", p["residual"])


def _groups(what: str) -> Param:
    return Param("group", 32, choices=_GROUPS, help=f"{what} that share a scale and an offset")


def _residual(**limits: Any) -> Param:
    kept = "latest tokens kept in full precision"
    return Param("residual", minimum=0, help=kept, **limits)


METHODS: tuple[Method, ...] = (
    Method(
        name="full",
        title="Full cache",
        paper="arXiv:1911.02150",
        family="exact",
        params=(),
        axes=_full,
        note="every key and value in the model's own type, as section 2 of the paper caches them",
    ),
    Method(
        name="int8",
        title="Per-token asymmetric int8",
        paper="arXiv:2303.06865",
        family="quantization",
        params=(_groups("channels of a token"), _residual(default=0)),
        axes=_int8,
        note="FlexGen's group-wise min/max quantization of the cache, at 8 bits instead of 4",
    ),
    Method(
        name="fp8",
        title="8-bit floating point",
        paper="arXiv:2209.05433",
        family="quantization",
        params=(
            Param("format", "e4m3", choices=("e4m3", "e5m2"), help="exponent and mantissa bits"),
            _residual(default=0),
        ),
        axes=_fp8,
        note="the paper's two encodings applied to stored keys and values",
    ),
    Method(
        name="kivi",
        title="KIVI",
        paper="arXiv:2402.02750",
        family="quantization",
        params=(
            Param("bits", 2, choices=(2, 4), help="bits of a stored number"),
            _groups("tokens of a channel (K) or channels of a token (V)"),
            _residual(default=128, multiple_of="group"),
        ),
        axes=_kivi,
        note="K leaves the residual in whole blocks, V one token at a time; with residual=0 "
        "K still waits for a full group",
    ),
    Method(
        name="streamingllm",
        title="StreamingLLM",
        paper="arXiv:2309.17453",
        family="streaming",
        params=(
            Param("sinks", 4, minimum=0, help="first tokens that stay"),
            Param("window", 1024, minimum=1, help="latest tokens that stay"),
        ),
        axes=_streamingllm,
        note="keys keep their original positions; the paper numbers them by place in the cache",
    ),
)
