// The kernels for NEON with dot products of bytes with and without sign.
#include "packed.h"
#include "rotation.h"

#ifdef SL_ARM
#include <arm_neon.h>
#define SL_LEVEL 2
SL_TARGET_ON(SL_I8MM)
namespace i8mm {
#include "vec.h"
#include "planes.h"
#include "model.h"
}
SL_TARGET_OFF
extern const Calls calls_i8mm;
const Calls calls_i8mm = {i8mm::linear_any, i8mm::decode_step, i8mm::prompt, i8mm::rows};
#endif
