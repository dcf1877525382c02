// Products with AMX: tiles of 16 x 64 bytes. The same numbers as train_rows.h gives; see train.cpp.
//
// SL_EMULATE_TILES: tiles in plain C++, to test this file where there are none.
#include "train.h"

#ifdef SL_TRAIN_HERE
#define T512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,bmi2,fma")))

// ---------------------------------------------------------------- small vector helpers
INL T512 __mmask16 lanes(int64_t left) {
    return left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

INL T512 __m512 load16(const void* x, int type, int64_t i, __mmask16 k) {
    if (type == F32) return _mm512_maskz_loadu_ps(k, (const float*)x + i);
    const __m256i half = _mm256_maskz_loadu_epi16(k, (const uint16_t*)x + i);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INL T512 void store16(void* y, int type, int64_t i, __mmask16 k, __m512 v) {
    if (type == F32) return _mm512_mask_storeu_ps((float*)y + i, k, v);
    __m512i b = _mm512_castps_si512(v);   // round half to even; NaN stays NaN
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    b = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd)), 16);
    b = _mm512_mask_mov_epi32(b, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16((uint16_t*)y + i, k, _mm512_cvtepi32_epi16(b));
}

// ---------------------------------------------------------------- tiles
#ifdef SL_EMULATE_TILES
struct Tiles {};
static thread_local int8_t tmm[8][16][64];
static void tile_copy(int t, void* p, int64_t stride, bool load) {
    for (int r = 0; r < 16; r++)
        if (load) memcpy(tmm[t][r], (char*)p + r * stride, 64); else memcpy((char*)p + r * stride, tmm[t][r], 64);
}
static void tile_dot(int c, int a, int b, bool sign) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            int32_t s;
            memcpy(&s, &tmm[c][i][4 * j], 4);
            for (int k = 0; k < 64; k++)
                s += (sign ? tmm[a][i][k] : (int)(uint8_t)tmm[a][i][k]) * tmm[b][k / 4][j * 4 + k % 4];
            memcpy(&tmm[c][i][4 * j], &s, 4);
        }
}
#define TLOADS(t, p, stride) tile_copy(t, (void*)(p), stride, true)
#define TSTORE(t, p, stride) tile_copy(t, p, stride, false)
#define TZERO(t) memset(tmm[t], 0, 1024)
#define TDOT(op, c, a, b) tile_dot(c, a, b, op[4] == 's')
#define TLOAD(t, p) TLOADS(t, p, 64)
#else
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
#endif

// ---------------------------------------------------------------- one block of 32 x 32 results
struct Block {   // a finished block of integer sums
    int64_t m0 = 0, c0 = 0; int rows = 0;
    const float *inv = nullptr, *base = nullptr; const int32_t* sums = nullptr;
};

struct Finish {   // how integer sums become results; each thread has a copy, so that stores cannot alias it
    int64_t columns; const int32_t *zero, *code_sums; const float *s, *bias; __m512i shift;
    const uint8_t* mask; int64_t ldmask; char* y; int type; int64_t stride; bool add;
};

template <int D>
INL T512 __m512 exact_sum(const int32_t* t) {   // of planes of bytes, rounded once
    __m512d low = _mm512_setzero_pd(), high = low;
    for (int e = D - 1; e >= 0; e--) {
        const __m512d b8 = _mm512_set1_pd(256.);
        low = _mm512_fmadd_pd(low, b8, _mm512_cvtepi32_pd(_mm256_load_si256((const __m256i*)(t + e * 1024))));
        high = _mm512_fmadd_pd(high, b8, _mm512_cvtepi32_pd(_mm256_load_si256((const __m256i*)(t + e * 1024 + 8))));
    }
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}

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
                v = _mm512_add_ps(exact_sum<D>(t), _mm512_set1_ps(b.base[i]));
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
    const Fixed f = fixed_scale(_mm512_reduce_max_epu32(_mm512_max_epu32(big, big2)), D);
    const bool bad = f.bad;
    *inv = f.inv;
    const __m512 sc = _mm512_set1_ps(f.scale);
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
    const __m512i four = _mm512_broadcast_i32x4(order), live = _mm512_set1_epi8((char)w.live);
    const int64_t steps = w.np / 64;
    for (int64_t kb = k0 / 64; kb < k1 / 64; kb++)
        for (int64_t ob = 0; ob < w.np / 16; ob++) {
            const char* t = w.tile(ob, kb);
            char* to = out + ((kb - k0 / 64) * 4 * steps + ob / 4) * 1024 + ob % 4 * 256;
            for (int j = 0; j < 4; j++, t += 256, to += steps * 1024) {
                __m512i r0 = _mm512_and_si512(_mm512_loadu_si512(t), live);
                __m512i r1 = _mm512_and_si512(_mm512_loadu_si512(t + 64), live);
                __m512i r2 = _mm512_and_si512(_mm512_loadu_si512(t + 128), live);
                __m512i r3 = _mm512_and_si512(_mm512_loadu_si512(t + 192), live);
                __m512i a = _mm512_shuffle_i32x4(r0, r1, 0x44), b = _mm512_shuffle_i32x4(r2, r3, 0x44);
                __m512i c = _mm512_shuffle_i32x4(r0, r1, 0xee), d = _mm512_shuffle_i32x4(r2, r3, 0xee);
                _mm512_store_si512(to, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(a, b, 0x88), four));
                _mm512_store_si512(to + 64, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(a, b, 0xdd), four));
                _mm512_store_si512(to + 128, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(c, d, 0x88), four));
                _mm512_store_si512(to + 192, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(c, d, 0xdd), four));
            }
        }
}

