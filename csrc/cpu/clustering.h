// SPDX-License-Identifier: Apache-2.0
// Soft k-means of points, block by block: what the table path (values with
// counts, fp64) and the streaming path (the weights themselves) of
// differentiable k-means share.
//
// A pass visits all points once and recomputes their attention from the
// centroids; no map over points and centroids is ever stored. Passes run in
// tasks whose number depends on the number of points alone, each task adds up in
// fp64, and the tasks' sums are added in order: the same bits for any number of
// threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exponential.h"
#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

// What an iteration does besides k-means; see Rules in ops/clustering.py.
struct Rules {
  double eps;
  bool enforce_zero;
  double prune_threshold;
  bool keep_sparsity;
};

// `status` of a partition.
enum Status : int32_t { kConverged = 0, kBelowFloor = 1, kStalled = 2 };

constexpr int64_t kBins = 65536;
constexpr int64_t kBlock = 32;  // points whose attention is in the cache at a time

template <typename R, int D>
struct Block {
  R x[D][kBlock];
  R g[D][kBlock];  // upstream gradients: of the point, or summed over all that it stands for
  R n[kBlock];     // how many weights a point stands for; zero past the end
  int64_t count;
};

// Values that stand for several weights each.
struct TablePoints {
  using Real = double;
  static constexpr int kDim = 1;
  static constexpr int64_t kChunk = 512;
  const double* x;
  const double* n;
  const double* g;
  int64_t size;

  void load(int64_t first, int64_t last, Block<double, 1>& block) const {
    block.count = last - first;
    for (int64_t i = 0; i < kBlock; ++i) {
      const bool there = i < block.count;
      block.x[0][i] = x[there ? first + i : first];
      block.n[i] = there ? n[first + i] : 0;
      block.g[0][i] = there && g ? g[first + i] : 0;
    }
  }
};

// The weights themselves, in vectors of D.
template <typename R, int D>
struct StreamPoints {
  using Real = R;
  static constexpr int kDim = D;
  static constexpr int64_t kChunk = 32 * VecOf<R>::size();  // fp32 sums of few addends
  const void* x;
  const void* g;
  at::ScalarType dtype;
  int64_t size;

  void load(int64_t first, int64_t last, Block<R, D>& block) const {
    block.count = last - first;
    dispatch(dtype, [&](auto zero) {
      using T = decltype(zero);
      read(static_cast<const T*>(x) + first * D, block.count, block.x);
      if (g) read(static_cast<const T*>(g) + first * D, block.count, block.g);
    });
    for (int64_t i = 0; i < kBlock; ++i) block.n[i] = i < block.count;
  }

 private:
  template <typename T>
  static void read(const T* p, int64_t count, R (&into)[D][kBlock]) {
    if (D == 1 && count == kBlock && std::is_same_v<R, float>) {
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        load_f32(p + i).store(reinterpret_cast<float*>(&into[0][i]));
      }
      return;
    }
    for (int64_t i = 0; i < kBlock; ++i) {
      for (int d = 0; d < D; ++d) {
        into[d][i] = i < count ? static_cast<R>(static_cast<float>(p[i * D + d])) : R(0);
      }
    }
  }
};

// The attention of the points of a block to centroids c [K, D].
template <typename R, int D>
struct Attention {
  using V = VecOf<R>;
  int64_t clusters = 0;
  std::vector<R> c;
  R sharpness = 0;  // log2(e) / tau: attention in powers of two
  Rules rules{};

  Attention(const double* centroids, int64_t clusters, double tau, const Rules& rules)
      : clusters(clusters),
        c(centroids, centroids + clusters * D),
        sharpness(static_cast<R>(1.4426950408889634074 / tau)),
        rules(rules) {}

  // The distance to centroid 0, as the rules see it.
  V first(const V& distance, const V (&x)[D]) const {
    V result = distance - V(static_cast<R>(rules.prune_threshold));
    if (rules.keep_sparsity) {
      for (int d = 0; d < D; ++d) {
        result = V::blendv(result, V(std::numeric_limits<R>::infinity()), x[d] != V(0));
      }
    }
    return result;
  }

