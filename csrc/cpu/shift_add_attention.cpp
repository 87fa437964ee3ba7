// SPDX-License-Identifier: Apache-2.0
// binary_linear_attention: the sum of the values by bit of their keys' codes, and for each query
// the sum of the rows that its code selects, both by tables of the sixteen values of four bits
// (the method of four Russians): a row is added once for four bits.
//
// Sums over tokens are taken over chunks of fixed size and merged in order.
#include "shift_add_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

#include "loops.h"
#include "parts.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace shift_add {
namespace {

constexpr int64_t kChunk = 1024;  // tokens
constexpr int64_t kBlock = 4;     // tokens whose depthwise products share their loads
constexpr int kMostVectors = 16;  // of a row
constexpr int kTaps = 9;          // those with loops of their own
constexpr float kOverPi = static_cast<float>(1 / std::numbers::pi);

// Rows of d features in NV vectors, or (0) in as many as it takes.
template <int NV>
struct Width {
  static constexpr int kSpace = NV ? NV : kMostVectors;
  int64_t d, needed;

  explicit Width(int64_t d) : d(d), needed((d + kLanes - 1) / kLanes) {}
  int64_t vectors() const { return NV ? NV : needed; }
  int64_t stride() const { return vectors() * kLanes; }
  template <typename T>
  Vec get(const T* row, int64_t v) const {
    if constexpr (NV > 0) return load_f32(row + v * kLanes);
    return load_f32(row + v * kLanes, std::min(kLanes, d - v * kLanes));
  }
  template <typename T>
  void put(T* row, int64_t v, const Vec& x) const {
    if constexpr (NV > 0) {
      store_f32(row + v * kLanes, x);
    } else {
      store_f32(row + v * kLanes, x, std::min(kLanes, d - v * kLanes));
    }
  }
};

template <typename F>
void for_width(int64_t d, F&& f) {
  if (d == kLanes) {
    f(Width<1>(d));
  } else if (d == 2 * kLanes) {
    f(Width<2>(d));
  } else if (d == 4 * kLanes) {
    f(Width<4>(d));
  } else if (d == 8 * kLanes) {
    f(Width<8>(d));
  } else {
    f(Width<0>(d));
  }
}

// What one thread works with. Rows of tables have the stride of the width.
struct Workspace {
  std::vector<float> buckets, rows;
  std::vector<uint64_t> codes;

