// SPDX-License-Identifier: Apache-2.0
// Loops over vectors of fp32 lanes, whose last round may be a part of a vector.
#pragma once

#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

// Calls step(i, count) for each vector of [0, size), the last one with fewer lanes.
template <typename F>
inline void for_vectors(int64_t size, F&& step) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) step(i, std::integral_constant<int64_t, kLanes>{});
  if (i < size) step(i, size - i);
}

template <typename T>
inline Vec load(const T* p, std::integral_constant<int64_t, kLanes>) {
  return load_f32(p);
}
template <typename T>
inline Vec load(const T* p, int64_t count) {
  return load_f32(p, count);
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
