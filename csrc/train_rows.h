// Training kernels for vectors of one level, written once: train_vectors.cpp includes this in a namespace for each.
//
// SL_WIDE: vectors of 64 bytes, else of 32. SL_BYTES: DOT multiplies bytes, unsigned by signed, and adds four products
// in 32 bits. Without such an instruction numbers of 16 bits are multiplied, and two products added: then a row of
// fixed point numbers needs half as many digits.
#include "train_lanes.h"

// ---------------------------------------------------------------- activations to codes
static Range row_range(const void* x, int type, int64_t k) {
    F lo = all(INFINITY), hi = all(-INFINITY), lo2 = lo, hi2 = hi;
    I big = each(0);
    int64_t i = 0;
    for (; i + 2 * W <= k; i += 2 * W) {
        const F v = load(x, type, i, W), w = load(x, type, i + W, W);
        lo = least(lo, v); hi = most(hi, v);
        lo2 = least(lo2, w); hi2 = most(hi2, w);
        big = larger(big, larger(magnitude(v), magnitude(w)));
    }
    for (; i < k; i += W) {
        const M m = first(k - i);
        const F v = load(x, type, i, k - i);
        lo = pick(m, least(lo, v), lo); hi = pick(m, most(hi, v), hi);
        big = larger(big, magnitude(v));
    }
    Range r;
    r.lo = least_of(least(lo, lo2)); r.hi = most_of(most(hi, hi2));
    const uint32_t b = largest_of(big);
    if (b > 0x7f800000u) r.lo = r.hi = NAN;
    r.bad = b >= 0x7f800000u;
    return r;
}

template <int TYPE, bool KEPT, bool RANGE>
static int32_t codes_of(const void* x, int64_t k, Grid g, Limits to, uint8_t* codes, uint64_t* kept, Range* range) {
    const F inv = all(g.inv), lo = all((float)(to.qmin - g.zero)), hi = all((float)(to.qmax - g.zero));
    const I zero = each(g.zero), none = each(0);
    I sum = none, big = none;
    F smallest = all(INFINITY), largest = all(-INFINITY);
    for (int64_t i = 0; i < k; i += 64) {
        uint64_t bits = 0;
        for (int j = 0; j < 64 / W; j++) {
            const int64_t left = k - i - W * j;
            const M m = first(left);
            F v = load(x, TYPE, i + W * j, left);
            if (RANGE) {
                smallest = pick(m, least(smallest, v), smallest); largest = pick(m, most(largest, v), largest);
                big = larger(big, magnitude(v));
            }
            v = mul(v, inv);
            I q = rounded(least(most(v, lo), hi));   // NaN goes to lo
            if (KEPT) bits |= equal(q, rounded(v)) << (W * j);
            q = pick(m, plus(q, zero), none);
            sum = plus(sum, q);
            store_bytes(codes + i + W * j, q);
        }
        if (KEPT) {
            if (k - i < 64) bits &= (1ull << (k - i)) - 1;
            memcpy(kept + i / 64, &bits, 8);
        }
    }
    if (RANGE) {
        const uint32_t b = largest_of(big);
        range->lo = b > 0x7f800000u ? NAN : least_of(smallest);
        range->hi = b > 0x7f800000u ? NAN : most_of(largest);
        range->bad = b >= 0x7f800000u;
    }
    return (int32_t)total_of(sum);
}

template <int TYPE>
INL int32_t codes_row(const void* x, int64_t k, Grid g, Limits to, uint8_t* codes, uint64_t* kept, Range* range) {
    if (kept && range) return codes_of<TYPE, true, true>(x, k, g, to, codes, kept, range);
    if (kept) return codes_of<TYPE, true, false>(x, k, g, to, codes, kept, range);
    if (range) return codes_of<TYPE, false, true>(x, k, g, to, codes, kept, range);
    return codes_of<TYPE, false, false>(x, k, g, to, codes, kept, range);
}
static int32_t quantize_row(const void* x, int type, int64_t k, Grid g, Limits to, uint8_t* codes, uint64_t* kept,
                            Range* range) {
    return type == F32 ? codes_row<F32>(x, k, g, to, codes, kept, range)
                       : codes_row<BF16>(x, k, g, to, codes, kept, range);
}

