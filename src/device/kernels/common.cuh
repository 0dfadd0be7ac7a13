// What every kernel file builds on: the number types, sums over warps and blocks, 16-byte
// accesses, asynchronous copies and Philox. The same sources are compiled by nvcc (or
// NVRTC) for the device and, with FARM_EMULATOR, by a C++ compiler for the tests' emulator.
#pragma once

#ifdef FARM_EMULATOR
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

using f16 = __half;
using bf16 = __nv_bfloat16;
namespace wmma = nvcuda::wmma;

// The dynamic shared memory of the launch as an array of `type`, 128-byte aligned.
#define DYNAMIC_SHARED(type, name)                                     \
    extern __shared__ __align__(128) unsigned char name##_bytes[]; \
    type* name = reinterpret_cast<type*>(name##_bytes)

// Makes a kernel known to the emulator; nothing on the device.
#define EXPORT_KERNEL(name)

// NVRTC has no <math.h>.
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#endif

// bf16 has no tensor cores before compute capability 8.0.
#if defined(FARM_EMULATOR) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FARM_BF16_TENSOR_CORES 1
#endif

constexpr int WARP = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;

// ---------------------------------------------------------------- numbers

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ f16 from_f32<f16>(float x) { return __float2half(x); }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) { return __float2bfloat16(x); }

// ---------------------------------------------------------------- 16-byte accesses

template <class T> union Pack8 {
    uint4 words;
    T values[8];
    __device__ Pack8() : words{} {}
};

// Eight values from a 16-byte aligned address.
template <class T> __device__ __forceinline__ void load8(const T* from, float (&to)[8]) {
    Pack8<T> pack;
    pack.words = *reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = to_f32(pack.values[i]);
}
template <> __device__ __forceinline__ void load8<float>(const float* from, float (&to)[8]) {
    const float4 low = reinterpret_cast<const float4*>(from)[0];
    const float4 high = reinterpret_cast<const float4*>(from)[1];
    to[0] = low.x; to[1] = low.y; to[2] = low.z; to[3] = low.w;
    to[4] = high.x; to[5] = high.y; to[6] = high.z; to[7] = high.w;
}

// Eight values to a 16-byte aligned address.
template <class T> __device__ __forceinline__ void store8(T* to, const float (&from)[8]) {
    Pack8<T> pack;
#pragma unroll
    for (int i = 0; i < 8; i++) pack.values[i] = from_f32<T>(from[i]);
    *reinterpret_cast<uint4*>(to) = pack.words;
}
template <> __device__ __forceinline__ void store8<float>(float* to, const float (&from)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
}

// ---------------------------------------------------------------- sums

// The sum over the warp, in every lane; one order whatever the lanes.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

// The maximum over the warp, in every lane.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}

// The sum over a one-dimensional block, in every thread. `shared` holds 32 floats; its content
// before is lost, and it is free again after the next __syncthreads().
__device__ __forceinline__ float block_sum(float x, float* shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? shared[lane] : 0.0f);
}

// The maximum over a one-dimensional block, in every thread; `shared` as in block_sum.
__device__ __forceinline__ float block_max(float x, float* shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? shared[lane] : -INFINITY);
}

// ---------------------------------------------------------------- asynchronous copies

// 16 bytes from global to shared memory, both 16-byte aligned. Done after copy_async_wait and a
// barrier; before compute capability 8.0, at once.
__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(global) : "memory");
#else
    *reinterpret_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(global);
#endif
}

// Closes a group of copies.
__device__ __forceinline__ void copy_async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits for this thread's copies but the last N groups.
template <int N> __device__ __forceinline__ void copy_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#endif
}

// ---------------------------------------------------------------- random numbers

// Philox4x32-10 (Salmon et al., SC 2011), as src/philox.rs has it.
__device__ __forceinline__ uint4 philox4x32(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned low0 = 0xD2511F53u * counter.x, high0 = __umulhi(0xD2511F53u, counter.x);
        const unsigned low1 = 0xCD9E8D57u * counter.z, high1 = __umulhi(0xCD9E8D57u, counter.z);
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key = make_uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
    }
    return counter;
}
