// Numbers of every type as fp32 and back, and powers of two.
namespace kvc {

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
inline float read(const half* p) { return one(*p); }
#ifdef KVC_HALF
inline void write(half* p, float x) { KVC_HALF y = (KVC_HALF)x; std::memcpy(p, &y, 2); }
#else
inline void write(half* p, float x) {
    uint32_t sign = (as_bits(x) >> 16) & 0x8000u, rest = as_bits(x) & 0x7fffffffu;
    if (rest > 0x7f800000u) { p->bits = 0x7e00; return; }
    if (rest >= 0x477ff000u) { p->bits = sign | 0x7c00; return; }
    if (rest < 0x38800000u) { p->bits = sign | (uint16_t)std::nearbyintf(as_float(rest) * 16777216.0f); return; }
    p->bits = sign | (uint16_t)((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13);
}
#endif

}  // namespace kvc
