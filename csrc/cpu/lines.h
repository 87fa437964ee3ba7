// SPDX-License-Identifier: Apache-2.0
// Scratch memory that begins with a line of the cache. A vector of 64 bytes that lies across two
// lines costs two reads, and a row of a tile of AMX is one.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace cofire {
inline namespace CPU_CAPABILITY {

template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) noexcept {}  // NOLINT: as the standard asks

  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, std::size_t) noexcept { ::operator delete(p, kLine); }

  template <typename U>
  bool operator==(const LineAllocator<U>&) const noexcept {
    return true;
  }
};

template <typename T>
using Lines = std::vector<T, LineAllocator<T>>;

}  // namespace CPU_CAPABILITY
}  // namespace cofire
