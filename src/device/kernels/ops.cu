// Row-wise and elementwise kernels: embedding look-up, norms, activations, residual sums,
// rows picked and added. All are bound by memory: each value is read and written once, eight
// values (16 bytes of a 2-byte type) an access where addresses allow it, which the host says
// by `wide`. A row's result depends on its own values and its width only.

#include "activation.cuh"

namespace {

// ---- eight values at a time --------------------------------------------------------------

// Values `at .. at + 8` of `len`; zeros beyond the end.
template <typename T>
__device__ void load_piece(const T* from, long long at, long long len, int wide, float (&v)[8]) {
    if (wide) {
        load8(from + at, v);
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = at + j < len ? to_f32(from[at + j]) : 0.0f;
}

template <typename T>
__device__ void store_piece(T* to, long long at, long long len, int wide, const float (&v)[8]) {
    if (wide) {
        store8(to + at, v);
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (at + j < len) to[at + j] = from_f32<T>(v[j]);
    }
}

// The first piece of this thread in a grid-stride loop over values, and its step.
__device__ long long first_piece() {
    return 8ll * (blockIdx.x * (long long)blockDim.x + threadIdx.x);
}

__device__ long long piece_step() { return 8ll * gridDim.x * (long long)blockDim.x; }

// ---- embedding ---------------------------------------------------------------------------

// One block a row of `out`.
template <typename T>
__device__ void embed(const T* table, const int* ids, float* out, int first_id, int rows, int width,
                      float factor, int wide) {
    const int row = ids[blockIdx.x] - first_id;
    const bool here = row >= 0 && row < rows;
    const T* from = table + (long long)(here ? row : 0) * width;
    float* to = out + (long long)blockIdx.x * width;
    for (int at = 8 * threadIdx.x; at < width; at += 8 * blockDim.x) {
        float v[8] = {};
        if (here) load_piece(from, at, width, wide, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] *= factor;
        store_piece(to, at, width, wide, v);
    }
}

// ---- norms -------------------------------------------------------------------------------

// Pieces of a row that a thread keeps in registers: rows of 16 values a thread of the block.
constexpr int HELD = 2;

using Held = float[HELD][8];

__device__ int held_at(int piece) { return 8 * (piece * blockDim.x + threadIdx.x); }

template <typename T>
__device__ void load_row(const T* row, int width, int wide, Held& v) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (held_at(i) < width) {
            load_piece(row, held_at(i), width, wide, v[i]);
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) v[i][j] = 0.0f;
        }
    }
}

template <typename T>
__device__ void store_row(T* row, int width, int wide, const Held& v) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (held_at(i) < width) store_piece(row, held_at(i), width, wide, v[i]);
    }
}

// v += row; loaded here and not before, as two rows held would leave no room for 1024 threads.
template <typename T>
__device__ void add_row(const T* row, int width, int wide, Held& v) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (held_at(i) >= width) continue;
        float from[8];
        load_piece(row, held_at(i), width, wide, from);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[i][j] += from[j];
    }
}

// The sum of squares of the distances to `mean` of a row's values.
__device__ float square_sum(const Held& v, int width, float mean, float* shared) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float d = held_at(i) + j < width ? v[i][j] - mean : 0.0f;
            sum += d * d;
        }
    }
    return block_sum(sum, shared);
}

__device__ float row_sum(const Held& v, float* shared) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += v[i][j];
    }
    return block_sum(sum, shared);
}

// RMS norm, or layer norm where there is a bias.
__device__ void normalise(Held& v, const float* weight, const float* bias, float eps, int width,
                          int wide, float* shared) {
    const float mean = bias ? row_sum(v, shared) / width : 0.0f;
    const float scale = 1.0f / sqrtf(square_sum(v, width, mean, shared) / width + eps);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (held_at(i) >= width) continue;
        float w[8], b[8] = {};
        load_piece(weight, held_at(i), width, wide, w);
        if (bias) load_piece(bias, held_at(i), width, wide, b);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[i][j] = (v[i][j] - mean) * scale * w[j] + b[j];
    }
}

