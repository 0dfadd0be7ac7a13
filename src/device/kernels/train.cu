// Kernels of training besides those of a forward pass that generation has too: gradients of norms,
// activations and rotations, attention inside packed segments forward and backward, the loss
// over the vocabulary, dropout. No sum is taken by atomics: the same inputs give the same bits.

#include "common.cuh"

namespace {

// ---- norms of heads, and gradients of norms ----------------------------------------------
//
// A block takes one run of `width` values: a row, or a head of one. Runs lie `per_row` to a
// row of `stride` values. Bound by memory.

__device__ long long run_at(int per_row, int width, int stride) {
    return (long long)(blockIdx.x / per_row) * stride + (long long)(blockIdx.x % per_row) * width;
}

// The mean of a run and 1 / sqrt(mean square distance from it + eps); of an RMS norm the mean
// counts as 0.
template <typename T>
__device__ float2 run_statistics(const T* x, int width, float eps, int centred, float* shared) {
    float mean = 0.0f;
    if (centred) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += to_f32(x[i]);
        mean = block_sum(sum, shared) / width;
    }
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float d = to_f32(x[i]) - mean;
        squares += d * d;
    }
    return make_float2(mean, 1.0f / sqrtf(block_sum(squares, shared) / width + eps));
}

template <typename T>
__device__ void head_norm(const T* x, const float* weight, const float* bias, T* out, int width, int per_row,
                          int x_stride, int out_stride, float eps, int centred) {
    __shared__ float shared[32];
    x += run_at(per_row, width, x_stride);
    out += run_at(per_row, width, out_stride);
    const float2 s = run_statistics(x, width, eps, centred, shared);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float offset = centred ? bias[i] : 0.0f;
        out[i] = from_f32<T>((to_f32(x[i]) - s.x) * s.y * weight[i] + offset);
    }
}

// With g = weight * dy and n = (x - mean) * r: dx = r * (g - mean(g) - n * mean(g * n)), the
// mean of g for a layer norm only. Added to dx, or in its place; dx may be dy.
template <typename T>
__device__ void norm_backward(const T* x, const float* weight, const T* dy, T* dx, int width, int per_row,
                              int x_stride, int d_stride, float eps, int centred, int accumulate) {
    __shared__ float shared[32];
    x += run_at(per_row, width, x_stride);
    dy += run_at(per_row, width, d_stride);
    dx += run_at(per_row, width, d_stride);
    const float2 s = run_statistics(x, width, eps, centred, shared);
    float gradients = 0.0f, products = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float g = weight[i] * to_f32(dy[i]);
        gradients += g;
        products += g * (to_f32(x[i]) - s.x);
    }
    const float level = centred ? block_sum(gradients, shared) / width : 0.0f;
    const float along = s.y * s.y * (block_sum(products, shared) / width);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float g = weight[i] * to_f32(dy[i]);
        const float d = s.y * (g - level - (to_f32(x[i]) - s.x) * along);
        dx[i] = from_f32<T>(accumulate ? to_f32(dx[i]) + d : d);
    }
}

// ---- rotations ---------------------------------------------------------------------------

// Rotates the heads of each row of `x` in place, or back (the transpose, where cos and sin carry
// a factor). A block takes a row. Bound by memory.
template <typename T>
__device__ void turn(T* x, const float* cos, const float* sin, int heads, int stride, int head_dim,
                     int rotary_dim, int interleaved, int back) {
    const int half = rotary_dim / 2;
    x += blockIdx.x * (long long)stride;
    cos += blockIdx.x * (long long)half;
    sin += blockIdx.x * (long long)half;
    for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
        const int pair = i % half;
        T* head = x + i / half * head_dim;
        T* low = head + (interleaved ? 2 * pair : pair);
        T* high = low + (interleaved ? 1 : half);
        const float a = to_f32(*low), b = to_f32(*high);
        const float c = cos[pair], s = back ? -sin[pair] : sin[pair];
        *low = from_f32<T>(a * c - b * s);
        *high = from_f32<T>(b * c + a * s);
    }
}

// ---- activations -------------------------------------------------------------------------

constexpr int SILU = 0, GELU = 1;

// The activation (2: GELU by tanh) and its derivative.
__device__ float2 value_and_slope(int activation, float x) {
    if (activation == SILU) {
        const float s = 1.0f / (1.0f + expf(-x));
        return make_float2(x * s, s + fminf(fmaxf(x, -88.0f), 88.0f) * s * (1.0f - s));
    }
    if (activation == GELU) {
        const float cdf = 0.5f * (1.0f + erff(x * 0.70710678f));
        return make_float2(x * cdf, cdf + x * 0.39894228f * expf(-0.5f * x * x));
    }
    // Beyond 10 nothing changes, but cubes would not be finite.
    const float z = fminf(fmaxf(x, -10.0f), 10.0f);
    const float s = 1.0f / (1.0f + expf(-1.5957692f * z * (1.0f + 0.044715f * z * z)));
    const float rise = z * s * (1.0f - s) * 1.5957692f * (1.0f + 3.0f * 0.044715f * z * z);
    return make_float2(x * s, s + rise);
}

