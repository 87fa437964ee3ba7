// SPDX-License-Identifier: Apache-2.0
// Products with weights stored by panels of 16 rows (bitmap, block): a vector holds one column of a
// panel, and a token is a broadcast. Of a bitmap the vector is made from consecutive values and a
// word of 16 bits; of blocks it is stored as it is.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "instructions.h"
#include "sparse.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace sparse {

namespace {

constexpr int64_t kPanel = 16;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTogether = 14;  // tokens of the inner loop: a register each, and the column
constexpr int kFew = 8;        // up to as many, a bitmap is expanded in registers
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTogether = 6;
constexpr int kFew = 4;
#else
constexpr int kTogether = 2;
constexpr int kFew = 2;
#endif
constexpr int64_t kAhead = 2048;  // bytes whose way from memory is begun
constexpr int64_t kDepth = 256;   // columns of a panel that are expanded at once: 16 KB
constexpr int64_t kPart = 128;    // columns of blocks in a part of a sum
// Panels that a bitmap times one token takes side by side: each is two streams from memory, and one
// panel alone does not keep it busy, whatever is asked for ahead. Of two tokens half as many, which
// have as many sums.
constexpr int kSideBySide = 4;
// What an expansion may read of values that are not its own.
constexpr int64_t kBefore = 4, kBehind = 32;

// --------------------------------------------------------------------------- sixteen stored values

COFIRE_INLINE F16 load16(const float* p) { return F16::load(p); }

// How many values a word counts; never in a register of 16 bits, where a count waits for what the
// register held before.
COFIRE_INLINE int count(uint32_t word) {
#if defined(__GNUC__)
  asm("" : "+r"(word));
#endif
  return __builtin_popcount(word);
}

// Where the values behind those that a word counts begin; never in a vector of places, from which
// an address takes long to come back.
template <typename T>
COFIRE_INLINE const T* behind(const T* p, uint32_t word) {
  p += count(word);
#if defined(__GNUC__)
  asm("" : "+r"(p));
#endif
  return p;
}

#if defined(CPU_CAPABILITY_AVX512)

COFIRE_INLINE F16 load16(const c10::BFloat16* p) {
  const __m512i v = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))};
}
COFIRE_INLINE F16 load16(const c10::Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
COFIRE_INLINE F16 load16(const int8_t* p) {
  return {_mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

// The kept values of a column from p on, each in its row; p moves behind them.
template <typename T>
COFIRE_INLINE F16 expand(uint32_t word, const T*& p) {
  const F16 v{_mm512_maskz_expand_ps(static_cast<__mmask16>(word), load16(p).v)};
  p = behind(p, word);
  return v;
}

// Gives vectors that were expanded registers of their own. An expansion waits for what its register
// held before, although it writes all of it (Zen 4: 6 cycles each instead of 3).
template <int N>
COFIRE_INLINE void keep_apart(F16 (&all)[N]) {
  static_assert(N == 1 || N == 2 || N == 4 || N == 8);
#if defined(__GNUC__)
  if constexpr (N == 2) {
    asm("" : "+v"(all[0].v), "+v"(all[1].v));
  } else if constexpr (N == 4) {
    asm("" : "+v"(all[0].v), "+v"(all[1].v), "+v"(all[2].v), "+v"(all[3].v));
  } else if constexpr (N == 8) {
    asm(""
        : "+v"(all[0].v), "+v"(all[1].v), "+v"(all[2].v), "+v"(all[3].v), "+v"(all[4].v),
          "+v"(all[5].v), "+v"(all[6].v), "+v"(all[7].v));
  }
#endif
}

#ifndef _MSC_VER
bool has_vbmi2() {
  static const bool found = __builtin_cpu_supports("avx512vbmi2");
  return found;
}
// The numbers of 16 bits of a where the mask's bits are, from the first on, zeros elsewhere; for
// machines that have AVX512_VBMI2.
COFIRE_INLINE W16 expanded_halves(uint32_t mask, W16 a) {
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(a.v) : "Yk"(static_cast<__mmask32>(mask)));
  return a;
}
COFIRE_INLINE W16 permuted_halves(W16 a, W16 places) {
  return {_mm512_permutexvar_epi16(places.v, a.v)};
}
#endif

#elif defined(CPU_CAPABILITY_AVX2)

template <typename T>
COFIRE_INLINE __m128i bytes16(const T* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
COFIRE_INLINE F16 load16(const c10::BFloat16* p) {
  const auto half = [](const c10::BFloat16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bytes16(from)), 16));
  };
  return {half(p), half(p + 8)};
}
COFIRE_INLINE F16 load16(const c10::Half* p) {
  return {_mm256_cvtph_ps(bytes16(p)), _mm256_cvtph_ps(bytes16(p + 8))};
}
COFIRE_INLINE F16 load16(const int8_t* p) {
  const __m128i v = bytes16(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
}

// Of each byte of a word, 8 rows: which bytes of the values they take, and where; zero where a row
// has none (a shuffle writes zero where the place is negative). The values are `Size` bytes, and
// become the upper ones of the `Width` of a lane. Where values are as wide as a lane, four rows
// take their values from 16 bytes of their own: the first four from the last of theirs, and the
// others from the first, so that a single load of 32 bytes around the border has all.
template <int Size, int Width>
struct Places {
  alignas(64) uint8_t of[256][8 * Width];
  constexpr Places() : of{} {
    for (int byte = 0; byte < 256; ++byte) {
      int next = 0;
      if (Size == 4) {
        next = 4;
        for (int r = 0; r < 4; ++r) next -= byte >> r & 1;
      }
      for (int r = 0; r < 8; ++r) {
        if (Size == 4 && r == 4) next = 0;
        const bool kept = byte >> r & 1;
        for (int i = 0; i < Width; ++i) {
          const int from = i - (Width - Size);
          of[byte][r * Width + i] = kept && from >= 0 ? next * Size + from : 128;
        }
        next += kept;
      }
    }
  }
};
template <int Size, int Width = 4>
constexpr Places<Size, Width> kPlaces;

template <int Size>
COFIRE_INLINE __m256i shuffled(__m256i v, uint32_t byte) {
  const auto* place = reinterpret_cast<const __m256i*>(kPlaces<Size>.of[byte]);
  return _mm256_shuffle_epi8(v, _mm256_load_si256(place));
}
COFIRE_INLINE __m256 expand8(uint32_t byte, const c10::BFloat16* p) {
  return _mm256_castsi256_ps(shuffled<2>(_mm256_broadcastsi128_si256(bytes16(p)), byte));
}
COFIRE_INLINE __m256 expand8(uint32_t byte, const c10::Half* p) {
  const auto* place = reinterpret_cast<const __m128i*>(kPlaces<2, 2>.of[byte]);
  return _mm256_cvtph_ps(_mm_shuffle_epi8(bytes16(p), _mm_load_si128(place)));
}
COFIRE_INLINE __m256 expand8(uint32_t byte, const int8_t* p) {
  const __m256i v = _mm256_broadcastsi128_si256(bytes16(p));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(shuffled<1>(v, byte), 24));
}