// and forward, where not all bits count
static T512 void copy_live(const Packed& w, int64_t c0, int64_t c1, char* out) {
    const char* from = w.tile(c0 / 16, 0);
    const __m512i live = _mm512_set1_epi8((char)w.live);
    for (int64_t i = 0; i < (c1 - c0) * w.kp; i += 64)
        _mm512_store_si512(out + i, _mm512_and_si512(_mm512_loadu_si512(from + i), live));
}

// ---------------------------------------------------------------- the loops
static thread_local Buffer left, right;

static const int64_t ROWS = 32;           // of a panel
static const int64_t SPAN = 12;           // steps of 64 for which the second operand stays in the first-level cache

// panels p0..p1, columns c0..c1 (multiples of 64)
template <Mode MODE, int D>
static T512 void part(const Product& p, int64_t p0, int64_t p1, int64_t c0, int64_t c1) {
    const int64_t steps = p.rp / 64, size = D * p.rp * ROWS, width = p.width;
    const bool chunks = c1 - c0 > width;
    const int64_t super = chunks ? (int64_t)SUPER : p1 - p0;
    const int64_t kept = chunks ? std::min<int64_t>(SUPER, p1 - p0) : 1;   // panels in `left` at a time
    char* a = left.get(size * kept + p.rp * 4 + kept * ROWS * 12 + 2 * D * 4096);
    int32_t* acc = (int32_t*)a; a += 2 * D * 4096;
    float* tmp = (float*)(a + size * kept);
    float *inv = tmp + p.rp, *base = inv + kept * ROWS;
    int32_t* sums = (int32_t*)(base + kept * ROWS);
    const bool copied = MODE == BACKWARD || p.w.live != 0xff;
    char* second = copied ? right.get(std::min(width, c1 - c0) * p.rp) : nullptr;
    const Finish f{p.c, p.row_zero, p.w.sums, p.s, p.bias, _mm512_set1_epi32(p.shift), p.mask, p.ldmask,
                   (char*)p.y, p.ytype, p.ldy * (p.ytype == F32 ? 4 : 2), p.add != 0};
    const int rate = (int)((ROWS + steps * D - 1) / (steps * D));
    const int64_t pieces = D > 1 ? (steps + SPAN - 1) / SPAN : 1, span = (steps + pieces - 1) / pieces;
    Tiles unit;
    for (int64_t s0 = p0; s0 < p1; s0 += super)
        for (int64_t w0 = c0; w0 < c1; w0 += width) {
            const int64_t w1 = std::min(c1, w0 + width), s1 = std::min(p1, s0 + super);
            if (MODE == BACKWARD) turn(p.w, w0, w1, second);
            else if (copied) copy_live(p.w, w0, w1, second);
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
                    const char* b0 = copied ? second + (c - w0) / 16 * steps * 1024 : p.w.tile(c / 16, 0);
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

const part_fn tile_parts[3][5] = {
    {nullptr, part<FORWARD_INT, 1>, nullptr, nullptr, nullptr},
    {nullptr, nullptr, part<FORWARD_FLOAT, 2>, part<FORWARD_FLOAT, 3>, part<FORWARD_FLOAT, 4>},
    {nullptr, nullptr, part<BACKWARD, 2>, part<BACKWARD, 3>, part<BACKWARD, 4>}};
#endif
