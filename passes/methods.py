"""The table of named methods: an entry is its parameters, its axes, the paper it comes from.

Axes set here: ``format.k`` and ``format.v`` name the storage format; ``block.*`` is how many tokens
leave the full-precision residual at a time; ``lag.*`` is how many of the latest tokens stay in it
after they left; ``sinks`` and ``window`` are how many of the first and last tokens are kept;
``recompute=turned`` stores keys before their rotation (`passes/place.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

from kvcompile.method import Axes, Method, Param
from kvcompile.recipe import Term, Value

GROUPS = (16, 32, 64, 128)


def _full(p: Mapping[str, Any]) -> Axes:
    return {}


def _streamingllm(p: Mapping[str, Any]) -> Axes:
    beside = {"positions": "slot", "recompute": "turned"} if p["positions"] == "slot" else {}
    return {"sinks": p["sinks"], "window": p["window"], **beside}


def _kivi(p: Mapping[str, Any]) -> Axes:
    return kivi_axes((p["bits"], p["bits"]), p["group"], p["residual"])


def kivi_axes(bits: tuple[int, int], group: int, residual: int) -> Axes:
    """K per channel in blocks, V per token, each behind `residual` exact tokens."""
    return {
        "format.k": f"int(bits={bits[0]}, axis=channel, group={group})",
        "block.k": residual or group,
        "lag.k": 0,
        "format.v": f"int(bits={bits[1]}, axis=token, group={group})",
        "block.v": 1,
        "lag.v": residual,
    }


def by_token(text: str, residual: int) -> Axes:
    """K and V alike in a format that stores each token by itself."""
    one: dict[str, Value] = {"format": text, "block": 1, "lag": residual}
    return {f"{axis}.{x}": value for x in "kv" for axis, value in one.items()}


def _int8(p: Mapping[str, Any]) -> Axes:
    return by_token(f"int(bits=8, axis=token, group={p['group']})", p["residual"])


def _rtn(p: Mapping[str, Any]) -> Axes:
    return by_token(f"int(bits={p['bits']}, axis=token, group={p['group']})", p["residual"])


def _fp8(p: Mapping[str, Any]) -> Axes:
    return by_token(f"fp8(kind={p['format']})", p["residual"])


def _nf4(p: Mapping[str, Any]) -> Axes:
    return by_token(f"nf4(axis=token, group={p['group']})", p["residual"])


def _quarot(p: Mapping[str, Any]) -> Axes:
    inside = f"int(bits={p['bits']}, axis=token, group={p['group']}, clip={p['clip']})"
    return by_token(f"hadamard(of={inside})", p["residual"])


def _gear(p: Mapping[str, Any]) -> Axes:
    def lowrank(axis: str) -> str:
        code = f"int(bits={p['bits']}, axis={axis}, group={p['group']})"
        if p["outliers"]:
            code = f"outliers(of={code}, fraction={p['outliers']})"
        return f"lowrank(of={code}, rank={p['rank']}, block={p['block']})" if p["rank"] else code

    blocks: dict[str, Value] = {f"block.{x}": p["block"] for x in "kv"}
    return {"format.k": lowrank("channel"), "format.v": lowrank("token"), **blocks,
            "lag.k": 0, "lag.v": 0}


def _zipcache(p: Mapping[str, Any]) -> Axes:
    salient = int(p["salient"] * 128) if p["low"] < p["bits"] else 0
    group = gcd(salient, 128) if salient else 128

    def tiers(axis: str, group: int) -> str:
        high, low = (f"int(bits={p[n]}, axis={axis}, group={group})" for n in ("bits", "low"))
        return f"mixed(high={high}, low={low}, salient={salient})" if salient else high

    by_channel, by_token = tiers("channel", group), f"scaled(of={tiers('token', 128)}, block=128)"
    rule: dict[str, Value] = {"keep.score": Term("normalized"), "keep.budget": Term("all"),
                              "keep.every": 1, "keep.salient": salient} if salient else {}
    return {"format.k": by_channel if p["keys"] == "channel" else by_token, "block.k": 128,
            "lag.k": 0, "format.v": by_token, "block.v": 128, "lag.v": 0, **rule}


def _prerope(p: Mapping[str, Any]) -> Axes:
    return {"recompute": "turned"}


def groups(what: str, default: int = 32) -> Param:
    return Param("group", default, choices=GROUPS, help=f"{what} that share a scale and an offset")


def residual(**limits: Any) -> Param:
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
        params=(groups("channels of a token"), residual(default=0)),
        axes=_int8,
        note="FlexGen's group-wise min/max quantization of the cache, at 8 bits instead of 4",
    ),
    Method(
        name="rtn",
        title="Round to nearest, per token",
        paper="arXiv:2303.06865",
        family="quantization",
        params=(
            Param("bits", 4, choices=(2, 4, 8), help="bits of a stored number"),
            groups("channels of a token", 64),
            residual(default=0),
        ),
        axes=_rtn,
        note="FlexGen's group-wise min/max quantization, by default as published: 4 bits, groups "
        "of 64; what the other methods at these bits are measured against",
    ),
    Method(
        name="fp8",
        title="8-bit floating point",
        paper="arXiv:2209.05433",
        family="quantization",
        params=(
            Param("format", "e4m3", choices=("e4m3", "e5m2"), help="exponent and mantissa bits"),
            residual(default=0),
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
            groups("tokens of a channel (K) or channels of a token (V)"),
            residual(default=128, multiple_of="group"),
        ),
        axes=_kivi,
        note="K leaves the residual in whole blocks, V one token at a time; with residual=0 "
        "K still waits for a full group",
    ),
    Method(
        name="nf4",
        title="4-bit NormalFloat",
        paper="arXiv:2305.14314",
        family="quantization",
        params=(
            Param("group", 64, choices=GROUPS, help="channels of a token that share a scale"),
            residual(default=0),
        ),
        axes=_nf4,
        note="QLoRA's codebook for weights, quantiles of a normal distribution scaled by each "
        "group's largest magnitude, applied to the cache",
    ),
    Method(
        name="quarot",
        title="QuaRot's cache",
        paper="arXiv:2404.00456",
        family="quantization",
        params=(
            Param("bits", 4, choices=(2, 4), help="bits of a stored number"),
            groups("channels of a rotated token", 128),
            Param("clip", 0.95, minimum=0.5, maximum=1, help="share of a group's range that the "
                  "codes span"),
            residual(default=0),
        ),
        axes=_quarot,
        note="each head's K (after RoPE) and V are turned by a Hadamard matrix before they are "
        "stored per token; queries and outputs are turned when reading. Weights and activations "
        "stay as they are; the range is clipped about its middle, in the paper towards zero",
    ),
    Method(
        name="gear",
        title="GEAR",
        paper="arXiv:2403.05527",
        family="quantization",
        params=(
            Param("bits", 2, choices=(2, 4), help="bits of a stored number"),
            groups("tokens of a channel (K) or channels of a token (V)", 64),
            Param("rank", 4, minimum=0, maximum=16, help="rank of what corrects a block's error"),
            Param("outliers", 0.02, minimum=0, maximum=0.25, help="share of each group that is "
                  "stored apart, exactly"),
            Param("block", 128, choices=(64, 128), multiple_of="group",
                  help="tokens that leave the buffer together and share a correction"),
        ),
        axes=_gear,
        note="outliers, KIVI's quantization of the others, and per head a low-rank matrix for what "
        "that loses; here for every block, in the paper for the whole prompt at once and, at rank "
        "2, for each full buffer",
    ),
    Method(
        name="zipcache",
        title="ZipCache",
        paper="arXiv:2405.14256",
        family="quantization",
        params=(
            Param("bits", 4, choices=(2, 4, 8), help="bits of a salient token's numbers"),
            Param("low", 2, choices=(2, 4, 8), help="of the others'; no fewer: one precision"),
            Param("salient", 0.5, choices=tuple(i / 8 for i in range(1, 8)), help="share of them; "
                  "scales of K per channel are for 64 tokens at 0.5, else for fewer"),
            Param("keys", "channel", choices=("channel", "token"),
                  help="K per channel, or channel-separable per token as V"),
        ),
        axes=_zipcache,
        note="V channel-separable per token: each channel is divided by the root of its largest "
        "magnitude, then each token has one scale. Of a prompt, and then of every 128 tokens, the "
        "share of highest normalized attention has more bits, head by head, for good: the paper "
        "decides anew every 100 tokens",
    ),
    Method(
        name="prerope",
        title="Keys before RoPE",
        paper="arXiv:2401.18079",
        family="quantization",
        params=(),
        axes=_prerope,
        note="KVQuant's section 3.2 for any format: keys are stored before their rotation, which "
        "mixes the magnitudes of two channels, and turned at every read; layers whose keys are not "
        "rotated as a whole keep them as they are",
    ),
    Method(
        name="streamingllm",
        title="StreamingLLM",
        paper="arXiv:2309.17453",
        family="streaming",
        params=(
            Param("sinks", 4, minimum=0, help="first tokens that stay"),
            Param("window", 1024, minimum=1, help="latest tokens that stay"),
            Param("positions", "original", choices=("original", "slot"),
                  help="of keys: where they were, or by place in the cache"),
        ),
        axes=_streamingllm,
        note="positions=slot is the paper's: keys are stored before their rotation and turned at "
        "every read",
    ),
)
