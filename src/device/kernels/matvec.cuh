// Products of a few rows of activations with a matrix of weights, of floats or of ggml's
// blocks, whose values are made in registers. Bound by the memory that the weights stream
// from: a warp takes ROWS rows of them, a lane eight values of each at a time, which meet
// all rows of activations (those come out of the caches). Sums are f32, in an order that
// depends on the shape of the matrix only.
//
// Activations stay what they are: rounded to 8 bits for integer dot products (as llama.cpp
// has it) or to FP8, results would no longer be those of the weights' values.
#pragma once

#include "common.cuh"

namespace {

// ---- weights: eight values of a row, from stored value `at`, a multiple of eight ----------

// Contiguous floats; `wide` says that rows are aligned and `end`, their length, a multiple of 8.
template <typename T>
struct Dense {
    static constexpr int UNROLL = 4;
    static __device__ __forceinline__ void eight(const unsigned char* row, int at, int end, int wide,
                                                 float (&v)[8]) {
        const T* from = reinterpret_cast<const T*>(row) + at;
        if (wide) {
            load8(from, v);
            return;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = at + j < end ? to_f32(from[j]) : 0.0f;
    }
};

// An integer below 2^23, less `zero`, exactly: its bits are those of 2^23 + q without the
// exponent's. Cheaper than a conversion.
__device__ __forceinline__ float number(unsigned q, float zero) {
    return __uint_as_float(0x4b000000u | q) - (8388608.0f + zero);
}

// As `number` of byte j of a word, which one instruction puts under the exponent.
__device__ __forceinline__ float byte_number(unsigned word, int j, float zero) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7650u | j)) - (8388608.0f + zero);
}

__device__ __forceinline__ float half_at(const unsigned char* at) {
    return to_f32(*reinterpret_cast<const f16*>(at));
}

// Eight bytes that are ALIGN-byte aligned.
template <int ALIGN>
__device__ __forceinline__ uint2 bytes8(const unsigned char* at) {
    if (ALIGN >= 8) return *reinterpret_cast<const uint2*>(at);
    if (ALIGN == 4) {
        const unsigned* words = reinterpret_cast<const unsigned*>(at);
        return make_uint2(words[0], words[1]);
    }
    const unsigned short* halves = reinterpret_cast<const unsigned short*>(at);
    return make_uint2(halves[0] | (unsigned)halves[1] << 16, halves[2] | (unsigned)halves[3] << 16);
}

// The values of eight integers (bytes) of a group: (q - zero) * scale, rounded as ggml does.
__device__ __forceinline__ void scaled(uint2 q, float zero, float scale, float (&v)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        v[j] = __fmul_rn(byte_number(j < 4 ? q.x : q.y, j % 4, zero), scale);
    }
}

