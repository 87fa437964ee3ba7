// SPDX-License-Identifier: Apache-2.0
// kv_select and kv_gather_: which tokens of a cache stay, and the copies.
#include <ATen/ops/empty.h>

#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "pages.h"
#include "parts.h"
#include "selection_search.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {
namespace {

// Keys of the order of n scores, in whole vectors; returns how many are NaN.
template <typename T>
int64_t keys_of_row(const T* scores, int64_t n, int32_t* out) {
  Keys nan(0);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec s = load_f32(scores + i, std::min(kLanes, n - i));
    nan = nan + at::vec::cast<int32_t>(s != s);
    keys_of(s).store(out + i);
  }
  pad_keys(out, n);
  return true_lanes(nan);
}

// Whether a key is on this side of the cut. Ties are used up in order.
inline bool takes(Cut& cut, int32_t key) {
  const bool equal = key == cut.key;
  const bool taken = key > cut.key || (equal && cut.ties > 0);
  cut.ties -= equal;
  return taken;
}

// The arrays of one row, with room for one more entry or a vector.
struct Row {
  std::vector<int32_t> keys, scratch, rest_keys, heavy, rest, pick;
  explicit Row(int64_t n)
      : keys(whole_vectors(n) + kLanes),
        scratch(keys.size()),
        rest_keys(keys.size()),
        heavy(n + 1),
        rest(n + 1),
        pick(n + 1) {}
};

template <typename T>
int64_t select_row(const T* scores, int64_t n, int64_t heavy, int64_t merged, int64_t local,
                   Row& row, int32_t* heavy_index, int32_t* rest_index, int32_t* pick) {
  const int64_t nan = keys_of_row(scores, n, row.keys.data());
  if (nan > 0) return nan;
  const int64_t free = n - local;
  std::vector<int32_t>& keys = row.keys;
  int64_t stays = 0, others = 0;
  pad_keys(keys.data(), free);  // the last ones stay in any case
  Cut cut = cut_of(keys.data(), free, heavy - local, row.scratch.data());
  for (int64_t i = 0; i < free; ++i) {  // no branch: what is written too much is overwritten
    const int32_t key = keys[i];
    const bool taken = takes(cut, key);
    row.heavy[stays] = row.rest[others] = static_cast<int32_t>(i);
    row.rest_keys[others] = key;
    stays += taken;
    others += !taken;
  }
  for (int64_t i = free; i < n; ++i) row.heavy[stays++] = static_cast<int32_t>(i);
  pad_keys(row.rest_keys.data(), others);
  cut = cut_of(row.rest_keys.data(), others, merged, row.scratch.data());
  int64_t picked = 0;
  for (int64_t i = 0; i < others; ++i) {
    row.pick[picked] = static_cast<int32_t>(i);
    picked += takes(cut, row.rest_keys[i]);
  }
  std::copy_n(row.heavy.begin(), heavy, heavy_index);
  std::copy_n(row.rest.begin(), others, rest_index);
  std::copy_n(row.pick.begin(), merged, pick);
  return 0;
}

// A cache whose rows are contiguous.
struct Cache {
  at::Tensor tensor;
  char* data;
  int64_t batch, head, row;  // strides in bytes

