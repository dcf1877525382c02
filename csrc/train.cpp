// Training kernels: quantize activations, multiply with int8 weight codes, forward and backward. Plain C ABI, no torch, no Python.
//
// A weight is s[o]*(c[o,i]+d): int8 codes c, one float s per output, one small d per layer. All sums of products are exact integers (AMX int8).
// Float operands (gradients, float activations) become fixed point numbers first: a row is divided by its largest magnitude and
// written with `digits` bytes; each byte plane is one int8 product. So results depend neither on the order of the sum nor on the number of threads.
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
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define T512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,bmi2,fma")))
#define INL static inline __attribute__((always_inline))

// ---------------------------------------------------------------- what the processor can do
static int find_features() {
    unsigned a, b, c, d, lo, hi;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (lo & 0xe6) != 0xe6) return 0;
    bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (c >> 1 & 1) && (c >> 11 & 1);   // F, DQ, BW, VL, VBMI, VNNI
    bool amx = (d >> 24 & 1) && (d >> 25 & 1) && (lo >> 17 & 3) == 3;                                 // tiles, int8
    if (!avx512) return 0;
#if defined(__linux__)
    if (amx && syscall(SYS_arch_prctl, 0x1023, 18) == 0) return 7;   // ask the kernel for tile data, once per process
#endif
    return 1;
}
static int features() { static const int f = find_features(); return f; }

static int thread_count() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// ---------------------------------------------------------------- small vector helpers
INL T512 __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1); }

INL T512 __m512 load16(const void* x, int type, int64_t i, __mmask16 k) {
    if (type == F32) return _mm512_maskz_loadu_ps(k, (const float*)x + i);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, (const uint16_t*)x + i)), 16));
}

INL T512 void store16(void* y, int type, int64_t i, __mmask16 k, __m512 v) {
    if (type == F32) return _mm512_mask_storeu_ps((float*)y + i, k, v);
    __m512i b = _mm512_castps_si512(v);   // round half to even; NaN stays NaN
    b = _mm512_add_epi32(b, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_epi32(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1))));
    b = _mm512_mask_mov_epi32(_mm512_srli_epi32(b, 16), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16((uint16_t*)y + i, k, _mm512_cvtepi32_epi16(b));
}

INL const void* row_of(const void* x, int type, int64_t i) { return (const char*)x + i * (type == F32 ? 4 : 2); }

// ---------------------------------------------------------------- quantize activations
struct Range { float lo = INFINITY, hi = -INFINITY; bool bad = false; };

static T512 Range row_range(const void* x, int type, int64_t k) {
    __m512 lo = _mm512_set1_ps(INFINITY), hi = _mm512_set1_ps(-INFINITY), lo2 = lo, hi2 = hi;
    __m512i big = _mm512_setzero_si512(), abs = _mm512_set1_epi32(0x7fffffff);
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
        __m512 v = load16(x, type, i, 0xffff), w = load16(x, type, i + 16, 0xffff);
        lo = _mm512_min_ps(lo, v); hi = _mm512_max_ps(hi, v); lo2 = _mm512_min_ps(lo2, w); hi2 = _mm512_max_ps(hi2, w);
        big = _mm512_max_epu32(big, _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(v), abs), _mm512_and_si512(_mm512_castps_si512(w), abs)));
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
static T512 int32_t quantize_row(const void* x, int64_t k, Grid g, int qmin, int qmax, uint8_t* codes, uint64_t* mask, Range* range) {
    const __m512 inv = _mm512_set1_ps(g.inv), lo = _mm512_set1_ps((float)(qmin - g.zero)), hi = _mm512_set1_ps((float)(qmax - g.zero));
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
        range->lo = b > 0x7f800000u ? NAN : _mm512_reduce_min_ps(least); range->hi = b > 0x7f800000u ? NAN : _mm512_reduce_max_ps(most);
        range->bad = b >= 0x7f800000u;
    }
    return _mm512_reduce_add_epi32(sum);
}