COFIRE_INLINE F16 expand(uint32_t word, const float*& p) {
  const auto around = [](const float* border, uint32_t byte) __attribute__((always_inline)) {
    const auto* from = reinterpret_cast<const __m256i*>(border - 4);
    return _mm256_castsi256_ps(shuffled<4>(_mm256_loadu_si256(from), byte));
  };
  const F16 v{around(p + count(word & 0xF), word & 255),
              around(p + count(word & 0xFFF), word >> 8)};
  p = behind(p, word);
  return v;
}
template <typename T>
COFIRE_INLINE F16 expand(uint32_t word, const T*& p) {
  const uint32_t low = word & 255;
  const T* second = p + count(low);
  const F16 v{expand8(low, p), expand8(word >> 8, second)};
  p = behind(p, word);
  return v;
}

#else

template <typename T>
COFIRE_INLINE F16 load16(const T* p) {
  F16 v;
  for (int i = 0; i < 16; ++i) v.v[i] = static_cast<float>(p[i]);
  return v;
}
template <typename T>
COFIRE_INLINE F16 expand(uint32_t word, const T*& p) {
  F16 v;
  for (int i = 0; i < 16; ++i) v.v[i] = word >> i & 1 ? static_cast<float>(*p++) : 0.0f;
  return v;
}

#endif

// --------------------------------------------------------------------------------------- the input

// Tokens by tiles of up to kTogether: column k holds one float of each token of the tile.
struct Tiles {
  at::Tensor data;
  int64_t count, columns;  // columns rounded up, zeros there

  static int64_t first(int64_t tile) { return tile * kTogether; }
  int64_t number() const { return (count + kTogether - 1) / kTogether; }
  int64_t size(int64_t tile) const { return std::min<int64_t>(kTogether, count - first(tile)); }
  const float* of(int64_t tile) const {
    return data.const_data_ptr<float>() + first(tile) * columns;
  }
};

Tiles by_tiles(const at::Tensor& x, int64_t multiple) {
  Tiles t;
  t.count = x.size(0);
  t.columns = (x.size(1) + multiple - 1) / multiple * multiple;
  if (t.count == 1 && t.columns == x.size(1) && x.scalar_type() == at::kFloat) {
    t.data = x.contiguous();  // it is a tile
    return t;
  }
  t.data = at::empty({t.count * t.columns}, x.options().dtype(at::kFloat));
  auto* out = t.data.mutable_data_ptr<float>();
  const at::Tensor input = x.contiguous();
  const int64_t columns = x.size(1);
  dispatch(x.scalar_type(), [&](auto example) {
    using T = decltype(example);
    const T* from = input.const_data_ptr<T>();
    at::parallel_for(0, t.number(), grain_of(kTogether * columns), [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t size = t.size(tile);
        float* to = out + Tiles::first(tile) * t.columns;
        const T* token = from + Tiles::first(tile) * columns;
        for (int64_t r = 0; r < size; ++r) {
          for (int64_t k = 0; k < columns; ++k) {
            to[k * size + r] = static_cast<float>(token[r * columns + k]);
          }
        }
        std::fill(to + columns * size, to + t.columns * size, 0.0f);
      }
    });
  });
  return t;
}

// Calls f with a constant from 1 to Most.
template <int Most, typename F>
COFIRE_INLINE void with_tokens(int64_t count, F&& f) {
  if constexpr (Most > 1) {
    if (count < Most) return with_tokens<Most - 1>(count, std::forward<F>(f));
  }
  f(std::integral_constant<int, Most>{});
}

// c[16][stride] = the sums, a column for each token; or they are added to it.
template <int R>
COFIRE_INLINE void store_columns(const F16 (&sum)[R], float* c, int64_t stride, bool add = false) {
  if (R == 1 && stride == 1) return (add ? F16::load(c) + sum[0] : sum[0]).store(c);
  alignas(64) float v[16];
  for (int r = 0; r < R; ++r) {
    sum[r].store(v);
    for (int i = 0; i < 16; ++i) c[i * stride + r] = add ? c[i * stride + r] + v[i] : v[i];
  }
}

// ---------------------------------------------------------------------------------------- bitmaps

// Of the next kTurn columns: the words, and the values where half of them are kept.
constexpr int kTurn = 8;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kColumnsApart = 4;
#else
constexpr int kColumnsApart = 1;

template <int N>
COFIRE_INLINE void keep_apart(F16 (&)[N]) {}
#endif
template <typename T>
COFIRE_INLINE void ask_for(const uint16_t* words, const T* values) {
  __builtin_prefetch(words + kAhead / sizeof(*words));
  COFIRE_UNROLL
  for (size_t i = 0; i < sizeof(T); ++i) {
    __builtin_prefetch(values + (kAhead + 64 * i) / sizeof(T));
  }
}

// Stored values from a place on, of which more than the needed ones may be read.
template <typename T>
class Values {
 public:
  Values(const T* first, int64_t count) : first_(first), end_(first + count) {}

  // Where to read those of the next `columns` columns from: near the ends of all values, a copy.
  const T* at(int64_t place, int64_t columns) {
    const T* p = first_ + place;
    const int64_t most = columns * kPanel;
    if (p - first_ >= kBefore && end_ - p >= most + kBehind) return p;
    copy_.resize(kBefore + kDepth * kPanel + kBehind);
    std::copy(p, p + std::clamp<int64_t>(end_ - p, 0, most), copy_.begin() + kBefore);
    return copy_.data() + kBefore;
  }

 private:
  const T *first_, *end_;
  std::vector<T> copy_;
};

