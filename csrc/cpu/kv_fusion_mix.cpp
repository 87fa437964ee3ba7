// SPDX-License-Identifier: Apache-2.0
// kv_fuse: slots that are mixtures of tokens, whose shares a convolution computes. A convolution of
// k taps is a sum of k products of the tokens, each time shifted by one, so that nothing is copied
// into windows; of many taps, three taps and three tokens at a time take five products of a third
// instead of nine (Winograd, "Arithmetic Complexity of Computations", 1980). The logits of a
// tile of slots are turned into shares in place and multiplied with the tokens. The backward
// computes them again.
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "exponential.h"
#include "kv_fusion.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {
namespace {

constexpr int64_t kSlots = 256;  // of a tile, at most
constexpr int64_t kHeads = 8;    // whose gradients of logits are kept at a time, for any threads

constexpr int64_t kLong = 256;        // terms of a sum, from which on fewer multiplications count
constexpr int64_t kLittle = 1 << 17;  // multiplications of a product

constexpr int64_t kStep = 3, kPoints = 5;
// A polynomial of three coefficients at 0, 1, -1, 2 and infinity (divided by what clears the
// fractions of kTokens), and what three outputs of a filter of three taps are made of.
constexpr float kTaps[kPoints][kStep] = {
    {1 / 2.f, 0, 0},
    {1 / 2.f, 1 / 2.f, 1 / 2.f},
    {1 / 6.f, -1 / 6.f, 1 / 6.f},
    {1 / 6.f, 1 / 3.f, 2 / 3.f},
    {0, 0, 1},
};
constexpr float kTokens[kPoints][kPoints] = {
    {2, -1, -2, 1, 0}, {0, 2, 1, -1, 0}, {0, -2, 3, -1, 0}, {0, -1, 0, 1, 0}, {0, 2, -1, -2, 1},
};
constexpr float kOut[kStep][kPoints] = {{1, 1, 1, 1, 0}, {0, 1, -1, 2, 0}, {0, 1, 1, 4, 1}};

struct Shape {
  int64_t sets, rows, width, slots, taps;  // `rows` of a set with the padding, of `width` features

  int64_t tokens() const { return rows - taps + 1; }
  // Few heads make small tiles, so that there is work for all threads.
  int64_t tile() const { return sets >= kHeads ? kSlots : kSlots / 4; }
  int64_t tiles() const { return (slots + tile() - 1) / tile(); }

  // Tokens are taken by their remainder: those of remainder 0 first.
  bool fast() const { return taps > kStep && taps * width >= kLong; }
  int64_t step() const { return fast() ? kStep : 1; }
  int64_t points() const { return fast() ? kPoints : 1; }
  // Groups of taps are multiplied one after another or, where that is little work, as one: each
  // token then carries what it is multiplied with.
  int64_t groups() const { return merged() ? 1 : all_groups(); }
  int64_t columns() const { return merged() ? all_groups() * width : width; }
  bool merged() const { return longest() * width * std::min(slots, tile()) <= kLittle; }
  int64_t all_groups() const { return (taps + step() - 1) / step(); }
  int64_t longest() const { return (tokens() + step() - 1) / step(); }
  int64_t of_remainder(int64_t i) const { return (tokens() - i + step() - 1) / step(); }
  int64_t start(int64_t i) const {
    int64_t found = 0;
    for (int64_t k = 0; k < i; ++k) found += of_remainder(k);
    return found;
  }
  int64_t windows() const { return longest() + groups() - 1; }
  // Of a group of taps in the weight [points][groups][slots][columns].
  int64_t tap_at(int64_t p, int64_t g, int64_t slot) const {
    return merged() ? ((p * slots + slot) * all_groups() + g) * width
                    : ((p * all_groups() + g) * slots + slot) * width;
  }
};

// The weight [points][groups][slots][columns] in fp32: tap by tap, or at the points.
at::Tensor by_taps(const Shape& s, const at::Tensor& weight) {
  const at::Tensor taps = weight.to(at::kFloat).permute({2, 0, 1}).contiguous();
  if (!s.fast() && !s.merged()) return taps;
  const at::Tensor out = at::empty({s.points(), s.groups(), s.slots, s.columns()}, at::kFloat);
  const float* from = taps.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, s.all_groups() * s.slots, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / s.slots, slot = i % s.slots;
      for (int64_t p = 0; p < s.points(); ++p) {
        float* line = to + s.tap_at(p, g, slot);
        for_vectors(s.width, [&](int64_t c, auto m) {
          Vec sum(0.0f);
          for (int64_t r = 0; r < s.step() && s.step() * g + r < s.taps; ++r) {
            const float* tap = from + ((s.step() * g + r) * s.slots + slot) * s.width;
            sum = at::vec::fmadd(load(tap + c, m), Vec(s.fast() ? kTaps[p][r] : 1.0f), sum);
          }
          sum.store(line + c, static_cast<int>(m));
        });
      }
    }
  });
  return out;
}