  // Softmax over the centroids, not yet clamped: soft [K, kBlock].
  void softmax(const Block<R, D>& block, R* soft) const {
    constexpr int64_t L = V::size(), W = kBlock / L;
    V top[W], sum[W];
    for (int64_t w = 0; w < W; ++w) {
      V x[D];
      for (int d = 0; d < D; ++d) x[d] = V::loadu(&block.x[d][w * L]);
      top[w] = V(-std::numeric_limits<R>::infinity());
      for (int64_t k = 0; k < clusters; ++k) {
        V distance(0);
        for (int d = 0; d < D; ++d) {
          const V t = x[d] - V(c[k * D + d]);
          distance = at::vec::fmadd(t, t, distance);
        }
        if (k == 0) distance = first(distance, x);
        const V s = distance * V(-sharpness);
        s.store(soft + k * kBlock + w * L);
        top[w] = at::vec::clamp_min(s, top[w]);
      }
      sum[w] = V(0);
    }
    for (int64_t k = 0; k < clusters; ++k) {
      for (int64_t w = 0; w < W; ++w) {
        R* p = soft + k * kBlock + w * L;
        const V e = power_of_two<R>(V::loadu(p) - top[w]);
        e.store(p);
        sum[w] = sum[w] + e;
      }
    }
    for (int64_t w = 0; w < W; ++w) sum[w] = V(1) / sum[w];
    for (int64_t k = 0; k < clusters; ++k) {
      for (int64_t w = 0; w < W; ++w) {
        R* p = soft + k * kBlock + w * L;
        (V::loadu(p) * sum[w]).store(p);
      }
    }
  }

  // The nearest centroid of one point, of equally near ones the first, in fp64; and how far it is.
  std::pair<int64_t, double> nearest(const Block<R, D>& block, int64_t i) const {
    int64_t best = 0;
    double least = std::numeric_limits<double>::infinity(), away = 0;
    bool zero = true;
    for (int d = 0; d < D; ++d) zero = zero && block.x[d][i] == 0;
    for (int64_t k = 0; k < clusters; ++k) {
      double distance = 0;
      for (int d = 0; d < D; ++d) {
        const double t = static_cast<double>(block.x[d][i]) - static_cast<double>(c[k * D + d]);
        distance += t * t;
      }
      double seen = distance;
      if (k == 0) {
        seen -= rules.prune_threshold;
        if (rules.keep_sparsity && !zero) seen = std::numeric_limits<double>::infinity();
      }
      if (seen < least) {
        least = seen;
        best = k;
        away = distance;
      }
    }
    return {best, away};
  }
};

template <typename R>
inline double reduce(const VecOf<R>& v) {
  R lanes[VecOf<R>::size()];
  v.store(lanes);
  double sum = 0;
  for (R lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

// Runs body(first, last, sums) over chunks of points, adding to sums[width]; in tasks, as above.
template <typename F>
void in_tasks(int64_t points, int64_t chunk, int64_t most_tasks, int64_t width, int64_t work,
              double* sums, F&& body) {
  const int64_t chunks = (points + chunk - 1) / chunk;
  const int64_t tasks = std::min(chunks, most_tasks);
  std::vector<double> partial(tasks * width, 0.0);
  const int64_t grain = points * work < 65536 ? tasks : 1;  // not worth waking a thread
  at::parallel_for(0, tasks, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t i = chunks * task / tasks; i < chunks * (task + 1) / tasks; ++i) {
        body(i * chunk, std::min(points, (i + 1) * chunk), partial.data() + task * width);
      }
    }
  });
  std::fill(sums, sums + width, 0.0);
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t j = 0; j < width; ++j) sums[j] += partial[task * width + j];
  }
}

// Scratch of a thread, kept between chunks.
template <typename R>
inline R* scratch(int64_t size, int which) {
  static thread_local std::vector<R> buffers[3];
  if (static_cast<int64_t>(buffers[which].size()) < size) buffers[which].resize(size);
  return buffers[which].data();
}

template <typename P>
struct Passes {
  using R = typename P::Real;
  using V = VecOf<R>;
  static constexpr int D = P::kDim;
  static constexpr int64_t L = V::size(), W = kBlock / L;
  using At = Attention<R, D>;

  const P& points;
  int64_t clusters;
  double tau;
  Rules rules;

  int64_t width() const { return clusters * D; }
  At attention(const std::vector<double>& c) const { return At(c.data(), clusters, tau, rules); }

  template <typename F>
  void blocks(int64_t first, int64_t last, F&& body) const {
    Block<R, D> block{};
    for (int64_t i = first; i < last; i += kBlock) {
      points.load(i, std::min(last, i + kBlock), block);
      body(i, block);
    }
  }

