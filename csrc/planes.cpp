// Products with planes and with float weights, for few tokens (vectors) and many (tiles).
#include "packed.h"
#include "rotation.h"

#ifdef SL_HERE
#include "vectors.h"

static thread_local Arena arena;
struct Row { double sx, zx, sum; };   // activation = sx*(code - zx); sum of its codes

SL_VECTORS_ON
// ---- activations to signed bytes ----
static inline int digits_of(const SlLinear *d) { return d->act_mode == 0 || d->act_bits > 8 ? 3 : 1; }

// Scale, zero point and offset of one token, as quantizers.qparams computes them.
struct Grid { float inv, zp, lo, hi; int off; };
static Grid grid_of(const SlLinear *d, const void *x, int type, Row *row) {
    Grid g = {1, 0, 0, 0, 0};
    int bits = (int)d->act_bits;
    if (d->act_mode) {
        g.lo = d->act_symmetric ? (float)(1 - (1 << (bits - 1))) : 0.f;
        g.hi = d->act_symmetric ? (float)((1 << (bits - 1)) - 1) : (float)((1 << bits) - 1);
        g.off = !d->act_symmetric && bits == 8 ? 128 : 0;
    }
    if (d->act_mode == 1) {
        float s = (float)d->act_scale;
        g.inv = 1.0f / s; g.zp = (float)d->act_zero;
        row->sx = s; row->zx = g.zp - g.off;
        return g;
    }
    __m512 lo = _mm512_setzero_ps(), hi = lo;
    __m512i top = _mm512_setzero_si512();
    for (i64 i = 0; i < d->k; i += 16) {
        __m512 v = load16(x, type, i, head(d->k - i));
        lo = _mm512_min_ps(v, lo); hi = _mm512_max_ps(v, hi);
        top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
    }
    if (_mm512_reduce_max_epi32(top) >= 0x7f800000) {   // not finite: neither is the result
        row->sx = NAN; row->zx = 0; g.inv = 0;
        return g;
    }
    float l = _mm512_reduce_min_ps(lo), h = _mm512_reduce_max_ps(hi), big = h > -l ? h : -l;
    if (d->act_mode == 2) {
        float s = d->act_symmetric ? big / g.hi : (h - l) / g.hi;
        if (s < 1.17549435e-38f) s = 1.17549435e-38f;
        if (!d->act_symmetric) {
            g.zp = nearbyintf(-l / s);
            g.zp = g.zp < g.lo ? g.lo : g.zp > g.hi ? g.hi : g.zp;
        }
        g.inv = 1.0f / s; row->sx = s; row->zx = g.zp - g.off;
        return g;
    }
    int e = -100;               // floats: integers of 24 bits, in steps of a power of two
    if (big > 0) { frexpf(big, &e); if (e < -100) e = -100; if (ldexpf(big, 23 - e) > 8355711.f) e++; }
    g.inv = ldexpf(1.f, 23 - e); g.lo = -8355711.f; g.hi = 8355711.f;
    row->sx = ldexp(1., e - 23); row->zx = 0;
    return g;
}

