// SPDX-License-Identifier: Apache-2.0
// Depthwise convolution of the channels a gate kept: it moves bytes rather than multiplying.
//
// Some rows of a plane at a time are copied, as fp32, with their padding, and with columns apart by
// their phase modulo the stride. Then a tap is a constant offset, and neighbouring outputs read
// neighbouring floats.
#include <ATen/ops/empty.h>

#include <array>

#include "gating_conv2d.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace {

// A padded depthwise plane, or some rows of it, stays in the L1 cache.
constexpr int64_t kFloats = 24 * 1024 / sizeof(float);
constexpr int kRows = 4;  // output rows at a time: enough sums to hide the FMA latency

// Where a tap finds its inputs in the copied rows.
struct Layout {
  int64_t pitch;       // floats of one column phase of a row
  int64_t row;         // floats of a row
  int64_t chunk;       // output rows at a time
  int64_t chunk_rows;  // input rows that they need
  std::vector<int64_t> taps;

  explicit Layout(const ConvShape& s) {
    const int64_t phases = s.stride[1], reach = (s.kernel[0] - 1) * s.dilation[0] + 1;
    pitch = s.out_width + (s.kernel[1] - 1) * s.dilation[1] / phases;
    row = phases * pitch;
    const int64_t fitting = (kFloats / row - reach) / s.stride[0] + 1;
    chunk = std::clamp<int64_t>(fitting, 1, s.out_height);
    chunk_rows = (chunk - 1) * s.stride[0] + reach;
    for (int64_t a = 0; a < s.kernel[0]; ++a) {
      for (int64_t b = 0; b < s.kernel[1]; ++b) {
        const int64_t column = b * s.dilation[1];
        taps.push_back(a * s.dilation[0] * row + column % phases * pitch + column / phases);
      }
    }
  }

  // The last vector of a row reads past its end.
  int64_t size() const { return chunk_rows * row + kLanes; }
};

// Two neighbouring columns at a time: the even ones to one phase, the odd ones to the other.
template <typename T>
void copy_pairs(const T* source, float* even, int64_t evens, float* odd, int64_t odds) {
  const int64_t size = evens + odds;
  for (int64_t i = 0; i < evens; i += kLanes) {
    const int64_t left = size - 2 * i;  // no value beyond the last one is touched
    const Vec low = load_f32(source + 2 * i, std::min(left, kLanes));
    const Vec high =
        left > kLanes ? load_f32(source + 2 * i + kLanes, std::min(left - kLanes, kLanes)) : low;
    const auto [e, o] = at::vec::deinterleave2(low, high);
    e.store(even + i, static_cast<int>(std::min(evens - i, kLanes)));
    if (i < odds) o.store(odd + i, static_cast<int>(std::min(odds - i, kLanes)));
  }
}

// The rows that the outputs from `first_row` on need. The columns of the padding are never written:
// they keep the zeros that the copy began with, as its rows do where one chunk is the whole plane.
template <typename T>
void copy_rows(const T* plane, const ConvShape& s, const Layout& layout, int64_t first_row,
               float* copy) {
  const int64_t y = first_row * s.stride[0] - s.padding[0], pad = s.padding[1];
  const auto [top, bottom] = inside(1, y, s.height, layout.chunk_rows);
  if (layout.chunk < s.out_height) {
    std::fill_n(copy, top * layout.row, 0.f);
    std::fill(copy + bottom * layout.row, copy + layout.chunk_rows * layout.row, 0.f);
  }
  const T* source = plane + (y + top) * s.width;
  float* to = copy + top * layout.row;
  if (s.stride[1] == 2) {
    const int64_t even = pad % 2 * layout.pitch + pad / 2;
    const int64_t odd = (pad + 1) % 2 * layout.pitch + (pad + 1) / 2;
    const int64_t evens = std::min((s.width + 1) / 2, layout.pitch - pad / 2);
    const int64_t odds = std::min(s.width / 2, layout.pitch - (pad + 1) / 2);
    for (int64_t r = top; r < bottom; ++r, source += s.width, to += layout.row) {
      copy_pairs(source, to + even, evens, to + odd, odds);
    }
    return;
  }
  for (int64_t phase = 0; phase < s.stride[1]; ++phase) {
    const int64_t x = phase - pad;
    const auto [left, right] = inside(s.stride[1], x, s.width, layout.pitch);
    for (int64_t r = 0; r < bottom - top; ++r) {
      copy_f32(source + r * s.width + left * s.stride[1] + x, s.stride[1],
               to + r * layout.row + phase * layout.pitch + left, right - left);
    }
  }
}