  Workspace(int64_t groups, int64_t stride)
      : buckets(2 * groups * 16 * stride), rows(kBlock * stride), codes(kChunk) {}
};

template <typename W>
void widen(const W* codes, int64_t count, int64_t bits, uint64_t* out) {
  const uint64_t mask = mask_of(bits);
  for (int64_t n = 0; n < count; ++n) out[n] = static_cast<uint64_t>(codes[n]) & mask;
}

// sums[i] += the rows of the tokens with bit i set, i < 4 groups. Even and odd tokens have tables
// of their own, so that a store and the load after it seldom meet.
template <typename T, int NV>
void accumulate(const Width<NV>& w, Workspace& ws, const T* rows, int64_t count, int64_t groups,
                float* sums) {
  const int64_t stride = w.stride(), nv = w.vectors(), table = groups * 16 * stride;
  std::fill(ws.buckets.begin(), ws.buckets.end(), 0.0f);
  for (int64_t n = 0; n < count; ++n) {
    Vec row[Width<NV>::kSpace];
    for (int64_t v = 0; v < nv; ++v) row[v] = w.get(rows + n * w.d, v);
    float* bucket = ws.buckets.data() + (n & 1) * table;
    for (uint64_t code = ws.codes[n], g = 0; g < static_cast<uint64_t>(groups); ++g, code >>= 4) {
      float* p = bucket + (g * 16 + (code & 15)) * stride;
      for (int64_t v = 0; v < nv; ++v) (Vec::loadu(p + v * kLanes) + row[v]).store(p + v * kLanes);
    }
  }
  for (int64_t i = 0; i < 4 * groups; ++i) {
    const float* group = ws.buckets.data() + i / 4 * 16 * stride;
    for (int64_t v = 0; v < nv; ++v) {
      Vec sum(0.0f);
      for (int64_t value = 0; value < 16; ++value) {
        if (!(value >> (i & 3) & 1)) continue;
        const float* p = group + value * stride + v * kLanes;
        sum = sum + (Vec::loadu(p) + Vec::loadu(p + table));
      }
      float* p = sums + i * stride + v * kLanes;
      (Vec::loadu(p) + sum).store(p);
    }
  }
}

// The sums of all subsets of each four rows: [groups][16][stride].
void build_tables(const float* sums, int64_t groups, int64_t stride, float* tables) {
  for (int64_t g = 0; g < groups; ++g) {
    float* table = tables + g * 16 * stride;
    std::fill_n(table, stride, 0.0f);
    for (int64_t value = 1; value < 16; ++value) {
      const float* row = sums + (4 * g + __builtin_ctzll(value)) * stride;
      const float* rest = table + (value & (value - 1)) * stride;
      for (int64_t k = 0; k < stride; ++k) table[value * stride + k] = rest[k] + row[k];
    }
  }
}

template <int NV>
inline void gather(const Width<NV>& w, const float* tables, int64_t groups, uint64_t code,
                   Vec* out) {
  const int64_t stride = w.stride(), nv = w.vectors();
  const float* p = tables + (code & 15) * stride;
  for (int64_t v = 0; v < nv; ++v) out[v] = Vec::loadu(p + v * kLanes);
  for (int64_t g = 1; g < groups; ++g) {
    code >>= 4;
    p = tables + (g * 16 + (code & 15)) * stride;
    for (int64_t v = 0; v < nv; ++v) out[v] = out[v] + Vec::loadu(p + v * kLanes);
  }
}

// out[i] = sum over j of taps[j] x[n + i + j - size / 2] for the tokens n + i of a block that there
// are, and zero where there are no taps.
template <typename T, int NV>
void depthwise(const Width<NV>& w, const T* x, int64_t tokens, int64_t n, const float* taps,
               int64_t size, float* out) {
  const int64_t stride = w.stride(), nv = w.vectors(), d = w.d;
  if (size == kTaps && n >= kTaps / 2 && n + kBlock + kTaps / 2 <= tokens) {
    Vec tap[kTaps];
    COFIRE_UNROLL
    for (int j = 0; j < kTaps; ++j) tap[j] = Vec(taps[j]);
    for (int64_t v = 0; v < nv; ++v) {
      Vec acc[kBlock];
      COFIRE_UNROLL
      for (int i = 0; i < kBlock; ++i) acc[i] = Vec(0.0f);
      COFIRE_UNROLL
      for (int r = 0; r < kBlock + kTaps - 1; ++r) {
        const Vec row = w.get(x + (n + r - kTaps / 2) * d, v);
        COFIRE_UNROLL
        for (int i = 0; i < kBlock; ++i) {
          if (r - i >= 0 && r - i < kTaps) acc[i] = at::vec::fmadd(row, tap[r - i], acc[i]);
        }
      }
      COFIRE_UNROLL
      for (int i = 0; i < kBlock; ++i) acc[i].store(out + i * stride + v * kLanes);
    }
    return;
  }
  for (int64_t i = 0; i < kBlock; ++i) {
    for (int64_t v = 0; v < nv; ++v) {
      Vec acc(0.0f);
      for (int64_t j = 0; j < size; ++j) {
        const int64_t at_ = n + i + j - size / 2;
        if (at_ < 0 || at_ >= tokens) continue;
        acc = at::vec::fmadd(w.get(x + at_ * d, v), Vec(taps[j]), acc);
      }
      acc.store(out + i * stride + v * kLanes);
    }
  }
}

// t = V / 2 + the selected rows / pi, and one over its norm.
template <typename T, int NV>
inline float angle(const Width<NV>& w, const float* tables, int64_t groups, uint64_t code,
                   const T* value, float eps, Vec* t) {
  gather(w, tables, groups, code, t);
  Vec sum(0.0f);
  for (int64_t v = 0; v < w.vectors(); ++v) {
    t[v] = at::vec::fmadd(t[v], Vec(kOverPi), w.get(value, v) * Vec(0.5f));
    sum = at::vec::fmadd(t[v], t[v], sum);
  }
  return 1 / std::sqrt(reduce_add(sum) + eps);
}

// The tokens [n, end) of a set.
template <typename T, int NV>
void attend(const Width<NV>& w, Workspace& ws, const float* tables, int64_t groups, const T* value,
            int64_t tokens, int64_t n, int64_t end, const float* taps, int64_t size, float eps,
            T* out) {
  const int64_t first = n;
  for (; n < end; n += kBlock) {
    depthwise(w, value, tokens, n, taps, size, ws.rows.data());
    for (int64_t i = 0; i < std::min(kBlock, end - n); ++i) {
      Vec t[Width<NV>::kSpace];
      const T* row = value + (n + i) * w.d;
      const Vec scale(angle(w, tables, groups, ws.codes[n + i - first], row, eps, t));
      for (int64_t v = 0; v < w.vectors(); ++v) {
        const Vec residual = Vec::loadu(ws.rows.data() + i * w.stride() + v * kLanes);
        w.put(out + (n + i) * w.d, v, at::vec::fmadd(t[v], scale, residual));
      }
    }
  }
}

// out[r][0, columns) = x[r] times w [depth][ld], for up to kBlock rows x; ld is whole vectors.
template <typename S, typename T>
void rows_times(const S* x, int64_t rows, int64_t depth, const float* w, int64_t ld,
                int64_t columns, T* out) {
  float in[kBlock][kMostVectors * kLanes];
  for (int64_t r = 0; r < kBlock; ++r) {
    for (int64_t k = 0; k < depth; ++k) {
      in[r][k] = r < rows ? static_cast<float>(x[r * depth + k]) : 0.0f;
    }
  }
  for (int64_t c = 0; c < columns; c += kLanes) {
    Vec acc[kBlock] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    for (int64_t k = 0; k < depth; ++k) {
      const Vec v = Vec::loadu(w + k * ld + c);
      COFIRE_UNROLL
      for (int r = 0; r < kBlock; ++r) acc[r] = at::vec::fmadd(Vec(in[r][k]), v, acc[r]);
    }
    for (int64_t r = 0; r < rows; ++r) {
      store_f32(out + r * columns + c, acc[r], std::min(kLanes, columns - c));
    }
  }
}

// sums[j] += sum over the tokens [n, end) of g[n] x[n + j - size / 2], all features together.
template <typename T, int NV>
void correlate(const Width<NV>& w, const T* g, const T* x, int64_t tokens, int64_t n, int64_t end,
               int64_t size, double* sums) {
  for (int64_t j = 0; j < size; ++j) {
    const int64_t shift = j - size / 2;
    const int64_t from = std::max(n, -shift), to = std::min(end, tokens - shift);
    Vec sum(0.0f);
    for (int64_t i = from; i < to; ++i) {
      for (int64_t v = 0; v < w.vectors(); ++v) {
        sum = at::vec::fmadd(w.get(g + i * w.d, v), w.get(x + (i + shift) * w.d, v), sum);
      }
    }
    sums[j] += reduce_add(sum);
  }
}

std::vector<float> scaled_transpose(const std::vector<float>& sums, int64_t bits, int64_t stride,
                                    int64_t d, int64_t ld) {
  std::vector<float> out(d * ld);
  for (int64_t i = 0; i < bits; ++i) {
    for (int64_t k = 0; k < d; ++k) out[k * ld + i] = sums[i * stride + k] * kOverPi;
  }
  return out;
}

template <typename T>
struct Gradients {
  T *value, *query, *key;  // query and key may be null
  double* weight;          // [taps]
};

// All gradients of one set.
template <typename T, typename W, int NV>
void set_backward(const Width<NV>& w, const T* g, const W* query, const W* key, const T* value,
                  int64_t tokens, int64_t bits, const float* taps, int64_t size, float eps,
                  const Gradients<T>& out) {
  const int64_t d = w.d, stride = w.stride(), groups = (bits + 3) / 4;
  const int64_t ld = (bits + kLanes - 1) / kLanes * kLanes;
  Workspace ws(groups, stride);
  std::vector<float> sums(4 * groups * stride), grad_sums(4 * groups * stride),
      tables(groups * 16 * stride), to_t(tokens * d);
  const auto for_chunks = [&](const W* codes, auto&& f) {
    for (int64_t n = 0; n < tokens; n += kChunk) {
      const int64_t count = std::min(kChunk, tokens - n);
      widen(codes + n, count, bits, ws.codes.data());
      f(n, count);
    }
  };
  for_chunks(key, [&](int64_t n, int64_t count) {
    accumulate(w, ws, value + n * d, count, groups, sums.data());
  });
  build_tables(sums.data(), groups, stride, tables.data());
  for_chunks(query, [&](int64_t n, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      Vec t[Width<NV>::kSpace];
      const float scale = angle(w, tables.data(), groups, ws.codes[i], value + (n + i) * d, eps, t);
      Vec along(0.0f);
      for (int64_t v = 0; v < w.vectors(); ++v) {
        t[v] = t[v] * Vec(scale);
        along = at::vec::fmadd(t[v], w.get(g + (n + i) * d, v), along);
      }
      const Vec dot(-reduce_add(along));
      for (int64_t v = 0; v < w.vectors(); ++v) {
        const Vec part = at::vec::fmadd(t[v], dot, w.get(g + (n + i) * d, v));
        w.put(to_t.data() + (n + i) * d, v, part * Vec(scale));
      }
    }
    accumulate(w, ws, to_t.data() + n * d, count, groups, grad_sums.data());
  });
  if (out.query != nullptr) {
    const std::vector<float> factor = scaled_transpose(sums, bits, stride, d, ld);
    for (int64_t n = 0; n < tokens; n += kBlock) {
      rows_times(to_t.data() + n * d, std::min(kBlock, tokens - n), d, factor.data(), ld, bits,
                 out.query + n * bits);
    }
  }
  if (out.key != nullptr) {
    const std::vector<float> factor = scaled_transpose(grad_sums, bits, stride, d, ld);
    for (int64_t n = 0; n < tokens; n += kBlock) {
      rows_times(value + n * d, std::min(kBlock, tokens - n), d, factor.data(), ld, bits,
                 out.key + n * bits);
    }
  }
  build_tables(grad_sums.data(), groups, stride, tables.data());
  const std::vector<float> reversed(std::make_reverse_iterator(taps + size),
                                    std::make_reverse_iterator(taps));
  for_chunks(key, [&](int64_t first, int64_t count) {
    for (int64_t n = first; n < first + count; n += kBlock) {
      depthwise(w, g, tokens, n, reversed.data(), size, ws.rows.data());
      for (int64_t i = 0; i < std::min(kBlock, first + count - n); ++i) {
        Vec selected[Width<NV>::kSpace];
        gather(w, tables.data(), groups, ws.codes[n + i - first], selected);
        for (int64_t v = 0; v < w.vectors(); ++v) {
          const Vec own = at::vec::fmadd(w.get(to_t.data() + (n + i) * d, v), Vec(0.5f),
                                         Vec::loadu(ws.rows.data() + i * stride + v * kLanes));
          w.put(out.value + (n + i) * d, v, at::vec::fmadd(selected[v], Vec(kOverPi), own));
        }
      }
    }
  });
  for (int64_t n = 0; n < tokens; n += 64) {
    correlate(w, g, value, tokens, n, std::min(n + 64, tokens), size, out.weight);
  }
}

