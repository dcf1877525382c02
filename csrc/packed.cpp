// Products with the nested store (nbs/06a_kernels.ipynb describes the layout and the formulas).
//
// A weight of n output channels and k inputs is kept as three planes of its eight-bit codes: bits 7-4, bits 3-2, bits 1-0. A vector of
// 64 bytes is 16 channels x 4 inputs; four vectors make a unit of 16 inputs: 128 bytes of the high plane, 64 of the middle, 64 of the low.
// Codes are used with their top bit at bit 7 and zeros (or nothing) below the live bits, so one routine serves all precisions.
// Activations become signed bytes: codes of at most 8 bits take one, wider codes and floats (24-bit integers per token) take three.
// All sums are integers; scales, zero points and bias are applied in double, and the result is rounded once.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cmath>
#ifdef _OPENMP
#include <omp.h>
#endif

#define SL_API extern "C" __attribute__((visibility("default")))
typedef int64_t i64;

// Every struct begins with its own size, as the caller knows it, and every buffer comes with the count of numbers that it holds:
// the calls compare both with what they are going to read, and return a fault instead of reading past an end.
enum { HIGH, MIDDLE, LOW, DENSE, SCALE, SUMS, BIAS, LORA_A, LORA_BT, BUFFERS };
struct SlLinear {               // mirrored by kernels._Linear
    i64 size;
    const uint8_t *high, *middle, *low;
    const void *dense;          // float weight instead of planes, or null
    const float *scale;         // (n) step of a row
    const int32_t *sums;        // (n) sum of a row's codes; null for float activations, which need none
    const float *bias;          // (n) or null
    const float *lora_a;        // (r,k) or null
    const float *lora_bt;       // (r,n)
    i64 len[BUFFERS];           // of the buffers above, in their order
    i64 n, k, kp, r, bits;
    i64 dense_type;             // 0 float32, 1 bfloat16, 2 float16
    i64 dense_columns;          // 0: the float weight is (n,k); 1: (k,n)
    i64 act_mode;               // 0 float, 1 static range, 2 range per token
    i64 act_bits, act_symmetric, act_zero;
    double act_scale, zero, lora_scale;
};

struct SlLayer {                // mirrored by lean._Layer
    i64 size;
    const float *norm[4];       // weight and bias of the norm before attention and of that before the MLP; biases null for RMS norms
    i64 norm_len[4];
    const SlLinear *qkv[3];     // one fused (then 1 and 2 are null) or three
    const SlLinear *out, *gate, *up, *down;               // gate null for a plain MLP
};
struct SlModel {                // mirrored by lean._Model: a model at one profile; shared by all threads, and only read
    i64 size;
    const SlLayer *layers;
    const SlLinear *embedding, *head;
    const void *positions;      // (context,dim) learned positions, or null
    const float *norm_w, *norm_b;
    i64 positions_len, norm_w_len, norm_b_len;
    i64 positions_type;         // as dense_type
    i64 n_layers, dim, heads, kv_heads, head_dim, hidden, context;
    i64 rms, silu, rotary;      // RMS norm or layer norm; SiLU or tanh GELU; rotated queries and keys or not
    double eps, attention_scale;
    i64 checked, packed, max_kp, max_r;   // written by sl_check_model
};
struct SlCache {                // mirrored by lean._Cache: one sequence
    i64 size;
    float *keys, *values;       // (layers,kv_heads,capacity,head_dim)
    const float *cos, *sin;     // (capacity or more,head_dim) rotary angles, or null
    i64 keys_len, values_len, cos_len, sin_len;
    i64 capacity;               // tokens that fit
};

// What the calls return; mirrored by kernels.FAULTS.
enum { FINE, CANNOT, NO_MEMORY, POSITION, TOKEN, STRUCT, RANGE, BUFFER, SHAPES, UNCHECKED };

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <immintrin.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static int detect() {           // bit 0: vector kernels, bit 1: tile kernels
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))) return 0;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return 1;
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 3 : 1;   // ask the system for tile registers
}
static int features() { static const int f = detect(); return f; }
SL_API int sl_packed_features() { int f = features(); return (f & 1) | (f & 2 ? 6 : 0); }

static int max_threads() {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}
static int thread_id() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

struct Arena {                  // scratch memory of the calling thread; grows, and goes with the thread
    char *p = nullptr; size_t size = 0;
    char *get(size_t n) {
        if (n > size) { free(p); p = nullptr; size = 0; void *q; if (posix_memalign(&q, 64, n + n/4)) return nullptr; p = (char*)q; size = n + n/4; }
        return p;
    }
    ~Arena() { free(p); }
};
static thread_local Arena arena;
static inline size_t round64(size_t n) { return (n + 63) & ~(size_t)63; }

// ---- what comes in is checked before anything is read through it ----
static const i64 CHECKED = 0x736c5f636865636b;
static const i64 MOST = (i64)1 << 31;
static inline bool within(i64 v, i64 lo, i64 hi) { return v >= lo && v <= hi; }
static i64 times(i64 a, i64 b) { i64 c; return __builtin_mul_overflow(a, b, &c) ? -1 : c; }
static inline bool holds(const void *p, i64 len, i64 need) { return p && need > 0 && len == need; }
static inline bool holds_or_none(const void *p, i64 len, i64 need) { return !p || holds(p, len, need); }

