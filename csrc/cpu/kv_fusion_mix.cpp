// SPDX-License-Identifier: Apache-2.0
// kv_fuse: slots that are mixtures of tokens, whose shares a convolution computes. A convolution of
// k taps is a sum of k products of the tokens, each time shifted by one, so that nothing is copied
// into windows. The logits of a tile of slots are turned into shares in place and multiplied with
// the tokens. The backward computes them again.
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

constexpr int64_t kSlots = 128;  // of a tile
constexpr int64_t kHeads = 8;    // whose gradients of logits are kept at a time, for any threads

struct Shape {
  int64_t sets, rows, width, slots, taps;  // `rows` of a set with the padding, of `width` features

  int64_t tokens() const { return rows - taps + 1; }
  int64_t tiles() const { return (slots + kSlots - 1) / kSlots; }
};

// The weight tap by tap, [taps][slots][width] in fp32.
at::Tensor by_taps(const at::Tensor& weight) {
  return weight.to(at::kFloat).permute({2, 0, 1}).contiguous();
}

// relu(convolution + bias) of the slots [first, first + count), [count][tokens].
void convolve(const Shape& s, const Floats& x, const float* weight, const float* bias,
              int64_t first, int64_t count, float* logits) {
  const int64_t n = s.tokens();
  const at::Tensor out = matrix(logits, count, n, n);
  for (int64_t j = 0; j < s.taps; ++j) {
    const float* tap = weight + (j * s.slots + first) * s.width;
    multiply(out, matrix(tap, count, s.width, s.width), x.matrix(j, n, s.width).t(), j > 0);
  }
  for (int64_t r = 0; r < count; ++r) {
    const Vec by(bias != nullptr ? bias[first + r] : 0.0f);
    for_vectors(n, [&](int64_t i, auto m) {
      at::vec::maximum(load(logits + r * n + i, m) + by, Vec(0.0f))
          .store(logits + r * n + i, static_cast<int>(m));
    });
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
  const int64_t n = s.tokens(), d = s.width / 2, tiles = s.tiles();
  each_by_one_thread(s.sets * tiles, [&](int64_t task) {
    const int64_t set = task / tiles, first = task % tiles * kSlots;
    const int64_t count = std::min(kSlots, s.slots - first);
    const Floats x(tokens + set * s.rows * s.width, s.rows, s.width, s.width);
    const at::Tensor tile = at::empty({count, n}, at::kFloat);
    const at::Tensor product = at::empty({count, s.width}, at::kFloat);
    auto *shares = tile.mutable_data_ptr<float>(), *mixed = product.mutable_data_ptr<float>();
    convolve(s, x, weight, bias, first, count, shares);
    float inverse[kSlots];
    for (int64_t r = 0; r < count; ++r) {
      inverse[r] = gate / exponentials(shares + r * n, n, shares + r * n);
    }
    multiply(product, tile, x.matrix(s.taps / 2, n, s.width));
    for (int64_t r = 0; r < count; ++r) {
      const int64_t slot = set * s.slots + first + r;
      const float* one = x.data + (s.taps / 2 + pick[slot]) * x.stride;
      const Vec of_mixed(inverse[r]), of_one(1 - gate);
      for (int64_t half = 0; half < 2; ++half) {
        T* out = (half == 0 ? key : value) + slot * d;
        for_vectors(d, [&](int64_t c, auto m) {
          const int64_t i = half * d + c;
          store_f32(
              out + c,
              at::vec::fmadd(load(mixed + r * s.width + i, m), of_mixed, load(one + i, m) * of_one),
              m);
        });
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

struct Gradients {
  at::Tensor tokens, weight, bias;  // fp32: [sets][rows][width] (or nothing), by taps, [slots]
  double gate = 0;
};

// Heads by groups: first the gradients of the group's logits, head by head and tile by tile, then
// their products with the tokens, tap by tap.
template <typename T>
void fuse_backward(const Shape& s, const T* grad_key, const T* grad_value, const T* tokens,
                   const float* weight, const float* bias, float gate, const int32_t* pick,
                   Gradients& to) {
  const int64_t n = s.tokens(), d = s.width / 2, tiles = s.tiles(), middle = s.taps / 2;
  const int64_t group = std::min(kHeads, s.sets);
  const at::Tensor logits = at::empty({group, s.slots, n}, at::kFloat);
  const at::Tensor to_bias = at::empty({group, s.slots}, at::kDouble);
  const at::Tensor to_gate = at::empty({group, s.slots}, at::kDouble);
  auto* to_x = to.tokens.defined() ? to.tokens.mutable_data_ptr<float>() : nullptr;
  auto* to_weight = to.weight.mutable_data_ptr<float>();
  for (int64_t base = 0; base < s.sets; base += group) {
    const int64_t now = std::min(group, s.sets - base);
    std::vector<std::optional<Floats>> x(now);
    at::parallel_for(0, now, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        x[i].emplace(tokens + (base + i) * s.rows * s.width, s.rows, s.width, s.width);
      }
    });
    // With a gradient of the tokens the tiles of a head follow each other.
    const int64_t parts = to_x != nullptr ? 1 : tiles;
    each_by_one_thread(now * parts, [&](int64_t task) {
      const int64_t i = task / parts, set = base + i;
      const Floats& rows = *x[i];
      const at::Tensor rest = rows.matrix(middle, n, s.width);
      const int64_t room = std::min(kSlots, s.slots);
      const at::Tensor products = at::empty({room, n}, at::kFloat);
      const at::Tensor grads = at::empty({room, s.width}, at::kFloat);
      auto *dp = products.mutable_data_ptr<float>(), *g = grads.mutable_data_ptr<float>();
      std::vector<float> shares(to_x != nullptr ? room * n : n);
      const int64_t from = to_x != nullptr ? 0 : task % parts * kSlots;
      const int64_t until = to_x != nullptr ? s.slots : std::min(s.slots, from + kSlots);
      for (int64_t first = from; first < until; first += kSlots) {
        const int64_t count = std::min(kSlots, s.slots - first);
        float* z = logits.mutable_data_ptr<float>() + (i * s.slots + first) * n;
        convolve(s, rows, weight, bias, first, count, z);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t slot = (set * s.slots + first + r) * d;
          for_vectors(d, [&](int64_t c, auto m) {
            load(grad_key + slot + c, m).store(g + r * s.width + c, static_cast<int>(m));
            load(grad_value + slot + c, m).store(g + r * s.width + d + c, static_cast<int>(m));
          });
        }
        const at::Tensor grad = grads.narrow(0, 0, count);
        multiply(products.narrow(0, 0, count), grad, rest.t());
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
          const float* one = rows.data + (middle + pick[set * s.slots + first + r]) * rows.stride;
          to_gate.mutable_data_ptr<double>()[slot] = along - dot(g + r * s.width, one, s.width);
        }
        if (to_x == nullptr) continue;
        float* out = to_x + set * s.rows * s.width;
        const at::Tensor p = matrix(shares.data(), count, n, n), slope = matrix(z, count, n, n);
        multiply(matrix(out + middle * s.width, n, s.width, s.width), p.t(), grad, true);
        for (int64_t j = 0; j < s.taps; ++j) {
          const float* tap = weight + (j * s.slots + first) * s.width;
          multiply(matrix(out + j * s.width, n, s.width, s.width), slope.t(),
                   matrix(tap, count, s.width, s.width), true);
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
    });
    each_by_one_thread(s.taps * tiles, [&](int64_t task) {
      const int64_t j = task / tiles, first = task % tiles * kSlots;
      const int64_t count = std::min(kSlots, s.slots - first);
      const at::Tensor sum =
          matrix(to_weight + (j * s.slots + first) * s.width, count, s.width, s.width);
      for (int64_t i = 0; i < now; ++i) {
        const float* slopes = logits.const_data_ptr<float>() + (i * s.slots + first) * n;
        multiply(sum, matrix(slopes, count, n, n), x[i]->matrix(j, n, s.width), true);
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
  const at::Tensor x = tokens.contiguous(), w = by_taps(weight), index = pick.contiguous();
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
  const at::Tensor x = tokens.contiguous(), w = by_taps(weight), index = pick.contiguous();
  const at::Tensor constant = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const at::Tensor gk = grad_key.contiguous(), gv = grad_value.contiguous();
  check_pick("kv_fuse_backward", index, s.tokens());
  const auto floats = x.options().dtype(at::kFloat);
  Gradients to;
  if (to_tokens) to.tokens = at::zeros(x.sizes(), floats);
  to.weight = at::zeros({s.taps, s.slots, s.width}, floats);
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
          to.weight.permute({1, 2, 0}).to(weight.scalar_type()).contiguous(),
          bias.has_value() ? to.bias.to(bias->scalar_type()) : nothing(), of_gate};
}

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("kv_fuse", &cofire::kv_fusion::kv_fuse);
  m.impl("kv_fuse_backward", &cofire::kv_fusion::kv_fuse_backward);
}
