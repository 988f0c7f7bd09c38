// Products of a block of keys or values with 32 queries abreast, for attention of many queries.
//
//     logits[t][c] = sum over d of k[t][d] q[c][d]        o[d][c] += sum over t of v[t][d] p[t][c]
//
// 16-bit models multiply pairs of bf16 (AMX tiles or AVX-512's dot products) where the CPU can, all
// others fp32. Sums are fp32.
#if KVC_PAIRS && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define KVC_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define KVC_TILES 0
#endif

namespace kvc {

constexpr int COLUMNS = 32;  // queries abreast

constexpr int ABREAST = KVC_AVX512 ? 8 : 2;  // rows that are multiplied at a time

// acc[row][column] += sum over n of a[row * rows + n * step] b[n][column], 32 columns, R rows
template <int R, class Element, class Times>
inline void micro(const Element* a, long row, long step, const Element* b, int n, vf (&acc)[R][2], Times&& times) {
    for (int k = 0; k < n; k++)
        for (int r = 0; r < R; r++) times(a[r * row + k * step], b + k * COLUMNS, acc[r]);
}

// c[row][column] (+)= the same for all `rows`
template <bool ADD, class Element, class Times>
inline void product(const Element* a, long row, long step, int rows, const Element* b, int n, float* c, Times&& times) {
    auto some = [&](auto count, int r) {
        constexpr int R = decltype(count)::value;
        vf acc[R][2];
        float* to = c + r * COLUMNS;
        for (int j = 0; j < R; j++) for (int i = 0; i < 2; i++) acc[j][i] = ADD ? load(to + j * COLUMNS + i * 16) : set(0.0f);
        micro<R>(a + r * row, row, step, b, n, acc, times);
        for (int j = 0; j < R; j++) for (int i = 0; i < 2; i++) store(to + j * COLUMNS + i * 16, acc[j][i]);
    };
    int r = 0;
    for (; r + ABREAST <= rows; r += ABREAST) some(std::integral_constant<int, ABREAST>{}, r);
    for (; r < rows; r++) some(std::integral_constant<int, 1>{}, r);
}

// The same, given to each(row, acc of it, acc of the next one) instead of stored; `rows` whole.
template <class Element, class Times, class Each>
inline void product_each(const Element* a, long row, int rows, const Element* b, int n, Times&& times, Each&& each) {
    for (int r = 0; r < rows; r += ABREAST) {
        vf acc[ABREAST][2];
        for (auto& x : acc) x[0] = x[1] = set(0.0f);
        micro<ABREAST>(a + r * row, row, 1, b, n, acc, times);
        for (int j = 0; j < ABREAST; j += 2) each(r + j, acc[j], acc[j + 1]);
    }
}

// fp32 operands.
template <int DK, int DV> struct Plain {
    static constexpr int TOKENS = PAGE;
    struct Query { alignas(64) float x[DK][COLUMNS]; };
    struct Weights { alignas(64) float x[PAGE][COLUMNS]; };
    struct Block { alignas(64) float k[PAGE][DK], v[PAGE][DV]; };

    static void begin() {}
    static void end() {}
    template <class T> static void put(Block& block, int t, const T* k, const T* v) {
        for (int d = 0; d < DK; d += 16) store(block.k[t] + d, load(k + d));
        for (int d = 0; d < DV; d += 16) store(block.v[t] + d, load(v + d));
    }
    template <class Fill> static void fill(Block& block, int from, int, Fill&& rows) {
        rows(block.k, block.v);
        std::memset(block.k, 0, from * sizeof(block.k[0]));
        std::memset(block.v, 0, from * sizeof(block.v[0]));
    }
    static void pack(Block&, int) {}
    static void pack(Query& query, float (*q)[DK]) {
        for (int c = 0; c < COLUMNS; c += 16) for (int d = 0; d < DK; d += 16) {
            vf x[16];
            for (int i = 0; i < 16; i++) x[i] = load(q[c + i] + d);
            transpose(x);
            for (int i = 0; i < 16; i++) store(query.x[d + i] + c, x[i]);
        }
    }
    static void weights(Weights& p, int t, const vf (&a)[2], const vf (&b)[2]) {
        for (int i = 0; i < 2; i++) store(p.x[t] + i * 16, a[i]), store(p.x[t + 1] + i * 16, b[i]);
    }
    static void times(float a, const float* b, vf (&acc)[2]) {
        vf x = set(a);
        for (int i = 0; i < 2; i++) acc[i] = fma(x, load(b + i * 16), acc[i]);
    }
    static void logits(const Block& block, int tokens, const Query& query, float (*out)[COLUMNS]) {
        product<false>(block.k[0], DK, 1, tokens, query.x[0], DK, out[0], times);
    }
    // Gives the logits of a whole block to each(token, its logits, the next one's).
    template <class Each> static void logits_each(const Block& block, const Query& query, float (*)[COLUMNS], Each&& each) {
        product_each(block.k[0], DK, PAGE, query.x[0], DK, times, each);
    }
    static void add(const Block& block, int tokens, const Weights& p, float (*o)[COLUMNS]) {
        product<true>(block.v[0], 1, DV, DV, p.x[0], tokens, o[0], times);
    }
};

#if KVC_PAIRS
// bf16 operands, two neighbours of a sum in 32 bits.
template <int DK, int DV> struct Pairs {
    static constexpr int WIDTH = (DK + 31) / 32 * 32;
    typedef uint32_t pair;
    struct Query { alignas(64) pair x[WIDTH / 2][COLUMNS]; };
    struct Weights { alignas(64) pair x[PAGE / 2][COLUMNS]; };
    struct Block {
        alignas(64) pair k[PAGE][WIDTH / 2], v[DV][PAGE / 2];  // v turned: two tokens in a pair
        alignas(64) bf16 rows[PAGE][(DV + 31) / 32 * 32];
        alignas(64) float some_k[PAGE][DK], some_v[PAGE][DV];
    };

    static __m512i two(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
    template <int D> static void narrow(const float* x, void* to) {
        for (int d = 0; d < D; d += 32)
            _mm512_storeu_si512((bf16*)to + d, two(load(x + d), d + 16 < D ? load(x + d + 16) : set(0.0f)));
    }
    static void put(Block& block, int t, const bf16* k, const bf16* v) {
        for (int d = DK; d < WIDTH; d++) ((bf16*)block.k[t])[d].bits = 0;
        std::memcpy(block.k[t], k, DK * 2);
        std::memcpy(block.rows[t], v, DV * 2);
    }
    template <class Fill> static void fill(Block& block, int from, int to, Fill&& rows) {
        rows(block.some_k, block.some_v);
        std::memset(block.k, 0, from * sizeof(block.k[0]));
        std::memset(block.rows, 0, from * sizeof(block.rows[0]));
        for (int t = from; t < to; t++) narrow<DK>(block.some_k[t], block.k[t]), narrow<DV>(block.some_v[t], block.rows[t]);
    }
    // Once the first `tokens` rows are there: whole groups of 32 are made up by zeros.
    static void pack(Block& block, int tokens) {
        int whole = (tokens + 31) / 32 * 32;
        std::memset(block.k + tokens, 0, (whole - tokens) * sizeof(block.k[0]));
        std::memset(block.rows + tokens, 0, (whole - tokens) * sizeof(block.rows[0]));
        for (int t = 0; t < whole; t += 32) for (int d = 0; d < DV; d += 16) {
            vf x[16];
            for (int i = 0; i < 16; i++) {
                auto row = [&](int t) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(block.rows[t] + d))); };
                x[i] = bits(either(row(t + 2 * i), shift_left(row(t + 2 * i + 1), 16)));
            }
            transpose(x);
            for (int i = 0; i < 16; i++) store((float*)block.v[d + i] + t / 2, x[i]);
        }
    }
    static void pack(Query& query, float (*q)[DK]) {
        for (int c = 0; c < COLUMNS; c += 16) for (int d = 0; d < WIDTH; d += 32) {
            vf x[16];
            for (int i = 0; i < 16; i++) {
                pair some[16];
                vf a = load(q[c + i] + d), b = d + 16 < DK ? load(q[c + i] + d + 16) : set(0.0f);
                _mm512_storeu_si512(some, two(a, b));
                x[i] = load((const float*)some);
            }
            transpose(x);
            for (int i = 0; i < 16; i++) store((float*)query.x[d / 2 + i] + c, x[i]);
        }
    }
    static void weights(Weights& p, int t, const vf (&a)[2], const vf (&b)[2]) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                               23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        for (int i = 0; i < 2; i++)
            _mm512_storeu_si512(p.x[t / 2] + i * 16, _mm512_permutexvar_epi16(order, two(a[i], b[i])));
    }
