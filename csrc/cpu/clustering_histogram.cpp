// SPDX-License-Identifier: Apache-2.0
// histogram16, scatter16 and lut_apply16: counts, sums and tables by 16-bit
// pattern. See the contract in pyextensions/cofire/ops/clustering.py.
#include "clustering_histogram.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace cofire {
inline namespace CPU_CAPABILITY {

namespace {

constexpr int64_t kGrain = 65536;  // patterns worth a thread

// Whether an increment often waits for one to the same counter shortly before, for five cycles
// each.
bool crowded(const uint16_t* p, int64_t n) {
  const int64_t samples = std::min<int64_t>(n / 8, 1024);
  int64_t again = 0;
  for (int64_t s = 0; s < samples; ++s) {
    const uint16_t* at = p + (n - 4) * s / samples;
    again += at[0] == at[1] || at[0] == at[2] || at[0] == at[3];
  }
  return 8 * again > samples;
}

// Of crowded patterns consecutive ones count in tables of their own. Others fit the first-level
// cache better in one table: of fp16 weights twenty thousand patterns occur.
template <int tables>
void count_range(const uint16_t* p, int64_t n, uint32_t* counts) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t words[2];
    std::memcpy(words, p + i, 16);
    COFIRE_UNROLL for (int j = 0; j < 8; ++j) {
      const uint64_t pattern = (words[j / 4] >> (16 * (j % 4))) & 0xFFFF;
      ++counts[(j % tables) * kPatterns + pattern];
    }
  }
  for (; i < n; ++i) ++counts[p[i]];
}

int64_t tasks_of(int64_t n) {
  if (at::in_parallel_region()) return 1;
  return std::clamp<int64_t>(n / kGrain, 1, at::get_num_threads());
}

// The floats of a tensor, fp64 included.
bool known(const at::Tensor& t) { return covered(t) || t.scalar_type() == at::kDouble; }

// Chunks that are summed by themselves and then in order: their number depends on n alone.
int64_t chunks_of(int64_t n) { return std::clamp<int64_t>(n >> 18, 1, 16); }

}  // namespace

void count_patterns(const uint16_t* input, int64_t n, uint32_t* counts) {
  const int64_t tasks = tasks_of(n), tables = !crowded(input, n) ? 1 : n >= (1 << 20) ? 4 : 2;
  const int64_t all = tasks * tables;
  // Zeroed by each thread for itself.
  const std::unique_ptr<uint32_t[]> partial(new uint32_t[all * kPatterns]);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      uint32_t* mine = partial.get() + task * tables * kPatterns;
      std::fill_n(mine, tables * kPatterns, 0u);
      const int64_t first = n * task / tasks, last = n * (task + 1) / tasks;
      if (tables == 4) {
        count_range<4>(input + first, last - first, mine);
      } else if (tables == 2) {
        count_range<2>(input + first, last - first, mine);
      } else {
        count_range<1>(input + first, last - first, mine);
      }
    }
  });
  std::copy_n(partial.get(), kPatterns, counts);
  for (int64_t t = 1; t < all; ++t) {
    const uint32_t* other = partial.get() + t * kPatterns;
    for (int64_t i = 0; i < kPatterns; ++i) counts[i] += other[i];
  }
}

void sum_patterns(const uint16_t* input, const void* source, at::ScalarType dtype, int64_t n,
                  double* sums, uint32_t* counts) {
  const int64_t chunks = chunks_of(n);
  const std::unique_ptr<double[]> partial(new double[chunks * kPatterns]);
  const std::unique_ptr<uint32_t[]> counted(counts ? new uint32_t[chunks * kPatterns] : nullptr);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* values = static_cast<const T*>(source);
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        double* mine = partial.get() + chunk * kPatterns;
        uint32_t* count = counts ? counted.get() + chunk * kPatterns : nullptr;
        std::fill_n(mine, kPatterns, 0.0);
        if (count) std::fill_n(count, kPatterns, 0u);
        const int64_t last = n * (chunk + 1) / chunks;
        for (int64_t i = n * chunk / chunks; i < last; i += kLanes) {
          alignas(64) float wide[kLanes];
          const int64_t m = std::min(kLanes, last - i);
          load_f32(values + i, m).store(wide);
          for (int64_t j = 0; j < m; ++j) {
            mine[input[i + j]] += static_cast<double>(wide[j]);
            if (count) ++count[input[i + j]];
          }
        }
      }
    });
  });
  std::copy_n(partial.get(), kPatterns, sums);
  if (counts) std::copy_n(counted.get(), kPatterns, counts);
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < kPatterns; ++i) sums[i] += partial[chunk * kPatterns + i];
    if (counts) {
      for (int64_t i = 0; i < kPatterns; ++i) counts[i] += counted[chunk * kPatterns + i];
    }
  }
}

