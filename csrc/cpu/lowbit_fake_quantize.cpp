// SPDX-License-Identifier: Apache-2.0
// Fused fake quantisation, forward and backward: the input is read once from memory (twice from a
// cache where a row has a statistic) and the result is written once.
//
// Every value is computed by the operations of the references, one rounding each, so that it has
// their bits. Sums are taken over pieces of fixed size, in fp32 over at most kRun elements of a
// lane's share and in fp64 above, and merged in order: the same for every number of threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "loops.h"
#include "pages.h"
#include "philox.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace fake_quantize {
namespace {

constexpr int64_t kPiece = 32768;     // elements whose sum one thread takes
constexpr int64_t kRun = 4096;        // of them, summed in fp32
constexpr int64_t kColumns = 1024;    // scales by column: columns that one thread takes
constexpr int64_t kRows = 64;         // and rows whose terms are summed in fp32
constexpr int64_t kMostParts = 64;    // and parts of the rows
constexpr int64_t kExpand = 1 << 16;  // shorter runs than two vectors: scales are repeated
constexpr float kScaleFloor = 1e-5f;  // what the contract reads smaller scales as
constexpr float kRangeFloor = 1e-6f, kRangeCeiling = 1e5f;
constexpr float kStatsqCeiling = static_cast<float>(1 - 1e-6);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Vec masked(const Vec& mask, const Vec& v) { return mask & v; }
inline Vec within(const Vec& v, const Vec& low, const Vec& high) {
  return (v >= low) & (v <= high);
}
inline Vec clamped(const Vec& v, const Vec& low, const Vec& high) {
  return at::vec::clamp(v, low, high);  // NaN passes
}
inline Vec magnitude_of(const Vec& v) {
  return v & at::vec::cast<float>(at::vec::Vectorized<int32_t>(0x7fffffff));
}
inline Vec with_sign(const Vec& magnitude, const Vec& v) { return magnitude | (v & Vec(-0.0f)); }

// ---- scales that are parameters: LSQ and the affine quantiser ----

struct Lsq {
  static constexpr int kParameters = 1, kSums = 1;
  Vec low, high;

  Lsq(int64_t low, int64_t high) : low(static_cast<float>(low)), high(static_cast<float>(high)) {}
  Vec forward(const Vec& x, const Vec* p) const {
    return clamped(x / p[0], low, high).round() * p[0];
  }
  Vec backward(const Vec& x, const Vec& g, const Vec* p, Vec* sums) const {
    const Vec v = x / p[0], inside = within(v, low, high);
    sums[0] = at::vec::fmadd(g, clamped(v, low, high).round() - masked(inside, v), sums[0]);
    return masked(inside, g);
  }
};

// Parameters: step, zero point, and what the zero point adds to the gradient of the step outside.
struct Affine {
  static constexpr int kParameters = 3, kSums = 2;
  Vec top;

  explicit Affine(int64_t bits) : top(static_cast<float>((1 << bits) - 1)) {}
  Vec forward(const Vec& x, const Vec* p) const {
    return (clamped(x / p[0] + p[1], Vec(0.0f), top).round() - p[1]) * p[0];
  }
  Vec backward(const Vec& x, const Vec& g, const Vec* p, Vec* sums) const {
    const Vec v = x / p[0] + p[1], inside = within(v, Vec(0.0f), top);
    const Vec outer = clamped(v, Vec(0.0f), top) + p[2];
    sums[0] = at::vec::fmadd(g, Vec::blendv(outer, v.round() - v, inside), sums[0]);
    sums[1] = sums[1] + Vec::blendv(g, Vec(0.0f), inside);
    return masked(inside, g);
  }
};

// How elements and scales belong together: element i to scale (i / inner) % scales.
struct Layout {
  int64_t numel, scales, inner;
  int64_t repeated = 1;  // neighbouring scales that were one before they were repeated
  bool columns = false;  // a scale per element of a row of `scales`