template <bool MASK, bool RANGE>
static int32_t quantize_any(int type, const void* x, int64_t k, Grid g, int qmin, int qmax, uint8_t* c, uint64_t* m, Range* r) {
    return type == F32 ? quantize_row<F32, MASK, RANGE>(x, k, g, qmin, qmax, c, m, r) : quantize_row<BF16, MASK, RANGE>(x, k, g, qmin, qmax, c, m, r);
}

static void join(Range& a, const Range& b) {   // order does not matter, NaN stays
    if (std::isnan(a.lo) || std::isnan(b.lo)) { a.lo = a.hi = NAN; return; }
    a.lo = std::min(a.lo, b.lo); a.hi = std::max(a.hi, b.hi);
}
static void give(const Range& r, float* out) { out[0] = r.lo + 0.f; out[1] = r.hi + 0.f; }   // -0 becomes 0

API int sl_range(const void* x, int xtype, int64_t m, int64_t k, int64_t ldx, const uint8_t* keep, float* range) {
    if (!(features() & 1)) return NO_CPU;
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

API int sl_quantize(const void* x, int xtype, int64_t m, int64_t k, int64_t ldx, int bits, int symmetric, int dynamic,
                    const float* scale, const int32_t* zero, uint8_t* codes, int64_t ldc, float* row_scale, int32_t* row_zero, int32_t* row_sum,
                    void* mask, int64_t ldmask, const uint8_t* keep, float* range) {
    if (!(features() & 1)) return NO_CPU;
    if (bits < 2 || bits > 8 || ldc < up(k, 64) || (mask && ldmask < up(k, 64) / 8)) return NO_RANGE;
    const int qmin = symmetric ? 1 : 0, qmax = (1 << bits) - 1;
    Grid fixed{};
    if (!dynamic) { fixed.scale = *scale; fixed.inv = 1.f / fixed.scale; fixed.zero = symmetric ? *zero + (1 << (bits - 1)) : *zero; }
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
            int32_t sum = dynamic || (!bit && !count) ? quantize_any<false, false>(xtype, row, k, g, qmin, qmax, c, bit, &r)
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

// ---------------------------------------------------------------- packed weight codes
// [64 bytes: largest |c|][sum over inputs of the codes, int32, one per padded output][tiles]
// tile (ob, kb), 1024 bytes: outputs 16*ob.., inputs 64*kb..; row r holds inputs 4r..4r+3 of 16 outputs: what tdpb*d wants as second operand.
struct Packed {
    int64_t np, kp;
    const int32_t* sums; const char* tiles; int32_t most;
    Packed(const void* p, int64_t n, int64_t k) : np(up(n, 64)), kp(up(k, 64)) {
        most = *(const int32_t*)p; sums = (const int32_t*)((const char*)p + 64); tiles = (const char*)(sums + np);
    }
    const char* tile(int64_t ob, int64_t kb) const { return tiles + (ob * (kp / 64) + kb) * 1024; }
};

API int64_t sl_train_packed_bytes(int64_t n, int64_t k) { return 64 + up(n, 64) * 4 + up(n, 64) * up(k, 64); }

API int sl_train_pack(const int8_t* codes, int64_t so, int64_t sk, int64_t n, int64_t k, void* packed) {
    const int64_t np = up(n, 64), kp = up(k, 64);
    int32_t* sums = (int32_t*)((char*)packed + 64);
    int8_t* tiles = (int8_t*)(sums + np);
    int most = 0;
    memset(packed, 0, 64);
#pragma omp parallel for schedule(static) reduction(max : most) if (n * k > 32768)
    for (int64_t ob = 0; ob < np / 16; ob++) {
        int32_t sum[16] = {0};
        for (int64_t kb = 0; kb < kp / 64; kb++) {
            int8_t* t = tiles + (ob * (kp / 64) + kb) * 1024;
            for (int64_t r = 0; r < 16; r++)
                for (int64_t o = 0; o < 16; o++)
                    for (int64_t j = 0; j < 4; j++) {
                        int64_t oo = ob * 16 + o, kk = kb * 64 + r * 4 + j;
                        int8_t c = oo < n && kk < k ? codes[oo * so + kk * sk] : 0;
                        t[r * 64 + o * 4 + j] = c; sum[o] += c; most = std::max(most, std::abs((int)c));
                    }
        }
        memcpy(sums + ob * 16, sum, 64);
    }
    *(int32_t*)packed = most;
    return OK;
}

// ---------------------------------------------------------------- tiles
struct alignas(64) TileConfig { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; };

struct Tiles {   // this thread's tile unit, given back as it was found
    TileConfig before;
    Tiles() {
        TileConfig c; memset(&c, 0, sizeof c); c.palette = 1;
        for (int i = 0; i < 8; i++) { c.bytes[i] = 64; c.rows[i] = 16; }
        __asm__ volatile("sttilecfg %0" : "=m"(before)::"memory");
        __asm__ volatile("ldtilecfg %0" ::"m"(c) : "memory");
    }
    ~Tiles() {
        if (before.palette) __asm__ volatile("ldtilecfg %0" ::"m"(before) : "memory");
        else __asm__ volatile("tilerelease" ::: "memory");
    }
};
#define TLOADS(t, p, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"((int64_t)(stride)))
#define TLOAD(t, p) TLOADS(t, p, 64)
#define TZERO(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define TSTORE(t, p, stride) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"((int64_t)(stride)) : "memory")
#define TDOT(op, c, a, b) __asm__ volatile(op " %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

// ---------------------------------------------------------------- one block of 32 x 32 results
enum Mode { FORWARD_INT, FORWARD_FLOAT, BACKWARD };

struct Product {   // what all threads share
    int64_t m, r, c;              // rows, length of the sums, columns of the result, not padded
    int64_t rp;                   // r padded to 64
    const void* a; int atype; int64_t lda; const float* fold;        // float operand; factors on its columns, or null
    const uint8_t* codes; int64_t ldc; const float* row_scale; const int32_t *row_zero, *row_sum;
    Packed w; const float* s; float d; int shift; const float* bias;
    const uint8_t* mask; int64_t ldmask;
    void* y; int ytype; int64_t ldy; int add;
};

struct Block { int64_t m0 = 0, c0 = 0; int rows = 0; const float* inv = nullptr; const float* base = nullptr; const int32_t* sums = nullptr; };   // a finished block of integer sums

struct Finish {   // how integer sums become results; a copy of its own for each thread, so that stores cannot alias it
    int64_t columns; const int32_t *zero, *code_sums; const float *s, *bias; __m512i shift;
    const uint8_t* mask; int64_t ldmask; char* y; int type; int64_t stride; bool add;
};

template <Mode MODE, int D>
INL T512 void finish_rows(const Finish& f, const Block& b, const int32_t* acc, int i0, int i1) {
    for (int h = 0; h < 2; h++) {
        const int64_t col = b.c0 + 16 * h;
        const __mmask16 k = lanes(f.columns - col);
        if (!k) return;
        const __m512 s = MODE == BACKWARD ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(k, f.s + col);
        const __m512 bias = MODE == BACKWARD || !f.bias ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(k, f.bias + col);
        const __m512i code_sums = MODE == FORWARD_INT ? _mm512_loadu_si512(f.code_sums + col) : _mm512_setzero_si512();
        char* y = f.y + (b.m0 + i0) * f.stride;
        for (int i = i0; i < i1; i++, y += f.stride) {
            const int32_t* t = acc + i * 32 + 16 * h;
            __m512 v;
            if (MODE == FORWARD_INT) {   // exact: sum (c+d)(q-zero), times 2**shift
                __m512i n = _mm512_sub_epi32(_mm512_load_si512(t), _mm512_mullo_epi32(_mm512_set1_epi32(f.zero[b.m0 + i]), code_sums));
                v = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_sllv_epi32(n, f.shift), _mm512_set1_epi32(b.sums[i])));
            } else {
                __m512 n[4];
                for (int e = 0; e < D; e++) n[e] = _mm512_cvtepi32_ps(_mm512_load_si512(t + e * 1024));
                const __m512 b8 = _mm512_set1_ps(256.f), b16 = _mm512_set1_ps(65536.f);
                v = _mm512_fmadd_ps(n[1], b8, n[0]);
                if (D == 3) v = _mm512_fmadd_ps(n[2], b16, v);
                if (D == 4) v = _mm512_fmadd_ps(_mm512_fmadd_ps(n[3], b8, n[2]), b16, v);
                v = _mm512_add_ps(v, _mm512_set1_ps(b.base[i]));
            }
            v = _mm512_mul_ps(v, _mm512_set1_ps(b.inv[i]));
            if (MODE != BACKWARD) v = f.bias ? _mm512_fmadd_ps(v, s, bias) : _mm512_mul_ps(v, s);
            else {
                if (f.mask) { uint16_t bits; memcpy(&bits, f.mask + (b.m0 + i) * f.ldmask + col / 8, 2); v = _mm512_maskz_mov_ps(bits, v); }
                if (f.add) v = _mm512_add_ps(v, load16(y, f.type, col, k));
            }
            store16(y, f.type, col, k, v);
        }
    }
}