// From d, the gradient of act(gate) * up, those of gate and up. `gate_up` and `d_gate_up` are
// rows of gate | up. A thread takes a value. Bound by memory.
template <typename T>
__device__ void gated_backward(const T* gate_up, const T* d, T* d_gate_up, long long len, int inner,
                               int activation) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < len; i += step) {
        const long long gate = i / inner * 2 * inner + i % inner;
        const float2 a = value_and_slope(activation, to_f32(gate_up[gate]));
        const float dy = to_f32(d[i]);
        d_gate_up[gate] = from_f32<T>(dy * to_f32(gate_up[gate + inner]) * a.y);
        d_gate_up[gate + inner] = from_f32<T>(dy * a.x);
    }
}

// d *= act'(x)
template <typename T>
__device__ void activate_backward(const T* x, T* d, long long len, int activation) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < len; i += step) {
        d[i] = from_f32<T>(to_f32(d[i]) * value_and_slope(activation, to_f32(x[i])).y);
    }
}

// ---- dropout -----------------------------------------------------------------------------

// The draws of src/train/dropout.rs: four columns of the whole share a block of Philox. Writes
// x with values dropped to `out`, or adds it there. A thread takes such a block.
template <typename T, typename O>
__device__ void dropout(const T* x, O* out, const unsigned long long* numbers, int rows, int cols, int first_col,
                        unsigned threshold, float factor, unsigned key0, unsigned key1, int accumulate) {
    const int first = first_col / 4, blocks = (first_col + cols + 3) / 4 - first;
    const long long len = (long long)rows * blocks, step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < len; i += step) {
        const long long row = i / blocks;
        const int block = first + (int)(i % blocks);
        const unsigned long long number = numbers[row];
        const uint4 counter = make_uint4(block, (unsigned)number, (unsigned)(number >> 32), 1);
        const uint4 words = philox4x32(counter, make_uint2(key0, key1));
        const unsigned draws[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int col = 4 * block + j - first_col;
            if (col < 0 || col >= cols) continue;
            const long long at = row * cols + col;
            const float y = to_f32(x[at]) * (draws[j] < threshold ? 0.0f : factor);
            out[at] = from_f32<O>(accumulate ? to_f32(out[at]) + y : y);
        }
    }
}

// ---- the loss ----------------------------------------------------------------------------

__device__ float capped(float x, float softcap) { return softcap > 0.0f ? softcap * tanhf(x / softcap) : x; }

// Of each row of logits: the largest, the sum of exp(logit - largest), the target's logit (0 if
// it is not among these columns, the ids from `first` on). A block takes a row and reads it
// once: bound by memory.
__device__ void row_sums(const float* logits, const int* targets, float* sums, int first, int cols,
                          float softcap) {
    __shared__ float shared[32];
    const float* row = logits + blockIdx.x * (long long)cols;
    float top = -INFINITY, sum = 0.0f;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        const float x = capped(row[i], softcap);
        if (x > top) {
            sum = sum * expf(top - x) + 1.0f;
            top = x;
        } else {
            sum += expf(x - top);
        }
    }
    const float all = block_max(top, shared);
    // A thread without values has top = -inf.
    sum = block_sum(top == all ? sum : sum * expf(top - all), shared);
    if (threadIdx.x == 0) {
        const int target = targets[blockIdx.x] - first;
        const bool here = target >= 0 && target < cols;
        sums[3 * blockIdx.x] = all;
        sums[3 * blockIdx.x + 1] = sum;
        sums[3 * blockIdx.x + 2] = here ? capped(row[target], softcap) : 0.0f;
    }
}

// The gradient of a row's loss: p - [target], and through the cap. `sums` are those over the
// whole vocabulary. `d` may be the logits. Bound by memory.
template <typename T>
__device__ void loss_gradient(const float* logits, const int* targets, const float* sums, T* d, int first,
                              int cols, float softcap) {
    const int row = blockIdx.y;
    const int target = targets[row] - first;
    const float top = sums[3 * row], share = 1.0f / sums[3 * row + 1];
    logits += row * (long long)cols;
    d += row * (long long)cols;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < cols; i += gridDim.x * blockDim.x) {
        const float x = capped(logits[i], softcap);
        float g = expf(x - top) * share - (i == target ? 1.0f : 0.0f);
        if (softcap > 0.0f) g *= 1.0f - (x / softcap) * (x / softcap);
        d[i] = from_f32<T>(g);
    }
}

// ---- sums of magnitudes (DoRA) -----------------------------------------------------------

// sums[col] += factors[col] * sum over the rows of a * b. A thread takes a column, so that rows
// are summed in order; neighbours read neighbouring values.
template <typename T>
__device__ void column_products(const T* a, const T* b, const float* factors, float* sums, int rows, int cols,
                                int a_stride, int b_stride, float weight) {
    const int col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= cols) return;
    float sum = 0.0f;
    for (int row = 0; row < rows; row++) {
        sum += to_f32(a[(long long)row * a_stride + col]) * to_f32(b[(long long)row * b_stride + col]);
    }
    sums[col] += weight * factors[col] * sum;
}

// out = x * factors, column by column. A block takes a row.
template <typename T>
__device__ void scale_columns(const T* x, const float* factors, T* out, int cols, int x_stride, int out_stride) {
    x += blockIdx.x * (long long)x_stride;
    out += blockIdx.x * (long long)out_stride;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) out[i] = from_f32<T>(to_f32(x[i]) * factors[i]);
}

