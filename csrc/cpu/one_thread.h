// SPDX-License-Identifier: Apache-2.0
// Calls of the library, each by one thread: one call by all threads gives other bits for other
// numbers of threads.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>

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

}  // namespace CPU_CAPABILITY
}  // namespace cofire
