// SPDX-License-Identifier: Apache-2.0
// Hard k-means: the globally optimal centroids of scalars (kmeans1d), and the
// nearest centroid of each weight (palettize).
#include <ATen/Functions.h>

#include <numeric>

#include "clustering.h"
#include "clustering_histogram.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

namespace {

// Weights wider than 16 bits, if more than this many, stay together by their leading 16 bits.
constexpr int64_t kExactWeights = 4096;

// Neighbouring weights that stay together: running count, sum and sum of squares about `shift`.
// What is near the others must be subtracted from them before it is squared: a sum of squares about
// zero holds no digits of a small variance.
struct Cells {
  std::vector<double> count{0.0}, sum{0.0}, square{0.0};
  double shift = 0;
  double within = 0;  // squared distances of the weights to the means of their cells

  // n weights about `base` with sum s and sum of squares q.
  void add(double base, double n, double s = 0, double q = 0) {
    const double away = base - shift;
    count.push_back(count.back() + n);
    sum.push_back(sum.back() + s + n * away);
    square.push_back(square.back() + q + 2 * away * s + n * away * away);
    within += std::max(0.0, q - s * s / n);
  }
  int64_t size() const { return static_cast<int64_t>(count.size()) - 1; }
  // Squared distances of the cells [first, last) to their mean.
  double cost(int64_t first, int64_t last) const {
    const double n = count[last] - count[first], s = sum[last] - sum[first];
    return std::max(0.0, square[last] - square[first] - s * s / n);
  }
  double mean(int64_t first, int64_t last) const {
    return (sum[last] - sum[first]) / (count[last] - count[first]) + shift;
  }
};

Cells cells_of_patterns(const at::Tensor& weight) {
  std::vector<uint32_t> counts(kPatterns);
  count_patterns(static_cast<const uint16_t*>(weight.const_data_ptr()), weight.numel(),
                 counts.data());
  const Present present(counts.data(), weight.scalar_type(), "kmeans1d");
  Cells cells;
  for (int64_t u = 0; u < present.size(); ++u) cells.shift += present.n[u] * present.x[u];
  cells.shift /= static_cast<double>(weight.numel());
  for (int64_t u = 0; u < present.size(); ++u) {
    double n = present.n[u];
    const double x = present.x[u];
    if (u + 1 < present.size() && present.x[u + 1] == x) n += present.n[++u];  // -0 and 0
    cells.add(x, n);
  }
  return cells;
}

Cells cells_of_floats(const at::Tensor& weight) {
  const float* w = weight.const_data_ptr<float>();
  const int64_t n = weight.numel();
  Cells cells;
  if (n <= kExactWeights) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += static_cast<double>(w[i]);
    cells.shift = total / static_cast<double>(n);
    std::vector<float> sorted(w, w + n);
    std::sort(sorted.begin(), sorted.end());
    for (int64_t i = 0; i < n;) {
      int64_t j = i;
      while (j < n && sorted[j] == sorted[i]) ++j;
      cells.add(static_cast<double>(sorted[i]), static_cast<double>(j - i));
      i = j;
    }
    return cells;
  }
  struct Moments {
    double n = 0, s = 0, q = 0;  // about the weight of no more than the leading bits
  };
  const auto leading = [](uint32_t bits) {
    bits &= 0xFFFF0000u;
    float base;
    std::memcpy(&base, &bits, 4);
    return static_cast<double>(base);
  };
  const int64_t chunks = std::clamp<int64_t>(n >> 18, 1, 4);
  std::vector<Moments> moments(chunks * kPatterns);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Moments* mine = moments.data() + chunk * kPatterns;
      for (int64_t i = n * chunk / chunks; i < n * (chunk + 1) / chunks; ++i) {
        uint32_t bits;
        std::memcpy(&bits, w + i, 4);
        Moments& m = mine[bits >> 16];
        const double x = static_cast<double>(w[i]) - leading(bits);
        m.n += 1;
        m.s += x;
        m.q += x * x;
      }
    }
  });
  const auto base_of = [&](int64_t pattern) {
    return leading(static_cast<uint32_t>(pattern) << 16);
  };
  double total = 0;
  for (int64_t pattern = 0; pattern < kPatterns; ++pattern) {
    Moments& all = moments[pattern];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const Moments& m = moments[chunk * kPatterns + pattern];
      all.n += m.n;
      all.s += m.s;
      all.q += m.q;
    }
    if (all.n > 0) total += all.n * base_of(pattern) + all.s;
  }
  cells.shift = total / static_cast<double>(n);
  for (int64_t bin = 0; bin < kPatterns; ++bin) {
    const int64_t pattern = pattern_of_bin(bin);
    const Moments& all = moments[pattern];
    if (all.n > 0) cells.add(base_of(pattern), all.n, all.s, all.q);
  }
  return cells;
}