  Layout(int64_t numel, int64_t scales, int64_t inner)
      : numel(numel), scales(scales), inner(scales == 1 ? numel : inner) {
    if (numel == 0 || scales == 1) return;
    if (this->inner < 2 * kLanes && scales * this->inner <= kExpand) {
      repeated = this->inner;
      this->scales *= repeated;
      this->inner = 1;
    }
    columns = this->inner == 1;
  }
};

template <int N>
using Parameters = std::array<std::vector<float>, N>;

template <int N>
void repeat(Parameters<N>& parameters, int64_t times) {
  if (times == 1) return;
  for (auto& p : parameters) {
    std::vector<float> wide(p.size() * times);
    for (size_t i = 0; i < wide.size(); ++i) wide[i] = p[i / times];
    p = std::move(wide);
  }
}

template <typename T, typename Q>
void forward(const Q& q, const T* x, T* y, const Layout& at_, const Parameters<Q::kParameters>& p) {
  constexpr int N = Q::kParameters;
  const int64_t chunk = kPiece / 2;
  at::parallel_for(
      0, ceil_div(at_.numel, chunk), grain_of(chunk), [&](int64_t first, int64_t last) {
        int64_t i = first * chunk;
        const int64_t end = std::min(last * chunk, at_.numel);
        Vec now[N];
        while (i < end) {
          if (at_.columns) {  // to the end of a row
            const int64_t c = i % at_.scales, count = std::min(end - i, at_.scales - c);
            for_vectors(count, [&](int64_t j, auto rest) {
              for (int k = 0; k < N; ++k) now[k] = load(p[k].data() + c + j, rest);
              store_f32(y + i + j, q.forward(load(x + i + j, rest), now), rest);
            });
            i += count;
          } else {
            const int64_t run = i / at_.inner, count = std::min(end, (run + 1) * at_.inner) - i;
            for (int k = 0; k < N; ++k) now[k] = Vec(p[k][run % at_.scales]);
            for_vectors(count, [&](int64_t j, auto rest) {
              store_f32(y + i + j, q.forward(load(x + i + j, rest), now), rest);
            });
            i += count;
          }
        }
      });
}

// Sums [kSums][scales], in fp64.
template <typename T, typename Q>
std::vector<double> backward(const Q& q, const T* g, const T* x, T* dx, const Layout& at_,
                             const Parameters<Q::kParameters>& p) {
  constexpr int N = Q::kParameters, S = Q::kSums;
  std::vector<double> total(S * at_.scales);
  if (at_.numel == 0) return total;
  if (at_.columns) {
    const int64_t width = at_.scales, rows = at_.numel / width;
    const int64_t part = std::max(kRows, ceil_div(ceil_div(rows, kMostParts), kRows) * kRows);
    const int64_t parts = ceil_div(rows, part), blocks = ceil_div(width, kColumns);
    std::vector<double> sums(parts * S * width);
    const int64_t size = std::min(part, rows) * std::min(kColumns, width);
    at::parallel_for(0, parts * blocks, grain_of(size), [&](int64_t first, int64_t last) {
      std::vector<float> run(S * kColumns);
      for (int64_t item = first; item < last; ++item) {
        const int64_t c = item % blocks * kColumns, count = std::min(kColumns, width - c);
        const int64_t begin = item / blocks * part, end = std::min(begin + part, rows);
        double* sum = sums.data() + item / blocks * S * width + c;
        for (int64_t row = begin; row < end; row += kRows) {
          std::fill(run.begin(), run.end(), 0.0f);
          for (int64_t r = row; r < std::min(row + kRows, end); ++r) {
            const int64_t at_row = r * width + c;
            for_vectors(count, [&](int64_t j, auto rest) {
              Vec now[N], acc[S];
              for (int k = 0; k < N; ++k) now[k] = load(p[k].data() + c + j, rest);
              for (int k = 0; k < S; ++k) acc[k] = Vec::loadu(run.data() + k * kColumns + j);
              const Vec d =
                  q.backward(load(x + at_row + j, rest), load(g + at_row + j, rest), now, acc);
              store_f32(dx + at_row + j, d, rest);
              for (int k = 0; k < S; ++k) acc[k].store(run.data() + k * kColumns + j);
            });
          }
          for (int k = 0; k < S; ++k) {
            for (int64_t j = 0; j < count; ++j) sum[k * width + j] += run[k * kColumns + j];
          }
        }
      }
    });
    for (int64_t i = 0; i < parts; ++i) {
      for (int64_t j = 0; j < S * width; ++j) total[j] += sums[i * S * width + j];
    }
    return total;
  }
  const int64_t per_run = ceil_div(at_.inner, kPiece), runs = at_.numel / at_.inner;
  std::vector<double> sums(runs * per_run * S);
  const int64_t size = std::min(at_.inner, kPiece);
  at::parallel_for(0, runs * per_run, grain_of(size), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t run = item / per_run, start = run * at_.inner + item % per_run * kPiece;
      const int64_t end = std::min(start + kPiece, (run + 1) * at_.inner);
      Vec now[N];
      for (int k = 0; k < N; ++k) now[k] = Vec(p[k][run % at_.scales]);
      double* sum = sums.data() + item * S;
      for (int64_t i = start; i < end; i += kRun) {
        Vec acc[2][S];  // in turns, so that additions do not wait for one another
        for (auto& a : acc) std::fill(std::begin(a), std::end(a), Vec(0.0f));
        const int64_t count = std::min(kRun, end - i);
        int64_t j = 0;
        for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
          for (int h = 0; h < 2; ++h) {
            const int64_t at_v = i + j + h * kLanes;
            store_f32(dx + at_v, q.backward(load_f32(x + at_v), load_f32(g + at_v), now, acc[h]));
          }
        }
        for_vectors(count - j, [&](int64_t more, auto rest) {
          const int64_t at_v = i + j + more;
          store_f32(dx + at_v, q.backward(load(x + at_v, rest), load(g + at_v, rest), now, acc[0]),
                    rest);
        });
        for (int k = 0; k < S; ++k) sum[k] += reduce_add(acc[0][k] + acc[1][k]);
      }
    }
  });
  for (int64_t item = 0; item < runs * per_run; ++item) {
    const int64_t scale = item / per_run % at_.scales;
    for (int k = 0; k < S; ++k) total[k * at_.scales + scale] += sums[item * S + k];
  }
  return total;
}

