// SPDX-License-Identifier: Apache-2.0
// Codes of up to 64 bits, in words of 16, 32 or 64.
#pragma once

#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace shift_add {

inline at::ScalarType word_of(int64_t bits) {
  return bits <= 16 ? at::kShort : bits <= 32 ? at::kInt : at::kLong;
}

template <typename F>
void for_word(int64_t bits, F&& f) {
  if (bits <= 16) {
    f(int16_t{});
  } else if (bits <= 32) {
    f(int32_t{});
  } else {
    f(int64_t{});
  }
}

// The bits of a word that are a code's; others are ignored.
inline uint64_t mask_of(int64_t bits) { return ~uint64_t{0} >> (64 - bits); }

inline bool is_double(const at::Tensor& t) { return t.scalar_type() == at::kDouble; }

}  // namespace shift_add
}  // namespace CPU_CAPABILITY
}  // namespace cofire
