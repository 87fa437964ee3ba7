// SPDX-License-Identifier: Apache-2.0
// Products with a packed weight: y = x W^T.
//
// Two inner loops each for floats and for bytes. With a few rows of x the codes
// are decoded in registers and used there (decoding is most of the work, reading
// the weight the limit). With more, a tile of the weight is decoded into the
// first-level cache and multiplied by blocks of rows. The work is cut by rows of
// the weight alone, so results do not depend on the number of threads.
#include <cmath>

#include "lowbit.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace lowbit {

namespace {

[[maybe_unused]] bool has_vnni() {
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
  static const bool found = __builtin_cpu_supports("avx512vnni");
  return found;
#else
  return false;
#endif
}

[[maybe_unused]] bool has_bf16() {
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

// The rows of x, as the loops read them. Columns are padded to whole steps by zeros.
struct Rows {
  int64_t count, columns, stride;
  at::Tensor values;  // fp32 [count, stride]; with bytes only where they go through floats
  at::Tensor bytes;   // int8 [count, stride]
  at::Tensor pairs;   // bf16 [count, stride]
  at::Tensor sums;    // fp32 [count, groups]: of values, or of bytes
  at::Tensor scales;  // fp32 [count], of bytes

  const float* row(int64_t m) const { return values.const_data_ptr<float>() + m * stride; }
  const int8_t* row8(int64_t m) const { return bytes.const_data_ptr<int8_t>() + m * stride; }
};

float largest(const float* x, int64_t n) {
  Vec most(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) most = at::vec::maximum(most, Vec::loadu(x + i).abs());
  if (i < n) {  // the other lanes are zero
    float rest[kLanes] = {};
    std::copy(x + i, x + n, rest);
    most = at::vec::maximum(most, Vec::loadu(rest).abs());
  }
  return reduce_max(most);
}

// Rounds a row to symmetric bytes, halves to even, and returns the scale.
float quantize_row(const float* x, int64_t n, int8_t* out) {
  const float scale = largest(x, n) / 127;
  if (!(scale > 0) || !std::isfinite(scale)) {
    std::fill(out, out + n, 0);
    return scale;
  }
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t i = 0; i < n; ++i) {
    const float shifted = x[i] / scale + kMagic;
    int32_t word;
    std::memcpy(&word, &shifted, sizeof(word));
    out[i] = static_cast<int8_t>(word);
  }
  return scale;
}

Rows prepare(const at::Tensor& x, int64_t group, int64_t groups, bool int8, bool sums, bool many,
             bool bytes_as_floats) {
  Rows rows;
  rows.count = x.size(0);
  rows.columns = x.size(1);
  const int64_t apart = many ? kApart : 0;
  rows.stride = round_up(rows.columns, kStep) + apart;
  const bool as_it_is = x.scalar_type() == at::kFloat && x.is_contiguous() &&
                        rows.stride == rows.columns && !bytes_as_floats;
  rows.values = as_it_is ? x : float_rows(x, kStep, apart);
  if (int8) {
    rows.bytes = at::empty({rows.count, rows.stride}, x.options().dtype(at::kChar));
    rows.scales = at::empty({rows.count}, x.options().dtype(at::kFloat));
  }
  if (sums) rows.sums = at::empty({rows.count, groups}, x.options().dtype(at::kFloat));
  const auto* values = rows.values.const_data_ptr<float>();
  at::parallel_for(0, rows.count, grain_of(8 * rows.stride), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const float* v = values + m * rows.stride;
      int8_t* p = nullptr;
      if (int8) {
        p = rows.bytes.mutable_data_ptr<int8_t>() + m * rows.stride;
        rows.scales.mutable_data_ptr<float>()[m] = quantize_row(v, rows.columns, p);
        std::fill(p + rows.columns, p + rows.stride, 0);
        if (bytes_as_floats) {
          std::copy(p, p + rows.columns, rows.values.mutable_data_ptr<float>() + m * rows.stride);
        }
      }
      for (int64_t g = 0; sums && g < groups; ++g) {
        const int64_t from = g * group, to = from + group;
        float total = 0;
        if (int8) {
          int32_t whole = 0;
          for (int64_t k = from; k < to; ++k) whole += p[k];
          total = static_cast<float>(whole);
        } else {
          F16 part = F16::zero();
          int64_t k = from;
          for (; k + 16 <= to; k += 16) part = part + F16::load(v + k);
          float lanes[16];
          part.store(lanes);
          for (const float lane : lanes) total += lane;
          for (; k < to; ++k) total += v[k];
        }
        rows.sums.mutable_data_ptr<float>()[m * groups + g] = total;
      }
    }
  });
  return rows;
}

// Where a block of results goes: the low-rank term, the scale of the row and the bias are added on
// the way.
struct Sink {
  const Rows& rows;
  const LowRank& low_rank;
  bool scaled;
  at::Tensor bias;  // fp32 [N], or undefined
  const at::Tensor& y;

  // c: [count][kWidth] for the rows from m on and the columns from n on; changed.
  void operator()(float* c, int64_t m, int64_t count, int64_t n, int64_t width) const {
    if (low_rank.low.defined()) {
      const int64_t rank = low_rank.low.size(1);
      product(low_rank.low.const_data_ptr<float>() + m * rank, rank, 1,
              low_rank.b.const_data_ptr<float>() + n, low_rank.b.size(1), c, kWidth, count, rank);
    }
    dispatch(y.scalar_type(), [&](auto example) {
      using T = decltype(example);
      const int64_t all = y.size(1);
      T* to = y.mutable_data_ptr<T>() + m * all + n;
      const float* added = bias.defined() ? bias.const_data_ptr<float>() + n : nullptr;
      const int64_t used = std::min(width, all - n);
      for (int64_t r = 0; r < count; ++r) {
        const float a = scaled ? rows.scales.const_data_ptr<float>()[m + r] : 1.0f;
        int64_t j = 0;
        for (; j + 16 <= used; j += 16) {
          F16 value = F16::load(c + r * kWidth + j);
          if (scaled) value = rounded(value * F16::all(a));
          if (added != nullptr) value = value + F16::load(added + j);
          alignas(64) float lanes[16];
          value.store(lanes);
          for (int i = 0; i < 16; i += kLanes) {
            store_f32(to + r * all + j + i, Vec::loadu(lanes + i));
          }
        }
        for (; j < used; ++j) {
          float value = c[r * kWidth + j];
          if (scaled) value = rounded(value * a);
          if (added != nullptr) value += added[j];
          to[r * all + j] = static_cast<T>(value);
        }
      }
    });
  }
};

