// SPDX-License-Identifier: Apache-2.0
// The training epilogue of a gated convolution: batch normalisation, residual, activation, the
// peak of each map, and the gate, forward and backward.
//
// Contiguous maps: a thread takes a few channels at a time, reduces them and then writes them
// while they are still in its second-level cache, so that memory is read once. Channels_last maps:
// a channel has no compact memory, so the two phases are two passes over rows of pixels.
//
// Moments are taken over short runs, each read twice: once for its mean, and again, from the
// first-level cache, about that mean. No mean, however large, cancels the variance.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 32768;         // elements worth a thread of their own
constexpr int64_t kRunElements = 1024;    // contiguous maps: elements reduced in fp32
constexpr int64_t kRunRows = 64;          // channels_last: rows reduced in fp32
constexpr int64_t kGroupBytes = 1 << 19;  // of input, kept in the second-level cache

int64_t grain_of(int64_t size) { return 1 + kGrain / (size + 1); }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// apply: the activation; NaN passes. gate: the gradient where the activation's slope is one.
struct Identity {
  static Vec apply(const Vec& v) { return v; }
  static Vec gate(const Vec& grad, const Vec&) { return grad; }
};
struct Relu {
  static Vec apply(const Vec& v) { return at::vec::clamp_min(v, Vec(0.0f)); }
  static Vec gate(const Vec& grad, const Vec& out) { return (out > Vec(0.0f)) & grad; }
};
struct Relu6 {
  static Vec apply(const Vec& v) { return at::vec::clamp_max(Relu::apply(v), Vec(6.0f)); }
  static Vec gate(const Vec& grad, const Vec& out) {
    return (out > Vec(0.0f)) & (out < Vec(6.0f)) & grad;
  }
};

template <typename F>
void with_activation(c10::string_view name, F&& f) {
  if (name == "relu") return f(Relu{});
  if (name == "relu6") return f(Relu6{});
  f(Identity{});
}

// Calls step(i) for each whole vector of [0, size) and step(i, rest) for the tail.
template <typename F>
inline void for_vectors(int64_t size, F&& step) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) step(i);
  if (i < size) step(i, size - i);
}

// For sums: step(part, i) for each multiple i of kUnit below size. Four parts take turns, so that
// additions neither wait for one another nor form long chains.
constexpr int kParts = 4;

template <int64_t kUnit, typename F>
inline void in_parts(int64_t size, F&& step) {
  int64_t i = 0;
  for (; i + kParts * kUnit <= size; i += kParts * kUnit) {
    for (int part = 0; part < kParts; ++part) step(part, i + part * kUnit);
  }
  for (; i < size; i += kUnit) step(0, i);
}

template <typename F>
inline void for_vectors_in_parts(int64_t size, F&& step) {
  const int64_t whole = size / kLanes * kLanes;
  in_parts<kLanes>(whole, step);
  if (whole < size) step(0, whole, size - whole);
}

template <typename T>
inline T sum_of_parts(const T (&part)[kParts]) {
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// The lanes of v that the tail covers; all of them without one.
inline Vec covered_lanes(const Vec& v) { return v; }
inline Vec covered_lanes(const Vec& v, int64_t count) { return Vec::set(Vec(0.0f), v, count); }

// Geometry of a [N, C, H, W] map.
struct Map {
  explicit Map(const at::Tensor& t)
      : samples(t.size(0)), channels(t.size(1)), size(t.size(2) * t.size(3)) {}
  int64_t rows() const { return samples * size; }  // elements of a channel
  int64_t plane(int64_t n, int64_t c) const { return (n * channels + c) * size; }

  int64_t samples, channels, size;
};

// Whether the channels of a pixel lie next to each other. (One-pixel maps do in both formats.)
bool has_rows(const at::Tensor& t, const Map& map) {
  return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast || map.size == 1;
}

at::Tensor as_float(const at::Tensor& t) { return t.to(at::kFloat).contiguous(); }

// Runs f(c0, c1) over groups of channels of a contiguous map.
template <typename F>
void for_channel_groups(const Map& map, int64_t element_size, F&& f) {
  const int64_t channel_bytes = map.rows() * element_size;
  const int64_t group = std::clamp<int64_t>(kGroupBytes / channel_bytes, 1, 16);
  const int64_t groups = ceil_div(map.channels, group);
  at::parallel_for(0, groups, grain_of(map.rows() * group), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      f(g * group, std::min((g + 1) * group, map.channels));
    }
  });
}

