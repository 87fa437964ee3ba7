// SPDX-License-Identifier: Apache-2.0
// Codes of queries and keys: hash_encode and binary_encode with their gradients.
//
// Tokens lie in the lanes of the vectors, a tile of kTile at a time, so that the products with
// anchors and projection need no sums across lanes, and a bit of all codes is one comparison.
// Sums over tokens are taken over chunks of fixed size and merged in order.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "exponential.h"
#include "loops.h"
#include "parts.h"
#include "shift_add_attention.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace shift_add {
namespace {

using Word = at::vec::Vectorized<int32_t>;

constexpr int64_t kTile = 2 * kLanes;  // tokens
constexpr int64_t kChunk = 256;        // tokens whose sum is taken in fp32
constexpr float kSigmaFloor = 1e-12f;
constexpr int kRows = 5;                    // of a product at a time
constexpr int64_t kTogether = 32 / kLanes;  // vectors of a row whose sums stay in registers
constexpr float kLog2E = 1.44269504f;

// out[r] = sum over k of w[r][k] x[k] for R rows; x and out are tiles.
template <int R>
inline void product_rows(const float* w, int64_t ld, const float* x, int64_t depth, float* out) {
  Vec acc[R][2];
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = Vec(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    const Vec a = Vec::loadu(x + k * kTile), b = Vec::loadu(x + k * kTile + kLanes);
    COFIRE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec v(w[r * ld + k]);
      acc[r][0] = at::vec::fmadd(v, a, acc[r][0]);
      acc[r][1] = at::vec::fmadd(v, b, acc[r][1]);
    }
  }
  COFIRE_UNROLL
  for (int r = 0; r < R; ++r) {
    acc[r][0].store(out + r * kTile);
    acc[r][1].store(out + r * kTile + kLanes);
  }
}

// Rows in as few groups as there can be, all of much the same size: one row alone would wait for
// its own sums.
inline void product(const float* w, int64_t rows, int64_t depth, const float* x, float* out) {
  const auto take = [&](auto count) {
    product_rows<count()>(w, depth, x, depth, out);
    w += count() * depth;
    out += count() * kTile;
    rows -= count();
  };
  while (rows > 0) {
    const int64_t groups = (rows + kRows - 1) / kRows;
    switch ((rows + groups - 1) / groups) {
      case 5:
        take(std::integral_constant<int, 5>());
        break;
      case 4:
        take(std::integral_constant<int, 4>());
        break;
      case 3:
        take(std::integral_constant<int, 3>());
        break;
      case 2:
        take(std::integral_constant<int, 2>());
        break;
      default:
        take(std::integral_constant<int, 1>());
    }
  }
}

// The transposed rows of a tile, [columns][kTile]; lanes without a token are zero.
template <typename T>
void to_lanes(const T* rows, int64_t count, int64_t columns, float* scratch, float* out) {
  const float* from = scratch;
  if constexpr (std::is_same_v<T, float>) {
    if (count == kTile) from = rows;
  }
  if (from == scratch) {
    for (int64_t t = 0; t < count; ++t) {
      for_vectors(columns, [&](int64_t i, auto rest) {
        store_f32(scratch + t * columns + i, load(rows + t * columns + i, rest), rest);
      });
    }
    std::fill(scratch + count * columns, scratch + kTile * columns, 0.0f);
  }
  for (int64_t t = 0; t < kTile; t += kLanes) {
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) {
      at::vec::transpose_mxn<float, kLanes, kLanes>(from + t * columns + i, columns,
                                                    out + i * kTile + t, kTile);
    }
    for (; i < columns; ++i) {
      for (int64_t u = 0; u < kLanes; ++u) out[i * kTile + t + u] = from[(t + u) * columns + i];
    }
  }
}

// The way back, of `count` tokens.
template <typename T>
void from_lanes(const float* x, int64_t count, int64_t columns, T* rows) {
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < columns; ++i) {
      rows[t * columns + i] = static_cast<T>(x[i * kTile + t]);
    }
  }
}

at::Tensor nothing_of(const at::Tensor& input, int64_t bits) {
  auto sizes = input.sizes().vec();
  sizes.back() = bits;
  return at::zeros({}, input.options()).expand(sizes);
}

