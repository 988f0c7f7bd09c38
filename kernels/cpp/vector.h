// 16 lanes of fp32 or int32: AVX-512, or the compiler's own vectors (AVX2, NEON, plain).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && !defined(KVC_PORTABLE)
#define KVC_AVX512 1
#include <immintrin.h>
#else
#define KVC_AVX512 0
#endif
#if KVC_AVX512 && defined(__AVX512VNNI__)
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

#if KVC_AVX512
typedef __m512 vf;
typedef __m512i vi;
inline vf set(float x) { return _mm512_set1_ps(x); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline vi load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline float sum(vf a) { return _mm512_reduce_add_ps(a); }
inline float peak(vf a) { return _mm512_reduce_max_ps(a); }
inline void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
template <int N> inline vi shift(vi a) { return N ? _mm512_srli_epi32(a, N) : a; }
inline vf lookup(vf table, vi index) { return _mm512_permutexvar_ps(index, table); }
inline vf number(vi a) { return _mm512_cvtepi32_ps(a); }
inline vi mask(vi a, int m) { return _mm512_and_si512(a, _mm512_set1_epi32(m)); }
inline vi shift_left(vi a, int n) { return _mm512_slli_epi32(a, n); }
inline vi add(vi a, int n) { return _mm512_add_epi32(a, _mm512_set1_epi32(n)); }
inline vi either(vi a, vi b) { return _mm512_or_si512(a, b); }
inline vf bits(vi a) { return _mm512_castsi512_ps(a); }
inline vi as_int(vf a) { return _mm512_castps_si512(a); }
inline vi sum_of(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vf below(vf a, vf limit, vf yes, vf no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, limit, _CMP_LT_OQ), no, yes);
}
inline vf nearest(vf a) { return _mm512_roundscale_ps(a, 0); }
inline vf times_power(vf a, vf n) { return _mm512_scalef_ps(a, n); }
inline vf load(const half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline vf load(const bf16* p) {
    return bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline vf load(const exponent* p) {
    return bits(shift_left(add(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)), 127), 23));
}
// out[i] = sum of the lanes of a[i]
inline vf sums(const vf* a) {
    vf b[16], c[16];
    for (int i = 0; i < 8; i++) {
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]),
                             _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    }
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
        c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; i++) {
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88),
                         _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
}
#if KVC_INTEGER
// a += low 16 bits of each lane's product + high 16 bits' product
inline vi dot(vi a, vi x, vi y) { return _mm512_dpwssd_epi32(a, x, y); }
inline vi zero() { return _mm512_setzero_si512(); }
inline vi set_int(int32_t x) { return _mm512_set1_epi32(x); }
// Field SHIFT of both 16-bit halves of every lane
template <int SHIFT, int BITS> inline vi field(vi word) {
    vi x = SHIFT ? _mm512_srli_epi16(word, SHIFT) : word;
    return SHIFT + BITS == 16 ? x : _mm512_and_si512(x, _mm512_set1_epi16((1 << BITS) - 1));
}
// 32 numbers as 16-bit integers in units of 1 / inverse; of every 4 neighbours lane 2i holds
// (first, third), lane 2i + 1 (second, fourth): as the codes of a quad come out of its bytes.
inline vi quads(vf a, vf b, vf inverse) {
    vi x = _mm512_packs_epi32(_mm512_cvtps_epi32(a * inverse), _mm512_cvtps_epi32(b * inverse));
    const vi order = _mm512_set_epi16(31, 29, 30, 28, 23, 21, 22, 20, 15, 13, 14, 12, 7, 5, 6, 4,
                                      27, 25, 26, 24, 19, 17, 18, 16, 11, 9, 10, 8, 3, 1, 2, 0);
    return _mm512_permutexvar_epi16(order, x);
}
inline void store(int32_t* p, vi a) { _mm512_storeu_si512(p, a); }
#endif
inline vf magnitude(vf a) { return _mm512_abs_ps(a); }
#else
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
inline vf set(float x) { return vf{} + x; }
inline vf load(const float* p) { vf a; std::memcpy(&a, p, 64); return a; }
inline vi load_bytes(const uint8_t* p) { vi a; std::memcpy(&a, p, 64); return a; }
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline float sum(vf a) { float s = 0; for (int i = 0; i < 16; i++) s += a[i]; return s; }
inline float peak(vf a) { float s = a[0]; for (int i = 1; i < 16; i++) s = s < a[i] ? a[i] : s; return s; }
inline void store(float* p, vf a) { std::memcpy(p, &a, 64); }
template <int N> inline vi shift(vi a) {
    typedef uint32_t vu __attribute__((vector_size(64)));
    return (vi)((vu)a >> N);
}
inline vf number(vi a) { return __builtin_convertvector(a, vf); }
inline vi mask(vi a, int m) { return a & m; }
inline vf lookup(vf table, vi index) {
    vf out;
    for (int i = 0; i < 16; i++) out[i] = table[index[i] & 15];
    return out;
}
inline vi shift_left(vi a, int n) { return a << n; }
inline vi add(vi a, int n) { return a + n; }
inline vi either(vi a, vi b) { return a | b; }
inline vf bits(vi a) { return (vf)a; }
inline vi as_int(vf a) { return (vi)a; }
inline vi sum_of(vi a, vi b) { return a + b; }
inline vf below(vf a, vf limit, vf yes, vf no) { return a < limit ? yes : no; }
inline vf nearest(vf a) { vf out; for (int i = 0; i < 16; i++) out[i] = std::nearbyintf(a[i]); return out; }
inline vf times_power(vf a, vf n) {
    vi e = __builtin_convertvector(n, vi) + 127;
    return a * bits((e > 0 ? e : vi{}) << 23);
}
inline float one(half x) {
    uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    float magnitude = rest < 0x400u ? (float)rest * as_float(0x33800000u)
                                    : as_float((rest << 13) + 0x38000000u);
    return as_float(as_bits(magnitude) | sign);
}
inline vf load(const half* p) { vf a; for (int i = 0; i < 16; i++) a[i] = one(p[i]); return a; }
inline vf load(const bf16* p) {
    vi a;
    for (int i = 0; i < 16; i++) a[i] = (int32_t)((uint32_t)p[i].bits << 16);
    return bits(a);
}
inline vf load(const exponent* p) {
    vi a;
    for (int i = 0; i < 16; i++) a[i] = (p[i].bits + 127) << 23;
    return bits(a);
}
inline vf sums(const vf* a) { vf out; for (int i = 0; i < 16; i++) out[i] = sum(a[i]); return out; }
inline vf magnitude(vf a) { return a < 0 ? -a : a; }
#endif