// Runs f(part, first_row, last_row) over pieces of at most `length` pixels of one sample each.
// Parts are numbered by sample, `ceil(size / length)` to a sample.
template <typename F>
void for_sample_parts(const Map& map, int64_t length, F&& f) {
  const int64_t parts = ceil_div(map.size, length);
  const int64_t grain = grain_of(std::min(length, map.size) * map.channels);
  at::parallel_for(0, map.samples * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / parts, p = i % parts * length;
      f(i, n * map.size + p, n * map.size + std::min(p + length, map.size));
    }
  });
}

// The sum of one series, and of its products with another.
struct Sums {
  Vec first{0.0f}, product{0.0f};

  void add(const Vec& a, const Vec& b) {
    first = first + a;
    product = at::vec::fmadd(a, b, product);
  }
  Sums operator+(const Sums& other) const {
    return {first + other.first, product + other.product};
  }
};

// ---- moments ----

// Number, mean and sum of squared deviations, merged by Chan's rule.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(double n, double other_mean, double other_m2) {
    const double delta = other_mean - mean;
    const double total = count + n, share = n / total;
    mean += delta * share;
    m2 += other_m2 + delta * delta * count * share;
    count = total;
  }
  // `sum` and `square` are taken about `pivot`.
  void merge_sums(double n, double pivot, double sum, double square) {
    merge(n, pivot + sum / n, square - sum * sum / n);
  }
};

// A run of `planes` planes, `stride` elements apart, of `size` elements each.
template <typename T>
void add_run(Moments& total, const T* x, int64_t planes, int64_t stride, int64_t size) {
  Vec sum[kParts] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  for (int64_t p = 0; p < planes; ++p) {
    for_vectors_in_parts(size, [&](int part, int64_t i, auto... rest) {
      sum[part] = sum[part] + load_f32(x + p * stride + i, rest...);
    });
  }
  const float count = static_cast<float>(planes * size);
  const float pivot = reduce_add(sum_of_parts(sum)) / count;
  Sums sums[kParts];
  for (int64_t p = 0; p < planes; ++p) {
    for_vectors_in_parts(size, [&](int part, int64_t i, auto... rest) {
      const Vec d = covered_lanes(load_f32(x + p * stride + i, rest...) - Vec(pivot), rest...);
      sums[part].add(d, d);
    });
  }
  const Sums total_sums = sum_of_parts(sums);
  total.merge_sums(count, pivot, reduce_add(total_sums.first), reduce_add(total_sums.product));
}

// Moments of channels [c0, c1) of a contiguous map.
template <typename T>
void group_moments(const T* x, const Map& map, int64_t c0, int64_t c1, float* mean, float* var) {
  std::vector<Moments> moments(c1 - c0);
  const int64_t planes = std::max<int64_t>(1, kRunElements / 4 / map.size);
  for (int64_t n = 0; n < map.samples; n += planes) {
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t stride = map.channels * map.size;
      for (int64_t i = 0; i < map.size; i += kRunElements) {
        add_run(moments[c - c0], x + map.plane(n, c) + i, std::min(planes, map.samples - n), stride,
                std::min(kRunElements, map.size - i));
      }
    }
  }
  for (int64_t c = c0; c < c1; ++c) {
    mean[c] = static_cast<float>(moments[c - c0].mean);
    var[c] = static_cast<float>(moments[c - c0].m2 / moments[c - c0].count);
  }
}

