// SPDX-License-Identifier: Apache-2.0
// The operators of the family: dequantize, qlinear and qlora_linear, their
// backwards, and the packed layout that they keep.
#include "lowbit.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <array>
#include <bit>
#include <mutex>
#include <unordered_map>

#include "lines.h"
#include "pages.h"
#include "parts.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace lowbit {

namespace {

// [..., K] as [M, K], also where K is 0.
at::Tensor rows_of(const at::Tensor& x) {
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) count *= x.size(d);
  return x.reshape({count, x.size(-1)});
}

at::Tensor in_fp32(const MaybeTensor& t) {
  return t.has_value() ? t->to(at::kFloat).contiguous() : at::Tensor();
}

// Eight codes fill `bits` bytes.
template <int Bits>
void unpack(const uint8_t* from, int64_t count, uint8_t* out) {
  constexpr uint64_t mask = (1u << Bits) - 1;
  int64_t i = 0;
  if constexpr (Bits == 8) {
    std::memcpy(out, from, count);
    return;
  } else if constexpr (Bits == 4 || Bits == 2 || Bits == 1) {
    constexpr int fields = 8 / Bits;
    for (; i + fields <= count; i += fields, ++from) {
      for (int j = 0; j < fields; ++j) out[i + j] = *from >> (Bits * j) & mask;
    }
    for (int j = 0; i < count; ++i, ++j) out[i] = *from >> (Bits * j) & mask;
  } else {
    for (; i < count; i += 8, from += Bits) {
      const int64_t now = std::min<int64_t>(8, count - i);
      uint64_t word = 0;
      std::memcpy(&word, from, (now * Bits + 7) / 8);
      if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
      if (now == 8) {
        for (int j = 0; j < 8; ++j) out[i + j] = word >> (Bits * j) & mask;
      } else {
        for (int j = 0; j < now; ++j) out[i + j] = word >> (Bits * j) & mask;
      }
    }
  }
}

}  // namespace

Stored::Stored(const at::Tensor& codes, const MaybeTensor& scale, const MaybeTensor& zero,
               const MaybeTensor& offset, const MaybeTensor& lut, int64_t bits, int64_t group_size,
               int64_t columns)
    : codes(codes.contiguous()),
      scale(in_fp32(scale)),
      zero(in_fp32(zero)),
      offset(in_fp32(offset)),
      lut(in_fp32(lut)),
      rows(codes.size(0)),
      columns(columns),
      bits(bits),
      group(group_size),
      groups(columns / group_size),
      row_bytes((columns * bits + 7) / 8),
      partition_rows(
          lut.has_value() ? std::max<int64_t>((rows + lut->size(0) - 1) / lut->size(0), 1) : rows),
      one_zero(zero.has_value() && zero->numel() == 1),
      int8_lut(lut.has_value() && lut->scalar_type() == at::kChar) {
  // What a weight was when it was made, its tensors may not be any more.
  const auto fits = [](const MaybeTensor& x, int64_t count) {
    return !x.has_value() || x->numel() == count;
  };
  TORCH_CHECK(codes.scalar_type() == at::kByte && codes.dim() == 2 && codes.size(1) == row_bytes,
              "codes must be uint8 of shape [", rows, ", ", row_bytes, "], got ",
              codes.scalar_type(), " ", codes.sizes());
  TORCH_CHECK(fits(scale, rows * groups) && (one_zero || fits(zero, rows * groups)) &&
                  fits(offset, rows * groups),
              "scale, zero and offset must have ", rows * groups, " elements");
  TORCH_CHECK(!lut.has_value() || lut->size(1) == int64_t{1} << bits, "lut must have ",
              int64_t{1} << bits, " columns");
}

void Stored::codes_of(int64_t row, int64_t start, int64_t count, uint8_t* out) const {
  const uint8_t* from = codes.const_data_ptr<uint8_t>() + row * row_bytes + start * bits / 8;
  with_bits(bits, [&](auto b) { unpack<b>(from, count, out); });
}

