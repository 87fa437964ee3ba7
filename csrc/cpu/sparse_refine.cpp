// SPDX-License-Identifier: Apache-2.0
// Refinement of pruning masks by swaps within a row, one row per thread. The contract is in
// pyextensions/cofire/ops/sparse_refine.py: masks are equal to the references', so all arithmetic
// is fp64 and every operation is rounded by itself. A product that is not exact in fp64 (that of
// two fp32 values is) must not be fused with the sum it enters: COFIRE_ROUNDED separates them.
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vec.h"

// What was computed before is in memory, rounded, when what follows is computed.
#define COFIRE_ROUNDED asm volatile("" ::: "memory")

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kLeastGain = 1.0 / (1 << 30);
constexpr int64_t kSums = 1024;  // partial sums of a row
constexpr int64_t kShort = 16;   // candidates that most rows are done with
constexpr int64_t kScan = 64;    // scores that are looked at for one below the bound before each is

// Sum of x[0, size): elements k, k + kSums, ... one after the other, and of these sums the second
// half is added to the first until one is left. Overwrites x.
double ordered_sum(double* x, int64_t size) {
  if (size == 0) return 0;
  for (int64_t start = kSums; start < size; start += kSums) {
    for (int64_t i = 0; i < std::min(kSums, size - start); ++i) x[i] += x[start + i];
  }
  int64_t length = std::min(kSums, size), width = 1;
  while (width < length) width *= 2;
  for (; width > 1; length = std::min(length, width)) {
    width /= 2;
    for (int64_t i = 0; i < length - width; ++i) x[i] += x[i + width];
  }
  return x[0];
}

// The `limit` least scores seen, ties to the lower column. Columns come in ascending order.
class Least {
 public:
  struct Item {
    double score;
    int64_t column;
    bool operator<(const Item& other) const {
      return score < other.score || (score == other.score && column < other.column);
    }
  };

  void clear(int64_t limit) {
    limit_ = limit;
    items_.clear();
  }

  // Scores of all columns; what is infinite or NaN is no candidate.
  void take(const double* scores, int64_t columns) {
    for (int64_t start = 0; start < columns; start += kScan) {
      const int64_t end = std::min(columns, start + kScan);
      const double above = bound();
      bool any = false;
      for (int64_t i = start; i < end; ++i) any |= scores[i] < above;
      if (!any) continue;
      for (int64_t i = start; i < end; ++i) {
        if (scores[i] < bound()) push({scores[i], i});
      }
    }
  }

  void sort_by_score() { std::sort(items_.begin(), items_.end()); }
  void sort_by_column() {
    std::sort(items_.begin(), items_.end(),
              [](const Item& a, const Item& b) { return a.column < b.column; });
  }
  const std::vector<Item>& items() const { return items_; }

 private:
  bool full() const { return static_cast<int64_t>(items_.size()) == limit_; }
  double bound() const { return limit_ == 0 ? -kInf : full() ? items_.front().score : kInf; }
  void push(const Item& item) {
    if (full()) {
      std::pop_heap(items_.begin(), items_.end());
      items_.back() = item;
    } else {
      items_.push_back(item);
    }
    std::push_heap(items_.begin(), items_.end());
  }

  int64_t limit_ = 0;
  std::vector<Item> items_;  // a heap with the greatest in front
};

void unpack_row(const uint8_t* bits, int64_t columns, uint8_t* kept) {
  // Each byte of the product gets its own bit of the mask, which a carry then moves to its top.
  const auto eight = [](uint64_t byte) {
    const uint64_t spread = byte * 0x0101010101010101ull & 0x8040201008040201ull;
    return (spread + 0x7f7f7f7f7f7f7f7full) >> 7 & 0x0101010101010101ull;
  };
  for (int64_t start = 0; start < columns; start += 8) {
    const uint64_t bytes = eight(bits[start / 8]);
    std::memcpy(kept + start, &bytes, std::min<int64_t>(8, columns - start));
  }
}

void pack_row(const uint8_t* kept, int64_t columns, uint8_t* bits) {
  for (int64_t start = 0; start < columns; start += 8) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, kept + start, std::min<int64_t>(8, columns - start));
    bits[start / 8] = static_cast<uint8_t>(bytes * 0x0102040810204080ull >> 56);
  }
}

