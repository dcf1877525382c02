// Products where every `group` inputs of a row have a step of their own; planes.cpp includes this.
//
// The sum of a group is exact: 32-bit integers, with the zero point of the weight in them from the start (its half
// at eight bits is added in float). Each is turned to float32, times its step, and added from the first group to the
// last: the order is the same for one token and for many, so a row does not depend on the rows beside it. Steps are
// those of the eight-bit code, whatever the width, as the top bit of a code stands at bit 7.
#pragma once
#include "packed.h"

// What a token's groups add up to, digit by digit (each times the zero point, negative), and behind them the half
// that eight bits need: digits+1 rows of `groups_of` numbers.
static void group_sums(const SlLinear *d, const int8_t *bytes, int digits, int32_t *out) {
    const i64 G = groups_of(d);
    const int32_t zero = d->bits == 8 ? 119 : 120 - (1 << (7 - d->bits));
    float *half = (float*)(out + digits*G);
    const __m128i ones = _mm_set1_epi8(1);
    for (i64 g = 0; g < G; g++) {
        const i64 a = g*d->group, b = a + d->group < d->kp ? a + d->group : d->kp;
        float whole = 0;
        for (int digit = digits; digit--;) {
            __m128i s = _mm_setzero_si128();
            for (i64 i = a; i < b; i += 16)
                s = _mm_dpbusd_epi32(s, ones, _mm_loadu_si128((const __m128i*)(bytes + digit*d->kp + i)));
            s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
            const int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
            out[digit*G + g] = -zero*sum;
            whole = whole*256.f + (float)sum;
        }
        half[g] = -.5f*whole;
    }
}

// 16 channels of T tokens, whose sums by group stand `digits+1` rows apart. U units make a group, 0 if another number.
template<int P, int D, int T, int U>
static void groups_block(const SlLinear *d, i64 nb, const int8_t *xs, const int32_t *sums, float *out) {
    enum { R = D*T, A = R <= 3 ? 2 : 1 };
    const i64 G = groups_of(d), units = d->kp >> 4, each = U ? U : d->group >> 4, far = (D + 1)*G;
    const uint8_t *h = d->high + nb*units*128;
    const uint8_t *m = P > 1 ? d->middle + nb*units*64 : h, *l = P > 2 ? d->low + nb*units*64 : h;
    const float *step = d->scale + nb*G*16;
    const __m512i mask = _mm512_set1_epi8((char)code_mask(d->bits));
    __m512 y[T];
    for (int t = 0; t < T; t++) y[t] = _mm512_setzero_ps();
    for (i64 g = 0, u = 0; g < G; g++) {
        __m512i a[R][A];
        for (int t = 0; t < T; t++) for (int j = 0; j < D; j++) {
            a[t*D + j][0] = _mm512_set1_epi32(sums[t*far + j*G + g]);
            for (int i = 1; i < A; i++) a[t*D + j][i] = _mm512_setzero_si512();
        }
        const i64 end = U == 2 || U == 4 ? u + U : u + each < units ? u + each : units;
        for (; u < end; u++) {
            __m512i w[4];
            unpack_unit<P>(h + u*128, m + u*64, l + u*64, mask, w);
            for (int r = 0; r < R; r++) for (int j = 0; j < 4; j++) {
                int32_t b; memcpy(&b, xs + r*d->kp + u*16 + j*4, 4);
                a[r][j % A] = _mm512_dpbusd_epi32(a[r][j % A], w[j], _mm512_set1_epi32(b));
            }
        }
        const __m512 s = _mm512_loadu_ps(step + g*16);
        for (int t = 0; t < T; t++) {
            __m512 v = _mm512_setzero_ps();
            for (int j = D; j--;) {
                __m512i sum = a[t*D + j][0];
                for (int i = 1; i < A; i++) sum = _mm512_add_epi32(sum, a[t*D + j][i]);
                v = j == D - 1 ? _mm512_cvtepi32_ps(sum)
                               : _mm512_fmadd_ps(v, _mm512_set1_ps(256.f), _mm512_cvtepi32_ps(sum));
            }
            if (P == 3) v = _mm512_add_ps(v, _mm512_set1_ps(((const float*)sums)[t*far + D*G + g]));
            y[t] = _mm512_fmadd_ps(s, v, y[t]);
        }
    }
    for (int t = 0; t < T; t++) _mm512_storeu_ps(out + t*16, y[t]);
}
typedef void (*groups_fn)(const SlLinear*, i64, const int8_t*, const int32_t*, float*);
#define SL_ONE(P, U) {groups_block<P,1,1,U>, groups_block<P,1,2,U>, groups_block<P,1,3,U>, groups_block<P,1,4,U>, \
                      groups_block<P,1,5,U>, groups_block<P,1,6,U>, groups_block<P,1,7,U>, groups_block<P,1,8,U>}