  // One update: the new centroids, and how much attention each got.
  std::vector<double> update(const std::vector<double>& c,
                             std::vector<double>* totals = nullptr) const {
    const At at = attention(c);
    std::vector<double> sums(clusters * (1 + D));
    in_tasks(
        points.size, P::kChunk, 64, clusters * (1 + D), clusters, sums.data(),
        [&](int64_t first, int64_t last, double* into) { add_moments(at, first, last, into); });
    return centroids(c, sums.data(), totals);
  }

  // What becomes of each point: write(index, block, V (&out)[D][W]).
  template <typename F>
  void apply(const std::vector<double>& before, const std::vector<double>& after, F&& write) const {
    const At at = attention(before);
    const std::vector<R> to(after.begin(), after.end());
    in_tasks(points.size, P::kChunk, 64, 0, clusters, nullptr,
             [&](int64_t first, int64_t last, double*) {
               R* soft = scratch<R>(clusters * kBlock, 0);
               blocks(first, last, [&](int64_t i, const Block<R, D>& block) {
                 at.softmax(block, soft);
                 R out[D][kBlock] = {};
                 for (int64_t w = 0; w < W; ++w) {
                   V sum[D];
                   for (int d = 0; d < D; ++d) sum[d] = V(0);
                   for (int64_t k = 0; k < clusters; ++k) {
                     const V a = clamped(soft + k * kBlock + w * L);
                     for (int d = 0; d < D; ++d) {
                       sum[d] = at::vec::fmadd(a, V(to[k * D + d]), sum[d]);
                     }
                   }
                   for (int d = 0; d < D; ++d) sum[d].store(&out[d][w * L]);
                 }
                 write(i, block.count, out);
               });
             });
  }

  // write(index, block, i, label, squared distance) for each point.
  template <typename F>
  void nearest(const std::vector<double>& c, double* inertia, F&& write) const {
    const At at = attention(c);
    in_tasks(points.size, P::kChunk, 64, 1, clusters, inertia,
             [&](int64_t first, int64_t last, double* into) {
               blocks(first, last, [&](int64_t i, const Block<R, D>& block) {
                 for (int64_t j = 0; j < block.count; ++j) {
                   const auto [label, away] = at.nearest(block, j);
                   *into += static_cast<double>(block.n[j]) * away;
                   write(i + j, label);
                 }
               });
             });
  }

  // The gradient that reaches the output: of each point by itself (written), and of the centroids
  // after and before the last update (summed). For D = 1 what is written is the slope, that is, per
  // unit of the point's own upstream gradient.
  template <typename F>
  void output_backward(const std::vector<double>& before, const std::vector<double>& after,
                       std::vector<double>& to_after, std::vector<double>& to_before,
                       F&& write) const {
    const std::vector<R> c(after.begin(), after.end());
    std::vector<double> sums(2 * width());
    pull(
        before, 2 * width(), sums.data(), write,
        [&](const Block<R, D>& block, const V(&)[D], int64_t k, int64_t w) {
          if constexpr (D == 1) {
            return V(c[k]);
          } else {
            V sum(0);
            for (int d = 0; d < D; ++d) {
              sum = at::vec::fmadd(V::loadu(&block.g[d][w * L]), V(c[k * D + d]), sum);
            }
            return sum;
          }
        },
        [&](const Block<R, D>& block, const V& a, const V& t, int64_t k, int d, int64_t w, V* acc,
            V&) {
          const V g = V::loadu(&block.g[d][w * L]);
          acc[k * D + d] = at::vec::fmadd(a, g, acc[k * D + d]);
          V& other = acc[width() + k * D + d];
          other = D == 1 ? at::vec::fmadd(t, g, other) : other + t;
        });
    to_after.assign(sums.begin(), sums.begin() + width());
    to_before.assign(sums.begin() + width(), sums.end());
  }