// Bytes of input i stand at out + (i/64)*chunk + i%64, those of the next digit `digit` further.
static void quantize_row(const SlLinear *d, const void *x, int type, int8_t *out, i64 chunk, i64 digit,
                         Row *row) {
    Grid g = grid_of(d, x, type, row);
    const __m512 inv = _mm512_set1_ps(g.inv), zp = _mm512_set1_ps(g.zp);
    const __m512 lo = _mm512_set1_ps(g.lo), hi = _mm512_set1_ps(g.hi);
    const __m512i off = _mm512_set1_epi32(g.off), half = _mm512_set1_epi32(0x808080);
    const int wide = digits_of(d) == 3;
    __m512i sum = _mm512_setzero_si512(), sum2 = sum;
    for (i64 i = 0; i < d->kp; i += 16) {
        const __mmask16 m = i < d->k ? head(d->k - i) : 0;
        __m512 v = _mm512_roundscale_ps(_mm512_mul_ps(load16(x, type, i, m), inv), 8);
        v = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(v, zp), lo), hi);
        __m512i q = _mm512_maskz_sub_epi32(m, _mm512_cvtps_epi32(v), off);
        int8_t *o = out + (i >> 6)*chunk + (i & 63);
        if (!wide) {
            _mm_storeu_si128((__m128i*)o, _mm512_cvtepi32_epi8(q));
            sum = _mm512_add_epi32(sum, q);
            continue;
        }
        __m512i t = _mm512_xor_si512(_mm512_add_epi32(q, half), half);   // balanced base-256 digits
        _mm_storeu_si128((__m128i*)o, _mm512_cvtepi32_epi8(t));
        _mm_storeu_si128((__m128i*)(o + digit), _mm512_cvtepi32_epi8(_mm512_srli_epi32(t, 8)));
        _mm_storeu_si128((__m128i*)(o + 2*digit), _mm512_cvtepi32_epi8(_mm512_srli_epi32(t, 16)));
        sum = _mm512_add_epi64(sum, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(q)));
        sum2 = _mm512_add_epi64(sum2, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(q, 1)));
    }
    row->sum = wide ? (double)_mm512_reduce_add_epi64(_mm512_add_epi64(sum, sum2))
                    : (double)_mm512_reduce_add_epi32(sum);
}

// The input in the basis of the codes: x, or a turned copy of its type in `room`.
size_t turned_room(i64 kp) { return 4*(size_t)(3*kp + 64); }
static const void *turned(const SlLinear *d, const void *x, int type, float *room) {
    if (!d->order) return x;
    const SlRotation r = {d->signs, d->matrix, d->k, d->block, d->order};
    turn_row(&r, 0, x, type, room, room + d->kp);
    return room;
}

// R rows of A at once.
template<int R> static void dots(const float *a, i64 step, const void *x, int type, i64 k, float scaling, float *h) {
    __m512 s[R];
    for (int j = 0; j < R; j++) s[j] = _mm512_setzero_ps();
    for (i64 i = 0; i < k; i += 16) {
        const __mmask16 m = head(k - i);
        const __m512 v = load16(x, type, i, m);
        for (int j = 0; j < R; j++) s[j] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, a + j*step + i), v, s[j]);
    }
    for (int j = 0; j < R; j++) h[j] = scaling*_mm512_reduce_add_ps(s[j]);
}
static void adapter_row(const SlLinear *d, const void *x, int type, float *h) {   // h = scaling * A x
    const float c = (float)d->lora_scale;
    i64 j = 0;
    for (; j + 8 <= d->r; j += 8) dots<8>(d->lora_a + j*d->k, d->k, x, type, d->k, c, h + j);
    for (; j + 4 <= d->r; j += 4) dots<4>(d->lora_a + j*d->k, d->k, x, type, d->k, c, h + j);
    for (; j < d->r; j++) dots<1>(d->lora_a + j*d->k, d->k, x, type, d->k, c, h + j);
}

// ---- planes to codes ----
static inline uint8_t code_mask(i64 bits) { return (uint8_t)(0xff << (8 - bits)); }
static inline __m512i pick(__m512i mask, __m512i yes, __m512i no) {
    return _mm512_ternarylogic_epi32(mask, yes, no, 0xca);
}

