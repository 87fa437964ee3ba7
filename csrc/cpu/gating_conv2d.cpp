// SPDX-License-Identifier: Apache-2.0
// Convolution that computes, per sample, only the channels a gate kept and
// reads only the channels that are not zero.
//
// The active input channels of a sample are packed once, as fp32, into a
// *panel*: for every column tap one shifted, zero-padded copy of the plane whose
// rows are exactly as long as an output row. A whole plane of outputs is then
// one flat run of positions, each tap is a constant offset, and padding, stride
// and dilation are gone. The convolution becomes a list of K = channels x taps
// steps (offset in the panel, offset in the weight row), and the micro-kernel is
// an outer product of kRows output channels by kVecs vectors of positions.
// Weights are read where they lie, in any layout: a skipped output channel costs
// no bytes, a skipped input channel no arithmetic.
#include "gating_conv2d.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <utility>
#include <vector>

namespace cofire {
inline namespace CPU_CAPABILITY {
namespace {

// The register tile: kRows x kVecs accumulators, kVecs inputs and a broadcast
// must fit the register file (32 vectors with AVX-512, else 16).
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kRows = 8, kVecs = 3;
#else
constexpr int kRows = 6, kVecs = 2;
#endif

constexpr int64_t kLine = 64 / sizeof(float);  // floats of a cache line
// A panel stays in the L2 cache of a core while all output tiles pass over it, and
// a thread works on about this many floats of panels at a time.
constexpr int64_t kPanelFloats = 512 * 1024 / sizeof(float);
constexpr int64_t kGroupFloats = 2 * kPanelFloats;
// A panel that several threads use exists in so many copies: half of 256x256 3x3 @14x14, one
// sample, two threads: 0.237 ms instead of 0.286 where each reads what the other has packed.
constexpr int64_t kCopies = 2;
// But no panel has fewer positions than this (14 x 14, say), if the plane has them.
constexpr int64_t kPanelPositions = 192;

// Work that is split over the threads in contiguous ranges, so that a thread
// comes back to what it packed, and evened out by stealing, so that an unequal
// split or a busy core costs little. run(task, worker): what a task writes depends
// on its index alone, so the result is the same for any number of threads.
template <typename F>
void for_each_task(int64_t tasks, int64_t workers, const F& run) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  if (workers <= 1) {
    for (int64_t i = 0; i < tasks; ++i) run(i, 0);
    return;
  }
  std::vector<Range> ranges(workers);
  for (int64_t t = 0; t < workers; ++t) {
    ranges[t].next = tasks * t / workers;
    ranges[t].end = tasks * (t + 1) / workers;
  }
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t victim = 0; victim < workers; ++victim) {
        Range& range = ranges[(t + victim) % workers];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
          run(i, t);
        }
      }
    }
  });
}

// One multiplication per position: where its input is in the panel, and where its
// weight is in every weight row.
struct Step {
  int32_t panel, weight;
};

// Where a tap finds its inputs in a packed channel.
struct PanelLayout {
  int64_t rows;                 // output rows of a full panel
  int64_t copy_rows;            // rows of one shifted copy
  int64_t copy;                 // floats of one shifted copy
  int64_t channel;              // floats of one packed channel
  std::vector<int64_t> phases;  // the row phases (modulo the stride) that taps use
  std::vector<Step> taps;       // every tap in a packed channel and in a weight's channel

