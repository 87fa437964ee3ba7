// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>

namespace cofire {

struct ConvShape {
  int64_t batch, in_channels, out_channels, height, width, out_height, out_width, groups;
  std::array<int64_t, 2> kernel, stride, padding, dilation;
};

inline bool prefer_gated(const ConvShape& s, double macs, int threads, int elem) {
#ifdef FORCE
  return FORCE;
#endif
  return true;
}

inline bool prefer_gated_linear(int64_t n, int64_t, int64_t) { return n <= 8; }
}  // namespace cofire