template<int P> static inline __attribute__((always_inline))
void unpack_unit(const uint8_t *h, const uint8_t *m, const uint8_t *l, __m512i mask, __m512i w[4]) {
    const __m512i high = _mm512_set1_epi8((char)0xf0), low = _mm512_set1_epi8(3);
    __m512i h0 = _mm512_loadu_si512(h), h1 = _mm512_loadu_si512(h + 64);
    w[0] = _mm512_slli_epi16(h0, 4); w[1] = h0; w[2] = _mm512_slli_epi16(h1, 4); w[3] = h1;
    if (P > 1) {
        __m512i v = _mm512_loadu_si512(m);
        w[0] = pick(high, w[0], _mm512_slli_epi16(v, 2)); w[1] = pick(high, w[1], v);
        w[2] = pick(high, w[2], _mm512_srli_epi16(v, 2)); w[3] = pick(high, w[3], _mm512_srli_epi16(v, 4));
    }
    if (P > 2) {
        __m512i v = _mm512_loadu_si512(l);
        w[0] = pick(low, v, w[0]); w[1] = pick(low, _mm512_srli_epi16(v, 2), w[1]);
        w[2] = pick(low, _mm512_srli_epi16(v, 4), w[2]); w[3] = pick(low, _mm512_srli_epi16(v, 6), w[3]);
    }
    if (P != 3)                       // P=4 is seven bits: three planes, masked
        for (int j = 0; j < 4; j++) w[j] = _mm512_and_si512(w[j], mask);
}
static inline int variant(i64 bits) { return bits <= 4 ? 1 : bits <= 6 ? 2 : bits == 8 ? 3 : 4; }

// ---- few tokens: one block of 16 channels times R rows of bytes ----
template<int P, int R> static void gemv_block(const SlLinear *d, i64 nb, const int8_t *xs, int32_t *s) {
    enum { A = R <= 4 ? 4 : 2 };
    const i64 units = d->kp >> 4;
    const uint8_t *h = d->high + nb*units*128;
    const uint8_t *m = P > 1 ? d->middle + nb*units*64 : h, *l = P > 2 ? d->low + nb*units*64 : h;
    const __m512i mask = _mm512_set1_epi8((char)code_mask(d->bits));
    __m512i acc[R][A];
    for (int r = 0; r < R; r++) for (int a = 0; a < A; a++) acc[r][a] = _mm512_setzero_si512();
    for (i64 u = 0; u < units; u++) {
        __m512i w[4];
        unpack_unit<P>(h + u*128, m + u*64, l + u*64, mask, w);
        for (int r = 0; r < R; r++) for (int j = 0; j < 4; j++) {
            int32_t b; memcpy(&b, xs + r*d->kp + u*16 + j*4, 4);
            acc[r][j % A] = _mm512_dpbusd_epi32(acc[r][j % A], w[j], _mm512_set1_epi32(b));
        }
    }
    for (int r = 0; r < R; r++) {
        __m512i t = _mm512_add_epi32(acc[r][0], acc[r][1]);
        if (A == 4) t = _mm512_add_epi32(t, _mm512_add_epi32(acc[r][2 % A], acc[r][3 % A]));
        _mm512_storeu_si512(s + r*16, t);
    }
}
typedef void (*gemv_fn)(const SlLinear*, i64, const int8_t*, int32_t*);
#define SL_ROW(P) {gemv_block<P,1>, gemv_block<P,2>, gemv_block<P,3>, gemv_block<P,4>, \
                   gemv_block<P,5>, gemv_block<P,6>, gemv_block<P,7>, gemv_block<P,8>}
static const gemv_fn gemv_table[4][8] = {SL_ROW(1), SL_ROW(2), SL_ROW(3), SL_ROW(4)};