// A parameter as fp32 numbers.
std::vector<float> numbers(const at::Tensor& t) {
  const at::Tensor f = t.to(at::kFloat).contiguous();
  const float* p = f.const_data_ptr<float>();
  return {p, p + f.numel()};
}

// value(i) for each scale, as a tensor like `parameter`.
template <typename F>
at::Tensor gradient_like(const at::Tensor& parameter, F&& value) {
  at::Tensor out = at::empty(parameter.sizes(), parameter.options().dtype(at::kFloat));
  float* p = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < out.numel(); ++i) p[i] = static_cast<float>(value(i));
  return out.to(parameter.scalar_type());
}

// The sum of the repeated parts of scale i.
double folded(const std::vector<double>& total, const Layout& at_, int64_t sum, int64_t i) {
  double found = 0;
  for (int64_t j = 0; j < at_.repeated; ++j) {
    found += total[sum * at_.scales + i * at_.repeated + j];
  }
  return found;
}

void check_layout(const at::Tensor& input, const at::Tensor& parameter, int64_t inner) {
  const int64_t count = parameter.numel() * inner;
  TORCH_CHECK(inner >= 0 && (input.numel() == 0 || (count > 0 && input.numel() % count == 0)),
              "fake_quantize: ", parameter.numel(), " scales of ", inner,
              " elements do not divide an input of ", input.numel());
}

void check_grad(const at::Tensor& grad, const at::Tensor& input) {
  TORCH_CHECK(grad.sizes() == input.sizes(), "fake_quantize: grad must have shape ", input.sizes(),
              ", got ", grad.sizes());
}

at::Tensor empty_contiguous(const at::Tensor& t) {
  return empty_in_large_pages(t.sizes(), t.options());
}

Parameters<1> lsq_parameters(const at::Tensor& scale, const Layout& at_) {
  Parameters<1> p{numbers(scale)};
  for (float& s : p[0]) s = s < kScaleFloor ? kScaleFloor : s;
  repeat<1>(p, at_.repeated);
  return p;
}

at::Tensor lsq(const at::Tensor& input, const at::Tensor& scale, int64_t inner, int64_t low,
               int64_t high, std::optional<double> gradient_scale) {
  if (!covered(input) || !covered(scale)) {
    return reference("cofire::fake_quantize_lsq", &lsq, input, scale, inner, low, high,
                     gradient_scale);
  }
  check_layout(input, scale, inner);
  const at::Tensor x = input.contiguous();
  at::Tensor y = empty_contiguous(input);
  const Layout at_(x.numel(), scale.numel(), inner);
  const auto p = lsq_parameters(scale, at_);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    forward(Lsq(low, high), x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), at_, p);
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> lsq_backward(const at::Tensor& grad, const at::Tensor& input,
                                                const at::Tensor& scale, int64_t inner, int64_t low,
                                                int64_t high,
                                                std::optional<double> gradient_scale) {
  if (!covered(input) || !covered(scale) || grad.scalar_type() != input.scalar_type()) {
    return reference("cofire::fake_quantize_lsq_backward", &lsq_backward, grad, input, scale, inner,
                     low, high, gradient_scale);
  }
  check_layout(input, scale, inner);
  check_grad(grad, input);
  const at::Tensor x = input.contiguous(), g = grad.contiguous();
  at::Tensor dx = empty_contiguous(input);
  const Layout at_(x.numel(), scale.numel(), inner);
  const auto p = lsq_parameters(scale, at_);
  std::vector<double> total;
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    total = backward(Lsq(low, high), g.const_data_ptr<T>(), x.const_data_ptr<T>(),
                     dx.mutable_data_ptr<T>(), at_, p);
  });
  const double n = static_cast<double>(high) * (x.numel() / std::max<int64_t>(scale.numel(), 1));
  const double factor = gradient_scale.value_or(1 / std::sqrt(std::max(n, 1.0)));
  return {dx, gradient_like(scale, [&](int64_t i) { return factor * folded(total, at_, 0, i); })};
}

Parameters<3> affine_parameters(const at::Tensor& range, const at::Tensor& minimum, int64_t bits,
                                std::vector<char>* movable) {
  Parameters<3> p{numbers(range), numbers(minimum), {}};
  const float top = static_cast<float>((1 << bits) - 1);
  p[2].resize(p[0].size());
  for (size_t i = 0; i < p[0].size(); ++i) {
    const float r = p[0][i];
    const float step = (r < kRangeFloor     ? kRangeFloor
                        : r > kRangeCeiling ? kRangeCeiling
                                            : r) /
                       top;
    const float exact = -p[1][i] / step, rounded = std::nearbyint(exact);
    const float zero = rounded < 0 ? 0.0f : rounded > top ? top : rounded;
    const bool moves = rounded >= 0 && rounded <= top;
    if (movable != nullptr) movable->push_back(moves);
    p[0][i] = step;
    p[1][i] = zero;
    p[2][i] = moves ? exact - rounded : -zero;
  }
  return p;
}

