"""kvc.linear: linears of one input, as one kernel that reads each weight once, where it lies."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.ir import body
from kvcompile.kernels import cpp_vector


@body("linear")
def linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    """x [..., K], weights [N_i, K], biases [N_i] or None -> [..., sum of N_i]."""
    return torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)


FUNCTIONS = cpp_vector.TEXT + r"""
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

// Rows [begin, end) of w x + bias, those of them that exist: w has N rows, bias may be null.
template <typename T>
inline void linear(const T* w, int64_t stride, const T* bias, const T* x, int64_t N, int64_t K,
                   T* out, int64_t begin, int64_t end) {
  int64_t n = std::max<int64_t>(begin, 0);
  end = std::min(end, N);
  float y[4];
  auto put = [&](int r) {
    out[n + r] = static_cast<T>(bias ? y[r] + static_cast<float>(bias[n + r]) : y[r]);
  };
  for (; n + 4 <= end; n += 4) {
    rows<4>(w + n * stride, stride, x, K, y);
    for (int r = 0; r < 4; r++) put(r);
  }
  for (; n < end; n++) {
    rows<1>(w + n * stride, stride, x, K, y);
    put(0);
  }
}
}  // namespace kvc
"""


def statements(biases: list[bool]) -> str:
    """C++ for `x`, `weight<i>` and, where `biases` says so, `bias<i>` -> `out`, in one region.

    A thread computes a contiguous range of the rows of all weights together.
    """
    rows = " + ".join(f"weight{i}_size[0]" for i in range(len(biases)))
    lines = [f"const int64_t K = weight0_size[1], total = {rows};",
             "#pragma omp parallel if (total * K > 32768)", "{",
             "  const int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();",
             "  int64_t begin = total * id / threads, end = total * (id + 1) / threads, at = 0;"]
    for i, bias in enumerate(biases):
        start = f"bias{i}" if bias else "static_cast<decltype(+x)>(nullptr)"
        lines += [f"  kvc::linear(weight{i}, weight{i}_stride[0], {start}, x, weight{i}_size[0], "
                  "K, out + at, begin - at, end - at);",
                  f"  at += weight{i}_size[0];"]
    return "\n".join([*lines, "}"])