// four tiles of sums of one byte plane; meanwhile the rows of the block before are finished, so that tile unit and vector unit both work
template <Mode MODE, int D, bool SIGNED>
INL T512 void plane(const char* a, const char* b0, const char* b1, int64_t steps, int32_t* out, bool more, const Finish& f, const Block& before, const int32_t* acc, int& row, int rate) {
    if (more) { TLOADS(0, out, 128); TLOADS(1, out + 16, 128); TLOADS(2, out + 512, 128); TLOADS(3, out + 528, 128); }
    else { TZERO(0); TZERO(1); TZERO(2); TZERO(3); }
    for (int64_t i = 0; i < steps; i++, a += 2048, b0 += 1024, b1 += 1024) {
        TLOAD(4, a); TLOAD(6, b0);
        if (SIGNED) TDOT("tdpbssd", 0, 4, 6); else TDOT("tdpbusd", 0, 4, 6);
        TLOAD(7, b1);
        if (SIGNED) TDOT("tdpbssd", 1, 4, 7); else TDOT("tdpbusd", 1, 4, 7);
        TLOAD(5, a + 1024);
        if (SIGNED) { TDOT("tdpbssd", 2, 5, 6); TDOT("tdpbssd", 3, 5, 7); } else { TDOT("tdpbusd", 2, 5, 6); TDOT("tdpbusd", 3, 5, 7); }
        if (row < before.rows) {
            const int end = std::min(row + rate, before.rows);
            finish_rows<MODE, D>(f, before, acc, row, end);
            row = end;
        }
    }
    TSTORE(0, out, 128); TSTORE(1, out + 16, 128); TSTORE(2, out + 512, 128); TSTORE(3, out + 528, 128);
}

