// Products with planes and with float weights, for few tokens and for many. Included once for each level, after vec.h.
//
// A block is 16 output channels, a unit 16 inputs. Codes of a unit are vectors of 64 bytes, 16 channels by 4 inputs: four
// of whole codes, or where the processor multiplies no whole codes, four of their upper halves and four of their lower.
static thread_local Arena arena;
struct Row { double sx, zx, flat; };  // activation = sx*(code - zx); what the weight's zero point adds to every channel
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
    const double all = (double)sum_of(sum) + 4096.*(double)sum_of(upper);
    row->flat = d->zero*(double)(1 << (8 - d->bits))*(d->k*row->zx - all);
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
// The same at four bits, then widened in place to six and to eight, for rows of several precisions. Where a processor
// takes halves of codes, `four` gives the upper ones, and the others the lower ones of a code that begins as zeros.
struct Nested {
    const uint8_t *h, *m, *l;
    INL_MEMBER Nested(const SlLinear *d, i64 nb) {
        const i64 units = d->kp >> 4;
        h = d->high + nb*units*128; m = d->middle + nb*units*64; l = d->bits > 6 ? d->low + nb*units*64 : m;
    }
    INL_MEMBER void four(i64 u, Bytes *w) const {
        const Bytes h0 = load_64(h + u*128), h1 = load_64(h + u*128 + 64), live = all_bytes(SL_WHOLE_CODES ? 0xf0 : 15);
#if SL_WHOLE_CODES
        w[0] = up<4>(h0) & live; w[1] = h0 & live; w[2] = up<4>(h1) & live; w[3] = h1 & live;
#else
        w[0] = h0 & live; w[1] = down<4>(h0) & live; w[2] = h1 & live; w[3] = down<4>(h1) & live;
#endif
    }
    INL_MEMBER void six(i64 u, Bytes *w) const {
        const Bytes v = load_64(m + u*64), live = all_bytes(12);
        w[0] = pick(live, up<2>(v), w[0]); w[1] = pick(live, v, w[1]);
        w[2] = pick(live, down<2>(v), w[2]); w[3] = pick(live, down<4>(v), w[3]);
    }
    INL_MEMBER void eight(i64 u, Bytes *w) const {
        const Bytes v = load_64(l + u*64), live = all_bytes(3);
        w[0] = pick(live, v, w[0]); w[1] = pick(live, down<2>(v), w[1]);
        w[2] = pick(live, down<4>(v), w[2]); w[3] = pick(live, down<6>(v), w[3]);
    }
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

// One block times A rows at four bits, B at six and C at eight: what is read and unpacked for one serves the next. A code
// of more bits is one of fewer with bits below, so all are made on the way to eight.
template<int P, int R> using SumsOf = Sums<P,(R ? R : 1),SL_ASIDE/2,1>;
template<class S> INL void add_four(S &sums, int first, const Bytes *w, const int8_t *x, i64 far) {
    for (int j = 0; j < 4; j += S::TAKES) {
        Bytes some[1][S::TAKES];
        for (int i = 0; i < S::TAKES; i++) some[0][i] = w[j + i];
        sums.add(first + j, some, x, far);
    }
}
template<int A, int B, int C> static void nested_block(const SlLinear *d, i64 nb, const int8_t *xs, int32_t *s) {
    const Nested from(d, nb);
    const i64 kp = d->kp;
    const int second = SL_WHOLE_CODES ? 0 : 4;   // where the lower halves of codes go
    SumsOf<1,A> a; SumsOf<2,B> b; SumsOf<3,C> c;
    a.clear(); b.clear(); c.clear();
    for (i64 u = 0; u < kp >> 4; u++, xs += 16) {
        Bytes w[4];
        from.four(u, w);
        if (A) add_four(a, 0, w, xs, kp);
        if (second) {
            if (B) add_four(b, 0, w, xs + A*kp, kp);
            if (C) add_four(c, 0, w, xs + (A + B)*kp, kp);
            for (int j = 0; j < 4; j++) w[j] = all_bytes(0);
        }
        from.six(u, w);
        if (B) add_four(b, second, w, xs + A*kp, kp);
        if (!C) continue;
        from.eight(u, w);
        add_four(c, second, w, xs + (A + B)*kp, kp);
    }
    for (int r = 0; r < A; r++) store(s + r*16, a.total(0, r));
    for (int r = 0; r < B; r++) store(s + (A + r)*16, b.total(0, r));
    for (int r = 0; r < C; r++) store(s + (A + B + r)*16, c.total(0, r));
}
template<int A, int B, int C> constexpr gemv_fn nested_fn() {   // of at least two precisions
    if constexpr (A + B + C > SL_ROWS || !A + !B + !C > 1) return nullptr;
    else return nested_block<A,B,C>;
}
enum { SL_COUNTS = SL_ROWS + 1 };
struct NestedTable { gemv_fn of[SL_COUNTS*SL_COUNTS*SL_COUNTS]; };
template<size_t... I> static constexpr NestedTable nested_fns(std::index_sequence<I...>) {
    return {{nested_fn<I/(SL_COUNTS*SL_COUNTS), I/SL_COUNTS % SL_COUNTS, I % SL_COUNTS>()...}};
}
static const NestedTable nested_table = nested_fns(std::make_index_sequence<SL_COUNTS*SL_COUNTS*SL_COUNTS>());

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
// 16 channels of one token; digit g of the sums stands at s + g*step.
template<int G> INL F finish16(const Channels &c, const int32_t *s, i64 step, const Row *row) {
    D t = doubles(load(s));
    if (G == 3) {
        t = fma(doubles(load(s + step)), each(256.), t);
        t = fma(doubles(load(s + 2*step)), each(65536.), t);
    }
    t = fnma(each(row->zx), c.sums, t) + each(row->flat);
    return floats(fma(c.scale*each(row->sx), t, c.bias));
}
struct Done {                   // tokens whose sums become numbers
    const SlLinear *d; Row *rows;
    float *h;                   // (tokens,r) A x of their adapters
    char *y; i64 stride; int type;   // where the numbers go, tokens `stride` bytes apart
};
// Tokens t..t+T-1, their sums `far` apart, with their adapters: y = ... + B h.
template<int G, int T> INL void finish(const Done &f, const Channels &c, i64 nb, const int32_t *s, i64 far, i64 step, i64 t) {
    F v[T];
    for (int i = 0; i < T; i++) v[i] = finish16<G>(c, s + i*far, step, f.rows + t + i);
    const i64 n = f.d->n, r = f.d->r;
    const float *bt = f.d->lora_bt + nb*16, *h = f.h + t*r;
    for (i64 j = 0; j < r; j++, bt += n) {
        const F b = load(bt, c.m);
        for (int i = 0; i < T; i++) v[i] = fma(each(h[i*r + j]), b, v[i]);
    }
    for (int i = 0; i < T; i++) store16(f.y + (t + i)*f.stride, f.type, nb*16, c.m, v[i]);
}
template<int G, int T> INL void finish_by(const Done &f, const Channels &c, i64 nb, const int32_t *s, i64 far, i64 step, i64 t, i64 end) {
    for (; t + T <= end; t += T, s += T*far) finish<G,T>(f, c, nb, s, far, step, t);
    if constexpr (T > 1) finish_by<G,T/2>(f, c, nb, s, far, step, t, end);
}
// Block nb of tokens t..end; the sums of token t stand at s.
template<int G> static void finish_some(const Done &f, i64 nb, const int32_t *s, i64 far, i64 step, i64 t, i64 end) {
    finish_by<G,SL_FINISH>(f, channels(f.d, nb), nb, s, far, step, t, end);
}
typedef void (*finish_fn)(const Done&, i64, const int32_t*, i64, i64, i64, i64);
static inline finish_fn finish_of(int digits) { return digits == 3 ? finish_some<3> : finish_some<1>; }

#include "groups.h"

// ---- few tokens, of one precision or several ----
struct Piece { const SlLinear *d; i64 first, count; };   // tokens that go through a weight at one precision
struct Place { i64 row; int32_t *sums; Done done; };   // its first row of bytes, what its groups add up to, and the rest
struct Call { const SlLinear *d; gemv_fn f; i64 row, end; };   // a kernel and the rows of bytes that it takes
static i64 rows_of(const Piece *p) { return p->count*digits_of(p->d); }
static size_t place_piece(const Piece *p, i64 row, char *mem, Place *at) {   // the bytes that it takes
    const SlLinear *d = p->d;
    const i64 far = d->group ? (digits_of(d) + 1)*groups_of(d) : 0;   // what a token's groups add up to
    const size_t h_at = round64(p->count*sizeof(Row)), sums_at = h_at + round64((size_t)p->count*d->r*4);
    if (at) *at = {row, (int32_t*)(mem + sums_at), {d, (Row*)mem, (float*)(mem + h_at)}};
    return sums_at + round64((size_t)p->count*far*4);
}
// Few bits first, and last the pieces with groups, which have kernels of their own.
static void sort_pieces(const Piece *P, i64 n, Piece *to) {
    auto key = [](const Piece &p) { return p.d->group ? 9 : p.d->bits; };
    for (i64 i = 0; i < n; i++) {
        i64 j = i;
        for (; j && key(to[j - 1]) > key(P[i]); j--) to[j] = to[j - 1];
        to[j] = P[i];
    }
}
// Whether one kernel takes rows of both: of one precision, or of two of 4, 6 and 8 bits, of one weight.
static bool together(const SlLinear *d, const SlLinear *wider) {
    const i64 all = (i64)1 << 4 | 1 << 6 | 1 << 8;
    if (d->bits != wider->bits && !(all >> d->bits & all >> wider->bits & 1)) return false;
    return d->high == wider->high && (d->bits <= 4 || d->middle == wider->middle) && (d->bits <= 6 || d->low == wider->low);
}
// The kernel for as many rows from `row` on as one takes; `of` are the weights of all, few bits first.
static Call call_for(const SlLinear *const *of, i64 row, i64 rows) {
    i64 counts[4] = {0, 0, 0, 0}, end = row;
    do counts[variant(of[end++]->bits) - 1]++;
    while (end < rows && end - row < SL_ROWS && together(of[end - 1], of[end]));
    const SlLinear *widest = of[end - 1];
    const int v = variant(widest->bits) - 1;
    if (counts[v] == end - row) return {widest, gemv_table[v][end - row - 1], row, end};
    return {widest, nested_table.of[(counts[0]*SL_COUNTS + counts[1])*SL_COUNTS + counts[2]], row, end};
}

struct Few {                    // tokens of n pieces on their way
    Piece *pieces; Place *at; Call *calls; i64 n, made;
    int8_t *xs;                 // their rows of bytes, in the order of the pieces
    const char *x; i64 xstride; int type;
};
static void prepare_token(const Few &f, i64 i, i64 t, float *room) {
    const SlLinear *d = f.pieces[i].d;
    const Place &at = f.at[i];
    const int digits = digits_of(d);
    const char *in = f.x + (f.pieces[i].first + t)*f.xstride*(i64)width(f.type);
    int8_t *xs = f.xs + (at.row + t*digits)*d->kp;
    quantize_row(d, turned(d, in, f.type, room), f.type, xs, 64, d->kp, at.done.rows + t);
    if (d->group) group_sums(d, xs, digits, at.sums + t*(digits + 1)*groups_of(d));
    adapter_row(d, in, f.type, at.done.h + t*d->r);
}
// Asks for what `finish` reads of a block, which comes while the block is multiplied. Inline, since compilers leave out a
// call of a function that does nothing else.
INL void fetch(const SlLinear *d, i64 nb) {
    const i64 last = nb*16 + 15 < d->n ? nb*16 + 15 : d->n - 1;
    __builtin_prefetch((const float*)d->scale + last);
    if (d->act_mode) __builtin_prefetch(d->sums + last);
    for (i64 j = 0; j < d->r; j++) __builtin_prefetch(d->lora_bt + j*d->n + last);
}
// Blocks b0..b1 of all tokens; s is room for the sums of a block.
static void multiply_few(const Few &f, i64 b0, i64 b1, int32_t *s) {
    const i64 step = f.n == 1 ? b1 - b0 : SL_BLOCKS, kp = f.pieces->d->kp;
    for (i64 b = b0; b < b1; b += step) for (i64 i = 0; i < f.n; i++) {   // a block is read once for all
        const Done &g = f.at[i].done;
        if (g.d->group) groups_range(g.d, f.xs + f.at[i].row*kp, f.at[i].sums, g.rows, g.h, f.pieces[i].count, b,
                                     b + step < b1 ? b + step : b1, g.y, g.stride/(i64)width(g.type), g.type);
    }
    if (f.made) for (i64 nb = b0; nb < b1; nb++) {
        for (i64 i = 0; i < f.n && !f.pieces[i].d->group; i++) fetch(f.pieces[i].d, nb);
        for (const Call *c = f.calls; c < f.calls + f.made; c++) c->f(c->d, nb, f.xs + c->row*kp, s + c->row*16);
        for (i64 i = 0; i < f.n && !f.pieces[i].d->group; i++) {
            const int digits = digits_of(f.pieces[i].d);
            finish_of(digits)(f.at[i].done, nb, s + f.at[i].row*16, digits*16, 16, 0, f.pieces[i].count);
        }
    }
}
// Lays out in `mem` what the pieces need, and chooses kernels; returns the bytes, and does nothing else where mem is null.
static size_t place_few(const Piece *P, char *mem, char *y, i64 ystride, Few *f) {
    const i64 n = f->n, w = (i64)width(f->type);
    i64 rows = 0, row = 0, plain = 0;   // rows of bytes; those without groups
    for (i64 i = 0; i < n; i++) { rows += rows_of(P + i); if (!P[i].d->group) plain += rows_of(P + i); }
    const size_t at_at = round64(n*sizeof(Piece)), of_at = at_at + round64(n*sizeof(Place));
    const size_t calls_at = of_at + round64(rows*sizeof(void*)), xs_at = calls_at + round64(rows*sizeof(Call));
    size_t end = xs_at + round64((size_t)rows*P->d->kp);
    if (!mem) {
        for (i64 i = 0; i < n; i++) end += place_piece(P + i, 0, nullptr, nullptr);
        return end;
    }
    f->pieces = (Piece*)mem; f->at = (Place*)(mem + at_at); f->calls = (Call*)(mem + calls_at); f->xs = (int8_t*)mem + xs_at;
    const SlLinear **of = (const SlLinear**)(mem + of_at);
    sort_pieces(P, n, f->pieces);
    for (i64 i = 0; i < n; i++) {
        const Piece &p = f->pieces[i];
        end += place_piece(&p, row, mem + end, f->at + i);
        Done &done = f->at[i].done;
        done.y = y + p.first*ystride*w; done.stride = ystride*w; done.type = f->type;
        for (i64 j = rows_of(&p); j; j--) of[row++] = p.d;
    }
    for (row = 0; row < plain; f->made++) {
        f->calls[f->made] = call_for(of, row, plain);
        row = f->calls[f->made].end;
    }
    return end;
}
static int linear_few(const Piece *P, i64 n, const char *x, i64 xstride, int type, char *y, i64 ystride) {
    const i64 kp = P->d->kp, blocks = (P->d->n + 15) >> 4;
    i64 tokens = 0, work = 0, rows = 0;
    for (i64 i = 0; i < n; i++) {
        tokens += P[i].count; rows += rows_of(P + i); work += P[i].count*kp*(digits_of(P[i].d) + P[i].d->r);
    }
    int threads = max_threads();
    if (tokens*blocks*kp < 8192) threads = 1;
    if (threads > blocks) threads = (int)blocks;
    Few f = {nullptr, nullptr, nullptr, n, 0, nullptr, x, xstride, type};
    const size_t sums = round64((size_t)rows*64), own = sums + round64(turned_room(kp)), common = place_few(P, nullptr, y, ystride, &f);
    char *mem = arena.get(common + own*threads + 64);
    if (!mem) return NO_MEMORY;
    place_few(P, mem, y, ystride, &f);
    char *p = mem + common;
    const bool shared = work < 65536;   // few rows: one thread prepares them, else all do
    if (shared || threads == 1)
        for (i64 i = 0; i < n; i++) for (i64 t = 0; t < f.pieces[i].count; t++) prepare_token(f, i, t, (float*)(p + sums));
    if (threads == 1) { multiply_few(f, 0, blocks, (int32_t*)p); return FINE; }
    #pragma omp parallel num_threads(threads)
    {
        char *mine = p + own*thread_id();
        if (!shared) {
            for (i64 i = 0; i < n; i++) {
                #pragma omp for schedule(static) nowait
                for (i64 t = 0; t < f.pieces[i].count; t++) prepare_token(f, i, t, (float*)(mine + sums));
            }
            #pragma omp barrier
        }
#ifdef _OPENMP
        const int me = thread_id(), all = omp_get_num_threads();
#else
        const int me = 0, all = 1;
#endif
        multiply_few(f, blocks*me/all, blocks*(me + 1)/all, (int32_t*)mine);
    }
    return FINE;
}

// Blocks nb.. of tokens t0..t1, `some` at a time; `codes` holds the blocks, unpacked.
static void gemm_range(const SlLinear *d, const uint8_t *codes, i64 nb, const int8_t *xs, const int32_t *sums, Row *rows,
                       float *h, i64 m, i64 t0, i64 t1, int some, char *y, i64 stride, int type) {
    const int digits = digits_of(d);
    const i64 apart = unpacked_bytes(d), w = (i64)width(type), far = d->group ? (digits + 1)*groups_of(d) : 0;
    const i64 blocks = ((d->n + 15) >> 4) - nb;
    const bool four = apart == d->kp*16;
    alignas(64) int32_t s[SL_BLOCKS*SL_MANY*16];
    float *f = (float*)s;
    const Done done = {d, rows, h, y, stride*w, type};
    for (i64 t = t0; t < t1; t += some) {
        const int8_t *x = xs + t*digits*d->kp;
        const i64 tokens = m - t < some ? m - t : some;
        if (d->group) {
            const int32_t *own = sums + t*far;
            if (blocks < SL_BLOCKS) groups_any<1>(d, four, codes, nb, x, own, f);
            else groups_any<SL_BLOCKS>(d, four, codes, nb, x, own, f);
        } else (four ? gemm_block<4,SL_MANY,SL_BLOCKS> : gemm_block<8,SL_MANY,SL_BLOCKS>)(codes, apart, d->kp, x, s);
        for (i64 b = 0; b < SL_BLOCKS && b < blocks; b++) {
            if (d->group) for (i64 i = t; i < t + tokens; i++)
                groups_put(d, nb + b, f + (b*some + i - t)*16, rows + i, h + i*d->r, y + i*stride*w, type);
            else finish_of(digits)(done, nb + b, s + b*SL_MANY*16, digits*16, 16, t, t + tokens);
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
    for (i64 nb = b0; nb < b1; nb++) {
        const Channels c = channels(d, nb);
        f(d, nb, o->bytes, s);
        const F v = digits == 3 ? finish16<3>(c, s, 16, &row) : finish16<1>(c, s, 16, &row);
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
