// SPDX-License-Identifier: Apache-2.0
// What products of bytes read: rows of floats rounded to bytes, sums of bytes, and rows that stand
// side by side word by word.
#pragma once

#include <algorithm>
#include <cmath>

#include "lanes16.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

// The larger of two signed words, the largest of sixteen, and the lowest byte of each.
#if defined(CPU_CAPABILITY_AVX512)
COFIRE_INLINE W16 larger_words(W16 a, W16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
COFIRE_INLINE int32_t largest_word(W16 a) { return _mm512_reduce_max_epi32(a.v); }
COFIRE_INLINE void store_low_bytes(W16 a, int8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// 64 floats, below 128 in magnitude, rounded to bytes, halves to even.
COFIRE_INLINE void store_bytes(F16 a, F16 b, F16 c, F16 d, int8_t* p) {
  const __m512i first = _mm512_packs_epi32(_mm512_cvtps_epi32(a.v), _mm512_cvtps_epi32(b.v));
  const __m512i second = _mm512_packs_epi32(_mm512_cvtps_epi32(c.v), _mm512_cvtps_epi32(d.v));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(first, second));
  _mm512_storeu_si512(p, bytes);
}
#elif defined(CPU_CAPABILITY_AVX2)
COFIRE_INLINE W16 larger_words(W16 x, W16 y) {
  return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)};
}
COFIRE_INLINE int32_t largest_word(W16 x) {
  const __m256i half = _mm256_max_epi32(x.a, x.b);
  __m128i v = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
}
COFIRE_INLINE void store_low_bytes(W16 x, int8_t* p) {
  const __m256i low = _mm256_set1_epi32(255);
  const __m256i halves = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low)), 0xd8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
#else
COFIRE_INLINE W16 larger_words(W16 a, W16 b) {
  for (int i = 0; i < 16; ++i) {
    if (static_cast<int32_t>(a.v[i]) < static_cast<int32_t>(b.v[i])) a.v[i] = b.v[i];
  }
  return a;
}
COFIRE_INLINE int32_t largest_word(W16 a) {
  auto most = static_cast<int32_t>(a.v[0]);
  for (const uint32_t word : a.v) most = std::max(most, static_cast<int32_t>(word));
  return most;
}
COFIRE_INLINE void store_low_bytes(W16 a, int8_t* p) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
#endif

// Magnitudes of floats as integers, of which that of a NaN is the largest.
COFIRE_INLINE W16 magnitudes(F16 a) { return bits_of(a) & W16::all(0x7fffffff); }

// The largest magnitude of n floats, a multiple of 32; NaN if there is one.
inline float largest_magnitude(const float* x, int64_t n) {
  W16 most = W16::zero(), other = W16::zero();
  for (int64_t i = 0; i < n; i += 32) {
    most = larger_words(most, magnitudes(F16::load(x + i)));
    other = larger_words(other, magnitudes(F16::load(x + i + 16)));
  }
  return std::bit_cast<float>(largest_word(larger_words(most, other)));
}

// Rounds a row of n floats, a multiple of 32, to symmetric bytes, halves to even, and returns the
// scale. Zeros where the scale is zero, infinite or NaN.
inline float round_to_bytes(const float* x, int64_t n, int8_t* out) {
  const float scale = largest_magnitude(x, n) / 127;
  if (!(scale > 0) || !std::isfinite(scale)) {
    std::fill(out, out + n, 0);
    return scale;
  }
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  // Quotients as a division rounds them (Markstein, 1990): a product with the inverse, and what it
  // leaves of the dividend. Of a smaller scale that may have no float.
  constexpr float kLeast = 1e-25f;
  if (scale >= kLeast) {
    const F16 inverse = F16::all(1 / scale), divisor = F16::all(-scale), magic = F16::all(kMagic);
    const auto quotient = [&](int64_t i) __attribute__((always_inline)) {
      const F16 value = F16::load(x + i), near = rounded(value * inverse);
      return fma(fma(near, divisor, value), inverse, near);
    };
    int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
    for (; i + 64 <= n; i += 64) {
      store_bytes(quotient(i), quotient(i + 16), quotient(i + 32), quotient(i + 48), out + i);
    }
#endif
    for (; i < n; i += 16) store_low_bytes(bits_of(quotient(i) + magic), out + i);
    return scale;
  }
#endif
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<int8_t>(std::bit_cast<int32_t>(x[i] / scale + kMagic));
  }
  return scale;
}

inline int32_t sum_of_bytes(const int8_t* p, int64_t n) {
  int32_t sum = 0;
  int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  // There is an instruction for sums of unsigned bytes: 128 is added to each, and taken off.
  const __m256i flip = _mm256_set1_epi8(-128);
  __m256i sums = _mm256_setzero_si256();
  for (; i + 32 <= n; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
    sums = _mm256_add_epi64(sums,
                            _mm256_sad_epu8(_mm256_xor_si256(bytes, flip), _mm256_setzero_si256()));
  }
  const __m128i half =
      _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  sum = _mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 2) - static_cast<int32_t>(128 * i);
#endif
  for (; i < n; ++i) sum += p[i];
  return sum;
}

constexpr int kWoven = 4;

// to[word * apart + r] = rows[r][word], of `count` <= kWoven rows and a multiple of 4 words.
inline void side_by_side_words(const uint32_t* const (&rows)[kWoven], int count, int64_t words,
                               uint32_t* to, int64_t apart) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if (count == kWoven) {
    for (int64_t w = 0; w < words; w += 4, to += 4 * apart) {
      const auto four = [&](int r) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + w));
      };
      const auto keep = [&](int i, __m128i v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * apart), v);
      };
      const __m128i a = four(0), b = four(1), c = four(2), d = four(3);
      const __m128i low = _mm_unpacklo_epi32(a, b), high = _mm_unpackhi_epi32(a, b);
      const __m128i low2 = _mm_unpacklo_epi32(c, d), high2 = _mm_unpackhi_epi32(c, d);
      keep(0, _mm_unpacklo_epi64(low, low2));
      keep(1, _mm_unpackhi_epi64(low, low2));
      keep(2, _mm_unpacklo_epi64(high, high2));
      keep(3, _mm_unpackhi_epi64(high, high2));
    }
    return;
  }
  if (count == 2) {
    for (int64_t w = 0; w < words; w += 4, to += 4 * apart) {
      const auto four = [&](int r) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + w));
      };
      const auto keep = [&](int i, __m128i v) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i * apart), v);
        _mm_storeh_pd(reinterpret_cast<double*>(to + (i + 1) * apart), _mm_castsi128_pd(v));
      };
      const __m128i a = four(0), b = four(1);
      keep(0, _mm_unpacklo_epi32(a, b));
      keep(2, _mm_unpackhi_epi32(a, b));
    }
    return;
  }
#endif
  for (int r = 0; r < count; ++r) {
    for (int64_t w = 0; w < words; ++w) to[w * apart + r] = rows[r][w];
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
