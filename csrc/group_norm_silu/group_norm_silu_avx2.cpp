// GroupNorm and SiLU with AVX2 and FMA.
#include "cpu/simd.h"
#include "group_norm_silu/group_norm_silu.h"

#ifdef DIFFMEM_AVX2

#include <immintrin.h>

namespace diffmem::group_norm_silu {

namespace {

using Floats = __m256;
constexpr int kLanes = 8;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats value) { _mm256_storeu_ps(p, value); }
inline Floats load_part(const float* p) { return _mm256_loadu_ps(p); }
inline void store_part(float* p, Floats value) { _mm256_storeu_ps(p, value); }
inline Floats set1(float value) { return _mm256_set1_ps(value); }
inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats add(Floats x, Floats y) { return _mm256_add_ps(x, y); }
inline Floats sub(Floats x, Floats y) { return _mm256_sub_ps(x, y); }
inline Floats multiply(Floats x, Floats y) { return _mm256_mul_ps(x, y); }
inline Floats multiply_add(Floats x, Floats y, Floats z) { return _mm256_fmadd_ps(x, y, z); }
inline Floats multiply_subtract(Floats x, Floats y, Floats z) { return _mm256_fmsub_ps(x, y, z); }
inline Floats negative_multiply_add(Floats x, Floats y, Floats z) { return _mm256_fnmadd_ps(x, y, z); }
inline Floats negative_multiply_subtract(Floats x, Floats y, Floats z) { return _mm256_fnmsub_ps(x, y, z); }
inline Floats lowest(Floats x, Floats y) { return _mm256_min_ps(x, y); }
inline Floats highest(Floats x, Floats y) { return _mm256_max_ps(x, y); }
inline Floats to_exponent(Floats x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }
inline Floats inverse_of(Floats x) { return _mm256_div_ps(set1(1.0f), x); }

inline void add_to(double* totals, Floats values) {
  const __m128 low = _mm256_castps256_ps128(values), high = _mm256_extractf128_ps(values, 1);
  _mm256_storeu_pd(totals, _mm256_add_pd(_mm256_loadu_pd(totals), _mm256_cvtps_pd(low)));
  _mm256_storeu_pd(totals + 4, _mm256_add_pd(_mm256_loadu_pd(totals + 4), _mm256_cvtps_pd(high)));
}

}  // namespace

}  // namespace diffmem::group_norm_silu

#include "group_norm_silu/group_norm_silu_simd.h"

namespace diffmem::group_norm_silu {
const Kernels* avx2_kernels() { return &kTable; }
}  // namespace diffmem::group_norm_silu

#else

namespace diffmem::group_norm_silu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace diffmem::group_norm_silu

#endif