// Moments of all channels of a channels_last map.
template <typename T>
void row_moments(const T* x, const Map& map, float* mean, float* var) {
  const int64_t rows = map.rows(), channels = map.channels, runs = ceil_div(rows, kRunRows);
  std::vector<float> scratch(runs * 3 * channels);  // pivot, sum and square of each run
  at::parallel_for(0, runs, grain_of(kRunRows * channels), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t length = std::min(kRunRows, rows - r * kRunRows);
      float* out = scratch.data() + r * 3 * channels;
      for_vectors(channels, [&](int64_t c, auto... rest) {
        const T* column = x + r * kRunRows * channels + c;
        Vec sum[kParts] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
        in_parts<1>(length, [&](int part, int64_t i) {
          sum[part] = sum[part] + load_f32(column + i * channels, rest...);
        });
        const Vec pivot = sum_of_parts(sum) / Vec(static_cast<float>(length));
        Sums part_sums[kParts];
        in_parts<1>(length, [&](int part, int64_t i) {
          const Vec d = load_f32(column + i * channels, rest...) - pivot;
          part_sums[part].add(d, d);
        });
        const Sums sums = sum_of_parts(part_sums);
        store_f32(out + c, pivot, rest...);
        store_f32(out + channels + c, sums.first, rest...);
        store_f32(out + 2 * channels + c, sums.product, rest...);
      });
    }
  });
  at::parallel_for(0, channels, grain_of(4 * runs), [&](int64_t begin, int64_t end) {
    std::vector<Moments> moments(end - begin);
    for (int64_t r = 0; r < runs; ++r) {
      const double length = static_cast<double>(std::min(kRunRows, rows - r * kRunRows));
      const float* run = scratch.data() + r * 3 * channels;
      for (int64_t c = begin; c < end; ++c) {
        moments[c - begin].merge_sums(length, run[c], run[channels + c], run[2 * channels + c]);
      }
    }
    for (int64_t c = begin; c < end; ++c) {
      mean[c] = static_cast<float>(moments[c - begin].mean);
      var[c] = static_cast<float>(moments[c - begin].m2 / moments[c - begin].count);
    }
  });
}

// ---- forward ----

// One plane: writes the output if it is kept, else zeros, and returns the peak either way.
template <typename Act, bool kResidual, typename T>
float norm_act_plane(const T* x, const T* residual, T* y, int64_t size, bool keep, float mean,
                     float scale, float bias) {
  Vec peak(0.0f);
  for_vectors(size, [&](int64_t i, auto... rest) {
    Vec u = at::vec::fmadd(load_f32(x + i, rest...) - Vec(mean), Vec(scale), Vec(bias));
    if constexpr (kResidual) u = u + load_f32(residual + i, rest...);
    u = Act::apply(u);
    if (keep) store_f32(y + i, u, rest...);
    peak = at::vec::maximum(peak, covered_lanes(u.abs(), rest...));
  });
  if (!keep) std::fill(y, y + size, T(0));
  return reduce_max(peak);
}

// Rows of one sample of a channels_last map; `keep` has a zero or all-ones word per channel, and
// `peak` is updated.
template <typename Act, bool kResidual, typename T>
void norm_act_rows(const T* x, const T* residual, T* y, int64_t rows, int64_t channels,
                   const float* keep, const float* mean, const float* scale, const float* bias,
                   float* peak) {
  for_vectors(channels, [&](int64_t c, auto... rest) {
    const Vec mean_c = load_f32(mean + c, rest...), scale_c = load_f32(scale + c, rest...);
    const Vec bias_c = load_f32(bias + c, rest...), keep_c = load_f32(keep + c, rest...);
    Vec peak_c = load_f32(peak + c, rest...);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = r * channels + c;
      Vec u = at::vec::fmadd(load_f32(x + i, rest...) - mean_c, scale_c, bias_c);
      if constexpr (kResidual) u = u + load_f32(residual + i, rest...);
      u = Act::apply(u);
      store_f32(y + i, u & keep_c, rest...);
      peak_c = at::vec::maximum(peak_c, u.abs());
    }
    store_f32(peak + c, peak_c, rest...);
  });
}

// Words of ones for the kept channels and zeros for the others, [N, C], as fp32 patterns.
std::vector<float> keep_words(const bool* mask, const Map& map) {
  const uint32_t ones = 0xffffffff;
  float kept;
  std::memcpy(&kept, &ones, sizeof(kept));
  std::vector<float> words(map.samples * map.channels, kept);
  if (mask) {
    for (size_t i = 0; i < words.size(); ++i) words[i] = mask[i] ? kept : 0.0f;
  }
  return words;
}

