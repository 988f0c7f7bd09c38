"""kvc.linear: linears of one input, as one kernel that reads each weight once, where it lies."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.ir import body

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


TEXT = r"""
namespace kvc {
// out[r] = w[r] . x for R rows of w; what comes 8 KB later in memory is asked for meanwhile.
template <int R, typename T>
inline void rows(const T* w, int64_t stride, const T* x, int64_t K, float* out) {
  constexpr int64_t width = Lanes<T>::width, line = 64 / sizeof(T);
  constexpr int64_t ahead = 8192 / sizeof(T), block = width > line ? width : line;
  Vec sums[R];
  for (int r = 0; r < R; r++) sums[r] = Vec::zero();
  int64_t k = 0;
  for (; k + block <= K; k += block) {
    for (int r = 0; r < R; r++)
      for (int64_t i = 0; i < block; i += line) KVC_PREFETCH(w + r * stride + k + i + ahead);
    for (int64_t i = 0; i < block; i += width) {
      auto a = Lanes<T>::load(x + k + i);
      for (int r = 0; r < R; r++)
        sums[r] = dot(sums[r], a, Lanes<T>::load(w + r * stride + k + i));
    }
  }
  for (; k + width <= K; k += width) {
    auto a = Lanes<T>::load(x + k);
    for (int r = 0; r < R; r++) sums[r] = dot(sums[r], a, Lanes<T>::load(w + r * stride + k));
  }
  if (k < K) {
    auto a = Lanes<T>::load(x + k, K - k);
    for (int r = 0; r < R; r++)
      sums[r] = dot(sums[r], a, Lanes<T>::load(w + r * stride + k, K - k));
  }
  for (int r = 0; r < R; r++) out[r] = sums[r].sum();
}

// out[r] = w[r] . x + bias[r] for n rows; bias may be null.
template <typename T>
inline void linear(const T* w, int64_t stride, const T* bias, const T* x, int64_t n, int64_t K,
                   float* out) {
  int64_t r = 0;
  for (; r + 4 <= n; r += 4) rows<4>(w + r * stride, stride, x, K, out + r);
  for (; r < n; r++) rows<1>(w + r * stride, stride, x, K, out + r);
  if (bias)
    for (r = 0; r < n; r++) out[r] += static_cast<float>(bias[r]);
}
}  // namespace kvc
"""


def statements(biases: list[bool], gate: str = "") -> str:
    """C++ for `x`, `weight<i>` and, where `biases` says so, `bias<i>` -> `out`, in one region.

    A thread computes a contiguous range of the rows of all weights together; with a gate, the same
    rows of both.
    """
    each = [f"weight{i}_size[0]" for i in range(len(biases))]
    blocks = [_gated(biases, gate)] if gate else [_plain(i, b) for i, b in enumerate(biases)]
    return f"""
using T = std::decay_t<decltype(*x)>;
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
    start = f"bias{i} + n" if bias else "static_cast<const T*>(nullptr)"
    return (f"kvc::linear(weight{i} + n * weight{i}_stride[0], weight{i}_stride[0], {start}, x, "
            f"count, K, {to});")


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
    for (int64_t r = 0; r < count; r++) out[first + n + r] = static_cast<T>(y[r]);""")


def _gated(biases: list[bool], gate: str) -> str:
    return _blocks(0, f"""float gates[BLOCK], y[BLOCK];
    {_rows(0, biases[0], "gates")}
    {_rows(1, biases[1], "y")}
    for (int64_t r = 0; r < count; r++) {{
      const float g = gates[r];
      out[n + r] = static_cast<T>(({GATES_CPP[gate]}) * y[r]);
    }}""")
