// SPDX-License-Identifier: Apache-2.0
// Products with weights stored by rows (csr, delta). One token: what the row's entries name of it
// is put together in registers. More tokens: they stand side by side, so that an entry is one
// broadcast and a multiplication with vectors from the row of the input that it names; sums of a
// row stay in registers. Each result is the sum of one thread in one order: the same bits for any
// number of threads.
#include "sparse_rows.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "instructions.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace sparse {

namespace {

// Floats of the tokens that a pass over some rows of the weight reads again and again: at most less
// than half of a small second-level cache. Fewer stay in the first level for longer; but a row
// should find some entries among them.
constexpr int64_t kMostSlab = 49152, kLeastSlab = 12288, kEntries = 18;
// Rows of such a pass: their sums, and what it reads of the weight, stay in the second level.
constexpr int64_t kMostRows = 512, kFewestRows = 64;

// ------------------------------------------------------------------------------------ one token

constexpr int64_t kAhead = 512;  // entries whose way from memory is begun

// The same numbers of entries further on.
template <typename Index, typename Value>
COFIRE_INLINE void ask_ahead(const Index* index, const Value* values, int64_t j) {
  __builtin_prefetch(values + j + kAhead);
  __builtin_prefetch(index + j + kAhead);
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

COFIRE_INLINE __m128 load4(const float* p) { return _mm_loadu_ps(p); }
COFIRE_INLINE __m128i words4(const void* p) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(p));
}
COFIRE_INLINE __m128 load4(const c10::BFloat16* p) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(words4(p)), 16));
}
COFIRE_INLINE __m128 load4(const c10::Half* p) { return _mm_cvtph_ps(words4(p)); }
COFIRE_INLINE __m128 load4(const int8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, 4);
  return _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(bytes)));
}