  // For panels of `channels` channels, and a sample's planes shared by so many threads.
  PanelLayout(const ConvShape& s, int64_t channels, int64_t sharers, const at::Tensor& weight) {
    std::vector<int64_t> phase_of(s.kernel[0]);
    int64_t last_row = 0;
    for (int64_t a = 0; a < s.kernel[0]; ++a) {
      const int64_t phase = a * s.dilation[0] % s.stride[0];
      auto it = std::find(phases.begin(), phases.end(), phase);
      phase_of[a] = it - phases.begin();
      if (it == phases.end()) phases.push_back(phase);
      last_row = a * s.dilation[0] / s.stride[0];
    }
    const int64_t copies = static_cast<int64_t>(phases.size()) * s.kernel[1];
    const int64_t fitting =
        kPanelFloats / std::max<int64_t>(1, channels * copies * s.out_width) - last_row;
    const int64_t fewest = (kPanelPositions + s.out_width - 1) / s.out_width;
    // A thread that packs its own rows waits for nobody: 32x32 3x3 @32x32, one sample, half of the
    // channels kept, two threads: 0.038 ms instead of 0.061.
    const int64_t share = (s.out_height + sharers - 1) / sharers;
    const int64_t most_rows = std::min(std::max(std::min(fitting, share), fewest), s.out_height);
    int64_t chunks = (s.out_height + most_rows - 1) / most_rows;
    if (chunks > sharers)
      chunks = std::min((chunks + sharers - 1) / sharers * sharers, s.out_height);
    rows = (s.out_height + chunks - 1) / chunks;
    copy_rows = rows + last_row;
    // One vector of slack: the last vector of positions may read past its end.
    copy = (copy_rows * s.out_width + kLanes + kLine - 1) / kLine * kLine;
    // An odd number of cache lines, so that channels spread over all L1 sets.
    channel = copies * copy;
    if (channel / kLine % 2 == 0) channel += kLine;
    for (int64_t a = 0; a < s.kernel[0]; ++a) {
      for (int64_t b = 0; b < s.kernel[1]; ++b) {
        const int64_t row = a * s.dilation[0] / s.stride[0];
        const int64_t in_panel = (phase_of[a] * s.kernel[1] + b) * copy + row * s.out_width;
        const int64_t in_weight = a * weight.stride(2) + b * weight.stride(3);
        taps.push_back({static_cast<int32_t>(in_panel), static_cast<int32_t>(in_weight)});
      }
    }
  }
};

void zero_columns(float* copy, int64_t width, int64_t top, int64_t bottom, int64_t first,
                  int64_t last) {
  for (int64_t column = first; column < last; ++column) {
    for (int64_t r = top; r < bottom; ++r) copy[r * width + column] = 0.f;
  }
}

// One channel into its panel slot: for every row phase and column tap a copy of
// the plane with rows of out_width values, zero where the tap meets padding.
template <typename T>
void pack_channel(const T* plane, float* copy, const ConvShape& s, const PanelLayout& layout,
                  int64_t first_row) {
  const int64_t width = s.out_width, step = s.stride[1];
  for (const int64_t phase : layout.phases) {
    const int64_t y = first_row * s.stride[0] + phase - s.padding[0];
    const auto [top, bottom] = inside(s.stride[0], y, s.height, layout.copy_rows);
    for (int64_t b = 0; b < s.kernel[1]; ++b, copy += layout.copy) {
      const int64_t x = b * s.dilation[1] - s.padding[1];
      const auto [left, right] = inside(step, x, s.width, width);
      std::fill_n(copy, top * width, 0.f);
      std::fill(copy + bottom * width, copy + layout.copy, 0.f);
      const T* const source = plane + (y + top * s.stride[0]) * s.width + left * step + x;
      float* const to = copy + top * width + left;
      if (left == right) {
        // The tap meets nothing but padding: every column is cleared below.
      } else if (step == 1 && s.stride[0] == 1 && width == s.width) {
        // Rows follow each other in the source as in the copy: one flat run, which
        // takes wrong values to the border columns.
        copy_f32(source, 1, to, (bottom - top) * width - left - (width - right));
      } else {
        for (int64_t r = 0; r < bottom - top; ++r) {
          copy_f32(source + r * s.stride[0] * s.width, step, to + r * width, right - left);
        }
      }
      zero_columns(copy, width, top, bottom, 0, left);
      zero_columns(copy, width, top, bottom, right, width);
    }
  }
}

// A chain of fused multiply-adds ends after this many steps and is added to the sum. One chain
// over all 4608 steps of 512 channels had 3 to 5 times the library's rounding error.
constexpr int64_t kChain = 256;

