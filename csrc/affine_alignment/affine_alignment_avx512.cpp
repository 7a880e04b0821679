// The sums of the affine alignment with AVX-512.
#include "affine_alignment/affine_alignment.h"
#include "cpu/simd.h"

#ifdef DIFFMEM_AVX512

#include <immintrin.h>

namespace diffmem::affine_alignment {

namespace {

struct Eight {
  __m512d all;
  static Eight zero() { return {_mm512_setzero_pd()}; }
  static Eight set1(double value) { return {_mm512_set1_pd(value)}; }
  static Eight of(__m256 floats) { return {_mm512_cvtps_pd(floats)}; }
  static Eight add(Eight a, Eight b) { return {_mm512_add_pd(a.all, b.all)}; }
  static Eight multiply(Eight a, Eight b) { return {_mm512_mul_pd(a.all, b.all)}; }
  static void store(double* to, Eight a) { _mm512_storeu_pd(to, a.all); }
};

}  // namespace

}  // namespace diffmem::affine_alignment

#include "affine_alignment/affine_alignment_simd.h"

namespace diffmem::affine_alignment {
const Kernels* avx512_kernels() { return &kTable; }
}  // namespace diffmem::affine_alignment

#else

namespace diffmem::affine_alignment {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace diffmem::affine_alignment

#endif
