// SPDX-License-Identifier: Apache-2.0
// Compaction of one mask row and the stable descending order of one score row,
// shared by the operators of selection.cpp and gating.cpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "vec.h"

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace cofire {
inline namespace CPU_CAPABILITY {

// The operator itself (selection.cpp): positions and number of the set entries of each row.
std::tuple<at::Tensor, at::Tensor> compact(const at::Tensor& mask);

// Writes the ascending positions of the non-zero bytes of mask[0, size) to index, fills the rest
// of index[0, size) with -1, and returns how many there are.
inline int32_t compact_row(const bool* mask, int64_t size, int32_t* index) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(mask);
  int64_t count = 0, i = 0;
#if defined(CPU_CAPABILITY_AVX512)
  // A whole vector is stored at `count`, of which the next store overwrites the surplus. It ends
  // at count + 16 <= i + 16 <= size. (Compressing into memory is microcoded on some CPUs.)
  __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= size; i += 16) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
    const __mmask16 set = _mm_test_epi8_mask(b, b);
    _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(set, position));
    count += __builtin_popcount(set);
    position = _mm512_add_epi32(position, _mm512_set1_epi32(16));
  }
#endif
  // No branch: a position is always written (count <= i), and kept if its byte is set.
  for (; i < size; ++i) {
    index[count] = static_cast<int32_t>(i);
    count += bytes[i] != 0;
  }
  std::fill(index + count, index + size, -1);
  return static_cast<int32_t>(count);
}

// A row in descending order, equal values by ascending position. -0 equals +0; NaN comes first,
// as in torch.sort.
class DescendingOrder {
 public:
  explicit DescendingOrder(int64_t size) : items_(size), scratch_(size) {}

  int64_t size() const { return static_cast<int64_t>(items_.size()); }
  int64_t position(int64_t rank) const { return items_[rank] & 0xffffffff; }

  // Radix sort by bytes, the lowest first. Each pass is stable, and the row enters by ascending
  // position, so positions need no pass of their own.
  template <typename T>
  void sort(const T* row) {
    const int64_t n = size();
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = descending_key(static_cast<float>(row[i]));
      items_[i] = static_cast<uint64_t>(key) << 32 | static_cast<uint64_t>(i);
    }
    sort_items(n);
  }

  // The same for a row without negative values or NaN: its zeros come last and need no sorting.
  // Returns how many values are positive.
  int64_t sort_non_negative(const float* row) {
    const int64_t n = size();
    int64_t positive = 0, zero = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t item =
          static_cast<uint64_t>(descending_key(row[i])) << 32 | static_cast<uint64_t>(i);
      items_[positive] = scratch_[zero] = item;  // no branch: the next one overwrites a wrong one
      positive += row[i] > 0;
      zero += !(row[i] > 0);
    }
    std::copy_n(scratch_.begin(), zero, items_.begin() + positive);
    sort_items(positive);
    return positive;
  }

 private:
  void sort_items(int64_t n) {
    uint32_t histogram[4][256] = {};
    for (int64_t i = 0; i < n; ++i) {
      const auto key = static_cast<uint32_t>(items_[i] >> 32);
      for (int d = 0; d < 4; ++d) ++histogram[d][key >> (8 * d) & 255];
    }
    for (int d = 0; d < 4; ++d) {
      const int shift = 32 + 8 * d;
      uint32_t* next = histogram[d];
      if (n == 0 || next[items_[0] >> shift & 255] == n) continue;  // all alike in this byte
      uint32_t start = 0;
      for (int b = 0; b < 256; ++b) start += std::exchange(next[b], start);
      for (int64_t i = 0; i < n; ++i) scratch_[next[items_[i] >> shift & 255]++] = items_[i];
      std::copy(items_.begin() + n, items_.end(), scratch_.begin() + n);
      items_.swap(scratch_);
    }
  }

  // Unsigned keys whose ascending order is the descending order of the values.
  static uint32_t descending_key(float value) {
    if (value != value) return 0;
    value += 0.0f;  // -0 becomes +0
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits >> 31 ? bits : ~bits & 0x7fffffff;
  }

  std::vector<uint64_t> items_, scratch_;
};

// Sets the bits of mask at the `count` first positions of the order, and clears all others.
inline void keep_first(const DescendingOrder& order, int64_t count, bool* mask) {
  std::fill(mask, mask + order.size(), false);
  for (int64_t rank = 0; rank < std::min(count, order.size()); ++rank) {
    mask[order.position(rank)] = true;
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
