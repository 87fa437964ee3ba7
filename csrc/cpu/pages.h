// SPDX-License-Identifier: Apache-2.0
// Large outputs in large pages.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "large_pages.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

// Uninitialised and contiguous, for a kernel that writes all of it.
inline at::Tensor empty_in_large_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor t = at::empty(sizes, options);
  ask_for_large_pages(t.mutable_data_ptr(), t.nbytes());
  return t;
}

// Memory of torch's, which begins with a line of the cache and is counted as its other tensors are.
template <typename T>
class Room {
 public:
  Room() = default;
  explicit Room(int64_t count)
      : owner_(empty_in_large_pages({count * static_cast<int64_t>(sizeof(T))},
                                    at::TensorOptions(at::kByte))),
        data_(reinterpret_cast<T*>(owner_.mutable_data_ptr<uint8_t>())) {}
  T* at(int64_t i) const { return data_ + i; }
  T* data() const { return data_; }

 private:
  at::Tensor owner_;
  T* data_ = nullptr;
};

}  // namespace CPU_CAPABILITY
}  // namespace cofire