#if KVC_TILES
    static void begin() {
        static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ask for the tiles' state
        (void)allowed;
        struct { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } config;
        for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
        _tile_loadconfig(&config);
    }
    static void end() { _tile_release(); }
    // c[row][column] (+)= sum over n pairs: tiles of 16 rows, 16 columns and 16 pairs
    template <bool ADD> static void product(const pair* a, long row, int rows, const pair* b, int n, float* c) {
        constexpr int line = COLUMNS * 4;
        asm volatile("" ::: "memory");  // the compiler does not know that tiles touch memory
        for (int r = 0; r < rows; r += 32) {
            const bool two = r + 16 < rows;
            float* to = c + r * COLUMNS;
            if constexpr (ADD) {
                _tile_loadd(0, to, line); _tile_loadd(1, to + 16, line);
                if (two) { _tile_loadd(2, to + 16 * COLUMNS, line); _tile_loadd(3, to + 16 * COLUMNS + 16, line); }
            } else {
                _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            }
            for (int k = 0; k < n; k += 16) {
                _tile_loadd(6, b + k * COLUMNS, line); _tile_loadd(7, b + k * COLUMNS + 16, line);
                _tile_loadd(4, a + r * row + k, row * 4);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
                if (two) {
                    _tile_loadd(5, a + (r + 16) * row + k, row * 4);
                    _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, to, line); _tile_stored(1, to + 16, line);
            if (two) { _tile_stored(2, to + 16 * COLUMNS, line); _tile_stored(3, to + 16 * COLUMNS + 16, line); }
        }
        asm volatile("" ::: "memory");
    }
#else
    static void begin() {}
    static void end() {}
    static void times(pair x, const pair* y, vf (&acc)[2]) {
        for (int i = 0; i < 2; i++)
            acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)_mm512_set1_epi32(x), (__m512bh)_mm512_loadu_si512(y + i * 16));
    }
    template <bool ADD> static void product(const pair* a, long row, int rows, const pair* b, int n, float* c) {
        kvc::product<ADD>(a, row, 1, rows, b, n, c, times);
    }
