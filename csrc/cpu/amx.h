// SPDX-License-Identifier: Apache-2.0
// Products on the tiles of AMX, of 16 rows of 64 bytes each: some rows of x times three blocks of
// a decoded weight, whose words lie as `vpdpbusd` and `vdpbf16ps` read them too.
#pragma once

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

// Whether this machine multiplies bytes and pairs of bf16 on tiles, and the system lets it.
inline bool found() {
  static const bool is = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAll) == kAll &&
           at::cpu::init_amx();
  }();
  return is;
}

// The tile registers of this thread: 0 to 2 hold sums of some rows of x, 3 a part of those rows, so
// many words of each, and 4 to 6 the same words of the weight. Given back at the end of its life.
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
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const auto set = [&](int i, int64_t count, int64_t width) {
      config.rows[i] = static_cast<uint8_t>(count);
      config.row_bytes[i] = static_cast<uint16_t>(4 * width);
    };
    for (int i = 0; i < 3; ++i) set(i, rows, kWords);
    set(3, rows, words);
    for (int i = 4; i < 7; ++i) set(i, words, kWords);
    asm volatile("ldtilecfg %0" : : "m"(config));
    rows_ = rows;
    words_ = words;
  }

 private:
  int64_t rows_ = 0, words_ = 0;
};

// sums[r][3 * 16] = what `count` words of the rows of `x` give with those of `tile`: signed bytes
// of x times unsigned ones of the weight, or pairs of bf16. `x`: [count / words][rows][words];
// `tile`: [count][3 * 16].
template <bool Pairs>
COFIRE_INLINE void multiply(const uint32_t* x, const uint8_t* tile, int64_t count, int64_t rows,
                            int64_t words, void* sums) {
  static_assert(kTileBlocks == 3);
  const int64_t x_row = 4 * words, row = 4 * 3 * kWords;
  asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2");
  for (int64_t q = 0; q < count; q += words, x += rows * words, tile += words * row) {
    asm volatile("tileloadd (%0, %1, 1), %%tmm3" : : "r"(x), "r"(x_row) : "memory");
    asm volatile("tileloadd (%0, %1, 1), %%tmm4" : : "r"(tile), "r"(row) : "memory");
    asm volatile("tileloadd (%0, %1, 1), %%tmm5" : : "r"(tile + 64), "r"(row) : "memory");
    asm volatile("tileloadd (%0, %1, 1), %%tmm6" : : "r"(tile + 128), "r"(row) : "memory");
    if constexpr (Pairs) {
      asm volatile(
          "tdpbf16ps %tmm4, %tmm3, %tmm0\n\t"
          "tdpbf16ps %tmm5, %tmm3, %tmm1\n\t"
          "tdpbf16ps %tmm6, %tmm3, %tmm2");
    } else {
      asm volatile(
          "tdpbsud %tmm4, %tmm3, %tmm0\n\t"
          "tdpbsud %tmm5, %tmm3, %tmm1\n\t"
          "tdpbsud %tmm6, %tmm3, %tmm2");
    }
  }
  auto* to = static_cast<uint8_t*>(sums);
  asm volatile("tilestored %%tmm0, (%0, %1, 1)" : : "r"(to), "r"(row) : "memory");
  asm volatile("tilestored %%tmm1, (%0, %1, 1)" : : "r"(to + 64), "r"(row) : "memory");
  asm volatile("tilestored %%tmm2, (%0, %1, 1)" : : "r"(to + 128), "r"(row) : "memory");
}

#else

inline bool found() { return false; }

#endif

}  // namespace amx
}  // namespace CPU_CAPABILITY
}  // namespace cofire