void check(const char* op, const at::Tensor& weight, const at::Tensor& bits, int64_t group) {
  TORCH_CHECK(weight.dim() == 2 && bits.dim() == 2 && bits.scalar_type() == at::kByte &&
                  bits.size(0) == weight.size(0) && bits.size(1) == (weight.size(1) + 7) / 8,
              op, ": bits must be uint8 [rows, ceil(columns / 8)]");
  TORCH_CHECK(group >= 0 && (group == 0 || weight.size(1) % group == 0), op,
              ": columns must be a multiple of the group");
}

// ---- by the mean of the output ----

class DsnotRow {
 public:
  DsnotRow(int64_t columns, const double* mean, const double* norm, const double* growth,
           int64_t max_swaps, double threshold, bool official, int64_t group)
      : columns_(columns),
        mean_(mean),
        norm_(norm),
        growth_(growth),
        max_swaps_(std::min(max_swaps, columns)),
        threshold_(threshold),
        official_(official),
        group_(group),
        share_(columns),
        metric_(columns),
        score_(columns),
        used_(columns) {}

  // Swaps within kept[0, columns).
  template <typename T>
  void run(const T* weight, uint8_t* kept, int64_t) {
    const int64_t n = columns_;
    for (int64_t k = 0; k < n; ++k) {
      const double w = static_cast<float>(weight[k]);
      share_[k] = w * mean_[k];
      metric_[k] = std::abs(w) * norm_[k];
    }
    COFIRE_ROUNDED;
    for (int64_t k = 0; k < n; ++k) score_[k] = kept[k] ? 0.0 : share_[k];
    double error = ordered_sum(score_.data(), n);
    double limit = threshold_;
    if (!official_) {
      for (int64_t k = 0; k < n; ++k) score_[k] = std::abs(share_[k]);
      limit = threshold_ * ordered_sum(score_.data(), n) / std::sqrt(static_cast<double>(n));
    }
    const double first = sign(error);
    if (!(std::abs(error) > limit)) return;

    std::fill(used_.begin(), used_.end(), 0);
    limit_ = std::min(max_swaps_, kShort);
    for (int d = 0; d < 2; ++d) ready_[d] = false;
    for (int64_t swaps = 0; swaps < max_swaps_ && std::abs(error) > limit; ++swaps) {
      const int direction = error > 0;
      // Nothing has moved yet, or what has is marked as used: the lists are those of the first
      // mask.
      if (!ready_[direction]) order(kept, direction);
      const int64_t grown = next(grow_[direction].items(), next_grow_[direction]);
      int64_t gone = group_ ? 0 : next(go_[direction].items(), next_go_[direction]);
      if ((grown < 0 || gone < 0) && limit_ < max_swaps_) {  // this row needs longer lists
        limit_ = max_swaps_;
        ready_[0] = ready_[1] = false;
        --swaps;
        continue;
      }
      if (grown >= 0 && group_) gone = least_of_group(kept, grown / group_);
      if (grown < 0 || gone < 0) return;
      const double changed = (error + share_[gone]) - share_[grown];
      if (official_ ? group_ && !(changed * first > 0) : !(std::abs(changed) < std::abs(error))) {
        return;
      }
      kept[grown] = used_[grown] = used_[gone] = 1;
      kept[gone] = 0;
      error = changed;
    }
  }

 private:
  static double sign(double x) { return (x > 0) - (x < 0); }

  void order(const uint8_t* kept, int direction) {
    const double s = direction ? 1.0 : -1.0;
    const double none = std::numeric_limits<double>::quiet_NaN();  // below no bound
    for (int64_t k = 0; k < columns_; ++k) {                       // no branches: masks are random
      const double gain = share_[k] * growth_[k];
      const bool may =
          (kept[k] == 0) & (used_[k] == 0) & (growth_[k] > 0) & (std::abs(gain) < kInf);
      score_[k] = may ? -(s * gain) : none;
    }
    grow_[direction].clear(limit_);
    grow_[direction].take(score_.data(), columns_);
    grow_[direction].sort_by_score();
    if (!group_) {
      for (int64_t k = 0; k < columns_; ++k) {
        const bool may = (kept[k] != 0) & (used_[k] == 0) & (s * share_[k] < 0);
        score_[k] = may ? metric_[k] : none;
      }
      go_[direction].clear(limit_);
      go_[direction].take(score_.data(), columns_);
      go_[direction].sort_by_score();
    }
    next_grow_[direction] = next_go_[direction] = 0;
    ready_[direction] = true;
  }