  // Through one update: of each point (written), and of the centroids before it (returned).
  // `share` is the gradient of the centroids after it, over their totals.
  template <typename F>
  std::vector<double> update_backward(const std::vector<double>& before,
                                      const std::vector<double>& after,
                                      const std::vector<double>& share, F&& write) const {
    const std::vector<R> c(after.begin(), after.end()), s(share.begin(), share.end());
    std::vector<double> sums(width());
    pull(
        before, width(), sums.data(), write,
        [&](const Block<R, D>&, const V(&x)[D], int64_t k, int64_t) {
          V sum(0);
          for (int d = 0; d < D; ++d) {
            sum = at::vec::fmadd(x[d] - V(c[k * D + d]), V(s[k * D + d]), sum);
          }
          return sum;
        },
        [&](const Block<R, D>& block, const V& a, const V& t, int64_t k, int d, int64_t w, V* acc,
            V& out) {
          acc[k * D + d] = at::vec::fmadd(t, V::loadu(&block.n[w * L]), acc[k * D + d]);
          out = at::vec::fmadd(a, V(s[k * D + d]), out);
        });
    return sums;
  }

  // The totals at c, the residual of an update, and the update's Jacobian [K D, K D] there.
  void linearize(const std::vector<double>& c, std::vector<double>& totals,
                 std::vector<double>& residual, std::vector<double>& jacobian) const {
    const At at = attention(c);
    const int64_t m = width(), moments = clusters * (1 + D), own = clusters * D * D;
    std::vector<double> sums(moments + own + m * m);
    in_tasks(points.size, P::kChunk, 16, static_cast<int64_t>(sums.size()), clusters * clusters,
             sums.data(), [&](int64_t first, int64_t last, double* into) {
               add_moments(at, first, last, into);
               add_products(at, first, last, into + moments, into + moments + own);
             });
    const std::vector<double> next = centroids(c, sums.data(), &totals);
    residual.resize(m);
    for (int64_t j = 0; j < m; ++j) residual[j] = next[j] - c[j];
    jacobian.assign(m * m, 0.0);
    for (int64_t k = rules.enforce_zero ? 1 : 0; k < clusters; ++k) {
      const double factor = totals[k] == 0 ? 0 : 2 / tau / totals[k];
      for (int d = 0; d < D; ++d) {
        const int64_t row = k * D + d;
        const double* full = sums.data() + moments + own + row * m;
        for (int64_t j = 0; j < m; ++j) jacobian[row * m + j] = -factor * full[j];
        for (int e = 0; e < D; ++e) {
          jacobian[row * m + k * D + e] += factor * sums[moments + (k * D + d) * D + e];
        }
      }
    }
  }

 private:
  V clamped(const R* soft) const {
    return at::vec::clamp_min(V::loadu(soft), V(static_cast<R>(rules.eps)));
  }

  // Adds n A and n A x of the points to moments [K] and [K, D].
  void add_moments(const At& at, int64_t first, int64_t last, double* into) const {
    R* soft = scratch<R>(clusters * kBlock, 0);
    const int64_t size = clusters * (1 + D);
    std::vector<V> acc(size, V(0));
    blocks(first, last, [&](int64_t, const Block<R, D>& block) {
      at.softmax(block, soft);
      for (int64_t k = 0; k < clusters; ++k) {
        for (int64_t w = 0; w < W; ++w) {
          const V a = clamped(soft + k * kBlock + w * L) * V::loadu(&block.n[w * L]);
          acc[k] = acc[k] + a;
          for (int d = 0; d < D; ++d) {
            V& moment = acc[clusters + k * D + d];
            moment = at::vec::fmadd(a, V::loadu(&block.x[d][w * L]), moment);
          }
        }
      }
    });
    for (int64_t j = 0; j < size; ++j) into[j] += reduce<R>(acc[j]);
  }

  // Where the moments put the centroids. One that got no attention stays.
  std::vector<double> centroids(const std::vector<double>& c, const double* moments,
                                std::vector<double>* totals) const {
    std::vector<double> result(c);
    for (int64_t k = 0; k < clusters; ++k) {
      if (moments[k] == 0) continue;
      for (int d = 0; d < D; ++d) {
        result[k * D + d] = moments[clusters + k * D + d] / moments[k];
      }
    }
    if (rules.enforce_zero) std::fill_n(result.begin(), D, 0.0);
    if (totals) totals->assign(moments, moments + clusters);
    return result;
  }

