// SPDX-License-Identifier: Apache-2.0
// The gates of dynamic channel gating (FTWT, Elkerdawy et al., CVPR 2022): pooled channel
// descriptors, mass-based targets, and the head that predicts a mask per sample.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <atomic>
#include <cmath>
#include <limits>

#include "selection.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace {

constexpr float kTolerance = 1e-5f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool is_channels_last(const at::Tensor& input) {
  return memory_format(input) == at::MemoryFormat::ChannelsLast;
}

// ---- channel_pool ----

// Running sum or maximum of a channel, and the union of the bits of its magnitudes: zero if and
// only if every element is +0 or -0.
template <bool kMax>
struct Pool {
  Vec value{kMax ? -kInfinity : 0.0f};
  Vec bits{0.0f};

  void add(const Vec& x) {
    value = kMax ? at::vec::maximum(value, x) : value + x;
    bits = bits | x.abs();
  }
  void add(const Pool& other) {
    value = kMax ? at::vec::maximum(value, other.value) : value + other.value;
    bits = bits | other.bits;
  }
};

template <bool kMax, typename T>
void pool_plane(const T* x, int64_t size, T& pooled, bool& support) {
  Pool<kMax> part[4];
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) part[j].add(load_f32(x + i + j * kLanes));
  }
  for (; i + kLanes <= size; i += kLanes) part[0].add(load_f32(x + i));
  if (const int64_t rest = size - i; rest > 0) {
    const Vec pad(kMax ? -kInfinity : 0.0f);
    const Vec tail = Vec::set(pad, load_f32(x + i, rest), rest);
    part[0].value = kMax ? at::vec::maximum(part[0].value, tail) : part[0].value + tail;
    part[0].bits = part[0].bits | load_f32(x + i, rest).abs();
  }
  part[0].add(part[1]);
  part[2].add(part[3]);
  part[0].add(part[2]);
  const float value =
      kMax ? reduce_max(part[0].value) : reduce_add(part[0].value) / static_cast<float>(size);
  pooled = static_cast<T>(value);
  support = part[0].bits.zero_mask() != (1 << kLanes) - 1;
}

// Up to kLanes neighbouring channels of a channels_last sample: x[p * stride + lane].
template <bool kMax, typename T>
void pool_lanes(const T* x, int64_t size, int64_t stride, int64_t lanes, T* pooled, bool* support) {
  constexpr int64_t kRun = 64;  // sums in two levels: short runs, then their sums
  Pool<kMax> total;
  for (int64_t begin = 0; begin < size; begin += kRun) {
    Pool<kMax> run;
    const int64_t end = std::min(begin + kRun, size);
    if (lanes == kLanes) {
      for (int64_t p = begin; p < end; ++p) run.add(load_f32(x + p * stride));
    } else {
      for (int64_t p = begin; p < end; ++p) run.add(load_f32(x + p * stride, lanes));
    }
    total.add(run);
  }
  store_f32(pooled, kMax ? total.value : total.value / Vec(static_cast<float>(size)), lanes);
  const int zeros = total.bits.zero_mask();
  for (int64_t i = 0; i < lanes; ++i) support[i] = !(zeros >> i & 1);
}

template <bool kMax, typename T>
void pool_channels(const at::Tensor& input, at::Tensor& pooled, at::Tensor& support) {
  const int64_t samples = input.size(0), channels = input.size(1);
  const int64_t size = input.size(2) * input.size(3);
  const T* x = input.const_data_ptr<T>();
  T* value = pooled.data_ptr<T>();
  bool* any = support.data_ptr<bool>();
  if (!is_channels_last(input)) {
    at::parallel_for(0, samples * channels, grain_of(size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        pool_plane<kMax>(x + i * size, size, value[i], any[i]);
      }
    });
    return;
  }
  const int64_t blocks = (channels + kLanes - 1) / kLanes;
  at::parallel_for(0, samples * blocks, grain_of(size * kLanes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, c = i % blocks * kLanes;
      pool_lanes<kMax>(x + n * size * channels + c, size, channels, std::min(kLanes, channels - c),
                       value + n * channels + c, any + n * channels + c);
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> channel_pool(const at::Tensor& input,
                                                            c10::string_view mode) {
  if (!covered(input) || input.numel() == 0) {
    return reference("cofire::channel_pool", &channel_pool, input, mode);
  }
  TORCH_CHECK(input.dim() == 4, "channel_pool: input must be 4-D [N, C, H, W], got ", input.dim(),
              "-D");
  const at::Tensor x = input.contiguous(memory_format(input));
  at::Tensor pooled = at::empty({x.size(0), x.size(1)}, x.options());
  at::Tensor support = at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kBool));
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (mode == "max") {
      pool_channels<true, T>(x, pooled, support);
    } else {
      pool_channels<false, T>(x, pooled, support);
    }
  });
  auto [index, count] = compact(support);
  return {pooled, index, count};
}

