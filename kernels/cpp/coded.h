// Readers of pages of small codes (kernels/coded.py): x = value(code) * scale [+ low].
namespace kvc {

constexpr int PAGE = 128;
constexpr int CONSTANTS = 12;  // where a tier's planes name the layer's constants
// Readers that can are told how many pages further the next one is that will be read: they fetch its
// bytes as they read their own, since processors look ahead within 4 KiB only.
template <class Reader, class = void> constexpr bool looks = false;
template <class Reader> constexpr bool looks<Reader, std::void_t<decltype(&Reader::ahead)>> = true;
template <class Reader> inline void look_ahead(Reader& reader, long pages) {
    if constexpr (looks<Reader>) reader.ahead(pages);
}

constexpr int WIDE = KVC_AVX512 ? 4 : 1;  // token groups or tiles that are worked on abreast
enum Axis { channel_axis, token_axis };

template <int BITS, int OFFSET> struct Whole {
    static constexpr int bits = BITS, offset = OFFSET;
    static constexpr bool whole = true;
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
    static constexpr int bits = BITS, offset = 0;
    static constexpr bool whole = false;
    vf table;
    Table() {
        const uint32_t x[16] = {NUMBERS...};
        table = load((const float*)x);
    }
    template <int SHIFT> vf at(vi word) const { return lookup(table, shift<SHIFT>(word)); }
};

template <int BITS, int START> struct Given {  // a table of the layer's own
    static constexpr int bits = BITS, offset = 0;
    static constexpr bool whole = false;
    float numbers[16];
    vf table;
    explicit Given(const void* const* plane) {
        for (int i = 0; i < 16; i++) numbers[i] = ((const float*)plane[CONSTANTS])[START + i % (1 << BITS)];
        table = load(numbers);
    }
    template <int SHIFT> vf at(vi word) const { return lookup(table, shift<SHIFT>(word)); }
};
template <class V> inline V values_of(const void* const* plane) {
    if constexpr (std::is_constructible_v<V, const void* const*>) return V(plane);
    else return V();
}

template <int EXPONENT> struct Float8 {  // e4m3 or e5m2
    static constexpr int bits = 8, offset = 0;
    static constexpr bool whole = false;
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

// body(0), .., body(N - 1). Arrays that are indexed by these numbers alone become registers, if
// everything is inlined early: so bodies are ALWAYS.
template <int N, class Body> ALWAYS inline void unroll(Body&& body) {
    if constexpr (N > 0) {
        unroll<N - 1>(body);
        body(std::integral_constant<int, N - 1>{});
    }
}

// 16-bit integers: the largest number becomes 32767, so that 256 products with 8-bit codes fit 32
// bits. The sum of the integers in x[0 .. n), n a multiple of 8.
#if KVC_INTEGER
constexpr float MOST = 32767.0f;
inline float total_of(const int32_t* x, int n) {
    vi all = zero();
    for (int i = 0; i < n; i += 8) {
        alignas(64) int32_t some[16] = {};
        std::memcpy(some, x + i, 32);
        all = dot(all, load_bytes((const uint8_t*)some), set_int(0x00010001));
    }
    return sum(number(all));
}
#endif

// K: 16 tokens abreast. logits[r][t] = q[r] . k[t] for whole groups of 16 tokens.
template <int D, class V, Axis AXIS, int GROUP, class S, bool LOW> struct CodedK {
    static constexpr int planes = LOW ? 3 : 2;
    static constexpr int F = 8 / V::bits, TILE = 4 * F, TILES = (D + TILE - 1) / TILE;
    static constexpr int PAD = TILES * TILE;
    static constexpr int GROUPS = AXIS == channel_axis ? 1 : D / GROUP;
    static constexpr int SCALES = AXIS == channel_axis ? PAGE / GROUP * D : GROUPS * PAGE;
    static constexpr int ROOM = (PAD + 31) / 32 * 32;
    const uint8_t* codes;
    const S *scale, *low;
    V values;
    static constexpr long PLACES = PAGE / 16 * TILES * 64;
    long next = 0, next_scale = 0;  // bytes

    CodedK(const void* const* plane, long page)
        : codes((const uint8_t*)plane[0] + page * PLACES), scale((const S*)plane[1] + page * SCALES),
          low(LOW ? (const S*)plane[2] + page * SCALES : nullptr), values(values_of<V>(plane)) {}

    void ahead(long pages) { next = pages * PLACES, next_scale = pages * SCALES * (long)sizeof(S); }

    vi codes_at(int group, int tile) const {
        const uint8_t* at = codes + (group * TILES + tile) * 64;
        fetch(at, next);
        return load_bytes(at);
    }
    vf number_at(const S* p) const { fetch(p, next_scale); return load(p); }

    // acc[i][r] += q[r] . codes of token group group + i, over tiles [first, last)
    template <int R, int N>
    ALWAYS inline void dots(const float (*q)[ROOM], int group, int first, int last, vf (&acc)[N][R]) const {
        for (int tile = first; tile < last; tile++) {
            vi word[N];
            unroll<N>([&](auto i) ALWAYS { word[i] = codes_at(group + i, tile); });
            unroll<4>([&](auto c) ALWAYS {
                unroll<F>([&](auto f) ALWAYS {
                    vf x[R];
                    unroll<R>([&](auto r) ALWAYS { x[r] = set(q[r][tile * TILE + f * 4 + c]); });
                    unroll<N>([&](auto i) ALWAYS {
                        vf k = values.template at<8 * c + V::bits * f>(word[i]);
                        unroll<R>([&](auto r) ALWAYS { acc[i][r] = fma(x[r], k, acc[i][r]); });
                    });
                });
            });
        }
    }

#if KVC_INTEGER
    template <int R, int N>
    ALWAYS inline void dots(const int32_t (*q)[ROOM / 2], int group, int first, int last, vi (&acc)[N][R]) const {
        for (int tile = first; tile < last; tile++) {
            vi word[N];
            unroll<N>([&](auto i) ALWAYS { word[i] = codes_at(group + i, tile); });
            unroll<2>([&](auto c) ALWAYS {
                unroll<F>([&](auto f) ALWAYS {
                    vi x[R];
                    unroll<R>([&](auto r) ALWAYS { x[r] = set_int(q[r][(tile * F + f) * 2 + c]); });
                    unroll<N>([&](auto i) ALWAYS {
                        vi k = field<8 * c + V::bits * f, V::bits>(word[i]);
                        unroll<R>([&](auto r) ALWAYS { acc[i][r] = dot(acc[i][r], k, x[r]); });
                    });
                });
            });
        }
    }
#endif

    template <int R> struct Query {  // of one step (axis=channel) or of all channel groups
        float bias[GROUPS][R];       // what the codes do not touch: q . low, or the sum of q
        alignas(64) float q[R][ROOM];
#if KVC_INTEGER
        alignas(64) int32_t whole[R][ROOM / 2];
        float unit[R], shift[GROUPS][R];
#endif
    };

    template <int R, int N, bool ROUGH>
    void some(const Query<R>& query, int group, float (*out)[PAGE]) const {
        constexpr int wide = GROUPS == 1 ? TILES : GROUP / TILE;  // tiles of a group
        vf total[N][R];
        auto each = [](auto&& body) ALWAYS { unroll<N>([&](auto i) ALWAYS { unroll<R>([&](auto r) ALWAYS { body(i, r); }); }); };
        each([&](auto i, auto r) ALWAYS { total[i][r] = set(AXIS == channel_axis ? query.bias[0][r] : 0.0f); });
        for (int g = 0; g < GROUPS; g++) {
            vf acc[N][R];
            if constexpr (ROUGH && V::whole && KVC_INTEGER) {
#if KVC_INTEGER
                vi whole[N][R];
                each([&](auto i, auto r) ALWAYS { whole[i][r] = zero(); });
                dots<R, N>(query.whole, group, g * wide, (g + 1) * wide, whole);
                each([&](auto i, auto r) ALWAYS {
                    acc[i][r] = number(whole[i][r]) * set(query.unit[r]);
                    if constexpr (V::offset != 0) acc[i][r] = acc[i][r] - set(query.shift[g][r]);
                });
#endif
            } else {
                each([&](auto i, auto r) ALWAYS { acc[i][r] = set(0.0f); });
                dots<R, N>(query.q, group, g * wide, (g + 1) * wide, acc);
            }
            unroll<N>([&](auto i) ALWAYS {
                if constexpr (AXIS == channel_axis) {
                    unroll<R>([&](auto r) ALWAYS { total[i][r] = total[i][r] + acc[i][r]; });
                } else {
                    vf s = number_at(scale + g * PAGE + (group + i) * 16);
                    unroll<R>([&](auto r) ALWAYS { total[i][r] = fma(acc[i][r], s, total[i][r]); });
                    if constexpr (LOW) {
                        vf z = number_at(low + g * PAGE + (group + i) * 16);
                        unroll<R>([&](auto r) ALWAYS { total[i][r] = fma(set(query.bias[g][r]), z, total[i][r]); });
                    }
                }
            });
        }
        each([&](auto i, auto r) ALWAYS { store(out[r] + (group + i) * 16, total[i][r]); });
    }

    template <int R, bool ROUGH> void run(Query<R>& query, int first, int last, float (*out)[PAGE]) const {
#if KVC_INTEGER
        if constexpr (ROUGH && V::whole && V::offset != 0) {
            constexpr int each = GROUPS == 1 ? ROOM / 2 : GROUP / 2;
            for (int r = 0; r < R; r++) for (int g = 0; g < GROUPS; g++)
                query.shift[g][r] = total_of(query.whole[r] + g * each, each) * query.unit[r] * V::offset;
        }
#endif
        int group = first;
        for (; group + WIDE <= last; group += WIDE) some<R, WIDE, ROUGH>(query, group, out);
        if constexpr (WIDE > 2) for (; group + 2 <= last; group += 2) some<R, 2, ROUGH>(query, group, out);
        for (; group < last; group++) some<R, 1, ROUGH>(query, group, out);
    }

    // q times the scales of one step (axis=channel) or q itself, as `dots` takes it
    template <int R, bool ROUGH, class Factor, class Unit>
    void prepare(Query<R>& query, const float* const* q, const float* peaks, Factor&& factor, Unit unit) const {
        if constexpr (ROUGH && V::whole && KVC_INTEGER) {
#if KVC_INTEGER
            for (int r = 0; r < R; r++) {
                vf inverse = set(peaks[r] * unit > 1e-30f ? MOST / (peaks[r] * unit) : 0.0f);
                query.unit[r] = peaks[r] * unit / MOST;
                for (int d = 0; d < ROOM; d += 32) {
                    vf a = d < D ? load(q[r] + d) * factor(d) : set(0.0f);
                    vf b = d + 16 < D ? load(q[r] + d + 16) * factor(d + 16) : set(0.0f);
                    store(query.whole[r] + d / 2, quads(a, b, inverse));
                }
            }
#endif
        } else {
            for (int r = 0; r < R; r++) for (int d = 0; d < ROOM; d += 16)
                store(query.q[r] + d, d < D ? load(q[r] + d) * factor(d) : set(0.0f));
        }
    }

    // q[r] has D numbers, the largest magnitude is peaks[r]; token groups [first, last) of the page
    template <int R, bool ROUGH>
    void logits(const float* const* q, const float* peaks, int first, int last, float (*out)[PAGE]) const {
        Query<R> query;
        if constexpr (AXIS == token_axis) {
            prepare<R, ROUGH>(query, q, peaks, [](int) { return set(1.0f); }, 1.0f);
            for (int r = 0; r < R; r++)
                for (int g = 0; LOW && g < GROUPS; g++) {
                    vf s = set(0.0f);
                    for (int d = 0; d < GROUP; d += 16) s = s + load(q[r] + g * GROUP + d);
                    query.bias[g][r] = sum(s);
                }
            run<R, ROUGH>(query, first, last, out);
        } else {
            constexpr int per = GROUP / 16;  // token groups in a step
            for (int step = first / per; step * per < last; step++) {
                alignas(64) float factor[D];
                vf most = set(0.0f), bias[R];
                for (int r = 0; r < R; r++) bias[r] = set(0.0f);
                for (int d = 0; d < D; d += 16) {
                    vf x = number_at(scale + step * D + d);
                    most = max(most, x);
                    store(factor + d, x);
                    if constexpr (LOW) {
                        vf z = number_at(low + step * D + d);
                        for (int r = 0; r < R; r++) bias[r] = fma(load(q[r] + d), z, bias[r]);
                    }
                }
                prepare<R, ROUGH>(query, q, peaks, [&](int d) { return load(factor + d); }, ROUGH ? peak(most) : 1.0f);
                for (int r = 0; r < R; r++) query.bias[0][r] = LOW ? sum(bias[r]) : 0.0f;
                int from = step * per > first ? step * per : first;
                int to = (step + 1) * per < last ? (step + 1) * per : last;
                run<R, ROUGH>(query, from, to, out);
            }
        }
    }

    // k of token groups [first, last), as rows
    void rows(int first, int last, float (*out)[D]) const {
        for (int group = first; group < last; group++) {
            const int step = AXIS == channel_axis ? group * 16 / GROUP : 0;
            alignas(64) float x[PAD][16];  // channel by channel
            for (int tile = 0; tile < TILES; tile++) {
                vi word = load_bytes(codes + (group * TILES + tile) * 64);
                unroll<4>([&](auto c) ALWAYS {
                    unroll<F>([&](auto f) ALWAYS { store(x[tile * TILE + f * 4 + c], values.template at<8 * c + V::bits * f>(word)); });
                });
            }
            for (int d = 0; d < D; d++) {
                const int at = AXIS == channel_axis ? 0 : (GROUPS == 1 ? 0 : d / GROUP) * PAGE + group * 16;
                if constexpr (AXIS == channel_axis)
                    store(x[d], fma(load(x[d]), set(read(scale + step * D + d)), set(LOW ? read(low + step * D + d) : 0.0f)));
                else
                    store(x[d], fma(load(x[d]), load(scale + at), LOW ? load(low + at) : set(0.0f)));
            }
            for (int d = 0; d < D; d += 16) {
                vf some[16];
                for (int i = 0; i < 16; i++) some[i] = load(x[d + i]);
                transpose(some);
                for (int i = 0; i < 16; i++) store(out[group * 16 + i] + d, some[i]);
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
    long next = 0, next_scale = 0;  // bytes

    CodedV(const void* const* plane, long page)
        : codes((const uint8_t*)plane[0] + page * (PAGE * BYTES)), scale((const S*)plane[1] + page * SCALES),
          low(LOW ? (const S*)plane[2] + page * SCALES : nullptr), values(values_of<V>(plane)) {}

    void ahead(long pages) { next = pages * (PAGE * BYTES), next_scale = pages * SCALES * (long)sizeof(S); }
    vf number_at(const S* p) const { fetch(p, next_scale); return load(p); }

    template <int R> struct Weights {  // of every channel group: p times the scales
        alignas(64) float p[GROUPS][R][PAGE];
#if KVC_INTEGER
        alignas(64) int32_t whole[GROUPS][R][PAGE / 2];
        float unit[GROUPS], shift[GROUPS][R];
#endif
    };

    template <bool REMAINDER> vi codes_at(int quad, int tile) const {
        const uint8_t* at = codes + (quad * BYTES + tile * 16) * 4;
        fetch(at, next);
        if constexpr (!REMAINDER) return load_bytes(at);
        alignas(64) uint8_t x[64] = {};
        std::memcpy(x, at, REST * 4);
        return load_bytes(x);
    }

    static constexpr int group_of(int channel) { return GROUPS == 1 ? 0 : channel / GROUP; }

    // o[r] += share[r] times the sum over token quads [first, last) of p v, for the channels of N tiles
    template <int R, int N, int tile, bool REMAINDER, bool ROUGH>
    void tiles_of(const Weights<R>& weights, const float* share, int first, int last, float (*o)[D]) const {
        constexpr int lanes = REMAINDER ? REST : 16;
        vf acc[N * F][R];
        if constexpr (ROUGH && V::whole && KVC_INTEGER) {
#if KVC_INTEGER
            vi whole[N * F][R];
            unroll<N * F>([&](auto i) ALWAYS { unroll<R>([&](auto r) ALWAYS { whole[i][r] = zero(); }); });
            for (int quad = first; quad < last; quad++) {
                vi word[N];
                unroll<N>([&](auto i) ALWAYS { word[i] = codes_at<REMAINDER>(quad, tile + i); });
                unroll<2>([&](auto c) ALWAYS {
                    unroll<N>([&](auto i) ALWAYS {
                        unroll<F>([&](auto f) ALWAYS {
                            vi v = field<8 * c + V::bits * f, V::bits>(word[i]);
                            constexpr int group = group_of((tile + i) * TILE + f * lanes);
                            unroll<R>([&](auto r) ALWAYS {
                                whole[i * F + f][r] = dot(whole[i * F + f][r], v, set_int(weights.whole[group][r][quad * 2 + c]));
                            });
                        });
                    });
                });
            }
            unroll<N * F>([&](auto i) ALWAYS {
                constexpr int group = group_of((tile + i / F) * TILE + i % F * lanes);
                unroll<R>([&](auto r) ALWAYS {
                    acc[i][r] = number(whole[i][r]) * set(weights.unit[group]);
                    if constexpr (V::offset != 0) acc[i][r] = acc[i][r] - set(weights.shift[group][r]);
                });
            });
#endif
        } else {
            unroll<N * F>([&](auto i) ALWAYS { unroll<R>([&](auto r) ALWAYS { acc[i][r] = set(0.0f); }); });
            for (int quad = first; quad < last; quad++) {
                vi word[N];
                unroll<N>([&](auto i) ALWAYS { word[i] = codes_at<REMAINDER>(quad, tile + i); });
                unroll<4>([&](auto c) ALWAYS {
                    unroll<N>([&](auto i) ALWAYS {
                        unroll<F>([&](auto f) ALWAYS {
                            vf v = values.template at<8 * c + V::bits * f>(word[i]);
                            constexpr int group = group_of((tile + i) * TILE + f * lanes);
                            unroll<R>([&](auto r) ALWAYS {
                                acc[i * F + f][r] = fma(set(weights.p[group][r][quad * 4 + c]), v, acc[i * F + f][r]);
                            });
                        });
                    });
                });
            }
        }
        unroll<N * F>([&](auto i) ALWAYS {
            unroll<R>([&](auto r) ALWAYS {
                float* to = o[r] + tile * TILE + i * lanes;
                if constexpr (REMAINDER) {
                    float x[16];
                    store(x, acc[i][r]);
                    for (int d = 0; d < lanes; d++) to[d] += share[r] * x[d];
                } else {
                    store(to, fma(acc[i][r], set(share[r]), load(to)));
                }
            });
        });
    }

    template <int R, bool ROUGH, int TILE0 = 0>
    void tiles(const Weights<R>& weights, const float* share, int first, int last, float (*o)[D]) const {
        constexpr int most = !KVC_AVX512 || R * F >= 8 ? 1 : (R * F >= 4 ? 2 : 4);
        constexpr int abreast = TILE0 + most <= TILES ? most : 1;
        if constexpr (TILE0 < TILES) {
            tiles_of<R, abreast, TILE0, false, ROUGH>(weights, share, first * 4, last * 4, o);
            tiles<R, ROUGH, TILE0 + abreast>(weights, share, first, last, o);
        } else if constexpr (REST > 0) {
            tiles_of<R, 1, TILES, true, ROUGH>(weights, share, first * 4, last * 4, o);
        }
    }

    // p times factor(t), of token groups [first, last), as `tiles_of` takes it; the largest is `unit`
    template <int R, bool ROUGH, class Factor>
    void prepare(Weights<R>& weights, int group, const float (*p)[PAGE], int first, int last, Factor&& factor, float unit) const {
        if constexpr (ROUGH && V::whole && KVC_INTEGER) {
#if KVC_INTEGER
            vf inverse = set(unit > 1e-30f ? MOST / unit : 0.0f);
            weights.unit[group] = unit / MOST;
            int from = first / 2 * 2, to = (last + 1) / 2 * 2;  // whole pairs of token groups
            for (int r = 0; r < R; r++) {
                for (int t = from; t < to; t += 2) {
                    vf a = t < first ? set(0.0f) : load(p[r] + t * 16) * factor(t * 16);
                    vf b = t + 1 < last ? load(p[r] + t * 16 + 16) * factor(t * 16 + 16) : set(0.0f);
                    store(weights.whole[group][r] + t * 8, quads(a, b, inverse));
                }
                if constexpr (V::offset != 0)
                    weights.shift[group][r] = total_of(weights.whole[group][r] + from * 8, (to - from) * 8) * weights.unit[group] * V::offset;
            }
#endif
        } else {
            for (int r = 0; r < R; r++)
                for (int t = first * 16; t < last * 16; t += 16)
                    store(weights.p[group][r] + t, load(p[r] + t) * factor(t));
        }
    }

    // o[r] += share[r] times the sum of p[r][t] v[t], 0 <= p <= 1, over token groups [first, last)
    template <int R, bool ROUGH>
    void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[D]) const {
        Weights<R> weights;
        if constexpr (AXIS == token_axis) {
            for (int g = 0; g < GROUPS; g++) {
                alignas(64) float factor[PAGE];
                vf most = set(0.0f), bias[R];
                for (int r = 0; r < R; r++) bias[r] = set(0.0f);
                for (int t = first * 16; t < last * 16; t += 16) {
                    vf x = number_at(scale + g * PAGE + t);
                    most = max(most, x);
                    store(factor + t, x);
                    if constexpr (LOW) {
                        vf z = number_at(low + g * PAGE + t);
                        for (int r = 0; r < R; r++) bias[r] = fma(load(p[r] + t), z, bias[r]);
                    }
                }
                prepare<R, ROUGH>(weights, g, p, first, last, [&](int t) { return load(factor + t); }, ROUGH ? peak(most) : 1.0f);
                constexpr int width = GROUPS == 1 ? D : GROUP;
                for (int r = 0; LOW && r < R; r++) {
                    vf z = set(sum(bias[r]) * share[r]);
                    for (int d = g * width; d < (g + 1) * width; d += 16) store(o[r] + d, load(o[r] + d) + z);
                }
            }
            tiles<R, ROUGH>(weights, share, first, last, o);
        } else {
            constexpr int per = GROUP / 16;
            for (int step = first / per; step * per < last; step++) {
                int from = step * per > first ? step * per : first;
                int to = (step + 1) * per < last ? (step + 1) * per : last;
                alignas(64) float part[R][D] = {};
                prepare<R, ROUGH>(weights, 0, p, from, to, [](int) { return set(1.0f); }, 1.0f);
                tiles<R, ROUGH>(weights, share, from, to, part);
                for (int r = 0; r < R; r++) {
                    vf mass = set(0.0f);
                    for (int t = from * 16; LOW && t < to * 16; t += 16) mass = mass + load(p[r] + t);
                    vf all = set(LOW ? sum(mass) * share[r] : 0.0f);
                    for (int d = 0; d < D; d += 16) {
                        vf x = fma(load(part[r] + d), load(scale + step * D + d), load(o[r] + d));
                        if constexpr (LOW) x = fma(all, load(low + step * D + d), x);
                        store(o[r] + d, x);
                    }
                }
            }
        }
    }

    // v of token groups [first, last), as rows
    void rows(int first, int last, float (*out)[D]) const {
        for (int quad = first * 4; quad < last * 4; quad++) {
            alignas(64) float x[4][TILES * TILE + 16 * F];
            unroll<TILES + (REST > 0)>([&](auto tile) {
                constexpr bool remainder = tile == TILES;
                vi word = codes_at<remainder>(quad, tile);
                unroll<F>([&](auto f) ALWAYS {
                    constexpr int at = tile * TILE + f * (remainder ? REST : 16);
                    unroll<4>([&](auto c) ALWAYS { store(x[c] + at, values.template at<8 * c + V::bits * f>(word)); });
                });
            });
            for (int c = 0; c < 4; c++) for (int d = 0; d < D; d += 16) {
                const int t = quad * 4 + c, place = (GROUPS == 1 ? 0 : d / GROUP) * PAGE + t;
                if constexpr (AXIS == channel_axis) {
                    const int at = t / GROUP * D + d;
                    store(out[t] + d, fma(load(x[c] + d), load(scale + at), LOW ? load(low + at) : set(0.0f)));
                } else {
                    store(out[t] + d, fma(load(x[c] + d), set(read(scale + place)), set(LOW ? read(low + place) : 0.0f)));
                }
            }
        }
    }
};

}  // namespace kvc
