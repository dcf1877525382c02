// Sixteen numbers at a time, by the same names at every level. Included inside a namespace and between SL_TARGET_ON and
// SL_TARGET_OFF, once for each level, with SL_LEVEL its number.
//
// F is 16 float32, I 16 int32, D 16 float64, Bytes 64 bytes; Lanes the first so many of 16. Numbers in and out of memory
// have a type: 0 is float32, 1 bfloat16, 2 float16.
//
// All levels give the same bits. Sums of integers are exact; floats are added in the same order at every level (a sum of
// sixteen: the upper eight to the lower eight, then four, two, one), products and sums are fused only where fma says so.
#define INL static inline __attribute__((always_inline))
#define INL_MEMBER inline __attribute__((always_inline))

#if defined(SL_ARM)
#include "vec_neon.h"
#elif SL_LEVEL >= 3
#include "vec_avx512.h"
#else
#include "vec_avx2.h"
#endif

INL size_t width(int type) { return type ? 2 : 4; }
INL F load16(const void *x, int type, i64 i, Lanes m) {
    if (type == 0) return load((const float*)x + i, m);
    return type == 1 ? load_bfloat((const uint16_t*)x + i, m) : load_half((const uint16_t*)x + i, m);
}
INL void store16(void *y, int type, i64 i, Lanes m, F v) {
    if (type == 0) { store((float*)y + i, m, v); return; }
    if (type == 2) { store_half((uint16_t*)y + i, m, v); return; }
    I u = bits_of(v);                   // to the nearest, ties to even; NaN stays NaN
    u = shift_right<16>(u + ((shift_right<16>(u) & all_ints(1)) + all_ints(0x7fff)));
    store_low16((uint16_t*)y + i, m, or_nan(u, v));
}
INL float dot(const float *a, const void *x, int type, i64 k) {
    F s[4];
    for (int j = 0; j < 4; j++) s[j] = zero();
    i64 i = 0;
    for (; i + 64 <= k; i += 64)
        for (int j = 0; j < 4; j++) s[j] = fma(load(a + i + 16*j), load16(x, type, i + 16*j, head(16)), s[j]);
    for (; i < k; i += 16) {
        const Lanes m = head(k - i);
        s[0] = fma(load(a + i, m), load16(x, type, i, m), s[0]);
    }
    return sum_of((s[0] + s[1]) + (s[2] + s[3]));
}
