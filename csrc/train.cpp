// Products with int8 weight codes, forward and backward.
//
// A weight is s[o]*(c[o,i]+d): int8 codes c, one float s per output, one small d per layer. All sums of products are
// exact integers (AMX int8). Float operands (gradients, float activations) become fixed point numbers first: a row is
// divided by its largest magnitude and written with `digits` bytes, and each byte plane is one int8 product. So
// results depend neither on the order of the sum nor on the number of threads.
#include "train.h"

#ifdef SL_TRAIN_HERE
#if defined(__linux__)
#include <sys/mman.h>
#endif

static int thread_count() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// ---------------------------------------------------------------- packed weight codes
// [64 bytes: largest |c|][sum over inputs of the codes, int32, one per padded output][tiles]
// tile (ob, kb), 1024 bytes: outputs 16*ob.., inputs 64*kb..; row r holds inputs 4r..4r+3 of 16 outputs, as tdpb*d
// wants its second operand.
struct Packed {
    int64_t np, kp;
    const int32_t* sums; const char* tiles; int32_t most;
    Packed(const void* p, int64_t n, int64_t k) : np(up(n, 64)), kp(up(k, 64)) {
        most = *(const int32_t*)p;
        sums = (const int32_t*)((const char*)p + 64);
        tiles = (const char*)(sums + np);
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
#define TSTORE(t, p, stride) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"((int64_t)(stride)) : "memory")
#define TDOT(op, c, a, b) __asm__ volatile(op " %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

// ---------------------------------------------------------------- one block of 32 x 32 results
enum Mode { FORWARD_INT, FORWARD_FLOAT, BACKWARD };

struct Product {   // what all threads share
    int64_t m, r, c;              // rows, length of the sums, columns of the result, not padded
    int64_t rp;                   // r padded to 64
    const void* a; int atype; int64_t lda; const float* fold;   // float operand; factors on its columns, or null
    const uint8_t* codes; int64_t ldc; const float* row_scale; const int32_t *row_zero, *row_sum;
    Packed w; const float* s; float d; int shift; const float* bias;
    const uint8_t* mask; int64_t ldmask;
    void* y; int ytype; int64_t ldy; int add;
};

struct Block {   // a finished block of integer sums
    int64_t m0 = 0, c0 = 0; int rows = 0;
    const float *inv = nullptr, *base = nullptr; const int32_t* sums = nullptr;
};

struct Finish {   // how integer sums become results; each thread has a copy, so that stores cannot alias it
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
        const bool plain = MODE == BACKWARD || !f.bias;
        const __m512 bias = plain ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(k, f.bias + col);
        const __m512i code_sums = MODE == FORWARD_INT ? _mm512_loadu_si512(f.code_sums + col)
                                                      : _mm512_setzero_si512();
        char* y = f.y + (b.m0 + i0) * f.stride;
        for (int i = i0; i < i1; i++, y += f.stride) {
            const int32_t* t = acc + i * 32 + 16 * h;
            __m512 v;
            if (MODE == FORWARD_INT) {   // exact: sum (c+d)(q-zero), times 2**shift
                const __m512i off = _mm512_mullo_epi32(_mm512_set1_epi32(f.zero[b.m0 + i]), code_sums);
                const __m512i n = _mm512_sllv_epi32(_mm512_sub_epi32(_mm512_load_si512(t), off), f.shift);
                v = _mm512_cvtepi32_ps(_mm512_add_epi32(n, _mm512_set1_epi32(b.sums[i])));
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
                if (f.mask) {
                    uint16_t bits;
                    memcpy(&bits, f.mask + (b.m0 + i) * f.ldmask + col / 8, 2);
                    v = _mm512_maskz_mov_ps(bits, v);
                }
                if (f.add) v = _mm512_add_ps(v, load16(y, f.type, col, k));
            }
            store16(y, f.type, col, k, v);
        }
    }
}

// four tiles of sums of one byte plane; meanwhile the rows of the block before are finished, so that tile unit and
// vector unit both work
template <Mode MODE, int D, bool SIGNED>
INL T512 void plane(const char* a, const char* b0, const char* b1, int64_t steps, int32_t* out, bool more,
                    const Finish& f, const Block& before, const int32_t* acc, int& row, int rate) {
    if (more) {
        TLOADS(0, out, 128); TLOADS(1, out + 16, 128);
        TLOADS(2, out + 512, 128); TLOADS(3, out + 528, 128);
    } else { TZERO(0); TZERO(1); TZERO(2); TZERO(3); }
    for (int64_t i = 0; i < steps; i++, a += 2048, b0 += 1024, b1 += 1024) {
        TLOAD(4, a); TLOAD(6, b0);
        if (SIGNED) TDOT("tdpbssd", 0, 4, 6); else TDOT("tdpbusd", 0, 4, 6);
        TLOAD(7, b1);
        if (SIGNED) TDOT("tdpbssd", 1, 4, 7); else TDOT("tdpbusd", 1, 4, 7);
        TLOAD(5, a + 1024);
        if (SIGNED) { TDOT("tdpbssd", 2, 5, 6); TDOT("tdpbssd", 3, 5, 7); }
        else { TDOT("tdpbusd", 2, 5, 6); TDOT("tdpbusd", 3, 5, 7); }
        if (row < before.rows) {
            const int end = std::min(row + rate, before.rows);
            finish_rows<MODE, D>(f, before, acc, row, end);
            row = end;
        }
    }
    TSTORE(0, out, 128); TSTORE(1, out + 16, 128);
    TSTORE(2, out + 512, 128); TSTORE(3, out + 528, 128);
}

// ---------------------------------------------------------------- first operand: 32 rows in tile order
// float rows as fixed point numbers: panel[digit][step][row/16][row%16][64]
template <int D>
static T512 void fixed_row(const Product& p, const void* x, float* tmp, char* panel, int64_t place, float* inv,
                           float* base) {
    __m512i big = _mm512_setzero_si512(), big2 = big, abs = _mm512_set1_epi32(0x7fffffff);
    int64_t i = 0;
    for (; i + 32 <= p.r; i += 32) {
        __m512 v = load16(x, p.atype, i, 0xffff), w = load16(x, p.atype, i + 16, 0xffff);
        if (p.fold) {
            v = _mm512_mul_ps(v, _mm512_loadu_ps(p.fold + i));
            w = _mm512_mul_ps(w, _mm512_loadu_ps(p.fold + i + 16));
        }
        _mm512_store_ps(tmp + i, v); _mm512_store_ps(tmp + i + 16, w);
        big = _mm512_max_epu32(big, _mm512_and_si512(_mm512_castps_si512(v), abs));
        big2 = _mm512_max_epu32(big2, _mm512_and_si512(_mm512_castps_si512(w), abs));
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
    else if (D == 4) {
        int e;
        std::frexp(std::max(most, 0x1p-90f), &e);
        scale = std::ldexp(1.f, 30 - e); *inv = std::ldexp(1.f, e - 30);
    } else { most = std::max(most, 0x1p-100f); scale = top / most; *inv = most / top; }
    const __m512 sc = _mm512_set1_ps(scale);
    const __m512i lane = _mm512_set_epi32(0x3f3b3733, 0x2f2b2723, 0x1f1b1713, 0x0f0b0703,
                                          0x3e3a3632, 0x2e2a2622, 0x1e1a1612, 0x0e0a0602,
                                          0x3d393531, 0x2d292521, 0x1d191511, 0x0d090501,
                                          0x3c383430, 0x2c282420, 0x1c181410, 0x0c080400);
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i none = _mm512_setzero_si512();
    __m512i sum[4] = {none, none, none, none};
    const int64_t digit = p.rp * 32;
    char* out = panel + place;
    for (i = 0; i < p.rp; i += 64, out += 2048) {
        __m512i v[4], plane[4];
        for (int j = 0; j < 4; j++) {
            v[j] = bad ? none : _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(tmp + i + 16 * j), sc));
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
            sum[e] = e < D - 1 ? _mm512_dpbusd_epi32(sum[e], plane[e], ones)
                               : _mm512_dpbusd_epi32(sum[e], ones, plane[e]);
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
// the packed codes with outputs and inputs swapped: out[input/16][output/64], rows of 4 outputs x 16 inputs
static T512 void turn(const Packed& w, int64_t k0, int64_t k1, char* out) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i four = _mm512_broadcast_i32x4(order);
    const int64_t steps = w.np / 64;
    for (int64_t kb = k0 / 64; kb < k1 / 64; kb++)
        for (int64_t ob = 0; ob < w.np / 16; ob++) {
            const char* t = w.tile(ob, kb);
            char* to = out + ((kb - k0 / 64) * 4 * steps + ob / 4) * 1024 + ob % 4 * 256;
            for (int j = 0; j < 4; j++, t += 256, to += steps * 1024) {
                __m512i r0 = _mm512_loadu_si512(t), r1 = _mm512_loadu_si512(t + 64);
                __m512i r2 = _mm512_loadu_si512(t + 128), r3 = _mm512_loadu_si512(t + 192);
                __m512i a = _mm512_shuffle_i32x4(r0, r1, 0x44), b = _mm512_shuffle_i32x4(r2, r3, 0x44);
                __m512i c = _mm512_shuffle_i32x4(r0, r1, 0xee), d = _mm512_shuffle_i32x4(r2, r3, 0xee);
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

static const int64_t ROWS = 32;           // of a panel
static const int64_t SUPER = 16;          // panels that pass one after another where the second operand comes in chunks
static const int64_t SPAN = 12;           // steps of 64 for which the second operand stays in the first-level cache
static const int64_t CHUNK = 640 << 10;   // bytes of the second operand that stay in the second-level cache

static int64_t chunk_width(const Product& p) {   // in columns
    return std::max<int64_t>(64, CHUNK / p.rp / 64 * 64);
}

// panels p0..p1, columns c0..c1 (multiples of 64)
template <Mode MODE, int D>
static T512 void part(const Product& p, int64_t p0, int64_t p1, int64_t c0, int64_t c1) {
    const int64_t steps = p.rp / 64, size = D * p.rp * ROWS, width = chunk_width(p);
    const bool chunks = c1 - c0 > width;
    const int64_t super = chunks ? SUPER : p1 - p0;
    const int64_t kept = chunks ? std::min(SUPER, p1 - p0) : 1;   // panels in `left` at a time
    char* a = left.get(size * kept + p.rp * 4 + kept * ROWS * 12 + 2 * D * 4096);
    int32_t* acc = (int32_t*)a; a += 2 * D * 4096;
    float* tmp = (float*)(a + size * kept);
    float *inv = tmp + p.rp, *base = inv + kept * ROWS;
    int32_t* sums = (int32_t*)(base + kept * ROWS);
    char* turned = MODE == BACKWARD ? right.get(std::min(width, c1 - c0) * p.rp) : nullptr;
    const Finish f{p.c, p.row_zero, p.w.sums, p.s, p.bias, _mm512_set1_epi32(p.shift), p.mask, p.ldmask,
                   (char*)p.y, p.ytype, p.ldy * (p.ytype == F32 ? 4 : 2), p.add != 0};
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
                    if (kept == 1) {   // it reads inv
                        finish_rows<MODE, D>(f, before, acc + (now ^ 1) * D * 1024, 0, before.rows);
                        before.rows = 0;
                    }
                    for (int i = 0; i < ROWS; i++) {
                        const int64_t place = i / 16 * 1024 + i % 16 * 64;
                        if (i >= rows) {
                            for (int e = 0; e < D; e++) blank_row(p.rp, panel + e * p.rp * 32 + place);
                            continue;
                        }
                        if (MODE == FORWARD_INT) {
                            code_row(p.codes + (m0 + i) * p.ldc, p.rp, panel + place);
                            pi[i] = std::ldexp(p.row_scale[m0 + i], -p.shift);
                            const int32_t sum = p.row_sum[m0 + i] - (int32_t)p.r * p.row_zero[m0 + i];
                            ps[i] = (int32_t)(std::ldexp(p.d, p.shift)) * sum;
                        } else if (D > 1) {
                            const void* row = row_of(p.a, p.atype, (m0 + i) * p.lda);
                            fixed_row<D < 2 ? 2 : D>(p, row, tmp, panel, place, pi + i, pb + i);
                        }
                    }
                }
                __asm__ volatile("" ::: "memory");
                for (int64_t c = w0; c < w1 && c < p.c; c += 32) {
                    const char* b0 = MODE == BACKWARD ? turned + (c - w0) / 16 * steps * 1024
                                                      : p.w.tile(c / 16, 0);
                    int row = 0;
                    int32_t *out = acc + now * D * 1024, *done = acc + (now ^ 1) * D * 1024;
                    for (int64_t i = 0; i < steps; i += span) {   // the second operand stays in the first-level cache
                        const int64_t n = std::min(span, steps - i);
                        const char *l = panel + i * 2048, *r0 = b0 + i * 1024, *r1 = r0 + steps * 1024;
                        const char* last = l + (D - 1) * p.rp * 32;
                        for (int e = 0; e < D - 1; e++)
                            plane<MODE, D, false>(l + e * p.rp * 32, r0, r1, n, out + e * 1024, i > 0,
                                                  f, before, done, row, rate);
                        plane<MODE, D, MODE != FORWARD_INT>(last, r0, r1, n, out + (D - 1) * 1024, i > 0,
                                                            f, before, done, row, rate);
                    }
                    before.m0 = m0; before.c0 = c; before.rows = rows;
                    before.inv = pi; before.base = pb; before.sums = ps;
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
    // rows among t threads, columns among the others: the cheapest slowest thread, in cycles / r, as measured
    for (int64_t t = 1; t <= threads; t++) {
        int64_t rows = up(panels, t) / t, cols = up(columns, threads / t) / (threads / t);
        int64_t chunks = up(cols * 64, chunk_width(p)) / chunk_width(p);
        int64_t again = chunks > 1 ? up(rows, SUPER) / SUPER : 1;   // times that the second operand comes in
        int64_t cost = rows * cols * 4 * D + (MODE == BACKWARD ? 10 : 3) * cols * again
                       + (MODE == FORWARD_INT ? 3 : 21) * rows + (chunks > 1 ? D * rows * chunks : 0);
        if (cost < best) { best = cost; tr = t; tc = threads / t; }
    }
#pragma omp parallel for schedule(static, 1) num_threads((int)(tr * tc)) if (tr * tc > 1)
    for (int64_t t = 0; t < tr * tc; t++) {
        int64_t i = t / tc, j = t % tc;
        int64_t p0 = panels * i / tr, p1 = panels * (i + 1) / tr;
        int64_t c0 = columns * j / tc * 64, c1 = columns * (j + 1) / tc * 64;
        if (p0 < p1 && c0 < c1) part<MODE, D>(p, p0, p1, c0, c1);
    }
    return OK;
}

template <Mode MODE>
static int run_digits(const Product& p, int digits) {
    if (digits == 2) return run<MODE, 2>(p);
    if (digits == 3) return run<MODE, 3>(p);
    return digits == 4 ? run<MODE, 4>(p) : NO_RANGE;
}

API int sl_forward(const uint8_t* codes, int64_t ldc, const float* row_scale, const int32_t* row_zero,
                   const int32_t* row_sum, int64_t m, int64_t n, int64_t k, const void* packed, const float* s,
                   float d, const float* bias, void* y, int ytype, int64_t ldy) {
    if (!(train_features() & 2)) return NO_CPU;
    Product p{m, k, n, up(k, 64), nullptr, 0, 0, nullptr, codes, ldc, row_scale, row_zero, row_sum,
              Packed(packed, n, k), s, d, 0, bias, nullptr, 0, y, ytype, ldy, 0};
    while (p.shift < 4 && std::ldexp(d, p.shift) != std::floor(std::ldexp(d, p.shift))) p.shift++;
    const double largest = std::ldexp((double)p.w.most, p.shift) + std::fabs(std::ldexp(d, p.shift));
    if (p.shift > 3 || 255. * (double)p.rp * largest >= 2147483647.) return NO_RANGE;
    return run<FORWARD_INT, 1>(p);
}

API int sl_forward_float(const void* x, int xtype, int64_t ldx, int64_t m, int64_t n, int64_t k, const void* packed,
                         const float* s, float d, int digits, const float* bias, void* y, int ytype, int64_t ldy) {
    if (!(train_features() & 4)) return NO_CPU;
    if (k > 65536) return NO_RANGE;
    Product p{m, k, n, up(k, 64), x, xtype, ldx, nullptr, nullptr, 0, nullptr, nullptr, nullptr,
              Packed(packed, n, k), s, d, 0, bias, nullptr, 0, y, ytype, ldy, 0};
    return run_digits<FORWARD_FLOAT>(p, digits);
}

API int sl_backward(const void* gy, int gtype, int64_t ldg, int64_t m, int64_t n, int64_t k, const void* packed,
                    const float* s, float d, int digits, const void* mask, int64_t ldmask, void* gx, int gxtype,
                    int64_t ldgx, int add) {
    if (!(train_features() & 4)) return NO_CPU;
    if (n > 65536) return NO_RANGE;
    Product p{m, n, k, up(n, 64), gy, gtype, ldg, s, nullptr, 0, nullptr, nullptr, nullptr, Packed(packed, n, k),
              s, d, 0, nullptr, (const uint8_t*)mask, ldmask, gx, gxtype, ldgx, add};
    return run_digits<BACKWARD>(p, digits);
}
#endif
