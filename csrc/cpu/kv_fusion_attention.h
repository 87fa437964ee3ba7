// SPDX-License-Identifier: Apache-2.0
// What kinds of attention share: blocks of queries go over all keys that they see, and their
// weights stay in the cache between two products, by the library or on AMX. A kind of attention
// says what becomes of a block's products: see attend and attend_backward.
#pragma once

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "exponential.h"
#include "kv_fusion.h"
#include "kv_fusion_few.h"
#include "kv_fusion_tiles.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {

constexpr int64_t kTile = 64 << 10;           // weights of a block: a quarter of a megabyte
constexpr int64_t kFewest = 16, kMost = 128;  // queries of a block
constexpr int64_t kQueries = 256;             // of a task of the forward pass
constexpr int64_t kKeys = 1024;               // of a task, where there are few queries

struct Sizes {
  int64_t batch, heads, groups, queries, keys, d;  // `groups` heads of queries for each of keys
  bool causal;
  float scale;
  bool hidden_too = false;  // keys that a row does not see have weights even so

  int64_t sets() const { return batch * heads; }
  int64_t rows() const { return groups * queries; }  // of a set
  int64_t chunks() const { return (rows() + kQueries - 1) / kQueries; }
  int64_t block() const { return std::clamp(kTile / keys, kFewest, kMost); }
  int64_t own(int64_t row) const { return keys - queries + row % queries; }  // its token among keys
  // How many keys a row sees; and for how many the rows [first, last) have weights.
  int64_t seen(int64_t row) const { return causal ? own(row) + 1 : keys; }
  int64_t width(int64_t first, int64_t last) const {
    return !hidden_too && first / queries == (last - 1) / queries ? seen(last - 1) : keys;
  }
};

inline Sizes sizes_of(const char* name, const at::Tensor& query, const at::Tensor& key,
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

// Keys or values, a part of a cache perhaps.
template <typename T>
struct Cache {
  at::Tensor tensor;
  explicit Cache(const at::Tensor& x) : tensor(x.stride(3) == 1 ? x : x.contiguous()) {}
  const T* at(int64_t b, int64_t h) const {
    return tensor.const_data_ptr<T>() + b * tensor.stride(0) + h * tensor.stride(1);
  }
  int64_t row() const { return tensor.stride(2); }
  Floats of(int64_t b, int64_t h, int64_t rows) const {
    return Floats(at(b, h), rows, tensor.size(3), row());
  }
};

// The largest of some values; NaN if one is.
inline float largest_of(const float* x, int64_t count) {
  Vec most(-std::numeric_limits<float>::infinity()), other = most;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    most = at::vec::maximum(most, Vec::loadu(x + i));
    other = at::vec::maximum(other, Vec::loadu(x + i + kLanes));
  }
  for (; i < count; i += kLanes) {
    const int64_t n = std::min(kLanes, count - i);
    most = at::vec::maximum(most, Vec::set(most, Vec::loadu(x + i, n), n));
  }
  return reduce_max(at::vec::maximum(most, other));
}

// Rows [first, first + count) of a set, row by row their `width` products with keys; rows are
// `stride` apart.
struct Block {
  int64_t set, task, first, count, width, stride;
};

