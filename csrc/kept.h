// Keys and values in few bits: packing, and products with what is packed. The rule is that of nbs/attention/caches.ipynb,
// the layout that of nbs/serving/kept.ipynb. model.h includes this.
static inline float half_at(const uint8_t *p, i64 i) { uint16_t h; memcpy(&h, p + 2*i, 2); return from_half(h); }
static inline void put_half(uint8_t *p, i64 i, float x) {
    const uint16_t h = to_half(x); memcpy(p + 2*i, &h, 2);
}
static inline float bounded(float x) { return x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x; }
// Codes of n numbers, `stride` apart, as `range_codes` of attention/caches makes them, several in a byte.
static void put_codes(const float *x, i64 n, i64 stride, i64 bits, uint8_t *codes, uint8_t *low, uint8_t *steps, i64 at) {
    float lo = x[0], hi = x[0];
    for (i64 i = 1; i < n; i++) {
        const float v = x[i*stride];
        lo = v < lo ? v : lo; hi = v > hi ? v : hi;
    }
    const float most = (float)((1 << bits) - 1), step = (hi - lo)/most;
    put_half(low, at, bounded(lo)); put_half(steps, at, step > 65504.f ? 65504.f : step);
    const float l = half_at(low, at), s = half_at(steps, at), inverse = s > 0 ? 1.f/s : 0.f;
    const i64 several = 8/bits, span = (n + several - 1)/several;
    for (i64 i = 0; i < span; i++) {
        unsigned byte = 0;
        for (i64 j = 0; j < several && j*span + i < n; j++) {
            float c = rintf((x[(j*span + i)*stride] - l)*inverse);
            c = c < 0 ? 0 : c > most ? most : c;
            byte |= (unsigned)c << j*bits;
        }
        codes[i] = (uint8_t)byte;
    }
}
static void put_row(const float *v, i64 hd, i64 bits, uint8_t *row) {
    uint8_t *end = row + packed_bytes(hd, bits);
    put_codes(v, hd, 1, bits, row, end, end + 2, 0);
}
static void put_unit(const float *recent, i64 hd, i64 bits, uint8_t *unit) {
    const i64 span = GROUP*bits/8;
    uint8_t *low = unit + hd*span;
    for (i64 c = 0; c < hd; c++) put_codes(recent + c, GROUP, hd, bits, unit + c*span, low, low + 2*hd, c);
}
static inline F half16(const uint8_t *p, i64 i, Lanes m) { return load16(p, 2, i, m); }
// Codes of 32 tokens of one channel, as floats.
static inline void codes32(const uint8_t *p, i64 bits, F *a, F *b) {
    I x, y;
    if (bits == 8) {
        x = load_bytes(p); y = load_bytes(p + 16);
    } else if (bits == 4) {
        const I v = load_bytes(p);
        x = v & all_ints(15); y = shift_right<4>(v);
    } else {
        const I v = load_8_twice<2>(p);
        x = v & all_ints(3); y = shift_right<4>(v) & all_ints(3);
    }
    *a = floats(x); *b = floats(y);
}
// What a head of keys and values has in the pages of a text: where it begins in each, and the bytes of a token's values.
struct Head {
    uint8_t *const *pages;
    float *recent;
    i64 keys, values, row, k_bits, v_bits;
    uint8_t *unit_at(i64 t) const { return pages[t/GROUP] + keys; }
    uint8_t *values_at(i64 t) const { return pages[t/GROUP] + values + t % GROUP*row; }
};
static Head head_at(const SlModel *M, const SlCache *C, i64 layer, i64 g) {
    const SlKept *S = C->kept + layer;
    const i64 hd = M->head_dim, row = row_bytes(hd, S->v_bits);
    float *recent = S->k_bits ? C->recent + S->recent + g*GROUP*hd : nullptr;
    return {C->pages, recent, S->keys + g*unit_bytes(hd, S->k_bits), S->values + g*GROUP*row, row, S->k_bits, S->v_bits};
}
static float *key_at(const Head &h, i64 t, i64 hd) { return (float*)h.unit_at(t) + t % GROUP*hd; }   // a float key
// y (n) = inv sum p v over rows a..b and the last one.
template<int B> static void mix_rows(const float *p, const Head &h, i64 begin, i64 end, const uint8_t *last, i64 n, float inv,
                                     float *y) {
    constexpr int several = 8/B, loads = 4/several;
    const i64 codes = packed_bytes(n, B), row = codes + 4, span = codes;
    for (i64 i = 0; i < span; i += 16*loads) {
        F a[4]; Lanes m[loads];
        for (int j = 0; j < 4; j++) a[j] = zero();
        for (int l = 0; l < loads; l++) m[l] = head(span - i - 16*l);
        for (i64 t = begin; t <= end;) {
            const uint8_t *r = t < end ? h.values_at(t) : last;
            for (const i64 stop = t < end ? page_end(t, end) : t + 1; t < stop; t++, r += row) {
                const F w = each(p[t - begin]), low = each(half_at(r + codes, 0)), step = each(half_at(r + codes, 1));
                for (int l = 0; l < loads; l++) {
                    const I v = load_bytes(r + i + 16*l, m[l]);
                    I c[4] = {v, shift_right<B>(v), shift_right<B*2 % 32>(v), shift_right<B*3 % 32>(v)};
                    for (int j = 0; j < several; j++)
                        a[l*several + j] = fma(w, low + step*floats(c[j] & all_ints((1 << B) - 1)), a[l*several + j]);
                }
            }
        }
        for (int l = 0; l < loads; l++) for (int j = 0; j < several; j++) {
            const i64 at = j*span + i + 16*l;
            const i64 left = span - i - 16*l < n - at ? span - i - 16*l : n - at;
            store(y + at, head(left), a[l*several + j]*each(inv));
        }
    }
}
static void put_key(const Head &h, i64 hd, i64 pos, const float *k) {
    float *own = h.k_bits ? h.recent + pos % GROUP*hd : key_at(h, pos, hd);
    memcpy(own, k, (size_t)hd*4);
    if (h.k_bits && pos % GROUP == GROUP - 1) put_unit(h.recent, hd, h.k_bits, h.unit_at(pos));
}
static void put_value(const Head &h, i64 hd, i64 pos, const float *v) {
    if (h.v_bits) put_row(v, hd, h.v_bits, h.values_at(pos));
    else memcpy(h.values_at(pos), v, (size_t)hd*4);
}
// Columns a..b of kt (hd,keys) from units, which begin at multiples of 32.
static void unpack_units(const Head &h, i64 hd, i64 a, i64 b, float *kt, i64 keys) {
    const i64 bits = h.k_bits, span = GROUP*bits/8;
    for (i64 k = a; k < b; k += GROUP) {
        const uint8_t *unit = h.unit_at(k), *low = unit + hd*span, *steps = low + 2*hd;
        for (i64 j = 0; j < hd; j++) {
            F x, y;
            codes32(unit + j*span, bits, &x, &y);
            const F s = each(half_at(steps, j)), l = each(half_at(low, j));
            store(kt + j*keys + k, fma(x, s, l));
            store(kt + j*keys + k + 16, fma(y, s, l));
        }
    }
}
static void unpack_rows(const Head &h, i64 hd, i64 a, i64 b, float *v) {
    const i64 bits = h.v_bits, span = packed_bytes(hd, bits);
    for (i64 t = a; t < b; t++) {
        const uint8_t *row = h.values_at(t);
        const float low = half_at(row + span, 0), step = half_at(row + span, 1);
        for (i64 i = 0; i < hd; i++)
            v[t*hd + i] = low + step*(float)(row[i % span] >> i/span*bits & ((1 << bits) - 1));
    }
}
