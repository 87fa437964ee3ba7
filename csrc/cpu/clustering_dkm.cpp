// SPDX-License-Identifier: Apache-2.0
// Differentiable k-means: forward and backward of dkm and dkm_tables. See the
// contract in pyextensions/cofire/ops/clustering.py, whose reference this
// follows step by step; the passes over the points are in clustering.h.
#include <ATen/Functions.h>

#include <cstdio>

#include "clustering.h"
#include "clustering_histogram.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

namespace {

using Centroids = std::vector<double>;  // [K, D]

constexpr int kNewtonIterations = 60, kFallbackIterations = 50;
constexpr double kNewtonShortest = 1.0 / 64, kNewtonTolerance = 1e-13, kNewtonStalled = 1e-10;

// Fewer 16-bit weights than this are points themselves: to clear and search the tables of all
// patterns takes as long as their attention.
constexpr int64_t kTableWeights = 8192;

enum class Gradient { kUnroll, kImplicit, kJfb };

Gradient gradient_of(c10::string_view name) {
  if (name == "unroll") return Gradient::kUnroll;
  return name == "implicit" ? Gradient::kImplicit : Gradient::kJfb;
}

// NaN if there is one: it is less than nothing, and no residual that ends a search.
double largest(const std::vector<double>& v) {
  double result = 0;
  for (double x : v) {
    if (std::isnan(x)) return x;
    result = std::max(result, std::abs(x));
  }
  return result;
}

// Whether some neighbours' attention changes over within the spacing of the weights between them.
bool below_floor(Centroids c, int64_t d, double tau, double resolution) {
  if (d != 1) return false;
  std::sort(c.begin(), c.end());
  for (size_t k = 0; k + 1 < c.size(); ++k) {
    const double gap = c[k + 1] - c[k], boundary = std::abs(c[k + 1] + c[k]) / 2;
    if (tau < 2 * gap * boundary * resolution) return true;
  }
  return false;
}

// Solves (I - J) y = r, or (I - J)' y = r; false where there is no solution.
bool solve(const std::vector<double>& jacobian, const std::vector<double>& r, bool transposed,
           std::vector<double>& y) {
  const int64_t m = static_cast<int64_t>(r.size());
  at::Tensor system = at::empty({m, m}, at::kDouble);
  double* a = system.data_ptr<double>();
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      a[i * m + j] = (i == j) - jacobian[transposed ? j * m + i : i * m + j];
    }
  }
  const at::Tensor right = at::from_blob(const_cast<double*>(r.data()), {m}, at::kDouble);
  const auto [solution, info] = at::linalg_solve_ex(system, right);
  if (info.const_data_ptr<int32_t>()[0] != 0) return false;
  const double* found = solution.const_data_ptr<double>();
  y.assign(found, found + m);
  return true;
}