at::Tensor affine(const at::Tensor& input, const at::Tensor& range, const at::Tensor& minimum,
                  int64_t inner, int64_t bits) {
  if (!covered(input) || !covered(range) || !covered(minimum)) {
    return reference("cofire::fake_quantize_affine", &affine, input, range, minimum, inner, bits);
  }
  check_layout(input, range, inner);
  TORCH_CHECK(range.sizes() == minimum.sizes(),
              "fake_quantize_affine: minimum must have the shape of range");
  const at::Tensor x = input.contiguous();
  at::Tensor y = empty_contiguous(input);
  const Layout at_(x.numel(), range.numel(), inner);
  auto p = affine_parameters(range, minimum, bits, nullptr);
  repeat<3>(p, at_.repeated);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    forward(Affine(bits), x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), at_, p);
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> affine_backward(const at::Tensor& grad,
                                                               const at::Tensor& input,
                                                               const at::Tensor& range,
                                                               const at::Tensor& minimum,
                                                               int64_t inner, int64_t bits) {
  if (!covered(input) || !covered(range) || !covered(minimum) ||
      grad.scalar_type() != input.scalar_type()) {
    return reference("cofire::fake_quantize_affine_backward", &affine_backward, grad, input, range,
                     minimum, inner, bits);
  }
  check_layout(input, range, inner);
  check_grad(grad, input);
  TORCH_CHECK(range.sizes() == minimum.sizes(),
              "fake_quantize_affine: minimum must have the shape of range");
  const at::Tensor x = input.contiguous(), g = grad.contiguous();
  at::Tensor dx = empty_contiguous(input);
  const Layout at_(x.numel(), range.numel(), inner);
  std::vector<char> movable;
  auto p = affine_parameters(range, minimum, bits, &movable);
  repeat<3>(p, at_.repeated);
  std::vector<double> total;
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    total = backward(Affine(bits), g.const_data_ptr<T>(), x.const_data_ptr<T>(),
                     dx.mutable_data_ptr<T>(), at_, p);
  });
  const double top = (1 << bits) - 1;
  return {dx, gradient_like(range, [&](int64_t i) { return folded(total, at_, 0, i) / top; }),
          gradient_like(minimum,
                        [&](int64_t i) { return movable[i] ? folded(total, at_, 1, i) : 0.0; })};
}

// ---- scales that are statistics of a row ----

// Runs statistic(row, begin, end) -> S and then apply(row, begin, end, S) on each row. Rows that
// fit into a piece: both at once, while the row is in the cache. Longer ones: piece by piece, the
// statistics merged in order by S::merge.
template <typename S, typename Statistic, typename Apply>
void by_rows(int64_t rows, int64_t width, Statistic&& statistic, Apply&& apply) {
  if (rows == 0 || width == 0) return;
  if (width <= kPiece) {
    at::parallel_for(0, rows, grain_of(width), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        S found;
        found.merge(statistic(row, int64_t{0}, width));
        apply(row, int64_t{0}, width, found);
      }
    });
    return;
  }
  const int64_t per_row = ceil_div(width, kPiece);
  std::vector<S> parts(rows * per_row), found(rows);
  const auto pieces = [&](auto&& f) {
    at::parallel_for(0, rows * per_row, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i % per_row * kPiece;
        f(i, i / per_row, begin, std::min(begin + kPiece, width));
      }
    });
  };
  pieces([&](int64_t i, int64_t row, int64_t begin, int64_t end) {
    parts[i] = statistic(row, begin, end);
  });
  for (int64_t i = 0; i < rows * per_row; ++i) found[i / per_row].merge(parts[i]);
  pieces([&](int64_t, int64_t row, int64_t begin, int64_t end) {
    apply(row, begin, end, found[row]);
  });
}

// The smallest and the largest value; NaN if there is one.
struct Extremes {
  float low = std::numeric_limits<float>::infinity();
  float high = -std::numeric_limits<float>::infinity();

  void merge(const Extremes& other) {
    low = other.low < low || std::isnan(other.low) ? other.low : low;
    high = other.high > high || std::isnan(other.high) ? other.high : high;
  }

  template <typename T>
  static Extremes of(const T* x, int64_t count) {
    const float inf = std::numeric_limits<float>::infinity();
    Vec low[2] = {Vec(inf), Vec(inf)}, high[2] = {Vec(-inf), Vec(-inf)};
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      for (int h = 0; h < 2; ++h) {
        const Vec v = load_f32(x + i + h * kLanes);
        low[h] = at::vec::minimum(low[h], v);
        high[h] = at::vec::maximum(high[h], v);
      }
    }
    for_vectors(count - i, [&](int64_t j, int64_t rest) {
      const Vec v = load_f32(x + i + j, rest);
      low[0] = Vec::set(low[0], at::vec::minimum(low[0], v), rest);
      high[0] = Vec::set(high[0], at::vec::maximum(high[0], v), rest);
    });
    const auto lower = [](const Vec& a, const Vec& b) { return at::vec::minimum(a, b); };
    return {at::vec::vec_reduce_all<float>(lower, at::vec::minimum(low[0], low[1])),
            reduce_max(at::vec::maximum(high[0], high[1]))};
  }
};

// Levels between two values: q = round(x / step) + zero in 0 to top.
struct Levels {
  float step, zero, top;
  bool constant;

  Levels(const Extremes& e, float top) : top(top) {
    step = (e.high - e.low) / top;
    constant = step == 0;
    if (constant) step = 1;
    zero = std::nearbyint(-e.low / step);
  }
  Vec from_zero(const Vec& v) const {  // of rounded v = x / step
    return clamped(v + Vec(zero), Vec(0.0f), Vec(top)) - Vec(zero);
  }
};