// ---- integer sums to numbers ----
struct Channels { __m512d scale[2], sums[2], bias[2]; __mmask16 m; };   // constants of 16 channels
static inline void wide(__m512 v, __m512d o[2]) {
    o[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    o[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
}
static inline Channels channels(const SlLinear *d, i64 nb) {
    Channels c;
    const i64 n0 = nb*16;
    const unsigned shift = 8 - (unsigned)d->bits;
    c.m = head(d->n - n0);
    wide(_mm512_maskz_loadu_ps(c.m, (const float*)d->scale + n0), c.scale);
    wide(d->bias ? _mm512_maskz_loadu_ps(c.m, d->bias + n0) : _mm512_setzero_ps(), c.bias);
    const __m512i sums = d->act_mode ? _mm512_maskz_loadu_epi32(c.m, d->sums + n0) : _mm512_setzero_si512();
    const __m512i s = _mm512_slli_epi32(sums, shift);
    c.sums[0] = _mm512_cvtepi32_pd(_mm512_castsi512_si256(s));
    c.sums[1] = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(s, 1));
    for (int p = 0; p < 2; p++)       // codes are used with their top bit at bit 7
        c.scale[p] = _mm512_mul_pd(c.scale[p], _mm512_set1_pd(1./(1 << shift)));
    return c;
}
static inline double flat_of(const SlLinear *d, const Row *row) {
    return d->zero*(double)(1 << (8 - d->bits))*(d->k*row->zx - row->sum);
}
static inline __m512d eight(const int32_t *s) {
    return _mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i*)s));
}
// 16 channels of one token; digit g of the sums stands at s + g*step.
template<int D> static inline __attribute__((always_inline))
__m512 finish16(const Channels *c, const int32_t *s, i64 step, const Row *row, double flat) {
    __m256 part[2];
    for (int p = 0; p < 2; p++) {
        __m512d t = eight(s + 8*p);
        if (D == 3) {
            t = _mm512_fmadd_pd(eight(s + step + 8*p), _mm512_set1_pd(256.), t);
            t = _mm512_fmadd_pd(eight(s + 2*step + 8*p), _mm512_set1_pd(65536.), t);
        }
        t = _mm512_add_pd(_mm512_fnmadd_pd(_mm512_set1_pd(row->zx), c->sums[p], t), _mm512_set1_pd(flat));
        const __m512d scale = _mm512_mul_pd(c->scale[p], _mm512_set1_pd(row->sx));
        part[p] = _mm512_cvtpd_ps(_mm512_fmadd_pd(scale, t, c->bias[p]));
    }
    return _mm512_insertf32x8(_mm512_castps256_ps512(part[0]), part[1], 1);
}
// The same for T tokens (sums `far` apart, results `stride` bytes apart) with their adapters: y = ... + B h.
template<int D, int T> static inline __attribute__((always_inline))
void finish(const SlLinear *d, const Channels *c, const int32_t *s, i64 far, i64 step, const Row *row,
            const float *h, i64 nb, char *y, i64 stride, int type) {
    __m512 v[T];
    for (int t = 0; t < T; t++) v[t] = finish16<D>(c, s + t*far, step, row + t, flat_of(d, row + t));
    for (i64 j = 0; j < d->r; j++) {
        const __m512 b = _mm512_maskz_loadu_ps(c->m, d->lora_bt + j*d->n + nb*16);
        for (int t = 0; t < T; t++) v[t] = _mm512_fmadd_ps(_mm512_set1_ps(h[t*d->r + j]), b, v[t]);
    }
    for (int t = 0; t < T; t++) store16(y + t*stride, type, nb*16, c->m, v[t]);
}
template<int D> static
void finish_some(const SlLinear *d, const Channels *c, const int32_t *s, i64 far, i64 step, const Row *row,
                 const float *h, i64 nb, char *y, i64 stride, int type, i64 tokens) {
    i64 t = 0;
    for (; t + 8 <= tokens; t += 8)
        finish<D,8>(d, c, s + t*far, far, step, row + t, h + t*d->r, nb, y + t*stride, stride, type);
    for (; t < tokens; t++)
        finish<D,1>(d, c, s + t*far, far, step, row + t, h + t*d->r, nb, y + t*stride, stride, type);
}
typedef void (*finish_fn)(const SlLinear*, const Channels*, const int32_t*, i64, i64, const Row*,
                          const float*, i64, char*, i64, int, i64);
static inline finish_fn finish_of(int D) { return D == 3 ? finish_some<3> : finish_some<1>; }