// Centroids that an update leaves in place, by Newton's method; without it, where updates lead.
template <typename P>
Centroids fixed_point(const Passes<P>& passes, Centroids c, int64_t iterations, Gradient gradient,
                      double resolution, Status& status) {
  constexpr int D = P::kDim;
  status = kConverged;
  const auto advance = [&](int64_t times) {
    for (int64_t i = 0; i < times; ++i) c = passes.update(c);
    return c;
  };
  if (gradient == Gradient::kJfb) return advance(iterations);
  if (passes.rules.enforce_zero) std::fill_n(c.begin(), D, 0.0);
  if (below_floor(c, D, passes.tau, resolution)) {
    status = kBelowFloor;
    return advance(kFallbackIterations);
  }
  std::vector<int64_t> order(passes.clusters);
  for (int64_t k = 0; k < passes.clusters; ++k) order[k] = k;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return c[a * D] < c[b * D]; });
  const auto ordered = [&](const Centroids& at) {
    if (D > 1) return true;
    for (size_t k = 0; k + 1 < order.size(); ++k) {
      if (!(at[order[k + 1]] - at[order[k]] > 0)) return false;
    }
    return true;
  };
  const double scale = largest(c);
  std::vector<double> totals, r, jacobian, step, next_totals, next_r, next_jacobian;
  passes.linearize(c, totals, r, jacobian);
  status = kStalled;
  for (int i = 0; i < kNewtonIterations; ++i) {
    const double size = largest(r);
    if (size <= kNewtonTolerance * scale) {
      status = kConverged;
      break;
    }
    Centroids next(c.size());
    bool better = false;
    if (solve(jacobian, r, false, step)) {
      for (double length = 1; !better && length >= kNewtonShortest; length /= 2) {
        for (size_t j = 0; j < c.size(); ++j) next[j] = c[j] + length * step[j];
        if (!ordered(next)) continue;
        passes.linearize(next, next_totals, next_r, next_jacobian);
        better = largest(next_r) < size;
      }
    }
    if (!better) {  // a plain update always leads on
      for (size_t j = 0; j < c.size(); ++j) next[j] = c[j] + r[j];
      passes.linearize(next, next_totals, next_r, next_jacobian);
    }
    c.swap(next);
    r.swap(next_r);
    jacobian.swap(next_jacobian);
  }
  if (status == kStalled && largest(r) <= kNewtonStalled * scale) status = kConverged;
  return status == kConverged ? c : advance(kFallbackIterations);
}

// As the centroids are returned and stored, in fp32: what is nearest must not depend on more.
Centroids stored(const Centroids& c) {
  Centroids result(c);
  for (double& x : result) x = static_cast<double>(static_cast<float>(x));
  return result;
}

// The centroids from start to end; `path` is written with a stride of one partition.
template <typename P>
std::vector<Centroids> forward_path(const Passes<P>& passes, const Centroids& start,
                                    int64_t iterations, Gradient gradient, double resolution,
                                    Status& status) {
  std::vector<Centroids> path{start};
  status = kConverged;
  if (gradient == Gradient::kUnroll) {
    for (int64_t t = 0; t < iterations; ++t) path.push_back(passes.update(path.back()));
  } else {
    path.push_back(fixed_point(passes, start, iterations, gradient, resolution, status));
  }
  return path;
}

// The attention of the output is that to the centroids before the last update.
const Centroids& attended(const std::vector<Centroids>& path, Gradient gradient) {
  return gradient == Gradient::kUnroll && path.size() > 1 ? path[path.size() - 2] : path.back();
}

// The gradient of a partition: own(...) gets what reaches each point from its own upstream
// gradient, shared(...) what reaches it through the centroids, possibly several times. Returns the
// gradient of the first centroids.
template <typename P, typename F, typename G>
Centroids backward(const Passes<P>& passes, const std::vector<Centroids>& path, Gradient gradient,
                   Status status, F&& own, G&& shared) {
  constexpr int D = P::kDim;
  const Rules& rules = passes.rules;
  Centroids to_after, to_before;
  passes.output_backward(attended(path, gradient), path.back(), to_after, to_before, own);
  // The gradient of each centroid over its total; empty ones stay, and hand theirs on.
  const auto share = [&](Centroids& incoming, const std::vector<double>& totals, Centroids& stay) {
    if (rules.enforce_zero) std::fill_n(incoming.begin(), D, 0.0);
    Centroids result(incoming.size(), 0.0);
    stay.assign(incoming.size(), 0.0);
    for (size_t j = 0; j < incoming.size(); ++j) {
      const double total = totals[j / D];
      (total == 0 ? stay : result)[j] = total == 0 ? incoming[j] : incoming[j] / total;
    }
    return result;
  };
  std::vector<double> totals, residual, jacobian;
  Centroids stay;
  if (gradient != Gradient::kUnroll) {
    const Centroids& c = path.back();
    Centroids incoming(c.size()), solution;
    for (size_t j = 0; j < c.size(); ++j) incoming[j] = to_after[j] + to_before[j];
    if (gradient == Gradient::kImplicit && status == kConverged) {
      passes.linearize(c, totals, residual, jacobian);
      if (solve(jacobian, incoming, true, solution)) incoming.swap(solution);
    } else {
      passes.update(c, &totals);
    }
    passes.update_backward(c, c, share(incoming, totals, stay), shared);
    return Centroids(c.size(), 0.0);
  }
  for (size_t t = path.size() - 1; t >= 1; --t) {
    passes.update(path[t - 1], &totals);
    Centroids next =
        passes.update_backward(path[t - 1], path[t], share(to_after, totals, stay), shared);
    for (size_t j = 0; j < next.size(); ++j) {
      next[j] += stay[j] + (t == path.size() - 1 ? to_before[j] : 0);
    }
    to_after.swap(next);
  }
  return to_after;
}