// The words of a tile from masks: mask(bit, part) gives those of a code and of another one.
template <typename W, typename F>
void store_words(int64_t bits, int64_t count, F&& mask, W* code, W* other) {
  constexpr int kHalves = sizeof(W) == 8 ? 2 : 1;
  uint32_t words[2][kHalves][kTile];
  for (int half = 0; half < kHalves; ++half) {
    for (int part = 0; part < 2; ++part) {
      Word set[2] = {Word(0), Word(0)};
      uint32_t place = 1;
      for (int64_t bit = half * 32; bit < std::min<int64_t>(bits, half * 32 + 32); ++bit) {
        const Word here(static_cast<int32_t>(place));
        const auto [a, b] = mask(bit, part);
        set[0] = set[0] | (at::vec::cast<int32_t>(a) & here);
        set[1] = set[1] | (at::vec::cast<int32_t>(b) & here);
        place <<= 1;
      }
      for (int i = 0; i < 2; ++i) set[i].store(words[i][half] + part * kLanes);
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    uint64_t both[2] = {words[0][0][t], words[1][0][t]};
    if constexpr (kHalves == 2) {
      for (int i = 0; i < 2; ++i) both[i] |= static_cast<uint64_t>(words[i][1][t]) << 32;
    }
    code[t] = static_cast<W>(both[0]);
    other[t] = static_cast<W>(both[1]);
  }
}

template <typename T>
inline float squared_norm(const T* row, int64_t d) {
  Vec sum(0.0f);
  for_vectors(d, [&](int64_t i, auto rest) {
    const Vec v = load(row + i, rest);
    sum = at::vec::fmadd(v, v, sum);
  });
  return reduce_add(sum);
}

// What all tokens of a head share.
struct Head {
  int64_t d, m, bits;
  const float *anchors, *center, *projection;  // [m][d], [m], [bits][m]
  std::vector<float> squares, anchors_t, projection_t;
  std::vector<double> mean;  // of the anchors
  double mean_square = 0;

  Head(int64_t d, int64_t m, int64_t bits, const float* a, const float* c, const float* p,
       bool transposed)
      : d(d), m(m), bits(bits), anchors(a), center(c), projection(p), squares(m), mean(d) {
    for (int64_t j = 0; j < m; ++j) {
      double s = 0;
      for (int64_t k = 0; k < d; ++k) {
        s += static_cast<double>(a[j * d + k]) * a[j * d + k];
        mean[k] += a[j * d + k];
      }
      squares[j] = static_cast<float>(s);
      mean_square += s / m;
    }
    for (double& v : mean) v /= m;
    if (!transposed) return;
    anchors_t.resize(d * m);
    projection_t.resize(m * bits);
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t k = 0; k < d; ++k) anchors_t[k * m + j] = a[j * d + k];
      for (int64_t i = 0; i < bits; ++i) projection_t[j * bits + i] = p[i * m + j];
    }
  }
};

// Sums over a chunk: the unit rows [d], and the squares of their norms.
template <typename T>
void sum_chunk(const T* x, int64_t count, int64_t d, float eps, double* sums) {
  std::vector<float> acc(d + kLanes);
  double squares = 0;
  const int64_t whole = d / (kTogether * kLanes) * kTogether * kLanes;
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t some = std::min(kLanes, count - first);
    const T* rows = x + first * d;
    float norm2[kLanes] = {}, inverse[kLanes];
    for (int64_t n = 0; n < some; ++n) norm2[n] = squared_norm(rows + n * d, d);
    const Vec of_rows = Vec::loadu(norm2);
    const Vec one_over = Vec(1.0f) / at::vec::maximum(of_rows.sqrt(), Vec(eps));
    one_over.store(inverse);
    squares += reduce_add(of_rows * one_over * one_over);
    for (int64_t i = 0; i < whole; i += kTogether * kLanes) {
      Vec sum[kTogether];
      COFIRE_UNROLL for (int64_t v = 0; v < kTogether; ++v) {
        sum[v] = Vec::loadu(acc.data() + i + v * kLanes);
      }
      for (int64_t n = 0; n < some; ++n) {
        const Vec scale(inverse[n]);
        COFIRE_UNROLL for (int64_t v = 0; v < kTogether; ++v) {
          sum[v] = at::vec::fmadd(load_f32(rows + n * d + i + v * kLanes), scale, sum[v]);
        }
      }
      COFIRE_UNROLL for (int64_t v = 0; v < kTogether; ++v) {
        sum[v].store(acc.data() + i + v * kLanes);
      }
    }
    for (int64_t n = 0; n < some; ++n) {
      for_vectors(d - whole, [&](int64_t c, auto rest) {
        float* to = acc.data() + whole + c;
        const Vec row = load(rows + n * d + whole + c, rest);
        store_f32(to, at::vec::fmadd(row, Vec(inverse[n]), load(to, rest)), rest);
      });
    }
  }
  for (int64_t i = 0; i < d; ++i) sums[i] = acc[i];
  sums[d] = squares;
}

