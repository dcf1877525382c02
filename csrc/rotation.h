// A fast orthogonal transform of rows (nbs/core/rotation.ipynb): signs, then a Hadamard matrix in each block.
#pragma once
#include <cstddef>
#include <cstdint>

// A block has order*width numbers, width a power of two: its matrix is the Kronecker product of one of `order` rows,
// of ones and minus ones, and Sylvester's of `width` rows.
struct SlRotation {
    const float *signs;         // (n): +-1/sqrt(block)
    const float *matrix;        // (order,order), or null where order is 1
    int64_t n, block, order;
};
static inline size_t turn_room(const SlRotation *r) { return 2*(((size_t)r->block + 15) & ~(size_t)15); }   // floats of scratch

// y = x R, or y = x R' (`back`: then `matrix` is the transposed one). Types: 0 float32, 1 bfloat16, 2 float16, all
// computed in float32; y may be x.
void turn_row(const SlRotation *r, int back, const void *x, int type, void *y, float *scratch);
