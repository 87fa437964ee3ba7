// SPDX-License-Identifier: Apache-2.0
// Drop and grow: of each row, or of the tensor, the kept entries of least magnitude leave the mask
// and as many of the pruned ones with the largest score enter it.
//
// Every entry is a candidate of one of the two, so one pass counts both in histograms of the upper
// bits of their keys, a second collects what shares the bin of a threshold, and among those the
// threshold is exact: a key and an index. The score of the other entries is never stored.
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <vector>

#include "loops.h"
#include "philox.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace prune_and_grow {
namespace {

constexpr int kBinBits = 12;
constexpr int64_t kBins = 1 << kBinBits;
constexpr int64_t kChunk = 1 << 17;  // entries of whole rows that a thread takes, scope "tensor"

using Histogram = std::array<std::vector<int64_t>, 2>;  // of the pruned, of the kept
using Item = std::pair<uint32_t, int64_t>;  // a key and a flat index, in the order of choice

// Where a choice ends: at the item before which, itself included, everything is taken.
struct Cut {
  int64_t number = 0;  // how many are taken
  int64_t bin = -1, rest = 0;
  Item last{0, -1};

  void find_bin(const std::vector<int64_t>& histogram, int64_t wanted) {
    number = rest = wanted;
    for (bin = 0; wanted > 0 && rest > histogram[bin]; ++bin) rest -= histogram[bin];
  }
  void find_last(std::vector<Item>& candidates) {
    if (number == 0) return;
    std::nth_element(candidates.begin(), candidates.begin() + (rest - 1), candidates.end());
    last = candidates[rest - 1];
  }
  bool takes(uint32_t key, int64_t index) const { return number > 0 && Item(key, index) <= last; }
};

class Rows {
 public:
  Rows(const at::Tensor& weight, const at::Tensor& bits, const std::optional<at::Tensor>& grow,
       const std::optional<at::Tensor>& drop, int64_t seed)
      : rows(weight.size(0)),
        columns(weight.numel() / rows),
        bytes((columns + 7) / 8),
        bits_(bits.const_data_ptr<uint8_t>()),
        drop_(drop.has_value() ? *drop : weight),
        grow_(grow),
        seed_(seed) {}

  const int64_t rows, columns, bytes;
  std::atomic<int64_t> nan[2] = {0, 0};

  struct Scratch {
    std::vector<uint32_t> keys, words;
    std::vector<uint8_t> kept;
    std::vector<float> drop, grow;
  };

