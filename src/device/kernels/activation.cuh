// The nonlinearities of MLPs, by the formulas of src/kernels/ops.rs.
#pragma once

#include "common.cuh"

namespace {

// x * Φ(x) by the formula of the CPU's kernel (Abramowitz & Stegun 1964, 7.1.26).
__device__ float gelu(float x) {
    const float size = fmaxf(-x, x);
    const float z = size * 0.70710678f;
    const float t = 1.0f / (0.3275911f * z + 1.0f);
    float p = 1.0614054f;
    p = p * t - 1.4531521f;
    p = p * t + 1.4214138f;
    p = p * t - 0.28449672f;
    p = p * t + 0.2548296f;
    return fmaxf(0.0f, x) - size * (p * t * expf(-z * z) * 0.5f);
}

// 0 silu, 1 gelu, 2 gelu by tanh, whose (1 + tanh(u)) / 2 is the logistic function of 2u.
__device__ float activation(int kind, float x) {
    if (kind == 1) return gelu(x);
    const float y = kind == 0 ? x : 1.5957692f * (0.044715f * (x * x * x) + x);
    return x / (1.0f + expf(-y));
}

}  // namespace
