// The reader of one of two layers whose directions are one (kernels/direction.py).
namespace kvc {

// x = length * e but for the N tokens at `place`, which lie in `exact`. The planes' pointers are
// those of one layer; lengths and exact tokens of the other lie between its pages.
template <class Inner, int D, int N, class T> struct Direction {
    static constexpr int planes = Inner::planes + (N ? 3 : 1);
    Inner inner;
    const half* length;
    const uint8_t* place = nullptr;
    const T* exact = nullptr;
    Direction(const void* const* plane, long page)
        : inner(plane, page), length((const half*)plane[Inner::planes] + page * 2 * PAGE) {
        if constexpr (N > 0) {
            place = (const uint8_t*)plane[Inner::planes + 1] + page * N;
            exact = (const T*)plane[Inner::planes + 2] + page * 2 * N * D;
        }
    }
    void ahead(long pages) { look_ahead(inner, pages); }

    template <int R, bool ROUGH> void logits(const float* const* q, const float* peaks, int first, int last, float (*out)[PAGE]) const {
        inner.template logits<R, ROUGH>(q, peaks, first, last, out);
        for (int t = first * 16; t < last * 16; t += 16) {
            vf x = load(length + t);
            for (int r = 0; r < R; r++) store(out[r] + t, load(out[r] + t) * x);
        }
        for (int i = 0; i < N; i++)
            if (place[i] >= first * 16 && place[i] < last * 16)
                for (int r = 0; r < R; r++) out[r][place[i]] = dot_of<D>(q[r], exact + i * D);
    }

    // the format inside is given weights of at most 1
    template <int R, bool ROUGH> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[D]) const {
        alignas(64) float x[R][PAGE];
        float raised[R];
        vf most = set(0.0f);
        for (int t = first * 16; t < last * 16; t += 16) most = max(most, load(length + t));
        float top = peak(most);
        vf unit = set(top > 0.0f ? 1.0f / top : 0.0f);
        for (int t = first * 16; t < last * 16; t += 16) {
            vf scale = load(length + t) * unit;
            for (int r = 0; r < R; r++) store(x[r] + t, load(p[r] + t) * scale);
        }
        for (int i = 0; i < N; i++)
            if (place[i] >= first * 16 && place[i] < last * 16)
                for (int r = 0; r < R; r++) {
                    x[r][place[i]] = 0.0f;
                    vf weight = set(share[r] * p[r][place[i]]);
                    for (int d = 0; d < D; d += 16)
                        store(o[r] + d, fma(weight, load(exact + i * D + d), load(o[r] + d)));
                }
        for (int r = 0; r < R; r++) raised[r] = share[r] * top;
        inner.template add<R, ROUGH>(x, raised, first, last, o);
    }

    void rows(int first, int last, float (*out)[D]) const {
        inner.rows(first, last, out);
        for (int t = first * 16; t < last * 16; t++)
            for (int d = 0; d < D; d += 16) store(out[t] + d, load(out[t] + d) * set(read(length + t)));
        for (int i = 0; i < N; i++)
            if (place[i] >= first * 16 && place[i] < last * 16)
                for (int d = 0; d < D; d += 16) store(out[place[i]] + d, load(exact + i * D + d));
    }
};

}  // namespace kvc
