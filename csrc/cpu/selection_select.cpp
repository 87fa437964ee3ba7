// SPDX-License-Identifier: Apache-2.0
// keep_mask and keep_masks: the largest scores of rows, blocks or tensors as packed masks. Scores
// are computed where they are needed, each operation rounded by itself as in the reference
// (pyextensions/cofire/ops/selection.py), and never stored as a whole.
#include <ATen/ops/empty.h>

#include <atomic>
#include <string_view>
#include <utility>
#include <vector>

#include "selection.h"
#include "selection_search.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace select {
namespace {

enum class Score { value, magnitude, wanda, taylor, fisher, magnitude_gradient };

Score score_of(std::string_view name) {
  if (name == "value") return Score::value;
  if (name == "magnitude") return Score::magnitude;
  if (name == "wanda") return Score::wanda;
  if (name == "taylor") return Score::taylor;
  if (name == "fisher") return Score::fisher;
  TORCH_CHECK_VALUE(name == "magnitude_gradient", "keep_mask: unknown score ", std::string(name));
  return Score::magnitude_gradient;
}

constexpr int64_t kPiece = 512;  // scores at a time: what is converted stays in the first cache

// n floats: in place, or converted into `buffer`.
const float* as_f32(const void* data, at::ScalarType dtype, int64_t first, int64_t n,
                    float* buffer) {
  if (dtype == at::kFloat) return static_cast<const float*>(data) + first;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(data) + first;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) load_f32(from + i).store(buffer + i);
    for (; i < n; ++i) buffer[i] = static_cast<float>(from[i]);
  });
  return buffer;
}