void check_temperature(const char* name, const at::Tensor& tau) {
  for (int64_t p = 0; p < tau.numel(); ++p) {
    const double t = tau[p].item<double>();
    TORCH_CHECK_VALUE(t > 0 && std::isfinite(t), name, ": tau must be positive and finite, got ", t,
                      " for partition ", p);
  }
}

// Partition p of [.., P, K, D] fp64 at each step.
struct Path {
  double* data;
  int64_t partitions, width;

  void put(int64_t p, const std::vector<Centroids>& path) const {
    for (size_t t = 0; t < path.size(); ++t) {
      std::copy(path[t].begin(), path[t].end(),
                data + (static_cast<int64_t>(t) * partitions + p) * width);
    }
  }
};

std::vector<Centroids> read_path(const at::Tensor& path, int64_t p) {
  const int64_t width = path[0][0].numel(), partitions = path.size(1);
  const double* data = path.const_data_ptr<double>();
  std::vector<Centroids> result;
  for (int64_t t = 0; t < path.size(0); ++t) {
    const double* from = data + (t * partitions + p) * width;
    result.emplace_back(from, from + width);
  }
  return result;
}

// Partitions share the threads, or each gets them all.
template <typename F>
void each_partition(int64_t partitions, F&& body) {
  if (partitions >= at::get_num_threads() && partitions > 1) {
    at::parallel_for(0, partitions, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) body(p);
    });
  } else {
    for (int64_t p = 0; p < partitions; ++p) body(p);
  }
}

bool half(const at::Tensor& t) {
  return t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
}

// How the weights of a partition are visited.
enum class Way { kTable, kExact, kStream };

Way way_of(const at::Tensor& weight, int64_t count, int64_t d, Gradient gradient) {
  if (half(weight) && d == 1 && count >= kTableWeights) return Way::kTable;
  return half(weight) && d == 1 || gradient != Gradient::kUnroll ? Way::kExact : Way::kStream;
}

struct Call {
  Rules rules;
  Gradient gradient;
  int64_t clusters, d, iterations;
  bool hard;
  double resolution;
};

// One partition of 16-bit scalars through the table of their values.
Status table_forward(const Call& call, const at::Tensor& weight, const Centroids& start, double tau,
                     at::Tensor& output, std::vector<Centroids>& path) {
  const auto* patterns = static_cast<const uint16_t*>(weight.const_data_ptr());
  std::vector<uint32_t> counts(kPatterns);
  count_patterns(patterns, weight.numel(), counts.data());
  const Present present(counts.data(), weight.scalar_type(), "dkm");
  const TablePoints points{present.x.data(), present.n.data(), nullptr, present.size()};
  const Passes<TablePoints> passes{points, call.clusters, tau, call.rules};
  Status status;
  path = forward_path(passes, start, call.iterations, call.gradient, call.resolution, status);
  std::vector<uint16_t> table(kPatterns);
  dispatch(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto put = [&](int64_t u, double value) {
        const T rounded = static_cast<T>(static_cast<float>(value));
        std::memcpy(&table[present.patterns[u]], &rounded, 2);
      };
      if (call.hard) {
        double inertia;
        const Centroids final = stored(path.back());
        passes.nearest(final, &inertia, [&](int64_t u, int64_t label) { put(u, final[label]); });
      } else {
        passes.apply(attended(path, call.gradient), path.back(),
                     [&](int64_t first, int64_t count, const double (&out)[1][kBlock]) {
                       for (int64_t i = 0; i < count; ++i) put(first + i, out[0][i]);
                     });
      }
    }
  });
  look_up_patterns(patterns, weight.numel(), table.data(),
                   static_cast<uint16_t*>(output.data_ptr()));
  return status;
}