#endif
    // Gives the logits of a whole block to each(token, its logits, the next one's).
    template <class Each> static void logits_each(const Block& block, const Query& query, [[maybe_unused]] float (*s)[COLUMNS], Each&& each) {
#if KVC_TILES
        for (int t = 0; t < PAGE; t += 32) {
            product<false>(block.k[t], WIDTH / 2, 32, query.x[0], WIDTH / 2, s[t]);
            for (int j = t; j < t + 32; j += 2) {
                vf a[2] = {load(s[j]), load(s[j] + 16)}, b[2] = {load(s[j + 1]), load(s[j + 1] + 16)};
                each(j, a, b);
            }
        }
#else
        product_each(block.k[0], WIDTH / 2, PAGE, query.x[0], WIDTH / 2, times, each);
#endif
    }
    static void logits(const Block& block, int tokens, const Query& query, float (*out)[COLUMNS]) {
        product<false>(block.k[0], WIDTH / 2, (tokens + 31) / 32 * 32, query.x[0], WIDTH / 2, out[0]);
    }
    static void add(const Block& block, int tokens, const Weights& p, float (*o)[COLUMNS]) {
        product<true>(block.v[0], PAGE / 2, DV, p.x[0], (tokens + 31) / 32 * 16, o[0]);
    }
};
template <class T, int DK, int DV> using Products = std::conditional_t<std::is_same_v<T, bf16>, Pairs<DK, DV>, Plain<DK, DV>>;
#else
template <class T, int DK, int DV> using Products = Plain<DK, DV>;
#endif

}  // namespace kvc
