// SPDX-License-Identifier: Apache-2.0
// kv_fuse: slots that are mixtures of tokens, whose shares a convolution computes. Of many taps it
// is computed by frequencies: tokens are taken in segments that overlap, a segment's transform is
// multiplied with that of the taps, frequency by frequency, and transformed back (overlap-save; for
// networks Mathieu, Henaff, LeCun 2014). A product of complex numbers takes three of real ones
// (Karatsuba), so that 48 outputs of 21 taps take 101 products instead of 1008. Products of all
// segments at a frequency are one product of matrices, as are the transforms, whose length is
// small. The logits of a tile of slots, token by token, are turned into shares in place and
// multiplied with the tokens. The backward computes them again. In bf16, on AMX, the convolution is
// computed as it stands (kv_fusion_windows.h).
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numbers>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "exponential.h"
#include "kv_fusion.h"
#include "kv_fusion_windows.h"
#include "pages.h"

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace kv_fusion {
namespace {

constexpr int64_t kSlots = 64;         // of a tile, at most
constexpr int64_t kRoom = 4 << 20;     // numbers that are kept of the sets taken at a time
constexpr int64_t kLongest = 128;      // segment, with what it shares with the next
constexpr int64_t kColumns = 1 << 12;  // of a weight's transform, by a thread
constexpr int64_t kTogether = 512;     // rows of sets that are multiplied at a time, tap by tap

struct Shape {
  int64_t sets, rows, width, slots, taps;  // `rows` of a set with the padding, of `width` features
  int64_t segment = 0;                     // outputs of one, 0: tap by tap
  int64_t points = 1;                      // real products of a segment and the taps
  bool windows = false;                    // by windows of bf16, on AMX

  Shape(int64_t sets_, int64_t rows_, int64_t width_, int64_t slots_, int64_t taps_)
      : sets(sets_), rows(rows_), width(width_), slots(slots_), taps(taps_) {
    // In multiplications. Those of transforms count twice: they are small products. A weight takes
    // as long to read as a few of them, a call of the library as many.
    constexpr int64_t kRead = 8, kCall = 1 << 16;
    const int64_t weight = width * slots;
    const int64_t products = (sets * rows + kTogether - 1) / kTogether;
    int64_t least = taps * (weight * (sets * rows + kRead) + products * kCall);
    least -= least / 8;  // tap by tap where it is much the same
    for (int64_t length = taps + 3; length <= kLongest; ++length) {
      const int64_t outputs = length - taps + 1, count = (tokens() + outputs - 1) / outputs;
      const int64_t real = points_of(length), transforms = length * width + outputs * slots;
      const int64_t calls = sets * count * (1 + tiles()) + real;
      const int64_t cost =
          real * (sets * count * (weight + 2 * transforms) + weight * (kRead + 2 * taps)) +
          calls * kCall;
      if (cost < least) {
        least = cost;
        segment = outputs;
        points = real;
      }
    }
  }
  void take_windows() {
    windows = true;
    segment = 0;
    points = 1;
  }
  // One frequency is real, of an even length two; the others come in pairs.
  static int64_t points_of(int64_t length) { return (3 * length - 1) / 2; }

  int64_t tokens() const { return rows - taps + 1; }
  int64_t tiles() const { return (slots + kSlots - 1) / kSlots; }
  bool by_taps() const { return segment == 0; }
  int64_t length() const { return segment + taps - 1; }
  int64_t segments() const { return by_taps() ? 0 : (tokens() + segment - 1) / segment; }
  int64_t outputs(int64_t i) const { return std::min(segment, tokens() - i * segment); }
  int64_t inputs(int64_t i) const { return std::min(length(), rows - i * segment); }
  // Rows of a weight by taps, or by frequencies.
  int64_t weights() const { return by_taps() ? taps : points; }
  // Of the logits of a set, by frequencies, or token by token, with those of its padding.
  int64_t of_logits() const { return (by_taps() ? rows : segments() * points) * slots; }
  int64_t of_tokens() const { return segments() * points * width; }
  // How many sets are taken at a time, for any number of threads.
  int64_t group() const {
    const int64_t each = std::max<int64_t>(of_logits() + of_tokens() + rows * width, 1);
    const int64_t fit = std::max<int64_t>(kRoom / each, 1);
    const int64_t groups = std::max<int64_t>((sets + fit - 1) / fit, 1);
    return (sets + groups - 1) / groups;
  }
};

// The transforms: of taps [points][taps], of tokens [points][length], and of the products of both
// [segment][points] to outputs o, which are the sum over j of tap j and token o + j.
struct Transforms {
  std::vector<float> taps, tokens, outputs;

  explicit Transforms(const Shape& s) {
    if (s.by_taps()) return;
    const int64_t length = s.length();
    taps.resize(s.points * s.taps);
    tokens.resize(s.points * length);
    outputs.resize(s.segment * s.points);
    std::vector<double> c(length), d(length);
    for (int64_t i = 0; i < length; ++i) {
      const double angle =
          2 * std::numbers::pi * static_cast<double>(i) / static_cast<double>(length);
      c[i] = std::cos(angle), d[i] = std::sin(angle);
    }
    int64_t p = 0;
    // One more product: each of its factors, at i, is a cosine and a sine times these.
    using Two = std::array<double, 2>;
    const auto add = [&](int64_t f, Two of_taps, Two of_tokens, Two of_outputs) {
      const double by = (2 * f % length == 0 ? 1.0 : 2.0) / static_cast<double>(length);
      const auto at = [&](Two two, int64_t i) {
        const int64_t k = f * i % length;
        return two[0] * c[k] + two[1] * d[k];
      };
      for (int64_t i = 0; i < s.taps; ++i) {
        taps[p * s.taps + i] = static_cast<float>(at(of_taps, i));
      }
      for (int64_t i = 0; i < length; ++i) {
        tokens[p * length + i] = static_cast<float>(at(of_tokens, i));
      }
      for (int64_t i = 0; i < s.segment; ++i) {
        outputs[i * s.points + p] = static_cast<float>(by * at(of_outputs, i));
      }
      ++p;
    };
    for (int64_t f = 0; 2 * f <= length; ++f) {
      if (2 * f % length == 0) {
        add(f, {1, 0}, {1, 0}, {1, 0});
        continue;
      }
      // (a + ib)(x + iy) = (x(a + b) - b(x + y)) + i(x(a + b) + a(y - x)), where a and b are the
      // cosines' and sines' sums of the taps, x and -y those of the tokens.
      add(f, {1, 1}, {1, 0}, {1, -1});
      add(f, {1, 0}, {-1, -1}, {0, -1});
      add(f, {0, 1}, {1, -1}, {-1, 0});
    }
  }
};

// By windows the gradient is summed in blocks [taps][kBlock slots][kBlock features], those of the
// same features one after the other. Where the block of a slot and a feature, multiples of kBlock,
// begins.
int64_t block_at(const Shape& s, int64_t slot, int64_t f) {
  return (f * s.slots + slot * kBlock) * s.taps;
}

// Such blocks: [slots][width][taps].
at::Tensor from_blocks(const Shape& s, const at::Tensor& blocks) {
  const at::Tensor out = at::empty({s.slots, s.width, s.taps}, blocks.options());
  const auto* from = blocks.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr<float>();
  in_turns(s.slots, [&](int64_t slot) {
    for (int64_t f = 0; f < s.width; ++f) {
      const int64_t c = f % kBlock, r = slot % kBlock;
      const float* sum = from + block_at(s, slot - r, f - c) + r * kBlock + c;
      float* line = to + (slot * s.width + f) * s.taps;
      for (int64_t j = 0; j < s.taps; ++j) line[j] = sum[j * kBlock * kBlock];
    }
  });
  return out;
}

// The weight [slots][width][taps] in fp32: [points][slots][width], or [taps][slots][width].
at::Tensor by_points(const Shape& s, const Transforms& to, const at::Tensor& weight) {
  const at::Tensor taps = weight.to(at::kFloat).contiguous();
  if (s.by_taps()) return taps.permute({2, 0, 1}).contiguous();
  const at::Tensor out = empty_in_large_pages({s.points, s.slots, s.width}, taps.options());
  const auto* from = taps.const_data_ptr<float>();
  auto* data = out.mutable_data_ptr<float>();
  const int64_t all = s.slots * s.width;
  each_by_one_thread((all + kColumns - 1) / kColumns, [&](int64_t i) {
    const int64_t first = i * kColumns, count = std::min(kColumns, all - first);
    library_product(matrix(data + first, s.points, count, all),
                    matrix(to.taps.data(), s.points, s.taps, s.taps),
                    matrix(from + first * s.taps, count, s.taps, s.taps).t());
  });
  return out;
}

// The other way of `by_points`, of the gradient: [slots][width][taps].
at::Tensor to_taps(const Shape& s, const Transforms& to, const at::Tensor& products) {
  if (s.windows) return from_blocks(s, products);
  if (s.by_taps()) return products.view({s.taps, s.slots, s.width}).permute({1, 2, 0});
  const at::Tensor out = at::empty({s.slots, s.width, s.taps}, products.options());
  const auto* from = products.const_data_ptr<float>();
  auto* data = out.mutable_data_ptr<float>();
  const int64_t all = s.slots * s.width;
  each_by_one_thread((all + kColumns - 1) / kColumns, [&](int64_t i) {
    const int64_t first = i * kColumns, count = std::min(kColumns, all - first);
    library_product(matrix(data + first * s.taps, count, s.taps, s.taps),
                    matrix(from + first, s.points, count, all).t(),
                    matrix(to.taps.data(), s.points, s.taps, s.taps));
  });
  return out;
}

// A tile of a set's slots: columns of numbers, a row for each token, in whole vectors. Those after
// the last slot are anything.
struct Tile {
  int64_t first, count, stride;

  Tile(const Shape& s, int64_t index)
      : first(index * kSlots),
        count(std::min(kSlots, s.slots - first)),
        stride((count + kLanes - 1) / kLanes * kLanes) {}
  at::Tensor rows(const float* data, int64_t n) const { return matrix(data, n, count, stride); }
};

// The weight as a product needs it.
struct Weight {
  at::Tensor numbers;     // `by_points`
  Room<uint16_t> blocks;  // by windows: blocks of kBlock slots

  Weight(const Shape& s, const Transforms& to, const at::Tensor& weight) {
    if (!s.windows) {
      numbers = by_points(s, to, weight);
      return;
    }
#if defined(COFIRE_AMX)
    const at::Tensor taps = weight.contiguous();
    const auto* from = reinterpret_cast<const uint16_t*>(taps.const_data_ptr<at::BFloat16>());
    blocks = Room<uint16_t>(s.slots / kBlock * of_block(s));
    in_turns(s.slots / kBlock, [&](int64_t i) {
      pack_block(from, i * kBlock, s.width, s.taps, blocks.at(i * of_block(s)));
    });
#endif
  }
  static int64_t of_block(const Shape& s) { return s.taps * s.width * kBlock; }
};

// Some sets at a time: their tokens, these and the logits by frequencies.
struct Group {
  const Shape& s;
  const Transforms& transforms;
  const Weight& all_of_weight;
  const float* weight;
  const float* bias;
  const uint16_t* windows = nullptr;  // tokens of the first set
  Room<uint16_t> lines;               // by windows: of tokens, [set][width / 32][lines][32]
  Room<uint16_t> slopes;              // the logits' gradients, [set][slots][whole]
  Room<uint32_t> pairs;  // or pairs of tokens, [set][width / 16][pairs][16], from the middle tap on
  at::Tensor of_tokens;  // [set and segment][points][width]
  at::Tensor of_logits;  // [set and segment][points][slots]; tap by tap [set][rows][slots]
  at::Tensor converted;  // rows of the sets, where they are not in fp32
  const float* flat = nullptr;  // rows of all sets, one after the other

  Group(const Shape& shape, const Transforms& t, const Weight& weight_, const float* bias_,
        bool keeps_logits)
      : s(shape),
        transforms(t),
        all_of_weight(weight_),
        weight(s.windows ? nullptr : weight_.numbers.const_data_ptr<float>()),
        bias(bias_) {
#if defined(COFIRE_AMX)
    if (s.windows) {
      lines = Room<uint16_t>(s.group() * of_lines());
      if (keeps_logits) {
        slopes = Room<uint16_t>(s.group() * s.slots * whole());
      } else {
        pairs = Room<uint32_t>(s.group() * of_pairs());
      }
      return;
    }
#endif
    const auto room = [&](int64_t each) {
      return empty_in_large_pages({s.group() * each}, at::TensorOptions(at::kFloat));
    };
    if (!s.by_taps()) of_tokens = room(s.of_tokens());
    of_logits = room(s.of_logits());
  }

  // The products of the sets' tokens with the weight, from which logits are made.
  template <typename T>
  void take(const T* tokens, int64_t sets) {
#if defined(COFIRE_AMX)
    if (s.windows) {
      windows = reinterpret_cast<const uint16_t*>(tokens);
      in_turns(sets, [&](int64_t i) {
        pack_tokens(window_of(i), s.rows, s.width, lines_each(), lines.at(i * of_lines()));
        if (pairs.data() == nullptr) return;
        pack_pairs(window_of(i) + s.taps / 2 * s.width, s.tokens(), s.width, s.width,
                   of_halves(whole()), whole() / 2, pairs.at(i * of_pairs()));
      });
      return;
    }
#endif
    const int64_t size = s.rows * s.width;
    if constexpr (std::is_same_v<T, float>) {
      flat = tokens;
    } else {
      if (!converted.defined()) converted = at::empty({s.group() * size}, at::kFloat);
      auto* to = converted.mutable_data_ptr<float>();
      at::parallel_for(0, sets, grain_of(size), [&](int64_t begin, int64_t end) {
        for_vectors((end - begin) * size, [&](int64_t c, auto count) {
          const int64_t at = begin * size + c;
          load(tokens + at, count).store(to + at, static_cast<int>(count));
        });
      });
      flat = to;
    }
    if (s.by_taps()) {
      // Sets follow each other in one product; what lies across two of them is of no use.
      const int64_t all = in_one(sets);
      each_by_one_thread((all + kTogether - 1) / kTogether, [&](int64_t task) {
        const int64_t first = task * kTogether, count = std::min(kTogether, all - first);
        for (int64_t j = 0; j < s.taps; ++j) {
          library_product(logits_from(first, 0, count, s.slots), rows_from(first + j, count),
                          weight_of(j, 0, s.slots).t(), j > 0);
        }
      });
      return;
    }
    const int64_t segments = s.segments();
    each_by_one_thread(sets * segments, [&](int64_t task) {
      const int64_t i = task / segments, t = task % segments;
      library_product(segment_of(i, t), inputs_of(t),
                      rows_from(i * s.rows + t * s.segment, s.inputs(t)));
    });
    each_by_one_thread(s.points, [&](int64_t p) {
      library_product(logits_at(p, sets), tokens_at(p, sets), weight_of(p, 0, s.slots).t());
    });
  }

  // How many rows of some sets, one after the other, have all their taps among those.
  int64_t in_one(int64_t sets) const { return sets * s.rows - s.taps + 1; }
  // Rows of all sets, as they follow each other, and logits of slots [slot, slot + many).
  at::Tensor rows_from(int64_t first, int64_t count) const {
    return matrix(flat + first * s.width, count, s.width, s.width);
  }
  at::Tensor logits_from(int64_t first, int64_t slot, int64_t count, int64_t many) const {
    float* data = of_logits.mutable_data_ptr<float>() + first * s.slots + slot;
    return matrix(data, count, many, s.slots);
  }

  const uint16_t* window_of(int64_t i) const { return windows + i * s.rows * s.width; }
#if defined(COFIRE_AMX)
  int64_t whole() const { return squares(s.tokens()); }  // tokens, in whole squares
  int64_t lines_each() const { return whole() + s.taps - 1; }
  int64_t of_lines() const { return lines_each() * s.width; }
  int64_t of_pairs() const { return whole() / 2 * s.width; }
  const uint16_t* block_of(int64_t slot) const {
    return all_of_weight.blocks.at(slot / kBlock * Weight::of_block(s));
  }
  uint16_t* slopes_at(int64_t i, int64_t slot) const {
    return slopes.at((i * s.slots + slot) * whole());
  }
#endif

  at::Tensor segment_of(int64_t i, int64_t t) const {
    float* data = of_tokens.mutable_data_ptr<float>();
    return matrix(data + (i * s.segments() + t) * s.points * s.width, s.points, s.width, s.width);
  }
  at::Tensor tokens_at(int64_t p, int64_t sets) const {
    return matrix(of_tokens.mutable_data_ptr<float>() + p * s.width, sets * s.segments(), s.width,
                  s.points * s.width);
  }
  at::Tensor logits_at(int64_t p, int64_t sets) const {
    return matrix(of_logits.mutable_data_ptr<float>() + p * s.slots, sets * s.segments(), s.slots,
                  s.points * s.slots);
  }
  // Of a set's slots [first, first + count): a segment's logits by frequencies; or all, by tokens.
  at::Tensor logits_of(int64_t i, int64_t t, int64_t first, int64_t count) const {
    float* data = of_logits.mutable_data_ptr<float>() + i * s.of_logits() + first;
    return s.by_taps() ? matrix(data, s.tokens(), count, s.slots)
                       : matrix(data + t * s.points * s.slots, s.points, count, s.slots);
  }
  at::Tensor weight_of(int64_t p, int64_t first, int64_t count) const {
    return matrix(weight + (p * s.slots + first) * s.width, count, s.width, s.width);
  }
  // Tokens without their padding.
  at::Tensor tokens_of(int64_t i) const { return rows_from(i * s.rows + s.taps / 2, s.tokens()); }
  // The transforms of a segment.
  at::Tensor inputs_of(int64_t t) const {
    return matrix(transforms.tokens.data(), s.points, s.inputs(t), s.length());
  }
  at::Tensor outputs_of(int64_t t) const {
    return matrix(transforms.outputs.data(), s.outputs(t), s.points, s.points);
  }
  // The mixtures of a tile's slots [count][width], by shares [tokens][stride].
  void mix(int64_t i, const Tile& tile, const float* shares, float* out) const {
#if defined(COFIRE_AMX)
    if (s.windows) {
      Halves by_slots(tile.count * whole());
      transpose(shares, s.tokens(), tile.count, tile.stride, by_slots.data(), whole());
      amx::Registers registers;
      registers.square();
      mixtures(by_slots.data(), tile.count, whole(), pairs.at(i * of_pairs()), whole() / 2, s.width,
               out);
      return;
    }
#endif
    library_product(matrix(out, tile.count, s.width, s.width), tile.rows(shares, s.tokens()).t(),
                    tokens_of(i));
  }
  // Products of a set's tokens and the gradients of a tile's slots, in fp32 and as they came.
  template <typename T>
  void along(int64_t i, const Tile& tile, const at::Tensor& grad, const T* key, const T* value,
             float* out) const {
#if defined(COFIRE_AMX)
    if (s.windows) {
      Lines<uint32_t> packed(s.width / 2 * tile.stride);
      pack_gradients(reinterpret_cast<const uint16_t*>(key),
                     reinterpret_cast<const uint16_t*>(value), tile.count, s.width / 2, tile.stride,
                     packed.data());
      amx::Registers registers;
      registers.square();
      along_gradients(window_of(i) + s.taps / 2 * s.width, s.tokens(), s.width, packed.data(),
                      tile.count, tile.stride, out);
      return;
    }
#endif
    library_product(tile.rows(out, s.tokens()), tokens_of(i), grad.t());
  }
  // The gradient of a tile's logits takes their place.
  void keep(int64_t i, const Tile& tile, const float* slopes_from) {
#if defined(COFIRE_AMX)
    if (s.windows) {
      transpose(slopes_from, s.tokens(), tile.count, tile.stride, slopes_at(i, tile.first),
                whole());
      return;
    }
#endif
    if (s.by_taps()) {
      float* to = of_logits.mutable_data_ptr<float>() + i * s.of_logits() + tile.first;
      for (int64_t k = 0; k < s.tokens(); ++k) {
        std::copy_n(slopes_from + k * tile.stride, tile.count, to + k * s.slots);
      }
      for (int64_t k = s.tokens(); k < s.rows; ++k) std::fill_n(to + k * s.slots, tile.count, 0.0f);
    }
    for (int64_t t = 0; t < s.segments(); ++t) {
      library_product(logits_of(i, t, tile.first, tile.count), outputs_of(t).t(),
                      tile.rows(slopes_from + t * s.segment * tile.stride, s.outputs(t)));
    }
  }
};

// Calls f(column, number of vectors) for all columns of a tile.
template <typename F>
void for_columns(const Tile& tile, F&& f) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= tile.stride; c += 4 * kLanes) f(c, std::integral_constant<int64_t, 4>{});
  for (; c < tile.stride; c += kLanes) f(c, std::integral_constant<int64_t, 1>{});
}

// Sums over tokens, for each column of a tile: of so many first, so that no sum is long.
constexpr int64_t kTerms = 32;

// relu(convolution + bias) of a tile, [tokens][stride], and the largest of each column.
void logits_of(const Group& group, int64_t set, const Tile& tile, float* out, float* largest) {
  const Shape& s = group.s;
  const float* from = out;
  int64_t stride = tile.stride;
  float constants[kSlots] = {};
  if (group.bias != nullptr) std::copy_n(group.bias + tile.first, tile.count, constants);
#if defined(COFIRE_AMX)
  if (s.windows) {
    amx::Registers registers;
    registers.square();
    const int64_t all = (s.tokens() + amx::kRows - 1) / amx::kRows;
    const uint16_t* lines = group.lines.at(set * group.of_lines());
    std::fill_n(largest, tile.count, 0.0f);
    for (int64_t first = 0, now = 0; first < all; first += now) {
      now = next_part(all - first, amx::kSums);
      const int64_t t = first * amx::kRows, count = std::min(now * amx::kRows, s.tokens() - t);
      for (int64_t c = 0; c < tile.count; c += kBlock) {
        window_products(lines + t * kSquare, group.lines_each(), now, count, s.width, s.taps,
                        group.block_of(tile.first + c), constants + c, out + t * tile.stride + c,
                        tile.stride, largest + c);
      }
    }
    return;
  }
#endif
  if (s.by_taps()) {
    from = group.of_logits.const_data_ptr<float>() + set * s.of_logits() + tile.first;
    stride = s.slots;
  } else {
    for (int64_t t = 0; t < s.segments(); ++t) {
      library_product(tile.rows(out + t * s.segment * tile.stride, s.outputs(t)),
                      group.outputs_of(t), group.logits_of(set, t, tile.first, tile.count));
    }
  }
  // (Other slots' logits beside those of the tile may be written at the same time.)
  const auto load_sum = [&](const float* p, int64_t there) {
    return from == out || there >= kLanes ? Vec::loadu(p) : Vec::loadu(p, there);
  };
  for_columns(tile, [&](int64_t c, auto vectors) {
    Vec most[vectors()], by[vectors()];
    const Vec zero(0.0f);
    COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
      most[v] = zero;
      by[v] = Vec::loadu(constants + c + v * kLanes);
    }
    for (int64_t i = 0; i < s.tokens(); ++i) {
      float* line = out + i * tile.stride + c;
      const float* sums = from + i * stride + c;
      COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
        const Vec sum = load_sum(sums + v * kLanes, tile.count - c - v * kLanes);
        relu_of(sum, by[v], most[v]).store(line + v * kLanes);
      }
    }
    COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) most[v].store(largest + c + v * kLanes);
  });
}

