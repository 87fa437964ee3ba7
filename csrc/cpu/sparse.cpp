// SPDX-License-Identifier: Apache-2.0
// The operators of the family: apply_mask, masked_linear, spmm and sddmm, and their backwards.
#include "sparse.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "pages.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace sparse {

// ---------------------------------------------------------------------------------------- the
// input

namespace {

// Of `vectors` vectors, how many the next block takes: what is a little short of a power of two is
// filled with zeros, which is cheaper than another pass over the weight.
int next_vectors(int64_t vectors) {
  if (vectors + 1 >= kMostVectors) return kMostVectors;
  if (vectors >= 3) return 4;
  return static_cast<int>(vectors);
}

template <typename T>
void transpose_block(const T* x, int64_t columns, const Block& b, int64_t from, int64_t to,
                     float* out) {
  const int64_t width = b.width();
  for (int64_t t = 0; t < width; t += kLanes) {
    const int64_t tokens = std::clamp<int64_t>(b.count - t, 0, kLanes);
    int64_t k = from;
    if (tokens == kLanes) {
      for (; k + kLanes <= to; k += kLanes) {
        const T* corner = x + (b.first + t) * columns + k;
        if constexpr (std::is_same_v<T, float>) {
          at::vec::transpose_mxn<float, kLanes, kLanes>(corner, columns, out + k * width + t,
                                                        width);
        } else {
          alignas(64) float tile[kLanes * kLanes];
          for (int64_t i = 0; i < kLanes; ++i) {
            load_f32(corner + i * columns).store(tile + i * kLanes);
          }
          at::vec::transpose_mxn<float, kLanes, kLanes>(tile, kLanes, out + k * width + t, width);
        }
      }
    }
    for (; k < to; ++k) {
      float* at = out + k * width + t;
      const T* token = x + (b.first + t) * columns + k;
      for (int64_t i = 0; i < tokens; ++i) at[i] = static_cast<float>(token[i * columns]);
      std::fill(at + tokens, at + kLanes, 0.0f);
    }
  }
}

}  // namespace

Tokens side_by_side(const at::Tensor& x) {
  Tokens tokens;
  tokens.count = x.size(0);
  tokens.columns = x.size(1);
  int64_t start = 0;
  for (int64_t m = 0; m < tokens.count;) {
    const int vectors = next_vectors((tokens.count - m + kLanes - 1) / kLanes);
    const int64_t now = std::min<int64_t>(tokens.count - m, vectors * kLanes);
    tokens.blocks.push_back({m, now, vectors, start});
    start += vectors * kLanes * tokens.columns;
    m += now;
  }
  tokens.data = empty_in_large_pages({start}, x.options().dtype(at::kFloat));
  const at::Tensor input = x.contiguous();
  auto* out = tokens.data.mutable_data_ptr<float>();
  constexpr int64_t part = 256;
  const int64_t parts = (tokens.columns + part - 1) / part;
  dispatch(x.scalar_type(), [&](auto example) {
    using T = decltype(example);
    const T* from = input.const_data_ptr<T>();
    const auto tasks = static_cast<int64_t>(tokens.blocks.size()) * parts;
    at::parallel_for(0, tasks, 2, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const Block& b = tokens.blocks[task / parts];
        const int64_t k = task % parts * part;
        transpose_block(from, tokens.columns, b, k, std::min(k + part, tokens.columns),
                        out + b.start);
      }
    });
  });
  return tokens;
}