COFIRE_INLINE uint32_t four(const int8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

// Bytes of the weight that are asked for in advance: where a step takes some 25 cycles, memory
// answers after 20 of them; a tile stops reading for as long as it is multiplied.
constexpr int64_t kAhead = 6144, kTileAhead = 2048;

template <int Bits>
COFIRE_INLINE void ask_for(const uint8_t* codes) {
  COFIRE_UNROLL
  for (int i = 0; i < Bits; ++i) __builtin_prefetch(codes + 64 * i);
}

// ------------------------------------------------------------------------------------ few rows

// How a code becomes a float.
enum class Value { kTable, kConvert, kGather };

// Calls f with the number of bits of a weight and the way in which its codes become floats.
template <typename F>
void with_value(const Packed& w, F&& f) {
  with_bits(w.bits, [&](auto bits) {
    constexpr int B = bits;
    if (w.uniform && !(kLookup && B <= 4)) {
      f(bits, std::integral_constant<Value, Value::kConvert>{});
    } else if constexpr (B <= 4) {
      f(bits, std::integral_constant<Value, Value::kTable>{});
    } else {
      f(bits, std::integral_constant<Value, Value::kGather>{});
    }
  });
}

// The loops over rows are unrolled by `unrolled`: arrays that a pragma's loop indexes stay in
// memory.

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
  const int8_t* p[R];
  unrolled<R>([&](auto r) __attribute__((always_inline)) { p[r] = x.row8(m + r); });
  F16 y[R];
  unrolled<R>([&](auto r) __attribute__((always_inline)) { y[r] = F16::zero(); });
  const uint8_t* codes = w.step(block, 0);
  const int64_t padded = kBlock * w.blocks;
  const float* scale = w.scale.const_data_ptr<float>() + block * kBlock;
  const float* shift =
      w.byte_shift.defined() ? w.byte_shift.const_data_ptr<float>() + block * kBlock : nullptr;
  int64_t column = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    W16 total[R], acc[R][kChains];
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      total[r] = W16::zero();
      unrolled<kChains>([&](auto i) __attribute__((always_inline)) { acc[r][i] = W16::zero(); });
    });
    for (int64_t s = 0; s < steps; ++s, codes += 64 * Bits, column += kStep) {
      ask_for<Bits>(codes + kAhead);
      const Planes<Bits> planes(codes);
      if constexpr (Kind == Bytes::kNarrow) {  // 16 bits hold one step
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
          unrolled<kChains>([&](auto i)
                                __attribute__((always_inline)) { acc[r][i] = W16::zero(); });
        });
      }
      unrolled<8>([&](auto q) __attribute__((always_inline)) {
        W16 quad = planes.template quad<q>();
        if constexpr (Lookup) quad = table[quad];
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
          acc[r][q % kChains] =
              dot<Kind>(acc[r][q % kChains], quad, W16::all(four(p[r] + column + 4 * q)));
        });
      });
      if constexpr (Kind == Bytes::kNarrow) {
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
          unrolled<kChains>([&](auto i) __attribute__((always_inline)) {
            total[r] = widened<Kind>(total[r], acc[r][i]);
          });
        });
      }
    }
    const F16 factor = F16::load(scale + g * padded);
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      if constexpr (Kind != Bytes::kNarrow) {
        unrolled<kChains>([&](auto i) __attribute__((always_inline)) {
          total[r] = widened<Kind>(total[r], acc[r][i]);
        });
      }
      y[r] = fma(factor, to_float(total[r]), y[r]);
      if (shift != nullptr) {
        const F16 sum = F16::all(x.sums.const_data_ptr<float>()[(m + r) * w.groups + g]);
        y[r] = fma(F16::load(shift + g * padded), sum, y[r]);
      }
    });
  }
  unrolled<R>([&](auto r) __attribute__((always_inline)) { y[r].store(c + r * kWidth); });
}

template <int Bits, Value How, int Q, int I>
COFIRE_INLINE F16 value_of(const Planes<Bits>& planes, const W16& quad, const Table16& table,
                           const float* entries) {
  if constexpr (How == Value::kTable && (Bits == 4 || Bits == 2 || Bits == 1)) {
    // Straight from the plane: bits of the next codes choose among equal entries.
    constexpr int fields = 8 / Bits;
    return table[shift_right<8 * I + Bits*(Q % fields)>(planes.vector(Q / fields))];
  } else if constexpr (How == Value::kTable) {
    return table[shift_right<8 * I>(quad)];
  } else {
    const W16 code = shift_right<8 * I>(quad) & W16::all(255);
    return How == Value::kConvert ? to_float(code) : gather(entries, code);
  }
}

