// The kernels for NEON with dot products.
#include "packed.h"
#include "rotation.h"

#ifdef SL_ARM
#include <arm_neon.h>
#define SL_LEVEL 1
SL_TARGET_ON(SL_DOT)
namespace dot {
#include "vec.h"
#include "planes.h"
#include "model.h"
}
SL_TARGET_OFF
extern const Calls calls_dot;
const Calls calls_dot = {dot::linear_any, dot::decode_step, dot::prompt, dot::rows};
#endif