void Sink::operator()(const float* c, int64_t stride, int64_t n, int64_t count, int64_t m,
                      int64_t tokens) const {
  const float* b = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  dispatch(y.scalar_type(), [&](auto example) {
    using T = decltype(example);
    T* out = static_cast<T*>(y.mutable_data_ptr());
    const auto one_by_one = [&](int64_t t, int64_t from) {
      T* row = out + (m + t) * rows + n;
      for (int64_t r = from; r < count; ++r) {
        float v = c[r * stride + t];
        if (scale != nullptr) v *= scale[n + r];
        if (b != nullptr) v += b[n + r];
        row[r] = static_cast<T>(v);
      }
    };
    int64_t t = 0;
    for (; t + kLanes <= tokens; t += kLanes) {
      int64_t r = 0;
      for (; r + kLanes <= count; r += kLanes) {
        alignas(64) float tile[kLanes * kLanes];
        at::vec::transpose_mxn<float, kLanes, kLanes>(c + r * stride + t, stride, tile, kLanes);
        for (int64_t i = 0; i < kLanes; ++i) {
          Vec v = Vec::loadu(tile + i * kLanes);
          if (scale != nullptr) v = v * Vec::loadu(scale + n + r);
          if (b != nullptr) v = v + Vec::loadu(b + n + r);
          store_f32(out + (m + t + i) * rows + n + r, v);
        }
      }
      for (int64_t i = t; i < t + kLanes; ++i) one_by_one(i, r);
    }
    for (; t < tokens; ++t) one_by_one(t, 0);
  });
}

// Memory safety, once more than the public function: of the shapes alone. What the index says is
// checked where a weight is made.
Weight weight_of(const at::Tensor& values, const at::Tensor& index, const at::Tensor& offsets,
                 const MaybeTensor& scale, c10::string_view format, int64_t rows, int64_t columns,
                 int64_t block_rows, int64_t block_columns) {
  Weight w{values.contiguous(),
           index.contiguous(),
           offsets.contiguous(),
           scale.has_value() ? scale->to(at::kFloat).contiguous() : at::Tensor(),
           std::string(format),
           rows,
           columns,
           block_rows,
           block_columns};
  const int64_t size = w.format == "bitmap" ? 16 : w.format == "block" ? block_rows : 1;
  TORCH_CHECK(w.offsets.scalar_type() == at::kLong && w.offsets.dim() == 1 &&
                  w.offsets.size(0) == (rows + size - 1) / size + 1,
              "spmm: offsets must be int64 of shape [", (rows + size - 1) / size + 1, "]");
  if (w.format == "bitmap") {
    TORCH_CHECK(
        w.index.dim() == 2 && w.index.size(0) == (rows + 15) / 16 && w.index.size(1) == columns,
        "spmm: index must have a word for each panel and column");
  } else {
    TORCH_CHECK(w.values.size(0) == w.index.size(0), "spmm: values and index must be as many");
  }
  TORCH_CHECK(w.starts()[w.offsets.size(0) - 1] == w.values.size(0),
              "spmm: offsets must end with the number of values, ", w.values.size(0));
  return w;
}

namespace {

bool covers(const at::Tensor& x, const at::Tensor& values) {
  return covered(x) && (covered(values) || values.scalar_type() == at::kChar);
}

void multiply(const at::Tensor& x, const Weight& w, const Sink& sink) {
  if (w.format == "csr" || w.format == "delta") {
    multiply_rows(x, w, sink);
  } else {
    multiply_panels(x, w, sink);
  }
}

bool has_kernel(const at::Tensor& x, const at::Tensor& values, c10::string_view format,
                int64_t block_rows) {
  return covers(x, values) && (format != "block" || block_rows % 16 == 0) && x.numel() > 0;
}

}  // namespace

at::Tensor spmm(const at::Tensor& input, const MaybeTensor& bias, const at::Tensor& values,
                const at::Tensor& index, const at::Tensor& offsets, const MaybeTensor& scale,
                c10::string_view format, int64_t rows, int64_t columns, int64_t block_rows,
                int64_t block_columns) {
  if (!has_kernel(input, values, format, block_rows)) {
    return reference("cofire::spmm", &spmm, input, bias, values, index, offsets, scale, format,
                     rows, columns, block_rows, block_columns);
  }
  TORCH_CHECK(input.size(-1) == columns, "spmm: input must have ", columns, " columns");
  const Weight w =
      weight_of(values, index, offsets, scale, format, rows, columns, block_rows, block_columns);
  auto sizes = input.sizes().vec();
  sizes.back() = rows;
  at::Tensor y = at::empty(sizes, input.options());
  const at::Tensor b = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  if (y.numel() > 0) multiply(rows_of(input), w, Sink{y, w.scales(), b, rows});
  return y;
}

