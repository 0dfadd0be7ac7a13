// Routed experts: which experts a row takes, which rows an expert has, and for a decode's few
// rows the experts' products themselves, without the host knowing the choice. The weights of
// an expert that some row chose stream once for four of its rows; all else is small.

#include "activation.cuh"
#include "matvec.cuh"

namespace {

// An order of all floats as integers, NaN included, as Rust's total_cmp has it.
__device__ unsigned order_key(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ float from_key(unsigned key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Where the largest of `n` keys is, the first of equals; in every lane.
__device__ int largest(const unsigned* keys, int n) {
    unsigned best = 0;
    int at = n;
    for (int i = threadIdx.x; i < n; i += WARP) {
        if (keys[i] > best) {
            best = keys[i];
            at = i;
        }
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        const unsigned other = __shfl_xor_sync(FULL_WARP, best, step);
        const int other_at = __shfl_xor_sync(FULL_WARP, at, step);
        if (other > best || (other == best && other_at < at)) {
            best = other;
            at = other_at;
        }
    }
    return at;
}

// Probabilities of a row's scores, as keys.
__device__ void softmax_keys(const float* scores, int n, unsigned* keys) {
    float top = -INFINITY, sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += WARP) top = fmaxf(top, scores[i]);
    top = warp_max(top);
    for (int i = threadIdx.x; i < n; i += WARP) sum += expf(scores[i] - top);
    sum = warp_sum(sum);
    for (int i = threadIdx.x; i < n; i += WARP) keys[i] = order_key(expf(scores[i] - top) / sum);
    __syncwarp();
}

// ---- products ----------------------------------------------------------------------------

// What the blocks of an expert know of it: blockIdx.y counts the experts that have rows.
struct Assignment {
    const unsigned long long* addresses;
    const int* active;
    const int* counts;
    const int* pairs;
    int list_stride;
    int per_token;
};

// Rows of weights that begin here, the warp's.
__device__ int first_row(int parts) {
    return (blockIdx.x * (WARPS / parts) + (int)threadIdx.x / WARP / parts) * ROWS;
}

__device__ bool leads(int parts) {
    return threadIdx.x / WARP % parts == 0 && threadIdx.x % WARP == 0;
}

// inner[pair] = act(gate · x[row]) * (up · x[row]) for each pair of an expert and a row of its.
// addresses: the gates of all experts, then their ups.
template <typename Weights, int M, typename X>
__device__ void gate_up(const Assignment& a, int experts, const X* x, X* inner, const Shape& shape,
                        int kind, int parts, int wide) {
    const int expert = a.active[blockIdx.y];
    if (expert < 0) return;
    const auto* gate = reinterpret_cast<const unsigned char*>(a.addresses[expert]);
    const auto* up = reinterpret_cast<const unsigned char*>(a.addresses[experts + expert]);
    const int* pairs = a.pairs + (long long)expert * a.list_stride;
    const int first = first_row(parts), part = threadIdx.x / WARP % parts, count = a.counts[expert];
    for (int done = 0; done < count; done += M) {
        const X* xs[M];
#pragma unroll
        for (int i = 0; i < M; ++i) {
            xs[i] = x + (long long)(pairs[min(done + i, count - 1)] / a.per_token) * shape.cols;
        }
        float g[ROWS][M] = {}, u[ROWS][M] = {};
        products<Weights, M>(gate, shape, first, xs, part, parts, wide, g);
        products<Weights, M>(up, shape, first, xs, part, parts, wide, u);
        add_parts<M>(parts, g);
        add_parts<M>(parts, u);
        if (!leads(parts)) continue;
#pragma unroll
        for (int i = 0; i < M; ++i) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (done + i >= count || first + r >= shape.rows) continue;
                const long long pair = pairs[done + i];
                inner[pair * shape.rows + first + r] = from_f32<X>(activation(kind, g[r][i]) * u[r][i]);
            }
        }
    }
}

