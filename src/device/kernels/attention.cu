// Attention over the paged KV cache, and what comes right before it.
//
//   rope_and_cache   norms and rotates queries and keys, writes keys and values to the cache
//   attend_rows      a row at a time, split over its keys; any head, any type (f32's path)
//   attend_split     the same for decode on tensor cores
//   attend_combine   adds up the splits of the two above
//   attend_prefill   chunks of prompts on tensor cores (Dao 2023, FlashAttention-2)
//
// A block of the cache holds 16 tokens, `[block][kv_head][16][head_dim]`, keys and values
// alike. A query sees the keys of its own sequence up to its own position, and with a window
// only the last ones of them. Keys that no query of a tile sees never enter a product,
// not even times zero: their place may belong to another sequence, or hold anything.
//
// Left out: attention sinks, masks other than causal and sliding, and an own fast path on
// tensor cores for f32 (TF32 would round its operands to 10 bits).
#include "common.cuh"
#include "tiles.cuh"

namespace {

constexpr int BLOCK = 16;  // tokens of a cache block

// ---------------------------------------------------------------- the rule of the scores

// Window, cap and slopes are 0 or null where the model has none.
struct Rule {
    float scale;
    int window;
    float softcap;
    const float* slopes;
    float inverse_softcap;

    __device__ Rule(float scale_, int window_, float softcap_, const float* slopes_)
        : scale(scale_), window(window_), softcap(softcap_), slopes(slopes_),
          inverse_softcap(softcap_ > 0.0f ? 1.0f / softcap_ : 0.0f) {}

    // The first key that the query at `position` sees.
    __device__ __forceinline__ int first(int position) const { return window > 0 ? max(position + 1 - window, 0) : 0; }

    // ALiBi's slope of a head; transformers rounds it, the key's position and their product to bf16.
    __device__ __forceinline__ float slope(int head) const {
        return slopes ? to_f32(from_f32<bf16>(slopes[head])) : 0.0f;
    }

    __device__ __forceinline__ float score(float dot, float slope, int key) const {
        float score = dot * scale;
        if (softcap > 0.0f) score = softcap * tanhf(score * inverse_softcap);
        if (slopes) {
            const float bias = slope * to_f32(from_f32<bf16>(static_cast<float>(key)));
            score += to_f32(from_f32<bf16>(bias)) * scale;
        }
        return score;
    }
};

// ---------------------------------------------------------------- rotation, and the cache

// A row of the projection: all query heads, then key heads, then value heads.
template <class T> struct Projected {
    T* qkv;
    T* q_out;
    int q_stride;
    const float* q_weight;
    const float* k_weight;
    float eps;
    const float* cos;
    const float* sin;
    int rotary_dim, interleaved;
    T* keys;
    T* values;
    int heads, kv_heads, head_dim;

    // Where head `head` of row `row` comes from and goes to, and the weight of its norm.
    struct Place {
        const T* from;
        T* to;
        const float* weight;
        bool rotated;
    };
    __device__ Place place(int row, int head, int slot) const {
        Place p;
        p.from = qkv + (static_cast<size_t>(row) * (heads + 2 * kv_heads) + head) * head_dim;
        p.rotated = cos != nullptr && head < heads + kv_heads;
        if (head < heads) {
            p.to = q_out + static_cast<size_t>(row) * q_stride + head * head_dim;
            p.weight = q_weight;
            return p;
        }
        const bool key = head < heads + kv_heads;
        const int kv_head = head - heads - (key ? 0 : kv_heads);
        const size_t block = static_cast<size_t>(slot / BLOCK) * kv_heads + kv_head;
        p.to = (key ? keys : values) + (block * BLOCK + slot % BLOCK) * head_dim;
        p.weight = key ? k_weight : nullptr;
        return p;
    }
    // The two values that element `pair` turns.
    __device__ __forceinline__ int first_of(int pair) const { return interleaved ? 2 * pair : pair; }
    __device__ __forceinline__ int second_of(int pair) const { return interleaved ? 2 * pair + 1 : pair + rotary_dim / 2; }
};

__device__ __forceinline__ float turned_first(float a, float b, float cos, float sin) { return a * cos - b * sin; }
__device__ __forceinline__ float turned_second(float a, float b, float cos, float sin) { return b * cos + a * sin; }

// One head by one warp, value by value.
template <class T>
__device__ void project_head(const Projected<T>& x, typename Projected<T>::Place p, const float* cos, const float* sin) {
    const int lane = threadIdx.x % WARP;
    float scale = 1.0f;
    if (p.weight) {
        float squares = 0.0f;
        for (int d = lane; d < x.head_dim; d += WARP) {
            const float v = to_f32(p.from[d]);
            squares += v * v;
        }
        scale = 1.0f / sqrtf(warp_sum(squares) / x.head_dim + x.eps);
    }
    __syncwarp();  // all have read before one writes in place
    const int rotated = p.rotated ? x.rotary_dim : 0;
    for (int pair = lane; pair < rotated / 2; pair += WARP) {
        const int first = x.first_of(pair), second = x.second_of(pair);
        const float a = to_f32(p.from[first]) * scale * (p.weight ? p.weight[first] : 1.0f);
        const float b = to_f32(p.from[second]) * scale * (p.weight ? p.weight[second] : 1.0f);
        p.to[first] = from_f32<T>(turned_first(a, b, cos[pair], sin[pair]));
        p.to[second] = from_f32<T>(turned_second(a, b, cos[pair], sin[pair]));
    }
    for (int d = rotated + lane; d < x.head_dim; d += WARP) {
        const float v = to_f32(p.from[d]) * scale;
        p.to[d] = from_f32<T>(p.weight ? v * p.weight[d] : v);
    }
}

// One head by `lanes` lanes of a warp (a power of two; the last ones may be idle), 16 values
// each: eight pairs, or 16 neighbours beyond the rotated ones. Needs a head_dim and a
// rotary_dim that 16 divides.
template <class T>
__device__ void project_head_by_16(const Projected<T>& x, typename Projected<T>::Place p, bool there, const float* cos,
                                   const float* sin, int lanes) {
    const int part = threadIdx.x % lanes;
    const bool active = there && 16 * part < x.head_dim;
    const bool turns = active && p.rotated && 16 * part < x.rotary_dim;
    const bool halves = turns && !x.interleaved;
    const int low_at = halves ? 8 * part : 16 * part;
    const int high_at = halves ? low_at + x.rotary_dim / 2 : low_at + 8;
    float low[8] = {}, high[8] = {};
    if (active) {
        load8(p.from + low_at, low);
        load8(p.from + high_at, high);
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) squares += low[i] * low[i] + high[i] * high[i];
    for (int step = lanes / 2; step > 0; step /= 2) squares += __shfl_xor_sync(FULL_WARP, squares, step);
    if (!active) return;
    if (p.weight) {
        const float scale = 1.0f / sqrtf(squares / x.head_dim + x.eps);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            low[i] = low[i] * scale * p.weight[low_at + i];
            high[i] = high[i] * scale * p.weight[high_at + i];
        }
    }
    if (turns) {
        float c[8], s[8], turned_low[8], turned_high[8];
        load8(cos + 8 * part, c);
        load8(sin + 8 * part, s);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (x.interleaved) {
                const float* from = i < 4 ? low : high;
                const float a = from[i % 4 * 2], b = from[i % 4 * 2 + 1];
                (i < 4 ? turned_low : turned_high)[i % 4 * 2] = turned_first(a, b, c[i], s[i]);
                (i < 4 ? turned_low : turned_high)[i % 4 * 2 + 1] = turned_second(a, b, c[i], s[i]);
            } else {
                turned_low[i] = turned_first(low[i], high[i], c[i], s[i]);
                turned_high[i] = turned_second(low[i], high[i], c[i], s[i]);
            }
        }
        store8(p.to + low_at, turned_low);
        store8(p.to + high_at, turned_high);
    } else {
        store8(p.to + low_at, low);
        store8(p.to + high_at, high);
    }
}

