// SPDX-License-Identifier: Apache-2.0
// Exact selection of the largest scores. Scores become integers of the same order; the least key
// that is kept is searched by counting, in passes that vectorise, over fewer and fewer keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vec.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#define COFIRE_EIGHT_KEYS 1  // per register
#endif

namespace cofire {
inline namespace CPU_CAPABILITY {

using Keys = at::vec::Vectorized<int32_t>;

constexpr int32_t kPadding = std::numeric_limits<int32_t>::min();  // below every key
constexpr int32_t kLowest = -0x7f800001;                           // the key of -inf
constexpr int32_t kBeyond = 0x7f800001;                            // above the key of +inf
constexpr int64_t kAllTies = std::numeric_limits<int64_t>::max();

// Keys are stored in whole vectors; what is left of the last one is padding.
inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
inline void pad_keys(int32_t* keys, int64_t n) {
  std::fill(keys + n, keys + whole_vectors(n), kPadding);
}

// Signed integers of the same order; -0 and +0 are the same. Of NaN they are meaningless.
inline Keys keys_of(const Vec& scores) {
  const Keys bits = at::vec::cast<int32_t>(scores);
  const Keys key = bits ^ ((Keys(0) > bits) & Keys(0x7fffffff));
  return key - (key == Keys(-1));  // -0
}

// kLanes keys, each `stride` after the one before.
inline Keys strided(const int32_t* keys, int64_t stride) {
#if defined(CPU_CAPABILITY_AVX2) && !defined(CPU_CAPABILITY_AVX512)
  const auto step = static_cast<int>(stride);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_i32gather_epi32(keys, _mm256_mullo_epi32(lanes, _mm256_set1_epi32(step)), 4);
#else
  alignas(64) int32_t lanes[Keys::size()];
  for (int lane = 0; lane < Keys::size(); ++lane) lanes[lane] = keys[lane * stride];
  return Keys::loadu(lanes);
#endif
}

// What is kept: keys greater than `key`, and the first `ties` of those equal to it.
struct Cut {
  int32_t key;
  int64_t ties;
};

// The sum over all lanes of minus-ones: how many comparisons were true.
inline int64_t true_lanes(const Keys& masks) {
  alignas(64) int32_t lanes[Keys::size()];
  masks.store(lanes);
  int64_t total = 0;
  for (int lane = 0; lane < Keys::size(); ++lane) total -= lanes[lane];
  return total;
}

// How many keys are at least `pivot`, which is above the padding. n < 2^31.
inline int64_t count_from(const int32_t* keys, int64_t n, int32_t pivot) {
  const Keys p(pivot), zero(0);
  Keys a(0), b(0), c(0), d(0);
  const int64_t end = whole_vectors(n);
  int64_t i = 0;
  for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
    a = a + (Keys::loadu(keys + i) >= p);
    b = b + (Keys::loadu(keys + i + kLanes) >= p);
    c = c + (Keys::loadu(keys + i + 2 * kLanes) >= p);
    d = d + (Keys::loadu(keys + i + 3 * kLanes) >= p);
  }
  for (; i < end; i += kLanes) a = a + (Keys::loadu(keys + i) >= p);
  return true_lanes((a + b) + (c + d));
}

#if defined(COFIRE_EIGHT_KEYS)
// For each set of lanes, the lanes to take: a nibble each, in order.
struct LaneTable {
  alignas(64) uint64_t lanes[256];
  constexpr LaneTable() : lanes() {
    for (int set = 0; set < 256; ++set) {
      int next = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (set >> lane & 1) lanes[set] |= static_cast<uint64_t>(lane) << (8 * next++);
      }
    }
  }
};
inline constexpr LaneTable kLaneTable{};
#endif

// Writes the keys in [low, high) to out, in order, and pads them; `out` may be `keys`, and has
// room for the keys and a vector. Returns how many there are; `above` counts those from high on.
inline int64_t between(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* out,
                       int64_t* above) {
  int64_t found = 0, greater = 0;
#if defined(COFIRE_EIGHT_KEYS)
  const __m256i below = _mm256_set1_epi32(low - 1), top = _mm256_set1_epi32(high - 1);
  __m256i counted = _mm256_setzero_si256();
  const int64_t end = whole_vectors(n);
  for (int64_t i = 0; i < end; i += 8) {
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    const __m256i over = _mm256_cmpgt_epi32(k, top);
    counted = _mm256_sub_epi32(counted, over);
    const __m256i inside = _mm256_andnot_si256(over, _mm256_cmpgt_epi32(k, below));
    const auto set = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(inside)));
    const __m256i lanes =
        _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kLaneTable.lanes[set])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + found),
                        _mm256_permutevar8x32_epi32(k, lanes));
    found += __builtin_popcount(set);
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), counted);
  for (int32_t lane : lanes) greater += lane;
#else
  for (int64_t i = 0; i < n; ++i) {
    const int32_t k = keys[i];
    out[found] = k;
    found += k >= low && k < high;
    greater += k >= high;
  }
#endif
  pad_keys(out, found);
  *above = greater;
  return found;
}