template <typename T>
void copy(const T* x, T* y, int64_t count) {
  std::copy_n(x, count, y);
}

at::Tensor minmax(const at::Tensor& input, int64_t bits, int64_t group_size) {
  if (!covered(input)) {
    return reference("cofire::fake_quantize_minmax", &minmax, input, bits, group_size);
  }
  at::Tensor y = empty_contiguous(input);
  if (input.numel() == 0) return y;
  TORCH_CHECK(group_size > 0 && input.numel() % group_size == 0,
              "fake_quantize_minmax: group_size");
  const at::Tensor x = input.contiguous();
  const float top = static_cast<float>((1 << bits) - 1);
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    by_rows<Extremes>(
        x.numel() / group_size, group_size,
        [&](int64_t row, int64_t begin, int64_t end) {
          return Extremes::of(from + row * group_size + begin, end - begin);
        },
        [&](int64_t row, int64_t begin, int64_t end, const Extremes& e) {
          const Levels levels(e, top);
          const T* p = from + row * group_size + begin;
          T* out = to + row * group_size + begin;
          if (levels.constant) return copy(p, out, end - begin);
          const Vec step(levels.step);
          for_vectors(end - begin, [&](int64_t i, auto rest) {
            store_f32(out + i, levels.from_zero((load(p + i, rest) / step).round()) * step, rest);
          });
        });
  });
  return y;
}

// Of a row whose extremes are known: the gradient of its step, and how often the extremes occur.
struct StepGradient {
  double sum = 0;
  int64_t lows = 0, highs = 0;

  void merge(const StepGradient& other) {
    sum += other.sum;
    lows += other.lows;
    highs += other.highs;
  }
};

int64_t lanes_set(const Vec& mask, int64_t count) {
  return count - __builtin_popcount(mask.zero_mask() & ((1 << count) - 1));
}

template <typename T>
StepGradient step_gradient(const T* g, const T* x, int64_t count, const Extremes& e,
                           const Levels& levels) {
  StepGradient found;
  const Vec step(levels.step), zero(levels.zero), top(levels.top), none(0.0f);
  const Vec low(e.low), high(e.high);
  for (int64_t i = 0; i < count; i += kRun) {
    Vec acc[2] = {none, none};
    Vec lows(0.0f), highs(0.0f);  // counted in fp32: exact
    const auto take = [&](int64_t j, auto rest, Vec& sum) {
      const Vec value = load(x + j, rest), v = value / step, level = v.round() + zero;
      const Vec term = clamped(level, none, top) - zero - masked(within(level, none, top), v);
      sum = at::vec::fmadd(load(g + j, rest), term, sum);
      return value;
    };
    const int64_t size = std::min(kRun, count - i);
    int64_t j = 0;
    for (; j + 2 * kLanes <= size; j += 2 * kLanes) {
      for (int h = 0; h < 2; ++h) {
        const Vec v = take(i + j + h * kLanes, std::integral_constant<int64_t, kLanes>{}, acc[h]);
        lows = lows + masked(v == low, Vec(1.0f));
        highs = highs + masked(v == high, Vec(1.0f));
      }
    }
    for_vectors(size - j, [&](int64_t more, int64_t rest) {
      Vec sum(0.0f);
      const Vec v = take(i + j + more, rest, sum);
      acc[0] = acc[0] + Vec::set(none, sum, rest);
      found.lows += lanes_set(v == low, rest);
      found.highs += lanes_set(v == high, rest);
    });
    found.sum += reduce_add(acc[0] + acc[1]);
    found.lows += static_cast<int64_t>(reduce_add(lows));
    found.highs += static_cast<int64_t>(reduce_add(highs));
  }
  return found;
}

// dx of a row: g inside, and the step's gradient shared by the extremes.
template <typename T>
void spread(const T* g, const T* x, T* dx, int64_t count, const Extremes& e, const Levels& levels,
            const StepGradient& found) {
  const Vec step(levels.step), zero(levels.zero), top(levels.top), none(0.0f);
  const Vec low(e.low), high(e.high);
  const float to_step = static_cast<float>(found.sum / levels.top);
  const Vec to_high(to_step * (1.0f / static_cast<float>(found.highs)));
  const Vec to_low(-to_step * (1.0f / static_cast<float>(found.lows)));
  // NaN times the zero share of the others is NaN
  const Vec other(std::isfinite(to_step) ? 0.0f : std::numeric_limits<float>::quiet_NaN());
  for_vectors(count, [&](int64_t i, auto rest) {
    const Vec value = load(x + i, rest), level = (value / step).round() + zero;
    const Vec share = Vec::blendv(Vec::blendv(other, to_low, value == low), to_high, value == high);
    store_f32(dx + i, masked(within(level, none, top), load(g + i, rest)) + share, rest);
  });
}