// Adds the steps' products to the sums of `Vecs` vectors of positions for `Rows` output channels,
// or sets the sums to them.
template <int Rows, int Vecs>
void micro_kernel(const Step* step, const Step* end, const float* panel, const float* const* weight,
                  bool add, float* sums) {
  Vec acc[Rows][Vecs];
  const float* row[Rows];
  COFIRE_UNROLL for (int r = 0; r < Rows; ++r) {
    row[r] = weight[r];
    COFIRE_UNROLL for (int v = 0; v < Vecs; ++v) acc[r][v] = Vec(0.f);
  }
  // One flat loop over a list of offsets runs at the FMA limit (172 of 173 GF/s a
  // core); nested loops over channels and taps reached 150.
  for (; step != end; ++step) {
    const float* const x = panel + step->panel;
    const int64_t k = step->weight;
    Vec in[Vecs];
    COFIRE_UNROLL for (int v = 0; v < Vecs; ++v) in[v] = Vec::loadu(x + v * kLanes);
    COFIRE_UNROLL for (int r = 0; r < Rows; ++r) {
      const Vec w(row[r][k]);
      COFIRE_UNROLL for (int v = 0; v < Vecs; ++v) {
        acc[r][v] = at::vec::fmadd(w, in[v], acc[r][v]);
      }
    }
  }
  COFIRE_UNROLL for (int r = 0; r < Rows; ++r) {
    COFIRE_UNROLL for (int v = 0; v < Vecs; ++v) {
      float* const sum = sums + (r * Vecs + v) * kLanes;
      (add ? Vec::loadu(sum) + acc[r][v] : acc[r][v]).store(sum);
    }
  }
}

// A weight row as the micro-kernel wants it: fp32 as it lies, other types widened into `scratch`.
// The whole row: value by value, only where a step reads, took ten times as long.
const float* fp32_row(const float* row, int64_t, float*) { return row; }

template <typename T>
const float* fp32_row(const T* row, int64_t size, float* scratch) {
  copy_f32(row, 1, scratch, size);
  return scratch;
}

using MicroKernel = void (*)(const Step*, const Step*, const float*, const float* const*, bool,
                             float*);

template <int Vecs, size_t... I>
constexpr auto micro_kernels(std::index_sequence<I...>) {
  return std::array<MicroKernel, sizeof...(I)>{
      &micro_kernel<static_cast<int>(I) / Vecs + 1, static_cast<int>(I) % Vecs + 1>...};
}

// A tile of output channels: the weight row of each, and where its sums go, as
// y = clamp(sum + bias [+ residual]).
template <typename T>
struct Tile {
  int64_t rows;
  std::array<const float*, kRows> weight;
  std::array<T*, kRows> output;
  std::array<const T*, kRows> residual;  // null: none
  std::array<float, kRows> bias;
};

// All positions of a tile of at most Rows channels, in runs of at most Vecs vectors
// and of even length.
template <int Rows, int Vecs, typename T>
void run_tile(const Tile<T>& tile, const Step* step, const Step* end, const float* panel,
              int64_t positions, float low, float high) {
  static constexpr auto kKernels = micro_kernels<Vecs>(std::make_index_sequence<Rows * Vecs>{});
  alignas(64) float sums[Rows * Vecs * kLanes];
  const int64_t vectors = (positions + kLanes - 1) / kLanes;
  const int64_t runs = (vectors + Vecs - 1) / Vecs;
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t first = vectors * i / runs, length = vectors * (i + 1) / runs - first;
    const MicroKernel kernel = kKernels[(tile.rows - 1) * Vecs + length - 1];
    const Step* chain = step;
    do {
      const Step* const next = chain + std::min<int64_t>(kChain, end - chain);
      kernel(chain, next, panel + first * kLanes, tile.weight.data(), chain != step, sums);
      chain = next;
    } while (chain != end);
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t v = 0; v < length; ++v) {
        const int64_t at = (first + v) * kLanes, n = std::min(kLanes, positions - at);
        Vec y = Vec::loadu(sums + (r * length + v) * kLanes) + Vec(tile.bias[r]);
        if (tile.residual[r] != nullptr) y = y + load_f32(tile.residual[r] + at, n);
        store_f32(tile.output[r] + at, at::vec::clamp(y, Vec(low), Vec(high)), n);
      }
    }
  }
}

