// SPDX-License-Identifier: Apache-2.0
// The inner loop of all products with weights stored by rows: one entry is a broadcast, and a
// multiplication with vectors of tokens.
#pragma once

#include "sparse.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace sparse {

template <typename T>
COFIRE_INLINE float widened(T v) {
  return static_cast<float>(v);
}

template <typename Index>
constexpr bool kDistances = std::is_same_v<Index, uint8_t>;

// The column of entry j. Of distances it is their sum: `column` holds that of the entry before.
template <typename Index>
COFIRE_INLINE int64_t advance(const Index* index, int64_t j, int64_t column) {
  if constexpr (kDistances<Index>) return column + index[j];
  return index[j];
}

// Adds the entries [j, end) of a row to its sums for V vectors of tokens; row_of(column): where the
// tokens of a column stand.
template <int V, typename Index, typename Value, typename Row>
COFIRE_INLINE void add_entries(const Index* index, const Value* values, int64_t j, int64_t end,
                               int64_t column, Row&& row_of, float* c) {
  constexpr int kChains = kMostVectors / V;
  Vec sum[kChains][V];
  COFIRE_UNROLL
  for (int i = 0; i < kChains; ++i) {
    COFIRE_UNROLL
    for (int v = 0; v < V; ++v) sum[i][v] = Vec(0.0f);
  }
  for (; j + kChains <= end; j += kChains) {
    COFIRE_UNROLL
    for (int i = 0; i < kChains; ++i) {
      column = advance(index, j + i, column);
      const Vec w(widened(values[j + i]));
      const float* row = row_of(column);
      COFIRE_UNROLL
      for (int v = 0; v < V; ++v) {
        sum[i][v] = at::vec::fmadd(w, Vec::loadu(row + v * kLanes), sum[i][v]);
      }
    }
  }
  for (; j < end; ++j) {
    column = advance(index, j, column);
    const Vec w(widened(values[j]));
    const float* row = row_of(column);
    COFIRE_UNROLL
    for (int v = 0; v < V; ++v) {
      sum[0][v] = at::vec::fmadd(w, Vec::loadu(row + v * kLanes), sum[0][v]);
    }
  }
  COFIRE_UNROLL
  for (int i = 1; i < kChains; ++i) {
    COFIRE_UNROLL
    for (int v = 0; v < V; ++v) sum[0][v] = sum[0][v] + sum[i][v];
  }
  COFIRE_UNROLL
  for (int v = 0; v < V; ++v) {
    // Added at the end: sums of a part lose less than one that goes on and on.
    (Vec::loadu(c + v * kLanes) + sum[0][v]).store(c + v * kLanes);
  }
}

}  // namespace sparse
}  // namespace CPU_CAPABILITY
}  // namespace cofire