void Stored::values_of(int64_t row, int64_t start, int64_t count, uint8_t* bytes,
                       float* out) const {
  codes_of(row, start, count, bytes);
  const float* table = table_of(row);
  int64_t i = 0;
  while (i < count) {
    const int64_t g = (start + i) / group, end = std::min(count, (g + 1) * group - start);
    const float s = scale_of(row, g), z = zero_of(row, g), o = offset_of(row, g);
    const F16 vs = F16::all(s), vz = F16::all(z), vo = F16::all(o);
    const bool moved = offset.defined();
    for (; i + 16 <= end; i += 16) {
      const W16 code = W16::from_bytes(bytes + i);
      F16 value = table == nullptr ? to_float(code) : gather(table, code);
      value = rounded((value - vz) * vs);
      if (moved) value = value + vo;
      value.store(out + i);
    }
    for (; i < end; ++i) {
      const float value = table == nullptr ? static_cast<float>(bytes[i]) : table[bytes[i]];
      const float product = rounded((value - z) * s);
      out[i] = moved ? product + o : product;
    }
  }
}

Packed::Packed(const Stored& w)
    : rows(w.rows),
      columns(w.columns),
      bits(w.bits),
      group(w.group),
      groups(w.groups),
      blocks((w.rows + kBlock - 1) / kBlock),
      steps((w.columns + kStep - 1) / kStep) {
  codes = empty_in_large_pages({blocks * steps * bits * 64}, w.codes.options());
  auto* to = codes.mutable_data_ptr<uint8_t>();
  const int64_t padded = steps * kStep;
  at::parallel_for(0, blocks, grain_of(8 * padded), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> rows_of(kBlock * padded);
    for (int64_t block = begin; block < end; ++block) {
      std::fill(rows_of.begin(), rows_of.end(), 0);
      for (int64_t n = 0; n < std::min(kBlock, rows - block * kBlock); ++n) {
        w.codes_of(block * kBlock + n, 0, columns, rows_of.data() + n * padded);
      }
      for (int64_t s = 0; s < steps; ++s) {
        alignas(64) uint32_t words[8][16];
        for (int n = 0; n < 16; ++n) {
          uint32_t row[8];
          std::memcpy(row, rows_of.data() + n * padded + s * kStep, sizeof(row));
          for (int q = 0; q < 8; ++q) words[q][n] = row[q];
        }
        with_bits(bits, [&](auto b) {
          constexpr int B = b;
          uint8_t* out = to + (block * steps + s) * B * 64;
          const auto plane = [&]<int W, int Low, int First>() {
            constexpr int fields = 8 / W;
            constexpr uint32_t mask = 0x01010101u * ((1u << W) - 1);
            unrolled<W>([&](auto v) {
              W16 vector = W16::zero();
              unrolled<fields>([&](auto j) {
                const W16 word = W16::load(words[fields * v + j]);
                vector = vector | shift_left<W * j>(shift_right<Low>(word) & W16::all(mask));
              });
              vector.store(out + 64 * (First + v));
            });
          };
          if constexpr (B == 8) plane.template operator()<8, 0, 0>();
          if constexpr (B >= 4 && B < 8) plane.template operator()<4, 0, 0>();
          if constexpr (B == 2 || B == 3) plane.template operator()<2, 0, 0>();
          if constexpr (B == 6 || B == 7) plane.template operator()<2, 4, 4>();
          if constexpr (B == 1) plane.template operator()<1, 0, 0>();
          if constexpr (B == 3) plane.template operator()<1, 2, 2>();
          if constexpr (B == 5) plane.template operator()<1, 4, 4>();
          if constexpr (B == 7) plane.template operator()<1, 6, 6>();
        });
      }
    }
  });
  gather_in_large_pages(to, codes.nbytes());
  set_scales(w);
}

// See Packed::exponents.
at::Tensor exponents_of(const Stored& w) {
  if (!w.lut.defined() || w.bits != 5) return {};
  const int64_t tables = w.lut.size(0);
  at::Tensor found = at::empty({tables, 16}, w.codes.options());
  for (int64_t p = 0; p < tables; ++p) {
    const float* values = w.lut.const_data_ptr<float>() + p * 32;
    for (int i = 0; i < 16; ++i) {
      const auto bits = std::bit_cast<uint32_t>(values[i]);
      const bool power = (bits & ~(127u << 23)) == 0 && bits != 0;
      if (!(power || values[i] == 0) || values[i + 16] != -values[i]) return {};
      found.mutable_data_ptr<uint8_t>()[p * 16 + i] = power ? bits >> 23 : 0;
    }
  }
  return found;
}

