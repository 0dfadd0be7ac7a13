// CUDA C++ as far as farm's kernels use it, for an ordinary C++ compiler: the tests run
// the kernels of the device, unchanged, on the CPU.
//
// Every CUDA thread of a block is a fiber; blocks run one after another. Barriers, shuffles and
// votes are exact. What CUDA leaves undefined is made to show: a barrier that not all threads
// reach and a shuffle with lanes that have left abort with the kernel's name; the threads of
// a block can run in rising, falling or shuffled order, so that a missing barrier changes
// results; dynamic shared memory starts as NaN; tensor-core tiles demand their alignment.
//
// Left out: memory spaces (any pointer reaches anything), timing, concurrency of blocks,
// streams, textures, cooperative groups, and intrinsics that no kernel uses.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One block runs at a time in the process. Not thread_local: all kernels' arrays together are
// larger than a thread's stack, which is where a program's own thread-local memory comes from.
#define __shared__ static
#define __constant__ static const

// ---------------------------------------------------------------- vectors

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
#define EMULATOR_VECTORS(scalar, name)                                                         \
    struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                               \
    struct alignas(16) name##4 { scalar x, y, z, w; };                                         \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                       \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
#undef EMULATOR_VECTORS

// ---------------------------------------------------------------- 16-bit floats

inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };
using __half = f16;
using __nv_bfloat16 = bf16;

inline float __bfloat162float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline bf16 __float2bfloat16(float x) {
    unsigned u = __float_as_uint(x);
    if (std::isnan(x)) return {0x7fff};
    u += 0x7fff + (u >> 16 & 1);
    return {static_cast<uint16_t>(u >> 16)};
}
inline float __half2float(f16 x) {
    const unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(mantissa), -24), __uint_as_float(sign | 0x3f800000u));
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline f16 __float2half(float x) {
    const unsigned u = __float_as_uint(x), magnitude = u & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return {0x7fff};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x38800000u) {  // subnormal: the sum with 0.5 rounds at 2^-24
        const float shifted = __uint_as_float(magnitude) + 0.5f;
        return {static_cast<uint16_t>(sign | (__float_as_uint(shifted) - 0x3f000000u))};
    }
    const unsigned rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return {static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13)};
}

// ---------------------------------------------------------------- threads

namespace emulator {

struct Warp;
// Where the running thread is; set at every switch.
extern __thread uint3 thread_index, block_index;
extern __thread dim3 block_shape, grid_shape;
extern __thread unsigned lane;
extern __thread unsigned char* dynamic_shared;

void block_barrier();
// The barrier, and how many threads gave a value other than 0.
int block_count(int predicate);
void warp_barrier();
// Leaves 8 bytes for the other lanes, then takes those of lane `from`.
uint64_t exchange(uint64_t own, unsigned from);
// Bit i: lane i gave a value other than 0.
unsigned ballot(int predicate);
[[noreturn]] void fail(const char* what);

using Invoke = void (*)(void* kernel, void** arguments);
struct Registration {
    Registration(const char* name, void* kernel, Invoke invoke);
};
template <class Kernel> struct Invoker;
template <class... P> struct Invoker<void(P...)> {
    template <size_t... I>
    static void with(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_const_t<P>*>(arguments[I])...);
    }
    static void invoke(void* kernel, void** arguments) {
        with(reinterpret_cast<void (*)(P...)>(kernel), arguments, std::index_sequence_for<P...>{});
    }
};

template <class T> T shuffle(T own, unsigned from) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bytes = 0;
    std::memcpy(&bytes, &own, sizeof own);
    bytes = exchange(bytes, from);
    std::memcpy(&own, &bytes, sizeof own);
    return own;
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_shape
#define gridDim emulator::grid_shape
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::dynamic_shared)
#define EXPORT_KERNEL(name)                                    \
    static const emulator::Registration registered_##name(     \
        #name, reinterpret_cast<void*>(&name), &emulator::Invoker<decltype(name)>::invoke);

inline void __syncthreads() { emulator::block_barrier(); }
inline int __syncthreads_or(int p) { return emulator::block_count(p) != 0; }
inline int __syncthreads_count(int p) { return emulator::block_count(p); }
inline int __syncthreads_and(int p) { return emulator::block_count(!p) == 0; }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::warp_barrier(); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> T __shfl_sync(unsigned, T x, int from, int width = 32) {
    const unsigned w = static_cast<unsigned>(width);
    return emulator::shuffle(x, emulator::lane / w * w + static_cast<unsigned>(from) % w);
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) {
    return emulator::shuffle(x, emulator::lane ^ static_cast<unsigned>(mask));
}
template <class T> T __shfl_down_sync(unsigned, T x, unsigned delta, int width = 32) {
    const unsigned w = static_cast<unsigned>(width), at = emulator::lane % w + delta;
    return emulator::shuffle(x, at < w ? emulator::lane + delta : emulator::lane);
}
template <class T> T __shfl_up_sync(unsigned, T x, unsigned delta, int width = 32) {
    const unsigned w = static_cast<unsigned>(width);
    return emulator::shuffle(x, emulator::lane % w >= delta ? emulator::lane - delta : emulator::lane);
}
inline unsigned __ballot_sync(unsigned, int p) { return emulator::ballot(p); }
inline int __any_sync(unsigned, int p) { return emulator::ballot(p) != 0; }
inline int __all_sync(unsigned, int p) { return emulator::ballot(!p) == 0; }
inline unsigned __activemask() { return 0xffffffffu; }