  // Keys of a row: the least are taken. Kept entries by magnitude, pruned ones by score downwards.
  void load_row(int64_t row, Scratch& s) {
    s.keys.resize(columns);
    s.kept.resize(8 * bytes);
    const uint8_t* bits = bits_ + row * bytes;
    for (int64_t b = 0; b < bytes; ++b) {
      for (int i = 0; i < 8; ++i) s.kept[8 * b + i] = bits[b] >> i & 1;
    }
    const uint32_t* drop = magnitudes(drop_, row, s.drop);
    const uint8_t* kept = s.kept.data();
    uint32_t* keys = s.keys.data();
    int64_t bad[2] = {0, 0};
    if (!grow_.has_value()) {
      const uint32_t* words = random_numbers(seed_, row * columns, columns, s.words,
                                             [](uint32_t word) { return word; });
      for (int64_t k = 0; k < columns; ++k) {
        const uint32_t key = drop[k] << 1;
        bad[1] += kept[k] & (key > kInfinity);
        keys[k] = kept[k] ? key : ~words[k];
      }
    } else {
      const uint32_t* grow = magnitudes(*grow_, row, s.grow);
      for (int64_t k = 0; k < columns; ++k) {
        const uint32_t key = (kept[k] ? drop[k] : grow[k]) << 1, wrong = key > kInfinity;
        bad[1] += kept[k] & wrong;
        bad[0] += (kept[k] ^ 1) & wrong;
        keys[k] = kept[k] ? key : ~key;
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (bad[i] != 0) nan[i] += bad[i];
    }
  }

  void count(const Scratch& s, Histogram& into) const {
    int64_t* of[2] = {into[0].data(), into[1].data()};
    for (int64_t k = 0; k < columns; ++k) ++of[s.kept[k]][s.keys[k] >> (32 - kBinBits)];
  }

  void collect(int64_t row, const Scratch& s, const std::array<Cut, 2>& cuts,
               std::array<std::vector<Item>, 2>& into) const {
    for (int64_t k = 0; k < columns; ++k) {
      const int kept = s.kept[k];
      if (s.keys[k] >> (32 - kBinBits) == cuts[kept].bin && cuts[kept].number > 0) {
        into[kept].emplace_back(s.keys[k], row * columns + k);
      }
    }
  }

  void write(int64_t row, const Scratch& s, const std::array<Cut, 2>& cuts, uint8_t* bits) const {
    std::fill_n(bits + row * bytes, bytes, 0);
    for (int64_t k = 0; k < columns; ++k) {
      const uint8_t kept = s.kept[k], changes = cuts[kept].takes(s.keys[k], row * columns + k);
      bits[row * bytes + k / 8] |= static_cast<uint8_t>((kept ^ changes) << (k % 8));
    }
  }

 private:
  static constexpr uint32_t kInfinity = 0xff000000u;  // 0x7f800000, shifted as keys are

  // The bits of a row's scores, without the upper one, which the shift of the keys drops.
  const uint32_t* magnitudes(const at::Tensor& scores, int64_t row, std::vector<float>& scratch) {
    const float* found = nullptr;
    if (scores.scalar_type() == at::kFloat) {
      found = scores.const_data_ptr<float>() + row * columns;
    } else {
      scratch.resize(columns);
      dispatch(scores.scalar_type(), [&](auto type) {
        const auto* from = scores.const_data_ptr<decltype(type)>() + row * columns;
        for_vectors(columns, [&](int64_t i, auto rest) {
          load(from + i, rest).store(scratch.data() + i, static_cast<int>(rest));
        });
      });
      found = scratch.data();
    }
    return reinterpret_cast<const uint32_t*>(found);
  }

  const uint8_t* bits_;
  const at::Tensor drop_;
  const std::optional<at::Tensor> grow_;
  const uint64_t seed_;
};

// As many are dropped as grow.
void find_bins(const Histogram& histogram, int64_t count, std::array<Cut, 2>& cuts) {
  for (const auto& h : histogram) {
    int64_t there = 0;
    for (const int64_t n : h) there += n;
    count = std::min(count, there);
  }
  for (int i = 0; i < 2; ++i) cuts[i].find_bin(histogram[i], count);
}

void by_row(Rows& all, int64_t count, uint8_t* bits) {
  at::parallel_for(0, all.rows, grain_of(all.columns), [&](int64_t first, int64_t last) {
    Rows::Scratch scratch;
    Histogram histogram;
    std::array<std::vector<Item>, 2> candidates;
    for (int64_t row = first; row < last; ++row) {
      all.load_row(row, scratch);
      for (auto& h : histogram) h.assign(kBins, 0);
      for (auto& c : candidates) c.clear();
      all.count(scratch, histogram);
      std::array<Cut, 2> cuts;
      find_bins(histogram, count, cuts);
      all.collect(row, scratch, cuts, candidates);
      for (int i = 0; i < 2; ++i) cuts[i].find_last(candidates[i]);
      all.write(row, scratch, cuts, bits);
    }
  });
}

void by_tensor(Rows& all, int64_t count, uint8_t* bits) {
  const int64_t rows = std::max<int64_t>(1, kChunk / std::max<int64_t>(all.columns, 1));
  const int64_t chunks = (all.rows + rows - 1) / rows;
  const auto each_row = [&](auto&& f) {
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      Rows::Scratch scratch;
      for (int64_t chunk = first; chunk < last; ++chunk) {
        for (int64_t row = chunk * rows; row < std::min((chunk + 1) * rows, all.rows); ++row) {
          all.load_row(row, scratch);
          f(chunk, row, scratch);
        }
      }
    });
  };
  std::vector<Histogram> histograms(chunks,
                                    {std::vector<int64_t>(kBins), std::vector<int64_t>(kBins)});
  each_row(
      [&](int64_t chunk, int64_t, const Rows::Scratch& s) { all.count(s, histograms[chunk]); });
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    for (int i = 0; i < 2; ++i) {
      for (int64_t b = 0; b < kBins; ++b) histograms[0][i][b] += histograms[chunk][i][b];
    }
  }
  if (all.nan[0] + all.nan[1] > 0) return;
  std::array<Cut, 2> cuts;
  find_bins(histograms[0], count, cuts);
  std::vector<std::array<std::vector<Item>, 2>> parts(chunks);
  each_row([&](int64_t chunk, int64_t row, const Rows::Scratch& s) {
    all.collect(row, s, cuts, parts[chunk]);
  });
  for (int i = 0; i < 2; ++i) {
    std::vector<Item> candidates;
    for (const auto& part : parts) {
      candidates.insert(candidates.end(), part[i].begin(), part[i].end());
    }
    cuts[i].find_last(candidates);
  }
  each_row([&](int64_t, int64_t row, const Rows::Scratch& s) { all.write(row, s, cuts, bits); });
}

