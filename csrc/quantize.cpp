// What the processor can do for training, and activations to codes.
#include "train.h"

#ifdef SL_TRAIN_HERE
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// ---------------------------------------------------------------- what the processor can do
static int find_features() {
    unsigned a, b, c, d, lo, hi;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (lo & 0xe6) != 0xe6) return 0;
    // F, DQ, BW, VL, VBMI, VNNI; tiles, int8
    bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (c >> 1 & 1) && (c >> 11 & 1);
    bool amx = (d >> 24 & 1) && (d >> 25 & 1) && (lo >> 17 & 3) == 3;
    if (!avx512) return 0;
#if defined(__linux__)
    if (amx && syscall(SYS_arch_prctl, 0x1023, 18) == 0) return 7;   // asks the kernel for tile data, once
#endif
    return 1;
}
int train_features() { static const int f = find_features(); return f; }

// ---------------------------------------------------------------- quantize activations
struct Range { float lo = INFINITY, hi = -INFINITY; bool bad = false; };

static T512 Range row_range(const void* x, int type, int64_t k) {
    __m512 lo = _mm512_set1_ps(INFINITY), hi = _mm512_set1_ps(-INFINITY), lo2 = lo, hi2 = hi;
    __m512i big = _mm512_setzero_si512(), abs = _mm512_set1_epi32(0x7fffffff);
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
        __m512 v = load16(x, type, i, 0xffff), w = load16(x, type, i + 16, 0xffff);
        lo = _mm512_min_ps(lo, v); hi = _mm512_max_ps(hi, v);
        lo2 = _mm512_min_ps(lo2, w); hi2 = _mm512_max_ps(hi2, w);
        const __m512i a = _mm512_and_si512(_mm512_castps_si512(v), abs);
        const __m512i b = _mm512_and_si512(_mm512_castps_si512(w), abs);
        big = _mm512_max_epu32(big, _mm512_max_epu32(a, b));
    }
    for (; i < k; i += 16) {
        __mmask16 m = lanes(k - i);
        __m512 v = load16(x, type, i, m);
        lo = _mm512_mask_min_ps(lo, m, lo, v); hi = _mm512_mask_max_ps(hi, m, hi, v);
        big = _mm512_max_epu32(big, _mm512_and_si512(_mm512_castps_si512(v), abs));
    }
    Range r;
    r.lo = _mm512_reduce_min_ps(_mm512_min_ps(lo, lo2)); r.hi = _mm512_reduce_max_ps(_mm512_max_ps(hi, hi2));
    uint32_t b = _mm512_reduce_max_epu32(big);
    if (b > 0x7f800000u) r.lo = r.hi = NAN;
    r.bad = b >= 0x7f800000u;
    return r;
}

struct Grid { float scale, inv; int zero; };   // one row's step; zero is the zero point of the unsigned code

// scale and zero point of a range, in the very float32 operations of quantizers._scale_and_zero
static Grid grid_of(Range r, int bits, int symmetric) {
    Grid g;
    float lo = r.lo < 0 ? r.lo : 0.f, hi = r.hi > 0 ? r.hi : 0.f, tiny = std::numeric_limits<float>::min();
    if (symmetric) {
        g.scale = std::max(-lo, hi) / (float)((1 << (bits - 1)) - 1);
        g.scale = std::max(g.scale, tiny); g.zero = 1 << (bits - 1);
    } else {
        float top = (float)((1 << bits) - 1);
        g.scale = std::max((hi - lo) / top, tiny);
        g.zero = (int)std::min(std::max(std::nearbyintf(-lo / g.scale), 0.f), top);
    }
    g.inv = 1.f / g.scale;
    if (r.bad || !std::isfinite(g.scale)) { g.scale = NAN; g.inv = 0; g.zero = symmetric ? g.zero : 0; }
    return g;
}

template <int TYPE, bool MASK, bool RANGE>
static T512 int32_t quantize_row(const void* x, int64_t k, Grid g, int qmin, int qmax, uint8_t* codes,
                                 uint64_t* mask, Range* range) {
    const __m512 inv = _mm512_set1_ps(g.inv);
    const __m512 lo = _mm512_set1_ps((float)(qmin - g.zero)), hi = _mm512_set1_ps((float)(qmax - g.zero));
    const __m512i zero = _mm512_set1_epi32(g.zero), abs = _mm512_set1_epi32(0x7fffffff);
    __m512i sum = _mm512_setzero_si512(), big = sum;
    __m512 least = _mm512_set1_ps(INFINITY), most = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < k; i += 64) {
        uint64_t bits = 0;
        for (int j = 0; j < 4; j++) {
            __mmask16 m = lanes(k - i - 16 * j);
            __m512 v = load16(x, TYPE, i + 16 * j, m);
            if (RANGE) {
                least = _mm512_mask_min_ps(least, m, least, v); most = _mm512_mask_max_ps(most, m, most, v);
                big = _mm512_max_epu32(big, _mm512_and_si512(_mm512_castps_si512(v), abs));
            }
            v = _mm512_mul_ps(v, inv);
            __m512i q = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(v, lo), hi));   // NaN goes to lo
            if (MASK) bits |= (uint64_t)_mm512_mask_cmpeq_epi32_mask(m, q, _mm512_cvtps_epi32(v)) << (16 * j);
            q = _mm512_maskz_add_epi32(m, q, zero);
            sum = _mm512_add_epi32(sum, q);
            _mm_storeu_si128((__m128i*)(codes + i + 16 * j), _mm512_cvtepi32_epi8(q));
        }
        if (MASK) memcpy(mask + i / 64, &bits, 8);
    }
    if (RANGE) {
        uint32_t b = _mm512_reduce_max_epu32(big);
        range->lo = b > 0x7f800000u ? NAN : _mm512_reduce_min_ps(least);
        range->hi = b > 0x7f800000u ? NAN : _mm512_reduce_max_ps(most);
        range->bad = b >= 0x7f800000u;
    }
    return _mm512_reduce_add_epi32(sum);
}

