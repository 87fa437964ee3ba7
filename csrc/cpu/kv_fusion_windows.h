// SPDX-License-Identifier: Apache-2.0
// The convolution of kv_fuse in bf16 on AMX. Row s of the matrix that a convolution multiplies, of
// the same features of so many tokens, is the piece of memory that begins at token s: rows overlap,
// and windows are not written out. The gradient of the weight is the slopes, transposed, times
// pairs of tokens.
#pragma once

#include <algorithm>

#include "amx.h"
#include "lines.h"
#include "loops.h"
#include "parts.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {

using Halves = Lines<uint16_t>;  // bits of bf16

constexpr int64_t kSquare = 32;  // slots, tokens and features of a step
constexpr int64_t kBlock = 16;   // slots of a block of the weight, and of its gradient features too

// A logit of a convolution's sum and a bias, which keeps NaN; `most` becomes the largest so far.
COFIRE_INLINE Vec relu_of(Vec sum, Vec bias, Vec& most) {
  const Vec logit = at::vec::maximum(sum + bias, Vec(0.0f));
  most = at::vec::maximum(most, logit);
  return logit;
}

#if defined(COFIRE_AMX)

static_assert(kBlock == amx::kRows && kBlock == amx::kWords);

constexpr int64_t kTileHalves = 512;

inline int64_t squares(int64_t n) { return (n + kSquare - 1) / kSquare * kSquare; }

// A set's tokens x [rows][width]: [width / 32][lines][32], zeros after the last.
inline void pack_tokens(const uint16_t* x, int64_t rows, int64_t width, int64_t lines,
                        uint16_t* to) {
  for (int64_t p = 0; p < lines; ++p) {
    for (int64_t c = 0; c < width; c += kSquare) {
      const __m512i line =
          p < rows ? _mm512_loadu_si512(x + p * width + c) : _mm512_setzero_si512();
      _mm512_store_si512(to + c * lines + p * kSquare, line);
    }
  }
}

// The words of 16 rows become those of 16 columns.
COFIRE_INLINE void transpose_words(__m512i (&rows)[16]) {
  __m512i two[16];
  for (int i = 0; i < 16; i += 2) {
    two[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    two[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  __m512i four[16];  // in each quarter, 4 rows of a column of it
  for (int i = 0; i < 16; i += 4) {
    four[i] = _mm512_unpacklo_epi64(two[i], two[i + 2]);
    four[i + 1] = _mm512_unpackhi_epi64(two[i], two[i + 2]);
    four[i + 2] = _mm512_unpacklo_epi64(two[i + 1], two[i + 3]);
    four[i + 3] = _mm512_unpackhi_epi64(two[i + 1], two[i + 3]);
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(four[j], four[4 + j], kEven);
    const __m512i b = _mm512_shuffle_i32x4(four[j], four[4 + j], kOdd);
    const __m512i c = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], kEven);
    const __m512i d = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], kOdd);
    rows[j] = _mm512_shuffle_i32x4(a, c, kEven);
    rows[4 + j] = _mm512_shuffle_i32x4(b, d, kEven);
    rows[8 + j] = _mm512_shuffle_i32x4(a, c, kOdd);
    rows[12 + j] = _mm512_shuffle_i32x4(b, d, kOdd);
  }
}

// The block of 16 slots from `first` on, of a weight [slots][width][taps]:
// [width / 32][taps][16 pairs of features][16 slots][2].
inline void pack_block(const uint16_t* weight, int64_t first, int64_t width, int64_t taps,
                       uint16_t* to) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Bytes from every second feature to the next such one.
  const __m512i step = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(4 * taps)));
  for (int64_t k = 0; k < width; k += kSquare) {
    for (int64_t j = 0; j < taps; j += 2) {
      // Two taps are one word; the last of an odd number is read with the one before.
      const int64_t at = taps == 1 ? 0 : std::min(j, taps - 2);
      __m512i low[16], high[16];
      for (int64_t c = 0; c < kBlock; ++c) {
        const uint16_t* from = weight + ((first + c) * width + k) * taps + at;
        if (taps == 1) {
          low[c] = _mm512_loadu_si512(from);
          continue;
        }
        const __m512i even = _mm512_i32gather_epi32(step, from, 1);
        const __m512i odd = _mm512_i32gather_epi32(step, from + taps, 1);
        constexpr __mmask32 kHigh = 0xaaaaaaaa;
        low[c] = _mm512_mask_mov_epi16(even, kHigh, _mm512_slli_epi32(odd, 16));
        high[c] = _mm512_mask_mov_epi16(_mm512_srli_epi32(even, 16), kHigh, odd);
      }
      const auto put = [&](__m512i(&tile)[16]) __attribute__((always_inline)) {
        transpose_words(tile);
        for (const __m512i& row : tile) {
          _mm512_store_si512(to, row);
          to += kSquare;
        }
      };
      if (at == j) put(low);
      if (at + 1 < taps) put(high);
    }
  }
}