// Zeros at every entry whose bit has changed.
void clear_changed(const at::Tensor& weight, const uint8_t* before, const uint8_t* after,
                   const Rows& all) {
  dispatch(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* w = weight.mutable_data_ptr<T>();
    at::parallel_for(0, all.rows, grain_of(all.bytes), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        for (int64_t b = 0; b < all.bytes; ++b) {
          unsigned changed = before[row * all.bytes + b] ^ after[row * all.bytes + b];
          if (b == all.bytes - 1 && all.columns % 8 != 0) changed &= (1u << all.columns % 8) - 1;
          for (; changed != 0; changed &= changed - 1) {
            w[row * all.columns + 8 * b + __builtin_ctz(changed)] = T(0);
          }
        }
      }
    });
  });
}

at::Tensor prune_and_grow(const at::Tensor& weight, const at::Tensor& bits,
                          const std::optional<at::Tensor>& grow_score,
                          const std::optional<at::Tensor>& drop_score, int64_t count,
                          c10::string_view scope, int64_t seed) {
  const auto wide = [](const std::optional<at::Tensor>& t) {
    return t.has_value() && !covered(*t);
  };
  if (!covered(weight) || wide(grow_score) || wide(drop_score)) {
    return reference("cofire::prune_and_grow_", &prune_and_grow, weight, bits, grow_score,
                     drop_score, count, scope, seed);
  }
  at::Tensor result = at::empty_like(bits, bits.options(), at::MemoryFormat::Contiguous);
  if (weight.numel() == 0) return result.zero_();
  const auto as_rows = [&](const std::optional<at::Tensor>& t) {
    TORCH_CHECK(!t.has_value() || t->sizes() == weight.sizes(), "scores must fit the weight");
    return t.has_value() ? std::optional<at::Tensor>(t->contiguous()) : std::nullopt;
  };
  const at::Tensor w = weight.contiguous(), before = bits.contiguous();
  TORCH_CHECK(before.scalar_type() == at::kByte &&
                  before.numel() == w.size(0) * ((w.numel() / w.size(0) + 7) / 8),
              "bits must fit the weight");
  Rows all(w, before, as_rows(grow_score), as_rows(drop_score), seed);
  uint8_t* after = result.mutable_data_ptr<uint8_t>();
  scope == "tensor" ? by_tensor(all, count, after) : by_row(all, count, after);
  for (int i = 1; i >= 0; --i) {
    const int64_t found = all.nan[i];
    TORCH_CHECK_VALUE(found == 0, "prune_and_grow_: ", i == 1 ? "drop" : "grow",
                      " scores must not be NaN, got NaN at ", found, i == 1 ? " kept" : " pruned",
                      " entries");
  }
  clear_changed(w, before.const_data_ptr<uint8_t>(), after, all);
  if (!w.is_same(weight)) weight.copy_(w);
  return result;
}

}  // namespace
}  // namespace prune_and_grow
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("prune_and_grow_", &cofire::prune_and_grow::prune_and_grow);
}