namespace {

// The lanes that hold the maximum; where that is NaN, the lanes that are NaN.
Vec is_maximum(const Vec& x, const Vec& maximum) { return (x == maximum) | (x != x); }

template <typename T>
int64_t first_maximum(const T* x, int64_t size) {
  T pooled;
  bool support;
  pool_plane<true>(x, size, pooled, support);
  const float maximum = static_cast<float>(pooled);
  int64_t i = 0;
  while (i + kLanes <= size &&
         is_maximum(load_f32(x + i), Vec(maximum)).zero_mask() == (1 << kLanes) - 1) {
    i += kLanes;
  }
  for (; i < size - 1; ++i) {
    const float value = static_cast<float>(x[i]);
    if (value == maximum || value != value) break;
  }
  return i;
}

template <typename T>
void unpool_planes(const T* grad, const T* x, T* out, int64_t planes, int64_t size, bool is_max) {
  at::parallel_for(0, planes, grain_of(size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* plane = out + i * size;
      if (is_max) {
        std::fill(plane, plane + size, T(0));
        plane[first_maximum(x + i * size, size)] = grad[i];
      } else {
        const float share = static_cast<float>(grad[i]) / static_cast<float>(size);
        std::fill(plane, plane + size, static_cast<T>(share));
      }
    }
  });
}

// Up to kLanes neighbouring channels of a channels_last sample.
template <typename T>
void unpool_lanes(const T* grad, const T* x, T* out, int64_t size, int64_t stride, int64_t lanes,
                  bool is_max) {
  const Vec g = load_f32(grad, lanes);
  if (!is_max) {
    const Vec share = g / Vec(static_cast<float>(size));
    for (int64_t p = 0; p < size; ++p) store_f32(out + p * stride, share, lanes);
    return;
  }
  Vec maximum(-kInfinity);
  for (int64_t p = 0; p < size; ++p) {
    maximum = at::vec::maximum(maximum, load_f32(x + p * stride, lanes));
  }
  Vec pending = g == g | g != g;  // all lanes set
  for (int64_t p = 0; p < size; ++p) {
    const Vec hit = is_maximum(load_f32(x + p * stride, lanes), maximum) & pending;
    pending = pending ^ hit;
    store_f32(out + p * stride, hit & g, lanes);
  }
}

template <typename T>
void unpool_channels_last(const T* grad, const T* x, T* out, int64_t samples, int64_t channels,
                          int64_t size, bool is_max) {
  const int64_t blocks = (channels + kLanes - 1) / kLanes;
  at::parallel_for(0, samples * blocks, grain_of(size * kLanes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, c = i % blocks * kLanes, at = n * size * channels + c;
      unpool_lanes(grad + n * channels + c, x + at, out + at, size, channels,
                   std::min(kLanes, channels - c), is_max);
    }
  });
}

}  // namespace

at::Tensor channel_pool_backward(const at::Tensor& grad, const at::Tensor& input,
                                 c10::string_view mode) {
  if (!covered(input) || input.numel() == 0 || grad.scalar_type() != input.scalar_type()) {
    return reference("cofire::channel_pool_backward", &channel_pool_backward, grad, input, mode);
  }
  const int64_t samples = input.size(0), channels = input.size(1);
  const int64_t size = input.size(2) * input.size(3);
  TORCH_CHECK(grad.dim() == 2 && grad.size(0) == samples && grad.size(1) == channels,
              "channel_pool_backward: grad must be [N, C] = [", samples, ", ", channels, "], got ",
              grad.sizes());
  const at::Tensor g = grad.contiguous();
  const at::Tensor x = input.contiguous(memory_format(input));
  at::Tensor out = empty_map(x);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* g_data = g.const_data_ptr<T>();
    const T* x_data = x.const_data_ptr<T>();
    T* out_data = out.data_ptr<T>();
    const bool is_max = mode == "max";
    if (is_channels_last(x)) {
      unpool_channels_last(g_data, x_data, out_data, samples, channels, size, is_max);
    } else {
      unpool_planes(g_data, x_data, out_data, samples * channels, size, is_max);
    }
  });
  return out;
}