// `lanes` lanes a head. Bound by memory: every value is read and written once, in 16 bytes; in
// decode the launch takes longer than the work. Rows with a slot below 0 are left alone.
template <class T>
__device__ void rope_and_cache(const Projected<T>& x, const int* table_row, const int* slots, int rows, int lanes) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int heads_a_row = x.heads + 2 * x.kv_heads;
    const int item = thread / lanes, row = item / heads_a_row;
    const int slot = row < rows ? slots[row] : -1;
    const bool there = slot >= 0;
    if (!__any_sync(FULL_WARP, there)) return;
    const typename Projected<T>::Place place = x.place(row, item % heads_a_row, there ? slot : 0);
    const bool rotated = there && place.rotated;
    const size_t angles = rotated ? static_cast<size_t>(table_row[row]) * (x.rotary_dim / 2) : 0;
    if (x.head_dim % 16 == 0 && x.rotary_dim % 16 == 0) {
        project_head_by_16(x, place, there, x.cos + angles, x.sin + angles, lanes);
    } else {
        project_head(x, place, x.cos + angles, x.sin + angles);
    }
}

#define ROPE_AND_CACHE(T)                                                                                              \
    extern "C" __global__ void rope_and_cache_##T(                                                                     \
        T##_value* qkv, T##_value* q_out, int q_stride, const float* q_weight, const float* k_weight, float eps,       \
        const float* cos, const float* sin, int rotary_dim, int interleaved, const int* table_row, const int* slots,   \
        T##_value* keys, T##_value* values, int rows, int heads, int kv_heads, int head_dim, int lanes) {              \
        const Projected<T##_value> x = {qkv, q_out,      q_stride,    q_weight, k_weight, eps,   cos,      sin,        \
                                        rotary_dim, interleaved, keys, values, heads, kv_heads, head_dim};             \
        rope_and_cache(x, table_row, slots, rows, lanes);                                                              \
    }                                                                                                                  \
    EXPORT_KERNEL(rope_and_cache_##T)

// ---------------------------------------------------------------- rows: what they share

// A step's rows and the cache, as the kernels of rows get them.
template <class T> struct Rows {
    const T* q;
    int q_stride;
    const T* keys;
    const T* values;
    T* out;
    float* scratch;  // null where there is one split
    const int* row_list;
    const int* sequence_of_row;
    const int* positions;
    const int* block_tables;
    int max_blocks;
    int heads, kv_heads, head_dim;
    Rule rule;
};

// The keys that a row sees, in cache blocks, and how the splits share them.
struct Seen {
    int first, end;              // keys
    int first_block, end_block;  // cache blocks
    int blocks_a_split;

    // `position` below 0: a row of padding, which sees nothing.
    __device__ Seen(const Rule& rule, int position, int splits) {
        end = max(position + 1, 0);
        first = position >= 0 ? rule.first(position) : 0;
        first_block = first / BLOCK;
        end_block = (end + BLOCK - 1) / BLOCK;
        const int share = (end_block - first_block + splits - 1) / splits;
        // 256 keys at least, or the splits' sums would cost more than they save, and as many
        // blocks for each of 4 warps.
        blocks_a_split = max((share + 3) / 4 * 4, 16);
    }
    // Splits that have something to do; one at least, which writes the zeros of padding.
    __device__ int splits() const { return max((end_block - first_block + blocks_a_split - 1) / blocks_a_split, 1); }
};

// One row and one KV head of it, up to some number of its query heads, one split of its keys.
template <class T> struct RowTask {
    int row, kv_head, first_head, heads;
    Seen seen;
    int begin, end;  // cache blocks of this split
    bool idle;
    const int* table;

    __device__ RowTask(const Rows<T>& rows, int queries)
        : row(rows.row_list ? rows.row_list[blockIdx.x] : static_cast<int>(blockIdx.x)),
          seen(rows.rule, rows.sequence_of_row[row] < 0 ? -1 : rows.positions[row], gridDim.z) {
        const int group = rows.heads / rows.kv_heads, tiles = (group + queries - 1) / queries;
        kv_head = blockIdx.y / tiles;
        const int tile = blockIdx.y % tiles;
        first_head = kv_head * group + tile * queries;
        heads = min(queries, group - tile * queries);
        const int split = blockIdx.z;
        begin = seen.first_block + split * seen.blocks_a_split;
        end = min(begin + seen.blocks_a_split, seen.end_block);
        idle = split >= seen.splits();
        table = rows.block_tables + static_cast<size_t>(max(rows.sequence_of_row[row], 0)) * rows.max_blocks;
    }
    // Start of cache block `block` of the sequence, for this KV head.
    __device__ __forceinline__ size_t at(const Rows<T>& rows, int block) const {
        return (static_cast<size_t>(table[block]) * rows.kv_heads + kv_head) * (BLOCK * rows.head_dim);
    }
};

// The largest score of a query and the sum of e^(score - largest), as far as someone got.
struct Stat {
    float top, sum;
};

// e^(from - to), for a `from` that may be -inf because nothing was seen.
__device__ __forceinline__ float factor(float from, float to) { return from == -INFINITY ? 0.0f : expf(from - to); }

constexpr int ROW_WARPS = 4;

// Merges the sums of a block's warps, `values + warp * warp_stride + query * query_stride`, and
// writes the split's sums to the scratch memory, or the row's result where there is one split.
template <class T>
__device__ void write_row(const Rows<T>& rows, const RowTask<T>& task, const float* values, int warp_stride,
                          int query_stride, const Stat* stats, int stats_stride) {
    const size_t parts = static_cast<size_t>(gridDim.x) * rows.heads * gridDim.z;
    for (int query = 0; query < task.heads; query++) {
        const int head = task.first_head + query;
        Stat all = {-INFINITY, 0.0f};
        float weights[ROW_WARPS];
#pragma unroll
        for (int w = 0; w < ROW_WARPS; w++) all.top = fmaxf(all.top, stats[w * stats_stride + query].top);
#pragma unroll
        for (int w = 0; w < ROW_WARPS; w++) {
            weights[w] = factor(stats[w * stats_stride + query].top, all.top);
            all.sum += stats[w * stats_stride + query].sum * weights[w];
        }
        const size_t part = (static_cast<size_t>(blockIdx.x) * rows.heads + head) * gridDim.z + blockIdx.z;
        const float scale = all.sum == 0.0f ? 0.0f : 1.0f / all.sum;
        for (int d = threadIdx.x; d < rows.head_dim; d += blockDim.x) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < ROW_WARPS; w++) sum += weights[w] * values[w * warp_stride + query * query_stride + d];
            if (rows.scratch) {
                rows.scratch[2 * parts + part * rows.head_dim + d] = sum;
            } else {
                rows.out[(static_cast<size_t>(task.row) * rows.heads + head) * rows.head_dim + d] = from_f32<T>(sum * scale);
            }
        }
        if (rows.scratch && threadIdx.x == 0) reinterpret_cast<Stat*>(rows.scratch)[part] = all;
    }
}