// See Packed::halves. `table`: fp32 [P, 16], from which `middle` comes off; or the exponents.
std::vector<uint8_t> halves_of(const at::Tensor& table, float middle, const at::Tensor& exponents) {
  const bool powers = exponents.defined();
  if (!powers && table.size(1) > 16) return {};
  std::vector<uint8_t> found(table.size(0) * 32);
  for (int64_t p = 0; p < table.size(0); ++p) {
    uint8_t* to = found.data() + p * 32;
    for (int64_t i = 0; i < 16; ++i) {
      const uint32_t bits =
          powers ? uint32_t{exponents.const_data_ptr<uint8_t>()[p * 16 + i]} << 23
                 : std::bit_cast<uint32_t>(table.const_data_ptr<float>()[p * 16 + i] - middle);
      if (bits & 0xffff) return {};
      to[i] = bits >> 24;
      to[16 + i] = bits >> 16 & 255;
    }
  }
  return found;
}

void Packed::set_scales(const Stored& w) {
  const int64_t entries = 1 << bits;
  const auto floats = w.codes.options().dtype(at::kFloat);
  uniform = !w.lut.defined();
  scale = at::zeros({blocks, groups, kBlock}, floats);
  const bool moved = w.zero.defined() || w.offset.defined();
  shift = moved ? at::zeros({blocks, groups, kBlock}, floats) : at::Tensor();
  auto* to_scale = scale.mutable_data_ptr<float>();
  auto* to_shift = moved ? shift.mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, blocks, grain_of(kBlock * groups), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kBlock; n < std::min(rows, end * kBlock); ++n) {
      for (int64_t g = 0; g < groups; ++g) {
        const float s = w.scale_of(n, g);
        const int64_t at = (n / kBlock * groups + g) * kBlock + n % kBlock;
        to_scale[at] = s;
        if (moved) to_shift[at] = w.offset_of(n, g) - s * w.zero_of(n, g);
      }
    }
  });
  // Tables of at least 16 entries: shorter ones repeat, so that only the lowest bits of an index
  // count.
  const int64_t size = std::max<int64_t>(entries, 16), tables = w.lut.defined() ? w.lut.size(0) : 1;
  table = at::empty({tables, size}, floats);
  for (int64_t p = 0; p < tables; ++p) {
    for (int64_t i = 0; i < size; ++i) {
      table.mutable_data_ptr<float>()[p * size + i] =
          w.lut.defined() ? w.lut.const_data_ptr<float>()[p * entries + i % entries]
                          : static_cast<float>(i % entries);
    }
  }
  above = w.int8_lut ? -std::min<int64_t>(table.min().item<float>(), 0) : 0;
  most = w.int8_lut ? table.max().item<float>() + above : entries - 1;
  bytes = w.int8_lut ? (table + above).to(at::kByte) : at::Tensor();
  exponents = exponents_of(w);
  middle = uniform && w.one_zero && w.zero.defined() ? w.zero_of(0, 0) : 0.0f;
  halves = halves_of(table, middle, exponents);
  few_shift = middle == 0.0f ? shift : w.offset.defined() ? shift + scale * middle : at::Tensor();
  const bool whole = middle == std::floor(middle) && std::abs(middle) <= 255;
  byte_middle = w.int8_lut ? above : whole ? static_cast<int64_t>(middle) : 0;
  byte_shift = uniform && whole ? few_shift : shift;
  partition_blocks = tables == 1 ? std::max<int64_t>(blocks, 1) : w.partition_rows / kBlock;
}

namespace {

struct Entry {
  Tag codes, scale, zero, offset, lut;
  int64_t bits, group, columns;
  std::shared_ptr<const Packed> packed;
};

std::mutex cache_mutex;
std::unordered_map<const void*, Entry>& cache() {
  static auto* entries = new std::unordered_map<const void*, Entry>();  // outlives static tensors
  return *entries;
}

}  // namespace

std::shared_ptr<const Packed> packed(const at::Tensor& codes, const MaybeTensor& scale,
                                     const MaybeTensor& zero, const MaybeTensor& offset,
                                     const MaybeTensor& lut, const Stored& stored) {
  const auto whole = [&] {
    return Stored(codes, scale, zero, offset, lut, stored.bits, stored.group, stored.columns);
  };
  const std::lock_guard<std::mutex> lock(cache_mutex);
  auto& entries = cache();
  const auto found = entries.find(codes.const_data_ptr());
  const bool same_codes = found != entries.end() && found->second.codes.matches(codes) &&
                          found->second.bits == stored.bits &&
                          found->second.columns == stored.columns &&
                          found->second.group == stored.group;
  if (same_codes) {
    Entry& entry = found->second;
    if (entry.scale.matches(scale) && entry.zero.matches(zero) && entry.offset.matches(offset) &&
        entry.lut.matches(lut)) {
      return entry.packed;
    }
    auto changed = std::make_shared<Packed>(*entry.packed);  // shares the codes
    changed->set_scales(whole());
    entry.scale = Tag::of(scale);
    entry.zero = Tag::of(zero);
    entry.offset = Tag::of(offset);
    entry.lut = Tag::of(lut);
    entry.packed = changed;
    return changed;
  }
  std::erase_if(entries, [](const auto& item) { return item.second.codes.storage.expired(); });
  auto made = std::make_shared<Packed>(whole());
  entries.insert_or_assign(codes.const_data_ptr(),
                           Entry{Tag::of(codes), Tag::of(scale), Tag::of(zero), Tag::of(offset),
                                 Tag::of(lut), stored.bits, stored.group, stored.columns, made});
  return made;
}