// `attend` for one query of each head: parts of a set's keys, whose sums are added in their order.
// Where there are sets enough, a task is all of one: threads then meet once.
template <typename T, typename F>
void attend_few(const Sizes& s, const at::Tensor& query, const at::Tensor& key,
                const at::Tensor& value, at::Tensor& output, F&& weigh) {
  constexpr int64_t kEnough = 8;
  const Cache<T> k(key), v(value);
  const int64_t rows = s.rows(), sets = s.sets(), size = rows * s.d;
  const int64_t width = s.width(0, rows), parts = (width + kKeys - 1) / kKeys;
  const Floats queries(query.const_data_ptr<T>(), sets * rows, s.d, s.d);
  std::vector<float> weights(sets * rows * width), sums(sets * parts * size), factors(sets * rows);
  const auto multiply_part = [&](int64_t task) {
    const int64_t set = task / parts, first = task % parts * kKeys;
    multiply_few(queries.data + set * size, rows,
                 k.at(set / s.heads, set % s.heads) + first * k.row(),
                 std::min(kKeys, width - first), k.row(), s.d,
                 weights.data() + set * rows * width + first, width);
  };
  const auto weigh_set = [&](int64_t set) {
    weigh(Block{set, set, 0, rows, width, width}, weights.data() + set * rows * width,
          factors.data() + set * rows);
  };
  const auto mix_part = [&](int64_t task) {
    const int64_t set = task / parts, first = task % parts * kKeys;
    mix_few(weights.data() + set * rows * width + first, rows, width,
            v.at(set / s.heads, set % s.heads) + first * v.row(), std::min(kKeys, width - first),
            v.row(), s.d, sums.data() + task * size);
  };
  if (sets >= kEnough) {
    in_turns(sets, [&](int64_t set) {
      for (int64_t i = 0; i < parts; ++i) multiply_part(set * parts + i);
      weigh_set(set);
      for (int64_t i = 0; i < parts; ++i) mix_part(set * parts + i);
    });
  } else {
    in_turns(sets * parts, multiply_part);
    in_turns(sets, weigh_set);
    in_turns(sets * parts, mix_part);
  }
  T* out = output.mutable_data_ptr<T>();
  for (int64_t r = 0; r < sets * rows; ++r) {
    const float* from = sums.data() + r / rows * parts * size + r % rows * s.d;
    const Vec by(factors[r]);
    for_vectors(s.d, [&](int64_t c, auto n) {
      Vec sum = load(from + c, n);
      for (int64_t i = 1; i < parts; ++i) sum = sum + load(from + i * size + c, n);
      store_f32(out + r * s.d + c, sum * by, n);
    });
  }
}

// Whether a pass over keys and values is enough: for one query of each head, of a few. (Several
// queries, as a piece of a prompt has them, are summed up as all of it is.)
inline bool are_few(const Sizes& s) { return s.queries == 1 && s.groups <= kFew; }

// Whether the products are made on the tiles of AMX.
template <typename T>
bool on_tiles(const Sizes& s) {
  return std::is_same_v<T, at::BFloat16> && s.d % kSquare == 0 && amx::found();
}

// How `attend` would multiply, or its gradient.
inline std::string way_of(const Sizes& s, at::ScalarType type, bool backward) {
  if (!backward && are_few(s)) return "vector by vector, for one query of each head";
  return type == at::kBFloat16 && on_tiles<at::BFloat16>(s) ? "products of bf16 on AMX"
                                                            : "products of the library in fp32";
}

#if defined(COFIRE_AMX)

template <typename T>
const uint16_t* bits_of(const T* x) {
  return reinterpret_cast<const uint16_t*>(x);
}

// `attend` on tiles.
template <typename T, typename F>
void attend_on_tiles(const Sizes& s, const at::Tensor& query, const at::Tensor& key,
                     const at::Tensor& value, at::Tensor& output, F&& weigh) {
  constexpr int64_t kBlock = 2 * kSquare;
  const Cache<T> k(key), v(value);
  const uint16_t* q = bits_of(query.const_data_ptr<T>());
  T* out = output.mutable_data_ptr<T>();
  const int64_t rows = s.rows(), chunks = s.chunks(), d = s.d;
  each_by_one_thread(s.sets() * chunks, [&](int64_t task) {
    const int64_t set = task / chunks, begin = task % chunks * kQueries;
    const int64_t end = std::min(rows, begin + kQueries), most = s.width(begin, end);
    const int64_t b = set / s.heads, h = set % s.heads, room = squares(most);
    // Rows that are a power of two apart would drive each other out of the cache.
    const int64_t line = room + 16, wide = room + kSquare;
    const Room<uint32_t> keys(room * d / 2), values(room / 2 * d);
    const Room<float> weights(kBlock * line), mixed(kBlock * d);
    const Room<uint16_t> halves(kBlock * wide), copied(kBlock * d);
    pack_features(bits_of(k.at(b, h)), most, k.row(), d, room, keys.data());
    pack_pairs(bits_of(v.at(b, h)), most, d, v.row(), kNeighbours, room / 2, values.data());
    amx::Registers registers;
    registers.square();
    float factors[kBlock];
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first), width = s.width(first, first + count);
      const int64_t from = set * rows + first, whole = squares(count), columns = squares(width);
      const WholeRows queries(q + from * d, count, d, copied.data());
      row_products(queries.data, whole, d, keys.data(), columns, weights.data(), line);
      weigh(Block{set, task, first, count, width, line}, weights.data(), factors);
      halve(weights.data(), count, width, line, whole, columns, halves.data(), wide);
      mix_rows(halves.data(), whole, wide, columns, values.data(), room / 2, d, mixed.data());
      for (int64_t r = 0; r < count; ++r) {
        const Vec by(factors[r]);
        for_vectors(d, [&](int64_t c, auto n) {
          store_f32(out + (from + r) * d + c, load(mixed.data() + r * d + c, n) * by, n);
        });
      }
    }
  });
}

