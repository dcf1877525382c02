// The training kernels for each level that has them.
#include "train.h"

#ifdef SL_TRAIN_HERE
SL_TARGET_ON(SL_AVX2)
namespace for_avx2 {
enum { CHUNK = 128 << 10 };   // of codes, which become twice as many bytes
#define DOT(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
#include "train_rows.h"
#undef DOT
}
SL_TARGET_OFF

#define SL_BYTES
SL_TARGET_ON(SL_AVX_VNNI)
namespace for_avx_vnni {
enum { CHUNK = 384 << 10 };
#define DOT(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)
#include "train_rows.h"
#undef DOT
}
SL_TARGET_OFF

#define SL_WIDE
SL_TARGET_ON(SL_AVX512)
namespace for_avx512 {
enum { CHUNK = 640 << 10 };
#define DOT(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
#include "train_rows.h"
#undef DOT
}
SL_TARGET_OFF

static TrainTable with_tiles() {
    TrainTable t = for_avx512::table;
    memcpy(t.parts, tile_parts, sizeof t.parts);
    t.panel = 32;
    return t;
}
const TrainTable* train_table() {
    static const TrainTable tiles = with_tiles();
    switch (isa_level()) {
        case AVX2: return &for_avx2::table;
        case AVX_VNNI: return &for_avx_vnni::table;
#ifdef SL_EMULATE_TILES
        case AVX512: return &tiles;
#else
        case AVX512: return &for_avx512::table;
#endif
        case AMX: return &tiles;
    }
    return nullptr;
}
#endif
