// SPDX-License-Identifier: Apache-2.0
// Calls of the library, each by one thread: one call by all threads gives other bits for other
// numbers of threads.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "parts.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

// f(task) by threads, each within a parallel region: the library then takes no threads of its own.
template <typename F>
void each_by_one_thread(int64_t tasks, F&& f) {
  in_turns(std::max<int64_t>(tasks, 2), [&](int64_t i) {
    if (i >= tasks) return;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // of this thread
    f(i);
  });
}

// out = a b, or out += a b, by the library. A long sum is taken in pieces: the library would cut it
// itself, on some CPUs otherwise for one thread than within a region of several.
inline void library_product(at::Tensor out, const at::Tensor& a, const at::Tensor& b,
                            bool add = false) {
  constexpr int64_t kLongest = 512;
  const int64_t depth = a.size(1);
  for (int64_t k = 0; k < std::max<int64_t>(depth, 1); k += kLongest) {
    const int64_t count = std::min(kLongest, depth - k);
    const bool whole = count == depth;
    const at::Tensor left = whole ? a : a.narrow(1, k, count);
    const at::Tensor right = whole ? b : b.narrow(0, k, count);
    add || k > 0 ? at::addmm_out(out, out, left, right) : at::mm_out(out, left, right);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
