// From logits to tokens and scores. What a row gives is what src/engine/choose.rs gives on the
// host for the same logits and draw; the notes there say in which order things are processed.
//
// How: tokens are ordered by falling logit, then rising id, and every filter (top-k, top-p,
// min-p) keeps a prefix of that order. So a filter is known by the mass of its prefix, the
// shortest one counts, and the draw is one more place in the same order. Nothing is sorted but
// the few tokens around such a place: a histogram over the logits finds their bin.
//
// Masses are integers: a weight e^((x - max) / temperature) in units of 2^-44 of the best one's.
// Integer sums do not depend on their order, so a row gives the same token whatever the number
// of blocks and threads, and whatever shares the batch. The weights themselves are those of
// src/engine/softmax.rs to the bit. What a weight loses below the unit is 2^-44 at most, far below
// what an f32 logit knows; a draw so close to a border may fall on its other side.
//
// Three kernels: maxima, then masses (both with one block for each CHUNK tokens of a row, bound
// by memory or, where exponentials are taken, by arithmetic), then one block a row that decides.
#include "common.cuh"

namespace {

using Mass = unsigned long long;

constexpr int CHUNK = 4096;
constexpr int CHUNK_THREADS = 256;
constexpr int CHUNK_WARPS = CHUNK_THREADS / WARP;
constexpr int BINS = 2048;
constexpr int LIST = 2048;
constexpr int DIGITS = 256;
// A weight of 1. Up to 2^20 tokens sum without overflow.
constexpr float UNIT = 17592186044416.0f;
// Below this exponent a weight is less than one unit.
constexpr float LOWEST = -30.5f;
constexpr int MAX_TOP = 20;

enum Flags : unsigned { CHOOSE = 1, GREEDY = 2, SUPPRESS_EOS = 4, NORMALISER = 8, FILTER = 16, TOP_P = 32, SCORE = 64 };
enum Status : unsigned { OK = 0, NOT_FINITE = 1, NO_CANDIDATE = 2, NOTHING_ASKED = 3 };
enum Bad : unsigned { RAW_NAN = 1, EDITED_NAN = 2 };

// What is wanted of a row; words as src/device/sampling.rs writes them.
struct Row {
    unsigned flags, top_k;
    float temperature, min_p, repetition, presence, frequency;
    unsigned target;
    Mass top_p;  // times 2^64
    Mass seed, record;
    unsigned completion, step;
    int slot;     // of its token counts; -1: none
    int allowed;  // its bitmap; -1: none
    unsigned num_top;
    int histogram;  // its place among the histograms
};

// What the first two kernels find in a chunk.
struct Partial {
    Mass best;       // the edited row's best key
    Mass raw_total;  // of the raw row, at temperature 1
    Mass kept;       // of the edited row: what min-p leaves
    float raw_max;
    unsigned bad;
};

struct Outcome {
    unsigned token, status;
    float logit, raw_max;
    Mass raw_total;
};

// ---------------------------------------------------------------- arithmetic

// Products and sums that the compiler must not fuse: the host does not.
#ifdef FARM_EMULATOR
__device__ float mul(float a, float b) { return a * b; }
__device__ float add(float a, float b) { return a + b; }
__device__ float sub(float a, float b) { return a - b; }
__device__ float div(float a, float b) { return a / b; }
__device__ Mass high_product(Mass a, Mass b) { return static_cast<Mass>(static_cast<unsigned __int128>(a) * b >> 64); }
#else
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float div(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ Mass high_product(Mass a, Mass b) { return __umul64hi(a, b); }
#endif

__device__ __forceinline__ bool is_nan(float x) { return x != x; }

// exp_nonpositive of src/engine/softmax.rs.
__device__ __forceinline__ float exp_nonpositive(float x) {
    const float smallest = -87.0f, rounder = 12582912.0f;
    const float clamped = x > smallest ? x : smallest;
    const float rounded = add(mul(clamped, 1.44269504088896340736f), rounder);
    const float n = sub(rounded, rounder);
    const float r = add(sub(clamped, mul(n, 0.6933594f)), mul(n, 2.1219444e-4f));
    float p = 1.9875692e-4f;
    p = add(mul(p, r), 1.3982e-3f);
    p = add(mul(p, r), 8.333452e-3f);
    p = add(mul(p, r), 4.1665796e-2f);
    p = add(mul(p, r), 1.6666665e-1f);
    p = add(mul(p, r), 0.5f);
    const float mantissa = add(add(mul(p, mul(r, r)), r), 1.0f);
    const unsigned power = (__float_as_uint(rounded) - __float_as_uint(rounder) + 127u) << 23;
    return x < smallest ? 0.0f : mul(mantissa, __uint_as_float(power));
}

__device__ __forceinline__ Mass mass_of(float weight) { return static_cast<Mass>(mul(weight, UNIT)); }

// The part of key_of in src/engine/choose.rs that the logit gives: rising for a falling logit.
__device__ __forceinline__ unsigned order_of(float logit) {
    const unsigned bits = __float_as_uint(add(logit, 0.0f));
    return bits >> 31 == 0 ? ~(bits | 0x80000000u) : bits;
}
__device__ __forceinline__ float logit_of(unsigned order) {
    return __uint_as_float(order >> 31 == 0 ? ~order & 0x7fffffffu : order);
}
__device__ __forceinline__ Mass key_of(float logit, int id) {
    return static_cast<Mass>(order_of(logit)) << 32 | static_cast<unsigned>(id);
}
__device__ __forceinline__ float logit_of_key(Mass key) { return logit_of(static_cast<unsigned>(key >> 32)); }

// ---------------------------------------------------------------- a row

// A row's logits, and what is done to them before a token is chosen.
struct Logits {
    const float* row;
    const unsigned* counts;   // null: no penalties
    const unsigned* allowed;  // null: no guide
    const unsigned* eos;
    int num_eos;  // 0 where EOS is not suppressed
    float repetition, presence, frequency;

    __device__ float edit(float x, int id) const {
        if (allowed && !(allowed[id / 32] >> id % 32 & 1u)) x = -INFINITY;
        if (counts) {
            const unsigned count = counts[id];
            if (count > 0) {
                x = x < 0.0f ? mul(x, repetition) : div(x, repetition);
                x = sub(x, add(presence, mul(frequency, static_cast<float>(count))));
            }
        }
        for (int i = 0; i < num_eos; i++)
            if (eos[i] == static_cast<unsigned>(id)) x = -INFINITY;
        return x;
    }
    __device__ float operator()(int id) const { return edit(row[id], id); }
};

__device__ __forceinline__ Logits logits_of(const Row& row, const float* logits, int vocab, const unsigned* counts,
                                            const unsigned* allowed, const unsigned* eos, int num_eos) {
    const bool suppress = (row.flags & SUPPRESS_EOS) && row.allowed < 0;
    return {logits,
            row.slot < 0 ? nullptr : counts + static_cast<size_t>(row.slot) * vocab,
            row.allowed < 0 ? nullptr : allowed + static_cast<size_t>(row.allowed) * ((vocab + 31) / 32),
            eos,
            suppress ? num_eos : 0,
            row.repetition,
            row.presence,
            row.frequency};
}

// What all chunks of a row found; every warp gathers it for itself.
struct Summary {
    Mass best = ~0ull, raw_total = 0, kept = 0;
    float raw_max = -INFINITY;
    unsigned bad = 0;
};

__device__ Summary summarise(const Partial* partials, int chunks, bool with_masses) {
    Summary s;
    for (int i = threadIdx.x % WARP; i < chunks; i += WARP) {
        s.best = min(s.best, partials[i].best);
        s.raw_max = fmaxf(s.raw_max, partials[i].raw_max);
        s.bad |= partials[i].bad;
        if (with_masses) {
            s.raw_total += partials[i].raw_total;
            s.kept += partials[i].kept;
        }
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        s.best = min(s.best, __shfl_xor_sync(FULL_WARP, s.best, step));
        s.raw_max = fmaxf(s.raw_max, __shfl_xor_sync(FULL_WARP, s.raw_max, step));
        s.bad |= __shfl_xor_sync(FULL_WARP, s.bad, step);
        s.raw_total += __shfl_xor_sync(FULL_WARP, s.raw_total, step);
        s.kept += __shfl_xor_sync(FULL_WARP, s.kept, step);
    }
    return s;
}

// row_max of src/engine/softmax.rs.
__device__ __forceinline__ unsigned check(float max, bool nan) {
    if (nan || max == INFINITY) return NOT_FINITE;
    return max == -INFINITY ? NO_CANDIDATE : OK;
}
__device__ __forceinline__ unsigned check_raw(const Summary& s) { return check(s.raw_max, s.bad & RAW_NAN); }
__device__ __forceinline__ unsigned check_edited(const Summary& s) { return check(logit_of_key(s.best), s.bad & EDITED_NAN); }

// ---------------------------------------------------------------- histograms

// Masses of `size` bins by halves, and their tokens. 64-bit atomics on shared memory are loops;
// two 32-bit ones with a carry are not, and the high half seldom changes.
struct Histogram {
    unsigned* low;
    unsigned* high;
    unsigned* count;
    __device__ Histogram(unsigned* words, int size) : low(words), high(words + size), count(words + 2 * size) {}

    __device__ void add(int bin, Mass mass, unsigned tokens) const {
        const unsigned part = static_cast<unsigned>(mass);
        const unsigned before = atomicAdd(&low[bin], part);
        const unsigned rest = static_cast<unsigned>(mass >> 32) + (before + part < before ? 1u : 0u);
        if (rest > 0) atomicAdd(&high[bin], rest);
        atomicAdd(&count[bin], tokens);
    }
    __device__ Mass mass(int bin) const { return static_cast<Mass>(high[bin]) << 32 | low[bin]; }
};

// The bin of a token whose weight has the exponent z <= 0; -1 where it weighs nothing.
__device__ __forceinline__ int bin_of(float z) {
    if (!(z >= LOWEST)) return -1;
    return min(static_cast<int>(mul(-z, BINS / -LOWEST)), BINS - 1);
}

// ---------------------------------------------------------------- a block that decides

struct Found {
    int index;
    Mass before;  // what all earlier ones sum to
};

struct Scratch {
    Mass keys[LIST];
    unsigned digits[3 * DIGITS];
    Mass warp_totals[WARP];
    Found found;
    unsigned listed;
};

// The sum of `own` over the threads before this one, and over all.
__device__ __noinline__ Mass block_scan(Mass own, Mass& total, Scratch& s) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    Mass sum = own;
    for (int step = 1; step < WARP; step *= 2) {
        const Mass other = __shfl_up_sync(FULL_WARP, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();
    if (lane == WARP - 1) s.warp_totals[warp] = sum;
    __syncthreads();
    Mass of_warps = lane < warps ? s.warp_totals[lane] : 0;
    for (int step = 1; step < WARP; step *= 2) {
        const Mass other = __shfl_up_sync(FULL_WARP, of_warps, step);
        if (lane >= step) of_warps += other;
    }
    total = __shfl_sync(FULL_WARP, of_warps, WARP - 1);
    const Mass before = __shfl_sync(FULL_WARP, of_warps, max(warp - 1, 0));
    return (warp > 0 ? before : 0) + sum - own;
}

// The first of `n` values where their running sum exceeds `target`, which is less than the sum of
// all. Each thread takes a run of neighbours.
template <class Value> __device__ Found locate(int n, Mass target, const Value& value, Scratch& s) {
    const int share = (n + blockDim.x - 1) / blockDim.x;
    const int first = min(static_cast<int>(threadIdx.x) * share, n), last = min(first + share, n);
    Mass own = 0, total;
    for (int i = first; i < last; i++) own += value(i);
    Mass before = block_scan(own, total, s);
    if (before <= target && target - before < own) {
        int i = first;
        for (Mass next = value(i); target - before >= next; next = value(i)) {
            before += next;
            i++;
        }
        s.found = {i, before};
    }
    __syncthreads();
    return s.found;
}

template <class Value> __device__ Mass sum_of(int n, const Value& value, Scratch& s) {
    Mass own = 0, total;
    for (int i = threadIdx.x; i < n; i += blockDim.x) own += value(i);
    block_scan(own, total, s);
    return total;
}

// A token at a place in the order, and the mass of those before it.
struct Place {
    int id;
    Mass before, mass;
};

// The order's places, found where they are wanted.
struct Order {
    const Logits& logits;
    const Histogram& bins;
    Scratch& s;
    int vocab;
    float max, temperature;
    // The sorted tokens in s.keys: how many, and tokens and mass before and in them.
    int listed = 0;
    Mass tokens_before = 0, mass_before = 0, mass_listed = 0;

    __device__ float exponent(float x) const { return div(sub(x, max), temperature); }
    __device__ Mass mass(float x) const { return mass_of(exp_nonpositive(exponent(x))); }

    // The place where the running sum, of tokens or of mass, first exceeds `target`, which is
    // less than the sum of all bins.
    __device__ __noinline__ Place find(bool by_mass, Mass target) {
        const Mass start = by_mass ? mass_before : tokens_before;
        const Mass length = by_mass ? mass_listed : static_cast<Mass>(listed);
        if (target >= start && target - start < length) return find_listed(by_mass, target);
        const auto tokens = [&](int i) { return static_cast<Mass>(bins.count[i]); };
        const auto masses = [&](int i) { return bins.mass(i); };
        const Found found = by_mass ? locate(BINS, target, masses, s) : locate(BINS, target, tokens, s);
        const int bin = found.index;
        const Mass other = by_mass ? sum_of(bin, tokens, s) : sum_of(bin, masses, s);
        tokens_before = by_mass ? other : found.before;
        mass_before = by_mass ? found.before : other;
        if (tokens_before + bins.count[bin] <= LIST) {
            // All up to here, for what is asked next comes earlier.
            tokens_before = mass_before = 0;
            list(0, bin, 0, 0);
        } else if (bins.count[bin] <= LIST) {
            list(bin, bin, 0, 0);
        } else {
            return find_crowded(by_mass, target, bin);
        }
        return find_listed(by_mass, target);
    }

    __device__ Place find_listed(bool by_mass, Mass target) {
        const auto masses = [&](int i) { return mass(logit_of_key(s.keys[i])); };
        Found found;
        if (by_mass) {
            found = locate(listed, target - mass_before, masses, s);
        } else {
            found.index = static_cast<int>(target - tokens_before);
            found.before = sum_of(found.index, masses, s);
        }
        const Mass key = s.keys[found.index];
        return {static_cast<int>(key & 0xffffffffu), mass_before + found.before, mass(logit_of_key(key))};
    }

    // Within a bin of more tokens than the list holds: narrows them by eight bits of their
    // logits at a time. Where all are equal, their ids are in order already.
    __device__ Place find_crowded(bool by_mass, Mass target, int bin) {
        const Histogram digits(s.digits, DIGITS);
        unsigned prefix = 0, mask = 0;
        for (int shift = 24; shift >= 0; shift -= 8) {
            count_digits(bin, prefix, mask, shift, digits);
            const auto tokens = [&](int i) { return static_cast<Mass>(digits.count[i]); };
            const auto masses = [&](int i) { return digits.mass(i); };
            const Found found = by_mass ? locate(DIGITS, target - mass_before, masses, s)
                                        : locate(DIGITS, target - tokens_before, tokens, s);
            const Mass other = by_mass ? sum_of(found.index, tokens, s) : sum_of(found.index, masses, s);
            tokens_before += by_mass ? other : found.before;
            mass_before += by_mass ? found.before : other;
            prefix |= static_cast<unsigned>(found.index) << shift;
            mask |= 255u << shift;
            if (digits.count[found.index] <= LIST) {
                list(bin, bin, prefix, mask);
                return find_listed(by_mass, target);
            }
        }
        listed = 0;
        mass_listed = 0;
        const Mass each = mass(logit_of(prefix));
        const Mass rank = by_mass ? (target - mass_before) / each : target - tokens_before;
        const auto ties = [&](int id) { return static_cast<Mass>(order_of(logits(id)) == prefix); };
        const Found found = locate(vocab, rank, ties, s);
        return {found.index, mass_before + rank * each, each};
    }

    // Every token up to this bin has a logit of at least this: one bin more than rounding can
    // cost. Spares the others the division.
    __device__ float floor_of(int last_bin) const { return sub(max, mul(mul(static_cast<float>(last_bin + 2), -LOWEST / BINS), temperature)); }

    __device__ bool is_wanted(float x, int first_bin, int last_bin, unsigned prefix, unsigned mask) const {
        const int bin = bin_of(exponent(x));
        return bin >= first_bin && bin <= last_bin && (order_of(x) & mask) == prefix;
    }

    __device__ void count_digits(int bin, unsigned prefix, unsigned mask, int shift, const Histogram& digits) {
        __syncthreads();
        for (int i = threadIdx.x; i < 3 * DIGITS; i += blockDim.x) s.digits[i] = 0;
        __syncthreads();
        const float floor = floor_of(bin);
        for (int id = threadIdx.x; id < vocab; id += blockDim.x) {
            const float x = logits(id);
            if (x >= floor && is_wanted(x, bin, bin, prefix, mask)) digits.add(order_of(x) >> shift & 255, mass(x), 1);
        }
        __syncthreads();
    }

    // Fills s.keys with the tokens of these bins whose logits have these bits, in order.
    __device__ __noinline__ void list(int first_bin, int last_bin, unsigned prefix, unsigned mask) {
        __syncthreads();
        if (threadIdx.x == 0) s.listed = 0;
        __syncthreads();
        const float floor = floor_of(last_bin);
        // Four loads in flight a thread.
#pragma unroll 4
        for (int id = threadIdx.x; id < vocab; id += blockDim.x) {
            const float x = logits(id);
            if (x >= floor && is_wanted(x, first_bin, last_bin, prefix, mask)) s.keys[atomicAdd(&s.listed, 1u)] = key_of(x, id);
        }
        __syncthreads();
        listed = static_cast<int>(s.listed);
        sort();
        mass_listed = sum_of(listed, [&](int i) { return mass(logit_of_key(s.keys[i])); }, s);
    }

    // Bitonic, over the next power of two.
    __device__ void sort() {
        int size = 1;
        while (size < listed) size *= 2;
        for (int i = listed + static_cast<int>(threadIdx.x); i < size; i += blockDim.x) s.keys[i] = ~0ull;
        __syncthreads();
        for (int run = 2; run <= size; run *= 2)
            for (int step = run / 2; step > 0; step /= 2) {
                for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
                    const int low = i / step * step * 2 + i % step, high = low + step;
                    const Mass a = s.keys[low], b = s.keys[high];
                    if ((a > b) == ((low & run) == 0)) {
                        s.keys[low] = b;
                        s.keys[high] = a;
                    }
                }
                __syncthreads();
            }
    }
};

// The draw of src/engine/rng.rs times `total`, rounded down.
__device__ Mass draw_below(const Row& row, Mass total) {
    const uint4 counter = make_uint4(row.step, row.completion, static_cast<unsigned>(row.record), static_cast<unsigned>(row.record >> 32));
    const uint4 bits = philox4x32(counter, make_uint2(static_cast<unsigned>(row.seed), static_cast<unsigned>(row.seed >> 32)));
    const Mass draw = (static_cast<Mass>(bits.y) << 32 | bits.x) & ~0x7ffull;
    return high_product(draw, total);
}

// Without top-k and top-p the draw goes by id: first among chunks, then in one.
__device__ int draw_by_id(const Row& row, const Logits& logits, int vocab, const Partial* partials, const Summary& sum, Scratch& s) {
    const Mass target = draw_below(row, sum.kept);
    const int chunks = (vocab + CHUNK - 1) / CHUNK;
    const Found chunk = locate(chunks, target, [&](int i) { return partials[i].kept; }, s);
    const int first = chunk.index * CHUNK;
    const float max = logit_of_key(sum.best);
    const auto mass = [&](int i) {
        const float weight = exp_nonpositive(div(sub(logits(first + i), max), row.temperature));
        return weight < row.min_p ? Mass(0) : mass_of(weight);
    };
    return first + locate(min(CHUNK, vocab - first), target - chunk.before, mass, s).index;
}

// With top-k or top-p, from the best down.
__device__ int draw_in_order(const Row& row, const Logits& logits, int vocab, const Histogram& bins, const Summary& sum, Scratch& s) {
    Order order{logits, bins, s, vocab, logit_of_key(sum.best), row.temperature};
    Mass total = sum_of(BINS, [&](int i) { return bins.mass(i); }, s);
    if (row.top_k > 0) {
        const Mass tokens = sum_of(BINS, [&](int i) { return static_cast<Mass>(bins.count[i]); }, s);
        if (row.top_k < tokens) {
            const Place last = order.find(false, row.top_k - 1);
            total = last.before + last.mass;
        }
    }
    Mass kept = total;
    if (row.flags & TOP_P) {
        // The first place where the mass reaches top_p * total, that is, exceeds its ceiling less one.
        const Mass limit = high_product(row.top_p, total) + (row.top_p * total != 0);
        const Place last = order.find(true, limit > 0 ? limit - 1 : 0);
        kept = last.before + last.mass;
    }
    // The best token always stays.
    kept = max(min(kept, sum.kept), static_cast<Mass>(UNIT));
    return order.find(true, draw_below(row, kept)).id;
}

}  // namespace

// Grid: chunks, rows. Maxima and faults of each chunk; clears a filtered row's
// histogram.
extern "C" __global__ void __launch_bounds__(CHUNK_THREADS)
    sampling_maxima(const float* logits, int stride, int vocab, const void* rows, const unsigned* counts, const unsigned* allowed,
                    const unsigned* eos, int num_eos, void* partials, unsigned* histograms) {
    const int chunk = blockIdx.x, chunks = gridDim.x, r = blockIdx.y;
    const Row& row = static_cast<const Row*>(rows)[r];
    if ((row.flags & (CHOOSE | SCORE)) == 0) return;
    if (row.flags & FILTER)
        for (int i = chunk * CHUNK_THREADS + threadIdx.x; i < 3 * BINS; i += chunks * CHUNK_THREADS)
            histograms[static_cast<size_t>(row.histogram) * 3 * BINS + i] = 0;
    const Logits values = logits_of(row, logits + static_cast<size_t>(r) * stride, vocab, counts, allowed, eos, num_eos);
    Summary s;
    const int end = min((chunk + 1) * CHUNK, vocab);
#pragma unroll 4
    for (int id = chunk * CHUNK + threadIdx.x; id < end; id += CHUNK_THREADS) {
        const float raw = values.row[id], x = values.edit(raw, id);
        s.raw_max = fmaxf(s.raw_max, raw);
        if (is_nan(raw)) s.bad |= RAW_NAN;
        if (is_nan(x)) s.bad |= EDITED_NAN;
        else s.best = min(s.best, key_of(x, id));
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        s.best = min(s.best, __shfl_xor_sync(FULL_WARP, s.best, step));
        s.raw_max = fmaxf(s.raw_max, __shfl_xor_sync(FULL_WARP, s.raw_max, step));
        s.bad |= __shfl_xor_sync(FULL_WARP, s.bad, step);
    }
    __shared__ Mass best[CHUNK_WARPS];
    __shared__ float raw_max[CHUNK_WARPS];
    __shared__ unsigned bad[CHUNK_WARPS];
    if (threadIdx.x % WARP == 0) {
        best[threadIdx.x / WARP] = s.best;
        raw_max[threadIdx.x / WARP] = s.raw_max;
        bad[threadIdx.x / WARP] = s.bad;
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < CHUNK_WARPS; i++) {
        s.best = min(s.best, best[i]);
        s.raw_max = fmaxf(s.raw_max, raw_max[i]);
        s.bad |= bad[i];
    }
    Partial& partial = static_cast<Partial*>(partials)[static_cast<size_t>(r) * chunks + chunk];
    partial.best = s.best;
    partial.raw_max = s.raw_max;
    partial.bad = s.bad;
}
EXPORT_KERNEL(sampling_maxima)

// Grid: chunks, rows. Masses of each chunk, and the row's histogram.
extern "C" __global__ void __launch_bounds__(CHUNK_THREADS)
    sampling_masses(const float* logits, int stride, int vocab, const void* rows, const unsigned* counts, const unsigned* allowed,
                    const unsigned* eos, int num_eos, void* partials, unsigned* histograms) {
    const int chunk = blockIdx.x, chunks = gridDim.x, r = blockIdx.y;
    const Row& row = static_cast<const Row*>(rows)[r];
    Partial* of_row = static_cast<Partial*>(partials) + static_cast<size_t>(r) * chunks;
    if ((row.flags & (CHOOSE | SCORE)) == 0) return;
    const Summary found = summarise(of_row, chunks, false);
    const bool draws = (row.flags & CHOOSE) && !(row.flags & GREEDY) && check_edited(found) == OK;
    const bool filters = draws && (row.flags & FILTER);
    const bool normalises = (row.flags & NORMALISER) && check_raw(found) == OK;
    if (!draws && !normalises) return;

    __shared__ unsigned words[3 * BINS];
    __shared__ Mass kept_of[CHUNK_WARPS], raw_of[CHUNK_WARPS];
    const Histogram bins(words, BINS);
    if (filters) {
        for (int i = threadIdx.x; i < 3 * BINS; i += CHUNK_THREADS) words[i] = 0;
        __syncthreads();
    }
    const Logits values = logits_of(row, logits + static_cast<size_t>(r) * stride, vocab, counts, allowed, eos, num_eos);
    const float max = logit_of_key(found.best);
    const int end = min((chunk + 1) * CHUNK, vocab);
    Mass kept = 0, raw_total = 0;
#pragma unroll 4
    for (int id = chunk * CHUNK + threadIdx.x; id < end; id += CHUNK_THREADS) {
        const float raw = values.row[id];
        if (normalises) raw_total += mass_of(exp_nonpositive(sub(raw, found.raw_max)));
        if (!draws) continue;
        const float z = div(sub(values.edit(raw, id), max), row.temperature), weight = exp_nonpositive(z);
        if (!(weight < row.min_p)) kept += mass_of(weight);
        const int bin = filters ? bin_of(z) : -1;
        if (bin >= 0) bins.add(bin, mass_of(weight), 1);
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        kept += __shfl_xor_sync(FULL_WARP, kept, step);
        raw_total += __shfl_xor_sync(FULL_WARP, raw_total, step);
    }
    if (threadIdx.x % WARP == 0) {
        kept_of[threadIdx.x / WARP] = kept;
        raw_of[threadIdx.x / WARP] = raw_total;
    }
    __syncthreads();
    if (filters) {
        const Histogram all(histograms + static_cast<size_t>(row.histogram) * 3 * BINS, BINS);
        for (int bin = threadIdx.x; bin < BINS; bin += CHUNK_THREADS)
            if (bins.count[bin] > 0) all.add(bin, bins.mass(bin), bins.count[bin]);
    }
    if (threadIdx.x > 0) return;
    for (int i = 1; i < CHUNK_WARPS; i++) {
        kept += kept_of[i];
        raw_total += raw_of[i];
    }
    of_row[chunk].kept = kept;
    of_row[chunk].raw_total = raw_total;
}
EXPORT_KERNEL(sampling_masses)

// Grid: rows. Decides; counts the token; `next` gets it for the next step's input.
extern "C" __global__ void __launch_bounds__(1024)
    sampling_decide(const float* logits, int stride, int vocab, const void* rows, unsigned* counts, const unsigned* allowed,
                    const unsigned* eos, int num_eos, const void* partials, unsigned* histograms, void* outcomes, int* next) {
    __shared__ Scratch scratch;
    const int r = blockIdx.x, chunks = (vocab + CHUNK - 1) / CHUNK;
    const Row row = static_cast<const Row*>(rows)[r];
    const Partial* of_row = static_cast<const Partial*>(partials) + static_cast<size_t>(r) * chunks;
    const float* raw = logits + static_cast<size_t>(r) * stride;
    Outcome outcome = {0, NOTHING_ASKED, 0.0f, 0.0f, 0};
    if (row.flags & (CHOOSE | SCORE)) {
        const Summary sum = summarise(of_row, chunks, true);
        outcome.raw_max = sum.raw_max;
        outcome.raw_total = sum.raw_total;
        unsigned status = OK;
        if (row.flags & SCORE) {
            outcome.token = row.target;
        } else {
            if (row.allowed >= 0) status = check_raw(sum);
            if (status == OK) status = check_edited(sum);
            const bool is_greedy = row.flags & GREEDY, filters = row.flags & FILTER;
            if (status == OK && !is_greedy && !filters && sum.kept == 0) status = NO_CANDIDATE;
            if (status == OK) {
                const Logits values = logits_of(row, raw, vocab, counts, allowed, eos, num_eos);
                const Histogram bins(histograms + static_cast<size_t>(row.histogram) * 3 * BINS, BINS);
                outcome.token = is_greedy ? static_cast<unsigned>(sum.best)
                                : filters ? draw_in_order(row, values, vocab, bins, sum, scratch)
                                          : draw_by_id(row, values, vocab, of_row, sum, scratch);
            }
        }
        if (status == OK && (row.flags & NORMALISER)) status = check_raw(sum);
        if (status == OK) outcome.logit = raw[outcome.token];
        outcome.status = status;
    }
    // The counts are read until here.
    __syncthreads();
    if (threadIdx.x > 0) return;
    const bool chosen = outcome.status == OK && (row.flags & CHOOSE);
    static_cast<Outcome*>(outcomes)[r] = outcome;
    next[r] = chosen ? static_cast<int>(outcome.token) : 0;
    if (chosen && row.slot >= 0) counts[static_cast<size_t>(row.slot) * vocab + outcome.token]++;
}
EXPORT_KERNEL(sampling_decide)

// Grid: rows. The best `num_top` raw logits of each row that asks, as pairs of id and logit in
// `top` [rows][MAX_TOP], one after another: few rows ask, for few.
extern "C" __global__ void __launch_bounds__(1024)
    sampling_top(const float* logits, int stride, int vocab, const void* rows, unsigned* top) {
    __shared__ Mass warp_best[WARP];
    const int r = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const float* raw = logits + static_cast<size_t>(r) * stride;
    const int wanted = min(static_cast<int>(static_cast<const Row*>(rows)[r].num_top), min(vocab, MAX_TOP));
    Mass last = 0;
    for (int place = 0; place < wanted; place++) {
        Mass best = ~0ull;
#pragma unroll 4
        for (int id = threadIdx.x; id < vocab; id += blockDim.x) {
            const Mass key = key_of(raw[id], id);
            if (place == 0 || key > last) best = min(best, key);
        }
        for (int step = WARP / 2; step > 0; step /= 2) best = min(best, __shfl_xor_sync(FULL_WARP, best, step));
        __syncthreads();
        if (lane == 0) warp_best[warp] = best;
        __syncthreads();
        last = lane < warps ? warp_best[lane] : ~0ull;
        for (int step = WARP / 2; step > 0; step /= 2) last = min(last, __shfl_xor_sync(FULL_WARP, last, step));
        if (threadIdx.x == 0) {
            unsigned* pair = top + (static_cast<size_t>(r) * MAX_TOP + place) * 2;
            pair[0] = static_cast<unsigned>(last);
            pair[1] = __float_as_uint(raw[static_cast<unsigned>(last)]);
        }
    }
}
EXPORT_KERNEL(sampling_top)

// Grid: any. Counts `n` tokens into one slot, which is zero before.
extern "C" __global__ void sampling_count(const unsigned* tokens, int n, unsigned* counts) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&counts[tokens[i]], 1u);
}
EXPORT_KERNEL(sampling_count)