// ---- the trained embedding ---------------------------------------------------------------

// gradient[row] += factor * the sum of `d` at places first[i] .. first[i + 1] of `order`, in that
// order, with row = rows[i]. A block takes a row of the embedding.
__device__ void row_gradient(const float* d, const int* rows, const int* first, const int* order, float* gradient,
                             int width, float factor) {
    gradient += rows[blockIdx.x] * (long long)width;
    for (int col = threadIdx.x; col < width; col += blockDim.x) {
        float sum = 0.0f;
        for (int i = first[blockIdx.x]; i < first[blockIdx.x + 1]; i++) sum += d[order[i] * (long long)width + col];
        gradient[col] += factor * sum;
    }
}

// ---- products of tiles -------------------------------------------------------------------
//
// A block holds M x N sums in registers and adds products of tiles in shared memory to them: by
// tensor cores, or, for f32 and where bf16 has none, by multiply-adds.

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;

// A thread has rows t / 16 + 16 i and columns t % 16 + 16 j.
template <typename T, int M, int N> struct PlainSums {
    static constexpr int ROWS = M / 16, COLS = N / 16;
    float sums[ROWS][COLS];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int j = 0; j < COLS; j++) sums[i][j] = 0.0f;
        }
    }

    // += a b over `depth` terms; a is stored by columns if it is TURNED_A, b likewise.
    template <bool TURNED_A, bool TURNED_B>
    __device__ void add(const T* a, int a_stride, const T* b, int b_stride, int depth) {
        const int row = threadIdx.x / 16, col = threadIdx.x % 16;
        for (int k = 0; k < depth; k++) {
            float x[ROWS], y[COLS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int r = row + 16 * i;
                x[i] = to_f32(a[TURNED_A ? k * a_stride + r : r * a_stride + k]);
            }
#pragma unroll
            for (int j = 0; j < COLS; j++) {
                const int c = col + 16 * j;
                y[j] = to_f32(b[TURNED_B ? c * b_stride + k : k * b_stride + c]);
            }
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
#pragma unroll
                for (int j = 0; j < COLS; j++) sums[i][j] += x[i] * y[j];
            }
        }
    }

    __device__ void store(float* to, int stride) const {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int j = 0; j < COLS; j++) to[(threadIdx.x / 16 + 16 * i) * stride + threadIdx.x % 16 + 16 * j] = sums[i][j];
        }
    }

    // Multiplies each row by its factor.
    __device__ void scale_rows(const float* factors, float*) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int j = 0; j < COLS; j++) sums[i][j] *= factors[threadIdx.x / 16 + 16 * i];
        }
    }

    // Writes `rows` rows of `cols` values.
    __device__ void write(float*, T* to, int stride, int rows, int cols) const {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = threadIdx.x / 16 + 16 * i;
#pragma unroll
            for (int j = 0; j < COLS; j++) {
                const int col = threadIdx.x % 16 + 16 * j;
                if (row < rows && col < cols) to[(long long)row * stride + col] = from_f32<T>(sums[i][j]);
            }
        }
    }
};

template <bool TURNED> struct Layout {
    using Of = wmma::row_major;
};
template <> struct Layout<true> {
    using Of = wmma::col_major;
};

// Tiles of 16 x 16, some neighbours in a row of tiles to a warp.
template <typename T, int M, int N> struct TensorSums {
    static constexpr int COLS = N / 16, COUNT = M / 16 * COLS, EACH = (COUNT + WARPS - 1) / WARPS;
    // A warp's tiles lie in one row, or fill rows, so that it loads a tile of `a` once a row.
    static_assert(COLS % EACH == 0 || EACH % COLS == 0, "tiles of a warp share rows");
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[EACH];

    __device__ static int tile(int i) { return threadIdx.x / WARP * EACH + i; }

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < EACH; i++) wmma::fill_fragment(sums[i], 0.0f);
    }

    template <bool TURNED_A, bool TURNED_B>
    __device__ void add(const T* a, int a_stride, const T* b, int b_stride, int depth) {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, T, typename Layout<TURNED_A>::Of> x;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, typename Layout<TURNED_B>::Of> y;
        for (int k = 0; k < depth; k += 16) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                if (tile(i) >= COUNT) continue;
                const int row = tile(i) / COLS * 16, col = tile(i) % COLS * 16;
                if (i % COLS == 0) {
                    wmma::load_matrix_sync(x, a + (TURNED_A ? k * a_stride + row : row * a_stride + k), a_stride);
                }
                wmma::load_matrix_sync(y, b + (TURNED_B ? col * b_stride + k : k * b_stride + col), b_stride);
                wmma::mma_sync(sums[i], x, y, sums[i]);
            }
        }
    }

    __device__ void store(float* to, int stride) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (tile(i) >= COUNT) continue;
            const int row = tile(i) / COLS * 16, col = tile(i) % COLS * 16;
            wmma::store_matrix_sync(to + row * stride + col, sums[i], stride, wmma::mem_row_major);
        }
    }

    // Which value of a fragment is in which lane is not known, so rows are scaled in shared
    // memory: `scratch` has 256 floats a warp.
    __device__ void scale_rows(const float* factors, float* scratch) {
        float* own = scratch + threadIdx.x / WARP * 256;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (tile(i) >= COUNT) continue;
            wmma::store_matrix_sync(own, sums[i], 16, wmma::mem_row_major);
            __syncwarp();
            for (int at = threadIdx.x % WARP; at < 256; at += WARP) own[at] *= factors[tile(i) / COLS * 16 + at / 16];
            __syncwarp();
            wmma::load_matrix_sync(sums[i], own, 16, wmma::mem_row_major);
            __syncwarp();
        }
    }

    __device__ void write(float* scratch, T* to, int stride, int rows, int cols) const {
        float* own = scratch + threadIdx.x / WARP * 256;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (tile(i) >= COUNT) continue;
            wmma::store_matrix_sync(own, sums[i], 16, wmma::mem_row_major);
            __syncwarp();
            const int first_row = tile(i) / COLS * 16, first_col = tile(i) % COLS * 16;
            for (int at = threadIdx.x % WARP; at < 256; at += WARP) {
                const int row = first_row + at / 16, col = first_col + at % 16;
                if (row < rows && col < cols) to[(long long)row * stride + col] = from_f32<T>(own[at]);
            }
            __syncwarp();
        }
    }
};

