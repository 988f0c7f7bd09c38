// The writer of a low-rank correction (kernels/lowrank.py): every sum in the plain body's order.
namespace kvc {

template <class Inner, class Reader, int D, int STEP, int RANK, int STEPS, int FACTOR, int MODULUS> struct LowrankWriter {
    static void write(const void* const* plane, long page, int at, const float (*x)[D], int n) {
        Inner::write(plane, page, at, x, n);
        static thread_local std::vector<float> room(PAGE * D + 3 * STEP * D);
        float (*stored)[D] = (float (*)[D])room.data();
        float *error = room.data() + PAGE * D, *turned = error + STEP * D, *terms = turned + STEP * D;
        Inner::decode(plane, page, at, stored, n);
        Reader reader(plane, page);
        half* a = const_cast<half*>(reader.a) + at / STEP * RANK * STEP;
        half* b = const_cast<half*>(reader.b) + at / STEP * RANK * D;
        for (int from = 0; from < n; from += STEP, a += RANK * STEP, b += RANK * D) {
            for (int t = 0; t < STEP; t++)
                for (int c = 0; c < D; c++)
                    error[t * D + c] = turned[c * STEP + t] = x[from + t][c] - stored[from + t][c];
            float left[STEP], right[RANK][D];
            for (int r = 0; r < RANK; r++)
                for (int c = 0; c < D; c++)
                    right[r][c] = (float)((long)(c + 1) * (2 * r + 1) * FACTOR % MODULUS - MODULUS / 2) / (float)MODULUS;
            for (int i = 0; i < STEPS; i++) {
                for (int r = 0; r < RANK; r++) {
                    times<D, STEP>(turned, right[r], left, terms);
                    times<STEP, D>(error, left, right[r], terms);
                }
                orthonormal(right);
            }
            for (int r = 0; r < RANK; r++) {
                times<D, STEP>(turned, right[r], left, terms);
                for (int t = 0; t < STEP; t++) a[r * STEP + t] = as_half(std::min(std::max(left[t], -65504.0f), 65504.0f));
                for (int c = 0; c < D; c++) b[r * D + c] = as_half(right[r][c]);
            }
        }
    }

    // out [WIDTH] = y [N] m, m [N][WIDTH]
    template <int N, int WIDTH> static void times(const float* m, const float* y, float* out, float* terms) {
        for (int i = 0; i < N; i++)
            for (int j = 0; j < WIDTH; j++) terms[i * WIDTH + j] = m[i * WIDTH + j] * y[i];
        total<WIDTH>(terms, N);
        std::memcpy(out, terms, WIDTH * sizeof(float));
    }

    static float dot(const float* x, const float* y) {
        float terms[D];
        for (int c = 0; c < D; c++) terms[c] = x[c] * y[c];
        return total(terms, D);
    }

    // Gram-Schmidt, each vector twice; what lies among those before it becomes 0.
    static void orthonormal(float (*q)[D]) {
        for (int i = 0; i < RANK; i++) {
            const float before = dot(q[i], q[i]);
            for (int again = 0; again < 2 && i > 0; again++) {
                float share[RANK], terms[RANK][D];
                for (int j = 0; j < i; j++) share[j] = dot(q[j], q[i]);
                for (int j = 0; j < i; j++)
                    for (int c = 0; c < D; c++) terms[j][c] = q[j][c] * share[j];
                total<D>(terms[0], i);
                for (int c = 0; c < D; c++) q[i][c] = q[i][c] - terms[0][c];
            }
            const float size = dot(q[i], q[i]), length = std::sqrt(size);
            for (int c = 0; c < D; c++) q[i][c] = size > before * 1e-12f ? q[i][c] / length : 0.0f;
        }
    }
};

}  // namespace kvc