struct Parameters {
  const float *weight, *bias;
  float *mean, *var;
  double eps;

  float rstd(int64_t c) const { return static_cast<float>(1 / std::sqrt(var[c] + eps)); }
};

template <typename Act, bool kResidual, typename T>
void forward_planes(const T* x, const T* residual, const bool* mask, const Map& map,
                    const Parameters& p, bool training, T* y, float* peak) {
  for_channel_groups(map, sizeof(T), [&](int64_t c0, int64_t c1) {
    if (training) group_moments(x, map, c0, c1, p.mean, p.var);
    for (int64_t n = 0; n < map.samples; ++n) {
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t i = n * map.channels + c, at = map.plane(n, c);
        peak[i] = norm_act_plane<Act, kResidual>(
            x + at, kResidual ? residual + at : nullptr, y + at, map.size, !mask || mask[i],
            p.mean[c], p.weight[c] * p.rstd(c), p.bias[c]);
      }
    }
  });
}

template <typename Act, bool kResidual, typename T>
void forward_rows(const T* x, const T* residual, const bool* mask, const Map& map,
                  const Parameters& p, bool training, T* y, float* peak) {
  constexpr int64_t kTile = 8;  // rows that share a load of the parameters
  const int64_t channels = map.channels, parts = ceil_div(map.size, kRunRows);
  if (training) row_moments(x, map, p.mean, p.var);
  std::vector<float> scale(channels);
  for (int64_t c = 0; c < channels; ++c) scale[c] = p.weight[c] * p.rstd(c);
  const std::vector<float> keep = keep_words(mask, map);
  std::vector<float> peaks(map.samples * parts * channels, 0.0f);
  for_sample_parts(map, kRunRows, [&](int64_t part, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r += kTile) {
      const int64_t at = r * channels;
      norm_act_rows<Act, kResidual>(x + at, kResidual ? residual + at : nullptr, y + at,
                                    std::min(kTile, end - r), channels,
                                    keep.data() + part / parts * channels, p.mean, scale.data(),
                                    p.bias, peaks.data() + part * channels);
    }
  });
  for (int64_t n = 0; n < map.samples; ++n) {
    for_vectors(channels, [&](int64_t c, auto... rest) {
      Vec largest(0.0f);
      for (int64_t i = n * parts; i < (n + 1) * parts; ++i) {
        largest = at::vec::maximum(largest, load_f32(peaks.data() + i * channels + c, rest...));
      }
      store_f32(peak + n * channels + c, largest, rest...);
    });
  }
}

// The mask as contiguous bool, or an undefined tensor.
at::Tensor as_mask(const char* op, const std::optional<at::Tensor>& mask, const at::Tensor& input) {
  if (!mask) return {};
  TORCH_CHECK(mask->sizes() == input.sizes().slice(0, 2), op, ": mask must be [N, C] = ",
              input.sizes().slice(0, 2), ", got ", mask->sizes());
  return mask->to(at::kBool).contiguous();
}

void check_channels(const char* op, const char* name, const at::Tensor& t, int64_t channels) {
  TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, op, ": ", name, " must be [C] = [", channels,
              "], got ", t.sizes());
}