// y[pair] = down · inner[pair].
template <typename Weights, int M, typename X>
__device__ void down(const Assignment& a, const X* inner, float* y, const Shape& shape, int parts,
                     int wide) {
    const int expert = a.active[blockIdx.y];
    if (expert < 0) return;
    const auto* weights = reinterpret_cast<const unsigned char*>(a.addresses[expert]);
    const int* pairs = a.pairs + (long long)expert * a.list_stride;
    const int first = first_row(parts), part = threadIdx.x / WARP % parts, count = a.counts[expert];
    for (int done = 0; done < count; done += M) {
        const X* xs[M];
#pragma unroll
        for (int i = 0; i < M; ++i) {
            xs[i] = inner + (long long)pairs[min(done + i, count - 1)] * shape.cols;
        }
        float sum[ROWS][M] = {};
        products<Weights, M>(weights, shape, first, xs, part, parts, wide, sum);
        add_parts<M>(parts, sum);
        if (!leads(parts)) continue;
#pragma unroll
        for (int i = 0; i < M; ++i) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (done + i >= count || first + r >= shape.rows) continue;
                y[(long long)pairs[done + i] * shape.rows + first + r] = sum[r][i];
            }
        }
    }
}

}  // namespace

// The `per_token` likeliest experts of each row and their weights, by rising number: that is
// the order of the sum. One warp a row; dynamic shared memory: a word an expert, two a choice.
extern "C" __global__ void route_rows(const float* scores, int experts, int per_token, int norm_topk_prob,
                                      int* chosen, float* weights) {
    DYNAMIC_SHARED(unsigned, keys);
    int* choice = reinterpret_cast<int*>(keys + experts);
    float* probability = reinterpret_cast<float*>(choice + per_token);
    softmax_keys(scores + (long long)blockIdx.x * experts, experts, keys);
    float sum = 0.0f;
    for (int j = 0; j < per_token; ++j) {
        const int at = largest(keys, experts);
        const float p = from_key(keys[at]);
        sum += p;
        __syncwarp();
        if (threadIdx.x == 0) {
            choice[j] = at;
            probability[j] = p;
            keys[at] = 0;
        }
        __syncwarp();
    }
    for (int j = threadIdx.x; j < per_token; j += WARP) {
        int place = 0;
        for (int i = 0; i < per_token; ++i) place += choice[i] < choice[j];
        const long long to = (long long)blockIdx.x * per_token + place;
        chosen[to] = choice[j];
        weights[to] = norm_topk_prob ? probability[j] / sum : probability[j];
    }
}
EXPORT_KERNEL(route_rows)

// For each of the `experts` experts from `first` on: how many rows chose it, and of those, in
// order, the pair (row * per_token + place in the row's choice), the row and its weight; then
// the experts that have any, and -1 for the others. One block: the order is by warps' votes.
extern "C" __global__ void __launch_bounds__(1024)
    list_experts(const int* chosen, const float* weights, int rows, int per_token, int first, int experts,
                 int list_stride, int* counts, int* active, int* pairs, int* row_lists, float* factors) {
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const unsigned below = (1u << lane) - 1;
    for (int expert = threadIdx.x / WARP; expert < experts; expert += warps) {
        const long long list = (long long)expert * list_stride;
        int count = 0;
        for (int base = 0; base < rows; base += WARP) {
            const int row = base + lane;
            int pair = -1;
            for (int j = 0; row < rows && j < per_token; ++j) {
                if (chosen[row * per_token + j] == first + expert) pair = row * per_token + j;
            }
            const unsigned votes = __ballot_sync(FULL_WARP, pair >= 0);
            if (pair >= 0) {
                const long long to = list + count + __popc(votes & below);
                pairs[to] = pair;
                row_lists[to] = row;
                factors[to] = weights[pair];
            }
            count += __popc(votes);
        }
        if (lane == 0) counts[expert] = count;
    }
    __syncthreads();
    if (threadIdx.x >= WARP) return;
    int total = 0;
    for (int base = 0; base < experts; base += WARP) {
        const int expert = base + lane;
        const bool has_rows = expert < experts && counts[expert] > 0;
        const unsigned votes = __ballot_sync(FULL_WARP, has_rows);
        if (has_rows) active[total + __popc(votes & below)] = expert;
        total += __popc(votes);
    }
    for (int i = total + lane; i < experts; i += WARP) active[i] = -1;
}
EXPORT_KERNEL(list_experts)

