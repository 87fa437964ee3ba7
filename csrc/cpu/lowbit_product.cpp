// SPDX-License-Identifier: Apache-2.0
// Products with a packed weight: y = x W^T.
//
// Two inner loops each for floats, for bytes and for pairs of bf16, and one for bytes of a small
// weight. With a few rows of x the codes are decoded in registers and used there (decoding is
// most of the work, reading the weight the limit). With more, a tile of the weight is decoded into
// the first-level cache and multiplied by blocks of rows. The work is cut by rows of the weight,
// and of x, and no sum is cut, so results do not depend on the number of threads.
#include <ATen/Context.h>
#include <ATen/ops/mm.h>

#include <bit>
#include <cmath>
#include <limits>

#include "amx.h"
#include "instructions.h"
#include "lines.h"
#include "lowbit.h"
#include "one_thread.h"
#include "pages.h"
#include "panels.h"
#include "parts.h"
#include "rounding.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace lowbit {

namespace {

// Of x, multiplied by one tile of the weight: more on AMX, where decoding it takes longer than a
// product, and of bytes in 16 bits, of which a tile holds half as many.
constexpr int64_t kRowsAtOnce = 64, kManyRowsAtOnce = 128;
constexpr int64_t kLibraryRows =
    512;  // from which on the library's product is worth a decoded weight
// The same in bf16, on machines that have its products but no AMX.
constexpr int64_t kLibraryHalvesRows = 192;
constexpr int64_t kTransposedRows = 8;  // and of the gradient of the input
constexpr int64_t kHalvesRows = 64;  // in bf16 on AMX: from which on a weight is decoded to tiles
constexpr int kPairBits = 5;         // of codes that one table makes pairs of bf16 of
// The rows from which on a weight of so few elements is decoded once, and those taken together
// where that is to bytes.
constexpr int64_t kManyForWhole = 64, kWholeWeights = 1 << 17;
constexpr int kWholeRows = 6;
#if (defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)) && !defined(_MSC_VER)
#define COFIRE_WHOLE
#endif

// The rows of x, as the loops read them. Columns are padded to whole steps by zeros.
struct Rows {
  int64_t count, columns, stride;
  at::Tensor values;  // fp32 [count, stride]
  // Words of four bytes, of two bf16 or of a float, by panels: the rows that a loop takes together
  // stand side by side, word by word or some words of each. Apart they would be on a page each, and
  // fetched one by one.
  at::Tensor words;
  uint32_t* first_word = nullptr;
  int64_t origin = 0;      // the row whose words stand first
  bool in_panels = false;  // whether there are words; else the values are read
  int word_shift;          // a word has 1 << word_shift columns
  int64_t run = 1;         // words of a row that stand side by side in its panel: more on AMX
  int64_t at_once = kRowsAtOnce;
  std::vector<int64_t> panels;  // the first row of each, and `count`
  at::Tensor sums;              // fp32 [count, groups or their parts]: of values, or of bytes
  at::Tensor scales;            // fp32 [count], of bytes
  int64_t group = 1, groups = 1, part = 1;  // columns of a group, and of the parts that are summed
  // What values become: bytes, as floats or in 16 bits, or pairs of bf16.
  bool int8 = false, pairs = false, widened = false, shorts = false;
  bool by_pairs = false;  // whether the values stand as `by_pairs` puts them

  // The panels that are multiplied by one tile each time, and the number of panels.
  std::vector<int64_t> pieces() const {
    const int64_t all = static_cast<int64_t>(panels.size()) - 1;
    std::vector<int64_t> firsts{0};
    for (int64_t to = 1; to < all; ++to) {
      if (panels[to + 1] - panels[firsts.back()] > at_once) firsts.push_back(to);
    }
    firsts.push_back(all);
    return firsts;
  }
  int64_t number_of_panels() const { return static_cast<int64_t>(panels.size()) - 1; }
  // Bytes of all words.
  int64_t size_of_words() const { return in_panels ? 4 * count * (stride >> word_shift) : 0; }
  // Makes room for the words of panels [begin, end), and no others.
  void make_room(int64_t begin, int64_t end) {
    if (!in_panels) return;
    origin = panels[begin];
    const int64_t size = (panels[end] - origin) * (stride >> word_shift);
    if (!words.defined() || words.numel() < size) words = at::empty({size}, at::kInt);
    first_word = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
  }
  // What becomes of the values of panels [begin, end): words, for which there is room, sums and
  // scales.
  void fill(int64_t begin, int64_t end) const;
  // Of all. Or each thread fills what it multiplies, in a copy that has no more room than that.
  void fill() {
    make_room(0, number_of_panels());
    at::parallel_for(0, number_of_panels(), grain_of(8 * kTileRows * stride),
                     [&](int64_t begin, int64_t end) { fill(begin, end); });
  }
  const float* row(int64_t m) const { return values.const_data_ptr<float>() + m * stride; }
  // The panel whose first row is m, from a column on.
  const uint32_t* panel(int64_t m, int64_t rows, int64_t column) const {
    return first_word + (((m - origin) * stride + column * rows) >> word_shift);
  }
};

// Rows that are taken together while codes are decoded: as many as there is a loop for, in parts of
// about one size. Words of bytes or of pairs: more than floats.
constexpr int kFewSizes[] = {12, 8, 6, 4, 3, 2, 1};
int64_t part_of_few(int64_t rows, bool words) {
  const int64_t fair = next_part(rows, words ? kFewWordRows : kFewRows);
  for (const int size : kFewSizes) {
    if (size <= fair) return size;
  }
  return 1;
}

// Sums of a row by groups, or by parts of each.
void sum_groups(const float* values, const int8_t* bytes, int64_t group, int64_t groups,
                int64_t part, float* to) {
  for (int64_t g = 0; g < groups; ++g) {
    int64_t k = g * group;
    do {
      const int64_t end = std::min(k + part, (g + 1) * group);
      if (bytes != nullptr) {
        *to++ = static_cast<float>(sum_of_bytes(bytes + k, end - k));
        k = end;
      } else {
        F16 sum = F16::zero();
        for (; k + 16 <= end; k += 16) sum = sum + F16::load(values + k);
        float total = 0, lanes[16];
        sum.store(lanes);
        for (const float lane : lanes) total += lane;
        for (; k < end; ++k) total += values[k];
        *to++ = total;
      }
    } while (k < (g + 1) * group);
  }
}

void Rows::fill(int64_t begin, int64_t end) const {
  static_assert(kStep % kLanes == 0);
  const int64_t word_count = stride >> word_shift, parts = sums.defined() ? sums.size(1) : 0;
  // Of so many rows what they become; beyond their columns they are zero.
  Lines<int8_t> bytes(int8 ? kWoven * stride : 0);
  Lines<float> floats(widened ? kWoven * stride : 0);
  Lines<c10::BFloat16> narrowed(pairs ? kWoven * stride : 0);
  Lines<int16_t> in_16_bits(shorts ? kWoven * stride : 0);
  // Columns 0 and 2 of four are a pair, and 1 and 3: so bytes are cut into numbers of 16 bits.
  const auto pair_up = [&](auto* numbers) {
    for (int64_t k = 0; k < stride; k += 4) std::swap(numbers[k + 1], numbers[k + 2]);
  };
  float* all_scales = int8 ? scales.mutable_data_ptr<float>() : nullptr;
  float* all_sums = parts > 0 ? sums.mutable_data_ptr<float>() : nullptr;
  const float* first_row = values.const_data_ptr<float>();
  const uint32_t* made[kWoven] = {};
  const auto make = [&](int64_t m, int i) {
    const float* v = first_row + m * stride;
    if (m + 1 < count) {
      for (int64_t k = 0; k < stride; k += 16) __builtin_prefetch(v + stride + k);
    }
    const void* from = v;
    int8_t* rounded_to = int8 ? bytes.data() + i * stride : nullptr;
    if (int8) {
      all_scales[m] = round_to_bytes(v, stride, rounded_to);
      from = rounded_to;
    }
    if (widened) {
      std::copy(rounded_to, rounded_to + stride, floats.data() + i * stride);
      from = floats.data() + i * stride;
    } else if (shorts) {
      int16_t* numbers = in_16_bits.data() + i * stride;
      std::copy(rounded_to, rounded_to + stride, numbers);
      pair_up(numbers);
      from = numbers;
    } else if (pairs) {
      c10::BFloat16* halves = narrowed.data() + i * stride;
      for (int64_t k = 0; k < stride; k += kLanes) {
        store_f32(halves + k, Vec::loadu(v + k));  // what they were
      }
      pair_up(halves);
      from = halves;
    }
    made[i] = static_cast<const uint32_t*>(from);
    if (parts > 0) sum_groups(v, rounded_to, group, groups, part, all_sums + m * parts);
  };
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panels[panel], together = panels[panel + 1] - first;
    for (int64_t r = 0; r < together; r += kWoven) {
      const int now = static_cast<int>(std::min<int64_t>(together - r, kWoven));
      for (int i = 0; i < now; ++i) make(first + r + i, i);
      if (!in_panels) continue;
      uint32_t* to = first_word + (first - origin) * word_count + r * run;
      if (run == 1) {
        side_by_side_words(made, now, word_count, to, together);
        continue;
      }
      for (int i = 0; i < now; ++i) {
        for (int64_t w = 0; w < word_count; w += run) {
          std::memcpy(to + w * together + i * run, made[i] + w, 4 * run);
        }
      }
    }
  }
}

// `run`: words of a row that AMX takes at a time; without it 1. Sums are those of parts of so many
// columns of a group. Where there are words, whoever multiplies has to fill them.
Rows prepare(const at::Tensor& x, int64_t group, int64_t groups, int64_t part, bool int8, bool sums,
             Way way, int64_t run, bool shorts) {
  Rows rows;
  const int64_t parts = groups * std::max<int64_t>((group + part - 1) / part, 1);
  rows.group = group;
  rows.groups = groups;
  rows.part = part;
  rows.run = run;
  if (run > 1 || shorts) rows.at_once = kManyRowsAtOnce;
  rows.count = x.size(0);
  rows.columns = x.size(1);
  // A few rows of floats are read as they are.
  rows.in_panels = int8 || way != Way::kFew;
  rows.int8 = int8;
  rows.pairs = way == Way::kPairs || way == Way::kFewPairs;
  rows.shorts = shorts;
  rows.widened = int8 && way == Way::kStored;
  rows.stride = round_up(rows.columns, kStep);
  const bool as_it_is =
      x.scalar_type() == at::kFloat && x.is_contiguous() && rows.stride == rows.columns;
  rows.values = as_it_is ? x : float_rows(x, kStep);
  if (int8) rows.scales = at::empty({rows.count}, x.options().dtype(at::kFloat));
  if (sums) rows.sums = at::empty({rows.count, parts}, x.options().dtype(at::kFloat));
  rows.word_shift = rows.pairs || shorts ? 1 : int8 && !rows.widened ? 2 : 0;
  for (int64_t m = 0; m < rows.count;) {
    rows.panels.push_back(m);
    const int64_t left = rows.count - m;
    if (way == Way::kFew || way == Way::kFewPairs) {
      m += part_of_few(left, int8 || rows.pairs);
    } else {
      const bool in_words = way == Way::kBytes || way == Way::kPairs;
      const bool whole = way == Way::kWholeBytes;
      m += next_part(left, run > 1    ? amx::kRows
                           : whole    ? kWholeRows
                           : in_words ? kWordRows
                                      : kTileRows);
    }
  }
  rows.panels.push_back(rows.count);
  if (!rows.in_panels && sums) rows.fill();
  return rows;
}

// Rows of results, `apart`, the scales of the rows and the bias of the columns; those may be null.
struct Straight {
  float* to = nullptr;
  int64_t apart = 0;
  const float *scales = nullptr, *added = nullptr;

  Straight of_row(int64_t r) const {
    return {to + r * apart, apart, scales != nullptr ? scales + r : nullptr, added};
  }
};

// Where a block of results goes: the low-rank term, the scale of the row and the bias are added on
// the way.
class Sink {
 public:
  // `scaled`: by the scales of the rows.
  Sink(const Rows& rows, const LowRank& low_rank, bool scaled, const MaybeTensor& bias,
       const at::Tensor& y)
      : low_rank_(low_rank),
        scales_(scaled ? rows.scales.const_data_ptr<float>() : nullptr),
        bias_(bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor()),
        added_(bias_.defined() ? bias_.const_data_ptr<float>() : nullptr),
        type_(y.scalar_type()),
        size_(y.element_size()),
        columns_(y.size(1)),
        y_(static_cast<char*>(y.mutable_data_ptr())) {}