// out = norm(x), one block a row.
template <typename X, typename O>
__device__ void norm(const X* x, const float* weight, const float* bias, float eps, O* out, int width,
                     int wide) {
    __shared__ float shared[32];
    const long long row = blockIdx.x * (long long)width;
    Held v;
    load_row(x + row, width, wide, v);
    normalise(v, weight, bias, eps, width, wide, shared);
    store_row(out + row, width, wide, v);
}

// x += y; out = norm(x).
template <typename Y, typename O>
__device__ void add_norm(const Y* y, float* x, const float* weight, const float* bias, float eps,
                         O* out, int width, int wide) {
    __shared__ float shared[32];
    const long long row = blockIdx.x * (long long)width;
    Held v;
    load_row(y + row, width, wide, v);
    add_row(x + row, width, wide, v);
    store_row(x + row, width, wide, v);
    normalise(v, weight, bias, eps, width, wide, shared);
    store_row(out + row, width, wide, v);
}

// x += post(y); returns the new row of x.
template <typename Y>
__device__ void post_norm(const Y* y, const float* weight, const float* bias, float eps, float* x,
                          int width, int wide, float* shared, Held& sum) {
    load_row(y, width, wide, sum);
    normalise(sum, weight, bias, eps, width, wide, shared);
    add_row(x, width, wide, sum);
    store_row(x, width, wide, sum);
}

template <typename Y>
__device__ void norm_add(const Y* y, const float* weight, const float* bias, float eps, float* x,
                         int width, int wide) {
    __shared__ float shared[32];
    const long long row = blockIdx.x * (long long)width;
    Held sum;
    post_norm(y + row, weight, bias, eps, x + row, width, wide, shared, sum);
}

// x += post(y); out = next(x).
template <typename Y, typename O>
__device__ void norm_add_norm(const Y* y, const float* post_weight, const float* post_bias,
                              float post_eps, float* x, const float* next_weight,
                              const float* next_bias, float next_eps, O* out, int width, int wide) {
    __shared__ float shared[32];
    const long long row = blockIdx.x * (long long)width;
    Held sum;
    post_norm(y + row, post_weight, post_bias, post_eps, x + row, width, wide, shared, sum);
    normalise(sum, next_weight, next_bias, next_eps, width, wide, shared);
    store_row(out + row, width, wide, sum);
}

// ---- activations -------------------------------------------------------------------------

// `gate` and `up` are rows of `inner` values, `stride` values apart.
template <typename T>
__device__ void gated(int kind, const T* gate, const T* up, T* out, int rows, int inner,
                      long long stride, int wide) {
    const int pieces = (inner + 7) / 8;
    const long long total = (long long)rows * pieces;
    for (long long i = first_piece() / 8; i < total; i += piece_step() / 8) {
        const long long row = i / pieces;
        const int at = 8 * (int)(i - row * pieces);
        float g[8], u[8];
        load_piece(gate + row * stride, at, inner, wide, g);
        load_piece(up + row * stride, at, inner, wide, u);
#pragma unroll
        for (int j = 0; j < 8; ++j) g[j] = activation(kind, g[j]) * u[j];
        store_piece(out + row * inner, at, inner, wide, g);
    }
}

template <typename T>
__device__ void activate(int kind, const T* x, T* out, long long len, int wide) {
    for (long long at = first_piece(); at < len; at += piece_step()) {
        float v[8];
        load_piece(x, at, len, wide, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = activation(kind, v[j]);
        store_piece(out, at, len, wide, v);
    }
}

// ---- sums, factors, types ----------------------------------------------------------------

template <typename T>
__device__ void add_bias(T* x, const float* bias, int rows, int width, int wide) {
    const int pieces = (width + 7) / 8;
    const long long total = (long long)rows * pieces;
    for (long long i = first_piece() / 8; i < total; i += piece_step() / 8) {
        const long long row = i / pieces;
        const int at = 8 * (int)(i - row * pieces);
        float v[8], b[8];
        load_piece(x + row * width, at, width, wide, v);
        load_piece(bias, at, width, wide, b);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] += b[j];
        store_piece(x + row * width, at, width, wide, v);
    }
}