// ---------------------------------------------------------------- gradient of a static range
// Of a row: zeros in the gradient where x was clipped; before that, what scale and lower end of the range get.
// Sums are kept for sixteen numbers apart, whatever a vector holds, so that all levels add in the same order.
static void range_row(const void* x, int xtype, void* g, int gtype, int64_t k, const Ends& e, double* sums) {
    enum { PARTS = 16 / W };
    const F inv = all(e.inv), lo = all(e.lo), hi = all(e.hi), qmin = all(e.qmin), qmax = all(e.qmax), none = all(0);
    F to_scale[PARTS], to_end[PARTS];
    for (int p = 0; p < PARTS; p++) to_scale[p] = to_end[p] = none;
    for (int64_t i = 0; i < k; i += 16)
        for (int p = 0; p < PARTS; p++) {
            const int64_t at = i + p * W, left = k - at;
            const F u = mul(load(x, xtype, at, left), inv), q = nearest(u), v = load(g, gtype, at, left);
            const M low = below(q, lo), high = below(hi, q), clipped = either(low, high);
            to_scale[p] = fma(v, pick(low, qmin, pick(high, qmax, minus(q, u))), to_scale[p]);
            to_end[p] = plus(to_end[p], pick(clipped, v, none));
            store(g, gtype, at, left, pick(clipped, none, v));
        }
    sums[0] = sums[1] = 0;
    for (int p = 0; p < PARTS; p++) {
        float a[W], b[W];
        storef(a, to_scale[p]); storef(b, to_end[p]);
        for (int i = 0; i < W; i++) { sums[0] += a[i]; sums[1] += b[i]; }
    }
}

// ---------------------------------------------------------------- first operand: a line for each digit of a row
#ifdef SL_BYTES
enum { SIZE = 1, UNIT = 4 };                 // bytes of a digit; digits that are multiplied at once
constexpr int lines(int digits) { return digits; }
#else
enum { SIZE = 2, UNIT = 2 };
constexpr int lines(int digits) { return digits > 2 ? 2 : 1; }
constexpr int digit_bits(int digits) { return digits == 3 ? 12 : 16; }
#endif

#ifdef SL_BYTES
// Byte e of each of 4*W numbers to out + e*line.
template <int D>
INL void split(const I* v, char* out, int64_t line) {
    I q[4], p[4];
#ifdef SL_WIDE
    const __m512i to_bytes = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int j = 0; j < 4; j++) q[j] = _mm512_shuffle_epi8(v[j], to_bytes);
    const I a = _mm512_unpacklo_epi32(q[0], q[1]), b = _mm512_unpacklo_epi32(q[2], q[3]);
    const I c = _mm512_unpackhi_epi32(q[0], q[1]), d = _mm512_unpackhi_epi32(q[2], q[3]);
    p[0] = _mm512_unpacklo_epi64(a, b); p[1] = _mm512_unpackhi_epi64(a, b);
    p[2] = _mm512_unpacklo_epi64(c, d); p[3] = _mm512_unpackhi_epi64(c, d);
    for (int e = 0; e < D; e++) storei(out + e * line, _mm512_permutexvar_epi32(order, p[e]));
#else
    const __m256i to_bytes = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int j = 0; j < 4; j++) q[j] = _mm256_shuffle_epi8(v[j], to_bytes);
    const I a = _mm256_unpacklo_epi32(q[0], q[1]), b = _mm256_unpacklo_epi32(q[2], q[3]);
    const I c = _mm256_unpackhi_epi32(q[0], q[1]), d = _mm256_unpackhi_epi32(q[2], q[3]);
    p[0] = _mm256_unpacklo_epi64(a, b); p[1] = _mm256_unpackhi_epi64(a, b);
    p[2] = _mm256_unpacklo_epi64(c, d); p[3] = _mm256_unpackhi_epi64(c, d);
    for (int e = 0; e < D; e++) storei(out + e * line, _mm256_permutevar8x32_epi32(p[e], order));