  // Adds sum n A (x - c)(x - c)' to own [K, D, D] and sum n A_k A_l (x - c_k)(x - c_l)' to full,
  // where A is zero where it was clamped (of the second, A_l is not).
  void add_products(const At& at, int64_t first, int64_t last, double* own, double* full) const {
    const int64_t m = width();
    R* soft = scratch<R>(clusters * kBlock, 0);
    double* left = scratch<double>(m * kBlock, 1);   // n A_k (x - c_k), [K D, kBlock]
    double* right = scratch<double>(m * kBlock, 2);  // A_l (x - c_l), [kBlock, K D]
    blocks(first, last, [&](int64_t, const Block<R, D>& block) {
      at.softmax(block, soft);
      for (int64_t k = 0; k < clusters; ++k) {
        for (int64_t i = 0; i < kBlock; ++i) {
          const double a = soft[k * kBlock + i];
          const double kept = a > rules.eps ? a * block.n[i] : 0;
          for (int d = 0; d < D; ++d) {
            const double away = block.x[d][i] - at.c[k * D + d];
            left[(k * D + d) * kBlock + i] = kept * away;
            right[i * m + k * D + d] = a * away;
          }
          for (int d = 0; d < D; ++d) {
            for (int e = 0; e < D; ++e) {
              own[(k * D + d) * D + e] +=
                  left[(k * D + d) * kBlock + i] * (block.x[e][i] - at.c[k * D + e]);
            }
          }
        }
      }
      using VD = VecOf<double>;
      for (int64_t row = 0; row < m; ++row) {
        const double* l = left + row * kBlock;
        int64_t j = 0;
        for (; j + VD::size() <= m; j += VD::size()) {
          VD sum = VD::loadu(full + row * m + j);
          for (int64_t i = 0; i < kBlock; ++i) {
            sum = at::vec::fmadd(VD(l[i]), VD::loadu(right + i * m + j), sum);
          }
          sum.store(full + row * m + j);
        }
        for (; j < m; ++j) {
          double sum = full[row * m + j];
          for (int64_t i = 0; i < kBlock; ++i) sum += l[i] * right[i * m + j];
          full[row * m + j] = sum;
        }
      }
    });
  }

  // From the gradient of the attention, d_attention(block, x, k, w), to that of the points and
  // centroids: t = 2 / tau A (dA - sum A dA)(x - c). sum(block, A, t, k, d, w, acc, out) adds to
  // the sums of a centroid and to the point's.
  template <typename F, typename G, typename H>
  void pull(const std::vector<double>& before, int64_t size, double* sums, F& write,
            const G& d_attention, const H& sum) const {
    const At at = attention(before);
    const V factor(static_cast<R>(2 / tau)), eps(static_cast<R>(rules.eps));
    in_tasks(points.size, P::kChunk, 64, size, 2 * clusters, sums,
             [&](int64_t first, int64_t last, double* into) {
               R* soft = scratch<R>(clusters * kBlock, 0);
               R* passed = scratch<R>(clusters * kBlock, 1);
               std::vector<V> acc(size, V(0));
               blocks(first, last, [&](int64_t index, const Block<R, D>& block) {
                 at.softmax(block, soft);
                 R out[D][kBlock];
                 for (int64_t w = 0; w < W; ++w) {
                   V x[D], result[D];
                   for (int d = 0; d < D; ++d) {
                     x[d] = V::loadu(&block.x[d][w * L]);
                     result[d] = V(0);
                   }
                   V inner(0);
                   for (int64_t k = 0; k < clusters; ++k) {
                     const V a = V::loadu(soft + k * kBlock + w * L);
                     const V d = where_greater<R>(a, eps, d_attention(block, x, k, w));
                     d.store(passed + k * kBlock + w * L);
                     inner = at::vec::fmadd(a, d, inner);
                   }
                   for (int64_t k = 0; k < clusters; ++k) {
                     const V a = V::loadu(soft + k * kBlock + w * L);
                     const V score = a * (V::loadu(passed + k * kBlock + w * L) - inner) * factor;
                     const V kept = at::vec::clamp_min(a, eps);
                     for (int d = 0; d < D; ++d) {
                       const V t = score * (x[d] - V(at.c[k * D + d]));
                       result[d] = result[d] - t;
                       sum(block, kept, t, k, d, w, acc.data(), result[d]);
                     }
                   }
                   for (int d = 0; d < D; ++d) result[d].store(&out[d][w * L]);
                 }
                 write(index, block.count, out);
               });
               for (int64_t j = 0; j < size; ++j) into[j] += reduce<R>(acc[j]);
             });
  }
};

// Vectors of so many weights have a kernel; others take the reference.
inline bool dimension_covered(int64_t d) { return (d >= 1 && d <= 4) || d == 8; }

template <typename F>
void with_dimension(int64_t d, F&& f) {
  switch (d) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, 8>{});
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