// `t` like `input` in shape, dtype and memory format.
at::Tensor as_input(const char* op, const char* name, const at::Tensor& t,
                    const at::Tensor& input) {
  TORCH_CHECK(t.sizes() == input.sizes(), op, ": ", name, " must have input's shape ",
              input.sizes(), ", got ", t.sizes());
  return t.to(input.scalar_type()).contiguous(input.suggest_memory_format());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gated_norm_act(
    const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
    const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& mask,
    c10::string_view activation, bool training, double eps) {
  if (!covered(input) || input.numel() == 0) {
    return reference("cofire::gated_norm_act", &gated_norm_act, input, weight, bias, running_mean,
                     running_var, residual, mask, activation, training, eps);
  }
  constexpr const char* kOp = "gated_norm_act";
  TORCH_CHECK(input.dim() == 4, kOp, ": input must be 4-D [N, C, H, W], got ", input.dim(), "-D");
  const Map map(input);
  check_channels(kOp, "weight", weight, map.channels);
  check_channels(kOp, "bias", bias, map.channels);
  const at::Tensor x = input.contiguous(input.suggest_memory_format());
  const at::Tensor w = as_float(weight), b = as_float(bias), m = as_mask(kOp, mask, input);
  const at::Tensor r = residual ? as_input(kOp, "residual", *residual, x) : at::Tensor();
  at::Tensor mean = at::empty({map.channels}, w.options());
  at::Tensor var = at::empty({map.channels}, w.options());
  if (!training) {
    TORCH_CHECK(running_mean && running_var, kOp,
                ": running_mean and running_var must be given when training is False");
    check_channels(kOp, "running_mean", *running_mean, map.channels);
    check_channels(kOp, "running_var", *running_var, map.channels);
    mean.copy_(*running_mean);
    var.copy_(*running_var);
  }
  at::Tensor output = at::empty_like(x);
  at::Tensor peak = at::empty({map.samples, map.channels}, w.options());
  const Parameters p{w.const_data_ptr<float>(), b.const_data_ptr<float>(), mean.data_ptr<float>(),
                     var.data_ptr<float>(), eps};
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    with_activation(activation, [&](auto act) {
      using Act = decltype(act);
      const auto run = [&](auto kernel) {
        kernel(x.const_data_ptr<T>(), residual ? r.const_data_ptr<T>() : nullptr,
               mask ? m.const_data_ptr<bool>() : nullptr, map, p, training, output.data_ptr<T>(),
               peak.data_ptr<float>());
      };
      if (has_rows(x, map)) {
        residual ? run(forward_rows<Act, true, T>) : run(forward_rows<Act, false, T>);
      } else {
        residual ? run(forward_planes<Act, true, T>) : run(forward_planes<Act, false, T>);
      }
    });
  });
  return {output, peak, mean, var};
}

// ---- backward ----

namespace {

// dpre: the gradient of the pre-activation, grad where the channel is kept and the slope is one.
// Its sums are taken with the deviation x - mean; then
//   grad_input = slope * dpre + offset + curve * (x - mean),
// which in evaluation mode is the first term alone.
struct InputGrad {
  float slope = 0, offset = 0, curve = 0;