// The keys of n scores, in whole vectors; returns how many scores are NaN. `score(i, count)` gives
// a vector of `count` scores and zeros.
template <typename F>
int64_t store_keys(int64_t n, int32_t* keys, F&& score) {
  Keys nan(0);
  const auto store = [&](int64_t i, int64_t count) {
    const Vec s = score(i, count);
    nan = nan + at::vec::cast<int32_t>(s != s);
    keys_of(s).store(keys + i);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(i, kLanes);
  if (i < n) store(i, n - i);
  return true_lanes(nan);
}

// The scores of one weight matrix.
class Scores {
 public:
  Scores(const at::Tensor& weight, const std::optional<at::Tensor>& other, Score score,
         double factor)
      : weight_(weight.contiguous()), score_(score), factor_(static_cast<float>(factor)) {
    TORCH_CHECK_VALUE(weight.dim() == 2, "keep_mask: weight must have shape [N, K]");
    rows = weight.size(0), columns = weight.size(1);
    const bool binary = score != Score::value && score != Score::magnitude;
    TORCH_CHECK_VALUE(other.has_value() == binary, "keep_mask: other does not fit the score");
    if (!binary) return;
    by_column_ = score == Score::wanda;
    TORCH_CHECK_VALUE(by_column_ ? other->dim() == 1 && other->size(0) == columns
                                 : other->sizes() == weight.sizes(),
                      "keep_mask: other does not fit the shape of weight");
    // one vector for all rows is converted once
    other_ = by_column_ ? other->to(at::kFloat).contiguous() : other->contiguous();
  }

  // The keys of n neighbouring entries of a row, in whole vectors; returns how many scores are NaN.
  int64_t keys(int64_t row, int64_t column, int64_t n, int32_t* out) const {
    int64_t nan = 0;
    for (int64_t i = 0; i < n; i += kPiece) {
      nan += piece(row * columns + column + i, column + i, std::min(kPiece, n - i), out + i);
    }
    return nan;
  }

  int64_t rows = 0, columns = 0;

 private:
  int64_t piece(int64_t place, int64_t column, int64_t n, int32_t* out) const {
    alignas(64) float weights[kPiece], others[kPiece];
    const float* w = as_f32(weight_.const_data_ptr(), weight_.scalar_type(), place, n, weights);
    const auto magnitude = [=](int64_t i, int64_t count) { return load_f32(w + i, count).abs(); };
    if (score_ == Score::value) {
      return store_keys(n, out, [=](int64_t i, int64_t m) { return load_f32(w + i, m); });
    }
    if (score_ == Score::magnitude) return store_keys(n, out, magnitude);
    const float* o = as_f32(other_.const_data_ptr(), other_.scalar_type(),
                            by_column_ ? column : place, n, others);
    const auto product = [=](int64_t i, int64_t m) {
      return load_f32(w + i, m) * load_f32(o + i, m);
    };
    switch (score_) {
      case Score::wanda:
        return store_keys(
            n, out, [=](int64_t i, int64_t m) { return magnitude(i, m) * load_f32(o + i, m); });
      case Score::taylor:
        return store_keys(n, out, [=](int64_t i, int64_t m) { return product(i, m).abs(); });
      case Score::fisher:
        return store_keys(n, out, [=](int64_t i, int64_t m) {
          const Vec p = product(i, m);
          return p * p;
        });
      default: {
        // In two loops: a fused multiply-add would round once where the reference rounds twice.
        alignas(64) float scaled[kPiece];
        for (int64_t i = 0; i < n; ++i) scaled[i] = std::fabs(o[i]) * factor_;
        const float* p = scaled;
        __asm__ volatile("" : "+r"(p) : : "memory");
        return store_keys(
            n, out, [=](int64_t i, int64_t m) { return magnitude(i, m) + load_f32(p + i, m); });
      }
    }
  }

  at::Tensor weight_, other_;
  Score score_;
  float factor_;
  bool by_column_ = false;
};

void refuse_nan(const char* name, int64_t nan, int64_t of) {
  TORCH_CHECK_VALUE(nan == 0, name, ": scores must not be NaN, got ", nan, " NaN among ", of,
                    " scores");
}

int64_t bytes_of(int64_t columns) { return (columns + 7) / 8; }

at::Tensor empty_bits(const Scores& s, const at::Tensor& like) {
  return at::empty({s.rows, bytes_of(s.columns)}, like.options().dtype(at::kByte));
}

// ------------------------------------------------------------------------------------ rows

int64_t keep_rows(const Scores& s, const int64_t* counts, int64_t keep, uint8_t* bits) {
  std::atomic<int64_t> nan{0};
  const int64_t room = whole_vectors(s.columns) + kLanes;
  at::parallel_for(0, s.rows, grain_of(s.columns), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys(room), scratch(room);
    for (int64_t r = begin; r < end; ++r) {
      nan += s.keys(r, 0, s.columns, keys.data());
      pad_keys(keys.data(), s.columns);
      Cut cut = cut_of(keys.data(), s.columns, counts ? counts[r] : keep, scratch.data());
      write_bits(keys.data(), s.columns, cut, bits + r * bytes_of(s.columns));
    }
  });
  return nan;
}

// ------------------------------------------------------------------------------------ blocks

constexpr int64_t kGroups = kLanes;    // whose ranks are computed side by side
constexpr int64_t kLargestGroup = 32;  // entries, for a word of bits

// Groups of M entries, entry j of group g at keys[g * across + j * along]: a word of bits for each
// of kGroups groups, entry 0 in the lowest bit.
template <int M>
void keep_of_groups(const int32_t* keys, int64_t across, int64_t along, int32_t keep,
                    int32_t* words) {
  Keys key[M], rank[M];
  for (int j = 0; j < M; ++j) {
    rank[j] = Keys(0);
    if (across == 1) {
      key[j] = Keys::loadu(keys + j * along);
    } else {
      key[j] = strided(keys + j * along, across);
    }
  }
  COFIRE_UNROLL for (int j = 1; j < M; ++j) {
    COFIRE_UNROLL for (int i = 0; i < j; ++i) {
      const Keys first = key[i] >= key[j];  // -1 where entry i comes first
      rank[j] = rank[j] - first;
      rank[i] = rank[i] + first;  // M - 1 - i of those behind it are ahead at first
    }
  }
  Keys word(0);
  COFIRE_UNROLL for (int j = 0; j < M; ++j) {
    const Keys kept = Keys(keep - (M - 1 - j)) > rank[j];
    word = word | (kept & Keys(static_cast<int32_t>(1u << j)));
  }
  word.store(words);
}

