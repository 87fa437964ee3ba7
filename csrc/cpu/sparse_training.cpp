// SPDX-License-Identifier: Apache-2.0
// Optimiser steps on masked weights: one pass over weight, gradient and state, in which kept
// entries are updated and pruned ones become zero, whatever gradient stood there.
//
// The order of operations is that of torch.optim; where a product is added, it is a fused
// multiply-add that says so, so that every way through a weight has the same bits. Entries do not
// depend on each other, and which lane computes which does not depend on the number of threads.
#include <array>
#include <cmath>
#include <optional>

#include "loops.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace sparse_training {
namespace {

// Entries of a word of mask. An empty one is not loaded: with 32 of them a mask without pattern, of
// density 0.1, has so many that the interrupted streams cost more than they save.
constexpr int64_t kWord = 64;
constexpr int64_t kSegment = 4096;  // entries that are worth a thread's turn
constexpr int64_t kGather = 512;    // entries whose kept ones are brought together at a time

template <int S>
using States = std::array<float*, S>;

// Full lanes where the bits are set.
inline Vec lanes_of(uint32_t bits) {
  using Int = at::vec::Vectorized<int32_t>;
  alignas(64) static constexpr int32_t kEach[16] = {
      1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
      1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const Int each = Int::loadu(kEach);
  return at::vec::cast<float>((Int(static_cast<int32_t>(bits)) & each) == each);
}

// The mask of the `count` entries from k on, a multiple of 8; at most 64.
inline uint64_t word_of(const uint8_t* bits, int64_t k, int64_t count) {
  uint64_t word = 0;
  if (count == kWord) {
    std::memcpy(&word, bits + k / 8, 8);  // little-endian, like the machines torch is built for
    return word;
  }
  for (int64_t i = 0; 8 * i < count; ++i) word |= uint64_t{bits[k / 8 + i]} << (8 * i);
  return word & ((uint64_t{1} << count) - 1);
}

// ---- states that hold the values of kept entries alone ----

#if defined(CPU_CAPABILITY_AVX2)
// Lanes to and from the positions of set bits, by the bits of a byte: eight indices of a byte each.
struct Places {
  uint64_t expand[256], compress[256];
  constexpr Places() : expand(), compress() {
    for (int bits = 0; bits < 256; ++bits) {
      uint64_t rank = 0;
      for (uint64_t lane = 0; lane < 8; ++lane) {
        expand[bits] |= rank << (8 * lane);
        if (bits >> lane & 1) compress[bits] |= lane << (8 * rank++);
      }
    }
  }
};
constexpr Places kPlaces;

inline __m256i indices(uint64_t packed) {
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(packed)));
}
#endif

// Lane i of the first ones goes to the i-th lane whose bit is set; the others mean nothing.
inline Vec expand(const Vec& v, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), v);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_permutevar8x32_ps(v, indices(kPlaces.expand[bits]));
#else
  alignas(64) float from[kLanes], to[kLanes] = {};
  v.store(from);
  for (const float* p = from; bits != 0; bits &= bits - 1) to[__builtin_ctz(bits)] = *p++;
  return Vec::loadu(to);
#endif
}

// The lanes whose bits are set come first; what follows means nothing.
inline Vec compress(const Vec& v, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), v);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_permutevar8x32_ps(v, indices(kPlaces.compress[bits]));
#else
  alignas(64) float from[kLanes], to[kLanes] = {};
  v.store(from);
  for (float* p = to; bits != 0; bits &= bits - 1) *p++ = from[__builtin_ctz(bits)];
  return Vec::loadu(to);
#endif
}

// ---- the three ways through a weight ----

template <int S>
inline States<S> moved(const States<S>& states, int64_t by) {
  States<S> to;
  for (int j = 0; j < S; ++j) to[j] = states[j] + by;
  return to;
}

template <typename T, int S, typename U>
void step_all(T* w, const T* g, const States<S>& states, int64_t numel, const U& given) {
  const int64_t segments = (numel + kSegment - 1) / kSegment;
  at::parallel_for(0, segments, 8, [&](int64_t first, int64_t last) {
    const U update = given;  // of its own, so that no store can change it
    const int64_t begin = first * kSegment, end = std::min(last * kSegment, numel);
    for_vectors(end - begin, [&](int64_t i, auto rest) {
      const int64_t k = begin + i;
      Vec value = load(w + k, rest);
      std::array<Vec, S> state;
      for (int j = 0; j < S; ++j) state[j] = load(states[j] + k, rest);
      update(value, load(g + k, rest), state);
      store_f32(w + k, value, rest);
      for (int j = 0; j < S; ++j) store_f32(states[j] + k, state[j], rest);
    });
  });
}

constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

// Calls f(i, count, bits) for each vector of a word of mask.
template <typename F>
inline void for_lanes(uint64_t word, int64_t count, F&& f) {
  if (count == kWord) {
    COFIRE_UNROLL
    for (int64_t i = 0; i < kWord; i += kLanes) {
      f(i, std::integral_constant<int64_t, kLanes>{}, static_cast<uint32_t>(word >> i) & kAllLanes);
    }
    return;
  }
  for_vectors(count, [&](int64_t i, auto rest) {
    f(i, rest, static_cast<uint32_t>(word >> i) & kAllLanes);
  });
}

// The entries [from, to) of a row; states have its columns.
template <typename T, int S, typename U>
void masked_run(T* w, const T* g, const States<S>& states, const uint8_t* bits, int64_t from,
                int64_t to, bool clean, const U& update) {
  for (int64_t k = from; k < to; k += kWord) {
    const int64_t count = std::min(kWord, to - k);
    const uint64_t word = word_of(bits, k, count);
    if (word == 0) {
      if (clean) continue;
      std::fill_n(w + k, count, T(0));
      for (int j = 0; j < S; ++j) std::fill_n(states[j] + k, count, 0.0f);
      continue;
    }
    for_lanes(word, count, [&](int64_t i, auto rest, uint32_t set) {
      const Vec mask = lanes_of(set);
      const int64_t at_ = k + i;
      Vec value = load(w + at_, rest);
      std::array<Vec, S> state;
      for (int j = 0; j < S; ++j) state[j] = load(states[j] + at_, rest);
      update(value, load(g + at_, rest), state);
      store_f32(w + at_, value & mask, rest);
      for (int j = 0; j < S; ++j) store_f32(states[j] + at_, state[j] & mask, rest);
    });
  }
}

// A row whose states hold the values of its kept entries: weights and gradients of these are
// brought together a segment at a time, updated beside their states, and put back.
template <typename T, int S, typename U>
void packed_run(T* w, const T* g, States<S> states, const uint8_t* bits, int64_t columns,
                bool clean, const U& update) {
  alignas(64) float weights[kGather + kLanes], grads[kGather + kLanes];
  for (int64_t from = 0; from < columns; from += kGather) {
    const int64_t to = std::min(from + kGather, columns);
    const auto each_word = [&](auto&& f) {
      for (int64_t k = from; k < to; k += kWord) {
        const int64_t count = std::min(kWord, to - k);
        f(k, count, word_of(bits, k, count));
      }
    };
    int64_t found = 0;
    each_word([&](int64_t k, int64_t count, uint64_t word) {
      if (word == 0) return;
      for_lanes(word, count, [&](int64_t i, auto rest, uint32_t set) {
        compress(load(w + k + i, rest), set).store(weights + found);
        compress(load(g + k + i, rest), set).store(grads + found);
        found += __builtin_popcount(set);
      });
    });
    for_vectors(found, [&](int64_t i, auto rest) {
      Vec value = load(weights + i, rest);
      std::array<Vec, S> state;
      for (int j = 0; j < S; ++j) state[j] = load(states[j] + i, rest);
      update(value, load(grads + i, rest), state);
      value.store(weights + i);
      for (int j = 0; j < S; ++j) store_f32(states[j] + i, state[j], rest);
    });
    for (int j = 0; j < S; ++j) states[j] += found;
    found = 0;
    each_word([&](int64_t k, int64_t count, uint64_t word) {
      if (word == 0) {
        if (!clean) std::fill_n(w + k, count, T(0));
        return;
      }
      for_lanes(word, count, [&](int64_t i, auto rest, uint32_t set) {
        const Vec value = expand(Vec::loadu(weights + found), set);
        store_f32(w + k + i, value & lanes_of(set), rest);
        found += __builtin_popcount(set);
      });
    });
  }
}