// The part of the work that shares packed inputs: some output rows of a sample.
struct Panel {
  int64_t sample, first_row, rows;
};

// One unit of the compute phase: output slots [first, first + count) of a panel,
// all of one convolution group, against the input slots [in_first, in_last).
// count == 0: the channels of the panel that stay zero.
struct Task {
  int32_t panel, first, count, in_first, in_last;
};

// Cuts the active outputs of every group of a sample into tiles of even height.
void append_tasks(const Problem& p, int64_t n, int32_t panel, std::vector<Task>& tasks) {
  const ConvShape& s = p.shape;
  const int64_t in_per_group = s.in_channels / s.groups;
  const int64_t out_per_group = s.out_channels / s.groups;
  const int64_t in_count = p.in.count(n), out_count = p.out.count(n);
  int64_t in_last = 0, out_last = 0;
  while (out_last < out_count) {
    const int64_t group = p.out.channel(n, out_last) / out_per_group;
    const int64_t out_first = out_last;
    while (out_last < out_count && p.out.channel(n, out_last) / out_per_group == group) ++out_last;
    while (in_last < in_count && p.in.channel(n, in_last) / in_per_group < group) ++in_last;
    const int64_t in_first = in_last;
    while (in_last < in_count && p.in.channel(n, in_last) / in_per_group == group) ++in_last;
    const int64_t outs = out_last - out_first, tiles = (outs + kRows - 1) / kRows;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t a = outs * t / tiles, b = outs * (t + 1) / tiles;
      tasks.push_back({panel, static_cast<int32_t>(out_first + a), static_cast<int32_t>(b - a),
                       static_cast<int32_t>(in_first), static_cast<int32_t>(in_last)});
    }
  }
  tasks.push_back({panel, 0, 0, 0, 0});
}

// Zeros in the rows of a panel for every channel that is not computed.
template <typename T>
void zero_inactive(const Problem& p, const Panel& panel, T* output) {
  const ConvShape& s = p.shape;
  const int64_t n = panel.sample, active = p.out.count(n), channels = p.output_channels();
  const int64_t plane = s.out_height * s.out_width;
  int64_t slot = 0;
  for (int64_t c = 0; c < channels; ++c) {
    if (slot < active && (p.compact_output > 0 || p.out.channel(n, slot) == c)) {
      ++slot;
    } else {
      std::fill_n(output + (n * channels + c) * plane + panel.first_row * s.out_width,
                  panel.rows * s.out_width, T(0.f));
    }
  }
}

