// SPDX-License-Identifier: Apache-2.0
// Random numbers by counter: element i gets word i % 4 of the block i / 4 of Philox-4x32-10 (Salmon
// et al. 2011) under a key, whoever computes it.
#pragma once

#include <vector>

#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

// Word w of block i is words[w][i], of the blocks that follow `block`.
struct Philox {
  static constexpr int kBlocks = 16;
  uint32_t words[4][kBlocks];

  Philox(uint64_t block, uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < kBlocks; ++i) {
      words[0][i] = static_cast<uint32_t>(block + i);
      words[1][i] = static_cast<uint32_t>((block + i) >> 32);
      words[2][i] = words[3][i] = 0;
    }
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kBlocks; ++i) {
        const uint64_t p = uint64_t{0xD2511F53} * words[0][i],
                       q = uint64_t{0xCD9E8D57} * words[2][i];
        words[0][i] = static_cast<uint32_t>(q >> 32) ^ words[1][i] ^ k0;
        words[2][i] = static_cast<uint32_t>(p >> 32) ^ words[3][i] ^ k1;
        words[1][i] = static_cast<uint32_t>(q);
        words[3][i] = static_cast<uint32_t>(p);
      }
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
  }
};

// of(word) of the elements from `start` on. Returns where in `out` they begin.
template <typename T, typename F>
const T* random_numbers(uint64_t seed, int64_t start, int64_t count, std::vector<T>& out, F&& of) {
  constexpr int64_t kBlocks = Philox::kBlocks;
  const int64_t first = start / 4, blocks = (start + count + 3) / 4 - first;
  out.resize((blocks + kBlocks - 1) / kBlocks * kBlocks * 4 + kLanes);
  for (int64_t b = 0; b < blocks; b += kBlocks) {
    const Philox random(first + b, seed);
    T* to = out.data() + 4 * b;
    for (int i = 0; i < kBlocks; ++i) {
      for (int w = 0; w < 4; ++w) to[4 * i + w] = of(random.words[w][i]);
    }
  }
  return out.data() + start % 4;
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