  // Where results of rows from m on and columns from n on may go straight from registers, as floats
  // of whole tiles do to which no low-rank term is added.
  Straight straight(int64_t m, int64_t n, int64_t width = kWidth) const {
    if (type_ != at::kFloat || low_rank_.low.defined() || n + width > columns_) return {};
    return {reinterpret_cast<float*>(y_) + m * columns_ + n, columns_,
            scales_ != nullptr ? scales_ + m : nullptr, added_ != nullptr ? added_ + n : nullptr};
  }

  // Asks for the lines that the results will go to: a column of them, which no machine foresees.
  void ask_for(int64_t m, int64_t count, int64_t n, int64_t width) const {
    const int64_t row = columns_ * size_;
    const int64_t lines = (std::min(width, columns_ - n) * size_ + 63) / 64;
    const char* to = y_ + m * row + n * size_;
    for (int64_t r = 0; r < count; ++r, to += row) {
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(to + 64 * i, 1);
    }
  }

  // c: [count][kWidth], rows `apart`, for the rows from m on and the columns from n on; changed.
  void operator()(float* c, int64_t m, int64_t count, int64_t n, int64_t width,
                  int64_t apart = kWidth) const {
    if (low_rank_.low.defined()) {
      const int64_t rank = low_rank_.low.size(1);
      product(low_rank_.low.const_data_ptr<float>() + m * rank, rank, 1,
              low_rank_.b.const_data_ptr<float>() + n, low_rank_.b.size(1), c, apart, count, rank);
    }
    const int64_t used = std::min(width, columns_ - n);
    const float* added = added_ != nullptr ? added_ + n : nullptr;
    dispatch(type_, [&](auto example) {
      using T = decltype(example);
      constexpr int64_t kAheadRows = 4, kLine = 64 / sizeof(T);
      T* to = reinterpret_cast<T*>(y_) + m * columns_ + n;
      for (int64_t r = 0; r < count; ++r, to += columns_, c += apart) {
        // Rows a power of two apart drive each other out of the first-level cache: what has been
        // asked for is fetched anew from the second.
        if (r + kAheadRows < count) {
          for (int64_t j = 0; j < used; j += kLine) {
            __builtin_prefetch(to + kAheadRows * columns_ + j, 1);
          }
        }
        const float a = scales_ != nullptr ? scales_[m + r] : 1.0f;
        int64_t j = 0;
        for (; j + 16 <= used; j += 16) {
          F16 value = F16::load(c + j);
          if (scales_ != nullptr) value = rounded(value * F16::all(a));
          if (added != nullptr) value = value + F16::load(added + j);
          if constexpr (std::is_same_v<T, float>) {
            value.store(to + j);
          } else {
            alignas(64) float lanes[16];
            value.store(lanes);
            for (int i = 0; i < 16; i += kLanes) store_f32(to + j + i, Vec::loadu(lanes + i));
          }
        }
        for (; j < used; ++j) {
          float value = c[j];
          if (scales_ != nullptr) value = rounded(value * a);
          if (added != nullptr) value += added[j];
          to[j] = static_cast<T>(value);
        }
      }
    });
  }

 private:
  const LowRank& low_rank_;
  const float* scales_;
  at::Tensor bias_;
  const float* added_;
  at::ScalarType type_;
  int64_t size_, columns_;
  char* y_;
};

// Asks for codes to come, so many bytes further on: where a step takes some 25 cycles, memory
// answers after 20 of them; a tile stops reading for as long as it is multiplied.
constexpr int64_t kAhead = 6144, kTileAhead = 2048;

template <int Bits>
COFIRE_INLINE void ask_for(const uint8_t* codes) {
  COFIRE_UNROLL
  for (int i = 0; i < Bits; ++i) __builtin_prefetch(codes + 64 * i);
}

// Where a step takes less time than its way from memory: of the second-level cache early, and of
// the first when they are near. All the way to the first only as many lines can be on at once as it
// has places for, and memory has more to give.
template <int Bits>
COFIRE_INLINE void ask_twice_for(const uint8_t* codes) {
  constexpr int64_t kFar = 12288, kNear = 2048;
  COFIRE_UNROLL
  for (int i = 0; i < Bits; ++i) {
    __builtin_prefetch(codes + kFar + 64 * i, 0, 2);
    __builtin_prefetch(codes + kNear + 64 * i, 0, 3);
  }
}

// ------------------------------------------------------------------------------------ few rows

// How a code becomes a float: by a table of floats, as the number that it is, as a byte from a
// table, as a power of two, or from a table in memory.
enum class Value { kTable, kConvert, kByte, kPower, kGather };

// Calls f with the number of bits of a weight and the way in which its codes become floats.
template <typename F>
void with_value(const Packed& w, F&& f) {
  with_bits(w.bits, [&](auto bits) {
    constexpr int B = bits;
    if (w.uniform && !(kLookup && B <= 4)) {
      return f(bits, std::integral_constant<Value, Value::kConvert>{});
    }
    if constexpr (B <= 4) {
      if constexpr (kByteTables) {
        if (w.bytes.defined()) return f(bits, std::integral_constant<Value, Value::kByte>{});
      }
      f(bits, std::integral_constant<Value, Value::kTable>{});
    } else {
      if constexpr (B == 5) {
        if (w.exponents.defined()) return f(bits, std::integral_constant<Value, Value::kPower>{});
      }
      f(bits, std::integral_constant<Value, Value::kGather>{});
    }
  });
}

// The loops over rows are unrolled by `unrolled`: arrays that a pragma's loop indexes stay in
// memory.

// How many quads of unsigned codes of so many bits, times signed bytes, 16 bits can hold the sums
// of: whole steps. A pair of products is at most 2 * 127 * the largest code.
constexpr int64_t narrow_quads(int64_t bits) {
  return std::max<int64_t>(32767 / (254 * ((int64_t{1} << bits) - 1)) / 8 * 8, 8);
}

// -middle times a sum of bytes, in every lane.
COFIRE_INLINE W16 taken_off(int64_t middle, float sum) {
  return W16::all(static_cast<uint32_t>(-middle * static_cast<int64_t>(sum)));
}

// R rows times one block, bytes. A table has at most 16 entries here.
template <int Bits, int R, Bytes Kind, bool Lookup>
void few_bytes(const Rows& x, const Packed& w, int64_t block, int64_t m, float* c) {
  constexpr int kChains = std::clamp(kSums / R, 1, 2);
  const int64_t steps = w.groups == 1 ? w.steps : w.group / kStep;
  alignas(64) uint8_t entries[16] = {};
  if constexpr (Lookup) {
    const int64_t size = w.bytes.size(1);
    std::memcpy(entries, w.bytes.const_data_ptr<uint8_t>() + block / w.partition_blocks * size, 16);
  }
  const Bytes16 table(entries);
  const uint32_t* p = x.panel(m, R, 0);
  F16 y[R];
  unrolled<R>([&](auto r) __attribute__((always_inline)) { y[r] = F16::zero(); });
  const uint8_t* codes = w.step(block, 0);
  const float* scale = w.scale.const_data_ptr<float>() + block * w.groups * kBlock;
  const float* shift = w.byte_shift.defined()
                           ? w.byte_shift.const_data_ptr<float>() + block * w.groups * kBlock
                           : nullptr;
  // The sums of x are asked for once: what checks a tensor would empty the registers per group.
  const float* sums = x.sums.defined() ? x.sums.const_data_ptr<float>() + m * w.groups : nullptr;
  constexpr int64_t kHeld = narrow_quads(Bits) * kChains / 8;  // steps, where 16 bits hold sums
  for (int64_t g = 0; g < w.groups; ++g) {
    W16 total[R];
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      total[r] =
          w.byte_middle == 0 ? W16::zero() : taken_off(w.byte_middle, sums[r * w.groups + g]);
    });
    for (int64_t s = 0; s < steps;) {
      W16 acc[R][kChains];
      unrolled<R>([&](auto r) __attribute__((always_inline)) {
        unrolled<kChains>([&](auto i) __attribute__((always_inline)) { acc[r][i] = W16::zero(); });
        // One register less for each row.
        if constexpr (Kind != Bytes::kNarrow) std::swap(acc[r][0], total[r]);
      });
      const auto add_step = [&]() __attribute__((always_inline)) {
        ask_twice_for<Bits>(codes);
        const Planes<Bits> planes(codes);
        unrolled<8>([&](auto q) __attribute__((always_inline)) {
          W16 quad = planes.template quad<q>();
          if constexpr (Lookup) quad = table[quad];
          unrolled<R>([&](auto r) __attribute__((always_inline)) {
            acc[r][q % kChains] = dot<Kind>(acc[r][q % kChains], quad, W16::all(p[q * R + r]));
          });
        });
        codes += 64 * Bits;
        p += 8 * R;
        ++s;
      };
      if constexpr (Kind == Bytes::kNarrow && kHeld == 1) {
        add_step();
      } else {
        const int64_t end = Kind == Bytes::kNarrow ? std::min(steps, s + kHeld) : steps;
        while (s < end) add_step();
      }
      unrolled<R>([&](auto r) __attribute__((always_inline)) {
        unrolled<kChains>([&](auto i) __attribute__((always_inline)) {
          total[r] = widened<Kind>(total[r], acc[r][i]);
        });
      });
    }
    const F16 factor = F16::load(scale + g * kBlock);
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      y[r] = fma(factor, to_float(total[r]), y[r]);
      if (shift != nullptr) {
        const F16 sum = F16::all(sums[r * w.groups + g]);
        y[r] = fma(F16::load(shift + g * kBlock), sum, y[r]);
      }
    });
  }
  unrolled<R>([&](auto r) __attribute__((always_inline)) { y[r].store(c + r * kWidth); });
}

// Codes to floats. What a way does not need takes no register.
template <int Bits, Value How>
struct Decoder {
  const float* entries;
  Table16 floats;
  Bytes16 bytes;
  F16 middle;

  // For one block. `middle`: what comes off each value.
  Decoder(const Packed& w, int64_t block, float middle = 0)
      : Decoder(w, block / w.partition_blocks, middle,
                w.table.const_data_ptr<float>() + block / w.partition_blocks * w.table.size(1)) {}

  // What a quad has in common.
  COFIRE_INLINE W16 prepared(const W16& quad) const {
    if constexpr (How == Value::kByte) return bytes[quad];
    if constexpr (How == Value::kPower) {
      return bytes[quad] | (shift_left<3>(quad) & W16::all(0x80808080u));
    }
    return quad;
  }

  // Byte I of quad Q, prepared; `Centred`: without the middle.
  template <int Q, int I, bool Centred = false>
  COFIRE_INLINE F16 value(const Planes<Bits>& planes, const W16& quad) const {
    if constexpr (How == Value::kTable && (Bits == 4 || Bits == 2 || Bits == 1)) {
      // Straight from the plane: bits of the next codes choose among equal entries.
      constexpr int fields = 8 / Bits;
      return floats[shift_right<8 * I + Bits*(Q % fields)>(planes.vector(Q / fields))];
    } else if constexpr (How == Value::kTable) {
      return floats[shift_right<8 * I>(quad)];
    } else if constexpr (How == Value::kPower) {
      // The sign shifted in is the sign; the next bit is the highest of the exponent, which is 0.
      return as_float(shift_right_signed<1>(byte_on_top<I>(quad)) & W16::all(0xbfffffffu));
    } else {
      const W16 code = byte_of<I>(quad);
      if constexpr (How == Value::kGather) return gather(entries, code);
      const F16 number = to_float(code);
      return How == Value::kByte || Centred ? number - middle : number;
    }
  }

 private:
  Decoder(const Packed& w, int64_t p, float middle, const float* table)
      : entries(table),
        floats(Shifted(table, middle).values),
        bytes(bytes_of(w, p)),
        middle(F16::all(How == Value::kByte ? static_cast<float>(w.above) : middle)) {}

  struct Shifted {
    alignas(64) float values[16];
    Shifted(const float* table, float middle) {
      for (int i = 0; i < 16; ++i) values[i] = table[i] - middle;
    }
  };

  static const uint8_t* bytes_of(const Packed& w, int64_t p) {
    static constexpr uint8_t nothing[16] = {};
    if constexpr (How == Value::kByte) return w.bytes.const_data_ptr<uint8_t>() + p * 16;
    if constexpr (How == Value::kPower) return w.exponents.const_data_ptr<uint8_t>() + p * 16;
    return nothing;
  }
};

// The end of group g: the sums of its products, in chains, times its scales, and its shifts, if
// there are any, times the sums of the rows, are added to the results.
template <int R, int Chains>
COFIRE_INLINE void end_group(const F16 (&acc)[R][Chains], const float* scale, const float* shift,
                             const float* sums, int64_t g, int64_t groups, F16 (&y)[R]) {
  const F16 factor = F16::load(scale + g * kBlock);
  unrolled<R>([&](auto r) __attribute__((always_inline)) {
    F16 sum = acc[r][0];
    unrolled<Chains - 1>([&](auto i) __attribute__((always_inline)) { sum = sum + acc[r][i + 1]; });
    y[r] = fma(factor, sum, y[r]);
    if (shift != nullptr) {
      y[r] = fma(F16::load(shift + g * kBlock), F16::all(sums[r * groups + g]), y[r]);
    }
  });
}