#define SL_WIDE(P, U) {groups_block<P,3,1,U>, groups_block<P,3,2,U>}
static const groups_fn groups_one[4][3][8] = {
    {SL_ONE(1,0), SL_ONE(1,2), SL_ONE(1,4)}, {SL_ONE(2,0), SL_ONE(2,2), SL_ONE(2,4)},
    {SL_ONE(3,0), SL_ONE(3,2), SL_ONE(3,4)}, {SL_ONE(4,0), SL_ONE(4,2), SL_ONE(4,4)}};
static const groups_fn groups_wide[4][3][2] = {
    {SL_WIDE(1,0), SL_WIDE(1,2), SL_WIDE(1,4)}, {SL_WIDE(2,0), SL_WIDE(2,2), SL_WIDE(2,4)},
    {SL_WIDE(3,0), SL_WIDE(3,2), SL_WIDE(3,4)}, {SL_WIDE(4,0), SL_WIDE(4,2), SL_WIDE(4,4)}};
static const groups_fn *groups_table(const SlLinear *d, int digits) {   // by tokens, less 1
    const int p = variant(d->bits) - 1, u = d->group == 32 ? 1 : d->group == 64 ? 2 : 0;
    return digits == 3 ? groups_wide[p][u] : groups_one[p][u];
}

// What `groups_block` added up, with the token's step and zero point, and the bias.
static inline __m512 groups_finish(const SlLinear *d, i64 nb, const float *s, const Row *row) {
    const __mmask16 m = head(d->n - nb*16);
    const __m512 bias = d->bias ? _mm512_maskz_loadu_ps(m, d->bias + nb*16) : _mm512_setzero_ps();
    __m512 v = _mm512_loadu_ps(s);
    if (d->act_mode)
        v = _mm512_fnmadd_ps(_mm512_set1_ps((float)row->zx), _mm512_maskz_loadu_ps(m, d->totals + nb*16), v);
    return _mm512_fmadd_ps(_mm512_set1_ps((float)row->sx), v, bias);
}
// As `gemv_range`.
static void groups_range(const SlLinear *d, const int8_t *xs, const int32_t *sums, const Row *rows, const float *h,
                         i64 m, i64 b0, i64 b1, char *y, i64 stride, int type) {
    const int D = digits_of(d), some = D == 3 ? 2 : 8;
    const groups_fn *table = groups_table(d, D);
    const i64 far = (D + 1)*groups_of(d), w = (i64)width(type);
    float s[8*16] __attribute__((aligned(64)));
    for (i64 nb = b0; nb < b1; nb++) for (i64 t0 = 0; t0 < m; t0 += some) {
        const __mmask16 lanes = head(d->n - nb*16);
        const i64 g = m - t0 < some ? m - t0 : some;
        table[g - 1](d, nb, xs + t0*D*d->kp, sums + t0*far, s);
        for (i64 t = 0; t < g; t++) {
            __m512 v = groups_finish(d, nb, s + t*16, rows + t0 + t);
            for (i64 j = 0; j < d->r; j++) {
                const __m512 b = _mm512_maskz_loadu_ps(lanes, d->lora_bt + j*d->n + nb*16);
                v = _mm512_fmadd_ps(_mm512_set1_ps(h[(t0 + t)*d->r + j]), b, v);
            }
            store16(y + (t0 + t)*stride*w, type, nb*16, lanes, v);
        }
    }
}
