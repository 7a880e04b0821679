// GroupNorm and SiLU with AVX-512.
#include "cpu/simd.h"
#include "group_norm_silu/group_norm_silu.h"

#ifdef DIFFMEM_AVX512

#include <immintrin.h>

namespace diffmem::group_norm_silu {

namespace {

using Floats = __m512;
constexpr int kLanes = 16;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats value) { _mm512_storeu_ps(p, value); }
inline Floats load_part(const float* p) { return _mm512_maskz_loadu_ps(0xff, p); }
inline void store_part(float* p, Floats value) { _mm512_mask_storeu_ps(p, 0xff, value); }
inline Floats set1(float value) { return _mm512_set1_ps(value); }
inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats add(Floats x, Floats y) { return _mm512_add_ps(x, y); }
inline Floats sub(Floats x, Floats y) { return _mm512_sub_ps(x, y); }
inline Floats multiply(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
inline Floats multiply_add(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
inline Floats multiply_subtract(Floats x, Floats y, Floats z) { return _mm512_fmsub_ps(x, y, z); }
inline Floats negative_multiply_add(Floats x, Floats y, Floats z) { return _mm512_fnmadd_ps(x, y, z); }
inline Floats negative_multiply_subtract(Floats x, Floats y, Floats z) { return _mm512_fnmsub_ps(x, y, z); }
inline Floats lowest(Floats x, Floats y) { return _mm512_min_ps(x, y); }
inline Floats highest(Floats x, Floats y) { return _mm512_max_ps(x, y); }
inline Floats to_exponent(Floats x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23)); }

// 1/x for normal numbers: an estimate of 14 bits and one step of Newton's method, where a division takes ten cycles.
inline Floats inverse_of(Floats x) {
  const Floats estimate = _mm512_rcp14_ps(x);
  return multiply_add(estimate, negative_multiply_add(x, estimate, set1(1.0f)), estimate);
}

inline void add_to(double* totals, Floats values) {
  const __m256 low = _mm512_castps512_ps256(values), high = _mm512_extractf32x8_ps(values, 1);
  _mm512_storeu_pd(totals, _mm512_add_pd(_mm512_loadu_pd(totals), _mm512_cvtps_pd(low)));
  _mm512_storeu_pd(totals + 8, _mm512_add_pd(_mm512_loadu_pd(totals + 8), _mm512_cvtps_pd(high)));
}

}  // namespace

}  // namespace diffmem::group_norm_silu

#include "group_norm_silu/group_norm_silu_simd.h"

namespace diffmem::group_norm_silu {
const Kernels* avx512_kernels() { return &kTable; }
}  // namespace diffmem::group_norm_silu

#else

namespace diffmem::group_norm_silu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace diffmem::group_norm_silu

#endif