template <typename Y>
__device__ void add(const Y* y, float* x, long long len, int wide) {
    for (long long at = first_piece(); at < len; at += piece_step()) {
        float v[8], sum[8];
        load_piece(y, at, len, wide, v);
        load_piece(x, at, len, wide, sum);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += v[j];
        store_piece(x, at, len, wide, sum);
    }
}

template <typename T>
__device__ void scale(T* x, float factor, long long len, int wide) {
    for (long long at = first_piece(); at < len; at += piece_step()) {
        float v[8];
        load_piece(x, at, len, wide, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] *= factor;
        store_piece(x, at, len, wide, v);
    }
}

template <typename From, typename To>
__device__ void convert(const From* from, To* to, long long len, int wide) {
    for (long long at = first_piece(); at < len; at += piece_step()) {
        float v[8];
        load_piece(from, at, len, wide, v);
        store_piece(to, at, len, wide, v);
    }
}

// ---- rows picked and added ---------------------------------------------------------------

// Rows of `units` units of any type; one block a row of `out`.
template <typename Unit>
__device__ void gather_rows(const Unit* from, const int* indices, Unit* out, int rows, int units,
                            Unit zero) {
    const int index = indices[blockIdx.x];
    const bool here = index >= 0 && index < rows;
    const Unit* row = from + (long long)(here ? index : 0) * units;
    Unit* to = out + (long long)blockIdx.x * units;
    for (int at = threadIdx.x; at < units; at += blockDim.x) to[at] = here ? row[at] : zero;
}

// One block a row of `from`; no two have the same row to add to.
template <typename T>
__device__ void scatter_add_rows(const T* from, const int* indices, const float* factors, float* to,
                                 int rows, int width, int wide) {
    const int index = indices[blockIdx.x];
    if (index < 0 || index >= rows) return;
    const float factor = factors ? factors[blockIdx.x] : 1.0f;
    const T* row = from + (long long)blockIdx.x * width;
    float* sum = to + (long long)index * width;
    for (int at = 8 * threadIdx.x; at < width; at += 8 * blockDim.x) {
        float v[8], s[8];
        load_piece(row, at, width, wide, v);
        load_piece(sum, at, width, wide, s);
#pragma unroll
        for (int j = 0; j < 8; ++j) s[j] += factor * v[j];
        store_piece(sum, at, width, wide, s);
    }
}

}  // namespace

// ---- the kernels -------------------------------------------------------------------------