at::Tensor float_rows(const at::Tensor& x, int64_t to, int64_t apart) {
  const int64_t count = x.size(0), columns = x.size(1), stride = round_up(columns, to) + apart;
  const at::Tensor input = x.contiguous();
  at::Tensor out = at::empty({count, stride}, x.options().dtype(at::kFloat));
  auto* p = out.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), [&](auto example) {
    using T = decltype(example);
    const T* from = input.const_data_ptr<T>();
    at::parallel_for(0, count, grain_of(stride), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const T* row = from + m * columns;
        float* values = p + m * stride;
        int64_t k = 0;
        for (; k + kLanes <= columns; k += kLanes) load_f32(row + k).store(values + k);
        for (; k < columns; ++k) values[k] = static_cast<float>(row[k]);
        std::fill(values + columns, values + stride, 0.0f);
      }
    });
  });
  return out;
}

namespace {

bool wide(const MaybeTensor& t) { return t.has_value() && t->scalar_type() == at::kDouble; }

// The gradients of one row of the weight, given that of its values.
struct RowGradients {
  RowGradients(const Stored& w, bool to_zero, bool to_lut)
      : w(w),
        scale(w.scale.defined() ? at::empty({w.rows, w.groups}, w.scale.options()) : at::Tensor()),
        zero(to_zero ? at::empty({w.rows, w.groups}, w.zero.options()) : at::Tensor()),
        offset(w.offset.defined() ? at::empty({w.rows, w.groups}, w.offset.options())
                                  : at::Tensor()),
        cells(to_lut ? at::zeros({w.rows, int64_t{1} << w.bits}, w.lut.options()) : at::Tensor()) {}

  void operator()(int64_t row, const float* grad, uint8_t* bytes) const {
    w.codes_of(row, 0, w.columns, bytes);
    const float* table = w.table_of(row);
    float* cell = cells.defined() ? cells.mutable_data_ptr<float>() + (row << w.bits) : nullptr;
    for (int64_t g = 0; g < w.groups; ++g) {
      const float s = w.scale_of(row, g), z = w.zero_of(row, g);
      F16 total = F16::zero(), weighted = F16::zero();
      int64_t k = g * w.group;
      const int64_t end = k + w.group;
      for (; k + 16 <= end; k += 16) {
        const W16 code = W16::from_bytes(bytes + k);
        const F16 value = table == nullptr ? to_float(code) : gather(table, code);
        const F16 d = F16::load(grad + k);
        total = total + d;
        weighted = fma(d, value - F16::all(z), weighted);
      }
      double sum = 0, dot = 0;
      float lanes[16];
      total.store(lanes);
      for (const float lane : lanes) sum += lane;
      weighted.store(lanes);
      for (const float lane : lanes) dot += lane;
      for (; k < end; ++k) {
        const float value = table == nullptr ? static_cast<float>(bytes[k]) : table[bytes[k]];
        sum += grad[k];
        dot += static_cast<double>(grad[k]) * (value - z);
      }
      const int64_t at = row * w.groups + g;
      if (scale.defined()) scale.mutable_data_ptr<float>()[at] = static_cast<float>(dot);
      if (offset.defined()) offset.mutable_data_ptr<float>()[at] = static_cast<float>(sum);
      if (zero.defined()) zero.mutable_data_ptr<float>()[at] = static_cast<float>(-sum * s);
      if (cell != nullptr) {
        for (int64_t i = g * w.group; i < end; ++i) cell[bytes[i]] += grad[i] * s;
      }
    }
  }