  Cache(const at::Tensor& x, bool written)
      : tensor(x.stride(3) == 1 || x.size(3) <= 1 ? x : x.contiguous()),
        data(static_cast<char*>(written ? tensor.mutable_data_ptr()
                                        : const_cast<void*>(tensor.const_data_ptr()))),
        batch(tensor.stride(0) * x.element_size()),
        head(tensor.stride(1) * x.element_size()),
        row(tensor.stride(2) * x.element_size()) {}
  char* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> kv_select(const at::Tensor& scores, int64_t heavy,
                                                         int64_t merged, int64_t local) {
  if (!covered(scores)) {
    return reference("cofire::kv_select", &kv_select, scores, heavy, merged, local);
  }
  TORCH_CHECK(scores.dim() == 3 && 0 <= local && local <= heavy && heavy <= scores.size(2) &&
                  0 <= merged && merged <= scores.size(2) - heavy,
              "kv_select: numbers do not fit scores");
  const at::Tensor s = scores.contiguous();
  const int64_t n = s.size(2), rows = s.size(0) * s.size(1);
  const auto empty = [&](int64_t count) {
    return at::empty({s.size(0), s.size(1), count}, s.options().dtype(at::kInt));
  };
  at::Tensor kept = empty(heavy), rest = empty(n - heavy), pick = empty(merged);
  auto *h = kept.data_ptr<int32_t>(), *r = rest.data_ptr<int32_t>(), *p = pick.data_ptr<int32_t>();
  std::atomic<int64_t> nan{0};
  dispatch(s.scalar_type(), [&](auto t) {
    const auto* from = s.const_data_ptr<decltype(t)>();
    in_parts(rows, grain_of(8 * n), [&](int64_t begin, int64_t end) {
      Row row(n);
      for (int64_t i = begin; i < end; ++i) {
        nan += select_row(from + i * n, n, heavy, merged, local, row, h + i * heavy,
                          r + i * (n - heavy), p + i * merged);
      }
    });
  });
  TORCH_CHECK_VALUE(nan == 0, "kv_select: scores must not be NaN, got ", nan.load(), " NaN among ",
                    s.numel(), " scores");
  return {kept, rest, pick};
}

at::Tensor kv_gather_(at::Tensor& heavy_key, at::Tensor& heavy_value, const at::Tensor& key,
                      const at::Tensor& value, const at::Tensor& heavy_index,
                      const at::Tensor& rest_index, int64_t padding) {
  if (!covered(key)) {
    return reference("cofire::kv_gather_", &kv_gather_, heavy_key, heavy_value, key, value,
                     heavy_index, rest_index, padding);
  }
  TORCH_CHECK(key.dim() == 4 && value.sizes() == key.sizes() &&
                  value.scalar_type() == key.scalar_type() &&
                  heavy_key.scalar_type() == key.scalar_type() &&
                  heavy_value.scalar_type() == key.scalar_type() && heavy_key.dim() == 4 &&
                  heavy_value.dim() == 4 && heavy_index.dim() == 3 && rest_index.dim() == 3 &&
                  heavy_index.scalar_type() == at::kInt && rest_index.scalar_type() == at::kInt &&
                  padding >= 0,
              "kv_gather_: the arguments do not fit each other");
  const int64_t batch = key.size(0), heads = key.size(1), tokens = key.size(2), d = key.size(3);
  const int64_t heavy = heavy_index.size(2), rest = rest_index.size(2);
  for (const at::Tensor* x : {&heavy_key, &heavy_value}) {
    TORCH_CHECK(
        x->size(0) == batch && x->size(1) == heads && x->size(2) >= heavy && x->size(3) == d,
        "kv_gather_: no room for the heavy hitters");
  }
  for (const at::Tensor* x : {&heavy_index, &rest_index}) {
    TORCH_CHECK(x->size(0) == batch && x->size(1) == heads, "kv_gather_: an index per head");
  }
  const int64_t rows = rest + 2 * padding, bytes = d * key.element_size();
  at::Tensor out = empty_in_large_pages({batch, heads, rows, 2 * d}, key.options());
  if (batch * heads == 0 || d == 0) return out;
  const at::Tensor hi = heavy_index.contiguous(), ri = rest_index.contiguous();
  const auto *h = hi.const_data_ptr<int32_t>(), *r = ri.const_data_ptr<int32_t>();
  const Cache k(key, false), v(value, false), hk(heavy_key, true), hv(heavy_value, true);
  auto* to = static_cast<char*>(out.data_ptr());
  std::atomic<bool> outside{false};
  const auto valid = [&](int64_t i) {
    if (i >= 0 && i < tokens) return true;
    outside = true;
    return false;
  };
  // Items: the rows of all heads, the padded rest after the heavy ones.
  const int64_t each = heavy + rows;
  in_parts(batch * heads * each, grain_of(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t set = at / each, b = set / heads, c = set % heads, last = (set + 1) * each;
      const char *keys = k.at(b, c), *values = v.at(b, c);
      char *new_keys = hk.at(b, c), *new_values = hv.at(b, c);
      for (; at < std::min(end, last); ++at) {
        const int64_t i = at - set * each;
        if (i < heavy) {
          const int64_t from = h[set * heavy + i];
          if (!valid(from)) continue;
          std::memcpy(new_keys + i * hk.row, keys + from * k.row, bytes);
          std::memcpy(new_values + i * hv.row, values + from * v.row, bytes);
          continue;
        }
        const int64_t j = i - heavy - padding;
        char* p = to + (set * rows + i - heavy) * 2 * bytes;
        if (j < 0 || j >= rest) {
          std::memset(p, 0, 2 * bytes);
          continue;
        }
        const int64_t from = r[set * rest + j];
        if (!valid(from)) continue;
        std::memcpy(p, keys + from * k.row, bytes);
        std::memcpy(p + bytes, values + from * v.row, bytes);
      }
    }
  });
  TORCH_CHECK_INDEX(!outside, "kv_gather_: an index is outside of the ", tokens, " tokens");
  for (auto [cache, x] : {std::pair(&hk, &heavy_key), std::pair(&hv, &heavy_value)}) {
    if (!cache->tensor.is_same(*x)) x->copy_(cache->tensor);
  }
  return out;
}

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("kv_select", &cofire::kv_fusion::kv_select);
  m.impl("kv_gather_", &cofire::kv_fusion::kv_gather_);
}