template <int Bits, int R, Value How>
void few_floats(const Rows& x, const Packed& w, int64_t block, int64_t m, float* c) {
  constexpr int kChains = std::clamp(kSums / R, 1, 4);
  const int64_t steps = w.groups == 1 ? w.steps : w.group / kStep;
  const float* entries =
      w.table.const_data_ptr<float>() + block / w.partition_blocks * w.table.size(1);
  alignas(64) float centred[16];
  for (int i = 0; i < 16; ++i) centred[i] = entries[i] - w.middle;
  const Table16 table(centred);
  const F16 middle = F16::all(w.middle);
  F16 y[R];
  unrolled<R>([&](auto r) __attribute__((always_inline)) { y[r] = F16::zero(); });
  const uint8_t* codes = w.step(block, 0);
  const int64_t padded = kBlock * w.blocks;
  const float* scale = w.scale.const_data_ptr<float>() + block * kBlock;
  const float* shift =
      w.few_shift.defined() ? w.few_shift.const_data_ptr<float>() + block * kBlock : nullptr;
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
        const W16 quad = planes.template quad<q>();
        unrolled<4>([&](auto i) __attribute__((always_inline)) {
          F16 value = value_of<Bits, How, q, i>(planes, quad, table, entries);
          if constexpr (How == Value::kConvert) value = value - middle;
          unrolled<R>([&](auto r) __attribute__((always_inline)) {
            F16& sum = acc[r][i % kChains];
            sum = fma(value, F16::all(p[r][column + 4 * q + i]), sum);
          });
        });
      });
    }
    const F16 factor = F16::load(scale + g * padded);
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      F16 sum = acc[r][0];
      unrolled<kChains - 1>([&](auto i)
                                __attribute__((always_inline)) { sum = sum + acc[r][i + 1]; });
      y[r] = fma(factor, sum, y[r]);
      if (shift != nullptr) {
        const F16 total = F16::all(x.sums.const_data_ptr<float>()[(m + r) * w.groups + g]);
        y[r] = fma(F16::load(shift + g * padded), total, y[r]);
      }
    });
  }
  unrolled<R>([&](auto r) __attribute__((always_inline)) { y[r].store(c + r * kWidth); });
}

// Rows that are taken together: one, two or kFewRows.
int64_t part_of_few(int64_t rows) {
  if (rows >= kFewRows) return kFewRows;
  return rows >= 2 ? 2 : 1;
}

template <typename F>
void with_rows(int64_t rows, F&& f) {
  if (rows == 1) return f(std::integral_constant<int, 1>{});
  if constexpr (kFewRows > 1) {
    if (rows == 2) return f(std::integral_constant<int, 2>{});
    f(std::integral_constant<int, kFewRows>{});
  }
}

// Calls f with the way in which bytes are multiplied by this weight on this machine.
template <typename F>
void with_kind(const Packed& w, F&& f) {
#if defined(CPU_CAPABILITY_AVX512)
  if (has_vnni()) return f(std::integral_constant<Bytes, Bytes::kVnni>{});
#elif defined(CPU_CAPABILITY_AVX2)
  if (!w.bytes.defined() && w.bits <= 4) {
    return f(std::integral_constant<Bytes, Bytes::kNarrow>{});
  }
  if (!w.bytes.defined() && w.bits <= 7) return f(std::integral_constant<Bytes, Bytes::kPairs>{});
#endif
  f(std::integral_constant<Bytes, Bytes::kWide>{});
}

using Few = void (*)(const Rows&, const Packed&, int64_t, int64_t, float*);

Few few_kernel(const Packed& w, int64_t rows, bool int8) {
  Few found = nullptr;
  with_rows(rows, [&](auto r) {
    constexpr int R = r;
    if (!int8) {
      with_value(w, [&](auto bits, auto how) { found = few_floats<bits, R, how>; });
      return;
    }
    with_bits(w.bits, [&](auto bits) {
      with_kind(w, [&](auto kind) {
        constexpr int B = bits;
        constexpr Bytes K = kind;
        if constexpr (K == Bytes::kNarrow && B > 4)
          return;
        else if (!w.bytes.defined())
          found = few_bytes<B, R, K, false>;
        else if constexpr (B <= 4 && K != Bytes::kNarrow && K != Bytes::kPairs) {
          found = few_bytes<B, R, K, true>;
        }
      });
    });
  });
  return found;
}

void multiply_few(const Rows& x, const Packed& w, bool int8, const Sink& sink) {
  const int64_t cost = w.steps * kStep * kBlock / 8 * x.count;
  at::parallel_for(0, w.blocks, grain_of(cost), [&](int64_t begin, int64_t end) {
    alignas(64) float c[kFewRows * kWidth];
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t m = 0, now; m < x.count; m += now) {
        now = part_of_few(x.count - m);
        few_kernel(w, now, int8)(x, w, block, m, c);
        sink(c, m, now, block * kBlock, kBlock);
      }
    }
  });
}

// ----------------------------------------------------------------------------------- more rows

constexpr int64_t kRowsAtOnce = 64;