static int check_planes(const SlLinear *d) {
    if (!within(d->bits, 2, 8)) return RANGE;
    const i64 unit = times((d->n + 15) >> 4, d->kp >> 4)*64;
    if (!holds(d->high, d->len[HIGH], 2*unit)) return BUFFER;
    if (d->bits > 4 && !holds(d->middle, d->len[MIDDLE], unit)) return BUFFER;
    if (d->bits > 6 && !holds(d->low, d->len[LOW], unit)) return BUFFER;
    if (!holds(d->scale, d->len[SCALE], d->n)) return BUFFER;
    return d->act_mode && !holds(d->sums, d->len[SUMS], d->n) ? BUFFER : FINE;
}
static int check_dense(const SlLinear *d) {
    if (!within(d->dense_type, 0, 2) || !within(d->dense_columns, 0, 1)) return RANGE;
    return holds(d->dense, d->len[DENSE], times(d->n, d->k)) ? FINE : BUFFER;
}
static int check_activations(const SlLinear *d) {
    if (!within(d->act_mode, 0, 2)) return RANGE;
    if (!d->act_mode) return FINE;
    if (!within(d->act_bits, 2, 16) || !within(d->act_symmetric, 0, 1)) return RANGE;
    const i64 top = (i64)1 << (d->act_symmetric ? d->act_bits - 1 : d->act_bits);
    if (!within(d->act_zero, d->act_symmetric ? 1 - top : 0, top - 1)) return RANGE;
    return d->act_mode == 1 && !(d->act_scale > 0 && d->act_scale <= 3.4e38) ? RANGE : FINE;
}
static int check_linear(const SlLinear *d) {
    if (!d || d->size != (i64)sizeof *d) return STRUCT;
    if (!within(d->n, 1, MOST) || !within(d->k, 1, 65536) || !within(d->r, 0, 65536)) return RANGE;
    if (d->kp != ((d->k + 63) & ~(i64)63)) return RANGE;
    if (int fault = check_activations(d)) return fault;
    if (int fault = d->dense ? check_dense(d) : check_planes(d)) return fault;
    if (!holds_or_none(d->bias, d->len[BIAS], d->n)) return BUFFER;
    if (!d->r) return FINE;
    if (!holds(d->lora_a, d->len[LORA_A], times(d->r, d->k))) return BUFFER;
    return holds(d->lora_bt, d->len[LORA_BT], times(d->r, d->n)) ? FINE : BUFFER;
}
static int check_shape(const SlLinear *d, i64 n, i64 k) {
    if (int fault = check_linear(d)) return fault;
    return d->n == n && d->k == k ? FINE : SHAPES;
}
static int check_layer(const SlModel *M, const SlLayer *L, i64 *part) {
    const i64 q = M->heads*M->head_dim, kv = M->kv_heads*M->head_dim, dim = M->dim;
    if (L->size != (i64)sizeof *L) return STRUCT;
    for (int i = 0; i < 4; i++) if (!holds_or_none(L->norm[i], L->norm_len[i], dim)) return BUFFER;
    const bool three = L->qkv[1] || L->qkv[2];
    int fault = check_shape(L->qkv[*part = 0], three ? q : q + 2*kv, dim);
    for (i64 i = 1; three && i < 3 && !fault; i++) fault = check_shape(L->qkv[*part = i], kv, dim);
    if (!fault) *part = 3, fault = check_shape(L->out, dim, q);
    if (!fault && L->gate) *part = 4, fault = check_shape(L->gate, M->hidden, dim);
    if (!fault) *part = 5, fault = check_shape(L->up, M->hidden, dim);
    if (!fault) *part = 6, fault = check_shape(L->down, dim, M->hidden);
    return fault;
}
static int check_ends(const SlModel *M, i64 *part) {
    *part = 7;
    if (int fault = check_linear(M->embedding)) return fault;
    if (M->embedding->k != M->dim || M->embedding->dense_columns) return SHAPES;
    *part = 8;
    if (int fault = check_linear(M->head)) return fault;
    if (M->head->k != M->dim) return SHAPES;
    *part = 9;
    if (!holds_or_none(M->norm_w, M->norm_w_len, M->dim) || !holds_or_none(M->norm_b, M->norm_b_len, M->dim)) return BUFFER;
    return holds_or_none(M->positions, M->positions_len, times(M->context, M->dim)) ? FINE : BUFFER;
}
static void note_size(SlModel *M, const SlLinear *d, bool inside) {   // the largest of all layers, and whether all inside are planes
    if (!d) return;
    if (d->kp > M->max_kp) M->max_kp = d->kp;
    if (d->r > M->max_r) M->max_r = d->r;
    if (inside && d->dense) M->packed = 0;
}
// Checks a table once, before its first use; layer and part of the first fault go to `where` (2), -1 where there is none.
SL_API int sl_check_model(SlModel *M, i64 *where) {
    where[0] = where[1] = -1;
    if (!M || M->size != (i64)sizeof *M) return STRUCT;
    M->checked = 0;
    if (!within(M->n_layers, 1, 65536) || !within(M->dim, 1, 65536) || !within(M->hidden, 1, 65536)) return RANGE;
    if (!within(M->heads, 1, 65536) || !within(M->kv_heads, 1, M->heads) || M->heads % M->kv_heads) return RANGE;
    if (!within(M->head_dim, 1, 65536) || (M->rotary && M->head_dim % 2)) return RANGE;
    if (!within(M->context, 1, MOST) || !within(M->positions_type, 0, 2) || !M->layers) return RANGE;
    if (int fault = check_ends(M, where + 1)) return fault;
    M->packed = 1; M->max_kp = M->max_r = 0;
    for (i64 i = 0; i < M->n_layers; i++) {
        const SlLayer *L = M->layers + i;
        where[0] = i; where[1] = -1;
        if (int fault = check_layer(M, L, where + 1)) return fault;
        const SlLinear *all[7] = {L->qkv[0], L->qkv[1], L->qkv[2], L->out, L->gate, L->up, L->down};
        for (const SlLinear *d : all) note_size(M, d, true);
    }
    note_size(M, M->head, false);
    M->checked = CHECKED;
    return FINE;
}
// Before each pass: tokens ids (m) at position pos.
static int check_pass(const SlModel *M, const SlCache *C, const i64 *ids, i64 m, i64 pos) {
    if (!M || !C || M->size != (i64)sizeof *M || C->size != (i64)sizeof *C) return STRUCT;
    if (M->checked != CHECKED) return UNCHECKED;
    if (!within(C->capacity, 1, MOST)) return RANGE;
    const i64 one = times(C->capacity, M->head_dim), need = times(times(M->n_layers, M->kv_heads), one);
    if (!holds(C->keys, C->keys_len, need) || !holds(C->values, C->values_len, need)) return BUFFER;
    if (M->rotary && (!C->cos || !C->sin || C->cos_len < one || C->sin_len < one)) return BUFFER;
    if (m < 1 || pos < 0 || m > C->capacity - pos || m > M->context - pos) return POSITION;
    for (i64 t = 0; t < m; t++) if (ids[t] < 0 || ids[t] >= M->embedding->n) return TOKEN;
    return FINE;
}

struct Row { double sx, zx, sum; };   // activation = sx*(code - zx); sum of its codes

#define SL_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,f16c,amx-tile,amx-int8"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(SL_TARGET))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,f16c,amx-tile,amx-int8")
#endif

// ---- numbers in and out: type 0 float32, 1 bfloat16, 2 float16 ----
static inline size_t width(int type) { return type ? 2 : 4; }
static inline __mmask16 head(i64 left) { return left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1); }
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
        __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        u = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        u = _mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        h = _mm512_cvtepi32_epi16(u);
    }
    _mm256_mask_storeu_epi16((uint16_t*)y + i, m, h);
}

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
    if (_mm512_reduce_max_epi32(top) >= 0x7f800000) { row->sx = NAN; row->zx = 0; g.inv = 0; return g; }   // not finite: neither is the result
    float l = _mm512_reduce_min_ps(lo), h = _mm512_reduce_max_ps(hi), big = h > -l ? h : -l;
    if (d->act_mode == 2) {
        float s = d->act_symmetric ? big / g.hi : (h - l) / g.hi;
        if (s < 1.17549435e-38f) s = 1.17549435e-38f;
        if (!d->act_symmetric) { g.zp = nearbyintf(-l / s); g.zp = g.zp < g.lo ? g.lo : g.zp > g.hi ? g.hi : g.zp; }
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
static void quantize_row(const SlLinear *d, const void *x, int type, int8_t *out, i64 chunk, i64 digit, Row *row) {
    Grid g = grid_of(d, x, type, row);
    const __m512 inv = _mm512_set1_ps(g.inv), zp = _mm512_set1_ps(g.zp), lo = _mm512_set1_ps(g.lo), hi = _mm512_set1_ps(g.hi);
    const __m512i off = _mm512_set1_epi32(g.off), half = _mm512_set1_epi32(0x808080);
    const int wide = digits_of(d) == 3;
    __m512i sum = _mm512_setzero_si512(), sum2 = sum;
    for (i64 i = 0; i < d->kp; i += 16) {
        const __mmask16 m = i < d->k ? head(d->k - i) : 0;
        __m512 v = _mm512_roundscale_ps(_mm512_mul_ps(load16(x, type, i, m), inv), 8);
        v = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(v, zp), lo), hi);
        __m512i q = _mm512_maskz_sub_epi32(m, _mm512_cvtps_epi32(v), off);
        int8_t *o = out + (i >> 6)*chunk + (i & 63);
        if (!wide) { _mm_storeu_si128((__m128i*)o, _mm512_cvtepi32_epi8(q)); sum = _mm512_add_epi32(sum, q); continue; }
        __m512i t = _mm512_xor_si512(_mm512_add_epi32(q, half), half);   // balanced base-256 digits
        _mm_storeu_si128((__m128i*)o, _mm512_cvtepi32_epi8(t));
        _mm_storeu_si128((__m128i*)(o + digit), _mm512_cvtepi32_epi8(_mm512_srli_epi32(t, 8)));
        _mm_storeu_si128((__m128i*)(o + 2*digit), _mm512_cvtepi32_epi8(_mm512_srli_epi32(t, 16)));
        sum = _mm512_add_epi64(sum, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(q)));
        sum2 = _mm512_add_epi64(sum2, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(q, 1)));
    }
    row->sum = wide ? (double)_mm512_reduce_add_epi64(_mm512_add_epi64(sum, sum2)) : (double)_mm512_reduce_add_epi32(sum);
}

static float dot(const float *a, const void *x, int type, i64 k) {
    __m512 s[4];
    for (int j = 0; j < 4; j++) s[j] = _mm512_setzero_ps();
    i64 i = 0;
    for (; i + 64 <= k; i += 64)
        for (int j = 0; j < 4; j++) s[j] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16*j), load16(x, type, i + 16*j, 0xffff), s[j]);
    for (; i < k; i += 16) { __mmask16 m = head(k - i); s[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, a + i), load16(x, type, i, m), s[0]); }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
}
template<int R> static void dots(const float *a, i64 step, const void *x, int type, i64 k, float scaling, float *h) {   // R rows of A at once
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
static inline __m512i pick(__m512i mask, __m512i yes, __m512i no) { return _mm512_ternarylogic_epi32(mask, yes, no, 0xca); }

template<int P> static inline __attribute__((always_inline)) void unpack_unit(const uint8_t *h, const uint8_t *m, const uint8_t *l, __m512i mask, __m512i w[4]) {
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
    if (P != 3) for (int j = 0; j < 4; j++) w[j] = _mm512_and_si512(w[j], mask);   // P=4 is seven bits: three planes, masked
}
static inline int variant(i64 bits) { return bits <= 4 ? 1 : bits <= 6 ? 2 : bits == 8 ? 3 : 4; }

// ---- few tokens: one block of 16 channels times R rows of bytes ----
template<int P, int R> static void gemv_block(const SlLinear *d, i64 nb, const int8_t *xs, int32_t *s) {
    enum { A = R <= 4 ? 4 : 2 };
    const i64 units = d->kp >> 4;
    const uint8_t *h = d->high + nb*units*128, *m = P > 1 ? d->middle + nb*units*64 : h, *l = P > 2 ? d->low + nb*units*64 : h;
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
#define SL_ROW(P) {gemv_block<P,1>, gemv_block<P,2>, gemv_block<P,3>, gemv_block<P,4>, gemv_block<P,5>, gemv_block<P,6>, gemv_block<P,7>, gemv_block<P,8>}
static const gemv_fn gemv_table[4][8] = {SL_ROW(1), SL_ROW(2), SL_ROW(3), SL_ROW(4)};

// ---- integer sums to numbers ----
struct Channels { __m512d scale[2], sums[2], bias[2]; __mmask16 m; };   // constants of 16 channels
static inline void wide(__m512 v, __m512d o[2]) { o[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(v)); o[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
static inline Channels channels(const SlLinear *d, i64 nb) {
    Channels c;
    const i64 n0 = nb*16;
    const unsigned shift = 8 - (unsigned)d->bits;
    c.m = head(d->n - n0);
    wide(_mm512_maskz_loadu_ps(c.m, d->scale + n0), c.scale);
    wide(d->bias ? _mm512_maskz_loadu_ps(c.m, d->bias + n0) : _mm512_setzero_ps(), c.bias);
    const __m512i sums = d->act_mode ? _mm512_maskz_loadu_epi32(c.m, d->sums + n0) : _mm512_setzero_si512();
    const __m512i s = _mm512_slli_epi32(sums, shift);
    c.sums[0] = _mm512_cvtepi32_pd(_mm512_castsi512_si256(s)); c.sums[1] = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(s, 1));
    for (int p = 0; p < 2; p++) c.scale[p] = _mm512_mul_pd(c.scale[p], _mm512_set1_pd(1./(1 << shift)));   // codes are used with their top bit at bit 7
    return c;
}
static inline double flat_of(const SlLinear *d, const Row *row) { return d->zero*(double)(1 << (8 - d->bits))*(d->k*row->zx - row->sum); }
// 16 channels of one token; digit g of the sums stands at s + g*step.
template<int D> static inline __attribute__((always_inline)) __m512 finish16(const Channels *c, const int32_t *s, i64 step, const Row *row, double flat) {
    __m256 part[2];
    for (int p = 0; p < 2; p++) {
        __m512d t = _mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i*)(s + 8*p)));
        if (D == 3) {
            t = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i*)(s + step + 8*p))), _mm512_set1_pd(256.), t);
            t = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i*)(s + 2*step + 8*p))), _mm512_set1_pd(65536.), t);
        }
        t = _mm512_add_pd(_mm512_fnmadd_pd(_mm512_set1_pd(row->zx), c->sums[p], t), _mm512_set1_pd(flat));
        part[p] = _mm512_cvtpd_ps(_mm512_fmadd_pd(_mm512_mul_pd(c->scale[p], _mm512_set1_pd(row->sx)), t, c->bias[p]));
    }
    return _mm512_insertf32x8(_mm512_castps256_ps512(part[0]), part[1], 1);
}
// The same for T tokens (sums `far` apart, results `stride` bytes apart) with their adapters: y = ... + B h.
template<int D, int T> static inline __attribute__((always_inline)) void finish(const SlLinear *d, const Channels *c, const int32_t *s, i64 far, i64 step,
                                                                              const Row *row, const float *h, i64 nb, char *y, i64 stride, int type) {
    __m512 v[T];
    for (int t = 0; t < T; t++) v[t] = finish16<D>(c, s + t*far, step, row + t, flat_of(d, row + t));
    for (i64 j = 0; j < d->r; j++) {
        const __m512 b = _mm512_maskz_loadu_ps(c->m, d->lora_bt + j*d->n + nb*16);
        for (int t = 0; t < T; t++) v[t] = _mm512_fmadd_ps(_mm512_set1_ps(h[t*d->r + j]), b, v[t]);
    }
    for (int t = 0; t < T; t++) store16(y + t*stride, type, nb*16, c->m, v[t]);
}
template<int D> static void finish_some(const SlLinear *d, const Channels *c, const int32_t *s, i64 far, i64 step, const Row *row, const float *h,
                                        i64 nb, char *y, i64 stride, int type, i64 tokens) {
    i64 t = 0;
    for (; t + 8 <= tokens; t += 8) finish<D,8>(d, c, s + t*far, far, step, row + t, h + t*d->r, nb, y + t*stride, stride, type);
    for (; t < tokens; t++) finish<D,1>(d, c, s + t*far, far, step, row + t, h + t*d->r, nb, y + t*stride, stride, type);
}
typedef void (*finish_fn)(const SlLinear*, const Channels*, const int32_t*, i64, i64, const Row*, const float*, i64, char*, i64, int, i64);
static inline finish_fn finish_of(int D) { return D == 3 ? finish_some<3> : finish_some<1>; }

