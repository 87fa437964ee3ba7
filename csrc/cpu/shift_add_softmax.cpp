// SPDX-License-Identifier: Apache-2.0
// binary_softmax_attention: softmax(scale S) V, where S counts bits that agree. A tile of queries
// goes over the keys block by block: distances of codes by tables of four bits, weights by a table
// of the distances, and the product of the weights with the values, where the time goes: in fp32,
// or in 16 bits, which is twice as fast, and on AMX in bytes, of which the products are put
// together.
//
// Softmax does not change when a constant is taken from the scores of a query, so that distances
// alone matter: scores are -step * distance. They are counted from the nearest key so far.
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "amx.h"
#include "instructions.h"
#include "lanes16.h"
#include "parts.h"
#include "shift_add_attention.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace shift_add {
namespace {

constexpr int64_t kKeys = 128;    // of a block
constexpr int64_t kQueries = 48;  // of a tile
constexpr int64_t kColumns = 16;  // of the values that are multiplied at a time
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kRows = 12;  // sums of a product in registers
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int64_t kRows = 6;
#else
constexpr int64_t kRows = 2;
#endif
constexpr int kFarthest = 64;
// In 16 bits a value is at most kMostValue, and the weights of a block sum up to at most kMostSum,
// so that a sum of their products fits into 32 bits.
constexpr int kMostValue = (1 << 13) - 1, kMostSum = (1 << 18) - 1;
static_assert(int64_t{kMostValue} * kMostSum < int64_t{1} << 31);

struct Sizes {
  int64_t queries, keys, d;
  int64_t groups;  // of four bits, by fours
  bool causal;

  int64_t blocks() const { return (keys + kKeys - 1) / kKeys; }
  int64_t columns() const { return (d + kColumns - 1) / kColumns * kColumns; }
};

// A table of numbers of 16 bits, as bytes.
struct Halves {
  alignas(16) uint8_t low[16], high[16];

  void set(int i, double x) {
    const auto whole = static_cast<unsigned>(std::lrint(x));
    low[i] = whole & 255;
    high[i] = static_cast<uint8_t>(whole >> 8);
  }
};

// What the weight of the nearest key of a block may be in 16 bits: four to each power of two.
constexpr int kScales = 4 * 13;
constexpr int scale_at(int i) { return (4 + i % 4) << (i / 4); }  // up to 7 << 12
// The largest that is not above x: exponent and first two digits of the float.
inline int scale_below(float x) {
  const int i = static_cast<int>(std::bit_cast<uint32_t>(x) >> 21) - (129 << 2);
  return std::clamp(i, 0, kScales - 1);
}

// What depends on the bits and the scale alone.
struct Tables {
  alignas(64) uint8_t distance[16][16];  // between four bits of a query and of a key
  alignas(64) float low[8], high[8];     // exp(-step i) and exp(-8 step i)
  float decay[kFarthest + 1];            // exp(-step i)
  Halves near, far[kScales];             // exp(-step i), and exp(-16 step i) times a scale
  // The key whose weight comes at each place of a block: bytes are looked up as they lie in words.
  uint8_t order[kKeys], order16[kKeys];

  Tables(double step, bool common) {
    for (unsigned q = 0; q < 16; ++q) {
      for (unsigned k = 0; k < 16; ++k) {
        distance[q][k] =
            static_cast<uint8_t>(common ? 4 - std::popcount(q & k) : std::popcount(q ^ k));
      }
    }
    for (int i = 0; i < 8; ++i) low[i] = static_cast<float>(std::exp(-step * i));
    for (int i = 0; i < 8; ++i) high[i] = static_cast<float>(std::exp(-8 * step * i));
    for (int i = 0; i <= kFarthest; ++i) decay[i] = static_cast<float>(std::exp(-step * i));
    for (int i = 0; i < 16; ++i) {
      near.set(i, 32767 * std::exp(-step * i));
      for (int j = 0; j < kScales; ++j) far[j].set(i, scale_at(j) * std::exp(-16 * step * i));
    }
    alignas(64) uint8_t lane[64];
    alignas(64) uint16_t stored[64];
    for (int i = 0; i < 64; ++i) lane[i] = static_cast<uint8_t>(i);
    first_pairs(W16::load(lane), W16::zero()).store(stored);
    second_pairs(W16::load(lane), W16::zero()).store(stored + 32);
    for (int i = 0; i < kKeys; ++i) {
      order[i] = static_cast<uint8_t>(i / 64 * 64 + i % 16 * 4 + i % 64 / 16);
      order16[i] = static_cast<uint8_t>(i / 64 * 64 + stored[i % 64]);
    }
  }