COFIRE_INLINE float sum_of_lanes(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

// The dot product of a row's entries [j, end) with the token: four are put together in a register,
// for which an entry takes one instruction; a gather takes longer. Four chains of sums.
template <typename Index, typename Value>
float dot_row(const Index* index, const Value* values, int64_t j, int64_t end, const float* x) {
  __m128 sum[4] = {};
  int64_t column = 0;
  const auto add = [&](int64_t at, __m128& to) __attribute__((always_inline)) {
    const auto next = [&](int i) __attribute__((always_inline)) {
      column = advance(index, at + i, column);
      return _mm_load_ss(x + column);
    };
    __m128 four = next(0);
    four = _mm_insert_ps(four, next(1), 0x10);
    four = _mm_insert_ps(four, next(2), 0x20);
    four = _mm_insert_ps(four, next(3), 0x30);
    to = _mm_fmadd_ps(load4(values + at), four, to);
  };
  for (; j + 16 <= end; j += 16) {
    ask_ahead(index, values, j);
    COFIRE_UNROLL
    for (int c = 0; c < 4; ++c) add(j + 4 * c, sum[c]);
  }
  for (; j + 4 <= end; j += 4) add(j, sum[0]);
  float rest = 0.0f;
  for (; j < end; ++j) {
    column = advance(index, j, column);
    rest += widened(values[j]) * x[column];
  }
  return sum_of_lanes(_mm_add_ps(_mm_add_ps(sum[0], sum[1]), _mm_add_ps(sum[2], sum[3]))) + rest;
}

#else

// Eight chains of sums: an addition takes four cycles, of which each starts two.
template <typename Index, typename Value>
float dot_row(const Index* index, const Value* values, int64_t j, int64_t end, const float* x) {
  constexpr int kChains = 8;
  float sum[kChains] = {};
  int64_t column = 0;
  for (; j + kChains <= end; j += kChains) {
    ask_ahead(index, values, j);
    COFIRE_UNROLL
    for (int c = 0; c < kChains; ++c) {
      column = advance(index, j + c, column);
      sum[c] += widened(values[j + c]) * x[column];
    }
  }
  for (int c = 0; j < end; ++j, ++c) {
    column = advance(index, j, column);
    sum[c] += widened(values[j]) * x[column];
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

#endif

#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)

// The same of a token of bf16 and values of bf16, for machines that multiply those: eight entries
// are a product of pairs.
template <typename Index>
float dot_row(const Index* index, const c10::BFloat16* values, int64_t j, int64_t end,
              const c10::BFloat16* x) {
  __m128 sum[2] = {};
  int64_t column = 0;
  const auto add = [&](int64_t at, int64_t from, __m128& to) __attribute__((always_inline)) {
    const auto next = [&](int i) __attribute__((always_inline)) {
      from = advance(index, at + i, from);
      return static_cast<int>(x[from].x);
    };
    __m128i eight = _mm_cvtsi32_si128(next(0));
    eight = _mm_insert_epi16(eight, next(1), 1);
    eight = _mm_insert_epi16(eight, next(2), 2);
    eight = _mm_insert_epi16(eight, next(3), 3);
    eight = _mm_insert_epi16(eight, next(4), 4);
    eight = _mm_insert_epi16(eight, next(5), 5);
    eight = _mm_insert_epi16(eight, next(6), 6);
    eight = _mm_insert_epi16(eight, next(7), 7);
    const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + at));
    asm("vdpbf16ps %2, %1, %0" : "+v"(to) : "v"(w), "v"(eight));
    return from;
  };
  const auto add_sixteen = [&](int64_t at) __attribute__((always_inline)) {
    int64_t middle = column;
    if constexpr (kDistances<Index>) {
      // Summed beforehand: one after the other distances would be the longest chain.
      const __m128i distances = _mm_loadu_si128(reinterpret_cast<const __m128i*>(index + at));
      const __m128i sums = _mm_sad_epu8(distances, _mm_setzero_si128());
      middle += _mm_cvtsi128_si64(sums);
      add(at, column, sum[0]);
      add(at + 8, middle, sum[1]);
      column = middle + _mm_extract_epi64(sums, 1);
    } else {
      add(at, column, sum[0]);
      add(at + 8, middle, sum[1]);
    }
  };
  for (; j + 32 <= end; j += 32) {
    ask_ahead(index, values, j);
    add_sixteen(j);
    add_sixteen(j + 16);
  }
  if (j + 16 <= end) {
    add_sixteen(j);
    j += 16;
  }
  if (j + 8 <= end) {
    column = add(j, column, sum[0]);
    j += 8;
  }
  float rest = 0.0f;
  for (; j < end; ++j) {
    column = advance(index, j, column);
    rest += widened(values[j]) * widened(x[column]);
  }
  return sum_of_lanes(_mm_add_ps(sum[0], sum[1])) + rest;
}

#endif

// ----------------------------------------------------------------------------------- more tokens

// Where the entries of each row begin that belong to a slab of columns, and the column of the one
// before.
struct Slabs {
  int64_t columns, number;
  std::vector<int32_t> begin;   // [rows][number], from the row's first entry on
  std::vector<int32_t> column;  // the same, of distances only
};

template <typename Index>
std::shared_ptr<const Slabs> cut(const Index* index, const Weight& w, int64_t columns) {
  auto slabs = std::make_shared<Slabs>();
  slabs->columns = columns;
  slabs->number = std::max<int64_t>((w.columns + columns - 1) / columns, 1);
  slabs->begin.resize(w.rows * slabs->number);
  if (kDistances<Index>) slabs->column.resize(w.rows * slabs->number);
  const int64_t* starts = w.starts();
  at::parallel_for(0, w.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      int64_t j = starts[n], column = 0, before = 0;
      for (int64_t s = 0; s < slabs->number; ++s) {
        // The first entry at or behind the slab's first column.
        for (; j < starts[n + 1]; ++j) {
          column = advance(index, j, before);
          if (column >= s * columns) break;
          before = column;
        }
        slabs->begin[n * slabs->number + s] = static_cast<int32_t>(j - starts[n]);
        if (kDistances<Index>) {
          slabs->column[n * slabs->number + s] = static_cast<int32_t>(before);
        }
      }
    }
  });
  return slabs;
}

struct Cut {
  Tag index, offsets;
  std::vector<std::shared_ptr<const Slabs>> slabs;
};