#if defined(COFIRE_EIGHT_KEYS)
// The lane that is `shift` further in the group of M, round it; and -1 where that is before.
template <int M>
struct Turn {
  alignas(32) int32_t lane[M][8];
  alignas(32) int32_t before[M][8];
  constexpr Turn() : lane(), before() {
    for (int shift = 0; shift < M; ++shift) {
      for (int i = 0; i < 8; ++i) {
        lane[shift][i] = i / M * M + (i + shift) % M;
        before[shift][i] = i % M + shift >= M ? -1 : 0;
      }
    }
  }
};

// The byte of eight keys in groups of M, which stay where they are: each is compared with the
// M - 1 others of its group as they turn past.
template <int M>
uint8_t keep_of_lanes(const int32_t* keys, int32_t keep) {
  static constexpr Turn<M> turn{};
  const auto vector = [](const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  };
  const __m256i mine = vector(keys);
  __m256i ahead = _mm256_set1_epi32(keep);  // less those that go first
  COFIRE_UNROLL for (int shift = 1; shift < M; ++shift) {
    const __m256i other = _mm256_permutevar8x32_epi32(mine, vector(turn.lane[shift]));
    // an equal key goes first if it is before
    const __m256i than = _mm256_add_epi32(mine, vector(turn.before[shift]));
    ahead = _mm256_add_epi32(ahead, _mm256_cmpgt_epi32(other, than));
  }
  const __m256i kept = _mm256_cmpgt_epi32(ahead, _mm256_setzero_si256());
  return static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(kept)));
}

template <int M>
void keep_row_of_lanes(const int32_t* keys, int64_t n, int32_t keep, uint8_t* bits) {
  for (int64_t i = 0; i < n; i += 8) bits[i / 8] = keep_of_lanes<M>(keys + i, keep);
  if (n % 8) bits[n / 8] &= static_cast<uint8_t>((1 << (n % 8)) - 1);
}

// Whether groups of this size are selected within a vector; then it is done.
bool keep_by_lanes(const int32_t* keys, int64_t n, int64_t size, int32_t keep, uint8_t* bits) {
  if (size == 2) return keep_row_of_lanes<2>(keys, n, keep, bits), true;
  if (size == 4) return keep_row_of_lanes<4>(keys, n, keep, bits), true;
  if (size == 8) return keep_row_of_lanes<8>(keys, n, keep, bits), true;
  return false;
}
#else
bool keep_by_lanes(const int32_t*, int64_t, int64_t, int32_t, uint8_t*) { return false; }
#endif

using KeepGroups = void (*)(const int32_t*, int64_t, int64_t, int32_t, int32_t*);

template <int... M>
KeepGroups keep_groups_of(int64_t size, std::integer_sequence<int, M...>) {
  static constexpr KeepGroups table[] = {&keep_of_groups<M + 1>...};
  return table[size - 1];
}