// ---------------------------------------------------------------- first operand: 32 rows in tile order
// float rows as fixed point numbers: panel[digit][step][row/16][row%16][64]
template <int D>
static T512 void fixed_row(const Product& p, const void* x, float* tmp, char* panel, int64_t place, float* inv, float* base) {
    __m512i big = _mm512_setzero_si512(), big2 = big, abs = _mm512_set1_epi32(0x7fffffff);
    int64_t i = 0;
    for (; i + 32 <= p.r; i += 32) {
        __m512 v = load16(x, p.atype, i, 0xffff), w = load16(x, p.atype, i + 16, 0xffff);
        if (p.fold) { v = _mm512_mul_ps(v, _mm512_loadu_ps(p.fold + i)); w = _mm512_mul_ps(w, _mm512_loadu_ps(p.fold + i + 16)); }
        _mm512_store_ps(tmp + i, v); _mm512_store_ps(tmp + i + 16, w);
        big = _mm512_max_epu32(big, _mm512_and_si512(_mm512_castps_si512(v), abs)); big2 = _mm512_max_epu32(big2, _mm512_and_si512(_mm512_castps_si512(w), abs));
    }
    for (; i < p.rp; i += 16) {
        __mmask16 k = lanes(p.r - i);
        __m512 v = load16(x, p.atype, i, k);
        if (p.fold) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(k, p.fold + i));
        _mm512_store_ps(tmp + i, v);
        big = _mm512_max_epu32(big, _mm512_and_si512(_mm512_castps_si512(v), abs));
    }
    const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(big, big2));
    float most, scale, top = D == 2 ? 32767.f : 8388600.f;   // a little room: the product below rounds
    memcpy(&most, &bits, 4);
    const bool bad = bits >= 0x7f800000u;
    if (bad) { scale = 0; *inv = NAN; }
    else if (D == 4) { int e; most = std::max(most, 0x1p-90f); std::frexp(most, &e); scale = std::ldexp(1.f, 30 - e); *inv = std::ldexp(1.f, e - 30); }
    else { most = std::max(most, 0x1p-100f); scale = top / most; *inv = most / top; }
    const __m512 sc = _mm512_set1_ps(scale);
    const __m512i lane = _mm512_set_epi32(0x3f3b3733, 0x2f2b2723, 0x1f1b1713, 0x0f0b0703, 0x3e3a3632, 0x2e2a2622, 0x1e1a1612, 0x0e0a0602,
                                          0x3d393531, 0x2d292521, 0x1d191511, 0x0d090501, 0x3c383430, 0x2c282420, 0x1c181410, 0x0c080400);
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    const int64_t digit = p.rp * 32;
    char* out = panel + place;
    for (i = 0; i < p.rp; i += 64, out += 2048) {
        __m512i v[4], plane[4];
        for (int j = 0; j < 4; j++) {
            v[j] = bad ? _mm512_setzero_si512() : _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(tmp + i + 16 * j), sc));
            v[j] = _mm512_permutexvar_epi8(lane, v[j]);   // byte e of 16 numbers in 128-bit lane e
        }
        __m512i l = _mm512_shuffle_i32x4(v[0], v[1], 0x44), m = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
        plane[0] = _mm512_shuffle_i32x4(l, m, 0x88); plane[1] = _mm512_shuffle_i32x4(l, m, 0xdd);
        if (D > 2) {
            l = _mm512_shuffle_i32x4(v[0], v[1], 0xee); m = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
            plane[2] = _mm512_shuffle_i32x4(l, m, 0x88); plane[3] = _mm512_shuffle_i32x4(l, m, 0xdd);
        }
        for (int e = 0; e < D; e++) {   // store a plane; add up its bytes, of which only the highest has a sign
            _mm512_store_si512(out + e * digit, plane[e]);
            sum[e] = e < D - 1 ? _mm512_dpbusd_epi32(sum[e], plane[e], ones) : _mm512_dpbusd_epi32(sum[e], ones, plane[e]);
        }
    }
    int64_t total = 0;
    if (p.d != 0) for (int e = D - 1; e >= 0; e--) total = total * 256 + _mm512_reduce_add_epi32(sum[e]);
    *base = (float)((double)p.d * (double)total);
}