at::Tensor minmax_backward(const at::Tensor& grad, const at::Tensor& input, int64_t bits,
                           int64_t group_size) {
  if (!covered(input) || grad.scalar_type() != input.scalar_type()) {
    return reference("cofire::fake_quantize_minmax_backward", &minmax_backward, grad, input, bits,
                     group_size);
  }
  check_grad(grad, input);
  at::Tensor dx = empty_contiguous(input);
  if (input.numel() == 0) return dx;
  TORCH_CHECK(group_size > 0 && input.numel() % group_size == 0,
              "fake_quantize_minmax: group_size");
  const at::Tensor x = input.contiguous(), g = grad.contiguous();
  const float top = static_cast<float>((1 << bits) - 1);
  const int64_t rows = x.numel() / group_size;
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T *from = x.const_data_ptr<T>(), *grads = g.const_data_ptr<T>();
    T* to = dx.mutable_data_ptr<T>();
    const auto of = [&](int64_t row, int64_t begin, int64_t end) {
      return Extremes::of(from + row * group_size + begin, end - begin);
    };
    const auto finish = [&](int64_t row, int64_t begin, int64_t end, const Extremes& e,
                            const StepGradient& found) {
      const int64_t i = row * group_size + begin;
      const Levels levels(e, top);
      if (levels.constant) return copy(grads + i, to + i, end - begin);
      spread(grads + i, from + i, to + i, end - begin, e, levels, found);
    };
    const auto sum = [&](int64_t row, int64_t begin, int64_t end, const Extremes& e) {
      const int64_t i = row * group_size + begin;
      const Levels levels(e, top);
      if (levels.constant) return StepGradient();
      return step_gradient(grads + i, from + i, end - begin, e, levels);
    };
    if (group_size <= kPiece) {
      by_rows<Extremes>(rows, group_size, of,
                        [&](int64_t row, int64_t begin, int64_t end, const Extremes& e) {
                          finish(row, begin, end, e, sum(row, begin, end, e));
                        });
      return;
    }
    std::vector<Extremes> extremes(rows);
    by_rows<Extremes>(rows, group_size, of,
                      [&](int64_t row, int64_t begin, int64_t, const Extremes& e) {
                        if (begin == 0) extremes[row] = e;
                      });
    by_rows<StepGradient>(
        rows, group_size,
        [&](int64_t row, int64_t begin, int64_t end) {
          return sum(row, begin, end, extremes[row]);
        },
        [&](int64_t row, int64_t begin, int64_t end, const StepGradient& found) {
          finish(row, begin, end, extremes[row], found);
        });
  });
  return dx;
}

struct Magnitude {
  double sum = 0;

  void merge(const Magnitude& other) { sum += other.sum; }

  template <typename T>
  static Magnitude of(const T* x, int64_t count) {
    double lanes[kLanes] = {};
    for_vectors(count, [&](int64_t i, auto rest) {
      alignas(64) float values[kLanes];
      load(x + i, rest).store(values);
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(std::fabs(values[j]));
    });
    double total = 0;
    for (const double lane : lanes) total += lane;
    return {total};
  }
};

at::Tensor statsq(const at::Tensor& input, int64_t bits) {
  if (!covered(input)) return reference("cofire::fake_quantize_statsq", &statsq, input, bits);
  at::Tensor y = empty_contiguous(input);
  if (input.numel() == 0) return y;
  const at::Tensor x = input.contiguous();
  const int64_t width = x.size(-1);
  const float half = static_cast<float>(1 << (bits - 1));
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    by_rows<Magnitude>(
        x.numel() / width, width,
        [&](int64_t row, int64_t begin, int64_t end) {
          return Magnitude::of(from + row * width + begin, end - begin);
        },
        [&](int64_t row, int64_t begin, int64_t end, const Magnitude& m) {
          const float s = static_cast<float>(2 * m.sum / static_cast<double>(width));
          const Vec scale(s == 0 ? 1.0f : s), step(s / half), n(half), middle(0.5f);
          for_vectors(end - begin, [&](int64_t i, auto rest) {
            const int64_t at_v = row * width + begin + i;
            const Vec u = clamped(load(from + at_v, rest) / scale, Vec(-1.0f), Vec(kStatsqCeiling));
            const Vec q = clamped((u * n - middle).round(), -n, n - Vec(1.0f));
            store_f32(to + at_v, (q + middle) * step, rest);
          });
        });
  });
  return y;
}

// ---- groups with exact outliers ----

// The order of magnitudes, NaN above all.
inline uint32_t order_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return std::min(bits & 0x7fffffffu, 0x7f800001u);
}

// The largest magnitudes of a group in order, of equal ones the lower index first.
struct Largest {
  std::vector<uint32_t> order;
  std::vector<int64_t> index;
  std::vector<uint64_t> keys;