  const uint8_t* order_of(float) const { return order; }
  const uint8_t* order_of(int16_t) const { return order16; }
};

// ------------------------------------------------------------------- keys and values, prepared
// once

// The bits of a block of codes by fours: [groups][kKeys].
template <typename W>
void split(const W* codes, int64_t count, uint64_t mask, int64_t groups, uint8_t* out) {
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* p = out + g * kKeys;
    for (int64_t j = 0; j < kKeys; ++j) {
      const uint64_t code = static_cast<uint64_t>(codes[std::min(j, count - 1)]) & mask;
      p[j] = code >> (4 * g) & 15;
    }
  }
}

// f(c, load) for each kLanes columns from c on: load(j) are those of value j, zeros where there are
// none.
template <typename T, typename F>
void for_columns(const T* value, int64_t count, int64_t d, F&& f) {
  for (int64_t c = 0; c < (d + kColumns - 1) / kColumns * kColumns; c += kLanes) {
    const int64_t width = std::clamp<int64_t>(d - c, 0, kLanes);
    f(c, [=](int64_t j) {
      return j < count && width > 0 ? load_f32(value + j * d + c, width) : Vec(0.0f);
    });
  }
}

// A block of values by columns: [columns / kColumns][kKeys][kColumns].
template <typename T>
void arrange(const T* value, int64_t count, int64_t d, const uint8_t* order, float* out, float*) {
  for_columns(value, count, d, [&](int64_t c, auto&& load) {
    float* p = out + c / kColumns * kKeys * kColumns + c % kColumns;
    for (int64_t j = 0; j < kKeys; ++j) load(order[j]).store(p + j * kColumns);
  });
}

// The same in integers and a scale for each column, the values of two keys beside each other:
// [columns / kColumns][kKeys / 2][kColumns][2].
template <typename T>
void arrange(const T* value, int64_t count, int64_t d, const uint8_t* order, int16_t* out,
             float* scales) {
  for_columns(value, count, d, [&](int64_t c, auto&& load) {
    Vec largest(0.0f);
    for (int64_t j = 0; j < count; ++j) largest = at::vec::maximum(largest, load(j).abs());
    alignas(64) float inverse[kLanes];
    (largest * Vec(1.0f / kMostValue)).store(scales + c);
    largest.store(inverse);
    for (float& x : inverse) x = std::isfinite(kMostValue / x) ? kMostValue / x : 0.0f;  // of zeros
    const Vec by = Vec::loadu(inverse);
    // (What is not finite becomes 0 here: the scale says what it was.)
    const auto whole = [&](int64_t j) {
      return at::vec::convert_to_int_of_same_size((load(order[j]) * by).round());
    };
    const at::vec::Vectorized<int32_t> lower(0xffff), bits(16);
    int16_t* p = out + (c / kColumns * kKeys * kColumns + c % kColumns * 2);
    for (int64_t j = 0; j < kKeys; j += 2) {
      ((whole(j + 1) << bits) | (whole(j) & lower)).store(p + j * kColumns);
    }
  });
}

// The same for AMX: [columns / kColumns][2][kKeys / 4][kColumns][4] bytes, the high and the low
// ones, both signed.
inline void to_planes(int64_t columns, int16_t* values) {
  alignas(64) int16_t copy[kKeys * kColumns];
  for (int64_t c = 0; c < columns; c += kColumns, values += kKeys * kColumns) {
    std::copy_n(values, kKeys * kColumns, copy);
    auto* high = reinterpret_cast<int8_t*>(values);
    int8_t* low = high + kKeys * kColumns;
    for (int64_t k = 0; k < kKeys; ++k) {
      for (int64_t i = 0; i < kColumns; ++i) {
        const int16_t value = copy[k / 2 * kColumns * 2 + i * 2 + k % 2];
        const auto part = static_cast<int8_t>(value);
        const int64_t at = (k / 4 * kColumns + i) * 4 + k % 4;
        low[at] = part;
        high[at] = static_cast<int8_t>((value - part) >> 8);
      }
    }
  }
}

// ------------------------------------------------------------------------------ a tile of queries

// How weights and values are multiplied.
enum class By { kVectors, kVnni, kAmx };

By fastest() { return amx::found() ? By::kAmx : has_vnni() ? By::kVnni : By::kVectors; }