template <int Bits, int R, Value How>
void few_floats(const Rows& x, const Packed& w, int64_t block, int64_t m, float* c) {
  constexpr int kChains = std::clamp(kSums / R, 1, 4);
  const int64_t steps = w.groups == 1 ? w.steps : w.group / kStep;
  const Decoder<Bits, How> decoder(w, block, w.middle);
  F16 y[R];
  unrolled<R>([&](auto r) __attribute__((always_inline)) { y[r] = F16::zero(); });
  const uint8_t* codes = w.step(block, 0);
  const float* scale = w.scale.const_data_ptr<float>() + block * w.groups * kBlock;
  const float* shift = w.few_shift.defined()
                           ? w.few_shift.const_data_ptr<float>() + block * w.groups * kBlock
                           : nullptr;
  const float* sums = shift != nullptr ? x.sums.const_data_ptr<float>() + m * w.groups : nullptr;
  const float* p[R];
  unrolled<R>([&](auto r) __attribute__((always_inline)) { p[r] = x.row(m + r); });
  int64_t column = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    F16 acc[R][kChains];
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      unrolled<kChains>([&](auto i) __attribute__((always_inline)) { acc[r][i] = F16::zero(); });
    });
    for (int64_t s = 0; s < steps; ++s, codes += 64 * Bits, column += kStep) {
      ask_for<Bits>(codes + kAhead);
      const Planes<Bits> planes(codes);
      unrolled<8>([&](auto q) __attribute__((always_inline)) {
        const W16 quad = decoder.prepared(planes.template quad<q>());
        unrolled<4>([&](auto i) __attribute__((always_inline)) {
          const F16 value = decoder.template value<q, i, true>(planes, quad);
          unrolled<R>([&](auto r) __attribute__((always_inline)) {
            F16& sum = acc[r][i % kChains];
            sum = fma(value, F16::all(p[r][column + 4 * q + i]), sum);
          });
        });
      });
    }
    end_group(acc, scale, shift, sums, g, w.groups, y);
  }
  unrolled<R>([&](auto r) __attribute__((always_inline)) { y[r].store(c + r * kWidth); });
}

#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
// Codes of up to 5 bits to pairs of bf16, which have to hold what they stand for: half H of quad Q
// is that of columns 4 Q + H and 4 Q + H + 2 of each row.
template <int Bits>
struct PairDecoder {
  Halves32 table;

  PairDecoder(const Packed& w, int64_t block) : table(Entries(w, block).halves) {}

  template <int Q, int H>
  COFIRE_INLINE W16 pair(const Planes<Bits>& planes) const {
    if constexpr (Bits == 3 || Bits == 5) {
      return table[shift_right<8 * H>(planes.template quad<Q>())];
    } else {  // straight from the plane: bits of the next codes choose among equal entries
      constexpr int fields = 8 / Bits;
      return table[shift_right<8 * H + Bits*(Q % fields)>(planes.vector(Q / fields))];
    }
  }

 private:
  struct Entries {
    alignas(64) uint16_t halves[32];
    Entries(const Packed& w, int64_t block) {
      const float* from =
          w.table.const_data_ptr<float>() + block / w.partition_blocks * w.table.size(1);
      for (int i = 0; i < 32; ++i) {
        halves[i] = std::bit_cast<uint32_t>(from[i % (1 << Bits)]) >> 16;
      }
    }
  };
};

// R rows times one block, pairs.
template <int Bits, int R>
void few_pairs(const Rows& x, const Packed& w, int64_t block, int64_t m, float* c) {
  constexpr int kChains = std::clamp(kSums / R, 1, 4);
  const int64_t steps = w.groups == 1 ? w.steps : w.group / kStep;
  const PairDecoder<Bits> decoder(w, block);
  const uint32_t* p = x.panel(m, R, 0);
  F16 y[R];
  unrolled<R>([&](auto r) __attribute__((always_inline)) { y[r] = F16::zero(); });
  const uint8_t* codes = w.step(block, 0);
  const float* scale = w.scale.const_data_ptr<float>() + block * w.groups * kBlock;
  const float* shift =
      w.shift.defined() ? w.shift.const_data_ptr<float>() + block * w.groups * kBlock : nullptr;
  const float* sums = shift != nullptr ? x.sums.const_data_ptr<float>() + m * w.groups : nullptr;
  for (int64_t g = 0; g < w.groups; ++g) {
    F16 acc[R][kChains];
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      unrolled<kChains>([&](auto i) __attribute__((always_inline)) { acc[r][i] = F16::zero(); });
    });
    for (int64_t s = 0; s < steps; ++s, codes += 64 * Bits, p += 16 * R) {
      ask_for<Bits>(codes + kAhead);
      const Planes<Bits> planes(codes);
      unrolled<16>([&](auto i) __attribute__((always_inline)) {
        const W16 pair = decoder.template pair<i / 2, i % 2>(planes);
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
          F16& sum = acc[r][i % kChains];
          sum = dot_bf16(sum, pair, W16::all(p[i * R + r]));
        });
      });
    }
    end_group(acc, scale, shift, sums, g, w.groups, y);
  }
  unrolled<R>([&](auto r) __attribute__((always_inline)) { y[r].store(c + r * kWidth); });
}
#endif

#if defined(CPU_CAPABILITY_AVX2)
// The same where all values are bf16: two tables of bytes make halves of floats, rows by two
// columns side by side, so that a lane of a sum is one of a pair of columns. Less is spent on each
// float than where codes are converted; with more rows of x, whose sums take more registers, it is
// not. `x`: as `by_pairs` puts it.
constexpr int kHalfRows = 2;

template <int Bits, int R>
void few_halves(const Rows& x, const Packed& w, int64_t block, int64_t m, float* c) {
  // Eight rows at a time, or with one row of x twice as many: each sum would wait for the last one.
  constexpr int kParts = R == 1 ? 2 : 1;
  const int64_t steps = w.groups == 1 ? w.steps : w.group / kStep;
  const uint8_t* tables = w.halves.data() + block / w.partition_blocks * 32;
  const Bytes16 high(tables), low(tables + 16);
  const uint8_t* codes = w.step(block, 0);
  const float* scale = w.scale.const_data_ptr<float>() + block * w.groups * kBlock;
  const float* shift = w.few_shift.defined()
                           ? w.few_shift.const_data_ptr<float>() + block * w.groups * kBlock
                           : nullptr;
  const float* sums = shift != nullptr ? x.sums.const_data_ptr<float>() + m * w.groups : nullptr;
  unrolled<R>([&](auto r) { F16::zero().store(c + r * kWidth); });
  for (int64_t g = 0; g < w.groups; ++g, codes += steps * 64 * Bits) {
    for (int first = 0; first < 2; first += kParts) {
      // Of even and of odd columns, of the first two rows of each four and of the others.
      __m256 even[R][kParts][2], odd[R][kParts][2];
      unrolled<R * kParts * 2>([&](auto i) __attribute__((always_inline)) {
        even[i / 2 / kParts][i / 2 % kParts][i % 2] = _mm256_setzero_ps();
        odd[i / 2 / kParts][i / 2 % kParts][i % 2] = _mm256_setzero_ps();
      });
      const float* p[R];
      unrolled<R>([&](auto r)
                      __attribute__((always_inline)) { p[r] = x.row(m + r) + g * steps * kStep; });
      const uint8_t* at = codes + 32 * first;
      for (int64_t s = 0; s < steps; ++s, at += 64 * Bits) {
        if (first == 0) ask_for<Bits>(at + kAhead);
        unrolled<8>([&](auto q) __attribute__((always_inline)) {
          unrolled<kParts>([&](auto part) __attribute__((always_inline)) {
            const HalfPlanes<Bits> planes{at + 32 * part};
            const __m256i quad = planes.template quad<q>();
            __m256i top = _mm256_shuffle_epi8(high.v, quad);
            if constexpr (Bits == 5) top = _mm256_or_si256(top, planes.template signs<q>());
            const __m256i bottom = _mm256_shuffle_epi8(low.v, quad);
            const __m256i halves[2] = {_mm256_unpacklo_epi8(bottom, top),
                                       _mm256_unpackhi_epi8(bottom, top)};
            unrolled<2>([&](auto i) __attribute__((always_inline)) {
              const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(halves[i], 16));
              const __m256 b =
                  _mm256_castsi256_ps(_mm256_and_si256(halves[i], _mm256_set1_epi32(-65536)));
              unrolled<R>([&](auto r) __attribute__((always_inline)) {
                const auto* pairs = reinterpret_cast<const double*>(p[r] + 4 * q);
                even[r][part][i] = _mm256_fmadd_ps(a, _mm256_castpd_ps(_mm256_broadcast_sd(pairs)),
                                                   even[r][part][i]);
                odd[r][part][i] = _mm256_fmadd_ps(
                    b, _mm256_castpd_ps(_mm256_broadcast_sd(pairs + 1)), odd[r][part][i]);
              });
            });
          });
        });
        unrolled<R>([&](auto r) __attribute__((always_inline)) { p[r] += kStep; });
      }
      unrolled<kParts>([&](auto part) __attribute__((always_inline)) {
        const int64_t n = 8 * (first + part);
        const __m256 factor = _mm256_loadu_ps(scale + g * kBlock + n);
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
          const __m256 sum = _mm256_hadd_ps(_mm256_add_ps(even[r][part][0], odd[r][part][0]),
                                            _mm256_add_ps(even[r][part][1], odd[r][part][1]));
          float* to = c + r * kWidth + n;
          __m256 y = _mm256_fmadd_ps(factor, sum, _mm256_loadu_ps(to));
          if (shift != nullptr) {
            y = _mm256_fmadd_ps(_mm256_loadu_ps(shift + g * kBlock + n),
                                _mm256_set1_ps(sums[r * w.groups + g]), y);
          }
          _mm256_storeu_ps(to, y);
        });
      });
    }
  }
}

// Of each quad of columns the even ones, and then the odd ones: as pairs of halves come.
at::Tensor by_pairs(const at::Tensor& values) {
  at::Tensor out = at::empty(values.sizes(), values.options());
  const auto* from = values.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < values.numel(); i += 4) {
    for (int64_t j = 0; j < 4; ++j) to[i + j] = from[i + (j % 2) * 2 + j / 2];
  }
  return out;
}
#endif

template <int Most, typename F>
void with_rows(int64_t rows, F&& f) {
  unrolled<std::size(kFewSizes)>([&](auto i) {
    if constexpr (kFewSizes[i] <= Most) {
      if (rows == kFewSizes[i]) f(std::integral_constant<int, kFewSizes[i]>{});
    }
  });
}

// Calls f with the way in which bytes are multiplied by this weight on this machine.
template <typename F>
void with_kind(const Packed& w, F&& f) {
#if defined(CPU_CAPABILITY_AVX512)
  if (has_vnni()) return f(std::integral_constant<Bytes, Bytes::kVnni>{});
#elif defined(CPU_CAPABILITY_AVX2)
  if (w.bits <= 4 && w.most < int64_t{1} << w.bits) {
    return f(std::integral_constant<Bytes, Bytes::kNarrow>{});
  }
  if (w.most <= 128) return f(std::integral_constant<Bytes, Bytes::kPairs>{});
#endif
  f(std::integral_constant<Bytes, Bytes::kWide>{});
}

// Whether bytes, of many rows, are widened to 16 bits beforehand: where sums of products of bytes
// could be more than 16 bits hold.
bool multiplies_shorts([[maybe_unused]] const Packed& w) {
#if defined(CPU_CAPABILITY_AVX2)
  return w.most > 128;
#else
  return false;
#endif
}

using Few = void (*)(const Rows&, const Packed&, int64_t, int64_t, float*);

Few few_kernel(const Packed& w, int64_t rows, const Rows& x) {
  Few found = nullptr;
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
  if (x.pairs) {
    with_rows<kFewWordRows>(rows, [&](auto r) {
      with_bits(w.bits, [&](auto bits) {
        if constexpr (bits <= kPairBits) found = few_pairs<bits, r>;
      });
    });
    return found;
  }
#endif
#if defined(CPU_CAPABILITY_AVX2)
  if (x.by_pairs) {
    with_rows<kHalfRows>(rows, [&](auto r) {
      with_bits(w.bits, [&](auto bits) {
        if constexpr (bits <= 5) found = few_halves<bits, r>;
      });
    });
    return found;
  }
#endif
  if (!x.int8) {
    with_rows<kFewRows>(rows, [&](auto r) {
      with_value(w, [&](auto bits, auto how) { found = few_floats<bits, r, how>; });
    });
    return found;
  }
  with_rows<kFewWordRows>(rows, [&](auto r) {
    constexpr int R = r;
    with_bits(w.bits, [&](auto bits) {
      with_kind(w, [&](auto kind) {
        constexpr int B = bits;
        constexpr Bytes K = kind;
        if (!w.bytes.defined()) {
          if constexpr (!(K == Bytes::kNarrow && B > 4)) found = few_bytes<B, R, K, false>;
        } else if constexpr (B <= 4) {
          found = few_bytes<B, R, K, true>;
        }
      });
    });
  });
  return found;
}

