// The kernels for AVX-512 with VNNI, and AMX.
#include "packed.h"
#include "rotation.h"

#ifdef SL_X86
#include <immintrin.h>
#define SL_LEVEL 3
#define SL_TILES 1
SL_TARGET_ON(SL_AMX)
namespace avx512 {
#include "vec.h"
#include "planes.h"
#include "tiles.h"
#include "model.h"
}
SL_TARGET_OFF
extern const Calls calls_avx512;
const Calls calls_avx512 = {avx512::linear_any, avx512::decode_step, avx512::prompt, avx512::rows};
#endif