float sigma_of(const Head& head, const double* sums, int64_t chunks, int64_t tokens) {
  double squares = 0, along = 0;
  for (int64_t c = 0; c < chunks; ++c) squares += sums[c * (head.d + 1) + head.d];
  for (int64_t k = 0; k < head.d; ++k) {
    double s = 0;
    for (int64_t c = 0; c < chunks; ++c) s += sums[c * (head.d + 1) + k];
    along += s / tokens * head.mean[k];
  }
  const double sigma = squares / tokens + head.mean_square - 2 * along;
  return std::max(static_cast<float>(sigma), kSigmaFloor);
}

// A tile of tokens: the transposed input, one over the norms, and the distances from all anchors,
// or what becomes of them.
struct Tile {
  std::vector<float> scratch, x, distance, features;
  Vec inverse[2];

  explicit Tile(const Head& h)
      : scratch(kTile * std::max(h.d, h.bits)),
        x(kTile * h.d),
        distance(kTile * h.m),
        features(kTile * std::max(h.bits, h.m)) {}

  // of(j, distance): what becomes of the distances from anchor j.
  template <typename T, typename F>
  void measure(const Head& h, const T* rows, int64_t count, float eps, F&& of) {
    to_lanes(rows, count, h.d, scratch.data(), x.data());
    product(h.anchors, h.m, h.d, x.data(), distance.data());
    constexpr int kChains = 4;  // that do not wait for each other
    Vec squares[kChains][2];
    COFIRE_UNROLL for (int i = 0; i < kChains; ++i) squares[i][0] = squares[i][1] = Vec(0.0f);
    const auto add = [&](int64_t k, int to) {
      COFIRE_UNROLL for (int part = 0; part < 2; ++part) {
        const Vec v = Vec::loadu(x.data() + k * kTile + part * kLanes);
        squares[to][part] = at::vec::fmadd(v, v, squares[to][part]);
      }
    };
    int64_t k = 0;
    for (; k + kChains <= h.d; k += kChains) {
      COFIRE_UNROLL for (int i = 0; i < kChains; ++i) add(k + i, i);
    }
    for (; k < h.d; ++k) add(k, 0);
    for (int part = 0; part < 2; ++part) {
      const Vec sum = (squares[0][part] + squares[1][part]) + (squares[2][part] + squares[3][part]);
      inverse[part] = Vec(1.0f) / at::vec::maximum(sum.sqrt(), Vec(eps));
      const Vec unit = sum * inverse[part] * inverse[part], twice = inverse[part] * Vec(-2.0f);
      for (int64_t j = 0; j < h.m; ++j) {
        float* p = distance.data() + j * kTile + part * kLanes;
        of(j, at::vec::fmadd(Vec::loadu(p), twice, unit + Vec(h.squares[j]))).store(p);
      }
    }
  }
};

template <typename T, typename W>
void encode_chunk(const Head& h, Tile& tile, const T* x, int64_t count, float sigma, float eps,
                  W* codes, W* gate) {
  const Vec scale(-0.5f / sigma * kLog2E), zero(0.0f), one(1.0f);
  for (int64_t t = 0; t < count; t += kTile) {
    const int64_t some = std::min(kTile, count - t);
    tile.measure(h, x + t * h.d, some, eps, [&](int64_t j, const Vec& distance) {
      return power_of_two<float, true>(distance * scale) - Vec(h.center[j]);
    });
    product(h.projection, h.bits, h.m, tile.distance.data(), tile.features.data());
    const float* features = tile.features.data();
    store_words(
        h.bits, some,
        [&](int64_t bit, int part) {
          const Vec y = Vec::loadu(features + bit * kTile + part * kLanes);
          const Vec positive = y > zero;
          return std::pair(positive, positive & (y < one));
        },
        codes + t, gate + t);
  }
}

// Gradients of a row set: first all that does not need the sum through sigma, then the rest.
template <typename T, typename W>
void hash_backward(const Head& h, const T* g, const T* x, const W* gate, int64_t tokens,
                   float sigma, bool floored, float eps, T* dx) {
  Tile tile(h);
  std::vector<float> to_unit(tokens * h.d), grads(kTile * h.bits), tile_grad(kTile * h.d);
  const Vec scale(-0.5f / sigma);
  double through_sigma = 0;
  for (int64_t t = 0; t < tokens; t += kTile) {
    const int64_t some = std::min(kTile, tokens - t);
    to_lanes(g + t * h.bits, some, h.bits, tile.scratch.data(), grads.data());
    for (int64_t u = 0; u < some; ++u) {
      const auto word = static_cast<uint64_t>(gate[t + u]);
      for (int64_t i = 0; i < h.bits; ++i) {
        if (!(word >> i & 1)) grads[i * kTile + u] = 0;
      }
    }
    tile.measure(h, x + t * h.d, some, eps, [](int64_t, const Vec& distance) { return distance; });
    product(h.projection_t.data(), h.m, h.bits, grads.data(), tile.features.data());
    Vec total[2] = {Vec(0.0f), Vec(0.0f)}, rows[2] = {Vec(0.0f), Vec(0.0f)};
    for (int64_t j = 0; j < h.m; ++j) {
      for (int part = 0; part < 2; ++part) {
        float* p = tile.distance.data() + j * kTile + part * kLanes;
        const Vec distance = Vec::loadu(p);
        const Vec weighted =
            (distance * scale).exp() * Vec::loadu(tile.features.data() + j * kTile + part * kLanes);
        total[part] = at::vec::fmadd(weighted, distance, total[part]);
        const Vec to_distance = weighted * scale;
        rows[part] = rows[part] + to_distance;
        to_distance.store(p);
      }
    }
    through_sigma += static_cast<double>(reduce_add(total[0])) + reduce_add(total[1]);
    product(h.anchors_t.data(), h.d, h.m, tile.distance.data(), tile_grad.data());
    for (int part = 0; part < 2; ++part) {
      const Vec along = rows[part] * tile.inverse[part];
      for (int64_t k = 0; k < h.d; ++k) {
        const int64_t at_ = k * kTile + part * kLanes;
        const Vec v = Vec::loadu(tile.x.data() + at_) * along - Vec::loadu(tile_grad.data() + at_);
        (v * Vec(2.0f)).store(tile_grad.data() + at_);
      }
    }
    from_lanes(tile_grad.data(), some, h.d, to_unit.data() + t * h.d);
  }
  // d sigma: the same for every distance, so of every row 2 (m u - the sum of the anchors) times
  // it.
  const double each =
      floored ? 0 : through_sigma / (2 * static_cast<double>(sigma) * sigma) / tokens;
  std::vector<float> constant(h.d);
  for (int64_t k = 0; k < h.d; ++k) constant[k] = static_cast<float>(-2 * each * h.mean[k]);
  const float own = static_cast<float>(2 * each);
  for (int64_t n = 0; n < tokens; ++n) {
    const T* row = x + n * h.d;
    const float* part = to_unit.data() + n * h.d;
    const float norm = std::sqrt(squared_norm(row, h.d)), inverse = 1 / std::max(norm, eps);
    const auto grad_at = [&](int64_t k, auto rest, const Vec& unit) {
      return at::vec::fmadd(unit, Vec(own), load(part + k, rest) + load(constant.data() + k, rest));
    };
    Vec along(0.0f);
    for_vectors(h.d, [&](int64_t k, auto rest) {
      const Vec unit = load(row + k, rest) * Vec(inverse);
      along = at::vec::fmadd(unit, grad_at(k, rest, unit), along);
    });
    const Vec dot(norm >= eps ? reduce_add(along) : 0.0f);
    for_vectors(h.d, [&](int64_t k, auto rest) {
      const Vec unit = load(row + k, rest) * Vec(inverse);
      store_f32(dx + n * h.d + k, (grad_at(k, rest, unit) - unit * dot) * Vec(inverse), rest);
    });
  }
}

