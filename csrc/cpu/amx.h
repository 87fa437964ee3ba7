// SPDX-License-Identifier: Apache-2.0
// Products on the tiles of AMX, of 16 rows of 64 bytes each: some rows of x times up to three
// blocks of a decoded weight, whose words lie as `vpdpbusd` and `vdpbf16ps` read them too.
#pragma once

#include <array>

#include "lanes16.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#if __has_include(<amxtileintrin.h>)  // a compiler so new comes with an assembler that knows them
#define COFIRE_AMX
#endif
#endif

#if defined(COFIRE_AMX)
#include <ATen/cpu/Utils.h>
#include <cpuid.h>
#endif

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace amx {

constexpr int64_t kRows = 16;   // of a tile
constexpr int64_t kWords = 16;  // four bytes each, of a row of a tile

#if defined(COFIRE_AMX)

// Whether this machine multiplies bytes and pairs of bf16 on tiles, and the system lets it; and
// rounds to bf16, which all such machines do, but a virtual one may hide it.
inline bool found() {
  static const bool is = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
    constexpr unsigned kRounds = 1u << 5;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAll) != kAll) return false;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & kRounds) != 0 &&
           at::cpu::init_amx();
  }();
  return is;
}

// The tile registers of this thread, given back at the end of its life. As `shape` makes them: 0 to
// 2 hold sums of some rows of x, 3 a part of those rows, so many words of each, and 4 to 6 the same
// words of the weight. As `square` does: all are whole.
class Registers {
 public:
  Registers() = default;
  Registers(Registers&& other) noexcept : rows_(other.rows_), words_(other.words_) {
    other.rows_ = 0;
  }
  Registers& operator=(Registers&&) = delete;
  ~Registers() {
    if (rows_ != 0) asm volatile("tilerelease");
  }

  // Shaped only where they are not yet so: it takes some 100 cycles.
  void shape(int64_t rows, int64_t words) {
    if (rows == rows_ && words == words_) return;
    Config config;
    for (int i = 0; i < 3; ++i) config.set(i, rows, kWords);
    config.set(3, rows, words);
    for (int i = 4; i < 7; ++i) config.set(i, words, kWords);
    config.load();
    rows_ = rows;
    words_ = words;
  }

  void square() {
    Config config;
    for (int i = 0; i < 8; ++i) config.set(i, kRows, kWords);
    config.load();
    rows_ = words_ = -1;
  }

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int i, int64_t count, int64_t width) {
      rows[i] = static_cast<uint8_t>(count);
      row_bytes[i] = static_cast<uint16_t>(4 * width);
    }
    void load() const { asm volatile("ldtilecfg %0" : : "m"(*this)); }
  };
  int64_t rows_ = 0, words_ = 0;
};

// In bf16, rounded to even: first those of `low`.
COFIRE_INLINE __m512i halves_of(__m512 low, __m512 high) {
  __m512i both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
  return both;
}

// Pairs of them.
COFIRE_INLINE __m512i pairs_of(__m512 first, __m512 second) {
  alignas(64) static constexpr auto kInterleaved = [] {
    std::array<uint16_t, 32> at{};
    for (uint16_t i = 0; i < 32; ++i) at[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    return at;
  }();
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved.data()), halves_of(first, second));
}