// Blocks b0..b1 of all tokens through the vector kernels; rows of bytes lie kp apart, the digits of a token together.
static void gemv_range(const SlLinear *d, const int8_t *xs, const Row *rows, const float *h, i64 m, i64 b0, i64 b1, char *y, i64 stride, int type) {
    const int D = digits_of(d), group = D == 3 ? 2 : 8;
    const gemv_fn *table = gemv_table[variant(d->bits) - 1];
    int32_t s[8*16] __attribute__((aligned(64)));
    const i64 w = (i64)width(type);
    for (i64 nb = b0; nb < b1; nb++) {
        const Channels c = channels(d, nb);
        for (i64 t0 = 0; t0 < m; t0 += group) {
            const i64 g = m - t0 < group ? m - t0 : group;
            table[g*D - 1](d, nb, xs + t0*D*d->kp, s);
            finish_of(D)(d, &c, s, D*16, 16, rows + t0, h + t0*d->r, nb, y + t0*stride*w, stride*w, type, g);
        }
    }
}

// ---- many tokens: tiles. A row tile is 16 tokens of one digit, stored as kp/64 pieces of 16 x 64 bytes ----
struct TileConfig { uint8_t palette, start, pad[14]; uint16_t cols[16]; uint8_t rows[16]; };
static void tiles_on() {
    TileConfig c; memset(&c, 0, sizeof c); c.palette = 1;
    for (int i = 0; i < 8; i++) { c.cols[i] = 64; c.rows[i] = 16; }
    _tile_loadconfig(&c);
}
template<int P> static void unpack_block(const SlLinear *d, i64 nb, uint8_t *out) {
    const i64 units = d->kp >> 4;
    const uint8_t *h = d->high + nb*units*128, *m = P > 1 ? d->middle + nb*units*64 : h, *l = P > 2 ? d->low + nb*units*64 : h;
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
static void tiles_2x2(const int8_t *a0, const int8_t *a1, const uint8_t *b0, const uint8_t *b1, i64 pieces, int32_t *c, int32_t *c2) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (i64 p = 0; p < pieces; p++) {
        _tile_loadd(6, b0 + p*1024, 64); _tile_loadd(4, a0 + p*1024, 64); _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b1 + p*1024, 64); _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, a1 + p*1024, 64); _tile_dpbsud(2, 5, 6); _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, c, 128); _tile_stored(1, c + 16, 128); _tile_stored(2, c2, 128); _tile_stored(3, c2 + 16, 128);
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
static void gemm_pair(const SlLinear *d, const int8_t *a, const Row *rows, const float *h, i64 m, i64 t0, i64 t1, i64 nb,
                      const uint8_t *b, int32_t *c, char *y, i64 stride, int type) {
    const int D = digits_of(d);
    const i64 pieces = d->kp >> 6, tile = d->kp*16, blocks = (d->n + 15) >> 4, w = (i64)width(type);
    const int two = nb + 1 < blocks;
    const uint8_t *b1 = two ? b + tile : b;
    const Channels ch[2] = {channels(d, nb), channels(d, two ? nb + 1 : nb)};
    for (i64 t = t0; t < t1; t += 2) {
        const int pair = t + 1 < t1;
        for (int g = 0; g < D; g++)
            if (pair) tiles_2x2(a + (t*D + g)*tile, a + ((t + 1)*D + g)*tile, b, b1, pieces, c + g*512, c + (D + g)*512);
            else tiles_1x2(a + (t*D + g)*tile, b, b1, pieces, c + g*512);
        for (i64 u = t; u <= t + pair; u++) for (int q = 0; q <= two; q++)
            finish_of(D)(d, ch + q, c + (u - t)*D*512 + q*16, 32, 512, rows + u*16, h + u*16*d->r, nb + q, y + u*16*stride*w, stride*w, type, m - u*16 < 16 ? m - u*16 : 16);
    }
}

static int linear_few(const SlLinear *d, const char *x, i64 m, i64 xstride, int type, char *y, i64 ystride) {
    const int D = digits_of(d);
    const i64 blocks = (d->n + 15) >> 4;
    size_t rows_at = round64((size_t)m*D*d->kp), h_at = rows_at + round64(m*sizeof(Row));
    char *p = arena.get(h_at + round64((size_t)m*d->r*4) + 64);
    if (!p) return NO_MEMORY;
    int8_t *xs = (int8_t*)p; Row *rows = (Row*)(p + rows_at); float *h = (float*)(p + h_at);
    const i64 w = (i64)width(type);
    int threads = max_threads();
    if (m*blocks*d->kp < 8192) threads = 1;
    if (threads > blocks) threads = (int)blocks;
    const bool shared = m*d->kp*(D + d->r) < 65536;   // few rows: one thread prepares them, else all do
    if (shared || threads == 1) for (i64 t = 0; t < m; t++) {
        quantize_row(d, x + t*xstride*w, type, xs + t*D*d->kp, 64, d->kp, rows + t);
        adapter_row(d, x + t*xstride*w, type, h + t*d->r);
    }
    if (threads == 1) { gemv_range(d, xs, rows, h, m, 0, blocks, y, ystride, type); return 0; }
    #pragma omp parallel num_threads(threads)
    {
        const int me = thread_id();
        if (!shared) {
            #pragma omp for schedule(static)
            for (i64 t = 0; t < m; t++) {
                quantize_row(d, x + t*xstride*w, type, xs + t*D*d->kp, 64, d->kp, rows + t);
                adapter_row(d, x + t*xstride*w, type, h + t*d->r);
            }
        }
#ifdef _OPENMP
        const int all = omp_get_num_threads();
#else
        const int all = 1;
#endif
        gemv_range(d, xs, rows, h, m, blocks*me/all, blocks*(me + 1)/all, y, ystride, type);
    }
    return 0;
}

