// 16 lanes in a register of AVX-512.
#if KVC_AVX512
namespace kvc {

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
// a += low 16 bits of each lane's product + high 16 bits' product
inline vi dot(vi a, vi x, vi y) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(a, x, y);
#else
    return _mm512_add_epi32(a, _mm512_madd_epi16(x, y));
#endif
}
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
inline vf magnitude(vf a) { return _mm512_abs_ps(a); }

// 16 vectors turned: lane i of x[j] <-> lane j of x[i].
inline void transpose(vf* x) {
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
}

}  // namespace kvc
#endif