void check(const at::Tensor& x, const at::Tensor& anchors, const at::Tensor& projection) {
  TORCH_CHECK(x.dim() == 4 && anchors.dim() == 3 && projection.dim() == 3 &&
                  anchors.size(0) == x.size(1) && anchors.size(2) == x.size(3) &&
                  projection.size(0) == x.size(1) && projection.size(2) == anchors.size(1) &&
                  anchors.size(1) > 0 && projection.size(1) >= 1 && projection.size(1) <= 64,
              "hash_encode: shapes of input, anchors and projection do not fit");
}

std::vector<Head> heads_of(const at::Tensor& a, const float* center, const at::Tensor& p,
                           bool transposed) {
  const int64_t m = a.size(1), d = a.size(2), bits = p.size(1);
  std::vector<Head> heads;
  for (int64_t i = 0; i < a.size(0); ++i) {
    heads.emplace_back(d, m, bits, a.const_data_ptr<float>() + i * m * d,
                       center == nullptr ? nullptr : center + i * m,
                       p.const_data_ptr<float>() + i * bits * m, transposed);
  }
  return heads;
}

}  // namespace

using Encoded = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Encoded hash_encode(const at::Tensor& input, const at::Tensor& anchors, const at::Tensor& center,
                    const at::Tensor& projection, double eps) {
  if (!covered(input) || is_double(anchors) || is_double(center) || is_double(projection)) {
    return reference("cofire::hash_encode", &hash_encode, input, anchors, center, projection, eps);
  }
  check(input, anchors, projection);
  TORCH_CHECK(
      center.dim() == 2 && center.size(0) == anchors.size(0) && center.size(1) == anchors.size(1),
      "hash_encode: center does not fit anchors");
  const at::Tensor x = input.contiguous(), a = anchors.to(at::kFloat).contiguous(),
                   c = center.to(at::kFloat).contiguous(),
                   p = projection.to(at::kFloat).contiguous();
  const int64_t heads = x.size(1), sets = x.size(0) * heads, tokens = x.size(2), d = x.size(3),
                bits = p.size(1), chunks = (tokens + kChunk - 1) / kChunk;
  at::Tensor codes = at::empty({x.size(0), heads, tokens}, x.options().dtype(word_of(bits)));
  at::Tensor gate = at::empty_like(codes);
  at::Tensor sigma = at::zeros({x.size(0), heads}, x.options().dtype(at::kFloat));
  const std::vector<Head> shared = heads_of(a, c.const_data_ptr<float>(), p, false);
  float* sigmas = sigma.data_ptr<float>();
  const auto small = static_cast<float>(eps);
  std::vector<double> sums(sets * chunks * (d + 1));
  const auto size_of = [&](int64_t chunk) { return std::min(kChunk, tokens - chunk * kChunk); };
  if (tokens > 0)
    dispatch(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      const T* data = x.const_data_ptr<T>();
      for_word(bits, [&](auto w) {
        using W = decltype(w);
        W *code = codes.data_ptr<W>(), *pass = gate.data_ptr<W>();
        const auto sum = [&](int64_t set, int64_t chunk) {
          sum_chunk(data + (set * tokens + chunk * kChunk) * d, size_of(chunk), d, small,
                    sums.data() + (set * chunks + chunk) * (d + 1));
        };
        const auto merge = [&](int64_t set) {
          sigmas[set] =
              sigma_of(shared[set % heads], sums.data() + set * chunks * (d + 1), chunks, tokens);
        };
        const auto encode = [&](int64_t set, int64_t chunk, Tile& tile) {
          const int64_t first = set * tokens + chunk * kChunk;
          encode_chunk(shared[set % heads], tile, data + first * d, size_of(chunk), sigmas[set],
                       small, code + first, pass + first);
        };
        if (sets >= 2 * at::get_num_threads()) {  // while the rows are in a cache
          in_runs(sets, [&](int64_t set) {
            Tile tile(shared[set % heads]);
            for (int64_t chunk = 0; chunk < chunks; ++chunk) sum(set, chunk);
            merge(set);
            for (int64_t chunk = 0; chunk < chunks; ++chunk) encode(set, chunk, tile);
          });
        } else {
          in_runs(sets * chunks, [&](int64_t i) { sum(i / chunks, i % chunks); });
          for (int64_t set = 0; set < sets; ++set) merge(set);
          in_runs(sets * chunks, [&](int64_t i) {
            Tile tile(shared[i / chunks % heads]);
            encode(i / chunks, i % chunks, tile);
          });
        }
      });
    });
  return {nothing_of(input, bits), codes, gate, sigma};
}