template <bool MASK, bool RANGE>
static int32_t quantize_any(int type, const void* x, int64_t k, Grid g, int qmin, int qmax, uint8_t* c, uint64_t* m,
                            Range* r) {
    return type == F32 ? quantize_row<F32, MASK, RANGE>(x, k, g, qmin, qmax, c, m, r)
                       : quantize_row<BF16, MASK, RANGE>(x, k, g, qmin, qmax, c, m, r);
}

static void join(Range& a, const Range& b) {   // order does not matter, NaN stays
    if (std::isnan(a.lo) || std::isnan(b.lo)) { a.lo = a.hi = NAN; return; }
    a.lo = std::min(a.lo, b.lo); a.hi = std::max(a.hi, b.hi);
}
static void give(const Range& r, float* out) { out[0] = r.lo + 0.f; out[1] = r.hi + 0.f; }   // -0 becomes 0

API int sl_range(const void* x, int xtype, int64_t m, int64_t k, int64_t ldx, const uint8_t* keep,
                 float* range) {
    if (!(train_features() & 1)) return NO_CPU;
    Range all;
    if (k > 0) {
#pragma omp parallel if (m * k > 32768)
        {
            Range mine;
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < m; i++)
                if (!keep || keep[i]) join(mine, row_range(row_of(x, xtype, i * ldx), xtype, k));
#pragma omp critical(sl_join)
            join(all, mine);
        }
    }
    give(all, range);
    return OK;
}

API int sl_quantize(const void* x, int xtype, int64_t m, int64_t k, int64_t ldx, int bits, int symmetric,
                    int dynamic, const float* scale, const int32_t* zero, uint8_t* codes, int64_t ldc,
                    float* row_scale, int32_t* row_zero, int32_t* row_sum, void* mask, int64_t ldmask,
                    const uint8_t* keep, float* range) {
    if (!(train_features() & 1)) return NO_CPU;
    if (bits < 2 || bits > 8 || ldc < up(k, 64) || (mask && ldmask < up(k, 64) / 8)) return NO_RANGE;
    const int qmin = symmetric ? 1 : 0, qmax = (1 << bits) - 1;
    Grid fixed{};
    if (!dynamic) {
        fixed.scale = *scale; fixed.inv = 1.f / fixed.scale;
        fixed.zero = symmetric ? *zero + (1 << (bits - 1)) : *zero;
    }
    Range all;
#pragma omp parallel if (m * k > 32768)
    {
        Range mine;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < m; i++) {
            const void* row = row_of(x, xtype, i * ldx);
            Range r;
            Grid g = fixed;
            uint64_t* bit = mask && !dynamic ? (uint64_t*)((char*)mask + i * ldmask) : nullptr;
            bool count = range && (!keep || keep[i]);
            if (dynamic) g = grid_of(r = row_range(row, xtype, k), bits, symmetric);
            uint8_t* c = codes + i * ldc;
            int32_t sum = dynamic || (!bit && !count)
                                 ? quantize_any<false, false>(xtype, row, k, g, qmin, qmax, c, bit, &r)
                        : !count ? quantize_any<true, false>(xtype, row, k, g, qmin, qmax, c, bit, &r)
                        : bit    ? quantize_any<true, true>(xtype, row, k, g, qmin, qmax, c, bit, &r)
                                 : quantize_any<false, true>(xtype, row, k, g, qmin, qmax, c, bit, &r);
            row_scale[i] = g.scale; row_zero[i] = g.zero; row_sum[i] = sum;
            if (count && k > 0) join(mine, r);
        }
        if (range) {
#pragma omp critical(sl_join)
            join(all, mine);
        }
    }
    if (range) give(all, range);
    return OK;
}
API int sl_train_features(void) { return train_features(); }
#else   // another processor or compiler: the caller has its torch path
API int sl_train_features(void) { return 0; }
#endif