template <typename T, int S, typename U>
void step_masked(T* w, const T* g, const States<S>& states, const uint8_t* bits, int64_t rows,
                 int64_t columns, bool clean, const U& given) {
  const int64_t segments = (columns + kSegment - 1) / kSegment, bytes = (columns + 7) / 8;
  const int64_t grain = std::max<int64_t>(1, 8 * kSegment / std::min(columns, kSegment));
  at::parallel_for(0, rows * segments, grain, [&](int64_t first, int64_t last) {
    const U update = given;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / segments, from = task % segments * kSegment, at_ = row * columns;
      masked_run<T, S>(w + at_, g + at_, moved<S>(states, at_), bits + row * bytes, from,
                       std::min(from + kSegment, columns), clean, update);
    }
  });
}

template <typename T, int S, typename U>
void step_packed(T* w, const T* g, const States<S>& states, const uint8_t* bits,
                 const int64_t* offsets, int64_t values, int64_t rows, int64_t columns, bool clean,
                 const U& given) {
  const int64_t bytes = (columns + 7) / 8;
  at::parallel_for(0, rows, grain_of(columns), [&](int64_t first, int64_t last) {
    const U update = given;
    for (int64_t row = first; row < last; ++row) {
      const int64_t begin = offsets[row];
      int64_t kept = 0;
      for (int64_t k = 0; k < columns; k += kWord) {
        kept += __builtin_popcountll(word_of(bits + row * bytes, k, std::min(kWord, columns - k)));
      }
      TORCH_CHECK(0 <= begin && begin + kept <= values && begin + kept == offsets[row + 1],
                  "offsets must count the kept entries of each row");
      packed_run<T, S>(w + row * columns, g + row * columns, moved<S>(states, begin),
                       bits + row * bytes, columns, clean, update);
    }
  });
}

// A tensor that is written to: the kernel sees a contiguous one.
struct Written {
  at::Tensor given, own;
  explicit Written(const at::Tensor& t) : given(t), own(t.contiguous()) {}
  void finish() const {
    if (!own.is_same(given)) given.copy_(own);
  }
};

template <int S, typename U>
void step(const at::Tensor& weight, const at::Tensor& grad, const std::array<at::Tensor, S>& states,
          const std::optional<at::Tensor>& bits, const std::optional<at::Tensor>& offsets,
          bool clean, const U& update) {
  const int64_t numel = weight.numel();
  TORCH_CHECK(grad.sizes() == weight.sizes() && grad.scalar_type() == weight.scalar_type(),
              "grad must be like weight");
  const Written w(weight);
  const at::Tensor g = grad.contiguous();
  std::array<std::optional<Written>, S> written;
  States<S> pointers;
  int64_t values = numel;
  for (int j = 0; j < S; ++j) {
    TORCH_CHECK(
        states[j].scalar_type() == at::kFloat &&
            (offsets.has_value() ? states[j].dim() == 1 && states[j].numel() == states[0].numel()
                                 : states[j].sizes() == weight.sizes()),
        "the state must fit the weight");
    written[j].emplace(states[j]);
    pointers[j] = written[j]->own.template mutable_data_ptr<float>();
    values = states[j].numel();
  }
  if (numel == 0) return;
  const int64_t rows = weight.dim() == 0 ? 1 : weight.size(0), columns = numel / rows;
  at::Tensor mask, begins;
  if (bits.has_value()) {
    mask = bits->contiguous();
    TORCH_CHECK(mask.scalar_type() == at::kByte && mask.numel() == rows * ((columns + 7) / 8),
                "bits must fit the weight");
  }
  if (offsets.has_value()) {
    begins = offsets->contiguous();
    TORCH_CHECK(bits.has_value() && begins.scalar_type() == at::kLong && begins.numel() == rows + 1,
                "offsets must fit the weight");
  }
  dispatch(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* to = w.own.mutable_data_ptr<T>();
    const T* from = g.const_data_ptr<T>();
    if (!bits.has_value()) return step_all<T, S>(to, from, pointers, numel, update);
    const uint8_t* m = mask.const_data_ptr<uint8_t>();
    if (!offsets.has_value()) {
      return step_masked<T, S>(to, from, pointers, m, rows, columns, clean, update);
    }
    step_packed<T, S>(to, from, pointers, m, begins.const_data_ptr<int64_t>(), values, rows,
                      columns, clean, update);
  });
  w.finish();
  for (const auto& state : written) state->finish();
}

inline Vec negated(const Vec& v) { return v ^ Vec(-0.0f); }

void sgd(const at::Tensor& weight, const at::Tensor& grad,
         const std::optional<at::Tensor>& momentum_buffer, const std::optional<at::Tensor>& bits,
         const std::optional<at::Tensor>& offsets, double lr, double momentum, double dampening,
         double weight_decay, bool nesterov, bool maximize, bool first, bool clean) {
  if (!covered(weight)) {
    return reference("cofire::masked_sgd_", &sgd, weight, grad, momentum_buffer, bits, offsets, lr,
                     momentum, dampening, weight_decay, nesterov, maximize, first, clean);
  }
  const Vec minus_lr(static_cast<float>(-lr)), decay(static_cast<float>(weight_decay)),
      keep(static_cast<float>(momentum)), take(static_cast<float>(1 - dampening));
  const bool decays = weight_decay != 0;
  const auto of = [=](const Vec& w, const Vec& grad) {
    const Vec g = maximize ? negated(grad) : grad;
    return decays ? at::vec::fmadd(w, decay, g) : g;
  };
  if (!momentum_buffer.has_value()) {
    return step<0>(weight, grad, {}, bits, offsets, clean,
                   [=](Vec& w, const Vec& grad, std::array<Vec, 0>&) {
                     w = at::vec::fmadd(of(w, grad), minus_lr, w);
                   });
  }
  step<1>(weight, grad, {*momentum_buffer}, bits, offsets, clean,
          [=](Vec& w, const Vec& grad, std::array<Vec, 1>& buffer) {
            const Vec g = of(w, grad);
            buffer[0] = first ? g : at::vec::fmadd(g, take, buffer[0] * keep);
            w = at::vec::fmadd(nesterov ? at::vec::fmadd(buffer[0], keep, g) : buffer[0], minus_lr,
                               w);
          });
}

void adam(const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& exp_avg,
          const at::Tensor& exp_avg_sq, const std::optional<at::Tensor>& max_exp_avg_sq,
          const std::optional<at::Tensor>& bits, const std::optional<at::Tensor>& offsets,
          double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
          bool maximize, int64_t step_number, bool clean) {
  if (!covered(weight)) {
    return reference("cofire::masked_adam_", &adam, weight, grad, exp_avg, exp_avg_sq,
                     max_exp_avg_sq, bits, offsets, lr, beta1, beta2, eps, weight_decay, decoupled,
                     maximize, step_number, clean);
  }
  const auto power = static_cast<double>(step_number);
  const Vec minus_size(static_cast<float>(-lr / (1 - std::pow(beta1, power)))),
      root(static_cast<float>(std::sqrt(1 - std::pow(beta2, power))));
  const Vec shrink(static_cast<float>(1 - lr * weight_decay)),
      decay(static_cast<float>(weight_decay)), epsilon(static_cast<float>(eps));
  const Vec near(static_cast<float>(1 - beta1)), minus_far(static_cast<float>(-beta1)),
      keep(static_cast<float>(beta2)), take(static_cast<float>(1 - beta2));
  const bool shrinks = weight_decay != 0 && decoupled, decays = weight_decay != 0 && !decoupled;
  const bool from_start = 1 - beta1 < 0.5;  // torch.lerp: from the nearer end
  const auto update = [=](Vec& w, const Vec& grad, auto& state) {
    Vec g = maximize ? negated(grad) : grad;
    if (decays) g = at::vec::fmadd(w, decay, g);
    const Vec apart = g - state[0];
    state[0] =
        from_start ? at::vec::fmadd(near, apart, state[0]) : at::vec::fmadd(apart, minus_far, g);
    state[1] = at::vec::fmadd(take * g, g, state[1] * keep);
    Vec second = state[1];
    if constexpr (std::tuple_size_v<std::decay_t<decltype(state)>> == 3) {
      second = state[2] = at::vec::maximum(state[2], second);
    }
    const Vec move = minus_size * state[0] / (second.sqrt() / root + epsilon);
    w = shrinks ? at::vec::fmadd(w, shrink, move) : w + move;
  };
  if (max_exp_avg_sq.has_value()) {
    return step<3>(weight, grad, {exp_avg, exp_avg_sq, *max_exp_avg_sq}, bits, offsets, clean,
                   update);
  }
  step<2>(weight, grad, {exp_avg, exp_avg_sq}, bits, offsets, clean, update);
}

}  // namespace
}  // namespace sparse_training
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("masked_sgd_", &cofire::sparse_training::sgd);
  m.impl("masked_adam_", &cofire::sparse_training::adam);
}
