// SPDX-License-Identifier: Apache-2.0
// Products of the library on pieces of memory, each by one thread: what a piece is multiplied to is
// still in the cache.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "loops.h"
#include "one_thread.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {

inline at::Tensor matrix(const float* data, int64_t rows, int64_t columns, int64_t stride) {
  return at::from_blob(const_cast<float*>(data), {rows, columns}, {stride, 1},
                       at::TensorOptions(at::kFloat));
}

// Rows in fp32: where they are, or converted.
struct Floats {
  at::Tensor owner;
  const float* data = nullptr;
  int64_t stride = 0;

  template <typename T>
  Floats(const T* p, int64_t rows, int64_t d, int64_t stride_) {
    if constexpr (std::is_same_v<T, float>) {
      data = p;
      stride = stride_;
    } else {
      owner = at::empty({rows, d}, at::kFloat);
      auto* to = owner.mutable_data_ptr<float>();
      data = to;
      stride = d;
      for (int64_t r = 0; r < rows; ++r) {
        for_vectors(d, [&](int64_t c, auto count) {
          store_f32(to + r * d + c, load(p + r * stride_ + c, count), count);
        });
      }
    }
  }
  at::Tensor matrix(int64_t first, int64_t count, int64_t d) const {
    return kv_fusion::matrix(data + first * stride, count, d, stride);
  }
};

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire
