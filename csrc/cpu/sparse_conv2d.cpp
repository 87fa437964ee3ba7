// SPDX-License-Identifier: Apache-2.0
// Convolution with a weight stored by rows. Of a padded image, cut into one plane per phase of the
// stride, every tap of the kernel reads the same positions, only shifted: an entry of the weight is
// a broadcast and a multiplication with consecutive floats, as in a product with tokens side by
// side. The positions run through the rows of a plane, its margins included; what comes out there
// is dropped.
#include <ATen/TensorOperators.h>
#include <ATen/ops/diff.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/repeat_interleave.h>

#include <algorithm>
#include <vector>

#include "pages.h"
#include "sparse_rows.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace sparse {

namespace {

constexpr int64_t kRows = 64;

struct Geometry {
  int64_t channels, height, width;  // of the input
  int64_t kernel[2], stride[2], padding[2], dilation[2], groups;
  int64_t out_height, out_width;
  int64_t plane_height, plane_width, phases;  // of the planes that are read

  int64_t plane() const { return plane_height * plane_width; }
  int64_t positions() const { return (out_height - 1) * plane_width + out_width; }

  // Where a column of the weight (channel of its group, then kernel row, then column) begins.
  int64_t start(int64_t column) const {
    const int64_t taps = kernel[0] * kernel[1], channel = column / taps, tap = column % taps;
    const int64_t y = tap / kernel[1] * dilation[0], x = tap % kernel[1] * dilation[1];
    const int64_t phase = y % stride[0] * stride[1] + x % stride[1];
    return (channel * phases + phase) * plane() + y / stride[0] * plane_width + x / stride[1];
  }
};

template <typename T>
void fill_planes(const T* image, const Geometry& g, float* planes) {
  for (int64_t c = 0; c < g.channels; ++c) {
    for (int64_t phase = 0; phase < g.phases; ++phase) {
      const int64_t dy = phase / g.stride[1], dx = phase % g.stride[1];
      float* to = planes + (c * g.phases + phase) * g.plane();
      for (int64_t y = 0; y < g.plane_height; ++y, to += g.plane_width) {
        const int64_t row = y * g.stride[0] + dy - g.padding[0];
        if (row < 0 || row >= g.height) {
          std::fill(to, to + g.plane_width, 0.0f);
          continue;
        }
        const T* from = image + (c * g.height + row) * g.width;
        for (int64_t x = 0; x < g.plane_width; ++x) {
          const int64_t column = x * g.stride[1] + dx - g.padding[1];
          to[x] = column >= 0 && column < g.width ? static_cast<float>(from[column]) : 0.0f;
        }
      }
    }
  }
}

// Of the sums at `count` positions from `start` on, those of pixels.
template <typename T>
void drop_margins(const float* sums, int64_t start, int64_t count, const Geometry& g, float offset,
                  T* out) {
  for (int64_t row = start / g.plane_width; row < g.out_height; ++row) {
    const int64_t at = row * g.plane_width - start;
    if (at >= count) break;
    const int64_t high = std::min(g.out_width, count - at);
    for (int64_t i = std::max<int64_t>(0, -at); i < high; ++i) {
      out[row * g.out_width + i] = static_cast<T>(sums[at + i] + offset);
    }
  }
}

// In fp32, whatever the input and the stored values are: the loops need not be there for each type.
template <typename Index>
void convolve(const at::Tensor& x, const at::Tensor& y, const Index* index, const float* values,
              const Weight& w, const Geometry& g, const float* bias) {
  const int64_t images = x.size(0), all = g.channels * g.phases * g.plane();
  constexpr int64_t block = kMostVectors * kLanes;
  // The last block of positions reads on behind the last plane.
  const at::Tensor scratch =
      empty_in_large_pages({images * all + block}, x.options().dtype(at::kFloat));
  auto* planes = scratch.mutable_data_ptr<float>();
  std::fill(planes + images * all, planes + images * all + block, 0.0f);
  dispatch(x.scalar_type(), [&](auto example) {
    using T = decltype(example);
    const T* from = x.const_data_ptr<T>();
    at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        fill_planes(from + i * g.channels * g.height * g.width, g, planes + i * all);
      }
    });
  });
  std::vector<int64_t> start(w.columns);
  for (int64_t k = 0; k < w.columns; ++k) start[k] = g.start(k);
  const int64_t* starts = w.starts();
  const int64_t of_group = w.rows / g.groups, chunks = (of_group + kRows - 1) / kRows;
  const int64_t area = g.out_height * g.out_width, blocks = (g.positions() + block - 1) / block;
  const int64_t channels_of_group = g.channels / g.groups * g.phases * g.plane();
  at::parallel_for(0, images * g.groups * chunks * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(kRows * block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task % blocks, chunk = task / blocks % chunks;
      const int64_t group = task / blocks / chunks % g.groups;
      const int64_t image = task / blocks / chunks / g.groups;
      const int64_t first = group * of_group + chunk * kRows;
      const int64_t rows = std::min(kRows, of_group - chunk * kRows);
      const int64_t count = std::min(block, g.positions() - b * block);
      const float* base = planes + image * all + group * channels_of_group + b * block;
      std::fill(sums.begin(), sums.begin() + rows * block, 0.0f);
      const auto vectors = (count + kLanes - 1) / kLanes;
      with_vectors(vectors <= 1   ? 1
                   : vectors <= 2 ? 2
                   : vectors <= 4 ? 4
                                  : kMostVectors,
                   [&](auto v) {
                     constexpr int V = decltype(v)::value;
                     for (int64_t r = 0; r < rows; ++r) {
                       add_entries<V>(
                           index, values, starts[first + r], starts[first + r + 1], int64_t{0},
                           [&](int64_t k) { return base + start[k]; }, sums.data() + r * block);
                     }
                   });
      dispatch(y.scalar_type(), [&](auto example) {
        using T = decltype(example);
        T* to = y.mutable_data_ptr<T>() + image * w.rows * area;
        for (int64_t r = 0; r < rows; ++r) {
          const float offset = bias == nullptr ? 0.0f : bias[first + r];
          drop_margins(sums.data() + r * block, b * block, count, g, offset,
                       to + (first + r) * area);
        }
      });
    }
  });
}

}  // namespace