// ---- mass_mask ----

namespace {

bool within(double cumulative, float mass) {
  return static_cast<float>(cumulative) - mass <= kTolerance;
}

// How many channels of a row, in descending order, the mass rule keeps. Running sums are held in
// fp64 and rounded to fp32 at each step, as torch.cumsum does, so that the plain-torch expression
// agrees bit for bit.
int64_t mass_kept(const DescendingOrder& order, const float* scores, int64_t positive,
                  double whole) {
  const bool lossless = whole == 1;
  const auto mass = static_cast<float>(whole);
  double sum = 0;
  for (int64_t i = 0; i < positive; ++i) sum += scores[order.position(i)];
  const float total = static_cast<float>(sum);
  double cumulative = 0;
  for (int64_t i = 0; i < positive; ++i) {
    const float share = scores[order.position(i)] / total;
    cumulative += share;
    if (lossless ? share <= kTolerance : !within(cumulative, mass)) return i;
  }
  return lossless || positive == 0 ? positive : order.size();  // zeros add nothing to the sum
}

// The same without sorting a row: shares are added up by magnitude, and only those of the magnitude
// that crosses the mass are put in order. 128x512: twice as fast.
class MassSelection {
 public:
  explicit MassSelection(int64_t size) : share_(size), bucket_(size), crossing_(size) {}

  // Writes the mask and returns true; false: the order of the sums may matter, or too few are kept.
  bool run(const float* scores, double whole, int64_t min_keep, bool* mask) {
    if (!sum_shares(scores)) return false;
    const int64_t size = static_cast<int64_t>(share_.size());
    if (whole == 1) {
      for (int64_t i = 0; i < size; ++i) mask[i] = share_[i] > kTolerance;
    } else {
      keep_mass(scores, static_cast<float>(whole), mask);
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) kept += mask[i];
    return kept >= min_keep;
  }

 private:
  static constexpr int kBuckets = 256, kShift = 20, kFirst = 768;  // exponent, three more bits

  // fp64 adds fp32 values exactly, in any order, while the sum is below 2^29 of the smallest: all
  // are multiples of its last place. With 2^27, so do the shares.
  bool sum_shares(const float* scores) {
    constexpr int kParts = 8;
    const int64_t size = static_cast<int64_t>(share_.size());
    double sums[kParts] = {};
    float least[kParts];
    std::fill_n(least, kParts, kInfinity);
    for (int64_t i = 0; i < size; i += kParts) {
      const int64_t parts = std::min<int64_t>(kParts, size - i);
      for (int64_t l = 0; l < parts; ++l) {
        const float s = scores[i + l];
        sums[l] += s;
        least[l] = s > 0 && s < least[l] ? s : least[l];
      }
    }
    double sum = 0;
    for (const double s : sums) sum += s;
    const float total = static_cast<float>(sum);
    const float smallest = *std::min_element(least, least + kParts);
    if (!(smallest > total * 0x1p-27f) || !(total < kInfinity) || total == 0) return false;
    for (int64_t i = 0; i < size; ++i) share_[i] = scores[i] / total;
    return true;
  }

