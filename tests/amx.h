// Intel's tiles (AMX) in plain C++, for machines that have none: what kernels/cpp/product.h uses of them.
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#ifndef __AMX_TILE__
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#endif
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps

namespace amx {

inline thread_local float tile[8][16][16];
inline thread_local uint8_t config[64];

inline float* of(int t) {  // a trap where it is not configured as 16 rows of 64 bytes
    if (config[0] != 1 || config[1] || config[16 + 2 * t] != 64 || config[17 + 2 * t] || config[48 + t] != 16) __builtin_trap();
    return tile[t][0];
}
inline void configure(const void* from) { std::memcpy(config, from, 64), std::memset(tile, 0, sizeof(tile)); }
inline void release() { std::memset(config, 0, 64); }
inline void zero(int t) { std::memset(of(t), 0, sizeof(tile[t])); }
inline void load(int t, const void* from, long line) {
    for (int r = 0; r < 16; r++) std::memcpy(of(t) + r * 16, (const char*)from + r * line, 64);
}
inline void store(int t, void* to, long line) {
    for (int r = 0; r < 16; r++) std::memcpy((char*)to + r * line, of(t) + r * 16, 64);
}
// c[m][n] += a[m][2 k] b[k][2 n] + a[m][2 k + 1] b[k][2 n + 1] of bf16 a and b
inline void multiply(int c, int a, int b) {
    auto number = [](const float* x, int half) {
        uint32_t both;
        std::memcpy(&both, x, 4);
        both = half ? both & 0xffff0000u : both << 16;
        float y;
        std::memcpy(&y, &both, 4);
        return y;
    };
    for (int m = 0; m < 16; m++) for (int k = 0; k < 16; k++) for (int n = 0; n < 16; n++) for (int half = 0; half < 2; half++)
        of(c)[m * 16 + n] += number(of(a) + m * 16 + k, half) * number(of(b) + k * 16 + n, half);
}

}  // namespace amx

#define _tile_loadconfig amx::configure
#define _tile_release amx::release
#define _tile_zero amx::zero
#define _tile_loadd amx::load
#define _tile_stored amx::store
#define _tile_dpbf16ps amx::multiply
