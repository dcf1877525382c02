// Numbers in and out of vectors: type 0 is float32, 1 bfloat16, 2 float16.
//
// What stands between SL_VECTORS_ON and SL_VECTORS_OFF is compiled for processors with AVX-512 and AMX, whatever
// the compiler is told; `features()` says whether it may be called.
#pragma once
#include "packed.h"
#include <immintrin.h>

#define SL_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,f16c,amx-tile,amx-int8"
#define SL_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define SL_PUSH(target_) SL_PRAGMA(clang attribute push(__attribute__((target(target_))), apply_to = function))
#define SL_VECTORS_ON SL_PUSH(SL_TARGET)
#define SL_VECTORS_OFF SL_PRAGMA(clang attribute pop)
#else
#define SL_PUSH(target_) SL_PRAGMA(GCC push_options) SL_PRAGMA(GCC target target_)
#define SL_VECTORS_ON SL_PUSH(SL_TARGET)
#define SL_VECTORS_OFF SL_PRAGMA(GCC pop_options)
#endif

SL_VECTORS_ON
static inline size_t width(int type) { return type ? 2 : 4; }
static inline __mmask16 head(i64 left) {   // the first lanes, at most 16
    return left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1);
}
static inline __m512 load16(const void *x, int type, i64 i, __mmask16 m) {
    if (type == 0) return _mm512_maskz_loadu_ps(m, (const float*)x + i);
    __m256i v = _mm256_maskz_loadu_epi16(m, (const uint16_t*)x + i);
    if (type == 2) return _mm512_cvtph_ps(v);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
static inline void store16(void *y, int type, i64 i, __mmask16 m, __m512 v) {
    if (type == 0) { _mm512_mask_storeu_ps((float*)y + i, m, v); return; }
    __m256i h;
    if (type == 2) h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    else {
        __m512i u = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        u = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        u = _mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        h = _mm512_cvtepi32_epi16(u);
    }
    _mm256_mask_storeu_epi16((uint16_t*)y + i, m, h);
}
static inline float dot(const float *a, const void *x, int type, i64 k) {
    __m512 s[4];
    for (int j = 0; j < 4; j++) s[j] = _mm512_setzero_ps();
    i64 i = 0;
    for (; i + 64 <= k; i += 64)
        for (int j = 0; j < 4; j++) {
            const __m512 v = load16(x, type, i + 16*j, 0xffff);
            s[j] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16*j), v, s[j]);
        }
    for (; i < k; i += 16) {
        const __mmask16 m = head(k - i);
        s[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, a + i), load16(x, type, i, m), s[0]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
}
SL_VECTORS_OFF