  void keep_mass(const float* scores, float mass, bool* mask) {
    const int64_t size = static_cast<int64_t>(share_.size());
    for (int64_t i = 0; i < size; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &share_[i], sizeof(bits));
      bucket_[i] =
          static_cast<uint8_t>(std::max<int32_t>(0, static_cast<int32_t>(bits >> kShift) - kFirst));
    }
    double sums[kBuckets] = {};
    for (int64_t i = 0; i < size; ++i) sums[bucket_[i]] += share_[i];
    double cumulative = 0;
    int bucket = kBuckets - 1;  // bucket 0 holds the zeros: where the others fit, they do
    for (; bucket > 0 && within(cumulative + sums[bucket], mass); --bucket) {
      cumulative += sums[bucket];
    }
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) {
      mask[i] = bucket_[i] > bucket || bucket == 0;
      crossing_[count] = i;
      count += bucket_[i] == bucket && bucket > 0;
    }
    const auto end = crossing_.begin() + count;
    std::stable_sort(crossing_.begin(), end,
                     [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
    for (auto i = crossing_.begin(); i != end; ++i) {
      cumulative += share_[*i];
      if (!within(cumulative, mass)) break;
      mask[*i] = true;
    }
  }

  std::vector<float> share_;
  std::vector<uint8_t> bucket_;
  std::vector<int64_t> crossing_;
};

int64_t uniform_kept(const DescendingOrder& order, const float* scores, double ratio) {
  const int64_t size = order.size();
  int64_t kept = size - static_cast<int64_t>(ratio * static_cast<double>(size));
  while (kept > 0 && scores[order.position(kept - 1)] <= kTolerance) --kept;
  return kept;
}

bool valid_score(float s) { return s >= 0 && s < kInfinity; }

bool valid_row(const float* scores, int64_t size) {
  bool all = true;
  for (int64_t i = 0; i < size; ++i) all &= valid_score(scores[i]);
  return all;
}

[[noreturn]] void refuse_scores(const float* scores, int64_t samples, int64_t channels) {
  const float* bad = std::find_if_not(scores, scores + samples * channels, valid_score);
  const int64_t at = bad - scores;
  const std::string got = std::isnan(*bad) ? "nan" : c10::str(*bad);
  TORCH_CHECK_VALUE(false, "mass_mask: scores must be finite and non-negative, got ", got,
                    " for sample ", at / channels, ", channel ", at % channels);
}

}  // namespace

at::Tensor mass_mask(const at::Tensor& scores, double mass, c10::string_view mode,
                     int64_t min_keep) {
  if (!covered(scores) || scores.numel() == 0) {
    return reference("cofire::mass_mask", &mass_mask, scores, mass, mode, min_keep);
  }
  TORCH_CHECK(scores.dim() == 2, "mass_mask: scores must be 2-D [N, C], got ", scores.dim(), "-D");
  const at::Tensor s = scores.to(at::kFloat).contiguous();
  const int64_t samples = s.size(0), channels = s.size(1);
  const float* s_data = s.const_data_ptr<float>();
  at::Tensor mask = at::empty({samples, channels}, s.options().dtype(at::kBool));
  bool* mask_data = mask.data_ptr<bool>();
  const bool uniform = mode == "uniform", off = !uniform && mass < 0;
  std::atomic<bool> valid = true;
  at::parallel_for(0, samples, 1 + 2048 / channels, [&](int64_t begin, int64_t end) {
    DescendingOrder order(channels);
    MassSelection selection(channels);
    for (int64_t n = begin; n < end; ++n) {
      const float* row = s_data + n * channels;
      if (!valid_row(row, channels)) {
        valid = false;
        return;
      }
      if (off) {
        std::fill_n(mask_data + n * channels, channels, true);
        continue;
      }
      if (!uniform && selection.run(row, mass, min_keep, mask_data + n * channels)) continue;
      const int64_t positive = order.sort_non_negative(row);
      const int64_t kept =
          uniform ? uniform_kept(order, row, mass) : mass_kept(order, row, positive, mass);
      keep_first(order, std::max(kept, min_keep), mask_data + n * channels);
    }
  });
  if (!valid) refuse_scores(s_data, samples, channels);
  return mask;
}

// ---- gate_head ----

namespace {

// softmax(x) in fp32.
template <typename T>
void softmax_row(const T* x, int64_t size, float* out) {
  Vec maximum(-kInfinity);
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = std::min(kLanes, size - i);
    const Vec v = load_f32(x + i, count);
    maximum = at::vec::maximum(maximum, Vec::set(maximum, v, count));
  }
  const Vec shift(reduce_max(maximum));
  Vec sum(0.0f);
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = std::min(kLanes, size - i);
    const Vec e = Vec::set(Vec(0.0f), (load_f32(x + i, count) - shift).exp(), count);
    sum = sum + e;
    store_f32(out + i, e, count);
  }
  const Vec scale(1.0f / reduce_add(sum));
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = std::min(kLanes, size - i);
    store_f32(out + i, Vec::loadu(out + i, count) * scale, count);
  }
}

