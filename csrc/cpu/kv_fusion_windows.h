// SPDX-License-Identifier: Apache-2.0
// The convolution of kv_fuse in bf16 on AMX. Row s of the matrix that a convolution multiplies,
// taps times features long, is the piece of memory that begins at token s: rows overlap, and
// nothing is copied. The gradient of the weight is the slopes, transposed, times pairs of tokens.
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
constexpr int64_t kBlock = 16;   // slots and features of a block of the weight's gradient

// Two logits of a slot, of tokens that follow each other, take four products for each three taps
// instead of six (minimal filtering, Winograd 1980; F(2, 3) of Lavin, Gray 2016). Of tokens x0 to x3
// and taps g0 to g2:
//   x0 g0 + x1 g1 + x2 g2 = m0 + m1 + m2, x1 g0 + x2 g1 + x3 g2 = m1 - m2 - m3, where
//   m0 = (x0 - x2) g0, m1 = (x1 + x2) (g0 + g1 + g2) / 2,
//   m2 = (x2 - x1) (g0 - g1 + g2) / 2, m3 = (x1 - x3) g2.
// The sums are rounded to bf16, so that the logits are as far from the right ones as two roundings
// of theirs would take them.
constexpr int64_t kOutputs = 2, kTaps = 3, kProducts = 4;
constexpr int64_t kTokens = kOutputs * amx::kRows;  // of a tile

constexpr int64_t rounds_of(int64_t taps) { return (taps + kTaps - 1) / kTaps; }

#if defined(COFIRE_AMX)

static_assert(kBlock == amx::kRows && kBlock == amx::kWords);

constexpr int64_t kTileHalves = 512;

// Sums of tokens, as products read them: x0 - x2, x1 + x2 and x2 - x1, at each token x0 (and x1 -
// x3, which is the first at the next one). Of so many tiles: [3][width / 32][tokens][32].
constexpr int64_t kSumsOfTokens = 3;
constexpr int64_t tokens_of_sums(int64_t tiles, int64_t taps) {
  return tiles * kTokens + kTaps * (rounds_of(taps) - 1);
}
constexpr int64_t size_of_sums(int64_t tiles, int64_t width, int64_t taps) {
  return kSumsOfTokens * width * tokens_of_sums(tiles, taps);
}

// 32 numbers of bf16: those of even places, and those of odd ones.
struct Two {
  __m512 even, odd;
};
COFIRE_INLINE Two load_two(const uint16_t* from) {
  const __m512i both = _mm512_loadu_si512(from);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_andnot_si512(_mm512_set1_epi32(0xffff), both))};
}

