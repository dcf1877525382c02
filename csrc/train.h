// Training kernels: quantize activations, multiply with int8 weight codes, forward and backward. Plain C ABI, no
// torch, no Python.
//
// quantize.cpp and train.cpp are what Python calls. The work is done by one of the levels of isa.h: train_rows.h,
// compiled for each in train_vectors.cpp, or train_tiles.cpp. All give the same numbers, bit for bit.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <algorithm>
#include "isa.h"
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

#if defined(SL_X86) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define SL_TRAIN_HERE 1         // elsewhere the caller has its torch path
#include <immintrin.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#define INL static inline __attribute__((always_inline))

INL const void* row_of(const void* x, int type, int64_t i) {
    return (const char*)x + i * (type == F32 ? 4 : 2);
}

// ---------------------------------------------------------------- activations to codes
struct Range { float lo = INFINITY, hi = -INFINITY; bool bad = false; };
struct Grid { float scale, inv; int zero; };   // one row's step; zero is the zero point of the unsigned code
struct Limits { int qmin, qmax; };             // of the unsigned code
struct Ends { float inv, lo, hi, qmin, qmax; };   // of a static range: 1/step; codes less the zero point; codes

// ---------------------------------------------------------------- packed weight codes
// [64 bytes][sum over inputs of the codes, int32, one per padded output; once, or for each width from 8 down to 2][tiles]
// tile (ob, kb), 1024 bytes: outputs 16*ob.., inputs 64*kb..; row r holds inputs 4r..4r+3 of 16 outputs, as byte
// products want their second operand. The 64 bytes: [0] whether all widths share the codes, [bits] largest |c|. A code
// of fewer bits is that of eight without its lowest ones: c is the unsigned code less 128.
struct Packed {
    int64_t np, kp;
    const int32_t* sums; const char* tiles; int32_t most; uint8_t live;   // bits of a code that count
    Packed(const void* p, int64_t n, int64_t k, int bits) : np(up(n, 64)), kp(up(k, 64)) {
        const int32_t* head = (const int32_t*)p;
        most = head[bits]; live = (uint8_t)(0xff << (8 - bits));
        sums = head + 16 + (8 - bits) * np;
        tiles = (const char*)(head + 16 + (head[0] ? 7 : 1) * np);
    }
    const char* tile(int64_t ob, int64_t kb) const { return tiles + (ob * (kp / 64) + kb) * 1024; }
};

// ---------------------------------------------------------------- products
enum Mode { FORWARD_INT, FORWARD_FLOAT, BACKWARD };

struct Product {   // what all threads share
    int64_t m, r, c;              // rows, length of the sums, columns of the result, not padded
    int64_t rp;                   // r padded to 64
    const void* a; int atype; int64_t lda; const float* fold;   // float operand; factors on its columns, or null
    const uint8_t* codes; int64_t ldc; const float* row_scale; const int32_t *row_zero, *row_sum;
    Packed w; const float* s; float d; int shift; const float* bias;
    const uint8_t* mask; int64_t ldmask;
    void* y; int ytype; int64_t ldy; int add;
    int64_t width;                // columns whose part of the second operand stays in the second-level cache
};

// Float rows as fixed point numbers: the largest magnitude of a row is `top`, or, with four bytes, a power of two.
struct Fixed { float scale, inv; bool bad; };
INL Fixed fixed_scale(uint32_t bits, int digits) {   // bits: of the largest magnitude
    Fixed f;
    float most;
    memcpy(&most, &bits, 4);
    f.bad = bits >= 0x7f800000u;
    if (f.bad) { f.scale = 0; f.inv = NAN; return f; }
    if (digits == 4) {
        int e;
        frexpf(most > 0x1p-90f ? most : 0x1p-90f, &e);
        f.scale = ldexpf(1.f, 30 - e); f.inv = ldexpf(1.f, e - 30);
        return f;
    }
    const float top = digits == 2 ? 32767.f : 8388600.f;   // a little room: the product with it rounds
    most = most > 0x1p-100f ? most : 0x1p-100f;
    f.scale = top / most; f.inv = most / top;
    return f;
}

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

// panels p0..p1 of rows, columns c0..c1 (multiples of 64)
typedef void (*part_fn)(const Product&, int64_t p0, int64_t p1, int64_t c0, int64_t c1);
enum { SUPER = 16 };   // panels that pass one after another where the second operand comes in chunks
struct TrainTable {    // the functions of a level
    Range (*row_range)(const void* x, int type, int64_t k);
    // codes of a row; what was not clipped as bits, or null; its range, or null. Returns the sum of the codes.
    int32_t (*quantize_row)(const void* x, int type, int64_t k, Grid, Limits, uint8_t* codes, uint64_t* kept, Range*);
    void (*range_row)(const void* x, int xtype, void* g, int gtype, int64_t k, const Ends&, double* sums);
    part_fn parts[3][5];        // by mode and digits
    int64_t panel, chunk;       // rows of a panel; bytes of packed codes that stay in the second-level cache
};
const TrainTable* train_table();   // of isa_level(); null where there is none
extern const part_fn tile_parts[3][5];
#endif