const float kLog2E = 1.44269504088896341f;

// exp(logit - largest) in place, and their sums.
void exponentials(const Tile& tile, int64_t n, float* logits, const float* largest, float* sums) {
  for_columns(tile, [&](int64_t c, auto vectors) {
    Vec sum[vectors()], from[vectors()];
    COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
      sum[v] = Vec(0.0f);
      from[v] = Vec::loadu(largest + c + v * kLanes);
    }
    for (int64_t first = 0; first < n; first += kTerms) {
      Vec part[vectors()];
      COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) part[v] = Vec(0.0f);
      for (int64_t i = first; i < std::min(n, first + kTerms); ++i) {
        float* line = logits + i * tile.stride + c;
        COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
          const Vec e =
              power_of_two<float>((Vec::loadu(line + v * kLanes) - from[v]) * Vec(kLog2E));
          e.store(line + v * kLanes);
          part[v] = part[v] + e;
        }
      }
      COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) sum[v] = sum[v] + part[v];
    }
    COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) sum[v].store(sums + c + v * kLanes);
  });
}

// Where a token of a set begins.
int64_t token_at(const Shape& s, int64_t set, int64_t index) {
  return (set * s.rows + s.taps / 2 + index) * s.width;
}

template <typename T>
void fuse(const Shape& s, const Transforms& transforms, const T* tokens, const Weight& weight,
          const float* bias, float gate, const int32_t* pick, T* key, T* value) {
  const int64_t n = s.tokens(), d = s.width / 2, tiles = s.tiles();
  Group group(s, transforms, weight, bias, false);
  for (int64_t base = 0; base < s.sets; base += s.group()) {
    const int64_t now = std::min(s.group(), s.sets - base);
    group.take(tokens + base * s.rows * s.width, now);
    each_by_one_thread(now * tiles, [&](int64_t task) {
      const int64_t i = task / tiles;
      const Tile tile(s, task % tiles);
      const at::Tensor room = at::empty({n, tile.stride}, at::kFloat);
      const at::Tensor product = at::empty({tile.count, s.width}, at::kFloat);
      auto *shares = room.mutable_data_ptr<float>(), *mixed = product.mutable_data_ptr<float>();
      float largest[kSlots], sums[kSlots];
      logits_of(group, i, tile, shares, largest);
      exponentials(tile, n, shares, largest, sums);
      group.mix(i, tile, shares, mixed);
      for (int64_t r = 0; r < tile.count; ++r) {
        const int64_t slot = (base + i) * s.slots + tile.first + r;
        const T* one = tokens + token_at(s, base + i, pick[slot]);
        const Vec of_mixed(gate / sums[r]), of_one(1 - gate);
        for (int64_t half = 0; half < 2; ++half) {
          T* out = (half == 0 ? key : value) + slot * d;
          for_vectors(d, [&](int64_t c, auto m) {
            const int64_t k = half * d + c;
            const Vec kept = load(one + k, m) * of_one;
            store_f32(out + c, at::vec::fmadd(load(mixed + r * s.width + k, m), of_mixed, kept), m);
          });
        }
      }
    });
  }
}