static T512 void code_row(const uint8_t* q, int64_t rp, char* out) {
    for (int64_t i = 0; i < rp; i += 64, out += 2048) _mm512_store_si512(out, _mm512_loadu_si512(q + i));
}

static T512 void blank_row(int64_t bytes, char* out) {
    for (int64_t i = 0; i < bytes; i += 64, out += 2048) _mm512_store_si512(out, _mm512_setzero_si512());
}

// ---------------------------------------------------------------- second operand of the backward product
// the packed codes with outputs and inputs changed over: out[input/16][output/64], rows of 4 outputs x 16 inputs
static T512 void turn(const Packed& w, int64_t k0, int64_t k1, char* out) {
    const __m512i four = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const int64_t steps = w.np / 64;
    for (int64_t kb = k0 / 64; kb < k1 / 64; kb++)
        for (int64_t ob = 0; ob < w.np / 16; ob++) {
            const char* t = w.tile(ob, kb);
            char* to = out + ((kb - k0 / 64) * 4 * steps + ob / 4) * 1024 + ob % 4 * 256;
            for (int j = 0; j < 4; j++, t += 256, to += steps * 1024) {
                __m512i r0 = _mm512_loadu_si512(t), r1 = _mm512_loadu_si512(t + 64), r2 = _mm512_loadu_si512(t + 128), r3 = _mm512_loadu_si512(t + 192);
                __m512i a = _mm512_shuffle_i32x4(r0, r1, 0x44), b = _mm512_shuffle_i32x4(r2, r3, 0x44), c = _mm512_shuffle_i32x4(r0, r1, 0xee), d = _mm512_shuffle_i32x4(r2, r3, 0xee);
                _mm512_store_si512(to, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(a, b, 0x88), four));
                _mm512_store_si512(to + 64, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(a, b, 0xdd), four));
                _mm512_store_si512(to + 128, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(c, d, 0x88), four));
                _mm512_store_si512(to + 192, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(c, d, 0xdd), four));
            }
        }
}