// ---------------------------------------------------------------- rows, any type and head

// Each warp takes a cache block at a time: two lanes score a key for all QUERIES heads, then each
// lane sums DIMS (32 apart) of the values' dimensions. Grouped heads share every load.
// Bound by memory for one head a group, by the multiply-adds for eight.
template <class T, int QUERIES, int DIMS> __device__ void attend_rows(const Rows<T>& rows) {
    const RowTask<T> task(rows, QUERIES);
    if (task.idle) return;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int head_dim = rows.head_dim, q_stride = (head_dim + 7) / 8 * 8;
    DYNAMIC_SHARED(float, shared);
    float* q = shared;
    float* weights = q + QUERIES * q_stride + warp * QUERIES * BLOCK;
    Stat* stats = reinterpret_cast<Stat*>(q + QUERIES * q_stride + ROW_WARPS * QUERIES * BLOCK);
    float* sums = reinterpret_cast<float*>(stats + ROW_WARPS * QUERIES);

    const T* from = rows.q + static_cast<size_t>(task.row) * rows.q_stride + static_cast<size_t>(task.first_head) * head_dim;
    for (int i = threadIdx.x; i < QUERIES * q_stride; i += blockDim.x) {
        const int query = i / q_stride, d = i % q_stride;
        q[i] = query < task.heads && d < head_dim ? to_f32(from[query * head_dim + d]) : 0.0f;
    }
    float slopes[QUERIES], top[QUERIES], sum[QUERIES], out[QUERIES][DIMS];
#pragma unroll
    for (int h = 0; h < QUERIES; h++) {
        slopes[h] = rows.rule.slope(task.first_head + min(h, task.heads - 1));
        top[h] = -INFINITY;
        sum[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < DIMS; i++) out[h][i] = 0.0f;
    }
    __syncthreads();

    for (int block = task.begin + warp; block < task.end; block += ROW_WARPS) {
        const size_t at = task.at(rows, block);
        const int key = block * BLOCK + lane / 2;
        const bool seen = key >= task.seen.first && key < task.seen.end;
        const T* k = rows.keys + at + lane / 2 * head_dim;
        float dots[QUERIES] = {};
        if (head_dim % 8 == 0) {
            for (int d = lane % 2 * 8; d < head_dim; d += 16) {
                float values[8];
                load8(k + d, values);
#pragma unroll
                for (int h = 0; h < QUERIES; h++) {
                    float own[8];
                    load8(q + h * q_stride + d, own);
#pragma unroll
                    for (int i = 0; i < 8; i++) dots[h] += own[i] * values[i];
                }
            }
        } else {
            for (int d = lane % 2; d < head_dim; d += 2) {
                const float value = to_f32(k[d]);
#pragma unroll
                for (int h = 0; h < QUERIES; h++) dots[h] += q[h * q_stride + d] * value;
            }
        }
#pragma unroll
        for (int h = 0; h < QUERIES; h++) {
            const float dot = dots[h] + __shfl_xor_sync(FULL_WARP, dots[h], 1);
            const float score = seen ? rows.rule.score(dot, slopes[h], key) : -INFINITY;
            const float new_top = fmaxf(top[h], warp_max(score));  // a block of the range has a key that is seen
            const float shrink = factor(top[h], new_top);
            const float weight = seen ? expf(score - new_top) : 0.0f;
            top[h] = new_top;
            sum[h] = sum[h] * shrink + weight;
#pragma unroll
            for (int i = 0; i < DIMS; i++) out[h][i] *= shrink;
            if (lane % 2 == 0) weights[h * BLOCK + lane / 2] = weight;
        }
        __syncwarp();
        const T* v = rows.values + at;
#pragma unroll
        for (int t = 0; t < BLOCK; t += 4) {
            float values[4][DIMS];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int token = block * BLOCK + t + j;
                const bool wanted = token >= task.seen.first && token < task.seen.end;
#pragma unroll
                for (int i = 0; i < DIMS; i++) {
                    const int d = lane + WARP * i;
                    values[j][i] = wanted && d < head_dim ? to_f32(v[(t + j) * head_dim + d]) : 0.0f;
                }
            }
#pragma unroll
            for (int h = 0; h < QUERIES; h++) {
                const float4 w = *reinterpret_cast<const float4*>(weights + h * BLOCK + t);
#pragma unroll
                for (int i = 0; i < DIMS; i++) {
                    out[h][i] += w.x * values[0][i] + w.y * values[1][i] + w.z * values[2][i] + w.w * values[3][i];
                }
            }
        }
        __syncwarp();  // the weights are read before the next block's are written
    }
#pragma unroll
    for (int h = 0; h < QUERIES; h++) {
        const float total = 0.5f * warp_sum(sum[h]);  // two lanes a key
        if (lane == 0) stats[warp * QUERIES + h] = {top[h], total};
#pragma unroll
        for (int i = 0; i < DIMS; i++) {
            const int d = lane + WARP * i;
            if (d < head_dim) sums[(warp * QUERIES + h) * head_dim + d] = out[h][i];
        }
    }
    __syncthreads();
    write_row(rows, task, sums, QUERIES * head_dim, head_dim, stats, QUERIES);
}

