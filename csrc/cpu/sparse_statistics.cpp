// SPDX-License-Identifier: Apache-2.0
// Statistics of activations by feature and of groups of weights, each in one pass over memory.
// Pieces of fixed size, merged in order: the same for every number of threads.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <vector>

#include "loops.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace sparse_statistics {
namespace {

constexpr int64_t kRows = 128;  // of a piece: its values stay in a cache and are read twice there
constexpr int64_t kColumns = 256;  // and its columns
constexpr int64_t kLong = 128;     // columns of a group that is summed up by itself, ...
constexpr int64_t kShort = 4;      // ... and rows of one for which a vector is enough

// Mean, squared deviations from it and largest magnitude of each column of a piece.
template <typename T>
void piece(const T* x, int64_t stride, int64_t rows, int64_t columns, float* mean, float* deviation,
           float* largest) {
  std::fill_n(mean, columns, 0.0f);
  std::fill_n(deviation, columns, 0.0f);
  std::fill_n(largest, columns, 0.0f);
  const auto each_row = [&](auto&& f) {
    for (int64_t r = 0; r < rows; ++r) {
      for_vectors(columns,
                  [&](int64_t i, auto rest) { f(load(x + r * stride + i, rest), i, rest); });
    }
  };
  each_row([&](const Vec& v, int64_t i, auto rest) {
    store_f32(mean + i, load(mean + i, rest) + v, rest);
    store_f32(largest + i, at::vec::maximum(load(largest + i, rest), v.abs()), rest);
  });
  const Vec count(static_cast<float>(rows));
  for_vectors(columns, [&](int64_t i, auto rest) {
    store_f32(mean + i, load(mean + i, rest) / count, rest);
  });
  each_row([&](const Vec& v, int64_t i, auto rest) {
    const Vec apart = v - load(mean + i, rest);
    store_f32(deviation + i, at::vec::fmadd(apart, apart, load(deviation + i, rest)), rest);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> activations(const at::Tensor& input) {
  if (!covered(input)) return reference("cofire::activation_statistics", &activations, input);
  const at::Tensor x = input.contiguous();
  const int64_t columns = x.size(-1), rows = columns == 0 ? 0 : x.numel() / columns;
  const auto options = x.options().dtype(at::kFloat);
  std::array<at::Tensor, 3> found;
  for (auto& f : found) f = at::empty({columns}, options);
  if (rows == 0) {
    for (auto& f : found) f.zero_();
    return {found[0], found[1], found[2]};
  }
  const int64_t pieces = (rows + kRows - 1) / kRows, blocks = (columns + kColumns - 1) / kColumns;
  std::vector<float> parts(3 * pieces * columns);
  const auto part = [&](int which, int64_t p) {
    return parts.data() + (which * pieces + p) * columns;
  };
  dispatch(x.scalar_type(), [&](auto type) {
    const auto* from = x.const_data_ptr<decltype(type)>();
    at::parallel_for(0, pieces * blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t p = task / blocks, c = task % blocks * kColumns;
        piece(from + p * kRows * columns + c, columns, std::min(kRows, rows - p * kRows),
              std::min(kColumns, columns - c), part(0, p) + c, part(1, p) + c, part(2, p) + c);
      }
    });
  });
  float* to[3];
  for (int i = 0; i < 3; ++i) to[i] = found[i].mutable_data_ptr<float>();
  at::parallel_for(0, columns, grain_of(4 * pieces), [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      double mean = part(0, 0)[c], deviation = part(1, 0)[c];
      float largest = part(2, 0)[c];
      for (int64_t p = 1; p < pieces; ++p) {
        const auto before = static_cast<double>(p * kRows);
        const auto count = static_cast<double>(std::min(kRows, rows - p * kRows));
        const double delta = part(0, p)[c] - mean, share = count / (before + count);
        mean += delta * share;
        deviation += part(1, p)[c] + delta * delta * before * share;
        const float now = part(2, p)[c];
        largest = now > largest || now != now ? now : largest;
      }
      to[0][c] = static_cast<float>(mean);
      to[1][c] = static_cast<float>(deviation);
      to[2][c] = largest;
    }
  });
  return {found[0], found[1], found[2]};
}

// In eight parts, so that the additions need not wait for each other.
inline float sum(const double* x, int64_t count) {
  double parts[8] = {}, total = 0;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) parts[j] += x[i + j];
  }
  for (; i < count; ++i) total += x[i];
  for (const double part : parts) total += part;
  return static_cast<float>(total);
}

