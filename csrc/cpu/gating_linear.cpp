// SPDX-License-Identifier: Apache-2.0
// Linear layer that reads only the weights a gate kept. At small batches the
// time is the weight's bytes, so what can be skipped follows from its storage:
// of a row-major weight the rows of outputs that are off, of a column-major one
// (a transposed view) the columns of inputs that are off.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "gating_selection.h"
#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace {

struct LinearProblem {
  Selection in, out;
  int64_t batch;
  std::optional<at::Tensor> bias;
  float low, high;  // the activation is a clamp
};

// The input as fp32 with zeros where it is off.
template <typename T>
std::vector<float> masked_input(const LinearProblem& p, const T* input) {
  const int64_t size = p.in.channels();
  std::vector<float> masked(p.batch * size, 0.f);
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t j = 0; j < p.in.count(n); ++j) {
      const int64_t i = n * size + p.in.channel(n, j);
      masked[i] = static_cast<float>(input[i]);
    }
  }
  return masked;
}

// Dot products of one input row with `Rows` weight rows: that many streams from
// memory at a time, two sums each.
template <typename T, int Rows>
void dot_rows(const float* x, const T* const* weight, int64_t size, float* sums) {
  Vec acc[Rows][2];
  COFIRE_UNROLL for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = Vec(0.f);
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    COFIRE_UNROLL for (int v = 0; v < 2; ++v) {
      const Vec in = Vec::loadu(x + i + v * kLanes);
      COFIRE_UNROLL for (int r = 0; r < Rows; ++r) {
        acc[r][v] = at::vec::fmadd(in, load_f32(weight[r] + i + v * kLanes), acc[r][v]);
      }
    }
  }
  for (; i < size; i += kLanes) {
    const int64_t n = std::min(kLanes, size - i);
    const Vec in = Vec::loadu(x + i, n);
    COFIRE_UNROLL for (int r = 0; r < Rows; ++r) {
      acc[r][0] = at::vec::fmadd(in, load_f32(weight[r] + i, n), acc[r][0]);
    }
  }
  COFIRE_UNROLL for (int r = 0; r < Rows; ++r) { sums[r] = reduce_add(acc[r][0] + acc[r][1]); }
}

constexpr int kStreams = 4;

// Row-major weights. A task is a block of output features, in which all samples
// find their active rows, so that a block comes from memory once.
template <typename T>
void run_rows(const LinearProblem& p, const float* x, const T* weight, int64_t stride,
              const float* bias, T* y) {
  constexpr int64_t kBlock = 32;
  const int64_t in = p.in.channels(), out = p.out.channels();
  const int64_t blocks = (out + kBlock - 1) / kBlock;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    // The next slot of every sample: slots ascend with the blocks.
    std::vector<int64_t> next(p.batch);
    for (int64_t n = 0; n < p.batch; ++n) next[n] = p.out.first_slot(n, begin * kBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(out, (block + 1) * kBlock);
      for (int64_t n = 0; n < p.batch; ++n) {
        T* const to = y + n * out;
        std::fill(to + block * kBlock, to + last, T(0.f));
        int64_t& slot = next[n];
        while (slot < p.out.count(n) && p.out.channel(n, slot) < last) {
          // Missing rows of the last tile repeat its first one.
          int64_t feature[kStreams];
          const T* row[kStreams];
          int64_t rows = 0;
          for (; rows < kStreams && slot < p.out.count(n) && p.out.channel(n, slot) < last;
               ++rows, ++slot) {
            feature[rows] = p.out.channel(n, slot);
            row[rows] = weight + feature[rows] * stride;
          }
          float sums[kStreams];
          if (rows == kStreams) {
            dot_rows<T, kStreams>(x + n * in, row, in, sums);
          } else {
            for (int64_t r = 0; r < rows; ++r) dot_rows<T, 1>(x + n * in, row + r, in, sums + r);
          }
          for (int64_t r = 0; r < rows; ++r) {
            const float v = sums[r] + (bias ? bias[feature[r]] : 0.f);
            to[feature[r]] = static_cast<T>(std::clamp(v, p.low, p.high));
          }
        }
      }
    }
  });
}

