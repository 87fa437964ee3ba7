// SPDX-License-Identifier: Apache-2.0
// Counting and summing by 16-bit pattern. Tables here are indexed by the bits
// themselves; a bin is the rank of a pattern by value (negative patterns, whose
// order is reversed, come first).
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

constexpr int64_t kPatterns = 65536;
constexpr int64_t kSign = 32768;

inline uint16_t pattern_of_bin(int64_t bin) {
  return static_cast<uint16_t>(bin < kSign ? bin ^ 0xFFFF : bin ^ 0x8000);
}

inline int64_t bin_of_pattern(uint16_t pattern) {
  return pattern & 0x8000 ? pattern ^ 0xFFFF : pattern ^ 0x8000;
}

inline uint16_t infinity_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? 0x7F80 : 0x7C00;
}

inline float value_of(uint16_t bits, at::ScalarType dtype) {
  return dtype == at::kBFloat16
             ? static_cast<float>(c10::BFloat16(bits, c10::BFloat16::from_bits()))
             : static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
}

// counts[65536] of n patterns.
void count_patterns(const uint16_t* input, int64_t n, uint32_t* counts);

// sums[65536], fp64, of the source by pattern, and (if asked) the counts. NaN and infinity spread
// within their pattern.
void sum_patterns(const uint16_t* input, const void* source, at::ScalarType dtype, int64_t n,
                  double* sums, uint32_t* counts);

// out = slope[pattern] * source + offset[pattern]; both tables interleaved, [65536][2].
void affine_patterns(const uint16_t* input, const void* source, at::ScalarType dtype, int64_t n,
                     const float* tables, void* out);

// out = table[pattern], 16 bits or 8 each.
template <typename T>
void look_up_patterns(const uint16_t* input, int64_t n, const T* table, T* out);

// The values that occur, ascending.
struct Present {
  std::vector<uint16_t> patterns;
  std::vector<double> x, n;

  // `operator` names who refuses NaN and infinity.
  Present(const uint32_t* counts, at::ScalarType dtype, const char* name);
  int64_t size() const { return static_cast<int64_t>(x.size()); }
};

// Refuses what is not finite, with its number.
[[noreturn]] void refuse_values(const char* name, int64_t nan, int64_t infinite);
void check_finite(const char* name, const at::Tensor& weight);

// What visits partitions one by one. If it refuses the values of one, the sentence counts all.
template <typename F>
void counting_all(const char* name, const at::Tensor& weight, F&& visit) {
  try {
    visit();
  } catch (const c10::ValueError&) {
    check_finite(name, weight);
    throw;
  }
}

// How many partitions there are. group_size may be as large as an integer can be.
inline int64_t partitions_of(const at::Tensor& weight, int64_t group_size) {
  return weight.numel() / group_size + (weight.numel() % group_size != 0);
}

// Consecutive weights of partition p.
inline at::Tensor part(const at::Tensor& flat, int64_t p, int64_t group_size) {
  return flat.slice(0, p * group_size, std::min(flat.numel(), (p + 1) * group_size));
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