// Block by block of the weight. Where codes stay in the second-level cache and x does not, panel by
// panel of x, each filled by the thread that multiplies it.
void multiply_few(Rows& x, const Packed& w, const Sink& sink) {
  constexpr int64_t kHeldCodes = 1 << 18, kHeldWords = 1 << 19;  // bytes
  const int64_t cost = w.steps * kStep * kBlock / 8, panels = x.number_of_panels();
  const auto multiply = [&](const Rows& rows, int64_t block, int64_t panel, float* c) {
    const int64_t m = rows.panels[panel], now = rows.panels[panel + 1] - m;
    few_kernel(w, now, rows)(rows, w, block, m, c);
    sink(c, m, now, block * kBlock, kBlock);
  };
  if (panels >= 8 * at::get_num_threads() && w.codes.numel() <= kHeldCodes &&
      x.size_of_words() > kHeldWords) {
    return in_parts(panels, grain_of(cost * w.blocks), [&](int64_t begin, int64_t end) {
      alignas(64) float c[kFewWordRows * kWidth];
      Rows mine = x;
      for (int64_t panel = begin; panel < end; ++panel) {
        mine.make_room(panel, panel + 1);
        mine.fill(panel, panel + 1);
        for (int64_t block = 0; block < w.blocks; ++block) multiply(mine, block, panel, c);
      }
    });
  }
  if (x.in_panels) x.fill();
#if defined(CPU_CAPABILITY_AVX2)
  if (!x.int8 && !w.halves.empty() && x.count <= kHalfRows) {
    x.values = by_pairs(x.values);
    x.by_pairs = true;
  }
#endif
  in_runs_of_parts(w.blocks, grain_of(cost * x.count), [&](int64_t begin, int64_t end) {
    alignas(64) float c[kFewWordRows * kWidth];
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t panel = 0; panel < panels; ++panel) multiply(x, block, panel, c);
    }
  });
}

// ----------------------------------------------------------------------------------- more rows

// R rows times kTileBlocks blocks over one group of decoded words [word][kWidth]: four bytes each,
// or a pair of bf16. `p`: a panel of x, [word][R].
template <int R, int Blocks, typename Sum, typename Dot>
COFIRE_INLINE void add_word(const uint32_t* p, const uint8_t* tile, int64_t q,
                            Sum (&sums)[R][Blocks], const Dot& dot_of) {
  W16 w[Blocks];
  COFIRE_UNROLL
  for (int j = 0; j < Blocks; ++j) w[j] = W16::load(tile + (q * Blocks + j) * 64);
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) {
    const W16 x = W16::all(p[q * R + r]);
    COFIRE_UNROLL
    for (int j = 0; j < Blocks; ++j) sums[r][j] = dot_of(sums[r][j], w[j], x);
  }
}

// Sums of R rows, each of which starts at what `first(r)` says.
template <int R, int Blocks, typename Sum, typename First>
COFIRE_INLINE void start(Sum (&sums)[R][Blocks], const First& first) {
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) {
    const Sum value = first(r);
    COFIRE_UNROLL
    for (int j = 0; j < Blocks; ++j) sums[r][j] = value;
  }
}

template <int R, typename Sum>
COFIRE_INLINE void clear(Sum (&sums)[R][kTileBlocks]) {
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) {
    COFIRE_UNROLL
    for (int j = 0; j < kTileBlocks; ++j) sums[r][j] = Sum::zero();
  }
}

// Some groups of kTileBlocks blocks, decoded.
struct Piece {
  const uint8_t* tile;         // [groups][words][kWidth]
  int64_t groups, words;       // words of a group: whole steps
  int64_t held;                // quads whose sums 16 bits can hold
  const float *scale, *shift;  // [groups][kWidth]; no shift: null
  int64_t all_groups;          // of x
  int64_t middle;              // what comes off each byte
  bool first;                  // whether nothing was added to the results before
};

// y += scale * total + shift * sums.
template <int R>
COFIRE_INLINE void add_group(const F16 (&total)[R][kTileBlocks], const Piece& piece, int64_t g,
                             const float* sums, F16 (&y)[R][kTileBlocks]) {
  COFIRE_UNROLL
  for (int j = 0; j < kTileBlocks; ++j) {
    const int64_t at = g * kWidth + 16 * j;
    const F16 factor = F16::load(piece.scale + at);
    const F16 moved = piece.shift != nullptr ? F16::load(piece.shift + at) : F16::zero();
    COFIRE_UNROLL
    for (int r = 0; r < R; ++r) {
      y[r][j] = fma(factor, total[r][j], y[r][j]);
      if (piece.shift != nullptr) {
        y[r][j] = fma(moved, F16::all(sums[r * piece.all_groups + g]), y[r][j]);
      }
    }
  }
}

// The results of a panel, from [R][kWidth] or to it.
template <int R>
COFIRE_INLINE void load_results(const Piece& piece, const float* c, F16 (&y)[R][kTileBlocks]) {
  COFIRE_UNROLL
  for (int i = 0; i < R * kTileBlocks; ++i) {
    y[i / kTileBlocks][i % kTileBlocks] = piece.first ? F16::zero() : F16::load(c + 16 * i);
  }
}

// And from the last piece to where they go, if they may (else null), as `Sink` takes them there.
// It is pointed to: a copy would be read before the stores of the results that went before are
// done.
template <int R, int Blocks>
COFIRE_INLINE void store_results(F16 (&y)[R][Blocks], float* c, const Straight* to) {
  if (to == nullptr) {
    COFIRE_UNROLL
    for (int i = 0; i < R * Blocks; ++i) y[i / Blocks][i % Blocks].store(c + 16 * i);
    return;
  }
  const Straight straight = *to;  // what it points to, the stores below might change
  if (straight.scales != nullptr) {
    COFIRE_UNROLL
    for (int r = 0; r < R; ++r) {
      const F16 scale = F16::all(straight.scales[r]);
      COFIRE_UNROLL
      for (int j = 0; j < Blocks; ++j) y[r][j] = rounded(y[r][j] * scale);
    }
  }
  if (straight.added != nullptr) {
    COFIRE_UNROLL
    for (int j = 0; j < Blocks; ++j) {
      const F16 added = F16::load(straight.added + 16 * j);
      COFIRE_UNROLL
      for (int r = 0; r < R; ++r) y[r][j] = y[r][j] + added;
    }
  }
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) {
    COFIRE_UNROLL
    for (int j = 0; j < Blocks; ++j) y[r][j].store(straight.to + r * straight.apart + 16 * j);
  }
}

// A panel of R rows times a piece. `Long`: 16 bits hold the sums of more than one step.
template <int R, Bytes Kind, bool Long>
void tile_bytes(const Piece& piece, const uint32_t* p, const float* sums, float* c,
                const Straight* straight) {
  const auto dot_of = [](W16 a, W16 w, W16 x)
                          __attribute__((always_inline)) { return dot<Kind>(a, w, x); };
  const uint8_t* tile = piece.tile;
  F16 y[R][kTileBlocks];
  load_results(piece, c, y);
  for (int64_t g = 0; g < piece.groups; ++g) {
    W16 acc[R][kTileBlocks];
    if (piece.middle == 0) {
      clear(acc);
    } else {
      start(acc, [&](int r) { return taken_off(piece.middle, sums[r * piece.all_groups + g]); });
    }
    if constexpr (Kind == Bytes::kNarrow) {
      for (int64_t q = 0; q < piece.words;) {
        W16 narrow[R][kTileBlocks];
        clear(narrow);
        const auto add_step = [&]() __attribute__((always_inline)) {
          unrolled<8>([&](auto i) __attribute__((always_inline)) {
            add_word(p, tile, q + i, narrow, dot_of);
          });
          q += 8;
        };
        if constexpr (Long) {
          for (const int64_t end = std::min(piece.words, q + piece.held); q < end;) add_step();
        } else {
          add_step();
        }
        COFIRE_UNROLL
        for (int r = 0; r < R; ++r) {
          COFIRE_UNROLL
          for (int j = 0; j < kTileBlocks; ++j) acc[r][j] = widened<Kind>(acc[r][j], narrow[r][j]);
        }
      }
    } else if constexpr (Kind == Bytes::kShorts) {  // the loop itself is a tenth of so few words
      for (int64_t q = 0; q < piece.words; q += 4) {
        unrolled<4>([&](auto i)
                        __attribute__((always_inline)) { add_word(p, tile, q + i, acc, dot_of); });
      }
    } else {
      for (int64_t q = 0; q < piece.words; ++q) add_word(p, tile, q, acc, dot_of);
    }
    F16 total[R][kTileBlocks];
    COFIRE_UNROLL
    for (int r = 0; r < R; ++r) {
      COFIRE_UNROLL
      for (int j = 0; j < kTileBlocks; ++j) total[r][j] = to_float(acc[r][j]);
    }
    add_group(total, piece, g, sums, y);
    p += piece.words * R;
    tile += piece.words * 4 * kWidth;
  }
  store_results(y, c, straight);
}

#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
// The same for pairs of bf16.
template <int R>
void tile_pairs(const Piece& piece, const uint32_t* p, const float* sums, float* c,
                const Straight* straight) {
  const auto dot_of = [](F16 a, W16 w, W16 x)
                          __attribute__((always_inline)) { return dot_bf16(a, w, x); };
  const uint8_t* tile = piece.tile;
  F16 y[R][kTileBlocks];
  load_results(piece, c, y);
  for (int64_t g = 0; g < piece.groups; ++g) {
    F16 acc[R][kTileBlocks];
    clear(acc);
    for (int64_t q = 0; q < piece.words; ++q) add_word(p, tile, q, acc, dot_of);
    add_group(acc, piece, g, sums, y);
    p += piece.words * R;
    tile += piece.words * 4 * kWidth;
  }
  store_results(y, c, straight);
}

// Decodes one step of a block into a tile of pairs: codes, and the bytes of tables, are exact in
// bf16.
template <int Bits>
void step_to_pairs(const uint8_t* codes, const PairDecoder<Bits>& decoder, uint8_t* tile) {
  ask_for<Bits>(codes + kTileAhead);
  const Planes<Bits> planes(codes);
  unrolled<16>([&](auto i) __attribute__((always_inline)) {
    decoder.template pair<i / 2, i % 2>(planes).store(tile + i * 4 * kWidth);
  });
}
template <int Bits, Value How>
void step_to_pairs(const uint8_t* codes, const Decoder<Bits, How>& decoder, uint8_t* tile) {
  ask_for<Bits>(codes + kTileAhead);
  const Planes<Bits> planes(codes);
  unrolled<8>([&](auto q) __attribute__((always_inline)) {
    const W16 quad = decoder.prepared(planes.template quad<q>());
    unrolled<2>([&](auto h) __attribute__((always_inline)) {
      const F16 low = decoder.template value<q, h>(planes, quad);
      const F16 high = decoder.template value<q, h + 2>(planes, quad);
      const W16 pair = shift_right<16>(bits_of(low)) | (bits_of(high) & W16::all(0xffff0000u));
      pair.store(tile + (2 * q + h) * 4 * kWidth);
    });
  });
}
#endif

#if defined(COFIRE_AMX)
// The same on AMX, for up to amx::kRows rows and so many blocks; `p`: [words / run][rows][run].
template <bool Pairs, int Blocks>
void tile_amx(const Piece& piece, const uint32_t* p, const float* sums, float* c, int64_t rows,
              int64_t run) {
  alignas(64) uint32_t all[amx::kRows * kWidth];
  const uint8_t* tile = piece.tile;
  for (int64_t g = 0; g < piece.groups; ++g) {
    amx::multiply<Pairs, Blocks>(p, tile, piece.words, rows, run, all);
    const bool fresh = piece.first && g == 0;
    F16 factor[Blocks], moved[Blocks];
    COFIRE_UNROLL
    for (int j = 0; j < Blocks; ++j) {
      const int64_t at = g * kWidth + 16 * j;
      factor[j] = F16::load(piece.scale + at);
      moved[j] = piece.shift != nullptr ? F16::load(piece.shift + at) : F16::zero();
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float sum = sums != nullptr ? sums[r * piece.all_groups + g] : 0;
      const W16 off = piece.middle != 0 ? taken_off(piece.middle, sum) : W16::zero();
      COFIRE_UNROLL
      for (int j = 0; j < Blocks; ++j) {
        float* to = c + r * kWidth + 16 * j;
        const W16 whole = W16::load(all + r * kWidth + 16 * j);
        const F16 total = Pairs ? as_float(whole) : to_float(W16{_mm512_add_epi32(whole.v, off.v)});
        F16 y = fresh ? factor[j] * total : fma(factor[j], total, F16::load(to));
        if (piece.shift != nullptr) y = fma(moved[j], F16::all(sum), y);
        y.store(to);
      }
    }
    p += piece.words * rows;
    tile += piece.words * 4 * kWidth;
  }
}