  // In the dtypes and shapes of the arguments; empty where there is no argument.
  std::array<at::Tensor, 4> finish(const at::Tensor& like, const MaybeTensor& scale_like,
                                   const MaybeTensor& zero_like, const MaybeTensor& offset_like,
                                   const MaybeTensor& lut_like) const {
    const auto cast = [&](const at::Tensor& t, const MaybeTensor& to) {
      return t.defined() ? t.to(to->scalar_type()) : at::empty({0}, like.options());
    };
    at::Tensor to_zero = zero, to_lut;
    if (zero.defined() && w.one_zero) to_zero = zero.to(at::kDouble).sum().view({1, 1});
    if (cells.defined()) {
      const int64_t tables = w.lut.size(0), entries = int64_t{1} << w.bits;
      to_lut = at::zeros({tables, entries}, w.lut.options().dtype(at::kDouble));
      auto* sums = to_lut.mutable_data_ptr<double>();
      for (int64_t n = 0; n < w.rows; ++n) {
        for (int64_t i = 0; i < entries; ++i) {
          sums[n / w.partition_rows * entries + i] +=
              cells.const_data_ptr<float>()[n * entries + i];
        }
      }
    }
    return {cast(scale, scale_like), cast(to_zero, zero_like), cast(offset, offset_like),
            cast(to_lut, lut_like)};
  }