#define KERNELS_OF_ONE(S, T)                                                                      \
    extern "C" __global__ void embed_##S(const T* table, const int* ids, float* out, int first_id, \
                                         int rows, int width, float factor, int wide) {           \
        embed(table, ids, out, first_id, rows, width, factor, wide);                              \
    }                                                                                             \
    EXPORT_KERNEL(embed_##S)                                                                      \
    extern "C" __global__ void __launch_bounds__(1024) norm_add_##S(const T* y, const float* weight, const float* bias,   \
                                            float eps, float* x, int width, int wide) {           \
        norm_add(y, weight, bias, eps, x, width, wide);                                           \
    }                                                                                             \
    EXPORT_KERNEL(norm_add_##S)                                                                   \
    extern "C" __global__ void gated_##S(int kind, const T* gate, const T* up, T* out, int rows,  \
                                         int inner, long long stride, int wide) {                 \
        gated(kind, gate, up, out, rows, inner, stride, wide);                                    \
    }                                                                                             \
    EXPORT_KERNEL(gated_##S)                                                                      \
    extern "C" __global__ void activate_##S(int kind, const T* x, T* out, long long len,          \
                                            int wide) {                                           \
        activate(kind, x, out, len, wide);                                                        \
    }                                                                                             \
    EXPORT_KERNEL(activate_##S)                                                                   \
    extern "C" __global__ void add_bias_##S(T* x, const float* bias, int rows, int width,         \
                                            int wide) {                                           \
        add_bias(x, bias, rows, width, wide);                                                     \
    }                                                                                             \
    EXPORT_KERNEL(add_bias_##S)                                                                   \
    extern "C" __global__ void add_##S(const T* y, float* x, long long len, int wide) {           \
        add(y, x, len, wide);                                                                     \
    }                                                                                             \
    EXPORT_KERNEL(add_##S)                                                                        \
    extern "C" __global__ void scale_##S(T* x, float factor, long long len, int wide) {           \
        scale(x, factor, len, wide);                                                              \
    }                                                                                             \
    EXPORT_KERNEL(scale_##S)                                                                      \
    extern "C" __global__ void scatter_add_rows_##S(const T* from, const int* indices,            \
                                                    const float* factors, float* to, int rows,    \
                                                    int width, int wide) {                        \
        scatter_add_rows(from, indices, factors, to, rows, width, wide);                          \
    }                                                                                             \
    EXPORT_KERNEL(scatter_add_rows_##S)

KERNELS_OF_ONE(f32, float)
KERNELS_OF_ONE(f16, f16)
KERNELS_OF_ONE(bf16, bf16)

#define KERNELS_OF_TWO(A, B, X, O)                                                                 \
    extern "C" __global__ void __launch_bounds__(1024) norm_##A##_##B(const X* x, const float* weight, const float* bias,  \
                                              float eps, O* out, int width, int wide) {            \
        norm(x, weight, bias, eps, out, width, wide);                                              \
    }                                                                                              \
    EXPORT_KERNEL(norm_##A##_##B)                                                                  \
    extern "C" __global__ void __launch_bounds__(1024) add_norm_##A##_##B(const X* y, float* x, const float* weight,       \
                                                  const float* bias, float eps, O* out, int width, \
                                                  int wide) {                                      \
        add_norm(y, x, weight, bias, eps, out, width, wide);                                       \
    }                                                                                              \
    EXPORT_KERNEL(add_norm_##A##_##B)                                                              \
    extern "C" __global__ void __launch_bounds__(1024) norm_add_norm_##A##_##B(                                            \
        const X* y, const float* post_weight, const float* post_bias, float post_eps, float* x,    \
        const float* next_weight, const float* next_bias, float next_eps, O* out, int width,       \
        int wide) {                                                                                \
        norm_add_norm(y, post_weight, post_bias, post_eps, x, next_weight, next_bias, next_eps,    \
                      out, width, wide);                                                           \
    }                                                                                              \
    EXPORT_KERNEL(norm_add_norm_##A##_##B)                                                         \
    extern "C" __global__ void convert_##A##_##B(const X* from, O* to, long long len, int wide) {  \
        convert(from, to, len, wide);                                                              \
    }                                                                                              \
    EXPORT_KERNEL(convert_##A##_##B)

KERNELS_OF_TWO(f32, f32, float, float)
KERNELS_OF_TWO(f32, f16, float, f16)
KERNELS_OF_TWO(f32, bf16, float, bf16)
KERNELS_OF_TWO(f16, f32, f16, float)
KERNELS_OF_TWO(f16, f16, f16, f16)
KERNELS_OF_TWO(f16, bf16, f16, bf16)
KERNELS_OF_TWO(bf16, f32, bf16, float)
KERNELS_OF_TWO(bf16, f16, bf16, f16)
KERNELS_OF_TWO(bf16, bf16, bf16, bf16)

// cap * tanh(x / cap)
extern "C" __global__ void softcap(float* x, float cap, long long len, int wide) {
    const float inverse = 1.0f / cap;
    for (long long at = first_piece(); at < len; at += piece_step()) {
        float v[8];
        load_piece(x, at, len, wide, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = cap * tanhf(v[j] * inverse);
        store_piece(x, at, len, wide, v);
    }
}
EXPORT_KERNEL(softcap)

extern "C" __global__ void gather_rows_16(const uint4* from, const int* indices, uint4* out, int rows,
                                          int units) {
    gather_rows(from, indices, out, rows, units, make_uint4(0, 0, 0, 0));
}
EXPORT_KERNEL(gather_rows_16)

extern "C" __global__ void gather_rows_2(const unsigned short* from, const int* indices,
                                         unsigned short* out, int rows, int units) {
    gather_rows(from, indices, out, rows, units, (unsigned short)0);
}
EXPORT_KERNEL(gather_rows_2)