// Adds up the splits of one row and head. Bound by latency: a few KiB a block.
template <class T> __device__ void attend_combine(const Rows<T>& rows, int splits) {
    const int row = rows.row_list ? rows.row_list[blockIdx.x] : static_cast<int>(blockIdx.x), head = blockIdx.y;
    const int position = rows.sequence_of_row[row] < 0 ? -1 : rows.positions[row];
    const int live = Seen(rows.rule, position, splits).splits();
    const size_t parts = static_cast<size_t>(gridDim.x) * rows.heads * splits;
    const size_t part = (static_cast<size_t>(blockIdx.x) * rows.heads + head) * splits;
    const Stat* stats = reinterpret_cast<const Stat*>(rows.scratch) + part;
    const float* values = rows.scratch + 2 * parts + part * rows.head_dim;
    Stat all = {-INFINITY, 0.0f};
    for (int s = 0; s < live; s++) all.top = fmaxf(all.top, stats[s].top);
    for (int s = 0; s < live; s++) all.sum += stats[s].sum * factor(stats[s].top, all.top);
    const float scale = all.sum == 0.0f ? 0.0f : 1.0f / all.sum;
    for (int d = threadIdx.x; d < rows.head_dim; d += blockDim.x) {
        float sum = 0.0f;
        for (int s = 0; s < live; s++) sum += factor(stats[s].top, all.top) * values[s * rows.head_dim + d];
        rows.out[(static_cast<size_t>(row) * rows.heads + head) * rows.head_dim + d] = from_f32<T>(sum * scale);
    }
}

// ---------------------------------------------------------------- tensor cores: 16 queries of a warp

// 16 queries (or fewer) of one KV head against tiles of KEYS keys, heads padded by zeros to DIM,
// all by one warp. There are two kinds of QueryTile: from compute capability 8.0 on, and by wmma for
// cards before. Queries, keys and values lie in shared memory, rows of STRIDE values of T. A
// lane follows LANE_QUERIES of the queries, with the keys `first..end` that each of them sees.

// A query's weights are taken relative to a score of its own, which only moves once the largest
// lies this far above it: weights up to e^8, at no loss in floating point, and the sums seldom
// have to be scaled.
constexpr float SLACK = 8.0f;

// The statistics of a query in one lane; `sum` over the keys that the lane has.
struct Running {
    float top = -INFINITY, sum = 0.0f;

    // Takes the largest of a tile's scores into account; the factor for earlier sums. `any`
    // becomes true where there are some and the factor is not 1.
    __device__ __forceinline__ float follow(float largest, bool& any) {
        if (largest <= top + SLACK && top != -INFINITY) return 1.0f;
        const float shrink = factor(top, largest);
        any = any || top != -INFINITY;
        top = largest;
        sum *= shrink;
        return shrink;
    }
    // What scores are relative to; where nothing was seen all are -inf and so are to stay.
    __device__ __forceinline__ float base() const { return top == -INFINITY ? 0.0f : top; }
    // __expf errs by less than 1e-6 here; the weight is rounded to 8 or 11 bits.
    __device__ __forceinline__ float weight(float score) const { return __expf(score - base()); }
};

__device__ __forceinline__ float inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

template <class T, int DIM, int KEYS, bool VOLTA> struct QueryTile;

// From compute capability 8.0 on: scores and sums stay in registers.
#ifdef FARM_TILES
template <class T, int DIM, int KEYS> struct QueryTile<T, DIM, KEYS, false> {
    static constexpr int STRIDE = DIM + 8;  // without bank conflicts
    static constexpr int LANE_QUERIES = 2;
    static constexpr int SCORES = 0;
    // Where registers are short, the queries are loaded again for each tile: for wide heads, and for
    // narrow ones, of which a multiprocessor has two blocks.
    static constexpr bool KEEPS = DIM > 64 && DIM <= 128;

    float out[DIM / 8][4] = {};
    Running running[2];
    unsigned queries[KEEPS ? DIM / 16 : 1][4];
    const T* q;

    __device__ QueryTile(const T* own_q, float*) : q(own_q) {
        if constexpr (KEEPS) {
#pragma unroll
            for (int d = 0; d < DIM; d += 16) load_queries(queries[d / 16], d);
        }
    }

    static __device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
    static __device__ __forceinline__ int query(int i) { return lane() / 4 + 8 * i; }
    // Where the keys (or dimensions) 8n + key_at() and the next lie among the tile's.
    static __device__ __forceinline__ int key_at() { return lane() % 4 * 2; }

    __device__ __forceinline__ void load_queries(unsigned (&to)[4], int d) const {
        load_tiles(to, q + lane() % 16 * STRIDE + d + lane() / 16 * 8);
    }

    __device__ void add(const T* keys, const T* values, const Rule& rule, const float (&slope)[2], int first_key,
                        const int (&first)[2], const int (&end)[2], bool whole) {
        float x[KEYS / 8][4] = {};
        score(keys, x);
        if (rule.softcap > 0.0f || rule.slopes) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) x[n][i] = rule.score(x[n][i], slope[i / 2], first_key + 8 * n + key_at() + i % 2);
            }
        } else {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) x[n][i] *= rule.scale;
            }
        }
        if (!whole) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int key = first_key + 8 * n + key_at() + i % 2;
                    if (key < first[i / 2] || key >= end[i / 2]) x[n][i] = -INFINITY;
                }
            }
        }
        follow(x);
        sum_values(values, x);
    }

    __device__ __forceinline__ void score(const T* keys, float (&x)[KEYS / 8][4]) {
        const T* row = keys + (lane() / 16 * 8 + lane() % 8) * STRIDE + lane() / 8 % 2 * 8;
#pragma unroll
        for (int d = 0; d < DIM; d += 16) {
            if (!KEEPS) load_queries(queries[0], d);
#pragma unroll
            for (int n = 0; n < KEYS; n += 16) {
                unsigned b[4];
                load_tiles(b, row + n * STRIDE + d);
                multiply<T>(x[n / 8], queries[KEEPS ? d / 16 : 0], b[0], b[1]);
                multiply<T>(x[n / 8 + 1], queries[KEEPS ? d / 16 : 0], b[2], b[3]);
            }
        }
    }

    // Moves what the scores are relative to, and scales the sums.
    __device__ __forceinline__ void follow(const float (&x)[KEYS / 8][4]) {
        float shrink[2];
        bool any = false;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float largest = -INFINITY;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) largest = fmaxf(largest, fmaxf(x[n][2 * i], x[n][2 * i + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 2));
            shrink[i] = running[i].follow(largest, any);
        }
        if (!__any_sync(FULL_WARP, any)) return;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] *= shrink[i / 2];
        }
    }

    // Scores to weights, 16 keys at a time; as operands they lie where the scores did.
    __device__ __forceinline__ void sum_values(const T* values, const float (&x)[KEYS / 8][4]) {
        const T* row = values + lane() % 16 * STRIDE + lane() / 16 * 8;
#pragma unroll
        for (int k = 0; k < KEYS; k += 16) {
            unsigned weights[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float(&two)[4] = x[k / 8 + i / 2];
                Running& own = running[i % 2];
                const float low = own.weight(two[2 * (i % 2)]), high = own.weight(two[2 * (i % 2) + 1]);
                own.sum += low + high;
                weights[i] = pack2<T>(low, high);
            }
#pragma unroll
            for (int d = 0; d < DIM; d += 16) {
                unsigned b[4];
                load_tiles_transposed(b, row + k * STRIDE + d);
                multiply<T>(out[d / 8], weights, b[0], b[1]);
                multiply<T>(out[d / 8 + 1], weights, b[2], b[3]);
            }
        }
        __syncwarp();  // keys and values are read before others come
    }

    // The sum of query `query(i)`.
    __device__ __forceinline__ float total(int i) const {
        const float sum = running[i].sum + __shfl_xor_sync(FULL_WARP, running[i].sum, 1);
        return sum + __shfl_xor_sync(FULL_WARP, sum, 2);
    }
    // To `to[16][STRIDE]` and `stats[16]`, in shared memory.
    __device__ void write_sums(float* to, Stat* stats) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float sum = total(i);
            if (lane() % 4 == 0) stats[query(i)] = {running[i].top, sum};
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                *reinterpret_cast<float2*>(to + query(i) * STRIDE + 8 * n + key_at()) = make_float2(out[n][2 * i], out[n][2 * i + 1]);
            }
        }
    }
    // The results to `to[16][STRIDE]` in shared memory.
    __device__ void write_results(T* to) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float scale = inverse(total(i));
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                *reinterpret_cast<unsigned*>(to + query(i) * STRIDE + 8 * n + key_at()) =
                    pack2<T>(out[n][2 * i] * scale, out[n][2 * i + 1] * scale);
            }
        }
    }
};
#endif