// Made once per index and width, and kept for as long as the index lives and does not change.
template <typename Index>
std::shared_ptr<const Slabs> slabs_of(const Index* index, const Weight& w, int64_t columns) {
  static std::mutex mutex;
  static auto* entries = new std::unordered_map<const void*, Cut>();  // outlives static tensors
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = entries->find(index);
  if (found == entries->end() || !found->second.index.matches(w.index) ||
      !found->second.offsets.matches(w.offsets)) {
    std::erase_if(*entries, [](const auto& item) { return item.second.index.storage.expired(); });
    entries->insert_or_assign(index, Cut{Tag::of(w.index), Tag::of(w.offsets), {}});
  }
  auto& kept = entries->at(index).slabs;
  for (const auto& slabs : kept) {
    if (slabs->columns == columns) return slabs;
  }
  kept.push_back(cut(index, w, columns));
  return kept.back();
}

// `lines` lines of 64 bytes from p on are asked for. (As many as an array says would be a branch
// that nobody can foretell.)
template <int Level>
COFIRE_INLINE void ask_for(const void* p, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) {
    __builtin_prefetch(static_cast<const char*>(p) + 64 * i, 0, Level);
  }
}

// Calls f(row, first entry, end, column before) for the rows [n, to), slab of columns by slab. A
// row has a few entries in a slab, far from those of the next row: as many lines as an average row
// has are asked for two rows ahead (what is read of them: index, and `values`). And row by row a
// piece of what the next slab reads of the tokens, `width` floats per column, is fetched into the
// second level.
template <typename Index, typename Value, typename F>
COFIRE_INLINE void by_slabs(const Weight& w, const Slabs& slabs, const Index* index,
                            const Value* values, const float* tokens, int64_t width, int64_t n,
                            int64_t to, F&& f) {
  constexpr int64_t kAheadRows = 2;
  const int64_t* starts = w.starts();
  // What an average row has in a slab, and the line that it begins in.
  const int64_t entries = (starts[to] - starts[n]) / ((to - n) * slabs.number);
  const auto lines_of = [&](int64_t size) { return (entries * size + 63) / 64 + 1; };
  const int64_t value_lines = lines_of(sizeof(Value)), index_lines = lines_of(sizeof(Index));
  for (int64_t s = 0; s < slabs.number; ++s) {
    const int32_t* first = slabs.begin.data() + n * slabs.number + s;
    const int32_t* column = slabs.column.data() + n * slabs.number + s;
    const bool last = s + 1 == slabs.number;
    const int64_t columns =
        std::clamp(w.columns - (s + 1) * slabs.columns, int64_t{0}, slabs.columns);
    const float* next = tokens + (s + 1) * slabs.columns * width;
    const int64_t lines = (columns * width / (to - n) + 15) / 16;
    const float* end = next + columns * width;
    const auto stop_of = [&](int64_t r, const int32_t* at) {
      return last ? starts[r + 1] : starts[r] + at[1];
    };
    for (int64_t r = n; r < to; ++r, first += slabs.number, column += slabs.number) {
      if (r + kAheadRows < to) {
        const int64_t from = starts[r + kAheadRows] + first[kAheadRows * slabs.number];
        ask_for<3>(values + from, value_lines);
        ask_for<3>(index + from, index_lines);
      }
      if (next < end) ask_for<2>(next, lines);
      next += 16 * lines;
      f(r, starts[r] + first[0], stop_of(r, first), slabs.column.empty() ? 0 : int64_t{*column});
    }
  }
}

// Enough passes for the threads; the order of a sum does not depend on it.
int64_t rows_of_a_pass(int64_t rows) {
  return std::clamp(rows / (4 * at::get_num_threads()) / kFewestRows * kFewestRows, kFewestRows,
                    kMostRows);
}

int64_t slab_columns(int vectors, const Weight& w) {
  const int64_t width = vectors * kLanes, entries = w.index.size(0);
  int64_t slab = kLeastSlab;
  while (slab < kMostSlab && slab / width * entries < kEntries * w.rows * w.columns) slab *= 2;
  return slab / width;
}

