// Attention over the paged KV cache, and what comes right before it.
//
//   rope_and_cache   norms and rotates queries and keys, writes keys and values to the cache
//   attend_rows      a row at a time, split over its keys; any head, any type (f32's path)
//   attend_split     the same for decode on tensor cores
//   attend_combine   adds up the splits of the two above
//   attend_prefill   chunks of prompts on tensor cores
//
// A block of the cache holds 16 tokens, `[block][kv_head][16][head_dim]`, keys and values
// alike. A query sees the keys of its own sequence up to its own position, and with a window
// only the last ones of them. Keys that no query of a tile sees never enter a product,
// not even times zero: their place may belong to another sequence, or hold anything.
//
// Left out: attention sinks, masks other than causal and sliding, and an own fast path on
// tensor cores for f32 (TF32 would round its operands to 10 bits).
#include "common.cuh"

namespace {

constexpr int BLOCK = 16;  // tokens of a cache block

// ---------------------------------------------------------------- the rule of the scores

// Window, cap and slopes are 0 or null where the model has none.
struct Rule {
    float scale;
    int window;
    float softcap;
    const float* slopes;

    // The first key that the query at `position` sees.
    __device__ __forceinline__ int first(int position) const { return window > 0 ? max(position + 1 - window, 0) : 0; }

    // ALiBi's slope of a head; transformers rounds it, the key's position and their product to bf16.
    __device__ __forceinline__ float slope(int head) const {
        return slopes ? to_f32(from_f32<bf16>(slopes[head])) : 0.0f;
    }

    __device__ __forceinline__ float score(float dot, float slope, int key) const {
        float score = dot * scale;
        if (softcap > 0.0f) score = softcap * tanhf(score / softcap);
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

// A query's weights are taken relative to a score of its own, which only moves once the largest
// lies this far above it: weights up to e^8, at no loss in floating point, and the sums seldom
// have to leave the tensor cores' registers to be scaled.
constexpr float SLACK = 8.0f;

// 16 queries (or fewer) of one KV head against tiles of KEYS keys, heads padded by zeros to DIM.
// All by one warp; lanes 2i and 2i + 1 keep the statistics of query i.
template <class T, int DIM, int KEYS> struct QueryTile {
    static constexpr int STRIDE = DIM + 8;         // of queries, keys and values in shared memory
    static constexpr int SCORE_STRIDE = KEYS + 8;  // both without bank conflicts
    static constexpr int COLUMNS = DIM / 16;
    static constexpr int AT_ONCE = KEYS / 16;  // columns of tiles that the scores' memory takes
    using Sums = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;
    using Rows16 = wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major>;
    using Keys16 = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major>;
    using Values16 = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major>;

    Sums out[COLUMNS];
    float top = -INFINITY, sum = 0.0f;  // `sum` over this lane's keys
    float* scores;                      // [16][SCORE_STRIDE], the warp's own

    __device__ explicit QueryTile(float* own_scores) : scores(own_scores) {
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) wmma::fill_fragment(out[i], 0.0f);
    }

    static __device__ __forceinline__ int half() { return threadIdx.x % 2; }
    static __device__ __forceinline__ int query() { return threadIdx.x % WARP / 2; }
    // Where this lane's keys 4c..4c + 4 lie among the tile's.
    static __device__ __forceinline__ int key_at(int c) { return (2 * c + half()) * 4; }
    __device__ __forceinline__ float4* scores_at(int c) const {
        return reinterpret_cast<float4*>(scores + query() * SCORE_STRIDE + key_at(c));
    }

    // Adds the keys from `first_key` on. The lane's query sees those at `first..end`; `whole`, the
    // same in all lanes: all queries see all of them.
    __device__ void add(const T* q, const T* keys, const T* values, const Rule& rule, float slope, int first_key,
                        int first, int end, bool whole) {
        score(q, keys);
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
        if (rule.softcap > 0.0f || rule.slopes) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) x[i] = rule.score(x[i], slope, first_key + key_at(i / 4) + i % 4);
        } else {
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) x[i] *= rule.scale;
        }
        if (!whole) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) {
                const int key = first_key + key_at(i / 4) + i % 4;
                if (key < first || key >= end) x[i] = -INFINITY;
            }
        }
        weigh(x);
        sum_values(values);
    }

    __device__ void score(const T* q, const T* keys) {
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

    // Scores to weights, rounded to T and laid down as [16][SCORE_STRIDE] where the scores were.
    __device__ void weigh(float (&x)[KEYS / 2]) {
        float largest = x[0];
#pragma unroll
        for (int i = 1; i < KEYS / 2; i++) largest = fmaxf(largest, x[i]);
        largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 1));
        const bool moves = largest > top + SLACK || top == -INFINITY;
        const float shrink = moves ? factor(top, largest) : 1.0f;
        rescale_if_any(shrink, moves && top != -INFINITY);
        sum *= shrink;
        if (moves) top = largest;
        const float base = top == -INFINITY ? 0.0f : top;  // nothing seen so far: all weights 0
        T* weights = reinterpret_cast<T*>(scores) + query() * SCORE_STRIDE;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) {
            // __expf errs by less than 1e-6 here; the weight is rounded to 8 or 11 bits.
            const T weight = from_f32<T>(__expf(x[i] - base));
            weights[key_at(i / 4) + i % 4] = weight;
            sum += to_f32(weight);
        }
        __syncwarp();
    }

    // Scales each query's sums by its factor if one of them has any; the scores' memory is free.
    __device__ void rescale_if_any(float shrink, bool any) {
        if (!__any_sync(FULL_WARP, any)) return;
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
    __device__ __forceinline__ void lay_down(int j) {
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
        __syncwarp();  // the weights are read before the next scores are written
    }

    // The largest score (or the one that stands for it) and the sum, of the lane's query.
    __device__ Stat stat() const { return {top, sum + __shfl_xor_sync(FULL_WARP, sum, 1)}; }
};

