// Products with int8 weight codes, forward and backward.
//
// A weight is s[o]*(c[o,i]+d): int8 codes c, one float s per output, one small d per layer. All sums of products are
// exact integers. Float operands (gradients, float activations) become fixed point numbers first: a row is divided by
// its largest magnitude and written with `digits` bytes. The exact sum is rounded once, to float32. So results depend
// neither on the order of the sum, nor on the number of threads, nor on the processor.
#include "train.h"

#ifdef SL_TRAIN_HERE
static int thread_count() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

API int64_t sl_train_packed_bytes(int64_t n, int64_t k, int shared) {
    return 64 + (shared ? 7 : 1) * up(n, 64) * 4 + up(n, 64) * up(k, 64);
}

API int sl_train_pack(const int8_t* codes, int64_t so, int64_t sk, int64_t n, int64_t k, int shared, void* packed) {
    const int64_t np = up(n, 64), kp = up(k, 64);
    const int widths = shared ? 7 : 1;
    int32_t *head = (int32_t*)packed, *sums = head + 16, most[7] = {0};
    int8_t* tiles = (int8_t*)(sums + widths * np);
    memset(packed, 0, 64);
#pragma omp parallel for schedule(static) reduction(max : most[:7]) if (n * k > 32768)
    for (int64_t ob = 0; ob < np / 16; ob++) {
        int32_t sum[7][16] = {{0}};
        for (int64_t kb = 0; kb < kp / 64; kb++) {
            int8_t* t = tiles + (ob * (kp / 64) + kb) * 1024;
            for (int64_t r = 0; r < 16; r++)
                for (int64_t o = 0; o < 16; o++)
                    for (int64_t j = 0; j < 4; j++) {
                        int64_t oo = ob * 16 + o, kk = kb * 64 + r * 4 + j;
                        const int8_t c = oo < n && kk < k ? codes[oo * so + kk * sk] : 0;
                        t[r * 64 + o * 4 + j] = c;
                        for (int w = 0; w < widths; w++) {
                            const int v = (int8_t)(c & 0xff << w);
                            sum[w][o] += v; most[w] = std::max(most[w], std::abs(v));
                        }
                    }
        }
        for (int w = 0; w < widths; w++) memcpy(sums + w * np + ob * 16, sum[w], 64);
    }
    head[0] = shared;
    for (int w = 0; w < widths; w++) head[8 - w] = most[w];
    return OK;
}

// ---------------------------------------------------------------- products
static int run(Product p, Mode mode, int digits) {
    if (mode != FORWARD_INT && (digits < 2 || digits > 4)) return NO_RANGE;
    if (p.m <= 0 || p.c <= 0) return OK;
    const TrainTable* table = train_table();
    const part_fn part = table->parts[mode][digits];
    p.width = std::max<int64_t>(64, table->chunk / p.rp / 64 * 64);
    const int64_t panels = up(p.m, table->panel) / table->panel, columns = up(p.c, 64) / 64;
    const int threads = (double)p.m * p.r * p.c < 1e5 ? 1 : thread_count();
    int64_t best = INT64_MAX, tr = 1, tc = 1;
    // rows among t threads, columns among the others: the cheapest slowest thread, in cycles / r, as measured
    for (int64_t t = 1; t <= threads; t++) {
        int64_t rows = up(panels, t) / t, cols = up(columns, threads / t) / (threads / t);
        int64_t chunks = up(cols * 64, p.width) / p.width;
        int64_t again = chunks > 1 ? up(rows, SUPER) / SUPER : 1;   // times that the second operand comes in
        int64_t cost = rows * cols * 4 * digits + (mode == BACKWARD ? 10 : 3) * cols * again
                       + (mode == FORWARD_INT ? 3 : 21) * rows + (chunks > 1 ? digits * rows * chunks : 0);
        if (cost < best) { best = cost; tr = t; tc = threads / t; }
    }
#pragma omp parallel for schedule(static, 1) num_threads((int)(tr * tc)) if (tr * tc > 1)
    for (int64_t t = 0; t < tr * tc; t++) {
        int64_t i = t / tc, j = t % tc;
        int64_t p0 = panels * i / tr, p1 = panels * (i + 1) / tr;
        int64_t c0 = columns * j / tc * 64, c1 = columns * (j + 1) / tc * 64;
        if (p0 < p1 && c0 < c1) part(p, p0, p1, c0, c1);
    }
    return OK;
}

API int sl_forward(const uint8_t* codes, int64_t ldc, const float* row_scale, const int32_t* row_zero,
                   const int32_t* row_sum, int64_t m, int64_t n, int64_t k, const void* packed, int bits,
                   const float* s, float d, const float* bias, void* y, int ytype, int64_t ldy) {
    if (!train_table()) return NO_CPU;
    Product p{m, k, n, up(k, 64), nullptr, 0, 0, nullptr, codes, ldc, row_scale, row_zero, row_sum,
              Packed(packed, n, k, bits), s, d, 0, bias, nullptr, 0, y, ytype, ldy, 0, 0};
    while (p.shift < 4 && std::ldexp(d, p.shift) != std::floor(std::ldexp(d, p.shift))) p.shift++;
    const double largest = std::ldexp((double)p.w.most, p.shift) + std::fabs(std::ldexp(d, p.shift));
    if (p.shift > 3 || 255. * (double)p.rp * largest >= 2147483647.) return NO_RANGE;
    return run(p, FORWARD_INT, 1);
}

API int sl_forward_float(const void* x, int xtype, int64_t ldx, int64_t m, int64_t n, int64_t k, const void* packed,
                         int bits, const float* s, float d, int digits, const float* bias, void* y, int ytype, int64_t ldy) {
    if (!train_table()) return NO_CPU;
    if (k > 65536) return NO_RANGE;
    Product p{m, k, n, up(k, 64), x, xtype, ldx, nullptr, nullptr, 0, nullptr, nullptr, nullptr,
              Packed(packed, n, k, bits), s, d, 0, bias, nullptr, 0, y, ytype, ldy, 0, 0};
    return run(p, FORWARD_FLOAT, digits);
}

API int sl_backward(const void* gy, int gtype, int64_t ldg, int64_t m, int64_t n, int64_t k, const void* packed,
                    int bits, const float* s, float d, int digits, const void* mask, int64_t ldmask, void* gx, int gxtype,
                    int64_t ldgx, int add) {
    if (!train_table()) return NO_CPU;
    if (n > 65536) return NO_RANGE;
    Product p{m, n, k, up(n, 64), gy, gtype, ldg, s, nullptr, 0, nullptr, nullptr, nullptr, Packed(packed, n, k, bits),
              s, d, 0, nullptr, (const uint8_t*)mask, ldmask, gx, gxtype, ldgx, add, 0};
    return run(p, BACKWARD, digits);
}
#endif