int64_t keep_groups(const Scores& s, int64_t size, int64_t keep, uint8_t* bits) {
  std::atomic<int64_t> nan{0};
  const KeepGroups keep_of = keep_groups_of(size, std::make_integer_sequence<int, kLargestGroup>());
  const int64_t groups = s.columns / size;
  at::parallel_for(0, s.rows, grain_of(s.columns), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys(s.columns + kGroups * size + kLanes);
    for (int64_t r = begin; r < end; ++r) {
      nan += s.keys(r, 0, s.columns, keys.data());
      uint8_t* out = bits + r * bytes_of(s.columns);
      if (keep_by_lanes(keys.data(), s.columns, size, static_cast<int32_t>(keep), out)) continue;
      uint64_t pending = 0;  // bits that do not fill a byte yet
      int64_t filled = 0;
      for (int64_t g = 0; g < groups; g += kGroups) {
        int32_t words[kGroups];
        keep_of(keys.data() + g * size, size, 1, static_cast<int32_t>(keep), words);
        for (int64_t j = 0; j < std::min(kGroups, groups - g); ++j) {
          pending |= static_cast<uint64_t>(static_cast<uint32_t>(words[j])) << filled;
          for (filled += size; filled >= 8; filled -= 8, pending >>= 8) {
            *out++ = static_cast<uint8_t>(pending);
          }
        }
      }
      if (filled > 0) *out = static_cast<uint8_t>(pending);
    }
  });
  return nan;
}

// Blocks of one column: neighbouring blocks are side by side already.
int64_t keep_columns(const Scores& s, int64_t height, int64_t keep, uint8_t* bits) {
  std::atomic<int64_t> nan{0};
  const KeepGroups keep_of =
      keep_groups_of(height, std::make_integer_sequence<int, kLargestGroup>());
  const int64_t line = whole_vectors(s.columns) + kLanes;
  at::parallel_for(0, s.rows / height, grain_of(height * s.columns), [&](int64_t from, int64_t to) {
    std::vector<int32_t> band(height * line), words(line);
    for (int64_t b = from; b < to; ++b) {
      for (int64_t r = 0; r < height; ++r) {
        nan += s.keys(b * height + r, 0, s.columns, band.data() + r * line);
      }
      for (int64_t c = 0; c < s.columns; c += kGroups) {
        keep_of(band.data() + c, 1, line, static_cast<int32_t>(keep), words.data() + c);
      }
      std::fill(words.begin() + s.columns, words.end(), 0);
      for (int64_t r = 0; r < height; ++r) {
        uint8_t* out = bits + (b * height + r) * bytes_of(s.columns);
        for (int64_t c = 0; c < s.columns; c += 8) out[c / 8] = bit_of_eight(words.data() + c, r);
      }
    }
  });
  return nan;
}

int64_t keep_blocks(const Scores& s, int64_t height, int64_t width, int64_t keep, uint8_t* bits) {
  std::atomic<int64_t> nan{0};
  const int64_t size = height * width, line = whole_vectors(width);
  const int64_t room = whole_vectors(size) + kLanes;
  at::parallel_for(0, s.rows / height, grain_of(height * s.columns), [&](int64_t from, int64_t to) {
    std::vector<int32_t> band(height * s.columns + kLanes), keys(room), scratch(room),
        mine(line + kLanes);
    for (int64_t b = from; b < to; ++b) {
      for (int64_t r = 0; r < height; ++r) {
        nan += s.keys(b * height + r, 0, s.columns, band.data() + r * s.columns);
      }
      uint8_t* out = bits + b * height * bytes_of(s.columns);
      std::fill_n(out, height * bytes_of(s.columns), uint8_t{0});
      for (int64_t c = 0; c < s.columns; c += width) {
        for (int64_t r = 0; r < height; ++r) {
          std::copy_n(band.data() + r * s.columns + c, width, keys.data() + r * width);
        }
        pad_keys(keys.data(), size);
        Cut cut = cut_of(keys.data(), size, keep, scratch.data());
        for (int64_t r = 0; r < height; ++r) {
          uint8_t* row = out + r * bytes_of(s.columns);
          std::copy_n(keys.data() + r * width, width, mine.data());
          pad_keys(mine.data(), width);
          for (int64_t i = 0; i < width; i += 8) {
            uint8_t eight = 0;
            write_bits(mine.data() + i, std::min<int64_t>(8, width - i), cut, &eight);
            const int64_t at = c + i;
            row[at / 8] |= static_cast<uint8_t>(eight << (at % 8));
            if (at % 8 && eight >> (8 - at % 8)) row[at / 8 + 1] |= eight >> (8 - at % 8);
          }
        }
      }
    }
  });
  return nan;
}

