// AVX-512/VNNI instance of the search's inner loops (nearest_simd.h). Compiles to nothing without those instructions.
//
// VPDPWSSD does the multiply-add and the accumulation in one instruction over 16 points: four times AVX2's rate per
// instruction. A panel is then one vector, so 12 accumulators (the instruction takes 5 cycles, two start per cycle).
#include "cpu/simd.h"
#include "nearest/nearest.h"

#ifdef DIFFMEM_AVX512
#include <immintrin.h>

namespace {

struct V {
  using Int = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kStripRows = 12;
  static constexpr std::size_t kBytes = 64;

  static Int zero() { return _mm512_setzero_si512(); }
  static Int load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Int a) { _mm512_storeu_si512(p, a); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int broadcast(std::int32_t a) { return _mm512_set1_epi32(a); }
  static Int madd(Int acc, Int a, Int b) { return _mm512_dpwssd_epi32(acc, a, b); }
  static std::uint32_t greater(Int a, Int b) { return _mm512_cmpgt_epi32_mask(a, b); }
  static std::int32_t sum(Int a) { return _mm512_reduce_add_epi32(a); }
  static void sum4(Int a, Int b, Int c, Int d, std::int32_t* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }
  static Int square_difference(Int acc, const std::uint8_t* x, const std::uint8_t* y) {
    const Int a = load(x);
    const Int b = load(y);
    const Int gap = _mm512_or_si512(_mm512_subs_epu8(a, b), _mm512_subs_epu8(b, a));
    const Int low = _mm512_unpacklo_epi8(gap, zero());
    const Int high = _mm512_unpackhi_epi8(gap, zero());
    return _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(acc, low, low), high, high);
  }
  static void pack16x16(const std::uint8_t* points, std::size_t stride, std::int16_t* panel) {
    for (std::size_t i = 0; i < 16; ++i) {
      for (std::size_t j = 0; j < 8; ++j) {
        panel[32 * j + 2 * i] = static_cast<std::int16_t>(points[i * stride + 2 * j] - 128);
        panel[32 * j + 2 * i + 1] = static_cast<std::int16_t>(points[i * stride + 2 * j + 1] - 128);
      }
    }
  }
  static __m512d wide(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static __m512d wide(const double* p) { return _mm512_loadu_pd(p); }
  template <class Real>
  static void accumulate(double* sums, const Real* x, const Real* y, std::size_t count) {
    __m512d total = _mm512_loadu_pd(sums);
    for (std::size_t j = 0; j < count; j += 8) {  // no FMA: the product is rounded, as on every other path
      const __m512d a = _mm512_sub_pd(wide(x + j), wide(y + j));
      total = _mm512_add_pd(total, _mm512_mul_pd(a, a));
    }
    _mm512_storeu_pd(sums, total);
  }
};

}  // namespace

#include "nearest/nearest_simd.h"

namespace diffmem::nearest {
const Kernels* avx512_kernels() { return &kTable; }
}  // namespace diffmem::nearest

#else

namespace diffmem::nearest {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace diffmem::nearest

#endif