// Blocks b0..b1 of all tokens through the vector kernels; rows of bytes lie kp apart, the digits of a token
// together.
static void gemv_range(const SlLinear *d, const int8_t *xs, const Row *rows, const float *h, i64 m, i64 b0, i64 b1,
                       char *y, i64 stride, int type) {
    const int D = digits_of(d), group = D == 3 ? 2 : 8;
    const gemv_fn *table = gemv_table[variant(d->bits) - 1];
    int32_t s[8*16] __attribute__((aligned(64)));
    const i64 w = (i64)width(type);
    for (i64 nb = b0; nb < b1; nb++) {
        const Channels c = channels(d, nb);
        for (i64 t0 = 0; t0 < m; t0 += group) {
            const i64 g = m - t0 < group ? m - t0 : group;
            table[g*D - 1](d, nb, xs + t0*D*d->kp, s);
            char *to = y + t0*stride*w;
            finish_of(D)(d, &c, s, D*16, 16, rows + t0, h + t0*d->r, nb, to, stride*w, type, g);
        }
    }
}

#include "groups.h"

// ---- many tokens: tiles. A row tile is 16 tokens of one digit, stored as kp/64 pieces of 16 x 64 bytes ----
struct TileConfig { uint8_t palette, start, pad[14]; uint16_t cols[16]; uint8_t rows[16]; };
static void tiles_on() {
    TileConfig c; memset(&c, 0, sizeof c); c.palette = 1;
    for (int i = 0; i < 8; i++) { c.cols[i] = 64; c.rows[i] = 16; }
    _tile_loadconfig(&c);
}
template<int P> static void unpack_block(const SlLinear *d, i64 nb, uint8_t *out) {
    const i64 units = d->kp >> 4;
    const uint8_t *h = d->high + nb*units*128;
    const uint8_t *m = P > 1 ? d->middle + nb*units*64 : h, *l = P > 2 ? d->low + nb*units*64 : h;
    const __m512i mask = _mm512_set1_epi8((char)code_mask(d->bits));
    for (i64 u = 0; u < units; u++) {
        __m512i w[4];
        unpack_unit<P>(h + u*128, m + u*64, l + u*64, mask, w);
        for (int j = 0; j < 4; j++) _mm512_store_si512(out + u*256 + j*64, w[j]);
    }
}
static void unpack_any(const SlLinear *d, i64 nb, uint8_t *out) {
    switch (variant(d->bits)) {
        case 1: unpack_block<1>(d, nb, out); break;
        case 2: unpack_block<2>(d, nb, out); break;
        case 3: unpack_block<3>(d, nb, out); break;
        default: unpack_block<4>(d, nb, out);
    }
}
// Two row tiles x two channel blocks; sums go to c (rows 32 apart, the second row tile at c2).
static void tiles_2x2(const int8_t *a0, const int8_t *a1, const uint8_t *b0, const uint8_t *b1, i64 pieces,
                      int32_t *c, int32_t *c2) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (i64 p = 0; p < pieces; p++) {
        _tile_loadd(6, b0 + p*1024, 64); _tile_loadd(4, a0 + p*1024, 64); _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b1 + p*1024, 64); _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, a1 + p*1024, 64); _tile_dpbsud(2, 5, 6); _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, c, 128); _tile_stored(1, c + 16, 128);
    _tile_stored(2, c2, 128); _tile_stored(3, c2 + 16, 128);
}
static void tiles_1x2(const int8_t *a0, const uint8_t *b0, const uint8_t *b1, i64 pieces, int32_t *c) {
    _tile_zero(0); _tile_zero(1);
    for (i64 p = 0; p < pieces; p++) {
        _tile_loadd(4, a0 + p*1024, 64);
        _tile_loadd(6, b0 + p*1024, 64); _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b1 + p*1024, 64); _tile_dpbsud(1, 4, 7);
    }
    _tile_stored(0, c, 128); _tile_stored(1, c + 16, 128);
}
// Channel blocks nb, nb+1 of row tiles t0..t1 (units of 16 tokens).
static void gemm_pair(const SlLinear *d, const int8_t *a, const Row *rows, const float *h, i64 m, i64 t0, i64 t1,
                      i64 nb, const uint8_t *b, int32_t *c, char *y, i64 stride, int type) {
    const int D = digits_of(d);
    const i64 pieces = d->kp >> 6, tile = d->kp*16, blocks = (d->n + 15) >> 4, w = (i64)width(type);
    const int two = nb + 1 < blocks;
    const uint8_t *b1 = two ? b + tile : b;
    const Channels ch[2] = {channels(d, nb), channels(d, two ? nb + 1 : nb)};
    for (i64 t = t0; t < t1; t += 2) {
        const int pair = t + 1 < t1;
        for (int g = 0; g < D; g++) {
            const int8_t *a0 = a + (t*D + g)*tile;
            if (pair) tiles_2x2(a0, a0 + D*tile, b, b1, pieces, c + g*512, c + (D + g)*512);
            else tiles_1x2(a0, b, b1, pieces, c + g*512);
        }
        for (i64 u = t; u <= t + pair; u++) for (int q = 0; q <= two; q++) {
            const i64 first = u*16, tokens = m - first < 16 ? m - first : 16;
            const int32_t *sums = c + (u - t)*D*512 + q*16;
            finish_of(D)(d, ch + q, sums, 32, 512, rows + first, h + first*d->r, nb + q, y + first*stride*w,
                         stride*w, type, tokens);
        }
    }
}

