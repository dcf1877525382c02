// Products of many tokens by tiles: included after planes.h, where there may be AMX.
//
// A row tile is 16 tokens of one digit, stored as kp/64 pieces of 16 x 64 bytes.
struct TileConfig { uint8_t palette, start, pad[14]; uint16_t cols[16]; uint8_t rows[16]; };
static void tiles_on() {
    TileConfig c; memset(&c, 0, sizeof c); c.palette = 1;
    for (int i = 0; i < 8; i++) { c.cols[i] = 64; c.rows[i] = 16; }
    __asm__ volatile("ldtilecfg %0" :: "m"(c));   // the intrinsic of some compilers reads but a part of it
}
// Two row tiles x two channel blocks; sums go to c (rows 32 apart, the second row tile at c2).
static void tiles_2x2(const int8_t *a0, const int8_t *a1, const uint8_t *b0, const uint8_t *b1, i64 pieces,
                      int32_t *c, int32_t *c2) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (i64 p = 0; p < pieces; p++) {
        _tile_loadd(6, b0 + p*1024, 64); _tile_loadd(4, a0 + p*1024, 64); _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b1 + p*1024, 64); _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, a1 + p*1024, 64); _tile_dpbsud(2, 5, 6); _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, c, 128); _tile_stored(1, c + 16, 128);
    _tile_stored(2, c2, 128); _tile_stored(3, c2 + 16, 128);
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
static void gemm_pair(const SlLinear *d, const int8_t *a, Row *rows, float *h, i64 m, i64 t0, i64 t1,
                      i64 nb, const uint8_t *b, int32_t *c, char *y, i64 stride, int type) {
    const int digits = digits_of(d);
    const i64 pieces = d->kp >> 6, tile = d->kp*16, blocks = (d->n + 15) >> 4, w = (i64)width(type);
    const int two = nb + 1 < blocks;
    const uint8_t *b1 = two ? b + tile : b;
    const Done done = {d, rows, h, y, stride*w, type};
    for (i64 t = t0; t < t1; t += 2) {
        const int pair = t + 1 < t1;
        for (int g = 0; g < digits; g++) {
            const int8_t *a0 = a + (t*digits + g)*tile;
            if (pair) tiles_2x2(a0, a0 + digits*tile, b, b1, pieces, c + g*512, c + (digits + g)*512);
            else tiles_1x2(a0, b, b1, pieces, c + g*512);
        }
        for (i64 u = t; u <= t + pair; u++) for (int q = 0; q <= two; q++) {
            const i64 first = u*16, tokens = m - first < 16 ? m - first : 16;
            const int32_t *sums = c + (u - t)*digits*512 + q*16;
            finish_of(digits)(done, nb + q, sums, 32, 512, first, first + tokens);
        }
    }
}

static int linear_tiles(const SlLinear *d, const char *x, i64 m, i64 xstride, int type, char *y, i64 ystride) {
    const int digits = digits_of(d);
    const i64 tiles = (m + 15) >> 4, tile = d->kp*16, blocks = (d->n + 15) >> 4, pairs = (blocks + 1) >> 1;
    const i64 w = (i64)width(type);
    int threads = max_threads();
    const size_t room = d->order ? turned_room(d->kp) : 0, own = round64(2*tile) + 6*2048 + room;
    const size_t rows_at = round64((size_t)tiles*digits*tile), h_at = rows_at + round64(m*sizeof(Row));
    const size_t own_at = h_at + round64((size_t)m*d->r*4);
    char *p = arena.get(own_at + own*threads + 64);
    if (!p) return NO_MEMORY;
    int8_t *a = (int8_t*)p; Row *rows = (Row*)(p + rows_at); float *h = (float*)(p + h_at);
    i64 step = (1 << 20)/(digits*tile);    // row tiles whose bytes stay in the second-level cache
    step = step < 2 ? 2 : step & ~(i64)1;
    #pragma omp parallel num_threads(threads)
    {
        uint8_t *b = (uint8_t*)p + own_at + own*thread_id();
        int32_t *c = (int32_t*)(b + round64(2*tile));
        float *spare = (float*)((char*)c + 6*2048);
        #pragma omp for schedule(static)
        for (i64 t = 0; t < tiles*16; t++) {
            int8_t *o = a + (t >> 4)*digits*tile + (t & 15)*64;
            if (t < m) {
                quantize_row(d, turned(d, x + t*xstride*w, type, spare), type, o, 1024, tile, rows + t);
                adapter_row(d, x + t*xstride*w, type, h + t*d->r);
            }
            else for (int g = 0; g < digits; g++)
                for (i64 q = 0; q < d->kp >> 6; q++) memset(o + g*tile + q*1024, 0, 64);
        }
        tiles_on();
        for (i64 t0 = 0; t0 < tiles; t0 += step) {
            const i64 t1 = t0 + step < tiles ? t0 + step : tiles;
            #pragma omp for schedule(static) nowait
            for (i64 q = 0; q < pairs; q++) {
                unpack_any(d, 2*q, b);
                if (2*q + 1 < blocks) unpack_any(d, 2*q + 1, b + tile);
                gemm_pair(d, a, rows, h, m, t0, t1, 2*q, b, c, y, ystride, type);
            }
        }
        _tile_release();
    }
    return FINE;
}

