// AVX2 instance of the scan's inner loops (vector_scan_simd.h). Compiles to nothing without those instructions.
//
// VPMADDUBSW adds two products of bytes in 16 bits and saturates: queries get 63 levels, since 2 * 255 * 63 < 2^15.
// Three instructions for 32 products, where float32 takes four.
#include "cpu/simd.h"
#include "vector_scan/vector_scan.h"

#ifdef DIFFMEM_AVX2
#include <immintrin.h>

namespace {

alignas(32) constexpr std::int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

struct V {
  static constexpr int kLanes = 8;
  static constexpr int kStripRows = 6;  // 6 x 2 accumulators, 2 panel vectors, a query's four bytes, their products
  static constexpr int kTilePanels = 1;
  static constexpr int kLevels = 63;
  using Int = __m256i;
  using Float = __m256;

  static Int zero() { return _mm256_setzero_si256(); }
  static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Int broadcast(std::int32_t a) { return _mm256_set1_epi32(a); }
  static Float all(float a) { return _mm256_set1_ps(a); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int left(Int a, int bits) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(bits)); }
  static Int dot4(Int acc, Int rows, Int query) {
#if defined(__GNUC__)  // in assembly, or GCC spills accumulators (nearest_avx2.cpp)
    Int products;
    asm volatile("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
                 : "+x"(acc), "=&x"(products)
                 : "x"(rows), "x"(query), "m"(*reinterpret_cast<const __m256i*>(kOnes)));
    return acc;
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(rows, query), load(kOnes)));
#endif
  }
  static std::int32_t sum(Int a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
  }
  static Float real(Int a) { return _mm256_cvtepi32_ps(a); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static std::uint32_t at_least(Float a, Float b) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
  }
  static void transpose16(const std::uint8_t* points, std::size_t stride, std::uint8_t* panel) {
    for (int rows = 0; rows < 16; rows += 8) {
      for (int half = 0; half < 2; ++half) {
        Int r[8];
        for (int i = 0; i < 8; ++i) r[i] = load(points + (rows + i) * stride + 32 * half);
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
          std::uint8_t* low = panel + 64 * (8 * half + i) + 4 * rows;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm256_permute2x128_si256(u[i], u[i + 4], 0x20));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + 256), _mm256_permute2x128_si256(u[i], u[i + 4], 0x31));
        }
      }
    }
  }
};

}  // namespace

#include "vector_scan/vector_scan_simd.h"

namespace diffmem::vector_scan {
const Kernels* avx2_kernels() { return &kTable; }
}  // namespace diffmem::vector_scan

#else

namespace diffmem::vector_scan {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace diffmem::vector_scan

#endif
