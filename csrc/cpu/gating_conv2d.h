// SPDX-License-Identifier: Apache-2.0
// What the three ways to compute a gated convolution share: gating_conv2d.cpp
// chooses between its own kernel, gating_depthwise.cpp and gating_library.cpp.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "gating_selection.h"
#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

struct Problem {
  ConvShape shape;
  Selection in, out;
  std::optional<at::Tensor> bias, residual;
  float low, high;  // the activation is a clamp
  bool masked_input, compact_input;
  int64_t compact_output;

  int64_t output_channels() const {
    return compact_output > 0 ? compact_output : shape.out_channels;
  }
  std::vector<int64_t> output_size() const {
    return {shape.batch, output_channels(), shape.out_height, shape.out_width};
  }
};

// The positions i in [0, limit) with 0 <= i * step + offset < size, as [first, last).
inline std::pair<int64_t, int64_t> inside(int64_t step, int64_t offset, int64_t size,
                                          int64_t limit) {
  const int64_t first = std::clamp<int64_t>(offset < 0 ? (-offset + step - 1) / step : 0, 0, limit);
  const int64_t last = offset < size ? (size - offset + step - 1) / step : 0;
  return {first, std::clamp(last, first, limit)};
}

// count values, `step` apart, as fp32.
template <typename T>
void copy_f32(const T* source, int64_t step, float* to, int64_t count) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + kLanes <= count; i += kLanes) load_f32(source + i).store(to + i);
    if (i < count) load_f32(source + i, count - i).store(to + i, count - i);
  } else if (step == 2) {
    for (; i < count; i += kLanes) {
      const int64_t left = 2 * (count - i) - 1;  // no value beyond the last one is touched
      const Vec low = load_f32(source + 2 * i, std::min(left, kLanes));
      const Vec high = left > kLanes
                           ? load_f32(source + 2 * i + kLanes, std::min(left - kLanes, kLanes))
                           : Vec(0.f);
      at::vec::deinterleave2(low, high).first.store(to + i, std::min(count - i, kLanes));
    }
  } else {
    for (; i < count; ++i) to[i] = static_cast<float>(source[i * step]);
  }
}

// One input channel per output channel; input and weight contiguous.
at::Tensor gated_depthwise(const Problem& p, const at::Tensor& input, const at::Tensor& weight);

// The library convolution on dense maps, in the input's memory format.
at::Tensor library_conv2d(const Problem& p, const at::Tensor& input, const at::Tensor& weight);

}  // namespace CPU_CAPABILITY
}  // namespace cofire