// Copies keys and values of one KV head from the cache into shared memory, 16 bytes at a time:
// the lanes of a warp side by side along the head, as many tokens at once as fit.
template <class T> struct TileLoader {
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

    // Tokens `first_key..first_key + count` by `warps` warps, of which this is number `warp`.
    __device__ __forceinline__ void load(T* to_keys, T* to_values, int stride, int first_key, int count, int warp,
                                         int warps) const {
        if (own >= at_once) return;
        for (int i = warp * at_once + own; i < count; i += warps * at_once) {
            const int key = first_key + i, to = i * stride + octet * 8;
            if (key >= first && key < end) {
                const size_t block = static_cast<size_t>(table[key / BLOCK]) * kv_heads + kv_head;
                const size_t from = (block * BLOCK + key % BLOCK) * head_dim + octet * 8;
                copy_async16(to_keys + to, keys + from);
                copy_async16(to_values + to, values + from);
            } else {
                *reinterpret_cast<uint4*>(to_keys + to) = make_uint4(0, 0, 0, 0);
                *reinterpret_cast<uint4*>(to_values + to) = make_uint4(0, 0, 0, 0);
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
template <class T, int DIM> __device__ void attend_split(const Rows<T>& rows, int stages) {
    using Queries = QueryTile<T, DIM, BLOCK>;
    constexpr int STRIDE = Queries::STRIDE, TILE = BLOCK * STRIDE;
    const RowTask<T> task(rows, BLOCK);
    if (task.idle) return;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head_dim = rows.head_dim;
    DYNAMIC_SHARED(T, q);
    float* scores = reinterpret_cast<float*>(q + TILE);
    Stat* stats = reinterpret_cast<Stat*>(scores + ROW_WARPS * BLOCK * Queries::SCORE_STRIDE);
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
    const TileLoader<T> loader(rows.keys, rows.values, task.table, rows.kv_heads, task.kv_head, head_dim, task.seen.first,
                               task.seen.end);
    const int first = task.begin + warp;
    if (stages == 2 && first < task.end) loader.load(own, own + TILE, STRIDE, first * BLOCK, BLOCK, 0, 1);
    copy_async_commit();
    __syncthreads();

    Queries queries(scores + warp * BLOCK * Queries::SCORE_STRIDE);
    const float slope = rows.rule.slope(task.first_head + min(Queries::query(), task.heads - 1));
    int stage = 0;
    for (int block = first; block < task.end; block += ROW_WARPS) {
        T* k = own + stage * 2 * TILE;
        if (stages == 1) loader.load(k, k + TILE, STRIDE, block * BLOCK, BLOCK, 0, 1);
        copy_async_commit();
        copy_async_wait<0>();
        __syncwarp();
        if (stages == 2) {
            stage = 1 - stage;
            T* next = own + stage * 2 * TILE;
            const int next_block = block + ROW_WARPS;
            if (next_block < task.end) loader.load(next, next + TILE, STRIDE, next_block * BLOCK, BLOCK, 0, 1);
            copy_async_commit();
        }
        const int key = block * BLOCK;
        const bool whole = key >= task.seen.first && key + BLOCK <= task.seen.end;
        queries.add(q, k, k + TILE, rows.rule, slope, key, task.seen.first, task.seen.end, whole);
    }
    // The sums go where a tile of keys and values was: 16 rows of DIM + 8 floats are as large.
    float* sums = reinterpret_cast<float*>(own);
    copy_async_wait<0>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Queries::COLUMNS; j++) {
        wmma::store_matrix_sync(sums + j * 16, queries.out[j], STRIDE, wmma::mem_row_major);
    }
    const Stat stat = queries.stat();
    if (lane % 2 == 0) stats[warp * BLOCK + Queries::query()] = stat;
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

// Tiles of KEYS keys go through shared memory, the next one on its way while all warps work on
// this one. Bound by shared memory: each warp reads every key and value for 16 queries (with 8
// warps and 128 dimensions 256 KiB a tile, 2000 cycles, beside some 1000 of tensor cores).
template <class T, int DIM, int KEYS> __device__ void attend_prefill(const Chunks<T>& x, int stages) {
    using Queries = QueryTile<T, DIM, KEYS>;
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
    float* scores = reinterpret_cast<float*>(tiles + stages * 2 * TILE) + warp * 16 * Queries::SCORE_STRIDE;

    // Each warp loads its own queries.
    T* own_q = q + warp * 16 * STRIDE;
    for (int i = lane; i < 16 * DIM / 8; i += WARP) {
        const int query = own.first + i / (DIM / 8), d = i % (DIM / 8) * 8;
        uint4 eight = make_uint4(0, 0, 0, 0);
        if (query <= own.last && d < head_dim) {
            const size_t row = static_cast<size_t>(first_row + query / group) * x.q_stride;
            eight = *reinterpret_cast<const uint4*>(x.q + row + (kv_head * group + query % group) * head_dim + d);
        }
        *reinterpret_cast<uint4*>(own_q + i / (DIM / 8) * STRIDE + d) = eight;
    }
    clear_padding(tiles, stages * 2 * KEYS, STRIDE, head_dim, DIM, threadIdx.x, blockDim.x);

    const int end = all.end_position, first_seen = x.rule.first(all.first_position);
    const TileLoader<T> loader(x.keys, x.values, x.block_tables + static_cast<size_t>(sequence) * x.max_blocks, x.kv_heads,
                               kv_head, head_dim, first_seen, end);
    const int query = min(own.first + Queries::query(), max(own.last, 0));  // those beyond are not written
    const int position = start + query / group, seen_from = x.rule.first(position);
    const float slope = x.rule.slope(kv_head * group + query % group);
    Queries queries(scores);
    int key = first_seen / BLOCK * BLOCK, stage = 0;
    if (stages == 2) loader.load(tiles, tiles + TILE, STRIDE, key, KEYS, warp, warps);
    for (; key < end; key += KEYS) {
        T* k = tiles + stage * 2 * TILE;
        if (stages == 1) loader.load(k, k + TILE, STRIDE, key, KEYS, warp, warps);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();  // this tile is there, and all are done with the one before
        if (stages == 2) {
            stage = 1 - stage;
            T* next = tiles + stage * 2 * TILE;
            if (key + KEYS < end) loader.load(next, next + TILE, STRIDE, key + KEYS, KEYS, warp, warps);
        }
        if (!own.empty() && key < own.end_position && key + KEYS > x.rule.first(own.first_position)) {
            const bool whole = key + KEYS <= own.first_position + 1 && key >= x.rule.first(own.end_position - 1);
            queries.add(own_q, k, k + TILE, x.rule, slope, key, seen_from, position + 1, whole);
        }
        if (stages == 1) __syncthreads();
    }

    const Stat stat = queries.stat();
    const float scale = stat.sum == 0.0f ? 0.0f : 1.0f / stat.sum;
    const bool there = own.first + Queries::query() <= own.last;
    T* to = x.out + (static_cast<size_t>(first_row + query / group) * x.heads + kv_head * group + query % group) * head_dim;
#pragma unroll
    for (int j = 0; j < Queries::COLUMNS; j += Queries::AT_ONCE) {
        queries.lay_down(j);
#pragma unroll
        for (int octet = Queries::half(); octet < KEYS / 8; octet += 2) {
            const int d = j * 16 + octet * 8;
            float eight[8];
            load8(scores + Queries::query() * Queries::SCORE_STRIDE + octet * 8, eight);
            for (int i = 0; i < 8; i++) eight[i] *= scale;
            if (there && d < head_dim) store8(to + d, eight);
        }
        __syncwarp();
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

// bf16 without tensor cores for it: kernels that do nothing, and that the caller does not choose.
#ifdef FARM_BF16_TENSOR_CORES
#define ON_TENSOR_CORES_bf16(statement) statement
#else
#define ON_TENSOR_CORES_bf16(statement)
#endif
#define ON_TENSOR_CORES_f16(statement) statement

#define ATTEND_TILES(T, DIM, KEYS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(128) attend_split_##T##_d##DIM(ROWS_PARAMETERS(T##_value), int stages) { \
        ROWS(T##_value);                                                                                              \
        ON_TENSOR_CORES_##T((attend_split<T##_value, DIM>(rows, stages));)                                            \
    }                                                                                                                 \
    EXPORT_KERNEL(attend_split_##T##_d##DIM)                                                                          \
    extern "C" __global__ void __launch_bounds__(256) attend_prefill_##T##_d##DIM(                                    \
        const T##_value* q, int q_stride, const T##_value* keys, const T##_value* values, T##_value* out,             \
        const int* tiles, const int* first_row, const int* num_rows, const int* start_position,                       \
        const int* block_tables, int max_blocks, int heads, int kv_heads, int head_dim, float scale, int window,      \
        float softcap, const float* slopes, int stages) {                                                             \
        const Chunks<T##_value> chunks = {q, q_stride, keys, values, out, tiles, first_row, num_rows, start_position, \
                                          block_tables, max_blocks, heads, kv_heads, head_dim,                        \
                                          {scale, window, softcap, slopes}};                                          \
        ON_TENSOR_CORES_##T((attend_prefill<T##_value, DIM, KEYS>(chunks, stages));)                                  \
    }                                                                                                                 \
    EXPORT_KERNEL(attend_prefill_##T##_d##DIM)
#define ATTEND_TILES_OF(T)                                                                                            \
    ATTEND_TILES(T, 64, 64)                                                                                           \
    ATTEND_TILES(T, 96, 64)                                                                                           \
    ATTEND_TILES(T, 128, 64)                                                                                          \
    ATTEND_TILES(T, 256, 32)

ATTEND_TILES_OF(f16)
ATTEND_TILES_OF(bf16)