// ---------------------------------------------------------------- atomics (one thread runs at a time)

template <class T> T atomicAdd(T* at, std::common_type_t<T> x) { T old = *at; *at = old + x; return old; }
template <class T> T atomicSub(T* at, std::common_type_t<T> x) { T old = *at; *at = old - x; return old; }
template <class T> T atomicMax(T* at, std::common_type_t<T> x) { T old = *at; *at = std::max<T>(old, x); return old; }
template <class T> T atomicMin(T* at, std::common_type_t<T> x) { T old = *at; *at = std::min<T>(old, x); return old; }
template <class T> T atomicExch(T* at, std::common_type_t<T> x) { T old = *at; *at = x; return old; }
template <class T> T atomicOr(T* at, std::common_type_t<T> x) { T old = *at; *at = old | x; return old; }
template <class T> T atomicCAS(T* at, std::common_type_t<T> compare, std::common_type_t<T> x) {
    T old = *at;
    if (old == compare) *at = x;
    return old;
}

// ---------------------------------------------------------------- arithmetic

template <class T> T __ldg(const T* p) { return *p; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
    unsigned bytes = 0;
    for (int i = 0; i < 4; i++) bytes |= static_cast<unsigned>(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return bytes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
#define EMULATOR_MIN_MAX(type)                                \
    inline type min(type a, type b) { return b < a ? b : a; } \
    inline type max(type a, type b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
EMULATOR_MIN_MAX(float)
EMULATOR_MIN_MAX(double)
#undef EMULATOR_MIN_MAX
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

// ---------------------------------------------------------------- tensor cores
//
// Lane 0 holds a tile whole and does the work of all; the other lanes go on. So a tile in
// shared memory that other lanes have not finished writing shows.

namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static_assert(M == 16 && N == 16 && K == 16, "tiles of 16 by 16 by 16");
    float values[256];  // row-major
};

inline float wide(float x) { return x; }
inline float wide(f16 x) { return __half2float(x); }
inline float wide(bf16 x) { return __bfloat162float(x); }

template <class T> void check(const T* tile, unsigned stride) {
    if (reinterpret_cast<uintptr_t>(tile) % 32 != 0) emulator::fail("a tensor-core tile is not 32-byte aligned");
    if (stride * sizeof(T) % 16 != 0) emulator::fail("a tensor-core tile's stride is not a multiple of 16 bytes");
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned stride) {
    check(from, stride);
    if (emulator::lane != 0) return;
    for (unsigned r = 0; r < 16; r++)
        for (unsigned c = 0; c < 16; c++)
            to.values[r * 16 + c] = wide(std::is_same_v<Layout, col_major> ? from[c * stride + r] : from[r * stride + c]);
}
inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& to, const float* from, unsigned stride, layout_t layout) {
    check(from, stride);
    if (emulator::lane != 0) return;
    for (unsigned r = 0; r < 16; r++)
        for (unsigned c = 0; c < 16; c++)
            to.values[r * 16 + c] = layout == mem_row_major ? from[r * stride + c] : from[c * stride + r];
}
inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& from, unsigned stride, layout_t layout) {
    check(to, stride);
    if (emulator::lane != 0) return;
    for (unsigned r = 0; r < 16; r++)
        for (unsigned c = 0; c < 16; c++)
            (layout == mem_row_major ? to[r * stride + c] : to[c * stride + r]) = from.values[r * 16 + c];
}
template <class Fragment> void fill_fragment(Fragment& f, float x) {
    if (emulator::lane == 0) std::fill_n(f.values, 256, x);
}
template <class T, class A, class B>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, T, A>& a,
              const fragment<matrix_b, 16, 16, 16, T, B>& b, const fragment<accumulator, 16, 16, 16, float>& c) {
    if (emulator::lane != 0) return;
    for (int r = 0; r < 16; r++) {
        float row[16];
        for (int n = 0; n < 16; n++) row[n] = c.values[r * 16 + n];
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++) row[n] += a.values[r * 16 + k] * b.values[k * 16 + n];
        for (int n = 0; n < 16; n++) d.values[r * 16 + n] = row[n];
    }
}

}  // namespace wmma