// The sums of so many tokens, from x on; zeros follow after so many rows of `width`. Of 32 features
// those of even places come first.
inline void add_tokens(const uint16_t* x, int64_t rows, int64_t width, int64_t count,
                       uint16_t* to) {
  constexpr int kRows = 4;  // at a time, so that rows are read as they lie
  const int64_t each = count * width;
  for (int64_t p = 0; p < count; p += kRows) {
    for (int64_t c = 0; c < width; c += kSquare) {
      uint16_t* line = to + c * count + p * kSquare;
      Two two[kRows + 2];
      unrolled<kRows + 2>([&](auto r) __attribute__((always_inline)) {
        const bool there = p + r < rows;
        two[r] = there ? load_two(x + (p + r) * width + c)
                       : Two{_mm512_setzero_ps(), _mm512_setzero_ps()};
      });
      unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        if (r > 0 && p + r >= count) return;
        const auto put = [&](int64_t which, __m512 even, __m512 odd) __attribute__((always_inline)) {
          _mm512_store_si512(line + which * each + r * kSquare, amx::halves_of(even, odd));
        };
        put(0, two[r].even - two[r + 2].even, two[r].odd - two[r + 2].odd);
        put(1, two[r + 1].even + two[r + 2].even, two[r + 1].odd + two[r + 2].odd);
        put(2, two[r + 2].even - two[r + 1].even, two[r + 2].odd - two[r + 1].odd);
      });
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

// The block of 16 slots from `first` on, of a weight [slots][width][taps], its taps added up:
// [product][width / 32][rounds][16 pairs of features][16 slots][2].
inline void pack_block(const uint16_t* weight, int64_t first, int64_t width, int64_t taps,
                       uint16_t* to) {
  const int64_t rounds = rounds_of(taps), product = rounds * width * kBlock;
  const __m512i features = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_set1_epi32(static_cast<int>(4 * taps)));  // bytes from every second one to the next
  const __m512 half = _mm512_set1_ps(0.5f);
  for (int64_t j = 0; j < rounds; ++j) {
    // Two taps are read as a word, from the tap `at` on: there are three.
    const int64_t there = std::min(taps - kTaps * j, kTaps);
    const auto words = [&](const uint16_t* row, int64_t at) {
      return _mm512_i32gather_epi32(features, row + at, 1);
    };
    const auto low = [](__m512i word) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
    };
    const auto high = [](__m512i word) {
      return _mm512_castsi512_ps(_mm512_andnot_si512(_mm512_set1_epi32(0xffff), word));
    };
    struct Three {
      __m512 g0, g1, g2;
    };
    const auto three = [&](const uint16_t* row) -> Three {
      const __m512 none = _mm512_setzero_ps();
      if (there == 1) return {high(words(row, kTaps * j - 1)), none, none};
      const __m512i front = words(row, kTaps * j);
      if (there == 2) return {low(front), high(front), none};
      return {low(front), high(front), high(words(row, kTaps * j + 1))};
    };
    for (int64_t k = 0; k < width; k += kSquare) {
      __m512i tiles[kProducts][16];
      for (int64_t c = 0; c < kBlock; ++c) {
        const uint16_t* row = weight + ((first + c) * width + k) * taps;
        const Three even = three(row), odd = three(row + taps);
        const __m512 sum = (even.g0 + even.g2) * half, sums = (odd.g0 + odd.g2) * half;
        const __m512 middle = even.g1 * half, middles = odd.g1 * half;
        tiles[0][c] = amx::halves_of(even.g0, odd.g0);
        tiles[1][c] = amx::halves_of(sum + middle, sums + middles);
        tiles[2][c] = amx::halves_of(sum - middle, sums - middles);
        tiles[3][c] = amx::halves_of(even.g2, odd.g2);
      }
      uint16_t* tile = to + (k * rounds + j * kSquare) * kBlock;
      for (int64_t m = 0; m < kProducts; ++m) {
        transpose_words(tiles[m]);
        for (int64_t r = 0; r < amx::kRows; ++r) {
          _mm512_store_si512(tile + m * product + r * kSquare, tiles[m][r]);
        }
      }
    }
  }
}

// relu(windows of tokens times a block + bias): of `n` tokens in so many tiles, [n][16], rows of
// `stride`; `largest` of each column is kept up to date. `sums`: as `add_tokens` made them.
inline void window_products(const uint16_t* sums, int64_t tiles, int64_t n, int64_t width,
                            int64_t taps, const uint16_t* block, const float* bias, float* out,
                            int64_t stride, float* largest) {
  constexpr int64_t kRow = 2 * kSquare;
  const int64_t count = tokens_of_sums(tiles, taps), each = count * width;
  const int64_t rounds = rounds_of(taps), product = rounds * width * kBlock;
  const uint16_t* from[kProducts] = {sums, sums + each, sums + 2 * each, sums + kSquare};
  alignas(64) float products[kProducts][amx::kColumn * kBlock * kBlock];
  for (int64_t m = 0; m < kProducts; ++m) {
    amx::multiply_column(tiles, {from[m], kOutputs * kRow, kTokens * kRow, kTaps * kRow},
                         count * kRow, block + m * product, width / kSquare, rounds, products[m]);
  }
  const __m512 zero = _mm512_setzero_ps(), constant = _mm512_loadu_ps(bias);
  __m512 most = _mm512_loadu_ps(largest);
  for (int64_t i = 0; i < n; i += kOutputs) {
    const auto product_of = [&](int64_t m) __attribute__((always_inline)) {
      return _mm512_load_ps(products[m] + i / kOutputs * kBlock);
    };
    float* line = out + i * stride;
    const __m512 middle = product_of(1), less = product_of(2);
    const __m512 first = _mm512_max_ps(product_of(0) + (middle + less) + constant, zero);
    most = _mm512_max_ps(most, first);
    _mm512_storeu_ps(line, first);
    if (i + 1 == n) break;
    const __m512 second = _mm512_max_ps((middle - less) - product_of(3) + constant, zero);
    most = _mm512_max_ps(most, second);
    _mm512_storeu_ps(line + stride, second);
  }
  _mm512_storeu_ps(largest, most);
}

// How many pairs of tokens a sum over n tokens reads.
inline int64_t pairs_of(int64_t n) { return (n + kSquare - 1) / kSquare * (kSquare / 2); }

