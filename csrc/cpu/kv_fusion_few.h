// SPDX-License-Identifier: Apache-2.0
// Products of few queries with keys, and of their weights with values, as in a decoding step: what
// takes time is to read keys and values, which is done once, in their own type. (The library's
// products copy them to where they want them first.)
#pragma once

#include "loops.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {

constexpr int64_t kFew = 8;        // queries, at most
constexpr int64_t kTogether = 16;  // values that stay in the first cache
constexpr int64_t kAhead = 4096;   // bytes from a key to what is fetched: keys follow each other

// Calls f(first, integral_constant count) for fours of n, then what is left.
template <typename F>
inline void in_fours(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) f(i, std::integral_constant<int64_t, 4>{});
  if (i + 2 <= n) {
    f(i, std::integral_constant<int64_t, 2>{});
    i += 2;
  }
  if (i < n) f(i, std::integral_constant<int64_t, 1>{});
}

// out[r] = query r times the key
template <int64_t R, typename T>
inline void products(const float* queries, const T* key, int64_t d, float* out, int64_t stride) {
  Vec sums[R];
  COFIRE_UNROLL for (int64_t r = 0; r < R; ++r) sums[r] = Vec(0.0f);
  for_vectors(d, [&](int64_t c, auto n) {
    __builtin_prefetch(key + c + kAhead / sizeof(T));
    const Vec x = load(key + c, n);
    COFIRE_UNROLL for (int64_t r = 0; r < R; ++r) {
      sums[r] = at::vec::fmadd(load(queries + r * d + c, n), x, sums[r]);
    }
  });
  COFIRE_UNROLL for (int64_t r = 0; r < R; ++r) out[r * stride] = reduce_add(sums[r]);
}

// out[r][j] = query r times key j, one key after the other: memory is read in its order.
template <typename T>
void multiply_few(const float* queries, int64_t rows, const T* keys, int64_t count, int64_t stride,
                  int64_t d, float* out, int64_t out_stride) {
  for (int64_t j = 0; j < count; ++j) {
    in_fours(rows, [&](int64_t r, auto some) {
      products<some()>(queries + r * d, keys + j * stride, d, out + r * out_stride + j, out_stride);
    });
  }
}

// sums[r][c] += the sum over `count` values of weights[r][j] value j. What is read next is fetched
// in the order of memory.
template <typename T>
void mix_few(const float* weights, int64_t rows, int64_t weights_stride, const T* values,
             int64_t count, int64_t stride, int64_t d, float* sums) {
  constexpr int64_t kVectors = 2;
  for (int64_t first = 0; first < count; first += kTogether) {
    const int64_t last = std::min(count, first + kTogether);
    const T* ahead = values + last * stride;
    in_fours(rows, [&](int64_t r, auto some) {
      const float* w = weights + r * weights_stride;
      float* to = sums + r * d;
      const auto columns = [&](int64_t c, auto vectors, auto n) {
        Vec sum[some()][vectors()];
        COFIRE_UNROLL for (int64_t i = 0; i < some(); ++i) {
          COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) sum[i][v] = Vec(0.0f);
        }
        for (int64_t j = first; j < last; ++j) {
          const T* value = values + j * stride + c;
          __builtin_prefetch(ahead);
          ahead += vectors() * kLanes;
          Vec x[vectors()];
          COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) x[v] = load(value + v * kLanes, n);
          COFIRE_UNROLL for (int64_t i = 0; i < some(); ++i) {
            const Vec by(w[i * weights_stride + j]);
            COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
              sum[i][v] = at::vec::fmadd(by, x[v], sum[i][v]);
            }
          }
        }
        COFIRE_UNROLL for (int64_t i = 0; i < some(); ++i) {
          COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
            float* p = to + i * d + c + v * kLanes;
            (load(p, n) + sum[i][v]).store(p, static_cast<int>(n));
          }
        }
      };
      int64_t c = 0;
      for (; c + kVectors * kLanes <= d; c += kVectors * kLanes) {
        columns(c, std::integral_constant<int64_t, kVectors>{},
                std::integral_constant<int64_t, kLanes>{});
      }
      for (; c + kLanes <= d; c += kLanes) {
        columns(c, std::integral_constant<int64_t, 1>{}, std::integral_constant<int64_t, kLanes>{});
      }
      if (c < d) columns(c, std::integral_constant<int64_t, 1>{}, d - c);
    });
  }
}

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire
