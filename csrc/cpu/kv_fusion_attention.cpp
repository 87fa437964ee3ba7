// SPDX-License-Identifier: Apache-2.0
// attention_with_scores: softmax(scale Q K^T) V, and the sums of its weights by key. A block of
// queries goes over all keys that it sees: its weights stay in the cache for the product with the
// values and for the sums. The products are the library's, or tiles of AMX, each by one thread, so
// that results are the same for any number of threads.
#include "kv_fusion_attention.h"

#include <cmath>
#include <optional>
#include <tuple>

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {
namespace {

struct Sum {
  float most, total;
};

// exp(scale (x - largest)) of the first `seen` of `width` products, in place; zeros for the others.
Sum weigh(float* x, int64_t seen, int64_t width, float scale) {
  const float largest = largest_of(x, seen);
  const Vec from(largest), by(scale * 1.44269504088896341f);
  Vec sum(0.0f), more(0.0f);
  int64_t i = 0;
  for (; i + 2 * kLanes <= seen; i += 2 * kLanes) {
    const Vec a = power_of_two<float>((Vec::loadu(x + i) - from) * by);
    const Vec b = power_of_two<float>((Vec::loadu(x + i + kLanes) - from) * by);
    a.store(x + i);
    b.store(x + i + kLanes);
    sum = sum + a;
    more = more + b;
  }
  for (; i < seen; i += kLanes) {
    const int64_t count = std::min(kLanes, seen - i);
    const Vec a =
        Vec::set(Vec(0.0f), power_of_two<float>((Vec::loadu(x + i, count) - from) * by), count);
    a.store(x + i, static_cast<int>(count));
    sum = sum + a;
  }
  std::fill(x + seen, x + width, 0.0f);
  return {largest, reduce_add(sum + more)};
}

// sums[j] += sum over rows of shares[r] weights[r][j], of so many rows first: no sum is long.
void add_by_key(const float* weights, int64_t rows, int64_t width, int64_t stride,
                const float* shares, float* sums) {
  constexpr int64_t kVectors = 4, kTerms = 16;
  const auto add = [&](int64_t j, auto vectors, auto count) {
    for (int64_t first = 0; first < rows; first += kTerms) {
      Vec acc[vectors()];
      COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) acc[v] = Vec(0.0f);
      for (int64_t r = first; r < std::min(rows, first + kTerms); ++r) {
        const Vec share(shares[r]);
        const float* p = weights + r * stride + j;
        COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
          acc[v] = at::vec::fmadd(load(p + v * kLanes, count), share, acc[v]);
        }
      }
      COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
        float* sum = sums + j + v * kLanes;
        (load(sum, count) + acc[v]).store(sum, static_cast<int>(count));
      }
    }
  };
  constexpr std::integral_constant<int64_t, kLanes> whole;
  int64_t j = 0;
  for (; j + kVectors * kLanes <= width; j += kVectors * kLanes) {
    add(j, std::integral_constant<int64_t, kVectors>{}, whole);
  }
  for (; j + kLanes <= width; j += kLanes) add(j, std::integral_constant<int64_t, 1>{}, whole);
  if (j < width) add(j, std::integral_constant<int64_t, 1>{}, width - j);
}

template <typename T>
void attend_with_scores(const Sizes& s, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, int64_t window, at::Tensor& output,
                        at::Tensor& lse, at::Tensor& scores) {
  auto *log_sums = lse.mutable_data_ptr<float>(), *by_key = scores.mutable_data_ptr<float>();
  const int64_t chunks = s.chunks();
  const at::Tensor partial =
      chunks == 1 ? scores.zero_()
                  : at::zeros({s.sets(), chunks, s.keys}, at::TensorOptions(at::kFloat));
  auto* part = partial.mutable_data_ptr<float>();
  attend<T>(s, query, key, value, output, [&](const Block& at, float* weights, float* inverse) {
    float shares[kMost];
    bool counts = false;
    for (int64_t r = 0; r < at.count; ++r) {
      const int64_t row = at.first + r;
      const Sum sum = weigh(weights + r * at.stride, s.seen(row), at.width, s.scale);
      log_sums[at.set * s.rows() + row] = s.scale * sum.most + std::log(sum.total);
      inverse[r] = 1 / sum.total;
      const bool late = row % s.queries >= s.queries - window;
      shares[r] = late ? inverse[r] : 0.0f;
      counts |= late;
    }
    if (counts) add_by_key(weights, at.count, at.width, at.stride, shares, part + at.task * s.keys);
  });
  if (chunks == 1) return;
  at::parallel_for(0, s.sets(), grain_of(chunks * s.keys), [&](int64_t begin, int64_t end) {
    for (int64_t set = begin; set < end; ++set) {
      float* to = by_key + set * s.keys;
      std::copy_n(part + set * chunks * s.keys, s.keys, to);
      for (int64_t c = 1; c < chunks; ++c) {
        const float* p = part + (set * chunks + c) * s.keys;
        for (int64_t j = 0; j < s.keys; ++j) to[j] += p[j];
      }
    }
  });
}

// Divides the sums by the number of queries that were added.
void normalize_scores(const Sizes& s, int64_t window, float* scores) {
  const int64_t first = std::max<int64_t>(s.queries - window, 0);
  for (int64_t set = 0; set < s.sets(); ++set) {
    for (int64_t j = 0; j < s.keys; ++j) {
      const int64_t from = s.causal ? std::max(first, j - (s.keys - s.queries)) : first;
      const int64_t count = (s.queries - from) * s.groups;
      scores[set * s.keys + j] /= static_cast<float>(std::max<int64_t>(count, 1));
    }
  }
}