template <typename T> struct Cores {
    template <int M, int N> using Sums = PlainSums<T, M, N>;
};
template <> struct Cores<f16> {
    template <int M, int N> using Sums = TensorSums<f16, M, N>;
};
#ifdef FARM_BF16_TENSOR_CORES
template <> struct Cores<bf16> {
    template <int M, int N> using Sums = TensorSums<bf16, M, N>;
};
#endif

// ---- attention inside segments -----------------------------------------------------------
//
// As src/kernels/segments.rs: causal, each segment on its own, tiles of queries over tiles of keys
// (Dao 2023, FlashAttention-2), the backward pass from the log-sum-exp of the forward one. One
// kernel makes dk and dv (a block a tile of keys, over the queries of all heads of the group),
// one dq (a block a tile of queries), with 7 products of tiles in place of 5 and no sum
// across blocks. On tensor cores these kernels are bound by shared memory, else by arithmetic.

// What a score becomes, as `Rule` says; no window is 2^30, no cap 0.
struct Rule {
    float scale;
    int window;
    float softcap;
    // ALiBi's slope of the head, rounded to bf16; 0 without.
    float slope;

    __device__ bool sees(int query, int key) const { return key <= query && key > query - window; }

    // The score of q . k, and the derivative of the cap.
    __device__ float2 score(float product, int key) const {
        float score = product * scale, derivative = 1.0f;
        if (softcap > 0.0f) {
            const float t = tanhf(score / softcap);
            score = softcap * t;
            derivative = 1.0f - t * t;
        }
        if (slope != 0.0f) {
            const float position = to_f32(from_f32<bf16>((float)key));
            score += to_f32(from_f32<bf16>(slope * position)) * scale;
        }
        return make_float2(score, derivative);
    }
};

__device__ float slope_of(const float* slopes, int has_slopes, int head) {
    return has_slopes ? to_f32(from_f32<bf16>(slopes[head])) : 0.0f;
}

// A tile of the list: its first row, how many it has, and where its segment starts and ends.
struct Tile {
    int first, rows, start, end;
    __device__ explicit Tile(const int* tiles) {
        const int* of = tiles + 4 * blockIdx.x;
        first = of[0];
        rows = of[1];
        start = of[2];
        end = of[3];
    }
};

// Of a query that sees no key yet; finite, so that its difference to itself is 0.
constexpr float NO_SCORE = -1e30f;
// A row's sums are brought to a new maximum only if it is this much larger, since that
// costs a way through shared memory: e^8 is far from the limits of f16.
constexpr float RAISE = 8.0f;

// Values beyond a tile's row in shared memory, against bank conflicts.
constexpr int PAD = 8;

// Brings `rows` rows of `cols` values to a tile of ROWS x WIDTH, the rest zeros; done after
// copy_async_wait and a barrier.
template <typename T, int ROWS, int WIDTH>
__device__ void fetch(T* to, const T* from, int stride, int rows, int cols) {
    constexpr int VALUES = 16 / sizeof(T), PIECES = WIDTH / VALUES;
    const bool wide = cols % VALUES == 0 && stride % VALUES == 0 && reinterpret_cast<unsigned long long>(from) % 16 == 0;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, col = i % PIECES * VALUES;
        T* piece = to + row * (WIDTH + PAD) + col;
        const T* source = from + (long long)row * stride + col;
        if (wide && row < rows && col < cols) {
            copy_async16(piece, source);
        } else {
#pragma unroll
            for (int j = 0; j < VALUES; j++) {
                piece[j] = row < rows && col + j < cols ? source[j] : from_f32<T>(0.0f);
            }
        }
    }
    copy_async_commit();
}

// What is known of the softmax of a tile's queries, in shared memory.
struct RowState {
    float *top, *sum, *factor;
};