  // `count` of them, at most g.
  void find(const float* x, int64_t g, int64_t count) {
    order.clear();
    index.clear();
    if (count == 0) return;
    if (count > 2 * kLanes) return select(x, g, count);
    int64_t i = 0;
    const auto take = [&](int64_t at_) {
      const uint32_t now = order_of(x[at_]);
      const bool full = static_cast<int64_t>(order.size()) == count;
      if (full && now <= order.back()) return;
      if (full) {
        order.pop_back();
        index.pop_back();
      }
      const auto place = std::upper_bound(order.begin(), order.end(), now, std::greater<>());
      index.insert(index.begin() + (place - order.begin()), at_);
      order.insert(place, now);
    };
    // Of the maxima of 2 kLanes interleaved parts the count-th bounds the count-th of all from
    // below, so that hardly any vector has to be looked into. NaN, on either side, counts as
    // larger.
    const int64_t whole = g / (2 * kLanes) * (2 * kLanes);
    if (whole > 0) {
      Vec top[2] = {Vec(0.0f), Vec(0.0f)};
      for (int64_t j = 0; j < whole; j += 2 * kLanes) {
        for (int h = 0; h < 2; ++h) {
          top[h] = at::vec::maximum(top[h], magnitude_of(Vec::loadu(x + j + h * kLanes)));
        }
      }
      alignas(64) float lanes[2 * kLanes];
      for (int h = 0; h < 2; ++h) top[h].store(lanes + h * kLanes);
      const auto larger = [](float a, float b) { return order_of(a) > order_of(b); };
      std::partial_sort(lanes, lanes + count, lanes + 2 * kLanes, larger);
      const Vec bound(lanes[count - 1]);
      for (; i < whole; i += kLanes) {
        int reached = (magnitude_of(Vec::loadu(x + i)) < bound).zero_mask();
        for (; reached != 0; reached &= reached - 1) take(i + __builtin_ctz(reached));
      }
    }
    for (; i < g; ++i) take(i);
  }

  void select(const float* x, int64_t g, int64_t count) {
    keys.resize(g);
    for (int64_t i = 0; i < g; ++i) {
      keys[i] = static_cast<uint64_t>(order_of(x[i])) << 32 | static_cast<uint32_t>(~i);
    }
    count = std::min(count, g);
    std::partial_sort(keys.begin(), keys.begin() + count, keys.end(), std::greater<>());
    for (int64_t i = 0; i < count; ++i) {
      order.push_back(static_cast<uint32_t>(keys[i] >> 32));
      index.push_back(~static_cast<uint32_t>(keys[i]));
    }
  }
};

// The numbers in [0, 1) of the elements from `start` on. Returns where in `out` they begin.
const float* uniform(uint64_t seed, int64_t start, int64_t count, std::vector<float>& out) {
  return random_numbers(seed, start, count, out, [](uint32_t word) {
    return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
  });
}

enum class Format { kInt4, kAsymmetric, kE1M2, kE2M1, kE3M0 };

Format format_of(c10::string_view name) {
  if (name == "int4") return Format::kInt4;
  if (name == "int4_asymmetric") return Format::kAsymmetric;
  if (name == "e1m2") return Format::kE1M2;
  if (name == "e2m1") return Format::kE2M1;
  TORCH_CHECK(name == "e3m0", "fake_quantize_group: format must be one of int4, int4_asymmetric, ",
              "e1m2, e2m1, e3m0, got ", name);
  return Format::kE3M0;
}

float top_of(Format format) {
  switch (format) {
    case Format::kE1M2:
      return 1.75f;
    case Format::kE2M1:
      return 6.0f;
    case Format::kE3M0:
      return 16.0f;
    case Format::kAsymmetric:
      return 15.0f;
    default:
      return 7.0f;
  }
}

// Magnitudes, of at most a rounding more than the last value, to the values of a format: to the
// nearest, ties to the even code, or up with the chance of the distance from the one below.
template <Format kFormat, bool kStochastic>
inline Vec to_grid(const Vec& a, const Vec& chance) {
  const auto evenly = [&](const Vec& v, float top) {
    if constexpr (!kStochastic) return v.round();
    const Vec below = v.floor();
    return at::vec::minimum(below + masked(v - below > chance, Vec(1.0f)), Vec(top));
  };
  if constexpr (kFormat == Format::kInt4) {
    return evenly(a, 7.0f);
  } else if constexpr (kFormat == Format::kE1M2) {
    return evenly(a * Vec(4.0f), 7.0f) * Vec(0.25f);
  } else if constexpr (kFormat == Format::kE2M1) {
    // spacing 1/2 below 2, 1 below 4, 2 below 6
    const Vec two = a >= Vec(2.0f), four = a >= Vec(4.0f);
    const Vec inverse = Vec::blendv(Vec::blendv(Vec(2.0f), Vec(1.0f), two), Vec(0.5f), four);
    const Vec spacing = Vec::blendv(Vec::blendv(Vec(0.5f), Vec(1.0f), two), Vec(2.0f), four);
    return at::vec::minimum(evenly(a * inverse, 4.0f) * spacing, Vec(6.0f));
  } else {
    constexpr float values[] = {0.25f, 0.5f, 1.0f, 2.0f, 4.0f, 8.0f, 16.0f};
    Vec value(0.0f);
    for (int i = 0; i < 7; ++i) {
      if constexpr (kStochastic) {
        value = Vec::blendv(value, Vec(values[i]), a >= Vec(values[i]));
      } else {  // ties to the even code: up from the odd ones
        const Vec middle(i == 0 ? 0.125f : 0.75f * values[i]);
        const Vec beyond = i % 2 == 1 ? a >= middle : a > middle;
        value = Vec::blendv(value, Vec(values[i]), beyond);
      }
    }
    if constexpr (!kStochastic) return value;
    const Vec spacing = Vec::blendv(value, Vec(0.25f), value == Vec(0.0f));
    const Vec up = masked(a - value > chance * spacing, spacing);
    return at::vec::minimum(value + up, Vec(16.0f));
  }
}

