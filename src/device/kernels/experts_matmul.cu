// The products of routed experts with the rows that chose them, on the tensor cores: all
// experts in one launch, each with its own list of rows. An expert's weights stream once for
// every 16 * TILES of its rows.

#include "weight_tiles.cuh"

namespace {

// Rows of activations that pairs name.
template <typename T>
struct Listed {
    const T* x;
    const int* pairs;
    int divisor, cols, count;
    __device__ const T* row(int i) const { return x + (long long)(pairs[i] / divisor) * cols; }
};

// Sixteen by sixteen sums of a warp to the rows of `out` that pairs name, by shared memory.
template <typename O>
__device__ void store_listed(const float* sums, const int* pairs, int count, O* out,
                             long long out_stride, int cols) {
    const int lane = threadIdx.x % WARP, row = lane / 2, first = lane % 2 * 8;
    if (row >= count) return;
    O* to = out + pairs[row] * out_stride;
#pragma unroll
    for (int j = first; j < first + 8; ++j) {
        if (j < cols) to[j] = from_f32<O>(sums[row * 16 + j]);
    }
}

// out[pair] = weights · x[pair / divisor] for the pairs of each expert that has rows
// (blockIdx.y). Several matrices of an expert (blockIdx.z) have their addresses `experts` apart,
// and their results beside each other; those are f32 or of the type of x.
template <typename Weights, int TILES, typename T>
__device__ void matmul_experts(const unsigned long long* addresses, const int* active,
                               const int* counts, const int* pairs, int list_stride, int divisor,
                               int experts, const T* x, void* out, int out_f32,
                               const Shape& shape, long long out_stride) {
    DYNAMIC_SHARED(T, weight_tile);
    T* x_tile = weight_tile + TILE_ROWS * TILE_STRIDE;
    const int expert = active[blockIdx.y];
    if (expert < 0) return;
    const unsigned long long address = addresses[blockIdx.z * experts + expert];
    const auto* weights = reinterpret_cast<const unsigned char*>(address);
    const int* list = pairs + (long long)expert * list_stride;
    const int first = blockIdx.x * TILE_ROWS, warp = threadIdx.x / WARP, count = counts[expert];
    const int own = first + warp * 16, col = blockIdx.z * shape.rows + own;
    // The weights' tile is free after a product: 16 by 16 sums a warp fit.
    float* staged = reinterpret_cast<float*>(weight_tile) + warp * 256;
    for (int done = 0; done < count; done += 16 * TILES) {
        Sums<TILES> sums;
        const Listed<T> rows{x, list + done, divisor, shape.cols, count - done};
        multiply_tiles<Weights, TILES>(weights, shape, first, shape.skip, shape.skip + shape.cols,
                                       rows, weight_tile, x_tile, sums);
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            wmma::store_matrix_sync(staged, sums.tile[i], 16, wmma::mem_row_major);
            __syncwarp();
            const int from = done + 16 * i, left = count - from, cols = shape.rows - own;
            if (out_f32) {
                store_listed(staged, list + from, left, static_cast<float*>(out) + col, out_stride, cols);
            } else {
                store_listed(staged, list + from, left, static_cast<T*>(out) + col, out_stride, cols);
            }
            __syncwarp();
        }
        __syncthreads();
    }
}

}  // namespace

#define MATMUL(W, X, TILES, Weights, type)                                                       \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) experts_matmul_##W##_##X##_##TILES( \
        const unsigned long long* addresses, const int* active, const int* counts,               \
        const int* pairs, int list_stride, int divisor, int experts, const type* x, void* out,   \
        int out_f32, int rows, int cols, int skip, long long stride, long long out_stride) {     \
        matmul_experts<Weights, TILES>(addresses, active, counts, pairs, list_stride, divisor,   \
                                       experts, x, out, out_f32, {rows, cols, skip, stride},     \
                                       out_stride);                                              \
    }                                                                                            \
    EXPORT_KERNEL(experts_matmul_##W##_##X##_##TILES)

#define MATMULS(W, X, Weights, type)   \
    MATMUL(W, X, 2, Weights, type)     \
    MATMUL(W, X, 4, Weights, type)

#define KERNELS(X, type)                      \
    MATMULS(X, X, Dense<type>, type)          \
    MATMULS(q4_0, X, Blocks<Q4_0>, type)      \
    MATMULS(q4_1, X, Blocks<Q4_1>, type)      \
    MATMULS(q5_0, X, Blocks<Q5_0>, type)      \
    MATMULS(q5_1, X, Blocks<Q5_1>, type)      \
    MATMULS(q8_0, X, Blocks<Q8_0>, type)      \
    MATMULS(q2_k, X, Blocks<Q2_K>, type)      \
    MATMULS(q3_k, X, Blocks<Q3_K>, type)      \
    MATMULS(q4_k, X, Blocks<Q4_K>, type)      \
    MATMULS(q5_k, X, Blocks<Q5_K>, type)      \
    MATMULS(q6_k, X, Blocks<Q6_K>, type)

KERNELS(f16, f16)
#ifdef FARM_BF16_TENSOR_CORES
KERNELS(bf16, bf16)
#endif