// Turns the scores of the block's queries against the keys from position `key0` on into weights
// e^(score - top); whether a row's top has risen, which its sums have to follow by `factor`.
template <typename T, int Q, int K>
__device__ bool soften(const float* scores, T* weights, RowState state, const Rule& rule, int query0, int rows,
                       int key0) {
    constexpr int EACH = (K + WARP - 1) / WARP;
    const int lane = threadIdx.x % WARP;
    bool risen = false;
    for (int row = threadIdx.x / WARP; row < Q; row += WARPS) {
        float score[EACH];
        float most = NO_SCORE;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int col = lane + WARP * i;
            const bool seen = col < K && row < rows && rule.sees(query0 + row, key0 + col);
            score[i] = seen ? rule.score(scores[row * (K + PAD) + col], key0 + col).x : NO_SCORE;
            most = fmaxf(most, score[i]);
        }
        most = warp_max(most);
        const float before = state.top[row];
        const float top = most > before + RAISE ? most : before;
        const float factor = top == before ? 1.0f : expf(before - top);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int col = lane + WARP * i;
            const bool seen = col < K && row < rows && rule.sees(query0 + row, key0 + col);
            const float weight = seen ? expf(score[i] - top) : 0.0f;
            if (col < K) weights[row * (K + PAD) + col] = from_f32<T>(weight);
            sum += weight;
        }
        sum = warp_sum(sum);
        __syncwarp();
        if (lane == 0) {
            state.top[row] = top;
            state.sum[row] = state.sum[row] * factor + sum;
            state.factor[row] = factor;
        }
        // Before the first key there is nothing to bring along.
        risen |= factor != 1.0f && before != NO_SCORE;
    }
    return risen;
}

template <typename T, int WIDTH, int Q, int K>
__device__ void attend(const T* q, const T* k, const T* v, T* out, float* lse, const int* tiles,
                       const float* slopes, int heads, int kv_heads, int head_dim, int q_stride, int k_stride,
                       int v_stride, float scale, int window, float softcap, int has_slopes) {
    constexpr int STRIDE = WIDTH + PAD;
    DYNAMIC_SHARED(unsigned char, shared);
    T* queries = reinterpret_cast<T*>(shared);
    T* keys = queries + Q * STRIDE;
    T* values = keys + K * STRIDE;
    T* weights = values + K * STRIDE;
    float* scores = reinterpret_cast<float*>(weights + Q * (K + PAD));
    const RowState state = {scores + Q * (K + PAD), scores + Q * (K + PAD) + Q, scores + Q * (K + PAD) + 2 * Q};

    const Tile tile(tiles);
    const int head = blockIdx.y, kv_head = head / (heads / kv_heads);
    const Rule rule = {scale, window, softcap, slope_of(slopes, has_slopes, head)};
    const int query0 = tile.first - tile.start, end = query0 + tile.rows;
    const T* k_rows = k + tile.start * (long long)k_stride + kv_head * head_dim;
    const T* v_rows = v + tile.start * (long long)v_stride + kv_head * head_dim;
    int key0 = max(0, query0 - window + 1) / K * K;

    if (threadIdx.x < Q) {
        state.top[threadIdx.x] = NO_SCORE;
        state.sum[threadIdx.x] = 0.0f;
    }
    fetch<T, Q, WIDTH>(queries, q + tile.first * (long long)q_stride + head * head_dim, q_stride, tile.rows, head_dim);
    fetch<T, K, WIDTH>(keys, k_rows + key0 * (long long)k_stride, k_stride, end - key0, head_dim);
    fetch<T, K, WIDTH>(values, v_rows + key0 * (long long)v_stride, v_stride, end - key0, head_dim);
    typename Cores<T>::template Sums<Q, WIDTH> sums;
    sums.clear();
    for (; key0 < end; key0 += K) {
        // The keys are there; the values may be on their way.
        copy_async_wait<1>();
        __syncthreads();
        typename Cores<T>::template Sums<Q, K> products;
        products.clear();
        products.template add<false, true>(queries, STRIDE, keys, STRIDE, WIDTH);
        products.store(scores, K + PAD);
        __syncthreads();
        const int next = key0 + K;
        fetch<T, K, WIDTH>(keys, k_rows + next * (long long)k_stride, k_stride, end - next, head_dim);
        const bool risen = soften<T, Q, K>(scores, weights, state, rule, query0, tile.rows, key0);
        copy_async_wait<1>();
        if (__syncthreads_or(risen)) sums.scale_rows(state.factor, scores);
        sums.template add<false, false>(weights, K + PAD, values, STRIDE, K);
        __syncthreads();
        fetch<T, K, WIDTH>(values, v_rows + next * (long long)v_stride, v_stride, end - next, head_dim);
    }
    copy_async_wait<0>();
    if (threadIdx.x < tile.rows) {
        const float sum = state.sum[threadIdx.x];
        state.factor[threadIdx.x] = 1.0f / sum;
        lse[(tile.first + threadIdx.x) * (long long)heads + head] = state.top[threadIdx.x] + logf(sum);
    }
    __syncthreads();
    sums.scale_rows(state.factor, scores);
    __syncthreads();
    const int stride = heads * head_dim;
    sums.write(scores, out + tile.first * (long long)stride + head * head_dim, stride, tile.rows, head_dim);
}

// delta = the sum of out * dout of each head of a row: a warp each. Bound by memory.
template <typename T>
__device__ void attention_delta(const T* out, const T* dout, float* delta, int runs, int head_dim) {
    const int run = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (run >= runs) return;
    out += run * (long long)head_dim;
    dout += run * (long long)head_dim;
    float sum = 0.0f;
    for (int i = threadIdx.x % WARP; i < head_dim; i += WARP) sum += to_f32(out[i]) * to_f32(dout[i]);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) delta[run] = sum;
}

// Where the backward kernels keep their tiles.
template <typename T, int WIDTH, int Q, int K> struct Backward {
    static constexpr int STRIDE = WIDTH + PAD;
    T *keys, *values, *queries, *gradients, *weights, *changes;
    float *scores, *products, *lse, *delta;

    __device__ explicit Backward(unsigned char* shared) {
        keys = reinterpret_cast<T*>(shared);
        values = keys + K * STRIDE;
        queries = values + K * STRIDE;
        gradients = queries + Q * STRIDE;
        weights = gradients + Q * STRIDE;
        changes = weights + Q * (K + PAD);
        scores = reinterpret_cast<float*>(changes + Q * (K + PAD));
        products = scores + Q * (K + PAD);
        lse = products + Q * (K + PAD);
        delta = lse + Q;
    }

    // The rows of a tile of queries from row `first` of the matrices on.
    __device__ void fetch_queries(const T* q, const T* dout, const float* lse_of, const float* delta_of, int first,
                                  int rows, int head, int heads, int head_dim, int q_stride) {
        const int stride = heads * head_dim;
        fetch<T, Q, WIDTH>(queries, q + first * (long long)q_stride + head * head_dim, q_stride, rows, head_dim);
        fetch<T, Q, WIDTH>(gradients, dout + first * (long long)stride + head * head_dim, stride, rows, head_dim);
        if (threadIdx.x < Q) {
            const bool is_row = (int)threadIdx.x < rows;
            const long long at = (first + (int)threadIdx.x) * (long long)heads + head;
            lse[threadIdx.x] = is_row ? lse_of[at] : 0.0f;
            delta[threadIdx.x] = is_row ? delta_of[at] : 0.0f;
        }
    }

    // From tiles that are there: weights = p, changes = the gradient of q . k.
    __device__ void derive(const Rule& rule, int query0, int rows, int key0) {
        typename Cores<T>::template Sums<Q, K> sums;
        sums.clear();
        sums.template add<false, true>(queries, STRIDE, keys, STRIDE, WIDTH);
        sums.store(scores, K + PAD);
        sums.clear();
        sums.template add<false, true>(gradients, STRIDE, values, STRIDE, WIDTH);
        sums.store(products, K + PAD);
        __syncthreads();
        for (int i = threadIdx.x; i < Q * K; i += THREADS) {
            const int row = i / K, col = i % K, at = row * (K + PAD) + col;
            float p = 0.0f, change = 0.0f;
            if (row < rows && rule.sees(query0 + row, key0 + col)) {
                const float2 score = rule.score(scores[at], key0 + col);
                p = expf(score.x - lse[row]);
                change = p * (products[at] - delta[row]) * score.y * rule.scale;
            }
            weights[at] = from_f32<T>(p);
            changes[at] = from_f32<T>(change);
        }
        __syncthreads();
    }
};

template <typename T, int WIDTH, int Q, int K>
__device__ void attend_backward_keys(const T* q, const T* k, const T* v, const T* dout, const float* lse,
                                     const float* delta, T* dk, T* dv, const int* tiles, const float* slopes,
                                     int heads, int kv_heads, int head_dim, int q_stride, int k_stride,
                                     int v_stride, int dk_stride, int dv_stride, float scale, int window,
                                     float softcap, int has_slopes) {
    constexpr int STRIDE = WIDTH + PAD;
    DYNAMIC_SHARED(unsigned char, shared);
    Backward<T, WIDTH, Q, K> tile_of(shared);
    const Tile tile(tiles);
    const int kv_head = blockIdx.y, group = heads / kv_heads;
    const int key0 = tile.first - tile.start;
    // Behind the last query that sees the last key.
    const int end = min(tile.end - tile.start, key0 + tile.rows - 1 + window);
    const int column = kv_head * head_dim;
    fetch<T, K, WIDTH>(tile_of.keys, k + tile.first * (long long)k_stride + column, k_stride, tile.rows, head_dim);
    fetch<T, K, WIDTH>(tile_of.values, v + tile.first * (long long)v_stride + column, v_stride, tile.rows, head_dim);
    typename Cores<T>::template Sums<K, WIDTH> k_sums, v_sums;
    k_sums.clear();
    v_sums.clear();
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const Rule rule = {scale, window, softcap, slope_of(slopes, has_slopes, head)};
        for (int query0 = key0 / Q * Q; query0 < end; query0 += Q) {
            const int rows = min(Q, tile.end - tile.start - query0);
            tile_of.fetch_queries(q, dout, lse, delta, tile.start + query0, rows, head, heads, head_dim, q_stride);
            copy_async_wait<0>();
            __syncthreads();
            tile_of.derive(rule, query0, rows, key0);
            v_sums.template add<true, false>(tile_of.weights, K + PAD, tile_of.gradients, STRIDE, Q);
            k_sums.template add<true, false>(tile_of.changes, K + PAD, tile_of.queries, STRIDE, Q);
            __syncthreads();
        }
    }
    k_sums.write(tile_of.scores, dk + tile.first * (long long)dk_stride + column, dk_stride, tile.rows, head_dim);
    v_sums.write(tile_of.scores, dv + tile.first * (long long)dv_stride + column, dv_stride, tile.rows, head_dim);
}

