// The products of the alignment with AVX-512: vectors of sixteen and of eight templates against nine windows at a time.
#include "alignment/alignment.h"
#include "cpu/simd.h"

#ifdef DIFFMEM_AVX512

#include <immintrin.h>

namespace diffmem::alignment {

namespace {

struct Narrow {
  using Floats = __m256;
  static constexpr int kLanes = 8;
  static Floats load(const float* p) { return _mm256_load_ps(p); }
  static Floats set1(float value) { return _mm256_set1_ps(value); }
  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static void raise(Floats values, std::int32_t window, float* best, std::int32_t* position) {
    const __mmask8 higher = _mm256_cmp_ps_mask(values, _mm256_load_ps(best), _CMP_GT_OQ);
    _mm256_mask_store_ps(best, higher, values);
    _mm256_mask_store_epi32(position, higher, _mm256_set1_epi32(window));
  }
};

struct Wide {
  using Floats = __m512;
  static constexpr int kLanes = 16;
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }  // every other one of 24 lanes is half a line off
  static Floats set1(float value) { return _mm512_set1_ps(value); }
  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static void raise(Floats values, std::int32_t window, float* best, std::int32_t* position) {
    const __mmask16 higher = _mm512_cmp_ps_mask(values, _mm512_load_ps(best), _CMP_GT_OQ);
    _mm512_mask_store_ps(best, higher, values);
    _mm512_mask_store_epi32(position, higher, _mm512_set1_epi32(window));
  }
};

constexpr bool kUsesWide = true;
constexpr int kWindows = 9;

}  // namespace

}  // namespace diffmem::alignment

#include "alignment/alignment_simd.h"

namespace diffmem::alignment {
const Kernels* avx512_kernels() { return &kTable; }
}  // namespace diffmem::alignment

#else

namespace diffmem::alignment {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace diffmem::alignment

#endif