// P panels times R tokens, expanded in registers: adds up to kDepth columns to their sums.
template <int P, int R, typename T>
void add_columns(const uint16_t* words, int64_t stride, const T* (&values)[P], int64_t columns,
                 const float* x, F16 (&total)[P][R]) {
  constexpr int kColumns = P == 1 ? kTurn : 1;               // in a turn of the loop
  constexpr int kApart = std::min(kColumns, kColumnsApart);  // expanded before they are used
  F16 sum[P][R];
  const T* from[P];
  unrolled<P>([&](auto p) {
    from[p] = values[p];
    unrolled<R>([&](auto r) { sum[p][r] = F16::zero(); });
  });
  // Some columns of all panels.
  const auto add = [&](int64_t k, auto count) __attribute__((always_inline)) {
    constexpr int C = decltype(count)::value;
    F16 column[C * P];
    unrolled<C>([&](auto i) __attribute__((always_inline)) {
      unrolled<P>([&](auto p) __attribute__((always_inline)) {
        column[i * P + p] = expand(words[p * stride + k + i], from[p]);
      });
    });
    keep_apart(column);
    unrolled<C>([&](auto i) __attribute__((always_inline)) {
      F16 token[R];
      unrolled<R>([&](auto r)
                      __attribute__((always_inline)) { token[r] = F16::all(x[(k + i) * R + r]); });
      unrolled<P>([&](auto p) __attribute__((always_inline)) {
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
          sum[p][r] = fma(column[i * P + p], token[r], sum[p][r]);
        });
      });
    });
  };
  int64_t k = 0;
  for (; k + kColumns <= columns; k += kColumns) {
    if constexpr (P == 1) ask_for(words + k, from[0]);
    unrolled<kColumns / kApart>([&](auto i) __attribute__((always_inline)) {
      add(k + i * kApart, std::integral_constant<int, kApart>{});
    });
  }
  for (; k < columns; ++k) add(k, std::integral_constant<int, 1>{});
  unrolled<P>([&](auto p) {
    values[p] = from[p];
    unrolled<R>([&](auto r) { total[p][r] = total[p][r] + sum[p][r]; });
  });
}

// c[P * 16][R] = P panels, whose values begin at `starts`, times R tokens. The order of a sum does
// not depend on P.
template <int P, int R, typename T>
void multiply_few(const uint16_t* words, const int64_t* starts, Values<T>* values, int64_t columns,
                  const float* x, float* c) {
  F16 total[P][R];
  int64_t place[P];
  for (int p = 0; p < P; ++p) {
    place[p] = starts[p];
    for (int r = 0; r < R; ++r) total[p][r] = F16::zero();
  }
  for (int64_t k = 0; k < columns; k += kDepth) {
    const int64_t depth = std::min(kDepth, columns - k);
    const T *from[P], *to[P];
    for (int p = 0; p < P; ++p) from[p] = to[p] = values[p].at(place[p], depth);
    add_columns<P, R>(words + k, columns, to, depth, x + k * R, total);
    for (int p = 0; p < P; ++p) place[p] += to[p] - from[p];
  }
  for (int p = 0; p < P; ++p) store_columns(total[p], c + p * kPanel * R, R);
}

#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
// The same for values of bf16 and one token of bf16, where two columns are expanded at once and
// multiplied as pairs. x: its pairs.
template <int P>
void multiply_pairs(const uint16_t* words, const int64_t* starts, Values<c10::BFloat16>* values,
                    int64_t columns, const uint32_t* x, float* c) {
  // Row r of the first column and of the second become its pair.
  alignas(64) uint16_t places[32];
  for (int r = 0; r < 16; ++r) {
    places[2 * r] = static_cast<uint16_t>(r);
    places[2 * r + 1] = static_cast<uint16_t>(16 + r);
  }
  const W16 order = W16::load(places);
  F16 total[P][1];
  int64_t place[P];
  for (int p = 0; p < P; ++p) {
    place[p] = starts[p];
    total[p][0] = F16::zero();
  }
  for (int64_t k = 0; k < columns; k += kDepth) {
    const int64_t depth = std::min(kDepth, columns - k);
    const c10::BFloat16 *from[P], *to[P];
    F16 sum[P];
    unrolled<P>([&](auto p) __attribute__((always_inline)) {
      from[p] = to[p] = values[p].at(place[p], depth);
      sum[p] = F16::zero();
    });
    const auto add = [&](const uint16_t* word, uint32_t two,
                         bool both) __attribute__((always_inline)) {
      const W16 token = W16::all(two);
      F16 pair[P];
      unrolled<P>([&](auto p) __attribute__((always_inline)) {
        uint32_t mask = word[p * columns];
        if (both) std::memcpy(&mask, word + p * columns, sizeof(mask));
        asm("" : "+r"(mask));  // counted there, not in a register of masks
        __builtin_prefetch(to[p] + kAhead / sizeof(c10::BFloat16));
        pair[p] = as_float(permuted_halves(expanded_halves(mask, W16::load(to[p])), order));
        to[p] = behind(to[p], mask);
      });
      keep_apart(pair);
      unrolled<P>([&](auto p) __attribute__((always_inline)) {
        sum[p] = dot_bf16(sum[p], bits_of(pair[p]), token);
      });
    };
    const uint16_t* word = words + k;
    const uint32_t* two = x + k / 2;
    for (const uint16_t* end = word + depth / 2 * 2; word < end; word += 2) add(word, *two++, true);
    if (depth % 2) add(word, *two, false);
    unrolled<P>([&](auto p) __attribute__((always_inline)) {
      total[p][0] = total[p][0] + sum[p];
      place[p] += to[p] - from[p];
    });
  }
  for (int p = 0; p < P; ++p) store_columns(total[p], c + p * kPanel, 1);
}
#endif