// 16 vectors turned: lane i of x[j] <-> lane j of x[i].
inline void transpose(vf* x) {
#if KVC_AVX512
    __m512 a[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
            x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            a[i + j] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0x88);
            a[i + j + 4] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        x[j] = _mm512_shuffle_f32x4(a[j], a[j + 8], 0x88);
        x[j + 8] = _mm512_shuffle_f32x4(a[j], a[j + 8], 0xdd);
    }
#else
    float a[16][16];
    for (int i = 0; i < 16; i++) store(a[i], x[i]);
    for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) x[i][j] = a[j][i];
#endif
}

inline float largest_of(const float* x, int n) {  // n a multiple of 16
    vf most = set(0.0f);
    for (int i = 0; i < n; i += 16) most = max(most, magnitude(load(x + i)));
    return peak(most);
}

// 2^x for x <= 0, at least 2^-126. The polynomials are least-squares fits at Chebyshev nodes:
// relative error 8e-8, or 3e-6 where `ROUGH`.
template <bool ROUGH> inline vf exp2(vf x) {
    x = max(x, set(-126.0f));
    vf n = nearest(x), f = x - n, p;
    if constexpr (ROUGH) {
        p = fma(set(9.56051021e-3f), f, set(5.59170392e-2f));
        p = fma(p, f, set(0.240249811f));
        p = fma(p, f, set(0.693121968f));
        p = fma(p, f, set(0.999999191f));
    } else {
        p = fma(set(1.32669704e-3f), f, set(9.67545975e-3f));
        p = fma(p, f, set(5.55074262e-2f));
        p = fma(p, f, set(0.240221218f));
        p = fma(p, f, set(0.693146949f));
        p = fma(p, f, set(1.00000007f));
    }
    return times_power(p, n);
}

// 2^x as above, relative error 8e-5 where `ROUGH`: for weights that become bf16.
template <bool ROUGH> inline vf weight(vf x) {
    if constexpr (!ROUGH) return exp2<false>(x);
    x = max(x, set(-126.0f));
    const vf whole = set(12582912.0f);  // 1.5 * 2^23: adding it rounds, and leaves n in the low bits
    vf n = x + whole, f = x - (n - whole);
    vf p = fma(set(5.50886765e-2f), f, set(0.242604047f));
    p = fma(p, f, set(0.693276167f));
    p = fma(p, f, set(0.999928951f));
    return bits(sum_of(as_int(p), shift_left(as_int(n), 23)));
}

inline float read(const float* p) { return *p; }
inline float read(const exponent* p) { return as_float((uint32_t)(p->bits + 127) << 23); }
inline float read(const bf16* p) { return as_float((uint32_t)p->bits << 16); }
inline void write(float* p, float x) { *p = x; }
inline void write(bf16* p, float x) {
    uint32_t bits = as_bits(x);
    p->bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#if defined(__FLT16_MAX__)
inline float read(const half* p) { _Float16 x; std::memcpy(&x, p, 2); return (float)x; }
inline void write(half* p, float x) { _Float16 y = (_Float16)x; std::memcpy(p, &y, 2); }
#else
inline float read(const half* p) {
    uint32_t sign = (p->bits & 0x8000u) << 16, rest = p->bits & 0x7fffu;
    float magnitude = rest < 0x400u ? (float)rest * as_float(0x33800000u)
                                    : as_float((rest << 13) + 0x38000000u);
    return as_float(as_bits(magnitude) | sign);
}
inline void write(half* p, float x) {
    uint32_t sign = (as_bits(x) >> 16) & 0x8000u, rest = as_bits(x) & 0x7fffffffu;
    if (rest > 0x7f800000u) { p->bits = 0x7e00; return; }
    if (rest >= 0x477ff000u) { p->bits = sign | 0x7c00; return; }
    if (rest < 0x38800000u) { p->bits = sign | (uint16_t)std::nearbyintf(as_float(rest) * 16777216.0f); return; }
    p->bits = sign | (uint16_t)((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13);
}
#endif

}  // namespace kvc
