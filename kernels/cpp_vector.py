"""The small C++ vector layer that kernels are written in: AVX-512, AVX2, or what C++ compiles to.

`Vec` holds Vec::width floats: load(p) of float, BFloat16 or Half, load(p, n) of n < width elements
with zeros after them, store, +, *, fma, sum. The compiler's own macros choose; KVC_PLAIN,
KVC_NO_AVX512 and KVC_NO_AVX512BF16 hold back, so that one machine can test every form.
"""

TEXT = r"""
#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(KVC_NO_AVX512) && !defined(KVC_PLAIN)
#define KVC_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(KVC_PLAIN)
#define KVC_AVX2 1
#endif
#if defined(KVC_AVX512) || defined(KVC_AVX2)
#include <immintrin.h>
#endif
#if defined(__GNUC__)
#define KVC_PREFETCH(p) __builtin_prefetch(p)
#else
#define KVC_PREFETCH(p)
#endif

namespace kvc {
using BF16 = c10::BFloat16;
using FP16 = c10::Half;

#if defined(KVC_AVX512)
struct Vec {
  static constexpr int64_t width = 16;
  __m512 v;
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static __m512 wide(__m256i x, BF16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static __m512 wide(__m256i x, FP16) { return _mm512_cvtph_ps(x); }
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  template <typename T> static Vec load(const T* p) {
    return {wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T())};
  }
  template <typename T> static Vec load(const T* p, int64_t n) {
    __m512i x = _mm512_maskz_loadu_epi16(first(n), p);
    return {wide(_mm512_castsi512_si256(x), T())};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
};
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

#elif defined(KVC_AVX2)
struct Vec {
  static constexpr int64_t width = 8;
  __m256 v;
  static __m256 wide(__m128i x, BF16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static __m256 wide(__m128i x, FP16) { return _mm256_cvtph_ps(x); }
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  template <typename T> static Vec load(const T* p) {
    return {wide(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T())};
  }
  template <typename T> static Vec load(const T* p, int64_t n) {
    T part[width] = {};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    return load(part);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
};
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

#else
struct Vec {
  static constexpr int64_t width = 8;
  float v[width];
  static Vec zero() { return {}; }
  template <typename T> static Vec load(const T* p) { return load(p, width); }
  template <typename T> static Vec load(const T* p, int64_t n) {
    Vec x{};
    for (int64_t i = 0; i < n; i++) x.v[i] = static_cast<float>(p[i]);
    return x;
  }
  void store(float* p) const { for (int64_t i = 0; i < width; i++) p[i] = v[i]; }
  float sum() const {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }
};
inline Vec operator+(Vec a, const Vec& b) {
  for (int64_t i = 0; i < Vec::width; i++) a.v[i] += b.v[i];
  return a;
}
inline Vec operator*(Vec a, const Vec& b) {
  for (int64_t i = 0; i < Vec::width; i++) a.v[i] *= b.v[i];
  return a;
}
inline Vec fma(const Vec& a, const Vec& b, Vec c) {
  for (int64_t i = 0; i < Vec::width; i++) c.v[i] += a.v[i] * b.v[i];
  return c;
}
#endif

// Operands of products summed in fp32; bf16 pairs where the machine multiplies those itself.
template <typename T> struct Lanes {
  static constexpr int64_t width = Vec::width;
  Vec v;
  static Lanes load(const T* p) { return {Vec::load(p)}; }
  static Lanes load(const T* p, int64_t n) { return {Vec::load(p, n)}; }
};
template <typename T> inline Vec dot(Vec sum, Lanes<T> a, Lanes<T> b) { return fma(a.v, b.v, sum); }

#if defined(KVC_AVX512) && defined(__AVX512BF16__) && !defined(KVC_NO_AVX512BF16)
template <> struct Lanes<BF16> {
  static constexpr int64_t width = 32;
  __m512i v;
  static Lanes load(const BF16* p) { return {_mm512_loadu_si512(p)}; }
  static Lanes load(const BF16* p, int64_t n) {
    return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p)};
  }
};
inline Vec dot(Vec sum, Lanes<BF16> a, Lanes<BF16> b) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#endif
}  // namespace kvc
"""