at::Tensor hash_encode_backward(const at::Tensor& grad, const at::Tensor& input,
                                const at::Tensor& anchors, const at::Tensor& projection,
                                const at::Tensor& gate, const at::Tensor& sigma, double eps) {
  if (!covered(input) || is_double(grad) || is_double(anchors) || is_double(projection) ||
      is_double(sigma)) {
    return reference("cofire::hash_encode_backward", &hash_encode_backward, grad, input, anchors,
                     projection, gate, sigma, eps);
  }
  check(input, anchors, projection);
  const int64_t heads = input.size(1), sets = input.size(0) * heads, tokens = input.size(2),
                d = input.size(3), bits = projection.size(1);
  TORCH_CHECK(gate.scalar_type() == word_of(bits) && gate.numel() == sets * tokens &&
                  grad.numel() == sets * tokens * bits && sigma.numel() == sets,
              "hash_encode_backward: grad, gate or sigma does not fit input");
  const at::Tensor g = grad.to(input.scalar_type()).contiguous(), x = input.contiguous(),
                   a = anchors.to(at::kFloat).contiguous(),
                   p = projection.to(at::kFloat).contiguous(), passed = gate.contiguous(),
                   s = sigma.to(at::kFloat).contiguous();
  at::Tensor result = at::empty(input.sizes(), input.options());
  const std::vector<Head> shared = heads_of(a, nullptr, p, true);
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    for_word(bits, [&](auto w) {
      using W = decltype(w);
      in_turns(sets, [&](int64_t set) {
        const int64_t first = set * tokens;
        const float value = s.const_data_ptr<float>()[set];
        hash_backward(shared[set % heads], g.const_data_ptr<T>() + first * bits,
                      x.const_data_ptr<T>() + first * d, passed.const_data_ptr<W>() + first, tokens,
                      value, value <= kSigmaFloor, static_cast<float>(eps),
                      result.data_ptr<T>() + first * d);
      });
    });
  });
  return result;
}