// What a thread works with.
template <typename P>
struct Workspace {
  alignas(64) P weights[kQueries * kKeys];
  alignas(64) uint8_t distances[kQueries * kKeys];
  alignas(64) uint8_t high[kQueries * kKeys], low[kQueries * kKeys];  // bytes of weights, for AMX
  float factor[kQueries];                                             // of a block's weights
  float total[kQueries];                                              // of all weights
  int near[kQueries];   // the least distance of a block
  int least[kQueries];  // the least so far
  uint64_t codes[kQueries] = {};
  at::Tensor sums;  // [kQueries][columns]
};

constexpr int64_t kWords = kKeys / 64;

// The distances of N codes from a block of keys, and the least of each.
template <int N>
COFIRE_INLINE void measure(const uint64_t* codes, const uint8_t* planes, int64_t groups,
                           const Tables& tables, uint8_t* out, int* least) {
  W16 sum[N][kWords];
  unrolled<N>([&](auto n) { unrolled<kWords>([&](auto w) { sum[n()][w()] = W16::zero(); }); });
  for (int64_t g = 0; g < groups; g += 4, planes += 4 * kKeys) {
    uint64_t part[N];
    unrolled<N>([&](auto n) { part[n()] = codes[n()] >> (4 * g); });
    unrolled<4>([&](auto i) {
      W16 keys[kWords];
      unrolled<kWords>([&](auto w) { keys[w()] = W16::load(planes + i() * kKeys + 64 * w()); });
      unrolled<N>([&](auto n) {
        const Bytes16 table(tables.distance[part[n()] >> (4 * i()) & 15]);
        unrolled<kWords>(
            [&](auto w) { sum[n()][w()] = add_bytes(sum[n()][w()], table[keys[w()]]); });
      });
    });
  }
  unrolled<N>([&](auto n) {
    W16 lowest = sum[n()][0];
    unrolled<kWords>([&](auto w) {
      sum[n()][w()].store(out + n() * kKeys + 64 * w());
      lowest = min_bytes(lowest, sum[n()][w()]);
    });
    least[n()] = least_byte(lowest);
  });
}

// f(place, low, high) for 16 keys each: exp(-step (distance - least)) is the product of the two.
template <typename F>
COFIRE_INLINE void look_up(const uint8_t* distances, int least, const Tables& tables, F&& f) {
  const Table8 near(tables.low), far(tables.high);
  const W16 offset = W16::all(static_cast<uint32_t>(least) * 0x01010101u);
  unrolled<kWords>([&](auto w) {
    const W16 i = subtract_bytes(W16::load(distances + 64 * w()), offset);
    unrolled<4>([&](auto j) {
      f(64 * w() + 16 * j(), near[shift_right<8 * j()>(i)], far[shift_right<8 * j() + 3>(i)]);
    });
  });
}

// Whether a key is farther from the nearest than the tables reach: all bits of 64.
COFIRE_INLINE bool beyond(const uint8_t* distances, int least) {
  if (least > 0) return false;
  bool found = false;
  for (int64_t k = 0; k < kKeys; ++k) found |= distances[k] >= kFarthest;
  return found;
}

// No weights for keys that a query does not see.
template <typename P>
void forget(const uint8_t* order, int64_t valid, P* weights) {
  const auto end = static_cast<uint8_t>(valid);
  for (int64_t i = 0; i < kKeys; ++i) weights[i] = order[i] < end ? weights[i] : P{};
}

// The weights of a row, relative to the least distance so far; their sum.
COFIRE_INLINE float weigh(const uint8_t* distances, int64_t valid, int, int least, float,
                          const Tables& tables, float* out, float* factor) {
  *factor = 1.0f;
  if (beyond(distances, least)) {
    for (int64_t i = 0; i < kKeys; ++i) out[i] = tables.decay[distances[tables.order[i]] - least];
  } else {
    look_up(distances, least, tables,
            [&](int64_t i, F16 low, F16 high) { (low * high).store(out + i); });
  }
  if (valid < kKeys) forget(tables.order, valid, out);
  F16 sum = F16::zero();
  for (int64_t i = 0; i < kKeys; i += 16) sum = sum + F16::load(out + i);
  return sum_of(sum);
}