// R rows times kTileBlocks blocks over one group of decoded words [word][kWidth]: four bytes each,
// or a pair of bf16. `p` and `stride`: the rows of x, of the same words.
template <int R, typename Sum, typename Dot>
COFIRE_INLINE void add_word(const int8_t* p, int64_t stride, const uint8_t* tile, int64_t q,
                            Sum (&sums)[R][kTileBlocks], const Dot& dot_of) {
  W16 w[kTileBlocks];
  COFIRE_UNROLL
  for (int j = 0; j < kTileBlocks; ++j) w[j] = W16::load(tile + q * 4 * kWidth + 64 * j);
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) {
    const W16 x = W16::all(four(p + r * stride + 4 * q));
    COFIRE_UNROLL
    for (int j = 0; j < kTileBlocks; ++j) sums[r][j] = dot_of(sums[r][j], w[j], x);
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

// c += scale * total + shift * sums.
template <int R>
COFIRE_INLINE void add_group(F16 (&total)[R][kTileBlocks], const float* scale, const float* shift,
                             const float* sums, int64_t groups, float* c) {
  COFIRE_UNROLL
  for (int j = 0; j < kTileBlocks; ++j) {
    const F16 factor = F16::load(scale + 16 * j);
    const F16 moved = shift != nullptr ? F16::load(shift + 16 * j) : F16::zero();
    COFIRE_UNROLL
    for (int r = 0; r < R; ++r) {
      float* to = c + r * kWidth + 16 * j;
      F16 y = fma(factor, total[r][j], F16::load(to));
      if (shift != nullptr) y = fma(moved, F16::all(sums[r * groups]), y);
      y.store(to);
    }
  }
}

template <int R, Bytes Kind>
void tile_bytes(const int8_t* p, int64_t stride, const uint8_t* tile, int64_t quads,
                const float* scale, const float* shift, const float* sums, int64_t groups,
                float* c) {
  W16 acc[R][kTileBlocks];
  clear(acc);
  const auto dot_of = [](W16 a, W16 w, W16 x)
                          __attribute__((always_inline)) { return dot<Kind>(a, w, x); };
  if constexpr (Kind == Bytes::kNarrow) {  // 16 bits hold one step
    for (int64_t q = 0; q < quads; q += 8) {
      W16 narrow[R][kTileBlocks];
      clear(narrow);
      unrolled<8>([&](auto i) __attribute__((always_inline)) {
        add_word(p, stride, tile, q + i, narrow, dot_of);
      });
      COFIRE_UNROLL
      for (int r = 0; r < R; ++r) {
        COFIRE_UNROLL
        for (int j = 0; j < kTileBlocks; ++j) acc[r][j] = widened<Kind>(acc[r][j], narrow[r][j]);
      }
    }
  } else {
    for (int64_t q = 0; q < quads; ++q) add_word(p, stride, tile, q, acc, dot_of);
  }
  F16 total[R][kTileBlocks];
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) {
    COFIRE_UNROLL
    for (int j = 0; j < kTileBlocks; ++j) total[r][j] = to_float(acc[r][j]);
  }
  add_group(total, scale, shift, sums, groups, c);
}

#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
// The same for pairs of bf16.
template <int R>
void tile_pairs(const int8_t* p, int64_t stride, const uint8_t* tile, int64_t pairs,
                const float* scale, const float* shift, const float* sums, int64_t groups,
                float* c) {
  F16 acc[R][kTileBlocks];
  clear(acc);
  const auto dot_of = [](F16 a, W16 w, W16 x)
                          __attribute__((always_inline)) { return dot_bf16(a, w, x); };
  for (int64_t q = 0; q < pairs; ++q) add_word(p, stride, tile, q, acc, dot_of);
  add_group(acc, scale, shift, sums, groups, c);
}