// What the head multiplies with its weight, in fp32.
at::Tensor activations(const at::Tensor& pooled, bool softmax) {
  if (!softmax) return pooled.to(at::kFloat);
  at::Tensor out = at::empty(pooled.sizes(), pooled.options().dtype(at::kFloat));
  const int64_t size = pooled.size(1);
  float* out_data = out.data_ptr<float>();
  dispatch(pooled.scalar_type(), [&](auto zero) {
    const auto* x = pooled.const_data_ptr<decltype(zero)>();
    at::parallel_for(0, pooled.size(0), grain_of(8 * size), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) softmax_row(x + n * size, size, out_data + n * size);
    });
  });
  return out;
}

// out[r * ldo + c] = <a_r, w_c> + bias[c] for a block of rows of a and of w. Each product sums
// its lanes in the same order in every block shape: a logit depends neither on the batch it is
// in nor on the number of threads.
template <int kRows, int kCols, typename T>
void dot_block(const float* a, const T* w, const float* bias, int64_t size, T* out, int64_t ldo) {
  Vec acc[kRows][kCols];
  for (auto& row : acc) {
    for (Vec& v : row) v = Vec(0.0f);
  }
  const auto step = [&](int64_t i, auto... count) {
    Vec wv[kCols];
    for (int c = 0; c < kCols; ++c) wv[c] = load_f32(w + c * size + i, count...);
    for (int r = 0; r < kRows; ++r) {
      const Vec av = load_f32(a + r * size + i, count...);
      for (int c = 0; c < kCols; ++c) acc[r][c] = at::vec::fmadd(av, wv[c], acc[r][c]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) step(i);
  if (i < size) step(i, size - i);
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) {
      out[r * ldo + c] = static_cast<T>(reduce_add(acc[r][c]) + (bias ? bias[c] : 0.0f));
    }
  }
}

constexpr int kBlockRows = 4;
constexpr int kBlockCols = kLanes == 16 ? 4 : 2;  // 16 accumulators of 32 registers, or 8 of 16

// All rows of a against kCols rows of w.
template <int kCols, typename T>
void dot_columns(const float* a, const T* w, const float* bias, int64_t rows, int64_t size, T* out,
                 int64_t ldo) {
  int64_t r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) {
    dot_block<kBlockRows, kCols>(a + r * size, w, bias, size, out + r * ldo, ldo);
  }
  for (; r < rows; ++r) dot_block<1, kCols>(a + r * size, w, bias, size, out + r * ldo, ldo);
}

// out = a w^T + bias
template <typename T>
void head_matmul(const float* a, const T* w, const float* bias, int64_t rows, int64_t cols,
                 int64_t size, T* out) {
  constexpr int64_t kTile = 16;  // rows of a that stay in the first-level cache
  const int64_t blocks = (cols + kBlockCols - 1) / kBlockCols;
  const int64_t grain = grain_of(rows * size * kBlockCols);
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; r += kTile) {
      const int64_t tile = std::min(kTile, rows - r);
      for (int64_t block = begin; block < end; ++block) {
        int64_t c = block * kBlockCols;
        const auto at = [&](auto f) {
          f(a + r * size, w + c * size, bias ? bias + c : nullptr, tile, size, out + r * cols + c,
            cols);
        };
        if (c + kBlockCols <= cols) {
          at(dot_columns<kBlockCols, T>);
        } else {
          for (; c < cols; ++c) at(dot_columns<1, T>);
        }
      }
    }
  });
}