// The same in integers, relative to the nearest key of the block, and what they are a multiple of.
// `expected` is the sum of the weights of a block so far.
COFIRE_INLINE float weigh(const uint8_t* distances, int64_t valid, int near, int least,
                          float expected, const Tables& tables, int16_t* out, float* factor) {
  const float unit = tables.decay[near - least];
  // Not all that they may sum up to: this block may have more.
  const float most = 0.85f * kMostSum * unit / std::max(expected, 1e-30f);
  int chosen = scale_below(most);
  const Bytes16 low(tables.near.low), high(tables.near.high);
  const W16 offset = W16::all(static_cast<uint32_t>(near) * 0x01010101u);
  const W16 digit = W16::all(0x0f0f0f0fu);
  for (;; --chosen) {
    const Bytes16 far_low(tables.far[chosen].low), far_high(tables.far[chosen].high);
    unrolled<kWords>([&](auto w) {
      const W16 x = subtract_bytes(W16::load(distances + 64 * w()), offset);
      const W16 i = x & digit, j = shift_right<4>(x) & digit;
      const W16 a = low[i], b = high[i], c = far_low[j], d = far_high[j];
      fraction_products(first_pairs(a, b), first_pairs(c, d)).store(out + 64 * w());
      fraction_products(second_pairs(a, b), second_pairs(c, d)).store(out + 64 * w() + 32);
    });
    if (valid < kKeys) forget(tables.order16, valid, out);
    W16 sums = W16::zero();
    for (int64_t i = 0; i < kKeys; i += 32) {
      sums = dot_pairs(sums, W16::load(out + i), W16::all(0x00010001u));
    }
    const float sum = sum_of(to_float(sums));  // exact: below 2^24
    if (sum <= kMostSum) [[likely]] {
      *factor = unit / static_cast<float>(scale_at(chosen));
      return sum * *factor;
    }
  }
}

// sums += weights [kRows][kKeys] times values [kKeys][kColumns], of the first `depth` keys.
template <bool>
COFIRE_INLINE void multiply(const float* weights, const float* values, int64_t depth, const float*,
                            const float*, float* sums, int64_t stride) {
  F16 acc[kRows];
  COFIRE_UNROLL
  for (int r = 0; r < kRows; ++r) acc[r] = F16::zero();
  for (int64_t k = 0; k < depth; ++k) {
    const F16 x = F16::load(values + k * kColumns);
    COFIRE_UNROLL
    for (int r = 0; r < kRows; ++r) acc[r] = fma(F16::all(weights[r * kKeys + k]), x, acc[r]);
  }
  COFIRE_UNROLL
  for (int r = 0; r < kRows; ++r) (F16::load(sums + r * stride) + acc[r]).store(sums + r * stride);
}

template <bool Vnni>
COFIRE_INLINE void multiply(const int16_t* weights, const int16_t* values, int64_t depth,
                            const float* scales, const float* factors, float* sums,
                            int64_t stride) {
  W16 acc[kRows];
  COFIRE_UNROLL
  for (int r = 0; r < kRows; ++r) acc[r] = W16::zero();
  for (int64_t k = 0; k < depth; k += 4) {
    unrolled<2>([&](auto half) {
      const W16 x = W16::load(values + (k + 2 * half()) * kColumns);
      COFIRE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        uint32_t pair;
        std::memcpy(&pair, weights + r * kKeys + k + 2 * half(), sizeof(pair));
        acc[r] = dot_pairs<Vnni>(acc[r], W16::all(pair), x);
      }
    });
  }
  const F16 scale = F16::load(scales);
  COFIRE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float* p = sums + r * stride;
    fma(to_float(acc[r]) * scale, F16::all(factors[r]), F16::load(p)).store(p);
  }
}

// The products of a block in bytes: sums [rows][stride] of queries times columns, as above.
template <typename P>
void multiply_on_amx(Workspace<P>& ws, const P* values, int64_t rows, int64_t columns,
                     int64_t depth, const float* scales, float* sums) {
#if defined(COFIRE_AMX)
  if constexpr (std::is_same_v<P, int16_t>) {
    for (int64_t i = 0; i < rows * kKeys; ++i) {
      ws.high[i] = static_cast<uint8_t>(ws.weights[i] >> 8);
      ws.low[i] = static_cast<uint8_t>(ws.weights[i]);
    }
    alignas(64) int32_t parts[3 * amx::kRows * kColumns];
    for (int64_t c = 0; c < columns; c += kColumns) {
      const auto* high = reinterpret_cast<const int8_t*>(values + c * kKeys);
      const F16 scale = F16::load(scales + c);
      for (int64_t r = 0; r < rows; r += amx::kRows) {
        amx::multiply_planes(ws.high + r * kKeys, ws.low + r * kKeys, kKeys, high,
                             high + kKeys * kColumns, depth / 64, parts);
        for (int64_t i = 0; i < amx::kRows; ++i) {
          const auto part = [&](int64_t k) {
            return _mm512_load_si512(parts + (k * amx::kRows + i) * kColumns);
          };
          const __m512i whole = _mm512_add_epi32(
              _mm512_slli_epi32(_mm512_add_epi32(_mm512_slli_epi32(part(0), 8), part(1)), 8),
              part(2));
          float* p = sums + (r + i) * columns + c;
          fma(to_float(W16{whole}) * scale, F16::all(ws.factor[r + i]), F16::load(p)).store(p);
        }
      }
    }
  }
#endif
}