// Decodes one step of a block into a tile of pairs: codes, and the bytes of tables, are exact in
// bf16.
template <int Bits, Value How>
void step_to_pairs(const uint8_t* codes, const float* entries, uint8_t* tile) {
  ask_for<Bits>(codes + kTileAhead);
  const Planes<Bits> planes(codes);
  const Table16 table(entries);
  unrolled<8>([&](auto q) __attribute__((always_inline)) {
    const W16 quad = planes.template quad<q>();
    unrolled<2>([&](auto h) __attribute__((always_inline)) {
      const F16 low = value_of<Bits, How, q, 2 * h>(planes, quad, table, entries);
      const F16 high = value_of<Bits, How, q, 2 * h + 1>(planes, quad, table, entries);
      const W16 pair = shift_right<16>(bits_of(low)) | (bits_of(high) & W16::all(0xffff0000u));
      pair.store(tile + (2 * q + h) * 4 * kWidth);
    });
  });
}
#endif

using Tile = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, const float*, const float*,
                      const float*, int64_t, float*);

template <Bytes Kind, int... R>
Tile tile_kernel(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr Tile kernels[] = {tile_bytes<R + 1, Kind>...};
  return kernels[rows - 1];
}

#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
template <int... R>
Tile pairs_kernel(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr Tile kernels[] = {tile_pairs<R + 1>...};
  return kernels[rows - 1];
}
#endif

// Decodes quads of one step of a block into a tile of bytes.
template <int Bits>
void step_to_bytes(const uint8_t* codes, const uint8_t* table, uint8_t* tile) {
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
    quad.store(tile + q * 4 * kWidth);
  });
}

// By tiles of bytes, or of pairs of bf16.
void multiply_words(const Rows& x, const Packed& w, bool pairs, const Sink& sink) {
  const int64_t tiles = (w.blocks + kTileBlocks - 1) / kTileBlocks, padded = kBlock * w.blocks;
  const int64_t steps = w.groups == 1 ? w.steps : w.group / kStep;
  const int64_t size = pairs ? 2 : 1;  // bytes of a weight in the tile
  const at::Tensor& shift_of = pairs ? w.shift : w.byte_shift;
  const int8_t* const words =
      pairs ? reinterpret_cast<const int8_t*>(x.pairs.const_data_ptr<c10::BFloat16>())
            : x.bytes.const_data_ptr<int8_t>();
  const auto kernel = [&](int64_t rows) {
    Tile found = nullptr;
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
    if (pairs) return pairs_kernel(rows, std::make_integer_sequence<int, kTileRows>{});
#endif
    with_kind(w, [&](auto kind) {
      found = tile_kernel<kind>(rows, std::make_integer_sequence<int, kTileRows>{});
    });
    return found;
  };
  // `piece` steps of the blocks from `first` on, from step `at` on.
  const auto decode = [&](int64_t first, int64_t used, int64_t at, int64_t piece, uint8_t* tile) {
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
    if (pairs) {
      return with_value(w, [&](auto bits, auto how) {
        for (int64_t b = 0; b < used; ++b) {
          const float* entries =
              w.table.const_data_ptr<float>() + (first + b) / w.partition_blocks * w.table.size(1);
          for (int64_t i = 0; i < piece; ++i) {
            step_to_pairs<bits, how>(w.step(first + b, at + i), entries,
                                     tile + i * kStep * kWidth * 2 + 64 * b);
          }
        }
      });
    }
#endif
    with_bits(w.bits, [&](auto bits) {
      for (int64_t b = 0; b < used; ++b) {
        const uint8_t* table = w.bytes.defined()
                                   ? w.bytes.const_data_ptr<uint8_t>() +
                                         (first + b) / w.partition_blocks * w.bytes.size(1)
                                   : nullptr;
        for (int64_t i = 0; i < piece; ++i) {
          step_to_bytes<bits>(w.step(first + b, at + i), table, tile + i * kStep * kWidth + 64 * b);
        }
      }
    });
  };
  const int64_t cost = w.steps * kStep * kWidth / 8 * x.count;
  at::parallel_for(0, tiles, grain_of(cost), [&](int64_t begin, int64_t end) {
    const int64_t at_once = std::min(kRowsAtOnce, x.count);
    constexpr int64_t kPiece = 8;  // steps that are decoded at a time: 24 KB at most
    std::vector<uint8_t> tile(64 + std::min(steps, kPiece) * kStep * kWidth * size);
    std::vector<float> c(at_once * kWidth), factor(kWidth), moved(kWidth);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * kTileBlocks,
                    used = std::min<int64_t>(kTileBlocks, w.blocks - first);
      for (int64_t m = 0; m < x.count; m += at_once) {
        const int64_t rows = std::min(at_once, x.count - m);
        std::fill(c.begin(), c.begin() + rows * kWidth, 0.0f);
        for (int64_t g = 0; g < w.groups; ++g) {
          std::copy_n(w.scale.const_data_ptr<float>() + g * padded + first * kBlock, used * kBlock,
                      factor.begin());
          if (shift_of.defined()) {
            std::copy_n(shift_of.const_data_ptr<float>() + g * padded + first * kBlock,
                        used * kBlock, moved.begin());
          }
          for (int64_t s = 0; s < steps; s += kPiece) {
            const int64_t piece = std::min(kPiece, steps - s), at = g * steps + s;
            decode(first, used, at, piece, tile.data());
            // The shift of a group is added with its first piece.
            const float* shift = shift_of.defined() && s == 0 ? moved.data() : nullptr;
            for (int64_t r = 0, now; r < rows; r += now) {
              now = next_part(rows - r, kTileRows);
              const float* sums = shift != nullptr
                                      ? x.sums.const_data_ptr<float>() + (m + r) * w.groups + g
                                      : nullptr;
              kernel(now)(words + ((m + r) * x.stride + at * kStep) * size, x.stride * size,
                          tile.data(), piece * kStep / 4 * size, factor.data(), shift, sums,
                          w.groups, c.data() + r * kWidth);
            }
          }
        }
        sink(c.data(), m, rows, first * kBlock, kWidth);
      }
    }
  });
}