static int linear_few(const SlLinear *d, const char *x, i64 m, i64 xstride, int type, char *y, i64 ystride) {
    const int D = digits_of(d);
    const i64 blocks = (d->n + 15) >> 4;
    const i64 far = d->group ? (D + 1)*groups_of(d) : 0;   // what a token's groups add up to
    int threads = max_threads();
    if (m*blocks*d->kp < 8192) threads = 1;
    if (threads > blocks) threads = (int)blocks;
    const size_t rows_at = round64((size_t)m*D*d->kp), h_at = rows_at + round64(m*sizeof(Row));
    const size_t sums_at = h_at + round64((size_t)m*d->r*4), room_at = sums_at + round64((size_t)m*far*4);
    const size_t room = d->order ? turned_room(d->kp) : 0;
    char *p = arena.get(room_at + room*threads + 64);
    if (!p) return NO_MEMORY;
    int8_t *xs = (int8_t*)p; Row *rows = (Row*)(p + rows_at); float *h = (float*)(p + h_at);
    int32_t *sums = (int32_t*)(p + sums_at);
    const i64 w = (i64)width(type);
    auto prepare = [&](i64 t, int me) {
        const void *turn = turned(d, x + t*xstride*w, type, (float*)(p + room_at + room*me));
        quantize_row(d, turn, type, xs + t*D*d->kp, 64, d->kp, rows + t);
        if (d->group) group_sums(d, xs + t*D*d->kp, D, sums + t*far);
        adapter_row(d, x + t*xstride*w, type, h + t*d->r);
    };
    auto multiply = [&](i64 b0, i64 b1) {
        if (d->group) groups_range(d, xs, sums, rows, h, m, b0, b1, y, ystride, type);
        else gemv_range(d, xs, rows, h, m, b0, b1, y, ystride, type);
    };
    const bool shared = m*d->kp*(D + d->r) < 65536;   // few rows: one thread prepares them, else all do
    if (shared || threads == 1) for (i64 t = 0; t < m; t++) prepare(t, 0);
    if (threads == 1) { multiply(0, blocks); return 0; }
    #pragma omp parallel num_threads(threads)
    {
        const int me = thread_id();
        if (!shared) {
            #pragma omp for schedule(static)
            for (i64 t = 0; t < m; t++) prepare(t, me);
        }
#ifdef _OPENMP
        const int all = omp_get_num_threads();
#else
        const int all = 1;
#endif
        multiply(blocks*me/all, blocks*(me + 1)/all);
    }
    return 0;
}