Centroids table_backward(const Call& call, const at::Tensor& grad, const at::Tensor& weight,
                         const std::vector<Centroids>& path, Status status, double tau,
                         at::Tensor& output) {
  const auto* patterns = static_cast<const uint16_t*>(weight.const_data_ptr());
  std::vector<double> sums(kPatterns);
  std::vector<uint32_t> counts(kPatterns);
  sum_patterns(patterns, grad.const_data_ptr(), grad.scalar_type(), weight.numel(), sums.data(),
               counts.data());
  const Present present(counts.data(), weight.scalar_type(), "dkm");
  const int64_t size = present.size();
  std::vector<double> total(size), slope(size), offset(size, 0.0);
  for (int64_t u = 0; u < size; ++u) total[u] = sums[present.patterns[u]];
  const TablePoints points{present.x.data(), present.n.data(), total.data(), size};
  const Passes<TablePoints> passes{points, call.clusters, tau, call.rules};
  const Centroids first = backward(
      passes, path, call.gradient, status,
      [&](int64_t at, int64_t count, const double (&out)[1][kBlock]) {
        std::copy_n(out[0], count, slope.data() + at);
      },
      [&](int64_t at, int64_t count, const double (&out)[1][kBlock]) {
        for (int64_t i = 0; i < count; ++i) offset[at + i] += out[0][i];
      });
  const std::unique_ptr<float[]> tables(new float[2 * kPatterns]);
  for (int64_t u = 0; u < size; ++u) {
    tables[2 * present.patterns[u]] = static_cast<float>(slope[u]);
    tables[2 * present.patterns[u] + 1] = static_cast<float>(offset[u]);
  }
  affine_patterns(patterns, grad.const_data_ptr(), grad.scalar_type(), weight.numel(), tables.get(),
                  output.data_ptr());
  return first;
}

// Writes R [D][kBlock] to consecutive vectors of T.
template <typename T, typename R, int D>
void put_vectors(T* to, int64_t first, int64_t count, const R (&out)[D][kBlock]) {
  for (int64_t i = 0; i < count; ++i) {
    for (int d = 0; d < D; ++d)
      to[(first + i) * D + d] = static_cast<T>(static_cast<float>(out[d][i]));
  }
}

// One partition, each vector of weights a point.
template <typename R, int D>
Status stream_forward(const Call& call, const at::Tensor& weight, const Centroids& start,
                      double tau, at::Tensor& output, std::vector<Centroids>& path) {
  using P = StreamPoints<R, D>;
  check_finite("dkm", weight);
  const P points{weight.const_data_ptr(), nullptr, weight.scalar_type(), weight.numel() / D};
  const Passes<P> passes{points, call.clusters, tau, call.rules};
  Status status;
  path = forward_path(passes, start, call.iterations, call.gradient, call.resolution, status);
  dispatch(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(output.data_ptr());
    if (call.hard) {
      double inertia;
      const Centroids final = stored(path.back());
      passes.nearest(final, &inertia, [&](int64_t i, int64_t label) {
        for (int d = 0; d < D; ++d) {
          to[i * D + d] = static_cast<T>(static_cast<float>(final[label * D + d]));
        }
      });
    } else {
      passes.apply(attended(path, call.gradient), path.back(),
                   [&](int64_t first, int64_t count, const R(&out)[D][kBlock]) {
                     put_vectors(to, first, count, out);
                   });
    }
  });
  return status;
}

