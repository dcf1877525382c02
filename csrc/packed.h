// Products with the nested store (nbs/serving/kernels.ipynb describes the layout and the formulas).
//
// A weight of n output channels and k inputs is kept as three planes of its eight-bit codes: bits 7-4, bits 3-2,
// bits 1-0. A vector of 64 bytes is 16 channels x 4 inputs. Four vectors make a unit of 16 inputs: 128 bytes of the
// high plane, 64 of the middle, 64 of the low. Codes are used with their top bit at bit 7 and zeros (or nothing)
// below the live bits, so one routine serves all precisions.
//
// Activations become signed bytes: codes of at most 8 bits take one, wider codes and floats (24-bit integers per
// token) take three. All sums are integers; scales, zero points and bias are applied in double, and the result is
// rounded once.
//
// border.cpp checks what comes in, planes.h multiplies, model.h runs tokens through a whole model. Both are compiled for
// each level of isa.h, with the vectors of vec.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

#define SL_API extern "C" __attribute__((visibility("default")))
typedef int64_t i64;

// Every struct begins with its own size, as the caller knows it, and every buffer comes with the count of numbers
// that it holds. The calls compare both with what they are going to read, and return a fault instead of reading
// past an end.
enum { HIGH, MIDDLE, LOW, DENSE, SCALE, SUMS, BIAS, LORA_A, LORA_BT, TOTALS, SIGNS, MATRIX, BUFFERS };
struct SlLinear {               // mirrored by kernels._Linear
    i64 size;
    const uint8_t *high, *middle, *low;
    const void *dense;          // float weight instead of planes, or null
    const void *scale;          // (n) step of a row, float32; with groups (n/16,groups,16) step of the eight-bit code
    const int32_t *sums;        // (n) sum of a row's codes; null for float activations and groups, which need none
    const float *bias;          // (n) or null
    const float *lora_a;        // (r,k) or null
    const float *lora_bt;       // (r,n)
    const float *totals;        // (n) sum of a row's weights, for groups; null for float activations
    const float *signs, *matrix; // of the rotation of the input (rotation.h), or null
    i64 len[BUFFERS];           // of the buffers above, in their order
    i64 n, k, kp, r, bits;
    i64 dense_type;             // 0 float32, 1 bfloat16, 2 float16
    i64 dense_columns;          // 0: the float weight is (n,k); 1: (k,n)
    i64 act_mode;               // 0 float, 1 static range, 2 range per token
    i64 act_bits, act_symmetric, act_zero;
    i64 group, step_type;       // inputs that share a step, a multiple of 16, 0 for all; 0 float32, 2 float16
    i64 block, order;           // of the rotation; 0 for none. The adapter sees the input as it comes
    double act_scale, zero, lora_scale;
};

struct SlLayer {                // mirrored by parts._Layer
    i64 size;
    const float *norm[4];       // weight and bias before attention, then before the MLP; biases may be null
    const float *after[2];      // RMS norm of what attention gives, and of what the MLP gives; null for none
    const float *qk_norm[2];    // RMS norm of queries, and of keys: by its length of each head or of all; or null
    i64 norm_len[4], after_len[2], qk_norm_len[2];
    const SlLinear *qkv[3];     // one fused (then 1 and 2 are null) or three
    const SlLinear *out, *gate, *up, *down;               // gate null for a plain MLP
    i64 before;                 // whether there are norms before attention and MLP
    i64 angles;                 // which table of angles rotates queries and keys, from 1; 0 leaves them
    i64 window;                 // positions that a token sees, its own the last; 0 for all
};
struct SlModel {                // mirrored by parts._Model: a model at one profile; threads only read it
    i64 size;
    const SlLayer *layers;
    const SlLinear *embedding, *head;
    const void *positions;      // (context,dim) learned positions, or null
    const float *norm_w, *norm_b;
    i64 positions_len, norm_w_len, norm_b_len;
    i64 positions_type;         // as dense_type
    i64 n_layers, dim, heads, kv_heads, head_dim, hidden, context;
    i64 rms, silu;              // RMS norm or layer norm; SiLU or tanh GELU
    i64 angles, rotated;        // tables of rotary angles, 0 for none; numbers of a head that they rotate, its first
    double eps, attention_scale, embedding_scale;
    i64 checked, packed, max_kp, max_r;   // written by sl_check_model
};
// Keys and values of a text lie in pages of 32 tokens (nbs/serving/kept.ipynb has the layout). A page has for each block
// the keys and then the values of those tokens: floats, or in few bits (nbs/attention/caches.ipynb has the rule). A unit is
// the keys of 32 tokens: for each channel its codes, then the smallest numbers of all channels, then the steps. A row is
// the values of a token: codes, smallest number, step. Ranges are float16.
struct SlKept {                 // mirrored by kept._Kept: how a block lies in a page
    i64 size;
    i64 k_bits, v_bits;         // 2, 4, 8, or 0 for float
    i64 keys;                   // byte of a page where its keys begin: units (kv_heads), or floats (kv_heads,32,head_dim)
    i64 values;                 // and its values: rows (kv_heads,32), or floats
    i64 recent;                 // number of `recent` where its exact keys begin; 0 with float keys, which have none
};
struct SlCache {                // mirrored by kept._Cache: one sequence
    i64 size;
    uint8_t *const *pages;      // (capacity/32) of page_len bytes; what others hold too is only read
    float *recent;              // of each block with keys in few bits (kv_heads,32,head_dim): the group that is not complete
    const SlKept *kept;         // (layers)
    const float *cos, *sin;     // (tables,places,rotated) rotary angles, or null
    i64 pages_len, recent_len, kept_len, cos_len, sin_len;
    i64 page_len, capacity, places;   // bytes; tokens that fit; positions in a table of angles
};

