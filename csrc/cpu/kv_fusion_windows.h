// SPDX-License-Identifier: Apache-2.0
// The convolution of kv_fuse in bf16 on AMX. Row s of the matrix that a convolution multiplies,
// taps times features long, is the piece of memory that begins at token s: rows overlap, and
// nothing is copied. The gradient of the weight is the slopes, transposed, times pairs of tokens.
#pragma once

#include <algorithm>

#include "amx.h"
#include "lines.h"
#include "loops.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {

using Halves = Lines<uint16_t>;  // bits of bf16

constexpr int64_t kSquare = 32;  // slots, tokens and features of a step

#if defined(COFIRE_AMX)

constexpr int64_t kTileHalves = 512;

// The block of 32 slots from `first` on, of a weight [slots][width][taps]:
// [taps][width / 32][2][16 pairs of features][16 slots][2].
inline void pack_block(const uint16_t* weight, int64_t first, int64_t width, int64_t taps,
                       uint16_t* to) {
  for (int64_t j = 0; j < taps; ++j) {
    for (int64_t k = 0; k < width; k += kSquare) {
      for (int64_t half = 0; half < 2; ++half, to += kTileHalves) {
        for (int64_t c = 0; c < amx::kRows; ++c) {
          const uint16_t* from = weight + ((first + half * amx::kRows + c) * width + k) * taps + j;
          for (int64_t f = 0; f < kSquare; ++f) to[(f / 2 * 16 + c) * 2 + f % 2] = from[f * taps];
        }
      }
    }
  }
}

// out[n][32] = windows of x [n + taps - 1][width] times a block; rows of out are `stride` apart.
inline void window_products(const uint16_t* x, int64_t n, int64_t width, int64_t taps,
                            const uint16_t* block, float* out, int64_t stride) {
  const int64_t row = 2 * width;
  for (int64_t t = 0; t < n; t += kSquare) {
    const int64_t at = std::min(t, n - kSquare);  // the last ones overlap those before
    amx::multiply_square({x + at * width, row, amx::kRows * row, 64},
                         {block, 64, 2 * kTileHalves, 4 * kTileHalves}, taps * width / kSquare,
                         out + at * stride, 4 * stride, false);
  }
}

// How many pairs of tokens a sum over n tokens from tap `last` on at the latest reads.
inline int64_t pairs_of(int64_t n, int64_t last) {
  return (n + kSquare - 1) / kSquare * (kSquare / 2) + last / 2 + 1;
}

// [pairs][width][2]: each row of x and the next one, or zeros after the last of `rows`.
inline void pack_pairs(const uint16_t* x, int64_t rows, int64_t width, int64_t pairs,
                       uint32_t* to) {
  for (int64_t p = 0; p < pairs; ++p, to += width) {
    const uint16_t *one = x + 2 * p * width, *two = one + width;
    if (2 * p + 1 < rows) {
      for (int64_t c = 0; c < width; ++c) to[c] = one[c] | static_cast<uint32_t>(two[c]) << 16;
    } else if (2 * p < rows) {
      for (int64_t c = 0; c < width; ++c) to[c] = one[c];
    } else {
      std::fill_n(to, width, 0);
    }
  }
}

COFIRE_INLINE uint32_t bits_of(float x) { return c10::BFloat16(x).x; }

// Of slopes [n][stride] the first `count` columns, transposed: [count][room], zeros after the n-th.
inline void transpose(const float* slopes, int64_t n, int64_t count, int64_t stride, uint16_t* to,
                      int64_t room) {
  for (int64_t c = 0; c < count; ++c) std::fill_n(to + c * room + n, room - n, 0);
  int64_t t = 0;
  for (; t + 2 <= n; t += 2) {
    const float *one = slopes + t * stride, *two = one + stride;
    for (int64_t c = 0; c < count; ++c) {
      const uint32_t pair = bits_of(one[c]) | bits_of(two[c]) << 16;
      std::memcpy(to + c * room + t, &pair, sizeof pair);
    }
  }
  for (; t < n; ++t) {
    for (int64_t c = 0; c < count; ++c) {
      to[c * room + t] = static_cast<uint16_t>(bits_of(slopes[t * stride + c]));
    }
  }
}

// out [count][width] = shares [count][room], of slots, times tokens in pairs.
inline void mixtures(const uint16_t* shares, int64_t count, int64_t room, const uint32_t* pairs,
                     int64_t width, float* out) {
  for (int64_t c = 0; c < count; c += kSquare) {
    for (int64_t f = 0; f < width; f += kSquare) {
      amx::multiply_square({shares + c * room, 2 * room, 2 * amx::kRows * room, 64},
                           {pairs + f, 4 * width, 64, 4 * amx::kRows * width}, room / kSquare,
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

// to [taps][..][width] += slopes [32][room] times the tokens from tap j on, for each tap and all
// features; taps of `to` are `apart` numbers apart. `pairs`: [2][count][width], of both parities.
inline void add_to_weight(const uint16_t* slopes, int64_t room, const uint32_t* pairs,
                          int64_t count, int64_t width, int64_t taps, float* to, int64_t apart) {
  constexpr int64_t kSteps = 8;  // so many tokens times 32, which the taps share
  for (int64_t f = 0; f < width; f += kSquare) {
    for (int64_t t = 0; t < room; t += kSteps * kSquare) {
      const int64_t steps = std::min(kSteps, (room - t) / kSquare);
      for (int64_t j = 0; j < taps; ++j) {
        const uint32_t* from = pairs + (j % 2 * count + (t + j) / 2) * width + f;
        amx::multiply_square({slopes + t, 2 * room, 2 * amx::kRows * room, 64},
                             {from, 4 * width, 64, 4 * amx::kRows * width}, steps,
                             to + j * apart + f, 4 * width, true);
      }
    }
  }
}

#endif

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire
