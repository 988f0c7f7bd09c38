// Readers of pages of small codes (kernels/coded.py): x = value(code) * scale [+ low].
namespace kvc {

constexpr int PAGE = 128;
constexpr int WIDE = KVC_AVX512 ? 4 : 1;  // token groups or tiles that are worked on abreast
enum Axis { channel_axis, token_axis };

template <int BITS, int OFFSET> struct Whole {
    static constexpr int bits = BITS;
    vf table;
    Whole() {
        float x[16];
        for (int i = 0; i < 16; i++) x[i] = (float)((i & ((1 << BITS) - 1)) - OFFSET);
        table = load(x);
    }
    template <int SHIFT> vf at(vi word) const {  // the field SHIFT bits up in every lane
        if constexpr (BITS <= 4 && KVC_AVX512) return lookup(table, shift<SHIFT>(word));
        vf x = number(SHIFT + BITS == 32 ? shift<SHIFT>(word) : mask(shift<SHIFT>(word), (1 << BITS) - 1));
        return OFFSET ? x - set((float)OFFSET) : x;
    }
};

template <int BITS, uint32_t... NUMBERS> struct Table {
    static constexpr int bits = BITS;
    vf table;
    Table() {
        const uint32_t x[16] = {NUMBERS...};
        table = load((const float*)x);
    }
    template <int SHIFT> vf at(vi word) const { return lookup(table, shift<SHIFT>(word)); }
};

template <int EXPONENT> struct Float8 {  // e4m3 or e5m2
    static constexpr int bits = 8;
    template <int SHIFT> vf at(vi word) const {
        constexpr int mantissa = 7 - EXPONENT, bias = (1 << (EXPONENT - 1)) - 1;
        vi w = shift<SHIFT>(word);
        vf x = kvc::bits(add(shift_left(mask(w, 0x7f), 23 - mantissa), (127 - bias) << 23));
        vf least = set(as_float((128 - bias) << 23));         // the smallest normal number
        vf tiny = set(as_float((127 - bias) << 23));
        x = below(x, least, (x - tiny) * set(2.0f), x);       // subnormal: no implicit one
        return kvc::bits(either((vi)x_bits(x), shift_left(mask(w, 0x80), 24)));
    }
#if KVC_AVX512
    static vi x_bits(vf x) { return _mm512_castps_si512(x); }
#else
    static vi x_bits(vf x) { return (vi)x; }
#endif
};

template <int N, class Body> inline void unroll(Body&& body) {
    if constexpr (N > 0) {
        unroll<N - 1>(body);
        body(std::integral_constant<int, N - 1>{});
    }
}

// K: 16 tokens abreast. logits[r][t] = q[r] . k[t] for whole groups of 16 tokens.
template <int D, class V, Axis AXIS, int GROUP, class S, bool LOW> struct CodedK {
    static constexpr int planes = LOW ? 3 : 2;
    static constexpr int F = 8 / V::bits, TILE = 4 * F, TILES = (D + TILE - 1) / TILE;
    static constexpr int PAD = TILES * TILE;
    static constexpr int GROUPS = AXIS == channel_axis ? 1 : D / GROUP;
    static constexpr int SCALES = AXIS == channel_axis ? PAGE / GROUP * D : GROUPS * PAGE;
    const uint8_t* codes;
    const S *scale, *low;
    V values;

    CodedK(const void* const* plane, long page)
        : codes((const uint8_t*)plane[0] + page * (PAGE / 16 * TILES * 64)),
          scale((const S*)plane[1] + page * SCALES),
          low(LOW ? (const S*)plane[2] + page * SCALES : nullptr) {}

    // acc[i][r] += q[r][from ..] . codes of token group group + i, over tiles [first, last)
    template <int R, int N>
    void dots(const float (*q)[PAD], int group, int first, int last, vf (&acc)[N][R]) const {
        for (int tile = first; tile < last; tile++) {
            vi word[N];
            for (int i = 0; i < N; i++) word[i] = load_bytes(codes + ((group + i) * TILES + tile) * 64);
            unroll<4>([&](auto c) {
                unroll<F>([&](auto f) {
                    vf x[R];
                    for (int r = 0; r < R; r++) x[r] = set(q[r][tile * TILE + f * 4 + c]);
                    for (int i = 0; i < N; i++) {
                        vf k = values.template at<8 * c + V::bits * f>(word[i]);
                        for (int r = 0; r < R; r++) acc[i][r] = fma(x[r], k, acc[i][r]);
                    }
                });
            });
        }
    }

    template <int R, int N>
    void groups_of(const float (*q)[PAD], const float (*part)[R], int group, float (*out)[PAGE]) const {
        vf total[N][R];
        if constexpr (AXIS == channel_axis) {
            for (int i = 0; i < N; i++) for (int r = 0; r < R; r++) total[i][r] = set(part[0][r]);
            dots<R, N>(q, group, 0, TILES, total);
        } else {
            for (int i = 0; i < N; i++) for (int r = 0; r < R; r++) total[i][r] = set(0.0f);
            for (int g = 0; g < GROUPS; g++) {
                vf acc[N][R];
                for (int i = 0; i < N; i++) for (int r = 0; r < R; r++) acc[i][r] = set(0.0f);
                constexpr int each = GROUPS == 1 ? TILES : GROUP / TILE;
                dots<R, N>(q, group, g * each, (g + 1) * each, acc);
                for (int i = 0; i < N; i++) {
                    vf s = load(scale + g * PAGE + (group + i) * 16);
                    for (int r = 0; r < R; r++) total[i][r] = fma(acc[i][r], s, total[i][r]);
                    if constexpr (LOW) {
                        vf z = load(low + g * PAGE + (group + i) * 16);
                        for (int r = 0; r < R; r++) total[i][r] = fma(set(part[g][r]), z, total[i][r]);
                    }
                }
            }
        }
        for (int i = 0; i < N; i++) for (int r = 0; r < R; r++) store(out[r] + (group + i) * 16, total[i][r]);
    }

    template <int R> void run(const float (*q)[PAD], const float (*part)[R], int first, int last, float (*out)[PAGE]) const {
        int group = first;
        for (; group + WIDE <= last; group += WIDE) groups_of<R, WIDE>(q, part, group, out);
        if constexpr (WIDE > 2) for (; group + 2 <= last; group += 2) groups_of<R, 2>(q, part, group, out);
        for (; group < last; group++) groups_of<R, 1>(q, part, group, out);
    }

    // q[r] has D numbers; token groups [first, last) of the page
    template <int R> void logits(const float* const* q, int first, int last, float (*out)[PAGE]) const {
        alignas(64) float folded[R][PAD] = {};
        float part[GROUPS][R] = {};
        if constexpr (AXIS == token_axis) {
            for (int r = 0; r < R; r++) {
                std::memcpy(folded[r], q[r], D * sizeof(float));
                for (int g = 0; LOW && g < GROUPS; g++) {
                    vf s = set(0.0f);
                    for (int d = 0; d < GROUP; d += 16) s = s + load(q[r] + g * GROUP + d);
                    part[g][r] = sum(s);
                }
            }
            run<R>(folded, part, first, last, out);
        } else {
            constexpr int per = GROUP / 16;  // token groups in a step
            for (int step = first / per; step * per < last; step++) {
                const S *s = scale + step * D, *z = low + step * D;
                for (int r = 0; r < R; r++) {
                    vf bias = set(0.0f);
                    for (int d = 0; d < D; d += 16) {
                        vf x = load(q[r] + d);
                        store(folded[r] + d, x * load(s + d));
                        if constexpr (LOW) bias = fma(x, load(z + d), bias);
                    }
                    part[0][r] = LOW ? sum(bias) : 0.0f;
                }
                int from = step * per > first ? step * per : first;
                int to = (step + 1) * per < last ? (step + 1) * per : last;
                run<R>(folded, part, from, to, out);
            }
        }
    }
};

// V: 16 channels abreast. o[r] += sum over tokens of p[r][t] v[t], token groups of 16.
template <int D, class V, Axis AXIS, int GROUP, class S, bool LOW> struct CodedV {
    static constexpr int planes = LOW ? 3 : 2;
    static constexpr int F = 8 / V::bits, TILE = 16 * F, TILES = D / TILE;
    static constexpr int REST = (D - TILES * TILE) / F, BYTES = TILES * 16 + REST;
    static constexpr int GROUPS = AXIS == channel_axis ? 1 : D / GROUP;
    static constexpr int SCALES = AXIS == channel_axis ? PAGE / GROUP * D : GROUPS * PAGE;
    const uint8_t* codes;
    const S *scale, *low;
    V values;

    CodedV(const void* const* plane, long page)
        : codes((const uint8_t*)plane[0] + page * (PAGE * BYTES)),
          scale((const S*)plane[1] + page * SCALES),
          low(LOW ? (const S*)plane[2] + page * SCALES : nullptr) {}

    // o[r][channels of tiles tile ..] = [o +] sum over token quads [first, last) of p v
    template <int R, int N, bool REMAINDER>
    void tiles_of(const float (*p)[R][PAGE], int tile, int first, int last, float (*o)[D]) const {
        constexpr int lanes = REMAINDER ? REST : 16;
        vf acc[N * F][R];
        for (int i = 0; i < N * F; i++) for (int r = 0; r < R; r++) {
            if constexpr (REMAINDER) {
                float x[16] = {};
                std::memcpy(x, o[r] + tile * TILE + i * lanes, lanes * sizeof(float));
                acc[i][r] = load(x);
            } else {
                acc[i][r] = load(o[r] + (tile * F + i) * 16);
            }
        }
        for (int quad = first; quad < last; quad++) {
            vi word[N];
            for (int i = 0; i < N; i++) {
                const uint8_t* at = codes + (quad * BYTES + (tile + i) * 16) * 4;
                if constexpr (REMAINDER) {
                    uint8_t x[64] = {};
                    std::memcpy(x, at, REST * 4);
                    word[i] = load_bytes(x);
                } else {
                    word[i] = load_bytes(at);
                }
            }
            unroll<4>([&](auto c) {
                unroll<N>([&](auto i) {
                    unroll<F>([&](auto f) {
                        vf v = values.template at<8 * c + V::bits * f>(word[i]);
                        int group = AXIS == channel_axis || GROUPS == 1
                            ? 0 : ((tile + i) * TILE + f * lanes) / GROUP;
                        for (int r = 0; r < R; r++)
                            acc[i * F + f][r] = fma(set(p[group][r][quad * 4 + c]), v, acc[i * F + f][r]);
                    });
                });
            });
        }
        for (int i = 0; i < N * F; i++) for (int r = 0; r < R; r++) {
            if constexpr (REMAINDER) {
                float x[16];
                store(x, acc[i][r]);
                std::memcpy(o[r] + tile * TILE + i * lanes, x, lanes * sizeof(float));
            } else {
                store(o[r] + (tile * F + i) * 16, acc[i][r]);
            }
        }
    }

    template <int R> void run(const float (*p)[R][PAGE], int first, int last, float (*o)[D]) const {
        constexpr int abreast = !KVC_AVX512 || R * F >= 8 ? 1 : (R * F >= 4 ? 2 : 4);
        int tile = 0;
        for (; tile + abreast <= TILES; tile += abreast) tiles_of<R, abreast, false>(p, tile, first, last, o);
        for (; tile < TILES; tile++) tiles_of<R, 1, false>(p, tile, first, last, o);
        if constexpr (REST > 0) tiles_of<R, 1, true>(p, TILES, first, last, o);
    }

    template <int R> void add(const float (*p)[PAGE], int first, int last, float (*o)[D]) const {
        if constexpr (AXIS == token_axis) {
            alignas(64) float scaled[GROUPS][R][PAGE];
            for (int g = 0; g < GROUPS; g++) for (int r = 0; r < R; r++) {
                vf bias = set(0.0f);
                for (int t = first * 16; t < last * 16; t += 16) {
                    vf x = load(p[r] + t);
                    store(scaled[g][r] + t, x * load(scale + g * PAGE + t));
                    if constexpr (LOW) bias = fma(x, load(low + g * PAGE + t), bias);
                }
                if constexpr (LOW) {
                    vf z = set(sum(bias));
                    constexpr int width = GROUPS == 1 ? D : GROUP;
                    for (int d = g * width; d < (g + 1) * width; d += 16) store(o[r] + d, load(o[r] + d) + z);
                }
            }
            run<R>(scaled, first * 4, last * 4, o);
        } else {
            constexpr int per = GROUP / 16;
            for (int step = first / per; step * per < last; step++) {
                int from = step * per > first ? step * per : first;
                int to = (step + 1) * per < last ? (step + 1) * per : last;
                alignas(64) float part[R][D] = {};
                run<R>((const float (*)[R][PAGE])p, from * 4, to * 4, part);
                for (int r = 0; r < R; r++) {
                    vf mass = set(0.0f);
                    for (int t = from * 16; LOW && t < to * 16; t += 16) mass = mass + load(p[r] + t);
                    vf all = set(sum(mass));
                    for (int d = 0; d < D; d += 16) {
                        vf x = fma(load(part[r] + d), load(scale + step * D + d), load(o[r] + d));
                        if constexpr (LOW) x = fma(all, load(low + step * D + d), x);
                        store(o[r] + d, x);
                    }
                }
            }
        }
    }
};

}  // namespace kvc