// Adds some expanded columns of a panel to the sums of a tile of tokens.
template <int R>
void add_expanded(const float* panel, int64_t depth, const float* x, float* c) {
  F16 sum[R];
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) sum[r] = F16::zero();
  for (int64_t k = 0; k < depth; ++k) {
    const F16 w = F16::load(panel + k * kPanel);
    COFIRE_UNROLL
    for (int r = 0; r < R; ++r) sum[r] = fma(w, F16::all(x[k * R + r]), sum[r]);
  }
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) (F16::load(c + r * kPanel) + sum[r]).store(c + r * kPanel);
}

template <typename T>
void multiply_bitmap(const at::Tensor& x, const Weight& w, const Sink& sink) {
  const auto* words = static_cast<const uint16_t*>(w.index.const_data_ptr());
  const T* all = w.values.const_data_ptr<T>();
  const int64_t total = w.values.numel(), panels = (w.rows + kPanel - 1) / kPanel;
  const int64_t* starts = w.starts();
  const Tiles tiles = by_tiles(x, 1);
  const int64_t K = w.columns;
  std::vector<uint32_t> pairs;  // of a token of bf16, where pairs are multiplied
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
  if (std::is_same_v<T, c10::BFloat16> && x.scalar_type() == at::kBFloat16 && tiles.count == 1 &&
      has_bf16() && has_vbmi2()) {
    pairs.resize((K + 1) / 2);
    const at::Tensor token = x.contiguous();
    std::memcpy(pairs.data(), token.const_data_ptr(), K * 2);
  }
#endif
  // Panels that stay together where there are enough of them for all threads.
  const int64_t together =
      tiles.count <= kFew && panels >= kSideBySide * 4 * at::get_num_threads() ? kSideBySide : 1;
  const auto first_of = [&](int64_t unit) { return std::min(unit * together, panels); };
  const auto work = [&](int64_t unit) { return starts[first_of(unit)] + first_of(unit) * K * 2; };
  const int64_t units = (panels + together - 1) / together;
  in_equal_parts(
      units, 16384 / std::min<int64_t>(tiles.count, 16), work, [&](int64_t first, int64_t last) {
        const int64_t begin = first_of(first), end = first_of(last);
        if (tiles.count <= kFew) {
          std::vector<Values<T>> values(kSideBySide, {all, total});
          with_tokens<kFew>(tiles.count, [&](auto r) {
            constexpr int R = decltype(r)::value;
            float c[std::max(kSideBySide, R) * kPanel];
            int64_t p = begin;
            const auto take = [&](auto panels_at_once) {
              constexpr int P = decltype(panels_at_once)::value;
              for (; p + P <= end; p += P) {
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
                if constexpr (R == 1 && std::is_same_v<T, c10::BFloat16>) {
                  if (!pairs.empty()) {
                    multiply_pairs<P>(words + p * K, starts + p, values.data(), K, pairs.data(), c);
                    sink(c, R, p * kPanel, std::min(P * kPanel, w.rows - p * kPanel), 0, R);
                    continue;
                  }
                }
#endif
                multiply_few<P, R>(words + p * K, starts + p, values.data(), K, tiles.of(0), c);
                sink(c, R, p * kPanel, std::min(P * kPanel, w.rows - p * kPanel), 0, R);
              }
            };
            take(std::integral_constant<int, std::max(kSideBySide / R, 1)>{});
            take(std::integral_constant<int, 1>{});
          });
          return;
        }
        Values<T> stored(all, total);
        std::vector<float> panel(kDepth * kPanel), c(tiles.count * kPanel), out(kPanel * kTogether);
        for (int64_t p = begin; p < end; ++p) {
          std::fill(c.begin(), c.end(), 0.0f);
          int64_t place = starts[p];
          for (int64_t k = 0; k < K; k += kDepth) {
            const int64_t depth = std::min(kDepth, K - k);
            const T *from = stored.at(place, depth), *values = from;
            int64_t i = 0;
            for (; i + kTurn <= depth; i += kTurn) {
              const uint16_t* word = words + p * K + k + i;
              ask_for(word, values);
              F16 column[kTurn];
              unrolled<kTurn>([&](auto j) __attribute__((always_inline)) {
                column[j] = expand(word[j], values);
              });
              keep_apart(column);
              unrolled<kTurn>([&](auto j) __attribute__((always_inline)) {
                column[j].store(panel.data() + (i + j) * kPanel);
              });
            }
            for (; i < depth; ++i) {
              expand(words[p * K + k + i], values).store(panel.data() + i * kPanel);
            }
            place += values - from;
            for (int64_t t = 0; t < tiles.number(); ++t) {
              with_tokens<kTogether>(tiles.size(t), [&](auto r) {
                constexpr int R = decltype(r)::value;
                add_expanded<R>(panel.data(), depth, tiles.of(t) + k * R,
                                c.data() + Tiles::first(t) * kPanel);
              });
            }
          }
          for (int64_t t = 0; t < tiles.number(); ++t) {
            const int64_t size = tiles.size(t);
            const float* from = c.data() + Tiles::first(t) * kPanel;
            for (int64_t r = 0; r < size; ++r) {
              for (int64_t i = 0; i < kPanel; ++i) out[i * size + r] = from[r * kPanel + i];
            }
            sink(out.data(), size, p * kPanel, std::min(kPanel, w.rows - p * kPanel),
                 Tiles::first(t), size);
          }
        }
      });
}

