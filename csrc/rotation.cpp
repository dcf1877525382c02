// Rows times an orthogonal matrix, in n log n operations. Plain C++ with the compiler's vectors: each sum is added in
// the same order whatever the processor, and a product with 1 or -1 is exact, so all machines get the same numbers.
#pragma GCC diagnostic ignored "-Wpsabi"   // nothing with vectors is called from elsewhere
#include "rotation.h"
#include "isa.h"
#include <cstdlib>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

#define API extern "C" __attribute__((visibility("default")))
#define INL static inline __attribute__((always_inline))

#if defined(__clang__)
#define SWAP(v, a) __builtin_shufflevector(v, v, 0^a, 1^a, 2^a, 3^a, 4^a, 5^a, 6^a, 7^a, 8^a, 9^a, 10^a, 11^a, 12^a, \
                                           13^a, 14^a, 15^a)
#else
#define SWAP(v, a) __builtin_shuffle(v, (I){0^a, 1^a, 2^a, 3^a, 4^a, 5^a, 6^a, 7^a, 8^a, 9^a, 10^a, 11^a, 12^a, 13^a, \
                                            14^a, 15^a})
#endif
#define LANE(i, a) ((i) & (a) ? -1.f : 1.f)
#define SIGNS(a) (V){LANE(0, a), LANE(1, a), LANE(2, a), LANE(3, a), LANE(4, a), LANE(5, a), LANE(6, a), LANE(7, a), \
                     LANE(8, a), LANE(9, a), LANE(10, a), LANE(11, a), LANE(12, a), LANE(13, a), LANE(14, a), LANE(15, a)}

namespace plain {
#include "rotation_rows.h"
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target "avx2"
namespace avx2 {
#include "rotation_rows.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target "avx512f"
namespace avx512 {
#include "rotation_rows.h"
}
#pragma GCC pop_options
#define HAS_KINDS 1
#endif

typedef void (*block_fn)(const SlRotation*, int, const void*, int, int64_t, void*, float*, float*);
static block_fn find_block() {
#ifdef HAS_KINDS
    if (isa_level() >= AVX512) return avx512::turn_block;
    if (isa_level() >= AVX2) return avx2::turn_block;
#endif
    return plain::turn_block;
}
void turn_row(const SlRotation *r, int back, const void *x, int type, void *y, float *scratch) {
    static const block_fn turn_block = find_block();
    const int64_t half = (int64_t)turn_room(r)/2;
    for (int64_t at = 0; at < r->n; at += r->block) turn_block(r, back, x, type, at, y, scratch, scratch + half);
}

// y (m,n) = x (m,n) R, or R' if `back`; rows lie `xstride` and n numbers apart. 1: numbers that cannot be, 2: no memory.
API int sl_rotate(const float *signs, const float *matrix, int64_t n, int64_t block, int64_t order, int back,
                  const void *x, int type, int64_t m, int64_t xstride, void *y) {
    const int64_t width = order > 0 && block > 0 ? block/order : 0;
    if (n < 1 || width < 1 || n % block || block % order || (width & (width - 1)) || type < 0 || type > 2) return 1;
    if ((order > 1 && (!matrix || order % 4)) || !signs || m < 0 || (m && (!x || !y))) return 1;
    const SlRotation r = {signs, matrix, n, block, order};
    const int64_t bytes = type ? 2 : 4;
#ifdef _OPENMP
    const int threads = omp_in_parallel() || m*n < 32768 ? 1 : omp_get_max_threads();
#else
    const int threads = 1;
#endif
    const size_t room = turn_room(&r);
    void *p;
    if (posix_memalign(&p, 64, 4*room*threads)) return 2;
    #pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        float *own = (float*)p + room*omp_get_thread_num();
#else
        float *own = (float*)p;
#endif
        #pragma omp for schedule(static)
        for (int64_t t = 0; t < m; t++)
            turn_row(&r, back, (const char*)x + t*xstride*bytes, type, (char*)y + t*n*bytes, own);
    }
    free(p);
    return 0;
}