at::Tensor sddmm(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& index,
                 const at::Tensor& offsets, c10::string_view format, int64_t block_rows,
                 int64_t block_columns) {
  if (!has_kernel(input, grad, format, block_rows) || grad.numel() == 0) {
    return reference("cofire::sddmm", &sddmm, grad, input, index, offsets, format, block_rows,
                     block_columns);
  }
  const int64_t entries = index.size(0);
  const at::Tensor values =
      format == "csr"
          ? at::empty({1}, grad.options()).expand({entries})
          : at::empty({1, 1, 1}, grad.options()).expand({entries, block_columns, block_rows});
  Weight w{values,         index.contiguous(),  offsets.contiguous(),
           at::Tensor(),   std::string(format), grad.size(-1),
           input.size(-1), block_rows,          block_columns};
  const int64_t size = w.format == "block" ? block_rows : 1;
  TORCH_CHECK(w.offsets.size(0) == (w.rows + size - 1) / size + 1 &&
                  w.starts()[w.offsets.size(0) - 1] == entries,
              "sddmm: offsets must end with the number of entries, ", entries);
  return w.format == "csr"
             ? sampled_rows(side_by_side(rows_of(grad)), side_by_side(rows_of(input)), w)
             : sampled_blocks(rows_of(grad), rows_of(input), w);
}

namespace {

// The same weight by columns: where each entry goes.
struct Transposed {
  at::Tensor index, offsets, order;  // rows, starts of columns, entry of each place
};

struct Entry {
  Tag index, offsets;
  int64_t columns;
  std::shared_ptr<const Transposed> made;
};

template <typename Index>
Transposed transpose(const Index* index, const int64_t* starts, int64_t rows, int64_t columns,
                     int64_t entries, const at::TensorOptions& options) {
  Transposed t;
  const bool narrow = rows <= 1 << 16;
  t.index = at::empty({entries}, options.dtype(narrow ? at::kUInt16 : at::kInt));
  t.offsets = at::zeros({columns + 1}, options.dtype(at::kLong));
  const bool few = entries <= std::numeric_limits<int32_t>::max();
  t.order = at::empty({entries}, options.dtype(few ? at::kInt : at::kLong));
  auto* first = t.offsets.mutable_data_ptr<int64_t>();
  for (int64_t j = 0; j < entries; ++j) ++first[index[j] + 1];
  for (int64_t k = 0; k < columns; ++k) first[k + 1] += first[k];
  std::vector<int64_t> next(first, first + columns);
  void* order = t.order.mutable_data_ptr();
  void* row = t.index.mutable_data_ptr();
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t j = starts[n]; j < starts[n + 1]; ++j) {
      const int64_t place = next[index[j]]++;
      if (few) {
        static_cast<int32_t*>(order)[place] = static_cast<int32_t>(j);
      } else {
        static_cast<int64_t*>(order)[place] = j;
      }
      if (narrow) {
        static_cast<uint16_t*>(row)[place] = static_cast<uint16_t>(n);
      } else {
        static_cast<int32_t*>(row)[place] = static_cast<int32_t>(n);
      }
    }
  }
  return t;
}