// ---------------------------------------------------------------- the loops
struct Buffer {   // kept per thread between calls
    void* p = nullptr; size_t n = 0;
    char* get(size_t want) {
        if (want > n) {
            free(p); n = up((int64_t)want, 2 << 20); p = aligned_alloc(2 << 20, n);
            if (!p) { n = 0; return nullptr; }
#if defined(__linux__)
            madvise(p, n, MADV_HUGEPAGE);   // fewer page walks; only a hint
#endif
        }
        return (char*)p;
    }
    ~Buffer() { free(p); }
};
static thread_local Buffer left, right;

static const int64_t ROWS = 32, SUPER = 16;   // rows of a panel; panels that pass one after another where the second operand comes in several chunks
static const int64_t SPAN = 12;               // steps of 64 for which the second operand stays in the first-level cache
static const int64_t CHUNK = 640 << 10;       // bytes of the second operand that stay in the second-level cache

static int64_t chunk_width(const Product& p) { return std::max<int64_t>(64, CHUNK / p.rp / 64 * 64); }   // in columns

template <Mode MODE, int D>
static T512 void part(const Product& p, int64_t p0, int64_t p1, int64_t c0, int64_t c1) {   // panels p0..p1, columns c0..c1 (multiples of 64)
    const int64_t steps = p.rp / 64, size = D * p.rp * ROWS, width = chunk_width(p);
    const int64_t super = c1 - c0 > width ? SUPER : p1 - p0, kept = c1 - c0 > width ? std::min(SUPER, p1 - p0) : 1;   // panels in `left` at a time
    char* a = left.get(size * kept + p.rp * 4 + kept * ROWS * 12 + 2 * D * 4096);
    int32_t* acc = (int32_t*)a; a += 2 * D * 4096;
    float* tmp = (float*)(a + size * kept);
    float *inv = tmp + p.rp, *base = inv + kept * ROWS;
    int32_t* sums = (int32_t*)(base + kept * ROWS);
    char* turned = MODE == BACKWARD ? right.get(std::min(width, c1 - c0) * p.rp) : nullptr;
    const Finish f{p.c, p.row_zero, p.w.sums, p.s, p.bias, _mm512_set1_epi32(p.shift), p.mask, p.ldmask, (char*)p.y, p.ytype, p.ldy * (p.ytype == F32 ? 4 : 2), p.add != 0};
    const int rate = (int)((ROWS + steps * D - 1) / (steps * D));
    const int64_t pieces = D > 1 ? (steps + SPAN - 1) / SPAN : 1, span = (steps + pieces - 1) / pieces;
    Tiles unit;
    for (int64_t s0 = p0; s0 < p1; s0 += super)
        for (int64_t w0 = c0; w0 < c1; w0 += width) {
            const int64_t w1 = std::min(c1, w0 + width), s1 = std::min(p1, s0 + super);
            if (MODE == BACKWARD) turn(p.w, w0, w1, turned);
            Block before;
            int now = 0;
            for (int64_t q = s0; q < s1; q++) {
                const int64_t slot = kept > 1 ? q - s0 : 0, m0 = q * ROWS;
                const int rows = (int)std::min(ROWS, p.m - m0);
                char* panel = a + slot * size;
                float *pi = inv + slot * ROWS, *pb = base + slot * ROWS;
                int32_t* ps = sums + slot * ROWS;
                if (w0 == c0 || kept == 1) {
                    if (kept == 1) { finish_rows<MODE, D>(f, before, acc + (now ^ 1) * D * 1024, 0, before.rows); before.rows = 0; }   // it reads inv
                    for (int i = 0; i < ROWS; i++) {
                        const int64_t place = i / 16 * 1024 + i % 16 * 64;
                        if (i >= rows) { for (int e = 0; e < D; e++) blank_row(p.rp, panel + e * p.rp * 32 + place); continue; }
                        if (MODE == FORWARD_INT) {
                            code_row(p.codes + (m0 + i) * p.ldc, p.rp, panel + place);
                            pi[i] = std::ldexp(p.row_scale[m0 + i], -p.shift);
                            ps[i] = (int32_t)(std::ldexp(p.d, p.shift)) * (p.row_sum[m0 + i] - (int32_t)p.r * p.row_zero[m0 + i]);
                        } else if (D > 1) fixed_row<D < 2 ? 2 : D>(p, row_of(p.a, p.atype, (m0 + i) * p.lda), tmp, panel, place, pi + i, pb + i);
                    }
                }
                __asm__ volatile("" ::: "memory");
                for (int64_t c = w0; c < w1 && c < p.c; c += 32) {
                    const char* b0 = MODE == BACKWARD ? turned + (c - w0) / 16 * steps * 1024 : p.w.tile(c / 16, 0);
                    int row = 0;
                    int32_t *out = acc + now * D * 1024, *done = acc + (now ^ 1) * D * 1024;
                    for (int64_t i = 0; i < steps; i += span) {   // so short that the second operand stays in the first-level cache for all planes
                        const int64_t n = std::min(span, steps - i);
                        const char *l = panel + i * 2048, *r0 = b0 + i * 1024, *r1 = r0 + steps * 1024;
                        for (int e = 0; e < D - 1; e++) plane<MODE, D, false>(l + e * p.rp * 32, r0, r1, n, out + e * 1024, i > 0, f, before, done, row, rate);
                        plane<MODE, D, MODE != FORWARD_INT>(l + (D - 1) * p.rp * 32, r0, r1, n, out + (D - 1) * 1024, i > 0, f, before, done, row, rate);
                    }
                    before.m0 = m0; before.c0 = c; before.rows = rows; before.inv = pi; before.base = pb; before.sums = ps;
                    now ^= 1;
                }
            }
            finish_rows<MODE, D>(f, before, acc + (now ^ 1) * D * 1024, 0, before.rows);
        }
}