// Column-major weights. A task is a strip of output features; the active columns
// are added to it a few at a time, in blocks of inputs that all samples share.
template <typename T>
void run_columns(const LinearProblem& p, const float* x, const T* weight, int64_t stride,
                 const float* bias, T* y) {
  constexpr int64_t kStrip = 512, kBlock = 128;
  const int64_t in = p.in.channels(), out = p.out.channels();
  const int64_t strips = (out + kStrip - 1) / kStrip;
  at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(p.batch * kStrip);
    std::vector<int64_t> next(p.batch);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kStrip, width = std::min(kStrip, out - first);
      std::fill(sums.begin(), sums.end(), 0.f);
      std::fill(next.begin(), next.end(), 0);
      for (int64_t block = 0; block < in; block += kBlock) {
        for (int64_t n = 0; n < p.batch; ++n) {
          // A block is summed by itself: shorter chains, smaller rounding errors.
          float acc[kStrip] = {};
          int64_t& slot = next[n];
          while (slot < p.in.count(n) && p.in.channel(n, slot) < block + kBlock) {
            // Missing columns of the last few repeat the first, times zero.
            Vec scale[kStreams];
            const T* column[kStreams];
            for (int c = 0; c < kStreams; ++c) {
              const bool found = slot < p.in.count(n) && p.in.channel(n, slot) < block + kBlock;
              if (found) {
                const int64_t i = p.in.channel(n, slot++);
                scale[c] = Vec(x[n * in + i]);
                column[c] = weight + i * stride + first;
              } else {
                scale[c] = Vec(0.f);
                column[c] = column[0];
              }
            }
            for (int64_t o = 0; o < width; o += kLanes) {
              const int64_t lanes = std::min(kLanes, width - o);
              Vec v = Vec::loadu(acc + o);
              COFIRE_UNROLL for (int c = 0; c < kStreams; ++c) {
                v = at::vec::fmadd(scale[c], load_f32(column[c] + o, lanes), v);
              }
              v.store(acc + o);
            }
          }
          for (int64_t o = 0; o < kStrip; ++o) sums[n * kStrip + o] += acc[o];
        }
      }
      for (int64_t n = 0; n < p.batch; ++n) {
        T* const to = y + n * out;
        std::fill_n(to + first, width, T(0.f));
        for (int64_t slot = p.out.first_slot(n, first);
             slot < p.out.count(n) && p.out.channel(n, slot) < first + width; ++slot) {
          const int64_t o = p.out.channel(n, slot);
          const float v = sums[n * kStrip + o - first] + (bias ? bias[o] : 0.f);
          to[o] = static_cast<T>(std::clamp(v, p.low, p.high));
        }
      }
    }
  });
}

// The library's product on the masked input, then activation and mask.
template <typename T>
at::Tensor dense_linear(const LinearProblem& p, const at::Tensor& input, const at::Tensor& weight) {
  const int64_t in = p.in.channels(), out = p.out.channels();
  at::Tensor x = input;
  if (p.in.total() < p.batch * in) {
    x = at::zeros(input.sizes(), input.options());
    const T* from = input.const_data_ptr<T>();
    T* to = x.mutable_data_ptr<T>();
    for (int64_t n = 0; n < p.batch; ++n) {
      for (int64_t j = 0; j < p.in.count(n); ++j) {
        const int64_t i = n * in + p.in.channel(n, j);
        to[i] = from[i];
      }
    }
  }
  const at::Tensor y = at::linear(x, weight, p.bias);
  const std::vector<int32_t> slots = p.out.slots();
  T* const data = y.mutable_data_ptr<T>();
  at::parallel_for(0, p.batch, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, out)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin * out; i < end * out; ++i) {
                       const float v = static_cast<float>(data[i]);
                       data[i] = static_cast<T>(slots[i] < 0 ? 0.f : std::clamp(v, p.low, p.high));
                     }
                   });
  return y;
}

bool column_major(const at::Tensor& weight) {
  return weight.stride(0) == 1 && weight.stride(1) != 1;
}