// q * scale - min, each operation rounded.
__device__ __forceinline__ void scaled_less(uint2 q, float scale, float min, float (&v)[8]) {
    scaled(q, 0.0f, scale, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = __fsub_rn(v[j], min);
}

__device__ __forceinline__ uint2 masked(uint2 words, int shift, unsigned mask) {
    return make_uint2(words.x >> shift & mask, words.y >> shift & mask);
}

__device__ __forceinline__ uint2 joined(uint2 low, uint2 high) {
    return make_uint2(low.x | high.x, low.y | high.y);
}

// Four bits, each moved to bit 4 of a byte of its own.
__device__ __forceinline__ unsigned spread_fifth(unsigned bits) {
    return (bits & 1) << 4 | (bits & 2) << 11 | (bits & 4) << 18 | (bits & 8) << 25;
}

__device__ __forceinline__ uint2 fifth_bits(unsigned high, int at) {
    return make_uint2(spread_fifth(high >> at), spread_fifth(high >> (at + 4)));
}

// The formats, as src/kernels/quant/format.rs describes them. ALIGN is what their blocks
// are aligned to; `eight` takes a block and the place of the first value in it.

struct Q4_0 {
    static constexpr int LEN = 32, BYTES = 18, ALIGN = 2;
    static __device__ __forceinline__ void eight(const unsigned char* block, int at, float (&v)[8]) {
        const uint2 q = masked(bytes8<2>(block + 2 + at % 16), at < 16 ? 0 : 4, 0x0f0f0f0fu);
        scaled(q, 8.0f, half_at(block), v);
    }
};

struct Q4_1 {
    static constexpr int LEN = 32, BYTES = 20, ALIGN = 4;
    static __device__ __forceinline__ void eight(const unsigned char* block, int at, float (&v)[8]) {
        const uint2 q = masked(bytes8<4>(block + 4 + at % 16), at < 16 ? 0 : 4, 0x0f0f0f0fu);
        scaled_less(q, half_at(block), -half_at(block + 2), v);
    }
};

struct Q5_0 {
    static constexpr int LEN = 32, BYTES = 22, ALIGN = 2;
    static __device__ __forceinline__ void eight(const unsigned char* block, int at, float (&v)[8]) {
        const unsigned short* high = reinterpret_cast<const unsigned short*>(block + 2);
        const uint2 fifth = fifth_bits(high[0] | (unsigned)high[1] << 16, at);
        const uint2 q = masked(bytes8<2>(block + 6 + at % 16), at < 16 ? 0 : 4, 0x0f0f0f0fu);
        scaled(joined(q, fifth), 16.0f, half_at(block), v);
    }
};

struct Q5_1 {
    static constexpr int LEN = 32, BYTES = 24, ALIGN = 8;
    static __device__ __forceinline__ void eight(const unsigned char* block, int at, float (&v)[8]) {
        const uint2 fifth = fifth_bits(*reinterpret_cast<const unsigned*>(block + 4), at);
        const uint2 q = masked(bytes8<8>(block + 8 + at % 16), at < 16 ? 0 : 4, 0x0f0f0f0fu);
        scaled_less(joined(q, fifth), half_at(block), -half_at(block + 2), v);
    }
};

struct Q8_0 {
    static constexpr int LEN = 32, BYTES = 34, ALIGN = 2;
    static __device__ __forceinline__ void eight(const unsigned char* block, int at, float (&v)[8]) {
        uint2 q = bytes8<2>(block + 2 + at);
        q = make_uint2(q.x ^ 0x80808080u, q.y ^ 0x80808080u);
        scaled(q, 128.0f, half_at(block), v);
    }
};

struct Q2_K {
    static constexpr int LEN = 256, BYTES = 84, ALIGN = 4;
    static __device__ __forceinline__ void eight(const unsigned char* block, int at, float (&v)[8]) {
        const unsigned packed = block[at / 16];
        const float scale = __fmul_rn(half_at(block + 80), number(packed & 15, 0.0f));
        const float min = __fmul_rn(half_at(block + 82), number(packed >> 4, 0.0f));
        const uint2 bytes = bytes8<4>(block + 16 + at / 128 * 32 + at % 32);
        scaled_less(masked(bytes, at / 32 % 4 * 2, 0x03030303u), scale, min, v);
    }
};

struct Q3_K {
    static constexpr int LEN = 256, BYTES = 110, ALIGN = 2;
    static __device__ __forceinline__ void eight(const unsigned char* block, int at, float (&v)[8]) {
        const int g = at / 16;
        const unsigned low = block[96 + g % 8] >> (g < 8 ? 0 : 4) & 15;
        const unsigned high = block[104 + g % 4] >> g / 4 * 2 & 3;
        const float scale = __fmul_rn(half_at(block + 108), number(low | high << 4, 32.0f));
        const uint2 two = bytes8<2>(block + 32 + at / 128 * 32 + at % 32);
        const uint2 third = masked(bytes8<2>(block + at % 32), at / 32, 0x01010101u);
        const uint2 q = joined(masked(two, at / 32 % 4 * 2, 0x03030303u),
                               make_uint2(third.x << 2, third.y << 2));
        scaled(q, 4.0f, scale, v);
    }
};

// Scale and minimum of group g of q4_k and q5_k, whose blocks begin alike.
__device__ __forceinline__ void six_bit_scales(const unsigned char* block, int g, float& scale,
                                               float& min) {
    const unsigned char* packed = block + 4;
    unsigned s = packed[g], m = packed[g + 4];
    if (g < 4) {
        s &= 63;
        m &= 63;
    } else {
        // Here packed[g] has the high bits of the minimum, packed[g + 4] the low bits of both.
        const unsigned both = m;
        m = both >> 4 | s >> 6 << 4;
        s = (both & 15) | (unsigned)(packed[g - 4] >> 6) << 4;
    }
    scale = __fmul_rn(half_at(block), number(s, 0.0f));
    min = __fmul_rn(half_at(block + 2), number(m, 0.0f));
}

struct Q4_K {
    static constexpr int LEN = 256, BYTES = 144, ALIGN = 16;
    static __device__ __forceinline__ void eight(const unsigned char* block, int at, float (&v)[8]) {
        float scale, min;
        six_bit_scales(block, at / 32, scale, min);
        const uint2 bytes = bytes8<8>(block + 16 + at / 64 * 32 + at % 32);
        scaled_less(masked(bytes, at % 64 < 32 ? 0 : 4, 0x0f0f0f0fu), scale, min, v);
    }
};

struct Q5_K {
    static constexpr int LEN = 256, BYTES = 176, ALIGN = 16;
    static __device__ __forceinline__ void eight(const unsigned char* block, int at, float (&v)[8]) {
        float scale, min;
        six_bit_scales(block, at / 32, scale, min);
        const uint2 bytes = bytes8<8>(block + 48 + at / 64 * 32 + at % 32);
        const uint2 fifth = masked(bytes8<8>(block + 16 + at % 32), at / 32, 0x01010101u);
        const uint2 q = joined(masked(bytes, at % 64 < 32 ? 0 : 4, 0x0f0f0f0fu),
                               make_uint2(fifth.x << 4, fifth.y << 4));
        scaled_less(q, scale, min, v);
    }
};

struct Q6_K {
    static constexpr int LEN = 256, BYTES = 210, ALIGN = 2;
    static __device__ __forceinline__ void eight(const unsigned char* block, int at, float (&v)[8]) {
        const int half = at / 128, quarter = at / 32 % 4, l = at % 32;
        const float scale = __fmul_rn(half_at(block + 208), number(block[192 + at / 16] ^ 128u, 128.0f));
        const uint2 low = bytes8<2>(block + half * 64 + quarter % 2 * 32 + l);
        const uint2 high = masked(bytes8<2>(block + 128 + half * 32 + l), quarter * 2, 0x03030303u);
        const uint2 q = joined(masked(low, quarter < 2 ? 0 : 4, 0x0f0f0f0fu),
                               make_uint2(high.x << 4, high.y << 4));
        scaled(q, 32.0f, scale, v);
    }
};

// A row of blocks.
template <typename Format>
struct Blocks {
    static constexpr int UNROLL = 1;
    static __device__ __forceinline__ void eight(const unsigned char* row, int at, int, int,
                                                 float (&v)[8]) {
        Format::eight(row + at / Format::LEN * Format::BYTES, at % Format::LEN, v);
    }
};

// ---- products ----------------------------------------------------------------------------

// Rows of weights that a warp takes at once.
constexpr int ROWS = 2;

// Rows of weights: `stride` bytes apart, `cols` values each after the first `skip`.
struct Shape {
    int rows, cols, skip;
    long long stride;
};

// Adds to `sum` the products of weight rows `first ..` with M rows of x, those values that
// fall to warp `part` of the `parts` that share the rows. Rows beyond the last are the last
// again. `wide` says that skip and cols are multiples of eight and all rows aligned.
template <typename Weights, int M, typename X>
__device__ __forceinline__ void products(const unsigned char* weights, const Shape& shape, int first,
                                         const X* const (&x)[M], int part, int parts, int wide,
                                         float (&sum)[ROWS][M]) {
    const unsigned char* row[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) row[r] = weights + min(first + r, shape.rows - 1) * shape.stride;
    const int begin = shape.skip / 8 * 8 + 8 * (part * WARP + (int)threadIdx.x % WARP);
    const int end = shape.skip + shape.cols;
#pragma unroll Weights::UNROLL
    for (int at = begin; at < end; at += 8 * WARP * parts) {
        float w[ROWS][8];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) Weights::eight(row[r], at, end, wide, w[r]);
        const int col = at - shape.skip;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            float v[8];
            if (wide) {
                load8(x[m] + col, v);
            } else {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const bool inside = col + j >= 0 && col + j < shape.cols;
                    v[j] = inside ? to_f32(x[m][col + j]) : 0.0f;
                    // A neighbour's infinity would not vanish by a zero.
                    if (m == 0 && !inside) {
#pragma unroll
                        for (int r = 0; r < ROWS; ++r) w[r][j] = 0.0f;
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[r][m] += w[r][j] * v[j];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int m = 0; m < M; ++m) sum[r][m] = warp_sum(sum[r][m]);
    }
}

// Warps of a block.
constexpr int WARPS = 8;

// The sums of the `parts` warps that share rows, in the first of them; parts is the same
// for all threads of the block.
template <int M>
__device__ __forceinline__ void add_parts(int parts, float (&sum)[ROWS][M]) {
    __shared__ float shared[WARPS][ROWS * M];
    if (parts == 1) return;
    const int warp = threadIdx.x / WARP;
    __syncthreads();
    if (threadIdx.x % WARP == 0) {
#pragma unroll
        for (int i = 0; i < ROWS * M; ++i) shared[warp][i] = sum[i / M][i % M];
    }
    __syncthreads();
    if (warp % parts == 0) {
        for (int part = 1; part < parts; ++part) {
#pragma unroll
            for (int i = 0; i < ROWS * M; ++i) sum[i / M][i % M] += shared[warp + part][i];
        }
    }
}

// out[i * out_stride + r] (+)= x[i] · weights[r] for `m` rows of x, at most M. A block has
// WARPS warps, of which `parts` share ROWS rows of weights. `out` is f32 or of the type of x.
template <typename Weights, int M, typename X>
__device__ void matvec(const unsigned char* weights, const X* x, void* out, const Shape& shape, int m,
                       long long out_stride, int out_f32, int accumulate, int parts, int wide) {
    const int warp = threadIdx.x / WARP;
    const int first = (blockIdx.x * (WARPS / parts) + warp / parts) * ROWS;
    const X* xs[M];
#pragma unroll
    for (int i = 0; i < M; ++i) xs[i] = x + (long long)min(i, m - 1) * shape.cols;
    float sum[ROWS][M] = {};
    products<Weights, M>(weights, shape, first, xs, warp % parts, parts, wide, sum);
    add_parts<M>(parts, sum);
    if (warp % parts != 0 || threadIdx.x % WARP != 0) return;
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (i >= m || first + r >= shape.rows) continue;
            const long long at = i * out_stride + first + r;
            if (out_f32) {
                float* to = static_cast<float*>(out) + at;
                *to = accumulate ? *to + sum[r][i] : sum[r][i];
            } else {
                X* to = static_cast<X*>(out) + at;
                *to = from_f32<X>(accumulate ? to_f32(*to) + sum[r][i] : sum[r][i]);
            }
        }
    }
}

}  // namespace