template <typename R, int D>
Centroids stream_backward(const Call& call, const at::Tensor& grad, const at::Tensor& weight,
                          const std::vector<Centroids>& path, Status status, double tau,
                          at::Tensor& output) {
  using P = StreamPoints<R, D>;
  const P points{weight.const_data_ptr(), grad.const_data_ptr(), weight.scalar_type(),
                 weight.numel() / D};
  const Passes<P> passes{points, call.clusters, tau, call.rules};
  // In place where the result has the precision of the sum.
  const bool in_place = std::is_same_v<R, float> && weight.scalar_type() == at::kFloat;
  const std::unique_ptr<R[]> own(in_place ? nullptr : new R[weight.numel()]);
  R* sum = in_place ? static_cast<R*>(output.data_ptr()) : own.get();
  const Centroids first = backward(
      passes, path, call.gradient, status,
      [&](int64_t at, int64_t count, const R(&out)[D][kBlock]) {
        if constexpr (D == 1) {  // per unit of the point's gradient
          dispatch(grad.scalar_type(), [&](auto zero) {
            const auto* g = static_cast<const decltype(zero)*>(grad.const_data_ptr()) + at;
            for (int64_t i = 0; i < count; ++i) {
              sum[at + i] = out[0][i] * static_cast<R>(static_cast<float>(g[i]));
            }
          });
        } else {
          for (int64_t i = 0; i < count; ++i) {
            for (int d = 0; d < D; ++d) sum[(at + i) * D + d] = out[d][i];
          }
        }
      },
      [&](int64_t at, int64_t count, const R(&out)[D][kBlock]) {
        for (int64_t i = 0; i < count; ++i) {
          for (int d = 0; d < D; ++d) sum[(at + i) * D + d] += out[d][i];
        }
      });
  if (!in_place) {
    dispatch(weight.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      T* to = static_cast<T*>(output.data_ptr());
      for (int64_t i = 0; i < weight.numel(); ++i)
        to[i] = static_cast<T>(static_cast<float>(sum[i]));
    });
  }
  return first;
}

double resolution_of(at::ScalarType dtype) {
  return std::ldexp(1.0, dtype == at::kBFloat16 ? -8 : dtype == at::kHalf ? -11 : -24);
}

}  // namespace

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Forward dkm(const at::Tensor& weight, const at::Tensor& centroids, const at::Tensor& tau,
            int64_t group_size, int64_t iterations, double eps, bool enforce_zero,
            double prune_threshold, bool keep_sparsity, c10::string_view forward,
            c10::string_view grad) {
  if (!covered(weight) || !dimension_covered(centroids.size(2))) {
    return reference("cofire::dkm", &dkm, weight, centroids, tau, group_size, iterations, eps,
                     enforce_zero, prune_threshold, keep_sparsity, forward, grad);
  }
  const int64_t partitions = centroids.size(0), clusters = centroids.size(1), d = centroids.size(2);
  TORCH_CHECK_VALUE(centroids.scalar_type() == at::kFloat && tau.scalar_type() == at::kFloat &&
                        tau.numel() == partitions && group_size > 0 && weight.numel() % d == 0 &&
                        partitions_of(weight, group_size) == partitions,
                    "dkm: centroids and tau must be fp32, one for each partition");
  check_temperature("dkm", tau);
  const Call call{{eps, enforce_zero, prune_threshold, keep_sparsity},
                  gradient_of(grad),
                  clusters,
                  d,
                  iterations,
                  forward == "hard_ste",
                  resolution_of(weight.scalar_type())};
  const at::Tensor flat = weight.contiguous().view(-1);
  at::Tensor output = at::empty(weight.sizes(), flat.options());
  const int64_t steps = call.gradient == Gradient::kUnroll ? iterations + 1 : 2;
  at::Tensor path = at::empty({steps, partitions, clusters, d}, flat.options().dtype(at::kDouble));
  at::Tensor status = at::empty({partitions}, flat.options().dtype(at::kInt));
  const at::Tensor start = centroids.to(at::kDouble).contiguous(),
                   heat = tau.to(at::kDouble).contiguous();
  at::Tensor flat_output = output.view(-1);
  const Path to{path.data_ptr<double>(), partitions, clusters * d};
  counting_all("dkm", flat, [&] {
    each_partition(partitions, [&](int64_t p) {
      const at::Tensor x = part(flat, p, group_size);
      at::Tensor y = part(flat_output, p, group_size);
      const double* from = start.const_data_ptr<double>() + p * to.width;
      const Centroids c(from, from + to.width);
      const double t = heat.const_data_ptr<double>()[p];
      std::vector<Centroids> found;
      Status state;
      switch (way_of(flat, x.numel(), d, call.gradient)) {
        case Way::kTable:
          state = table_forward(call, x, c, t, y, found);
          break;
        case Way::kExact:
          with_dimension(
              d, [&](auto dim) { state = stream_forward<double, dim()>(call, x, c, t, y, found); });
          break;
        case Way::kStream:
          with_dimension(
              d, [&](auto dim) { state = stream_forward<float, dim()>(call, x, c, t, y, found); });
          break;
      }
      to.put(p, found);
      status.data_ptr<int32_t>()[p] = state;
    });
  });
  return {output, path, status};
}