// Four values of 16 bits that are stored at once.
template <class T> union Pack4 {
    uint2 words;
    T values[4];
    __device__ Pack4() : words{} {}
};

// By wmma, for Volta and Turing: where a value lies in registers is unknown, so scores go through
// shared memory, and sums too where they are scaled. Lanes 2i and 2i + 1 follow query i.
template <class T, int DIM, int KEYS> struct QueryTile<T, DIM, KEYS, true> {
    static constexpr int STRIDE = DIM + 8;
    static constexpr int LANE_QUERIES = 1;
    static constexpr int SCORE_STRIDE = KEYS + 8;     // both without bank conflicts
    static constexpr int SCORES = 16 * SCORE_STRIDE;  // floats of memory of its own
    static constexpr int COLUMNS = DIM / 16;
    static constexpr int AT_ONCE = KEYS / 16;  // columns of tiles that the scores' memory takes
    using Sums = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;
    using Rows16 = wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major>;
    using Keys16 = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major>;
    using Values16 = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major>;

    Sums out[COLUMNS];
    Running running;
    const T* q;
    float* scores;

    __device__ QueryTile(const T* own_q, float* own_scores) : q(own_q), scores(own_scores) {
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) wmma::fill_fragment(out[i], 0.0f);
    }

    static __device__ __forceinline__ int half() { return threadIdx.x % 2; }
    static __device__ __forceinline__ int query(int) { return threadIdx.x % WARP / 2; }
    // Where this lane's keys 4c..4c + 4 lie among the tile's.
    static __device__ __forceinline__ int key_at(int c) { return (2 * c + half()) * 4; }
    __device__ __forceinline__ float4* scores_at(int c) const {
        return reinterpret_cast<float4*>(scores + query(0) * SCORE_STRIDE + key_at(c));
    }

    __device__ void add(const T* keys, const T* values, const Rule& rule, const float (&slope)[1], int first_key,
                        const int (&first)[1], const int (&end)[1], bool whole) {
        score(keys);
        float x[KEYS / 2];
#pragma unroll
        for (int c = 0; c < KEYS / 8; c++) {
            const float4 four = *scores_at(c);
            x[4 * c] = four.x;
            x[4 * c + 1] = four.y;
            x[4 * c + 2] = four.z;
            x[4 * c + 3] = four.w;
        }
        __syncwarp();  // the scores' memory is free
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) {
            const int key = first_key + key_at(i / 4) + i % 4;
            x[i] = rule.score(x[i], slope[0], key);
            if (!whole && (key < first[0] || key >= end[0])) x[i] = -INFINITY;
        }
        weigh(x);
        sum_values(values);
    }

    __device__ void score(const T* keys) {
        Sums tile[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) wmma::fill_fragment(tile[n], 0.0f);
#pragma unroll
        for (int d = 0; d < DIM; d += 16) {
            Rows16 a;
            wmma::load_matrix_sync(a, q + d, STRIDE);
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++) {
                Keys16 b;
                wmma::load_matrix_sync(b, keys + n * 16 * STRIDE + d, STRIDE);
                wmma::mma_sync(tile[n], a, b, tile[n]);
            }
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) wmma::store_matrix_sync(scores + n * 16, tile[n], SCORE_STRIDE, wmma::mem_row_major);
        __syncwarp();
    }

    // Scores to weights, laid down as [16][SCORE_STRIDE] of T where the scores were.
    __device__ void weigh(const float (&x)[KEYS / 2]) {
        float largest = x[0];
#pragma unroll
        for (int i = 1; i < KEYS / 2; i++) largest = fmaxf(largest, x[i]);
        largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 1));
        bool any = false;
        const float shrink = running.follow(largest, any);
        if (__any_sync(FULL_WARP, any)) rescale(shrink);
        T* weights = reinterpret_cast<T*>(scores) + query(0) * SCORE_STRIDE;