using AmxTile = void (*)(const Piece&, const uint32_t*, const float*, float*, int64_t, int64_t);

template <int... Blocks>
AmxTile amx_kernel(bool pairs, int64_t blocks, std::integer_sequence<int, Blocks...>) {
  static constexpr AmxTile of_pairs[] = {tile_amx<true, Blocks + 1>...};
  static constexpr AmxTile of_bytes[] = {tile_amx<false, Blocks + 1>...};
  return (pairs ? of_pairs : of_bytes)[blocks - 1];
}
#endif

using Tile = void (*)(const Piece&, const uint32_t*, const float*, float*, const Straight*);

template <Bytes Kind, int... R>
Tile tile_kernel(int64_t rows, [[maybe_unused]] int64_t held, std::integer_sequence<int, R...>) {
  static constexpr Tile kernels[] = {tile_bytes<R + 1, Kind, false>...};
  if constexpr (Kind == Bytes::kNarrow) {
    static constexpr Tile long_kernels[] = {tile_bytes<R + 1, Kind, true>...};
    if (held > 8) return long_kernels[rows - 1];
  }
  return kernels[rows - 1];
}

#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
template <int... R>
Tile pairs_kernel(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr Tile kernels[] = {tile_pairs<R + 1>...};
  return kernels[rows - 1];
}
#endif

// Decodes quads of one step of a block into a tile of bytes, whose words are `apart`, or of twice
// as many words of 16 bits: columns 0 and 2 of each quad, 1 and 3.
template <int Bits>
void step_to_bytes(const uint8_t* codes, const uint8_t* table, bool shorts, uint8_t* tile,
                   int64_t apart) {
  ask_for<Bits>(codes + kTileAhead);
  const Planes<Bits> planes(codes);
  unrolled<8>([&](auto q) __attribute__((always_inline)) {
    W16 quad = planes.template quad<q>();
    if (table != nullptr) {
      if constexpr (Bits <= 4) {
        quad = Bytes16(table)[quad];
      } else {
        alignas(64) uint8_t lanes[64];
        quad.store(lanes);
        for (uint8_t& lane : lanes) lane = table[lane];
        quad = W16::load(lanes);
      }
    }
    if (!shorts) return quad.store(tile + q * apart);
    const W16 low = W16::all(0x00ff00ffu);
    (quad & low).store(tile + 2 * q * apart);
    (shift_right<8>(quad) & low).store(tile + (2 * q + 1) * apart);
  });
}

// Of `count` steps, from one on.
void decode_bytes(const Packed& w, int64_t block, int64_t from, int64_t count, bool shorts,
                  uint8_t* tile, int64_t apart) {
  const uint8_t* table = w.bytes.defined() ? w.bytes.const_data_ptr<uint8_t>() +
                                                 block / w.partition_blocks * w.bytes.size(1)
                                           : nullptr;
  with_bits(w.bits, [&](auto bits) {
    const uint8_t* codes = w.step(block, from);
    const int64_t words = kStep / (shorts ? 2 : 4);
    for (int64_t i = 0; i < count; ++i, codes += 64 * bits, tile += words * apart) {
      step_to_bytes<bits>(codes, table, shorts, tile, apart);
    }
  });
}

// Calls f(rows, first, used, from, to), in parts, for each tile of kTileBlocks blocks and each of
// x's pieces of panels. An x that the second-level cache holds stays there while the weight goes
// by; of a larger one a piece does, where the codes that then go by once for each are the lesser,
// and of a large y, where all codes stay there beside it: its rows are written in one go.
template <typename Start>
void by_tiles(Rows& x, const Packed* w, int64_t blocks, int64_t cost, const Start& start) {
  constexpr int64_t kHeld = 1 << 19;  // bytes
  const std::vector<int64_t> pieces = x.pieces();
  const int64_t tiles = (blocks + kTileBlocks - 1) / kTileBlocks;
  const int64_t all = static_cast<int64_t>(pieces.size()) - 1;
  const int64_t of_x = x.size_of_words(), of_y = 4 * x.count * blocks * kBlock;
  const int64_t codes = w != nullptr ? w->codes.numel() : 0;
  const bool by_pieces = w != nullptr && ((of_x > kHeld && codes * all < of_x * tiles) ||
                                          (of_y > kHeld && codes < kHeld / 2));
  const auto multiply = [&](auto& f, const Rows& rows, int64_t tile, int64_t piece) {
    const int64_t first = tile * kTileBlocks;
    f(rows, first, std::min<int64_t>(kTileBlocks, blocks - first), pieces[piece],
      pieces[piece + 1]);
  };
  // Filled by the thread that multiplies it a piece is still in its cache.
  if (by_pieces && all >= 8 * at::get_num_threads()) {
    return in_parts(all, grain_of(cost * tiles / all), [&](int64_t begin, int64_t end) {
      auto f = start();
      Rows mine = x;
      for (int64_t piece = begin; piece < end; ++piece) {
        mine.make_room(pieces[piece], pieces[piece + 1]);
        mine.fill(pieces[piece], pieces[piece + 1]);
        for (int64_t tile = 0; tile < tiles; ++tile) multiply(f, mine, tile, piece);
      }
    });
  }
  x.fill();
  in_parts(tiles * all, grain_of(cost / all), [&](int64_t begin, int64_t end) {
    auto f = start();
    for (int64_t i = begin; i < end; ++i) {
      by_pieces ? multiply(f, x, i % tiles, i / tiles) : multiply(f, x, i / all, i % all);
    }
  });
}

// How many steps a tile holds. AMX takes bytes so fast that of two tiles the lesser, which leaves
// room in the cache, is better.
int64_t most_steps(bool two_bytes, int64_t run) {
  const int64_t bytes = run > 1 && !two_bytes ? kTileBytes / 2 : kTileBytes;
  return bytes / (kStep * kWidth * (two_bytes ? 2 : 1));
}

int64_t steps_of_group(const Packed& w) { return w.groups == 1 ? w.steps : w.group / kStep; }

// How many steps of a group are decoded at a time: all, or those that a tile holds.
int64_t part_of(const Packed& w, bool two_bytes, int64_t run) {
  return std::clamp<int64_t>(steps_of_group(w), 1, most_steps(two_bytes, run));
}

// By tiles of bytes, as they are or in 16 bits, or of pairs of bf16.
void multiply_words(Rows& x, const Packed& w, const Sink& sink) {
  const bool pairs = x.pairs, two_bytes = pairs || x.shorts;
  const int64_t steps = steps_of_group(w);
  const int64_t size = two_bytes ? 2 : 1;  // bytes of a weight in the tile
  const at::Tensor& shift_of = pairs ? w.shift : w.byte_shift;
  const int64_t held = narrow_quads(w.bits);
  const auto kernel = [&](int64_t rows) {
    Tile found = nullptr;
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
    if (pairs) return pairs_kernel(rows, std::make_integer_sequence<int, kWordRows>{});
#endif
    constexpr auto all_rows = std::make_integer_sequence<int, kWordRows>{};
#if defined(CPU_CAPABILITY_AVX2)
    if (x.shorts) return tile_kernel<Bytes::kShorts>(rows, held, all_rows);
#endif
    with_kind(w, [&](auto kind) { found = tile_kernel<kind>(rows, held, all_rows); });
    return found;
  };
#if defined(COFIRE_AMX)
  using Registers = amx::Registers;
#else
  struct Registers {};
#endif
  // `piece` steps of the blocks from `first` on, from step `at` on.
  const auto decode = [&](int64_t first, int64_t used, int64_t at, int64_t piece, uint8_t* tile) {
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
    if (pairs) {
      const auto to_tile = [&](int64_t b, const auto& decoder) {
        for (int64_t i = 0; i < piece; ++i) {
          step_to_pairs(w.step(first + b, at + i), decoder, tile + i * kStep * kWidth * 2 + 64 * b);
        }
      };
      if (w.bits > kPairBits) {
        return with_value(w, [&](auto bits, auto how) {
          if constexpr (bits > kPairBits) {
            for (int64_t b = 0; b < used; ++b) to_tile(b, Decoder<bits, how>(w, first + b));
          }
        });
      }
      return with_bits(w.bits, [&](auto bits) {
        if constexpr (bits <= kPairBits) {
          for (int64_t b = 0; b < used; ++b) to_tile(b, PairDecoder<bits>(w, first + b));
        }
      });
    }
#endif
    for (int64_t b = 0; b < used; ++b) {
      decode_bytes(w, first + b, at, piece, x.shorts, tile + 64 * b, 4 * kWidth);
    }
  };
  const int64_t cost = w.steps * kStep * kWidth / 8 * x.count;
  // Decoded at a time: a part of a group, or some whole ones.
  const int64_t part = part_of(w, two_bytes, x.run), parts = (steps + part - 1) / part;
  const int64_t groups = std::clamp<int64_t>(most_steps(two_bytes, x.run) / steps, 1, w.groups);
  by_tiles(x, &w, w.blocks, cost, [&] {
    // Of the groups from g on, for the blocks from `first` on.
    const auto gather = [&](const at::Tensor& all, int64_t g, int64_t now, int64_t first,
                            int64_t used, Lines<float>& to) {
      for (int64_t b = 0; b < used; ++b) {
        const float* from = all.const_data_ptr<float>() + ((first + b) * w.groups + g) * kBlock;
        for (int64_t i = 0; i < now; ++i) {
          F16::load(from + i * kBlock).store(to.data() + i * kWidth + b * kBlock);
        }
      }
    };
    return [&, gather, tile = Lines<uint8_t>(groups * part * kStep * kWidth * size),
            c = Lines<float>(std::min(x.at_once, x.count) * kWidth),
            factor = Lines<float>(groups * kWidth), moved = Lines<float>(groups * kWidth),
            registers = Registers()](const Rows& filled, int64_t first, int64_t used, int64_t from,
                                     int64_t to) mutable {
      const int64_t m = x.panels[from], rows = x.panels[to] - m;
#if defined(COFIRE_AMX)
      const AmxTile on_amx =
          amx_kernel(pairs, used, std::make_integer_sequence<int, kTileBlocks>{});
#endif
      sink.ask_for(m, rows, first * kBlock, used * kBlock);
      const Straight to_y = x.run > 1 ? Straight{} : sink.straight(m, first * kBlock);
      for (int64_t g = 0; g < w.groups; g += groups) {
        const int64_t now = std::min(groups, w.groups - g);
        gather(w.scale, g, now, first, used, factor);
        if (shift_of.defined()) gather(shift_of, g, now, first, used, moved);
        for (int64_t s = 0; s < steps; s += part) {
          const int64_t length = std::min(part, steps - s), at = g * steps + s;
          decode(first, used, at, now * length, tile.data());
          // Each part takes off what belongs to it, so that no sum is much larger than the
          // result.
          const float* shift = shift_of.defined() ? moved.data() : nullptr;
          const Piece piece{
              tile.data(),   now,   length * kStep / 4 * size, held,
              factor.data(), shift, w.groups * parts,          pairs ? 0 : w.byte_middle,
              at == 0};
          const float* all_sums = x.sums.defined() ? x.sums.const_data_ptr<float>() : nullptr;
          const bool last = g + now == w.groups && s + length == steps && to_y.to != nullptr;
          for (int64_t i = from; i < to; ++i) {
            const int64_t r = x.panels[i], together = x.panels[i + 1] - r;
            const float* sums = all_sums != nullptr
                                    ? all_sums + r * piece.all_groups + g * parts + s / part
                                    : nullptr;
            const uint32_t* panel = filled.panel(r, together, at * kStep);
            float* results = c.data() + (r - m) * kWidth;
#if defined(COFIRE_AMX)
            if (x.run > 1) {
              registers.shape(together, x.run);
              on_amx(piece, panel, sums, results, together, x.run);
              continue;
            }
#endif
            const Straight row = to_y.of_row(r - m);
            kernel(together)(piece, panel, sums, results, last ? &row : nullptr);
          }
        }
      }
      if (to_y.to == nullptr || w.steps == 0) sink(c.data(), m, rows, first * kBlock, kWidth);
    };
  });
}