  const Stored& w;
  at::Tensor scale, zero, offset, cells;
};

bool trainable(const MaybeTensor& t) { return t.has_value() && t->is_floating_point(); }

at::Tensor dequantize(const at::Tensor& codes, const MaybeTensor& scale, const MaybeTensor& zero,
                      const MaybeTensor& offset, const MaybeTensor& lut, int64_t bits,
                      int64_t group_size, int64_t columns) {
  if (wide(scale) || wide(zero) || wide(offset) || wide(lut)) {
    return reference("cofire::dequantize", &dequantize, codes, scale, zero, offset, lut, bits,
                     group_size, columns);
  }
  const Stored w(codes, scale, zero, offset, lut, bits, group_size, columns);
  at::Tensor out = at::empty({w.rows, columns}, codes.options().dtype(at::kFloat));
  auto* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, w.rows, grain_of(columns), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> bytes(columns + 16);
    for (int64_t n = begin; n < end; ++n)
      w.values_of(n, 0, columns, bytes.data(), to + n * columns);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dequantize_backward(
    const at::Tensor& grad, const at::Tensor& codes, const MaybeTensor& scale,
    const MaybeTensor& zero, const MaybeTensor& offset, const MaybeTensor& lut, int64_t bits,
    int64_t group_size) {
  if (!covered(grad) || wide(scale) || wide(zero) || wide(offset) || wide(lut)) {
    return reference("cofire::dequantize_backward", &dequantize_backward, grad, codes, scale, zero,
                     offset, lut, bits, group_size);
  }
  const int64_t columns = grad.size(1);
  const Stored w(codes, scale, zero, offset, lut, bits, group_size, columns);
  const at::Tensor d = grad.to(at::kFloat).contiguous();
  const RowGradients gradients(w, trainable(zero), trainable(lut));
  at::parallel_for(0, w.rows, grain_of(columns), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> bytes(columns + 16);
    for (int64_t n = begin; n < end; ++n) {
      gradients(n, d.const_data_ptr<float>() + n * columns, bytes.data());
    }
  });
  auto [a, b, c, e] = gradients.finish(grad, scale, zero, offset, lut);
  return {a, b, c, e};
}

// A weight without its scales, zero points and offsets: where its layout is kept nobody reads them,
// and what is not fp32 need not be converted.
Stored without_scales(const at::Tensor& codes, const MaybeTensor& lut, int64_t bits,
                      int64_t group_size, int64_t columns) {
  return {codes, {}, {}, {}, lut, bits, group_size, columns};
}

// The packed layout, or nothing: where the product reads the weight as it is stored, `w` becomes
// the whole of it.
std::shared_ptr<const Packed> layout_of(Stored& w, const at::Tensor& codes,
                                        const MaybeTensor& scale, const MaybeTensor& zero,
                                        const MaybeTensor& offset, const MaybeTensor& lut) {
  if (can_pack(w)) return packed(codes, scale, zero, offset, lut, w);
  w = Stored(codes, scale, zero, offset, lut, w.bits, w.group, w.columns);
  return nullptr;
}

at::Tensor qlinear(const at::Tensor& input, const at::Tensor& codes, const MaybeTensor& scale,
                   const MaybeTensor& zero, const MaybeTensor& offset, const MaybeTensor& lut,
                   const MaybeTensor& bias, int64_t bits, int64_t group_size,
                   c10::string_view activations) {
  if (!covered(input) || wide(scale) || wide(zero) || wide(offset) || wide(lut)) {
    return reference("cofire::qlinear", &qlinear, input, codes, scale, zero, offset, lut, bias,
                     bits, group_size, activations);
  }
  const int64_t columns = input.size(-1);
  Stored w = without_scales(codes, lut, bits, group_size, columns);
  auto shape = input.sizes().vec();
  shape.back() = w.rows;
  const at::Tensor x = rows_of(input);
  const bool int8 = activations == "int8";
  at::Tensor y = empty_in_large_pages(shape, input.options());
  if (y.numel() == 0) return y;
  const auto layout = layout_of(w, codes, scale, zero, offset, lut);
  multiply(x, w, layout.get(), bias, {}, int8, y.view({y.numel() / w.rows, w.rows}));
  return y;
}

// What qlinear and qlora_linear would do with these arguments, and why.
std::string plan_product(const at::Tensor& input, const at::Tensor& codes, const MaybeTensor& scale,
                         const MaybeTensor& zero, const MaybeTensor& offset, const MaybeTensor& lut,
                         int64_t bits, int64_t group_size, bool int8) {
  if (wide(scale) || wide(zero) || wide(offset) || wide(lut)) return "reference: parts in fp64";
  const Stored w = without_scales(codes, lut, bits, group_size, input.size(-1));
  return plan_of(w, rows_of(input).size(0), input.scalar_type(), int8);
}

std::string plan_qlinear(const at::Tensor& input, const at::Tensor& codes, const MaybeTensor& scale,
                         const MaybeTensor& zero, const MaybeTensor& offset, const MaybeTensor& lut,
                         const MaybeTensor& /*bias*/, int64_t bits, int64_t group_size,
                         c10::string_view activations) {
  return plan_product(input, codes, scale, zero, offset, lut, bits, group_size,
                      activations == "int8");
}

// dx = dy W (+ low a): by tiles of columns, decoding the rows of the weight as they are stored, or,
// where products of bf16 are faster, as `multiply_transposed` does.
at::Tensor input_gradient(const at::Tensor& grad, const Stored& w,
                          const std::function<std::shared_ptr<const Packed>()>& layout,
                          const at::Tensor& low, const at::Tensor& lora_a) {
  const int64_t columns = w.columns;
  auto shape = grad.sizes().vec();
  shape.back() = columns;
  at::Tensor dx = empty_in_large_pages(shape, grad.options());
  if (dx.numel() == 0) return dx;
  const at::Tensor rows = rows_of(grad);
  const at::Tensor to = dx.view({rows.size(0), columns});
  if (multiply_transposed(rows, w, layout, {low, lora_a}, to)) return dx;
  const at::Tensor dy = float_rows(rows, 1, kApart);
  const int64_t count = dy.size(0), apart = dy.size(1);
  constexpr int64_t kColumns = (kWidth % 8 == 0 ? 4 : 1) * kWidth, kDepth = 64;
  const int64_t tiles = (columns + kColumns - 1) / kColumns;
  const int64_t cost = w.rows * kColumns / 2 * count;
  in_parts(tiles, grain_of(cost), [&](int64_t begin, int64_t end) {
    Lines<float> tile(kDepth * kColumns), c(count * kColumns);
    std::vector<uint8_t> bytes(kColumns + 16);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t k = t * kColumns, used = std::min(kColumns, columns - k);
      const int64_t across = round_up(used, kWidth);
      std::fill(c.begin(), c.end(), 0.0f);
      for (int64_t n = 0; n < w.rows; n += kDepth) {
        const int64_t depth = std::min(kDepth, w.rows - n);
        for (int64_t i = 0; i < depth; ++i) {
          w.values_of(n + i, k, used, bytes.data(), tile.data() + i * kColumns);
        }
        for (int64_t j = 0; j < across; j += kWidth) {
          product(dy.const_data_ptr<float>() + n, apart, 1, tile.data() + j, kColumns, c.data() + j,
                  kColumns, count, depth);
        }
      }
      if (low.defined()) {
        const int64_t rank = low.size(1), padded = lora_a.size(1);
        for (int64_t j = 0; j < across; j += kWidth) {
          product(low.const_data_ptr<float>(), rank, 1, lora_a.const_data_ptr<float>() + k + j,
                  padded, c.data() + j, kColumns, count, rank);
        }
      }
      dispatch(dx.scalar_type(), [&](auto example) {
        using T = decltype(example);
        T* to = dx.mutable_data_ptr<T>() + k;
        for (int64_t m = 0; m < count; ++m) {
          for (int64_t i = 0; i < used; ++i) {
            to[m * columns + i] = static_cast<T>(c[m * kColumns + i]);
          }
        }
      });
    }
  });
  return dx;
}

