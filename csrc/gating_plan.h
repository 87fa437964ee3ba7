// SPDX-License-Identifier: Apache-2.0
// When a gated kernel is worth it. Free of torch, so that the host module can explain the choice.
#pragma once

#include <array>
#include <cstdint>

namespace cofire {

struct ConvShape {
  int64_t batch, in_channels, out_channels, height, width, out_height, out_width, groups;
  std::array<int64_t, 2> kernel, stride, padding, dilation;
};

// The share of the dense multiply-adds below which the gated convolution wins. Per multiply-add it
// reaches 0.7 to 0.9 of the speed of the library's dense convolution (fp32, AVX-512, 2 threads:
// 0.72 at 256x256 3x3 @14x14, 0.9 at 64x64 3x3 @56x56, 0.75 at 128x128 3x3 stride 2 @28x28).
constexpr double kConvBreakEven = 0.7;

// A depthwise convolution moves bytes rather than multiplying: ours is ahead even with every
// channel active (1.7x at 512 @14x14, 1.9x at 144 @56x56). `kept` is the share of the
// multiply-adds that the masks leave.
inline bool prefer_gated_conv2d(int64_t in_channels, int64_t groups, double kept) {
  return (groups > 1 && groups == in_channels) || kept <= kConvBreakEven;
}

// Up to this many samples a linear layer is bound by the bytes of its weight, and each sample reads
// its own; from there on the library's GEMM, which reads the weight once, is ahead (4096x4096: at
// 8 samples 2.3x dense with half of the outputs kept, at 32 samples no gain).
constexpr int64_t kLinearSamples = 8;

inline bool prefer_gated_linear(int64_t batch) { return batch <= kLinearSamples; }

}  // namespace cofire