// `attend_backward` on tiles: the weights and slopes of some blocks are kept, in bf16, until what
// they add to the gradients of keys and values is worth reading those.
template <typename T, typename F>
void attend_backward_on_tiles(const Sizes& s, const at::Tensor& grad, const at::Tensor& query,
                              const at::Tensor& key, const at::Tensor& value, at::Tensor& to_query,
                              at::Tensor& to_key, at::Tensor& to_value, F&& slopes_of) {
  constexpr int64_t kBlock = kSquare, kChunk = 4 * kBlock;
  const Cache<T> k(key), v(value);
  const uint16_t *q = bits_of(query.const_data_ptr<T>()), *g = bits_of(grad.const_data_ptr<T>());
  T *dq = to_query.mutable_data_ptr<T>(), *dk = to_key.mutable_data_ptr<T>(),
    *dv = to_value.mutable_data_ptr<T>();
  const int64_t rows = s.rows(), d = s.d, room = squares(s.keys);
  each_by_one_thread(s.sets(), [&](int64_t set) {
    const int64_t b = set / s.heads, h = set % s.heads, size = s.keys * d;
    const int64_t line = room + 16, wide = room + kSquare;
    const Room<uint32_t> keys(room * d / 2), values(room * d / 2), pairs(room / 2 * d);
    const Room<uint32_t> of_queries(kChunk / 2 * d), of_grads(kChunk / 2 * d);
    const Room<float> weights(kBlock * line), slopes(kBlock * line), mixed(kBlock * d);
    const Room<float> sum_k(room * d), sum_v(room * d);
    const Room<uint16_t> halves(kBlock * wide), copied(kBlock * d), copied_grads(kBlock * d);
    const Room<uint16_t> kept(kChunk * room), kept_slopes(kChunk * room);
    pack_features(bits_of(k.at(b, h)), s.keys, k.row(), d, room, keys.data());
    pack_features(bits_of(v.at(b, h)), s.keys, v.row(), d, room, values.data());
    pack_pairs(bits_of(k.at(b, h)), s.keys, d, k.row(), kNeighbours, room / 2, pairs.data());
    for (const Room<float>* sum : {&sum_k, &sum_v}) std::fill_n(sum->data(), room * d, 0.0f);
    amx::Registers registers;
    registers.square();
    for (int64_t begin = 0; begin < rows; begin += kChunk) {
      const int64_t end = std::min(rows, begin + kChunk), blocks = squares(end - begin) / kSquare;
      const int64_t seen = squares(s.width(begin, end));
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = begin + i * kBlock, count = std::min(kBlock, end - first);
        const int64_t width = s.width(first, first + count), columns = squares(width);
        const int64_t from = set * rows + first;
        const WholeRows queries(q + from * d, count, d, copied.data());
        const WholeRows grads(g + from * d, count, d, copied_grads.data());
        row_products(queries.data, kBlock, d, keys.data(), columns, weights.data(), line);
        row_products(grads.data, kBlock, d, values.data(), columns, slopes.data(), line);
        slopes_of(Block{set, set, first, count, width, line}, weights.data(), slopes.data());
        halve(slopes.data(), count, width, line, kBlock, columns, halves.data(), wide);
        mix_rows(halves.data(), kBlock, wide, columns, pairs.data(), room / 2, d, mixed.data());
        for_vectors(count * d, [&](int64_t c, auto n) {
          store_f32(dq + from * d + c, load(mixed.data() + c, n), n);
        });
        for (int64_t c = 0; c < seen; c += amx::kRows) {
          const int64_t to = (c / amx::kRows * blocks + i) * kTileHalves;
          transposed_square(weights.data() + c, count, width - c, line, kNeighbours,
                            kept.data() + to);
          transposed_square(slopes.data() + c, count, width - c, line, kNeighbours,
                            kept_slopes.data() + to);
        }
      }
      const int64_t whole = blocks * kSquare, at = (set * rows + begin) * d;
      pack_pairs(q + at, end - begin, d, d, kNeighbours, whole / 2, of_queries.data());
      pack_pairs(g + at, end - begin, d, d, kNeighbours, whole / 2, of_grads.data());
      add_by_keys(kept.data(), seen, whole, of_grads.data(), d, sum_v.data());
      add_by_keys(kept_slopes.data(), seen, whole, of_queries.data(), d, sum_k.data());
    }
    for_vectors(size, [&](int64_t i, auto n) {
      store_f32(dk + set * size + i, load(sum_k.data() + i, n), n);
      store_f32(dv + set * size + i, load(sum_v.data() + i, n), n);
    });
  });
}