using Thresholded = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Thresholded binary_encode(const at::Tensor& input, const std::optional<at::Tensor>& threshold,
                          double eps) {
  if (!covered(input) || (threshold && is_double(*threshold))) {
    return reference("cofire::binary_encode", &binary_encode, input, threshold, eps);
  }
  TORCH_CHECK(input.dim() == 4 && input.size(3) >= 1 && input.size(3) <= 64,
              "binary_encode: input must be [B, H, N, d] with d from 1 to 64");
  TORCH_CHECK(!threshold || (threshold->dim() == 1 && threshold->size(0) == input.size(1)),
              "binary_encode: threshold must have an entry for each head");
  const at::Tensor x = input.contiguous();
  const int64_t heads = x.size(1), sets = x.size(0) * heads, tokens = x.size(2), d = x.size(3),
                chunks = (tokens + kChunk - 1) / kChunk;
  at::Tensor codes = at::empty({x.size(0), heads, tokens}, x.options().dtype(word_of(d)));
  at::Tensor mean = at::zeros({heads}, x.options().dtype(at::kFloat));
  std::vector<float> bounds(heads);
  std::vector<double> sums(sets * chunks);
  const auto small = static_cast<float>(eps);
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* data = x.const_data_ptr<T>();
    const auto for_chunk = [&](int64_t i, auto&& f) {
      const int64_t chunk = i % chunks, first = i / chunks * tokens + chunk * kChunk;
      f(first, std::min(kChunk, tokens - chunk * kChunk));
    };
    in_turns(sets * chunks, [&](int64_t i) {
      for_chunk(i, [&](int64_t first, int64_t count) {
        double total = 0;
        for (int64_t n = first; n < first + count; ++n) {
          Vec sum(0.0f);
          const Vec norm(std::max(std::sqrt(squared_norm(data + n * d, d)), small));
          for_vectors(
              d, [&](int64_t k, auto rest) { sum = sum + load(data + n * d + k, rest) / norm; });
          total += reduce_add(sum);
        }
        sums[i] = total;
      });
    });
    std::vector<double> of_head(heads);
    for (int64_t i = 0; i < sets * chunks; ++i) of_head[i / chunks % heads] += sums[i];
    float* means = mean.data_ptr<float>();
    const double count = static_cast<double>(x.size(0)) * tokens * d;
    double all = 0;
    for (int64_t i = 0; i < heads && count > 0; ++i) {
      means[i] = static_cast<float>(of_head[i] / count);
      all += means[i];
    }
    const at::Tensor given = threshold ? threshold->to(at::kFloat).contiguous() : mean;
    for (int64_t i = 0; i < heads; ++i) {
      bounds[i] = threshold ? given.const_data_ptr<float>()[i] : static_cast<float>(all / heads);
    }
    for_word(d, [&](auto w) {
      using W = decltype(w);
      W* code = codes.data_ptr<W>();
      in_turns(sets * chunks, [&](int64_t i) {
        const Vec bound(bounds[i / chunks % heads]);
        for_chunk(i, [&](int64_t first, int64_t count) {
          for (int64_t n = first; n < first + count; ++n) {
            const Vec norm(std::max(std::sqrt(squared_norm(data + n * d, d)), small));
            uint64_t word = 0;
            for_vectors(d, [&](int64_t k, auto rest) {
              const Vec above = load(data + n * d + k, rest) / norm > bound;
              const auto clear = static_cast<uint64_t>(static_cast<uint32_t>(above.zero_mask()));
              word |= (~clear & ((uint64_t{1} << rest) - 1)) << k;
            });
            code[n] = static_cast<W>(word);
          }
        });
      });
    });
  });
  return {nothing_of(input, d), codes, mean};
}

at::Tensor binary_encode_backward(const at::Tensor& grad, const at::Tensor& input, double eps) {
  if (!covered(input) || is_double(grad)) {
    return reference("cofire::binary_encode_backward", &binary_encode_backward, grad, input, eps);
  }
  TORCH_CHECK(grad.sizes() == input.sizes() && input.dim() == 4,
              "binary_encode_backward: grad must have the shape of input");
  const at::Tensor g = grad.to(input.scalar_type()).contiguous(), x = input.contiguous();
  at::Tensor result = at::empty(input.sizes(), input.options());
  const int64_t d = x.size(3), rows = d == 0 ? 0 : x.numel() / d;
  const auto small = static_cast<float>(eps);
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T *gradient = g.const_data_ptr<T>(), *data = x.const_data_ptr<T>();
    T* out = result.data_ptr<T>();
    in_parts(rows, 512, [&](int64_t begin, int64_t end) {
      const Vec zero(0.0f), one(1.0f);
      for (int64_t n = begin; n < end; ++n) {
        const float length = std::sqrt(squared_norm(data + n * d, d));
        const Vec norm(std::max(length, small));
        const auto each = [&](auto&& f) {
          for_vectors(d, [&](int64_t k, auto rest) {
            const Vec unit = load(data + n * d + k, rest) / norm;
            f(k, rest, unit, load(gradient + n * d + k, rest) & (unit >= zero) & (unit <= one));
          });
        };
        Vec along(0.0f);
        each([&](int64_t, auto, const Vec& unit, const Vec& passed) {
          along = at::vec::fmadd(unit, passed, along);
        });
        const Vec dot(length >= small ? reduce_add(along) : 0.0f);
        each([&](int64_t k, auto rest, const Vec& unit, const Vec& passed) {
          store_f32(out + n * d + k, (passed - unit * dot) / norm, rest);
        });
      }
    });
  });
  return result;
}

}  // namespace shift_add
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("hash_encode", &cofire::shift_add::hash_encode);
  m.impl("hash_encode_backward", &cofire::shift_add::hash_encode_backward);
  m.impl("binary_encode", &cofire::shift_add::binary_encode);
  m.impl("binary_encode_backward", &cofire::shift_add::binary_encode_backward);
}
