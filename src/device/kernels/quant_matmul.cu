// Up to 128 rows of 16-bit activations times ggml's blocks on the tensor cores: a batch's
// decode. A block of threads writes the values of 128 rows by 64 columns of the weights to
// shared memory, rounded to the type of the activations, and multiplies from there, so that
// the weights stream once, as blocks. Bound by the taking apart of blocks, about ten
// instructions a value, which every value needs once however many rows there are.

#include "matvec.cuh"

namespace {

// Rows of weights of a block, columns of a step, values from row to row in shared memory
// (8 more than there are: rows fall into different banks).
constexpr int TILE_ROWS = 128, TILE_COLS = 64, TILE_STRIDE = TILE_COLS + 8;
constexpr int THREADS = TILE_ROWS / 16 * WARP;

// partial[blockIdx.y][i][r] = x[i] · weights[r] over the `step` columns of this part of them,
// for 16 * TILES rows i, those from m on zeros, and rows r up to a multiple of 128. Columns,
// skip and addresses are multiples of eight values.
template <typename Format, int TILES, typename T>
__device__ void matmul_blocks(const unsigned char* weights, const T* x, float* partial,
                              const Shape& shape, int m, int step) {
    __align__(32) __shared__ T weight_tile[TILE_ROWS * TILE_STRIDE];
    __align__(32) __shared__ T x_tile[16 * TILES * TILE_STRIDE];
    const int first = blockIdx.x * TILE_ROWS, warp = threadIdx.x / WARP;
    const int begin = shape.skip + blockIdx.y * step;
    const int end = min(begin + step, shape.skip + shape.cols);
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i) wmma::fill_fragment(sum[i], 0.0f);
    for (int start = begin; start < end; start += TILE_COLS) {
        for (int i = threadIdx.x; i < TILE_ROWS * TILE_COLS / 8; i += THREADS) {
            const int row = i / (TILE_COLS / 8), col = 8 * (i % (TILE_COLS / 8)), at = start + col;
            float v[8] = {};
            if (first + row < shape.rows && at < end) {
                Blocks<Format>::eight(weights + (first + row) * shape.stride, at, end, 1, v);
            }
            store8(weight_tile + row * TILE_STRIDE + col, v);
        }
        for (int i = threadIdx.x; i < 16 * TILES * TILE_COLS / 8; i += THREADS) {
            const int row = i / (TILE_COLS / 8), col = 8 * (i % (TILE_COLS / 8)), at = start + col;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (row < m && at < end) {
                const long long from = (long long)row * shape.cols + at - shape.skip;
                v = *reinterpret_cast<const uint4*>(x + from);
            }
            *reinterpret_cast<uint4*>(x_tile + row * TILE_STRIDE + col) = v;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < TILE_COLS; k += 16) {
            wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> w;
            wmma::load_matrix_sync(w, weight_tile + warp * 16 * TILE_STRIDE + k, TILE_STRIDE);
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> rows;
                wmma::load_matrix_sync(rows, x_tile + i * 16 * TILE_STRIDE + k, TILE_STRIDE);
                wmma::mma_sync(sum[i], rows, w, sum[i]);
            }
        }
        __syncthreads();
    }
    const long long width = (long long)gridDim.x * TILE_ROWS;
    float* to = partial + blockIdx.y * 16ll * TILES * width + first + warp * 16;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        wmma::store_matrix_sync(to + i * 16 * width, sum[i], (unsigned)width, wmma::mem_row_major);
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
    extern "C" __global__ void __launch_bounds__(THREADS) matmul_##Q##_##X##_##TILES(            \
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