// ------------------------------------------------------------------------------------ tensors

struct Matrix {
  Scores scores;
  uint8_t* bits;
};

// Neighbouring rows of a matrix, or a part of one row that begins at a byte.
struct Chunk {
  const Matrix* matrix;
  int64_t row, rows, column, columns;
};

constexpr int64_t kChunk = 1 << 18;  // entries, about; the list does not depend on the threads
constexpr int64_t kSmall = 1 << 16;  // entries whose keys are simply stored
constexpr int64_t kMostSamples = 1 << 16;

std::vector<Chunk> chunks_of(const std::vector<Matrix>& matrices) {
  std::vector<Chunk> chunks;
  for (const Matrix& m : matrices) {
    const int64_t columns = std::min(m.scores.columns, kChunk);
    if (columns == 0) continue;
    const int64_t rows = std::max<int64_t>(1, kChunk / columns);
    for (int64_t r = 0; r < m.scores.rows; r += rows) {
      for (int64_t c = 0; c < m.scores.columns; c += columns) {
        chunks.push_back(
            {&m, r, std::min(rows, m.scores.rows - r), c, std::min(columns, m.scores.columns - c)});
      }
    }
  }
  return chunks;
}

// Runs of keys: f(keys, n, byte) with the address of the first bit. n is at most kLine.
constexpr int64_t kLine = 4096;
template <typename F>
int64_t for_each_line(const Chunk& chunk, F&& f) {
  const Scores& s = chunk.matrix->scores;
  alignas(64) int32_t keys[kLine + 64];
  int64_t nan = 0;
  for (int64_t r = chunk.row; r < chunk.row + chunk.rows; ++r) {
    uint8_t* bits = chunk.matrix->bits + r * bytes_of(s.columns);
    for (int64_t c = chunk.column; c < chunk.column + chunk.columns; c += kLine) {
      const int64_t n = std::min(kLine, chunk.column + chunk.columns - c);
      nan += s.keys(r, c, n, keys);
      pad_keys(keys, n);
      f(keys, n, bits + c / 8);
    }
  }
  return nan;
}

