// Readers of formats around a format (kernels/wrapper.py).
namespace kvc {

// The format inside holds H x: queries are turned once, outputs turned back once.
template <class Inner, int D, int SIZE> struct Hadamard : Inner {
    static constexpr bool turned = true;
    using Inner::Inner;

    static void turn(float* x) {
        const float root = std::sqrt((float)SIZE);  // divided by, as the plain body does
        float a[SIZE], b[SIZE];
        for (int block = 0; block < D; block += SIZE) {
            std::memcpy(a, x + block, sizeof(a));
            for (int n = 1; n < SIZE; n *= 2) {  // (a, b) of each pair of neighbours -> halves
                for (int i = 0; i < SIZE / 2; i++) {
                    b[i] = a[2 * i] + a[2 * i + 1];
                    b[i + SIZE / 2] = a[2 * i] - a[2 * i + 1];
                }
                std::memcpy(a, b, sizeof(a));
            }
            for (int i = 0; i < SIZE; i++) x[block + i] = a[i] / root;
        }
    }

    void rows(int first, int last, float (*out)[D]) const {
        Inner::rows(first, last, out);
        for (int t = first * 16; t < last * 16; t++) turn(out[t]);
    }
};

// Calls f(step, from, to) for the parts of token groups [first, last) that lie in one step.
template <int STEP, class F> inline void each_step(int first, int last, F&& f) {
    constexpr int per = STEP / 16;
    for (int step = first / per; step * per < last; step++)
        f(step, std::max(step * per, first), std::min((step + 1) * per, last));
}

template <int D, class T> inline float dot_of(const float* x, const T* y) {
    vf s = set(0.0f);
    for (int d = 0; d < D; d += 16) s = fma(load(x + d), load(y + d), s);
    return sum(s);
}

inline float total(const float* p, int first, int last) {
    vf s = set(0.0f);
    for (int t = first * 16; t < last * 16; t += 16) s = s + load(p + t);
    return sum(s);
}

// A mean per channel of a step.
template <class Inner, int D, int STEP> struct Centered {
    static constexpr int planes = Inner::planes + 1;
    Inner inner;
    const half* mean;
    Centered(const void* const* plane, long page)
        : inner(plane, page), mean((const half*)plane[Inner::planes] + page * (PAGE / STEP * D)) {}
    void ahead(long pages) { look_ahead(inner, pages); }

    template <int R, bool ROUGH> void logits(const float* const* q, const float* peaks, int first, int last, float (*out)[PAGE]) const {
        inner.template logits<R, ROUGH>(q, peaks, first, last, out);
        each_step<STEP>(first, last, [&](int step, int from, int to) {
            for (int r = 0; r < R; r++) {
                vf bias = set(dot_of<D>(q[r], mean + step * D));
                for (int t = from * 16; t < to * 16; t += 16) store(out[r] + t, load(out[r] + t) + bias);
            }
        });
    }

    template <int R, bool ROUGH> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[D]) const {
        inner.template add<R, ROUGH>(p, share, first, last, o);
        each_step<STEP>(first, last, [&](int step, int from, int to) {
            for (int r = 0; r < R; r++) {
                vf mass = set(total(p[r], from, to) * share[r]);
                for (int d = 0; d < D; d += 16) store(o[r] + d, fma(mass, load(mean + step * D + d), load(o[r] + d)));
            }
        });
    }

    void rows(int first, int last, float (*out)[D]) const {
        inner.rows(first, last, out);
        for (int t = first * 16; t < last * 16; t++)
            for (int d = 0; d < D; d += 16) store(out[t] + d, load(out[t] + d) + load(mean + t / STEP * D + d));
    }
};

// A scale per channel of a step.
template <class Inner, int D, int STEP> struct Scaled {
    static constexpr int planes = Inner::planes + 1;
    Inner inner;
    const half* channel;
    Scaled(const void* const* plane, long page)
        : inner(plane, page), channel((const half*)plane[Inner::planes] + page * (PAGE / STEP * D)) {}
    void ahead(long pages) { look_ahead(inner, pages); }

    template <int R, bool ROUGH> void logits(const float* const* q, const float* peaks, int first, int last, float (*out)[PAGE]) const {
        each_step<STEP>(first, last, [&](int step, int from, int to) {
            alignas(64) float scaled[R][D];
            const float* x[R];
            float most[R];
            for (int r = 0; r < R; r++) {
                x[r] = scaled[r];
                for (int d = 0; d < D; d += 16) store(scaled[r] + d, load(q[r] + d) * load(channel + step * D + d));
                most[r] = largest_of(scaled[r], D);
            }
            inner.template logits<R, ROUGH>(x, most, from, to, out);
        });
    }

    template <int R, bool ROUGH> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[D]) const {
        each_step<STEP>(first, last, [&](int step, int from, int to) {
            alignas(64) float part[R][D] = {};
            inner.template add<R, ROUGH>(p, share, from, to, part);
            for (int r = 0; r < R; r++)
                for (int d = 0; d < D; d += 16)
                    store(o[r] + d, fma(load(part[r] + d), load(channel + step * D + d), load(o[r] + d)));
        });
    }

    void rows(int first, int last, float (*out)[D]) const {
        inner.rows(first, last, out);
        for (int t = first * 16; t < last * 16; t++)
            for (int d = 0; d < D; d += 16) store(out[t] + d, load(out[t] + d) * load(channel + t / STEP * D + d));
    }
};