// 64 keys spread over the row, in descending order.
constexpr int kSamples = 64;
inline void sorted_sample(const int32_t* keys, int64_t n, int32_t* sorted) {
  alignas(64) int32_t sample[kSamples], rank[kSamples] = {};
  for (int64_t i = 0; i < kSamples; ++i) sample[i] = keys[(2 * i + 1) * n / (2 * kSamples)];
  for (int i = 0; i < kSamples; ++i) {  // counted by those before it: no branch, and it vectorises
    const int32_t key = sample[i];
    int32_t ahead = 0;
    for (int j = 0; j < kSamples; ++j) {
      const bool wins = sample[j] > key || (sample[j] == key && j < i);
      ahead += wins;
    }
    rank[i] = ahead;
  }
  for (int i = 0; i < kSamples; ++i) sorted[rank[i]] = sample[i];
}

// Where to cut n keys so that exactly `keep` remain. `scratch` is another array, with room for the
// keys and a vector. Always ends: every third step halves the interval.
inline Cut cut_of(const int32_t* keys, int64_t n, int64_t keep, int32_t* scratch) {
  if (keep <= 0) return {kBeyond, 0};
  if (keep >= n) return {kLowest, kAllTies};
  // `from_low` keys are at least low, `from_high` at least high: from_high < keep <= from_low
  int64_t low = kLowest, high = kBeyond, from_low = n, from_high = 0;
  if (n >= 8 * kSamples) {
    int32_t sample[kSamples];
    sorted_sample(keys, n, sample);
    const double share = static_cast<double>(keep) / static_cast<double>(n);
    const double margin = 2.2 * std::sqrt(kSamples * share * (1 - share)) + 1;
    const int first = static_cast<int>(std::floor(kSamples * share - margin));
    const int last = static_cast<int>(std::ceil(kSamples * share + margin));
    const int32_t up = first < 0 ? kBeyond : sample[first] + 1;
    const int32_t down = last >= kSamples ? kLowest : sample[last];
    int64_t above = 0;
    const int64_t found = between(keys, n, down, up, scratch, &above);
    if (above >= keep) {
      low = up, from_low = above;
    } else if (above + found < keep) {
      high = down, from_high = above + found;
    } else {
      keys = scratch, n = found, keep -= above;
      low = down, high = up, from_low = n, from_high = 0;
    }
  }
  for (int step = 1;; ++step) {
    if (from_low == keep) return {static_cast<int32_t>(low), kAllTies};
    if (high - low == 1) return {static_cast<int32_t>(low), keep - from_high};
    if (n > 64 && from_low - from_high <= n / 4) {
      int64_t above = 0;
      n = between(keys, n, static_cast<int32_t>(low), static_cast<int32_t>(high), scratch, &above);
      keys = scratch;
      keep -= from_high, from_low = n, from_high = 0;
    }
    const double share = (static_cast<double>(from_low - keep) + 0.5) /
                         static_cast<double>(from_low - from_high + 1);
    const int64_t ahead = step % 3 == 0
                              ? (high - low) / 2
                              : static_cast<int64_t>(share * static_cast<double>(high - low));
    const int64_t pivot = low + std::clamp<int64_t>(ahead, 1, high - low - 1);
    const int64_t found = count_from(keys, n, static_cast<int32_t>(pivot));
    if (found >= keep) {
      low = pivot, from_low = found;
    } else {
      high = pivot, from_high = found;
    }
  }
}

// One bit for each of eight keys: whether it is greater than `than`.
inline unsigned greater_of_eight(const int32_t* keys, int32_t than) {
#if defined(COFIRE_EIGHT_KEYS)
  const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys));
  const __m256i over = _mm256_cmpgt_epi32(k, _mm256_set1_epi32(than));
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(over)));
#else
  unsigned set = 0;
  for (int lane = 0; lane < 8; ++lane) set |= static_cast<unsigned>(keys[lane] > than) << lane;
  return set;
#endif
}

// Bit `bit` of each of eight words.
inline uint8_t bit_of_eight(const int32_t* words, int64_t bit) {
#if defined(COFIRE_EIGHT_KEYS)
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  const __m256i sign = _mm256_sll_epi32(w, _mm_cvtsi64_si128(31 - bit));
  return static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(sign)));
#else
  unsigned set = 0;
  for (int lane = 0; lane < 8; ++lane) {
    set |= (static_cast<uint32_t>(words[lane]) >> bit & 1u) << lane;
  }
  return static_cast<uint8_t>(set);
#endif
}

// The first `count` bits that are set.
inline unsigned first_set(unsigned set, int64_t count) {
  unsigned taken = 0;
  for (; set != 0 && count > 0; --count) {
    taken |= set & -set;
    set &= set - 1;
  }
  return taken;
}

// The bits of n keys (and zeros up to the end of the last byte). `ties` that are used up are
// taken from the cut, so that rows can follow each other.
inline void write_bits(const int32_t* keys, int64_t n, Cut& cut, uint8_t* bits) {
  if (cut.ties == 0 || cut.ties == kAllTies) {
    const int32_t than = cut.ties == 0 ? cut.key : cut.key - 1;
    for (int64_t i = 0; i < n; i += 8) {
      bits[i / 8] = static_cast<uint8_t>(greater_of_eight(keys + i, than));
    }
    return;
  }
  for (int64_t i = 0; i < n; i += 8) {
    const unsigned above = greater_of_eight(keys + i, cut.key);
    const unsigned equal = greater_of_eight(keys + i, cut.key - 1) & ~above;
    const unsigned taken = equal == 0 ? 0 : first_set(equal, cut.ties);
    cut.ties -= __builtin_popcount(taken);
    bits[i / 8] = static_cast<uint8_t>(above | taken);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
