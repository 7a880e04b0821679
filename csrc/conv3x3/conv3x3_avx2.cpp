// Winograd convolution with AVX2 and FMA: products of six tiles by sixteen outputs, twelve sums in registers.
#include "conv3x3/conv3x3.h"
#include "cpu/simd.h"

#ifdef DIFFMEM_AVX2

#include <immintrin.h>

namespace diffmem::conv3x3 {

namespace {

using Floats = __m256;
using Doubles = __m256d;
constexpr int kLanes = 8;
constexpr int kRows = 6, kPanels = 1, kSumRows = 4;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load_part(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats value) { _mm256_storeu_ps(p, value); }
inline void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
inline Floats set1(float value) { return _mm256_set1_ps(value); }
inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats add(Floats x, Floats y) { return _mm256_add_ps(x, y); }
inline Floats sub(Floats x, Floats y) { return _mm256_sub_ps(x, y); }
inline Floats multiply(Floats x, Floats y) { return _mm256_mul_ps(x, y); }
inline Floats multiply_add(Floats x, Floats y, Floats z) { return _mm256_fmadd_ps(x, y, z); }
inline Floats negative_multiply_add(Floats x, Floats y, Floats z) { return _mm256_fnmadd_ps(x, y, z); }

inline Doubles load_doubles(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline void store_floats(float* p, Doubles value) { _mm_storeu_ps(p, _mm256_cvtpd_ps(value)); }
inline Doubles set1(double value) { return _mm256_set1_pd(value); }
inline Doubles multiply(Doubles x, Doubles y) { return _mm256_mul_pd(x, y); }
inline Doubles multiply_add(Doubles x, Doubles y, Doubles z) { return _mm256_fmadd_pd(x, y, z); }
inline Doubles negative_multiply_add(Doubles x, Doubles y, Doubles z) { return _mm256_fnmadd_pd(x, y, z); }

}  // namespace

}  // namespace diffmem::conv3x3

#include "conv3x3/conv3x3_simd.h"

namespace diffmem::conv3x3 {
const Kernels* avx2_kernels() { return &kTable; }
}  // namespace diffmem::conv3x3

#else

namespace diffmem::conv3x3 {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace diffmem::conv3x3

#endif
