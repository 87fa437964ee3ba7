// SPDX-License-Identifier: Apache-2.0
// When a gated kernel is worth it. The figures are medians on a quiet AVX-512 Xeon without AMX, two
// threads, against the library's fastest form of the dense layer in the same memory format.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <string>

namespace cofire {
inline namespace CPU_CAPABILITY {

struct ConvShape {
  int64_t batch, in_channels, out_channels, height, width, out_height, out_width, groups;
  std::array<int64_t, 2> kernel, stride, padding, dilation;

  bool depthwise() const { return groups > 1 && groups == in_channels; }
};

constexpr double kAlways = 1.0;  // even where the masks leave everything

// The share of the dense multiply-adds up to which the gated convolution is the faster one: the
// time of the library's over its own with every channel active.
inline double gated_conv2d_break_even(const ConvShape& s, int64_t lanes, bool channels_last,
                                      bool sixteen_bit) {
  // A depthwise convolution moves bytes rather than multiplying: ahead even with every channel
  // active (1.8x at 512 @14x14, 1.5x at 128 @56x56 with stride 2).
  if (s.depthwise()) return kAlways;
  const int64_t positions = s.out_height * s.out_width, vectors = (positions + lanes - 1) / lanes;
  // Lanes past the end of a plane are wasted: 23 % at 7x7.
  const double used =
      static_cast<double>(positions) / static_cast<double>(std::max<int64_t>(1, vectors * lanes));
  // The library converts its input and output, for about the time of 30 multiply-adds an element:
  // 3x3 @32x32 with 16 channels, batch 32: 1.29; with 128 @28x28: 0.85.
  const double converted =
      static_cast<double>(s.in_channels * s.height * s.width + s.out_channels * positions);
  const double products = static_cast<double>(positions * s.out_channels * s.kernel[0] *
                                              s.kernel[1] * (s.in_channels / s.groups));
  // One vector leaves too few sums to hide the FMA latency: 4x4 at batch 32, 0.58.
  double speed = 0.85 * std::min(used, vectors == 1 ? 0.7 : 1.0) *
                 (1 + 30 * converted / std::max(1.0, products));
  if (s.batch <= 2) {
    // The library reorders its weights at every call: 0.98 to 2.1 at one sample, 0.91 to 2.4 at
    // two; 0.86 and 0.53 at 2x2.
    speed = positions < lanes ? 0.85 / static_cast<double>(s.batch) : kAlways;
  } else if (sixteen_bit && vectors > 1) {
    // It computes in fp32, which without AMX is faster than the library in 16 bits: 1.56 against
    // 0.86 in fp32 at 256x256 3x3 @14x14.
    speed *= 1.5;
  }
  // The kernel works on planes and both ends are converted: 7.7 ms instead of 3.7 at 256x256 3x3
  // @14x14, 8 samples, half of the channels kept on both sides.
  if (channels_last) speed /= 2.1;
  return std::min(speed, kAlways);
}

// Up to this many samples a linear layer is bound by the bytes of its weight, and each sample reads
// its own; from there on the library's GEMM reads the weight once: on one thread half of the
// outputs kept gave 1.95x dense at 8 samples and no gain from 16, at 4096x4096.
constexpr int64_t kLinearSamples = 8;

constexpr double kLinearMargin = 0.95;

// The cost of the kept rows (or columns). `passes` is the sum of the samples' shares, `touched` the
// share that any sample keeps. In units of one pass over a 4096x4096 weight in memory (4.6 ms on
// one thread) a further pass over what is in cache costs 0.2: half kept, 1, 2, 4 and 8
// samples: 2.3, 3.7, 5.3 and 7.8 ms. The library needs 4.6, 4.8, 9.4 and 15 ms on rows, 4.4, 5.7
// and (8 samples) 9.7 ms on columns.
// In 16 bits on AMX a pass takes 1.0 ms on two threads, every further one 0.6.
inline double gated_linear_cost(double passes, double touched, bool tiles) {
  return touched + (tiles ? 0.6 : 0.2) * (passes - touched);
}
// The library's, in the same units. On AMX it takes 2.1 ms for one sample and 1.7 to 1.9 for 2 to
// 16; on columns 2.3, where a pass takes 1.45. (These are bf16's; in fp16 the library takes 1.6 to
// 4 ms, and a pass as long.)
inline double dense_linear_cost(int64_t batch, bool columns, bool tiles) {
  if (tiles) return columns ? 1.55 : 1.8;
  return std::max(1.0, (columns ? 0.27 : 0.41) * static_cast<double>(batch));
}

// A sentence for people: the choice between two ways, and the two shares that made it.
inline std::string plan(double share, double limit, const char* of, const char* gated,
                        const char* dense) {
  std::array<char, 160> text;
  std::snprintf(text.data(), text.size(), "%s: %.0f%% of the %s, gated up to %.0f%%",
                share > limit ? dense : gated, 100 * share, of, 100 * limit);
  return text.data();
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