#endif
}
#else
INL void store_words(char* p, I a, I b) {
    storei(p, _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
}
// Digits from the low end, each with a sign: lo + 2**bits * hi.
template <int D>
INL void split(const I* v, char* out, int64_t line) {
    enum { B = digit_bits(D) };
    for (int j = 0; j < 4; j += 2) {
        I lo[2], hi[2];
        for (int h = 0; h < 2; h++) {
            lo[h] = right_by(left_by(v[j + h], 32 - B), 32 - B);
            hi[h] = right_by(minus(v[j + h], lo[h]), B);
        }
        store_words(out + j * W * 2, lo[0], lo[1]);
        if (D > 2) store_words(out + line + j * W * 2, hi[0], hi[1]);
    }
}
#endif

// A float row as fixed point numbers; `tmp` has room for rp numbers.
template <int D>
static void fixed_row(const Product& p, const void* x, float* tmp, char* out, int64_t line, float* inv, float* base) {
    I big = each(0), big2 = big;
    int64_t i = 0;
    for (; i + 2 * W <= p.r; i += 2 * W) {
        F v = load(x, p.atype, i, W), w = load(x, p.atype, i + W, W);
        if (p.fold) { v = mul(v, loadf(p.fold + i)); w = mul(w, loadf(p.fold + i + W)); }
        storef(tmp + i, v); storef(tmp + i + W, w);
        big = larger(big, magnitude(v)); big2 = larger(big2, magnitude(w));
    }
    for (; i < p.rp; i += W) {
        F v = load(x, p.atype, i, p.r - i);
        if (p.fold) v = mul(v, load(p.fold, F32, i, p.r - i));
        storef(tmp + i, v);
        big = larger(big, magnitude(v));
    }
    const Fixed f = fixed_scale(largest_of(larger(big, big2)), D);
    const F scale = all(f.scale);
    I low = each(0), high = low;   // sums of the numbers, in halves
    for (i = 0; i < p.rp; i += 4 * W, out += 4 * W * SIZE) {
        I v[4];
        for (int j = 0; j < 4; j++) {
            v[j] = f.bad ? each(0) : rounded(mul(loadf(tmp + i + W * j), scale));
            low = plus(low, both(v[j], each(0xffff))); high = plus(high, right_by(v[j], 16));
#ifdef SL_BYTES
            v[j] = minus(v[j], each((int32_t)(1u << (8 * D - 1))));   // flips the sign bit: all bytes without sign
#endif
        }
        split<D>(v, out, line);
    }
    *inv = f.inv;
    *base = (float)((double)p.d * (double)(total_of(high) * 65536 + total_of(low)));
}

// ---------------------------------------------------------------- second operand, of the bits that count
// Columns k0..k1 (backward) or c0..c1 (forward): [16 columns][UNIT numbers to sum][16 columns][UNIT]
#ifdef SL_BYTES
static void turn(const Packed& w, int64_t k0, int64_t k1, char* out) {   // outputs and inputs swapped
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i live = _mm_set1_epi8((char)w.live);
    for (int64_t kb = k0 / 64; kb < k1 / 64; kb++)
        for (int64_t ob = 0; ob < w.np / 16; ob++) {
            const char* t = w.tile(ob, kb);
            char* to = out + (kb - k0 / 64) * 4 * w.np * 16 + ob * 256;
            for (int r = 0; r < 16; r++)
                for (int q = 0; q < 4; q++) {
                    const __m128i v = _mm_and_si128(_mm_loadu_si128((const __m128i*)(t + r * 64 + q * 16)), live);
                    char* at = to + r / 4 * w.np * 16 + q * 64 + r % 4 * 16;
                    _mm_storeu_si128((__m128i*)at, _mm_shuffle_epi8(v, order));
                }
        }
}
static void copy_live(const Packed& w, int64_t c0, int64_t c1, char* out) {   // as they lie
    const char* from = w.tile(c0 / 16, 0);
    const I live = each((int32_t)(w.live * 0x01010101u));
    for (int64_t i = 0; i < (c1 - c0) * w.kp; i += W * 4) storei(out + i, both(loadi(from + i), live));
}
// What the flipped sign bits add to a column: 128 times the sum of its codes.
static void flips(const char* b, int64_t columns, int64_t units, int32_t* out) {
    for (int64_t c = 0; c < columns; c += 16, b += units * 64)
        for (int h = 0; h < 16; h += W) {
            I s = each(0);
            for (int64_t u = 0; u < units; u++) s = DOT(s, each(0x01010101), loadi(b + u * 64 + h * 4));
            storei(out + c + h, left_by(s, 7));
        }
}
#else
static void store_pairs(char* to, __m128i v, __m128i order) {
    v = _mm_shuffle_epi8(v, order);   // two units of four columns
    _mm_storeu_si128((__m128i*)to, _mm_cvtepi8_epi16(v));
    _mm_storeu_si128((__m128i*)(to + 64), _mm_cvtepi8_epi16(_mm_srli_si128(v, 8)));
}
static void widen_codes(const Packed& w, int64_t c0, int64_t c1, char* out) {
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m128i live = _mm_set1_epi8((char)w.live);
    for (int64_t ob = c0 / 16; ob < c1 / 16; ob++)
        for (int64_t kb = 0; kb < w.kp / 64; kb++) {
            const char* t = w.tile(ob, kb);
            char* to = out + (ob - c0 / 16) * w.kp * 32 + kb * 2048;
            for (int r = 0; r < 16; r++)
                for (int q = 0; q < 4; q++) {
                    const __m128i v = _mm_loadu_si128((const __m128i*)(t + r * 64 + q * 16));
                    store_pairs(to + r * 128 + q * 16, _mm_and_si128(v, live), order);
                }
        }
}
static void turn(const Packed& w, int64_t k0, int64_t k1, char* out) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const __m128i live = _mm_set1_epi8((char)w.live);
    for (int64_t kb = k0 / 64; kb < k1 / 64; kb++)
        for (int64_t ob = 0; ob < w.np / 16; ob++) {
            const char* t = w.tile(ob, kb);
            char* to = out + (kb - k0 / 64) * 4 * w.np * 32 + ob * 512;
            for (int r = 0; r < 16; r++)
                for (int q = 0; q < 4; q++) {
                    const __m128i v = _mm_loadu_si128((const __m128i*)(t + r * 64 + q * 16));
                    store_pairs(to + r / 4 * w.np * 32 + q * 128 + r % 4 * 16, _mm_and_si128(v, live), order);
                }
        }
}
#endif