// One more cluster: best[j] is the cost of the first j cells, from[j] where its last cluster
// begins. The best beginning grows with j, so the middle one halves the search of the others.
void extend(const Cells& cells, const std::vector<double>& previous, std::vector<double>& best,
            std::vector<int32_t>& from, int64_t first, int64_t last, int64_t low, int64_t high) {
  if (first > last) return;
  const int64_t middle = (first + last) / 2;
  double least = std::numeric_limits<double>::infinity();
  int64_t begin = low;
  for (int64_t i = low; i <= std::min(high, middle - 1); ++i) {
    const double cost = previous[i] + cells.cost(i, middle);
    if (cost < least) {
      least = cost;
      begin = i;
    }
  }
  best[middle] = least;
  from[middle] = static_cast<int32_t>(begin);
  extend(cells, previous, best, from, first, middle - 1, low, begin);
  extend(cells, previous, best, from, middle + 1, last, begin, high);
}

// Writes the centroids, ascending, and returns the inertia.
double optimal_centroids(const Cells& cells, int64_t clusters, float* centroids) {
  const int64_t size = cells.size();
  if (size <= clusters) {
    for (int64_t k = 0; k < clusters; ++k) {
      const int64_t i = std::min(k, size - 1);
      centroids[k] = static_cast<float>(cells.mean(i, i + 1));
    }
    return cells.within;
  }
  const double infinity = std::numeric_limits<double>::infinity();
  std::vector<double> previous(size + 1, infinity), best(size + 1, infinity);
  previous[0] = 0;
  std::vector<std::vector<int32_t>> from(clusters, std::vector<int32_t>(size + 1));
  for (int64_t k = 0; k < clusters; ++k) {
    std::fill(best.begin(), best.end(), infinity);
    if (k == 0) {
      for (int64_t j = 1; j <= size; ++j) best[j] = cells.cost(0, j);
    } else {
      extend(cells, previous, best, from[k], k + 1, size, k, size - 1);
    }
    previous.swap(best);
  }
  int64_t end = size;
  for (int64_t k = clusters - 1; k >= 0; --k) {
    const int64_t begin = from[k][end];
    centroids[k] = static_cast<float>(cells.mean(begin, end));
    end = begin;
  }
  return previous[size];
}

// The nearest of scalar centroids by binary search, with the distances, and the choice between
// equal ones, of a search through all: distances in fp64 grow with the true ones, so that the
// nearest stand beside the point.
class Sorted {
 public:
  Sorted(const double* c, int64_t clusters, const Rules& rules) : rules_(rules), first_(c[0]) {
    label_.resize(clusters - 1);
    std::iota(label_.begin(), label_.end(), 1);
    std::stable_sort(label_.begin(), label_.end(), [&](int i, int j) { return c[i] < c[j]; });
    while (size_ < clusters) size_ *= 2;
    value_.assign(size_, std::numeric_limits<float>::infinity());
    for (size_t i = 0; i < label_.size(); ++i) value_[i] = static_cast<float>(c[label_[i]]);
  }