// Made once per index, and kept for as long as it lives and does not change.
std::shared_ptr<const Transposed> transposed(const Weight& w) {
  static std::mutex mutex;
  static auto* entries = new std::unordered_map<const void*, Entry>();  // outlives static tensors
  const std::lock_guard<std::mutex> lock(mutex);
  const void* key = w.index.const_data_ptr();
  const auto found = entries->find(key);
  if (found != entries->end() && found->second.index.matches(w.index) &&
      found->second.offsets.matches(w.offsets) && found->second.columns == w.columns) {
    return found->second.made;
  }
  std::erase_if(*entries, [](const auto& item) { return item.second.index.storage.expired(); });
  const auto options = w.offsets.options();
  const int64_t count = w.index.size(0);
  auto made = std::make_shared<const Transposed>(
      w.index.scalar_type() == at::kInt ? transpose(w.index.const_data_ptr<int32_t>(), w.starts(),
                                                    w.rows, w.columns, count, options)
                                        : transpose(static_cast<const uint16_t*>(key), w.starts(),
                                                    w.rows, w.columns, count, options));
  entries->insert_or_assign(key, Entry{Tag::of(w.index), Tag::of(w.offsets), w.columns, made});
  return made;
}

// grads: the rows of grad side by side, of more than one.
at::Tensor input_gradient(const at::Tensor& grad, const Tokens* grads, const Weight& w) {
  const auto t = transposed(w);
  Weight back{
      at::empty_like(w.values), t->index, t->offsets, at::Tensor(), "csr", w.columns, w.rows, 1, 1};
  dispatch(w.values.scalar_type(), [&](auto example) {
    using T = decltype(example);
    const T* from = w.values.const_data_ptr<T>();
    T* to = back.values.mutable_data_ptr<T>();
    const auto take = [&](const auto* order) {
      at::parallel_for(0, w.values.numel(), 32768, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) to[j] = from[order[j]];
      });
    };
    if (t->order.scalar_type() == at::kInt) {
      take(t->order.const_data_ptr<int32_t>());
    } else {
      take(t->order.const_data_ptr<int64_t>());
    }
  });
  at::Tensor out = at::empty({grad.size(0), w.columns}, grad.options());
  const Sink sink{out, nullptr, at::Tensor(), w.columns};
  if (grads != nullptr) {
    multiply_rows(*grads, back, sink);
  } else {
    multiply_rows(grad, back, sink);
  }
  return out;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> spmm_backward(const at::Tensor& grad, const at::Tensor& input,
                                                 const at::Tensor& values, const at::Tensor& index,
                                                 const at::Tensor& offsets,
                                                 const MaybeTensor& scale, c10::string_view format,
                                                 int64_t rows, int64_t columns, int64_t block_rows,
                                                 int64_t block_columns, bool to_input,
                                                 bool to_values) {
  const bool kernel = (format == "csr" || format == "block") && covered(values) &&
                      has_kernel(grad, values, format, block_rows) && input.numel() > 0 &&
                      !scale.has_value();
  if (!kernel) {
    return reference("cofire::spmm_backward", &spmm_backward, grad, input, values, index, offsets,
                     scale, format, rows, columns, block_rows, block_columns, to_input, to_values);
  }
  const Weight w =
      weight_of(values, index, offsets, scale, format, rows, columns, block_rows, block_columns);
  at::Tensor to_x = at::empty({0}, grad.options()), to_v = to_x;
  const at::Tensor g = rows_of(grad);
  std::optional<Tokens> grads;  // for both gradients
  if (format == "csr" && (to_values || g.size(0) > 1)) grads = side_by_side(g);
  if (to_input) {
    auto sizes = grad.sizes().vec();
    sizes.back() = columns;
    to_x = format == "csr" ? input_gradient(g, g.size(0) > 1 ? &*grads : nullptr, w)
                           : input_gradient_of_blocks(g, w);
    to_x = to_x.view(sizes);
  }
  if (to_values) {
    to_v = format == "csr" ? sampled_rows(*grads, side_by_side(rows_of(input)), w)
                           : sampled_blocks(g, rows_of(input), w);
    to_v = to_v.to(values.scalar_type());
  }
  return {to_x, to_values ? to_v : at::empty({0}, grad.options())};
}

}  // namespace sparse
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("spmm", &cofire::sparse::spmm);
  m.impl("sddmm", &cofire::sparse::sddmm);
  m.impl("spmm_backward", &cofire::sparse::spmm_backward);
}
