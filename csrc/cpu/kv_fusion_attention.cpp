// SPDX-License-Identifier: Apache-2.0
// attention_with_scores: softmax(scale Q K^T) V, and the sums of its weights by key. A block of
// queries goes over all keys that it sees: its weights stay in the cache for the product with the
// values and for the sums. The products are the library's, each by one thread, so that results are
// the same for any number of threads.
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "exponential.h"
#include "kv_fusion.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {
namespace {

constexpr int64_t kTile = 64 << 10;           // weights of a block: a quarter of a megabyte
constexpr int64_t kFewest = 16, kMost = 128;  // queries of a block
constexpr int64_t kQueries = 256;             // of a task, whose sums by key are stored

struct Sizes {
  int64_t batch, heads, groups, queries, keys, d;  // `groups` heads of queries for each of keys
  bool causal;
  float scale;

  int64_t sets() const { return batch * heads; }
  int64_t rows() const { return groups * queries; }  // of a set
  int64_t block() const { return std::clamp(kTile / keys, kFewest, kMost); }
  // How many keys a row sees, or the rows [first, last).
  int64_t seen(int64_t row) const { return causal ? keys - queries + row % queries + 1 : keys; }
  int64_t seen(int64_t first, int64_t last) const {
    return first / queries == (last - 1) / queries ? seen(last - 1) : keys;
  }
};

// Keys or values, a part of a cache perhaps.
template <typename T>
struct Cache {
  at::Tensor tensor;
  explicit Cache(const at::Tensor& x) : tensor(x.stride(3) == 1 ? x : x.contiguous()) {}
  Floats of(int64_t b, int64_t h, int64_t rows) const {
    const T* p = tensor.const_data_ptr<T>() + b * tensor.stride(0) + h * tensor.stride(1);
    return Floats(p, rows, tensor.size(3), tensor.stride(2));
  }
};

struct Sum {
  float most, total;
};

// exp(scale (x - largest)) of the first `seen` of `width` products, in place; zeros for the others.
Sum weigh(float* x, int64_t seen, int64_t width, float scale) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  Vec most(-infinity), other(-infinity);
  int64_t i = 0;
  for (; i + 2 * kLanes <= seen; i += 2 * kLanes) {
    most = at::vec::maximum(most, Vec::loadu(x + i));
    other = at::vec::maximum(other, Vec::loadu(x + i + kLanes));
  }
  for (; i < seen; i += kLanes) {
    const int64_t count = std::min(kLanes, seen - i);
    most = at::vec::maximum(most, Vec::set(most, Vec::loadu(x + i, count), count));
  }
  const float largest = reduce_max(at::vec::maximum(most, other));
  const Vec from(largest), by(scale * 1.44269504088896341f);
  Vec sum(0.0f), more(0.0f);
  i = 0;
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

// sums[j] += sum over rows of shares[r] weights[r][j]
void add_by_key(const float* weights, int64_t rows, int64_t width, int64_t stride,
                const float* shares, float* sums) {
  constexpr int64_t kVectors = 4;
  int64_t j = 0;
  for (; j + kVectors * kLanes <= width; j += kVectors * kLanes) {
    Vec acc[kVectors];
    COFIRE_UNROLL for (int64_t v = 0; v < kVectors; ++v) acc[v] = Vec::loadu(sums + j + v * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec share(shares[r]);
      const float* p = weights + r * stride + j;
      COFIRE_UNROLL for (int64_t v = 0; v < kVectors; ++v) {
        acc[v] = at::vec::fmadd(Vec::loadu(p + v * kLanes), share, acc[v]);
      }
    }
    COFIRE_UNROLL for (int64_t v = 0; v < kVectors; ++v) acc[v].store(sums + j + v * kLanes);
  }
  for (; j < width; j += kLanes) {
    const int64_t count = std::min(kLanes, width - j);
    Vec acc = Vec::loadu(sums + j, count);
    for (int64_t r = 0; r < rows; ++r) {
      acc = at::vec::fmadd(Vec::loadu(weights + r * stride + j, count), Vec(shares[r]), acc);
    }
    acc.store(sums + j, static_cast<int>(count));
  }
}

template <typename T>
void attend(const Sizes& s, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
            int64_t window, at::Tensor& output, at::Tensor& lse, at::Tensor& scores) {
  const Cache<T> k(key), v(value);
  const T* q = query.const_data_ptr<T>();
  T* out = output.mutable_data_ptr<T>();
  auto *log_sums = lse.mutable_data_ptr<float>(), *by_key = scores.mutable_data_ptr<float>();
  const int64_t rows = s.rows(), chunks = (rows + kQueries - 1) / kQueries, block = s.block();
  at::Tensor partial =
      chunks == 1 ? scores : at::empty({s.sets(), chunks, s.keys}, at::TensorOptions(at::kFloat));
  auto* part = partial.mutable_data_ptr<float>();
  each_by_one_thread(s.sets() * chunks, [&](int64_t task) {
    const int64_t set = task / chunks, begin = task % chunks * kQueries;
    const int64_t end = std::min(rows, begin + kQueries), most = s.seen(begin, end);
    float* sums = part + task * s.keys;
    std::fill_n(sums, s.keys, 0.0f);
    const int64_t b = set / s.heads, h = set % s.heads;
    const Floats keys = k.of(b, h, most), values = v.of(b, h, most);
    const int64_t room = std::min(block, end - begin);
    const at::Tensor tile = at::empty({room * most}, at::kFloat);
    const at::Tensor product = at::empty({room * s.d}, at::kFloat);
    auto *weights = tile.mutable_data_ptr<float>(), *mixed = product.mutable_data_ptr<float>();
    std::vector<float> shares(room), inverse(room);
    for (int64_t first = begin; first < end; first += block) {
      const int64_t count = std::min(block, end - first), width = s.seen(first, first + count);
      const int64_t from = set * rows + first;
      const Floats queries(q + from * s.d, count, s.d, s.d);
      const at::Tensor w = matrix(weights, count, width, width);
      multiply(w, queries.matrix(0, count, s.d), keys.matrix(0, width, s.d).t());
      bool counts = false;
      for (int64_t r = 0; r < count; ++r) {
        const Sum sum = weigh(weights + r * width, s.seen(first + r), width, s.scale);
        log_sums[from + r] = s.scale * sum.most + std::log(sum.total);
        inverse[r] = 1 / sum.total;
        const bool late = (first + r) % s.queries >= s.queries - window;
        shares[r] = late ? inverse[r] : 0.0f;
        counts |= late;
      }
      if (counts) add_by_key(weights, count, width, width, shares.data(), sums);
      multiply(matrix(mixed, count, s.d, s.d), w, values.matrix(0, width, s.d));
      for (int64_t r = 0; r < count; ++r) {
        const Vec by(inverse[r]);
        for_vectors(s.d, [&](int64_t c, auto n) {
          store_f32(out + (from + r) * s.d + c, load(mixed + r * s.d + c, n) * by, n);
        });
      }
    }
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

template <typename T>
void attend_backward(const Sizes& s, const at::Tensor& grad, const float* grad_lse,
                     const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     at::Tensor& to_query, at::Tensor& to_key, at::Tensor& to_value) {
  const Cache<T> k(key), v(value);
  const T *q = query.const_data_ptr<T>(), *g = grad.const_data_ptr<T>();
  T *dq = to_query.mutable_data_ptr<T>(), *dk = to_key.mutable_data_ptr<T>(),
    *dv = to_value.mutable_data_ptr<T>();
  const int64_t rows = s.rows(), block = std::max(s.block() / 2, kFewest);
  each_by_one_thread(s.sets(), [&](int64_t set) {
    const int64_t b = set / s.heads, h = set % s.heads, size = s.keys * s.d;
    const Floats keys = k.of(b, h, s.keys), values = v.of(b, h, s.keys);
    const at::Tensor tiles = at::empty({2, block * s.keys}, at::kFloat);
    auto *weights = tiles.mutable_data_ptr<float>(), *slopes = weights + block * s.keys;
    at::Tensor sums, product;  // where the gradients have another type
    float *sum_k, *sum_v, *mixed = nullptr;
    if constexpr (std::is_same_v<T, float>) {
      sum_k = dk + set * size, sum_v = dv + set * size;
      std::fill_n(sum_k, size, 0.0f);
      std::fill_n(sum_v, size, 0.0f);
    } else {
      sums = at::zeros({2, size}, at::kFloat);
      product = at::empty({block * s.d}, at::kFloat);
      sum_k = sums.mutable_data_ptr<float>(), sum_v = sum_k + size;
      mixed = product.mutable_data_ptr<float>();
    }
    for (int64_t first = 0; first < rows; first += block) {
      const int64_t count = std::min(block, rows - first), width = s.seen(first, first + count);
      const int64_t from = set * rows + first;
      const Floats queries(q + from * s.d, count, s.d, s.d), grads(g + from * s.d, count, s.d, s.d);
      const at::Tensor w = matrix(weights, count, width, width);
      const at::Tensor slope = matrix(slopes, count, width, width);
      const at::Tensor seen_keys = keys.matrix(0, width, s.d);
      multiply(w, queries.matrix(0, count, s.d), seen_keys.t());
      multiply(slope, grads.matrix(0, count, s.d), values.matrix(0, width, s.d).t());
      for (int64_t r = 0; r < count; ++r) {
        float *p = weights + r * width, *dp = slopes + r * width;
        const Sum sum = weigh(p, s.seen(first + r), width, s.scale);
        const Vec inverse(1 / sum.total);
        Vec along(0.0f);
        for_vectors(width, [&](int64_t j, auto n) {
          const Vec share = load(p + j, n) * inverse;
          share.store(p + j, static_cast<int>(n));
          along = at::vec::fmadd(share, load(dp + j, n), along);
        });
        float less = reduce_add(along);
        if (grad_lse != nullptr) less -= grad_lse[from + r];
        const Vec mean(less), scale(s.scale);
        for_vectors(width, [&](int64_t j, auto n) {
          const Vec d = load(p + j, n) * (load(dp + j, n) - mean) * scale;
          d.store(dp + j, static_cast<int>(n));
        });
      }
      multiply(matrix(sum_v, width, s.d, s.d), w.t(), grads.matrix(0, count, s.d), true);
      multiply(matrix(sum_k, width, s.d, s.d), slope.t(), queries.matrix(0, count, s.d), true);
      if constexpr (std::is_same_v<T, float>) {
        multiply(matrix(dq + from * s.d, count, s.d, s.d), slope, seen_keys);
      } else {
        multiply(matrix(mixed, count, s.d, s.d), slope, seen_keys);
        for_vectors(count * s.d, [&](int64_t i, auto n) {
          store_f32(dq + from * s.d + i, load(mixed + i, n), n);
        });
      }
    }
    if constexpr (!std::is_same_v<T, float>) {
      for_vectors(size, [&](int64_t i, auto n) {
        store_f32(dk + set * size + i, load(sum_k + i, n), n);
        store_f32(dv + set * size + i, load(sum_v + i, n), n);
      });
    }
  });
}

Sizes sizes_of(const char* name, const at::Tensor& query, const at::Tensor& key,
               const at::Tensor& value, bool causal, double scale) {
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.sizes() == key.sizes() &&
                  key.size(0) == query.size(0) && key.size(3) == query.size(3) && key.size(2) > 0 &&
                  key.size(3) > 0 && key.scalar_type() == query.scalar_type() &&
                  value.scalar_type() == query.scalar_type() &&
                  (key.size(1) > 0 ? query.size(1) % key.size(1) == 0 : query.size(1) == 0) &&
                  !(causal && query.size(2) > key.size(2)) && scale > 0,
              name, ": the arguments do not fit each other");
  const int64_t heads = key.size(1), groups = heads > 0 ? query.size(1) / heads : 1;
  return {query.size(0), heads,       groups, query.size(2),
          key.size(2),   key.size(3), causal, static_cast<float>(scale)};
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
  dispatch(q.scalar_type(),
           [&](auto t) { attend<decltype(t)>(s, q, key, value, window, output, lse, scores); });
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
  dispatch(q.scalar_type(), [&](auto t) {
    attend_backward<decltype(t)>(s, g, of_lse.defined() ? of_lse.const_data_ptr<float>() : nullptr,
                                 q, key, value, to_query, to_key, to_value);
  });
  return {to_query, to_key, to_value};
}

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("attention_with_scores", &cofire::kv_fusion::attention_with_scores);
  m.impl("attention_with_scores_backward", &cofire::kv_fusion::attention_with_scores_backward);
}