template <typename T>
void threshold_row(const T* logits, int64_t size, int64_t min_keep, bool* mask) {
  int64_t kept = 0;
  for (int64_t i = 0; i < size; ++i) {
    mask[i] = static_cast<float>(logits[i]) > 0;
    kept += mask[i];
  }
  if (kept >= min_keep) return;
  DescendingOrder order(size);
  order.sort(logits);
  keep_first(order, min_keep, mask);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gate_head(
    const at::Tensor& pooled, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    bool softmax, int64_t min_keep) {
  if (!covered(pooled) || weight.scalar_type() != pooled.scalar_type() || pooled.numel() == 0 ||
      weight.numel() == 0) {
    return reference("cofire::gate_head", &gate_head, pooled, weight, bias, softmax, min_keep);
  }
  const int64_t samples = pooled.size(0), cols = weight.size(0);
  TORCH_CHECK(pooled.dim() == 2 && weight.dim() == 2 && weight.size(1) == pooled.size(1),
              "gate_head: weight must be [Co, Ci] with Ci as in pooled ", pooled.sizes(), ", got ",
              weight.sizes());
  TORCH_CHECK(!bias || bias->sizes() == weight.sizes().slice(0, 1), "gate_head: bias must be [",
              cols, "], got ", bias->sizes());
  const at::Tensor a = activations(pooled.contiguous(), softmax);
  const at::Tensor w = weight.contiguous();
  const at::Tensor b = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor logits = at::empty({samples, cols}, pooled.options());
  at::Tensor mask = at::empty({samples, cols}, pooled.options().dtype(at::kBool));
  bool* mask_data = mask.data_ptr<bool>();
  dispatch(pooled.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* out = logits.data_ptr<T>();
    head_matmul(a.const_data_ptr<float>(), w.const_data_ptr<T>(),
                bias ? b.const_data_ptr<float>() : nullptr, samples, cols, a.size(1), out);
    at::parallel_for(0, samples, grain_of(cols), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        threshold_row(out + n * cols, cols, min_keep, mask_data + n * cols);
      }
    });
  });
  auto [index, count] = compact(mask);
  return {logits, mask, index, count};
}

namespace {

// grad <- a (grad - <a, grad>), where a is the softmax. A confident softmax cancels almost all of
// the difference, so both terms are taken about the gradient of its largest entry.
template <typename T>
void softmax_backward_row(const float* a, int64_t size, T* grad) {
  const Vec pivot(static_cast<float>(grad[std::max_element(a, a + size) - a]));
  Vec sum(0.0f);
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = std::min(kLanes, size - i);
    sum = at::vec::fmadd(Vec::loadu(a + i, count), load_f32(grad + i, count) - pivot, sum);
  }
  const Vec dot(reduce_add(sum));
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = std::min(kLanes, size - i);
    const Vec difference = load_f32(grad + i, count) - pivot - dot;
    store_f32(grad + i, Vec::loadu(a + i, count) * difference, count);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> gate_head_backward(const at::Tensor& grad_logits,
                                                                  const at::Tensor& pooled,
                                                                  const at::Tensor& weight,
                                                                  bool softmax) {
  if (!covered(pooled) || weight.scalar_type() != pooled.scalar_type() ||
      grad_logits.scalar_type() != pooled.scalar_type() || pooled.numel() == 0 ||
      weight.numel() == 0) {
    return reference("cofire::gate_head_backward", &gate_head_backward, grad_logits, pooled, weight,
                     softmax);
  }
  // The products are the library's: like torch's own, their rounding may change with the number of
  // threads.
  at::Tensor grad_bias = grad_logits.sum(0);
  at::Tensor grad_pooled = grad_logits.mm(weight);
  if (!softmax) return {grad_pooled, grad_logits.t().mm(pooled), grad_bias};
  const at::Tensor a = activations(pooled.contiguous(), true);
  at::Tensor grad_weight = grad_logits.t().mm(a.to(pooled.scalar_type()));
  const int64_t size = pooled.size(1);
  dispatch(pooled.scalar_type(), [&](auto zero) {
    auto* grad = grad_pooled.data_ptr<decltype(zero)>();
    const float* a_data = a.const_data_ptr<float>();
    at::parallel_for(0, pooled.size(0), grain_of(size), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        softmax_backward_row(a_data + n * size, size, grad + n * size);
      }
    });
  });
  return {grad_pooled, grad_weight, grad_bias};
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("channel_pool", &cofire::channel_pool);
  m.impl("channel_pool_backward", &cofire::channel_pool_backward);
  m.impl("mass_mask", &cofire::mass_mask);
  m.impl("gate_head", &cofire::gate_head);
  m.impl("gate_head_backward", &cofire::gate_head_backward);
}
