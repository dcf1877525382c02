// Products with planes and with float weights, for few tokens and for many. Included once for each level, after vec.h.
//
// A block is 16 output channels, a unit 16 inputs. Codes of a unit are vectors of 64 bytes, 16 channels by 4 inputs: four
// of whole codes, or where the processor multiplies no whole codes, four of their upper halves and four of their lower.
static thread_local Arena arena;
struct Row { double sx, zx, sum; };   // activation = sx*(code - zx); sum of its codes
struct Own {                    // scratch of one thread
    int8_t *bytes; float *h, *norm, *scores, *q, *k, *spare, *turned;
    mutable const float *of;    // the input that `turned` is made of; null when its numbers have changed
};

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
    F lo = zero(), hi = lo;
    I top = no_ints();
    for (i64 i = 0; i < d->k; i += 16) {
        const F v = load16(x, type, i, head(d->k - i));
        lo = least(v, lo); hi = most(v, hi);
        top = most(top, bits_of(v) & all_ints(0x7fffffff));
    }
    if (largest_of(top) >= 0x7f800000) {   // not finite: neither is the result
        row->sx = NAN; row->zx = 0; g.inv = 0;
        return g;
    }
    float l = smallest_of(lo), h = largest_of(hi), big = h > -l ? h : -l;
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
    const Grid g = grid_of(d, x, type, row);
    const F inv = each(g.inv), zp = each(g.zp), lo = each(g.lo), hi = each(g.hi);
    const I off = all_ints(g.off), half = all_ints(0x808080);
    const bool wide = digits_of(d) == 3;
    I sum = no_ints(), upper = sum;      // in two parts: sums of 24 bits do not fit 32
    for (i64 i = 0; i < d->kp; i += 16) {
        const Lanes m = head(d->k - i);
        const F v = least(most(nearest(load16(x, type, i, m)*inv) + zp, lo), hi);
        const I q = keep(ints(v) - off, m);
        int8_t *o = out + (i >> 6)*chunk + (i & 63);
        if (!wide) {
            store_bytes(o, q);
            sum = sum + q;
            continue;
        }
        const I t = (q + half) ^ half;   // balanced base-256 digits
        store_bytes(o, t);
        store_bytes(o + digit, shift_right<8>(t));
        store_bytes(o + 2*digit, shift_right<16>(t));
        sum = sum + (q & all_ints(4095)); upper = upper + shift_down<12>(q);
    }
    row->sum = (double)sum_of(sum) + 4096.*(double)sum_of(upper);
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
    F s[R];
    for (int j = 0; j < R; j++) s[j] = zero();
    for (i64 i = 0; i < k; i += 16) {
        const Lanes m = head(k - i);
        const F v = load16(x, type, i, m);
        for (int j = 0; j < R; j++) s[j] = fma(load(a + j*step + i, m), v, s[j]);
    }
    for (int j = 0; j < R; j++) h[j] = scaling*sum_of(s[j]);
}
static void adapter_row(const SlLinear *d, const void *x, int type, float *h) {   // h = scaling * A x
    const float c = (float)d->lora_scale;
    i64 j = 0;
    for (; j + 8 <= d->r; j += 8) dots<8>(d->lora_a + j*d->k, d->k, x, type, d->k, c, h + j);
    for (; j + 4 <= d->r; j += 4) dots<4>(d->lora_a + j*d->k, d->k, x, type, d->k, c, h + j);
    for (; j < d->r; j++) dots<1>(d->lora_a + j*d->k, d->k, x, type, d->k, c, h + j);
}

// ---- planes to codes ----
INL uint8_t code_mask(i64 bits) { return (uint8_t)(0xff << (8 - bits)); }
INL int variant(i64 bits) { return bits <= 4 ? 1 : bits <= 6 ? 2 : bits == 8 ? 3 : 4; }   // 4: seven bits, three planes masked
template<int P> constexpr int vectors() { return SL_WHOLE_CODES || P == 1 ? 4 : 8; }

