// The kernels for AVX2.
#include "packed.h"
#include "rotation.h"

#ifdef SL_X86
#include <immintrin.h>
#define SL_LEVEL 1
SL_TARGET_ON(SL_AVX2)
namespace avx2 {
#include "vec.h"
#include "planes.h"
#include "model.h"
}
SL_TARGET_OFF
extern const Calls calls_avx2;
const Calls calls_avx2 = {avx2::linear_any, avx2::decode_step, avx2::prompt, avx2::rows};
#endif