template <typename T>
at::Tensor gated_conv(const Problem& p, const at::Tensor& input, const at::Tensor& weight) {
  const ConvShape& s = p.shape;
  const at::Tensor output = at::empty(p.output_size(), input.options());
  const int64_t most_inputs = p.in.most();
  const int64_t threads = at::get_num_threads();
  const int64_t sharers = std::max<int64_t>(1, threads / std::max<int64_t>(1, s.batch));
  const PanelLayout layout(s, most_inputs, sharers, weight);
  const int64_t taps = static_cast<int64_t>(layout.taps.size());
  const int64_t panel_floats = most_inputs * layout.channel;
  const int64_t in_plane = s.height * s.width, out_plane = s.out_height * s.out_width;
  const int64_t in_channels = input.size(1);

  std::vector<Panel> panels;
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t row = 0; row < s.out_height; row += layout.rows) {
      panels.push_back({n, row, std::min(layout.rows, s.out_height - row)});
    }
  }
  const int64_t total = static_cast<int64_t>(panels.size());
  const int64_t fitting = threads * kGroupFloats / std::max<int64_t>(1, panel_floats);
  int64_t group = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(1, total));
  if (group > threads) group -= group % threads;
  const int64_t copies = group < threads ? kCopies : 1;
  const at::Tensor workspace = at::empty({copies * group * panel_floats}, at::kFloat);
  float* const packed = workspace.mutable_data_ptr<float>();

  const int64_t in_per_group = s.in_channels / s.groups;
  const int64_t row_extent = weight.numel() / std::max<int64_t>(1, s.out_channels);
  std::vector<Step> steps(group * most_inputs * taps);

  const T* const in = input.const_data_ptr<T>();
  const T* const w = weight.const_data_ptr<T>();
  T* const out = output.mutable_data_ptr<T>();
  const at::Tensor dense_residual = p.residual ? p.residual->contiguous() : at::Tensor();
  const T* const residual = p.residual ? dense_residual.const_data_ptr<T>() : nullptr;
  const at::Tensor wide_bias = p.bias ? p.bias->to(at::kFloat).contiguous() : at::Tensor();
  const float* const bias = p.bias ? wide_bias.const_data_ptr<float>() : nullptr;
  std::vector<Task> tasks;

  for (int64_t begin = 0; begin < total; begin += group) {
    const int64_t count = std::min(group, total - begin);
    tasks.clear();
    for (int64_t i = 0; i < count; ++i) {
      append_tasks(p, panels[begin + i].sample, static_cast<int32_t>(i), tasks);
    }
    const int64_t slots = count * most_inputs;
    for_each_task(copies * slots, threads, [&](int64_t task, int64_t) {
      const int64_t i = task % slots, which = i / most_inputs, j = i % most_inputs;
      const Panel& panel = panels[begin + which];
      if (j >= p.in.count(panel.sample)) return;
      const int64_t channel = p.in.channel(panel.sample, j);
      const int64_t plane = panel.sample * in_channels + (p.compact_input ? j : channel);
      float* const copy = packed + task / slots * count * panel_floats;
      pack_channel(in + plane * in_plane, copy + which * panel_floats + j * layout.channel, s,
                   layout, panel.first_row);
      if (copy != packed) return;  // the copies share their steps
      const auto in_panel = static_cast<int32_t>(j * layout.channel);
      const auto in_weight = static_cast<int32_t>(channel % in_per_group * weight.stride(1));
      for (int64_t t = 0; t < taps; ++t) {
        const Step& tap = layout.taps[t];
        steps[i * taps + t] = {in_panel + tap.panel, in_weight + tap.weight};
      }
    });
    for_each_task(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i, int64_t worker) {
      const Task& task = tasks[i];
      const Panel& panel = panels[begin + task.panel];
      if (task.count == 0) return zero_inactive(p, panel, out);
      const int64_t n = panel.sample, offset = panel.first_row * s.out_width;
      const Step* const sample_steps = steps.data() + task.panel * most_inputs * taps;
      const Step* const step = sample_steps + task.in_first * taps;
      const Step* const end = sample_steps + task.in_last * taps;
      static thread_local std::vector<float> scratch;
      if constexpr (!std::is_same_v<T, float>) scratch.resize(kRows * row_extent);
      Tile<T> tile;
      tile.rows = task.count;
      for (int64_t r = 0; r < task.count; ++r) {
        const int64_t slot = task.first + r, channel = p.out.channel(n, slot);
        const int64_t to = p.compact_output > 0 ? slot : channel;
        tile.weight[r] =
            fp32_row(w + channel * row_extent, row_extent, scratch.data() + r * row_extent);
        tile.output[r] = out + (n * p.output_channels() + to) * out_plane + offset;
        tile.residual[r] =
            residual ? residual + (n * s.out_channels + channel) * out_plane + offset : nullptr;
        tile.bias[r] = bias ? bias[channel] : 0.f;
      }
      const float* const copy = packed + worker * copies / threads * count * panel_floats;
      run_tile<kRows, kVecs>(tile, step, end, copy + task.panel * panel_floats,
                             panel.rows * s.out_width, p.low, p.high);
    });
  }
  return output;
}

// Offsets in a panel and in a weight row are 32-bit.
bool offsets_fit(const ConvShape& s) {
  const int64_t taps = s.kernel[0] * s.kernel[1];
  const int64_t rows = s.kernel[0] * s.dilation[0] + 2;
  const int64_t floats = kPanelPositions + rows * s.out_width + 4 * kLine;
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  return kPanelFloats + s.in_channels * taps * floats < kLimit && s.in_channels * taps < kLimit;
}