static int linear_many(const SlLinear *d, const char *x, i64 m, i64 xstride, int type, char *y, i64 ystride) {
    const int D = digits_of(d);
    const i64 tiles = (m + 15) >> 4, tile = d->kp*16, pairs = (((d->n + 15) >> 4) + 1) >> 1, w = (i64)width(type);
    int threads = max_threads();
    const size_t own = round64(2*tile) + 6*2048;
    size_t rows_at = round64((size_t)tiles*D*tile), h_at = rows_at + round64(m*sizeof(Row)), own_at = h_at + round64((size_t)m*d->r*4);
    char *p = arena.get(own_at + own*threads + 64);
    if (!p) return NO_MEMORY;
    int8_t *a = (int8_t*)p; Row *rows = (Row*)(p + rows_at); float *h = (float*)(p + h_at);
    i64 step = (1 << 20)/(D*tile); step = step < 2 ? 2 : step & ~(i64)1;   // row tiles whose bytes stay in the second-level cache
    #pragma omp parallel num_threads(threads)
    {
        uint8_t *b = (uint8_t*)p + own_at + own*thread_id(); int32_t *c = (int32_t*)(b + round64(2*tile));
        #pragma omp for schedule(static)
        for (i64 t = 0; t < tiles*16; t++) {
            int8_t *o = a + (t >> 4)*D*tile + (t & 15)*64;
            if (t < m) { quantize_row(d, x + t*xstride*w, type, o, 1024, tile, rows + t); adapter_row(d, x + t*xstride*w, type, h + t*d->r); }
            else for (int g = 0; g < D; g++) for (i64 q = 0; q < d->kp >> 6; q++) memset(o + g*tile + q*1024, 0, 64);
        }
        tiles_on();
        for (i64 t0 = 0; t0 < tiles; t0 += step) {
            #pragma omp for schedule(static) nowait
            for (i64 q = 0; q < pairs; q++) {
                unpack_any(d, 2*q, b);
                if (2*q + 1 < (d->n + 15) >> 4) unpack_any(d, 2*q + 1, b + tile);
                gemm_pair(d, a, rows, h, m, t0, t0 + step < tiles ? t0 + step : tiles, 2*q, b, c, y, ystride, type);
            }
        }
        _tile_release();
    }
    return 0;
}

// y (m,n) = x (m,k) times the weight; n and k as the caller's x and y have them; type of both: 0 float32, 1 bfloat16, 2 float16.
// xstride: numbers from one token to the next.
SL_API int sl_linear(const SlLinear *d, const void *x, i64 m, i64 k, i64 xstride, int type, void *y, i64 n) {
    const int f = features();
    if (!(f & 1)) return CANNOT;
    if (int fault = check_linear(d)) return fault;
    if (d->n != n || d->k != k) return SHAPES;
    if (d->dense || !within(m, 0, MOST) || !within(type, 0, 2) || xstride < 0) return RANGE;
    if (m == 0) return FINE;
    if (!x || !y) return BUFFER;
    if ((f & 2) && m*digits_of(d) > 6) return linear_many(d, (const char*)x, m, xstride, type, (char*)y, n);
    return linear_few(d, (const char*)x, m, xstride, type, (char*)y, n);
}

// ---- one token through a whole model (nbs/06b_lean.ipynb) ----
static inline __m512 exp16(__m512 x) {   // within 2 units in the last place
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.7f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.f/5040);
    const float c[] = {1.f/720, 1.f/120, 1.f/24, 1.f/6, .5f, 1.f, 1.f};
    for (int i = 0; i < 7; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c[i]));
    return _mm512_scalef_ps(p, n);
}
static inline __m512 sigmoid16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}
static void activate(float *y, const float *gate, i64 a, i64 b, bool silu) {   // y = act(gate)*y, or act(y)
    for (i64 i = a; i < b; i += 16) {
        const __mmask16 m = head(b - i);
        const __m512 up = _mm512_maskz_loadu_ps(m, y + i), g = gate ? _mm512_maskz_loadu_ps(m, gate + i) : up;
        __m512 u = g;
        if (!silu) {                      // x/2 (1 + tanh v) = x sigmoid(2v)
            u = _mm512_mul_ps(_mm512_mul_ps(g, g), g);
            u = _mm512_mul_ps(_mm512_fmadd_ps(u, _mm512_set1_ps(0.044715f), g), _mm512_set1_ps(2*0.7978845608028654f));
        }
        const __m512 v = _mm512_mul_ps(g, sigmoid16(u));
        _mm512_mask_storeu_ps(y + i, m, gate ? _mm512_mul_ps(v, up) : v);
    }
}
static void normalize(const float *x, const float *w, const float *b, i64 n, bool rms, double eps, float *y) {
    __m512 s = _mm512_setzero_ps();
    float mean = 0;
    if (!rms) {
        for (i64 i = 0; i < n; i += 16) s = _mm512_add_ps(s, _mm512_maskz_loadu_ps(head(n - i), x + i));
        mean = _mm512_reduce_add_ps(s)/(float)n; s = _mm512_setzero_ps();
    }
    const __m512 mu = _mm512_set1_ps(mean);
    for (i64 i = 0; i < n; i += 16) {
        const __mmask16 m = head(n - i);
        const __m512 v = _mm512_maskz_sub_ps(m, _mm512_maskz_loadu_ps(m, x + i), mu);
        s = _mm512_fmadd_ps(v, v, s);
    }
    const __m512 r = _mm512_set1_ps(1.f/sqrtf(_mm512_reduce_add_ps(s)/(float)n + (float)eps));
    for (i64 i = 0; i < n; i += 16) {
        const __mmask16 m = head(n - i);
        const __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, x + i), mu), r);
        const __m512 c = b ? _mm512_maskz_loadu_ps(m, b + i) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(y + i, m, _mm512_fmadd_ps(v, w ? _mm512_maskz_loadu_ps(m, w + i) : _mm512_set1_ps(1.f), c));
    }
}

struct Own { int8_t *bytes; float *h, *norm, *scores, *q, *k; };   // scratch of one thread

