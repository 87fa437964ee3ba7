// SPDX-License-Identifier: Apache-2.0
// Large outputs in large pages. The allocator hands memory of many megabytes back to the system and
// gets it anew, so that a kernel that only streams spends most of its time on page faults: of
// 64 MB in pages of 4 kB, 75 ms with writing, in pages of 2 MB 16 ms, where 8 ms are the writing.
// Linux gives large pages to who asks ("madvise", the usual setting); elsewhere nothing happens.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cofire {
inline namespace CPU_CAPABILITY {

// Uninitialised and contiguous, for a kernel that writes all of it.
inline at::Tensor empty_in_large_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor t = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  if (t.nbytes() >= 4 * page) {  // smaller ones come from memory that is there already
    const auto data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t begin = (data + page - 1) / page * page,
                    end = (data + t.nbytes()) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: it may fail
  }
#endif
  return t;
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
