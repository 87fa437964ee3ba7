// SPDX-License-Identifier: Apache-2.0
// Products of many rows with a weight in fp32 that lies in panels [depth][kWidth]: for kernels that
// make such panels themselves, or whose rows are not side by side.
#pragma once

#include <algorithm>
#include <memory>

#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace panels {

constexpr int64_t kWidth = 2 * kLanes;            // columns of a product at a time
constexpr int64_t kRows = kLanes == 16 ? 12 : 6;  // rows: what the registers hold
constexpr int64_t kBlock = 48;                    // rows that share a panel from the first caches

// Rows of fp32 numbers, so many numbers apart.
struct Block {
  const float* first;
  int64_t apart;
};

// The rows of a block, as a copy. Rows that lie a multiple of a page's fraction apart would share
// few places of the first cache.
class Copy {
 public:
  // row(i): the i-th of `count`, of so many numbers, of any float type.
  template <typename F>
  Block operator()(int64_t size, int64_t count, F&& row) {
    const int64_t apart = size + kLanes;
    if (size_ < apart) {
      size_ = apart;
      room_ = std::make_unique_for_overwrite<float[]>(kBlock * apart);
    }
    for (int64_t r = 0; r < count; ++r) {
      const auto* from = row(r);
      float* to = room_.get() + r * apart;
      for (int64_t i = 0; i < size; i += kLanes) {
        load_f32(from + i, std::min(kLanes, size - i)).store(to + i);
      }
    }
    // The last tile is multiplied whole.
    const int64_t whole = (count + kRows - 1) / kRows * kRows;
    std::fill(room_.get() + count * apart, room_.get() + whole * apart, 0.0f);
    return {room_.get(), apart};
  }

 private:
  int64_t size_ = 0;
  std::unique_ptr<float[]> room_;
};

// Rows of numbers, `apart`: all the same one where that is 0.
template <typename T>
struct Lines {
  T* at = nullptr;
  int64_t apart = 0;

  T* operator[](int64_t r) const { return at + r * apart; }
};

// to = from + the products of `depth` columns of kRows rows with a panel. By itself, so that where
// rows begin stays in registers: of every third one.
[[gnu::noinline]] inline void product(Block rows, int64_t depth, const float* panel,
                                      Lines<const float> from, Lines<float> to) {
  constexpr int kThirds = kRows / 3;
  const char* third[kThirds];
  const int64_t apart = rows.apart * static_cast<int64_t>(sizeof(float));
  COFIRE_UNROLL for (int i = 0; i < kThirds; ++i) {
    third[i] = reinterpret_cast<const char*>(rows.first) + 3 * i * apart;
  }
  Vec acc[kRows][2];
  COFIRE_UNROLL for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = Vec(0.f);
  for (int64_t k = 0; k < depth; ++k, panel += kWidth) {
    const Vec b[2] = {Vec::loadu(panel), Vec::loadu(panel + kLanes)};
    COFIRE_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec a(*reinterpret_cast<const float*>(third[r / 3] + r % 3 * apart));
      acc[r][0] = at::vec::fmadd(a, b[0], acc[r][0]);
      acc[r][1] = at::vec::fmadd(a, b[1], acc[r][1]);
    }
    COFIRE_UNROLL for (int i = 0; i < kThirds; ++i) third[i] += sizeof(float);
  }
  COFIRE_UNROLL for (int r = 0; r < kRows; ++r) {
    (acc[r][0] + Vec::loadu(from[r])).store(to[r]);
    (acc[r][1] + Vec::loadu(from[r] + kLanes)).store(to[r] + kLanes);
  }
}

// `count` rows, at most kBlock, times a panel of so many columns, to which `add` is added. The
// products of a slab, which stays in the first cache, are added up before they are added to what
// there is: a chain of all of the depth would lose more. They go to `to`, if that is not null, or
// to `held`, which has room for kBlock rows. Returns whether they went to `to`. There are rows, of
// whatever, up to whole tiles.
inline bool multiply(Block rows, int64_t count, int64_t depth, int64_t slab, const float* panel,
                     const float* add, Lines<float> to, Lines<float> held) {
  Lines<const float> from{add, 0};
  for (int64_t begin = 0; begin == 0 || begin < depth; begin += slab) {
    const int64_t end = std::min(depth, begin + slab);
    const bool last = end == depth && to.at != nullptr;
    for (int64_t r = 0; r < count; r += kRows) {
      const bool straight = last && r + kRows <= count;
      product({rows.first + r * rows.apart + begin, rows.apart}, end - begin,
              panel + begin * kWidth, {from[r], from.apart},
              straight ? Lines<float>{to[r], to.apart} : Lines<float>{held[r], held.apart});
      for (int64_t i = r; last && !straight && i < count; ++i) std::copy_n(held[i], kWidth, to[i]);
    }
    from = {held.at, held.apart};
  }
  return to.at != nullptr;
}

}  // namespace panels
}  // namespace CPU_CAPABILITY
}  // namespace cofire