template <typename Token, typename Index, typename Value>
void multiply_token(const Token* token, const Index* index, const Value* values, const Weight& w,
                    const Sink& sink) {
  const int64_t* starts = w.starts();
  const auto work = [&](int64_t row) { return starts[row] + 8 * row; };
  in_equal_parts(w.rows, 8192, work, [&](int64_t begin, int64_t end) {
    constexpr int64_t kRows = 64;
    float c[kRows];
    for (int64_t n = begin; n < end; n += kRows) {
      const int64_t to = std::min(n + kRows, end);
      for (int64_t r = n; r < to; ++r) {
        c[r - n] = dot_row(index, values, starts[r], starts[r + 1], token);
      }
      sink(c, 1, n, to - n, 0, 1);
    }
  });
}

template <typename Index, typename Value>
void multiply(const Tokens& tokens, const Index* index, const Value* values, const Weight& w,
              const Sink& sink) {
  const int64_t* starts = w.starts();
  const auto blocks = static_cast<int64_t>(tokens.blocks.size());
  const int64_t rows = rows_of_a_pass(w.rows * blocks);
  const int64_t chunks = (w.rows + rows - 1) / rows;
  const auto row_of = [&](int64_t chunk) { return std::min(chunk * rows, w.rows); };
  const auto entries = [&](int64_t chunk) { return starts[row_of(chunk)] + 8 * row_of(chunk); };
  const auto work = [&](int64_t task) {
    return task / chunks * entries(chunks) + entries(task % chunks);
  };
  std::shared_ptr<const Slabs> slabs[kMostVectors + 1];
  for (const Block& block : tokens.blocks) {
    slabs[block.vectors] = slabs_of(index, w, slab_columns(block.vectors, w));
  }
  in_equal_parts(blocks * chunks, 2048, work, [&](int64_t begin, int64_t end) {
    std::vector<float> c(rows * kMostVectors * kLanes);
    for (int64_t task = begin; task < end; ++task) {
      const Block& block = tokens.blocks[task / chunks];
      const int64_t n = row_of(task % chunks), to = row_of(task % chunks + 1);
      std::fill(c.begin(), c.begin() + (to - n) * block.width(), 0.0f);
      with_vectors(block.vectors, [&](auto v) {
        constexpr int V = decltype(v)::value;
        const float* from = tokens.of(block);
        by_slabs(w, *slabs[V], index, values, from, V * kLanes, n, to,
                 [&](int64_t r, int64_t j, int64_t stop, int64_t column) {
                   add_entries<V>(
                       index, values, j, stop, column,
                       [=](int64_t k) { return from + k * V * kLanes; },
                       c.data() + (r - n) * V * kLanes);
                 });
      });
      sink(c.data(), block.width(), n, to - n, block.first, block.count);
    }
  });
}

// ------------------------------------------------------------------------------------ sampled
// product

// Adds to out[i] the lanes of sum[i]: together four sums take fewer steps than one by one.
COFIRE_INLINE void add_lanes(const Vec (&sum)[4], float* out) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const auto half = [](const Vec& v) {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 x = v;
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
    return static_cast<__m256>(v);
#endif
  };
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half(sum[0]), half(sum[1])),
                                      _mm256_hadd_ps(half(sum[2]), half(sum[3])));
  const __m128 all = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), all));
#else
  for (int i = 0; i < 4; ++i) out[i] += reduce_add(sum[i]);
#endif
}

// The gradients of the entries [j, end) of a row, of V vectors of tokens: of each the dot product
// of the row's tokens with those of the input's row.
template <int V, typename Index>
COFIRE_INLINE void sample_entries(const Index* index, int64_t j, int64_t end, const float* g,
                                  const float* x, float* out) {
  constexpr int64_t width = V * kLanes;
  Vec mine[V];
  COFIRE_UNROLL
  for (int v = 0; v < V; ++v) mine[v] = Vec::loadu(g + v * kLanes);
  for (; j + 4 <= end; j += 4) {
    Vec sum[4];
    COFIRE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* row = x + int64_t{index[j + i]} * width;
      sum[i] = mine[0] * Vec::loadu(row);
      COFIRE_UNROLL
      for (int v = 1; v < V; ++v) {
        sum[i] = at::vec::fmadd(mine[v], Vec::loadu(row + v * kLanes), sum[i]);
      }
    }
    add_lanes(sum, out + j);
  }
  for (; j < end; ++j) {
    const float* row = x + int64_t{index[j]} * width;
    Vec sum = mine[0] * Vec::loadu(row);
    COFIRE_UNROLL
    for (int v = 1; v < V; ++v) {
      sum = at::vec::fmadd(mine[v], Vec::loadu(row + v * kLanes), sum);
    }
    out[j] += reduce_add(sum);
  }
}

