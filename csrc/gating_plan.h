// SPDX-License-Identifier: Apache-2.0
// When a gated kernel is worth it. Free of torch, so that the host module can explain the choice.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace cofire {

struct ConvShape {
  int64_t batch, in_channels, out_channels, height, width, out_height, out_width, groups;
  std::array<int64_t, 2> kernel, stride, padding, dilation;

  bool depthwise() const { return groups > 1 && groups == in_channels; }
};

// The share of the dense multiply-adds below which the gated convolution wins. Preliminary: from
// the fastest of some 40 calls on a loaded machine (fp32, AVX-512, 2 threads), to be repeated on a
// quiet one. Per multiply-add it reached 0.7 to 0.9 of the speed of the library's dense
// convolution.
constexpr double kConvBreakEven = 0.7;

// A depthwise convolution moves bytes rather than multiplying: ours is ahead even with every
// channel active (1.7x at 512 @14x14, 1.9x at 144 @56x56). `kept` is the share of the
// multiply-adds that the masks leave.
inline bool prefer_gated_conv2d(int64_t in_channels, int64_t groups, double kept) {
  return (groups > 1 && groups == in_channels) || kept <= kConvBreakEven;
}

// What a kept multiply-add costs beyond one on large contiguous fp32 planes; it multiplies `kept`.
// Measured on one thread of an AVX-512 Xeon without AMX, in CPU time.
inline double gated_conv2d_factor(const ConvShape& s, int64_t lanes, bool channels_last,
                                  bool sixteen_bit) {
  // Lanes past the end of a plane are wasted: 31 % at 7x7. The library's floor is one vector for
  // the whole batch: below that it waits for the weights.
  const int64_t positions = s.out_height * s.out_width, vectors = (positions + lanes - 1) / lanes;
  const double useful = static_cast<double>(s.batch * positions) / static_cast<double>(lanes);
  double factor = static_cast<double>(s.batch * vectors) / std::max(1.0, useful);
  // One vector a tile leaves too few sums to hide the FMA latency: 512x512 3x3 @4x4, 8 samples, 61
  // GFLOP/s against 89 @7x7.
  if (vectors == 1) factor *= 1.4;
  // The kernel works on planes and both ends are converted: 7.7 ms instead of 3.7 at 256x256 3x3
  // @14x14, 8 samples, half of the channels kept on both sides.
  if (channels_last) factor *= 2.1;
  // It computes in fp32, which without AMX is faster than the library in 16 bits: bf16 115 against
  // 76 GFLOP/s at 256x256 3x3 @14x14 with .9 kept on both sides.
  if (sixteen_bit) factor /= 1.5;
  return factor;
}

// Up to this many samples a linear layer is bound by the bytes of its weight, and each sample reads
// its own; from there on the library's GEMM reads the weight once. Preliminary: on one thread half
// of the outputs kept gave 1.95x dense at 8 samples and no gain from 16, at 4096x4096.
constexpr int64_t kLinearSamples = 8;

inline bool prefer_gated_linear(int64_t batch) { return batch <= kLinearSamples; }

// Whether the kept rows (or columns) are few enough. `touched` is the share of them that any sample
// keeps, `passes` the sum of the samples' shares. In units of one pass over a 4096x4096 weight in
// memory (4.6 ms on one thread) a further pass over what is in cache costs 0.2: half kept, 1, 2, 4
// and 8 samples: 2.3, 3.7, 5.3 and 7.8 ms. The library needs 4.6, 4.8, 9.4 and 15 ms on
// rows, 4.4, 5.7 and (8 samples) 9.7 ms on columns.
inline bool linear_skips_enough(int64_t batch, double passes, double touched, bool columns) {
  const double dense = std::max(1.0, (columns ? 0.27 : 0.41) * static_cast<double>(batch));
  return touched + 0.2 * (passes - touched) < 0.95 * dense;
}

}  // namespace cofire
