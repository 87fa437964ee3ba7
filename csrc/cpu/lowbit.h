// SPDX-License-Identifier: Apache-2.0
// What the kernels of the family share: a weight as it is stored, the layout that
// products read, and the one loop that all products of floats end in.
//
// A packed weight goes by blocks of 16 rows and, within one, by steps of 32
// columns. A step holds `bits` vectors of 64 bytes: its codes are cut into planes
// of 8, 4, 2 or 1 bits (7 = 4 + 2 + 1, low bits first), and in a plane of w bits
// byte 4 n + i of vector v holds, from its low bits up, the codes of row n at the
// columns 4 q + i of the quads q = 8/w v, 8/w v + 1, ... A shift and a mask thus
// turn a vector into 16 rows of four neighbouring columns: what vpdpbusd eats.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lanes16.h"
#include "parts.h"
#include "tag.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace lowbit {

constexpr int64_t kBlock = 16;  // rows of a block
constexpr int64_t kStep = 32;   // columns of a step
constexpr int64_t kWidth = kTileBlocks * kBlock;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A weight as it is stored, everything but the codes in fp32.
struct Stored {
  Stored(const at::Tensor& codes, const MaybeTensor& scale, const MaybeTensor& zero,
         const MaybeTensor& offset, const MaybeTensor& lut, int64_t bits, int64_t group_size,
         int64_t columns);

  // Codes of columns [start, start + count), start a multiple of 8.
  void codes_of(int64_t row, int64_t start, int64_t count, uint8_t* out) const;
  // The weight itself, each operation rounded by itself; `bytes`: scratch for `count` codes and 16.
  void values_of(int64_t row, int64_t start, int64_t count, uint8_t* bytes, float* out) const;

  const float* table_of(int64_t row) const {
    return lut.defined() ? lut.const_data_ptr<float>() + row / partition_rows * (1 << bits)
                         : nullptr;
  }
  float scale_of(int64_t row, int64_t group) const {
    return scale.defined() ? scale.const_data_ptr<float>()[row * groups + group] : 1.0f;
  }
  float zero_of(int64_t row, int64_t group) const {
    if (!zero.defined()) return 0.0f;
    return zero.const_data_ptr<float>()[one_zero ? 0 : row * groups + group];
  }
  float offset_of(int64_t row, int64_t group) const {
    return offset.defined() ? offset.const_data_ptr<float>()[row * groups + group] : 0.0f;
  }

  at::Tensor codes, scale, zero, offset, lut;
  int64_t rows, columns, bits, group, groups, row_bytes, partition_rows;
  bool one_zero, int8_lut;
};

// The layout of the products. Padding is zero: codes, scales and shifts.
struct Packed {
  explicit Packed(const Stored& stored);
  void set_scales(const Stored& stored);

  const uint8_t* step(int64_t block, int64_t s) const {
    return codes.const_data_ptr<uint8_t>() + (block * steps + s) * bits * 64;
  }

  int64_t rows, columns, bits, group, groups, blocks, steps;
  at::Tensor codes;         // uint8
  at::Tensor scale, shift;  // fp32 [blocks, groups, 16]: y += scale sum(V x) + shift sum(x)
  at::Tensor table;         // fp32 [P, max(16, 2^bits)]: V
  at::Tensor bytes;         // uint8, of the same shape: V + above where V are bytes, else undefined
  int64_t above, most;      // what makes bytes unsigned, and the largest that there then is
  // Of tables of 32 powers of two up to 1, the second half the first one's negatives: uint8 [P,
  // 16], the fields of the exponent (0: a zero). Else undefined.
  at::Tensor exponents;
  // Where all that few rows are multiplied by are halves of floats, that is, bf16: their high and
  // low bytes, of codes of up to 4 bits or, without the sign, of powers of two. [P][32], else none.
  std::vector<uint8_t> halves;
  bool uniform;  // V is the code itself
  // With few rows the zero point, where all are equal, comes off each code: sums of codes that it
  // is taken off afterwards would cancel. `few_shift` is what is left of `shift`.
  float middle;
  at::Tensor few_shift;
  // The same where bytes are multiplied, as far as it is an integer: with what makes bytes
  // unsigned, it is taken off sums of integers. `byte_shift` is what is left of `shift`.
  int64_t byte_middle;
  at::Tensor byte_shift;
  int64_t partition_blocks;  // blocks that share a row of the tables
};