template <Mode MODE, int D>
static int run(const Product& p) {
    if (p.m <= 0 || p.c <= 0) return OK;
    const int64_t panels = up(p.m, ROWS) / ROWS, columns = up(p.c, 64) / 64;
    const int threads = (double)p.m * p.r * p.c < 1e5 ? 1 : thread_count();
    int64_t best = INT64_MAX, tr = 1, tc = 1;
    for (int64_t t = 1; t <= threads; t++) {   // rows among t threads, columns among the others: the cheapest slowest thread, in cycles / r
        int64_t rows = up(panels, t) / t, cols = up(columns, threads / t) / (threads / t), chunks = up(cols * 64, chunk_width(p)) / chunk_width(p);
        int64_t again = chunks > 1 ? up(rows, SUPER) / SUPER : 1;   // times that the second operand comes in
        int64_t cost = rows * cols * 4 * D + (MODE == BACKWARD ? 10 : 3) * cols * again + (MODE == FORWARD_INT ? 3 : 21) * rows + (chunks > 1 ? D * rows * chunks : 0);   // as measured
        if (cost < best) { best = cost; tr = t; tc = threads / t; }
    }
#pragma omp parallel for schedule(static, 1) num_threads((int)(tr * tc)) if (tr * tc > 1)
    for (int64_t t = 0; t < tr * tc; t++) {
        int64_t i = t / tc, j = t % tc;
        int64_t p0 = panels * i / tr, p1 = panels * (i + 1) / tr, c0 = columns * j / tc * 64, c1 = columns * (j + 1) / tc * 64;
        if (p0 < p1 && c0 < c1) part<MODE, D>(p, p0, p1, c0, c1);
    }
    return OK;
}

