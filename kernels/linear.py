"""kvc.linear: linears of one input, as one kernel that reads each weight once, where it lies."""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.ir import body
from kvcompile.kernels.cpp_attend import FOLDER, VECTORS, number

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
GATES_CPP = {
    "silu": "g / (1.0f + std::exp(-g))",
    "gelu": "0.5f * g * (1.0f + std::erf(g * 0.70710678f))",
    "tanh": "0.5f * g * (1.0f + std::tanh(0.79788456f * (g + 0.044715f * g * g * g)))",
    "relu": "g < 0 ? 0 : g"}


@body("linear")
def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *, gate: str = ""
           ) -> Tensor:
    """x [..., K], weights [N_i, K], biases [N_i] or None -> [..., sum of N_i].

    With a gate, of two linears: gate(first) * second, [..., N].
    """
    parts = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    return GATES[gate](parts[0]) * parts[1] if gate else torch.cat(parts, -1)


FILES = (*VECTORS, FOLDER / "linear.h")


@cache
def headers() -> tuple[str, ...]:
    """What every kernel's text starts with."""
    return tuple(file.read_text() for file in FILES)


def statements(dtype: torch.dtype, biases: list[bool], gate: str = "") -> str:
    """C++ for `x`, `weight<i>` and, where `biases` says so, `bias<i>` -> `out`, in one region.

    A thread computes a contiguous range of the rows of all weights together; with a gate, the same
    rows of both.
    """
    each = [f"weight{i}_size[0]" for i in range(len(biases))]
    blocks = [_gated(biases, gate)] if gate else [_plain(i, b) for i, b in enumerate(biases)]
    return f"""
using T = {number(dtype)};
const auto* x_ = (const T*)x;
auto* out_ = (T*)out;
constexpr int64_t BLOCK = 16;
const int64_t K = weight0_size[1], total = {each[0] if gate else " + ".join(each)};
#pragma omp parallel if (total * K > 32768)
{{
  const int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
  const int64_t begin = total * id / threads, end = total * (id + 1) / threads;
  int64_t first = 0;  // the place of a weight's first row among all
  {"".join(blocks)}
}}"""


def _rows(i: int, bias: bool, to: str) -> str:
    """Rows [n, n + count) of linear i as fp32."""
    start = f"(const T*)bias{i} + n" if bias else "(const T*)nullptr"
    return (f"kvc::linear((const T*)weight{i} + n * weight{i}_stride[0], weight{i}_stride[0], "
            f"{start}, x_, count, K, {to});")


def _blocks(i: int, lines: str) -> str:
    """`lines` for each block of the thread's rows of linear i."""
    return f"""
  for (int64_t n = std::max<int64_t>(begin - first, 0),
               stop = std::min<int64_t>(end - first, weight{i}_size[0]); n < stop; n += BLOCK) {{
    const int64_t count = std::min(BLOCK, stop - n);
    {lines}
  }}
  first += weight{i}_size[0];"""


def _plain(i: int, bias: bool) -> str:
    return _blocks(i, f"""float y[BLOCK];
    {_rows(i, bias, "y")}
    for (int64_t r = 0; r < count; r++) kvc::write(out_ + first + n + r, y[r]);""")


def _gated(biases: list[bool], gate: str) -> str:
    return _blocks(0, f"""float gates[BLOCK], y[BLOCK];
    {_rows(0, biases[0], "gates")}
    {_rows(1, biases[1], "y")}
    for (int64_t r = 0; r < count; r++) {{
      const float g = gates[r];
      kvc::write(out_ + n + r, ({GATES_CPP[gate]}) * y[r]);
    }}""")