#if defined(COFIRE_WHOLE)

// Many rows of bytes times a small weight that has one scale a row: it is decoded once, to bytes
// that the second-level cache holds, and as sums of all columns become floats at their end,
// registers hold those of more rows and columns.
constexpr int kWholeBlocks = kLanes == 16 ? 4 : 1;
constexpr int64_t kWholeWidth = kWholeBlocks * kBlock;

struct Whole {
  const uint8_t* tile;  // [words][kWholeWidth]
  int64_t words;
  const float *scale, *shift;  // [kWholeWidth]; no shift: null
  int64_t middle;              // what comes off each byte
};

template <int R, Bytes Kind>
void whole_bytes(const Whole& w, const uint32_t* p, const float* sums, float* c,
                 const Straight* straight) {
  const auto dot_of = [](W16 a, W16 w, W16 x)
                          __attribute__((always_inline)) { return dot<Kind>(a, w, x); };
  W16 acc[R][kWholeBlocks];
  start(acc, [&](int r) { return w.middle == 0 ? W16::zero() : taken_off(w.middle, sums[r]); });
  for (int64_t q = 0; q < w.words; ++q) add_word(p, w.tile, q, acc, dot_of);
  F16 y[R][kWholeBlocks];
  COFIRE_UNROLL
  for (int j = 0; j < kWholeBlocks; ++j) {
    const F16 factor = F16::load(w.scale + 16 * j);
    COFIRE_UNROLL
    for (int r = 0; r < R; ++r) y[r][j] = fma(factor, to_float(acc[r][j]), F16::zero());
  }
  if (w.shift != nullptr) {
    COFIRE_UNROLL
    for (int j = 0; j < kWholeBlocks; ++j) {
      const F16 moved = F16::load(w.shift + 16 * j);
      COFIRE_UNROLL
      for (int r = 0; r < R; ++r) y[r][j] = fma(moved, F16::all(sums[r]), y[r][j]);
    }
  }
  store_results(y, c, straight);
}

void multiply_whole(Rows& x, const Packed& w, const Sink& sink) {
  using Kernel = void (*)(const Whole&, const uint32_t*, const float*, float*, const Straight*);
  std::array<Kernel, kWholeRows> kernels;
  with_kind(w, [&](auto kind) {
    // Sums of all columns are more than 16 bits hold.
    constexpr Bytes K = kind == Bytes::kNarrow ? Bytes::kPairs : Bytes{kind};
    kernels = []<int... R>(std::integer_sequence<int, R...>) {
      return std::array<Kernel, sizeof...(R)>{whole_bytes<R + 1, K>...};
    }(std::make_integer_sequence<int, kWholeRows>{});
  });
  const int64_t words = w.steps * kStep / 4, tiles = (w.blocks + kWholeBlocks - 1) / kWholeBlocks;
  const int64_t size = words * 4 * kWholeWidth;
  // Blocks beyond the last are not there; nor are their results.
  const at::Tensor scratch = at::empty({tiles * size}, at::kByte);
  auto* decoded = scratch.mutable_data_ptr<uint8_t>();
  Lines<float> scale(tiles * kWholeWidth), shift(tiles * kWholeWidth);
  const bool moved = w.byte_shift.defined();
  std::copy_n(w.scale.const_data_ptr<float>(), w.blocks * kBlock, scale.data());
  if (moved) std::copy_n(w.byte_shift.const_data_ptr<float>(), w.blocks * kBlock, shift.data());
  in_parts(w.blocks, grain_of(w.steps * kStep), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      uint8_t* to = decoded + b / kWholeBlocks * size + b % kWholeBlocks * 64;
      decode_bytes(w, b, 0, w.steps, false, to, 4 * kWholeWidth);
    }
  });
  const int64_t panels = x.number_of_panels();
  const int64_t cost = w.steps * kStep * w.blocks * kBlock / 8;
  const float* sums = x.sums.defined() ? x.sums.const_data_ptr<float>() : nullptr;
  in_runs_of_parts(panels, grain_of(cost), [&](int64_t begin, int64_t end) {
    constexpr int64_t kTogether = 8;
    Rows mine = x;
    alignas(64) float c[kWholeRows * kWholeWidth];
    for (int64_t first = begin; first < end; first += kTogether) {
      const int64_t last = std::min(first + kTogether, end);
      mine.make_room(first, last);
      mine.fill(first, last);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t n = t * kWholeWidth;
        const Whole whole{decoded + t * size, words, scale.data() + n,
                          moved ? shift.data() + n : nullptr, w.byte_middle};
        for (int64_t i = first; i < last; ++i) {
          const int64_t m = x.panels[i], rows = x.panels[i + 1] - m;
          const Straight to = sink.straight(m, n, kWholeWidth);
          kernels[rows - 1](whole, mine.panel(m, rows, 0), sums != nullptr ? sums + m : nullptr, c,
                            to.to != nullptr ? &to : nullptr);
          if (to.to == nullptr) sink(c, m, rows, n, kWholeWidth, kWholeWidth);
        }
      }
    }
  });
}

#endif

// Decodes columns [k, k + depth) of some blocks to the weight itself: keep(column - k, block -
// first, its 16 values).
template <typename Keep>
void decode_columns(const Packed& w, int64_t first, int64_t blocks, int64_t k, int64_t depth,
                    const Keep& keep) {
  with_value(w, [&](auto bits, auto how) {
    for (int64_t b = 0; b < blocks; ++b) {
      const Decoder<bits, how> decoder(w, first + b);
      const int64_t block = (first + b) * w.groups * kBlock;
      const float* scale = w.scale.const_data_ptr<float>() + block;
      const float* shift = w.shift.defined() ? w.shift.const_data_ptr<float>() + block : nullptr;
      const uint8_t* codes = w.step(first + b, k / kStep);
      for (int64_t i = 0; i < depth;) {
        const int64_t g = w.groups == 1 ? 0 : (k + i) / w.group;
        const int64_t end = w.groups == 1 ? depth : std::min(depth, (g + 1) * w.group - k);
        const F16 factor = F16::load(scale + g * kBlock);
        const F16 moved = shift != nullptr ? F16::load(shift + g * kBlock) : F16::zero();
        for (; i < end; i += kStep, codes += 64 * bits) {
          ask_for<bits>(codes + kTileAhead);
          const Planes<bits> planes(codes);
          unrolled<8>([&](auto q) __attribute__((always_inline)) {
            const W16 quad = decoder.prepared(planes.template quad<q>());
            unrolled<4>([&](auto j) __attribute__((always_inline)) {
              const F16 value = decoder.template value<q, j>(planes, quad);
              keep(i + 4 * q + j, b, fma(value, factor, moved));
            });
          });
        }
      }
    }
  });
}

// The same to [depth][apart] floats, blocks side by side.
void decode_floats(const Packed& w, int64_t first, int64_t blocks, int64_t k, int64_t depth,
                   float* to, int64_t apart) {
  decode_columns(w, first, blocks, k, depth,
                 [=](int64_t i, int64_t b, F16 value)
                     __attribute__((always_inline)) { value.store(to + i * apart + kBlock * b); });
}

#if defined(COFIRE_AMX)

// Decodes one step of a block to the weight itself, in pairs of bf16: a tile.
template <int Bits, Value How>
void step_to_tile(const uint8_t* codes, const Decoder<Bits, How>& decoder, F16 factor, F16 moved,
                  uint8_t* tile) {
  ask_for<Bits>(codes + kTileAhead);
  const Planes<Bits> planes(codes);
  unrolled<8>([&](auto q) __attribute__((always_inline)) {
    const W16 quad = decoder.prepared(planes.template quad<q>());
    unrolled<2>([&](auto h) __attribute__((always_inline)) {
      const F16 first = fma(decoder.template value<q, 2 * h>(planes, quad), factor, moved);
      const F16 second = fma(decoder.template value<q, 2 * h + 1>(planes, quad), factor, moved);
      _mm512_store_si512(tile + (2 * q + h) * 64, amx::pairs_of(first.v, second.v));
    });
  });
}

constexpr int64_t kTile = 1024;               // bytes
constexpr int64_t kDeep = 32;                 // steps that are decoded at a time, for ...
constexpr int64_t kMostRows = 512;            // ... so many rows of x
constexpr int64_t kNarrow = 2 * kTileBlocks;  // blocks, or twice as many

// Steps [from, from + count) of some blocks, [blocks][kDeep] tiles; zeros for those that are not
// there.
void decode_tiles(const Packed& w, int64_t first, int64_t blocks, int64_t from, int64_t count,
                  uint8_t* to) {
  with_value(w, [&](auto bits, auto how) {
    for (int64_t b = 0; b < blocks; ++b) {
      uint8_t* tile = to + b * kDeep * kTile;
      if (first + b >= w.blocks) {
        std::fill_n(tile, count * kTile, uint8_t{0});
        continue;
      }
      const Decoder<bits, how> decoder(w, first + b);
      const int64_t block = (first + b) * w.groups * kBlock;
      const float* scale = w.scale.const_data_ptr<float>() + block;
      const float* shift = w.shift.defined() ? w.shift.const_data_ptr<float>() + block : nullptr;
      for (int64_t s = from; s < from + count; ++s, tile += kTile) {
        const int64_t g = w.groups == 1 ? 0 : s * kStep / w.group;
        const F16 factor = F16::load(scale + g * kBlock);
        const F16 moved = shift != nullptr ? F16::load(shift + g * kBlock) : F16::zero();
        step_to_tile(w.step(first + b, s), decoder, factor, moved, tile);
      }
    }
  });
}

// Many rows in bf16, on AMX: both factors in tiles, each one piece of memory. decode(first, count,
// from, steps, to) makes those of blocks of 16 columns of y, [count][kDeep].
template <typename Decode>
void multiply_tiles(const at::Tensor& x, int64_t blocks, const LowRank& low_rank,
                    const MaybeTensor& bias, const at::Tensor& y, const Decode& decode) {
  constexpr int64_t kTogether = 2 * amx::kRows;
  const at::Tensor input = x.contiguous();
  const auto* from = static_cast<const uint8_t*>(input.const_data_ptr());
  const int64_t count = x.size(0), columns = x.size(1), row = 2 * columns;
  const int64_t steps = round_up(columns, kStep) / kStep;
  const int64_t panels = round_up(count, kTogether) / amx::kRows;
  // [steps / most][panels][most]: what is multiplied by the same steps lies together. Panels a
  // power of two apart would drive each other out of the cache.
  const int64_t most = std::clamp<int64_t>(steps, 1, kDeep);
  const at::Tensor tiles = at::empty({panels * round_up(steps, most) * kTile}, at::kByte);
  const auto tile_of = [&](int64_t panel, int64_t s) {
    return ((s / most * panels + panel) * most + s % most) * kTile;
  };
  auto* packed_x = tiles.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, panels, grain_of(amx::kRows * columns), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin * amx::kRows; m < end * amx::kRows; ++m) {
      for (int64_t s = 0; s < steps; ++s) {
        uint8_t* to = packed_x + tile_of(m / amx::kRows, s) + m % amx::kRows * 64;
        const int64_t there = m < count ? std::min<int64_t>(row - 64 * s, 64) : 0;
        if (there < 64) std::memset(to, 0, 64);
        if (there > 0) std::memcpy(to, from + m * row + 64 * s, there);
      }
    }
  });
  const Rows none{count, columns};
  const Sink sink(none, low_rank, false, bias, y);
  // Blocks that read x together: the more, the less often it comes from the third-level cache.
  // Sums are the same for any number of them.
  const int64_t pieces = (count + kMostRows - 1) / kMostRows;
  const bool many = pieces * blocks >= 8 * kNarrow * at::get_num_threads();
  const int64_t wide = many ? 2 * kNarrow : kNarrow, strips = (blocks + wide - 1) / wide;
  const int64_t apart = (wide + 1) * kBlock;
  in_turns(strips * pieces, [&](int64_t task) {
    const int64_t first = task % strips * wide, m = task / strips * kMostRows;
    const int64_t rows = std::min(kMostRows, count - m), whole = round_up(rows, kTogether);
    const int64_t size = wide * kDeep * kTile;
    const at::Tensor scratch = at::empty({size + whole * apart * 4}, at::kByte);
    auto* decoded = scratch.mutable_data_ptr<uint8_t>();
    auto* c = reinterpret_cast<float*>(decoded + size);
    if (steps == 0) std::fill_n(c, whole * apart, 0.0f);
    amx::Registers registers;
    registers.square();
    for (int64_t s = 0; s < steps; s += kDeep) {
      const int64_t deep = std::min(kDeep, steps - s);
      decode(first, wide, s, deep, decoded);
      for (int64_t b = 0; b < wide; b += 2) {
        for (int64_t r = 0; r < whole; r += kTogether) {
          const uint8_t* panel = packed_x + tile_of((m + r) / amx::kRows, s);
          amx::multiply_square({panel, 64, most * kTile, kTile, true},
                               {decoded + b * kDeep * kTile, 64, kDeep * kTile, kTile}, deep,
                               c + r * apart + b * kBlock, 4 * apart, s > 0);
        }
      }
    }
    for (int64_t n = 0; n < wide * kBlock && first * kBlock + n < y.size(1); n += kWidth) {
      sink(c + n, m, rows, first * kBlock + n, kWidth, apart);
    }
  });
}

