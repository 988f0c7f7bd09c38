// Readers of V where it is the first DV channels of K (multi-head latent attention): K's pages,
// read a second time while they are in the cache. V has no pages of its own.
#include <vector>
namespace kvc {

template <int DV, int D, class T> struct DenseInK {
    static constexpr int planes = 1;
    const T* data;
    DenseInK(const void* const* plane, long page) : data((const T*)plane[0] + page * (PAGE * D)) {}

    template <int R, int N> void part(const float (*p)[PAGE], const float* share, int first, int last, int from, float (*o)[DV]) const {
        vf acc[N][R];
        for (int i = 0; i < N; i++) for (int r = 0; r < R; r++) acc[i][r] = set(0.0f);
        for (int t = first; t < last; t++)
            for (int i = 0; i < N; i++) {
                vf x = load(data + t * D + from + i * 16);
                for (int r = 0; r < R; r++) acc[i][r] = fma(set(p[r][t]), x, acc[i][r]);
            }
        for (int i = 0; i < N; i++) for (int r = 0; r < R; r++) {
            float* to = o[r] + from + i * 16;
            store(to, fma(acc[i][r], set(share[r]), load(to)));
        }
    }

    void rows(int first, int last, float (*out)[DV]) const {
        for (int t = first * 16; t < last * 16; t++)
            for (int d = 0; d < DV; d += 16) store(out[t] + d, load(data + t * D + d));
    }

    template <int R, bool> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[DV]) const {
        constexpr int abreast = KVC_AVX512 ? (R <= 4 ? 4 : 2) : 1;
        int from = 0;
        for (; from + abreast * 16 <= DV; from += abreast * 16) part<R, abreast>(p, share, first * 16, last * 16, from, o);
        for (; from < DV; from += 16) part<R, 1>(p, share, first * 16, last * 16, from, o);
    }
};

template <class K, int DV> struct CodedInK;
// Codes lie 16 tokens abreast: each channel's weighted sum is one over lanes.
template <int DV, int D, class V, Axis AXIS, int GROUP, class S, bool LOW>
struct CodedInK<CodedK<D, V, AXIS, GROUP, S, LOW>, DV> : CodedK<D, V, AXIS, GROUP, S, LOW> {
    using Keys = CodedK<D, V, AXIS, GROUP, S, LOW>;
    using Keys::Keys;

    void rows(int first, int last, float (*out)[DV]) const {
        static thread_local std::vector<float> room(PAGE * D);
        float (*keys)[D] = (float (*)[D])room.data();
        Keys::rows(first, last, keys);
        for (int t = first * 16; t < last * 16; t++) std::memcpy(out[t], keys[t], sizeof(out[t]));
    }

    template <int R, bool> void add(const float (*p)[PAGE], const float* share, int first, int last, float (*o)[DV]) const {
        for (int tile = 0; tile * Keys::TILE < DV; tile++)
            unroll<4>([&](auto c) ALWAYS {
                unroll<Keys::F>([&](auto f) ALWAYS {
                    const int channel = tile * Keys::TILE + f * 4 + c;
                    if (channel >= DV) return;
                    vf acc[R];
                    for (int r = 0; r < R; r++) acc[r] = set(0.0f);
                    for (int group = first; group < last; group++) {
                        vi word = load_bytes(this->codes + (group * Keys::TILES + tile) * 64);
                        vf x = this->values.template at<8 * c + V::bits * f>(word);
                        if constexpr (AXIS == channel_axis) {
                            const int at = group * 16 / GROUP * D + channel;
                            vf low = set(0.0f);
                            if constexpr (LOW) low = set(read(this->low + at));
                            x = fma(x, set(number_at(this->scale + at)), low);
                        } else {
                            const int at = (Keys::GROUPS == 1 ? 0 : channel / GROUP) * PAGE + group * 16;
                            vf low = set(0.0f);
                            if constexpr (LOW) low = load(this->low + at);
                            x = fma(x, load(this->scale + at), low);
                        }
                        for (int r = 0; r < R; r++) acc[r] = fma(load(p[r] + group * 16), x, acc[r]);
                    }
                    for (int r = 0; r < R; r++) o[r][channel] += share[r] * sum(acc[r]);
                });
            });
    }

    static float number_at(const half* x) { return read(x); }
    static float number_at(const exponent* x) { return std::ldexp(1.0f, x->bits); }
};

}  // namespace kvc
