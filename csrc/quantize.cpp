// Activations to codes, and ranges.
#include "train.h"

#ifdef SL_TRAIN_HERE
// scale and zero point of a range, in the very float32 operations of quantizers._scale_and_zero
static Grid grid_of(Range r, int bits, int symmetric) {
    Grid g;
    float lo = r.lo < 0 ? r.lo : 0.f, hi = r.hi > 0 ? r.hi : 0.f, tiny = std::numeric_limits<float>::min();
    if (symmetric) {
        g.scale = std::max(-lo, hi) / (float)((1 << (bits - 1)) - 1);
        g.scale = std::max(g.scale, tiny); g.zero = 1 << (bits - 1);
    } else {
        float top = (float)((1 << bits) - 1);
        g.scale = std::max((hi - lo) / top, tiny);
        g.zero = (int)std::min(std::max(std::nearbyintf(-lo / g.scale), 0.f), top);
    }
    g.inv = 1.f / g.scale;
    if (r.bad || !std::isfinite(g.scale)) { g.scale = NAN; g.inv = 0; g.zero = symmetric ? g.zero : 0; }
    return g;
}

static void join(Range& a, const Range& b) {   // order does not matter, NaN stays
    if (std::isnan(a.lo) || std::isnan(b.lo)) { a.lo = a.hi = NAN; return; }
    a.lo = std::min(a.lo, b.lo); a.hi = std::max(a.hi, b.hi);
}
static void give(const Range& r, float* out) { out[0] = r.lo + 0.f; out[1] = r.hi + 0.f; }   // -0 becomes 0

API int sl_range(const void* x, int xtype, int64_t m, int64_t k, int64_t ldx, const uint8_t* keep,
                 float* range) {
    const TrainTable* table = train_table();
    if (!table) return NO_CPU;
    Range all;
    if (k > 0) {
#pragma omp parallel if (m * k > 32768)
        {
            Range mine;
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < m; i++)
                if (!keep || keep[i]) join(mine, table->row_range(row_of(x, xtype, i * ldx), xtype, k));
#pragma omp critical(sl_join)
            join(all, mine);
        }
    }
    give(all, range);
    return OK;
}

API int sl_quantize(const void* x, int xtype, int64_t m, int64_t k, int64_t ldx, int bits, int symmetric,
                    int dynamic, const float* scale, const int32_t* zero, uint8_t* codes, int64_t ldc,
                    float* row_scale, int32_t* row_zero, int32_t* row_sum, void* mask, int64_t ldmask,
                    const uint8_t* keep, float* range) {
    const TrainTable* table = train_table();
    if (!table) return NO_CPU;
    if (bits < 2 || bits > 8 || ldc < up(k, 64) || (mask && ldmask < up(k, 64) / 8)) return NO_RANGE;
    const Limits to{symmetric ? 1 : 0, (1 << bits) - 1};
    Grid fixed{};
    if (!dynamic) {
        fixed.scale = *scale; fixed.inv = 1.f / fixed.scale;
        fixed.zero = symmetric ? *zero + (1 << (bits - 1)) : *zero;
    }
    Range all;
#pragma omp parallel if (m * k > 32768)
    {
        Range mine;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < m; i++) {
            const void* row = row_of(x, xtype, i * ldx);
            Range r;
            Grid g = fixed;
            uint64_t* bit = mask && !dynamic ? (uint64_t*)((char*)mask + i * ldmask) : nullptr;
            bool count = range && (!keep || keep[i]);
            if (dynamic) g = grid_of(r = table->row_range(row, xtype, k), bits, symmetric);
            uint8_t* c = codes + i * ldc;
            Range* seen = count && !dynamic ? &r : nullptr;   // a dynamic range is known by now
            const int32_t sum = table->quantize_row(row, xtype, k, g, to, c, bit, seen);
            row_scale[i] = g.scale; row_zero[i] = g.zero; row_sum[i] = sum;
            if (count && k > 0) join(mine, r);
        }
        if (range) {
#pragma omp critical(sl_join)
            join(all, mine);
        }
    }
    if (range) give(all, range);
    return OK;
}

// g (m,k), the gradient of the fake-quantized x: zero where x was clipped, in place. sums (m,2): what a row of it adds
// to the gradient of the scale, and, where it was clipped, to that of the lower end.
API int sl_range_gradient(const void* x, int xtype, int64_t ldx, void* g, int gtype, int64_t ldg, int64_t m, int64_t k,
                          const float* scale, const int32_t* zero, int qmin, int qmax, double* sums) {
    const TrainTable* table = train_table();
    if (!table) return NO_CPU;
    const Ends e{1.f / *scale, (float)(qmin - *zero), (float)(qmax - *zero), (float)qmin, (float)qmax};
#pragma omp parallel for schedule(static) if (m * k > 32768)
    for (int64_t i = 0; i < m; i++)
        table->range_row(row_of(x, xtype, i * ldx), xtype, (void*)row_of(g, gtype, i * ldg), gtype, k, e, sums + 2 * i);
    return OK;
}

API int sl_train_features(void) { return train_table() ? 7 : 0; }   // quantize, int8 forward, exact backward
#else   // another processor or compiler: the caller has its torch path
API int sl_train_features(void) { return 0; }
#endif