// The cost of the gated kernel, as a share of the library's, and the largest at which it is chosen.
std::pair<double, double> cost_and_limit(const LinearProblem& p, const at::Tensor& weight) {
  const bool columns = column_major(weight);
  const Selection& kept = columns ? p.in : p.out;
  const double size = static_cast<double>(std::max<int64_t>(1, kept.channels()));
  const bool tiles = weight.scalar_type() != at::kFloat && has_amx();
  const double cost = gated_linear_cost(static_cast<double>(kept.total()) / size,
                                        static_cast<double>(kept.touched()) / size, tiles);
  return {cost / dense_linear_cost(p.batch, columns, tiles),
          p.batch <= kLinearSamples ? kLinearMargin : 0.0};
}

template <typename T>
at::Tensor run(const LinearProblem& p, const at::Tensor& input, const at::Tensor& any_weight) {
  const auto [cost, limit] = cost_and_limit(p, any_weight);
  if (cost > limit) return dense_linear<T>(p, input, any_weight);
  const bool columns = column_major(any_weight);
  const at::Tensor weight =
      columns || any_weight.stride(1) == 1 ? any_weight : any_weight.contiguous();
  const at::Tensor wide_bias = p.bias ? p.bias->to(at::kFloat).contiguous() : at::Tensor();
  const float* const bias = p.bias ? wide_bias.const_data_ptr<float>() : nullptr;
  const at::Tensor y = at::empty({p.batch, p.out.channels()}, input.options());
  const std::vector<float> x = masked_input(p, input.const_data_ptr<T>());
  const T* const w = weight.const_data_ptr<T>();
  T* const to = y.mutable_data_ptr<T>();
  if (columns) {
    run_columns(p, x.data(), w, weight.stride(1), bias, to);
  } else {
    run_rows(p, x.data(), w, weight.stride(0), bias, to);
  }
  return y;
}

LinearProblem make_problem(const at::Tensor& input, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const at::Tensor& in_index,
                           const at::Tensor& in_count, const at::Tensor& out_index,
                           const at::Tensor& out_count, c10::string_view activation) {
  const auto type = input.scalar_type();
  TORCH_CHECK(input.dim() == 2 && weight.dim() == 2 && input.size(1) == weight.size(1) &&
                  weight.scalar_type() == type,
              "input, weight: expected [batch, in_features] and [out_features, in_features] of one "
              "type, got ",
              type, " ", input.sizes(), " and ", weight.scalar_type(), " ", weight.sizes());
  TORCH_CHECK(!bias || bias->numel() == weight.size(0), "bias: expected ", weight.size(0),
              " values, got ", bias ? bias->numel() : 0);
  const auto [low, high] = activation_range(activation);
  return {Selection("gated_linear", "in", in_index, in_count, input.size(0), weight.size(1)),
          Selection("gated_linear", "out", out_index, out_count, input.size(0), weight.size(0)),
          input.size(0),
          bias,
          low,
          high};
}

}  // namespace

at::Tensor gated_linear(const at::Tensor& input, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, const at::Tensor& in_index,
                        const at::Tensor& in_count, const at::Tensor& out_index,
                        const at::Tensor& out_count, c10::string_view activation) {
  if (!covered(input)) {
    return reference("cofire::gated_linear", &gated_linear, input, weight, bias, in_index, in_count,
                     out_index, out_count, activation);
  }
  const LinearProblem problem =
      make_problem(input, weight, bias, in_index, in_count, out_index, out_count, activation);
  const at::Tensor x = input.contiguous();
  return dispatch(input.scalar_type(),
                  [&](auto zero) { return run<decltype(zero)>(problem, x, weight); });
}

// What gated_linear would do with these arguments, and why.
std::string plan_gated_linear(const at::Tensor& input, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias, const at::Tensor& in_index,
                              const at::Tensor& in_count, const at::Tensor& out_index,
                              const at::Tensor& out_count, c10::string_view activation) {
  const LinearProblem problem =
      make_problem(input, weight, bias, in_index, in_count, out_index, out_count, activation);
  const auto [cost, limit] = cost_and_limit(problem, weight);
  return plan(cost, limit, "dense layer's time", "computes the active outputs",
              "library GEMM, then mask");
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) { m.impl("gated_linear", &cofire::gated_linear); }
TORCH_LIBRARY_FRAGMENT(cofire_plan, m) { m.def("gated_linear", &cofire::plan_gated_linear); }