at::Tensor sparse_conv2d(const at::Tensor& input, const MaybeTensor& bias, const at::Tensor& values,
                         const at::Tensor& index, const at::Tensor& offsets,
                         const MaybeTensor& scale, c10::string_view format, int64_t rows,
                         int64_t columns, int64_t block_rows, int64_t block_columns,
                         at::IntArrayRef kernel_size, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const bool kernel = (format == "csr" || format == "delta") && covered(input) &&
                      input.numel() > 0 && rows > 0 &&
                      (covered(values) || values.scalar_type() == at::kChar);
  if (!kernel) {
    return reference("cofire::sparse_conv2d", &sparse_conv2d, input, bias, values, index, offsets,
                     scale, format, rows, columns, block_rows, block_columns, kernel_size, stride,
                     padding, dilation, groups);
  }
  const Weight w =
      weight_of(values, index, offsets, scale, format, rows, columns, block_rows, block_columns);
  Geometry g;
  g.channels = input.size(1);
  g.height = input.size(2);
  g.width = input.size(3);
  g.groups = groups;
  g.phases = stride[0] * stride[1];
  int64_t out[2];
  for (int d = 0; d < 2; ++d) {
    g.kernel[d] = kernel_size[d];
    g.stride[d] = stride[d];
    g.padding[d] = padding[d];
    g.dilation[d] = dilation[d];
    out[d] =
        (input.size(2 + d) + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1) / stride[d] +
        1;
  }
  TORCH_CHECK(
      out[0] > 0 && out[1] > 0 && columns == g.channels / groups * g.kernel[0] * g.kernel[1],
      "sparse_conv2d: the weight does not fit the input");
  g.out_height = out[0];
  g.out_width = out[1];
  g.plane_height = (g.height + 2 * padding[0] + stride[0] - 1) / stride[0];
  g.plane_width = (g.width + 2 * padding[1] + stride[1] - 1) / stride[1];
  const at::Tensor x = input.contiguous();
  const at::Tensor b = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor y = at::empty({x.size(0), rows, out[0], out[1]}, x.options());
  at::Tensor v = w.values.to(at::kFloat);
  if (w.scales() != nullptr) {
    v = v * at::repeat_interleave(w.scale, w.offsets.diff());
  }
  with_index(w, [&](auto* i) {
    convolve(x, y, i, v.const_data_ptr<float>(), w, g,
             b.defined() ? b.const_data_ptr<float>() : nullptr);
  });
  return y;
}

}  // namespace sparse
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) { m.impl("sparse_conv2d", &cofire::sparse::sparse_conv2d); }
