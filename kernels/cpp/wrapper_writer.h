// Writers of formats around a format (kernels/wrapper.py): they hand on what is left of a page's
// tokens.
namespace kvc {

// The sum of n numbers (or of n rows of them), half added to the other half, in place.
template <int WIDTH = 1> inline float total(float* x, int n) {
    for (int half = n / 2; n > 1; half = n / 2) {
        for (int i = 0; i < half * WIDTH; i++) x[i] = x[i] + x[half * WIDTH + i];
        if (n % 2) std::memcpy(x + half * WIDTH, x + (n - 1) * WIDTH, WIDTH * sizeof(float));
        n = half + n % 2;
    }
    return x[0];
}

template <class Inner, class Reader, int D> struct HadamardWriter {
    static void write(const void* const* plane, long page, int at, const float (*x)[D], int n) {
        static thread_local std::vector<float> room(PAGE * D);
        float (*turned)[D] = (float (*)[D])room.data();
        std::memcpy(turned, x, n * sizeof(*x));
        for (int t = 0; t < n; t++) Reader::turn(turned[t]);
        Inner::write(plane, page, at, turned, n);
    }

    static void decode(const void* const* plane, long page, int at, float (*out)[D], int n) {
        Inner::decode(plane, page, at, out, n);
        for (int t = 0; t < n; t++) Reader::turn(out[t]);
    }
};

template <class Inner, class Reader, int D, int STEP> struct CenteredWriter {
    static void write(const void* const* plane, long page, int at, const float (*x)[D], int n) {
        static thread_local std::vector<float> room(PAGE * D);
        float (*rest)[D] = (float (*)[D])room.data();
        half* means = const_cast<half*>(Reader(plane, page).mean) + at / STEP * D;
        for (int from = 0; from < n; from += STEP, means += D)
            for (int c = 0; c < D; c++) {
                float values[STEP];
                for (int t = 0; t < STEP; t++) values[t] = x[from + t][c];
                means[c] = as_half(total(values, STEP) / (float)STEP);
                for (int t = from; t < from + STEP; t++) rest[t][c] = x[t][c] - read(means + c);
            }
        Inner::write(plane, page, at, rest, n);
    }

    static void decode(const void* const* plane, long page, int at, float (*out)[D], int n) {
        Inner::decode(plane, page, at, out, n);
        const half* means = Reader(plane, page).mean;
        for (int t = 0; t < n; t++) for (int c = 0; c < D; c++) out[t][c] = out[t][c] + read(means + (at + t) / STEP * D + c);
    }
};

template <class Inner, class Reader, int D, int STEP> struct ScaledWriter {
    static void write(const void* const* plane, long page, int at, const float (*x)[D], int n) {
        static thread_local std::vector<float> room(PAGE * D);
        float (*rest)[D] = (float (*)[D])room.data();
        half* scales = const_cast<half*>(Reader(plane, page).channel) + at / STEP * D;
        for (int from = 0; from < n; from += STEP, scales += D)
            for (int c = 0; c < D; c++) {
                float most = 0.0f;
                for (int t = from; t < from + STEP; t++) most = std::max(most, std::fabs(x[t][c]));
                scales[c] = round_up(std::sqrt(most));
                if (read(scales + c) < 0x1p-12f) scales[c] = as_half(0x1p-12f);
                for (int t = from; t < from + STEP; t++) rest[t][c] = x[t][c] / read(scales + c);
            }
        Inner::write(plane, page, at, rest, n);
    }

    static void decode(const void* const* plane, long page, int at, float (*out)[D], int n) {
        Inner::decode(plane, page, at, out, n);
        const half* scales = Reader(plane, page).channel;
        for (int t = 0; t < n; t++) for (int c = 0; c < D; c++) out[t][c] = out[t][c] * read(scales + (at + t) / STEP * D + c);
    }
};

template <class Inner, class Reader, int N> struct OutliersWriter;
template <bool K, int D, class V, class Fit, Axis AXIS, int GROUP, class S, bool LOW, class Reader, int N>
struct OutliersWriter<CodedWriter<K, D, V, Fit, AXIS, GROUP, S, LOW>, Reader, N> {
    using Coded = CodedWriter<K, D, V, Fit, AXIS, GROUP, S, LOW>;
    static constexpr bool channels = AXIS == channel_axis;
    static constexpr int GROUPS = D / (channels ? 1 : GROUP);  // of a step