// 16 channels of a float weight, read in the type and the order in which it lies.
static __m512 dense_block(const SlLinear *d, const float *x, i64 nb) {
    const int type = (int)d->dense_type;
    const i64 n0 = nb*16, left = d->n - n0 < 16 ? d->n - n0 : 16;
    const __mmask16 m = head(left);
    __m512 v = d->bias ? _mm512_maskz_loadu_ps(m, d->bias + n0) : _mm512_setzero_ps();
    if (!d->dense_columns) {
        float s[16] = {0};
        for (i64 i = 0; i < left; i++) s[i] = dot(x, (const char*)d->dense + (n0 + i)*d->k*(i64)width(type), type, d->k);
        return _mm512_add_ps(v, _mm512_loadu_ps(s));
    }
    __m512 a[4];
    for (int j = 0; j < 4; j++) a[j] = _mm512_setzero_ps();
    for (i64 i = 0; i < d->k; i++) a[i & 3] = _mm512_fmadd_ps(_mm512_set1_ps(x[i]), load16(d->dense, type, i*d->n + n0, m), a[i & 3]);
    return _mm512_add_ps(v, _mm512_add_ps(_mm512_add_ps(a[0], a[1]), _mm512_add_ps(a[2], a[3])));
}
static void put_block(const SlLinear *d, __m512 v, const float *h, i64 nb, float *y, bool add) {   // with the adapter
    const __mmask16 m = head(d->n - nb*16);
    for (i64 j = 0; j < d->r; j++) v = _mm512_fmadd_ps(_mm512_set1_ps(h[j]), _mm512_maskz_loadu_ps(m, d->lora_bt + j*d->n + nb*16), v);
    if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(m, y + nb*16));
    _mm512_mask_storeu_ps(y + nb*16, m, v);
}
// This thread's share of y = d(x), or y += d(x); every thread quantizes the whole input for itself, which is cheaper than waiting.
static void share(const SlLinear *d, const float *x, float *y, bool add, const Own *o, int me, int all) {
    const i64 blocks = (d->n + 15) >> 4, b0 = blocks*me/all, b1 = blocks*(me + 1)/all;
    if (d->r) adapter_row(d, x, 0, o->h);
    if (d->dense) {
        for (i64 nb = b0; nb < b1; nb++) put_block(d, dense_block(d, x, nb), o->h, nb, y, add);
        return;
    }
    Row row;
    const int D = digits_of(d);
    const gemv_fn f = gemv_table[variant(d->bits) - 1][D - 1];
    quantize_row(d, x, 0, o->bytes, 64, d->kp, &row);
    int32_t s[3*16] __attribute__((aligned(64)));
    const double flat = flat_of(d, &row);
    for (i64 nb = b0; nb < b1; nb++) {
        const Channels c = channels(d, nb);
        f(d, nb, o->bytes, s);
        put_block(d, D == 3 ? finish16<3>(&c, s, 16, &row, flat) : finish16<1>(&c, s, 16, &row, flat), o->h, nb, y, add);
    }
}
static void add_row(const void *rows, int type, i64 row, i64 n, bool fresh, float *y) {   // y = rows[row], or y += rows[row]
    for (i64 i = 0; i < n; i += 16) {
        const __mmask16 m = head(n - i);
        const __m512 v = load16(rows, type, row*n + i, m);
        _mm512_mask_storeu_ps(y + i, m, fresh ? v : _mm512_add_ps(v, _mm512_maskz_loadu_ps(m, y + i)));
    }
}
static void embed(const SlLinear *d, i64 id, float *y) {   // row `id` of the weight
    if (d->dense) { add_row(d->dense, (int)d->dense_type, id, d->k, true, y); return; }
    const i64 units = d->kp >> 4, base = (id >> 4)*units, lane = (id & 15)*4;
    const float s = d->scale[id];
    for (i64 i = 0; i < d->k; i++) {
        const i64 u = base + (i >> 4), v = (i >> 2) & 3, at = lane + (i & 3);
        int c = (d->high[u*128 + (v >> 1)*64 + at] >> (v & 1)*4 & 15) << 4;
        if (d->bits > 4) c |= (d->middle[u*64 + at] >> 2*v & 3) << 2;
        if (d->bits > 6) c |= d->low[u*64 + at] >> 2*v & 3;
        y[i] = ((float)(c >> (8 - d->bits)) - (float)d->zero)*s;
    }
}
static void rotate(const float *x, const float *c, const float *s, i64 n, float *y) {   // halves rotated, as Llama does
    if (!c) { memcpy(y, x, (size_t)n*4); return; }
    const i64 h = n/2;
    for (i64 i = 0; i < h; i++) { y[i] = x[i]*c[i] - x[i + h]*s[i]; y[i + h] = x[i + h]*c[i + h] + x[i]*s[i + h]; }
}
// One head: q (n) against `pos` cached keys and the new one; y = softmax(scale q k) v.
static void attend(const float *q, const float *keys, const float *values, const float *k, const float *v, i64 pos, i64 n, float scale, float *p, float *y) {
    for (i64 t = 0; t < pos; t++) p[t] = scale*dot(keys + t*n, q, 0, n);
    p[pos] = scale*dot(k, q, 0, n);
    __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (i64 t = 0; t <= pos; t += 16) top = _mm512_mask_max_ps(top, head(pos + 1 - t), top, _mm512_maskz_loadu_ps(head(pos + 1 - t), p + t));
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (i64 t = 0; t <= pos; t += 16) {
        const __mmask16 m = head(pos + 1 - t);
        const __m512 e = _mm512_maskz_mov_ps(m, exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, p + t), top)));
        _mm512_mask_storeu_ps(p + t, m, e); sum = _mm512_add_ps(sum, e);
    }
    const float inv = 1.f/_mm512_reduce_add_ps(sum);
    for (i64 i = 0; i < n; i += 64) {
        __m512 a[4]; __mmask16 m[4];
        for (int j = 0; j < 4; j++) { m[j] = i + 16*j < n ? head(n - i - 16*j) : 0; a[j] = _mm512_mul_ps(_mm512_set1_ps(p[pos]), _mm512_maskz_loadu_ps(m[j], v + i + 16*j)); }
        for (i64 t = 0; t < pos; t++) {
            const __m512 w = _mm512_set1_ps(p[t]);
            for (int j = 0; j < 4; j++) a[j] = _mm512_fmadd_ps(w, _mm512_maskz_loadu_ps(m[j], values + t*n + i + 16*j), a[j]);
        }
        for (int j = 0; j < 4; j++) _mm512_mask_storeu_ps(y + i + 16*j, m[j], _mm512_mul_ps(a[j], _mm512_set1_ps(inv)));
    }
}
static void attention(const SlModel *M, const SlCache *C, i64 layer, i64 pos, const float *qkv, float *out, const Own *o, int me, int all) {
    const i64 hd = M->head_dim, H = M->heads, G = M->kv_heads, each = H/G, row = C->capacity*hd;
    const float *c = M->rotary ? C->cos + pos*hd : nullptr, *s = M->rotary ? C->sin + pos*hd : nullptr;
    const float *k_new = qkv + H*hd, *v_new = k_new + G*hd;
    for (i64 i = H*me/all, g = -1; i < H*(me + 1)/all; i++) {
        float *keys = C->keys + (layer*G + i/each)*row, *values = C->values + (layer*G + i/each)*row;
        if (g != i/each) { g = i/each; rotate(k_new + g*hd, c, s, hd, o->k); }
        rotate(qkv + i*hd, c, s, hd, o->q);
        attend(o->q, keys, values, o->k, v_new + g*hd, pos, hd, (float)M->attention_scale, o->scores, out + i*hd);
        if (i % each == 0) { memcpy(keys + pos*hd, o->k, (size_t)hd*4); memcpy(values + pos*hd, v_new + g*hd, (size_t)hd*4); }
    }
}
static void run_layer(const SlModel *M, const SlCache *C, i64 i, i64 pos, float *x, float *qkv, float *att, float *mid, const Own *o, int me, int all) {
    const SlLayer *L = M->layers + i;
    normalize(x, L->norm[0], L->norm[1], M->dim, M->rms, M->eps, o->norm);
    for (i64 j = 0, at = 0; j < 3 && L->qkv[j]; at += L->qkv[j++]->n) share(L->qkv[j], o->norm, qkv + at, false, o, me, all);
    #pragma omp barrier
    attention(M, C, i, pos, qkv, att, o, me, all);
    #pragma omp barrier
    share(L->out, att, x, true, o, me, all);
    #pragma omp barrier
    normalize(x, L->norm[2], L->norm[3], M->dim, M->rms, M->eps, o->norm);
    const i64 blocks = (M->hidden + 15) >> 4, a = blocks*me/all*16, b = blocks*(me + 1)/all*16;
    float *gate = L->gate ? mid + round64(M->hidden) : nullptr;
    if (gate) share(L->gate, o->norm, gate, false, o, me, all);
    share(L->up, o->norm, mid, false, o, me, all);
    activate(mid, gate, a, b < M->hidden ? b : M->hidden, M->silu);
    #pragma omp barrier
    share(L->down, mid, x, true, o, me, all);
    #pragma omp barrier
}
// Token `id` at position `pos`: its keys and values go into the cache, the logits of the next token to `logits` (if not null).
SL_API int sl_decode_step(const SlModel *M, const SlCache *C, i64 id, i64 pos, float *logits) {
    if (!(features() & 1)) return CANNOT;
    if (int fault = check_pass(M, C, &id, 1, pos)) return fault;
    const i64 kp = M->max_kp, r = M->max_r, wide = (M->heads + 2*M->kv_heads)*M->head_dim;
    const size_t dim = round64(M->dim), head_dim = round64(M->head_dim), hidden = round64(M->hidden), score = round64(pos + 17);
    const size_t own = round64(3*kp) + 4*(round64(r) + dim + score + 2*head_dim);
    const size_t common = 4*(dim + round64(wide) + round64(M->heads*M->head_dim) + 2*hidden);
    int threads = max_threads();
    char *p = arena.get(common + own*threads + 64);
    if (!p) return NO_MEMORY;
    float *x = (float*)p, *qkv = x + dim, *att = qkv + round64(wide), *mid = att + round64(M->heads*M->head_dim);
    embed(M->embedding, id, x);
    if (M->positions) add_row(M->positions, (int)M->positions_type, pos, M->dim, false, x);
    #pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
#else
        const int me = 0, all = 1;
#endif
        char *q = p + common + own*me;
        Own o;
        o.bytes = (int8_t*)q; o.h = (float*)(q + round64(3*kp)); o.norm = o.h + round64(r); o.scores = o.norm + dim;
        o.q = o.scores + score; o.k = o.q + head_dim;
        for (i64 i = 0; i < M->n_layers; i++) run_layer(M, C, i, pos, x, qkv, att, mid, &o, me, all);
        if (logits) {
            normalize(x, M->norm_w, M->norm_b, M->dim, M->rms, M->eps, o.norm);
            share(M->head, o.norm, logits, false, &o, me, all);
        }
    }
    return 0;
}