// Decodes one step of a block to the weight itself: [32][kWidth] floats.
template <int Bits, Value How>
void step_to_floats(const uint8_t* codes, const float* entries, F16 factor, F16 moved,
                    float* tile) {
  ask_for<Bits>(codes + kTileAhead);
  const Planes<Bits> planes(codes);
  const Table16 table(entries);
  unrolled<8>([&](auto q) __attribute__((always_inline)) {
    const W16 quad = planes.template quad<q>();
    unrolled<4>([&](auto i) __attribute__((always_inline)) {
      const F16 value = value_of<Bits, How, q, i>(planes, quad, table, entries);
      fma(value, factor, moved).store(tile + (4 * q + i) * kWidth);
    });
  });
}

void multiply_floats(const Rows& x, const Stored& stored, const Packed* w, const Sink& sink) {
  const int64_t blocks = (stored.rows + kBlock - 1) / kBlock;
  const int64_t tiles = (blocks + kTileBlocks - 1) / kTileBlocks, padded = kBlock * blocks;
  constexpr int64_t kDepth = 128;  // columns that are decoded at a time: 24 KB at most
  const int64_t cost = x.stride * kWidth / 2 * x.count;
  at::parallel_for(0, tiles, grain_of(cost), [&](int64_t begin, int64_t end) {
    const int64_t at_once = std::min(kRowsAtOnce, x.count);
    std::vector<float> tile(kDepth * kWidth), c(at_once * kWidth), values(kDepth);
    std::vector<uint8_t> bytes(kDepth + 16);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * kTileBlocks, used = std::min<int64_t>(kTileBlocks, blocks - first);
      for (int64_t m = 0; m < x.count; m += at_once) {
        const int64_t rows = std::min(at_once, x.count - m);
        std::fill(c.begin(), c.begin() + rows * kWidth, 0.0f);
        for (int64_t k = 0; k < x.columns; k += kDepth) {
          const int64_t depth = std::min(kDepth, x.columns - k);
          if (w == nullptr) {
            const int64_t last = std::min(stored.rows, (first + used) * kBlock);
            for (int64_t n = first * kBlock; n < last; ++n) {
              stored.values_of(n, k, depth, bytes.data(), values.data());
              float* to = tile.data() + (n - first * kBlock);
              for (int64_t i = 0; i < depth; ++i) to[i * kWidth] = values[i];
            }
          } else {
            with_value(*w, [&](auto bits, auto how) {
              for (int64_t b = 0; b < used; ++b) {
                const float* entries = w->table.const_data_ptr<float>() +
                                       (first + b) / w->partition_blocks * w->table.size(1);
                for (int64_t i = 0; i < depth; i += kStep) {
                  const int64_t g = w->groups == 1 ? 0 : (k + i) / w->group;
                  const int64_t at = g * padded + (first + b) * kBlock;
                  const F16 factor = F16::load(w->scale.const_data_ptr<float>() + at);
                  const F16 moved = w->shift.defined()
                                        ? F16::load(w->shift.const_data_ptr<float>() + at)
                                        : F16::zero();
                  step_to_floats<bits, how>(w->step(first + b, (k + i) / kStep), entries, factor,
                                            moved, tile.data() + i * kWidth + 16 * b);
                }
              }
            });
          }
          product(x.row(m) + k, x.stride, 1, tile.data(), kWidth, c.data(), kWidth, rows, depth);
        }
        sink(c.data(), m, rows, first * kBlock, kWidth);
      }
    }
  });
}

}  // namespace

