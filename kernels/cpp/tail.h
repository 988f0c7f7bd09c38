// Of every token the channels after the first DROP (kernels/tail.py): reader and writer.
#include <vector>
namespace kvc {

template <class Inner, int D, int DROP> struct Tail {
    static constexpr int planes = Inner::planes + 1, LEFT = D - DROP;
    Inner inner;
    const int8_t* above;  // of all pages, by step; reading has no use for it
    Tail(const void* const* plane, long page) : inner(plane, page), above((const int8_t*)plane[Inner::planes]) {}

    template <int R, bool ROUGH> void logits(const float* const* q, const float*, int first, int last, float (*out)[PAGE]) const {
        const float* x[R];
        float most[R];
        for (int r = 0; r < R; r++) {
            x[r] = q[r] + DROP;
            most[r] = largest_of(x[r], LEFT);
        }
        inner.template logits<R, ROUGH>(x, most, first, last, out);
    }

    template <int R, bool ROUGH> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[D]) const {
        alignas(64) float part[R][LEFT] = {};
        inner.template add<R, ROUGH>(p, share, first, last, part);
        for (int r = 0; r < R; r++)
            for (int d = 0; d < LEFT; d += 16) store(o[r] + DROP + d, load(o[r] + DROP + d) + load(part[r] + d));
    }

    void rows(int first, int last, float (*out)[D]) const {
        static thread_local std::vector<float> room(PAGE * LEFT);
        float (*part)[LEFT] = (float (*)[LEFT])room.data();
        inner.rows(first, last, part);
        for (int t = first * 16; t < last * 16; t++) {
            std::memset(out[t], 0, DROP * sizeof(float));
            std::memcpy(out[t] + DROP, part[t], sizeof(part[t]));
        }
    }
};

// How many of the first channels that a reader gives are 0.
template <class Reader> constexpr int zeros = 0;
template <class Inner, int D, int DROP> constexpr int zeros<Tail<Inner, D, DROP>> = DROP;

template <class Inner, class Reader, int D, int DROP, int STEP> struct TailWriter {
    static void write(const void* const* plane, long page, int at, const float (*x)[D], int n) {
        constexpr int LEFT = D - DROP;
        static thread_local std::vector<float> room(PAGE * LEFT);
        float (*part)[LEFT] = (float (*)[LEFT])room.data();
        int8_t* above = const_cast<int8_t*>(Reader(plane, page).above) + (page * PAGE + at) / STEP;
        for (int from = 0; from < n; from += STEP) {
            float peak = 0.0f;
            for (int t = from; t < from + STEP; t++) {
                for (int d = 0; d < DROP; d++) peak = std::max(peak, std::fabs(x[t][d]));
                std::memcpy(part[t], x[t] + DROP, sizeof(part[t]));
            }
            int e = -127;
            if (peak != 0.0f) {
                std::frexp(peak, &e);
                e = std::min(std::max(e, -126), 127);
            }
            *above++ = (int8_t)e;
        }
        Inner::write(plane, page, at, part, n);
    }
};

}  // namespace kvc