// The other way, of the gradient: [taps][slots][width].
at::Tensor to_taps(const Shape& s, const at::Tensor& products) {
  if (!s.fast() && !s.merged()) return products;
  const at::Tensor out = at::empty({s.taps, s.slots, s.width}, at::kFloat);
  const float* from = products.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, s.taps * s.slots, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t j = i / s.slots, slot = i % s.slots;
      for_vectors(s.width, [&](int64_t c, auto m) {
        Vec sum(0.0f);
        for (int64_t p = 0; p < s.points(); ++p) {
          const float by = s.fast() ? kOut[j % kStep][p] : 1.0f;
          sum = at::vec::fmadd(load(from + s.tap_at(p, j / s.step(), slot) + c, m), Vec(by), sum);
        }
        sum.store(to + i * s.width + c, static_cast<int>(m));
      });
    }
  });
  return out;
}

// A set's tokens in fp32, and what the products are of: [points][windows][columns].
struct Tokens {
  Shape s;
  Floats rows;
  at::Tensor owner;
  const float* data;
  int64_t stride;

  template <typename T>
  Tokens(const Shape& shape, const T* tokens)
      : s(shape), rows(tokens, s.rows, s.width, s.width), data(rows.data), stride(rows.stride) {
    if (!s.fast() && !s.merged()) return;
    owner = at::empty({s.points(), s.windows(), s.columns()}, at::kFloat);
    float* to = owner.mutable_data_ptr<float>();
    const std::vector<float> zeros(s.width);
    const int64_t size = s.windows() * s.columns();
    for (int64_t w = 0; w < s.longest() + s.all_groups() - 1; ++w) {
      const int64_t first = s.merged() ? std::max<int64_t>(0, w - s.longest() + 1) : 0;
      const int64_t last = s.merged() ? std::min(w, s.all_groups() - 1) : 0;
      if (!s.fast()) {
        const float* from = rows.data + w * rows.stride;
        for (int64_t g = first; g <= last; ++g) {
          std::copy_n(from, s.width, to + (w - g) * s.columns() + g * s.width);
        }
        continue;
      }
      const float* from[kPoints];
      for (int64_t k = 0; k < kPoints; ++k) {
        const int64_t row = kStep * w + k;
        from[k] = row < s.rows ? rows.data + row * rows.stride : zeros.data();
      }
      for_vectors(s.width, [&](int64_t c, auto m) {
        Vec x[kPoints];
        for (int64_t k = 0; k < kPoints; ++k) x[k] = load(from[k] + c, m);
        for (int64_t p = 0; p < kPoints; ++p) {
          Vec sum(0.0f);
          for (int64_t k = 0; k < kPoints; ++k) {
            if (kTokens[p][k] != 0) sum = at::vec::fmadd(x[k], Vec(kTokens[p][k]), sum);
          }
          for (int64_t g = first; g <= last; ++g) {
            float* line = to + p * size + (w - g) * s.columns() + g * s.width;
            sum.store(line + c, static_cast<int>(m));
          }
        }
      });
    }
    data = to;
    stride = s.columns();
  }
  // What a group of taps is multiplied with.
  at::Tensor at_point(int64_t p, int64_t g) const {
    return matrix(data + (p * s.windows() + g) * stride, s.longest(), s.columns(), stride);
  }
  // The tokens of one remainder.
  at::Tensor of_remainder(int64_t i) const {
    return matrix(rows.data + (s.taps / 2 + i) * rows.stride, s.of_remainder(i), s.width,
                  s.step() * rows.stride);
  }
  const float* token(int64_t index) const { return rows.data + (s.taps / 2 + index) * rows.stride; }
};