template <typename T>
float dot(const float* a, const T* b, int64_t n) {
  Vec sum(0.0f);
  for_vectors(
      n, [&](int64_t i, auto m) { sum = at::vec::fmadd(load(a + i, m), load(b + i, m), sum); });
  return reduce_add(sum);
}

// What the backward knows of a tile's slots.
struct Slots {
  float largest[kSlots];  // logit
  float sums[kSlots];     // of the exponentials
  float along[kSlots];    // sum of P dP: what a slot's gradient is to its mixture
  float bias[kSlots];     // the gradient of its bias
};

// Of logits, which become their gradient, and of dP = products of gradients and tokens, which
// become the shares that these have in the mixture.
void slopes_of(const Tile& tile, int64_t n, float gate, float* logits, float* products, Slots& to) {
  for_columns(tile, [&](int64_t c, auto vectors) {
    Vec sum[vectors()], along[vectors()], from[vectors()];
    const Vec zero(0.0f);
    COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
      sum[v] = along[v] = zero;
      from[v] = Vec::loadu(to.largest + c + v * kLanes);
    }
    const auto exponential = [&](const float* logit, int64_t v) {
      return power_of_two<float>((Vec::loadu(logit + v * kLanes) - from[v]) * Vec(kLog2E));
    };
    for (int64_t first = 0; first < n; first += kTerms) {
      Vec part[vectors()], weighted[vectors()];
      COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) part[v] = weighted[v] = zero;
      for (int64_t i = first; i < std::min(n, first + kTerms); ++i) {
        const int64_t at = i * tile.stride + c;
        COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
          const Vec e = exponential(logits + at, v);
          part[v] = part[v] + e;
          weighted[v] = at::vec::fmadd(e, Vec::loadu(products + at + v * kLanes), weighted[v]);
        }
      }
      COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
        sum[v] = sum[v] + part[v];
        along[v] = along[v] + weighted[v];
      }
    }
    Vec by[vectors()], bias[vectors()], more[vectors()];
    COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
      along[v] = along[v] / sum[v];
      by[v] = Vec(gate) / sum[v];
      bias[v] = more[v] = zero;
      sum[v].store(to.sums + c + v * kLanes);
      along[v].store(to.along + c + v * kLanes);
    }
    // What rounding left of the mean of dP: the slopes of a slot's logits cancel.
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * tile.stride + c;
      COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
        const Vec product = Vec::loadu(products + at + v * kLanes);
        more[v] = at::vec::fmadd(exponential(logits + at, v), product - along[v], more[v]);
      }
    }
    COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) more[v] = more[v] / sum[v];
    for (int64_t first = 0; first < n; first += kTerms) {
      Vec part[vectors()];
      COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) part[v] = zero;
      for (int64_t i = first; i < std::min(n, first + kTerms); ++i) {
        const int64_t at = i * tile.stride + c;
        COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) {
          float *logit = logits + at + v * kLanes, *product = products + at + v * kLanes;
          const Vec share = exponential(logits + at, v) * by[v];
          const Vec less = Vec::loadu(product) - along[v] - more[v];
          const Vec slope = where_greater<float>(Vec::loadu(logit), zero, share * less);
          slope.store(logit);
          share.store(product);
          part[v] = part[v] + slope;
        }
      }
      COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) bias[v] = bias[v] + part[v];
    }
    COFIRE_UNROLL for (int64_t v = 0; v < vectors(); ++v) bias[v].store(to.bias + c + v * kLanes);
  });
}