// relu(windows of tokens times a block + bias): of `n` tokens in so many tiles, [n][16], rows of
// `stride`; `largest` of each column is kept up to date. `x`: the first token's line of those that
// `pack_tokens` made.
inline void window_products(const uint16_t* x, int64_t lines, int64_t tiles, int64_t n,
                            int64_t width, int64_t taps, const uint16_t* block, const float* bias,
                            float* out, int64_t stride, float* largest) {
  constexpr int64_t kRow = 2 * kSquare;
  alignas(64) float products[amx::kSums * kBlock * kBlock];
  amx::multiply_column(tiles, {x, kRow, amx::kRows * kRow, kRow}, lines * kRow, block,
                       width / kSquare, taps, products);
  const Vec by = Vec::loadu(bias);
  Vec most = Vec::loadu(largest);
  for (int64_t i = 0; i < n; ++i) {
    relu_of(Vec::loadu(products + i * kBlock), by, most).store(out + i * stride);
  }
  most.store(largest);
}

// Which rows are a pair: row p * step and the one that lies `apart` after it. Neighbours; or those
// of two halves, where sums from any row on read the same pairs.
struct Pairing {
  int64_t step, apart;
};
constexpr Pairing kNeighbours{2, 1};
constexpr Pairing of_halves(int64_t rows) { return {1, rows / 2}; }