template <typename T, int WIDTH, int Q, int K>
__device__ void attend_backward_queries(const T* q, const T* k, const T* v, const T* dout, const float* lse,
                                        const float* delta, T* dq, const int* tiles, const float* slopes, int heads,
                                        int kv_heads, int head_dim, int q_stride, int k_stride, int v_stride,
                                        int dq_stride, float scale, int window, float softcap, int has_slopes) {
    constexpr int STRIDE = WIDTH + PAD;
    DYNAMIC_SHARED(unsigned char, shared);
    Backward<T, WIDTH, Q, K> tile_of(shared);
    const Tile tile(tiles);
    const int head = blockIdx.y, kv_head = head / (heads / kv_heads);
    const Rule rule = {scale, window, softcap, slope_of(slopes, has_slopes, head)};
    const int query0 = tile.first - tile.start, end = query0 + tile.rows;
    const T* k_rows = k + tile.start * (long long)k_stride + kv_head * head_dim;
    const T* v_rows = v + tile.start * (long long)v_stride + kv_head * head_dim;
    tile_of.fetch_queries(q, dout, lse, delta, tile.first, tile.rows, head, heads, head_dim, q_stride);
    typename Cores<T>::template Sums<Q, WIDTH> sums;
    sums.clear();
    for (int key0 = max(0, query0 - window + 1) / K * K; key0 < end; key0 += K) {
        fetch<T, K, WIDTH>(tile_of.keys, k_rows + key0 * (long long)k_stride, k_stride, end - key0, head_dim);
        fetch<T, K, WIDTH>(tile_of.values, v_rows + key0 * (long long)v_stride, v_stride, end - key0, head_dim);
        copy_async_wait<0>();
        __syncthreads();
        tile_of.derive(rule, query0, tile.rows, key0);
        sums.template add<false, false>(tile_of.changes, K + PAD, tile_of.keys, STRIDE, K);
        __syncthreads();
    }
    sums.write(tile_of.scores, dq + tile.first * (long long)dq_stride + head * head_dim, dq_stride, tile.rows, head_dim);
}

}  // namespace

// ---- kernels -----------------------------------------------------------------------------

