// AVX-512/VNNI instance of the scan's inner loops (vector_scan_simd.h). Compiles to nothing without those instructions.
//
// VPDPBUSD multiplies 64 bytes with 64 others and adds them to 16 sums: four times the products of a float32
// multiply-add.
#include "cpu/simd.h"
#include "vector_scan/vector_scan.h"

#ifdef DIFFMEM_AVX512
#include <immintrin.h>

namespace {

struct V {
  static constexpr int kLanes = 16;
  static constexpr int kStripRows = 12;  // 12 x 2 accumulators, 2 panel vectors and a query's four bytes
  static constexpr int kTilePanels = 2;
  static constexpr int kLevels = 127;
  using Int = __m512i;
  using Float = __m512;

  static Int zero() { return _mm512_setzero_si512(); }
  static Int load(const void* p) { return _mm512_loadu_si512(p); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Int broadcast(std::int32_t a) { return _mm512_set1_epi32(a); }
  static Float all(float a) { return _mm512_set1_ps(a); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int left(Int a, int bits) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits)); }
  static Int dot4(Int acc, Int rows, Int query) {
    // In assembly, or GCC moves accumulators about: 92 instead of 175 G products/s a core.
#if defined(__GNUC__)
    asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(rows), "v"(query));
    return acc;
#else
    return _mm512_dpbusd_epi32(acc, rows, query);
#endif
  }
  static std::int32_t sum(Int a) { return _mm512_reduce_add_epi32(a); }
  static Float real(Int a) { return _mm512_cvtepi32_ps(a); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static std::uint32_t at_least(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static void transpose16(const std::uint8_t* points, std::size_t stride, std::uint8_t* panel) {
    Int r[16];
    for (int i = 0; i < 16; ++i) r[i] = load(points + i * stride);
    Int t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // r[4 b + j]: step 4 lane + j of rows 4 b … 4 b + 3
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
      const Int low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);  // lanes 0 and 2 of rows 0-3 and 4-7
      const Int high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
      const Int low_odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
      const Int high_odd = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
      _mm512_storeu_si512(panel + 64 * j, _mm512_shuffle_i32x4(low, high, 0x88));
      _mm512_storeu_si512(panel + 64 * (8 + j), _mm512_shuffle_i32x4(low, high, 0xDD));
      _mm512_storeu_si512(panel + 64 * (4 + j), _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
      _mm512_storeu_si512(panel + 64 * (12 + j), _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD));
    }
  }
};

}  // namespace

#include "vector_scan/vector_scan_simd.h"

namespace diffmem::vector_scan {
const Kernels* avx512_kernels() { return &kTable; }
}  // namespace diffmem::vector_scan

#else

namespace diffmem::vector_scan {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace diffmem::vector_scan

#endif