// ---- a prompt: all its tokens through the same kernels ----
static void tokens_linear(const SlLinear *d, const float *x, i64 m, float *y, i64 stride) {
    if ((features() & 2) && m*digits_of(d) > 6) linear_many(d, (const char*)x, m, d->k, 0, (char*)y, stride);
    else linear_few(d, (const char*)x, m, d->k, 0, (char*)y, stride);
}
// Queries t..t+g-1 (g <= 8) of one head at positions pos+t..; kt holds the keys input by input, `wide` positions apart.
static void attend_some(const float *q, i64 qstride, const float *kt, const float *values, i64 pos, int g, i64 n, i64 wide, float scale, float *p, float *y, i64 ystride) {
    const i64 last = pos + g;   // keys that the last query sees
    for (i64 k = 0; k < last; k += 16) {
        __m512 a[8];
        for (int i = 0; i < 8; i++) a[i] = _mm512_setzero_ps();
        for (i64 j = 0; j < n; j++) {
            const __m512 v = _mm512_loadu_ps(kt + j*wide + k);
            for (int i = 0; i < 8; i++) a[i] = _mm512_fmadd_ps(_mm512_set1_ps(q[(i < g ? i : 0)*qstride + j]), v, a[i]);
        }
        for (int i = 0; i < g; i++) _mm512_storeu_ps(p + i*wide + k, _mm512_mul_ps(a[i], _mm512_set1_ps(scale)));
    }
    for (int i = 0; i < g; i++) {
        float *s = p + i*wide;
        const i64 sees = pos + i + 1;
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (i64 k = 0; k < sees; k += 16) top = _mm512_mask_max_ps(top, head(sees - k), top, _mm512_loadu_ps(s + k));
        top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        for (i64 k = 0; k < sees; k += 16) {
            const __m512 e = _mm512_maskz_mov_ps(head(sees - k), exp16(_mm512_sub_ps(_mm512_loadu_ps(s + k), top)));
            _mm512_storeu_ps(s + k, e); sum = _mm512_add_ps(sum, e);
        }
        const float inv = 1.f/_mm512_reduce_add_ps(sum);
        for (i64 k = 0; k < sees; k += 16) _mm512_storeu_ps(s + k, _mm512_mul_ps(_mm512_loadu_ps(s + k), _mm512_set1_ps(inv)));
        for (i64 k = sees; k < last; k++) s[k] = 0;
    }
    for (int i0 = 0; i0 < g; i0 += 4) for (i64 c = 0; c < n; c += 64) {
        __m512 a[4][4]; __mmask16 m[4];
        for (int j = 0; j < 4; j++) { m[j] = c + 16*j < n ? head(n - c - 16*j) : 0; for (int i = 0; i < 4; i++) a[i][j] = _mm512_setzero_ps(); }
        for (i64 k = 0; k < last; k++) {
            __m512 v[4];
            for (int j = 0; j < 4; j++) v[j] = _mm512_maskz_loadu_ps(m[j], values + k*n + c + 16*j);
            for (int i = 0; i < 4; i++) {
                const __m512 w = _mm512_set1_ps(p[(i0 + i < g ? i0 + i : 0)*wide + k]);
                for (int j = 0; j < 4; j++) a[i][j] = _mm512_fmadd_ps(w, v[j], a[i][j]);
            }
        }
        for (int i = 0; i < 4 && i0 + i < g; i++) for (int j = 0; j < 4; j++) _mm512_mask_storeu_ps(y + (i0 + i)*ystride + c + 16*j, m[j], a[i][j]);
    }
}
static void cache_tokens(const SlModel *M, const SlCache *C, i64 layer, i64 pos, i64 m, float *qkv, i64 wide, float *spare) {   // rotate, and put keys and values into the cache
    const i64 hd = M->head_dim, H = M->heads, G = M->kv_heads, row = C->capacity*hd;
    for (i64 t = 0; t < m; t++) {
        const float *c = M->rotary ? C->cos + (pos + t)*hd : nullptr, *s = M->rotary ? C->sin + (pos + t)*hd : nullptr;
        float *q = qkv + t*wide;
        if (c) for (i64 i = 0; i < H; i++) { memcpy(spare, q + i*hd, (size_t)hd*4); rotate(spare, c, s, hd, q + i*hd); }
        for (i64 g = 0; g < G; g++) {
            rotate(q + (H + g)*hd, c, s, hd, C->keys + (layer*G + g)*row + (pos + t)*hd);
            memcpy(C->values + (layer*G + g)*row + (pos + t)*hd, q + (H + G + g)*hd, (size_t)hd*4);
        }
    }
}
static thread_local Arena prompt_arena;

