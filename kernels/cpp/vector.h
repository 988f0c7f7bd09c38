// What vectors of 16 lanes of fp32 or int32 are made of: one register of AVX-512 (avx512.h), or two
// of AVX2 or four of another CPU (halves.h). KVC_PORTABLE and KVC_HALVES hold back what a CPU has.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && !defined(KVC_PORTABLE) && !defined(KVC_HALVES)
#define KVC_AVX512 1
#else
#define KVC_AVX512 0
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !KVC_AVX512 && !defined(KVC_PORTABLE)
#define KVC_AVX2 1
#else
#define KVC_AVX2 0
#endif
#if KVC_AVX512 || KVC_AVX2
#include <immintrin.h>
#define KVC_INTEGER 1  // dot products of 16-bit integers
#else
#define KVC_INTEGER 0
#endif
#if KVC_AVX512 && defined(__AVX512BF16__) && !defined(KVC_NO_PAIRS)
#define KVC_PAIRS 1  // dot products of bf16
#else
#define KVC_PAIRS 0
#endif

#define ALWAYS __attribute__((always_inline))

namespace kvc {

struct half { uint16_t bits; };
struct bf16 { uint16_t bits; };
struct exponent { int8_t bits; };

// What lies `bytes` further is brought into the second cache. Any address is legal.
inline void fetch(const void* p, long bytes) { __builtin_prefetch((const char*)p + bytes, 0, 2); }

inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

#if defined(__aarch64__)
#define KVC_HALF __fp16
#elif defined(__FLT16_MAX__) && (defined(__x86_64__) || defined(__clang__))
#define KVC_HALF _Float16
#endif
#ifdef KVC_HALF
inline float one(half x) { KVC_HALF y; std::memcpy(&y, &x, 2); return (float)y; }
#else
inline float one(half x) {
    uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    float magnitude = rest < 0x400u ? (float)rest * as_float(0x33800000u)
                                    : as_float((rest << 13) + 0x38000000u);
    return as_float(as_bits(magnitude) | sign);
}
#endif

}  // namespace kvc