  // The first of a list that has not moved, or -1.
  int64_t next(const std::vector<Least::Item>& items, size_t& place) const {
    while (place < items.size() && used_[items[place].column]) ++place;
    return place < items.size() ? items[place].column : -1;
  }

  int64_t least_of_group(const uint8_t* kept, int64_t group) const {
    int64_t found = -1;
    double least = kInf;
    for (int64_t k = group * group_; k < (group + 1) * group_; ++k) {
      if (kept[k] && !used_[k] && metric_[k] < least) {
        least = metric_[k];
        found = k;
      }
    }
    return found;
  }

  const int64_t columns_;
  const double *mean_, *norm_, *growth_;
  const int64_t max_swaps_;
  const double threshold_;
  const bool official_;
  const int64_t group_;
  int64_t limit_ = 0;  // how long the lists of this row are
  std::vector<double> share_, metric_, score_;
  std::vector<uint8_t> used_;
  Least grow_[2], go_[2];  // by the sign of the error
  size_t next_grow_[2], next_go_[2];
  bool ready_[2];
};

template <typename Row, typename Make>
at::Tensor refine(const at::Tensor& weight, const at::Tensor& bits, int64_t cost, Make&& make) {
  const at::Tensor w = weight.contiguous(), b = bits.contiguous();
  at::Tensor out = at::empty_like(b);
  const int64_t rows = w.size(0), columns = w.size(1), bytes = b.size(1);
  const uint8_t* from = b.const_data_ptr<uint8_t>();
  uint8_t* to = out.data_ptr<uint8_t>();
  dispatch(w.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* data = w.const_data_ptr<T>();
    at::parallel_for(0, rows, grain_of(cost * columns), [&](int64_t begin, int64_t end) {
      Row row = make();
      std::vector<uint8_t> kept(columns);
      for (int64_t r = begin; r < end; ++r) {
        unpack_row(from + r * bytes, columns, kept.data());
        row.run(data + r * columns, kept.data(), r);
        pack_row(kept.data(), columns, to + r * bytes);
      }
    });
  });
  return out;
}

// ---- by the squared error ----

class GramRow {
 public:
  GramRow(int64_t columns, const float* gram, const double* correlation, int64_t max_swaps,
          int64_t candidates, int64_t group)
      : columns_(columns),
        gram_(gram),
        correlation_(correlation),
        max_swaps_(max_swaps),
        candidates_(std::min(candidates, columns)),
        group_(group),
        w_(columns),
        c_(columns),
        going_(columns),
        coming_(columns),
        diagonal_(columns),
        pairs_(group ? group : candidates_) {
    for (int64_t k = 0; k < columns; ++k) diagonal_[k] = gram[k * columns + k];
  }

  template <typename T>
  void run(const T* weight, uint8_t* kept, int64_t row) {
    const int64_t n = columns_;
    for (int64_t k = 0; k < n; ++k) {
      w_[k] = static_cast<float>(weight[k]);
      c_[k] = correlation_[row * n + k];
    }
    for (int64_t k = 0; k < n; ++k) going_[k] = kept[k] ? 0.0 : w_[k] * c_[k];
    COFIRE_ROUNDED;
    const double limit = -kLeastGain * std::abs(ordered_sum(going_.data(), n));
    for (int64_t swaps = 0; swaps < max_swaps_; ++swaps) {
      for (int64_t k = 0; k < n; ++k) {
        // w * diagonal and 2 c are exact
        const double go = w_[k] * (2 * c_[k] + w_[k] * diagonal_[k]);
        const double come = w_[k] * (w_[k] * diagonal_[k] - 2 * c_[k]);
        going_[k] = kept[k] ? go : kInf;
        coming_[k] = kept[k] ? kInf : come;
      }
      COFIRE_ROUNDED;
      best_ = kInf;
      group_ ? search_groups() : search_candidates();
      if (!(best_ < limit)) return;
      const float *p = gram_ + gone_ * n, *q = gram_ + grown_ * n;
      const double wp = w_[gone_], wq = w_[grown_];
      for (int64_t k = 0; k < n; ++k) c_[k] = (c_[k] + wp * p[k]) - wq * q[k];  // exact products
      kept[gone_] = 0;
      kept[grown_] = 1;
    }
  }