struct Gradients {
  // In fp32: [sets][rows][width] (or nothing), as `by_points` or in blocks, [slots].
  at::Tensor tokens, weight, bias;
  double gate = 0;
};

#if defined(COFIRE_AMX)
// By windows, what the sets of a group add to the sums of the weight's gradient.
void add_to_sums(const Group& group, int64_t sets, float* sums) {
  const Shape& s = group.s;
  const int64_t blocks = s.slots / kBlock, room = group.whole();
  const int64_t count = room / 2 + s.taps - 1;
  in_parts(blocks * (s.width / kBlock), 1, [&](int64_t begin, int64_t end) {
    amx::Registers registers;
    registers.square();
    Lines<uint32_t> pairs(count * kBlock);
    for (int64_t i = 0; i < sets; ++i) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t slot = item % blocks * kBlock, f = item / blocks * kBlock;
        if (slot == 0 || item == begin) {
          pack_pairs(group.window_of(i) + f, s.rows, kBlock, s.width, of_halves(room), count,
                     pairs.data());
        }
        const uint16_t* slopes = group.slopes_at(i, slot);
        float* to = sums + block_at(s, slot, f);
        add_to_taps(slopes, room, pairs.data(), s.taps, to, to + s.taps * kBlock * kBlock,
                    slopes + kBlock * room);
      }
    }
  });
}
#endif

