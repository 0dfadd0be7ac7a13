// Products of many rows of 16-bit activations with rows of weights on the tensor cores. A block
// of threads brings 128 rows by 64 columns of the weights to shared memory, as values rounded to
// the type of the activations, and multiplies from there.
#pragma once

#include "matvec.cuh"

namespace {

// Rows of weights of a block, columns of a step, values from row to row in shared memory
// (8 more than there are: rows fall into different banks).
constexpr int TILE_ROWS = 128, TILE_COLS = 64, TILE_STRIDE = TILE_COLS + 8;
constexpr int TILE_THREADS = TILE_ROWS / 16 * WARP;
// Pieces of eight values of a step's row.
constexpr int TILE_PIECES = TILE_COLS / 8;

// A warp's sums: TILES times 16 rows of activations by 16 rows of weights.
template <int TILES>
struct Sums {
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> tile[TILES];
};

// `count` rows of activations, one after another.
template <typename T>
struct InOrder {
    const T* x;
    int cols, count;
    __device__ const T* row(int i) const { return x + (long long)i * cols; }
};

// Eight values of a row of weights, to 16-byte aligned shared memory.
template <typename Weights, typename T>
struct Piece {
    static __device__ __forceinline__ void load(const unsigned char* row, int at, int end, T* to) {
        float v[8];
        Weights::eight(row, at, end, 1, v);
        store8(to, v);
    }
};
template <typename T>
struct Piece<Dense<T>, T> {
    static __device__ __forceinline__ void load(const unsigned char* row, int at, int, T* to) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(row + at * sizeof(T));
    }
};

// Dynamic shared memory: TILE_ROWS and then 16 * TILES rows of TILE_STRIDE values.
//
// The sums over stored columns `begin .. end` for weight rows `first ..` of this block and 16 *
// TILES rows of activations; what is not there counts as zeros. Columns, skip and addresses are
// multiples of eight values. All threads leave with the shared memory free.
template <typename Weights, int TILES, typename T, typename Rows>
__device__ __forceinline__ void multiply_tiles(const unsigned char* weights, const Shape& shape,
                                               int first, int begin, int end, const Rows& rows,
                                               T* weight_tile, T* x_tile, Sums<TILES>& sums) {
    const int warp = threadIdx.x / WARP;
    const uint4 zeros = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < TILES; ++i) wmma::fill_fragment(sums.tile[i], 0.0f);
    for (int start = begin; start < end; start += TILE_COLS) {
#pragma unroll
        for (int pass = 0; pass < TILE_ROWS * TILE_PIECES / TILE_THREADS; ++pass) {
            const int i = pass * TILE_THREADS + threadIdx.x;
            const int row = i / TILE_PIECES, col = 8 * (i % TILE_PIECES), at = start + col;
            T* to = weight_tile + row * TILE_STRIDE + col;
            if (first + row < shape.rows && at < end) {
                Piece<Weights, T>::load(weights + (first + row) * shape.stride, at, end, to);
            } else {
                *reinterpret_cast<uint4*>(to) = zeros;
            }
        }
#pragma unroll
        for (int pass = 0; pass < 16 * TILES * TILE_PIECES / TILE_THREADS; ++pass) {
            const int i = pass * TILE_THREADS + threadIdx.x;
            const int row = i / TILE_PIECES, col = 8 * (i % TILE_PIECES), at = start + col;
            uint4 v = zeros;
            if (row < rows.count && at < end) {
                v = *reinterpret_cast<const uint4*>(rows.row(row) + at - shape.skip);
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
                wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> x;
                wmma::load_matrix_sync(x, x_tile + i * 16 * TILE_STRIDE + k, TILE_STRIDE);
                wmma::mma_sync(sums.tile[i], x, w, sums.tile[i]);
            }
        }
        __syncthreads();
    }
}

}  // namespace