// ----------------------------------------------------------------------------------------- blocks

// The blocks [begin, end) of a row of blocks, 16 of its rows, times a tile of tokens.
template <int R, typename T>
void multiply_blocks_of(const int32_t* index, const T* values, int64_t begin, int64_t end,
                        int64_t block_columns, int64_t block_rows, const float* x, float* c,
                        bool add) {
  F16 sum[R], other[R];
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) sum[r] = other[r] = F16::zero();
  constexpr bool two = R <= 2;
  for (int64_t b = begin; b < end; ++b) {
    const float* column = x + int64_t{index[b]} * block_columns * R;
    const T* v = values + b * block_columns * block_rows;
    int64_t k = 0;
    if constexpr (two) {
      for (; k + 2 <= block_columns; k += 2) {
        const F16 first = load16(v + k * block_rows), second = load16(v + (k + 1) * block_rows);
        COFIRE_UNROLL
        for (int r = 0; r < R; ++r) {
          sum[r] = fma(first, F16::all(column[k * R + r]), sum[r]);
          other[r] = fma(second, F16::all(column[(k + 1) * R + r]), other[r]);
        }
      }
    }
    for (; k < block_columns; ++k) {
      const F16 first = load16(v + k * block_rows);
      COFIRE_UNROLL
      for (int r = 0; r < R; ++r) sum[r] = fma(first, F16::all(column[k * R + r]), sum[r]);
    }
  }
  if constexpr (two) {
    COFIRE_UNROLL
    for (int r = 0; r < R; ++r) sum[r] = sum[r] + other[r];
  }
  store_columns(sum, c, R, add);
}

// Of blocks of one column: several at a time, each with sums of its own, by `part` blocks.
template <int R, typename T>
void multiply_columns_of(const int32_t* index, const T* values, int64_t begin, int64_t end,
                         int64_t part, int64_t block_rows, const float* x, float* c) {
  constexpr int kChains = R == 1 ? 4 : R == 2 ? 2 : 1;
  F16 total[R];
  unrolled<R>([&](auto r) { total[r] = F16::zero(); });
  int64_t b = begin;
  while (b < end) {
    const int64_t stop = std::min(b + part, end);
    F16 sum[kChains][R];
    unrolled<kChains>([&](auto i) __attribute__((always_inline)) {
      unrolled<R>([&](auto r) __attribute__((always_inline)) { sum[i][r] = F16::zero(); });
    });
    const auto add = [&](int64_t from, auto i) __attribute__((always_inline)) {
      const float* column = x + int64_t{index[from]} * R;
      const F16 v = load16(values + from * block_rows);
      unrolled<R>([&](auto r) __attribute__((always_inline)) {
        sum[i][r] = fma(v, F16::all(column[r]), sum[i][r]);
      });
    };
    for (; b + kChains <= stop; b += kChains) {
      // Bytes of places: fewer than of values.
      __builtin_prefetch(reinterpret_cast<const char*>(index + b) + kAhead / 4);
      unrolled<kChains>([&](auto i) __attribute__((always_inline)) {
        __builtin_prefetch(reinterpret_cast<const char*>(values + (b + i) * block_rows) + kAhead);
        add(b + i, i);
      });
    }
    for (; b < stop; ++b) add(b, std::integral_constant<int, 0>{});
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      F16 all = sum[0][r];
      for (int i = 1; i < kChains; ++i) all = all + sum[i][r];
      total[r] = total[r] + all;
    });
  }
  store_columns(total, c, R);
}

