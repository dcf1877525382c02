// Training kernels: quantize activations (quantize.cpp), multiply with int8 weight codes, forward and backward
// (train.cpp). Plain C ABI, no torch, no Python.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <algorithm>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(_WIN32)
#define API extern "C" __declspec(dllexport)
#else
#define API extern "C" __attribute__((visibility("default")))
#endif

enum { OK = 0, NO_CPU = -1, NO_RANGE = -2 };
enum { F32 = 0, BF16 = 1 };

static inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

#if defined(__x86_64__) && !defined(_MSC_VER) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define SL_TRAIN_HERE 1         // elsewhere the caller has its torch path
#include <immintrin.h>
#define T512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,bmi2,fma")))
#define INL static inline __attribute__((always_inline))

int train_features();           // bit 0: vectors, bits 1 and 2: tiles, for codes and for floats

// ---------------------------------------------------------------- small vector helpers
INL T512 __mmask16 lanes(int64_t left) {
    return left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

INL T512 __m512 load16(const void* x, int type, int64_t i, __mmask16 k) {
    if (type == F32) return _mm512_maskz_loadu_ps(k, (const float*)x + i);
    const __m256i half = _mm256_maskz_loadu_epi16(k, (const uint16_t*)x + i);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INL T512 void store16(void* y, int type, int64_t i, __mmask16 k, __m512 v) {
    if (type == F32) return _mm512_mask_storeu_ps((float*)y + i, k, v);
    __m512i b = _mm512_castps_si512(v);   // round half to even; NaN stays NaN
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    b = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd)), 16);
    b = _mm512_mask_mov_epi32(b, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16((uint16_t*)y + i, k, _mm512_cvtepi32_epi16(b));
}

INL const void* row_of(const void* x, int type, int64_t i) {
    return (const char*)x + i * (type == F32 ? 4 : 2);
}
#endif