void multiply_halves(const at::Tensor& x, const Packed& w, const LowRank& low_rank,
                     const MaybeTensor& bias, const at::Tensor& y) {
  multiply_tiles(x, w.blocks, low_rank, bias, y,
                 [&](int64_t first, int64_t blocks, int64_t from, int64_t count, uint8_t* to) {
                   decode_tiles(w, first, blocks, from, count, to);
                 });
}

// The same with the weight itself, not transposed: of a step, 32 rows of it.
void multiply_rows_of(const at::Tensor& x, const Stored& w, const LowRank& low_rank,
                      const at::Tensor& y) {
  multiply_tiles(x, (w.columns + kBlock - 1) / kBlock, low_rank, MaybeTensor(), y,
                 [&](int64_t first, int64_t blocks, int64_t from, int64_t count, uint8_t* to) {
                   const int64_t k = first * kBlock, width = blocks * kBlock;
                   const int64_t used = std::min(width, w.columns - k);
                   std::vector<uint8_t> bytes(width + 16);
                   Lines<float> values(2 * width);
                   for (int64_t s = 0; s < count; ++s) {
                     for (int64_t p = 0; p < kStep / 2; ++p) {
                       for (int64_t i = 0; i < 2; ++i) {
                         const int64_t n = (from + s) * kStep + 2 * p + i;
                         float* row = values.data() + i * width;
                         if (n < w.rows) {
                           w.values_of(n, k, used, bytes.data(), row);
                         } else {
                           std::fill_n(row, used, 0.0f);
                         }
                       }
                       for (int64_t b = 0; b < blocks; ++b) {
                         const float* one = values.data() + b * kBlock;
                         _mm512_store_si512(
                             to + (b * kDeep + s) * kTile + p * 64,
                             amx::pairs_of(_mm512_load_ps(one), _mm512_load_ps(one + width)));
                       }
                     }
                   }
                 });
}

#endif

// Columns whose products are one sum, which must not lose more than the library's: these are
// shorter on AVX-512.
constexpr int64_t kLongest = kLanes == 16 ? 64 : 256;

void multiply_floats(Rows& x, const Stored& stored, const Packed* w, const Sink& sink) {
  const int64_t blocks = (stored.rows + kBlock - 1) / kBlock;
  constexpr int64_t kDepth = std::min<int64_t>(kTileBytes / (4 * kWidth) / kStep * kStep, kLongest);
  const int64_t cost = x.stride * kWidth / 2 * x.count;
  by_tiles(x, w, blocks, cost, [&] {
    return [&, tile = Lines<float>(kDepth * kWidth),
            c = Lines<float>(std::min(x.at_once, x.count) * kWidth),
            values = std::vector<float>(kDepth), bytes = std::vector<uint8_t>(kDepth + 16)](
               const Rows& filled, int64_t first, int64_t used, int64_t from, int64_t to) mutable {
      const int64_t m = x.panels[from], rows = x.panels[to] - m;
      sink.ask_for(m, rows, first * kBlock, used * kBlock);
      std::fill(c.begin(), c.begin() + rows * kWidth, 0.0f);
      for (int64_t k = 0; k < x.columns; k += kDepth) {
        const int64_t depth = std::min(kDepth, x.columns - k);
        if (w == nullptr) {
          const int64_t last = std::min(stored.rows, (first + used) * kBlock);
          for (int64_t n = first * kBlock; n < last; ++n) {
            stored.values_of(n, k, depth, bytes.data(), values.data());
            float* column = tile.data() + (n - first * kBlock);
            for (int64_t i = 0; i < depth; ++i) column[i * kWidth] = values[i];
          }
        } else {
          decode_floats(*w, first, used, k, depth, tile.data(), kWidth);
        }
        for (int64_t i = from; i < to; ++i) {
          const int64_t r = x.panels[i], together = x.panels[i + 1] - r;
          const auto* p = reinterpret_cast<const float*>(filled.panel(r, together, k));
          product_of<true>(together)(p, 0, 0, tile.data(), kWidth, c.data() + (r - m) * kWidth,
                                     kWidth, depth);
        }
      }
      sink(c.data(), m, rows, first * kBlock, kWidth);
    };
  });
}

#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)

COFIRE_INLINE void store_halves(F16 a, c10::BFloat16* p) {
  __m256i halves;
  asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(a.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}

// The factors of products of bf16 where a machine has products of those and no AMX: all rows
// of x, and a slab of the weight, decoded with its scales, which one thread multiplies at a time.
// What else is added, a low-rank term and a bias, are further columns of x and of the weight, so
// that results are rounded once.
// A sum is not cut, as `library_product` cuts those of floats: of bf16 the library takes all
// columns in pieces of its own, which depend on shapes alone.
constexpr int64_t kHalvesSlab = 5 << 17;  // of bf16: about a second-level cache

at::Tensor with_more_columns(const at::Tensor& x, int64_t columns, const at::Tensor& low,
                             bool bias) {
  const int64_t rank = low.defined() ? low.size(1) : 0, all = columns + rank + (bias ? 1 : 0);
  if (all == x.size(1)) return x.contiguous();  // once, not for each slab
  at::Tensor out = at::zeros({x.size(0), all}, x.options());
  out.narrow(1, 0, x.size(1)).copy_(x);
  if (rank > 0) out.narrow(1, columns, rank).copy_(low);
  if (bias) out.select(1, all - 1).fill_(1);
  return out;
}

// How many of `count` units of so many bf16 to decode at a time: a power of two, for then threads
// often get equal shares, at least two or four, so that the library has enough columns, and an
// eighth of all at most. It must not depend on the number of threads, for the library may sum in
// another order where there are more columns.
int64_t units_of_slab(int64_t count, int64_t size, int64_t least) {
  const auto fit = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(kHalvesSlab / size)));
  return std::min(std::max(fit, least), std::max<int64_t>(count / 8, 1));
}

// One for each thread, whose pages are made once.
at::Tensor slabs_of_threads(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  return empty_in_large_pages({at::get_num_threads(), rows, columns}, options);
}

// Slabs of [columns][rows of the weight].
void multiply_library_halves(const at::Tensor& x, const Packed& w, const MaybeTensor& bias,
                             const LowRank& low_rank, const at::Tensor& y) {
  const at::Tensor& low = low_rank.low;
  const int64_t depth = round_up(x.size(1), kStep), rank = low.defined() ? low.size(1) : 0;
  const at::Tensor input = with_more_columns(x, depth, low, bias.has_value());
  const at::Tensor added = bias.has_value() ? bias->to(at::kBFloat16).contiguous() : at::Tensor();
  const int64_t all = input.size(1), most = units_of_slab(w.blocks, (all + 1) * kBlock, 4);
  const int64_t apart = (most + 1) * kBlock;
  const at::Tensor slabs = slabs_of_threads(all, apart, x.options());
  each_by_one_thread((w.blocks + most - 1) / most, [&](int64_t task) {
    const int64_t first = task * most, blocks = std::min(most, w.blocks - first);
    const int64_t n = first * kBlock, used = std::min(blocks * kBlock, y.size(1) - n);
    const at::Tensor slab = slabs.select(0, at::get_thread_num());
    auto* to = slab.mutable_data_ptr<c10::BFloat16>();
    decode_columns(w, first, blocks, 0, depth,
                   [=](int64_t k, int64_t b, F16 value) __attribute__((always_inline)) {
                     store_halves(value, to + k * apart + kBlock * b);
                   });
    for (int64_t r = 0; r < rank; ++r) {
      const float* from = low_rank.b.const_data_ptr<float>() + r * low_rank.b.size(1) + n;
      std::copy(from, from + used, to + (depth + r) * apart);
    }
    if (added.defined()) {
      const auto* from = added.const_data_ptr<c10::BFloat16>() + n;
      std::copy(from, from + used, to + (all - 1) * apart);
    }
    at::Tensor out = y.narrow(1, n, used);
    at::mm_out(out, input, slab.narrow(1, 0, used));
  });
}

// The same with the weight itself, not transposed.
void multiply_library_transposed(const at::Tensor& x, const Packed& w, const LowRank& low_rank,
                                 const at::Tensor& y) {
  const at::Tensor& low = low_rank.low;
  const at::Tensor input = with_more_columns(x, w.rows, low, false);
  const int64_t all = input.size(1), rank = all - w.rows;
  const int64_t apart = (w.blocks + 1) * kBlock + rank;
  const int64_t width = kStep * units_of_slab(w.steps, apart * kStep, 2);
  const at::Tensor slabs = slabs_of_threads(width, apart, x.options());
  each_by_one_thread((w.columns + width - 1) / width, [&](int64_t task) {
    const int64_t k = task * width, used = std::min(width, w.columns - k);
    const int64_t depth = round_up(used, kStep);
    const at::Tensor slab = slabs.select(0, at::get_thread_num());
    auto* to = slab.mutable_data_ptr<c10::BFloat16>();
    decode_columns(w, 0, w.blocks, k, depth,
                   [=](int64_t i, int64_t b, F16 value) __attribute__((always_inline)) {
                     store_halves(value, to + i * apart + kBlock * b);
                   });
    for (int64_t r = 0; r < rank; ++r) {
      const float* from = low_rank.b.const_data_ptr<float>() + r * low_rank.b.size(1) + k;
      for (int64_t i = 0; i < used; ++i) to[i * apart + w.rows + r] = from[i];
    }
    at::Tensor out = y.narrow(1, k, used);
    at::mm_out(out, input, slab.narrow(0, 0, used).narrow(1, 0, all).t());
  });
}

#endif

// By slabs of the weight, decoded, and the library's product of them by pieces of x.
void multiply_library(const at::Tensor& x, const Stored& stored, const Packed* w,
                      const MaybeTensor& bias, const LowRank& low_rank, const at::Tensor& y) {
  constexpr int64_t kSlab = 1 << 20;  // floats: half of a small third-level cache
  const bool as_it_is = x.scalar_type() == at::kFloat && x.is_contiguous();
  const at::Tensor rows = as_it_is ? x : float_rows(x, 1);
  const at::Tensor added = bias.has_value() ? bias->to(at::kFloat) : at::Tensor();
  const int64_t columns = stored.columns, blocks = (stored.rows + kBlock - 1) / kBlock;
  const int64_t most = std::clamp<int64_t>(kSlab / (columns + 1) / kBlock, 1, blocks);
  // Each piece has the library arrange the slab anew.
  const int64_t pieces =
      std::max<int64_t>(x.size(0) / std::clamp<int64_t>(x.size(0) / 4, 128, 512), 2);
  // Of a packed weight [columns][width and a block that keeps rows apart], else [width][columns].
  const int64_t width = most * kBlock, apart = w != nullptr ? width + kBlock : columns;
  const int64_t depth = round_up(columns, kStep);
  const at::Tensor slab =
      empty_in_large_pages({w != nullptr ? depth : width, apart}, rows.options());
  auto* values = slab.mutable_data_ptr<float>();
  for (int64_t first = 0; first < blocks; first += most) {
    const int64_t now = std::min(most, blocks - first), n = first * kBlock;
    const int64_t used = std::min(width, stored.rows - n);
    in_parts(now, grain_of(kBlock * columns), [&](int64_t begin, int64_t end) {
      if (w != nullptr) {
        return decode_floats(*w, first + begin, end - begin, 0, depth, values + begin * kBlock,
                             apart);
      }
      std::vector<uint8_t> bytes(columns + 16);
      for (int64_t i = begin * kBlock; i < std::min(end * kBlock, used); ++i) {
        stored.values_of(n + i, 0, columns, bytes.data(), values + i * columns);
      }
    });
    const at::Tensor weight =
        w != nullptr ? slab.narrow(0, 0, columns).narrow(1, 0, used) : slab.narrow(0, 0, used).t();
    each_by_one_thread(pieces, [&](int64_t piece) {
      const int64_t m = x.size(0) * piece / pieces;
      const int64_t count = x.size(0) * (piece + 1) / pieces - m;
      const at::Tensor to = y.narrow(0, m, count).narrow(1, n, used);
      at::Tensor out =
          y.scalar_type() == at::kFloat ? to : at::empty({count, used}, rows.options());
      const at::Tensor from = rows.narrow(0, m, count);
      if (added.defined()) out.copy_(added.narrow(0, n, used).expand_as(out));
      library_product(out, from, weight, added.defined());
      if (low_rank.low.defined()) {
        library_product(out, low_rank.low.narrow(0, m, count), low_rank.b.narrow(1, n, used), true);
      }
      if (!out.is_same(to)) to.copy_(out);
    });
  }
}