using Optional = std::optional<at::Tensor>;

bool fits(const at::Tensor& value) {
  return covered(value) && value.dim() == 4 && value.size(3) >= 1 &&
         value.size(3) <= kMostVectors * kLanes;
}

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
           const Optional& weight, int64_t bits) {
  TORCH_CHECK(bits >= 1 && bits <= 64 && query.scalar_type() == word_of(bits) &&
                  key.scalar_type() == word_of(bits) &&
                  query.sizes() == value.sizes().slice(0, 3) && key.sizes() == query.sizes() &&
                  (!weight || (weight->dim() == 2 && weight->size(0) == value.size(1) &&
                               weight->size(1) % 2 == 1)),
              "binary_linear_attention: codes or weight do not fit value");
}

}  // namespace

at::Tensor binary_linear_attention(const at::Tensor& query, const at::Tensor& key,
                                   const at::Tensor& value, const Optional& weight,
                                   const Optional& query_link, const Optional& key_link,
                                   int64_t bits, double eps) {
  if (!fits(value) || (weight && is_double(*weight))) {
    return reference("cofire::binary_linear_attention", &binary_linear_attention, query, key, value,
                     weight, query_link, key_link, bits, eps);
  }
  check(query, key, value, weight, bits);
  const at::Tensor q = query.contiguous(), k = key.contiguous(), x = value.contiguous();
  const at::Tensor taps = weight ? weight->to(at::kFloat).contiguous()
                                 : at::zeros({x.size(1), 0}, x.options().dtype(at::kFloat));
  const int64_t heads = x.size(1), sets = x.size(0) * heads, tokens = x.size(2), d = x.size(3),
                chunks = (tokens + kChunk - 1) / kChunk, groups = (bits + 3) / 4,
                size = taps.size(1);
  at::Tensor result = at::empty(value.sizes(), value.options());
  const float* tap = taps.const_data_ptr<float>();
  const auto small = static_cast<float>(eps);
  const auto run = [&](const auto& w, auto t, auto c) {
    using T = decltype(t);
    using W = decltype(c);
    const T* data = x.const_data_ptr<T>();
    T* out = result.data_ptr<T>();
    const int64_t stride = w.stride(), part = 4 * groups * stride;
    const auto sum = [&](int64_t set, int64_t chunk, Workspace& ws, float* sums) {
      const int64_t first = set * tokens + chunk * kChunk,
                    count = std::min(kChunk, tokens - chunk * kChunk);
      widen(k.const_data_ptr<W>() + first, count, bits, ws.codes.data());
      accumulate(w, ws, data + first * d, count, groups, sums);
    };
    const auto select = [&](int64_t set, int64_t chunk, Workspace& ws, const float* tables) {
      const int64_t n = chunk * kChunk, end = std::min(n + kChunk, tokens);
      widen(q.const_data_ptr<W>() + set * tokens + n, end - n, bits, ws.codes.data());
      attend(w, ws, tables, groups, data + set * tokens * d, tokens, n, end,
             tap + set % heads * size, size, small, out + set * tokens * d);
    };
    // The sums of chunks are merged in one way, whoever takes them.
    const auto merge = [&](const float* parts, std::vector<float>& sums, float* tables) {
      sums.assign(part, 0.0f);
      for (int64_t i = 0; i < chunks * part; ++i) sums[i % part] += parts[i];
      build_tables(sums.data(), groups, stride, tables);
    };
    if (sets >= 2 * at::get_num_threads() || chunks <= 1) {  // while the rows are in a cache
      in_turns(sets, [&](int64_t set) {
        Workspace ws(groups, stride);
        std::vector<float> parts(chunks * part), sums, tables(groups * 16 * stride);
        for (int64_t i = 0; i < chunks; ++i) sum(set, i, ws, parts.data() + i * part);
        merge(parts.data(), sums, tables.data());
        for (int64_t i = 0; i < chunks; ++i) select(set, i, ws, tables.data());
      });
      return;
    }
    std::vector<float> parts(sets * chunks * part), tables(sets * groups * 16 * stride), sums;
    in_turns(sets * chunks, [&](int64_t i) {
      Workspace ws(groups, stride);
      sum(i / chunks, i % chunks, ws, parts.data() + i * part);
    });
    for (int64_t set = 0; set < sets; ++set) {
      merge(parts.data() + set * chunks * part, sums, tables.data() + set * groups * 16 * stride);
    }
    in_turns(sets * chunks, [&](int64_t i) {
      Workspace ws(groups, stride);
      select(i / chunks, i % chunks, ws, tables.data() + i / chunks * groups * 16 * stride);
    });
  };
  if (tokens > 0) {
    dispatch(x.scalar_type(), [&](auto t) {
      for_word(bits, [&](auto c) { for_width(d, [&](const auto& w) { run(w, t, c); }); });
    });
  }
  return result;
}

using AttentionGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

AttentionGradients binary_linear_attention_backward(const at::Tensor& grad, const at::Tensor& query,
                                                    const at::Tensor& key, const at::Tensor& value,
                                                    const Optional& weight,
                                                    const Optional& query_link,
                                                    const Optional& key_link, int64_t bits,
                                                    double eps) {
  if (!fits(value) || is_double(grad) || (weight && is_double(*weight))) {
    return reference("cofire::binary_linear_attention_backward", &binary_linear_attention_backward,
                     grad, query, key, value, weight, query_link, key_link, bits, eps);
  }
  check(query, key, value, weight, bits);
  TORCH_CHECK(grad.sizes() == value.sizes(),
              "binary_linear_attention_backward: grad must have the shape of value");
  const at::Tensor g = grad.to(value.scalar_type()).contiguous(), q = query.contiguous(),
                   k = key.contiguous(), x = value.contiguous();
  const at::Tensor taps = weight ? weight->to(at::kFloat).contiguous()
                                 : at::zeros({x.size(1), 0}, x.options().dtype(at::kFloat));
  const int64_t heads = x.size(1), sets = x.size(0) * heads, tokens = x.size(2), d = x.size(3),
                size = taps.size(1);
  auto shape = x.sizes().vec();
  shape.back() = bits;
  const auto link_grad = [&](bool wanted) {
    return wanted ? at::empty(shape, value.options()) : at::empty({0}, value.options());
  };
  at::Tensor to_value = at::empty(value.sizes(), value.options());
  at::Tensor to_query = link_grad(query_link.has_value()), to_key = link_grad(key_link.has_value());
  std::vector<double> to_taps(sets * size);
  const float* tap = taps.const_data_ptr<float>();
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    for_word(bits, [&](auto c) {
      using W = decltype(c);
      for_width(d, [&](const auto& w) {
        in_turns(sets, [&](int64_t set) {
          const int64_t first = set * tokens;
          const Gradients<T> out = {
              to_value.data_ptr<T>() + first * d,
              query_link ? to_query.data_ptr<T>() + first * bits : nullptr,
              key_link ? to_key.data_ptr<T>() + first * bits : nullptr,
              to_taps.data() + set * size,
          };
          set_backward(w, g.const_data_ptr<T>() + first * d, q.const_data_ptr<W>() + first,
                       k.const_data_ptr<W>() + first, x.const_data_ptr<T>() + first * d, tokens,
                       bits, tap + set % heads * size, size, static_cast<float>(eps), out);
        });
      });
    });
  });
  if (!weight) return {to_value, at::empty({0}, value.options()), to_query, to_key};
  at::Tensor sum = at::zeros({heads, size}, x.options().dtype(at::kDouble));
  double* total = sum.data_ptr<double>();
  for (int64_t i = 0; i < sets * size; ++i) total[i % (heads * size)] += to_taps[i];
  return {to_value, sum.to(weight->scalar_type()), to_query, to_key};
}