static int linear_many(const SlLinear *d, const char *x, i64 m, i64 xstride, int type, char *y, i64 ystride) {
    const int D = digits_of(d);
    const i64 tiles = (m + 15) >> 4, tile = d->kp*16, blocks = (d->n + 15) >> 4, pairs = (blocks + 1) >> 1;
    const i64 w = (i64)width(type);
    int threads = max_threads();
    const size_t room = d->order ? turned_room(d->kp) : 0, own = round64(2*tile) + 6*2048 + room;
    const size_t rows_at = round64((size_t)tiles*D*tile), h_at = rows_at + round64(m*sizeof(Row));
    const size_t own_at = h_at + round64((size_t)m*d->r*4);
    char *p = arena.get(own_at + own*threads + 64);
    if (!p) return NO_MEMORY;
    int8_t *a = (int8_t*)p; Row *rows = (Row*)(p + rows_at); float *h = (float*)(p + h_at);
    i64 step = (1 << 20)/(D*tile);    // row tiles whose bytes stay in the second-level cache
    step = step < 2 ? 2 : step & ~(i64)1;
    #pragma omp parallel num_threads(threads)
    {
        uint8_t *b = (uint8_t*)p + own_at + own*thread_id();
        int32_t *c = (int32_t*)(b + round64(2*tile));
        float *spare = (float*)((char*)c + 6*2048);
        #pragma omp for schedule(static)
        for (i64 t = 0; t < tiles*16; t++) {
            int8_t *o = a + (t >> 4)*D*tile + (t & 15)*64;
            if (t < m) {
                quantize_row(d, turned(d, x + t*xstride*w, type, spare), type, o, 1024, tile, rows + t);
                adapter_row(d, x + t*xstride*w, type, h + t*d->r);
            }
            else for (int g = 0; g < D; g++)
                for (i64 q = 0; q < d->kp >> 6; q++) memset(o + g*tile + q*1024, 0, 64);
        }
        tiles_on();
        for (i64 t0 = 0; t0 < tiles; t0 += step) {
            const i64 t1 = t0 + step < tiles ? t0 + step : tiles;
            #pragma omp for schedule(static) nowait
            for (i64 q = 0; q < pairs; q++) {
                unpack_any(d, 2*q, b);
                if (2*q + 1 < blocks) unpack_any(d, 2*q + 1, b + tile);
                gemm_pair(d, a, rows, h, m, t0, t1, 2*q, b, c, y, ystride, type);
            }
        }
        _tile_release();
    }
    return 0;
}