std::tuple<at::Tensor, at::Tensor> dkm_backward(const at::Tensor& grad, const at::Tensor& weight,
                                                const at::Tensor& path, const at::Tensor& status,
                                                const at::Tensor& tau, int64_t group_size,
                                                double eps, bool enforce_zero,
                                                double prune_threshold, bool keep_sparsity,
                                                c10::string_view mode) {
  if (!covered(weight) || !dimension_covered(path.size(3))) {
    return reference("cofire::dkm_backward", &dkm_backward, grad, weight, path, status, tau,
                     group_size, eps, enforce_zero, prune_threshold, keep_sparsity, mode);
  }
  const int64_t partitions = path.size(1), clusters = path.size(2), d = path.size(3);
  TORCH_CHECK_VALUE(path.scalar_type() == at::kDouble && status.scalar_type() == at::kInt &&
                        tau.scalar_type() == at::kFloat && grad.sizes() == weight.sizes() &&
                        status.numel() == partitions && tau.numel() == partitions &&
                        group_size > 0 && weight.numel() % d == 0 &&
                        partitions_of(weight, group_size) == partitions,
                    "dkm_backward: path, status and tau must be those of dkm");
  const Call call{{eps, enforce_zero, prune_threshold, keep_sparsity},
                  gradient_of(mode),
                  clusters,
                  d,
                  0,
                  false,
                  0};
  const at::Tensor flat = weight.contiguous().view(-1);
  const at::Tensor flat_grad = grad.to(weight.scalar_type()).contiguous().view(-1);
  const at::Tensor steps = path.contiguous(), states = status.contiguous();
  const at::Tensor heat = tau.to(at::kDouble).contiguous();
  at::Tensor output = at::empty(weight.sizes(), flat.options());
  at::Tensor flat_output = output.view(-1);
  at::Tensor first = at::empty({partitions, clusters, d}, tau.options());
  each_partition(partitions, [&](int64_t p) {
    const at::Tensor x = part(flat, p, group_size), g = part(flat_grad, p, group_size);
    at::Tensor y = part(flat_output, p, group_size);
    const double t = heat.const_data_ptr<double>()[p];
    const auto state = static_cast<Status>(states.const_data_ptr<int32_t>()[p]);
    const std::vector<Centroids> way = read_path(steps, p);
    Centroids start;
    switch (way_of(flat, x.numel(), d, call.gradient)) {
      case Way::kTable:
        start = table_backward(call, g, x, way, state, t, y);
        break;
      case Way::kExact:
        with_dimension(d, [&](auto dim) {
          start = stream_backward<double, dim()>(call, g, x, way, state, t, y);
        });
        break;
      case Way::kStream:
        with_dimension(d, [&](auto dim) {
          start = stream_backward<float, dim()>(call, g, x, way, state, t, y);
        });
        break;
    }
    float* into = first.data_ptr<float>() + p * clusters * d;
    std::transform(start.begin(), start.end(), into,
                   [](double v) { return static_cast<float>(v); });
  });
  return {output, first};
}

