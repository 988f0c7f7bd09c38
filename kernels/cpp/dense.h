// Readers of pages of plain numbers [128 tokens, N, D]: of one of N layers, the first unless the
// plane's pointer is moved.
namespace kvc {

template <int D, int N, class T> inline void dense_rows(const T* data, int first, int last, float (*out)[D]) {
    for (int t = first * 16; t < last * 16; t++)
        for (int d = 0; d < D; d += 16) store(out[t] + d, load(data + t * (N * D) + d));
}

template <int D, class T, int N = 1> struct DenseK {
    static constexpr int planes = 1;
    const T* data;
    long next = 0;  // bytes
    DenseK(const void* const* plane, long page) : data((const T*)plane[0] + page * (PAGE * N * D)) {}
    void ahead(long pages) { next = pages * (PAGE * N * D) * (long)sizeof(T); }

    template <int R, bool> void logits(const float* const* q, const float*, int first, int last, float (*out)[PAGE]) const {
        for (int group = first; group < last; group++) {
            vf part[R][16];
            for (int t = 0; t < 16; t++) {
                const T* k = data + (group * 16 + t) * (N * D);
                vf acc[R];
                for (int r = 0; r < R; r++) acc[r] = set(0.0f);
                for (int d = 0; d < D; d += 16) {
                    fetch(k + d, next);
                    vf x = load(k + d);
                    for (int r = 0; r < R; r++) acc[r] = fma(load(q[r] + d), x, acc[r]);
                }
                for (int r = 0; r < R; r++) part[r][t] = acc[r];
            }
            for (int r = 0; r < R; r++) store(out[r] + group * 16, sums(part[r]));
        }
    }

    void rows(int first, int last, float (*out)[D]) const { dense_rows<D, N>(data, first, last, out); }
};

template <int D, class T, int N = 1> struct DenseV {
    static constexpr int planes = 1;
    const T* data;
    long next = 0;  // bytes
    DenseV(const void* const* plane, long page) : data((const T*)plane[0] + page * (PAGE * N * D)) {}
    void ahead(long pages) { next = pages * (PAGE * N * D) * (long)sizeof(T); }

    template <int R, int M> void part(const float (*p)[PAGE], const float* share, int first, int last, int from, float (*o)[D]) const {
        vf acc[M][R];
        for (int i = 0; i < M; i++) for (int r = 0; r < R; r++) acc[i][r] = set(0.0f);
        for (int t = first; t < last; t++) {
            const T* v = data + t * (N * D) + from;
            for (int i = 0; i < M; i++) {
                fetch(v + i * 16, next);
                vf x = load(v + i * 16);
                for (int r = 0; r < R; r++) acc[i][r] = fma(set(p[r][t]), x, acc[i][r]);
            }
        }
        for (int i = 0; i < M; i++) for (int r = 0; r < R; r++) {
            float* to = o[r] + from + i * 16;
            store(to, fma(acc[i][r], set(share[r]), load(to)));
        }
    }

    template <int R, bool> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[D]) const {
        constexpr int abreast = KVC_AVX512 ? (R <= 4 ? 4 : 2) : 1;
        int from = 0;
        for (; from + abreast * 16 <= D; from += abreast * 16) part<R, abreast>(p, share, first * 16, last * 16, from, o);
        for (; from < D; from += 16) part<R, 1>(p, share, first * 16, last * 16, from, o);
    }

    void rows(int first, int last, float (*out)[D]) const { dense_rows<D, N>(data, first, last, out); }
};

}  // namespace kvc
