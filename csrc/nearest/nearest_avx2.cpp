// AVX2 instance of the search's inner loops (nearest_simd.h). Compiled with -mavx2 -mfma; compiles to nothing
// elsewhere.
#include "cpu/simd.h"
#include "nearest/nearest.h"

#ifdef DIFFMEM_AVX2
#include <immintrin.h>

namespace {

struct V {
  using Int = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kStripRows =
      6;  // 6 x 2 accumulators + 2 panel vectors + 1 broadcast + 1 product: all 16 registers
  static constexpr std::size_t kBytes = 32;

  static Int zero() { return _mm256_setzero_si256(); }
  static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Int a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int broadcast(std::int32_t a) { return _mm256_set1_epi32(a); }
  static Int madd(Int acc, Int a, Int b) {
#if defined(__GNUC__)
    // In assembly: from the intrinsics GCC hoists a step's broadcasts to its top and spills half of the accumulators
    // (48 instead of 9x GMAC/s a core in `tile`); tamed with empty asm statements, it still copies each accumulator
    // (75).
    Int products;
    asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(a), "xm"(b));
    return acc;
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#endif
  }
  static std::uint32_t greater(Int a, Int b) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b))));
  }
  static std::int32_t sum(Int a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
  }
  static void sum4(Int a, Int b, Int c, Int d, std::int32_t* out) {
    const Int s = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1)));
  }
  static Int square_difference(Int acc, const std::uint8_t* x, const std::uint8_t* y) {
    const Int a = load(x);
    const Int b = load(y);
    const Int gap = _mm256_or_si256(_mm256_subs_epu8(a, b), _mm256_subs_epu8(b, a));  // |a - b|
    const Int low = _mm256_unpacklo_epi8(gap, zero());
    const Int high = _mm256_unpackhi_epi8(gap, zero());
    return _mm256_add_epi32(_mm256_add_epi32(acc, _mm256_madd_epi16(low, low)), _mm256_madd_epi16(high, high));
  }
  // 16 values of 16 points into 8 coordinate pairs of a panel: two 8 x 8 transposes of 32-bit elements.
  static void pack16x16(const std::uint8_t* points, std::size_t stride, std::int16_t* panel) {
    for (int half = 0; half < 2; ++half) {
      Int r[8];
      for (int i = 0; i < 8; ++i) {
        const void* p = points + (8 * half + i) * stride;
        r[i] = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))),
                                _mm256_set1_epi16(128));
      }
      Int t[8];
      for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
      }
      Int u[8];
      for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
      }
      for (int i = 0; i < 4; ++i) {
        store(panel + 32 * i + 16 * half, _mm256_permute2x128_si256(u[i], u[i + 4], 0x20));
        store(panel + 32 * (i + 4) + 16 * half, _mm256_permute2x128_si256(u[i], u[i + 4], 0x31));
      }
    }
  }
  static __m256d wide(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static __m256d wide(const double* p) { return _mm256_loadu_pd(p); }
  template <class Real>
  static void accumulate(double* sums, const Real* x, const Real* y, std::size_t count) {
    __m256d low = _mm256_loadu_pd(sums);
    __m256d high = _mm256_loadu_pd(sums + 4);
    for (std::size_t j = 0; j < count; j += 8) {  // no FMA: the product is rounded, as on every other path
      const __m256d a = _mm256_sub_pd(wide(x + j), wide(y + j));
      const __m256d b = _mm256_sub_pd(wide(x + j + 4), wide(y + j + 4));
      low = _mm256_add_pd(low, _mm256_mul_pd(a, a));
      high = _mm256_add_pd(high, _mm256_mul_pd(b, b));
    }
    _mm256_storeu_pd(sums, low);
    _mm256_storeu_pd(sums + 4, high);
  }
};

}  // namespace

#include "nearest/nearest_simd.h"

namespace diffmem::nearest {
const Kernels* avx2_kernels() { return &kTable; }
}  // namespace diffmem::nearest

#else

namespace diffmem::nearest {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace diffmem::nearest

#endif
