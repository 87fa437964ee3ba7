// SPDX-License-Identifier: Apache-2.0
// A gated convolution by the library's dense one: where the masks leave too much to gain.
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>

#include <cstring>

#include "gating_conv2d.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace {

// What surrounds the library convolution: y = clamp(x + residual) on the active
// channels and exact zero on the others. A compact x or y holds the active
// channels in its first slots; in channels-last memory both are dense.
template <typename T>
struct Masking {
  const Selection& selection;
  int64_t batch, positions;
  float low = -std::numeric_limits<float>::infinity();
  float high = std::numeric_limits<float>::infinity();

  void planes(const T* x, int64_t compact_x, const T* residual, T* y, int64_t compact_y) const {
    const int64_t channels = selection.channels();
    const int64_t x_channels = compact_x > 0 ? compact_x : channels;
    const int64_t y_channels = compact_y > 0 ? compact_y : channels;
    const std::vector<int32_t> slots = selection.slots();
    at::parallel_for(0, batch * y_channels, grain(positions), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / y_channels, c = i % y_channels;
        const int64_t slot = compact_y == 0 ? slots[i] : c < selection.count(n) ? c : -1;
        if (slot < 0) {
          std::fill_n(y + i * positions, positions, T(0.f));
          continue;
        }
        const int64_t channel = selection.channel(n, slot);
        const T* from = x + (n * x_channels + (compact_x > 0 ? slot : channel)) * positions;
        const T* add = residual ? residual + (n * channels + channel) * positions : nullptr;
        run(from, add, nullptr, y + i * positions, positions);
      }
    });
  }

  void pixels(const T* x, const T* residual, T* y) const {
    const int64_t channels = selection.channels();
    const std::vector<int32_t> slots = selection.slots();
    std::vector<float> mask(slots.size());  // all bits set where the channel is active
    for (size_t i = 0; i < slots.size(); ++i) {
      const int32_t bits = slots[i] < 0 ? 0 : -1;
      std::memcpy(&mask[i], &bits, sizeof(bits));
    }
    at::parallel_for(0, batch * positions, grain(channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* add = residual ? residual + i * channels : nullptr;
        run(x + i * channels, add, mask.data() + i / positions * channels, y + i * channels,
            channels);
      }
    });
  }

 private:
  static int64_t grain(int64_t run) {
    return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, run));
  }

  void run(const T* x, const T* residual, const float* mask, T* y, int64_t size) const {
    for (int64_t i = 0; i < size; i += kLanes) {
      const int64_t n = std::min(kLanes, size - i);
      Vec v = load_f32(x + i, n);
      if (residual != nullptr) v = v + load_f32(residual + i, n);
      v = at::vec::clamp(v, Vec(low), Vec(high));
      if (mask != nullptr) v = v & Vec::loadu(mask + i, n);
      store_f32(y + i, v, n);
    }
  }
};

// The library convolution on the dense tensor, then one pass that adds the
// residual, applies the activation and zeroes the channels that are off.
template <typename T>
at::Tensor run(const Problem& p, const at::Tensor& input, const at::Tensor& weight) {
  const ConvShape& s = p.shape;
  const auto format = memory_format(input);
  at::Tensor x = input.contiguous(format);
  if (p.compact_input || (!p.masked_input && p.in.total() < s.batch * s.in_channels)) {
    const Masking<T> masking{p.in, s.batch, s.height * s.width};
    const bool planes = p.compact_input || x.is_contiguous();
    const at::Tensor source = planes ? x.contiguous() : x;
    x = at::empty({s.batch, s.in_channels, s.height, s.width},
                  input.options().memory_format(planes ? at::MemoryFormat::Contiguous : format));
    T* const to = x.mutable_data_ptr<T>();
    if (planes) {
      masking.planes(source.const_data_ptr<T>(), p.compact_input ? source.size(1) : 0, nullptr, to,
                     0);
    } else {
      masking.pixels(source.const_data_ptr<T>(), nullptr, to);
    }
  }
  const bool planes = p.compact_output > 0 || format == at::MemoryFormat::Contiguous;
  const auto order = planes ? at::MemoryFormat::Contiguous : format;
  const at::Tensor conv =
      at::conv2d(x, weight, p.bias, s.stride, s.padding, s.dilation, s.groups).contiguous(order);
  const at::Tensor residual = p.residual ? p.residual->contiguous(order) : at::Tensor();
  const T* const from = conv.const_data_ptr<T>();
  const T* const add = p.residual ? residual.const_data_ptr<T>() : nullptr;
  const Masking<T> masking{p.out, s.batch, s.out_height * s.out_width, p.low, p.high};
  if (!planes) {
    masking.pixels(from, add, conv.mutable_data_ptr<T>());
    return conv;
  }
  const at::Tensor y = p.compact_output > 0 ? at::empty(p.output_size(), conv.options()) : conv;
  masking.planes(from, 0, add, y.mutable_data_ptr<T>(), p.compact_output);
  return y.contiguous(format);
}

}  // namespace

at::Tensor library_conv2d(const Problem& p, const at::Tensor& input, const at::Tensor& weight) {
  return dispatch(input.scalar_type(),
                  [&](auto zero) { return run<decltype(zero)>(p, input, weight); });
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