#define OF_TYPE(T, S)                                                                                             \
    extern "C" __global__ void head_norm_##S(const T* x, const float* weight, const float* bias, T* out,          \
                                             int width, int per_row, int x_stride, int out_stride, float eps,     \
                                             int centred) {                                                       \
        head_norm(x, weight, bias, out, width, per_row, x_stride, out_stride, eps, centred);                      \
    }                                                                                                             \
    EXPORT_KERNEL(head_norm_##S)                                                                                  \
    extern "C" __global__ void norm_backward_##S(const T* x, const float* weight, const T* dy, T* dx, int width,  \
                                                 int per_row, int x_stride, int d_stride, float eps, int centred, \
                                                 int accumulate) {                                                \
        norm_backward(x, weight, dy, dx, width, per_row, x_stride, d_stride, eps, centred, accumulate);           \
    }                                                                                                             \
    EXPORT_KERNEL(norm_backward_##S)                                                                              \
    extern "C" __global__ void turn_##S(T* x, const float* cos, const float* sin, int heads, int stride,          \
                                        int head_dim, int rotary_dim, int interleaved, int back) {                \
        turn(x, cos, sin, heads, stride, head_dim, rotary_dim, interleaved, back);                                \
    }                                                                                                             \
    EXPORT_KERNEL(turn_##S)                                                                                       \
    extern "C" __global__ void gated_backward_##S(const T* gate_up, const T* d, T* d_gate_up, long long len,      \
                                                  int inner, int activation) {                                    \
        gated_backward(gate_up, d, d_gate_up, len, inner, activation);                                            \
    }                                                                                                             \
    EXPORT_KERNEL(gated_backward_##S)                                                                             \
    extern "C" __global__ void activate_backward_##S(const T* x, T* d, long long len, int activation) {           \
        activate_backward(x, d, len, activation);                                                                 \
    }                                                                                                             \
    EXPORT_KERNEL(activate_backward_##S)                                                                          \
    extern "C" __global__ void dropout_##S(const T* x, T* out, const unsigned long long* numbers, int rows,       \
                                           int cols, int first_col, unsigned threshold, float factor,             \
                                           unsigned key0, unsigned key1, int accumulate) {                        \
        dropout(x, out, numbers, rows, cols, first_col, threshold, factor, key0, key1, accumulate);               \
    }                                                                                                             \
    EXPORT_KERNEL(dropout_##S)                                                                                    \
    extern "C" __global__ void loss_gradient_##S(const float* logits, const int* targets, const float* sums,      \
                                                 T* d, int first, int cols, float softcap) {                      \
        loss_gradient(logits, targets, sums, d, first, cols, softcap);                                            \
    }                                                                                                             \
    EXPORT_KERNEL(loss_gradient_##S)                                                                              \
    extern "C" __global__ void column_products_##S(const T* a, const T* b, const float* factors, float* sums,     \
                                                   int rows, int cols, int a_stride, int b_stride,                \
                                                   float weight) {                                                \
        column_products(a, b, factors, sums, rows, cols, a_stride, b_stride, weight);                             \
    }                                                                                                             \
    EXPORT_KERNEL(column_products_##S)                                                                            \
    extern "C" __global__ void scale_columns_##S(const T* x, const float* factors, T* out, int cols,              \
                                                 int x_stride, int out_stride) {                                  \
        scale_columns(x, factors, out, cols, x_stride, out_stride);                                               \
    }                                                                                                             \
    EXPORT_KERNEL(scale_columns_##S)                                                                              \
    extern "C" __global__ void attention_delta_##S(const T* out, const T* dout, float* delta, int runs,           \
                                                   int head_dim) {                                                \
        attention_delta(out, dout, delta, runs, head_dim);                                                        \
    }                                                                                                             \
    EXPORT_KERNEL(attention_delta_##S)

OF_TYPE(float, f32)
OF_TYPE(f16, f16)
OF_TYPE(bf16, bf16)

extern "C" __global__ void loss_sums(const float* logits, const int* targets, float* sums, int first, int cols,
                                     float softcap) {
    row_sums(logits, targets, sums, first, cols, softcap);
}
EXPORT_KERNEL(loss_sums)

extern "C" __global__ void embedding_gradient(const float* d, const int* rows, const int* first, const int* order,
                                              float* gradient, int width, float factor) {
    row_gradient(d, rows, first, order, gradient, width, factor);
}
EXPORT_KERNEL(embedding_gradient)

// Attention of heads of up to WIDTH values; tiles of queries and of keys forward and backward,
// as src/device/train.rs knows them.
#define ATTENTION(T, S, WIDTH, Q, K, BACK_Q, BACK_K)                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_##S##_##WIDTH(                                     \
        const T* q, const T* k, const T* v, T* out, float* lse, const int* tiles, const float* slopes, int heads,   \
        int kv_heads, int head_dim, int q_stride, int k_stride, int v_stride, float scale, int window,              \
        float softcap, int has_slopes) {                                                                            \
        attend<T, WIDTH, Q, K>(q, k, v, out, lse, tiles, slopes, heads, kv_heads, head_dim, q_stride, k_stride,     \
                               v_stride, scale, window, softcap, has_slopes);                                       \
    }                                                                                                               \
    EXPORT_KERNEL(attend_##S##_##WIDTH)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_backward_keys_##S##_##WIDTH(                       \
        const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta, T* dk, T* dv,      \
        const int* tiles, const float* slopes, int heads, int kv_heads, int head_dim, int q_stride, int k_stride,   \
        int v_stride, int dk_stride, int dv_stride, float scale, int window, float softcap, int has_slopes) {       \
        attend_backward_keys<T, WIDTH, BACK_Q, BACK_K>(q, k, v, dout, lse, delta, dk, dv, tiles, slopes, heads,     \
                                                       kv_heads, head_dim, q_stride, k_stride, v_stride,            \
                                                       dk_stride, dv_stride, scale, window, softcap, has_slopes);   \
    }                                                                                                               \
    EXPORT_KERNEL(attend_backward_keys_##S##_##WIDTH)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) attend_backward_queries_##S##_##WIDTH(                    \
        const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta, T* dq,             \
        const int* tiles, const float* slopes, int heads, int kv_heads, int head_dim, int q_stride, int k_stride,   \
        int v_stride, int dq_stride, float scale, int window, float softcap, int has_slopes) {                      \
        attend_backward_queries<T, WIDTH, BACK_Q, BACK_K>(q, k, v, dout, lse, delta, dq, tiles, slopes, heads,      \
                                                          kv_heads, head_dim, q_stride, k_stride, v_stride,         \
                                                          dq_stride, scale, window, softcap, has_slopes);           \
    }                                                                                                               \
    EXPORT_KERNEL(attend_backward_queries_##S##_##WIDTH)

#define ATTENTION_OF_TWO_BYTES(T, S)          \
    ATTENTION(T, S, 32, 64, 64, 32, 64)       \
    ATTENTION(T, S, 64, 64, 64, 32, 64)       \
    ATTENTION(T, S, 96, 64, 64, 32, 64)       \
    ATTENTION(T, S, 128, 64, 64, 32, 64)      \
    ATTENTION(T, S, 256, 64, 32, 32, 32)

ATTENTION(float, f32, 32, 32, 32, 32, 32)
ATTENTION(float, f32, 64, 32, 32, 32, 32)
ATTENTION(float, f32, 96, 32, 32, 32, 32)
ATTENTION(float, f32, 128, 32, 32, 32, 32)
ATTENTION(float, f32, 256, 16, 16, 16, 16)
ATTENTION_OF_TWO_BYTES(f16, f16)
ATTENTION_OF_TWO_BYTES(bf16, bf16)