// a [RANK, STEP] b [RANK, D] beside what the format inside holds.
template <class Inner, int D, int STEP, int RANK> struct Lowrank {
    static constexpr int planes = Inner::planes + 2;
    Inner inner;
    const half *a, *b;
    Lowrank(const void* const* plane, long page)
        : inner(plane, page), a((const half*)plane[Inner::planes] + page * (PAGE * RANK)),
          b((const half*)plane[Inner::planes + 1] + page * (PAGE / STEP * RANK * D)) {}
    void ahead(long pages) { look_ahead(inner, pages); }

    template <int R, bool ROUGH> void logits(const float* const* q, const float* peaks, int first, int last, float (*out)[PAGE]) const {
        inner.template logits<R, ROUGH>(q, peaks, first, last, out);
        each_step<STEP>(first, last, [&](int step, int from, int to) {
            for (int k = 0; k < RANK; k++) {
                const half* tokens = a + (step * RANK + k) * STEP - step * STEP;
                for (int r = 0; r < R; r++) {
                    vf w = set(dot_of<D>(q[r], b + (step * RANK + k) * D));
                    for (int t = from * 16; t < to * 16; t += 16)
                        store(out[r] + t, fma(w, load(tokens + t), load(out[r] + t)));
                }
            }
        });
    }

    template <int R, bool ROUGH> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[D]) const {
        inner.template add<R, ROUGH>(p, share, first, last, o);
        each_step<STEP>(first, last, [&](int step, int from, int to) {
            for (int k = 0; k < RANK; k++) {
                const half* tokens = a + (step * RANK + k) * STEP - step * STEP;
                for (int r = 0; r < R; r++) {
                    vf s = set(0.0f);
                    for (int t = from * 16; t < to * 16; t += 16) s = fma(load(p[r] + t), load(tokens + t), s);
                    vf w = set(sum(s) * share[r]);
                    for (int d = 0; d < D; d += 16)
                        store(o[r] + d, fma(w, load(b + (step * RANK + k) * D + d), load(o[r] + d)));
                }
            }
        });
    }

    void rows(int first, int last, float (*out)[D]) const {
        inner.rows(first, last, out);
        for (int t = first * 16; t < last * 16; t++)
            for (int k = 0; k < RANK; k++) {
                const int at = t / STEP * RANK + k;
                vf w = set(read(a + at * STEP + t % STEP));
                for (int d = 0; d < D; d += 16) store(out[t] + d, fma(w, load(b + at * D + d), load(out[t] + d)));
            }
    }
};

// N numbers of every group of GROUP, added where they belong.
template <class Inner, int D, Axis AXIS, int GROUP, int N> struct Sparse {
    static constexpr int planes = Inner::planes + 2;
    static constexpr int GROUPS = AXIS == channel_axis ? 1 : D / GROUP;
    static constexpr int SIZE = AXIS == channel_axis ? PAGE / GROUP * D * N : GROUPS * N * PAGE;
    Inner inner;
    const uint8_t* place;
    const half* rest;
    Sparse(const void* const* plane, long page)
        : inner(plane, page), place((const uint8_t*)plane[Inner::planes] + page * SIZE),
          rest((const half*)plane[Inner::planes + 1] + page * SIZE) {}
    void ahead(long pages) { look_ahead(inner, pages); }

    // f(token, channel, value) for the tokens of token groups [first, last)
    template <class F> void each(int first, int last, F&& f) const {
        if constexpr (AXIS == channel_axis) {
            each_step<GROUP>(first, last, [&](int step, int from, int to) {
                for (int i = 0; i < D * N; i++) {
                    int t = step * GROUP + place[step * D * N + i];
                    if (t >= from * 16 && t < to * 16) f(t, i / N, read(rest + step * D * N + i));
                }
            });
        } else {
            for (int i = 0; i < GROUPS * N; i++)
                for (int t = first * 16; t < last * 16; t++)
                    f(t, i / N * GROUP + place[i * PAGE + t], read(rest + i * PAGE + t));
        }
    }

    void rows(int first, int last, float (*out)[D]) const {
        inner.rows(first, last, out);
        each(first, last, [&](int t, int c, float x) { out[t][c] += x; });
    }
};

