// Dropping tokens that are stored by themselves: the last ones take the places of those that leave.
#include <limits>
#include <vector>
namespace kvc {

// What is known of the tokens of one (layer, row, head): `page` tokens of it lie in a page.
template <long page> struct Known {
    const int32_t *table, *position_pool;
    const float* score_pool;

    template <class T> void read(const T* pool, long count, T* out) const {
        for (long n = 0; n < count; n += page) std::memcpy(out + n, pool + table[n / page] * page, sizeof(T) * std::min(page, count - n));
    }
    void write(long count, const float* score) const {
        for (long n = 0; n < count; n += page)
            std::memcpy(const_cast<float*>(score_pool) + table[n / page] * page, score + n, sizeof(float) * std::min(page, count - n));
    }
    void arrived(long number, int64_t position) const {
        const_cast<int32_t*>(position_pool)[table[number / page] * page + number % page] = (int32_t)position;
    }
};

// In a page LANES tokens lie interleaved in front of their last REST numbers, of NUMBERS.
template <long page, long SIZE, long NUMBERS, long LANES, long REST> inline void move_token(const void* pool, const int32_t* table, long to, long from) {
    auto at = [&](long n) {
        long block = table[n / page] * (page / LANES) + n % page / LANES;
        return (char*)pool + SIZE * (block * NUMBERS * LANES + n % LANES * REST);
    };
    char *out = at(to), *in = at(from);
    for (long e = 0; e < NUMBERS; e += REST, out += SIZE * LANES * REST, in += SIZE * LANES * REST) std::memcpy(out, in, SIZE * REST);
}

struct Limits {  // of a rule: tokens over the limit that are dropped together, protected ones
    long every, sinks, recent;
    float share;  // of the limit that is protected as newest; negative: `recent` tokens
};

// Drops `over` tokens, at most those with a finite score, the lowest first and of equals the oldest;
// move(to, from) fills their places. How many were dropped.
template <class Move> inline long drop_tokens(const float* score, const int32_t* position, long count, long over, Move&& move) {
    static thread_local std::vector<long> order, gone;
    auto sooner = [&](long a, long b) { return score[a] != score[b] ? score[a] < score[b] : position[a] < position[b]; };
    order.clear();
    if (over == 1) {
        long first = -1;
        for (long n = 0; n < count; n++) if (std::isfinite(score[n]) && (first < 0 || sooner(n, first))) first = n;
        if (first >= 0) order.push_back(first);
    } else {
        for (long n = 0; n < count; n++) if (std::isfinite(score[n])) order.push_back(n);
        if (over < (long)order.size()) {
            std::nth_element(order.begin(), order.begin() + over, order.end(), sooner);
            order.resize(over);
        }
        std::sort(order.begin(), order.end());
    }
    gone.assign(order.begin(), order.end());
    long left = count - (long)gone.size(), tail = left, behind = 0;
    while (behind < (long)gone.size() && gone[behind] < left) behind++;  // the first that leaves the tail
    for (long hole = 0, next = behind; hole < behind; hole++, tail++) {
        while (next < (long)gone.size() && gone[next] == tail) next++, tail++;
        move(gone[hole], tail);
    }
    return (long)gone.size();
}

// Notes the new token of every head of a row, which has been counted, and drops what heads hold over
// their limits. `known`, `counts` and `limits` are the first head's; update(h, count, score) makes the
// scores of a head what they are after the step, and move(h, to, from) moves one of its tokens.
template <bool SHARED, long page, class Update, class Move>
inline void evict_row(const Known<page>& known, long pages, int32_t* counts, const int32_t* limits, long heads, int64_t position, Limits rule, Update&& update, Move&& move) {
    static thread_local std::vector<float> room;
    static thread_local std::vector<int32_t> positions;
    long wide = *std::max_element(counts, counts + heads);
    room.assign(heads * wide, 0.0f);
    auto of = [&](long h) { return Known<page>{known.table + h * pages, known.position_pool, known.score_pool}; };
    for (long h = 0; h < heads; h++) {
        float* score = room.data() + h * wide;
        of(h).read(known.score_pool, counts[h], score);
        of(h).arrived(counts[h] - 1, position);
        update(h, (long)counts[h], score);
        of(h).write(counts[h], score);
    }
    if constexpr (SHARED)
        for (long n = 0; n < wide; n++) {
            float sum = 0.0f;
            for (long h = 0; h < heads; h++) sum += room[h * wide + n];
            for (long h = 0; h < heads; h++) room[h * wide + n] = sum / (float)heads;
        }
    positions.resize(wide);
    for (long h = 0; h < heads; h++) {
        long count = counts[h], limit = limits[h], over = count - limit;
        if (over < rule.every) continue;
        float* score = room.data() + h * wide;
        of(h).read(known.position_pool, count, positions.data());
        long first = *std::min_element(positions.begin(), positions.begin() + count);
        long recent = rule.share < 0.0f ? rule.recent : (long)((float)limit * rule.share);
        for (long n = 0; n < count; n++)
            if (positions[n] > position - recent || positions[n] < first + rule.sinks) score[n] = std::numeric_limits<float>::infinity();
        counts[h] -= (int32_t)drop_tokens(score, positions.data(), count, over, [&](long to, long from) { move(h, to, from); });
    }
}

}  // namespace kvc