// The input as the product saw it.
at::Tensor seen(const at::Tensor& x, bool int8) {
  at::Tensor rows = float_rows(x, 1);
  if (!int8) return rows;
  const at::Tensor scale = rows.abs().amax({1}, true).div(127);
  const at::Tensor usable = scale.isfinite().logical_and(scale > 0);
  const at::Tensor codes = at::where(usable, rows / at::where(usable, scale, at::ones_like(scale)),
                                     at::zeros_like(rows));
  return codes.round() * scale;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> qlinear_backward(
    const at::Tensor& grad, const MaybeTensor& input, const at::Tensor& codes,
    const MaybeTensor& scale, const MaybeTensor& zero, const MaybeTensor& offset,
    const MaybeTensor& lut, int64_t bits, int64_t group_size, int64_t columns,
    c10::string_view activations, bool to_input) {
  if (!covered(grad) || wide(input) || wide(scale) || wide(zero) || wide(offset) || wide(lut)) {
    return reference("cofire::qlinear_backward", &qlinear_backward, grad, input, codes, scale, zero,
                     offset, lut, bits, group_size, columns, activations, to_input);
  }
  const Stored w(codes, scale, zero, offset, lut, bits, group_size, columns);
  const at::Tensor nothing = at::empty({0}, grad.options());
  const auto layout = [&] { return packed(codes, scale, zero, offset, lut, w); };
  const at::Tensor dx = to_input ? input_gradient(grad, w, layout, {}, {}) : nothing;
  if (!input.has_value()) {
    return {dx, nothing, nothing.clone(), nothing.clone(), nothing.clone()};
  }
  const at::Tensor x = seen(rows_of(*input), activations == "int8");
  const at::Tensor dy = float_rows(rows_of(grad), 1);
  const int64_t count = dy.size(0);
  // Of the gradient of the dense weight there are never more than some rows per thread.
  constexpr int64_t kRows = 32, kColumns = 4 * kWidth;
  const int64_t padded = round_up(columns, kColumns);
  const at::Tensor wide_x = float_rows(x, kColumns);
  const RowGradients gradients(w, trainable(zero), trainable(lut));
  const int64_t tiles = (w.rows + kRows - 1) / kRows;
  at::parallel_for(
      0, tiles, grain_of(kRows * columns * (1 + count)), [&](int64_t begin, int64_t end) {
        Lines<float> dense(kRows * padded);
        std::vector<uint8_t> bytes(columns + 16);
        for (int64_t t = begin; t < end; ++t) {
          const int64_t n = t * kRows, rows = std::min(kRows, w.rows - n);
          std::fill(dense.begin(), dense.end(), 0.0f);
          for (int64_t k = 0; k < padded; k += kWidth) {
            product(dy.const_data_ptr<float>() + n, 1, w.rows, wide_x.const_data_ptr<float>() + k,
                    padded, dense.data() + k, padded, rows, count);
          }
          for (int64_t r = 0; r < rows; ++r)
            gradients(n + r, dense.data() + r * padded, bytes.data());
        }
      });
  auto [a, b, c, e] = gradients.finish(grad, scale, zero, offset, lut);
  return {dx, a, b, c, e};
}

// [R, N] of lora_b [N, R], times alpha, columns padded to whole tiles from any block on.
at::Tensor across(const at::Tensor& lora_b, double alpha) {
  return float_rows(lora_b.to(at::kFloat).t().mul(alpha), kWidth, kWidth);
}

std::tuple<at::Tensor, at::Tensor> qlora_linear(const at::Tensor& input, const at::Tensor& codes,
                                                const MaybeTensor& scale, const MaybeTensor& zero,
                                                const MaybeTensor& offset, const MaybeTensor& lut,
                                                const MaybeTensor& bias, const at::Tensor& lora_a,
                                                const at::Tensor& lora_b, double alpha,
                                                int64_t bits, int64_t group_size) {
  if (!covered(input) || wide(scale) || wide(zero) || wide(offset) || wide(lut) || wide(lora_a) ||
      wide(lora_b)) {
    return reference("cofire::qlora_linear", &qlora_linear, input, codes, scale, zero, offset, lut,
                     bias, lora_a, lora_b, alpha, bits, group_size);
  }
  const int64_t columns = input.size(-1), rank = lora_a.size(0);
  Stored w = without_scales(codes, lut, bits, group_size, columns);
  auto shape = input.sizes().vec();
  shape.back() = w.rows;
  at::Tensor y = at::empty(shape, input.options());
  shape.back() = rank;
  const at::Tensor x = rows_of(input);
  const at::Tensor low = at::linear(x, lora_a.to(input.scalar_type())).reshape(shape).contiguous();
  if (y.numel() == 0) return {y, low};
  const auto layout = layout_of(w, codes, scale, zero, offset, lut);
  LowRank term;
  if (rank > 0) term = {rows_of(low).to(at::kFloat), across(lora_b, alpha)};
  multiply(x, w, layout.get(), bias, term, false, y.view({y.numel() / w.rows, w.rows}));
  return {y, low};
}

std::string plan_qlora_linear(const at::Tensor& input, const at::Tensor& codes,
                              const MaybeTensor& scale, const MaybeTensor& zero,
                              const MaybeTensor& offset, const MaybeTensor& lut,
                              const MaybeTensor& /*bias*/, const at::Tensor& /*lora_a*/,
                              const at::Tensor& /*lora_b*/, double /*alpha*/, int64_t bits,
                              int64_t group_size) {
  return plan_product(input, codes, scale, zero, offset, lut, bits, group_size, false);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> qlora_linear_backward(
    const at::Tensor& grad, const MaybeTensor& low_grad, const MaybeTensor& input,
    const MaybeTensor& low, const at::Tensor& codes, const MaybeTensor& scale,
    const MaybeTensor& zero, const MaybeTensor& offset, const MaybeTensor& lut,
    const at::Tensor& lora_a, const at::Tensor& lora_b, double alpha, int64_t bits,
    int64_t group_size, bool to_input) {
  if (!covered(grad) || wide(low_grad) || wide(input) || wide(scale) || wide(zero) ||
      wide(offset) || wide(lut) || wide(lora_a) || wide(lora_b)) {
    return reference("cofire::qlora_linear_backward", &qlora_linear_backward, grad, low_grad, input,
                     low, codes, scale, zero, offset, lut, lora_a, lora_b, alpha, bits, group_size,
                     to_input);
  }
  const int64_t columns = lora_a.size(1), rank = lora_a.size(0);
  const Stored w(codes, scale, zero, offset, lut, bits, group_size, columns);
  const at::Tensor dy = float_rows(rows_of(grad), 1);
  at::Tensor to_low = at::mm(dy, lora_b.to(at::kFloat)).mul(alpha);
  if (low_grad.has_value()) to_low = to_low + rows_of(*low_grad).to(at::kFloat);
  const at::Tensor nothing = at::empty({0}, grad.options());
  at::Tensor dx = nothing, da = nothing.clone(), db = nothing.clone();
  if (to_input) {
    const bool used = rank > 0;
    const auto layout = [&] { return packed(codes, scale, zero, offset, lut, w); };
    dx = input_gradient(grad, w, layout, used ? to_low.contiguous() : at::Tensor(),
                        used ? float_rows(lora_a, 4 * kWidth) : at::Tensor());
  }
  if (input.has_value()) {
    da = at::mm(to_low.t(), rows_of(*input).to(at::kFloat)).to(lora_a.scalar_type());
  }
  if (low.has_value()) {
    db = at::mm(dy.t(), rows_of(*low).to(at::kFloat)).mul(alpha).to(lora_b.scalar_type());
  }
  return {dx, da, db};
}

}  // namespace
}  // namespace lowbit

}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("dequantize", &cofire::lowbit::dequantize);
  m.impl("dequantize_backward", &cofire::lowbit::dequantize_backward);
  m.impl("qlinear", &cofire::lowbit::qlinear);
  m.impl("qlinear_backward", &cofire::lowbit::qlinear_backward);
  m.impl("qlora_linear", &cofire::lowbit::qlora_linear);
  m.impl("qlora_linear_backward", &cofire::lowbit::qlora_linear_backward);
}
TORCH_LIBRARY_FRAGMENT(cofire_plan, m) {
  m.def("qlinear", &cofire::lowbit::plan_qlinear);
  m.def("qlora_linear", &cofire::lowbit::plan_qlora_linear);
}
