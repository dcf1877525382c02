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

// B blocks of 16 channels of T tokens, whose sums by group stand `far` apart; the results of a block lie together. Two
// blocks share what is loaded of the tokens. U units make a group, 0 if another number.
template<int P, int D, int T, int B, int U>
static void groups_block(const SlLinear *d, i64 nb, const int8_t *xs, const int32_t *sums, float *out) {
    enum { R = D*T };
    const i64 G = groups_of(d), units = d->kp >> 4, each = U ? U : d->group >> 4, far = (D + 1)*G;
    const uint8_t *h = d->high + nb*units*128;
    const uint8_t *m = P > 1 ? d->middle + nb*units*64 : h, *l = P > 2 ? d->low + nb*units*64 : h;
    const int type = (int)d->step_type;
    const char *step = (const char*)d->scale + nb*G*16*(i64)width(type);
    const __m512i mask = _mm512_set1_epi8((char)code_mask(d->bits));
    __m512 y[T][B];
    for (int t = 0; t < T; t++) for (int b = 0; b < B; b++) y[t][b] = _mm512_setzero_ps();
    for (i64 g = 0, u = 0; g < G; g++) {
        __m512i a[R][B];
        for (int t = 0; t < T; t++) for (int j = 0; j < D; j++) for (int b = 0; b < B; b++)
            a[t*D + j][b] = _mm512_set1_epi32(sums[t*far + j*G + g]);
        const i64 end = U ? u + U : u + each < units ? u + each : units;
        for (; u < end; u++) {
            __m512i w[B][4];
            for (i64 b = 0; b < B; b++) {
                const i64 at = b*units + u;
                unpack_unit<P>(h + at*128, m + at*64, l + at*64, mask, w[b]);
            }
            for (int j = 0; j < 4; j++) for (int r = 0; r < R; r++) {
                int32_t x; memcpy(&x, xs + r*d->kp + u*16 + j*4, 4);
                const __m512i v = _mm512_set1_epi32(x);
                for (int b = 0; b < B; b++) a[r][b] = _mm512_dpbusd_epi32(a[r][b], w[b][j], v);
            }
        }
        for (i64 b = 0; b < B; b++) {
            const __m512 s = load16(step, type, (b*G + g)*16, 0xffff);
            for (int t = 0; t < T; t++) {
                __m512 v = _mm512_cvtepi32_ps(a[t*D + D - 1][b]);
                for (int j = D - 1; j--;)
                    v = _mm512_fmadd_ps(v, _mm512_set1_ps(256.f), _mm512_cvtepi32_ps(a[t*D + j][b]));
                if (P == 3) v = _mm512_add_ps(v, _mm512_set1_ps(((const float*)sums)[t*far + D*G + g]));
                y[t][b] = _mm512_fmadd_ps(s, v, y[t][b]);
            }
        }
    }
    for (int b = 0; b < B; b++) for (int t = 0; t < T; t++) _mm512_storeu_ps(out + (b*T + t)*16, y[t][b]);
}
typedef void (*groups_fn)(const SlLinear*, i64, const int8_t*, const int32_t*, float*);
enum { SOME = 4 };   // tokens at a time
struct GroupsTable { groups_fn one[2][SOME], wide[2][SOME]; };   // digits; by blocks and tokens, less 1
#define SL_ONE(P, B, U) {groups_block<P,1,1,B,U>, groups_block<P,1,2,B,U>, groups_block<P,1,3,B,U>, groups_block<P,1,4,B,U>}
#define SL_WIDE(P, B, U) {groups_block<P,3,1,B,U>, groups_block<P,3,2,B,U>}
#define SL_BOTH(P, U) {{SL_ONE(P,1,U), SL_ONE(P,2,U)}, {SL_WIDE(P,1,U), SL_WIDE(P,2,U)}}
static const GroupsTable groups_tables[4][3] = {
    {SL_BOTH(1,0), SL_BOTH(1,2), SL_BOTH(1,4)}, {SL_BOTH(2,0), SL_BOTH(2,2), SL_BOTH(2,4)},
    {SL_BOTH(3,0), SL_BOTH(3,2), SL_BOTH(3,4)}, {SL_BOTH(4,0), SL_BOTH(4,2), SL_BOTH(4,4)}};
static const GroupsTable *groups_table(const SlLinear *d) {
    return &groups_tables[variant(d->bits) - 1][d->group == 32 ? 1 : d->group == 64 ? 2 : 0];
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
    const int D = digits_of(d), some = D == 3 ? 2 : SOME;
    const GroupsTable *table = groups_table(d);
    const i64 far = (D + 1)*groups_of(d), w = (i64)width(type);
    float s[2*SOME*16] __attribute__((aligned(64)));
    for (i64 nb = b0; nb < b1; nb += 2) for (i64 t0 = 0; t0 < m; t0 += some) {
        const i64 T = m - t0 < some ? m - t0 : some, B = nb + 1 < b1 ? 2 : 1;
        (D == 3 ? table->wide : table->one)[B - 1][T - 1](d, nb, xs + t0*D*d->kp, sums + t0*far, s);
        for (i64 i = 0; i < B*T; i++) {
            const i64 block = nb + i/T, t = t0 + i % T;
            const __mmask16 lanes = head(d->n - block*16);
            __m512 v = groups_finish(d, block, s + i*16, rows + t);
            for (i64 j = 0; j < d->r; j++) {
                const __m512 b = _mm512_maskz_loadu_ps(lanes, d->lora_bt + j*d->n + block*16);
                v = _mm512_fmadd_ps(_mm512_set1_ps(h[t*d->r + j]), b, v);
            }
            store16(y + t*stride*w, type, block*16, lanes, v);
        }
    }
}