struct SlRow {                  // mirrored by parts._Row: tokens of one text at one precision
    i64 size;
    const SlModel *model;
    const SlCache *cache;
    const i64 *ids;             // (m)
    i64 m, pos;
    i64 wanted;                 // whether logits are to follow the last of them
};

// What the calls return; mirrored by kernels.FAULTS.
enum { FINE, CANNOT, NO_MEMORY, POSITION, TOKEN, STRUCT, RANGE, BUFFER, SHAPES, UNCHECKED };

#include "isa.h"
#if defined(SL_X86) || defined(SL_ARM)
#define SL_HERE 1               // elsewhere every call returns a fault
#endif

#ifdef SL_HERE
// ---- border.cpp ----
int check_linear(const SlLinear *d);
int check_pass(const SlModel *M, const SlCache *C, const i64 *ids, i64 m, i64 pos);

// ---- what a level does, after the checks ----
struct Calls {
    int (*linear)(const SlLinear *d, const void *x, i64 m, i64 xstride, int type, void *y, i64 ystride);
    int (*decode)(const SlModel *M, const SlCache *C, i64 id, i64 pos, float *logits);
    int (*prompt)(const SlModel *M, const SlCache *C, const i64 *ids, i64 m, i64 pos, float *logits);
    int (*rows)(const SlRow *R, i64 n, float *logits);
};
const Calls *calls();           // of `isa_level()`; null where it has none

static inline i64 groups_of(const SlLinear *d) { return (d->k + d->group - 1)/d->group; }
static const i64 GROUP = 32;     // tokens whose keys share ranges
static inline i64 packed_bytes(i64 n, i64 bits) { return (n*bits + 7)/8; }
static inline i64 unit_bytes(i64 hd, i64 bits) { return bits ? hd*(GROUP*bits/8 + 4) : 4*GROUP*hd; }   // keys of a page's head
static inline i64 row_bytes(i64 hd, i64 bits) { return bits ? packed_bytes(hd, bits) + 4 : 4*hd; }
static inline i64 page_end(i64 t, i64 end) {   // the end of the page that token t is in, or `end` before that
    const i64 next = t - t % GROUP + GROUP;
    return next < end ? next : end;
}

// ---- threads and memory ----
static inline int max_threads() {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}
static inline int thread_id() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

struct Arena {                  // scratch memory of the calling thread; grows, and goes with the thread
    char *p = nullptr; size_t size = 0;
    char *get(size_t n) {
        if (n <= size) return p;
        free(p);
        p = nullptr; size = 0;
        void *q;
        if (posix_memalign(&q, 64, n + n/4)) return nullptr;
        p = (char*)q; size = n + n/4;
        return p;
    }
    ~Arena() { free(p); }
};
static inline size_t round64(size_t n) { return (n + 63) & ~(size_t)63; }
static inline size_t input_bytes(i64 kp) { return round64(4*kp); }   // three digits, and the sums of its groups
static const i64 MOST = (i64)1 << 31;
static inline bool within(i64 v, i64 lo, i64 hi) { return v >= lo && v <= hi; }
#endif
