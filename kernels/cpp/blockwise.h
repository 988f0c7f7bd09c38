// Causal attention of many queries over what is stored and over the call's own tokens, exactly.
//
// A work unit is up to 8 query heads of a (row, kv head) and TB of the row's tokens: 32 queries
// abreast in vectors, keys by blocks of 128, of which one is decoded at a time for all of them.
#include <memory>
namespace kvc {

template <class C> struct Unit {  // queries in columns of 32: neighbouring tokens of one head
    static constexpr int chunks = (C::G + 7) / 8;
    static constexpr int heads = (C::G + chunks - 1) / chunks;
    static constexpr int columns = heads <= 4 ? 4 : heads <= 6 ? 2 : 1;  // of a head
    static constexpr int tokens = columns * COLUMNS, all = heads * columns;
    using Product = Products<typename C::T, C::DK, C::DV>;

    typename Product::Block block;
    typename Product::Query q[all];
    typename Product::Weights p;
    alignas(64) float s[PAGE][COLUMNS];
    alignas(64) float o[all][C::DV][COLUMNS], m[all][COLUMNS], l[all][COLUMNS];
};

constexpr float LOWEST = -1e30f;  // a maximum of nothing

// What a block's tokens [from, to) are to the queries: number = base + place in the block.
struct Part { long base; int from, to; };

// `rows` of the page for places [from, to), whose ends may lie inside a group of 16.
template <class Reader, int D> inline void read_rows(const Tier& tier, long page, int from, int to, float (*out)[D]) {
    Reader reader(tier.plane, page);
    if (from % 16 == 0) {
        reader.rows(from / 16, (to + 15) / 16, out);
        return;
    }
    alignas(64) float some[PAGE][D];
    reader.rows(from / 16, (to + 15) / 16, some);
    std::memcpy(out[from], some[from], (to - from) * sizeof(out[0]));
}

template <class C> inline Part stored_part(const Span<C>& at, long block, bool sinks) {
    const long base = block * PAGE;
    if (sinks) return {base, (int)(std::max(at.low, base) - base), (int)(std::min({at.count, (long)C::SINKS, base + PAGE}) - base)};
    return {C::SINKS + base, (int)(std::max(at.first, base) - base), (int)(std::min(at.queued, base + PAGE) - base)};
}

// K and V of a block's part, decoded: tokens of the body, then those of the recent tier.
template <class C> inline void stored_rows(const typename C::Tiers& tiers, const Span<C>& at, long place, long block, bool sinks,
                                           const Part& part, float (*k)[C::DK], float (*v)[C::DV]) {
    auto read = [&](auto* reader, const Tier& tier, long ring, int from, int to, auto* out) {
        using Reader = std::remove_pointer_t<decltype(reader)>;
        if constexpr (!std::is_same_v<Reader, None>)
            if (from < to) read_rows<Reader>(tier, tier.table[place * tier.pages + (ring ? block % ring : block)], from, to, out);
    };
    const int from = part.from / 16 * 16;
    if (sinks) {
        read((typename C::KSinks*)nullptr, tiers.k_sinks, 0, from, part.to, k);
        read((typename C::VSinks*)nullptr, tiers.v_sinks, 0, from, part.to, v);
        return;
    }
    auto end = [&](long number) { return (int)std::min<long>(std::max<long>(number - block * PAGE, part.from), part.to); };
    const int end_k = end(at.end_k), end_v = end(at.end_v);
    auto start = [&](int end) { return end == part.from ? from : end; };
    if (end_k > part.from) read((typename C::KBody*)nullptr, tiers.k_body, C::K_BODY_RING, from, end_k, k);
    if (end_v > part.from) read((typename C::VBody*)nullptr, tiers.v_body, C::V_BODY_RING, from, end_v, v);
    if (end_k < part.to) read((typename C::KRecent*)nullptr, tiers.k_recent, C::K_RECENT_RING, start(end_k), part.to, k);
    if (end_v < part.to) read((typename C::VRecent*)nullptr, tiers.v_recent, C::V_RECENT_RING, start(end_v), part.to, v);
}

// Weights of the logits in u.s and the column's move to its new maxima. Token `first + lane` of the
// column sees numbers up to its own and, with a window, the last ones only.
template <class C> inline void weigh_columns(Unit<C>& u, int column, long first, const Part& part) {
    constexpr float scale = C::SOFTCAP != 0.0f ? 1.0f : SCALE<C>;
    const int whole = (part.to + 31) / 32 * 32;
    float (*s)[COLUMNS] = u.s;
    if constexpr (C::SOFTCAP != 0.0f) {  // tanh x = 1 - 2 / (1 + e^2x)
        const vf to = set(2.0f * LOG2E * C::SCALE / C::SOFTCAP), one = set(1.0f), two = set(2.0f);
        const vf top = set(126.0f), low = set(-126.0f), unit = set(C::SOFTCAP * LOG2E);
        for (int t = 0; t < part.to; t++) for (int i = 0; i < COLUMNS; i += 16) {
            vf x = load(s[t] + i) * to;
            x = below(x, top, below(x, low, low, x), top);
            vf e = exp2<false>(set(0.0f) - magnitude(x));  // of |x|, so that 2^x is at most 1
            vf y = (one - two * e / (one + e)) * unit;
            store(s[t] + i, below(x, set(0.0f), set(0.0f) - y, y));
        }
    }
    long behind = C::SEEN ? C::SEEN : INT64_MAX / 2;
    if (part.from > 0 || part.base + part.to - 1 > first || part.base + part.from <= first + COLUMNS - 1 - behind) {
        const float nothing = -INFINITY;
        for (int i = 0; i < COLUMNS; i++) {
            int high = (int)std::min<long>(std::max<long>(first + i + 1 - part.base, 0), part.to);
            int low = (int)std::min<long>(std::max<long>(first + i + 1 - behind - part.base, part.from), part.to);
            for (int t = 0; t < low; t++) s[t][i] = nothing;
            for (int t = high; t < part.to; t++) s[t][i] = nothing;
        }
    }
    vf most[2][2], total[2], at[2];
    for (int i = 0; i < 2; i++) most[i][0] = most[i][1] = load(s[0] + i * 16);
    for (int t = 1; t < part.to; t++)
        for (int i = 0; i < 2; i++) most[i][t & 1] = max(most[i][t & 1], load(s[t] + i * 16));
    bool moved = false;
    alignas(64) float keep[COLUMNS];
    for (int i = 0; i < 2; i++) {
        vf before = load(u.m[column] + i * 16);
        at[i] = max(before, max(most[i][0], most[i][1]) * set(scale));
        store(u.m[column] + i * 16, at[i]);
        vf change = before - at[i];
        moved |= peak(set(0.0f) - change) > 0.0f;
        store(keep + i * 16, exp2<false>(change));
        total[i] = set(0.0f);
        at[i] = set(0.0f) - at[i];
    }
    const vf unit = set(scale);
    int t = 0;
    for (; t + 2 <= part.to; t += 2) {
        vf a[2], b[2];
        for (int i = 0; i < 2; i++) {
            a[i] = weight<C::ROUGH>(fma(load(s[t] + i * 16), unit, at[i]));
            b[i] = weight<C::ROUGH>(fma(load(s[t + 1] + i * 16), unit, at[i]));
            total[i] = total[i] + (a[i] + b[i]);
        }
        Unit<C>::Product::weights(u.p, t, a, b);
    }
    const vf none[2] = {set(0.0f), set(0.0f)};
    if (t < part.to) {
        vf a[2];
        for (int i = 0; i < 2; i++) {
            a[i] = weight<C::ROUGH>(fma(load(s[t] + i * 16), unit, at[i]));
            total[i] = total[i] + a[i];
        }
        Unit<C>::Product::weights(u.p, t, a, none);
        t += 2;
    }
    for (; t < whole; t += 2) Unit<C>::Product::weights(u.p, t, none, none);
    for (int i = 0; i < 2; i++)
        store(u.l[column] + i * 16, fma(load(u.l[column] + i * 16), load(keep + i * 16), total[i]));
    if (moved)
        for (int i = 0; i < 2; i++) {
            vf factor = load(keep + i * 16);
            for (int d = 0; d < C::DV; d++) store(u.o[column][d] + i * 16, load(u.o[column][d] + i * 16) * factor);
        }
}

// Logits and weights of a whole block that all of the column sees, at once: weights are of the maxima
// so far, which they may exceed 2^60 times. False, and nothing done, where one does by more.
template <class C> inline bool weigh_block(Unit<C>& u, int column) {
    const vf unit = set(SCALE<C>);
    vf at[2], most[2], total[2];
    for (int i = 0; i < 2; i++) {
        at[i] = set(0.0f) - load(u.m[column] + i * 16);
        most[i] = total[i] = set(0.0f);
    }
    auto weights = [&](vf (&x)[2]) {
        for (int i = 0; i < 2; i++) {
            x[i] = fma(x[i], unit, at[i]);
            most[i] = max(most[i], x[i]);
            x[i] = weight<C::ROUGH>(x[i]);
            total[i] = total[i] + x[i];
        }
    };
    Unit<C>::Product::logits_each(u.block, u.q[column], u.s, [&](int t, vf (&a)[2], vf (&b)[2]) {
        weights(a);
        weights(b);
        Unit<C>::Product::weights(u.p, t, a, b);
    });
    if (peak(max(most[0], most[1])) > 60.0f) return false;
    for (int i = 0; i < 2; i++) store(u.l[column] + i * 16, load(u.l[column] + i * 16) + total[i]);
    return true;
}

// q, k, v and out by (row, head, token); `tiers`, `count` where something is stored.
template <class C, class Q, class K, class V, class Out>
void blockwise(const typename C::Tiers& tiers, const int32_t* count, const bool* valid, const float* sinks, long batch, long tokens,
               Q q_at, K k_at, V v_at, Out out_at) {
    using U = Unit<C>;
    using Product = typename U::Product;
    std::vector<std::vector<long>> kept(batch);  // of every row: the columns that are tokens
    struct Job { long b, h, start; };
    std::vector<Job> jobs;
    for (long b = 0; b < batch; b++) {
        for (long t = 0; t < tokens; t++)
            if (valid[b * tokens + t]) kept[b].push_back(t);
    }
    for (long start = (tokens - 1) / U::tokens * U::tokens; start >= 0; start -= U::tokens)  // long ones first
        for (long b = 0; b < batch; b++)
            for (long h = 0; h < C::H * U::chunks && start < (long)kept[b].size(); h++) jobs.push_back({b, h, start});
    auto run = [&](const Job& job, U& u) {
        const long b = job.b, h = job.h / U::chunks, place = b * C::H + h, n = kept[b].size();
        const int head = (int)(job.h % U::chunks) * U::heads, heads = std::min(U::heads, C::G - head);
        const long* at = kept[b].data();
        const int own = (int)std::min<long>(U::tokens, n - job.start);
        const int used = (own + COLUMNS - 1) / COLUMNS;  // columns of a head that hold queries
        for (int g = 0; g < heads; g++) for (int c = 0; c < used; c++) {
            alignas(64) float rows[COLUMNS][C::DK];
            for (int i = 0; i < COLUMNS; i++) {
                const auto* q = q_at(b, h * C::G + head + g, at[job.start + std::min(c * COLUMNS + i, own - 1)]);
                for (int d = 0; d < C::DK; d += 16) store(rows[i] + d, load(q + d));
            }
            const int column = g * U::columns + c;
            Product::pack(u.q[column], rows);
            std::memset(u.o[column], 0, sizeof(u.o[column]));
            for (int i = 0; i < COLUMNS; i++) u.m[column][i] = LOWEST, u.l[column][i] = 0.0f;
        }
        long past = 0;
        auto attend = [&](const Part& part) {
            Product::pack(u.block, part.to);
            for (int g = 0; g < heads; g++) for (int c = 0; c < used; c++) {
                const long first = past + job.start + c * COLUMNS;
                if (part.base + part.from > first + COLUMNS - 1) continue;
                if (C::SEEN && part.base + part.to - 1 <= first - C::SEEN) continue;
                const int column = g * U::columns + c;
                const bool whole = part.to - part.from == PAGE && part.base + PAGE - 1 <= first
                    && (!C::SEEN || part.base > first + COLUMNS - 1 - C::SEEN);
                if (C::SOFTCAP != 0.0f || !whole || u.m[column][0] == LOWEST || !weigh_block(u, column)) {
                    const int to = (int)std::min<long>(part.to, first + COLUMNS - part.base);
                    Product::logits(u.block, to, u.q[column], u.s);
                    weigh_columns(u, column, first, {part.base, part.from, to});
                    Product::add(u.block, to, u.p, u.o[column]);
                } else {
                    Product::add(u.block, PAGE, u.p, u.o[column]);
                }
            }
        };
        if constexpr (C::STORED) {
            past = count[place];
            Span<C> span(past);
            auto stored = [&](long block, bool sink) {
                Part part = stored_part<C>(span, block, sink);
                if (part.from >= part.to) return;
                Product::fill(u.block, part.from, part.to, [&](float (*k)[C::DK], float (*v)[C::DV]) {
                    stored_rows<C>(tiers, span, place, block, sink, part, k, v);
                });
                attend(part);
            };
            for (long i = 0; i < span.sink_blocks(); i++) stored(i, true);
            for (long i = 0; i < span.blocks(); i++) stored(span.first / PAGE + i, false);
        }
        const long low = C::SEEN ? std::max(0L, job.start - C::SEEN + 1) / PAGE * PAGE : 0;
        for (long base = low; base < job.start + own; base += PAGE) {
            const int to = (int)std::min<long>(PAGE, job.start + own - base);
            for (int t = 0; t < to; t++) Product::put(u.block, t, k_at(b, h, at[base + t]), v_at(b, h, at[base + t]));
            attend({past + base, 0, to});
        }
        for (int g = 0; g < heads; g++) for (int c = 0; c < used; c++) {
            const int column = g * U::columns + c;
            float factor[COLUMNS];
            for (int i = 0; i < COLUMNS; i++) {
                float l = u.l[column][i], m = u.m[column][i];
                if (C::HAS_SINKS) {
                    float sink = sinks[h * C::G + head + g] * LOG2E, top = std::max(m, sink);
                    factor[i] = std::exp2(m - top) / (l * std::exp2(m - top) + std::exp2(sink - top));
                } else {
                    factor[i] = 1.0f / l;
                }
            }
            for (int d = 0; d < C::DV; d += 16) for (int i = 0; i < COLUMNS; i += 16) {
                vf x[16];
                for (int j = 0; j < 16; j++) x[j] = load(u.o[column][d + j] + i);
                transpose(x);
                for (int j = 0; j < 16 && c * COLUMNS + i + j < own; j++) {
                    alignas(64) float o[16];
                    store(o, x[j] * set(factor[i + j]));
                    auto* out = out_at(b, h * C::G + head + g, at[job.start + c * COLUMNS + i + j]);
                    for (int e = 0; e < 16; e++) write(out + d + e, o[e]);
                }
            }
        }
    };
#pragma omp parallel num_threads(C::THREADS)
    {
        Product::begin();
        std::unique_ptr<U> u(new U);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < (long)jobs.size(); i++) run(jobs[i], *u);
        Product::end();
    }
    for (long b = 0; b < batch; b++)
        for (long t = 0; t < tokens; t++)
            for (int g = 0; g < C::H * C::G && !valid[b * tokens + t]; g++) {
                auto* out = out_at(b, g, t);
                for (int d = 0; d < C::DV; d++) write(out + d, 0.0f);
            }
}

}  // namespace kvc
