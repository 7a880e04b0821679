// The sums of the affine alignment with AVX2.
#include "affine_alignment/affine_alignment.h"
#include "cpu/simd.h"

#ifdef DIFFMEM_AVX2

#include <immintrin.h>

namespace diffmem::affine_alignment {

namespace {

struct Eight {
  __m256d low, high;
  static Eight zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static Eight set1(double value) { return {_mm256_set1_pd(value), _mm256_set1_pd(value)}; }
  static Eight of(__m256 floats) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(floats)), _mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1))};
  }
  static Eight add(Eight a, Eight b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
  static Eight multiply(Eight a, Eight b) { return {_mm256_mul_pd(a.low, b.low), _mm256_mul_pd(a.high, b.high)}; }
  static void store(double* to, Eight a) {
    _mm256_storeu_pd(to, a.low);
    _mm256_storeu_pd(to + 4, a.high);
  }
};

}  // namespace

}  // namespace diffmem::affine_alignment

#include "affine_alignment/affine_alignment_simd.h"

namespace diffmem::affine_alignment {
const Kernels* avx2_kernels() { return &kTable; }
}  // namespace diffmem::affine_alignment

#else

namespace diffmem::affine_alignment {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace diffmem::affine_alignment

#endif