// [width / 16][pairs][16]: each row of x and the next one, `stride` apart, or zeros after the last
// of `rows`. A tile is one piece of memory: rows that are a power of two apart would drive each
// other out of the cache.
inline void pack_pairs(const uint16_t* x, int64_t rows, int64_t width, int64_t stride,
                       int64_t pairs, uint32_t* to) {
  constexpr int64_t kWords = amx::kWords;
  for (int64_t p = 0; p < pairs; ++p, to += kWords) {
    const int64_t there = std::clamp<int64_t>(rows - 2 * p, 0, 2);
    const uint16_t *one = x + 2 * p * stride, *two = one + stride;
    for (int64_t f = 0; f < width; f += kWords) {
      uint32_t* tile = to + f * pairs;
      for (int64_t c = 0; c < kWords; ++c) {
        tile[c] = (there > 0 ? one[f + c] : 0) | static_cast<uint32_t>(there > 1 ? two[f + c] : 0)
                                                     << 16;
      }
    }
  }
}

// The first of 16 numbers, so many as there are; zeros for the others.
COFIRE_INLINE __m512 load_part(const float* x, int64_t there) {
  if (there >= kLanes) return _mm512_loadu_ps(x);
  return _mm512_maskz_loadu_ps(there > 0 ? static_cast<__mmask16>((1u << there) - 1) : 0, x);
}

// 32 rows of 16 columns, of which so many are there, transposed: [16][32] in bf16.
inline void transposed_square(const float* x, int64_t rows, int64_t columns, int64_t stride,
                              uint16_t* to) {
  __m512i pairs[16];
  for (int64_t p = 0; p < amx::kWords; ++p) {
    const float* one = x + 2 * p * stride;
    const __m512 low = load_part(one, 2 * p < rows ? columns : 0);
    const __m512 high = load_part(one + stride, 2 * p + 1 < rows ? columns : 0);
    pairs[p] = amx::pairs_of(low, high);
  }
  transpose_words(pairs);
  for (int64_t r = 0; r < amx::kRows; ++r) _mm512_store_si512(to + r * kSquare, pairs[r]);
}

// Of slopes [n][stride] the first `count` columns, transposed: [count / 16][room / 32][16][32],
// zeros after the n-th.
inline void transpose(const float* slopes, int64_t n, int64_t count, int64_t stride, uint16_t* to,
                      int64_t room) {
  for (int64_t c = 0; c < count; c += amx::kRows) {
    for (int64_t t = 0; t < room; t += kSquare, to += kTileHalves) {
      transposed_square(slopes + t * stride + c, n - t, amx::kRows, stride, to);
    }
  }
}

// Two rows of tiles from slot `c` on, of what `transpose` made of the slopes or shares of slots.
COFIRE_INLINE amx::Factor of_slots(const uint16_t* transposed, int64_t c, int64_t room) {
  return {transposed + c * room, 64, 2 * amx::kRows * room, 2 * kTileHalves};
}

// Two columns of tiles from feature f and pair p on, of what `pack_pairs` made.
COFIRE_INLINE amx::Factor of_tokens(const uint32_t* pairs, int64_t count, int64_t f, int64_t p) {
  return {pairs + f * count + p * amx::kWords, 64, 64 * count, 2 * kTileHalves};
}