  InputGrad() = default;
  InputGrad(float scale, float rstd, double count, double sum, double product, bool training)
      : slope(scale) {
    if (!training) return;
    offset = static_cast<float>(-scale * sum / count);
    curve = static_cast<float>(-scale * product * rstd * rstd / count);
  }
};

template <typename T>
struct Gradients {
  const T *grad, *output, *input;
  T *grad_input, *grad_residual;  // grad_residual may be null
};

template <typename Act, typename T, typename... Rest>
inline Vec dpre_at(const Gradients<T>& g, int64_t i, Rest... rest) {
  if constexpr (std::is_same_v<Act, Identity>) {
    return load_f32(g.grad + i, rest...);
  } else {
    return Act::gate(load_f32(g.grad + i, rest...), load_f32(g.output + i, rest...));
  }
}

template <typename Act, typename T>
void reduce_plane(const Gradients<T>& g, int64_t at, int64_t size, bool keep, float mean,
                  double& sum, double& product) {
  if (!keep) {
    if (g.grad_residual) std::fill_n(g.grad_residual + at, size, T(0));
    return;
  }
  for (int64_t begin = at; begin < at + size; begin += kRunElements) {
    Sums sums[kParts];
    const int64_t length = std::min(kRunElements, at + size - begin);
    for_vectors_in_parts(length, [&](int part, int64_t i, auto... rest) {
      const Vec d = dpre_at<Act>(g, begin + i, rest...);
      sums[part].add(d, load_f32(g.input + begin + i, rest...) - Vec(mean));
      if (g.grad_residual) store_f32(g.grad_residual + begin + i, d, rest...);
    });
    const Sums total = sum_of_parts(sums);
    sum += reduce_add(total.first);
    product += reduce_add(total.product);
  }
}

template <typename Act, typename T>
void input_grad_plane(const Gradients<T>& g, int64_t at, int64_t size, bool keep, float mean,
                      const InputGrad& f) {
  for_vectors(size, [&](int64_t i, auto... rest) {
    const Vec deviation = load_f32(g.input + at + i, rest...) - Vec(mean);
    Vec out = at::vec::fmadd(Vec(f.curve), deviation, Vec(f.offset));
    if (keep) out = at::vec::fmadd(Vec(f.slope), dpre_at<Act>(g, at + i, rest...), out);
    store_f32(g.grad_input + at + i, out, rest...);
  });
}

template <typename Act, typename T>
void backward_planes(const Gradients<T>& g, const bool* mask, const Map& map, const Parameters& p,
                     bool training, float* grad_weight, float* grad_bias) {
  for_channel_groups(map, 3 * sizeof(T), [&](int64_t c0, int64_t c1) {
    const auto keep = [&](int64_t n, int64_t c) { return !mask || mask[n * map.channels + c]; };
    std::vector<double> sum(c1 - c0), product(c1 - c0);
    for (int64_t n = 0; n < map.samples; ++n) {
      for (int64_t c = c0; c < c1; ++c) {
        reduce_plane<Act>(g, map.plane(n, c), map.size, keep(n, c), p.mean[c], sum[c - c0],
                          product[c - c0]);
      }
    }
    std::vector<InputGrad> factors(c1 - c0);
    for (int64_t c = c0; c < c1; ++c) {
      const float rstd = p.rstd(c);
      grad_bias[c] = static_cast<float>(sum[c - c0]);
      grad_weight[c] = static_cast<float>(product[c - c0] * rstd);
      factors[c - c0] = InputGrad(p.weight[c] * rstd, rstd, static_cast<double>(map.rows()),
                                  sum[c - c0], product[c - c0], training);
    }
    for (int64_t n = 0; n < map.samples; ++n) {
      for (int64_t c = c0; c < c1; ++c) {
        input_grad_plane<Act>(g, map.plane(n, c), map.size, keep(n, c), p.mean[c],
                              factors[c - c0]);
      }
    }
  });
}

template <typename Act, typename T>
void backward_rows(const Gradients<T>& g, const bool* mask, const Map& map, const Parameters& p,
                   bool training, float* grad_weight, float* grad_bias) {
  const int64_t channels = map.channels, parts = ceil_div(map.size, kRunRows);
  const std::vector<float> words = keep_words(mask, map);
  std::vector<float> scratch(map.samples * parts * 2 * channels);  // both sums of each part
  for_sample_parts(map, kRunRows, [&](int64_t part, int64_t begin, int64_t end) {
    const float* keep = words.data() + part / parts * channels;
    float* out = scratch.data() + part * 2 * channels;
    for_vectors(channels, [&](int64_t c, auto... rest) {
      const Vec keep_c = load_f32(keep + c, rest...), mean_c = load_f32(p.mean + c, rest...);
      Sums part_sums[kParts];
      in_parts<1>(end - begin, [&](int part_of, int64_t row) {
        const int64_t i = (begin + row) * channels + c;
        const Vec d = dpre_at<Act>(g, i, rest...) & keep_c;
        part_sums[part_of].add(d, load_f32(g.input + i, rest...) - mean_c);
        if (g.grad_residual) store_f32(g.grad_residual + i, d, rest...);
      });
      const Sums sums = sum_of_parts(part_sums);
      store_f32(out + c, sums.first, rest...);
      store_f32(out + channels + c, sums.product, rest...);
    });
  });
  std::vector<float> slope(channels), offset(channels), curve(channels);
  at::parallel_for(0, channels, grain_of(map.samples * parts), [&](int64_t begin, int64_t end) {
    std::vector<double> sum(end - begin), product(end - begin);
    for (int64_t i = 0; i < map.samples * parts; ++i) {
      const float* part = scratch.data() + i * 2 * channels;
      for (int64_t c = begin; c < end; ++c) {
        sum[c - begin] += part[c];
        product[c - begin] += part[channels + c];
      }
    }
    for (int64_t c = begin; c < end; ++c) {
      const float rstd = p.rstd(c);
      grad_bias[c] = static_cast<float>(sum[c - begin]);
      grad_weight[c] = static_cast<float>(product[c - begin] * rstd);
      const InputGrad f(p.weight[c] * rstd, rstd, static_cast<double>(map.rows()), sum[c - begin],
                        product[c - begin], training);
      slope[c] = f.slope;
      offset[c] = f.offset;
      curve[c] = f.curve;
    }
  });
  for_sample_parts(map, kRunRows, [&](int64_t part, int64_t begin, int64_t end) {
    const float* keep = words.data() + part / parts * channels;
    for_vectors(channels, [&](int64_t c, auto... rest) {
      const Vec keep_c = load_f32(keep + c, rest...), mean_c = load_f32(p.mean + c, rest...);
      const Vec slope_c = load_f32(slope.data() + c, rest...);
      const Vec offset_c = load_f32(offset.data() + c, rest...);
      const Vec curve_c = load_f32(curve.data() + c, rest...);
      for (int64_t i = begin * channels + c; i < end * channels; i += channels) {
        const Vec d = dpre_at<Act>(g, i, rest...) & keep_c;
        const Vec deviation = load_f32(g.input + i, rest...) - mean_c;
        const Vec out = at::vec::fmadd(curve_c, deviation, offset_c);
        store_f32(g.grad_input + i, at::vec::fmadd(slope_c, d, out), rest...);
      }
    });
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gated_norm_act_backward(
    const at::Tensor& grad, const at::Tensor& output, const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& mean, const at::Tensor& var,
    const std::optional<at::Tensor>& mask, c10::string_view activation, bool training,
    bool residual, double eps) {
  if (!covered(input) || input.numel() == 0) {
    return reference("cofire::gated_norm_act_backward", &gated_norm_act_backward, grad, output,
                     input, weight, mean, var, mask, activation, training, residual, eps);
  }
  constexpr const char* kOp = "gated_norm_act_backward";
  TORCH_CHECK(input.dim() == 4, kOp, ": input must be 4-D [N, C, H, W], got ", input.dim(), "-D");
  const Map map(input);
  check_channels(kOp, "weight", weight, map.channels);
  check_channels(kOp, "mean", mean, map.channels);
  check_channels(kOp, "var", var, map.channels);
  const at::Tensor x = input.contiguous(input.suggest_memory_format());
  const at::Tensor g = as_input(kOp, "grad", grad, x), y = as_input(kOp, "output", output, x);
  const at::Tensor w = as_float(weight), mu = as_float(mean), v = as_float(var);
  const at::Tensor m = as_mask(kOp, mask, input);
  at::Tensor grad_input = at::empty_like(x);
  at::Tensor grad_residual = residual ? at::empty_like(x) : at::empty({0}, x.options());
  at::Tensor grad_weight = at::empty({map.channels}, w.options());
  at::Tensor grad_bias = at::empty({map.channels}, w.options());
  const Parameters p{w.const_data_ptr<float>(), nullptr, mu.data_ptr<float>(), v.data_ptr<float>(),
                     eps};
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Gradients<T> gradients{g.const_data_ptr<T>(), y.const_data_ptr<T>(),
                                 x.const_data_ptr<T>(), grad_input.data_ptr<T>(),
                                 residual ? grad_residual.data_ptr<T>() : nullptr};
    with_activation(activation, [&](auto act) {
      using Act = decltype(act);
      const auto kernel = has_rows(x, map) ? backward_rows<Act, T> : backward_planes<Act, T>;
      kernel(gradients, mask ? m.const_data_ptr<bool>() : nullptr, map, p, training,
             grad_weight.data_ptr<float>(), grad_bias.data_ptr<float>());
    });
  });
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("gated_norm_act", &cofire::gated_norm_act);
  m.impl("gated_norm_act_backward", &cofire::gated_norm_act_backward);
}