template <Mode MODE>
static int run_digits(const Product& p, int digits) {
    return digits == 2 ? run<MODE, 2>(p) : digits == 3 ? run<MODE, 3>(p) : digits == 4 ? run<MODE, 4>(p) : NO_RANGE;
}

API int sl_forward(const uint8_t* codes, int64_t ldc, const float* row_scale, const int32_t* row_zero, const int32_t* row_sum, int64_t m, int64_t n, int64_t k,
                   const void* packed, const float* s, float d, const float* bias, void* y, int ytype, int64_t ldy) {
    if (!(features() & 2)) return NO_CPU;
    Product p{m, k, n, up(k, 64), nullptr, 0, 0, nullptr, codes, ldc, row_scale, row_zero, row_sum, Packed(packed, n, k), s, d, 0, bias, nullptr, 0, y, ytype, ldy, 0};
    while (p.shift < 4 && std::ldexp(d, p.shift) != std::floor(std::ldexp(d, p.shift))) p.shift++;
    if (p.shift > 3 || 255. * (double)p.rp * (std::ldexp((double)p.w.most, p.shift) + std::fabs(std::ldexp(d, p.shift))) >= 2147483647.) return NO_RANGE;
    return run<FORWARD_INT, 1>(p);
}

API int sl_forward_float(const void* x, int xtype, int64_t ldx, int64_t m, int64_t n, int64_t k, const void* packed, const float* s, float d, int digits,
                         const float* bias, void* y, int ytype, int64_t ldy) {
    if (!(features() & 4)) return NO_CPU;
    if (k > 65536) return NO_RANGE;
    Product p{m, k, n, up(k, 64), x, xtype, ldx, nullptr, nullptr, 0, nullptr, nullptr, nullptr, Packed(packed, n, k), s, d, 0, bias, nullptr, 0, y, ytype, ldy, 0};
    return run_digits<FORWARD_FLOAT>(p, digits);
}

API int sl_backward(const void* gy, int gtype, int64_t ldg, int64_t m, int64_t n, int64_t k, const void* packed, const float* s, float d, int digits,
                    const void* mask, int64_t ldmask, void* gx, int gxtype, int64_t ldgx, int add) {
    if (!(features() & 4)) return NO_CPU;
    if (n > 65536) return NO_RANGE;
    Product p{m, n, k, up(n, 64), gy, gtype, ldg, s, nullptr, 0, nullptr, nullptr, nullptr, Packed(packed, n, k), s, d, 0, nullptr, (const uint8_t*)mask, ldmask, gx, gxtype, ldgx, add};
    return run_digits<BACKWARD>(p, digits);
}
API int sl_train_features(void) { return features(); }
#else   // another processor or compiler: the caller has its torch path
API int sl_train_features(void) { return 0; }
#endif