// out[row] = the weighted sum of y over the row's experts that are here, in their order.
extern "C" __global__ void combine_experts(const float* y, const int* chosen, const float* weights,
                                           int per_token, int first, int experts, float* out, int width) {
    const long long row = blockIdx.x;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        float sum = 0.0f;
        for (long long pair = row * per_token; pair < (row + 1) * per_token; ++pair) {
            const int expert = chosen[pair] - first;
            if (expert >= 0 && expert < experts) sum += weights[pair] * y[pair * width + at];
        }
        out[row * width + at] = sum;
    }
}
EXPORT_KERNEL(combine_experts)

#define PRODUCTS(W, X, M, Weights, type)                                                           \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP) experts_gate_up_##W##_##X##_##M(    \
        const unsigned long long* addresses, const int* active, const int* counts,                 \
        const int* pairs, int list_stride, int per_token, int experts, int kind, const type* x,    \
        type* inner, int rows, int cols, int skip, long long stride, int parts, int wide) {        \
        gate_up<Weights, M>({addresses, active, counts, pairs, list_stride, per_token}, experts,   \
                            x, inner, {rows, cols, skip, stride}, kind, parts, wide);              \
    }                                                                                              \
    EXPORT_KERNEL(experts_gate_up_##W##_##X##_##M)                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP) experts_down_##W##_##X##_##M(       \
        const unsigned long long* addresses, const int* active, const int* counts,                 \
        const int* pairs, int list_stride, int per_token, const type* inner, float* y, int rows,   \
        int cols, int skip, long long stride, int parts, int wide) {                               \
        down<Weights, M>({addresses, active, counts, pairs, list_stride, per_token}, inner, y,     \
                         {rows, cols, skip, stride}, parts, wide);                                 \
    }                                                                                              \
    EXPORT_KERNEL(experts_down_##W##_##X##_##M)

#define PRODUCTS_OF(W, X, Weights, type) \
    PRODUCTS(W, X, 1, Weights, type)     \
    PRODUCTS(W, X, 4, Weights, type)

// Blocks meet 16-bit activations only: with f32 ones, which check other ways of computing, the
// host takes part.
#define KERNELS(X, type)                           \
    PRODUCTS_OF(X, X, Dense<type>, type)           \
    PRODUCTS_OF(q4_0, X, Blocks<Q4_0>, type)       \
    PRODUCTS_OF(q4_1, X, Blocks<Q4_1>, type)       \
    PRODUCTS_OF(q5_0, X, Blocks<Q5_0>, type)       \
    PRODUCTS_OF(q5_1, X, Blocks<Q5_1>, type)       \
    PRODUCTS_OF(q8_0, X, Blocks<Q8_0>, type)       \
    PRODUCTS_OF(q2_k, X, Blocks<Q2_K>, type)       \
    PRODUCTS_OF(q3_k, X, Blocks<Q3_K>, type)       \
    PRODUCTS_OF(q4_k, X, Blocks<Q4_K>, type)       \
    PRODUCTS_OF(q5_k, X, Blocks<Q5_K>, type)       \
    PRODUCTS_OF(q6_k, X, Blocks<Q6_K>, type)

PRODUCTS_OF(f32, f32, Dense<float>, float)
KERNELS(f16, f16)
KERNELS(bf16, bf16)
