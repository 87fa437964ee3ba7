// SPDX-License-Identifier: Apache-2.0
// Large pages. What is read once, front to back, waits for its pages as well as for its bytes; and
// the allocator hands memory of many megabytes back to the system and gets it anew, so that a
// kernel that only streams spends most of its time on page faults: of 64 MB in pages of 4 kB, 75 ms
// with writing, in pages of 2 MB 16 ms, where 8 ms are the writing.
// Linux gives large pages to who asks ("madvise", the usual setting); elsewhere nothing happens.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cofire {

// For memory that nothing was written to yet. A wish: it may fail.
static inline void ask_for_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (bytes < 2 * kPage) return;  // it comes from memory that is there already
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// For memory that was written and will be read front to back, again and again: an allocator may
// have had it before, in small pages, which are then moved together. The large pages that it only
// begins or ends in come with it.
static inline void gather_in_large_pages([[maybe_unused]] const void* data,
                                         [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1: an error before
  if (bytes < 2 * kPage) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  for (uintptr_t page = begin / kPage * kPage; page < begin + bytes; page += kPage) {
    madvise(reinterpret_cast<void*>(page), kPage, kCollapse);
  }
#endif
}

}  // namespace cofire