void affine_patterns(const uint16_t* input, const void* source, at::ScalarType dtype, int64_t n,
                     const float* tables, void* out) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(source);
    T* to = static_cast<T*>(out);
    at::parallel_for(0, n, kGrain / 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kLanes) {
        const int64_t m = std::min(kLanes, end - i);
        alignas(64) int32_t place[kLanes] = {};
        for (int64_t j = 0; j < m; ++j) place[j] = 2 * static_cast<int32_t>(input[i + j]);
        const auto places = at::vec::Vectorized<int32_t>::loadu(place);
        const Vec slope = at::vec::gather<4>(tables, places);
        const Vec offset = at::vec::gather<4>(tables + 1, places);
        store_f32(to + i, at::vec::fmadd(slope, load_f32(from + i, m), offset), m);
      }
    });
  });
}

template <typename T>
void look_up_patterns(const uint16_t* input, int64_t n, const T* table, T* out) {
  at::parallel_for(0, n, kGrain / 2, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) {
      uint64_t words[2];
      T results[8];
      std::memcpy(words, input + i, 16);
      COFIRE_UNROLL for (int j = 0; j < 8; ++j) {
        results[j] = table[(words[j / 4] >> (16 * (j % 4))) & 0xFFFF];
      }
      std::memcpy(out + i, results, sizeof(results));
    }
    for (; i < end; ++i) out[i] = table[input[i]];
  });
}
template void look_up_patterns(const uint16_t*, int64_t, const uint8_t*, uint8_t*);
template void look_up_patterns(const uint16_t*, int64_t, const uint16_t*, uint16_t*);

void refuse_values(const char* name, int64_t nan, int64_t infinite) {
  TORCH_CHECK_VALUE(false, name, ": weight must be finite, got ", nan, " NaN and ", infinite,
                    " infinite values");
}

void check_finite(const char* name, const at::Tensor& weight) {
  int64_t nan = 0, infinite = 0;
  dispatch(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* p = static_cast<const T*>(weight.const_data_ptr());
    const int64_t n = weight.numel();
    Vec sum(0);  // zero times what is finite is zero
    for (int64_t i = 0; i < n; i += kLanes) {
      sum = sum + load_f32(p + i, std::min(kLanes, n - i)) * Vec(0);
    }
    if (reduce_add(sum) == 0) return;
    for (int64_t i = 0; i < n; ++i) {
      nan += std::isnan(static_cast<float>(p[i]));
      infinite += std::isinf(static_cast<float>(p[i]));
    }
  });
  if (nan + infinite > 0) refuse_values(name, nan, infinite);
}

Present::Present(const uint32_t* counts, at::ScalarType dtype, const char* name) {
  const uint16_t infinity = infinity_of(dtype);
  int64_t nan = 0, infinite = 0;
  const auto visit = [&](int64_t pattern) {
    const uint32_t count = counts[pattern];
    if (count == 0) return;
    const int64_t magnitude = pattern & 0x7FFF;
    if (magnitude >= infinity) (magnitude == infinity ? infinite : nan) += count;
    patterns.push_back(static_cast<uint16_t>(pattern));
    x.push_back(static_cast<double>(value_of(static_cast<uint16_t>(pattern), dtype)));
    n.push_back(count);
  };
  // Most patterns do not occur: look at eight at a time.
  const auto any = [&](int64_t first) {
    uint32_t all = 0;
    for (int64_t i = 0; i < 8; ++i) all |= counts[first + i];
    return all != 0;
  };
  for (int64_t first = kPatterns - 8; first >= kSign; first -= 8) {
    if (any(first)) {
      for (int64_t i = 7; i >= 0; --i) visit(first + i);
    }
  }
  for (int64_t first = 0; first < kSign; first += 8) {
    if (any(first)) {
      for (int64_t i = 0; i < 8; ++i) visit(first + i);
    }
  }
  if (nan + infinite > 0) refuse_values(name, nan, infinite);
}

// ----------------------------------------------------------------------------------------
// operators

at::Tensor histogram16(const at::Tensor& input) {
  TORCH_CHECK_TYPE(input.scalar_type() == at::kBFloat16 || input.scalar_type() == at::kHalf,
                   "histogram16: input must be bfloat16 or float16");
  const at::Tensor x = input.contiguous();
  std::vector<uint32_t> counts(kPatterns);
  count_patterns(static_cast<const uint16_t*>(x.const_data_ptr()), x.numel(), counts.data());
  at::Tensor result = at::empty({kPatterns}, x.options().dtype(at::kInt));
  int32_t* out = result.data_ptr<int32_t>();
  for (int64_t bin = 0; bin < kSign; ++bin) {
    out[bin] = static_cast<int32_t>(counts[kPatterns - 1 - bin]);
    out[kSign + bin] = static_cast<int32_t>(counts[bin]);
  }
  return result;
}