// One vector of outputs in each of `Rows` rows, `step` floats apart in the copy.
template <int Rows>
void multiply(const float* weight, const std::vector<int64_t>& taps, const float* copy,
              int64_t step, Vec* sums) {
  for (size_t t = 0; t < taps.size(); ++t) {
    const Vec w(weight[t]);
    const float* const x = copy + taps[t];
    COFIRE_UNROLL for (int r = 0; r < Rows; ++r) {
      sums[r] = at::vec::fmadd(w, Vec::loadu(x + r * step), sums[r]);
    }
  }
}

// A plane of outputs and what it is computed with.
template <typename T>
struct Plane {
  const T* input;  // null: the channel is off, and what remains is the bias
  const T* residual;
  T* output;
  const float* weight;
  float bias, low, high;
};

template <typename T>
void run_plane(const Plane<T>& p, const ConvShape& s, const Layout& layout, float* copy) {
  static constexpr std::array kMultiply{&multiply<1>, &multiply<2>, &multiply<3>, &multiply<4>};
  const int64_t step = s.stride[0] * layout.row;
  for (int64_t chunk = 0; chunk < s.out_height; chunk += layout.chunk) {
    const int64_t end = std::min(chunk + layout.chunk, s.out_height);
    if (p.input != nullptr) copy_rows(p.input, s, layout, chunk, copy);
    for (int64_t row = chunk; row < end; row += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, end - row);
      for (int64_t x = 0; x < s.out_width; x += kLanes) {
        std::array<Vec, kRows> sums;
        sums.fill(Vec(p.bias));
        if (p.input != nullptr) {
          kMultiply[rows - 1](p.weight, layout.taps, copy + (row - chunk) * step + x, step,
                              sums.data());
        }
        const int64_t count = std::min(kLanes, s.out_width - x);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = (row + r) * s.out_width + x;
          Vec y = sums[r];
          if (p.residual != nullptr) y = y + load_f32(p.residual + at, count);
          store_f32(p.output + at, at::vec::clamp(y, Vec(p.low), Vec(p.high)), count);
        }
      }
    }
  }
}

template <typename T>
void run(const Problem& p, const at::Tensor& input, const at::Tensor& weight,
         const at::Tensor& output) {
  const ConvShape& s = p.shape;
  const Layout layout(s);
  const at::Tensor wide_weight = weight.to(at::kFloat);
  const at::Tensor wide_bias = p.bias ? p.bias->to(at::kFloat).contiguous() : at::Tensor();
  const at::Tensor dense_residual = p.residual ? p.residual->contiguous() : at::Tensor();
  const std::vector<int32_t> in_slot = p.in.slots(), out_slot = p.out.slots();
  const int64_t in_plane = s.height * s.width, out_plane = s.out_height * s.out_width;
  const int64_t in_channels = input.size(1), out_channels = p.output_channels();
  const int64_t multiplier = s.out_channels / s.groups;
  const int64_t taps = static_cast<int64_t>(layout.taps.size());
  const T* const in = input.const_data_ptr<T>();
  const float* const w = wide_weight.const_data_ptr<float>();
  const T* const residual = p.residual ? dense_residual.const_data_ptr<T>() : nullptr;
  const float* const bias = p.bias ? wide_bias.const_data_ptr<float>() : nullptr;
  T* const out = output.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, out_plane));

  at::parallel_for(0, s.batch * out_channels, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> copy(layout.size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / out_channels, place = i % out_channels;
      const int64_t slot = p.compact_output == 0    ? out_slot[i]
                           : place < p.out.count(n) ? place
                                                    : -1;
      if (slot < 0) {
        std::fill_n(out + i * out_plane, out_plane, T(0.f));
        continue;
      }
      const int64_t channel = p.out.channel(n, slot), source = channel / multiplier;
      const int64_t source_slot = in_slot[n * s.in_channels + source];
      const int64_t place_in = n * in_channels + (p.compact_input ? source_slot : source);
      const Plane<T> plane{
          source_slot < 0 ? nullptr : in + place_in * in_plane,
          residual ? residual + (n * s.out_channels + channel) * out_plane : nullptr,
          out + i * out_plane,
          w + channel * taps,
          bias ? bias[channel] : 0.f,
          p.low,
          p.high};
      run_plane(plane, s, layout, copy.data());
    }
  });
}

}  // namespace

at::Tensor gated_depthwise(const Problem& p, const at::Tensor& input, const at::Tensor& weight) {
  const at::Tensor output = at::empty(p.output_size(), input.options());
  dispatch(input.scalar_type(), [&](auto zero) { run<decltype(zero)>(p, input, weight, output); });
  return output;
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
