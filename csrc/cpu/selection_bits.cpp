// SPDX-License-Identifier: Apache-2.0
// pack_mask, unpack_mask, transpose_mask and mask_offsets: packed masks, one bit per entry.
#include <ATen/ops/empty.h>

#include "selection.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace bits {
namespace {

int64_t bytes_of(int64_t columns) { return (columns + 7) / 8; }

// Eight bytes in the order of their addresses, the first in the lowest bits.
uint64_t load_eight(const void* from, int64_t count = 8) {
  uint64_t word = 0;
  std::memcpy(&word, from, count);
  return word;
}

constexpr uint64_t kOnes = 0x0101010101010101;

// 1 in each byte that is not zero.
uint64_t set_bytes(uint64_t word) {
  constexpr uint64_t low = 0x7f * kOnes;
  return (((word & low) + low) | word) >> 7 & kOnes;
}

uint8_t pack_eight(uint64_t word) {
  return static_cast<uint8_t>(set_bytes(word) * 0x0102040810204080 >> 56);
}

// Bit j becomes byte j.
uint64_t unpack_eight(uint8_t bits) { return set_bytes(bits * kOnes & 0x8040201008040201); }

void pack_row(const uint8_t* mask, int64_t columns, uint8_t* out) {
  int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  for (; i + 32 <= columns; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + i));
    const auto unset =
        static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
    const uint32_t set = ~unset;
    std::memcpy(out + i / 8, &set, 4);
  }
#endif
  for (; i + 8 <= columns; i += 8) out[i / 8] = pack_eight(load_eight(mask + i));
  if (i < columns) out[i / 8] = pack_eight(load_eight(mask + i, columns - i));
}

at::Tensor pack_mask(const at::Tensor& mask) {
  TORCH_CHECK_VALUE(mask.dim() == 2, "pack_mask: mask must have shape [rows, columns]");
  const bool bytes = mask.scalar_type() == at::kBool || mask.scalar_type() == at::kByte;
  const at::Tensor m = (bytes ? mask : mask.to(at::kBool)).contiguous();
  const int64_t rows = m.size(0), columns = m.size(1);
  at::Tensor result = at::empty({rows, bytes_of(columns)}, m.options().dtype(at::kByte));
  const auto* from = static_cast<const uint8_t*>(m.const_data_ptr());
  auto* out = result.data_ptr<uint8_t>();
  at::parallel_for(0, rows, grain_of(columns / 4), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      pack_row(from + r * columns, columns, out + r * bytes_of(columns));
    }
  });
  return result;
}

void check_bits(const at::Tensor& bits, int64_t columns) {
  TORCH_CHECK_VALUE(bits.scalar_type() == at::kByte && bits.dim() == 2 && columns >= 0 &&
                        bits.size(1) == bytes_of(columns),
                    "bits must be uint8 [N, ceil(columns / 8)]");
}

at::Tensor unpack_mask(const at::Tensor& bits, int64_t columns) {
  check_bits(bits, columns);
  const at::Tensor b = bits.contiguous();
  const int64_t rows = b.size(0), width = b.size(1);
  at::Tensor result = at::empty({rows, columns}, b.options().dtype(at::kBool));
  const auto* from = b.const_data_ptr<uint8_t>();
  auto* out = static_cast<uint8_t*>(result.data_ptr());
  at::parallel_for(0, rows, grain_of(columns / 4), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      uint8_t* row = out + r * columns;
      int64_t i = 0;
      for (; 8 * i + 8 <= columns; ++i) {
        const uint64_t eight = unpack_eight(from[r * width + i]);
        std::memcpy(row + 8 * i, &eight, 8);
      }
      if (8 * i < columns) {
        const uint64_t eight = unpack_eight(from[r * width + i]);
        std::memcpy(row + 8 * i, &eight, columns - 8 * i);
      }
    }
  });
  return result;
}

// Bit c of byte r becomes bit r of byte c.
uint64_t transpose_eight(uint64_t x) {
  uint64_t t = (x ^ x >> 7) & 0x00aa00aa00aa00aa;
  x ^= t ^ t << 7;
  t = (x ^ x >> 14) & 0x0000cccc0000cccc;
  x ^= t ^ t << 14;
  t = (x ^ x >> 28) & 0x00000000f0f0f0f0;
  return x ^ t ^ t << 28;
}

constexpr int64_t kTile = 64;  // bytes of a row, and rows eight at a time: a few lines each way

at::Tensor transpose_mask(const at::Tensor& bits, int64_t columns) {
  check_bits(bits, columns);
  const at::Tensor b = bits.contiguous();
  const int64_t rows = b.size(0), width = b.size(1), height = bytes_of(rows);
  at::Tensor result = at::empty({columns, height}, b.options());
  const auto* from = b.const_data_ptr<uint8_t>();
  auto* out = result.data_ptr<uint8_t>();
  // A task is a stretch of columns: its output rows are nobody else's.
  const int64_t tasks = (width + kTile - 1) / kTile;
  at::parallel_for(0, tasks, grain_of(kTile * rows / 8), [&](int64_t begin, int64_t end) {
    for (int64_t block = 0; block < height; block += kTile) {
      for (int64_t i = begin * kTile; i < std::min(end * kTile, width); ++i) {
        alignas(64) uint8_t turned[8][kTile];
        const int64_t blocks = std::min(kTile, height - block);
        for (int64_t j = 0; j < blocks; ++j) {
          const int64_t first = 8 * (block + j);
          uint64_t word = 0;
          for (int64_t r = 0; r < std::min<int64_t>(8, rows - first); ++r) {
            word |= static_cast<uint64_t>(from[(first + r) * width + i]) << (8 * r);
          }
          word = transpose_eight(word);
          for (int c = 0; c < 8; ++c) turned[c][j] = static_cast<uint8_t>(word >> (8 * c));
        }
        for (int64_t c = 0; c < std::min<int64_t>(8, columns - 8 * i); ++c) {
          std::memcpy(out + (8 * i + c) * height + block, turned[c], blocks);
        }
      }
    }
  });
  return result;
}

int64_t count_bits(const uint8_t* bits, int64_t n) {
  int64_t total = 0, i = 0;
  for (; i + 8 <= n; i += 8) total += __builtin_popcountll(load_eight(bits + i));
  return total + __builtin_popcountll(load_eight(bits + i, n - i));
}

at::Tensor mask_offsets(const at::Tensor& bits) {
  TORCH_CHECK_VALUE(bits.scalar_type() == at::kByte && bits.dim() == 2,
                    "mask_offsets: bits must be uint8 [N, ceil(columns / 8)]");
  const at::Tensor b = bits.contiguous();
  const int64_t rows = b.size(0), width = b.size(1);
  at::Tensor result = at::empty({rows + 1}, b.options().dtype(at::kLong));
  const auto* from = b.const_data_ptr<uint8_t>();
  auto* out = result.data_ptr<int64_t>();
  at::parallel_for(0, rows, grain_of(width / 4), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) out[r + 1] = count_bits(from + r * width, width);
  });
  out[0] = 0;
  for (int64_t r = 0; r < rows; ++r) out[r + 1] += out[r];
  return result;
}

}  // namespace
}  // namespace bits
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("pack_mask", &cofire::bits::pack_mask);
  m.impl("unpack_mask", &cofire::bits::unpack_mask);
  m.impl("transpose_mask", &cofire::bits::transpose_mask);
  m.impl("mask_offsets", &cofire::bits::mask_offsets);
}