// Logits of one token, by all threads.
static int finish_token(const SlModel *M, const float *x, float *norm, float *logits, int threads) {
    normalize(x, M->norm_w, M->norm_b, M->dim, M->rms, M->eps, norm);
    const size_t bytes = round64(3*M->head->kp), own = bytes + 4*round64(M->head->r);
    char *p = arena.get(own*threads + 64);
    if (!p) return NO_MEMORY;
    #pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int all = omp_get_num_threads();
#else
        const int all = 1;
#endif
        Own o = {};
        o.bytes = (int8_t*)p + own*thread_id(); o.h = (float*)(o.bytes + bytes);
        share(M->head, norm, logits, false, &o, thread_id(), all);
    }
    return FINE;
}

// Tokens ids (m) at positions pos, pos+1, ...: like m decoding steps, of which only the last makes logits (if not null). Layers must be packed.
SL_API int sl_prompt(const SlModel *M, const SlCache *C, const i64 *ids, i64 m, i64 pos, float *logits) {
    if (!(features() & 1)) return CANNOT;
    if (!ids) return BUFFER;
    if (int fault = check_pass(M, C, ids, m, pos)) return fault;
    if (!M->packed) return SHAPES;
    const i64 hd = M->head_dim, H = M->heads, G = M->kv_heads, wide = (H + 2*G)*hd, dim = M->dim, hidden = M->hidden, keys = ((pos + m + 15) & ~(i64)15) + 16;
    const int threads = max_threads();
    const size_t own = round64(hd*keys + 8*keys + hd + 64);
    char *mem = prompt_arena.get(4*(round64(3*m*dim) + round64(m*wide) + round64(m*H*hd) + round64(2*m*hidden) + own*threads) + 64);
    if (!mem) return NO_MEMORY;
    float *x = (float*)mem, *norm = x + m*dim, *y = norm + m*dim, *qkv = x + round64(3*m*dim), *att = qkv + round64(m*wide), *up = att + round64(m*H*hd), *gate = up + m*hidden;
    float *scratch = up + round64(2*m*hidden);
    for (i64 t = 0; t < m; t++) {
        embed(M->embedding, ids[t], x + t*dim);
        if (M->positions) add_row(M->positions, (int)M->positions_type, pos + t, dim, false, x + t*dim);
    }
    for (i64 l = 0; l < M->n_layers; l++) {
        const SlLayer *L = M->layers + l;
        #pragma omp parallel for schedule(static) num_threads(threads)
        for (i64 t = 0; t < m; t++) normalize(x + t*dim, L->norm[0], L->norm[1], dim, M->rms, M->eps, norm + t*dim);
        for (i64 j = 0, at = 0; j < 3 && L->qkv[j]; at += L->qkv[j++]->n) tokens_linear(L->qkv[j], norm, m, qkv + at, wide);
        cache_tokens(M, C, l, pos, m, qkv, wide, scratch);
        #pragma omp parallel num_threads(threads)
        {
            float *kt = scratch + own*thread_id(), *p = kt + hd*keys;
            i64 have = -1;
            #pragma omp for schedule(static)
            for (i64 h = 0; h < H; h++) {
                const i64 g = h/(H/G);
                const float *K = C->keys + (l*G + g)*C->capacity*hd, *V = C->values + (l*G + g)*C->capacity*hd;
                if (have != g) { for (i64 k = 0; k < keys; k++) for (i64 j = 0; j < hd; j++) kt[j*keys + k] = k < pos + m ? K[k*hd + j] : 0.f; have = g; }
                for (i64 t = 0; t < m; t += 8)
                    attend_some(qkv + t*wide + h*hd, wide, kt, V, pos + t, (int)(m - t < 8 ? m - t : 8), hd, keys, (float)M->attention_scale, p, att + t*H*hd + h*hd, H*hd);
            }
        }
        tokens_linear(L->out, att, m, y, dim);
        #pragma omp parallel for schedule(static) num_threads(threads)
        for (i64 t = 0; t < m; t++) {
            for (i64 i = t*dim; i < (t + 1)*dim; i++) x[i] += y[i];
            normalize(x + t*dim, L->norm[2], L->norm[3], dim, M->rms, M->eps, norm + t*dim);
        }
        if (L->gate) tokens_linear(L->gate, norm, m, gate, hidden);
        tokens_linear(L->up, norm, m, up, hidden);
        #pragma omp parallel for schedule(static) num_threads(threads)
        for (i64 t = 0; t < m; t++) activate(up + t*hidden, L->gate ? gate + t*hidden : nullptr, 0, hidden, M->silu);
        tokens_linear(L->down, up, m, y, dim);
        #pragma omp parallel for schedule(static) num_threads(threads)
        for (i64 i = 0; i < m*dim; i++) x[i] += y[i];
    }
    return logits ? finish_token(M, x + (m - 1)*dim, norm, logits, threads) : FINE;
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else
SL_API int sl_packed_features() { return 0; }
SL_API int sl_linear(const SlLinear*, const void*, i64, i64, i64, int, void*, i64) { return 1; }
SL_API int sl_check_model(SlModel*, i64*) { return 1; }
SL_API int sl_decode_step(const SlModel*, const SlCache*, i64, i64, float*) { return 1; }
SL_API int sl_prompt(const SlModel*, const SlCache*, const i64*, i64, i64, float*) { return 1; }
#endif