template <typename T>
void multiply_blocks(const at::Tensor& x, const Weight& w, const Sink& sink) {
  const auto* index = w.index.const_data_ptr<int32_t>();
  const T* values = w.values.const_data_ptr<T>();
  const int64_t* starts = w.starts();
  const int64_t grid = (w.rows + w.block_rows - 1) / w.block_rows, halves = w.block_rows / kPanel;
  const Tiles tiles = by_tiles(x, w.block_columns);
  const int64_t size = w.block_rows * w.block_columns;
  const auto work = [&](int64_t row) { return starts[row] * size + row * 16; };
  in_equal_parts(grid, 65536 / tiles.count, work, [&](int64_t begin, int64_t end) {
    float c[kPanel * kTogether];
    // Results of a few panels at once.
    if (tiles.count == 1 && w.block_columns == 1 && halves == 1) {
      constexpr int64_t kPanels = 8;
      float several[kPanels * kPanel];
      for (int64_t row = begin; row < end; row += kPanels) {
        const int64_t to = std::min(row + kPanels, end), n = row * kPanel;
        for (int64_t r = row; r < to; ++r) {
          multiply_columns_of<1>(index, values, starts[r], starts[r + 1], kPart, kPanel,
                                 tiles.of(0), several + (r - row) * kPanel);
        }
        sink(several, 1, n, std::min(to * kPanel, w.rows) - n, 0, 1);
      }
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t h = 0; h < halves; ++h) {
        const int64_t n = row * w.block_rows + h * kPanel;
        if (n >= w.rows) break;
        for (int64_t t = 0; t < tiles.number(); ++t) {
          with_tokens<kTogether>(tiles.size(t), [&](auto r) {
            constexpr int R = decltype(r)::value;
            // By parts: sums of a part lose less than one that goes on and on.
            const int64_t part = std::max<int64_t>(kPart / w.block_columns, 1);
            int64_t from = starts[row];
            if (w.block_columns == 1) {
              return multiply_columns_of<R>(index, values + h * kPanel, from, starts[row + 1], part,
                                            w.block_rows, tiles.of(t), c);
            }
            do {
              const int64_t to = std::min(from + part, starts[row + 1]);
              multiply_blocks_of<R>(index, values + h * kPanel, from, to, w.block_columns,
                                    w.block_rows, tiles.of(t), c, from > starts[row]);
              from = to;
            } while (from < starts[row + 1]);
          });
          sink(c, tiles.size(t), n, std::min(kPanel, w.rows - n), Tiles::first(t), tiles.size(t));
        }
      }
    }
  });
}

// The gradients of C neighbouring columns of a block, 16 rows of it: sums over the tokens.
template <int C>
COFIRE_INLINE void sample_columns(const float* g, const Tokens& x, int64_t column, float* out,
                                  int64_t stride) {
  F16 sum[C];
  COFIRE_UNROLL
  for (int c = 0; c < C; ++c) sum[c] = F16::zero();
  for (const Block& b : x.blocks) {
    const float* from = x.of(b) + column * b.width();
    const float* mine = g + b.first * kPanel;
    for (int64_t t = 0; t < b.count; ++t) {
      const F16 v = F16::load(mine + t * kPanel);
      COFIRE_UNROLL
      for (int c = 0; c < C; ++c) sum[c] = fma(v, F16::all(from[c * b.width() + t]), sum[c]);
    }
  }
  COFIRE_UNROLL
  for (int c = 0; c < C; ++c) sum[c].store(out + c * stride);
}

}  // namespace

void multiply_panels(const at::Tensor& x, const Weight& w, const Sink& sink) {
  with_values(w.values.scalar_type(), [&](auto example) {
    using T = decltype(example);
    if (w.format == "bitmap") {
      multiply_bitmap<T>(x, w, sink);
    } else {
      multiply_blocks<T>(x, w, sink);
    }
  });
}

