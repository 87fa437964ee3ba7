// SPDX-License-Identifier: Apache-2.0
// What the gated operators share: the channels a gate kept, checked; the
// activation; and what the dispatch rule asks about the type and the machine.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "gating_plan.h"
#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

// The channels a gate kept, per sample: ascending indices in the first slots.
class Selection {
 public:
  Selection(const char* op, const char* name, const at::Tensor& index, const at::Tensor& count,
            int64_t batch, int64_t channels)
      : index_(index.contiguous()), count_(count.contiguous()), channels_(channels) {
    TORCH_CHECK(index_.scalar_type() == at::kInt && count_.scalar_type() == at::kInt &&
                    index_.dim() == 2 && index_.size(0) == batch && index_.size(1) == channels &&
                    count_.numel() == batch,
                name, "_index, ", name, "_count: expected int32 [", batch, ", ", channels,
                "] and [", batch, "], got ", index.scalar_type(), " ", index.sizes(), " and ",
                count.scalar_type(), " ", count.sizes());
    channel_of_ = index_.const_data_ptr<int32_t>();
    active_ = count_.const_data_ptr<int32_t>();
    for (int64_t n = 0; n < batch; ++n) {
      const int64_t active = this->count(n);
      TORCH_CHECK_VALUE(active >= 0 && active <= channels, op, ": ", name,
                        "_count must be between 0 and ", channels, ", got ", active, " for sample ",
                        n);
      for (int64_t j = 0; j < active; ++j) {
        const int64_t low = j > 0 ? channel(n, j - 1) + 1 : 0;
        TORCH_CHECK_VALUE(channel(n, j) >= low && channel(n, j) < channels, op, ": ", name,
                          "_index must hold ascending channels below ", channels, ", got ",
                          channel(n, j), " at slot ", j, " of sample ", n);
      }
      most_ = std::max(most_, active);
      total_ += active;
    }
  }

  int64_t channels() const { return channels_; }
  int64_t most() const { return most_; }    // active channels of the fullest sample
  int64_t total() const { return total_; }  // active channels of all samples
  int64_t count(int64_t n) const { return active_[n]; }
  int64_t channel(int64_t n, int64_t slot) const { return channel_of_[n * channels_ + slot]; }

  // The first slot of sample n that holds `channel` or a higher one.
  int64_t first_slot(int64_t n, int64_t channel) const {
    const int32_t* begin = channel_of_ + n * channels_;
    return std::lower_bound(begin, begin + count(n), channel) - begin;
  }

  // Channels that any sample keeps.
  int64_t touched() const {
    std::vector<bool> kept(channels_);
    for (int64_t n = 0; n < count_.numel(); ++n) {
      for (int64_t j = 0; j < count(n); ++j) kept[channel(n, j)] = true;
    }
    return std::count(kept.begin(), kept.end(), true);
  }

  // For every (sample, channel) its slot, or -1 where the channel is off.
  std::vector<int32_t> slots() const {
    std::vector<int32_t> slot(count_.numel() * channels_, -1);
    for (int64_t n = 0; n < count_.numel(); ++n) {
      for (int64_t j = 0; j < count(n); ++j) {
        slot[n * channels_ + channel(n, j)] = static_cast<int32_t>(j);
      }
    }
    return slot;
  }

 private:
  at::Tensor index_, count_;
  const int32_t *channel_of_, *active_;
  int64_t channels_, most_ = 0, total_ = 0;
};

// Whether the library can multiply 16-bit types on AMX tiles.
inline bool has_amx() {
#if defined(__x86_64__) && defined(__GNUC__)
  unsigned a = 0, b = 0, c = 0, d = 0;  // __builtin_cpu_supports knows no "amx-tile" in older clang
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 24 & 1) != 0;
#else
  return false;
#endif
}

// Every activation is a clamp: its bounds.
inline std::pair<float, float> activation_range(c10::string_view name) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  if (name == "relu") return {0.f, infinity};
  if (name == "relu6") return {0.f, 6.f};
  TORCH_CHECK(name == "identity",
              "activation: expected \"identity\", \"relu\" or \"relu6\", got \"", name, "\"");
  return {-infinity, infinity};
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
