// Products of 16-bit tiles by a warp with the operands' places in its registers known, as
// compute capability 8.0 has them (PTX: ldmatrix, mma.m16n8k16). wmma hides the places, so that
// sums have to go through shared memory to be scaled, and it loads bf16 without ldmatrix.
//
// Lane 4r + c of the warp holds, two values a register where they have 16 bits:
//   a[16][16]  rows r (registers 0, 2) and r + 8 (1, 3), columns 2c, 2c + 1 (0, 1) and 2c + 8, 2c + 9 (2, 3)
//   b[16][8]   rows 2c, 2c + 1 (register 0) and 2c + 8, 2c + 9 (1), column r
//   c[16][8]   rows r (registers 0, 1) and r + 8 (2, 3), columns 2c (0, 2) and 2c + 1 (1, 3)
#pragma once

#include "common.cuh"

#if defined(FARM_EMULATOR) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
#define FARM_TILES 1

// Two values in a register, the first in its low half.
template <class T> __device__ __forceinline__ unsigned pack2(float low, float high);

#ifdef FARM_EMULATOR

namespace emulator {
// What the lanes of each warp leave for the others.
struct Left {
    const void* row;
    float a[4][2], b[2][2];
};
inline Left* left_by_warp() {
    static Left all[32][WARP];  // one block runs at a time
    return all[threadIdx.x / WARP];
}
}  // namespace emulator

template <class T> unsigned pack2_of(T low, T high) {
    const T both[2] = {low, high};
    unsigned bits;
    std::memcpy(&bits, both, 4);
    return bits;
}
template <class T> unsigned pack2(float low, float high) { return pack2_of(from_f32<T>(low), from_f32<T>(high)); }

template <class T> void load_tiles(unsigned (&to)[4], const T* row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("a row of a tile is not 16-byte aligned");
    emulator::Left* left = emulator::left_by_warp();
    const unsigned lane = emulator::lane, r = lane / 4, c = lane % 4 * 2;
    left[lane].row = row;
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        const auto value = [&](unsigned y, unsigned x) { return static_cast<const T*>(left[8 * i + y].row)[x]; };
        to[i] = transposed ? pack2_of(value(c, r), value(c + 1, r)) : pack2_of(value(r, c), value(r, c + 1));
    }
    __syncwarp();
}
template <class T> void load_tiles(unsigned (&to)[4], const T* row) { load_tiles(to, row, false); }
template <class T> void load_tiles_transposed(unsigned (&to)[4], const T* row) { load_tiles(to, row, true); }

template <class T> void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulator::Left* left = emulator::left_by_warp();
    const unsigned lane = emulator::lane;
    const auto unpack = [](float (&to)[2], unsigned bits) {
        T both[2];
        std::memcpy(both, &bits, 4);
        to[0] = to_f32(both[0]);
        to[1] = to_f32(both[1]);
    };
    for (int i = 0; i < 4; i++) unpack(left[lane].a[i], a[i]);
    unpack(left[lane].b[0], b0);
    unpack(left[lane].b[1], b1);
    __syncwarp();
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; k++) {
            const float x = left[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2][k % 2];
            c[i] += x * left[column * 4 + k % 8 / 2].b[k / 8][k % 2];
        }
    }
    __syncwarp();
}

#else

template <> __device__ __forceinline__ unsigned pack2<f16>(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&both);
}
template <> __device__ __forceinline__ unsigned pack2<bf16>(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&both);
}

// Four tiles of 8 by 8 from shared memory: lane 8i + j gives the address of row j of tile i, 16-byte
// aligned, and gets in register i what `a` and `c` above have of 8 rows and columns.
template <class T> __device__ __forceinline__ void load_tiles(unsigned (&to)[4], const T* row) {
    const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

// The same, each tile transposed.
template <class T> __device__ __forceinline__ void load_tiles_transposed(unsigned (&to)[4], const T* row) {
    const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

// c += a · b.
template <class T> __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void multiply<f16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<bf16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
#endif
