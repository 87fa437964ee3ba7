// SPDX-License-Identifier: Apache-2.0
// Instructions that not every CPU with AVX-512 has: whether this one does, and what they compute.
#pragma once

#include "lanes16.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)

inline bool has_vnni() {
  static const bool found = __builtin_cpu_supports("avx512vnni");
  return found;
}

inline bool has_bf16() {
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
}

// `dot_pairs` by one instruction of AVX512_VNNI, or as on any CPU.
template <bool Vnni>
COFIRE_INLINE W16 dot_pairs(W16 acc, W16 a, W16 b) {
  if constexpr (Vnni) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
    return acc;
  } else {
    return dot_pairs(acc, a, b);
  }
}

#else

inline bool has_vnni() { return false; }
inline bool has_bf16() { return false; }

template <bool Vnni>
COFIRE_INLINE W16 dot_pairs(W16 acc, W16 a, W16 b) {
  return dot_pairs(acc, a, b);
}

#endif

}  // namespace CPU_CAPABILITY
}  // namespace cofire