// out [slots][width] = shares of slots, transposed, times tokens, so many pairs.
inline void mixtures(const uint16_t* shares, int64_t slots, int64_t room, const uint32_t* pairs,
                     int64_t count, int64_t width, float* out) {
  for (int64_t c = 0; c < slots; c += kSquare) {
    for (int64_t f = 0; f < width; f += kSquare) {
      amx::multiply_square(of_slots(shares, c, room), of_tokens(pairs, count, f, 0), room / kSquare,
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

// The weight's gradient is the other way of the four products: with the slopes y0 and y1 of two
// logits, and the same sums of tokens,
//   n0 = y0 (x0 - x2), n1 = (y0 + y1) (x1 + x2), n2 = (y0 - y1) (x2 - x1), n3 = y1 (x1 - x3),
// those of the taps are n0 + (n1 + n2) / 2, (n1 - n2) / 2, (n1 + n2) / 2 - n3. A product reads two
// of each at a time: those of the first half of all twos of tokens, and those of the second.

// How many twos of n tokens a half is.
inline int64_t half_of(int64_t n) { return (n + 4 * amx::kRows - 1) / (4 * amx::kRows) * amx::kRows; }

// Of slopes [n][stride] the first 16 columns, added up: at to + product * `next`
// [half / 16][16 columns][32].
inline void add_slopes(const float* slopes, int64_t n, int64_t stride, int64_t next, uint16_t* to) {
  const int64_t half = half_of(n);
  const auto slope = [&](int64_t t) __attribute__((always_inline)) {
    return t < n ? _mm512_loadu_ps(slopes + t * stride) : _mm512_setzero_ps();
  };
  for (int64_t i = 0; i < half; i += amx::kWords, to += kTileHalves) {
    __m512i tiles[kProducts][16];
    for (int64_t r = 0; r < amx::kWords; ++r) {
      const int64_t t = kOutputs * (i + r), other = t + kOutputs * half;
      const __m512 y0 = slope(t), y1 = slope(t + 1), z0 = slope(other), z1 = slope(other + 1);
      tiles[0][r] = amx::pairs_of(y0, z0);
      tiles[1][r] = amx::pairs_of(y0 + y1, z0 + z1);
      tiles[2][r] = amx::pairs_of(y0 - y1, z0 - z1);
      tiles[3][r] = amx::pairs_of(y1, z1);
    }
    for (int64_t m = 0; m < kProducts; ++m) {
      transpose_words(tiles[m]);
      for (int64_t r = 0; r < amx::kRows; ++r) {
        _mm512_store_si512(to + m * next + r * kSquare, tiles[m][r]);
      }
    }
  }
}

// How many lines `add_pairs_of_tokens` makes.
inline int64_t lines_of_pairs(int64_t n, int64_t taps) {
  return kOutputs * half_of(n) + kTaps * (rounds_of(taps) - 1);
}

// The sums of tokens that one of the products takes, of `blocks` blocks of 16 features of x
// [rows][width]: [blocks][lines][16] pairs of those at a token and half of all tokens later.
inline void add_pairs_of_tokens(const uint16_t* x, int64_t rows, int64_t width, int64_t n,
                                int64_t taps, int64_t product, int64_t blocks, uint32_t* to) {
  const int64_t apart = kOutputs * half_of(n), count = lines_of_pairs(n, taps);
  const auto at = [&](int64_t p, int64_t f) __attribute__((always_inline)) {
    if (p >= rows) return _mm512_setzero_ps();
    const auto* row = reinterpret_cast<const __m256i*>(x + p * width + f);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(row)), 16));
  };
  constexpr int64_t kAhead = 16;  // rows that are asked for, which lie apart
  const auto ask = [&](int64_t p, int64_t f) __attribute__((always_inline)) {
    _mm_prefetch(reinterpret_cast<const char*>(x + (p + kAhead) * width + f), _MM_HINT_T0);
  };
  const auto fill = [&](int64_t first, int64_t second, __m512 sign) __attribute__((always_inline)) {
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t f = b * kBlock, later = p + apart;
        ask(p, f);
        ask(later, f);
        const __m512 low = _mm512_fmadd_ps(sign, at(p + second, f), at(p + first, f));
        const __m512 high = _mm512_fmadd_ps(sign, at(later + second, f), at(later + first, f));
        _mm512_store_si512(to + (b * count + p) * amx::kWords, amx::pairs_of(low, high));
      }
    }
  };
  const __m512 plus = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
  if (product == 0) fill(0, 2, minus);
  if (product == 1) fill(1, 2, plus);
  if (product == 2) fill(2, 1, minus);
  if (product == 3) fill(1, 3, minus);
}

// sums [rounds][kBlock][kBlock] += slopes of so many slots, as `add_slopes` made them, times as many
// features of tokens, as `add_pairs_of_tokens` did. The sums of even rounds, whose lines overlap,
// come first, then those of odd ones. `next_sums`, `next_slopes`: where those begin that are needed
// next.
inline void add_to_taps(const uint16_t* slopes, const uint32_t* pairs, int64_t half, int64_t taps,
                        float* sums, const float* next_sums, const uint16_t* next_slopes) {
  constexpr int64_t kRow = 4 * amx::kWords, kSums = kBlock * kBlock;
  const int64_t rounds = rounds_of(taps);
  for (int64_t odd = 0; odd < 2; ++odd) {
    const int64_t all = (rounds + 1 - odd) / 2;
    for (int64_t first = 0, now = 0; first < all; first += now) {
      now = next_part(all - first, amx::kShifts);
      const uint32_t* from = pairs + kTaps * (2 * first + odd) * amx::kWords;
      amx::multiply_shifted(now, {slopes, 2 * kSquare, 0, 2 * kTileHalves},
                            {from, kOutputs * kRow, 2 * kTaps * kRow, kOutputs * amx::kRows * kRow},
                            half / amx::kRows, sums, next_sums, next_slopes);
      sums += now * kSums;
      next_sums += now * kSums;
    }
  }
}

#endif

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire
