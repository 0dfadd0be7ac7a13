// What follows a gather over a tensor-parallel group.
#include "common.cuh"

// [size][rows][widest share] to [rows][vocab]; shares as `share` in src/model/layers.rs has them:
// the first `vocab % size` ranks have one id more. Bound by memory.
extern "C" __global__ void join_shares(const float* gathered, int size, int rows, int vocab, float* out) {
    const int id = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (id >= vocab) return;
    const int least = vocab / size, longer = vocab % size, widest = least + (longer > 0);
    const int in_longer = longer * (least + 1);
    const int rank = id < in_longer ? id / (least + 1) : longer + (id - in_longer) / least;
    const int first = rank * least + min(rank, longer);
    const size_t from = (static_cast<size_t>(rank) * rows + row) * widest + (id - first);
    out[static_cast<size_t>(row) * vocab + id] = gathered[from];
}
EXPORT_KERNEL(join_shares)
