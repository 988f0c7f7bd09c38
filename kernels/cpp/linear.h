// Linears of one row: each weight is read once, where it lies, and sums are fp32.
namespace kvc {

// Operands of products summed in fp32; bf16 pairs where the machine multiplies those itself.
template <class T> struct Lanes {
    static constexpr long width = 16;
    static vf some(const T* p) { return load(p); }
    static vf dot(vf sum, vf a, vf b) { return fma(a, b, sum); }
};
#if KVC_PAIRS
template <> struct Lanes<bf16> {
    static constexpr long width = 32;
    static __m512i some(const bf16* p) { return _mm512_loadu_si512(p); }
    static vf dot(vf sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

// The first n < width elements and zeros after them.
template <class T> inline auto part(const T* p, long n) {
    alignas(64) T x[Lanes<T>::width] = {};
    std::memcpy(x, p, n * sizeof(T));
    return Lanes<T>::some(x);
}

// out[r] = w[r] . x for R rows of w; what comes 16 KiB later is fetched meanwhile.
template <int R, class T> inline void rows(const T* w, long stride, const T* x, long K, float* out) {
    using L = Lanes<T>;
    constexpr long width = L::width, line = 64 / sizeof(T), ahead = 16384;
    constexpr long block = width > line ? width : line;
    vf sums[R];
    for (int r = 0; r < R; r++) sums[r] = set(0.0f);
    long k = 0;
    for (; k + block <= K; k += block) {
        for (int r = 0; r < R; r++)
            for (long i = 0; i < block; i += line) fetch(w + r * stride + k + i, ahead);
        for (long i = 0; i < block; i += width) {
            auto a = L::some(x + k + i);
            for (int r = 0; r < R; r++) sums[r] = L::dot(sums[r], a, L::some(w + r * stride + k + i));
        }
    }
    for (; k + width <= K; k += width) {
        auto a = L::some(x + k);
        for (int r = 0; r < R; r++) sums[r] = L::dot(sums[r], a, L::some(w + r * stride + k));
    }
    if (k < K) {
        auto a = part(x + k, K - k);
        for (int r = 0; r < R; r++) sums[r] = L::dot(sums[r], a, part(w + r * stride + k, K - k));
    }
    for (int r = 0; r < R; r++) out[r] = sum(sums[r]);
}

// out[r] = w[r] . x + bias[r] for n rows; bias may be null.
template <class T> inline void linear(const T* w, long stride, const T* bias, const T* x, long n, long K, float* out) {
    long r = 0;
    for (; r + 4 <= n; r += 4) rows<4>(w + r * stride, stride, x, K, out + r);
    for (; r < n; r++) rows<1>(w + r * stride, stride, x, K, out + r);
    if (bias)
        for (r = 0; r < n; r++) out[r] += read(bias + r);
}

}  // namespace kvc
