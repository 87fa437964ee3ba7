// SPDX-License-Identifier: Apache-2.0
// What every CPU kernel shares: vectors that load and store any float type as
// fp32, and the way back to an operator's reference.
//
// The sources in this folder are compiled once per instruction set. All names
// live in a namespace that carries the instruction set, so that no inline
// function of one build can be linked into another.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <tuple>

namespace cofire {
inline namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;  // 16 lanes with AVX-512, else 8
constexpr int64_t kLanes = Vec::size();

// Vec::size() consecutive elements of any float type, as fp32.
template <typename T>
inline Vec load_f32(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(p);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    Vec v;
    at::vec::load_fp32_from_bf16(p, v);
    return v;
  } else {
    Vec v;
    at::vec::load_fp32_from_fp16(p, v);
    return v;
  }
}

// The first `count` elements; the other lanes are zero.
template <typename T>
inline Vec load_f32(const T* p, int64_t count) {
  if (count == kLanes) return load_f32(p);
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(p, count);
  } else {
    alignas(64) T tmp[kLanes] = {};
    std::memcpy(tmp, p, count * sizeof(T));
    return load_f32(tmp);
  }
}

template <typename T>
inline void store_f32(T* p, const Vec& v, int64_t count = kLanes) {
  if constexpr (std::is_same_v<T, float>) {
    v.store(p, static_cast<int>(count));
  } else {
    at::vec::convert_from_float<T>(v, v).store(p, static_cast<int>(count));
  }
}

// The sum and the maximum of the lanes, in an order fixed by the instruction set.
// A NaN in any lane makes the maximum NaN.
inline float reduce_add(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, v);
}

inline float reduce_max(const Vec& v) {
  return at::vec::vec_reduce_all<float>(
      [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, v);
}

// Unrolls the loop that follows, so that its array of vectors stays in registers.
#define COFIRE_UNROLL _Pragma("GCC unroll 16")

// How many items of `size` elements each are worth a thread of their own.
inline int64_t grain_of(int64_t size) { return 1 + 32768 / (size + 1); }

// The types that kernels read and write.
inline bool covered(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 ||
         t.scalar_type() == at::kHalf;
}

// The format that convolution-like operators keep. A tensor in both counts as contiguous.
inline at::MemoryFormat memory_format(const at::Tensor& t) {
  return !t.is_contiguous() && t.is_contiguous(at::MemoryFormat::ChannelsLast)
             ? at::MemoryFormat::ChannelsLast
             : at::MemoryFormat::Contiguous;
}

// Uninitialised, in t's shape, type and the format above.
inline at::Tensor empty_map(const at::Tensor& t) {
  return at::empty_like(t, t.options(), memory_format(t));
}

// Calls f(T{}) with the C++ type of a covered dtype.
template <typename F>
inline auto dispatch(at::ScalarType dtype, F&& f) -> decltype(f(float{})) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kBFloat16:
      return f(c10::BFloat16{});
    case at::kHalf:
      return f(c10::Half{});
    default:
      TORCH_CHECK(false, "no CPU kernel for ", dtype);
  }
}

// Calls the reference of an operator (its overload `.reference`, plain torch):
// what a kernel does with a dtype or layout that it does not cover.
//   if (!covered) return reference("cofire::compact", &compact, mask);
template <typename R, typename... A, typename... B>
inline R reference(const char* op, R (*)(A...), B&&... args) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(op, "reference")
      .typed<R(A...)>()
      .call(std::forward<B>(args)...);
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
