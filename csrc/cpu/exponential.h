// SPDX-License-Identifier: Apache-2.0
// Powers of two, without a call.
#pragma once

#include <cmath>

#include "vec.h"

namespace cofire {
inline namespace CPU_CAPABILITY {

template <typename R>
using VecOf = at::vec::Vectorized<R>;

// v where a > b, and zero elsewhere. A comparison of at::vec fills a vector first.
template <typename R>
inline VecOf<R> where_greater(const VecOf<R>& a, const VecOf<R>& b, const VecOf<R>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<R, float>) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), v);
  } else {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a, b, _CMP_GT_OQ), v);
  }
#else
  return (a > b) & v;
#endif
}

// v where a is not at most b, so too where it is NaN, and zero elsewhere.
template <typename R>
inline VecOf<R> where_not_at_most(const VecOf<R>& a, const VecOf<R>& b, const VecOf<R>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<R, float>) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ), v);
  } else {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ), v);
  }
#else
  return VecOf<R>::blendv(v, VecOf<R>(R(0)), a <= b);
#endif
}

// v 2^n for integral n from -1022 (or -126) to 0; anything for others.
template <typename R>
inline VecOf<R> scale_by_power(const VecOf<R>& v, const VecOf<R>& n) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<R, float>) {
    return _mm512_scalef_ps(v, n);
  } else {
    return _mm512_scalef_pd(v, n);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<R, float>) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return v * VecOf<R>(_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
  } else {
    const __m256i biased =
        _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n)), _mm256_set1_epi64x(1023));
    return v * VecOf<R>(_mm256_castsi256_pd(_mm256_slli_epi64(biased, 52)));
  }
#else
  R lanes[VecOf<R>::size()], powers[VecOf<R>::size()];
  v.store(lanes);
  n.store(powers);
  for (int64_t i = 0; i < VecOf<R>::size(); ++i) {
    lanes[i] = powers[i] > R(-200) ? std::ldexp(lanes[i], static_cast<int>(powers[i])) : R(0);
  }
  return VecOf<R>::loadu(lanes);
#endif
}

// 2^s of what is not positive, to a unit or two in the last place. The library's vector routine is
// a call that spills every register. Less than 2^-100 (in fp64 2^-500, whose square is a normal
// number too) is zero: denormal numbers cost a hundred cycles each. Of NaN it is zero too, or NaN.
template <typename R, bool keeps_nan = false>
inline VecOf<R> power_of_two(const VecOf<R>& s) {
  using V = VecOf<R>;
  const V n = s.round();
  const V r = s - n;
  // Interpolates 2^r in the Chebyshev nodes of [-1/2, 1/2]: error 2.5e-9 and 4e-18.
  constexpr bool wide = std::is_same_v<R, double>;
  constexpr int degree = wide ? 11 : 6;
  constexpr R coefficients[] = {R(1),
                                wide ? R(6.931471805599453096e-01) : R(6.931472067028325956e-01),
                                wide ? R(2.402265069591015926e-01) : R(2.402265092228875789e-01),
                                wide ? R(5.550410866482160572e-02) : R(5.550327226670302367e-02),
                                wide ? R(9.618129107587313749e-03) : R(9.618056678524655722e-03),
                                wide ? R(1.333355814641078716e-03) : R(1.340042817761574708e-03),
                                wide ? R(1.540353046367909528e-04) : R(1.546144469856473906e-04),
                                R(1.525273383798806405e-05),
                                R(1.32154325519282134e-06),
                                R(1.017805839042889319e-07),
                                R(7.074192209639015042e-09),
                                R(4.455643340398825317e-10)};
  V p(coefficients[degree]);
  COFIRE_UNROLL for (int i = degree - 1; i >= 0; --i) {
    p = at::vec::fmadd(p, r, V(coefficients[i]));
  }
  const V least(R(wide ? -500 : -100)), power = scale_by_power<R>(p, n);
  return keeps_nan ? where_not_at_most<R>(s, least, power) : where_greater<R>(s, least, power);
}

}  // namespace CPU_CAPABILITY
}  // namespace cofire
