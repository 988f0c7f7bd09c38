// The reader of 128 tokens that are mixtures of a few vectors (kernels/subspace.py).
namespace kvc {

// x = u b: u [128, RANK] in the format inside, b [RANK, STRIDE], of which D columns are read: one
// layer's; the pointer to b is that layer's. With int8_t b has a scale a row.
template <class Inner, int D, int RANK, int STRIDE, class B> struct Subspace {
    static constexpr bool whole = std::is_same_v<B, int8_t>;
    static constexpr int planes = Inner::planes + (whole ? 3 : 2);
    Inner inner;
    const B* basis;
    const float* unit = nullptr;
    Subspace(const void* const* plane, long page)
        : inner(plane, page), basis((const B*)plane[Inner::planes] + page * (RANK * STRIDE)) {
        if constexpr (whole) unit = (const float*)plane[Inner::planes + 1] + page * RANK;
    }

    static vf some(const B* p) {
        if constexpr (whole) {
            alignas(64) float x[16];
            for (int i = 0; i < 16; i++) x[i] = p[i];
            return load(x);
        } else {
            return load(p);
        }
    }
    float size(int k) const { return whole ? unit[k] : 1.0f; }

    // o[d] += sum over k of u[k] b[k][d]
    void mix(const float* u, float* o) const {
        for (int d = 0; d < D; d += 16) {
            vf s = load(o + d);
            for (int k = 0; k < RANK; k++) s = fma(set(u[k] * size(k)), some(basis + (long)k * STRIDE + d), s);
            store(o + d, s);
        }
    }

    // u has not the size of x, so that nothing is rounded to integers of the largest
    template <int R, bool> void logits(const float* const* q, const float*, int first, int last, float (*out)[PAGE]) const {
        alignas(64) float turned[R][RANK];
        const float* x[R];
        float most[R];
        for (int r = 0; r < R; r++) {
            for (int k = 0; k < RANK; k++) {
                vf s = set(0.0f);
                for (int d = 0; d < D; d += 16) s = fma(load(q[r] + d), some(basis + (long)k * STRIDE + d), s);
                turned[r][k] = sum(s) * size(k);
            }
            x[r] = turned[r];
            most[r] = largest_of(turned[r], RANK);
        }
        inner.template logits<R, false>(x, most, first, last, out);
    }

    template <int R, bool> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[D]) const {
        alignas(64) float part[R][RANK] = {};
        inner.template add<R, false>(p, share, first, last, part);
        for (int r = 0; r < R; r++) mix(part[r], o[r]);
    }

    void rows(int first, int last, float (*out)[D]) const {
        alignas(64) float part[PAGE][RANK];
        inner.rows(first, last, part);
        for (int t = first * 16; t < last * 16; t++) {
            std::memset(out[t], 0, sizeof(out[t]));
            mix(part[t], out[t]);
        }
    }
};

}  // namespace kvc
