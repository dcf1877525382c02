// The transform, once for each kind of vectors: rotation.cpp includes this with other instructions switched on.
typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
// ---- numbers of other types ----
INL float from16(uint16_t h, int type) {
    uint32_t u;
    if (type == 1) u = (uint32_t)h << 16;
    else {
        const uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
        if (e == 0) {               // zero and the smallest: m/2^24
            float f = (float)m*5.9604644775390625e-8f;
            memcpy(&u, &f, 4);
            u |= sign;
        } else u = sign | (e == 31 ? 255u : e + 112) << 23 | m << 13;
    }
    float f; memcpy(&f, &u, 4);
    return f;
}
INL uint16_t to16(float f, int type) {   // to the nearest, ties to even
    uint32_t u; memcpy(&u, &f, 4);
    if (type == 1) return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
    const uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;
    if (u >= 0x477ff000) return sign | 0x7c00;
    if (u < 0x38800000) {           // below 2^-14: in steps of 2^-24, which adding 1/2 rounds to
        float a, half = .5f; memcpy(&a, &u, 4);
        a += half;
        uint32_t b; memcpy(&b, &a, 4);
        return sign | (uint16_t)(b - 0x3f000000);
    }
    return sign | (uint16_t)((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
}
INL void load(const void *x, int type, int64_t at, int64_t n, float *y) {
    if (type == 0) { memcpy(y, (const float*)x + at, (size_t)n*4); return; }
    const uint16_t *h = (const uint16_t*)x + at;
    if (type == 1) for (int64_t i = 0; i < n; i++) y[i] = from16(h[i], 1);
    else for (int64_t i = 0; i < n; i++) y[i] = from16(h[i], 2);
}
INL void store(const float *x, int type, int64_t at, int64_t n, void *y) {
    if (type == 0) { memcpy((float*)y + at, x, (size_t)n*4); return; }
    uint16_t *h = (uint16_t*)y + at;
    if (type == 1) for (int64_t i = 0; i < n; i++) h[i] = to16(x[i], 1);
    else for (int64_t i = 0; i < n; i++) h[i] = to16(x[i], 2);
}
INL V get(const float *p) { V v; memcpy(&v, p, sizeof v); return v; }
INL void put(float *p, const V &v) { memcpy(p, &v, sizeof v); }

// ---- Sylvester's matrix: sums and differences of neighbours, then of pairs, ... ----
INL void sums(float *x, int64_t width) {
    if (width < 16) {
        for (int64_t h = 1; h < width; h *= 2)
            for (int64_t i = 0; i < width; i += 2*h)
                for (int64_t j = i; j < i + h; j++) {
                    const float a = x[j], b = x[j + h];
                    x[j] = a + b; x[j + h] = a - b;
                }
        return;
    }
    for (int64_t i = 0; i < width; i += 16) {
        V v = get(x + i);
        v = SWAP(v, 1) + v*SIGNS(1);
        v = SWAP(v, 2) + v*SIGNS(2);
        v = SWAP(v, 4) + v*SIGNS(4);
        v = SWAP(v, 8) + v*SIGNS(8);
        put(x + i, v);
    }
    for (int64_t h = 16; h < width; h *= 2)
        for (int64_t i = 0; i < width; i += 2*h)
            for (int64_t j = i; j < i + h; j += 16) {
                const V a = get(x + j), b = get(x + j + h);
                put(x + j, a + b); put(x + j + h, a - b);
            }
}

// ---- the other factor: y[s] = sum_r matrix[r][s] x[r], rows of `width` numbers, four results at a time ----
template<int C> INL void four(const float *m, int64_t order, int64_t s, const float *x, int64_t width, int64_t c, float *y) {
    V a[4][C];
    for (int i = 0; i < 4; i++) for (int j = 0; j < C; j++) a[i][j] = (V){};
    for (int64_t r = 0; r < order; r++) {
        V v[C];
        for (int j = 0; j < C; j++) v[j] = get(x + r*width + c + 16*j);
        for (int i = 0; i < 4; i++) {
            const float k = m[r*order + s + i];
            for (int j = 0; j < C; j++) a[i][j] += v[j]*k;
        }
    }
    for (int i = 0; i < 4; i++) for (int j = 0; j < C; j++) put(y + (s + i)*width + c + 16*j, a[i][j]);
}
INL void mix(const float *m, int64_t order, const float *x, int64_t width, float *y) {
    for (int64_t s = 0; s < order; s += 4) {
        int64_t c = 0;
        for (; c + 32 <= width; c += 32) four<2>(m, order, s, x, width, c, y);
        for (; c + 16 <= width; c += 16) four<1>(m, order, s, x, width, c, y);
        for (; c < width; c++)
            for (int64_t i = s; i < s + 4; i++) {
                float a = 0;
                for (int64_t r = 0; r < order; r++) a += x[r*width + c]*m[r*order + i];
                y[i*width + c] = a;
            }
    }
}
INL void multiply(float *x, const float *s, int64_t n) { for (int64_t i = 0; i < n; i++) x[i] *= s[i]; }

static void turn_block(const SlRotation *r, int back, const void *x, int type, int64_t at, void *y, float *a, float *b) {
    const int64_t n = r->block, width = n/r->order;
    load(x, type, at, n, a);
    if (!back) multiply(a, r->signs + at, n);
    for (int64_t i = 0; i < n; i += width) sums(a + i, width);
    if (r->order > 1) mix(r->matrix, r->order, a, width, b);
    float *z = r->order > 1 ? b : a;
    if (back) multiply(z, r->signs + at, n);
    store(z, type, at, n, y);
}