// out [count][width] = shares [count][tokens] x.
void mix(const Tokens& x, float* shares, int64_t count, const at::Tensor& out) {
  const int64_t n = x.s.tokens();
  for (int64_t i = 0; i < x.s.step(); ++i) {
    if (x.s.of_remainder(i) == 0) continue;
    multiply(out, matrix(shares + x.s.start(i), count, x.s.of_remainder(i), n), x.of_remainder(i),
             i > 0);
  }
}

// products [count][tokens] = grad [count][width] x'.
void mix_back(const Tokens& x, const at::Tensor& grad, float* products) {
  const int64_t n = x.s.tokens();
  for (int64_t i = 0; i < x.s.step(); ++i) {
    if (x.s.of_remainder(i) == 0) continue;
    multiply(matrix(products + x.s.start(i), grad.size(0), x.s.of_remainder(i), n), grad,
             x.of_remainder(i).t());
  }
}

// relu(convolution + bias) of the slots [first, first + count), [count][tokens]; `room` for
// [points][count][longest].
void convolve(const Tokens& x, const float* weight, const float* bias, int64_t first, int64_t count,
              float* room, float* logits) {
  const Shape& s = x.s;
  const int64_t n = s.tokens(), longest = s.longest();
  float* sums = s.fast() ? room : logits;
  for (int64_t p = 0; p < s.points(); ++p) {
    const at::Tensor sum = matrix(sums + p * count * longest, count, longest, longest);
    for (int64_t g = 0; g < s.groups(); ++g) {
      const at::Tensor tap =
          matrix(weight + s.tap_at(p, g, first), count, s.columns(), s.columns());
      multiply(sum, tap, x.at_point(p, g).t(), g > 0);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const Vec by(bias != nullptr ? bias[first + r] : 0.0f), zero(0.0f);
    if (!s.fast()) {
      for_vectors(n, [&](int64_t i, auto m) {
        at::vec::maximum(load(logits + r * n + i, m) + by, zero)
            .store(logits + r * n + i, static_cast<int>(m));
      });
      continue;
    }
    for (int64_t i = 0; i < kStep; ++i) {
      float* out = logits + r * n + s.start(i);
      for_vectors(s.of_remainder(i), [&](int64_t t, auto m) {
        Vec sum = by;
        for (int64_t p = 0; p < kPoints; ++p) {
          if (kOut[i][p] == 0) continue;
          sum = at::vec::fmadd(load(sums + (p * count + r) * longest + t, m), Vec(kOut[i][p]), sum);
        }
        at::vec::maximum(sum, zero).store(out + t, static_cast<int>(m));
      });
    }
  }
}

// Slopes of logits [count][tokens], three tokens at a time, to `out` of [count][longest] for each
// point: as taps are (for the gradient of the weight), or as the gradient of `convolve`.
void at_points(const Shape& s, const float* slopes, int64_t count, bool as_taps, float* out,
               int64_t stride) {
  const int64_t n = s.tokens(), longest = s.longest();
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t p = 0; p < kPoints; ++p) {
      float* line = out + p * stride + r * longest;
      std::fill(line, line + longest, 0.0f);
      for (int64_t i = 0; i < kStep; ++i) {
        const float by = as_taps ? kTaps[p][i] : kOut[i][p];
        if (by == 0) continue;
        const float* from = slopes + r * n + s.start(i);
        for_vectors(s.of_remainder(i), [&](int64_t t, auto m) {
          at::vec::fmadd(load(from + t, m), Vec(by), load(line + t, m))
              .store(line + t, static_cast<int>(m));
        });
      }
    }
  }
}

// out = exp(logit - largest) of a row, which may be where the logits are; returns the sum.
float exponentials(const float* logits, int64_t n, float* out) {
  Vec most(0.0f);  // they are not negative
  for_vectors(n, [&](int64_t i, auto m) { most = at::vec::maximum(most, load(logits + i, m)); });
  const Vec from(reduce_max(most)), by(1.44269504088896341f);
  Vec sum(0.0f);
  for_vectors(n, [&](int64_t i, auto m) {
    const Vec e = power_of_two<float>((load(logits + i, m) - from) * by);
    e.store(out + i, static_cast<int>(m));
    sum = sum + Vec::set(Vec(0.0f), e, m);
  });
  return reduce_add(sum);
}

