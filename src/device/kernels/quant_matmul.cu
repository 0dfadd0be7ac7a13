// Up to 128 rows of 16-bit activations times ggml's blocks on the tensor cores: a batch's
// decode. A block of threads writes the values of 128 rows by 64 columns of the weights to
// shared memory, rounded to the type of the activations, and multiplies from there, so that
// the weights stream once, as blocks. Bound by the taking apart of blocks, about ten
// instructions a value, which every value needs once however many rows there are.

#include "weight_tiles.cuh"

namespace {

// partial[blockIdx.y][i][r] = x[i] · weights[r] over the `step` columns of this part of them,
// for 16 * TILES rows i, those from m on zeros, and rows r up to a multiple of TILE_ROWS.
template <typename Format, int TILES, typename T>
__device__ void matmul_blocks(const unsigned char* weights, const T* x, float* partial,
                              const Shape& shape, int m, int step) {
    DYNAMIC_SHARED(T, weight_tile);
    T* x_tile = weight_tile + TILE_ROWS * TILE_STRIDE;
    const int first = blockIdx.x * TILE_ROWS, begin = shape.skip + blockIdx.y * step;
    Sums<TILES> sums;
    const InOrder<T> rows{x, shape.cols, m};
    multiply_tiles<Blocks<Format>, TILES>(weights, shape, first, begin,
                                          min(begin + step, shape.skip + shape.cols), rows,
                                          weight_tile, x_tile, sums);
    const long long width = (long long)gridDim.x * TILE_ROWS;
    float* to = partial + blockIdx.y * 16ll * TILES * width + first + threadIdx.x / WARP * 16;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        wmma::store_matrix_sync(to + i * 16 * width, sums.tile[i], (unsigned)width,
                                wmma::mem_row_major);
    }
}

// out[i][r] (+)= the sum of the parts; `height` and `width` are those of a part.
template <typename T>
__device__ void add_partial(const float* partial, int parts, int height, int width, T* out, int rows,
                            long long out_stride, int accumulate) {
    const int r = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y;
    if (r >= rows) return;
    const long long part = (long long)height * width;
    T* to = out + i * out_stride + r;
    float sum = accumulate ? to_f32(*to) : 0.0f;
    for (int p = 0; p < parts; ++p) sum += partial[p * part + (long long)i * width + r];
    *to = from_f32<T>(sum);
}

}  // namespace

#define MATMUL(Q, X, TILES, Format, type)                                                        \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) matmul_##Q##_##X##_##TILES(            \
        const unsigned char* weights, const type* x, float* partial, int rows, int cols,         \
        int skip, long long stride, int m, int step) {                                           \
        matmul_blocks<Format, TILES>(weights, x, partial, {rows, cols, skip, stride}, m, step);  \
    }                                                                                            \
    EXPORT_KERNEL(matmul_##Q##_##X##_##TILES)

#define MATMULS(Q, X, Format, type)    \
    MATMUL(Q, X, 2, Format, type)      \
    MATMUL(Q, X, 4, Format, type)      \
    MATMUL(Q, X, 8, Format, type)

#ifdef FARM_BF16_TENSOR_CORES
#define KERNELS(Q, Format)             \
    MATMULS(Q, f16, Format, f16)       \
    MATMULS(Q, bf16, Format, bf16)
#else
#define KERNELS(Q, Format) MATMULS(Q, f16, Format, f16)
#endif

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

#define ADD_PARTIAL(S, type)                                                                     \
    extern "C" __global__ void add_partial_##S(const float* partial, int parts, int height,      \
                                               int width, type* out, int rows,                   \
                                               long long out_stride, int accumulate) {           \
        add_partial(partial, parts, height, width, out, rows, out_stride, accumulate);           \
    }                                                                                            \
    EXPORT_KERNEL(add_partial_##S)

ADD_PARTIAL(f32, float)
ADD_PARTIAL(f16, f16)
ADD_PARTIAL(bf16, bf16)
