// What adapters make of the rows they answer (src/model/adapter/delta.rs).
#include "common.cuh"

namespace {

// Row `rows[i]` of `out`: replaced by row i of `replaced` and the bias, where there is one; then `added` is added,
// or with gains (DoRA) gain * (out - bias + added) + bias. `bias`, `gains`: [width]. Bound by
// memory.
template <class T>
__device__ void adapter_rows(const int* rows, int count, int width, const float* replaced, const float* added,
                             const float* gains, const float* bias, T* out, int out_stride) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y;
    if (column >= width || i >= count) return;
    T* const to = out + static_cast<size_t>(rows[i]) * out_stride + column;
    const size_t from = static_cast<size_t>(i) * width + column;
    const float shift = bias ? bias[column] : 0.0f;
    float value = replaced ? replaced[from] + shift : to_f32(*to);
    if (added && gains) value = gains[column] * (value - shift + added[from]) + shift;
    else if (added) value += added[from];
    *to = from_f32<T>(value);
}

}  // namespace

#define ADAPTER_ROWS(T, TYPE)                                                                                          \
    extern "C" __global__ void adapter_rows_##T(const int* rows, int count, int width, const float* replaced,         \
                                                const float* added, const float* gains, const float* bias, TYPE* out, \
                                                int out_stride) {                                                      \
        adapter_rows(rows, count, width, replaced, added, gains, bias, out, out_stride);                               \
    }                                                                                                                  \
    EXPORT_KERNEL(adapter_rows_##T)
ADAPTER_ROWS(f32, float)
ADAPTER_ROWS(f16, f16)
ADAPTER_ROWS(bf16, bf16)
