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

}  // namespace CPU_CAPABILITY
}  // namespace cofire
