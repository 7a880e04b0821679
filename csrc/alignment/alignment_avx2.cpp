// The products of the alignment with AVX2 and FMA: three vectors of eight templates against four windows at a time.
#include "alignment/alignment.h"
#include "cpu/simd.h"

#ifdef DIFFMEM_AVX2

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
    const __m256 before = _mm256_load_ps(best);
    const __m256 higher = _mm256_cmp_ps(values, before, _CMP_GT_OQ);
    _mm256_store_ps(best, _mm256_blendv_ps(before, values, higher));
    const auto at = reinterpret_cast<__m256i*>(position);
    _mm256_store_si256(
        at, _mm256_blendv_epi8(_mm256_load_si256(at), _mm256_set1_epi32(window), _mm256_castps_si256(higher)));
  }
};

using Wide = Narrow;
constexpr bool kUsesWide = false;
constexpr int kWindows = 4;

}  // namespace

}  // namespace diffmem::alignment

#include "alignment/alignment_simd.h"

namespace diffmem::alignment {
const Kernels* avx2_kernels() { return &kTable; }
}  // namespace diffmem::alignment

#else

namespace diffmem::alignment {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace diffmem::alignment

#endif