    static void write(const void* const* plane, long page, int at, const float (*x)[D], int n) {
        static thread_local std::vector<float> room(PAGE * D);
        float (*dense)[D] = (float (*)[D])room.data();
        Reader reader(plane, page);
        uint8_t* places = const_cast<uint8_t*>(reader.place);
        half* rests = const_cast<half*>(reader.rest);
        for (int from = 0; from < n; from += channels ? GROUP : 1)
            for (int g = 0; g < GROUPS; g++) {
                auto in = [&](auto* y, int i) -> auto& { return channels ? y[from + i][g] : y[from][g * GROUP + i]; };
                float values[GROUP], far[GROUP];
                bool out[GROUP] = {};
                for (int i = 0; i < GROUP; i++) values[i] = in(x, i);
                float mean = total(values, GROUP) / (float)GROUP;
                for (int i = 0; i < GROUP; i++) far[i] = std::fabs(in(x, i) - mean);
                for (int k = 0; k < N; k++) {  // of equals the first
                    int best = -1;
                    for (int i = 0; i < GROUP; i++)
                        if (!out[i] && (best < 0 || far[i] > far[best])) best = i;
                    out[best] = true;
                }
                for (int i = 0; i < GROUP; i++) values[i] = out[i] ? 0.0f : in(x, i);
                mean = total(values, GROUP) / (float)(GROUP - N);
                for (int i = 0, k = 0; i < GROUP; i++) {
                    in(dense, i) = out[i] ? mean : in(x, i);
                    if (out[i]) places[where(at + from, g, k++)] = (uint8_t)i;
                }
            }
        Coded::write(plane, page, at, dense, n);
        each(reader, at, n, [&](int t, int c, long entry) {
            rests[entry] = as_half(x[t][c] - Coded::number(reader.inner, at + t, c));
        });
    }

    static void decode(const void* const* plane, long page, int at, float (*out)[D], int n) {
        Reader reader(plane, page);
        Coded::decode(plane, page, at, out, n);
        each(reader, at, n, [&](int t, int c, long entry) { out[t][c] = out[t][c] + read(reader.rest + entry); });
    }

    // f(token, channel, entry) for every outlier of tokens [at, at + n) of the page
    template <class F> static void each(const Reader& reader, int at, int n, F&& f) {
        for (int from = 0; from < n; from += channels ? GROUP : 1)
            for (int g = 0; g < GROUPS; g++)
                for (int k = 0; k < N; k++) {
                    long entry = where(at + from, g, k);
                    int i = reader.place[entry];
                    f(channels ? from + i : from, channels ? g : g * GROUP + i, entry);
                }
    }

    static long where(int token, int group, int k) {
        return channels ? ((long)token / GROUP * D + group) * N + k : ((long)group * N + k) * PAGE + token;
    }
};

// Whole pages: the first N tokens and the others.
template <class High, class Low, class Reader, int D, int N> struct MixedWriter {
    static void write(const void* const* plane, long page, int, const float (*x)[D], int) {
        High::write(Reader::upper(plane, page).plane, page, 0, x, N);
        Low::write(Reader::lower(plane, page).plane, page, 0, x + N, PAGE - N);
    }

    static void decode(const void* const* plane, long page, int, float (*out)[D], int) {
        High::decode(Reader::upper(plane, page).plane, page, 0, out, N);
        Low::decode(Reader::lower(plane, page).plane, page, 0, out + N, PAGE - N);
    }
};

}  // namespace kvc