// The share of the dense multiply-adds that the masks leave.
double kept_share(const Problem& p) {
  const ConvShape& s = p.shape;
  double pairs = 0.0;
  for (int64_t n = 0; n < s.batch; ++n) {
    pairs += static_cast<double>(p.in.count(n)) * static_cast<double>(p.out.count(n));
  }
  const double all = static_cast<double>(s.batch) * s.in_channels * s.out_channels;
  return all > 0 ? pairs / all : 0.0;
}

// The largest share of the multiply-adds at which the gated kernel is chosen; 0: never.
double break_even(const Problem& p, const at::Tensor& input) {
  const bool channels_last = memory_format(input) != at::MemoryFormat::Contiguous;
  const bool sixteen_bit = input.scalar_type() != at::kFloat;
  // Not offered: against AMX (not measured); depthwise on pixels, where the two
  // conversions cost more than the convolution (512 @14x14: 0.26 ms against 0.09 in the library).
  if (!offsets_fit(p.shape) || (sixteen_bit && has_amx()) ||
      (p.shape.depthwise() && channels_last)) {
    return 0.0;
  }
  return gated_conv2d_break_even(p.shape, kLanes, channels_last, sixteen_bit);
}

template <typename T>
at::Tensor run(const Problem& p, const at::Tensor& input, const at::Tensor& weight) {
  if (kept_share(p) > break_even(p, input)) return library_conv2d(p, input, weight);
  if (p.shape.depthwise()) return gated_depthwise(p, input.contiguous(), weight.contiguous());
  const bool rows = weight.is_contiguous(weight.suggest_memory_format());
  const at::Tensor y = gated_conv<T>(p, input.contiguous(), rows ? weight : weight.contiguous());
  return y.contiguous(memory_format(input));
}

ConvShape conv_shape(const at::Tensor& input, const at::Tensor& weight, int64_t in_channels,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                     int64_t groups) {
  TORCH_CHECK(input.dim() == 4 && weight.dim() == 4,
              "input, weight: expected 4 dimensions each, got ", input.sizes(), " and ",
              weight.sizes());
  TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
              "stride, padding, dilation: expected two values each, got ", stride, ", ", padding,
              " and ", dilation);
  ConvShape s;
  s.batch = input.size(0);
  s.in_channels = in_channels;
  s.out_channels = weight.size(0);
  s.height = input.size(2);
  s.width = input.size(3);
  for (int d = 0; d < 2; ++d) {
    s.kernel[d] = weight.size(2 + d);
    s.stride[d] = stride[d];
    s.padding[d] = padding[d];
    s.dilation[d] = dilation[d];
    TORCH_CHECK(s.stride[d] > 0 && s.padding[d] >= 0 && s.dilation[d] > 0 && s.kernel[d] > 0,
                "stride, dilation and kernel must be positive and padding not negative, got ",
                stride, ", ", dilation, ", ", weight.sizes(), " and ", padding);
  }
  s.out_height = (s.height + 2 * padding[0] - dilation[0] * (s.kernel[0] - 1) - 1) / stride[0] + 1;
  s.out_width = (s.width + 2 * padding[1] - dilation[1] * (s.kernel[1] - 1) - 1) / stride[1] + 1;
  s.groups = groups;
  TORCH_CHECK(s.height + 2 * padding[0] > dilation[0] * (s.kernel[0] - 1) &&
                  s.width + 2 * padding[1] > dilation[1] * (s.kernel[1] - 1),
              "input: expected planes at least as large as the kernel, got ", input.sizes(),
              " for weight ", weight.sizes(), " with padding ", padding);
  TORCH_CHECK(groups > 0 && s.in_channels % groups == 0 && s.out_channels % groups == 0 &&
                  weight.size(1) == s.in_channels / groups,
              "weight: expected [out_channels, ", s.in_channels, " / groups, h, w] with groups ",
              groups, ", got ", weight.sizes());
  return s;
}

