"""The C++ text of attention of many queries: kvc.attention, and kvc.attend with more than one."""

from functools import cache

import torch

from kvcompile.checks.rounding import Arithmetic
from kvcompile.kernels.cpp_attend import FILES as ONE_QUERY
from kvcompile.kernels.cpp_attend import FOLDER, Shape, name, number, tiers
from kvcompile.store import Store

FILES = (*ONE_QUERY, FOLDER / "product.h", FOLDER / "blockwise.h")


def arithmetic(dtype: torch.dtype) -> Arithmetic:
    """How the kernel computes: for 16-bit models q, what is decoded and the weights are bf16."""
    if dtype is torch.float32:
        return Arithmetic()
    eps = torch.finfo(torch.bfloat16).eps
    return Arithmetic(stored=eps, weights=eps, out=torch.finfo(dtype).eps / 2)


@cache
def headers() -> tuple[str, ...]:
    """What every kernel's text starts with; `cpp_attend.config` follows."""
    return tuple(file.read_text() for file in FILES)


def statements(store: Store, shape: Shape, threads: int) -> str:
    """The statements: q [B, Hq, S, Dk], k, v, valid [B, S], sinks and, where anything is stored,
    plane0.. (the count first) and slot -> out [B, S, Hq, Dv]."""
    start, count = "slot[0] * q_size[0] * Config::H", "nullptr"
    lines = [f"using Config = kvc::{name(store, shape, threads)};", "Config::Tiers tiers;"]
    if shape.stored:
        count = f"plane0 + {start}"
        lines += tiers(store, shape.dims, shape.dtype, "tiers.", start,
                       "member[0]" if store.members > 1 else "")
    lines += [f"const auto* {x}_ = (const Config::T*){x};" for x in "qkv"]
    lines += [f"auto* out_ = ({number(shape.dtype)}*)out;",
              f"kvc::blockwise<Config>(tiers, {count}, valid, "
              f"{'sinks' if shape.sinks else 'nullptr'}, q_size[0], q_size[2],"]
    lines += [f"    [&](long b, long h, long t) {{ return {x}_ + b * {x}_stride[0] + "
              f"h * {x}_stride[1] + t * {x}_stride[2]; }}," for x in "qkv"]
    lines.append("    [&](long b, long h, long t) { return out_ + ((b * q_size[2] + t) * "
                 "(Config::H * Config::G) + h) * Config::DV; });")
    return "\n".join(lines)