// ---------------------------------------------------------------- the product
#ifdef SL_WIDE
enum { VECTORS = 4, SPAN = 96 };             // of columns; units for which the second operand stays in the first cache
#else
enum { VECTORS = 2, SPAN = 384 };
#endif
enum { GROUP = VECTORS * W, PANEL = 24 };    // columns and rows of a block of results

// R lines times GROUP columns; all sums are in registers
template <int R>
static void multiply(const char* a, int64_t line, const char* b, int64_t far, int64_t units, int32_t* out, bool more) {
    I s[R][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) s[r][v] = more ? loadi(out + r * GROUP + v * W) : each(0);
    for (int64_t u = 0; u < units; u++, a += 4, b += 64) {
        I w[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) w[v] = loadi(b + v * W / 16 * far + v * W % 16 * 4);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t x;
            memcpy(&x, a + r * line, 4);
            const I q = each(x);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) s[r][v] = DOT(s[r][v], q, w[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) storei(out + r * GROUP + v * W, s[r][v]);
}

struct Sums {   // of a panel and GROUP columns
    int64_t m0, c0; int rows;
    const int32_t* acc; const double* totals;   // one of them
    const float *inv, *base; const int32_t *sums, *flips;
};

template <Mode MODE, int D>
INL Wide whole(const Sums& b, int64_t at, int h) {   // the exact sum
    enum { E = lines(D) };
#ifdef SL_BYTES
    I top = loadi(b.acc + (at + E - 1) * GROUP + h);
    Wide n = widen(minus(top, loadi(b.flips + h)));
    for (int e = E - 1; e--;) n = fma(n, 256., widen(loadi(b.acc + (at + e) * GROUP + h)));
#else
    Wide n = b.totals ? loadw(b.totals + (at + E - 1) * GROUP + h) : widen(loadi(b.acc + (at + E - 1) * GROUP + h));
    for (int e = E - 1; e--;) {
        const int64_t i = (at + e) * GROUP + h;
        n = fma(n, (double)(1 << digit_bits(D)), b.totals ? loadw(b.totals + i) : widen(loadi(b.acc + i)));
    }
#endif
    return n;
}

template <Mode MODE, int D>
static void finish(const Product& p, const Sums& b) {
    const int64_t stride = p.ldy * (p.ytype == F32 ? 4 : 2);
    for (int h = 0; h < GROUP; h += W) {
        const int64_t col = b.c0 + h, left = p.c - col;
        if (left <= 0) return;
        const F s = MODE == BACKWARD ? all(0) : load(p.s, F32, col, left);
        const F bias = MODE == BACKWARD || !p.bias ? all(0) : load(p.bias, F32, col, left);
        const I code_sums = MODE == FORWARD_INT ? loadi(p.w.sums + col) : each(0);
        char* y = (char*)p.y + b.m0 * stride;
        for (int i = 0; i < b.rows; i++, y += stride) {
            F v;
            if (MODE == FORWARD_INT) {   // exact: sum (c+d)(q-zero), times 2**shift
                const I off = times(each(p.row_zero[b.m0 + i]), code_sums);
                const I n = left_by(minus(loadi(b.acc + i * GROUP + h), off), p.shift);
                v = to_float(plus(n, each(b.sums[i])));
            } else v = plus(narrow(whole<MODE, D>(b, i * lines(D), h)), all(b.base[i]));
            v = mul(v, all(b.inv[i]));
            if (MODE != BACKWARD) v = p.bias ? fma(v, s, bias) : mul(v, s);
            else {
                if (p.mask) v = pick(unbits(p.mask + (b.m0 + i) * p.ldmask + col / 8), v, all(0));
                if (p.add) v = plus(v, load(y, p.ytype, col, left));
            }
            store(y, p.ytype, col, left, v);
        }
    }
}

static thread_local Buffer left_room, right_room;

template <Mode MODE, int D>
static void part(const Product& p, int64_t p0, int64_t p1, int64_t c0, int64_t c1) {
    enum { E = lines(D), R = E == 4 ? 4 : 6 };
    const bool direct = MODE == FORWARD_INT && SIZE == 1;      // codes are used where they lie
    const bool packed = MODE != BACKWARD && SIZE == 1 && p.w.live == 0xff;   // and those of the weight
    const int64_t line = direct ? p.ldc : p.rp * SIZE, units = p.rp / UNIT, far = units * 64;
    const int64_t width = p.width < c1 - c0 ? p.width : c1 - c0;
    const bool chunks = c1 - c0 > width;
    const int64_t super = chunks ? SUPER : 1, kept = super * PANEL;
#ifdef SL_BYTES
    const bool spill = false;
    const int64_t most_units = SPAN;
#else   // a sum of 32 bits holds so many products of digits with codes
    const int64_t most_units = MODE == FORWARD_INT || D == 3 ? (int64_t)SPAN : 224;
    const bool spill = MODE != FORWARD_INT && (D == 3 ? p.rp > 8128 : units > most_units);
#endif
    const int64_t pieces = (units + most_units - 1) / most_units, span = (units + pieces - 1) / pieces;
    // lines, sums, totals, one row of floats; per row inv, base, sum; per column what flipped bits add
    const int64_t block = PANEL * E * GROUP;
    char* a = left_room.get((direct ? 0 : kept * E * line) + block * 12 + p.rp * 4 + kept * 12 + width * 4);
    double* totals = (double*)a;
    int32_t* acc = (int32_t*)(totals + block);
    float *tmp = (float*)(acc + block), *inv = tmp + p.rp, *base = inv + kept;
    int32_t *sums = (int32_t*)(base + kept), *flip = sums + kept;
    char* lines_at = (char*)(flip + width);
    char* second = packed ? nullptr : right_room.get(width * p.rp * SIZE);
    int64_t made = -1;   // column at which `second` begins
    for (int64_t s0 = p0; s0 < p1; s0 += super) {
        const int64_t s1 = s0 + super < p1 ? s0 + super : p1, r0 = s0 * PANEL;
        const int64_t r1 = s1 * PANEL < p.m ? s1 * PANEL : p.m;
        for (int64_t i = r0; i < r1; i++) {
            char* to = lines_at + (i - r0) * E * line;
            if (MODE == FORWARD_INT) {
                inv[i - r0] = ldexpf(p.row_scale[i], -p.shift);
                const int32_t sum = p.row_sum[i] - (int32_t)p.r * p.row_zero[i];
                sums[i - r0] = (int32_t)ldexpf(p.d, p.shift) * sum;
#ifndef SL_BYTES
                for (int64_t k = 0; k < p.rp; k += 16) {
                    const __m128i q = _mm_loadu_si128((const __m128i*)(p.codes + i * p.ldc + k));
                    storei(to + k * 2, _mm256_cvtepu8_epi16(q));
                }
#endif
            } else fixed_row<D>(p, row_of(p.a, p.atype, i * p.lda), tmp, to, line, inv + i - r0, base + i - r0);
        }
        for (int64_t w0 = c0; w0 < c1; w0 += width) {
            const int64_t w1 = w0 + width < c1 ? w0 + width : c1;
            const char* b = packed ? p.w.tile(w0 / 16, 0) : second;
            if (made != w0) {
#ifdef SL_BYTES
                if (MODE == BACKWARD) turn(p.w, w0, w1, second);
                else if (!packed) copy_live(p.w, w0, w1, second);
                if (MODE == BACKWARD) flips(b, w1 - w0, units, flip);
                if (MODE == FORWARD_FLOAT) for (int64_t c = w0; c < w1; c++) flip[c - w0] = p.w.sums[c] * 128;
#else
                if (MODE == BACKWARD) turn(p.w, w0, w1, second); else widen_codes(p.w, w0, w1, second);
#endif
                made = w0;
            }
            for (int64_t m0 = r0; m0 < r1; m0 += PANEL) {
                const int rows = (int)(m0 + PANEL < r1 ? PANEL : r1 - m0), n = rows * E;
                const char* l = direct ? (const char*)p.codes + m0 * line : lines_at + (m0 - r0) * E * line;
                for (int64_t c = w0; c < w1 && c < p.c; c += GROUP) {
                    const char* columns = b + (c - w0) / 16 * far;
                    for (int64_t u = 0; u < units; u += span) {
                        const int64_t now = u + span < units ? span : units - u;
                        const bool more = u > 0 && !spill;
                        for (int v = 0; v < n; v += R) {
                            const char *x = l + v * line + u * 4, *w = columns + u * 64;
                            int32_t* out = acc + v * GROUP;
                            switch (n - v < R ? n - v : (int)R) {
                                case 1: multiply<1>(x, line, w, far, now, out, more); break;
                                case 2: multiply<2>(x, line, w, far, now, out, more); break;
                                case 3: multiply<3>(x, line, w, far, now, out, more); break;
                                case 4: multiply<4>(x, line, w, far, now, out, more); break;
                                case 5: multiply<5>(x, line, w, far, now, out, more); break;
                                default: multiply<R>(x, line, w, far, now, out, more);
                            }
                        }
                        if (spill) for (int64_t i = 0; i < n * GROUP; i += W) {
                            const Wide s = widen(loadi(acc + i));
                            storew(totals + i, u ? plus(loadw(totals + i), s) : s);
                        }
                    }
                    const int64_t at = m0 - r0;
                    finish<MODE, D>(p, Sums{m0, c, rows, acc, spill ? totals : nullptr, inv + at, base + at, sums + at,
                                            flip + (c - w0)});
                }
            }
        }
    }
}

static const TrainTable table = {
    row_range, quantize_row, range_row,
    {{nullptr, part<FORWARD_INT, 1>, nullptr, nullptr, nullptr},
     {nullptr, nullptr, part<FORWARD_FLOAT, 2>, part<FORWARD_FLOAT, 3>, part<FORWARD_FLOAT, 4>},
     {nullptr, nullptr, part<BACKWARD, 2>, part<BACKWARD, 3>, part<BACKWARD, 4>}},
    PANEL, CHUNK};
