// A few rows of activations times a matrix of floats (matvec.cuh). More rows go through
// cuBLAS, whose tensor cores pay from there on.

#include "matvec.cuh"

#define MATVEC(W, X, M, weight, type)                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP) matvec_##W##_##X##_##M(            \
        const unsigned char* weights, const type* x, void* out, int rows, int cols, int skip,     \
        long long stride, int m, long long out_stride, int out_f32, int accumulate, int parts,    \
        int wide) {                                                                               \
        matvec<Dense<weight>, M>(weights, x, out, {rows, cols, skip, stride}, m, out_stride,      \
                                 out_f32, accumulate, parts, wide);                               \
    }                                                                                             \
    EXPORT_KERNEL(matvec_##W##_##X##_##M)

#define MATVECS(W, X, weight, type)    \
    MATVEC(W, X, 1, weight, type)      \
    MATVEC(W, X, 2, weight, type)      \
    MATVEC(W, X, 4, weight, type)

MATVECS(f32, f32, float, float)
MATVECS(f16, f16, f16, f16)
MATVECS(bf16, bf16, bf16, bf16)
// A matrix whose precision is kept, as a router's.
MATVECS(f32, f16, float, f16)
MATVECS(f32, bf16, float, bf16)
