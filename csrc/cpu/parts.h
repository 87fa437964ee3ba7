// SPDX-License-Identifier: Apache-2.0
// Work in parts, which threads take in turns or in runs: one that is done takes another, so that
// where something else runs on a core, the others do more. What a part computes does not depend on
// who computes it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace cofire {
inline namespace CPU_CAPABILITY {

// How many parts to make where there could be `most`: more than threads, but not many more.
inline int64_t number_of_parts(int64_t most) {
  constexpr int64_t kOfAThread = 8;
  const int64_t threads = at::get_num_threads();
  return std::max<int64_t>(1, most < threads ? most : std::min(kOfAThread * threads, most));
}

// Cuts rows, or what else there is, into nearly equal parts of at most `most`: the size of the next
// part.
inline int64_t next_part(int64_t rows, int64_t most) {
  const int64_t parts = (rows + most - 1) / most;
  return (rows + parts - 1) / parts;
}

// Calls f(part) for each part.
template <typename F>
void in_turns(int64_t parts, F&& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(parts, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) f(part);
  });
}

// The same where parts are read from memory one after the other: each thread takes those that
// follow its last one, and then what others have left.
template <typename F>
void in_runs(int64_t parts, F&& f) {
  constexpr int64_t kMostRuns = 64;
  struct alignas(64) Run {
    std::atomic<int64_t> next;
  };
  Run run[kMostRuns];
  const int64_t threads = std::min<int64_t>(parts, at::get_num_threads());
  const int64_t runs = std::min(threads, kMostRuns);
  for (int64_t i = 0; i < runs; ++i) run[i].next.store(parts * i / runs, std::memory_order_relaxed);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t mine = (first + i) % runs, end = parts * (mine + 1) / runs;
      for (int64_t part; (part = run[mine].next.fetch_add(1, std::memory_order_relaxed)) < end;) {
        f(part);
      }
    }
  });
}

// Calls f(begin, end) for consecutive parts of `count` items, each at least `least`.
template <typename F>
void in_parts(int64_t count, int64_t least, F&& f) {
  if (count <= 0) return;
  const int64_t parts = number_of_parts(count / std::max<int64_t>(least, 1));
  in_turns(parts, [&](int64_t part) { f(count * part / parts, count * (part + 1) / parts); });
}

// The same in runs: in the next call, too, a thread begins with the items that its own caches may
// hold. Where cores share none of those it is slow to fetch what another one has written.
template <typename F>
void in_runs_of_parts(int64_t count, int64_t least, F&& f) {
  if (count <= 0) return;
  const int64_t parts = number_of_parts(count / std::max<int64_t>(least, 1));
  in_runs(parts, [&](int64_t part) { f(count * part / parts, count * (part + 1) / parts); });
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