// Whether there is a packed layout: groups of whole steps and, where there are several
// tables, one for each block.
inline bool can_pack(const Stored& w) {
  const bool steps = w.groups == 1 || w.group % kStep == 0;
  const bool tables = !w.lut.defined() || w.lut.size(0) == 1 || w.partition_rows % kBlock == 0;
  return steps && tables;
}

// The packed layout, kept for as long as the tensors live and do not change.
std::shared_ptr<const Packed> packed(const at::Tensor& codes, const MaybeTensor& scale,
                                     const MaybeTensor& zero, const MaybeTensor& offset,
                                     const MaybeTensor& lut, const Stored& stored);

// The planes of one step of a block, decoded to quads.
// They are loaded where they are used: all at once they would fill the registers of AVX2.
template <int Bits>
struct Planes {
  const uint8_t* p;

  explicit COFIRE_INLINE Planes(const uint8_t* codes) : p(codes) {}

  COFIRE_INLINE W16 vector(int i) const { return W16::load(p + 64 * i); }

  // The plane of width W whose codes start at bit Low and whose vectors start at First.
  template <int W, int Low, int First, int Q>
  COFIRE_INLINE W16 field() const {
    constexpr int fields = 8 / W, shift = W * (Q % fields);
    constexpr uint32_t mask = 0x01010101u * ((1u << W) - 1) << Low;
    const W16 from = vector(First + Q / fields);
    if constexpr (W == 8) return from;
    if constexpr (shift >= Low)
      return shift_right<shift - Low>(from) & W16::all(mask);
    else
      return shift_left<Low - shift>(from) & W16::all(mask);
  }

  // Row n, columns 4 Q to 4 Q + 3: the bytes of lane n.
  template <int Q>
  COFIRE_INLINE W16 quad() const {
    if constexpr (Bits == 8) return field<8, 0, 0, Q>();
    if constexpr (Bits == 4) return field<4, 0, 0, Q>();
    if constexpr (Bits == 2) return field<2, 0, 0, Q>();
    if constexpr (Bits == 1) return field<1, 0, 0, Q>();
    if constexpr (Bits == 3) return field<2, 0, 0, Q>() | field<1, 2, 2, Q>();
    if constexpr (Bits == 5) return field<4, 0, 0, Q>() | field<1, 4, 4, Q>();
    if constexpr (Bits == 6) return field<4, 0, 0, Q>() | field<2, 4, 4, Q>();
    if constexpr (Bits == 7) return field<4, 0, 0, Q>() | field<2, 4, 4, Q>() | field<1, 6, 6, Q>();
  }
};

#if defined(CPU_CAPABILITY_AVX2)
// Eight rows of a block: half of each vector.
template <int Bits>
struct HalfPlanes {
  const uint8_t* p;

  COFIRE_INLINE __m256i vector(int i) const {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64 * i));
  }

  // As in `Planes`, from the bit Low of each byte on.
  template <int W, int Low, int First, int Q>
  COFIRE_INLINE __m256i field() const {
    constexpr int fields = 8 / W, shift = W * (Q % fields);
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << W) - 1) << Low));
    __m256i from = vector(First + Q / fields);
    if constexpr (shift > Low) from = _mm256_srli_epi32(from, shift - Low);
    if constexpr (shift < Low) from = _mm256_slli_epi32(from, Low - shift);
    return _mm256_and_si256(from, mask);
  }

  // Rows n, columns 4 Q to 4 Q + 3: the lowest four bits of the bytes of lane n.
  template <int Q>
  COFIRE_INLINE __m256i quad() const {
    static_assert(Bits <= 5);
    if constexpr (Bits >= 4) return field<4, 0, 0, Q>();
    if constexpr (Bits == 3) return _mm256_or_si256(field<2, 0, 0, Q>(), field<1, 2, 2, Q>());
    if constexpr (Bits == 2) return field<2, 0, 0, Q>();
    if constexpr (Bits == 1) return field<1, 0, 0, Q>();
  }

  // The fifth bit, as the highest one.
  template <int Q>
  COFIRE_INLINE __m256i signs() const {
    return field<1, 7, 4, Q>();
  }
};
#endif

// Calls f with the number of bits as a constant.
template <typename F>
inline void with_bits(int64_t bits, F&& f) {
  switch (bits) {
#define COFIRE_CASE(B)                   \
  case B:                                \
    f(std::integral_constant<int, B>{}); \
    break;
    COFIRE_CASE(1)
    COFIRE_CASE(2)
    COFIRE_CASE(3)
    COFIRE_CASE(4)
    COFIRE_CASE(5)
    COFIRE_CASE(6)
    COFIRE_CASE(7)
    COFIRE_CASE(8)
#undef COFIRE_CASE
  }
}

