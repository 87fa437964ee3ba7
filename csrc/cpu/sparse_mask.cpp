// SPDX-License-Identifier: Apache-2.0
// Packed masks on dense weights: apply_mask, and the linear layer whose products are the library's.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include "pages.h"
#include "sparse.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace sparse {

namespace {

// Eight entries per byte; integers, so that a NaN in a pruned entry goes nowhere.
template <typename Word>
void mask_row(const Word* from, const uint8_t* bits, int64_t columns, Word* to) {
  int64_t k = 0;
  for (; k + 8 <= columns; k += 8) {
    const Word byte = bits[k / 8];
    for (int i = 0; i < 8; ++i) {
      to[k + i] = from[k + i] & static_cast<Word>(-static_cast<Word>(byte >> i & 1));
    }
  }
  for (; k < columns; ++k) to[k] = bits[k / 8] >> (k % 8) & 1 ? from[k] : Word{0};
}

void mask_rows(const at::Tensor& from, const at::Tensor& bits, at::Tensor& to) {
  const int64_t rows = bits.size(0), stride = bits.size(1);
  const int64_t columns = rows == 0 ? 0 : from.numel() / rows;
  const auto* b = bits.const_data_ptr<uint8_t>();
  const auto run = [&](auto example) {
    using Word = decltype(example);
    const auto* in = static_cast<const Word*>(from.const_data_ptr());
    auto* out = static_cast<Word*>(to.mutable_data_ptr());
    at::parallel_for(0, rows, grain_of(columns), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        mask_row(in + n * columns, b + n * stride, columns, out + n * columns);
      }
    });
  };
  if (from.element_size() == 4) {
    run(uint32_t{});
  } else {
    run(uint16_t{});
  }
}

// Adds decay * weight where the mask is not set.
void add_decay(const at::Tensor& weight, const at::Tensor& bits, double decay, at::Tensor& to) {
  const int64_t stride = bits.size(1), columns = weight.size(1);
  const auto* b = bits.const_data_ptr<uint8_t>();
  const auto factor = static_cast<float>(decay);
  dispatch(weight.scalar_type(), [&](auto example) {
    using T = decltype(example);
    const T* w = weight.const_data_ptr<T>();
    T* out = to.mutable_data_ptr<T>();
    at::parallel_for(0, weight.size(0), grain_of(columns), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t k = 0; k < columns; ++k) {
          const int64_t at = n * columns + k;
          if (b[n * stride + k / 8] >> (k % 8) & 1) continue;
          out[at] =
              static_cast<T>(static_cast<float>(out[at]) + factor * static_cast<float>(w[at]));
        }
      }
    });
  });
}

void check_mask(const char* op, const at::Tensor& weight, const at::Tensor& bits) {
  TORCH_CHECK(bits.scalar_type() == at::kByte && bits.dim() == 2 && weight.dim() >= 2 &&
                  bits.size(0) == weight.size(0),
              op, ": bits must be a packed mask of the weight");
  const int64_t columns = weight.size(0) == 0 ? 0 : weight.numel() / weight.size(0);
  TORCH_CHECK(weight.size(0) == 0 || bits.size(1) == (columns + 7) / 8, op,
              ": bits must have a bit for each of ", columns, " columns");
}

}  // namespace

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& bits) {
  if (!covered(weight)) return reference("cofire::apply_mask", &apply_mask, weight, bits);
  check_mask("apply_mask", weight, bits);
  at::Tensor out = empty_in_large_pages(weight.sizes(), weight.options());
  mask_rows(weight.contiguous(), bits.contiguous(), out);
  return out;
}

at::Tensor masked_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bits,
                         const MaybeTensor& bias, c10::string_view mode, double decay) {
  if (!covered(weight) || !covered(input)) {
    return reference("cofire::masked_linear", &masked_linear, input, weight, bits, bias, mode,
                     decay);
  }
  const at::Tensor w = mode == "invariant" ? weight : apply_mask(weight, bits);
  return at::linear(input, w, bias).contiguous();
}

std::tuple<at::Tensor, at::Tensor> masked_linear_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& bits, c10::string_view mode, double decay, bool to_input, bool to_weight) {
  if (!covered(weight) || !covered(input)) {
    return reference("cofire::masked_linear_backward", &masked_linear_backward, grad, input, weight,
                     bits, mode, decay, to_input, to_weight);
  }
  check_mask("masked_linear_backward", weight, bits);
  at::Tensor to_x = at::empty({0}, grad.options()), to_w = at::empty({0}, grad.options());
  const at::Tensor g = rows_of(grad);
  if (to_input) {
    const at::Tensor w = mode == "invariant" ? weight : apply_mask(weight, bits);
    to_x = at::mm(g, w).view(input.sizes());
  }
  if (to_weight) {
    const at::Tensor x = rows_of(input);
    if (mode == "ste" || mode == "srste") {
      to_w = at::mm(g.t(), x);
      if (mode == "srste") add_decay(weight.contiguous(), bits.contiguous(), decay, to_w);
    } else {
      to_w = empty_in_large_pages(weight.sizes(), weight.options());
      const at::Tensor packed = bits.contiguous();
      // Masked by parts, each while it is in the cache. But each part makes the library arrange x
      // anew: with many rows of x that costs more than a pass over the whole.
      const int64_t in_cache = (int64_t{1} << 23) / (weight.size(1) * weight.element_size() + 1);
      const int64_t rows = x.size(0) < 256 ? std::max<int64_t>(64, in_cache) : weight.size(0);
      for (int64_t n = 0; n < weight.size(0); n += rows) {
        const int64_t now = std::min(rows, weight.size(0) - n);
        at::Tensor part = to_w.narrow(0, n, now);
        at::mm_out(part, g.narrow(1, n, now).t(), x);
        mask_rows(part, packed.narrow(0, n, now), part);
      }
    }
  }
  return {to_x, to_w};
}

}  // namespace sparse
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("apply_mask", &cofire::sparse::apply_mask);
  m.impl("masked_linear", &cofire::sparse::masked_linear);
  m.impl("masked_linear_backward", &cofire::sparse::masked_linear_backward);
}