  // Labels of `count` points, and the sum of their squared distances.
  template <typename T>
  double operator()(const T* points, int64_t count, uint8_t* labels) const {
    constexpr int64_t kPoints = 64;
    alignas(64) float x[kPoints] = {};
    alignas(64) int32_t below[kPoints];
    double sum = 0;
    for (int64_t begin = 0; begin < count; begin += kPoints) {
      const int64_t n = std::min(kPoints, count - begin);
      for (int64_t i = 0; i < n; i += kLanes) {
        load_f32(points + begin + i, std::min(kLanes, n - i)).store(x + i);
      }
      const float* value = value_.data();
      for (int64_t i = 0; i < kPoints; ++i) below[i] = 0;
      for (int32_t half = size_ / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < kPoints; ++i) {
          below[i] += value[below[i] + half - 1] <= x[i] ? half : 0;
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        const auto [label, away] = choose(x[i], below[i]);
        labels[begin + i] = static_cast<uint8_t>(label);
        sum += away;
      }
    }
    return sum;
  }

 private:
  static double distance(double x, double c) { return (x - c) * (x - c); }

  // Centroids 1 and up are sorted; the first has rules of its own.
  std::pair<int32_t, double> choose(double x, int32_t below) const {
    const int32_t count = static_cast<int32_t>(label_.size());
    const double infinity = std::numeric_limits<double>::infinity();
    const double left = below > 0 ? distance(x, value_[below - 1]) : infinity;
    const double right = below < count ? distance(x, value_[below]) : infinity;
    const int32_t nearest = left <= right ? below - 1 : below;
    const double least = std::min(left, right);
    const int32_t next = left <= right ? below - 2 : below + 1;
    int32_t label = count > 0 ? label_[nearest] : 0;
    if (left == right || (next >= 0 && next < count && distance(x, value_[next]) == least)) {
      for (int32_t i = below - 1; i >= 0 && distance(x, value_[i]) == least; --i) {
        label = std::min(label, label_[i]);
      }
      for (int32_t i = below; i < count && distance(x, value_[i]) == least; ++i) {
        label = std::min(label, label_[i]);
      }
    }
    const double away = distance(x, first_);
    const bool barred = rules_.keep_sparsity && x != 0;
    if (!barred && away - rules_.prune_threshold <= least) return {0, away};
    return {label, least};
  }

  Rules rules_;
  double first_;
  int32_t size_ = 1;
  std::vector<float> value_;
  std::vector<int32_t> label_;
};

constexpr int64_t kSearched = 16384;  // points of a task

// Labels of scalars, partition by partition; the sums of squared distances.
template <typename T>
void search(const T* points, int64_t count, int64_t group_size, const double* c, int64_t partitions,
            int64_t clusters, const Rules& rules, uint8_t* labels, float* inertia) {
  const int64_t tasks = (std::min(group_size, count) + kSearched - 1) / kSearched;  // per partition
  std::vector<double> sums(partitions * tasks);
  at::parallel_for(0, partitions * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end;) {
      const int64_t p = t / tasks;
      const Sorted sorted(c + p * clusters, clusters, rules);
      for (; t < end && t / tasks == p; ++t) {
        const int64_t from = p * group_size + t % tasks * kSearched;
        const int64_t to = std::min({from + kSearched, (p + 1) * group_size, count});
        if (from < to) sums[t] = sorted(points + from, to - from, labels + from);
      }
    }
  });
  for (int64_t p = 0; p < partitions; ++p) {
    double sum = 0;
    for (int64_t t = 0; t < tasks; ++t) sum += sums[p * tasks + t];
    inertia[p] = static_cast<float>(sum);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> kmeans1d(const at::Tensor& weight, int64_t clusters,
                                            int64_t group_size) {
  if (!covered(weight))
    return reference("cofire::kmeans1d", &kmeans1d, weight, clusters, group_size);
  TORCH_CHECK_VALUE(clusters >= 2 && group_size >= 1 && weight.numel() > 0,
                    "kmeans1d: there must be weights, and at least two clusters");
  const at::Tensor flat = weight.contiguous().view(-1);
  const int64_t partitions = partitions_of(flat, group_size);
  at::Tensor centroids = at::empty({partitions, clusters, 1}, flat.options().dtype(at::kFloat));
  at::Tensor inertia = at::empty({partitions}, centroids.options());
  counting_all("kmeans1d", flat, [&] {
    at::parallel_for(0, partitions, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const at::Tensor x = part(flat, p, group_size);
        if (x.scalar_type() == at::kFloat) check_finite("kmeans1d", x);
        const Cells cells =
            x.scalar_type() == at::kFloat ? cells_of_floats(x) : cells_of_patterns(x);
        inertia.data_ptr<float>()[p] = static_cast<float>(
            optimal_centroids(cells, clusters, centroids.data_ptr<float>() + p * clusters));
      }
    });
  });
  return {centroids, inertia};
}

