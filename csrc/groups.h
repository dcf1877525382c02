// Products where every `group` inputs of a row have a step of their own; planes.h includes this.
//
// The sum of a group is exact: 32-bit integers, with the zero point of the weight in them (its half at eight bits is
// added in float). Each is turned to float32, times its step, and added from the first group to the last: the order is
// the same for one token and for many, so a row does not depend on the rows beside it. Steps are those of the eight-bit
// code, whatever the width, as the top bit of a code stands at bit 7.

// What a token's groups add up to, digit by digit (each times the zero point, negative), and behind them the half
// that eight bits need: digits+1 rows of `groups_of` numbers.
static void group_sums(const SlLinear *d, const int8_t *bytes, int digits, int32_t *out) {
    const i64 G = groups_of(d);
    const int32_t zero = d->bits == 8 ? 119 : 120 - (1 << (7 - d->bits));
    const float half = d->bits == 8 ? -.5f : 0.f;
    float *halves = (float*)(out + digits*G);
    for (i64 g = 0; g < G; g++) {
        const i64 a = g*d->group, b = a + d->group < d->kp ? a + d->group : d->kp;
        float whole = 0;
        for (int digit = digits; digit--;) {
            int32_t sum = 0;
            for (i64 i = a; i < b; i += 16) sum += sum_16(bytes + digit*d->kp + i);
            out[digit*G + g] = -zero*sum;
            whole = whole*256.f + (float)sum;
        }
        halves[g] = half*whole;
    }
}

// B blocks of 16 channels of T tokens, whose sums by group stand `far` apart; the results of a block lie together. Blocks
// share what is loaded of the tokens. U units make a group, 0 if another number.
template<class From, int N, int G3, int T, int B, int U>
INL void groups_block(const SlLinear *d, const From *from, i64 nb, const int8_t *xs, const int32_t *sums, float *out) {
    enum { R = G3*T };
    const i64 G = groups_of(d), units = d->kp >> 4, each_has = U ? U : d->group >> 4, far = (G3 + 1)*G;
    const int type = (int)d->step_type;
    const char *step = (const char*)d->scale + nb*G*16*(i64)width(type);
    F y[T][B];
    for (int t = 0; t < T; t++) for (int b = 0; b < B; b++) y[t][b] = zero();
    for (i64 g = 0, u = 0; g < G; g++) {
        typedef Sums<(N == 4 ? 1 : 2),R,1,B> S;
        S a;
        a.clear();
        const i64 end = u + each_has < units ? u + each_has : units;
        for (; u < end; u++) add_unit<S,N,B>(a, from, u, xs, d->kp);
        for (int b = 0; b < B; b++) {
            const F s = load16(step, type, (b*G + g)*16, head(16));
            for (int t = 0; t < T; t++) {
                const int32_t *base = sums + t*far + g;
                F v = floats(a.total(b, t*G3 + G3 - 1) + all_ints(base[(G3 - 1)*G]));
                for (int j = G3 - 1; j--;) v = fma(v, each(256.f), floats(a.total(b, t*G3 + j) + all_ints(base[j*G])));
                v = v + each(((const float*)base)[G3*G]);
                y[t][b] = fma(s, v, y[t][b]);
            }
        }
    }
    for (int b = 0; b < B; b++) for (int t = 0; t < T; t++) store(out + (b*T + t)*16, y[t][b]);
}
template<int P, int G3, int T, int B, int U>
static void groups_few(const SlLinear *d, i64 nb, const int8_t *xs, const int32_t *sums, float *out) {
    Packed<P> from[B];
    for (int b = 0; b < B; b++) from[b] = Packed<P>(d, nb + b);
    groups_block<Packed<P>,vectors<P>(),G3,T,B,U>(d, from, nb, xs, sums, out);
}
template<int N, int G3, int T, int B>
static void groups_many(const SlLinear *d, const uint8_t *codes, i64 apart, i64 nb, const int8_t *xs, const int32_t *sums, float *out) {
    Unpacked<N> from[B];
    for (int b = 0; b < B; b++) from[b].codes = codes + b*apart;
    if (d->group == 32) groups_block<Unpacked<N>,N,G3,T,B,2>(d, from, nb, xs, sums, out);
    else groups_block<Unpacked<N>,N,G3,T,B,0>(d, from, nb, xs, sums, out);
}
template<int B> static void groups_any(const SlLinear *d, bool four, const uint8_t *codes, i64 nb, const int8_t *xs,
                                       const int32_t *sums, float *out) {
    const i64 apart = unpacked_bytes(d);
    if (digits_of(d) == 3)
        (four ? groups_many<4,3,SL_MANY/6,B> : groups_many<8,3,SL_MANY/6,B>)(d, codes, apart, nb, xs, sums, out);
    else (four ? groups_many<4,1,SL_MANY/2,B> : groups_many<8,1,SL_MANY/2,B>)(d, codes, apart, nb, xs, sums, out);
}
typedef void (*groups_fn)(const SlLinear*, i64, const int8_t*, const int32_t*, float*);
// By digits (one or three), blocks less 1, and tokens at a time.
struct GroupsTable { groups_fn one[SL_BLOCKS][3], wide[SL_BLOCKS][3]; };
#define SL_ONE(P, B, U) {groups_few<P,1,1,B,U>, groups_few<P,1,2,B,U>, groups_few<P,1,4,B,U>}
#if SL_BLOCKS == 2
#define SL_WIDE(P, B, U) {groups_few<P,3,1,B,U>, groups_few<P,3,2,B,U>, nullptr}
#define SL_BOTH(P, U) {{SL_ONE(P,1,U), SL_ONE(P,2,U)}, {SL_WIDE(P,1,U), SL_WIDE(P,2,U)}}
#else
#define SL_WIDE(P, B, U) {groups_few<P,3,1,B,U>, nullptr, nullptr}
#define SL_BOTH(P, U) {{SL_ONE(P,1,U)}, {SL_WIDE(P,1,U)}}
#endif
static const GroupsTable groups_tables[4][2] = {
    {SL_BOTH(1,0), SL_BOTH(1,2)}, {SL_BOTH(2,0), SL_BOTH(2,2)}, {SL_BOTH(3,0), SL_BOTH(3,2)}, {SL_BOTH(4,0), SL_BOTH(4,2)}};