#pragma unroll
        for (int c = 0; c < KEYS / 8; c++) {
            Pack4<T> four;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float weight = running.weight(x[4 * c + i]);
                running.sum += weight;
                four.values[i] = from_f32<T>(weight);
            }
            *reinterpret_cast<uint2*>(weights + key_at(c)) = four.words;
        }
        __syncwarp();
    }

    // Scales each query's sums by its factor; the scores' memory is free.
    __device__ void rescale(float shrink) {
#pragma unroll
        for (int j = 0; j < COLUMNS; j += AT_ONCE) {
            lay_down(j);
#pragma unroll
            for (int c = 0; c < KEYS / 8; c++) {
                float4 four = *scores_at(c);
                four.x *= shrink;
                four.y *= shrink;
                four.z *= shrink;
                four.w *= shrink;
                *scores_at(c) = four;
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (j + i < COLUMNS) {
                    wmma::load_matrix_sync(out[j + i], scores + i * 16, SCORE_STRIDE, wmma::mem_row_major);
                }
            }
            __syncwarp();
        }
    }

    // The sums of AT_ONCE columns of tiles from column `j` on, where the scores were.
    __device__ __forceinline__ void lay_down(int j) const {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (j + i < COLUMNS) wmma::store_matrix_sync(scores + i * 16, out[j + i], SCORE_STRIDE, wmma::mem_row_major);
        }
        __syncwarp();
    }

    __device__ void sum_values(const T* values) {
        const T* weights = reinterpret_cast<const T*>(scores);
#pragma unroll
        for (int k = 0; k < KEYS; k += 16) {
            Rows16 a;
            wmma::load_matrix_sync(a, weights + k, SCORE_STRIDE);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                Values16 b;
                wmma::load_matrix_sync(b, values + k * STRIDE + j * 16, STRIDE);
                wmma::mma_sync(out[j], a, b, out[j]);
            }
        }
        __syncwarp();  // keys, values and weights are read before others come
    }

    __device__ __forceinline__ float total() const { return running.sum + __shfl_xor_sync(FULL_WARP, running.sum, 1); }
    __device__ void write_sums(float* to, Stat* stats) const {
        const float sum = total();
        if (half() == 0) stats[query(0)] = {running.top, sum};
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) wmma::store_matrix_sync(to + j * 16, out[j], STRIDE, wmma::mem_row_major);
    }
    __device__ void write_results(T* to) const {
        const float scale = inverse(total());
#pragma unroll
        for (int j = 0; j < COLUMNS; j += AT_ONCE) {
            lay_down(j);
#pragma unroll
            for (int c = 0; c < KEYS / 8; c++) {
                const float4 four = *scores_at(c);
                if (j * 16 + key_at(c) >= DIM) continue;
                T* row = to + query(0) * STRIDE + j * 16 + key_at(c);
                row[0] = from_f32<T>(four.x * scale);
                row[1] = from_f32<T>(four.y * scale);
                row[2] = from_f32<T>(four.z * scale);
                row[3] = from_f32<T>(four.w * scale);
            }
            __syncwarp();
        }
    }
};

// Copies keys and values of one KV head from the cache into shared memory, 16 bytes at a time:
// the lanes of a warp side by side along the head, as many tokens at once as fit.
template <class T, bool ASYNC> struct TileLoader {
    const T* keys;
    const T* values;
    const int* table;
    int kv_heads, kv_head, head_dim;
    int first, end;  // keys beyond are not read; their place is filled with zeros
    int at_once, own, octet;

    __device__ TileLoader(const T* all_keys, const T* all_values, const int* block_table, int num_kv_heads, int own_kv_head,
                          int width, int first_key, int end_key)
        : keys(all_keys), values(all_values), table(block_table), kv_heads(num_kv_heads), kv_head(own_kv_head),
          head_dim(width), first(first_key), end(end_key) {
        const int octets = head_dim / 8, lane = threadIdx.x % WARP;
        at_once = WARP / octets;
        own = lane / octets;
        octet = lane % octets;
    }

    // By one warp, `count` tokens of one cache block, from `key` on.
    __device__ __forceinline__ void load(T* to_keys, T* to_values, int stride, int key, int count) const {
        if (own >= at_once) return;
        size_t from = (static_cast<size_t>(key % BLOCK + own) * head_dim) + octet * 8;
        if (key < end && key + count > first) {
            from += (static_cast<size_t>(table[key / BLOCK]) * kv_heads + kv_head) * (BLOCK * head_dim);
        }
        const int step = at_once * head_dim, to = own * stride + octet * 8, to_step = at_once * stride;
        const int tokens = (count - own + at_once - 1) / at_once;
        const int low = max(first - key - own, 0), high = end - key - own;  // of i * at_once: what is read
        if constexpr (ASYNC) {
#pragma unroll 4
            for (int i = 0; i < tokens; i++) {
                T *k = to_keys + to + i * to_step, *v = to_values + to + i * to_step;
                if (i * at_once >= low && i * at_once < high) {
                    copy_async16(k, keys + from + i * step);
                    copy_async16(v, values + from + i * step);
                } else {
                    *reinterpret_cast<uint4*>(k) = make_uint4(0, 0, 0, 0);
                    *reinterpret_cast<uint4*>(v) = make_uint4(0, 0, 0, 0);
                }
            }
        } else {
            constexpr int BATCH = 4;  // tokens a lane loads before it stores them, or it would wait for each
            for (int start = 0; start < tokens; start += BATCH) {
                uint4 k[BATCH], v[BATCH];
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    const int i = start + j;
                    k[j] = v[j] = make_uint4(0, 0, 0, 0);
                    if (i < tokens && i * at_once >= low && i * at_once < high) {
                        k[j] = *reinterpret_cast<const uint4*>(keys + from + i * step);
                        v[j] = *reinterpret_cast<const uint4*>(values + from + i * step);
                    }
                }
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    const int i = start + j;
                    if (i < tokens) {
                        *reinterpret_cast<uint4*>(to_keys + to + i * to_step) = k[j];
                        *reinterpret_cast<uint4*>(to_values + to + i * to_step) = v[j];
                    }
                }
            }
        }
    }
};

// Zeros in the columns from `head_dim` on, which nothing else writes, by `threads` threads.
template <class T>
__device__ void clear_padding(T* tile, int rows, int stride, int head_dim, int dim, int thread, int threads) {
    const int octets = (dim - head_dim) / 8;
    for (int i = thread; i < rows * octets; i += threads) {
        *reinterpret_cast<uint4*>(tile + i / octets * stride + head_dim + i % octets * 8) = make_uint4(0, 0, 0, 0);
    }
}

// ---------------------------------------------------------------- rows on tensor cores