template <typename T, Format kFormat, bool kStochastic>
void group_kernel(const T* x, T* y, int64_t groups, int64_t g, int64_t outliers, uint64_t seed) {
  at::parallel_for(0, groups, grain_of(g), [&](int64_t first, int64_t last) {
    std::vector<float> values(g), random;
    Largest largest;
    std::vector<T> kept(outliers);
    for (int64_t group = first; group < last; ++group) {
      const T* from = x + group * g;
      T* to = y + group * g;
      for_vectors(g, [&](int64_t i, auto rest) {
        load(from + i, rest).store(values.data() + i, static_cast<int>(rest));
      });
      const float* chances = nullptr;
      if constexpr (kStochastic) chances = uniform(seed, group * g, g, random);
      const auto chance = [&](int64_t i, auto rest) {
        return kStochastic ? load(chances + i, rest) : Vec(0.0f);
      };
      // The largest magnitude that is no outlier is the next in the order.
      constexpr bool symmetric = kFormat != Format::kAsymmetric;
      largest.find(values.data(), g, outliers + (symmetric ? 1 : 0));
      for (int64_t i = 0; i < outliers; ++i) kept[i] = from[largest.index[i]];
      if constexpr (symmetric) {
        const float step = std::fabs(values[largest.index[outliers]]) / top_of(kFormat);
        if (step == 0) {
          copy(from, to, g);
          continue;
        }
        const Vec s(step);
        for_vectors(g, [&](int64_t i, auto rest) {
          const Vec v = load(values.data() + i, rest);
          const Vec grid = to_grid<kFormat, kStochastic>(magnitude_of(v) / s, chance(i, rest));
          store_f32(to + i, with_sign(grid, v) * s, rest);
        });
      } else {
        if (outliers > 0) {  // put a value of the others into their places
          std::vector<int64_t> places = largest.index;
          std::sort(places.begin(), places.end());
          int64_t other = 0;
          while (other < outliers && places[other] == other) ++other;
          for (const int64_t place : places) values[place] = values[other];
        }
        const Levels levels(Extremes::of(values.data(), g), 15.0f);
        if (levels.constant) {
          copy(from, to, g);
          continue;
        }
        const Vec s(levels.step);
        for_vectors(g, [&](int64_t i, auto rest) {
          const Vec v = load(values.data() + i, rest) / s;
          Vec rounded = v.round();
          if constexpr (kStochastic) {
            const Vec below = v.floor();
            rounded = below + masked(v - below > chance(i, rest), Vec(1.0f));
          }
          store_f32(to + i, levels.from_zero(rounded) * s, rest);
        });
      }
      for (int64_t i = 0; i < outliers; ++i) to[largest.index[i]] = kept[i];
    }
  });
}

at::Tensor group(const at::Tensor& input, c10::string_view format, int64_t group_size,
                 int64_t outliers, bool stochastic, int64_t seed) {
  if (!covered(input)) {
    return reference("cofire::fake_quantize_group", &group, input, format, group_size, outliers,
                     stochastic, seed);
  }
  at::Tensor y = empty_contiguous(input);
  const Format kind = format_of(format);
  if (input.numel() == 0) return y;
  TORCH_CHECK(
      group_size > 0 && input.numel() % group_size == 0 && outliers >= 0 && outliers < group_size,
      "fake_quantize_group: group_size or outliers");
  const at::Tensor x = input.contiguous();
  const int64_t groups = x.numel() / group_size;
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&]<Format kFormat>() {
      const T* from = x.const_data_ptr<T>();
      T* to = y.mutable_data_ptr<T>();
      if (stochastic) {
        group_kernel<T, kFormat, true>(from, to, groups, group_size, outliers, seed);
      } else {
        group_kernel<T, kFormat, false>(from, to, groups, group_size, outliers, seed);
      }
    };
    switch (kind) {
      case Format::kInt4:
        return run.template operator()<Format::kInt4>();
      case Format::kAsymmetric:
        return run.template operator()<Format::kAsymmetric>();
      case Format::kE1M2:
        return run.template operator()<Format::kE1M2>();
      case Format::kE2M1:
        return run.template operator()<Format::kE2M1>();
      case Format::kE3M0:
        return run.template operator()<Format::kE3M0>();
    }
  });
  return y;
}

}  // namespace
}  // namespace fake_quantize
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("fake_quantize_lsq", &cofire::fake_quantize::lsq);
  m.impl("fake_quantize_lsq_backward", &cofire::fake_quantize::lsq_backward);
  m.impl("fake_quantize_affine", &cofire::fake_quantize::affine);
  m.impl("fake_quantize_affine_backward", &cofire::fake_quantize::affine_backward);
  m.impl("fake_quantize_minmax", &cofire::fake_quantize::minmax);
  m.impl("fake_quantize_minmax_backward", &cofire::fake_quantize::minmax_backward);
  m.impl("fake_quantize_statsq", &cofire::fake_quantize::statsq);
  m.impl("fake_quantize_group", &cofire::fake_quantize::group);
}
