// SPDX-License-Identifier: Apache-2.0
// What the kernels of compressed weights share: the weight as the operators take it, and the input
// with its rows (the "tokens") side by side.
#pragma once

#include <ATen/ops/empty.h>

#include <string>
#include <vector>

#include "lanes16.h"
#include "parts.h"
#include "tag.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace sparse {

// Vectors of tokens that an inner loop takes at once: 64 tokens.
constexpr int kMostVectors = kLanes == 16 ? 4 : 8;

// A compressed weight: see cofire.ops.SparseWeight for the formats.
struct Weight {
  at::Tensor values, index, offsets, scale;  // contiguous; scale in fp32, or undefined
  std::string format;
  int64_t rows, columns, block_rows, block_columns;

  const int64_t* starts() const { return offsets.const_data_ptr<int64_t>(); }
  const float* scales() const { return scale.defined() ? scale.const_data_ptr<float>() : nullptr; }
};

// [..., K] as [M, K], also where K is 0.
inline at::Tensor rows_of(const at::Tensor& x) {
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) count *= x.size(d);
  return x.reshape({count, x.size(-1)});
}

Weight weight_of(const at::Tensor& values, const at::Tensor& index, const at::Tensor& offsets,
                 const MaybeTensor& scale, c10::string_view format, int64_t rows, int64_t columns,
                 int64_t block_rows, int64_t block_columns);

// Some tokens: column k holds `vectors * kLanes` floats, one of each token, zeros beyond the last.
struct Block {
  int64_t first, count;  // tokens
  int vectors;
  int64_t start;  // in floats

  int64_t width() const { return vectors * kLanes; }
};

struct Tokens {
  at::Tensor data;
  int64_t count, columns;
  std::vector<Block> blocks;

  const float* of(const Block& b) const { return data.const_data_ptr<float>() + b.start; }
};

// [M, K], any covered dtype.
Tokens side_by_side(const at::Tensor& x);

// Where results go: y[m, n] = sum * scale[n] + bias[n], in y's dtype.
struct Sink {
  at::Tensor y;           // [M, N]
  const float* scale;     // or null
  const at::Tensor bias;  // fp32, or undefined
  int64_t rows;           // N

  // c[r * stride + t] for the rows of the weight [n, n + rows) and the tokens [m, m + tokens).
  void operator()(const float* c, int64_t stride, int64_t n, int64_t rows, int64_t m,
                  int64_t tokens) const;
};

// csr and delta.
void multiply_rows(const at::Tensor& x, const Weight& w, const Sink& sink);
void multiply_rows(const Tokens& tokens, const Weight& w, const Sink& sink);
at::Tensor sampled_rows(const Tokens& grads, const Tokens& tokens, const Weight& w);
// bitmap and block.
void multiply_panels(const at::Tensor& x, const Weight& w, const Sink& sink);
at::Tensor sampled_blocks(const at::Tensor& grad, const at::Tensor& x, const Weight& w);
at::Tensor input_gradient_of_blocks(const at::Tensor& grad, const Weight& w);

// Calls f(begin, end) for consecutive parts of `count` items whose work is `work(i)`, the sum of
// that of the items before i: parts of about the same work, each at least `least`.
template <typename Work, typename F>
void in_equal_parts(int64_t count, int64_t least, Work&& work, F&& f) {
  const int64_t total = work(count);
  const int64_t parts = number_of_parts(std::min(count, total / std::max<int64_t>(least, 1)));
  const auto bound = [&](int64_t part) {
    if (part == parts) return count;
    int64_t low = 0, high = count;  // the first item at or behind this share of the work
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work(middle) * parts < total * part) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  in_runs(parts, [&](int64_t part) {
    const int64_t from = bound(part), to = bound(part + 1);
    if (from < to) f(from, to);
  });
}

// Calls f with a constant: the number of vectors of a block of tokens.
template <typename F>
auto with_vectors(int vectors, F&& f) {
  switch (vectors) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, kMostVectors>{});
  }
}

// Calls f with the index of a weight that is stored by rows.
template <typename F>
void with_index(const Weight& w, F&& f) {
  const void* p = w.index.const_data_ptr();
  if (w.format == "delta") {
    f(static_cast<const uint8_t*>(p));
  } else if (w.index.scalar_type() == at::kInt) {
    f(static_cast<const int32_t*>(p));
  } else {
    f(static_cast<const uint16_t*>(p));
  }
}

// Calls f(T{}) with the type of stored values: float, bfloat16, half or int8.
template <typename F>
auto with_values(at::ScalarType dtype, F&& f) {
  if (dtype == at::kChar) return f(int8_t{});
  return dispatch(dtype, std::forward<F>(f));
}

}  // namespace sparse
}  // namespace CPU_CAPABILITY
}  // namespace cofire
