// SPDX-License-Identifier: Apache-2.0
// The training epilogue of a gated convolution: batch normalisation, residual, activation, the
// peak of each map, and the gate, forward and backward.
//
// Contiguous maps: a thread takes a few channels at a time, reduces them and then writes them
// while they are still in its second-level cache, so that memory is read once. Channels_last maps:
// a channel has no compact memory, so the two phases are two passes over rows of pixels.
//
// Moments are taken about a pivot, the mean of m elements from all over the channel. It is at most
// sqrt(n / m) standard deviations from the mean of all n (Samuelson's inequality), and hardly ever
// one, so no mean, however large, cancels the variance, and memory is read once. Runs are summed in
// fp32, and the sums of the runs in fp64.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kRunElements = 256;     // contiguous maps: elements reduced in fp32
constexpr int64_t kRunRows = 16;          // channels_last: rows reduced in fp32
constexpr int64_t kPartRows = 64;         // channels_last: rows of a sample that one call takes
constexpr int64_t kGroupBytes = 1 << 19;  // of input, kept in the second-level cache

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// apply: the activation; NaN passes. gate: the gradient where the activation's slope is one.
struct Identity {
  static Vec apply(const Vec& v) { return v; }
  static Vec gate(const Vec& grad, const Vec&) { return grad; }
};
struct Relu {
  static Vec apply(const Vec& v) { return at::vec::clamp_min(v, Vec(0.0f)); }
  // As in torch, a NaN lets the gradient pass.
  static Vec gate(const Vec& grad, const Vec& out) {
    return Vec::blendv(grad, Vec(0.0f), out <= Vec(0.0f));
  }
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

// The sum of one series, and of its products with another.
struct Sums {
  Vec first{0.0f}, product{0.0f};

  void add(const Vec& a, const Vec& b) {
    first = first + a;
    product = at::vec::fmadd(a, b, product);
  }
  Sums operator+(const Sums& other) const { return {first + other.first, product + other.product}; }
};

// Sums of many runs, lane by lane in fp64.
struct WideSums {
  double first[kLanes] = {}, product[kLanes] = {};

  void add(const Sums& run) {
    float lanes[2][kLanes];
    run.first.store(lanes[0]);
    run.product.store(lanes[1]);
    for (int64_t i = 0; i < kLanes; ++i) {
      first[i] += lanes[0][i];
      product[i] += lanes[1][i];
    }
  }
};

double total(const double (&lanes)[kLanes]) {
  return std::accumulate(std::begin(lanes), std::end(lanes), 0.0);
}

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
  return memory_format(t) == at::MemoryFormat::ChannelsLast || map.size == 1;
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

// Runs f(part, first_row, last_row) over parts of at most kPartRows pixels of one sample each.
// Parts are numbered by sample, ceil(size / kPartRows) to a sample.
template <typename F>
void for_sample_parts(const Map& map, F&& f) {
  const int64_t parts = ceil_div(map.size, kPartRows);
  const int64_t grain = grain_of(std::min(kPartRows, map.size) * map.channels);
  at::parallel_for(0, map.samples * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / parts, p = i % parts * kPartRows;
      f(i, n * map.size + p, n * map.size + std::min(p + kPartRows, map.size));
    }
  });
}

// ---- channels_last: sums over rows ----

// Sums [parts, 2, C]: for each part of at most kPartRows rows of a sample, the sum of a and of
// a * b, where term(part, c, rest...)(i) is the pair (a, b) at element i, in channel c.
template <typename F>
std::vector<double> sum_parts(const Map& map, F&& term) {
  const int64_t channels = map.channels;
  std::vector<double> sums(map.samples * ceil_div(map.size, kPartRows) * 2 * channels);
  for_sample_parts(map, [&](int64_t part, int64_t begin, int64_t end) {
    double* out = sums.data() + part * 2 * channels;
    for_vectors(channels, [&](int64_t c, auto... rest) {
      const auto pair_at = term(part, c, rest...);
      WideSums wide;
      for (int64_t row = begin; row < end; row += kRunRows) {
        Sums run[kParts];
        in_parts<1>(std::min(kRunRows, end - row), [&](int j, int64_t i) {
          const auto [a, b] = pair_at((row + i) * channels + c);
          run[j].add(a, b);
        });
        wide.add(sum_of_parts(run));
      }
      const int64_t lanes = std::min(kLanes, channels - c);
      std::copy_n(wide.first, lanes, out + c);
      std::copy_n(wide.product, lanes, out + channels + c);
    });
  });
  return sums;
}