static const GroupsTable *groups_table(const SlLinear *d) { return &groups_tables[variant(d->bits) - 1][d->group == 32]; }
#undef SL_ONE
#undef SL_WIDE
#undef SL_BOTH

// What `groups_block` added up, with the token's step and zero point, and the bias.
static inline F groups_finish(const SlLinear *d, i64 nb, const float *s, const Row *row) {
    const Lanes m = head(d->n - nb*16);
    F v = load(s);
    if (d->act_mode) v = fnma(each((float)row->zx), load(d->totals + nb*16, m), v);
    return fma(each((float)row->sx), v, d->bias ? load(d->bias + nb*16, m) : zero());
}
// A block of a token with its adapter, to where it belongs.
static void groups_put(const SlLinear *d, i64 nb, const float *s, const Row *row, const float *h, char *y, int type) {
    const Lanes m = head(d->n - nb*16);
    F v = groups_finish(d, nb, s, row);
    for (i64 j = 0; j < d->r; j++) v = fma(each(h[j]), load(d->lora_bt + j*d->n + nb*16, m), v);
    store16(y, type, nb*16, m, v);
}
// Blocks b0..b1 of all tokens; rows of bytes lie kp apart, the digits of a token together.
static void groups_range(const SlLinear *d, const int8_t *xs, const int32_t *sums, const Row *rows, const float *h,
                         i64 m, i64 b0, i64 b1, char *y, i64 stride, int type) {
    const int digits = digits_of(d), some = digits == 3 ? SL_BLOCKS : 4;
    const GroupsTable *table = groups_table(d);
    const i64 far = (digits + 1)*groups_of(d), w = (i64)width(type);
    alignas(64) float s[2*4*16];
    for (i64 nb = b0; nb < b1; nb += SL_BLOCKS) for (i64 t = 0; t < m;) {
        const int which = m - t >= 4 && some == 4 ? 2 : m - t >= 2 && some >= 2 ? 1 : 0, T = 1 << which;
        const int B = b1 - nb < SL_BLOCKS ? 1 : SL_BLOCKS;
        (digits == 3 ? table->wide : table->one)[B - 1][which](d, nb, xs + t*digits*d->kp, sums + t*far, s);
        for (int b = 0; b < B; b++) for (int i = 0; i < T; i++)
            groups_put(d, nb + b, s + (b*T + i)*16, rows + t + i, h + (t + i)*d->r, y + (t + i)*stride*w, type);
        t += T;
    }
}