// The keys and values of a set.
template <typename P>
struct Prepared {
  const uint8_t* planes;
  const P* values;
  const float* scales;
};

// The outputs of the queries [first, first + rows) of a set; their codes are in the workspace.
template <By How, typename P, typename T>
void attend(const Sizes& s, const Prepared<P>& set, const Tables& tables, int64_t first,
            int64_t rows, Workspace<P>& ws, T* out) {
  constexpr int64_t kTogether = How == By::kAmx ? amx::kRows : kRows;
  static_assert(kQueries % kTogether == 0);
  const int64_t columns = s.columns(), end = (rows + kTogether - 1) / kTogether * kTogether;
#if defined(COFIRE_AMX)
  amx::Registers registers;
  if constexpr (How == By::kAmx) registers.square();
#endif
  float* sums = ws.sums.template data_ptr<float>();
  std::fill_n(sums, end * columns, 0.0f);
  std::fill(ws.weights + rows * kKeys, ws.weights + end * kKeys, P{});
  std::fill_n(ws.factor, kQueries, 0.0f);
  std::fill_n(ws.total, kQueries, 0.0f);
  std::fill_n(ws.least, kQueries, -1);
  for (int64_t b = 0; b < s.blocks(); ++b) {
    if (s.causal && b * kKeys >= first + rows) break;
    const uint8_t* planes = set.planes + b * s.groups * kKeys;
    const auto valid = [&](int64_t r) {
      return std::min(kKeys, (s.causal ? std::min(s.keys, first + r + 1) : s.keys) - b * kKeys);
    };
    for (int64_t r = 0; r < rows; r += 2) {  // (of one more, that is not used, where they are odd)
      measure<2>(ws.codes + r, planes, s.groups, tables, ws.distances + r * kKeys, ws.near + r);
    }
    for (int64_t r = 0; r < rows; ++r) {
      P* weights = ws.weights + r * kKeys;
      if (valid(r) <= 0) {
        std::fill_n(weights, kKeys, P{});
        continue;
      }
      const uint8_t* distances = ws.distances + r * kKeys;
      const int before = ws.least[r];
      // (beyond the last key there are copies of it)
      const bool cut = s.causal && valid(r) < kKeys;
      const int near = cut ? *std::min_element(distances, distances + valid(r)) : ws.near[r];
      ws.least[r] = before < 0 ? near : std::min(before, near);
      if (near < before) {
        const float by = tables.decay[before - near];
        ws.total[r] *= by;
        for (int64_t c = 0; c < columns; ++c) sums[r * columns + c] *= by;
      }
      const float expected = b > 0 ? ws.total[r] / static_cast<float>(b) : 0.0f;
      ws.total[r] +=
          weigh(distances, valid(r), near, ws.least[r], expected, tables, weights, ws.factor + r);
    }
    const int64_t depth = std::min(kKeys, (s.keys - b * kKeys + 63) / 64 * 64);
    const P* values = set.values + b * kKeys * columns;
    const float* scales = set.scales + b * columns;
    if constexpr (How == By::kAmx) {
      multiply_on_amx(ws, values, end, columns, depth, scales, sums);
      continue;
    }
    for (int64_t c = 0; c < columns; c += kColumns) {
      for (int64_t r = 0; r < end; r += kRows) {
        multiply<How == By::kVnni>(ws.weights + r * kKeys, values + c * kKeys, depth, scales + c,
                                   ws.factor + r, sums + r * columns + c, columns);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Vec inverse(1 / ws.total[r]);
    for (int64_t c = 0; c < s.d; c += kLanes) {
      store_f32(out + r * s.d + c, Vec::loadu(sums + r * columns + c) * inverse,
                std::min(kLanes, s.d - c));
    }
  }
}

// All sets: values of T, codes of W, products of P.
template <typename P, typename T, typename W>
void attend_all(const Sizes& s, const Tables& tables, int64_t sets, uint64_t mask, const W* query,
                const W* key, const T* value, T* out) {
  const int64_t blocks = s.blocks(), columns = s.columns();
  constexpr bool whole = std::is_same_v<P, int16_t>;
  const By how = whole ? fastest() : By::kVectors;
  at::Tensor planes = at::empty({sets * blocks * s.groups * kKeys}, at::kByte);
  at::Tensor values = at::empty({sets * blocks * kKeys * columns}, whole ? at::kShort : at::kFloat);
  at::Tensor scales = at::empty({sets * blocks * columns}, at::kFloat);
  auto* plane = planes.data_ptr<uint8_t>();
  auto* prepared = values.data_ptr<P>();
  auto* scale = scales.data_ptr<float>();
  in_turns(sets * blocks, [&](int64_t i) {
    const int64_t at_ = i % blocks * kKeys, from = i / blocks * s.keys + at_,
                  count = std::min(kKeys, s.keys - at_);
    split(key + from, count, mask, s.groups, plane + i * s.groups * kKeys);
    arrange(value + from * s.d, count, s.d, tables.order_of(P{}), prepared + i * kKeys * columns,
            scale + i * columns);
    if constexpr (whole) {
      if (how == By::kAmx) to_planes(columns, prepared + i * kKeys * columns);
    }
  });
  const int64_t tiles = (s.queries + kQueries - 1) / kQueries;
  in_turns(sets * tiles, [&](int64_t i) {
    thread_local std::unique_ptr<Workspace<P>> ws;
    if (!ws) ws = std::make_unique<Workspace<P>>();
    if (!ws->sums.defined() || ws->sums.numel() < kQueries * columns) {
      ws->sums = at::empty({kQueries * columns}, at::kFloat);
    }
    const int64_t set = i / tiles, first = i % tiles * kQueries,
                  rows = std::min(kQueries, s.queries - first), from = set * s.queries + first;
    for (int64_t r = 0; r < rows; ++r) ws->codes[r] = static_cast<uint64_t>(query[from + r]) & mask;
    const Prepared<P> keys = {plane + set * blocks * s.groups * kKeys,
                              prepared + set * blocks * kKeys * columns,
                              scale + set * blocks * columns};
    const auto run = [&](auto by) {
      attend<by()>(s, keys, tables, first, rows, *ws, out + from * s.d);
    };
    if constexpr (whole) {
      if (how == By::kAmx) return run(std::integral_constant<By, By::kAmx>{});
      if (how == By::kVnni) return run(std::integral_constant<By, By::kVnni>{});
    }
    run(std::integral_constant<By, By::kVectors>{});
  });
}

using Optional = std::optional<at::Tensor>;

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t bits,
           double scale) {
  TORCH_CHECK(value.dim() == 4 && bits >= 1 && bits <= 64 && scale > 0 &&
                  query.scalar_type() == word_of(bits) && key.scalar_type() == word_of(bits) &&
                  query.dim() == 3 && query.sizes().slice(0, 2) == value.sizes().slice(0, 2) &&
                  key.sizes() == value.sizes().slice(0, 3),
              "binary_softmax_attention: codes do not fit value");
}

// -------------------------------------------------------------------------------------- backward

// Of rows [first, first + count) of a set: from the gradient of their weights that of their scores,
// times `slope`, in its place, and their weights. Rows have the stride `ld`, whole blocks.
template <typename W>
void differentiate(const Sizes& s, const Tables& tables, const W* query, uint64_t mask,
                   const uint8_t* planes, int64_t first, int64_t count, int64_t columns, int64_t ld,
                   float slope, float* weights, float* to_scores) {
  const int64_t blocks = (columns + kKeys - 1) / kKeys;
  std::vector<uint8_t> distances(blocks * kKeys);
  for (int64_t r = 0; r < count; ++r) {
    const uint64_t code = static_cast<uint64_t>(query[r]) & mask;
    const int64_t seen = s.causal ? std::min(columns, first + r + 1) : columns;
    float *p = weights + r * ld, *g = to_scores + r * ld;
    for (int64_t b = 0; b < blocks; ++b) {
      int unused;
      measure<1>(&code, planes + b * s.groups * kKeys, s.groups, tables,
                 distances.data() + b * kKeys, &unused);
    }
    const int least = *std::min_element(distances.data(), distances.data() + seen);
    const Table8 near(tables.low), far(tables.high);
    const W16 offset = W16::all(static_cast<uint32_t>(least) * 0x01010101u);
    for (int64_t b = 0; b < (seen + kKeys - 1) / kKeys; ++b) {
      alignas(64) uint8_t index[kKeys];
      for (int64_t w = 0; w < kKeys; w += 64) {
        subtract_bytes(W16::load(distances.data() + b * kKeys + w), offset).store(index + w);
      }
      float* out = p + b * kKeys;
      for (int64_t k = 0; k < kKeys; k += 16) {
        const W16 i = W16::from_bytes(index + k);
        (near[i] * far[shift_right<3>(i)]).store(out + k);
      }
      if (!beyond(index, 0)) continue;
      for (int64_t k = 0; k < kKeys; ++k) out[k] = tables.decay[std::min<int>(index[k], kFarthest)];
    }
    Vec total(0.0f), along(0.0f);
    for (int64_t k = 0; k < seen; k += kLanes) {
      const int64_t n = std::min(kLanes, seen - k);
      const Vec x = Vec::loadu(p + k, n);
      total = total + x;
      along = at::vec::fmadd(x, Vec::loadu(g + k, n), along);
    }
    const float inverse = 1 / reduce_add(total);
    const Vec part(inverse), mean(reduce_add(along) * inverse), by(slope * inverse);
    for (int64_t k = 0; k < seen; k += kLanes) {
      const int64_t n = std::min(kLanes, seen - k);
      const Vec x = Vec::loadu(p + k, n);
      (x * by * (Vec::loadu(g + k, n) - mean)).store(g + k, n);
      (x * part).store(p + k, n);
    }
    std::fill(p + seen, p + columns, 0.0f);
    std::fill(g + seen, g + columns, 0.0f);
  }
}

// Codes as the floats that their bits stand for: [sets, tokens, bits].
template <typename W>
at::Tensor features(const W* codes, int64_t sets, int64_t tokens, int64_t bits, bool common) {
  at::Tensor result = at::empty({sets, tokens, bits}, at::kFloat);
  float* out = result.data_ptr<float>();
  const float zero = common ? 0.0f : -1.0f;
  for (int64_t n = 0; n < sets * tokens; ++n) {
    for (int64_t i = 0; i < bits; ++i) {
      *out++ = static_cast<uint64_t>(codes[n]) >> i & 1 ? 1.0f : zero;
    }
  }
  return result;
}

}  // namespace