template <int Tile>
COFIRE_INLINE void load_tile(const void* data, int64_t row) {
  asm volatile("tileloadd (%0, %1, 1), %%tmm%c2" : : "r"(data), "r"(row), "i"(Tile) : "memory");
}
template <int Tile>
COFIRE_INLINE void store_tile(void* data, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0, %1, 1)" : : "r"(data), "r"(row), "i"(Tile) : "memory");
}
template <int Tile>
COFIRE_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}
// Sum += A B, of pairs of bf16.
template <int Sum, int A, int B>
COFIRE_INLINE void add_pairs() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(B), "i"(A), "i"(Sum));
}
// The same of signed bytes A and unsigned ones B.
template <int Sum, int A, int B>
COFIRE_INLINE void add_bytes() {
  asm volatile("tdpbsud %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(B), "i"(A), "i"(Sum));
}

// sums[r][3 * 16] = what `count` words of the rows of `x` give with those of `tile`: signed bytes
// of x times unsigned ones of the weight, or pairs of bf16. `x`: [count / words][rows][words];
// `tile`: [count][3 * 16], of which the first `Blocks` blocks of 16 are used; the sums of others
// stay what they were.
template <bool Pairs, int Blocks>
COFIRE_INLINE void multiply(const uint32_t* x, const uint8_t* tile, int64_t count, int64_t rows,
                            int64_t words, void* sums) {
  static_assert(kTileBlocks == 3 && Blocks >= 1 && Blocks <= kTileBlocks);
  constexpr int kX = 3, kFirst = 4;
  const int64_t x_row = 4 * words, row = 4 * kTileBlocks * kWords;
  asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2");
  for (int64_t q = 0; q < count; q += words, x += rows * words, tile += words * row) {
    load_tile<kX>(x, x_row);
    unrolled<Blocks>(
        [&](auto j) __attribute__((always_inline)) { load_tile<kFirst + j>(tile + 64 * j, row); });
    unrolled<Blocks>([&](auto j) __attribute__((always_inline)) {
      Pairs ? add_pairs<j, kX, kFirst + j>() : add_bytes<j, kX, kFirst + j>();
    });
  }
  unrolled<Blocks>([&](auto j) __attribute__((always_inline)) {
    store_tile<j>(static_cast<uint8_t*>(sums) + 64 * j, row);
  });
}

// Where a tile of pairs of bf16 and its successors lie: `row` bytes from row to row, `next` to the
// tile beside it, `step` to the one that is multiplied after it.
struct Factor {
  const void* data;
  int64_t row, next, step;
  bool ahead = false;  // whether the tiles of a first factor too are asked for
};

// Tiles that are not in the first cache are loaded line by line, and little else runs meanwhile:
// they are asked for so many steps ahead.
constexpr int64_t kAhead = 3;

template <int64_t Lines>
COFIRE_INLINE void ask_for_lines(const uint8_t* data, int64_t row) {
  COFIRE_UNROLL for (int64_t r = 0; r < Lines; ++r) {
    _mm_prefetch(reinterpret_cast<const char*>(data + r * row), _MM_HINT_T0);
  }
}
COFIRE_INLINE void ask_for_tile(const uint8_t* tile, int64_t row) {
  ask_for_lines<kRows>(tile, row);
}

// c [32][32] = (or +=) the sum over `steps` of a [32][32] b [32][32], of bf16; c's rows are
// `c_row` bytes apart. Rows of `a` and pairs of rows of `b` may overlap those beside them.
// The registers are square.
COFIRE_INLINE void multiply_square(Factor a, Factor b, int64_t steps, float* c, int64_t c_row,
                                   bool add) {
  auto* first = reinterpret_cast<uint8_t*>(c);
  auto* second = first + kRows * c_row;
  if (add) {
    load_tile<0>(first, c_row);
    load_tile<1>(first + 64, c_row);
    load_tile<2>(second, c_row);
    load_tile<3>(second + 64, c_row);
  } else {
    asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
  }
  const auto *x = static_cast<const uint8_t*>(a.data), *w = static_cast<const uint8_t*>(b.data);
  for (int64_t q = 0; q < steps; ++q, x += a.step, w += b.step) {
    load_tile<6>(w, b.row);
    load_tile<4>(x, a.row);
    add_pairs<0, 4, 6>();
    load_tile<7>(w + b.next, b.row);
    ask_for_tile(w + kAhead * b.step, b.row);
    if (a.ahead) ask_for_tile(x + kAhead * a.step, a.row);
    add_pairs<1, 4, 7>();
    load_tile<5>(x + a.next, a.row);
    add_pairs<2, 5, 6>();
    ask_for_tile(w + b.next + kAhead * b.step, b.row);
    if (a.ahead) ask_for_tile(x + a.next + kAhead * a.step, a.row);
    add_pairs<3, 5, 7>();
  }
  store_tile<0>(first, c_row);
  store_tile<1>(first + 64, c_row);
  store_tile<2>(second, c_row);
  store_tile<3>(second + 64, c_row);
}

constexpr int kSums = 6;  // tiles of `multiply_column` and `multiply_shifted`, at most

// c [tiles][16][16] = the sum over `rounds` of `steps` each of a [tiles][16][32] b [32][16], of
// bf16. Rows of a may overlap, also those of other tiles and steps; those of the next round, which
// are asked for a line with each product, begin `round` bytes after those of this one. Tiles of b
// follow each other. The sums stay in registers. The registers are square.
template <int Tiles = kSums>
inline void multiply_column(int64_t tiles, Factor a, int64_t round, const void* b, int64_t rounds,
                            int64_t steps, float* c) {
  if constexpr (Tiles > 1) {
    if (tiles < Tiles) return multiply_column<Tiles - 1>(tiles, a, round, b, rounds, steps, c);
  }
  constexpr int kA = 6, kB = 7;
  constexpr int64_t kRow = 4 * kWords, kTile = kRows * kRow;
  const auto *begin = static_cast<const uint8_t*>(a.data), *w = static_cast<const uint8_t*>(b);
  unrolled<Tiles>([&](auto i) { zero_tile<i>(); });
  for (int64_t k = 0; k < rounds; ++k, begin += round) {
    const uint8_t *x = begin, *next = begin + round;
    for (int64_t q = 0; q < steps; ++q, x += a.step, w += kTile) {
      load_tile<kB>(w, kRow);
      unrolled<Tiles>([&](auto i) __attribute__((always_inline)) {
        load_tile<kA>(x + i * a.next, a.row);
        add_pairs<i, kA, kB>();
        if constexpr (i == 0) ask_for_tile(w + kAhead * kTile, kRow);
        ask_for_lines<1>(next, kRow);
        next += kRow;
      });
    }
  }
  unrolled<Tiles>([&](auto i) { store_tile<i>(c + i * kRows * kWords, kRow); });
}

// For each of 1 to 6 shifts of b, `b.next` bytes each: c [shifts][16][16] += the sum over `steps`
// of a [16][32] b [32][16], of bf16. The sums stay in registers, and where shifts are short most of
// b's lines are those of the shift before. `next_c`, `next_a`: where what is needed next begins, of
// which a line each is asked for with each product. The registers are square.
template <int Shifts = kSums>
inline void multiply_shifted(int64_t shifts, Factor a, Factor b, int64_t steps, float* c,
                             const void* next_c, const void* next_a) {
  if constexpr (Shifts > 1) {
    if (shifts < Shifts) {
      return multiply_shifted<Shifts - 1>(shifts, a, b, steps, c, next_c, next_a);
    }
  }
  constexpr int kA = 6, kB = 7;
  constexpr int64_t kRow = 4 * kWords;
  const auto *x = static_cast<const uint8_t*>(a.data), *w = static_cast<const uint8_t*>(b.data);
  const auto* soon = static_cast<const uint8_t*>(next_c);
  const auto* later = static_cast<const char*>(next_a);
  unrolled<Shifts>([&](auto i) { load_tile<i>(c + i * kRows * kWords, kRow); });
  for (int64_t q = 0; q < steps; ++q, x += a.step, w += b.step) {
    load_tile<kA>(x, a.row);
    unrolled<Shifts>([&](auto i) __attribute__((always_inline)) {
      load_tile<kB>(w + i * b.next, b.row);
      add_pairs<i, kA, kB>();
      if constexpr (i == 0) ask_for_tile(x + kAhead * a.step, a.row);
      if constexpr (i == Shifts - 1) ask_for_tile(w + i * b.next + b.step, b.row);
      ask_for_lines<1>(soon, kRow);
      soon += kRow;
      _mm_prefetch(later, _MM_HINT_T1);
      later += kRow;
    });
  }
  unrolled<Shifts>([&](auto i) { store_tile<i>(c + i * kRows * kWords, kRow); });
}

// c [3][16][16] = a b, for unsigned numbers of 16 bits a, [16 rows] in two planes of their high and
// their low bytes, and signed ones b, whose low bytes are signed too: the products of the high
// bytes, those of a high and a low one, and those of the low bytes, over 64 `steps` numbers each.
// The registers are square. `a`: rows are `a_row` bytes apart; `b`: [numbers / 4][16][4].
COFIRE_INLINE void multiply_planes(const uint8_t* a_high, const uint8_t* a_low, int64_t a_row,
                                   const int8_t* b_high, const int8_t* b_low, int64_t steps,
                                   int32_t* c) {
  constexpr int64_t kRow = 64;
  asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2");
  for (int64_t q = 0; q < steps; ++q) {
    const int64_t tile = q * kRows * kRow;
    load_tile<3>(a_high + q * kRow, a_row);
    load_tile<5>(b_high + tile, kRow);
    load_tile<4>(a_low + q * kRow, a_row);
    load_tile<6>(b_low + tile, kRow);
    asm volatile(
        "tdpbusd %tmm5, %tmm3, %tmm0\n\t"
        "tdpbusd %tmm5, %tmm4, %tmm1\n\t"
        "tdpbusd %tmm6, %tmm4, %tmm2\n\t"
        "tdpbusd %tmm6, %tmm3, %tmm1");
  }
  store_tile<0>(c, kRow);
  store_tile<1>(c + 256, kRow);
  store_tile<2>(c + 512, kRow);
}

#else

inline bool found() { return false; }

#endif

}  // namespace amx
}  // namespace CPU_CAPABILITY
}  // namespace cofire