template <class Inner, int D, Axis AXIS, int GROUP, int N> struct OutliersK : Sparse<Inner, D, AXIS, GROUP, N> {
    using Sparse<Inner, D, AXIS, GROUP, N>::Sparse;
    template <int R, bool ROUGH> void logits(const float* const* q, const float* peaks, int first, int last, float (*out)[PAGE]) const {
        this->inner.template logits<R, ROUGH>(q, peaks, first, last, out);
        this->each(first, last, [&](int t, int c, float x) {
            for (int r = 0; r < R; r++) out[r][t] += q[r][c] * x;
        });
    }
};

template <class Inner, int D, Axis AXIS, int GROUP, int N> struct OutliersV : Sparse<Inner, D, AXIS, GROUP, N> {
    using Sparse<Inner, D, AXIS, GROUP, N>::Sparse;
    template <int R, bool ROUGH> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[D]) const {
        this->inner.template add<R, ROUGH>(p, share, first, last, o);
        this->each(first, last, [&](int t, int c, float x) {
            for (int r = 0; r < R; r++) o[r][c] += share[r] * p[r][t] * x;
        });
    }
};

// LEFT channels of every step of STEP tokens.
template <class Inner, int D, int LEFT, int STEP> struct Channels {
    static constexpr int planes = Inner::planes + 2;
    Inner inner;
    const int16_t* place;
    Channels(const void* const* plane, long page)
        : inner(plane, page), place((const int16_t*)plane[Inner::planes] + page * (PAGE / STEP * LEFT)) {}
    void ahead(long pages) { look_ahead(inner, pages); }

    template <int R, bool ROUGH> void logits(const float* const* q, const float* peaks, int first, int last, float (*out)[PAGE]) const {
        each_step<STEP>(first, last, [&](int step, int from, int to) {
            alignas(64) float taken[R][LEFT];
            const float* x[R];
            float most[R];
            for (int r = 0; r < R; r++) {
                x[r] = taken[r];
                for (int c = 0; c < LEFT; c++) taken[r][c] = q[r][place[step * LEFT + c]];
                most[r] = largest_of(taken[r], LEFT);
            }
            inner.template logits<R, ROUGH>(x, most, from, to, out);
        });
    }

    template <int R, bool ROUGH> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[D]) const {
        each_step<STEP>(first, last, [&](int step, int from, int to) {
            alignas(64) float part[R][LEFT] = {};
            inner.template add<R, ROUGH>(p, share, from, to, part);
            for (int r = 0; r < R; r++)
                for (int c = 0; c < LEFT; c++) o[r][place[step * LEFT + c]] += part[r][c];
        });
    }

    void rows(int first, int last, float (*out)[D]) const {
        alignas(64) float part[PAGE][LEFT];
        inner.rows(first, last, part);
        for (int t = first * 16; t < last * 16; t++) {
            std::memset(out[t], 0, sizeof(out[t]));
            for (int c = 0; c < LEFT; c++) out[t][place[t / STEP * LEFT + c]] = part[t][c];
        }
    }
};

// Of every page the first N tokens in one format, the others in another. A page of a part holds
// fewer tokens than its reader believes: APART is, for each plane, how many bytes fewer that are.
template <class High, class Low, int D, int N, long... APART> struct Mixed {
    static constexpr int planes = High::planes + Low::planes;
    struct Part {
        const void* plane[CONSTANTS + 1] = {};
        Part(const void* const* all, long page, int from, int many) {
            constexpr long apart[] = {APART...};
            for (int i = 0; i < many; i++) plane[i] = (const char*)all[from + i] - page * apart[from + i];
            plane[CONSTANTS] = all[CONSTANTS];
        }
    };
    static Part upper(const void* const* plane, long page) { return Part(plane, page, 0, High::planes); }
    static Part lower(const void* const* plane, long page) { return Part(plane, page, High::planes, Low::planes); }
    static constexpr int CUT = N / 16;
    High high;
    Low low;
    Mixed(const void* const* plane, long page) : high(upper(plane, page).plane, page), low(lower(plane, page).plane, page) {}

    template <int R, bool ROUGH> void logits(const float* const* q, const float* peaks, int first, int last, float (*out)[PAGE]) const {
        if (first < CUT) high.template logits<R, ROUGH>(q, peaks, first, std::min(last, CUT), out);
        if (last > CUT) low.template logits<R, ROUGH>(q, peaks, std::max(first, CUT) - CUT, last - CUT, (float (*)[PAGE])(out[0] + N));
    }

    template <int R, bool ROUGH> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[D]) const {
        if (first < CUT) high.template add<R, ROUGH>(p, share, first, std::min(last, CUT), o);
        if (last > CUT) low.template add<R, ROUGH>((const float (*)[PAGE])(p[0] + N), share, std::max(first, CUT) - CUT, last - CUT, o);
    }

    void rows(int first, int last, float (*out)[D]) const {
        if (first < CUT) high.rows(first, std::min(last, CUT), out);
        if (last > CUT) low.rows(std::max(first, CUT) - CUT, last - CUT, out + N);
    }
};

}  // namespace kvc