std::tuple<at::Tensor, at::Tensor> palettize(const at::Tensor& weight, const at::Tensor& centroids,
                                             int64_t group_size, double prune_threshold,
                                             bool keep_sparsity) {
  const int64_t partitions = centroids.size(0), clusters = centroids.size(1), d = centroids.size(2);
  if (!covered(weight) || !dimension_covered(d)) {
    return reference("cofire::palettize", &palettize, weight, centroids, group_size,
                     prune_threshold, keep_sparsity);
  }
  TORCH_CHECK_VALUE(centroids.scalar_type() == at::kFloat && clusters <= 256 && group_size > 0 &&
                        weight.numel() % d == 0 && group_size % d == 0 &&
                        partitions_of(weight, group_size) == partitions,
                    "palettize: centroids must be fp32, for each partition");
  const at::Tensor flat = weight.contiguous().view(-1);
  at::Tensor labels =
      at::empty(d == 1 ? weight.sizes().vec() : std::vector<int64_t>{flat.numel() / d},
                flat.options().dtype(at::kByte));
  at::Tensor inertia = at::empty({partitions}, centroids.options());
  const at::Tensor from = centroids.to(at::kDouble).contiguous();
  const Rules rules{0, true, prune_threshold, keep_sparsity};
  const bool counted = flat.element_size() == 2 && std::min(flat.numel(), group_size) >= kPatterns;
  if (d == 1 && !counted && clusters >= 2 && at::isfinite(centroids).all().item<bool>()) {
    check_finite("palettize", flat);
    dispatch(flat.scalar_type(), [&](auto type) {
      using T = decltype(type);
      search(static_cast<const T*>(flat.const_data_ptr()), flat.numel(), group_size,
             from.const_data_ptr<double>(), partitions, clusters, rules, labels.data_ptr<uint8_t>(),
             inertia.data_ptr<float>());
    });
    return {labels, inertia};
  }
  counting_all("palettize", flat, [&] {
    for (int64_t p = 0; p < partitions; ++p) {
      const at::Tensor x = part(flat, p, group_size);
      const double* c = from.const_data_ptr<double>() + p * clusters * d;
      const std::vector<double> palette(c, c + clusters * d);
      uint8_t* out = labels.data_ptr<uint8_t>() + p * group_size / d;
      double sum = 0;
      if (d == 1 && x.element_size() == 2 && x.numel() >= kPatterns) {
        const auto* patterns = static_cast<const uint16_t*>(x.const_data_ptr());
        std::vector<uint32_t> counts(kPatterns);
        std::vector<uint8_t> table(kPatterns);
        count_patterns(patterns, x.numel(), counts.data());
        const Present present(counts.data(), x.scalar_type(), "palettize");
        const TablePoints points{present.x.data(), present.n.data(), nullptr, present.size()};
        Passes<TablePoints>{points, clusters, 1, rules}.nearest(
            palette, &sum, [&](int64_t u, int64_t label) {
              table[present.patterns[u]] = static_cast<uint8_t>(label);
            });
        look_up_patterns(patterns, x.numel(), table.data(), out);
      } else {
        check_finite("palettize", x);
        with_dimension(d, [&](auto dim) {
          const StreamPoints<double, dim()> points{x.const_data_ptr(), nullptr, x.scalar_type(),
                                                   x.numel() / d};
          Passes<StreamPoints<double, dim()>>{points, clusters, 1, rules}.nearest(
              palette, &sum,
              [&](int64_t i, int64_t label) { out[i] = static_cast<uint8_t>(label); });
        });
      }
      inertia.data_ptr<float>()[p] = static_cast<float>(sum);
    }
  });
  return {labels, inertia};
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("kmeans1d", &cofire::kmeans1d);
  m.impl("palettize", &cofire::palettize);
}
