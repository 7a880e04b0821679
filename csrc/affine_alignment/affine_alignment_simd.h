// The sums of the affine alignment for instruction sets with vectors of four doubles; included by the file of one,
// which says what eight doubles are: Eight with store, zero, of (eight floats), set1, add and multiply. Every sum
// is rounded as the plain loop of affine_alignment_cpu.cpp rounds it, in its order.
#include <immintrin.h>

#include "affine_alignment/affine_alignment.h"

namespace diffmem::affine_alignment {

namespace {

inline double clamped(double value, double last) { return value < 0 ? 0 : last < value ? last : value; }

template <int CHANNELS>
void sum_channels(const Job& job, Moments& moments) {
  const std::int64_t width = job.width, pixels = job.h * job.w;
  const double last_x = static_cast<double>(width - 1), last_y = static_cast<double>(job.height - 1);
  const double center_x = last_x / 2, center_y = last_y / 2;
  const double* const map = job.map;
  // Of value, its two derivatives and the template's: the first and the second factor of each of `Moments::products`.
  const __m256i first = _mm256_setr_epi32(1, 1, 2, 1, 2, 1, 2, 0), second = _mm256_setr_epi32(1, 2, 2, 0, 0, 3, 3, 0);
  __m256d plain[CHANNELS], times_x[CHANNELS], times_y[CHANNELS];
  for (int c = 0; c < CHANNELS; ++c) plain[c] = times_x[c] = times_y[c] = _mm256_setzero_pd();
  Eight sums[6];
  for (int j = 0; j < 6; ++j) sums[j] = Eight::zero();
  double value_wanted = 0;
  for (std::int64_t row = 0; row < job.h; ++row) {
    const double y = static_cast<double>(row) - static_cast<double>(job.h - 1) / 2;
    for (std::int64_t column = 0; column < job.w; ++column) {
      const double x = static_cast<double>(column) - static_cast<double>(job.w - 1) / 2;
      const double at_x = clamped(map[0] * x + map[1] * y + map[2] + center_x, last_x);
      const double at_y = clamped(map[3] * x + map[4] * y + map[5] + center_y, last_y);
      const auto left = static_cast<std::int64_t>(at_x), top = static_cast<std::int64_t>(at_y);
      const auto u = static_cast<float>(at_x - static_cast<double>(left));
      const auto v = static_cast<float>(at_y - static_cast<double>(top));
      const std::int64_t right = left + 1 < width ? kStacked * CHANNELS : 0;
      const std::int64_t below = top + 1 < job.height ? kStacked * CHANNELS * width : 0;
      const float* const corner = job.stacked + (top * width + left) * kStacked * CHANNELS;
      const float* const wanted = job.wanted + row * job.w + column;
      const __m128 weights[4] = {_mm_set1_ps((1 - v) * (1 - u)), _mm_set1_ps((1 - v) * u), _mm_set1_ps(v * (1 - u)),
                                 _mm_set1_ps(v * u)};
      const __m256d xs = _mm256_set1_pd(x), ys = _mm256_set1_pd(y);
      __m256 products = _mm256_setzero_ps();
      __m128 with_wanted = _mm_setzero_ps();
      for (int c = 0; c < CHANNELS; ++c) {
        const float* const at = corner + c * kStacked;
        __m128 read = _mm_mul_ps(weights[0], _mm_loadu_ps(at));
        read = _mm_add_ps(read, _mm_mul_ps(weights[1], _mm_loadu_ps(at + right)));
        read = _mm_add_ps(read, _mm_mul_ps(weights[2], _mm_loadu_ps(at + below)));
        read = _mm_add_ps(read, _mm_mul_ps(weights[3], _mm_loadu_ps(at + below + right)));
        const __m256d wide = _mm256_cvtps_pd(read);
        plain[c] = _mm256_add_pd(plain[c], wide);
        times_x[c] = _mm256_add_pd(times_x[c], _mm256_mul_pd(wide, xs));
        times_y[c] = _mm256_add_pd(times_y[c], _mm256_mul_pd(wide, ys));
        const __m128 goal = _mm_set1_ps(wanted[c * pixels]), four = _mm_blend_ps(read, goal, 8);
        const __m256 twice = _mm256_set_m128(four, four);
        products = _mm256_add_ps(
            products, _mm256_mul_ps(_mm256_permutevar_ps(twice, first), _mm256_permutevar_ps(twice, second)));
        with_wanted = _mm_add_ss(with_wanted, _mm_mul_ss(read, goal));
      }
      const Eight wide = Eight::of(products);
      sums[0] = Eight::add(sums[0], wide);
      const double of[6] = {1, x, y, x * x, x * y, y * y};
      for (int j = 1; j < 6; ++j) sums[j] = Eight::add(sums[j], Eight::multiply(wide, Eight::set1(of[j])));
      value_wanted += static_cast<double>(_mm_cvtss_f32(with_wanted));
    }
  }
  for (int c = 0; c < CHANNELS; ++c) {
    double of[3][4];
    _mm256_storeu_pd(of[0], plain[c]);
    _mm256_storeu_pd(of[1], times_x[c]);
    _mm256_storeu_pd(of[2], times_y[c]);
    double* const to = moments.columns + c * kColumns;
    for (int i = 0; i < 3; ++i) to[i] = of[0][i];
    to[3] = of[1][1];
    to[4] = of[2][1];
    to[5] = of[1][2];
    to[6] = of[2][2];
  }
  for (int j = 0; j < 6; ++j) Eight::store(moments.products[j], sums[j]);
  moments.value_wanted = value_wanted;
}

bool sum(const Job& job, Moments& moments) {
  switch (job.channels) {
    case 1: sum_channels<1>(job, moments); return true;
    case 3: sum_channels<3>(job, moments); return true;
    default: return false;
  }
}

const Kernels kTable = {sum};

}  // namespace

}  // namespace diffmem::affine_alignment