// Of a block: the weights, and the gradient of the products.
void slopes_of(const Sizes& s, const Block& at, const float* grad_lse, float* weights,
               float* slopes) {
  for (int64_t r = 0; r < at.count; ++r) {
    float *p = weights + r * at.stride, *dp = slopes + r * at.stride;
    const Sum sum = weigh(p, s.seen(at.first + r), at.width, s.scale);
    const Vec inverse(1 / sum.total);
    Vec along(0.0f);
    for_vectors(at.width, [&](int64_t j, auto n) {
      const Vec share = load(p + j, n) * inverse;
      share.store(p + j, static_cast<int>(n));
      along = at::vec::fmadd(share, load(dp + j, n), along);
    });
    float less = reduce_add(along);
    if (grad_lse != nullptr) less -= grad_lse[at.set * s.rows() + at.first + r];
    const Vec mean(less), scale(s.scale);
    for_vectors(at.width, [&](int64_t j, auto n) {
      const Vec d = load(p + j, n) * (load(dp + j, n) - mean) * scale;
      d.store(dp + j, static_cast<int>(n));
    });
  }
}

using Optional = std::optional<at::Tensor>;

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_with_scores(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, bool causal,
    double scale, int64_t window, bool normalize) {
  if (!covered(query)) {
    return reference("cofire::attention_with_scores", &attention_with_scores, query, key, value,
                     causal, scale, window, normalize);
  }
  const Sizes s = sizes_of("attention_with_scores", query, key, value, causal, scale);
  const at::Tensor q = query.contiguous();
  const auto floats = q.options().dtype(at::kFloat);
  at::Tensor output = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty(q.sizes().slice(0, 3), floats);
  at::Tensor scores = at::empty(key.sizes().slice(0, 3), floats);
  if (q.numel() == 0) return {output, lse, scores.zero_()};
  dispatch(q.scalar_type(), [&](auto t) {
    attend_with_scores<decltype(t)>(s, q, key, value, window, output, lse, scores);
  });
  if (normalize) normalize_scores(s, window, scores.mutable_data_ptr<float>());
  return {output, lse, scores};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_with_scores_backward(
    const at::Tensor& grad, const Optional& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, bool causal, double scale) {
  if (!covered(grad) || grad.scalar_type() != query.scalar_type()) {
    return reference("cofire::attention_with_scores_backward", &attention_with_scores_backward,
                     grad, grad_lse, query, key, value, causal, scale);
  }
  const Sizes s = sizes_of("attention_with_scores_backward", query, key, value, causal, scale);
  TORCH_CHECK(grad.sizes() == query.sizes() &&
                  (!grad_lse.has_value() || grad_lse->sizes() == query.sizes().slice(0, 3)),
              "attention_with_scores_backward: the gradients do not fit query");
  const at::Tensor q = query.contiguous(), g = grad.contiguous();
  const at::Tensor of_lse =
      grad_lse.has_value() ? grad_lse->to(at::kFloat).contiguous() : at::Tensor();
  const auto empty = [](const at::Tensor& x) { return at::empty(x.sizes(), x.options()); };
  at::Tensor to_query = empty(q), to_key = empty(key), to_value = empty(value);
  if (q.numel() == 0) return {to_query, to_key.zero_(), to_value.zero_()};
  const float* slope_of_lse = of_lse.defined() ? of_lse.const_data_ptr<float>() : nullptr;
  dispatch(q.scalar_type(), [&](auto t) {
    attend_backward<decltype(t)>(
        s, g, q, key, value, to_query, to_key, to_value,
        [&](const Block& at, float* w, float* d) { slopes_of(s, at, slope_of_lse, w, d); });
  });
  return {to_query, to_key, to_value};
}

// How attention_with_scores would multiply, and its backward.
std::string attention_with_scores_plan(const at::Tensor& query, const at::Tensor& key,
                                       const at::Tensor& value, bool causal, double scale,
                                       int64_t /*window*/, bool /*normalize*/) {
  if (!covered(query)) return "the reference";
  const Sizes s = sizes_of("attention_with_scores", query, key, value, causal, scale);
  return way_of(s, query.scalar_type(), false);
}

std::string attention_with_scores_backward_plan(const at::Tensor& grad,
                                                const Optional& /*grad_lse*/,
                                                const at::Tensor& query, const at::Tensor& key,
                                                const at::Tensor& value, bool causal,
                                                double scale) {
  if (!covered(grad) || grad.scalar_type() != query.scalar_type()) return "the reference";
  const Sizes s = sizes_of("attention_with_scores_backward", query, key, value, causal, scale);
  return way_of(s, query.scalar_type(), true);
}

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("attention_with_scores", &cofire::kv_fusion::attention_with_scores);
  m.impl("attention_with_scores_backward", &cofire::kv_fusion::attention_with_scores_backward);
}
TORCH_LIBRARY_FRAGMENT(cofire_plan, m) {
  m.def("attention_with_scores", &cofire::kv_fusion::attention_with_scores_plan);
  m.def("attention_with_scores_backward", &cofire::kv_fusion::attention_with_scores_backward_plan);
}