template <typename T>
void fuse(const Shape& s, const T* tokens, const float* weight, const float* bias, float gate,
          const int32_t* pick, T* key, T* value) {
  const int64_t n = s.tokens(), d = s.width / 2;
  // Where there are heads enough, the tiles of a head follow each other.
  const int64_t parts = s.sets >= kHeads ? 1 : s.tiles();
  each_by_one_thread(s.sets * parts, [&](int64_t task) {
    const int64_t set = task / parts;
    const int64_t from = parts == 1 ? 0 : task % parts * s.tile();
    const int64_t until = parts == 1 ? s.slots : std::min(s.slots, from + s.tile());
    const int64_t most = std::min(s.tile(), until - from);
    const Tokens x(s, tokens + set * s.rows * s.width);
    const at::Tensor tile = at::empty({most, n}, at::kFloat);
    const at::Tensor product = at::empty({most, s.width}, at::kFloat);
    const at::Tensor room = at::empty({s.fast() ? kPoints * most * s.longest() : 0}, at::kFloat);
    auto *shares = tile.mutable_data_ptr<float>(), *mixed = product.mutable_data_ptr<float>();
    for (int64_t first = from; first < until; first += s.tile()) {
      const int64_t count = std::min(s.tile(), until - first);
      convolve(x, weight, bias, first, count, room.mutable_data_ptr<float>(), shares);
      float inverse[kSlots];
      for (int64_t r = 0; r < count; ++r) {
        inverse[r] = gate / exponentials(shares + r * n, n, shares + r * n);
      }
      mix(x, shares, count, product.narrow(0, 0, count));
      for (int64_t r = 0; r < count; ++r) {
        const int64_t slot = set * s.slots + first + r;
        const float* one = x.token(pick[slot]);
        const Vec of_mixed(inverse[r]), of_one(1 - gate);
        for (int64_t half = 0; half < 2; ++half) {
          T* out = (half == 0 ? key : value) + slot * d;
          for_vectors(d, [&](int64_t c, auto m) {
            const int64_t i = half * d + c;
            const Vec kept = load(one + i, m) * of_one;
            store_f32(out + c, at::vec::fmadd(load(mixed + r * s.width + i, m), of_mixed, kept), m);
          });
        }
      }
    }
  });
}

float dot(const float* a, const float* b, int64_t n) {
  Vec sum(0.0f);
  for_vectors(
      n, [&](int64_t i, auto m) { sum = at::vec::fmadd(load(a + i, m), load(b + i, m), sum); });
  return reduce_add(sum);
}

// From the gradient of `Tokens::data` to that of the tokens.
void add_windows(const Shape& s, const float* from, float* to) {
  const int64_t size = s.windows() * s.columns(), parts = s.columns() / s.width;
  for (int64_t i = 0; i < s.windows() * parts; ++i) {
    const int64_t w = i / parts, g = i % parts, at = w * s.columns() + g * s.width;
    for (int64_t k = 0; k < (s.fast() ? kPoints : 1); ++k) {
      if (s.step() * (w + g) + k >= s.rows) break;
      float* line = to + (s.step() * (w + g) + k) * s.width;
      for_vectors(s.width, [&](int64_t c, auto m) {
        Vec sum = load(line + c, m);
        for (int64_t p = 0; p < s.points(); ++p) {
          const float by = s.fast() ? kTokens[p][k] : 1.0f;
          if (by != 0) sum = at::vec::fmadd(load(from + p * size + at + c, m), Vec(by), sum);
        }
        sum.store(line + c, static_cast<int>(m));
      });
    }
  }
}

struct Gradients {
  at::Tensor tokens, weight, bias;  // fp32: [sets][rows][width] (or nothing), as by_taps, [slots]
  double gate = 0;
};

