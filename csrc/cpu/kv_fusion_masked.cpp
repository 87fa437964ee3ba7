// SPDX-License-Identifier: Apache-2.0
// masked_softmax_attention: a mask multiplies the exponentials of keys, but for a query's own.
// Blocks of queries as in attention_with_scores; the gradient of the mask is a sum over the rows of
// a set, then over the sets of a sample, in a fixed order.
//
// kv_append_: one token into a cache, by rows of different lengths.
#include <ATen/ops/sum.h>

#include <cstring>
#include <tuple>

#include "kv_fusion_attention.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {
namespace {

struct Masked {
  Sizes sizes;
  const float* mask;  // [batch, keys]
  float eps, leak;    // what every weight gets of eps, before the division
};

// The first n lanes; zeros for the others.
inline Vec lanes(const Vec& v, int64_t n) { return n == kLanes ? v : Vec::set(Vec(0.0f), v, n); }

// Powers of e as the rows of products have them.
struct Exponential {
  Vec from, by;
  Exponential(float largest, float scale) : from(largest), by(scale * 1.44269504088896341f) {}
  Vec operator()(const Vec& x) const { return power_of_two<float>((x - from) * by); }
  float operator()(float x) const {
    alignas(64) float all[kLanes];
    (*this)(Vec(x)).store(all);
    return all[0];
  }
};

// Makes weights of a row's products, in place; the factor that makes their sum one.
float weigh(const Masked& m, int64_t set, int64_t row, int64_t width, float* x) {
  const Sizes& s = m.sizes;
  const int64_t seen = s.seen(row), own = s.own(row);
  const float* mask = m.mask + set / s.heads * s.keys;
  const float largest = largest_of(x, seen);
  const Exponential exp(largest, s.scale);
  const float self = exp(x[own]);
  const Vec leak(m.leak);
  Vec sum(0.0f);
  for_vectors(seen, [&](int64_t j, auto n) {
    const Vec kept = lanes(exp(load(x + j, n)) * load(mask + j, n), n);
    sum = sum + kept;
    (kept + leak).store(x + j, static_cast<int>(n));
  });
  x[own] = self + m.leak;
  std::fill(x + seen, x + width, s.hidden_too ? m.leak : 0.0f);
  // (Where the largest is not finite, nothing is.)
  return 1 / (reduce_add(sum) + (self - self * mask[own]) + m.eps + 0 * largest);
}

// Of a row's products with keys `x` and of its gradient with values `dx`: the weights, and the
// gradient of the former products. Adds the gradient of the mask to `by_key`.
void slopes_of(const Masked& m, int64_t set, int64_t row, int64_t width, float* x, float* dx,
               float* by_key) {
  const Sizes& s = m.sizes;
  const int64_t seen = s.seen(row), own = s.own(row);
  const float* mask = m.mask + set / s.heads * s.keys;
  const float largest = largest_of(x, seen);
  const Exponential exp(largest, s.scale);
  const float self = exp(x[own]), more = self - self * mask[own];
  const Vec leak(m.leak);
  Vec sum(0.0f), weighted(0.0f);
  for_vectors(seen, [&](int64_t j, auto n) {
    const Vec e = exp(load(x + j, n));
    const Vec kept = lanes(e * load(mask + j, n), n);
    e.store(x + j, static_cast<int>(n));
    sum = sum + kept;
    weighted = at::vec::fmadd(kept + leak, load(dx + j, n), weighted);
  });
  if (s.hidden_too) {
    for_vectors(width - seen, [&](int64_t j, auto n) {
      weighted = at::vec::fmadd(leak, load(dx + seen + j, n), weighted);
    });
  }
  const float inverse = 1 / (reduce_add(sum) + more + m.eps + 0 * largest);
  const float mean = (reduce_add(weighted) + more * dx[own]) * inverse;
  const float slope = self * (dx[own] - mean) * inverse * s.scale, before = by_key[own];
  const Vec less(mean), factor(inverse), scale(s.scale);
  for_vectors(seen, [&](int64_t j, auto n) {
    const Vec e = load(x + j, n), of_key = load(mask + j, n);
    const Vec to_mask = e * ((load(dx + j, n) - less) * factor);
    (load(by_key + j, n) + to_mask).store(by_key + j, static_cast<int>(n));
    (at::vec::fmadd(e, of_key, leak) * factor).store(x + j, static_cast<int>(n));
    (to_mask * of_key * scale).store(dx + j, static_cast<int>(n));
  });
  by_key[own] = before;
  x[own] = (self + m.leak) * inverse;
  dx[own] = slope;
  std::fill(x + seen, x + width, s.hidden_too ? m.leak * inverse : 0.0f);
  std::fill(dx + seen, dx + width, 0.0f);
}

Masked masked_of(const char* name, const at::Tensor& query, const at::Tensor& key,
                 const at::Tensor& value, const at::Tensor& mask, bool causal, double scale,
                 double eps, bool parity) {
  Sizes s = sizes_of(name, query, key, value, causal, scale);
  s.hidden_too = parity;
  TORCH_CHECK(mask.dim() == 2 && mask.size(0) == s.batch && mask.size(1) == s.keys &&
                  s.queries <= s.keys && eps > 0,
              name, ": the arguments do not fit each other");
  return {s, mask.const_data_ptr<float>(), static_cast<float>(eps),
          static_cast<float>(eps / static_cast<double>(s.keys))};
}

at::Tensor in_floats(const at::Tensor& mask) { return mask.to(at::kFloat).contiguous(); }

}  // namespace