// The three sums over a group whose rows are long: pieces of them in registers, then in fp64.
template <typename T>
std::array<double, 3> long_group(const T* w, const T* g, int64_t stride, int64_t rows,
                                 int64_t columns) {
  constexpr int64_t kPiece = 32 * kLanes;
  std::array<double, 3> total{};
  for (int64_t r = 0; r < rows; ++r, w += stride, g += stride) {
    for (int64_t c = 0; c < columns; c += kPiece) {
      Vec ww[2] = {Vec(0.0f), Vec(0.0f)}, gg[2] = {ww[0], ww[0]}, wg[2] = {ww[0], ww[0]};
      const int64_t end = std::min(columns, c + kPiece);
      int64_t i = c;
      const auto add = [&](int64_t at, int which, auto rest) {
        const Vec a = load(w + at, rest), b = load(g + at, rest);
        ww[which] = at::vec::fmadd(a, a, ww[which]);
        gg[which] = at::vec::fmadd(b, b, gg[which]);
        wg[which] = at::vec::fmadd(a, b, wg[which]);
      };
      constexpr std::integral_constant<int64_t, kLanes> whole;
      for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
        COFIRE_UNROLL for (int v = 0; v < 2; ++v) add(i + v * kLanes, v, whole);
      }
      for (; i < end; i += kLanes) add(i, 0, std::min(kLanes, end - i));
      total[0] += static_cast<double>(reduce_add(ww[0] + ww[1]));
      total[1] += static_cast<double>(reduce_add(gg[0] + gg[1]));
      total[2] += static_cast<double>(reduce_add(wg[0] + wg[1]));
    }
  }
  return total;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> groups(const at::Tensor& weight,
                                                      const at::Tensor& grad, int64_t block_rows,
                                                      int64_t block_columns) {
  if (!covered(weight)) {
    return reference("cofire::group_statistics", &groups, weight, grad, block_rows, block_columns);
  }
  TORCH_CHECK(weight.dim() == 2 && grad.sizes() == weight.sizes() &&
                  grad.scalar_type() == weight.scalar_type() && block_rows > 0 &&
                  block_columns > 0 && weight.size(0) % block_rows == 0 &&
                  weight.size(1) % block_columns == 0,
              "group_statistics: weight, grad or block");
  const at::Tensor w = weight.contiguous(), g = grad.contiguous();
  const int64_t columns = w.size(1), down = w.size(0) / block_rows,
                across = columns / block_columns;
  std::array<at::Tensor, 3> found;
  float* to[3];
  for (int i = 0; i < 3; ++i) {
    found[i] = at::empty({down, across}, w.options().dtype(at::kFloat));
    to[i] = found[i].mutable_data_ptr<float>();
  }
  if (w.numel() == 0) return {found[0], found[1], found[2]};
  // columns that one thread takes: whole groups
  const int64_t width = block_columns * std::max<int64_t>(1, 1024 / block_columns);
  const int64_t blocks = (columns + width - 1) / width;
  dispatch(w.scalar_type(), [&](auto type) {
    const auto* ws = w.const_data_ptr<decltype(type)>();
    const auto* gs = g.const_data_ptr<decltype(type)>();
    if (block_columns >= (block_rows < kShort ? kLanes : kLong)) {
      at::parallel_for(
          0, down * across, grain_of(block_rows * block_columns), [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
              const int64_t at = i / across * block_rows * columns + i % across * block_columns;
              const auto sums = long_group(ws + at, gs + at, columns, block_rows, block_columns);
              for (int j = 0; j < 3; ++j) to[j][i] = static_cast<float>(sums[j]);
            }
          });
      return;
    }
    at::parallel_for(
        0, down * blocks, grain_of(width * block_rows), [&](int64_t first, int64_t last) {
          std::vector<float> sums(3 * width);
          std::vector<double> totals(3 * width);
          for (int64_t task = first; task < last; ++task) {
            const int64_t row = task / blocks * block_rows, c = task % blocks * width;
            const int64_t size = std::min(width, columns - c);
            std::fill(totals.begin(), totals.end(), 0.0);
            for (int64_t r = 0; r < block_rows; r += kRows) {
              std::fill(sums.begin(), sums.end(), 0.0f);
              float *ww = sums.data(), *gg = ww + width, *wg = gg + width;
              for (int64_t i = r; i < std::min(r + kRows, block_rows); ++i) {
                const int64_t at_ = (row + i) * columns + c;
                for_vectors(size, [&](int64_t j, auto rest) {
                  const Vec a = load(ws + at_ + j, rest), b = load(gs + at_ + j, rest);
                  store_f32(ww + j, at::vec::fmadd(a, a, load(ww + j, rest)), rest);
                  store_f32(gg + j, at::vec::fmadd(b, b, load(gg + j, rest)), rest);
                  store_f32(wg + j, at::vec::fmadd(a, b, load(wg + j, rest)), rest);
                });
              }
              for (int64_t j = 0; j < 3 * width; ++j) totals[j] += static_cast<double>(sums[j]);
            }
            for (int64_t j = 0; j < size; j += block_columns) {
              const int64_t group = task / blocks * across + (c + j) / block_columns;
              for (int which = 0; which < 3; ++which) {
                to[which][group] = sum(totals.data() + which * width + j, block_columns);
              }
            }
          }
        });
  });
  return {found[0], found[1], found[2]};
}

}  // namespace
}  // namespace sparse_statistics
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("activation_statistics", &cofire::sparse_statistics::activations);
  m.impl("group_statistics", &cofire::sparse_statistics::groups);
}