// Heads by groups: first the gradients of the group's logits, head by head and tile by tile, then
// their products with the tokens, tap by tap.
template <typename T>
void fuse_backward(const Shape& s, const T* grad_key, const T* grad_value, const T* tokens,
                   const float* weight, const float* bias, float gate, const int32_t* pick,
                   Gradients& to) {
  const int64_t n = s.tokens(), d = s.width / 2, tiles = s.tiles(), middle = s.taps / 2;
  const int64_t group = std::min(kHeads, s.sets), longest = s.longest();
  const int64_t per_point = s.slots * longest, per_head = s.points() * per_point;
  const at::Tensor slopes = at::empty({group, per_head}, at::kFloat);
  const at::Tensor to_bias = at::empty({group, s.slots}, at::kDouble);
  const at::Tensor to_gate = at::empty({group, s.slots}, at::kDouble);
  auto* to_x = to.tokens.defined() ? to.tokens.mutable_data_ptr<float>() : nullptr;
  auto* to_weight = to.weight.mutable_data_ptr<float>();
  for (int64_t base = 0; base < s.sets; base += group) {
    const int64_t now = std::min(group, s.sets - base);
    std::vector<std::optional<Tokens>> x(now);
    at::parallel_for(0, now, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) x[i].emplace(s, tokens + (base + i) * s.rows * s.width);
    });
    // With a gradient of the tokens the tiles of a head follow each other.
    const int64_t parts = to_x != nullptr ? 1 : tiles;
    each_by_one_thread(now * parts, [&](int64_t task) {
      const int64_t i = task / parts, set = base + i;
      const Tokens& rows = *x[i];
      const int64_t most = std::min(s.tile(), s.slots);
      const at::Tensor products = at::empty({2, most, n}, at::kFloat);
      const at::Tensor grads = at::empty({most, s.width}, at::kFloat);
      const at::Tensor room = at::empty({s.fast() ? kPoints * most * longest : 0}, at::kFloat);
      const at::Tensor of_windows =
          (s.fast() || s.merged()) && to_x != nullptr
              ? at::zeros({s.points(), s.windows(), s.columns()}, at::kFloat)
              : at::Tensor();
      auto *dp = products.mutable_data_ptr<float>(), *g = grads.mutable_data_ptr<float>();
      auto* sums = room.mutable_data_ptr<float>();
      std::vector<float> shares(to_x != nullptr ? most * n : n);
      const int64_t from = to_x != nullptr ? 0 : task % parts * s.tile();
      const int64_t until = to_x != nullptr ? s.slots : std::min(s.slots, from + s.tile());
      for (int64_t first = from; first < until; first += s.tile()) {
        const int64_t count = std::min(s.tile(), s.slots - first);
        float* at_head = slopes.mutable_data_ptr<float>() + i * per_head;
        float* z = s.fast() ? dp + most * n : at_head + first * n;
        convolve(rows, weight, bias, first, count, sums, z);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t slot = (set * s.slots + first + r) * d;
          for_vectors(d, [&](int64_t c, auto m) {
            load(grad_key + slot + c, m).store(g + r * s.width + c, static_cast<int>(m));
            load(grad_value + slot + c, m).store(g + r * s.width + d + c, static_cast<int>(m));
          });
        }
        const at::Tensor grad = grads.narrow(0, 0, count);
        mix_back(rows, grad, dp);
        for (int64_t r = 0; r < count; ++r) {
          float *p = to_x != nullptr ? shares.data() + r * n : shares.data(), *q = dp + r * n;
          const float inverse = 1 / exponentials(z + r * n, n, p);
          // sum of P dP: what the slot's gradient is to its mixture
          const float along = dot(p, q, n) * inverse;
          const Vec less(along), by(gate * inverse), zero(0.0f);
          Vec sum(0.0f);
          for_vectors(n, [&](int64_t k, auto m) {
            const Vec value = load(z + r * n + k, m), share = load(p + k, m) * by;
            const Vec slope = share * (load(q + k, m) - less);
            const Vec passed = Vec::blendv(zero, slope, value > zero);
            passed.store(z + r * n + k, static_cast<int>(m));
            sum = sum + Vec::set(zero, passed, m);
            share.store(p + k, static_cast<int>(m));
          });
          const int64_t slot = i * s.slots + first + r;
          to_bias.mutable_data_ptr<double>()[slot] = reduce_add(sum);
          const float* one = rows.token(pick[set * s.slots + first + r]);
          to_gate.mutable_data_ptr<double>()[slot] = along - dot(g + r * s.width, one, s.width);
        }
        if (s.fast()) at_points(s, z, count, true, at_head + first * longest, per_point);
        if (to_x == nullptr) continue;
        float* out = to_x + set * s.rows * s.width;
        for (int64_t k = 0; k < s.step(); ++k) {
          if (s.of_remainder(k) == 0) continue;
          multiply(
              matrix(out + (middle + k) * s.width, s.of_remainder(k), s.width, s.step() * s.width),
              matrix(shares.data() + s.start(k), count, s.of_remainder(k), n).t(), grad, true);
        }
        if (s.fast()) at_points(s, z, count, false, sums, count * longest);
        float* to_windows = of_windows.defined() ? of_windows.mutable_data_ptr<float>() : out;
        for (int64_t p = 0; p < s.points(); ++p) {
          const float* slope = s.fast() ? sums + p * count * longest : z;
          for (int64_t k = 0; k < s.groups(); ++k) {
            const float* tap = weight + s.tap_at(p, k, first);
            multiply(matrix(to_windows + (p * s.windows() + k) * s.columns(), longest, s.columns(),
                            s.columns()),
                     matrix(slope, count, longest, longest).t(),
                     matrix(tap, count, s.columns(), s.columns()), true);
          }
        }
        for (int64_t r = 0; r < count; ++r) {
          float* one = out + (middle + pick[set * s.slots + first + r]) * s.width;
          const Vec by(1 - gate);
          for_vectors(s.width, [&](int64_t c, auto m) {
            at::vec::fmadd(load(g + r * s.width + c, m), by, load(one + c, m))
                .store(one + c, static_cast<int>(m));
          });
        }
      }
      if (of_windows.defined()) {
        add_windows(s, of_windows.const_data_ptr<float>(), to_x + set * s.rows * s.width);
      }
    });
    each_by_one_thread(s.points() * s.groups() * tiles, [&](int64_t task) {
      const int64_t first = task % tiles * s.tile(), count = std::min(s.tile(), s.slots - first);
      const int64_t p = task / tiles / s.groups(), k = task / tiles % s.groups();
      const at::Tensor sum =
          matrix(to_weight + s.tap_at(p, k, first), count, s.columns(), s.columns());
      for (int64_t i = 0; i < now; ++i) {
        const float* from =
            slopes.const_data_ptr<float>() + i * per_head + p * per_point + first * longest;
        multiply(sum, matrix(from, count, longest, longest), x[i]->at_point(p, k), true);
      }
    });
    const auto *of_bias = to_bias.const_data_ptr<double>(),
               *of_gate = to_gate.const_data_ptr<double>();
    auto* bias_sums = to.bias.mutable_data_ptr<double>();
    for (int64_t i = 0; i < now; ++i) {
      for (int64_t m = 0; m < s.slots; ++m) {
        bias_sums[m] += of_bias[i * s.slots + m];
        to.gate += of_gate[i * s.slots + m];
      }
    }
  }
}