// Decode. The heads of a group (16 at most, else several blocks) are the tile's queries and every
// warp takes cache blocks of its own, so that warps wait for nobody but at the end. The tile is mostly
// padding, yet bound by memory: 16 keys of 128 dimensions are 8 KiB, some 400 cycles' share
// of an H100's bandwidth for a multiprocessor, and 131 kFLOP, some 50 cycles.
template <class T, int DIM, bool VOLTA> __device__ void attend_split(const Rows<T>& rows, int stages) {
    using Queries = QueryTile<T, DIM, BLOCK, VOLTA>;
    constexpr int STRIDE = Queries::STRIDE, TILE = BLOCK * STRIDE;
    const RowTask<T> task(rows, BLOCK);
    if (task.idle) return;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head_dim = rows.head_dim;
    DYNAMIC_SHARED(T, q);
    float* scores = reinterpret_cast<float*>(q + TILE);
    Stat* stats = reinterpret_cast<Stat*>(scores + ROW_WARPS * Queries::SCORES);
    T* tiles = reinterpret_cast<T*>(stats + ROW_WARPS * BLOCK);
    T* own = tiles + warp * stages * 2 * TILE;

    const T* from = rows.q + static_cast<size_t>(task.row) * rows.q_stride + static_cast<size_t>(task.first_head) * head_dim;
    for (int i = threadIdx.x; i < BLOCK * DIM / 8; i += blockDim.x) {
        const int query = i / (DIM / 8), d = i % (DIM / 8) * 8;
        const bool there = query < task.heads && d < head_dim;
        *reinterpret_cast<uint4*>(q + query * STRIDE + d) =
            there ? *reinterpret_cast<const uint4*>(from + query * head_dim + d) : make_uint4(0, 0, 0, 0);
    }
    clear_padding(own, stages * 2 * BLOCK, STRIDE, head_dim, DIM, lane, WARP);
    const TileLoader<T, !VOLTA> loader(rows.keys, rows.values, task.table, rows.kv_heads, task.kv_head, head_dim,
                                       task.seen.first, task.seen.end);
    const int first_block = task.begin + warp;
    if (stages == 2 && first_block < task.end) loader.load(own, own + TILE, STRIDE, first_block * BLOCK, BLOCK);
    copy_async_commit();
    __syncthreads();

    Queries queries(q, scores + warp * Queries::SCORES);
    int first[Queries::LANE_QUERIES], end[Queries::LANE_QUERIES];
    float slope[Queries::LANE_QUERIES];
#pragma unroll
    for (int i = 0; i < Queries::LANE_QUERIES; i++) {
        first[i] = task.seen.first;
        end[i] = task.seen.end;
        slope[i] = rows.rule.slope(task.first_head + min(Queries::query(i), task.heads - 1));
    }
    int stage = 0;
    for (int block = first_block; block < task.end; block += ROW_WARPS) {
        T* k = own + stage * 2 * TILE;
        if (stages == 1) loader.load(k, k + TILE, STRIDE, block * BLOCK, BLOCK);
        copy_async_commit();
        copy_async_wait<0>();
        __syncwarp();
        if (stages == 2) {
            stage = 1 - stage;
            T* next = own + stage * 2 * TILE;
            const int next_block = block + ROW_WARPS;
            if (next_block < task.end) loader.load(next, next + TILE, STRIDE, next_block * BLOCK, BLOCK);
        }
        const int key = block * BLOCK;
        const bool whole = key >= task.seen.first && key + BLOCK <= task.seen.end;
        queries.add(k, k + TILE, rows.rule, slope, key, first, end, whole);
    }
    // The sums go where a tile of keys and values was: 16 rows of DIM + 8 floats are as large.
    queries.write_sums(reinterpret_cast<float*>(own), stats + warp * BLOCK);
    __syncthreads();
    write_row(rows, task, reinterpret_cast<const float*>(tiles), stages * TILE, STRIDE, stats, BLOCK);
}

// ---------------------------------------------------------------- chunks of prompts

// The chunks of a step: a block takes 16 queries a warp of one sequence and one KV head, counted row by
// row and head by head of the group; `tiles` lists (sequence, first of them).
template <class T> struct Chunks {
    const T* q;
    int q_stride;
    const T* keys;
    const T* values;
    T* out;
    const int* tiles;
    const int* first_row;
    const int* num_rows;
    const int* start_position;
    const int* block_tables;
    int max_blocks;
    int heads, kv_heads, head_dim;
    Rule rule;
};

// The queries of a warp or block among those of a sequence and KV head.
struct QueryRange {
    int first, last;                  // queries; none if last < first
    int first_position, end_position;  // of the rows that they belong to
    __device__ QueryRange(int from, int count, int queries, int group, int start_position) {
        first = from;
        last = min(from + count, queries) - 1;
        first_position = start_position + first / group;
        end_position = start_position + last / group + 1;
    }
    __device__ bool empty() const { return last < first; }
};

// `count` keys from `first_key` on, then as many values, by all warps of the block.
template <class T, bool ASYNC>
__device__ __forceinline__ void load_tile(const TileLoader<T, ASYNC>& loader, T* to, int count, int stride, int first_key) {
    constexpr int PARTS = 8;  // as many as warps, of one cache block each
    const int tokens = count / PARTS;
    for (int part = threadIdx.x / WARP; part < PARTS; part += blockDim.x / WARP) {
        T* keys = to + part * tokens * stride;
        loader.load(keys, keys + count * stride, stride, first_key + part * tokens, tokens);
    }
}

// Tiles of KEYS keys go through shared memory, the next one on its way while all warps work on
// this one. Bound by shared memory: each warp reads every key and value for 16 queries (with 8
// warps and 128 dimensions 256 KiB a tile of 64, 2000 cycles, beside some 1000 to 1600 of
// tensor cores).
template <class T, int DIM, int KEYS, bool VOLTA> __device__ void attend_prefill(const Chunks<T>& x, int stages) {
    using Queries = QueryTile<T, DIM, KEYS, VOLTA>;
    constexpr int STRIDE = Queries::STRIDE, TILE = KEYS * STRIDE;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int sequence = x.tiles[2 * blockIdx.x], first_query = x.tiles[2 * blockIdx.x + 1], kv_head = blockIdx.y;
    const int group = x.heads / x.kv_heads, count = x.num_rows[sequence] * group;
    const int first_row = x.first_row[sequence], start = x.start_position[sequence], head_dim = x.head_dim;
    const QueryRange all(first_query, 16 * warps, count, group, start);
    if (all.empty()) return;
    const QueryRange own(first_query + 16 * warp, 16, count, group, start);
    DYNAMIC_SHARED(T, q);
    T* tiles = q + warps * 16 * STRIDE;
    float* scores = reinterpret_cast<float*>(tiles + stages * 2 * TILE) + warp * Queries::SCORES;

    // Each warp loads its own queries, and later lays its results in their place.
    T* own_q = q + warp * 16 * STRIDE;
    const size_t head_offset = static_cast<size_t>(kv_head) * group * head_dim;
    for (int i = lane; i < 16 * DIM / 8; i += WARP) {
        const int query = own.first + i / (DIM / 8), d = i % (DIM / 8) * 8;
        uint4 eight = make_uint4(0, 0, 0, 0);
        if (query <= own.last && d < head_dim) {
            const size_t row = static_cast<size_t>(first_row + query / group) * x.q_stride;
            eight = *reinterpret_cast<const uint4*>(x.q + row + head_offset + query % group * head_dim + d);
        }
        *reinterpret_cast<uint4*>(own_q + i / (DIM / 8) * STRIDE + d) = eight;
    }
    clear_padding(tiles, stages * 2 * KEYS, STRIDE, head_dim, DIM, threadIdx.x, blockDim.x);
    __syncwarp();

    Queries queries(own_q, scores);
    int first[Queries::LANE_QUERIES], end[Queries::LANE_QUERIES];
    float slope[Queries::LANE_QUERIES];
#pragma unroll
    for (int i = 0; i < Queries::LANE_QUERIES; i++) {
        const int query = max(min(own.first + Queries::query(i), own.last), 0);  // those beyond are not written
        const int position = start + query / group;
        first[i] = x.rule.first(position);
        end[i] = position + 1;
        slope[i] = x.rule.slope(kv_head * group + query % group);
    }
    const int end_of_all = all.end_position, first_of_all = x.rule.first(all.first_position);
    const TileLoader<T, !VOLTA> loader(x.keys, x.values, x.block_tables + static_cast<size_t>(sequence) * x.max_blocks,
                                       x.kv_heads, kv_head, head_dim, first_of_all, end_of_all);
    int key = first_of_all / BLOCK * BLOCK, stage = 0;
    if (stages == 2) load_tile(loader, tiles, KEYS, STRIDE, key);
    for (; key < end_of_all; key += KEYS) {
        T* k = tiles + stage * 2 * TILE;
        if (stages == 1) load_tile(loader, k, KEYS, STRIDE, key);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();  // this tile is there, and all are done with the one before
        if (stages == 2) {
            stage = 1 - stage;
            if (key + KEYS < end_of_all) load_tile(loader, tiles + stage * 2 * TILE, KEYS, STRIDE, key + KEYS);
        }
        if (!own.empty() && key < own.end_position && key + KEYS > x.rule.first(own.first_position)) {
            const bool whole = key + KEYS <= own.first_position + 1 && key >= x.rule.first(own.end_position - 1);
            queries.add(k, k + TILE, x.rule, slope, key, first, end, whole);
        }
        if (stages == 1) __syncthreads();
    }

    queries.write_results(own_q);
    __syncwarp();
    for (int i = lane; i < 16 * DIM / 8; i += WARP) {
        const int query = own.first + i / (DIM / 8), d = i % (DIM / 8) * 8;
        if (query > own.last || d >= head_dim) continue;
        const size_t row = static_cast<size_t>(first_row + query / group) * x.heads * head_dim;
        *reinterpret_cast<uint4*>(x.out + row + head_offset + query % group * head_dim + d) =
            *reinterpret_cast<const uint4*>(own_q + i / (DIM / 8) * STRIDE + d);
    }
}

