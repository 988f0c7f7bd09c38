// Keys that are made of what is stored at every read: rope(B s + b) (kernels/rebuild.py), 16 tokens
// abreast.
namespace kvc {

// What keys are made of: the bases of a kv head's KEYS keys [KEYS][DQ][DK] and offsets [KEYS][DQ];
// angles of a row, by token number, `numbers` of them [R] each, every angle once for each of a pair.
template <class C> struct Making {
    static constexpr int R = C::ROTARY, PAIRS = R / 2;
    const float *basis = nullptr, *offset = nullptr;
    const typename C::A *cos = nullptr, *sin = nullptr;
    long numbers = 0, shift = 0;  // sinks are turned as if they stood `shift` tokens later

    static constexpr int first_of(int pair) { return C::HALVES ? pair : 2 * pair; }
    static constexpr int second_of(int pair) { return C::HALVES ? pair + PAIRS : 2 * pair + 1; }

    // cosines and sines of 16 tokens from `number` on: [PAIRS][16]
    void angles(long number, float (*c)[16], float (*s)[16]) const {
        for (int t = 0; t < 16; t++) {
            const long at = std::min(number + t, numbers - 1) * R;
            for (int i = 0; i < PAIRS; i++) {
                c[i][t] = read(cos + at + first_of(i));
                s[i][t] = read(sin + at + first_of(i));
            }
        }
    }
    // the first ROTARY of x [DQ][16] turned by such angles
    static void turn(float (*x)[16], const float (*c)[16], const float (*s)[16]) {
        for (int i = 0; i < PAIRS; i++) {
            float *one = x[first_of(i)], *two = x[second_of(i)];
            vf a = load(one), b = load(two), cosine = load(c[i]), sine = load(s[i]);
            store(one, a * cosine - b * sine);
            store(two, fma(b, cosine, a * sine));
        }
    }
    // x [DQ][16] = B s + b of one of the kv head's keys, s [DK][16] of which the first ZEROS are 0
    template <int ZEROS = 0> void widen(int key, const float (*s)[16], float (*x)[16]) const {
        if constexpr (C::BASIS) {
            constexpr int some = 8;  // channels at a time
            for (int d = 0; d < C::DQ; d += some) {
                vf sum[some];
                const int left = std::min(some, C::DQ - d);
                for (int i = 0; i < some; i++) sum[i] = set(C::OFFSET && i < left ? offset[key * C::DQ + d + i] : 0.0f);
                const float* rows[some];
                for (int i = 0; i < some; i++) rows[i] = basis + ((long)key * C::DQ + d + std::min(i, left - 1)) * C::DK;
                for (int r = ZEROS; r < C::DK; r++) {
                    vf stored = load(s[r]);
                    for (int i = 0; i < some; i++) sum[i] = fma(set(rows[i][r]), stored, sum[i]);
                }
                for (int i = 0; i < left; i++) store(x[d + i], sum[i]);
            }
        } else {
            for (int d = 0; d < C::DQ; d++)
                store(x[d], C::OFFSET ? load(s[d]) + set(offset[key * C::DQ + d]) : load(s[d]));
        }
    }
    // one key of one token
    void one(int key, const float* s, long number, float* x) const {
        alignas(64) static thread_local float in[C::DK][16], out[C::DQ][16], c[PAIRS + 1][16], sn[PAIRS + 1][16];
        for (int r = 0; r < C::DK; r++) in[r][0] = s[r];
        widen(key, in, out);
        if constexpr (R > 0) {
            angles(number, c, sn);
            turn(out, c, sn);
        }
        for (int d = 0; d < C::DQ; d++) x[d] = out[d][0];
    }
};

// logits out[r][t] of tokens [from, to) of a page, of which the first stands at `number`; queries
// are the kv head's from ROW on.
template <class C, class Reader, int R, int ROW>
inline void made_logits(const Tier& tier, long page, const Making<C>& making, long number, const float* const* q, int from, int to, float (*out)[PAGE]) {
    constexpr int each = C::G / C::KEYS, PAIRS = Making<C>::PAIRS;
    static thread_local std::vector<float> room(PAGE * C::DK + (C::DK + C::DQ) * 16);
    float (*rows)[C::DK] = (float (*)[C::DK])room.data();
    float (*s)[16] = (float (*)[16])(room.data() + PAGE * C::DK), (*x)[16] = s + C::DK;
    alignas(64) float c[PAIRS + 1][16], sn[PAIRS + 1][16];
    constexpr int none = C::BASIS ? zeros<Reader> : 0;
    const int first = from / 16, last = (to + 15) / 16;
    Reader(tier.plane, page).rows(first, last, rows);
    for (int group = first; group < last; group++) {
        for (int d = none; d < C::DK; d += 16) {
            vf some[16];
            for (int t = 0; t < 16; t++) some[t] = load(rows[group * 16 + t] + d);
            transpose(some);
            for (int i = 0; i < 16; i++) store(s[d + i], some[i]);
        }
        if constexpr (PAIRS > 0) making.angles(number + group * 16, c, sn);
        for (int key = ROW / each; key <= (ROW + R - 1) / each; key++) {
            making.template widen<none>(key, s, x);
            if constexpr (PAIRS > 0) making.turn(x, c, sn);
            vf sum[R];
            for (int r = 0; r < R; r++) sum[r] = set(0.0f);
            const int low = std::max(0, key * each - ROW), high = std::min(R, (key + 1) * each - ROW);
            for (int d = 0; d < C::DQ; d++) {
                vf k = load(x[d]);
                for (int r = 0; r < R; r++) if (r >= low && r < high) sum[r] = fma(set(q[r][d]), k, sum[r]);
            }
            for (int r = low; r < high; r++) {
                alignas(64) float now[16];
                store(now, sum[r]);
                for (int t = std::max(0, from - group * 16); t < 16; t++) out[r][group * 16 + t] = now[t];
            }
        }
    }
}

}  // namespace kvc
