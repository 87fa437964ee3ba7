// SPDX-License-Identifier: Apache-2.0
// Sixteen lanes of floats (F16) and of 32-bit words (W16), in one AVX-512
// register, two of AVX2, or an array. What at::vec has no word for: products of
// bytes, and tables in registers.
#pragma once

#include <bit>
#include <utility>

#include "vec.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

#define COFIRE_INLINE inline __attribute__((always_inline))

namespace cofire {
inline namespace CPU_CAPABILITY {

// How the products of bytes, unsigned by signed, are summed up to 32 bits: by one instruction; over
// 16 bits that hold the sums of a whole step (unsigned ones below 16), or those of a pair (below
// 128); or with every byte widened first, by each product or beforehand: kShorts.
enum class Bytes { kVnni, kNarrow, kPairs, kShorts, kWide };

// dot(acc, w, x): acc + the products of the four unsigned bytes of each lane of w with the four
// signed ones of x. For kNarrow the sums stay in 16 bits: `widened` adds them up. For kShorts a
// lane is two numbers of 16 bits.

// Calls f with the constants 0 to N - 1.
template <int N, typename F>
COFIRE_INLINE void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

#if defined(CPU_CAPABILITY_AVX512)

struct F16 {
  __m512 v;
  static COFIRE_INLINE F16 zero() { return {_mm512_setzero_ps()}; }
  static COFIRE_INLINE F16 all(float x) { return {_mm512_set1_ps(x)}; }
  static COFIRE_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  COFIRE_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
};
struct W16 {
  __m512i v;
  static COFIRE_INLINE W16 zero() { return {_mm512_setzero_si512()}; }
  static COFIRE_INLINE W16 all(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static COFIRE_INLINE W16 load(const void* p) { return {_mm512_loadu_si512(p)}; }
  static COFIRE_INLINE W16 from_bytes(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  COFIRE_INLINE void store(void* p) const { _mm512_storeu_si512(p, v); }
};
COFIRE_INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
COFIRE_INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
COFIRE_INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
COFIRE_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
COFIRE_INLINE W16 operator|(W16 a, W16 b) { return {_mm512_or_si512(a.v, b.v)}; }
COFIRE_INLINE W16 operator&(W16 a, W16 b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int S>
COFIRE_INLINE W16 shift_right(W16 a) {
  if constexpr (S == 0) return a;
  return {_mm512_srli_epi32(a.v, S)};
}
template <int S>
COFIRE_INLINE W16 shift_left(W16 a) {
  if constexpr (S == 0) return a;
  return {_mm512_slli_epi32(a.v, S)};
}
// Byte I of each lane, as a number.
template <int I>
COFIRE_INLINE W16 byte_of(W16 a) {
  if constexpr (I == 3) return shift_right<24>(a);
  return shift_right<8 * I>(a) & W16::all(255);
}
// Byte I of each lane as its highest one, zeros below.
template <int I>
COFIRE_INLINE W16 byte_on_top(W16 a) {
  return shift_left<24 - 8 * I>(a) & W16::all(0xff000000u);
}
template <int S>
COFIRE_INLINE W16 shift_right_signed(W16 a) {
  return {_mm512_srai_epi32(a.v, S)};
}
COFIRE_INLINE F16 as_float(W16 a) { return {_mm512_castsi512_ps(a.v)}; }
COFIRE_INLINE float sum_of(F16 a) { return reduce_add(Vec(a.v)); }
COFIRE_INLINE F16 to_float(W16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
COFIRE_INLINE W16 bits_of(F16 a) { return {_mm512_castps_si512(a.v)}; }
// Keeps a product from being fused into the addition that follows it.
COFIRE_INLINE F16 rounded(F16 a) {
#ifndef _MSC_VER
  asm("" : "+v"(a.v));
#endif
  return a;
}

// Table of 16 floats; of each index the lowest four bits count.
struct Table16 {
  __m512 v;
  explicit COFIRE_INLINE Table16(const float* p) : v(_mm512_loadu_ps(p)) {}
  COFIRE_INLINE F16 operator[](W16 i) const { return {_mm512_permutexvar_ps(i.v, v)}; }
};
COFIRE_INLINE F16 gather(const float* table, W16 i) { return {_mm512_i32gather_ps(i.v, table, 4)}; }
// The same of eight floats, which takes one instruction everywhere; the lowest three bits count.
struct Table8 {
  __m512 v;
  explicit COFIRE_INLINE Table8(const float* p) : v(_mm512_broadcast_f32x8(_mm256_loadu_ps(p))) {}
  COFIRE_INLINE F16 operator[](W16 i) const { return {_mm512_permutexvar_ps(i.v, v)}; }
};
// Of each of 64 bytes.
COFIRE_INLINE W16 add_bytes(W16 a, W16 b) { return {_mm512_add_epi8(a.v, b.v)}; }
COFIRE_INLINE W16 min_bytes(W16 a, W16 b) { return {_mm512_min_epu8(a.v, b.v)}; }
COFIRE_INLINE int least_byte(W16 a) {
  const __m256i half =
      _mm256_min_epu8(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
  const __m128i x = _mm_min_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i pairs = _mm_min_epu8(_mm_srli_epi16(x, 8), _mm_and_si128(x, _mm_set1_epi16(255)));
  return _mm_cvtsi128_si32(_mm_minpos_epu16(pairs)) & 255;
}
COFIRE_INLINE W16 subtract_bytes(W16 a, W16 b) { return {_mm512_sub_epi8(a.v, b.v)}; }
// Numbers of 16 bits whose low bytes are those of a and whose high bytes are those of b: one half
// of them and the other, in an order of their own.
COFIRE_INLINE W16 first_pairs(W16 a, W16 b) { return {_mm512_unpacklo_epi8(a.v, b.v)}; }
COFIRE_INLINE W16 second_pairs(W16 a, W16 b) { return {_mm512_unpackhi_epi8(a.v, b.v)}; }
// Products of fractions of 15 bits and a sign, rounded.
COFIRE_INLINE W16 fraction_products(W16 a, W16 b) { return {_mm512_mulhrs_epi16(a.v, b.v)}; }
// acc + the two products of signed 16-bit numbers in each lane.
COFIRE_INLINE W16 dot_pairs(W16 acc, W16 a, W16 b) {
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(a.v, b.v))};
}
// Table of 16 bytes for each of 64 bytes below 16.
struct Bytes16 {
  __m512i v;
  explicit COFIRE_INLINE Bytes16(const uint8_t* p)
      : v(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) {}
  COFIRE_INLINE W16 operator[](W16 i) const { return {_mm512_shuffle_epi8(v, i.v)}; }
};

template <Bytes Kind>
COFIRE_INLINE W16 dot(W16 acc, W16 w, W16 x) {
#ifndef _MSC_VER
  if constexpr (Kind == Bytes::kVnni) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
    return acc;
  }
#endif
  // Exact for all bytes: in pairs of 16 bits, even and odd ones apart.
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w.v, _mm512_set1_epi16(255)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(x.v, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w.v, 8), _mm512_srai_epi16(x.v, 8));
  return {_mm512_add_epi32(acc.v, _mm512_add_epi32(even, odd))};
}

template <Bytes Kind>
COFIRE_INLINE W16 widened(W16 acc, W16 sums) {
  return {_mm512_add_epi32(acc.v, sums.v)};
}

#ifndef _MSC_VER
// acc + the two products of bf16 in each lane; for machines that have AVX512_BF16.
COFIRE_INLINE F16 dot_bf16(F16 acc, W16 w, W16 x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
  return acc;
}
#endif
// Table of 32 numbers of 16 bits for each of 32; of each index the lowest five bits count.
struct Halves32 {
  __m512i v;
  explicit COFIRE_INLINE Halves32(const uint16_t* p) : v(_mm512_loadu_si512(p)) {}
  COFIRE_INLINE W16 operator[](W16 i) const { return {_mm512_permutexvar_epi16(i.v, v)}; }
};

// The rows and blocks of a tile; the rows that are multiplied while decoding, and up to how many
// they are taken in such parts, of floats and of bytes; the size of a tile of bytes or pairs; their
// sums in registers; whether a table of floats beats a conversion, and a table of bytes and a
// conversion beats one of floats.
constexpr int kTileRows = 8, kTileBlocks = 3, kFewRows = 4, kSums = 16;
constexpr int kFewFloats = 4, kFewBytes = 4, kTileBytes = 24 << 10;
// Of words of bytes or of pairs: the rows of a tile whose sums over all groups stay in registers
// beside those of one, and the rows that are multiplied while decoding.
constexpr int kWordRows = 4, kFewWordRows = 12;
constexpr bool kLookup = true, kByteTables = false;

#elif defined(CPU_CAPABILITY_AVX2)

struct F16 {
  __m256 a, b;
  static COFIRE_INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static COFIRE_INLINE F16 all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static COFIRE_INLINE F16 load(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
  COFIRE_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
};
struct W16 {
  __m256i a, b;
  static COFIRE_INLINE W16 zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static COFIRE_INLINE W16 all(uint32_t x) {
    const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
    return {v, v};
  }
  static COFIRE_INLINE W16 load(const void* p) {
    const auto* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static COFIRE_INLINE W16 from_bytes(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  COFIRE_INLINE void store(void* p) const {
    auto* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, a);
    _mm256_storeu_si256(q + 1, b);
  }
};
COFIRE_INLINE F16 operator+(F16 x, F16 y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
COFIRE_INLINE F16 operator-(F16 x, F16 y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
COFIRE_INLINE F16 operator*(F16 x, F16 y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
COFIRE_INLINE F16 fma(F16 x, F16 y, F16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
COFIRE_INLINE W16 operator|(W16 x, W16 y) {
  return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
}
COFIRE_INLINE W16 operator&(W16 x, W16 y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
template <int S>
COFIRE_INLINE W16 shift_right(W16 x) {
  if constexpr (S == 0) return x;
  return {_mm256_srli_epi32(x.a, S), _mm256_srli_epi32(x.b, S)};
}
template <int S>
COFIRE_INLINE W16 shift_left(W16 x) {
  if constexpr (S == 0) return x;
  return {_mm256_slli_epi32(x.a, S), _mm256_slli_epi32(x.b, S)};
}
template <int I>
COFIRE_INLINE W16 byte_of(W16 x) {
  if constexpr (I == 0) return x & W16::all(255);
  if constexpr (I == 3) return shift_right<24>(x);
  // One instruction in place of a shift and a mask.
  constexpr int none = static_cast<int>(0x80808000u);
  const __m256i pick = _mm256_broadcastsi128_si256(
      _mm_setr_epi32(none + I, none + I + 4, none + I + 8, none + I + 12));
  return {_mm256_shuffle_epi8(x.a, pick), _mm256_shuffle_epi8(x.b, pick)};
}
template <int I>
COFIRE_INLINE W16 byte_on_top(W16 x) {
  if constexpr (I == 0) return shift_left<24>(x);
  constexpr int none = 0x00808080;
  const __m256i pick = _mm256_broadcastsi128_si256(_mm_setr_epi32(
      none | I << 24, none | (I + 4) << 24, none | (I + 8) << 24, none | (I + 12) << 24));
  return {_mm256_shuffle_epi8(x.a, pick), _mm256_shuffle_epi8(x.b, pick)};
}
template <int S>
COFIRE_INLINE W16 shift_right_signed(W16 x) {
  return {_mm256_srai_epi32(x.a, S), _mm256_srai_epi32(x.b, S)};
}
COFIRE_INLINE F16 as_float(W16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
COFIRE_INLINE W16 bits_of(F16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
COFIRE_INLINE float sum_of(F16 x) { return reduce_add(Vec(_mm256_add_ps(x.a, x.b))); }
COFIRE_INLINE F16 to_float(W16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
COFIRE_INLINE F16 rounded(F16 x) {
#ifndef _MSC_VER
  asm("" : "+x"(x.a), "+x"(x.b));
#endif
  return x;
}
struct Table16 {
  __m256 low, high;
  explicit COFIRE_INLINE Table16(const float* p)
      : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
  COFIRE_INLINE __m256 half(__m256i i) const {  // bit 3 of the index chooses the half
    const __m256 pick = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                            pick);
  }
  COFIRE_INLINE F16 operator[](W16 i) const { return {half(i.a), half(i.b)}; }
};
COFIRE_INLINE F16 gather(const float* table, W16 i) {
  return {_mm256_i32gather_ps(table, i.a, 4), _mm256_i32gather_ps(table, i.b, 4)};
}
struct Bytes16 {
  __m256i v;
  explicit COFIRE_INLINE Bytes16(const uint8_t* p)
      : v(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) {}
  COFIRE_INLINE W16 operator[](W16 i) const {
    return {_mm256_shuffle_epi8(v, i.a), _mm256_shuffle_epi8(v, i.b)};
  }
};
// Keeps sums of integers in the order in which they are written: compilers turn them into trees,
// whose leaves fit in no register file (a tile of 4 bits: 2.4 times as long).
COFIRE_INLINE __m256i in_order(__m256i x) {
#ifndef _MSC_VER
  asm("" : "+x"(x));
#endif
  return x;
}
struct Table8 {
  __m256 v;
  explicit COFIRE_INLINE Table8(const float* p) : v(_mm256_loadu_ps(p)) {}
  COFIRE_INLINE F16 operator[](W16 i) const {
    return {_mm256_permutevar8x32_ps(v, i.a), _mm256_permutevar8x32_ps(v, i.b)};
  }
};
// acc + x by bytes, and by words: compilers would make trees of such sums, or exchange them for
// others in memory.
COFIRE_INLINE __m256i added_bytes(__m256i acc, __m256i x) {
#ifndef _MSC_VER
  asm("vpaddb %1, %0, %0" : "+x"(acc) : "x"(x));
  return acc;
#else
  return _mm256_add_epi8(acc, x);
#endif
}
COFIRE_INLINE __m256i added(__m256i acc, __m256i x) {
#ifndef _MSC_VER
  asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(x));
  return acc;
#else
  return _mm256_add_epi32(acc, x);
#endif
}
COFIRE_INLINE W16 add_bytes(W16 acc, W16 x) {
  return {added_bytes(acc.a, x.a), added_bytes(acc.b, x.b)};
}
COFIRE_INLINE W16 min_bytes(W16 x, W16 y) {
  return {_mm256_min_epu8(x.a, y.a), _mm256_min_epu8(x.b, y.b)};
}
COFIRE_INLINE int least_byte(W16 a) {
  const __m256i half = _mm256_min_epu8(a.a, a.b);
  const __m128i x = _mm_min_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i pairs = _mm_min_epu8(_mm_srli_epi16(x, 8), _mm_and_si128(x, _mm_set1_epi16(255)));
  return _mm_cvtsi128_si32(_mm_minpos_epu16(pairs)) & 255;
}
COFIRE_INLINE W16 subtract_bytes(W16 x, W16 y) {
  return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)};
}
COFIRE_INLINE W16 first_pairs(W16 x, W16 y) {
  return {_mm256_unpacklo_epi8(x.a, y.a), _mm256_unpacklo_epi8(x.b, y.b)};
}
COFIRE_INLINE W16 second_pairs(W16 x, W16 y) {
  return {_mm256_unpackhi_epi8(x.a, y.a), _mm256_unpackhi_epi8(x.b, y.b)};
}
COFIRE_INLINE W16 fraction_products(W16 x, W16 y) {
  return {_mm256_mulhrs_epi16(x.a, y.a), _mm256_mulhrs_epi16(x.b, y.b)};
}
COFIRE_INLINE W16 dot_pairs(W16 acc, W16 x, W16 y) {
  return {added(acc.a, _mm256_madd_epi16(x.a, y.a)), added(acc.b, _mm256_madd_epi16(x.b, y.b))};
}
template <Bytes Kind>
COFIRE_INLINE __m256i dot_half(__m256i acc, __m256i w, __m256i x) {
  if constexpr (Kind == Bytes::kNarrow) {
    return in_order(_mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x)));
  }
  if constexpr (Kind == Bytes::kPairs) {
    return in_order(
        _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1))));
  }
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return in_order(_mm256_add_epi32(acc, _mm256_add_epi32(even, odd)));
}
template <Bytes Kind>
COFIRE_INLINE W16 dot(W16 acc, W16 w, W16 x) {
  if constexpr (Kind == Bytes::kShorts) return dot_pairs(acc, w, x);
  return {dot_half<Kind>(acc.a, w.a, x.a), dot_half<Kind>(acc.b, w.b, x.b)};
}
template <Bytes Kind>
COFIRE_INLINE W16 widened(W16 acc, W16 sums) {
  if constexpr (Kind == Bytes::kNarrow) {
    const __m256i one = _mm256_set1_epi16(1);
    sums = {_mm256_madd_epi16(sums.a, one), _mm256_madd_epi16(sums.b, one)};
  }
  return {_mm256_add_epi32(acc.a, sums.a), _mm256_add_epi32(acc.b, sums.b)};
}

constexpr int kTileRows = 6, kTileBlocks = 1, kFewRows = 4, kSums = 4;
constexpr int kWordRows = kTileRows, kFewWordRows = kFewRows;
constexpr int kFewFloats = 8, kFewBytes = 4, kTileBytes = 24 << 10;
constexpr bool kLookup = false, kByteTables = true;

#else

struct F16 {
  float v[16];
  static COFIRE_INLINE F16 all(float x) {
    F16 r;
    for (float& e : r.v) e = x;
    return r;
  }
  static COFIRE_INLINE F16 zero() { return all(0.0f); }
  static COFIRE_INLINE F16 load(const float* p) {
    F16 r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  COFIRE_INLINE void store(float* p) const { std::memcpy(p, v, sizeof(v)); }
};
struct W16 {
  uint32_t v[16];
  static COFIRE_INLINE W16 all(uint32_t x) {
    W16 r;
    for (uint32_t& e : r.v) e = x;
    return r;
  }
  static COFIRE_INLINE W16 zero() { return all(0); }
  static COFIRE_INLINE W16 load(const void* p) {
    W16 r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static COFIRE_INLINE W16 from_bytes(const uint8_t* p) {
    W16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
  }
  COFIRE_INLINE void store(void* p) const { std::memcpy(p, v, sizeof(v)); }
};
#define COFIRE_LANES(T, expression)                 \
  T r;                                              \
  for (int i = 0; i < 16; ++i) r.v[i] = expression; \
  return r;
COFIRE_INLINE F16 operator+(F16 a, F16 b){
    COFIRE_LANES(F16, a.v[i] + b.v[i])} COFIRE_INLINE F16 operator-(F16 a, F16 b){
    COFIRE_LANES(F16, a.v[i] - b.v[i])} COFIRE_INLINE F16 operator*(F16 a, F16 b){
    COFIRE_LANES(F16, a.v[i] * b.v[i])} COFIRE_INLINE F16 fma(F16 a, F16 b, F16 c){
    COFIRE_LANES(F16, a.v[i] * b.v[i] + c.v[i])} COFIRE_INLINE W16 operator|(W16 a, W16 b){
    COFIRE_LANES(W16, a.v[i] | b.v[i])} COFIRE_INLINE W16 operator&(W16 a, W16 b){
    COFIRE_LANES(W16, a.v[i] & b.v[i])} COFIRE_INLINE float sum_of(F16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}
template <int S>
COFIRE_INLINE W16 shift_right(W16 a) {
  COFIRE_LANES(W16, a.v[i] >> S)
}
template <int I>
COFIRE_INLINE W16 byte_of(W16 a) {
  COFIRE_LANES(W16, a.v[i] >> (8 * I) & 255)
}
template <int S>
COFIRE_INLINE W16 shift_left(W16 a) {
  COFIRE_LANES(W16, a.v[i] << S)
}
template <int I>
COFIRE_INLINE W16 byte_on_top(W16 a) {
  COFIRE_LANES(W16, a.v[i] << (24 - 8 * I) & 0xff000000u)
}
template <int S>
COFIRE_INLINE W16 shift_right_signed(W16 a){
    COFIRE_LANES(W16, static_cast<uint32_t>(static_cast<int32_t>(a.v[i]) >> S))} COFIRE_INLINE F16
    as_float(W16 a) {
  return std::bit_cast<F16>(a);
}
COFIRE_INLINE W16 bits_of(F16 a) { return std::bit_cast<W16>(a); }
COFIRE_INLINE F16 to_float(W16 a){
    COFIRE_LANES(F16, static_cast<float>(static_cast<int32_t>(a.v[i])))} COFIRE_INLINE F16
    rounded(F16 a) {
#ifndef _MSC_VER
  asm("" : "+m"(a.v));
#endif
  return a;
}
struct Table16 {
  float v[16];
  explicit COFIRE_INLINE Table16(const float* p) { std::memcpy(v, p, sizeof(v)); }
  COFIRE_INLINE F16 operator[](W16 j) const { COFIRE_LANES(F16, v[j.v[i] & 15]) }
};
COFIRE_INLINE F16 gather(const float* table, W16 j) { COFIRE_LANES(F16, table[j.v[i]]) }
struct Bytes16 {
  uint8_t v[16];
  explicit COFIRE_INLINE Bytes16(const uint8_t* p) { std::memcpy(v, p, 16); }
  COFIRE_INLINE W16 operator[](W16 j) const {
    const auto byte = [&](uint32_t w, int s) { return uint32_t(v[w >> s & 15]) << s; };
    COFIRE_LANES(W16, byte(j.v[i], 0) | byte(j.v[i], 8) | byte(j.v[i], 16) | byte(j.v[i], 24))
  }
};
struct Table8 {
  float v[8];
  explicit COFIRE_INLINE Table8(const float* p) { std::memcpy(v, p, sizeof(v)); }
  COFIRE_INLINE F16 operator[](W16 j) const { COFIRE_LANES(F16, v[j.v[i] & 7]) }
};
template <typename F>
COFIRE_INLINE W16 by_bytes(W16 a, W16 b, F&& f) {
  uint8_t x[64], y[64];
  a.store(x);
  b.store(y);
  for (int i = 0; i < 64; ++i) x[i] = f(x[i], y[i]);
  return W16::load(x);
}
COFIRE_INLINE W16 add_bytes(W16 a, W16 b) {
  return by_bytes(a, b, [](uint8_t x, uint8_t y) { return static_cast<uint8_t>(x + y); });
}
COFIRE_INLINE W16 min_bytes(W16 a, W16 b) {
  return by_bytes(a, b, [](uint8_t x, uint8_t y) { return x < y ? x : y; });
}
COFIRE_INLINE int least_byte(W16 a) {
  uint8_t x[64];
  a.store(x);
  uint8_t least = x[0];
  for (const uint8_t e : x) least = e < least ? e : least;
  return least;
}
COFIRE_INLINE W16 subtract_bytes(W16 a, W16 b) {
  return by_bytes(a, b, [](uint8_t x, uint8_t y) { return static_cast<uint8_t>(x - y); });
}
COFIRE_INLINE W16 pairs_from(W16 a, W16 b, int first) {
  uint8_t x[64], y[64], z[64];
  a.store(x);
  b.store(y);
  for (int i = 0; i < 32; ++i) {
    z[2 * i] = x[first + i];
    z[2 * i + 1] = y[first + i];
  }
  return W16::load(z);
}
COFIRE_INLINE W16 first_pairs(W16 a, W16 b) { return pairs_from(a, b, 0); }
COFIRE_INLINE W16 second_pairs(W16 a, W16 b) { return pairs_from(a, b, 32); }
COFIRE_INLINE W16 fraction_products(W16 a, W16 b) {
  int16_t x[32], y[32];
  a.store(x);
  b.store(y);
  for (int i = 0; i < 32; ++i) x[i] = static_cast<int16_t>((x[i] * y[i] + (1 << 14)) >> 15);
  return W16::load(x);
}
COFIRE_INLINE W16 dot_pairs(W16 acc, W16 a, W16 b) {
  int16_t x[32], y[32];
  a.store(x);
  b.store(y);
  COFIRE_LANES(W16,
               acc.v[i] + static_cast<uint32_t>(x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1]))
}
template <Bytes Kind>
COFIRE_INLINE W16 dot(W16 acc, W16 w, W16 x) {
  const auto product = [](uint32_t u, uint32_t s, int shift) {
    return static_cast<uint32_t>(static_cast<int32_t>(u >> shift & 255) *
                                 static_cast<int8_t>(s >> shift));
  };
  COFIRE_LANES(W16, acc.v[i] + product(w.v[i], x.v[i], 0) + product(w.v[i], x.v[i], 8) +
                        product(w.v[i], x.v[i], 16) + product(w.v[i], x.v[i], 24))
}
template <Bytes Kind>
COFIRE_INLINE W16 widened(W16 acc, W16 sums) {
  COFIRE_LANES(W16, acc.v[i] + sums.v[i])
}
#undef COFIRE_LANES

constexpr int kTileRows = 2, kTileBlocks = 1, kFewRows = 1, kSums = 1;
constexpr int kWordRows = kTileRows, kFewWordRows = kFewRows;
constexpr int kFewFloats = 2, kFewBytes = 2, kTileBytes = 16 << 10;
constexpr bool kLookup = false, kByteTables = false;

#endif

// One product of floats that no compiler fuses with what follows.
COFIRE_INLINE float rounded(float x) {
#if defined(_MSC_VER)
  return x;
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