using Optional = std::optional<at::Tensor>;

Shape shape_of(const char* name, const at::Tensor& tokens, const at::Tensor& weight,
               const Optional& bias, const at::Tensor& gate, const at::Tensor& pick) {
  TORCH_CHECK(tokens.dim() == 4 && tokens.size(3) % 2 == 0 && tokens.size(3) > 0 &&
                  weight.dim() == 3 && weight.size(1) == tokens.size(3) &&
                  weight.size(2) % 2 == 1 && tokens.size(2) >= weight.size(2) &&
                  gate.numel() == 1 && pick.dim() == 3 && pick.scalar_type() == at::kInt &&
                  pick.size(0) == tokens.size(0) && pick.size(1) == tokens.size(1) &&
                  pick.size(2) == weight.size(0) &&
                  (!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0))),
              name, ": the arguments do not fit each other");
  return {tokens.size(0) * tokens.size(1), tokens.size(2), tokens.size(3), weight.size(0),
          weight.size(2)};
}

void check_pick(const char* name, const at::Tensor& pick, int64_t tokens) {
  const auto* p = pick.const_data_ptr<int32_t>();
  bool outside = false;
  for (int64_t i = 0; i < pick.numel(); ++i) outside |= p[i] < 0 || p[i] >= tokens;
  TORCH_CHECK_INDEX(!outside, name, ": an index is outside of the ", tokens, " tokens");
}