 private:
  void search_candidates() {
    go_.clear(candidates_);
    come_.clear(candidates_);
    go_.take(going_.data(), columns_);
    come_.take(coming_.data(), columns_);
    go_.sort_by_column();
    come_.sort_by_column();
    const auto& come = come_.items();
    const int64_t count = static_cast<int64_t>(come.size());
    for (const auto& p : go_.items()) {
      const float* g = gram_ + p.column * columns_;
      const double w = 2 * w_[p.column];
      for (int64_t j = 0; j < count; ++j) {
        const int64_t q = come[j].column;
        pairs_[j] = (w * w_[q]) * g[q];
      }
      COFIRE_ROUNDED;
      for (int64_t j = 0; j < count; ++j) {
        improve((p.score + come[j].score) - pairs_[j], p.column, come[j].column);
      }
    }
  }

  void search_groups() {
    for (int64_t start = 0; start < columns_; start += group_) {
      for (int64_t p = start; p < start + group_; ++p) {
        if (!(going_[p] < kInf)) continue;
        const float* g = gram_ + p * columns_;
        const double w = 2 * w_[p];
        for (int64_t j = 0; j < group_; ++j) pairs_[j] = (w * w_[start + j]) * g[start + j];
        COFIRE_ROUNDED;
        for (int64_t j = 0; j < group_; ++j) {
          const double come = coming_[start + j];
          if (come < kInf) improve((going_[p] + come) - pairs_[j], p, start + j);
        }
      }
    }
  }

  void improve(double change, int64_t gone, int64_t grown) {
    if (change < best_) {
      best_ = change;
      gone_ = gone;
      grown_ = grown;
    }
  }

  const int64_t columns_;
  const float* gram_;
  const double* correlation_;
  const int64_t max_swaps_, candidates_, group_;
  std::vector<double> w_, c_, going_, coming_, diagonal_, pairs_;
  Least go_, come_;
  double best_ = kInf;
  int64_t gone_ = 0, grown_ = 0;
};

}  // namespace

at::Tensor dsnot_swap(const at::Tensor& weight, const at::Tensor& bits, const at::Tensor& mean,
                      const at::Tensor& norm, const at::Tensor& growth, int64_t max_swaps,
                      double threshold, bool official, int64_t group) {
  if (!covered(weight)) {
    return reference("cofire::dsnot_swap", &dsnot_swap, weight, bits, mean, norm, growth, max_swaps,
                     threshold, official, group);
  }
  check("dsnot_swap", weight, bits, group);
  const int64_t columns = weight.size(1);
  at::Tensor vectors[3] = {mean, norm, growth};
  for (at::Tensor& v : vectors) {
    TORCH_CHECK(v.dim() == 1 && v.size(0) == columns, "dsnot_swap: one statistic per column");
    v = v.to(at::kDouble).contiguous();
  }
  return refine<DsnotRow>(weight, bits, 8, [&] {
    return DsnotRow(columns, vectors[0].const_data_ptr<double>(),
                    vectors[1].const_data_ptr<double>(), vectors[2].const_data_ptr<double>(),
                    max_swaps, threshold, official, group);
  });
}

at::Tensor gram_swap(const at::Tensor& weight, const at::Tensor& bits, const at::Tensor& gram,
                     const at::Tensor& correlation, int64_t max_swaps, int64_t candidates,
                     int64_t group) {
  if (!covered(weight) || !covered(gram)) {
    return reference("cofire::gram_swap", &gram_swap, weight, bits, gram, correlation, max_swaps,
                     candidates, group);
  }
  check("gram_swap", weight, bits, group);
  const int64_t columns = weight.size(1);
  TORCH_CHECK(gram.dim() == 2 && gram.size(0) == columns && gram.size(1) == columns &&
                  correlation.sizes() == weight.sizes() && correlation.scalar_type() == at::kDouble,
              "gram_swap: gram must be [columns, columns], correlation float64 [rows, columns]");
  const at::Tensor g = gram.to(at::kFloat).contiguous(), c = correlation.contiguous();
  return refine<GramRow>(weight, bits, 64, [&] {
    return GramRow(columns, g.const_data_ptr<float>(), c.const_data_ptr<double>(), max_swaps,
                   candidates, group);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("dsnot_swap", &cofire::dsnot_swap);
  m.impl("gram_swap", &cofire::gram_swap);
}