template <typename Index>
void sample(const Tokens& grads, const Tokens& tokens, const Index* index, const Weight& w,
            float* out) {
  const int64_t* starts = w.starts();
  const int64_t rows = rows_of_a_pass(w.rows), passes = (w.rows + rows - 1) / rows;
  const auto row_of = [&](int64_t pass) { return std::min(pass * rows, w.rows); };
  const auto work = [&](int64_t pass) { return starts[row_of(pass)] + 8 * row_of(pass); };
  std::shared_ptr<const Slabs> slabs[kMostVectors + 1];
  for (const Block& block : tokens.blocks) {
    slabs[block.vectors] = slabs_of(index, w, slab_columns(block.vectors, w));
  }
  in_equal_parts(passes, 2048, work, [&](int64_t begin, int64_t end) {
    for (int64_t pass = begin; pass < end; ++pass) {
      const int64_t n = row_of(pass), to = row_of(pass + 1);
      std::fill(out + starts[n], out + starts[to], 0.0f);
      for (size_t b = 0; b < tokens.blocks.size(); ++b) {
        const Block& block = tokens.blocks[b];
        const float* mine = grads.of(grads.blocks[b]);
        with_vectors(block.vectors, [&](auto v) {
          constexpr int V = decltype(v)::value;
          const float* from = tokens.of(block);
          by_slabs(w, *slabs[V], index, out, from, V * kLanes, n, to,
                   [&](int64_t r, int64_t j, int64_t stop, int64_t) {
                     sample_entries<V>(index, j, stop, mine + r * V * kLanes, from, out);
                   });
        });
      }
    }
  });
}

}  // namespace

void multiply_rows(const at::Tensor& x, const Weight& w, const Sink& sink) {
  if (x.size(0) != 1) return multiply_rows(side_by_side(x), w, sink);
  with_index(w, [&](auto* index) {
#if defined(CPU_CAPABILITY_AVX512) && !defined(_MSC_VER)
    if (x.scalar_type() == at::kBFloat16 && w.values.scalar_type() == at::kBFloat16 && has_bf16()) {
      const at::Tensor token = x.contiguous();
      return multiply_token(token.const_data_ptr<c10::BFloat16>(), index,
                            w.values.const_data_ptr<c10::BFloat16>(), w, sink);
    }
#endif
    const at::Tensor token = x.to(at::kFloat).contiguous();
    with_values(w.values.scalar_type(), [&](auto example) {
      using T = decltype(example);
      multiply_token(token.const_data_ptr<float>(), index, w.values.const_data_ptr<T>(), w, sink);
    });
  });
}

void multiply_rows(const Tokens& tokens, const Weight& w, const Sink& sink) {
  with_index(w, [&](auto* index) {
    with_values(w.values.scalar_type(), [&](auto example) {
      using T = decltype(example);
      multiply(tokens, index, w.values.const_data_ptr<T>(), w, sink);
    });
  });
}

at::Tensor sampled_rows(const Tokens& grads, const Tokens& tokens, const Weight& w) {
  at::Tensor out = at::empty({w.index.size(0)}, tokens.data.options());
  auto* p = out.mutable_data_ptr<float>();
  if (w.index.scalar_type() == at::kInt) {
    sample(grads, tokens, w.index.const_data_ptr<int32_t>(), w, p);
  } else {
    sample(grads, tokens, static_cast<const uint16_t*>(w.index.const_data_ptr()), w, p);
  }
  return out;
}

}  // namespace sparse
}  // namespace CPU_CAPABILITY
}  // namespace cofire