at::Tensor hamming_similarity(const at::Tensor& query, const at::Tensor& key, int64_t bits,
                              std::string_view kind) {
  TORCH_CHECK(bits >= 1 && bits <= 64 && query.scalar_type() == word_of(bits) &&
                  key.scalar_type() == word_of(bits) && query.dim() >= 1 &&
                  query.dim() == key.dim() &&
                  query.sizes().slice(0, query.dim() - 1) == key.sizes().slice(0, key.dim() - 1),
              "hamming_similarity: query and key do not fit");
  const at::Tensor q = query.contiguous(), k = key.contiguous();
  const int64_t rows = q.numel(), from = q.size(-1), columns = k.size(-1);
  auto shape = q.sizes().vec();
  shape.push_back(columns);
  at::Tensor result = at::empty(shape, q.options().dtype(at::kInt));
  int32_t* out = result.data_ptr<int32_t>();
  const bool common = kind == "binary";
  const uint64_t mask = mask_of(bits);
  for_word(bits, [&](auto c) {
    using W = decltype(c);
    using U = std::conditional_t<sizeof(W) == 8, uint64_t, uint32_t>;
    const W *codes = q.const_data_ptr<W>(), *others = k.const_data_ptr<W>();
    in_parts(columns == 0 ? 0 : rows, 1 + 16384 / (columns + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const W* row = others + r / from * columns;
        const auto code = static_cast<U>(codes[r]) & static_cast<U>(mask);
        int32_t* p = out + r * columns;
        if (common) {
          for (int64_t j = 0; j < columns; ++j) p[j] = std::popcount(code & static_cast<U>(row[j]));
        } else {
          for (int64_t j = 0; j < columns; ++j) {
            const U differ = (code ^ static_cast<U>(row[j])) & static_cast<U>(mask);
            p[j] = static_cast<int32_t>(bits) - 2 * std::popcount(differ);
          }
        }
      }
    });
  });
  return result;
}

}  // namespace shift_add
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("binary_linear_attention", &cofire::shift_add::binary_linear_attention);
  m.impl("hamming_similarity", &cofire::shift_add::hamming_similarity);
  m.impl("binary_linear_attention_backward", &cofire::shift_add::binary_linear_attention_backward);
}