// Groups of sets: first the gradients of the logits, tile by tile, then their products with the
// tokens, and with the weight.
template <typename T>
void fuse_backward(const Shape& s, const Transforms& transforms, const T* grad_key,
                   const T* grad_value, const T* tokens, const Weight& weight, const float* bias,
                   float gate, const int32_t* pick, Gradients& to) {
  const int64_t n = s.tokens(), d = s.width / 2, tiles = s.tiles(), middle = s.taps / 2;
  Group group(s, transforms, weight, bias, true);
  const at::Tensor of_slots = at::empty({2, s.group(), s.slots}, at::kDouble);
  auto* of_bias = of_slots.mutable_data_ptr<double>();
  auto* of_gate = of_bias + s.group() * s.slots;
  const bool to_tokens = to.tokens.defined();
  auto* to_weight = to.weight.mutable_data_ptr<float>();
  for (int64_t base = 0; base < s.sets; base += s.group()) {
    const int64_t now = std::min(s.group(), s.sets - base);
    float* to_rows =
        to_tokens ? to.tokens.mutable_data_ptr<float>() + base * s.rows * s.width : nullptr;
    const auto grad_rows = [&](int64_t i, int64_t first, int64_t count) {
      return matrix(to_rows + (i * s.rows + first) * s.width, count, s.width, s.width);
    };
    group.take(tokens + base * s.rows * s.width, now);
    // With a gradient of the tokens the tiles of a set follow each other.
    const int64_t parts = to_tokens ? 1 : tiles;
    each_by_one_thread(now * parts, [&](int64_t task) {
      const int64_t i = task / parts, last = to_tokens ? tiles : task % parts + 1;
      const at::Tensor room = at::empty({2, n, kSlots}, at::kFloat);
      const at::Tensor grads = at::empty({kSlots, s.width}, at::kFloat);
      auto *logits = room.mutable_data_ptr<float>(), *products = logits + n * kSlots;
      auto* g = grads.mutable_data_ptr<float>();
      Slots slots;
      for (int64_t index = task % parts; index < last; ++index) {
        const Tile tile(s, index);
        logits_of(group, i, tile, logits, slots.largest);
        for (int64_t r = 0; r < tile.count; ++r) {
          const int64_t slot = ((base + i) * s.slots + tile.first + r) * d;
          for_vectors(d, [&](int64_t c, auto m) {
            load(grad_key + slot + c, m).store(g + r * s.width + c, static_cast<int>(m));
            load(grad_value + slot + c, m).store(g + r * s.width + d + c, static_cast<int>(m));
          });
        }
        const at::Tensor grad = grads.narrow(0, 0, tile.count);
        const int64_t begin = ((base + i) * s.slots + tile.first) * d;
        group.along(i, tile, grad, grad_key + begin, grad_value + begin, products);
        slopes_of(tile, n, gate, logits, products, slots);
        for (int64_t r = 0; r < tile.count; ++r) {
          const int64_t slot = tile.first + r;
          const int64_t picked = pick[(base + i) * s.slots + slot];
          const float* line = g + r * s.width;
          of_bias[i * s.slots + slot] = slots.bias[r];
          of_gate[i * s.slots + slot] =
              slots.along[r] - dot(line, tokens + token_at(s, base + i, picked), s.width);
          if (!to_tokens) continue;
          float* one = to_rows + (i * s.rows + middle + picked) * s.width;
          const Vec by(1 - gate);
          for_vectors(s.width, [&](int64_t c, auto m) {
            at::vec::fmadd(load(line + c, m), by, load(one + c, m))
                .store(one + c, static_cast<int>(m));
          });
        }
        if (to_tokens) library_product(grad_rows(i, middle, n), tile.rows(products, n), grad, true);
        group.keep(i, tile, logits);
      }
    });
    if (s.windows) {
#if defined(COFIRE_AMX)
      add_to_sums(group, now, to_weight);
#endif
    } else if (s.by_taps()) {
      // (The slopes between two sets are zero.)
      each_by_one_thread(s.taps * tiles, [&](int64_t task) {
        const int64_t j = task / tiles, all = group.in_one(now);
        const Tile tile(s, task % tiles);
        const at::Tensor sum =
            matrix(to_weight + (j * s.slots + tile.first) * s.width, tile.count, s.width, s.width);
        library_product(sum, group.logits_from(0, tile.first, all, tile.count).t(),
                        group.rows_from(j, all), true);
      });
    } else {
      each_by_one_thread(s.points, [&](int64_t p) {
        library_product(matrix(to_weight + p * s.slots * s.width, s.slots, s.width, s.width),
                        group.logits_at(p, now).t(), group.tokens_at(p, now), true);
        if (!to_tokens) return;
        library_product(group.tokens_at(p, now), group.logits_at(p, now),
                        group.weight_of(p, 0, s.slots));
      });
    }
    if (to_tokens) {
      each_by_one_thread(now, [&](int64_t i) {
        for (int64_t j = 0; s.by_taps() && j < s.taps; ++j) {
          library_product(grad_rows(i, j, n), group.logits_of(i, 0, 0, s.slots),
                          group.weight_of(j, 0, s.slots), true);
        }
        for (int64_t t = 0; t < s.segments(); ++t) {
          library_product(grad_rows(i, t * s.segment, s.inputs(t)), group.inputs_of(t).t(),
                          group.segment_of(i, t), true);
        }
      });
    }
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
  return Shape(tokens.size(0) * tokens.size(1), tokens.size(2), tokens.size(3), weight.size(0),
               weight.size(2));
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

// Whether the convolution goes by windows: where AMX multiplies what is given, in whole squares.
bool by_windows(const Shape& s, const at::Tensor& tokens, const at::Tensor& weight) {
  return tokens.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16 &&
         s.slots % kSquare == 0 && s.width % kSquare == 0 && s.tokens() >= kSquare && amx::found();
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
  Shape s = shape_of("kv_fuse", tokens, weight, bias, gate, pick);
  if (by_windows(s, tokens, weight)) s.take_windows();
  const Transforms transforms(s);
  const at::Tensor x = tokens.contiguous(), index = pick.contiguous();
  const Weight w(s, transforms, weight);
  const at::Tensor constant = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  check_pick("kv_fuse", index, s.tokens());
  const auto empty = [&] {
    return at::empty({x.size(0), x.size(1), s.slots, s.width / 2}, x.options());
  };
  at::Tensor key = empty(), value = empty();
  if (key.numel() == 0) return {key, value};
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    fuse<T>(s, transforms, x.const_data_ptr<T>(), w,
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
  Shape s = shape_of("kv_fuse_backward", tokens, weight, bias, gate, pick);
  if (!to_tokens && by_windows(s, tokens, weight)) s.take_windows();
  TORCH_CHECK(grad_key.sizes() == grad_value.sizes() && grad_key.dim() == 4 &&
                  grad_key.numel() == s.sets * s.slots * s.width / 2,
              "kv_fuse_backward: the gradients do not fit tokens");
  const Transforms transforms(s);
  const at::Tensor x = tokens.contiguous(), index = pick.contiguous();
  const Weight w(s, transforms, weight);
  const at::Tensor constant = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const at::Tensor gk = grad_key.contiguous(), gv = grad_value.contiguous();
  check_pick("kv_fuse_backward", index, s.tokens());
  const auto floats = x.options().dtype(at::kFloat);
  Gradients to;
  if (to_tokens) to.tokens = at::zeros(x.sizes(), floats);
  to.weight = at::zeros({s.weights(), s.slots, s.width}, floats);
  to.bias = at::zeros({s.slots}, floats.dtype(at::kDouble));
  if (s.sets > 0 && s.slots > 0) {
    dispatch(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      fuse_backward<T>(s, transforms, gk.const_data_ptr<T>(), gv.const_data_ptr<T>(),
                       x.const_data_ptr<T>(), w,
                       constant.defined() ? constant.const_data_ptr<float>() : nullptr,
                       number_of(gate), index.const_data_ptr<int32_t>(), to);
    });
  }
  const auto nothing = [&] { return at::empty({0}, x.options()); };
  at::Tensor of_gate = at::empty(gate.sizes(), gate.options());
  of_gate.fill_(to.gate);
  return {to_tokens ? to.tokens.to(x.scalar_type()) : nothing(),
          to_taps(s, transforms, to.weight).to(weight.scalar_type()).contiguous(),
          bias.has_value() ? to.bias.to(bias->scalar_type()) : nothing(), of_gate};
}

// How kv_fuse would compute the convolution of these arguments.
std::string kv_fuse_plan(const at::Tensor& tokens, const at::Tensor& weight, const Optional& bias,
                         const at::Tensor& gate, const at::Tensor& pick) {
  if (!fits(tokens, weight, bias, gate)) return "the reference";
  const Shape s = shape_of("kv_fuse", tokens, weight, bias, gate, pick);
  if (by_windows(s, tokens, weight)) return "the convolution by windows in bf16, multiplied on AMX";
  if (s.by_taps()) return "the convolution tap by tap in fp32";
  return "the convolution by frequencies in fp32: " + std::to_string(s.points) + " products for " +
         std::to_string(s.segment) + " outputs of " + std::to_string(s.taps) + " taps";
}

}  // namespace kv_fusion
}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("kv_fuse", &cofire::kv_fusion::kv_fuse);
  m.impl("kv_fuse_backward", &cofire::kv_fusion::kv_fuse_backward);
}
TORCH_LIBRARY_FRAGMENT(cofire_plan, m) { m.def("kv_fuse", &cofire::kv_fusion::kv_fuse_plan); }