// y (m,n) = x (m,k) times the weight. n and k are those of the caller's x and y, type is of both, xstride counts
// the numbers from one token to the next.
SL_API int sl_linear(const SlLinear *d, const void *x, i64 m, i64 k, i64 xstride, int type, void *y, i64 n) {
    const int f = features();
    if (!(f & 1)) return CANNOT;
    if (int fault = check_linear(d)) return fault;
    if (d->n != n || d->k != k) return SHAPES;
    if (d->dense || !within(m, 0, MOST) || !within(type, 0, 2) || xstride < 0) return RANGE;
    if (m == 0) return FINE;
    if (!x || !y) return BUFFER;
    if ((f & 2) && !d->group && m*digits_of(d) > 6) return linear_many(d, (const char*)x, m, xstride, type, (char*)y, n);
    return linear_few(d, (const char*)x, m, xstride, type, (char*)y, n);
}
// 16 channels of a float weight, read in the type and the order in which it lies.
static __m512 dense_block(const SlLinear *d, const float *x, i64 nb) {
    const int type = (int)d->dense_type;
    const i64 n0 = nb*16, left = d->n - n0 < 16 ? d->n - n0 : 16;
    const __mmask16 m = head(left);
    __m512 v = d->bias ? _mm512_maskz_loadu_ps(m, d->bias + n0) : _mm512_setzero_ps();
    if (!d->dense_columns) {
        float s[16] = {0};
        const char *row = (const char*)d->dense + n0*d->k*(i64)width(type);
        for (i64 i = 0; i < left; i++) s[i] = dot(x, row + i*d->k*(i64)width(type), type, d->k);
        return _mm512_add_ps(v, _mm512_loadu_ps(s));
    }
    __m512 a[4];
    for (int j = 0; j < 4; j++) a[j] = _mm512_setzero_ps();
    for (i64 i = 0; i < d->k; i++)
        a[i & 3] = _mm512_fmadd_ps(_mm512_set1_ps(x[i]), load16(d->dense, type, i*d->n + n0, m), a[i & 3]);
    return _mm512_add_ps(v, _mm512_add_ps(_mm512_add_ps(a[0], a[1]), _mm512_add_ps(a[2], a[3])));
}
static void put_block(const SlLinear *d, __m512 v, const float *h, i64 nb, float *y, bool add) {
    const __mmask16 m = head(d->n - nb*16);
    for (i64 j = 0; j < d->r; j++) {   // the adapter
        const __m512 b = _mm512_maskz_loadu_ps(m, d->lora_bt + j*d->n + nb*16);
        v = _mm512_fmadd_ps(_mm512_set1_ps(h[j]), b, v);
    }
    if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(m, y + nb*16));
    _mm512_mask_storeu_ps(y + nb*16, m, v);
}
// This thread's share of y = d(x), or y += d(x). Every thread quantizes the whole input for itself, which is cheaper
// than waiting.
void share(const SlLinear *d, const float *x, float *y, bool add, const Own *o, int me, int all) {
    const i64 blocks = (d->n + 15) >> 4, b0 = blocks*me/all, b1 = blocks*(me + 1)/all;
    if (d->r) adapter_row(d, x, 0, o->h);
    if (d->dense) {
        for (i64 nb = b0; nb < b1; nb++) put_block(d, dense_block(d, x, nb), o->h, nb, y, add);
        return;
    }
    Row row;
    const int D = digits_of(d);
    if (d->order && o->of != x) { turned(d, x, 0, o->turned); o->of = x; }
    quantize_row(d, d->order ? o->turned : x, 0, o->bytes, 64, d->kp, &row);
    if (d->group) {
        int32_t *sums = (int32_t*)(o->bytes + 3*d->kp);
        float v[16] __attribute__((aligned(64)));
        const groups_fn f = (D == 3 ? groups_table(d)->wide : groups_table(d)->one)[0][0];
        group_sums(d, o->bytes, D, sums);
        for (i64 nb = b0; nb < b1; nb++) {
            f(d, nb, o->bytes, sums, v);
            put_block(d, groups_finish(d, nb, v, &row), o->h, nb, y, add);
        }
        return;
    }
    const gemv_fn f = gemv_table[variant(d->bits) - 1][D - 1];
    int32_t s[3*16] __attribute__((aligned(64)));
    const double flat = flat_of(d, &row);
    for (i64 nb = b0; nb < b1; nb++) {
        const Channels c = channels(d, nb);
        f(d, nb, o->bytes, s);
        const __m512 v = D == 3 ? finish16<3>(&c, s, 16, &row, flat) : finish16<1>(&c, s, 16, &row, flat);
        put_block(d, v, o->h, nb, y, add);
    }
}

void tokens_linear(const SlLinear *d, const float *x, i64 m, float *y, i64 stride) {
    if ((features() & 2) && !d->group && m*digits_of(d) > 6) linear_many(d, (const char*)x, m, d->k, 0, (char*)y, stride);
    else linear_few(d, (const char*)x, m, d->k, 0, (char*)y, stride);
}
SL_VECTORS_OFF

#else
SL_API int sl_linear(const SlLinear*, const void*, i64, i64, i64, int, void*, i64) { return 1; }
#endif