float number_of(const at::Tensor& gate) {
  return gate.to(at::kFloat).contiguous().const_data_ptr<float>()[0];
}

// Whether fp32 is wide enough.
bool fits(const at::Tensor& tokens, const at::Tensor& weight, const Optional& bias,
          const at::Tensor& gate) {
  return covered(tokens) && covered(weight) && covered(gate) &&
         (!bias.has_value() || covered(*bias));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> kv_fuse(const at::Tensor& tokens, const at::Tensor& weight,
                                           const Optional& bias, const at::Tensor& gate,
                                           const at::Tensor& pick) {
  if (!fits(tokens, weight, bias, gate)) {
    return reference("cofire::kv_fuse", &kv_fuse, tokens, weight, bias, gate, pick);
  }
  const Shape s = shape_of("kv_fuse", tokens, weight, bias, gate, pick);
  const at::Tensor x = tokens.contiguous(), w = by_taps(s, weight), index = pick.contiguous();
  const at::Tensor constant = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  check_pick("kv_fuse", index, s.tokens());
  const auto empty = [&] {
    return at::empty({x.size(0), x.size(1), s.slots, s.width / 2}, x.options());
  };
  at::Tensor key = empty(), value = empty();
  if (key.numel() == 0) return {key, value};
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    fuse<T>(s, x.const_data_ptr<T>(), w.const_data_ptr<float>(),
            constant.defined() ? constant.const_data_ptr<float>() : nullptr, number_of(gate),
            index.const_data_ptr<int32_t>(), key.mutable_data_ptr<T>(),
            value.mutable_data_ptr<T>());
  });
  return {key, value};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kv_fuse_backward(
    const at::Tensor& grad_key, const at::Tensor& grad_value, const at::Tensor& tokens,
    const at::Tensor& weight, const Optional& bias, const at::Tensor& gate, const at::Tensor& pick,
    bool to_tokens) {
  if (!fits(tokens, weight, bias, gate) || grad_key.scalar_type() != tokens.scalar_type() ||
      grad_value.scalar_type() != tokens.scalar_type()) {
    return reference("cofire::kv_fuse_backward", &kv_fuse_backward, grad_key, grad_value, tokens,
                     weight, bias, gate, pick, to_tokens);
  }
  const Shape s = shape_of("kv_fuse_backward", tokens, weight, bias, gate, pick);
  TORCH_CHECK(grad_key.sizes() == grad_value.sizes() && grad_key.dim() == 4 &&
                  grad_key.numel() == s.sets * s.slots * s.width / 2,
              "kv_fuse_backward: the gradients do not fit tokens");
  const at::Tensor x = tokens.contiguous(), w = by_taps(s, weight), index = pick.contiguous();
  const at::Tensor constant = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const at::Tensor gk = grad_key.contiguous(), gv = grad_value.contiguous();
  check_pick("kv_fuse_backward", index, s.tokens());
  const auto floats = x.options().dtype(at::kFloat);
  Gradients to;
  if (to_tokens) to.tokens = at::zeros(x.sizes(), floats);
  to.weight = at::zeros({s.points() * s.groups(), s.slots, s.columns()}, floats);
  to.bias = at::zeros({s.slots}, floats.dtype(at::kDouble));
  if (s.sets > 0 && s.slots > 0) {
    dispatch(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      fuse_backward<T>(s, gk.const_data_ptr<T>(), gv.const_data_ptr<T>(), x.const_data_ptr<T>(),
                       w.const_data_ptr<float>(),
                       constant.defined() ? constant.const_data_ptr<float>() : nullptr,
                       number_of(gate), index.const_data_ptr<int32_t>(), to);
    });
  }
  const auto nothing = [&] { return at::empty({0}, x.options()); };
  at::Tensor of_gate = at::empty(gate.sizes(), gate.options());
  of_gate.fill_(to.gate);
  return {to_tokens ? to.tokens.to(x.scalar_type()) : nothing(),
          to_taps(s, to.weight).permute({1, 2, 0}).to(weight.scalar_type()).contiguous(),
          bias.has_value() ? to.bias.to(bias->scalar_type()) : nothing(), of_gate};
}

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("kv_fuse", &cofire::kv_fusion::kv_fuse);
  m.impl("kv_fuse_backward", &cofire::kv_fusion::kv_fuse_backward);
}