at::Tensor masked_softmax_attention(const at::Tensor& query, const at::Tensor& key,
                                    const at::Tensor& value, const at::Tensor& mask, bool causal,
                                    double scale, double eps, bool parity) {
  if (!covered(query) || !covered(mask)) {
    return reference("cofire::masked_softmax_attention", &masked_softmax_attention, query, key,
                     value, mask, causal, scale, eps, parity);
  }
  const at::Tensor q = query.contiguous(), floats = in_floats(mask);
  const Masked m =
      masked_of("masked_softmax_attention", q, key, value, floats, causal, scale, eps, parity);
  at::Tensor output = at::empty(q.sizes(), q.options());
  if (q.numel() == 0) return output;
  dispatch(q.scalar_type(), [&](auto t) {
    attend<decltype(t)>(
        m.sizes, q, key, value, output, [&](const Block& at, float* weights, float* factors) {
          for (int64_t r = 0; r < at.count; ++r) {
            factors[r] = weigh(m, at.set, at.first + r, at.width, weights + r * at.stride);
          }
        });
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> masked_softmax_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& mask, bool causal, double scale, double eps, bool parity) {
  if (!covered(grad) || grad.scalar_type() != query.scalar_type() || !covered(mask)) {
    return reference("cofire::masked_softmax_attention_backward",
                     &masked_softmax_attention_backward, grad, query, key, value, mask, causal,
                     scale, eps, parity);
  }
  const at::Tensor q = query.contiguous(), g = grad.contiguous(), floats = in_floats(mask);
  const Masked m = masked_of("masked_softmax_attention_backward", q, key, value, floats, causal,
                             scale, eps, parity);
  TORCH_CHECK(g.sizes() == q.sizes(), "masked_softmax_attention_backward: grad does not fit query");
  const auto empty = [](const at::Tensor& x) { return at::empty(x.sizes(), x.options()); };
  at::Tensor to_query = empty(q), to_key = empty(key), to_value = empty(value);
  const Sizes& s = m.sizes;
  const at::Tensor sums = at::zeros({s.batch, s.heads, s.keys}, at::TensorOptions(at::kFloat));
  if (q.numel() == 0) {
    to_key.zero_();
    to_value.zero_();
  } else {
    auto* by_key = sums.mutable_data_ptr<float>();
    dispatch(q.scalar_type(), [&](auto t) {
      attend_backward<decltype(t)>(s, g, q, key, value, to_query, to_key, to_value,
                                   [&](const Block& at, float* weights, float* slopes) {
                                     for (int64_t r = 0; r < at.count; ++r) {
                                       slopes_of(m, at.set, at.first + r, at.width,
                                                 weights + r * at.stride, slopes + r * at.stride,
                                                 by_key + at.set * s.keys);
                                     }
                                   });
    });
  }
  return {to_query, to_key, to_value, sums.sum(1).to(mask.scalar_type())};
}

// How masked_softmax_attention would multiply, and its backward.
std::string masked_softmax_attention_plan(const at::Tensor& query, const at::Tensor& key,
                                          const at::Tensor& value, const at::Tensor& mask,
                                          bool causal, double scale, double eps, bool parity) {
  if (!covered(query) || !covered(mask)) return "the reference";
  const at::Tensor floats = in_floats(mask);
  const Masked m =
      masked_of("masked_softmax_attention", query, key, value, floats, causal, scale, eps, parity);
  return way_of(m.sizes, query.scalar_type(), false);
}

std::string masked_softmax_attention_backward_plan(const at::Tensor& grad, const at::Tensor& query,
                                                   const at::Tensor& key, const at::Tensor& value,
                                                   const at::Tensor& mask, bool causal,
                                                   double scale, double eps, bool parity) {
  if (!covered(grad) || grad.scalar_type() != query.scalar_type() || !covered(mask)) {
    return "the reference";
  }
  const at::Tensor floats = in_floats(mask);
  const Masked m = masked_of("masked_softmax_attention_backward", query, key, value, floats, causal,
                             scale, eps, parity);
  return way_of(m.sizes, query.scalar_type(), true);
}

at::Tensor kv_append_(const at::Tensor& cache_key, const at::Tensor& cache_value,
                      const at::Tensor& lengths, const at::Tensor& key, const at::Tensor& value,
                      const at::Tensor& keep) {
  const char* name = "kv_append_";
  TORCH_CHECK(cache_key.dim() == 4 && key.dim() == 4 && cache_value.sizes() == cache_key.sizes() &&
                  value.sizes() == key.sizes() && key.size(0) == cache_key.size(0) &&
                  key.size(1) == cache_key.size(1) && key.size(2) == 1 &&
                  key.size(3) == cache_key.size(3),
              name, ": the arguments do not fit each other");
  const int64_t batch = key.size(0), heads = key.size(1), slots = cache_key.size(2);
  for (const at::Tensor* x : {&cache_value, &key, &value}) {
    TORCH_CHECK(x->scalar_type() == cache_key.scalar_type(), name, ": dtypes differ");
  }
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == batch && lengths.scalar_type() == at::kInt &&
                  keep.dim() == 1 && keep.size(0) == batch && keep.scalar_type() == at::kBool,
              name, ": an int32 length and a bool for each row");
  auto used = lengths.accessor<int32_t, 1>();
  const auto stays = keep.accessor<bool, 1>();
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK(used[b] >= 0 && used[b] < slots, name,
                ": lengths must be from 0 to less than the slots of the cache: it is full");
  }
  const at::Tensor seen = at::empty({batch}, at::TensorOptions(at::kInt));
  auto* visible = seen.mutable_data_ptr<int32_t>();
  const int64_t element = key.element_size(), d = key.size(3);
  for (auto [cache, x] : {std::pair(&cache_key, &key), std::pair(&cache_value, &value)}) {
    auto* to = static_cast<char*>(cache->data_ptr());
    const auto* from = static_cast<const char*>(x->const_data_ptr());
    const bool rows = cache->stride(3) == 1 && x->stride(3) == 1;
    at::parallel_for(0, batch * heads, grain_of(d),
                     [&, cache = cache, x = x](int64_t i, int64_t n) {
                       for (; i < n; ++i) {
                         const int64_t b = i / heads, h = i % heads;
                         char* a = to + element * (b * cache->stride(0) + h * cache->stride(1) +
                                                   used[b] * cache->stride(2));
                         const char* c = from + element * (b * x->stride(0) + h * x->stride(1));
                         if (rows) {
                           std::memcpy(a, c, d * element);
                           continue;
                         }
                         for (int64_t j = 0; j < d; ++j) {
                           std::memcpy(a + element * j * cache->stride(3),
                                       c + element * j * x->stride(3), element);
                         }
                       }
                     });
  }
  for (int64_t b = 0; b < batch; ++b) {
    visible[b] = used[b] + 1;
    used[b] += stays[b];
  }
  return seen;
}

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("masked_softmax_attention", &cofire::kv_fusion::masked_softmax_attention);
  m.impl("masked_softmax_attention_backward",
         &cofire::kv_fusion::masked_softmax_attention_backward);
  m.impl("kv_append_", &cofire::kv_fusion::kv_append_);
}
TORCH_LIBRARY_FRAGMENT(cofire_plan, m) {
  m.def("masked_softmax_attention", &cofire::kv_fusion::masked_softmax_attention_plan);
  m.def("masked_softmax_attention_backward",
        &cofire::kv_fusion::masked_softmax_attention_backward_plan);
}