// The codes of a block where they are packed. They come with their top bit at bit 7 and zeros below the live bits.
template<int P> struct Packed {
    const uint8_t *h, *m, *l;
    Bytes mask, lower;
    Packed() = default;
    INL_MEMBER Packed(const SlLinear *d, i64 nb) {
        const i64 units = d->kp >> 4;
        h = d->high + nb*units*128;
        m = P > 1 ? d->middle + nb*units*64 : h; l = P > 2 ? d->low + nb*units*64 : h;
        const int live = code_mask(d->bits);
        mask = all_bytes(SL_WHOLE_CODES ? live : live >> 4); lower = all_bytes(live & 15);
    }
#if SL_WHOLE_CODES
    INL_MEMBER void part(int, i64 u, Bytes *w) const { get(u, w); }
    INL_MEMBER void get(i64 u, Bytes *w) const {
        const Bytes high = all_bytes(0xf0), low = all_bytes(3);
        const Bytes h0 = load_64(h + u*128), h1 = load_64(h + u*128 + 64);
        w[0] = up<4>(h0); w[1] = h0; w[2] = up<4>(h1); w[3] = h1;
        if (P > 1) {
            const Bytes v = load_64(m + u*64);
            w[0] = pick(high, w[0], up<2>(v)); w[1] = pick(high, w[1], v);
            w[2] = pick(high, w[2], down<2>(v)); w[3] = pick(high, w[3], down<4>(v));
        }
        if (P > 2) {
            const Bytes v = load_64(l + u*64);
            w[0] = pick(low, v, w[0]); w[1] = pick(low, down<2>(v), w[1]);
            w[2] = pick(low, down<4>(v), w[2]); w[3] = pick(low, down<6>(v), w[3]);
        }
        if (P != 3) for (int j = 0; j < 4; j++) w[j] = w[j] & mask;
    }
#else
    INL_MEMBER void part(int lower_part, i64 u, Bytes *w) const {   // four vectors of upper or of lower bits
        if (!lower_part) {
            const Bytes upper = P == 1 ? mask : all_bytes(15);
            const Bytes h0 = load_64(h + u*128), h1 = load_64(h + u*128 + 64);
            w[0] = h0 & upper; w[1] = down<4>(h0) & upper; w[2] = h1 & upper; w[3] = down<4>(h1) & upper;
            return;
        }
        const Bytes four = all_bytes(12), three = all_bytes(3);
        const Bytes v = load_64(m + u*64), live = P == 2 ? four & lower : four;
        w[0] = up<2>(v) & live; w[1] = v & live; w[2] = down<2>(v) & live; w[3] = down<4>(v) & live;
        if (P == 2) return;
        const Bytes x = load_64(l + u*64), rest = P == 4 ? three & lower : three;
        w[0] = w[0] | (x & rest); w[1] = w[1] | (down<2>(x) & rest);
        w[2] = w[2] | (down<4>(x) & rest); w[3] = w[3] | (down<6>(x) & rest);
    }
    INL_MEMBER void get(i64 u, Bytes *w) const { for (int p = 0; p < vectors<P>()/4; p++) part(p, u, w + 4*p); }
#endif
};
// The same unpacked: what many tokens share is unpacked once.
template<int N> struct Unpacked {
    const uint8_t *codes;
    INL_MEMBER Bytes at(i64 u, int j) const { return load_64(codes + (u*N + j)*64); }
};
template<int P> static void unpack_block(const SlLinear *d, i64 nb, uint8_t *out) {
    enum { N = vectors<P>() };
    const Packed<P> from(d, nb);
    for (i64 u = 0; u < d->kp >> 4; u++) {
        Bytes w[N];
        from.get(u, w);
        for (int j = 0; j < N; j++) store_64(out + (u*N + j)*64, w[j]);
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
static inline i64 unpacked_bytes(const SlLinear *d) { return d->kp*16*(SL_WHOLE_CODES || d->bits <= 4 ? 1 : 2); }

// A unit of B blocks into their sums.
template<class S, int N, int B, class From> INL void add_unit(S &sums, const From *from, i64 u, const int8_t *x, i64 far) {
    for (int p = 0; p < N/4; p++) {   // not more than is used next: registers are few
        Bytes w[B][4], some[B][S::TAKES];
        for (int b = 0; b < B; b++) from[b].part(p, u, w[b]);
        for (int j = 0; j < 4; j += S::TAKES) {
            for (int b = 0; b < B; b++) for (int i = 0; i < S::TAKES; i++) some[b][i] = w[b][j + i];
            sums.add(4*p + j, some, x + u*16, far);
        }
    }
}
template<class S, int N, int B> INL void add_unit(S &sums, const Unpacked<N> *from, i64 u, const int8_t *x, i64 far) {
    Bytes some[B][S::TAKES];
    for (int j = 0; j < N; j += S::TAKES) {
        for (int b = 0; b < B; b++) for (int i = 0; i < S::TAKES; i++) some[b][i] = from[b].at(u, j + i);
        sums.add(j, some, x + u*16, far);
    }
}

// ---- few tokens: one block times R rows of bytes ----
template<int P, int R> static void gemv_block(const SlLinear *d, i64 nb, const int8_t *xs, int32_t *s) {
    const Packed<P> from(d, nb);
    typedef Sums<P,R,(R <= SL_ROWS/2 ? SL_ASIDE : SL_ASIDE/2),1> S;
    S a;
    a.clear();
    for (i64 u = 0; u < d->kp >> 4; u++) add_unit<S,vectors<P>(),1>(a, &from, u, xs, d->kp);
    for (int r = 0; r < R; r++) store(s + r*16, a.total(0, r));
}
typedef void (*gemv_fn)(const SlLinear*, i64, const int8_t*, int32_t*);
#if SL_ROWS == 8
#define SL_ROW(P) {gemv_block<P,1>, gemv_block<P,2>, gemv_block<P,3>, gemv_block<P,4>, \
                   gemv_block<P,5>, gemv_block<P,6>, gemv_block<P,7>, gemv_block<P,8>}
#else
#define SL_ROW(P) {gemv_block<P,1>, gemv_block<P,2>, gemv_block<P,3>, gemv_block<P,4>}
#endif
static const gemv_fn gemv_table[4][SL_ROWS] = {SL_ROW(1), SL_ROW(2), SL_ROW(3), SL_ROW(4)};
#undef SL_ROW

// ---- many tokens: SL_MANY rows of bytes times SL_BLOCKS blocks of unpacked codes, `apart` bytes apart ----
template<int N, int R, int B> static void gemm_block(const uint8_t *codes, i64 apart, i64 kp, const int8_t *xs, int32_t *s) {
    typedef Sums<(N == 4 ? 1 : 2),R,1,B> S;
    Unpacked<N> from[B];
    for (int b = 0; b < B; b++) from[b].codes = codes + b*apart;
    S a;
    a.clear();
    for (i64 u = 0; u < kp >> 4; u++) add_unit<S,N,B>(a, from, u, xs, kp);
    for (int b = 0; b < B; b++) for (int r = 0; r < R; r++) store(s + (b*R + r)*16, a.total(b, r));
}

// ---- integer sums to numbers ----
struct Channels { D scale, sums, bias; Lanes m; };   // constants of 16 channels
static inline Channels channels(const SlLinear *d, i64 nb) {
    const i64 n0 = nb*16;
    const int shift = 8 - (int)d->bits;
    const Lanes m = head(d->n - n0);
    const I sums = d->act_mode ? load(d->sums + n0, m) : no_ints();
    return {doubles(load((const float*)d->scale + n0, m))*each(1./(1 << shift)),   // codes have their top bit at bit 7
            doubles(shift_left(sums, shift)), doubles(d->bias ? load(d->bias + n0, m) : zero()), m};
}
static inline double flat_of(const SlLinear *d, const Row *row) {
    return d->zero*(double)(1 << (8 - d->bits))*(d->k*row->zx - row->sum);
}
// 16 channels of one token; digit g of the sums stands at s + g*step.
template<int G> INL F finish16(const Channels *c, const int32_t *s, i64 step, const Row *row, double flat) {
    D t = doubles(load(s));
    if (G == 3) {
        t = fma(doubles(load(s + step)), each(256.), t);
        t = fma(doubles(load(s + 2*step)), each(65536.), t);
    }
    t = fnma(each(row->zx), c->sums, t) + each(flat);
    return floats(fma(c->scale*each(row->sx), t, c->bias));
}
// The same for T tokens (sums `far` apart, results `stride` bytes apart) with their adapters: y = ... + B h.
template<int G, int T> INL void finish(const SlLinear *d, const Channels *c, const int32_t *s, i64 far, i64 step, const Row *row,
            const float *h, i64 nb, char *y, i64 stride, int type) {
    F v[T];
    for (int t = 0; t < T; t++) v[t] = finish16<G>(c, s + t*far, step, row + t, flat_of(d, row + t));
    for (i64 j = 0; j < d->r; j++) {
        const F b = load(d->lora_bt + j*d->n + nb*16, c->m);
        for (int t = 0; t < T; t++) v[t] = fma(each(h[t*d->r + j]), b, v[t]);
    }
    for (int t = 0; t < T; t++) store16(y + t*stride, type, nb*16, c->m, v[t]);
}
template<int G> static
void finish_some(const SlLinear *d, const Channels *c, const int32_t *s, i64 far, i64 step, const Row *row,
                 const float *h, i64 nb, char *y, i64 stride, int type, i64 tokens) {
    i64 t = 0;
    for (; t + SL_FINISH <= tokens; t += SL_FINISH)
        finish<G,SL_FINISH>(d, c, s + t*far, far, step, row + t, h + t*d->r, nb, y + t*stride, stride, type);
    for (; t < tokens; t++)
        finish<G,1>(d, c, s + t*far, far, step, row + t, h + t*d->r, nb, y + t*stride, stride, type);
}
typedef void (*finish_fn)(const SlLinear*, const Channels*, const int32_t*, i64, i64, const Row*,
                          const float*, i64, char*, i64, int, i64);
static inline finish_fn finish_of(int digits) { return digits == 3 ? finish_some<3> : finish_some<1>; }


// Blocks b0..b1 of all tokens through the vector kernels; rows of bytes lie kp apart, the digits of a token
// together.
static void gemv_range(const SlLinear *d, const int8_t *xs, const Row *rows, const float *h, i64 m, i64 b0, i64 b1,
                       char *y, i64 stride, int type) {
    const int digits = digits_of(d), group = SL_ROWS/digits;
    const gemv_fn *table = gemv_table[variant(d->bits) - 1];
    alignas(64) int32_t s[SL_ROWS*16];
    const i64 w = (i64)width(type);
    for (i64 nb = b0; nb < b1; nb++) {
        const Channels c = channels(d, nb);
        for (i64 t0 = 0; t0 < m; t0 += group) {
            const i64 g = m - t0 < group ? m - t0 : group;
            table[g*digits - 1](d, nb, xs + t0*digits*d->kp, s);
            char *to = y + t0*stride*w;
            finish_of(digits)(d, &c, s, digits*16, 16, rows + t0, h + t0*d->r, nb, to, stride*w, type, g);
        }
    }
}

#include "groups.h"

// Tokens that go through a weight at one precision, and where what is made of them lies.
struct Piece { const SlLinear *d; i64 first, count; };
struct Place { int8_t *xs; Row *rows; float *h; int32_t *sums; };
static size_t place_piece(const Piece *p, char *mem, Place *at) {   // the bytes that it takes
    const SlLinear *d = p->d;
    const i64 digits = digits_of(d), far = d->group ? (digits + 1)*groups_of(d) : 0;   // what a token's groups add up to
    const size_t rows_at = round64((size_t)p->count*digits*d->kp), h_at = rows_at + round64(p->count*sizeof(Row));
    const size_t sums_at = h_at + round64((size_t)p->count*d->r*4);
    if (at) *at = {(int8_t*)mem, (Row*)(mem + rows_at), (float*)(mem + h_at), (int32_t*)(mem + sums_at)};
    return sums_at + round64((size_t)p->count*far*4);
}
// Few tokens, of n pieces: a block of the weight is read once for all of them.
static int linear_few(const Piece *P, i64 n, const char *x, i64 xstride, int type, char *y, i64 ystride) {
    const SlLinear *d0 = P->d;
    const i64 blocks = (d0->n + 15) >> 4, w = (i64)width(type);
    const size_t room = round64(turned_room(d0->kp)), lists = round64(n*sizeof(Place));
    size_t need = lists;
    i64 tokens = 0, work = 0;
    for (i64 i = 0; i < n; i++) {
        need += place_piece(P + i, nullptr, nullptr);
        tokens += P[i].count; work += P[i].count*d0->kp*(digits_of(P[i].d) + P[i].d->r);
    }
    int threads = max_threads();
    if (tokens*blocks*d0->kp < 8192) threads = 1;
    if (threads > blocks) threads = (int)blocks;
    char *mem = arena.get(need + room*threads + 64);
    if (!mem) return NO_MEMORY;
    Place *at = (Place*)mem;
    char *p = mem + lists;
    for (i64 i = 0; i < n; i++) p += place_piece(P + i, p, at + i);
    auto prepare = [&](i64 i, i64 t, int me) {
        const SlLinear *d = P[i].d;
        const i64 digits = digits_of(d);
        const char *in = x + (P[i].first + t)*xstride*w;
        int8_t *xs = at[i].xs + t*digits*d->kp;
        quantize_row(d, turned(d, in, type, (float*)(p + room*me)), type, xs, 64, d->kp, at[i].rows + t);
        if (d->group) group_sums(d, xs, (int)digits, at[i].sums + t*(digits + 1)*groups_of(d));
        adapter_row(d, in, type, at[i].h + t*d->r);
    };
    auto multiply = [&](i64 b0, i64 b1) {
        const i64 step = n == 1 ? b1 - b0 : SL_BLOCKS;
        for (i64 b = b0; b < b1; b += step) for (i64 i = 0; i < n; i++) {
            const SlLinear *d = P[i].d;
            const i64 end = b + step < b1 ? b + step : b1;
            char *to = y + P[i].first*ystride*w;
            if (d->group) groups_range(d, at[i].xs, at[i].sums, at[i].rows, at[i].h, P[i].count, b, end, to, ystride, type);
            else gemv_range(d, at[i].xs, at[i].rows, at[i].h, P[i].count, b, end, to, ystride, type);
        }
    };
    const bool shared = work < 65536;   // few rows: one thread prepares them, else all do
    if (shared || threads == 1) for (i64 i = 0; i < n; i++) for (i64 t = 0; t < P[i].count; t++) prepare(i, t, 0);
    if (threads == 1) { multiply(0, blocks); return FINE; }
    #pragma omp parallel num_threads(threads)
    {
        const int me = thread_id();
        if (!shared) {
            for (i64 i = 0; i < n; i++) {
                #pragma omp for schedule(static) nowait
                for (i64 t = 0; t < P[i].count; t++) prepare(i, t, me);
            }
            #pragma omp barrier
        }
#ifdef _OPENMP
        const int all = omp_get_num_threads();
#else
        const int all = 1;
#endif
        multiply(blocks*me/all, blocks*(me + 1)/all);
    }
    return FINE;
}

// Blocks nb.. of tokens t0..t1, `some` at a time; `codes` holds the blocks, unpacked.
static void gemm_range(const SlLinear *d, const uint8_t *codes, i64 nb, const int8_t *xs, const int32_t *sums, const Row *rows,
                       const float *h, i64 m, i64 t0, i64 t1, int some, char *y, i64 stride, int type) {
    const int digits = digits_of(d);
    const i64 apart = unpacked_bytes(d), w = (i64)width(type), far = d->group ? (digits + 1)*groups_of(d) : 0;
    const i64 blocks = ((d->n + 15) >> 4) - nb;
    const bool four = apart == d->kp*16;
    alignas(64) int32_t s[SL_BLOCKS*SL_MANY*16];
    float *f = (float*)s;
    for (i64 t = t0; t < t1; t += some) {
        const int8_t *x = xs + t*digits*d->kp;
        const i64 tokens = m - t < some ? m - t : some;
        if (d->group) {
            const int32_t *own = sums + t*far;
            if (blocks < SL_BLOCKS) groups_any<1>(d, four, codes, nb, x, own, f);
            else groups_any<SL_BLOCKS>(d, four, codes, nb, x, own, f);
        } else (four ? gemm_block<4,SL_MANY,SL_BLOCKS> : gemm_block<8,SL_MANY,SL_BLOCKS>)(codes, apart, d->kp, x, s);
        for (i64 b = 0; b < SL_BLOCKS && b < blocks; b++) {
            char *to = y + t*stride*w;
            if (d->group) for (i64 i = 0; i < tokens; i++)
                groups_put(d, nb + b, f + (b*some + i)*16, rows + t + i, h + (t + i)*d->r, to + i*stride*w, type);
            else {
                const Channels c = channels(d, nb + b);
                finish_of(digits)(d, &c, s + b*SL_MANY*16, digits*16, 16, rows + t, h + t*d->r, nb + b, to, stride*w, type, tokens);
            }
        }
    }
}
static int some_of(const SlLinear *d) {   // tokens at a time
    if (d->group) return digits_of(d) == 3 ? SL_MANY/6 : SL_MANY/2;
    return SL_MANY/digits_of(d);
}
static int linear_many(const SlLinear *d, const char *x, i64 m, i64 xstride, int type, char *y, i64 ystride) {
    const int digits = digits_of(d), some = some_of(d);
    const i64 padded = (m + some - 1)/some*some, blocks = (d->n + 15) >> 4, sets = (blocks + SL_BLOCKS - 1)/SL_BLOCKS;
    const i64 far = d->group ? (digits + 1)*groups_of(d) : 0, w = (i64)width(type), row = digits*d->kp;
    const int threads = max_threads();
    const size_t room = round64(d->order ? turned_room(d->kp) : 0), own = round64(SL_BLOCKS*unpacked_bytes(d)) + room;
    const size_t rows_at = round64((size_t)padded*row), h_at = rows_at + round64(padded*sizeof(Row));
    const size_t sums_at = h_at + round64((size_t)padded*d->r*4), own_at = sums_at + round64((size_t)padded*far*4);
    char *p = arena.get(own_at + own*threads + 64);
    if (!p) return NO_MEMORY;
    int8_t *xs = (int8_t*)p; Row *rows = (Row*)(p + rows_at); float *h = (float*)(p + h_at);
    int32_t *sums = (int32_t*)(p + sums_at);
    i64 step = (1 << 19)/row/some*some;    // tokens whose bytes stay in the second-level cache
    if (step < some) step = some;
    #pragma omp parallel num_threads(threads)
    {
        uint8_t *codes = (uint8_t*)p + own_at + own*thread_id();
        float *spare = (float*)(codes + own - room);
        #pragma omp for schedule(static)
        for (i64 t = 0; t < padded; t++) {
            if (t < m) {
                quantize_row(d, turned(d, x + t*xstride*w, type, spare), type, xs + t*row, 64, d->kp, rows + t);
                adapter_row(d, x + t*xstride*w, type, h + t*d->r);
            } else memset(xs + t*row, 0, (size_t)row);
            if (d->group) group_sums(d, xs + t*row, digits, sums + t*far);
        }
        for (i64 t = 0; t < padded; t += step) {
            const i64 end = t + step < padded ? t + step : padded;
            #pragma omp for schedule(static) nowait
            for (i64 q = 0; q < sets; q++) {
                for (i64 b = q*SL_BLOCKS; b < (q + 1)*SL_BLOCKS && b < blocks; b++)
                    unpack_any(d, b, codes + (b - q*SL_BLOCKS)*unpacked_bytes(d));
                gemm_range(d, codes, q*SL_BLOCKS, xs, sums, rows, h, m, t, end, some, y, ystride, type);
            }
        }
    }
    return FINE;
}

// 16 channels of a float weight, read in the type and the order in which it lies.
static F dense_block(const SlLinear *d, const float *x, i64 nb) {
    const int type = (int)d->dense_type;
    const i64 n0 = nb*16, left = d->n - n0 < 16 ? d->n - n0 : 16;
    const Lanes m = head(left);
    const F v = d->bias ? load(d->bias + n0, m) : zero();
    if (!d->dense_columns) {
        float s[16] = {0};
        const char *row = (const char*)d->dense + n0*d->k*(i64)width(type);
        for (i64 i = 0; i < left; i++) s[i] = dot(x, row + i*d->k*(i64)width(type), type, d->k);
        return v + load(s);
    }
    F a[4];
    for (int j = 0; j < 4; j++) a[j] = zero();
    for (i64 i = 0; i < d->k; i++) a[i & 3] = fma(each(x[i]), load16(d->dense, type, i*d->n + n0, m), a[i & 3]);
    return v + ((a[0] + a[1]) + (a[2] + a[3]));
}
static void put_block(const SlLinear *d, F v, const float *h, i64 nb, float *y, bool add) {
    const Lanes m = head(d->n - nb*16);
    for (i64 j = 0; j < d->r; j++)   // the adapter
        v = fma(each(h[j]), load(d->lora_bt + j*d->n + nb*16, m), v);
    if (add) v = v + load(y + nb*16, m);
    store(y + nb*16, m, v);
}
// This thread's share of y = d(x), or y += d(x). Every thread quantizes the whole input for itself, which is cheaper
// than waiting.
static void share(const SlLinear *d, const float *x, float *y, bool add, const Own *o, int me, int all) {
    const i64 blocks = (d->n + 15) >> 4, b0 = blocks*me/all, b1 = blocks*(me + 1)/all;
    if (d->r) adapter_row(d, x, 0, o->h);
    if (d->dense) {
        for (i64 nb = b0; nb < b1; nb++) put_block(d, dense_block(d, x, nb), o->h, nb, y, add);
        return;
    }
    Row row;
    const int digits = digits_of(d);
    if (d->order && o->of != x) { turned(d, x, 0, o->turned); o->of = x; }
    quantize_row(d, d->order ? o->turned : x, 0, o->bytes, 64, d->kp, &row);
    if (d->group) {
        int32_t *sums = (int32_t*)(o->bytes + 3*d->kp);
        alignas(64) float v[16];
        const groups_fn f = (digits == 3 ? groups_table(d)->wide : groups_table(d)->one)[0][0];
        group_sums(d, o->bytes, digits, sums);
        for (i64 nb = b0; nb < b1; nb++) {
            f(d, nb, o->bytes, sums, v);
            put_block(d, groups_finish(d, nb, v, &row), o->h, nb, y, add);
        }
        return;
    }
    const gemv_fn f = gemv_table[variant(d->bits) - 1][digits - 1];
    alignas(64) int32_t s[3*16];
    const double flat = flat_of(d, &row);
    for (i64 nb = b0; nb < b1; nb++) {
        const Channels c = channels(d, nb);
        f(d, nb, o->bytes, s);
        const F v = digits == 3 ? finish16<3>(&c, s, 16, &row, flat) : finish16<1>(&c, s, 16, &row, flat);
        put_block(d, v, o->h, nb, y, add);
    }
}


#ifdef SL_TILES
static int linear_tiles(const SlLinear *d, const char *x, i64 m, i64 xstride, int type, char *y, i64 ystride);
#endif
// The fastest way for so many tokens.
static int linear_any(const SlLinear *d, const void *x, i64 m, i64 xstride, int type, void *y, i64 ystride) {
    const i64 rows = m*digits_of(d);
#ifdef SL_TILES
    if (isa_level() >= AMX && !d->group && rows > 6) return linear_tiles(d, (const char*)x, m, xstride, type, (char*)y, ystride);
#endif
    if (SL_WHOLE_CODES && rows >= 2*SL_MANY) return linear_many(d, (const char*)x, m, xstride, type, (char*)y, ystride);
    const Piece all = {d, 0, m};
    return linear_few(&all, 1, (const char*)x, xstride, type, (char*)y, ystride);
}
static int tokens_linear(const SlLinear *d, const float *x, i64 m, float *y, i64 stride) {
    return linear_any(d, x, m, d->k, 0, y, stride);
}