// What dkm does with these arguments, and why.
std::string plan_dkm(const at::Tensor& weight, const at::Tensor& centroids, const at::Tensor&,
                     int64_t group_size, int64_t, double, bool, double, bool, c10::string_view,
                     c10::string_view grad) {
  if (!dimension_covered(centroids.size(2)))
    return "reference: vectors of 1 to 4 or 8 weights have a kernel";
  switch (
      way_of(weight, std::min(group_size, weight.numel()), centroids.size(2), gradient_of(grad))) {
    case Way::kTable:
      return "histogram of the 16-bit values, tables in fp64";
    case Way::kExact:
      return "streams the weights, in fp64";
    default:
      return "streams the weights, in fp32";
  }
}

// -----------------------------------------------------------------------------------------
// dkm_tables

namespace {

// The values with a count, of any float type, as fp64.
struct Values {
  std::vector<int64_t> place;
  std::vector<double> x, n;

  Values(const at::Tensor& values, const at::Tensor& counts, int64_t p) {
    const at::Tensor wide = values.to(at::kDouble).contiguous();
    const double* v = wide.const_data_ptr<double>();
    const int32_t* c = counts.const_data_ptr<int32_t>() + p * values.numel();
    int64_t nan = 0, infinite = 0;
    for (int64_t u = 0; u < values.numel(); ++u) {
      if (c[u] == 0) continue;
      nan += std::isnan(v[u]);
      infinite += std::isinf(v[u]);
      place.push_back(u);
      x.push_back(v[u]);
      n.push_back(c[u]);
    }
    if (nan + infinite > 0) refuse_values("dkm_tables", nan, infinite);
  }
};

template <typename F>
void into_floats(at::Tensor& t, int64_t row, F&& body) {
  const int64_t size = t.size(1);
  if (t.scalar_type() == at::kDouble) {
    body(t.data_ptr<double>() + row * size);
  } else {
    body(t.data_ptr<float>() + row * size);
  }
}

}  // namespace

Forward dkm_tables(const at::Tensor& values, const at::Tensor& counts, const at::Tensor& centroids,
                   const at::Tensor& tau, int64_t iterations, double eps, bool enforce_zero,
                   double prune_threshold, bool keep_sparsity, c10::string_view grad,
                   double resolution) {
  const int64_t partitions = centroids.size(0), clusters = centroids.size(1);
  TORCH_CHECK_VALUE(counts.scalar_type() == at::kInt && counts.size(0) == partitions &&
                        counts.size(1) == values.numel() && tau.numel() == partitions,
                    "dkm_tables: counts must be int32 [partitions, values]");
  check_temperature("dkm_tables", tau);
  const Gradient gradient = gradient_of(grad);
  const at::Tensor number = counts.contiguous(), start = centroids.to(at::kDouble).contiguous(),
                   heat = tau.to(at::kDouble).contiguous();
  at::Tensor table = at::zeros({partitions, values.numel()}, values.options());
  const int64_t steps = gradient == Gradient::kUnroll ? iterations + 1 : 2;
  at::Tensor path = at::empty({steps, partitions, clusters}, values.options().dtype(at::kDouble));
  at::Tensor status = at::empty({partitions}, counts.options());
  const Path to{path.data_ptr<double>(), partitions, clusters};
  each_partition(partitions, [&](int64_t p) {
    const Values there(values, number, p);
    const TablePoints points{there.x.data(), there.n.data(), nullptr,
                             static_cast<int64_t>(there.x.size())};
    const Passes<TablePoints> passes{points,
                                     clusters,
                                     heat.const_data_ptr<double>()[p],
                                     {eps, enforce_zero, prune_threshold, keep_sparsity}};
    const double* from = start.const_data_ptr<double>() + p * clusters;
    Status state;
    const auto found = forward_path(passes, Centroids(from, from + clusters), iterations, gradient,
                                    resolution, state);
    into_floats(table, p, [&](auto* out) {
      passes.apply(attended(found, gradient), found.back(),
                   [&](int64_t first, int64_t count, const double (&y)[1][kBlock]) {
                     for (int64_t i = 0; i < count; ++i) {
                       out[there.place[first + i]] =
                           static_cast<std::remove_reference_t<decltype(*out)>>(y[0][i]);
                     }
                   });
    });
    to.put(p, found);
    status.data_ptr<int32_t>()[p] = state;
  });
  return {table, path, status};
}