// Calls f(c, sum of a, sum of a * b) for each channel.
template <typename F>
void reduce_parts(const std::vector<double>& sums, int64_t channels, F&& f) {
  const int64_t parts = static_cast<int64_t>(sums.size()) / (2 * channels);
  at::parallel_for(0, channels, grain_of(2 * parts), [&](int64_t begin, int64_t end) {
    std::vector<double> first(end - begin), product(end - begin);
    for (int64_t i = 0; i < parts; ++i) {
      const double* part = sums.data() + i * 2 * channels;
      for (int64_t c = begin; c < end; ++c) {
        first[c - begin] += part[c];
        product[c - begin] += part[channels + c];
      }
    }
    for (int64_t c = begin; c < end; ++c) f(c, first[c - begin], product[c - begin]);
  });
}

// ---- forward ----

// What the normalisation of each channel needs: u = (x - mean) * scale + shift.
struct Normaliser {
  Normaliser(const at::Tensor& weight, const at::Tensor& bias, at::Tensor& mean, at::Tensor& var,
             double eps)
      : mean(mean.data_ptr<float>()),
        scale(mean.size(0)),
        shift(mean.size(0)),
        var_(var.data_ptr<float>()),
        weight_(weight.const_data_ptr<float>()),
        bias_(bias.const_data_ptr<float>()),
        eps_(eps) {}

  // The moments of channel c. What fp32 cannot hold of the mean goes into the shift: it matters
  // where the mean is a thousand deviations and more.
  void set(int64_t c, double exact_mean, double exact_var) {
    mean[c] = static_cast<float>(exact_mean);
    var_[c] = static_cast<float>(exact_var);
    scale[c] = static_cast<float>(weight_[c] / std::sqrt(exact_var + eps_));
    shift[c] = static_cast<float>(bias_[c] - (exact_mean - mean[c]) * scale[c]);
  }
  // The same from `count` deviations about a pivot: their sum and the sum of their squares.
  void set(int64_t c, int64_t count, double pivot, double sum, double square) {
    const double n = static_cast<double>(count), delta = sum / n;
    set(c, pivot + delta, std::max(0.0, square / n - delta * delta));
  }
  // Takes the moments as given.
  void set_from_running() {
    for (size_t c = 0; c < scale.size(); ++c) set(c, mean[c], var_[c]);
  }

  float* mean;
  std::vector<float> scale, shift;

 private:
  float* var_;
  const float *weight_, *bias_;
  double eps_;
};

// A pivot in the input's own type makes the deviations of 16-bit data exact; their rounding would
// not be random.
template <typename T>
float rounded(float pivot) {
  return static_cast<float>(static_cast<T>(pivot));
}

// Moments of channels [c0, c1) of a contiguous map.
template <typename T>
void group_moments(const T* x, const Map& map, int64_t c0, int64_t c1, Normaliser& norm) {
  std::vector<float> pivot(c1 - c0);
  std::vector<WideSums> sums(c1 - c0);
  const int64_t head = std::min(kLanes, map.size);  // of each plane, for the pivot
  for (int64_t c = c0; c < c1; ++c) {
    Vec sum(0.0f);
    for (int64_t n = 0; n < map.samples; ++n) sum = sum + load_f32(x + map.plane(n, c), head);
    pivot[c - c0] = rounded<T>(reduce_add(sum) / static_cast<float>(map.samples * head));
  }
  for (int64_t n = 0; n < map.samples; ++n) {
    for (int64_t c = c0; c < c1; ++c) {
      const Vec pivot_c(pivot[c - c0]);
      for (int64_t begin = 0; begin < map.size; begin += kRunElements) {
        const T* run = x + map.plane(n, c) + begin;
        Sums part[kParts];
        for_vectors_in_parts(std::min(kRunElements, map.size - begin),
                             [&](int j, int64_t i, auto... rest) {
                               const Vec d = load_f32(run + i, rest...) - pivot_c;
                               part[j].add(covered_lanes(d, rest...), d);
                             });
        sums[c - c0].add(sum_of_parts(part));
      }
    }
  }
  for (int64_t c = c0; c < c1; ++c) {
    const WideSums& all = sums[c - c0];
    norm.set(c, map.rows(), pivot[c - c0], total(all.first), total(all.product));
  }
}