uint64_t mixed(uint64_t x) {  // SplitMix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

class Selection {
 public:
  Selection(const std::vector<Matrix>& matrices, int64_t keep)
      : matrices_(matrices), chunks_(chunks_of(matrices)), keep_(keep) {
    for (const Matrix& m : matrices) total_ += m.scores.rows * m.scores.columns;
  }

  int64_t total() const { return total_; }

  // Writes all bits; returns how many scores are NaN, of which any makes the bits meaningless.
  int64_t run() {
    if (total_ <= kSmall) return run_small();
    int32_t low, high;
    if (bracket(&low, &high) && try_bracket(low, high)) return nan_;
    return nan_ == 0 ? run_by_histograms() : nan_;
  }

 private:
  int64_t run_small() {
    std::vector<int32_t> keys(whole_vectors(total_) + kLanes), scratch(keys.size());
    int64_t filled = 0;
    for (const Chunk& chunk : chunks_) {
      nan_ += for_each_line(chunk, [&](const int32_t* line, int64_t n, uint8_t*) {
        std::copy_n(line, n, keys.data() + filled);
        filled += n;
      });
    }
    pad_keys(keys.data(), filled);
    Cut cut = cut_of(keys.data(), filled, keep_, scratch.data());
    for (const Chunk& chunk : chunks_) {
      for_each_line(chunk, [&](const int32_t* line, int64_t n, uint8_t* bits) {
        write_bits(line, n, cut, bits);
      });
    }
    return nan_;
  }

  // Two keys between which, very probably, the last one to keep lies: by a sample of one entry of
  // each of equal stretches. Whether it is too wide to be of use is the answer.
  bool bracket(int32_t* low, int32_t* high) const {
    const int64_t samples = std::clamp<int64_t>(total_ / 64, 4096, kMostSamples);
    std::vector<int32_t> keys(samples + 2 * kLanes), scratch(keys.size());
    at::parallel_for(0, samples, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = total_ / samples * i, span = total_ / samples;
        int64_t place = first + static_cast<int64_t>(mixed(i) % static_cast<uint64_t>(span));
        size_t m = 0;
        while (place >= matrices_[m].scores.rows * matrices_[m].scores.columns) {
          place -= matrices_[m].scores.rows * matrices_[m].scores.columns;
          ++m;
        }
        const Scores& s = matrices_[m].scores;
        int32_t key[kLanes];
        s.keys(place / s.columns, place % s.columns, 1, key);
        keys[i] = key[0];
      }
    });
    pad_keys(keys.data(), samples);
    const double share = static_cast<double>(keep_) / static_cast<double>(total_);
    const double margin = 4.5 * std::sqrt(static_cast<double>(samples) * share * (1 - share)) + 2;
    const double middle = static_cast<double>(samples) * share;
    const auto key_at = [&](int64_t rank) {
      return cut_of(keys.data(), samples, rank, scratch.data()).key;
    };
    const auto first = static_cast<int64_t>(middle - margin);
    const auto last = static_cast<int64_t>(middle + margin);
    *high = first <= 0 ? kBeyond : std::min(key_at(first), kBeyond - 1) + 1;
    *low = last >= samples ? kLowest : key_at(last);
    const int64_t inside =
        count_from(keys.data(), samples, *low) - count_from(keys.data(), samples, *high);
    return 8 * inside <= samples;
  }

  struct Candidates {
    std::vector<int32_t> keys;
    std::vector<uint32_t> places;  // 8 times the byte, counted from the chunk's first, and the bit
    int64_t above = 0, nan = 0;
  };

  // One pass over the weights: what is above the bracket is kept, what is inside is remembered.
  bool try_bracket(int32_t low, int32_t high) {
    const auto count = static_cast<int64_t>(chunks_.size());
    std::vector<Candidates> all(count);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) collect(chunks_[c], low, high, all[c]);
    });
    int64_t above = 0, found = 0;
    for (const Candidates& mine : all) {
      above += mine.above, found += static_cast<int64_t>(mine.keys.size()), nan_ += mine.nan;
    }
    if (nan_ > 0 || above > keep_ || above + found < keep_) return false;
    std::vector<int32_t> keys(whole_vectors(found) + kLanes), scratch(keys.size());
    int64_t filled = 0;
    for (const Candidates& mine : all) {
      std::copy(mine.keys.begin(), mine.keys.end(), keys.begin() + filled);
      filled += static_cast<int64_t>(mine.keys.size());
    }
    pad_keys(keys.data(), filled);
    const Cut cut = cut_of(keys.data(), filled, keep_ - above, scratch.data());
    std::vector<int64_t> ties(count, cut.ties);
    if (cut.ties != 0 && cut.ties != kAllTies) {
      int64_t left = cut.ties;
      for (int64_t c = 0; c < count; ++c) {
        ties[c] = left;
        left -=
            std::min<int64_t>(left, std::count(all[c].keys.begin(), all[c].keys.end(), cut.key));
      }
    }
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        uint8_t* bits = first_byte(chunks_[c]);
        int64_t left = ties[c];
        for (size_t i = 0; i < all[c].keys.size(); ++i) {
          const int32_t key = all[c].keys[i];
          const bool tied = key == cut.key && left > 0;
          left -= tied;
          const auto bit = static_cast<uint8_t>(key > cut.key || tied);
          bits[all[c].places[i] / 8] |= static_cast<uint8_t>(bit << (all[c].places[i] % 8));
        }
      }
    });
    return true;
  }

  static uint8_t* first_byte(const Chunk& chunk) {
    return chunk.matrix->bits + chunk.row * bytes_of(chunk.matrix->scores.columns) +
           chunk.column / 8;
  }

  static void collect(const Chunk& chunk, int32_t low, int32_t high, Candidates& mine) {
    const uint8_t* first = first_byte(chunk);
    mine.nan = for_each_line(chunk, [&](const int32_t* keys, int64_t n, uint8_t* bits) {
      int64_t greater = 0, found = 0;
      int32_t inside_keys[kLine];
      uint32_t places[kLine];
      const auto place = static_cast<uint32_t>(8 * (bits - first));
      for (int64_t i = 0; i < n; i += 8) {
        const unsigned above = greater_of_eight(keys + i, high - 1);
        unsigned inside = greater_of_eight(keys + i, low - 1) & ~above;
        bits[i / 8] = static_cast<uint8_t>(above);
        greater += __builtin_popcount(above);
        for (; inside != 0; inside &= inside - 1) {
          const auto at = static_cast<uint32_t>(i + __builtin_ctz(inside));
          inside_keys[found] = keys[at];
          places[found++] = place + at;
        }
      }
      mine.above += greater;
      mine.keys.insert(mine.keys.end(), inside_keys, inside_keys + found);
      mine.places.insert(mine.places.end(), places, places + found);
    });
  }

  // The way that depends on no sample: many equal scores, or a bracket that missed. Three passes
  // count the digits of the keys (11, 11 and 10 bits), one counts ties, one writes.
  int64_t run_by_histograms() {
    const auto count = static_cast<int64_t>(chunks_.size());
    constexpr int kDigits[3][2] = {{21, 11}, {10, 11}, {0, 10}};  // shift, width
    uint32_t prefix = 0;
    int64_t left = keep_;  // to keep among the keys with this prefix
    nan_ = 0;
    for (const auto& [shift, width] : kDigits) {
      const int64_t bins = int64_t{1} << width, tasks = std::min<int64_t>(count, 16);
      std::vector<int64_t> counts(tasks * bins);
      std::vector<int64_t> nan(tasks);
      const int above = shift + width;
      at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          int64_t* mine = counts.data() + t * bins;
          for (int64_t c = count * t / tasks; c < count * (t + 1) / tasks; ++c) {
            nan[t] += for_each_line(chunks_[c], [&](const int32_t* keys, int64_t n, uint8_t*) {
              for (int64_t i = 0; i < n; ++i) {
                const uint32_t key = unsigned_key(keys[i]);
                if (above < 32 && key >> (above & 31) != prefix) continue;
                ++mine[key >> shift & (bins - 1)];
              }
            });
          }
        }
      });
      if (above == 32) {
        for (int64_t n : nan) nan_ += n;
        if (nan_ > 0) return nan_;
      }
      int64_t bin = bins;
      for (int64_t here = 0; bin-- > 0; left -= here) {  // ends: `left` keys have this prefix
        here = 0;
        for (int64_t t = 0; t < tasks; ++t) here += counts[t * bins + bin];
        if (here >= left) break;
      }
      prefix = prefix << width | static_cast<uint32_t>(bin);
    }
    // (where nothing is kept, no key is so great)
    const int32_t key = std::min(static_cast<int32_t>(prefix ^ 0x80000000u), kBeyond);
    std::vector<int64_t> ties(count + 1);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        for_each_line(chunks_[c], [&](const int32_t* keys, int64_t n, uint8_t*) {
          ties[c + 1] += count_from(keys, n, key) - count_from(keys, n, key + 1);
        });
      }
    });
    for (int64_t c = 0; c < count; ++c) ties[c + 1] += ties[c];
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        Cut cut{key, std::clamp<int64_t>(left - ties[c], 0, ties[c + 1] - ties[c])};
        for_each_line(chunks_[c], [&](const int32_t* keys, int64_t n, uint8_t* bits) {
          write_bits(keys, n, cut, bits);
        });
      }
    });
    return 0;
  }

  static uint32_t unsigned_key(int32_t key) { return static_cast<uint32_t>(key) ^ 0x80000000u; }

  const std::vector<Matrix>& matrices_;
  const std::vector<Chunk> chunks_;
  int64_t keep_, total_ = 0, nan_ = 0;
};