Forward dkm_tables_backward(const at::Tensor& grad, const at::Tensor& values,
                            const at::Tensor& counts, const at::Tensor& path,
                            const at::Tensor& status, const at::Tensor& tau, double eps,
                            bool enforce_zero, double prune_threshold, bool keep_sparsity,
                            c10::string_view mode) {
  const int64_t partitions = path.size(1), clusters = path.size(2);
  TORCH_CHECK_VALUE(path.scalar_type() == at::kDouble && counts.scalar_type() == at::kInt &&
                        status.scalar_type() == at::kInt && grad.sizes() == counts.sizes() &&
                        counts.size(0) == partitions && counts.size(1) == values.numel() &&
                        tau.numel() == partitions && status.numel() == partitions,
                    "dkm_tables_backward: path, status and tau must be those of dkm_tables");
  const at::Tensor number = counts.contiguous(), steps = path.contiguous(),
                   heat = tau.to(at::kDouble).contiguous(),
                   upstream = grad.to(at::kDouble).contiguous(), states = status.contiguous();
  at::Tensor slope = at::zeros({partitions, values.numel()}, values.options());
  at::Tensor offset = at::zeros({partitions, values.numel()}, values.options());
  at::Tensor first = at::empty({partitions, clusters}, values.options());
  each_partition(partitions, [&](int64_t p) {
    const Values there(values, number, p);
    const int64_t size = static_cast<int64_t>(there.x.size());
    std::vector<double> total(size), own(size), shared(size, 0.0);
    const double* g = upstream.const_data_ptr<double>() + p * values.numel();
    for (int64_t i = 0; i < size; ++i) total[i] = g[there.place[i]];
    const TablePoints points{there.x.data(), there.n.data(), total.data(), size};
    const Passes<TablePoints> passes{points,
                                     clusters,
                                     heat.const_data_ptr<double>()[p],
                                     {eps, enforce_zero, prune_threshold, keep_sparsity}};
    const Centroids start = backward(
        passes, read_path(steps, p), gradient_of(mode),
        static_cast<Status>(states.const_data_ptr<int32_t>()[p]),
        [&](int64_t at, int64_t count, const double (&out)[1][kBlock]) {
          std::copy_n(out[0], count, own.data() + at);
        },
        [&](int64_t at, int64_t count, const double (&out)[1][kBlock]) {
          for (int64_t i = 0; i < count; ++i) shared[at + i] += out[0][i];
        });
    const auto put = [&](at::Tensor& into, const std::vector<double>& from) {
      into_floats(into, p, [&](auto* out) {
        for (int64_t i = 0; i < size; ++i) {
          out[there.place[i]] = static_cast<std::remove_reference_t<decltype(*out)>>(from[i]);
        }
      });
    };
    put(slope, own);
    put(offset, shared);
    into_floats(first, p, [&](auto* out) {
      for (int64_t k = 0; k < clusters; ++k) {
        out[k] = static_cast<std::remove_reference_t<decltype(*out)>>(start[k]);
      }
    });
  });
  return {slope, offset, first};
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("dkm", &cofire::dkm);
  m.impl("dkm_backward", &cofire::dkm_backward);
  m.impl("dkm_tables", &cofire::dkm_tables);
  m.impl("dkm_tables_backward", &cofire::dkm_tables_backward);
}
TORCH_LIBRARY_FRAGMENT(cofire_plan, m) { m.def("dkm", &cofire::plan_dkm); }
