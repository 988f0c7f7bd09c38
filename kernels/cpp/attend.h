// Attention of one query per row over a store's tiers and over the query's own token.
//
// A work unit is a block of 128 token numbers of one (row, kv head): all units are split evenly
// over the threads, so that few heads use all cores; a thread's results for a head are partial
// softmaxes, merged by their log-sum-exps.
namespace kvc {

// The closed form of the count (kvcompile/store.py): which numbers are in which tier.
template <class C> struct Span {
    long count, queued, first, end_k, end_v, low;

    explicit Span(long n) : count(n) {
        queued = std::max(0L, n - C::SINKS);
        first = C::WINDOW ? std::max(0L, n - C::SINKS - C::WINDOW) / C::GRAIN * C::GRAIN : 0;
        end_k = std::max(0L, queued - C::K_LAG) / C::K_BLOCK * C::K_BLOCK;
        end_v = std::max(0L, queued - C::V_LAG) / C::V_BLOCK * C::V_BLOCK;
        low = C::SEEN ? std::max(0L, n - C::SEEN + 1) : 0;   // the oldest number that is seen
        first = std::max(first, low - C::SINKS);
    }
    long sink_blocks() const { return C::SINKS && low < C::SINKS ? (std::min<long>(count, C::SINKS) + PAGE - 1) / PAGE : 0; }
    long blocks() const { return first < queued ? (queued + PAGE - 1) / PAGE - first / PAGE : 0; }
};

template <class Reader, class = void> constexpr bool turns = false;  // reads turned vectors
template <class Reader> constexpr bool turns<Reader, std::void_t<decltype(Reader::turned)>> = Reader::turned;

template <class C> struct State {  // of one head's queries: o is not yet divided by l
    static constexpr int TURNED = turns<typename C::VBody> ? C::DV : 0;
    float m[C::G], l[C::G];
    alignas(64) float o[C::G][C::DV];
    alignas(64) float turned[C::G][TURNED ? TURNED : 1];  // what a turned body adds
    void clear() {
        for (int g = 0; g < C::G; g++) m[g] = -INFINITY, l[g] = 0.0f;
        std::memset(o, 0, sizeof(o));
        std::memset(turned, 0, sizeof(turned));
    }
    void finish() {
        if constexpr (TURNED)
            for (int g = 0; g < C::G; g++) {
                C::VBody::turn(turned[g]);
                for (int d = 0; d < C::DV; d++) o[g][d] += turned[g][d];
            }
    }
};

template <class C> constexpr bool k_turns = turns<typename C::KBody> && !C::MADE;

template <class C> struct Queries {  // of one kv head, scaled
    alignas(64) float q[C::G][C::DQ];
    alignas(64) float turned[C::G][k_turns<C> ? C::DK : 1];
    float peak[C::G], turned_peak[C::G];  // largest magnitudes
};

struct Page { long number, ahead; };  // and how many further the next one lies that will be read

template <class Reader, int R, bool ROUGH>
inline void read_logits(const Tier& tier, const Page& page, const float* const* q, const float* peaks, int from, int to, float (*out)[PAGE]) {
    Reader reader(tier.plane, page.number);
    look_ahead(reader, page.ahead);
    if (from % 16 == 0) {
        reader.template logits<R, ROUGH>(q, peaks, from / 16, (to + 15) / 16, out);
        return;
    }
    alignas(64) float some[R][PAGE];
    reader.template logits<R, ROUGH>(q, peaks, from / 16, (to + 15) / 16, some);
    for (int r = 0; r < R; r++) std::memcpy(out[r] + from, some[r] + from, (to - from) * sizeof(float));
}

template <class Reader, int R, bool ROUGH, int D>
inline void add_values(const Tier& tier, const Page& page, const float (*p)[PAGE], const float* share, int from, int to, bool whole, float (*o)[D]) {
    Reader reader(tier.plane, page.number);
    look_ahead(reader, page.ahead);
    if (whole) {
        reader.template add<R, ROUGH>(p, share, from / 16, (to + 15) / 16, o);
        return;
    }
    alignas(64) float some[R][PAGE] = {};
    for (int r = 0; r < R; r++) std::memcpy(some[r] + from, p[r] + from, (to - from) * sizeof(float));
    reader.template add<R, ROUGH>(some, share, from / 16, (to + 15) / 16, o);
}

// Logits are in units of ln 2, so that weights are powers of two.
constexpr float LOG2E = 1.44269504088896341f;
template <class C> constexpr float SCALE = C::SOFTCAP != 0.0f ? C::SCALE : C::SCALE * LOG2E;
template <class C> inline float capped(float x) { return C::SOFTCAP * std::tanh(x / C::SOFTCAP) * LOG2E; }

// The logits of one kv head by token number, where the weights that they become are asked for.
template <class C> struct Mass {
    float* logits;  // [G][places]; null: not asked for
    long places;

    void keep(const float (*x)[PAGE], int from, int to, int row, int rows, long number) const {
        if constexpr (C::MASS)
            for (int r = 0; r < rows; r++) std::memcpy(logits + (row + r) * places + number + from, x[r] + from, (to - from) * sizeof(float));
    }
    // their sum over the heads, given each head's log2-sum-exp; `count` tokens
    void sum(const float* lse, long count, float* out) const {
        long t = 0;
        for (; t + 16 <= count; t += 16) {
            vf s = set(0.0f);
            for (int g = 0; g < C::G; g++) s = s + exp2<false>(load(logits + g * places + t) - set(lse[g]));
            store(out + t, s);
        }
        for (; t < count; t++) {
            out[t] = 0.0f;
            for (int g = 0; g < C::G; g++) out[t] += std::exp2(logits[g * places + t] - lse[g]);
        }
    }
};

// Softmax weights of the logits x[.. [from, to)] relative to the largest of them, what they count
// beside those of other blocks (`share`), and the state's move to the new maximum.
template <class C, int R>
inline void weigh(float (*x)[PAGE], int from, int to, State<C>& s, int row, float* share, const Mass<C>& mass, long number) {
    int low = from / 16 * 16, high = (to + 15) / 16 * 16;
    alignas(64) float kept[16] = {}, own[16] = {}, sums[16];
    vf most[R], at[R], total[R];
    for (int r = 0; r < R; r++) {
        for (int t = low; t < from; t++) x[r][t] = -INFINITY;
        for (int t = to; t < high; t++) x[r][t] = -INFINITY;
        if (C::SOFTCAP != 0.0f)
            for (int t = from; t < to; t++) x[r][t] = capped<C>(x[r][t]);
        most[r] = load(x[r] + low);
    }
    mass.keep(x, from, to, row, R, number);
    for (int t = low + 16; t < high; t += 16)
        for (int r = 0; r < R; r++) most[r] = max(most[r], load(x[r] + t));
    for (int r = 0; r < R; r++) {
        float m = peak(most[r]), before = s.m[row + r];
        at[r] = set(m);
        total[r] = set(0.0f);
        s.m[row + r] = std::max(m, before);
        kept[r] = before - s.m[row + r];
        own[r] = m - s.m[row + r];
    }
    for (int t = low; t < high; t += 16)
        for (int r = 0; r < R; r++) {
            vf p = exp2<C::ROUGH>(load(x[r] + t) - at[r]);
            store(x[r] + t, p);
            total[r] = total[r] + p;
        }
    for (int r = 0; r < R; r++) sums[r] = sum(total[r]);
    store(kept, exp2<false>(load(kept)));
    store(own, exp2<false>(load(own)));
    for (int r = 0; r < R; r++) {
        share[r] = own[r];
        s.l[row + r] = s.l[row + r] * kept[r] + own[r] * sums[r];
        if (kept[r] == 1.0f) continue;
        vf factor = set(kept[r]);
        for (int d = 0; d < C::DV; d += 16) store(s.o[row + r] + d, load(s.o[row + r] + d) * factor);
        for (int d = 0; d < State<C>::TURNED; d += 16)
            store(s.turned[row + r] + d, load(s.turned[row + r] + d) * factor);
    }
}

// Logits of a tier's tokens, the first of the page at `number`; keys are made if they have to be.
template <class C, class Reader, int R, int ROW>
inline void tier_logits(const Tier& tier, const Page& page, const Making<C>& making, long number, const float* const* q, const float* peaks, int from, int to, float (*out)[PAGE]) {
    if constexpr (C::MADE) made_logits<C, Reader, R, ROW>(tier, page.number, making, number, q, from, to, out);
    else read_logits<Reader, R, C::ROUGH>(tier, page, q, peaks, from, to, out);
}

template <class C, int R, int ROW>
inline void rows(const typename C::Tiers& tiers, const Span<C>& at, long place, long block, bool sinks,
                 const Queries<C>& query, State<C>& s, const Mass<C>& mass, const Making<C>& making) {
    alignas(64) float x[R][PAGE];
    float share[R];
    const float *q[R], *body[R], *peaks = query.peak + ROW;
    const float* body_peaks = k_turns<C> ? query.turned_peak + ROW : peaks;
    for (int r = 0; r < R; r++) {
        q[r] = query.q[ROW + r];
        body[r] = k_turns<C> ? query.turned[ROW + r] : q[r];
    }
    long base = block * PAGE;
    auto id = [&](const Tier& tier, long ring) {
        const int32_t* table = tier.table + place * tier.pages;
        long own = ring ? block % ring : block, then = ring ? (block + 1) % ring : block + 1;
        bool more = base + PAGE < at.queued && then < tier.pages;
        return Page{table[own], more ? (long)table[then] - table[own] : 0};
    };
    if (sinks) {
        if constexpr (C::SINKS > 0) {
            int from = (int)(std::max(at.low, base) - base), to = (int)(std::min({at.count, (long)C::SINKS, base + PAGE}) - base);
            if (from >= to) return;
            tier_logits<C, typename C::KSinks, R, ROW>(tiers.k_sinks, id(tiers.k_sinks, 0), making, base + making.shift, q, peaks, from / 16 * 16, to, x);
            weigh<C, R>(x, from, to, s, ROW, share, mass, base);
            add_values<typename C::VSinks, R, C::ROUGH>(tiers.v_sinks, id(tiers.v_sinks, 0), x, share, from, to, true, s.o + ROW);
        }
        return;
    }
    int from = (int)(std::max(at.first, base) - base), to = (int)(std::min(at.queued, base + PAGE) - base);
    int k = (int)std::min<long>(std::max<long>(at.end_k - base, from), to);
    int v = (int)std::min<long>(std::max<long>(at.end_v - base, from), to);
    if constexpr (!std::is_same_v<typename C::KBody, None>)
        if (from < k) tier_logits<C, typename C::KBody, R, ROW>(tiers.k_body, id(tiers.k_body, C::K_BODY_RING), making, C::SINKS + base, body, body_peaks, from / 16 * 16, k, x);
    if constexpr (!std::is_same_v<typename C::KRecent, None>)
        if (k < to) tier_logits<C, typename C::KRecent, R, ROW>(tiers.k_recent, id(tiers.k_recent, C::K_RECENT_RING), making, C::SINKS + base, q, peaks, k == from ? from / 16 * 16 : k, to, x);
    weigh<C, R>(x, from, to, s, ROW, share, mass, C::SINKS + base);
    bool cut = v % 16 != 0 && from < v && v < to;
    if constexpr (!std::is_same_v<typename C::VBody, None>)
        if (from < v) {
            if constexpr (turns<typename C::VBody>)
                add_values<typename C::VBody, R, C::ROUGH>(tiers.v_body, id(tiers.v_body, C::V_BODY_RING), x, share, from, v, !cut, s.turned + ROW);
            else
                add_values<typename C::VBody, R, C::ROUGH>(tiers.v_body, id(tiers.v_body, C::V_BODY_RING), x, share, from, v, !cut, s.o + ROW);
        }
    if constexpr (!std::is_same_v<typename C::VRecent, None>)
        if (v < to) add_values<typename C::VRecent, R, C::ROUGH>(tiers.v_recent, id(tiers.v_recent, C::V_RECENT_RING), x, share, v, to, !cut, s.o + ROW);
}

// At most 8 queries share a decoded vector: more would spill registers.
template <class C, int ROW = 0>
inline void block_of(const typename C::Tiers& tiers, const Span<C>& at, long place, long block, bool sinks,
                     const Queries<C>& query, State<C>& s, const Mass<C>& mass, const Making<C>& making) {
    if constexpr (ROW < C::G) {
        constexpr int chunks = (C::G + 7) / 8, most = (C::G + chunks - 1) / chunks;
        constexpr int r = C::G - ROW < most ? C::G - ROW : most;
        rows<C, r, ROW>(tiers, at, place, block, sinks, query, s, mass, making);
        block_of<C, ROW + r>(tiers, at, place, block, sinks, query, s, mass, making);
    }
}

// `making_at(b, h)` is what the keys of a row's kv head are made of.
template <class C, class T, class Q, class K, class V, class Out, class M>
void attend(const typename C::Tiers& tiers, const int32_t* count, const bool* valid, const float* sinks, long batch,
            float* mass, long mass_places, Q q_at, K k_at, V v_at, Out out_at, float* lse_to, M making_at) {
    const long places = batch * C::H;
    long total = 0;
    for (long i = 0; i < places; i++) {
        Span<C> at(count[i]);
        if (valid[i / C::H]) total += at.sink_blocks() + at.blocks();
    }
    const int threads = (int)std::max(1L, std::min((long)C::THREADS, total / 2));
    static thread_local std::vector<State<C>> scratch;
    scratch.resize(places * threads);
    State<C>* partial = scratch.data();
    static thread_local std::vector<float> kept;  // logits, by place, head and number
    if (C::MASS) kept.resize(places * C::G * mass_places);
    auto mass_of = [&, logits = kept.data()](long i) { return Mass<C>{logits + i * C::G * mass_places, mass_places}; };
    auto read_queries = [&](long i, Queries<C>& query) {
        for (int g = 0; g < C::G; g++) {
            const T* q = q_at(i / C::H, i % C::H * C::G + g);
            for (int d = 0; d < C::DQ; d++) query.q[g][d] = read(q + d) * SCALE<C>;
            if constexpr (k_turns<C>) {
                std::memcpy(query.turned[g], query.q[g], sizeof(query.q[g]));
                C::KBody::turn(query.turned[g]);
                query.turned_peak[g] = largest_of(query.turned[g], C::DK);
            }
            if constexpr (!C::MADE) query.peak[g] = largest_of(query.q[g], C::DK);
        }
    };
    auto made_of = [&](long i) {
        Making<C> making = making_at(i / C::H, i % C::H);
        if constexpr (C::SHIFTED) making.shift = std::max(0L, count[i] - C::SINKS - C::WINDOW) / C::GRAIN * C::GRAIN;
        return making;
    };
    auto work = [&](int thread) {
        long from = total * thread / threads, to = total * (thread + 1) / threads, unit = 0;
        for (long i = 0; i < places; i++) {
            State<C>& s = partial[i * threads + thread];
            Span<C> at(count[i]);
            long sink = at.sink_blocks(), own = valid[i / C::H] ? sink + at.blocks() : 0;
            long start = std::max(from, unit) - unit, end = std::min(to, unit + own) - unit;
            unit += own;
            if (start >= end) {
                for (int g = 0; g < C::G; g++) s.m[g] = -INFINITY;
                continue;
            }
            s.clear();
            Queries<C> query;
            read_queries(i, query);
            const Making<C> making = made_of(i);
            for (long b = start; b < end; b++)
                block_of<C>(tiers, at, i, b < sink ? b : at.first / PAGE + b - sink, b < sink, query, s, mass_of(i), making);
            s.finish();
        }
    };
    auto merge = [&](long i) {
        alignas(64) float lse[C::G], own_mass = 0.0f;
        for (int g = 0; g < C::G; g++) {
            T* out = out_at(i / C::H, i % C::H * C::G + g);
            if (!valid[i / C::H]) {
                for (int d = 0; d < C::DV; d++) write(out + d, 0.0f);
                if (lse_to) lse_to[i * C::G + g] = -INFINITY;
                continue;
            }
            const T *q = q_at(i / C::H, i % C::H * C::G + g), *k = k_at(i / C::H, i % C::H), *v = v_at(i / C::H, i % C::H);
            float own = 0.0f;
            if constexpr (C::MADE) {
                alignas(64) static thread_local float stored[C::DK], key[C::DQ];
                for (int d = 0; d < C::DK; d++) stored[d] = read(k + d);
                made_of(i).one(g / (C::G / C::KEYS), stored, count[i], key);
                for (int d = 0; d < C::DQ; d++) own += read(q + d) * SCALE<C> * key[d];
            } else {
                for (int d = 0; d < C::DK; d++) own += read(q + d) * SCALE<C> * read(k + d);
            }
            if (C::SOFTCAP != 0.0f) own = capped<C>(own);
            float sink = C::HAS_SINKS ? sinks[i % C::H * C::G + g] * LOG2E : -INFINITY;
            float m = std::max(own, sink);
            for (int t = 0; t < threads; t++) m = std::max(m, partial[i * threads + t].m[g]);
            alignas(64) float o[C::DV];
            float weight = std::exp2(own - m), l = weight + std::exp2(sink - m);
            for (int d = 0; d < C::DV; d++) o[d] = weight * read(v + d);
            for (int t = 0; t < threads; t++) {
                const State<C>& s = partial[i * threads + t];
                if (s.m[g] == -INFINITY) continue;
                float share = std::exp2(s.m[g] - m);
                l += share * s.l[g];
                for (int d = 0; d < C::DV; d++) o[d] += share * s.o[g][d];
            }
            for (int d = 0; d < C::DV; d++) write(out + d, o[d] / l);
            lse[g] = m + std::log2(l);
            if (lse_to) lse_to[i * C::G + g] = lse[g] / LOG2E;
            own_mass += weight / l;
        }
        if constexpr (C::MASS) {
            float* to = mass + i * mass_places;
            long held = valid[i / C::H] ? count[i] : 0;
            if (held) mass_of(i).sum(lse, held, to);
            if (valid[i / C::H]) to[held++] = own_mass;
            std::fill(to + held, to + mass_places, 0.0f);
        }
    };
    if (threads == 1) {
        work(0);
        for (long i = 0; i < places; i++) merge(i);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        if (omp_get_num_threads() == threads) {
            work(omp_get_thread_num());
        } else {
#pragma omp for
            for (int t = 0; t < threads; t++) work(t);
        }
#pragma omp barrier
#pragma omp for
        for (long i = 0; i < places; i++) merge(i);
    }
}

}  // namespace kvc