bool fits(const at::Tensor& weight, const std::optional<at::Tensor>& other) {
  return covered(weight) && (!other || covered(*other));
}

at::Tensor keep_mask(const at::Tensor& weight, const std::optional<at::Tensor>& other,
                     const std::optional<at::Tensor>& counts, int64_t keep, c10::string_view scope,
                     c10::string_view score, int64_t block_rows, int64_t block_columns,
                     double factor) {
  if (!fits(weight, other)) {
    return reference("cofire::keep_mask", &keep_mask, weight, other, counts, keep, scope, score,
                     block_rows, block_columns, factor);
  }
  const Scores scores(weight, other, score_of(score), factor);
  at::Tensor result = empty_bits(scores, weight);
  if (result.numel() == 0) return result;
  auto* bits = result.data_ptr<uint8_t>();
  int64_t nan = 0;
  if (scope == "row") {
    at::Tensor each;
    if (counts) {
      each = counts->to(at::kLong).contiguous();
      TORCH_CHECK_VALUE(each.dim() == 1 && each.size(0) == scores.rows,
                        "keep_mask: keep must have an entry per row");
      const auto* first = each.const_data_ptr<int64_t>();
      const auto [least, most] = std::minmax_element(first, first + scores.rows);
      TORCH_CHECK_VALUE(*least >= 0 && *most <= scores.columns,
                        "keep_mask: keep must be between 0 and the ", scores.columns,
                        " columns of a row, got ", *least, " to ", *most);
    }
    nan = keep_rows(scores, counts ? each.const_data_ptr<int64_t>() : nullptr, keep, bits);
  } else if (scope == "block") {
    TORCH_CHECK_VALUE(block_rows > 0 && block_columns > 0 && scores.rows % block_rows == 0 &&
                          scores.columns % block_columns == 0,
                      "keep_mask: block must divide weight");
    if (block_rows == 1 && block_columns <= kLargestGroup) {
      nan = keep_groups(scores, block_columns, keep, bits);
    } else if (block_columns == 1 && block_rows <= kLargestGroup) {
      nan = keep_columns(scores, block_rows, keep, bits);
    } else {
      nan = keep_blocks(scores, block_rows, block_columns, keep, bits);
    }
  } else {
    const std::vector<Matrix> one{{scores, bits}};
    nan = Selection(one, keep).run();
  }
  refuse_nan("keep_mask", nan, weight.numel());
  return result;
}

std::vector<at::Tensor> keep_masks(at::TensorList weights, at::TensorList others, int64_t keep,
                                   c10::string_view score, double factor) {
  TORCH_CHECK_VALUE(others.empty() || others.size() == weights.size(),
                    "keep_masks: others must have an entry for each weight");
  const auto other = [&](size_t i) {
    return others.empty() ? std::optional<at::Tensor>() : std::optional<at::Tensor>(others[i]);
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!fits(weights[i], other(i))) {
      return reference("cofire::keep_masks", &keep_masks, weights, others, keep, score, factor);
    }
  }
  std::vector<Matrix> matrices;
  std::vector<at::Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Scores scores(weights[i], other(i), score_of(score), factor);
    results.push_back(empty_bits(scores, weights[i]));
    matrices.push_back({scores, results.back().data_ptr<uint8_t>()});
  }
  Selection selection(matrices, keep);
  refuse_nan("keep_masks", selection.run(), selection.total());
  return results;
}

}  // namespace
}  // namespace select
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("keep_mask", &cofire::select::keep_mask);
  m.impl("keep_masks", &cofire::select::keep_masks);
}
