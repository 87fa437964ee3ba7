// SPDX-License-Identifier: Apache-2.0
// Attention in bf16 on AMX: the products of kv_fusion_attention.h on tiles. What rows are
// multiplied with is packed once for a task; the weights between the products stay in fp32.
#pragma once

#include <algorithm>

#include "kv_fusion_windows.h"
#include "pages.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {

#if defined(COFIRE_AMX)

// Keys or values as their products with rows read them: [room / 16][d / 2 pairs of features][16
// keys], zeros after the last of `rows`, which are `stride` apart.
inline void pack_features(const uint16_t* x, int64_t rows, int64_t stride, int64_t d, int64_t room,
                          uint32_t* to) {
  for (int64_t first = 0; first < room; first += amx::kRows) {
    for (int64_t f = 0; f < d; f += kSquare, to += kTileHalves / 2) {
      __m512i words[16];
      for (int64_t r = 0; r < amx::kRows; ++r) {
        words[r] = first + r < rows ? _mm512_loadu_si512(x + (first + r) * stride + f)
                                    : _mm512_setzero_si512();
      }
      transpose_words(words);
      for (int64_t r = 0; r < amx::kRows; ++r) _mm512_store_si512(to + r * amx::kWords, words[r]);
    }
  }
}

// out [rows][line] = rows of bf16 [rows][d] times so many keys, both in whole squares.
inline void row_products(const uint16_t* x, int64_t rows, int64_t d, const uint32_t* by_features,
                         int64_t keys, float* out, int64_t line) {
  for (int64_t c = 0; c < keys; c += kSquare) {
    for (int64_t r = 0; r < rows; r += kSquare) {
      amx::multiply_square({x + r * d, 2 * d, 2 * amx::kRows * d, 64},
                           {by_features + c * d / 2, 64, 32 * d, 2 * kTileHalves}, d / kSquare,
                           out + r * line + c, 4 * line, false);
    }
  }
}

// Weights [count][line], of which `width` are there, in bf16: [rows][wide], zeros for the others.
inline void halve(const float* weights, int64_t count, int64_t width, int64_t line, int64_t rows,
                  int64_t columns, uint16_t* to, int64_t wide) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t there = r < count ? width : 0;
    for (int64_t c = 0; c < columns; c += kSquare) {
      const float* from = weights + r * line + c;
      _mm512_store_si512(to + r * wide + c, amx::halves_of(load_part(from, there - c),
                                                           load_part(from + 16, there - c - 16)));
    }
  }
}

// out [rows][d] = weights in bf16 [rows][wide] times the first `columns` of packed pairs.
inline void mix_rows(const uint16_t* weights, int64_t rows, int64_t wide, int64_t columns,
                     const uint32_t* pairs, int64_t count, int64_t d, float* out) {
  for (int64_t f = 0; f < d; f += kSquare) {
    for (int64_t r = 0; r < rows; r += kSquare) {
      amx::multiply_square({weights + r * wide, 2 * wide, 2 * amx::kRows * wide, 64},
                           of_tokens(pairs, count, f), columns / kSquare, out + r * d + f, 4 * d,
                           false);
    }
  }
}

// sums [keys][d] += what `transposed_square` made of the weights of `rows` rows, times these.
inline void add_by_keys(const uint16_t* transposed, int64_t keys, int64_t rows,
                        const uint32_t* pairs, int64_t d, float* sums) {
  for (int64_t c = 0; c < keys; c += kSquare) {
    for (int64_t f = 0; f < d; f += kSquare) {
      amx::multiply_square(of_slots(transposed, c, rows), of_tokens(pairs, rows / 2, f),
                           rows / kSquare, sums + c * d + f, 4 * d, true);
    }
  }
}

// Some rows, in whole squares: where they are, or copied with zeros after them.
struct WholeRows {
  const uint16_t* data;
  WholeRows(const uint16_t* x, int64_t count, int64_t d, uint16_t* room) : data(x) {
    if (count % kSquare == 0) return;
    std::copy_n(x, count * d, room);
    std::fill(room + count * d, room + squares(count) * d, uint16_t{0});
    data = room;
  }
};

#endif

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire
