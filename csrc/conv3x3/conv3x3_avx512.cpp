// Winograd convolution with AVX-512: products of up to fourteen tiles by thirty-two outputs, twenty-eight sums in
// registers.
#include "conv3x3/conv3x3.h"
#include "cpu/simd.h"

#ifdef DIFFMEM_AVX512

#include <immintrin.h>

namespace diffmem::conv3x3 {

namespace {

using Floats = __m512;
using Doubles = __m512d;
constexpr int kLanes = 16;
constexpr int kRows = 14, kPanels = 2, kSumRows = 8;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load_part(const float* p) { return _mm512_maskz_loadu_ps(0xff, p); }
inline void store(float* p, Floats value) { _mm512_storeu_ps(p, value); }
inline void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
inline Floats set1(float value) { return _mm512_set1_ps(value); }
inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats add(Floats x, Floats y) { return _mm512_add_ps(x, y); }
inline Floats sub(Floats x, Floats y) { return _mm512_sub_ps(x, y); }
inline Floats multiply(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
inline Floats multiply_add(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
inline Floats negative_multiply_add(Floats x, Floats y, Floats z) { return _mm512_fnmadd_ps(x, y, z); }

inline Doubles load_doubles(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline void store_floats(float* p, Doubles value) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(value)); }
inline Doubles set1(double value) { return _mm512_set1_pd(value); }
inline Doubles multiply(Doubles x, Doubles y) { return _mm512_mul_pd(x, y); }
inline Doubles multiply_add(Doubles x, Doubles y, Doubles z) { return _mm512_fmadd_pd(x, y, z); }
inline Doubles negative_multiply_add(Doubles x, Doubles y, Doubles z) { return _mm512_fnmadd_pd(x, y, z); }

}  // namespace

}  // namespace diffmem::conv3x3

#include "conv3x3/conv3x3_simd.h"

namespace diffmem::conv3x3 {
const Kernels* avx512_kernels() { return &kTable; }
}  // namespace diffmem::conv3x3

#else

namespace diffmem::conv3x3 {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace diffmem::conv3x3

#endif