at::Tensor scatter16(const at::Tensor& input, const at::Tensor& source) {
  if (!known(source)) return reference("cofire::scatter16", &scatter16, input, source);
  TORCH_CHECK_VALUE(input.sizes() == source.sizes() && input.element_size() == 2,
                    "scatter16: source must have the shape of input, which has 16 bits");
  const at::Tensor x = input.contiguous(), values = source.contiguous();
  const auto* patterns = static_cast<const uint16_t*>(x.const_data_ptr());
  std::vector<double> sums(kPatterns);
  if (values.scalar_type() == at::kDouble) {  // for tests: one after the other
    at::Tensor result = at::zeros({kPatterns}, values.options());
    const double* from = values.const_data_ptr<double>();
    for (int64_t i = 0; i < x.numel(); ++i) {
      result.data_ptr<double>()[bin_of_pattern(patterns[i])] += from[i];
    }
    return result;
  }
  sum_patterns(patterns, values.const_data_ptr(), values.scalar_type(), x.numel(), sums.data(),
               nullptr);
  at::Tensor result = at::empty({kPatterns}, x.options().dtype(at::kFloat));
  float* out = result.data_ptr<float>();
  for (int64_t bin = 0; bin < kPatterns; ++bin) {
    out[bin] = static_cast<float>(sums[pattern_of_bin(bin)]);
  }
  return result;
}

namespace {

// For tests: one after the other.
at::Tensor apply_in_fp64(const at::Tensor& input, const at::Tensor& table,
                         const std::optional<at::Tensor>& source,
                         const std::optional<at::Tensor>& slope) {
  const auto* patterns = static_cast<const uint16_t*>(input.const_data_ptr());
  const auto widen = [](const at::Tensor& t) { return t.to(at::kDouble).contiguous(); };
  const at::Tensor offset = widen(table), by = source ? widen(*source) : at::Tensor(),
                   factor = source ? widen(*slope) : at::Tensor();
  at::Tensor result = at::empty(input.sizes(), offset.options());
  double* out = result.data_ptr<double>();
  for (int64_t i = 0; i < input.numel(); ++i) {
    const int64_t bin = bin_of_pattern(patterns[i]);
    out[i] = offset.const_data_ptr<double>()[bin];
    if (source) out[i] += factor.const_data_ptr<double>()[bin] * by.const_data_ptr<double>()[i];
  }
  return result.to(source ? source->scalar_type() : input.scalar_type());
}

}  // namespace

at::Tensor lut_apply16(const at::Tensor& input, const at::Tensor& table,
                       const std::optional<at::Tensor>& source,
                       const std::optional<at::Tensor>& slope) {
  if (!known(table) || (source && !known(*source))) {
    return reference("cofire::lut_apply16", &lut_apply16, input, table, source, slope);
  }
  TORCH_CHECK_VALUE(
      input.element_size() == 2 && table.numel() == kPatterns &&
          (!source || (source->sizes() == input.sizes() && slope && slope->numel() == kPatterns)),
      "lut_apply16: tables must have 65536 entries, and source the shape of input");
  const at::Tensor x = input.contiguous(), values = table.contiguous();
  const auto* patterns = static_cast<const uint16_t*>(x.const_data_ptr());
  if (table.scalar_type() == at::kDouble || (source && source->scalar_type() == at::kDouble)) {
    return apply_in_fp64(x, values, source, slope);
  }
  const at::Tensor wide = values.to(at::kFloat);
  const float* from = wide.const_data_ptr<float>();
  if (!source) {
    at::Tensor result = at::empty(x.sizes(), x.options());
    dispatch(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      if constexpr (sizeof(T) == 2) {
        std::vector<uint16_t> bits(kPatterns);
        for (int64_t bin = 0; bin < kPatterns; ++bin) {
          const T rounded = static_cast<T>(from[bin]);
          std::memcpy(&bits[pattern_of_bin(bin)], &rounded, 2);
        }
        look_up_patterns(patterns, x.numel(), bits.data(),
                         static_cast<uint16_t*>(result.data_ptr()));
      }
    });
    return result;
  }
  const at::Tensor by = source->contiguous(), slopes = slope->to(at::kFloat).contiguous();
  std::vector<float> both(2 * kPatterns);
  for (int64_t bin = 0; bin < kPatterns; ++bin) {
    const int64_t pattern = pattern_of_bin(bin);
    both[2 * pattern] = slopes.const_data_ptr<float>()[bin];
    both[2 * pattern + 1] = from[bin];
  }
  at::Tensor result = at::empty(x.sizes(), by.options());
  affine_patterns(patterns, by.const_data_ptr(), by.scalar_type(), x.numel(), both.data(),
                  result.data_ptr());
  return result;
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire

TORCH_LIBRARY_IMPL(cofire, CPU, m) {
  m.impl("histogram16", &cofire::histogram16);
  m.impl("scatter16", &cofire::scatter16);
  m.impl("lut_apply16", &cofire::lut_apply16);
}
