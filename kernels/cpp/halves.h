// 16 lanes in several registers: two of AVX2, or four as wide as most CPUs have, of which the
// compiler makes what there is (SSE, NEON, plain numbers). Halves are named, not numbered, so that
// they become registers.
#if !KVC_AVX512
namespace kvc {

template <class T> struct Two { T a, b; };

#if KVC_AVX2
constexpr int LANES = 8;  // of a register
#else
constexpr int LANES = 4;
#endif
typedef float nf __attribute__((vector_size(4 * LANES)));
typedef int32_t ni __attribute__((vector_size(4 * LANES)));
typedef uint32_t nu __attribute__((vector_size(4 * LANES)));
#if KVC_AVX2
typedef Two<nf> vf;
typedef Two<ni> vi;
#else
typedef Two<Two<nf>> vf;
typedef Two<Two<ni>> vi;
#endif

// What a register does by itself.
template <class T> inline T loaded(const void* p) { T x; std::memcpy(&x, p, sizeof(T)); return x; }
inline void put(void* p, nf x) { std::memcpy(p, &x, sizeof(x)); }
inline void put(void* p, ni x) { std::memcpy(p, &x, sizeof(x)); }
inline nf max(nf a, nf b) { return a > b ? a : b; }
inline ni sum_of(ni a, ni b) { return a + b; }
inline ni either(ni a, ni b) { return a | b; }
inline ni mask(ni a, int m) { return a & m; }
inline ni add(ni a, int n) { return a + n; }
inline ni shift_left(ni a, int n) { return a << n; }
template <int N> inline ni shift(ni a) { return (ni)((nu)a >> N); }
inline nf bits(ni a) { return (nf)a; }
inline ni as_int(nf a) { return (ni)a; }
inline nf number(ni a) { return __builtin_convertvector(a, nf); }
inline nf magnitude(nf a) { return (nf)((ni)a & 0x7fffffff); }
inline nf below(nf a, nf limit, nf yes, nf no) { return a < limit ? yes : no; }
inline nf nearest(nf a) {  // |a| < 2^22
    const nf whole = nf{} + 12582912.0f;
    return (a + whole) - whole;
}
inline nf times_power(nf a, nf n) {
    ni e = __builtin_convertvector(n, ni) + 127;
    return a * (nf)((e > 0 ? e : ni{}) << 23);
}
#if KVC_AVX2
inline nf fma(nf a, nf b, nf c) { return _mm256_fmadd_ps(a, b, c); }
inline nf lookup(nf low, nf high, ni index) {  // a table of 16
    nf a = _mm256_permutevar8x32_ps(low, (__m256i)index), b = _mm256_permutevar8x32_ps(high, (__m256i)index);
    return _mm256_blendv_ps(a, b, (nf)(index << 28));
}
inline void widen(const half* p, nf& x) { x = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void widen(const bf16* p, nf& x) {
    x = (nf)(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)));
    x = (nf)((ni)x << 16);
}
inline void widen(const exponent* p, nf& x) {
    x = (nf)(((ni)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)) + 127) << 23);
}
inline float sum(nf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float peak(nf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
#else
inline nf fma(nf a, nf b, nf c) { return a * b + c; }
#if defined(__aarch64__)
inline void widen(const half* p, nf& x) {
    typedef __fp16 four __attribute__((vector_size(8)));
    x = __builtin_convertvector(loaded<four>(p), nf);
}
#else
inline void widen(const half* p, nf& x) { for (int i = 0; i < LANES; i++) x[i] = one(p[i]); }
#endif
inline void widen(const bf16* p, nf& x) {
    ni a;
    for (int i = 0; i < LANES; i++) a[i] = (int32_t)((uint32_t)p[i].bits << 16);
    x = (nf)a;
}
inline void widen(const exponent* p, nf& x) {
    ni a;
    for (int i = 0; i < LANES; i++) a[i] = (p[i].bits + 127) << 23;
    x = (nf)a;
}
inline float sum(nf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float peak(nf a) { return std::max(std::max(a[0], a[2]), std::max(a[1], a[3])); }
#endif

// And what several do.
template <class T> struct Load { static T at(const void* p) { return loaded<T>(p); } };
template <class T> struct Load<Two<T>> {
    static Two<T> at(const void* p) { return {Load<T>::at(p), Load<T>::at((const char*)p + sizeof(T))}; }
};
template <class T> inline void put(void* p, const Two<T>& x) { put(p, x.a), put((char*)p + sizeof(T), x.b); }
template <class S, class T> inline void widen(const S* p, Two<T>& x) { widen(p, x.a), widen(p + sizeof(T) / 4, x.b); }
inline void fill(nf& x, float value) { x = nf{} + value; }
inline void fill(ni& x, int32_t value) { x = ni{} + value; }
template <class T, class V> inline void fill(Two<T>& x, V value) { fill(x.a, value), fill(x.b, value); }

template <class T> inline Two<T> operator+(Two<T> x, Two<T> y) { return {x.a + y.a, x.b + y.b}; }
template <class T> inline Two<T> operator-(Two<T> x, Two<T> y) { return {x.a - y.a, x.b - y.b}; }
template <class T> inline Two<T> operator*(Two<T> x, Two<T> y) { return {x.a * y.a, x.b * y.b}; }
template <class T> inline Two<T> operator/(Two<T> x, Two<T> y) { return {x.a / y.a, x.b / y.b}; }
template <class T> inline Two<T> fma(Two<T> x, Two<T> y, Two<T> z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
template <class T> inline Two<T> max(Two<T> x, Two<T> y) { return {max(x.a, y.a), max(x.b, y.b)}; }
template <class T> inline Two<T> sum_of(Two<T> x, Two<T> y) { return {sum_of(x.a, y.a), sum_of(x.b, y.b)}; }
template <class T> inline Two<T> either(Two<T> x, Two<T> y) { return {either(x.a, y.a), either(x.b, y.b)}; }
template <class T> inline Two<T> times_power(Two<T> x, Two<T> n) { return {times_power(x.a, n.a), times_power(x.b, n.b)}; }
template <class T> inline Two<T> below(Two<T> x, Two<T> limit, Two<T> yes, Two<T> no) {
    return {below(x.a, limit.a, yes.a, no.a), below(x.b, limit.b, yes.b, no.b)};
}
template <class T> inline Two<T> mask(Two<T> x, int m) { return {mask(x.a, m), mask(x.b, m)}; }
template <class T> inline Two<T> add(Two<T> x, int n) { return {add(x.a, n), add(x.b, n)}; }
template <class T> inline Two<T> shift_left(Two<T> x, int n) { return {shift_left(x.a, n), shift_left(x.b, n)}; }
template <int N, class T> inline Two<T> shift(Two<T> x) { return {shift<N>(x.a), shift<N>(x.b)}; }
template <class T> inline Two<T> magnitude(Two<T> x) { return {magnitude(x.a), magnitude(x.b)}; }
template <class T> inline Two<T> nearest(Two<T> x) { return {nearest(x.a), nearest(x.b)}; }
template <class T> inline auto number(Two<T> x) -> Two<decltype(number(x.a))> { return {number(x.a), number(x.b)}; }
template <class T> inline auto bits(Two<T> x) -> Two<decltype(bits(x.a))> { return {bits(x.a), bits(x.b)}; }
template <class T> inline auto as_int(Two<T> x) -> Two<decltype(as_int(x.a))> { return {as_int(x.a), as_int(x.b)}; }
template <class T> inline float sum(Two<T> x) { return sum(x.a + x.b); }
template <class T> inline float peak(Two<T> x) { return peak(max(x.a, x.b)); }

inline vf set(float x) { vf v; fill(v, x); return v; }
inline vf load(const float* p) { return Load<vf>::at(p); }
inline vi load_bytes(const uint8_t* p) { return Load<vi>::at(p); }
inline void store(float* p, vf x) { put(p, x); }
inline vf load(const half* p) { vf x; widen(p, x); return x; }
inline vf load(const bf16* p) { vf x; widen(p, x); return x; }
inline vf load(const exponent* p) { vf x; widen(p, x); return x; }

#if KVC_AVX2
inline vf lookup(vf table, vi index) { return {lookup(table.a, table.b, index.a), lookup(table.a, table.b, index.b)}; }

// a += low 16 bits of each lane's product + high 16 bits' product
inline vi dot(vi a, vi x, vi y) {
    return {a.a + (ni)_mm256_madd_epi16((__m256i)x.a, (__m256i)y.a), a.b + (ni)_mm256_madd_epi16((__m256i)x.b, (__m256i)y.b)};
}
inline vi zero() { return {ni{}, ni{}}; }
inline vi set_int(int32_t x) { vi v; fill(v, x); return v; }
inline void store(int32_t* p, vi x) { put(p, x); }
template <int SHIFT, int BITS> inline ni field(ni word) {
    __m256i x = SHIFT ? _mm256_srli_epi16((__m256i)word, SHIFT) : (__m256i)word;
    return (ni)(SHIFT + BITS == 16 ? x : _mm256_and_si256(x, _mm256_set1_epi16((1 << BITS) - 1)));
}
// Field SHIFT of both 16-bit halves of every lane
template <int SHIFT, int BITS> inline vi field(vi word) { return {field<SHIFT, BITS>(word.a), field<SHIFT, BITS>(word.b)}; }
// 32 numbers as 16-bit integers in units of 1 / inverse, as in avx512.h
inline vi quads(vf a, vf b, vf inverse) {
    auto some = [](vf x) {
        __m256i y = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
        y = _mm256_permute4x64_epi64(y, 0xd8);
        return (ni)_mm256_shufflehi_epi16(_mm256_shufflelo_epi16(y, 0xd8), 0xd8);
    };
    return {some(a * inverse), some(b * inverse)};
}

// 8 vectors of 8 turned
inline void transpose8(nf* x) {
    nf a[8], b[8];
    for (int i = 0; i < 8; i += 2) a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
// 16 vectors turned: lane i of x[j] <-> lane j of x[i].
inline void transpose(vf* x) {
    nf part[2][2][8];
    for (int i = 0; i < 16; i++) part[i / 8][0][i % 8] = x[i].a, part[i / 8][1][i % 8] = x[i].b;
    for (int i = 0; i < 4; i++) transpose8(part[i / 2][i % 2]);
    for (int i = 0; i < 16; i++) x[i] = {part[0][i / 8][i % 8], part[1][i / 8][i % 8]};
}
// out[i] = sum of the lanes of a[i]
inline vf sums(const vf* a) {
    auto half_of = [](const vf* a) {
        nf b[4];
        for (int i = 0; i < 4; i++) b[i] = _mm256_hadd_ps(a[2 * i].a + a[2 * i].b, a[2 * i + 1].a + a[2 * i + 1].b);
        nf low = _mm256_hadd_ps(b[0], b[1]), high = _mm256_hadd_ps(b[2], b[3]);
        return (nf)_mm256_permute2f128_ps(low, high, 0x20) + (nf)_mm256_permute2f128_ps(low, high, 0x31);
    };
    return {half_of(a), half_of(a + 8)};
}
#else
inline vf lookup(vf table, vi index) {
    float of[16], out[16];
    int32_t at[16];
    put(of, table), put(at, index);
    for (int i = 0; i < 16; i++) out[i] = of[at[i] & 15];
    return load(out);
}
inline void transpose(vf* x) {
    float a[16][16], b[16][16];
    for (int i = 0; i < 16; i++) store(a[i], x[i]);
    for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) b[i][j] = a[j][i];
    for (int i = 0; i < 16; i++) x[i] = load(b[i]);
}
inline vf sums(const vf* a) {
    float out[16];
    for (int i = 0; i < 16; i++) out[i] = sum(a[i]);
    return load(out);
}
#endif

}  // namespace kvc
#endif