Way way_of(const Stored& w, int64_t count, at::ScalarType dtype, bool int8) {
  if (!can_pack(w)) return Way::kStored;
  // Bytes from a table of more than 16 entries are looked up one by one: once, for a tile.
  const bool looked_up = int8 && w.int8_lut && w.bits > 4;
  if (count <= (int8 ? kFewBytes : kFewFloats) && !looked_up) return Way::kFew;
  if (int8) return Way::kBytes;
  const bool exact = !w.lut.defined() || w.int8_lut;
  return dtype == at::kBFloat16 && exact && has_bf16() ? Way::kPairs : Way::kFloats;
}

std::string plan_of(const Stored& w, int64_t count, at::ScalarType dtype, bool int8) {
  const std::string rows = std::to_string(count) + (count == 1 ? " row" : " rows");
  const std::string limit = std::to_string(int8 ? kFewBytes : kFewFloats);
  switch (way_of(w, count, dtype, int8)) {
    case Way::kFew:
      return "codes decoded in registers: " + rows + ", up to " + limit;
    case Way::kBytes:
      return "tiles of the weight decoded to bytes: " + rows + ", more than " + limit +
             (w.int8_lut && w.bits > 4 ? " or a table of more than 16 entries" : "");
    case Way::kPairs:
      return "tiles of the weight decoded to pairs of bf16: " + rows + ", more than " + limit;
    case Way::kFloats:
      return "tiles of the weight decoded to floats: " + rows + ", more than " + limit;
    case Way::kStored:
      break;
  }
  return "tiles decoded from the stored codes: groups or palettes that blocks of 16 rows and 32 "
         "columns do not fit";
}

void multiply(const at::Tensor& x, const Stored& stored, const Packed* w, const MaybeTensor& bias,
              const LowRank& low_rank, bool int8, const at::Tensor& y) {
  if (y.numel() == 0) return;
  const Way way = way_of(stored, x.size(0), x.scalar_type(), int8);
  const at::Tensor* shift = w == nullptr       ? nullptr
                            : int8             ? &w->byte_shift
                            : way == Way::kFew ? &w->few_shift
                                               : &w->shift;
  const bool sums = shift != nullptr && shift->defined() && way != Way::kFloats;
  Rows rows = prepare(x, w != nullptr ? w->group : stored.columns, w != nullptr ? w->groups : 1,
                      int8, sums, way != Way::kFew, int8 && way == Way::kStored);
  if (way == Way::kPairs) {
    rows.pairs = rows.values.to(at::kBFloat16);  // what they were, padded
  }
  const Sink sink{rows, low_rank, int8,
                  bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor(), y};
  switch (way) {
    case Way::kFew:
      return multiply_few(rows, *w, int8, sink);
    case Way::kBytes:
    case Way::kPairs:
      return multiply_words(rows, *w, way == Way::kPairs, sink);
    default:
      return multiply_floats(rows, stored, w, sink);
  }
}

}  // namespace lowbit
}  // namespace CPU_CAPABILITY
}  // namespace cofire
