// ggml's blocks on the device: their values to the bits of the CPU's kernels, for many rows
// written out for a matrix product to read, for a few multiplied as they are made.

#include "matvec.cuh"

namespace {

// Row `first + i`, or `ids[i] - first`, of the weights, times a factor, becomes row i of
// `out`; ids elsewhere give zeros. One block a row. Bound by what it writes.
template <typename Format, typename T>
__device__ void dequantize(const unsigned char* weights, const Shape& shape, const int* ids, int first,
                           float factor, T* out, long long out_stride, int wide) {
    const int row = ids ? ids[blockIdx.x] - first : first + (int)blockIdx.x;
    const bool here = row >= 0 && row < shape.rows;
    const unsigned char* from = weights + (here ? row : 0) * shape.stride;
    T* to = out + blockIdx.x * out_stride;
    const int end = shape.skip + shape.cols;
    for (int at = shape.skip / 8 * 8 + 8 * threadIdx.x; at < end; at += 8 * blockDim.x) {
        float v[8] = {};
        if (here) Blocks<Format>::eight(from, at, end, wide, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = __fmul_rn(v[j], factor);
        const int col = at - shape.skip;
        if (wide) {
            store8(to + col, v);
            continue;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (col + j >= 0 && col + j < shape.cols) to[col + j] = from_f32<T>(v[j]);
        }
    }
}

}  // namespace

#define MATVEC(Q, X, M, Format, type)                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP) matvec_##Q##_##X##_##M(            \
        const unsigned char* weights, const type* x, void* out, int rows, int cols, int skip,     \
        long long stride, int m, long long out_stride, int out_f32, int accumulate, int parts,    \
        int wide) {                                                                               \
        matvec<Blocks<Format>, M>(weights, x, out, {rows, cols, skip, stride}, m, out_stride,     \
                                  out_f32, accumulate, parts, wide);                              \
    }                                                                                             \
    EXPORT_KERNEL(matvec_##Q##_##X##_##M)

#define KERNELS_OF_TYPE(Q, X, Format, type)                                                       \
    MATVEC(Q, X, 1, Format, type)                                                                 \
    MATVEC(Q, X, 2, Format, type)                                                                 \
    MATVEC(Q, X, 4, Format, type)                                                                 \
    MATVEC(Q, X, 8, Format, type)                                                                 \
    extern "C" __global__ void dequantize_##Q##_##X(                                              \
        const unsigned char* weights, int rows, int cols, int skip, long long stride,             \
        const int* ids, int first, float factor, type* out, long long out_stride, int wide) {     \
        dequantize<Format>(weights, {rows, cols, skip, stride}, ids, first, factor, out,          \
                           out_stride, wide);                                                     \
    }                                                                                             \
    EXPORT_KERNEL(dequantize_##Q##_##X)

#define KERNELS(Q, Format)                     \
    KERNELS_OF_TYPE(Q, f32, Format, float)     \
    KERNELS_OF_TYPE(Q, f16, Format, f16)       \
    KERNELS_OF_TYPE(Q, bf16, Format, bf16)

KERNELS(q4_0, Q4_0)
KERNELS(q4_1, Q4_1)
KERNELS(q5_0, Q5_0)
KERNELS(q5_1, Q5_1)
KERNELS(q8_0, Q8_0)
KERNELS(q2_k, Q2_K)
KERNELS(q3_k, Q3_K)
KERNELS(q4_k, Q4_K)
KERNELS(q5_k, Q5_K)
KERNELS(q6_k, Q6_K)