// Many rows times a small weight that is decoded once, to panels that the second-level cache holds.
void multiply_panels(const at::Tensor& x, const Packed& w, const MaybeTensor& bias,
                     const LowRank& low_rank, const at::Tensor& y) {
  constexpr int64_t kShort = 128;  // numbers of a row
  constexpr int64_t kBlocks = panels::kWidth / kBlock, kTiles = panels::kBlock / panels::kRows;
  const int64_t depth = w.steps * kStep, number = (w.blocks + kBlocks - 1) / kBlocks;
  // Columns beyond the last are not there; nor are their results.
  const at::Tensor scratch =
      empty_in_large_pages({number, depth, panels::kWidth}, x.options().dtype(at::kFloat));
  auto* decoded = scratch.mutable_data_ptr<float>();
  in_parts(number, grain_of(depth * panels::kWidth), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      decode_floats(w, p * kBlocks, std::min(kBlocks, w.blocks - p * kBlocks), 0, depth,
                    decoded + p * depth * panels::kWidth, panels::kWidth);
    }
  });
  const Sink sink(Rows(), low_rank, false, bias, y);
  const at::Tensor input = x.contiguous();
  const int64_t count = x.size(0), tiles = (count + panels::kRows - 1) / panels::kRows;
  const int64_t threads = at::get_num_threads();
  const int64_t parts = round_up((tiles + kTiles - 1) / kTiles, threads);
  const float nothing[panels::kWidth] = {};
  dispatch(x.scalar_type(), [&](auto example) {
    using T = decltype(example);
    const T* from = input.const_data_ptr<T>();
    in_runs(parts, [&](int64_t part) {
      const int64_t m = tiles * part / parts * panels::kRows;
      const int64_t rows = std::min(tiles * (part + 1) / parts * panels::kRows, count) - m;
      if (rows <= 0) return;
      // Short rows may stay where they are, if there are enough for whole tiles.
      const bool in_place =
          std::is_same_v<T, float> && w.columns < kShort && rows % panels::kRows == 0;
      panels::Copy copy;
      panels::Block lines{reinterpret_cast<const float*>(from + m * w.columns), w.columns};
      if (!in_place) {
        lines = copy(w.columns, rows, [&](int64_t r) { return from + (m + r) * w.columns; });
      }
      constexpr int64_t kApartRows = std::max(panels::kWidth, kWidth);  // that a sink writes to
      alignas(64) float c[panels::kBlock * kApartRows];
      for (int64_t p = 0; p < number; ++p) {
        const int64_t n = p * panels::kWidth;
        const Straight to = sink.straight(m, n, panels::kWidth);
        if (p + 1 < number) sink.ask_for(m, rows, n + panels::kWidth, panels::kWidth);
        if (!panels::multiply(
                lines, rows, w.columns, kLongest, decoded + p * depth * panels::kWidth,
                to.added != nullptr ? to.added : nothing, {to.to, to.apart}, {c, kApartRows})) {
          sink(c, m, rows, n, panels::kWidth, kApartRows);
        }
      }
    });
  });
}

}  // namespace

// Up to how many rows codes are decoded in registers. Of bytes and pairs an instruction takes a
// word of each row: those that are taken together; where rows are long, so that little of the time
// goes to results, of pairs all that the library does not take, and of bytes, which are multiplied
// faster than they come from far, as many as the caches hold. A tile of AMX, which is decoded once,
// is faster from a few on.
static int64_t most_few(bool bytes, bool pairs, int64_t columns) {
  constexpr int64_t kRowsBesideAmx = 8, kLong = 512, kHeldBytes = 1 << 21;
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
  if (pairs || (bytes && has_vnni())) {
    if (amx::found()) return kRowsBesideAmx;
    if (columns < kLong) return kFewWordRows;
    return pairs ? std::numeric_limits<int64_t>::max()
                 : std::max<int64_t>(kHeldBytes / columns, kFewWordRows);
  }
#endif
  return bytes ? kFewBytes : kFewFloats;
}

// Whether the library's products of bf16 are the fastest here: not where there is AMX, nor where
// they are turned off.
static bool library_takes_halves() {
  return has_bf16() && !amx::found() && at::globalContext().userEnabledMkldnn();
}

// Whether a weight is decoded to bytes once for so many rows, as it is small.
static bool fits_whole([[maybe_unused]] const Stored& w, [[maybe_unused]] int64_t count) {
#if defined(COFIRE_WHOLE)
#if defined(CPU_CAPABILITY_AVX512)
  const bool fast = has_vnni() && !amx::found();
#else
  const bool fast = w.bits > 4 || w.lut.defined();  // others' sums of a tile fit in 16 bits
#endif
  return fast && count >= kManyForWhole && w.groups == 1 && w.columns > 0 &&
         round_up(w.columns, kStep) * round_up(w.rows, kBlock) <= kWholeWeights;
#else
  return false;
#endif
}

// Whether a weight is decoded to panels of floats once for so many rows, as it is small.
static bool fits_panels(const Stored& w, int64_t count) {
  const int64_t size = w.rows * w.columns;
  return count >= kManyForWhole && size > 0 && size <= kWholeWeights && can_pack(w);
}

Way way_of(const Stored& w, int64_t count, at::ScalarType dtype, bool int8) {
  if (!int8 && dtype == at::kBFloat16 && count >= kHalvesRows && can_pack(w) && amx::found()) {
    return Way::kHalves;
  }
  if (!int8 && count >= kLibraryHalvesRows && dtype == at::kBFloat16 && can_pack(w) &&
      library_takes_halves()) {
    return Way::kLibraryHalves;
  }
  const bool in_floats = !int8 && !(dtype == at::kBFloat16 && has_bf16());
  if (in_floats && fits_panels(w, count)) return Way::kPanels;
  if (in_floats && count >= kLibraryRows) return Way::kLibrary;
  if (!can_pack(w)) return Way::kStored;
  if (int8 && fits_whole(w, count)) return Way::kWholeBytes;
  // Bytes from a table of more than 16 entries are looked up one by one: once, for a tile.
  const bool looked_up = int8 && w.int8_lut && w.bits > 4;
  const bool exact = !w.lut.defined() || w.int8_lut;
  const bool pairs = !int8 && dtype == at::kBFloat16 && exact && has_bf16();
  if (pairs && w.bits <= kPairBits && count <= most_few(false, true, w.columns))
    return Way::kFewPairs;
  if (count <= most_few(int8, false, w.columns) && !looked_up) return Way::kFew;
  if (int8) return Way::kBytes;
  return pairs ? Way::kPairs : Way::kFloats;
}

// How many words of a row AMX takes at a time: whole rows of a tile, where groups fill them.
static int64_t run_of(const Packed* w, Way way) {
  if (!(way == Way::kBytes || way == Way::kPairs) || !amx::found()) return 1;
  const int64_t steps = w->groups == 1 ? w->steps : w->group / kStep;
  return way == Way::kPairs || steps % 2 == 0 ? amx::kWords : amx::kWords / 2;
}

std::string plan_of(const Stored& w, int64_t count, at::ScalarType dtype, bool int8) {
  const std::string rows = std::to_string(count) + (count == 1 ? " row" : " rows");
  const Way way = way_of(w, count, dtype, int8);
  const bool pairs = way == Way::kPairs || way == Way::kFewPairs;
  int64_t most = most_few(int8, pairs && w.bits <= kPairBits, w.columns);
  if (int8 && fits_whole(w, kManyForWhole)) most = std::min(most, kManyForWhole - 1);
  const bool any = most == std::numeric_limits<int64_t>::max();
  const std::string up_to = any ? "" : ", up to " + std::to_string(most);
  std::string above = any ? "" : ", more than " + std::to_string(most);
  const std::string on_amx = amx::found() ? ", multiplied on AMX" : "";
  switch (way) {
    case Way::kFew:
      return "codes decoded in registers: " + rows + up_to;
    case Way::kFewPairs:
      return "codes decoded to pairs of bf16 in registers: " + rows + up_to;
    case Way::kBytes:
      if (w.int8_lut && w.bits > 4) {
        above += std::string(any ? "," : " or") + " a table of more than 16 entries";
      }
      return "tiles of the weight decoded to bytes: " + rows + above + on_amx;
    case Way::kWholeBytes:
      return "the weight decoded to bytes once, as it is small: " + rows + ", " +
             std::to_string(kManyForWhole) + " or more";
    case Way::kPairs:
      return "tiles of the weight decoded to pairs of bf16: " + rows + above + on_amx;
    case Way::kHalves:
      return "tiles of the weight decoded to bf16, scales included: " + rows + ", " +
             std::to_string(kHalvesRows) + " or more" + on_amx;
    case Way::kFloats:
      return "tiles of the weight decoded to floats: " + rows + above;
    case Way::kPanels:
      return "the weight decoded to floats once, as it is small: " + rows + ", " +
             std::to_string(kManyForWhole) + " or more";
    case Way::kLibrary:
      return "slabs of the weight decoded to floats, and the library's product: " + rows + ", " +
             std::to_string(kLibraryRows) + " or more";
    case Way::kLibraryHalves:
      return "slabs of the weight decoded to bf16, scales included, and the library's product: " +
             rows + ", " + std::to_string(kLibraryHalvesRows) + " or more";
    case Way::kStored:
      break;
  }
  return "tiles decoded from the stored codes: groups or palettes that blocks of 16 rows and 32 "
         "columns do not fit";
}

bool multiply_transposed(const at::Tensor& x, const Stored& w,
                         const std::function<std::shared_ptr<const Packed>()>& layout,
                         const LowRank& low_rank, const at::Tensor& y) {
  if (x.scalar_type() != at::kBFloat16) return false;
#if defined(COFIRE_AMX)
  if (x.size(0) >= kHalvesRows && amx::found()) {
    multiply_rows_of(x, w, low_rank, y);
    return true;
  }
#endif
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
  if (x.size(0) >= kTransposedRows && can_pack(w) && library_takes_halves()) {
    multiply_library_transposed(x, *layout(), low_rank, y);
    return true;
  }
#endif
  return false;
}

void multiply(const at::Tensor& x, const Stored& stored, const Packed* w, const MaybeTensor& bias,
              const LowRank& low_rank, bool int8, const at::Tensor& y) {
  if (y.numel() == 0) return;
  const Way way = way_of(stored, x.size(0), x.scalar_type(), int8);
  if (way == Way::kLibrary) return multiply_library(x, stored, w, bias, low_rank, y);
  if (way == Way::kPanels) return multiply_panels(x, *w, bias, low_rank, y);
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
  if (way == Way::kLibraryHalves) return multiply_library_halves(x, *w, bias, low_rank, y);
#endif
#if defined(COFIRE_AMX)
  if (way == Way::kHalves) return multiply_halves(x, *w, low_rank, bias, y);
#endif
  const at::Tensor* shift = w == nullptr       ? nullptr
                            : int8             ? &w->byte_shift
                            : way == Way::kFew ? &w->few_shift
                                               : &w->shift;
  const bool moved = shift != nullptr && shift->defined() && way != Way::kFloats;
  const bool sums = moved || (int8 && w != nullptr && w->byte_middle != 0);
  const bool in_words = way == Way::kBytes || way == Way::kPairs;
  const int64_t group = w != nullptr ? w->group : stored.columns, run = run_of(w, way);
  const int64_t whole = std::max<int64_t>(group, 1);
  const bool shorts = way == Way::kBytes && multiplies_shorts(*w);
  const int64_t part = in_words ? part_of(*w, way == Way::kPairs || shorts, run) * kStep : whole;
  Rows rows = prepare(x, group, w != nullptr ? w->groups : 1, part, int8, sums, way, run, shorts);
  const Sink sink(rows, low_rank, int8, bias, y);
  switch (way) {
    case Way::kFew:
    case Way::kFewPairs:
      return multiply_few(rows, *w, sink);
#if defined(COFIRE_WHOLE)
    case Way::kWholeBytes:
      TORCH_INTERNAL_ASSERT(!low_rank.low.defined());  // of which a sink adds kWidth columns
      return multiply_whole(rows, *w, sink);
#endif
    case Way::kBytes:
    case Way::kPairs:
      return multiply_words(rows, *w, sink);
    default:
      return multiply_floats(rows, stored, w, sink);
  }
}

}  // namespace lowbit
}  // namespace CPU_CAPABILITY
}  // namespace cofire