at::Tensor binary_softmax_attention(const at::Tensor& query, const at::Tensor& key,
                                    const at::Tensor& value, const Optional& query_link,
                                    const Optional& key_link, int64_t bits, double scale,
                                    std::string_view kind, bool causal,
                                    std::string_view precision) {
  if (!covered(value)) {
    return reference("cofire::binary_softmax_attention", &binary_softmax_attention, query, key,
                     value, query_link, key_link, bits, scale, kind, causal, precision);
  }
  check(query, key, value, bits, scale);
  const at::Tensor q = query.contiguous(), k = key.contiguous(), x = value.contiguous();
  const Sizes s = {q.size(2), x.size(2), x.size(3), (bits + 15) / 16 * 4, causal};
  const int64_t sets = x.size(0) * x.size(1);
  auto shape = q.sizes().vec();
  shape.push_back(s.d);
  if (s.keys == 0) return at::zeros(shape, x.options());
  at::Tensor result = at::empty(shape, x.options());
  if (result.numel() == 0) return result;
  const bool common = kind == "binary";
  const Tables tables(common ? scale : 2 * scale, common);
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    for_word(bits, [&](auto c) {
      using W = decltype(c);
      const auto run = [&](auto p) {
        attend_all<decltype(p), T, W>(s, tables, sets, mask_of(bits), q.const_data_ptr<W>(),
                                      k.const_data_ptr<W>(), x.const_data_ptr<T>(),
                                      result.data_ptr<T>());
      };
      precision == "high" ? run(int16_t{}) : run(float{});
    });
  });
  return result;
}

using SoftmaxGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Weights and their gradients of a tile of queries at a time, small enough for a cache; the
// products are the library's.
SoftmaxGradients binary_softmax_attention_backward(const at::Tensor& grad, const at::Tensor& query,
                                                   const at::Tensor& key, const at::Tensor& value,
                                                   const Optional& query_link,
                                                   const Optional& key_link, int64_t bits,
                                                   double scale, std::string_view kind,
                                                   bool causal) {
  if (!covered(value) || is_double(grad)) {
    return reference("cofire::binary_softmax_attention_backward",
                     &binary_softmax_attention_backward, grad, query, key, value, query_link,
                     key_link, bits, scale, kind, causal);
  }
  check(query, key, value, bits, scale);
  const Sizes s = {query.size(2), value.size(2), value.size(3), (bits + 15) / 16 * 4, causal};
  auto shape = query.sizes().vec();
  shape.push_back(s.d);
  TORCH_CHECK(grad.sizes() == at::IntArrayRef(shape),
              "binary_softmax_attention_backward: grad must have the shape of the output");
  const int64_t sets = value.size(0) * value.size(1), columns = s.keys, ld = s.blocks() * kKeys;
  const at::Tensor g = grad.to(at::kFloat).contiguous().view({sets, s.queries, s.d});
  const at::Tensor v = value.to(at::kFloat).contiguous().view({sets, columns, s.d});
  const at::Tensor q = query.contiguous(), k = key.contiguous();
  at::Tensor to_value = at::zeros(v.sizes(), v.options()), to_query, to_key;
  if (query_link) to_query = at::zeros({sets, s.queries, bits}, v.options());
  if (key_link) to_key = at::zeros({sets, columns, bits}, v.options());
  const bool common = kind == "binary";
  const Tables tables(common ? scale : 2 * scale, common);
  const auto slope = static_cast<float>(common ? scale : 2 * scale);  // of a score, by a bit
  if (g.numel() > 0 && columns > 0) {
    for_word(bits, [&](auto c) {
      using W = decltype(c);
      const W *query_codes = q.const_data_ptr<W>(), *key_codes = k.const_data_ptr<W>();
      const uint64_t mask = mask_of(bits);
      at::Tensor planes = at::empty({sets * s.blocks() * s.groups * kKeys}, at::kByte);
      auto* plane = planes.data_ptr<uint8_t>();
      in_turns(sets * s.blocks(), [&](int64_t i) {
        const int64_t begin = i % s.blocks() * kKeys;
        split(key_codes + i / s.blocks() * columns + begin, std::min(kKeys, columns - begin), mask,
              s.groups, plane + i * s.groups * kKeys);
      });
      at::Tensor queries, keys;
      if (key_link) queries = features(query_codes, sets, s.queries, bits, common);
      if (query_link) keys = features(key_codes, sets, columns, bits, common);
      constexpr int64_t kEntries = 1 << 20;  // of a matrix of weights
      const int64_t rows = std::min(s.queries, std::max<int64_t>(32, kEntries / ld)),
                    together =
                        rows < s.queries ? 1 : std::clamp<int64_t>(kEntries / (rows * ld), 1, sets);
      at::Tensor weights = at::empty({together * rows * ld}, v.options());
      at::Tensor scores = at::empty({together * rows * ld}, v.options());
      for (int64_t set = 0; set < sets; set += together) {
        const int64_t some = std::min(together, sets - set);
        for (int64_t n = 0; n < s.queries; n += rows) {
          const int64_t count = std::min(rows, s.queries - n);
          const int64_t seen = causal ? std::min(columns, n + count) : columns;
          const auto tile = [&](const at::Tensor& whole, int64_t width) {
            return whole.narrow(0, 0, some * count * ld)
                .view({some, count, ld})
                .narrow(2, 0, width);
          };
          at::Tensor p = tile(weights, seen), to_scores = tile(scores, seen);
          const at::Tensor part = g.narrow(0, set, some).narrow(1, n, count);
          const at::Tensor v_ = v.narrow(0, set, some).narrow(1, 0, seen);
          at::bmm_out(to_scores, part, v_.transpose(1, 2));
          constexpr int64_t kSome = 16;
          const int64_t chunks = (count + kSome - 1) / kSome;
          in_turns(some * chunks, [&](int64_t i) {
            const int64_t of = i / chunks, first = i % chunks * kSome;
            const int64_t at_ = (of * count + first) * ld;
            differentiate(s, tables, query_codes + (set + of) * s.queries + n + first, mask,
                          plane + (set + of) * s.blocks() * s.groups * kKeys, n + first,
                          std::min(kSome, count - first), seen, ld, slope,
                          weights.data_ptr<float>() + at_, scores.data_ptr<float>() + at_);
          });
          to_value.narrow(0, set, some).narrow(1, 0, seen).baddbmm_(p.transpose(1, 2), part);
          if (query_link) {
            at::Tensor out = to_query.narrow(0, set, some).narrow(1, n, count);
            out.baddbmm_(to_scores, keys.narrow(0, set, some).narrow(1, 0, seen));
          }
          if (key_link) {
            to_key.narrow(0, set, some)
                .narrow(1, 0, seen)
                .baddbmm_(to_scores.transpose(1, 2),
                          queries.narrow(0, set, some).narrow(1, n, count));
          }
        }
      }
    });
  }
  const auto result = [&](const at::Tensor& found, const at::Tensor& codes) {
    if (!found.defined()) return at::empty({0}, value.options());
    auto sizes = codes.sizes().vec();
    sizes.push_back(bits);
    return found.view(sizes).to(value.scalar_type());
  };
  return {to_value.view(value.sizes()).to(value.scalar_type()), result(to_query, query),
          result(to_key, key)};
}

}  // namespace shift_add
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("binary_softmax_attention", &cofire::shift_add::binary_softmax_attention);
  m.impl("binary_softmax_attention_backward",
         &cofire::shift_add::binary_softmax_attention_backward);
}