// [width / 16][pairs][16]: pairs of rows of x, `stride` apart, or zeros after the last of `rows`. A
// tile is one piece of memory: rows that are a power of two apart would drive each other out of the
// cache.
inline void pack_pairs(const uint16_t* x, int64_t rows, int64_t width, int64_t stride, Pairing of,
                       int64_t pairs, uint32_t* to) {
  constexpr int64_t kWords = amx::kWords, kSoon = 16;  // rows that are asked for
  const auto words = [&](int64_t row, int64_t f) __attribute__((always_inline)) {
    const uint16_t* from = x + row * stride + f;
    _mm_prefetch(reinterpret_cast<const char*>(from + kSoon * of.step * stride), _MM_HINT_T0);
    if (row >= rows) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  for (int64_t p = 0; p < pairs; ++p, to += kWords) {
    const int64_t first = p * of.step, second = first + of.apart;
    for (int64_t f = 0; f < width; f += kWords) {
      const __m512i high = _mm512_slli_epi32(words(second, f), 16);
      _mm512_store_si512(to + f * pairs, _mm512_or_si512(words(first, f), high));
    }
  }
}

// The first of 16 numbers, so many as there are; zeros for the others.
COFIRE_INLINE __m512 load_part(const float* x, int64_t there) {
  if (there >= kLanes) return _mm512_loadu_ps(x);
  return _mm512_maskz_loadu_ps(there > 0 ? static_cast<__mmask16>((1u << there) - 1) : 0, x);
}

// 16 pairs of rows of 16 columns, of which so many are there: transposed, [16][32] in bf16.
inline void transposed_square(const float* x, int64_t rows, int64_t columns, int64_t stride,
                              Pairing of, uint16_t* to) {
  __m512i pairs[16];
  for (int64_t p = 0; p < amx::kWords; ++p) {
    const int64_t first = p * of.step, second = first + of.apart;
    const __m512 low = load_part(x + first * stride, first < rows ? columns : 0);
    const __m512 high = load_part(x + second * stride, second < rows ? columns : 0);
    pairs[p] = amx::pairs_of(low, high);
  }
  transpose_words(pairs);
  for (int64_t r = 0; r < amx::kRows; ++r) _mm512_store_si512(to + r * kSquare, pairs[r]);
}

// Of slopes or shares [n][stride] the first `count` columns, transposed, tokens as the halves of
// `room` pair them: [count / 16][room / 32][16][32], zeros after the n-th.
inline void transpose(const float* slopes, int64_t n, int64_t count, int64_t stride, uint16_t* to,
                      int64_t room) {
  for (int64_t c = 0; c < count; c += amx::kRows) {
    for (int64_t t = 0; t < room / 2; t += amx::kRows, to += kTileHalves) {
      transposed_square(slopes + t * stride + c, n - t, amx::kRows, stride, of_halves(room), to);
    }
  }
}

// Two rows of tiles from slot `c` on, of what `transpose` made of the slopes or shares of slots.
COFIRE_INLINE amx::Factor of_slots(const uint16_t* transposed, int64_t c, int64_t room) {
  return {transposed + c * room, 64, 2 * amx::kRows * room, 2 * kTileHalves};
}

// Two columns of tiles from feature f on, of what `pack_pairs` made.
COFIRE_INLINE amx::Factor of_tokens(const uint32_t* pairs, int64_t count, int64_t f) {
  return {pairs + f * count, 64, 64 * count, 2 * kTileHalves};
}

// out [slots][width] = shares of slots, transposed, times tokens, so many pairs.
inline void mixtures(const uint16_t* shares, int64_t slots, int64_t room, const uint32_t* pairs,
                     int64_t count, int64_t width, float* out) {
  for (int64_t c = 0; c < slots; c += kSquare) {
    for (int64_t f = 0; f < width; f += kSquare) {
      amx::multiply_square(of_slots(shares, c, room), of_tokens(pairs, count, f), room / kSquare,
                           out + c * width + f, 4 * width, false);
    }
  }
}

// Gradients of slots, keys beside values, as `along_gradients` reads them: [width / 2][stride]
// pairs.
inline void pack_gradients(const uint16_t* key, const uint16_t* value, int64_t count, int64_t d,
                           int64_t stride, uint32_t* to) {
  for (const uint16_t* half : {key, value}) {
    for (int64_t c = 0; c < d; c += 2, to += stride) {
      for (int64_t r = 0; r < count; ++r) {
        to[r] = half[r * d + c] | static_cast<uint32_t>(half[r * d + c + 1]) << 16;
      }
    }
  }
}

// out [n][stride] = x [n][width] times `count` gradients.
inline void along_gradients(const uint16_t* x, int64_t n, int64_t width, const uint32_t* gradients,
                            int64_t count, int64_t stride, float* out) {
  for (int64_t t = 0; t < n; t += kSquare) {
    const int64_t at = std::min(t, n - kSquare);
    for (int64_t c = 0; c < count; c += kSquare) {
      amx::multiply_square({x + at * width, 2 * width, 2 * amx::kRows * width, 64},
                           {gradients + c, 4 * stride, 64, 4 * amx::kRows * stride},
                           width / kSquare, out + at * stride + c, 4 * stride, false);
    }
  }
}

// sums [taps][kBlock][kBlock] += slopes of so many slots, transposed, times as many features of the
// tokens from tap j on, for each tap. `pairs`: as the halves of `room` pair tokens. `next_sums`,
// `next_slopes`: where those begin that are needed next.
inline void add_to_taps(const uint16_t* slopes, int64_t room, const uint32_t* pairs, int64_t taps,
                        float* sums, const float* next_sums, const uint16_t* next_slopes) {
  constexpr int64_t kRow = 4 * amx::kWords, kSize = kBlock * kBlock;
  for (int64_t first = 0, now = 0; first < taps; first += now) {
    now = next_part(taps - first, amx::kSums);
    amx::multiply_shifted(now, of_slots(slopes, 0, room),
                          {pairs + first * amx::kWords, kRow, kRow, 2 * kTileHalves},
                          room / kSquare, sums + first * kSize, next_sums + first * kSize,
                          next_slopes + first * room * kBlock / taps);
  }
}

#endif

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire
