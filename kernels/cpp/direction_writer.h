// The writer of two layers as one direction (kernels/direction.py): whole pages of tokens.
namespace kvc {

// BETWEEN are the bits of the fp64 number t.
template <class Inner, class Reader, int D, int N, class T, uint64_t BETWEEN> struct DirectionWriter {
    static void write(const void* const* plane, long page, int, const float (*x)[2 * D], int n) {
        const uint64_t bits = BETWEEN;
        double t;
        std::memcpy(&t, &bits, sizeof(t));
        static thread_local std::vector<float> room(PAGE * D);
        float (*e)[D] = (float (*)[D])room.data();
        Reader reader(plane, page);
        half* length = const_cast<half*>(reader.length);
        float cosine[PAGE], unit[2][D], norm[2], square[D];
        for (int i = 0; i < n; i++) {
            for (int m = 0; m < 2; m++) {
                for (int d = 0; d < D; d++) square[d] = x[i][m * D + d] * x[i][m * D + d];
                norm[m] = std::sqrt(total(square, D));
                length[m * PAGE + i] = as_half(norm[m]);
            }
            for (int m = 0; m < 2; m++) {
                const int own = norm[m] == 0.0f ? 1 - m : m;  // zeros have no direction
                const float by = norm[own] == 0.0f ? 1.0f : norm[own];
                for (int d = 0; d < D; d++) unit[m][d] = x[i][own * D + d] / by;
            }
            for (int d = 0; d < D; d++) square[d] = unit[0][d] * unit[1][d];
            cosine[i] = std::min(std::max(total(square, D), -1.0f), 1.0f);
            double angle = std::acos((double)cosine[i]), sine = std::sin(angle), share[2] = {1.0 - t, t};
            if (sine >= 1e-4)
                for (double& s : share) s = std::sin(s * angle) / sine;
            float first = (float)share[0], second = (float)share[1];
            for (int d = 0; d < D; d++) e[i][d] = first * unit[0][d] + second * unit[1][d];
        }
        Inner::write(plane, page, 0, e, n);
        if constexpr (N > 0) {
            bool taken[PAGE] = {};
            for (int k = 0; k < N; k++) {  // of equals the first
                int best = -1;
                for (int i = 0; i < n; i++)
                    if (!taken[i] && (best < 0 || cosine[i] < cosine[best])) best = i;
                taken[best] = true;
                const_cast<uint8_t*>(reader.place)[k] = (uint8_t)best;
                for (int m = 0; m < 2; m++)
                    for (int d = 0; d < D; d++)
                        kvc::write(const_cast<T*>(reader.exact) + (m * N + k) * D + d, x[best][m * D + d]);
            }
        }
    }
};

}  // namespace kvc