// Moments of all channels of a channels_last map.
template <typename T>
void row_moments(const T* x, const Map& map, Normaliser& norm) {
  const int64_t channels = map.channels;
  const int64_t step = ceil_div(map.rows(), 256), heads = ceil_div(map.rows(), step);
  std::vector<float> pivot(channels);  // of every step-th row
  for_vectors(channels, [&](int64_t c, auto... rest) {
    Vec sum(0.0f);
    for (int64_t r = 0; r < map.rows(); r += step) {
      sum = sum + load_f32(x + r * channels + c, rest...);
    }
    store_f32(pivot.data() + c, sum / Vec(static_cast<float>(heads)), rest...);
  });
  for (float& p : pivot) p = rounded<T>(p);
  const auto deviation = [&](int64_t, int64_t c, auto... rest) {
    return [=, pivot_c = load_f32(pivot.data() + c, rest...)](int64_t i) {
      const Vec d = load_f32(x + i, rest...) - pivot_c;
      return std::pair(d, d);
    };
  };
  reduce_parts(sum_parts(map, deviation), channels, [&](int64_t c, double sum, double square) {
    norm.set(c, map.rows(), pivot[c], sum, square);
  });
}

// One plane: writes the output if it is kept, else zeros, and returns the peak either way.
template <typename Act, bool kResidual, typename T>
float norm_act_plane(const T* x, const T* residual, T* y, int64_t size, bool keep, float mean,
                     float scale, float shift) {
  Vec peak(0.0f);
  for_vectors(size, [&](int64_t i, auto... rest) {
    Vec u = at::vec::fmadd(load_f32(x + i, rest...) - Vec(mean), Vec(scale), Vec(shift));
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
                   const float* keep, const Normaliser& norm, float* peak) {
  for_vectors(channels, [&](int64_t c, auto... rest) {
    const Vec mean_c = load_f32(norm.mean + c, rest...), keep_c = load_f32(keep + c, rest...);
    const Vec scale_c = load_f32(norm.scale.data() + c, rest...);
    const Vec shift_c = load_f32(norm.shift.data() + c, rest...);
    Vec peak_c = load_f32(peak + c, rest...);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = r * channels + c;
      Vec u = at::vec::fmadd(load_f32(x + i, rest...) - mean_c, scale_c, shift_c);
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

template <typename Act, bool kResidual, typename T>
void forward_planes(const T* x, const T* residual, const bool* mask, const Map& map, bool training,
                    Normaliser& norm, T* y, float* peak) {
  for_channel_groups(map, sizeof(T), [&](int64_t c0, int64_t c1) {
    if (training) group_moments(x, map, c0, c1, norm);
    for (int64_t n = 0; n < map.samples; ++n) {
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t i = n * map.channels + c, at = map.plane(n, c);
        peak[i] = norm_act_plane<Act, kResidual>(x + at, kResidual ? residual + at : nullptr,
                                                 y + at, map.size, !mask || mask[i], norm.mean[c],
                                                 norm.scale[c], norm.shift[c]);
      }
    }
  });
}

template <typename Act, bool kResidual, typename T>
void forward_rows(const T* x, const T* residual, const bool* mask, const Map& map, bool training,
                  Normaliser& norm, T* y, float* peak) {
  constexpr int64_t kTile = 8;  // rows that share a load of the parameters
  const int64_t channels = map.channels, parts = ceil_div(map.size, kPartRows);
  if (training) row_moments(x, map, norm);
  const std::vector<float> keep = keep_words(mask, map);
  std::vector<float> peaks(map.samples * parts * channels, 0.0f);
  for_sample_parts(map, [&](int64_t part, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r += kTile) {
      const int64_t at = r * channels;
      norm_act_rows<Act, kResidual>(
          x + at, kResidual ? residual + at : nullptr, y + at, std::min(kTile, end - r), channels,
          keep.data() + part / parts * channels, norm, peaks.data() + part * channels);
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
  TORCH_CHECK(mask->sizes() == input.sizes().slice(0, 2), op,
              ": mask must be [N, C] = ", input.sizes().slice(0, 2), ", got ", mask->sizes());
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
  return t.to(input.scalar_type()).contiguous(memory_format(input));
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
  const at::Tensor x = input.contiguous(memory_format(input));
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
  at::Tensor output = empty_map(x);
  at::Tensor peak = at::empty({map.samples, map.channels}, w.options());
  Normaliser norm(w, b, mean, var, eps);
  if (!training) norm.set_from_running();
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    with_activation(activation, [&](auto act) {
      using Act = decltype(act);
      const auto run = [&](auto kernel) {
        kernel(x.const_data_ptr<T>(), residual ? r.const_data_ptr<T>() : nullptr,
               mask ? m.const_data_ptr<bool>() : nullptr, map, training, norm, output.data_ptr<T>(),
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

// dpre is the gradient of the pre-activation: grad where the channel is kept and the slope is one.
// From its sum, and that of its products with the deviation x - mean, come the gradients of weight
// and bias, and the three factors of each channel in
//   grad_input = slope * dpre + offset + curve * (x - mean),
// of which evaluation mode has the first alone.
struct Backward {
  Backward(const at::Tensor& weight, const at::Tensor& mean, const at::Tensor& var, double eps,
           bool training, int64_t rows, at::Tensor& grad_weight, at::Tensor& grad_bias)
      : mean(mean.const_data_ptr<float>()),
        slope(mean.size(0)),
        offset(mean.size(0)),
        curve(mean.size(0)),
        weight_(weight.const_data_ptr<float>()),
        var_(var.const_data_ptr<float>()),
        grad_weight_(grad_weight.data_ptr<float>()),
        grad_bias_(grad_bias.data_ptr<float>()),
        eps_(eps),
        share_(training ? 1.0 / static_cast<double>(rows) : 0.0) {}

  void set(int64_t c, double sum, double product) {
    const double rstd = 1 / std::sqrt(var_[c] + eps_), scale = weight_[c] * rstd;
    grad_bias_[c] = static_cast<float>(sum);
    grad_weight_[c] = static_cast<float>(product * rstd);
    slope[c] = static_cast<float>(scale);
    offset[c] = static_cast<float>(-scale * sum * share_);
    curve[c] = static_cast<float>(-scale * product * rstd * rstd * share_);
  }

  const float* mean;
  std::vector<float> slope, offset, curve;

 private:
  const float *weight_, *var_;
  float *grad_weight_, *grad_bias_;
  double eps_, share_;
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
                  WideSums& sums) {
  if (!keep) {
    if (g.grad_residual) std::fill_n(g.grad_residual + at, size, T(0));
    return;
  }
  for (int64_t begin = at; begin < at + size; begin += kRunElements) {
    Sums run[kParts];
    const int64_t length = std::min(kRunElements, at + size - begin);
    for_vectors_in_parts(length, [&](int j, int64_t i, auto... rest) {
      const Vec d = dpre_at<Act>(g, begin + i, rest...);
      run[j].add(d, load_f32(g.input + begin + i, rest...) - Vec(mean));
      if (g.grad_residual) store_f32(g.grad_residual + begin + i, d, rest...);
    });
    sums.add(sum_of_parts(run));
  }
}

template <typename Act, typename T>
void input_grad_plane(const Gradients<T>& g, int64_t at, int64_t size, bool keep, int64_t c,
                      const Backward& f) {
  const Vec mean(f.mean[c]), slope(f.slope[c]), offset(f.offset[c]), curve(f.curve[c]);
  for_vectors(size, [&](int64_t i, auto... rest) {
    Vec out = at::vec::fmadd(curve, load_f32(g.input + at + i, rest...) - mean, offset);
    if (keep) out = at::vec::fmadd(slope, dpre_at<Act>(g, at + i, rest...), out);
    store_f32(g.grad_input + at + i, out, rest...);
  });
}

template <typename Act, typename T>
void backward_planes(const Gradients<T>& g, const bool* mask, const Map& map, Backward& f) {
  for_channel_groups(map, 3 * sizeof(T), [&](int64_t c0, int64_t c1) {
    const auto for_planes = [&](auto body) {
      for (int64_t n = 0; n < map.samples; ++n) {
        for (int64_t c = c0; c < c1; ++c) {
          body(map.plane(n, c), !mask || mask[n * map.channels + c], c);
        }
      }
    };
    std::vector<WideSums> sums(c1 - c0);
    for_planes([&](int64_t at, bool keep, int64_t c) {
      reduce_plane<Act>(g, at, map.size, keep, f.mean[c], sums[c - c0]);
    });
    for (int64_t c = c0; c < c1; ++c) {
      f.set(c, total(sums[c - c0].first), total(sums[c - c0].product));
    }
    for_planes([&](int64_t at, bool keep, int64_t c) {
      input_grad_plane<Act>(g, at, map.size, keep, c, f);
    });
  });
}

template <typename Act, typename T>
void backward_rows(const Gradients<T>& g, const bool* mask, const Map& map, Backward& f) {
  const int64_t channels = map.channels, parts = ceil_div(map.size, kPartRows);
  const std::vector<float> keep = keep_words(mask, map);
  const auto keep_of = [&](int64_t part) { return keep.data() + part / parts * channels; };
  const auto term = [&](int64_t part, int64_t c, auto... rest) {
    const Vec keep_c = load_f32(keep_of(part) + c, rest...), mean_c = load_f32(f.mean + c, rest...);
    return [=, &g](int64_t i) {
      const Vec d = dpre_at<Act>(g, i, rest...) & keep_c;
      if (g.grad_residual) store_f32(g.grad_residual + i, d, rest...);
      return std::pair(d, load_f32(g.input + i, rest...) - mean_c);
    };
  };
  reduce_parts(sum_parts(map, term), channels,
               [&](int64_t c, double sum, double product) { f.set(c, sum, product); });
  for_sample_parts(map, [&](int64_t part, int64_t begin, int64_t end) {
    for_vectors(channels, [&](int64_t c, auto... rest) {
      const Vec keep_c = load_f32(keep_of(part) + c, rest...);
      const Vec mean_c = load_f32(f.mean + c, rest...);
      const Vec slope_c = load_f32(f.slope.data() + c, rest...);
      const Vec offset_c = load_f32(f.offset.data() + c, rest...);
      const Vec curve_c = load_f32(f.curve.data() + c, rest...);
      for (int64_t i = begin * channels + c; i < end * channels; i += channels) {
        const Vec d = dpre_at<Act>(g, i, rest...) & keep_c;
        const Vec out = at::vec::fmadd(curve_c, load_f32(g.input + i, rest...) - mean_c, offset_c);
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
  const at::Tensor x = input.contiguous(memory_format(input));
  const at::Tensor g = as_input(kOp, "grad", grad, x), y = as_input(kOp, "output", output, x);
  const at::Tensor w = as_float(weight), mu = as_float(mean), v = as_float(var);
  const at::Tensor m = as_mask(kOp, mask, input);
  at::Tensor grad_input = empty_map(x);
  at::Tensor grad_residual = residual ? empty_map(x) : at::empty({0}, x.options());
  at::Tensor grad_weight = at::empty({map.channels}, w.options());
  at::Tensor grad_bias = at::empty({map.channels}, w.options());
  Backward factors(w, mu, v, eps, training, map.rows(), grad_weight, grad_bias);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Gradients<T> gradients{g.const_data_ptr<T>(), y.const_data_ptr<T>(),
                                 x.const_data_ptr<T>(), grad_input.data_ptr<T>(),
                                 residual ? grad_residual.data_ptr<T>() : nullptr};
    with_activation(activation, [&](auto act) {
      using Act = decltype(act);
      const auto kernel = has_rows(x, map) ? backward_rows<Act, T> : backward_planes<Act, T>;
      kernel(gradients, mask ? m.const_data_ptr<bool>() : nullptr, map, factors);
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