Problem make_problem(const at::Tensor& input, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& residual, const at::Tensor& in_index,
                     const at::Tensor& in_count, const at::Tensor& out_index,
                     const at::Tensor& out_count, at::IntArrayRef stride, at::IntArrayRef padding,
                     at::IntArrayRef dilation, int64_t groups, c10::string_view activation,
                     bool masked_input, bool compact_input, int64_t compact_output) {
  const auto type = input.scalar_type();
  const int64_t in_channels = compact_input ? in_index.size(-1) : input.size(1);
  const ConvShape shape = conv_shape(input, weight, in_channels, stride, padding, dilation, groups);
  const auto [low, high] = activation_range(activation);
  Problem problem{
      shape,
      Selection("gated_conv2d", "in", in_index, in_count, shape.batch, shape.in_channels),
      Selection("gated_conv2d", "out", out_index, out_count, shape.batch, shape.out_channels),
      bias,
      residual,
      low,
      high,
      masked_input,
      compact_input,
      compact_output};
  TORCH_CHECK_VALUE(!compact_input || problem.in.most() <= input.size(1),
                    "gated_conv2d: a compact input must hold every sample's channels (",
                    problem.in.most(), "), got ", input.sizes());
  TORCH_CHECK_VALUE(compact_output == 0 || problem.out.most() <= compact_output,
                    "gated_conv2d: compact_output must hold every sample's channels (",
                    problem.out.most(), "), got ", compact_output);
  TORCH_CHECK(weight.scalar_type() == type && (!bias || bias->numel() == shape.out_channels),
              "weight, bias: expected ", type, " and ", shape.out_channels, " values, got ",
              weight.scalar_type(), " and ", bias ? bias->numel() : shape.out_channels);
  TORCH_CHECK(
      !residual || (residual->scalar_type() == type &&
                    residual->sizes() == at::IntArrayRef({shape.batch, shape.out_channels,
                                                          shape.out_height, shape.out_width})),
      "residual: expected ", type, " of the dense output's size, got ", residual->scalar_type(),
      " ", residual->sizes());
  return problem;
}

}  // namespace

at::Tensor gated_conv2d(const at::Tensor& input, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias,
                        const std::optional<at::Tensor>& residual, const at::Tensor& in_index,
                        const at::Tensor& in_count, const at::Tensor& out_index,
                        const at::Tensor& out_count, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                        c10::string_view activation, bool masked_input, bool compact_input,
                        int64_t compact_output) {
  if (!covered(input)) {
    return reference("cofire::gated_conv2d", &gated_conv2d, input, weight, bias, residual, in_index,
                     in_count, out_index, out_count, stride, padding, dilation, groups, activation,
                     masked_input, compact_input, compact_output);
  }
  const Problem problem = make_problem(input, weight, bias, residual, in_index, in_count, out_index,
                                       out_count, stride, padding, dilation, groups, activation,
                                       masked_input, compact_input, compact_output);
  return dispatch(input.scalar_type(),
                  [&](auto zero) { return run<decltype(zero)>(problem, input, weight); });
}

// What gated_conv2d would do with these arguments, and why.
std::string plan_gated_conv2d(const at::Tensor& input, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias,
                              const std::optional<at::Tensor>& residual, const at::Tensor& in_index,
                              const at::Tensor& in_count, const at::Tensor& out_index,
                              const at::Tensor& out_count, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                              c10::string_view activation, bool masked_input, bool compact_input,
                              int64_t compact_output) {
  const Problem problem = make_problem(input, weight, bias, residual, in_index, in_count, out_index,
                                       out_count, stride, padding, dilation, groups, activation,
                                       masked_input, compact_input, compact_output);
  return plan(kept_share(problem), break_even(problem, input), "multiply-adds",
              "computes the active channels", "library convolution, then mask");
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) { m.impl("gated_conv2d", &cofire::gated_conv2d); }
TORCH_LIBRARY_FRAGMENT(cofire_plan, m) { m.def("gated_conv2d", &cofire::plan_gated_conv2d); }
