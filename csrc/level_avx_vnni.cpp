// The kernels for AVX2 with VNNI.
#include "packed.h"
#include "rotation.h"

#ifdef SL_X86
#include <immintrin.h>
#define SL_LEVEL 2
SL_TARGET_ON(SL_AVX_VNNI)
namespace avx_vnni {
#include "vec.h"
#include "planes.h"
#include "model.h"
}
SL_TARGET_OFF
extern const Calls calls_avx_vnni;
const Calls calls_avx_vnni = {avx_vnni::linear_any, avx_vnni::decode_step, avx_vnni::prompt, avx_vnni::rows};
#endif