at::Tensor sampled_blocks(const at::Tensor& grad, const at::Tensor& x, const Weight& w) {
  const int64_t entries = w.index.size(0), R = w.block_rows, C = w.block_columns;
  at::Tensor out = at::empty({entries, C, R}, grad.options().dtype(at::kFloat));
  auto* to = out.mutable_data_ptr<float>();
  const auto* index = w.index.const_data_ptr<int32_t>();
  const int64_t* starts = w.starts();
  const int64_t grid = w.offsets.size(0) - 1, halves = R / kPanel, tokens = grad.size(0);
  const Tokens input = side_by_side(x);
  const at::Tensor mine = grad.contiguous();
  const auto work = [&](int64_t row) { return starts[row] * R * C + row; };
  dispatch(grad.scalar_type(), [&](auto example) {
    using T = decltype(example);
    const T* g = mine.const_data_ptr<T>();
    in_equal_parts(grid, 4096, work, [&](int64_t begin, int64_t end) {
      std::vector<float> panel(tokens * kPanel);
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t h = 0; h < halves; ++h) {
          const int64_t n = row * R + h * kPanel, used = std::clamp<int64_t>(w.rows - n, 0, kPanel);
          for (int64_t m = 0; m < tokens; ++m) {
            float* p = panel.data() + m * kPanel;
            for (int64_t i = 0; i < used; ++i) p[i] = static_cast<float>(g[m * w.rows + n + i]);
            std::fill(p + used, p + kPanel, 0.0f);
          }
          for (int64_t b = starts[row]; b < starts[row + 1]; ++b) {
            float* at = to + b * R * C + h * kPanel;
            const int64_t first = int64_t{index[b]} * C;
            const int64_t inside = std::min(C, w.columns - first);
            int64_t c = 0;
            for (; c + 4 <= inside; c += 4) {
              sample_columns<4>(panel.data(), input, first + c, at + c * R, R);
            }
            for (; c < inside; ++c)
              sample_columns<1>(panel.data(), input, first + c, at + c * R, R);
            for (; c < C; ++c) std::fill(at + c * R, at + c * R + kPanel, 0.0f);
          }
        }
      }
    });
  });
  return out;
}

// By blocks of tokens, each of one thread: column k of the gradient is loaded, gets the 16 rows of
// a block's column times theirs, and is stored.
at::Tensor input_gradient_of_blocks(const at::Tensor& grad, const Weight& w) {
  const Tokens g = side_by_side(grad);
  at::Tensor out = at::empty({grad.size(0), w.columns}, grad.options());
  const Sink sink{out, nullptr, at::Tensor(), w.columns};
  const auto* index = w.index.const_data_ptr<int32_t>();
  const int64_t* starts = w.starts();
  const int64_t grid = w.offsets.size(0) - 1;
  dispatch(w.values.scalar_type(), [&](auto example) {
    using T = decltype(example);
    const T* values = w.values.const_data_ptr<T>();
    const auto blocks = static_cast<int64_t>(g.blocks.size());
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Block& block = g.blocks[i];
        std::vector<float> c(w.columns * block.width());
        with_vectors(block.vectors, [&](auto vectors) {
          constexpr int V = decltype(vectors)::value;
          constexpr int64_t width = V * kLanes;
          for (int64_t row = 0; row < grid; ++row) {
            const float* mine = g.of(block) + row * w.block_rows * width;
            const int64_t inside = std::min(w.block_rows, w.rows - row * w.block_rows);
            for (int64_t b = starts[row]; b < starts[row + 1]; ++b) {
              const int64_t first = int64_t{index[b]} * w.block_columns;
              const int64_t used = std::min(w.block_columns, w.columns - first);
              for (int64_t k = 0; k < used; ++k) {
                float* at = c.data() + (first + k) * width;
                const T* v = values + (b * w.block_columns + k) * w.block_rows;
                Vec sum[V];
                COFIRE_UNROLL
                for (int j = 0; j < V; ++j) sum[j] = Vec::loadu(at + j * kLanes);
                for (int64_t r = 0; r < inside; ++r) {
                  const Vec value(static_cast<float>(v[r]));
                  COFIRE_UNROLL
                  for (int j = 0; j < V; ++j) {
                    sum[j] =
                        at::vec::fmadd(value, Vec::loadu(mine + r * width + j * kLanes), sum[j]);
                  }
                }
                COFIRE_UNROLL
                for (int j = 0; j < V; ++j) sum[j].store(at + j * kLanes);
              }
            }
          }
        });
        for (int64_t k = 0; k < w.columns; k += 64) {
          sink(c.data() + k * block.width(), block.width(), k, std::min<int64_t>(64, w.columns - k),
               block.first, block.count);
        }
      }
    });
  });
  return out;
}

}  // namespace sparse
}  // namespace CPU_CAPABILITY
}  // namespace cofire