// c[r][j] += sum_k a[r * row + k * column] * b[k][j] for R rows and kWidth columns; in a panel the
// rows stand side by side: a[k * R + r]. The sum is taken by itself: one chain over all pieces of a
// long row would lose several times as much.
template <int R, bool Panel>
inline void product_rows(const float* a, int64_t row, int64_t column, const float* b, int64_t ldb,
                         float* c, int64_t ldc, int64_t depth) {
  F16 acc[R][kTileBlocks];
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) {
    COFIRE_UNROLL
    for (int j = 0; j < kTileBlocks; ++j) acc[r][j] = F16::zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    F16 w[kTileBlocks];
    COFIRE_UNROLL
    for (int j = 0; j < kTileBlocks; ++j) w[j] = F16::load(b + k * ldb + 16 * j);
    COFIRE_UNROLL
    for (int r = 0; r < R; ++r) {
      const F16 x = F16::all(Panel ? a[k * R + r] : a[r * row + k * column]);
      COFIRE_UNROLL
      for (int j = 0; j < kTileBlocks; ++j) acc[r][j] = fma(x, w[j], acc[r][j]);
    }
  }
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) {
    COFIRE_UNROLL
    for (int j = 0; j < kTileBlocks; ++j) {
      float* to = c + r * ldc + 16 * j;
      (F16::load(to) + acc[r][j]).store(to);
    }
  }
}

using Product = void (*)(const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t,
                         int64_t);

// The kernel for so many rows, at most kTileRows.
template <bool Panel>
inline Product product_of(int64_t rows) {
  static constexpr auto kernels = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array<Product, sizeof...(R)>{product_rows<R + 1, Panel>...};
  }(std::make_integer_sequence<int, kTileRows>{});
  return kernels[rows - 1];
}

// The same for any number of rows; each row's sums are the same whatever rows stand beside it.
inline void product(const float* a, int64_t row, int64_t column, const float* b, int64_t ldb,
                    float* c, int64_t ldc, int64_t rows, int64_t depth) {
  for (int64_t r = 0, now; r < rows; r += now) {
    now = next_part(rows - r, kTileRows);
    product_of<false>(now)(a + r * row, row, column, b, ldb, c + r * ldc, ldc, depth);
  }
}

// A low-rank term of the product, or nothing: y += low transposed_b.
struct LowRank {
  at::Tensor low;  // fp32 [M, R]
  at::Tensor b;    // fp32 [R, N and more], zero where padded: kWidth columns from any block on
};

// Rows apart by a multiple of the size of a way of the cache would displace each other: 64 rows of
// 4096 bytes fill two sets of it. Between many rows there are this many elements more.
constexpr int64_t kApart = 128;

// fp32 [M, round_up(K, to) + apart], zero where padded.
at::Tensor float_rows(const at::Tensor& x, int64_t to, int64_t apart = 0);

// The ways to multiply: by codes that are decoded in registers, by a tile of the weight decoded to
// bytes, or all of a small one, by a tile decoded to pairs of bf16 (where the machine multiplies
// those; with their scales, rounded as a dense weight is, where AMX takes many rows) or to floats,
// by one decoded from the weight as it is stored, or by slabs decoded to floats, or to bf16 with
// their scales, and the library, or by panels of floats that are all of a small weight.
enum class Way {
  kFew,
  kFewPairs,
  kBytes,
  kWholeBytes,
  kPairs,
  kHalves,
  kFloats,
  kStored,
  kLibrary,
  kLibraryHalves,
  kPanels
};

// The way for `count` rows of a dtype; `plan_of` says it in words.
Way way_of(const Stored& w, int64_t count, at::ScalarType dtype, bool int8);
std::string plan_of(const Stored& w, int64_t count, at::ScalarType dtype, bool int8);

// y = x W^T + low b + bias, x of shape [M, K], in y's dtype;
// lowbit_product.cpp.
void multiply(const at::Tensor& x, const Stored& stored, const Packed* packed,
              const MaybeTensor& bias, const LowRank& low_rank, bool int8, const at::Tensor& y);

// y = x W + low b, of shapes [M, N] and [M, K], where that goes by products of bf16; else false.
// `layout`: the packed layout, asked for where it is read, which takes one that `can_pack`.
bool multiply_transposed(const at::Tensor& x, const Stored& w,
                         const std::function<std::shared_ptr<const Packed>()>& layout,
                         const LowRank& low_rank, const at::Tensor& y);

}  // namespace lowbit
}  // namespace CPU_CAPABILITY
}  // namespace cofire