using f32_value = float;
using f16_value = f16;
using bf16_value = bf16;

}  // namespace

// ---------------------------------------------------------------- kernels

ROPE_AND_CACHE(f32)
ROPE_AND_CACHE(f16)
ROPE_AND_CACHE(bf16)

#define ROWS_PARAMETERS(T)                                                                                            \
    const T* q, int q_stride, const T* keys, const T* values, T* out, float *scratch, const int *row_list,            \
        const int *sequence_of_row, const int *positions, const int *block_tables, int max_blocks, int heads,         \
        int kv_heads, int head_dim, float scale, int window, float softcap, const float *slopes
#define ROWS(T)                                                                                                       \
    const Rows<T> rows = {q, q_stride, keys, values, out, scratch, row_list, sequence_of_row, positions,              \
                          block_tables, max_blocks, heads, kv_heads, head_dim, {scale, window, softcap, slopes}}

#define ATTEND_ROWS(T, QUERIES, DIMS)                                                                                 \
    extern "C" __global__ void __launch_bounds__(128)                                                                 \
        attend_rows_##T##_q##QUERIES##_d##DIMS(ROWS_PARAMETERS(T##_value)) {                                          \
        ROWS(T##_value);                                                                                              \
        attend_rows<T##_value, QUERIES, (DIMS + 31) / 32>(rows);                                                      \
    }                                                                                                                 \
    EXPORT_KERNEL(attend_rows_##T##_q##QUERIES##_d##DIMS)
#define ATTEND_ROWS_OF(T)                                                                                             \
    ATTEND_ROWS(T, 1, 128)                                                                                            \
    ATTEND_ROWS(T, 4, 128)                                                                                            \
    ATTEND_ROWS(T, 8, 128)                                                                                            \
    ATTEND_ROWS(T, 1, 256)                                                                                            \
    ATTEND_ROWS(T, 4, 256)                                                                                            \
    ATTEND_ROWS(T, 8, 256)                                                                                            \
    extern "C" __global__ void attend_combine_##T(ROWS_PARAMETERS(T##_value), int splits) {                           \
        ROWS(T##_value);                                                                                              \
        attend_combine(rows, splits);                                                                                 \
    }                                                                                                                 \
    EXPORT_KERNEL(attend_combine_##T)

ATTEND_ROWS_OF(f32)
ATTEND_ROWS_OF(f16)
ATTEND_ROWS_OF(bf16)

// Each variant is empty where it is not chosen: `volta` from compute capability 8.0 on, the other before.
#ifdef FARM_TILES
#define TILES_ampere(...) __VA_ARGS__
#else
#define TILES_ampere(...)
#endif
#if defined(FARM_EMULATOR) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
#define TILES_volta(...) __VA_ARGS__
#else
#define TILES_volta(...)
#endif

// BLOCKS: what a multiprocessor should have room for.
#define ATTEND_TILES(NAME, T, DIM, KEYS, BLOCKS, VARIANT, VOLTA)                                                      \
    extern "C" __global__ void __launch_bounds__(128) attend_split_##NAME##_d##DIM(ROWS_PARAMETERS(T), int stages) {  \
        TILES_##VARIANT(ROWS(T); attend_split<T, DIM, VOLTA>(rows, stages);)                                          \
    }                                                                                                                 \
    EXPORT_KERNEL(attend_split_##NAME##_d##DIM)                                                                       \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) attend_prefill_##NAME##_d##DIM(                         \
        const T* q, int q_stride, const T* keys, const T* values, T* out, const int* tiles, const int* first_row,     \
        const int* num_rows, const int* start_position, const int* block_tables, int max_blocks, int heads,           \
        int kv_heads, int head_dim, float scale, int window, float softcap, const float* slopes, int stages) {        \
        TILES_##VARIANT(const Chunks<T> chunks = {q, q_stride, keys, values, out, tiles, first_row, num_rows,         \
                                                  start_position, block_tables, max_blocks, heads, kv_heads,          \
                                                  head_dim, {scale, window, softcap, slopes}};                        \
                        attend_prefill<T, DIM, KEYS, VOLTA>(chunks, stages);)                                         \
    }                                                                                                                 \
    EXPORT_KERNEL(attend_prefill_##NAME##_d##DIM)
#define ATTEND_TILES_OF(NAME, T, VARIANT, VOLTA)                                                                      \
    ATTEND_TILES(NAME, T, 64, 64, (VOLTA ? 1 : 2), VARIANT, VOLTA)                                                                  \
    ATTEND_TILES(NAME, T, 96, 64, 1, VARIANT, VOLTA)                                                                  \
    ATTEND_TILES(NAME, T, 128, 64, 1, VARIANT, VOLTA)                                                                 \
    ATTEND_TILES(NAME, T, 256, 32, 1, VARIANT, VOLTA)

ATTEND_TILES_OF(f16, f16_value, ampere, false)
ATTEND_TILES_OF(bf16, bf16_value, ampere, false)
ATTEND_TILES_OF(f16_volta, f16_value, volta, true)