#endif

// The sum of values by weights. weigh(block, products, factors) makes weights of products, in
// place, and gives each row a factor for what it sums up to. Tasks are chunks of a set's rows.
template <typename T, typename F>
void attend(const Sizes& s, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
            at::Tensor& output, F&& weigh) {
  if (are_few(s)) {
    return attend_few<T>(s, query, key, value, output, weigh);
  }
#if defined(COFIRE_AMX)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    if (on_tiles<T>(s)) return attend_on_tiles<T>(s, query, key, value, output, weigh);
  }
#endif
  const Cache<T> k(key), v(value);
  const T* q = query.const_data_ptr<T>();
  T* out = output.mutable_data_ptr<T>();
  const int64_t rows = s.rows(), chunks = s.chunks(), block = s.block();
  each_by_one_thread(s.sets() * chunks, [&](int64_t task) {
    const int64_t set = task / chunks, begin = task % chunks * kQueries;
    const int64_t end = std::min(rows, begin + kQueries), most = s.width(begin, end);
    const int64_t b = set / s.heads, h = set % s.heads;
    const Floats keys = k.of(b, h, most), values = v.of(b, h, most);
    const int64_t room = std::min(block, end - begin);
    const at::Tensor tile = at::empty({room * most}, at::kFloat);
    const at::Tensor product = at::empty({room * s.d}, at::kFloat);
    auto *weights = tile.mutable_data_ptr<float>(), *mixed = product.mutable_data_ptr<float>();
    std::vector<float> factors(room);
    for (int64_t first = begin; first < end; first += block) {
      const int64_t count = std::min(block, end - first), width = s.width(first, first + count);
      const int64_t from = set * rows + first;
      const Floats queries(q + from * s.d, count, s.d, s.d);
      const at::Tensor w = matrix(weights, count, width, width);
      library_product(w, queries.matrix(0, count, s.d), keys.matrix(0, width, s.d).t());
      weigh(Block{set, task, first, count, width, width}, weights, factors.data());
      library_product(matrix(mixed, count, s.d, s.d), w, values.matrix(0, width, s.d));
      for (int64_t r = 0; r < count; ++r) {
        const Vec by(factors[r]);
        for_vectors(s.d, [&](int64_t c, auto n) {
          store_f32(out + (from + r) * s.d + c, load(mixed + r * s.d + c, n) * by, n);
        });
      }
    }
  });
}

// Its gradient. slopes_of(block, weights, slopes) gets the products of queries and keys, and those
// of gradients and values; it leaves the weights, and the gradient of the former products.
template <typename T, typename F>
void attend_backward(const Sizes& s, const at::Tensor& grad, const at::Tensor& query,
                     const at::Tensor& key, const at::Tensor& value, at::Tensor& to_query,
                     at::Tensor& to_key, at::Tensor& to_value, F&& slopes_of) {
#if defined(COFIRE_AMX)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    if (on_tiles<T>(s)) {
      return attend_backward_on_tiles<T>(s, grad, query, key, value, to_query, to_key, to_value,
                                         slopes_of);
    }
  }
#endif
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
      const int64_t count = std::min(block, rows - first), width = s.width(first, first + count);
      const int64_t from = set * rows + first;
      const Floats queries(q + from * s.d, count, s.d, s.d), grads(g + from * s.d, count, s.d, s.d);
      const at::Tensor w = matrix(weights, count, width, width);
      const at::Tensor slope = matrix(slopes, count, width, width);
      const at::Tensor seen_keys = keys.matrix(0, width, s.d);
      library_product(w, queries.matrix(0, count, s.d), seen_keys.t());
      library_product(slope, grads.matrix(0, count, s.d), values.matrix(0, width, s.d).t());
      slopes_of(Block{set, set, first, count, width, width}, weights, slopes);
      library_product(matrix(sum_v, width, s.d, s.d), w.t(), grads.matrix(0, count, s.d), true);
      library_product(matrix(sum_k, width, s.d, s.d), slope.t(), queries.matrix(0, count, s.d),
                      true);
      if constexpr (std::is_same_v<T, float>) {
        library_product(matrix(dq + from * s.d, count, s.d, s.d), slope, seen_keys);
      } else {
        library_product(matrix(mixed, count, s.d, s.d), slope, seen_keys);
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

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire
