// SPDX-License-Identifier: Apache-2.0
// Selection primitives in CUDA C++, where warps must vote. No header, so that NVRTC and nvcc both
// take it.

// Positions of the set entries of each row, ascending, then -1; and their number. One warp per row,
// any width.
//
// A warp looks at 32 columns at a time: the ballot is their bitmap, and its popcount below a lane
// is the lane's rank. The r-th set column goes to slot r, the r-th unset one puts its -1 into the
// r-th slot from the end, so that one pass fills the row before its count is known.
extern "C" __global__ void __launch_bounds__(256)
    compact_forward_kernel(const unsigned char* __restrict__ mask, int* __restrict__ index,
                           int* __restrict__ count, long long rows, long long columns) {
  const long long row = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / 32;
  if (row >= rows) return;  // the whole warp: a warp shares its row
  const int lane = threadIdx.x % 32;
  const unsigned lanes_below = (1u << lane) - 1;
  mask += row * columns;
  index += row * columns;

  long long found = 0;
  for (long long start = 0; start < columns; start += 32) {
    const long long column = start + lane;
    const bool inside = column < columns;
    const bool set = inside && mask[column] != 0;
    const unsigned ballot = __ballot_sync(0xffffffffu, set);
    const long long before = found + __popc(ballot & lanes_below);
    if (set) {
      index[before] = static_cast<int>(column);
    } else if (inside) {
      index[columns - 1 - (column - before)] = -1;
    }
    found += __popc(ballot);
  }
  if (lane == 0) count[row] = static_cast<int>(found);
}
