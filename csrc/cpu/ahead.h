// SPDX-License-Identifier: Apache-2.0
// Asking for what will be read, front to back, from memory.
#pragma once

#include <cstdint>

namespace cofire {
inline namespace CPU_CAPABILITY {

// Bytes from what is read to what the second-level cache is asked for, and to what the first one
// is. Asked for from memory, few lines at a time are on their way to the first one, which has
// nowhere to put more: a core read 16 GB/s so, where more than 20 were to be had in two stages.
constexpr int64_t kFarAhead = 12288, kNearAhead = 2048;

// The line that begins, or ends, so far behind p.
inline __attribute__((always_inline)) void ask_ahead_of(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + kFarAhead, 0, 2);
  __builtin_prefetch(static_cast<const char*>(p) + kNearAhead, 0, 3);
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
