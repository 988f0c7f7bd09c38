// Storing one token of every row and layer, and encoding the blocks that become complete.
// Every number is computed as the plain bodies compute it, so that the codes are the same bits.
namespace kvc {

inline half as_half(float x) { half h; write(&h, x); return h; }
inline half neighbour(half x, bool up) {  // the next fp16 number
    if ((x.bits & 0x7fff) == 0) return half{(uint16_t)(up ? 0x0001 : 0x8001)};
    return half{(uint16_t)(x.bits + (((x.bits & 0x8000) == 0) == up ? 1 : -1))};
}
inline half round_up(float x) {
    half near = as_half(x);
    if (read(&near) < x) near = neighbour(near, true);
    return near.bits > 0x7bff ? half{0x7bff} : near;
}

// fit(x, n, scale, low): how a group's scale (and low) follow from its numbers.
template <int BITS, uint32_t CUT> struct Asymmetric {
    static void fit(const float* x, int n, half& scale, half& low) {
        float least = x[0], most = x[0];
        for (int i = 1; i < n; i++) least = std::min(least, x[i]), most = std::max(most, x[i]);
        least = least + 0.0f, most = most + 0.0f;  // no -0
        if constexpr (CUT != 0) {
            float cut = (most - least) * as_float(CUT);
            least = least + cut, most = most - cut;
        }
        low = as_half(least);
        if (read(&low) > least) low = neighbour(low, false);
        float want = (most - read(&low)) / (float)((1 << BITS) - 1);
        scale = as_half(want);
        if (read(&scale) < want && want < 6.103515625e-05f) scale = neighbour(scale, true);
        if (scale.bits > 0x7bff) scale = half{0x7bff};
    }
};
inline float largest(const float* x, int n) {
    float most = 0.0f;
    for (int i = 0; i < n; i++) most = std::max(most, std::fabs(x[i]));
    return most;
}
template <int DIVISOR> struct Peak {
    static void fit(const float* x, int n, half& scale, half&) { scale = round_up(largest(x, n) / (float)DIVISOR); }
};
struct Middle {  // the range of the numbers becomes [-1, 1]
    static void fit(const float* x, int n, half& scale, half& low) {
        float least = x[0], most = x[0];
        for (int i = 1; i < n; i++) least = std::min(least, x[i]), most = std::max(most, x[i]);
        low = as_half((least + most) / 2.0f);
        scale = round_up(std::max(most - read(&low), read(&low) - least));
    }
};
template <int MOST> struct Power {
    static void fit(const float* x, int n, exponent& scale, exponent&) {
        float peak = largest(x, n);
        int e = 0;
        if (peak > 0.0f) {
            std::frexp(peak / (float)MOST, &e);
            if (std::ldexp((float)MOST, e - 1) >= peak) e--;
            e = std::min(std::max(e, -100), 120);
        }
        scale.bits = (int8_t)e;
    }
};
inline float number_of(half x) { return read(&x); }
inline float number_of(exponent x) { return std::ldexp(1.0f, x.bits); }

// of(x): the code of a number in units of the scale; value(code) as a reader's `values` have it.
template <class V> struct Code;
template <int BITS, int OFFSET> struct Code<Whole<BITS, OFFSET>> {
    explicit Code(const Whole<BITS, OFFSET>&) {}
    static uint8_t of(float x) {
        float y = std::nearbyint(x) + (float)OFFSET;
        return (uint8_t)std::min(std::max(y, 0.0f), (float)((1 << BITS) - 1));
    }
    static float value(int code) { return (float)(code - OFFSET); }
};
template <int BITS, uint32_t... NUMBERS> struct Code<Table<BITS, NUMBERS...>> {
    explicit Code(const Table<BITS, NUMBERS...>&) {}
    static uint8_t of(float x) {
        const uint32_t bits[16] = {NUMBERS...};
        int code = 0;
        for (int i = 0; i + 1 < (1 << BITS); i++) code += x > (as_float(bits[i]) + as_float(bits[i + 1])) / 2.0f;
        return (uint8_t)code;
    }
    static float value(int code) {
        const uint32_t bits[16] = {NUMBERS...};
        return as_float(bits[code]);
    }
};
template <int BITS, int START> struct Code<Given<BITS, START>> {
    const float* numbers;
    explicit Code(const Given<BITS, START>& values) : numbers(values.numbers) {}
    uint8_t of(float x) const {
        int code = 0;
        for (int i = 0; i + 1 < (1 << BITS); i++) code += x > (numbers[i] + numbers[i + 1]) / 2.0f;
        return (uint8_t)code;
    }
    float value(int code) const { return numbers[code]; }
};
template <int EXPONENT> struct Code<Float8<EXPONENT>> {
    explicit Code(const Float8<EXPONENT>&) {}
    static uint8_t of(float x) {
        constexpr int mantissa = 7 - EXPONENT, bias = (1 << (EXPONENT - 1)) - 1, drop = 23 - mantissa;
        constexpr float most = EXPONENT == 4 ? 448.0f : 57344.0f;
        x = std::min(std::max(x, -most), most);
        uint32_t all = as_bits(x), sign = all >> 31 << 7, size = all & 0x7fffffffu;
        if (size < (uint32_t)(128 - bias) << 23)  // subnormal: whole multiples of the smallest
            return (uint8_t)(sign | (uint32_t)std::nearbyint(as_float(size) * as_float((uint32_t)(126 + bias + mantissa) << 23)));
        size += (1u << (drop - 1)) - 1 + ((size >> drop) & 1u);
        return (uint8_t)(sign | ((size >> drop) - ((uint32_t)(127 - bias) << mantissa)));
    }
    static float value(int code) {
        constexpr int mantissa = 7 - EXPONENT, bias = (1 << (EXPONENT - 1)) - 1;
        int power = (code & 0x7f) >> mantissa, part = code & ((1 << mantissa) - 1);
        float size = power ? std::ldexp((float)(part + (1 << mantissa)), power - bias - mantissa)
                           : std::ldexp((float)part, 1 - bias - mantissa);
        return code & 0x80 ? -size : size;
    }
};

// Where the code of (token of a page, channel) lies: byte and shift.
template <bool K, int D, int BITS> inline long place_of(int token, int channel, int& shift) {
    constexpr int F = 8 / BITS;
    if constexpr (K) {
        constexpr int tile = 4 * F, tiles = (D + tile - 1) / tile;
        shift = channel % tile / 4 * BITS;
        return ((token / 16 * tiles + channel / tile) * 16 + token % 16) * 4 + channel % 4;
    } else {
        constexpr int tile = 16 * F, full = D / tile, rest = (D - full * tile) / F, bytes = full * 16 + rest;
        int in = channel % tile, lanes = channel < full * tile ? 16 : rest;
        shift = in / lanes * BITS;
        return (token / 4 * bytes + channel / tile * 16 + in % lanes) * 4 + token % 4;
    }
}

// Writes the tokens of whole steps into a page: x [n][D], the first is token `at` of the page.
// `decode` reads them back, where there is one, in the very bits that the plain body decodes.
template <bool K, int D, class V, class Fit, Axis AXIS, int GROUP, class S, bool LOW> struct CodedWriter {
    using Reader = std::conditional_t<K, CodedK<D, V, AXIS, GROUP, S, LOW>, CodedV<D, V, AXIS, GROUP, S, LOW>>;

    static float number(const Reader& reader, int token, int channel) {
        int shift;
        long byte = place_of<K, D, V::bits>(token, channel, shift);
        long scale = AXIS == channel_axis ? (long)token / GROUP * D + channel : (long)channel / GROUP * PAGE + token;
        float y = Code<V>(reader.values).value(reader.codes[byte] >> shift & ((1 << V::bits) - 1)) * number_of(reader.scale[scale]);
        if constexpr (LOW) y = y + number_of(reader.low[scale]);
        return y;
    }

    static void decode(const void* const* plane, long page, int at, float (*out)[D], int n) {
        Reader reader(plane, page);
        for (int t = 0; t < n; t++) for (int c = 0; c < D; c++) out[t][c] = number(reader, at + t, c);
    }

    static void write(const void* const* plane, long page, int at, const float (*x)[D], int n) {
        Reader reader(plane, page);
        const Code<V> code(reader.values);
        uint8_t* codes = const_cast<uint8_t*>(reader.codes);
        S *scales = const_cast<S*>(reader.scale), *lows = const_cast<S*>(reader.low);
        auto put = [&](int token, int channel, float value) {
            int shift;
            uint8_t* byte = codes + place_of<K, D, V::bits>(token, channel, shift);
            constexpr int mask = (1 << V::bits) - 1;
            *byte = (uint8_t)((*byte & ~(mask << shift)) | (code.of(value) << shift));
        };
        auto group = [&](const float* values, int count, long where, auto&& put_one) {
            S scale, low;
            Fit::fit(values, count, scale, low);
            scales[where] = scale;
            float unit = number_of(scale), base = 0.0f;
            if constexpr (LOW) lows[where] = low, base = number_of(low);
            if (unit == 0.0f) unit = 1.0f;
            for (int i = 0; i < count; i++) put_one(i, (values[i] - base) / unit);
        };
        if constexpr (AXIS == token_axis) {
            for (int t = 0; t < n; t++)
                for (int g = 0; g < D / GROUP; g++)
                    group(x[t] + g * GROUP, GROUP, g * PAGE + at + t, [&](int i, float y) { put(at + t, g * GROUP + i, y); });
        } else {
            for (int from = 0; from < n; from += GROUP)
                for (int c = 0; c < D; c++) {
                    float values[GROUP];
                    for (int t = 0; t < GROUP; t++) values[t] = x[from + t][c];
                    group(values, GROUP, (long)(at + from) / GROUP * D + c, [&](int t, float y) { put(at + from + t, c, y); });
                }
        }
    }
};

template <int D, class T> struct DenseWriter {
    static void write(const void* const* plane, long page, int at, const float (*x)[D], int n) {
        T* data = (T*)plane[0] + (page * PAGE + at) * D;
        for (int t = 0; t < n; t++) for (int d = 0; d < D; d++) kvc::write(data + t * D + d, x[t][d]);
    }

    static void decode(const void* const* plane, long page, int at, float (*out)[D], int n) {
        const T* data = (const T*)plane[0] + (page * PAGE + at) * D;
        for (int t = 0; t < n; t++) for (int d = 0; d < D; d++) out[t][d] = read(data + t * D + d);
    }
};

// How one side (K or V) is stored: the closed form of the count, as in `Span`.
template <long SINKS, long WINDOW, long GRAIN, long BLOCK, long LAG, long BODY_RING, long RECENT_RING> struct Queue {
    static constexpr long sinks = SINKS, block = BLOCK, body_ring = BODY_RING, recent_ring = RECENT_RING;
    static long first(long n) { return WINDOW ? std::max(0L, n - SINKS - WINDOW) / GRAIN * GRAIN : 0; }
    static long end(long n) { return std::max(0L, n - SINKS - LAG) / BLOCK * BLOCK; }
};

// tier.table points to the pages of one (layer, row, head); x to a token's DIM numbers in each of
// the MEMBERS layers that lie side by side there.
template <class Q, class Sinks, class Body, class Recent, int DIM, int MEMBERS, class T>
inline void append_one(const Tier& sinks, const Tier& body, const Tier& recent, long n, const T* const (&x)[MEMBERS]) {
    constexpr int D = DIM * MEMBERS;
    alignas(64) float token[1][D];
    for (int d = 0; d < D; d++) token[0][d] = read(x[d / DIM] + d % DIM);
    if constexpr (!std::is_same_v<Sinks, None>)
        if (n < Q::sinks) {
            Sinks::write(sinks.plane, sinks.table[n / PAGE], (int)(n % PAGE), token, 1);
            return;
        }
    long number = n - Q::sinks;
    auto page = [](const Tier& tier, long at, long ring) { return (long)tier.table[ring ? at / PAGE % ring : at / PAGE]; };
    if constexpr (!std::is_same_v<Body, None>) {
        long start = std::max(Q::end(n), Q::first(n + 1)), end = Q::end(n + 1);
        if (start < end) {  // tokens [start, end) leave the recent tier, the new one may be among them
            static thread_local std::vector<float> room(Q::block * D);
            float (*block)[D] = (float (*)[D])room.data();
            for (long t = start; t < end; t++) {
                if (t == number) {
                    std::memcpy(block[t - start], token[0], sizeof(token[0]));
                    continue;
                }
                const T* data = (const T*)recent.plane[0] + (page(recent, t, Q::recent_ring) * PAGE + t % PAGE) * D;
                for (int d = 0; d < D; d++) block[t - start][d] = read(data + d);
            }
            for (long t = start; t < end;) {  // a page at a time
                long stop = std::min(end, t / PAGE * PAGE + PAGE);
                Body::write(body.plane, page(body, t, Q::body_ring), (int)(t % PAGE), block + (t - start), (int)(stop - t));
                t = stop;
            }
        }
    }
    if constexpr (!std::is_same_v<Recent, None>)
        if (number >= Q::end(n + 1)) Recent::write(recent.plane, page(recent, number, Q::recent_ring), (int)(number % PAGE), token, 1);
}

}  // namespace kvc
