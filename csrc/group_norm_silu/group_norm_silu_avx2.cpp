// One block of channels of one image with AVX2 and FMA. Eight channels at a time stay in registers while their pixels
// are gone through; sums over pixels are taken in runs of 64, whose results are added in double.
#include "group_norm_silu/group_norm_silu.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>

#include <cmath>
#include <type_traits>

#include "cpu/simd.h"

namespace diffmem::group_norm_silu {

namespace {

constexpr std::int64_t kRun = 64;  // pixels that are summed in float

// 1/(1 + 2^t), t = −v·log2(e) = n + f with a whole n and |f| ≤ ½: a polynomial for 2^f (Cephes' exp2f, relative error
// 2·10^-7), and n put into the exponent. Adding 1.5·2^23 + 127 to t leaves n + 127 in the lowest bits. v is held
// between ±87, beyond which the exponent would overflow.
inline __m256 sigmoid(__m256 v) {
  const __m256 one = _mm256_set1_ps(1.0f), log2e = _mm256_set1_ps(1.44269504088896341f);
  const __m256 magic = _mm256_set1_ps(12582912.0f + 127.0f);
  // The bounds come first: where v is NaN, min and max return their second argument.
  v = _mm256_max_ps(_mm256_set1_ps(-87.0f), _mm256_min_ps(_mm256_set1_ps(87.0f), v));
  const __m256 shifted = _mm256_fnmadd_ps(v, log2e, magic);
  const __m256 f = _mm256_fnmsub_ps(v, log2e, _mm256_sub_ps(shifted, magic));
  __m256 p = _mm256_set1_ps(1.535336188319500e-4f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.339887440266574e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.618437357674640e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.550332471162809e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.402264791363012e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.931472028550421e-1f));
  p = _mm256_fmadd_ps(p, f, one);
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
  return _mm256_div_ps(one, _mm256_fmadd_ps(p, power, one));
}

inline void add_to(double* totals, __m256 values) {
  _mm256_storeu_pd(totals, _mm256_add_pd(_mm256_loadu_pd(totals), _mm256_cvtps_pd(_mm256_castps256_ps128(values))));
  _mm256_storeu_pd(totals + 4,
                   _mm256_add_pd(_mm256_loadu_pd(totals + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1))));
}

// Per channel of a block. The deviation of x from the group's mean, z − mean = (x − high) − low, is a float and what
// the float could not hold; `low` is folded into whatever is added to x − high afterwards.
struct Center {
  alignas(32) float high[kMaxChannels], low[kMaxChannels];

  void set(std::int64_t i, double value) {
    high[i] = static_cast<float>(value);
    low[i] = static_cast<float>(value - high[i]);
  }
};

struct Affine {
  alignas(32) float gain[kMaxChannels], offset[kMaxChannels];

  Affine(const Parameters& p, std::int64_t image, std::int64_t first, std::int64_t last) {
    for (std::int64_t c = first; c < last; ++c) {
      const float factor = p.scale == nullptr ? 1.0f : 1.0f + p.scale[image * p.scale_stride + c];
      const float shift = p.scale == nullptr ? 0.0f : p.shift[image * p.shift_stride + c];
      gain[c - first] = p.weight[c] * factor;
      offset[c - first] = p.bias[c] * factor + shift;
    }
  }
};

// Calls work(std::integral_constant<int, W>, i) for the vectors of 8 channels at i, i + 8, …, four (W) at once while
// there are as many: enough independent sums to keep the adders busy, and whole cache lines.
template <class Work>
inline void for_vectors(std::int64_t width, const Work& work) {
  std::int64_t i = 0;
  for (; i + 32 <= width; i += 32) work(std::integral_constant<int, 4>(), i);
  for (; i < width; i += 8) work(std::integral_constant<int, 1>(), i);
}

inline double added_to(const Parameters& p, std::int64_t image, std::int64_t channel) {
  return p.added == nullptr ? 0.0 : p.added[image * p.added_stride + channel];
}

void forward(const Shape& shape, const Parameters& parameters, std::int64_t image, std::int64_t first,
             std::int64_t last, const float* x, float* y, double* mean, float* rstd) {
  const std::int64_t width = last - first, row = shape.channels, pixels = shape.pixels;
  const std::int64_t per_group = shape.channels / shape.groups;
  const double n = static_cast<double>(per_group) * static_cast<double>(pixels);
  const float* const in = x + image * pixels * row + first;
  float* const out = y + image * pixels * row + first;

  alignas(32) double totals[kMaxChannels], squares[kMaxChannels];
  simd::fill(totals, width, 0.0);
  simd::fill(squares, width, 0.0);
  Center center;
  for_vectors(width, [&](auto vectors, std::int64_t i) {
    constexpr int W = vectors;
    for (std::int64_t start = 0; start < pixels; start += kRun) {
      const std::int64_t stop = simd::min(pixels, start + kRun);
      __m256 sum[W];
      for (auto& each : sum) each = _mm256_setzero_ps();
      for (std::int64_t p = start; p < stop; ++p) {
        for (int w = 0; w < W; ++w) sum[w] = _mm256_add_ps(sum[w], _mm256_loadu_ps(in + p * row + i + 8 * w));
      }
      for (int w = 0; w < W; ++w) add_to(totals + i + 8 * w, sum[w]);
    }
  });
  // The group's mean as the float sums give it: near enough to take the deviations from, which then say what it lacks.
  for (std::int64_t i = 0; i < width; i += per_group) {
    double sum = 0;
    for (std::int64_t k = i; k < i + per_group; ++k)
      sum += totals[k] + static_cast<double>(pixels) * added_to(parameters, image, first + k);
    for (std::int64_t k = i; k < i + per_group; ++k) {
      center.set(k, sum / n - added_to(parameters, image, first + k));
      totals[k] = 0;
    }
    mean[image * shape.groups + (first + i) / per_group] = sum / n;
  }
  for_vectors(width, [&](auto vectors, std::int64_t i) {
    constexpr int W = vectors;
    for (std::int64_t start = 0; start < pixels; start += kRun) {
      const std::int64_t stop = simd::min(pixels, start + kRun);
      __m256 sum[W], square[W];
      for (int w = 0; w < W; ++w) sum[w] = square[w] = _mm256_setzero_ps();
      for (std::int64_t p = start; p < stop; ++p) {
        for (int w = 0; w < W; ++w) {
          const __m256 value = _mm256_loadu_ps(in + p * row + i + 8 * w);
          const __m256 d = _mm256_sub_ps(value, _mm256_load_ps(center.high + i + 8 * w));
          sum[w] = _mm256_add_ps(sum[w], d);
          square[w] = _mm256_fmadd_ps(d, d, square[w]);
        }
      }
      for (int w = 0; w < W; ++w) {
        add_to(totals + i + 8 * w, sum[w]);
        add_to(squares + i + 8 * w, square[w]);
      }
    }
  });
  Affine affine(parameters, image, first, last);
  for (std::int64_t i = 0; i < width; i += per_group) {
    double sum = 0, square = 0;
    for (std::int64_t k = i; k < i + per_group; ++k) {
      const double low = center.low[k], count = static_cast<double>(pixels);
      sum += totals[k] - count * low;
      square += squares[k] - low * (2 * totals[k] - count * low);
    }
    const double rest = sum / n;
    const std::int64_t group = image * shape.groups + (first + i) / per_group;
    mean[group] += rest;
    const double variance = simd::max(0.0, square / n - rest * rest);
    rstd[group] = static_cast<float>(1.0 / sqrt(variance + parameters.eps));
    for (std::int64_t k = i; k < i + per_group; ++k) {
      center.set(k, mean[group] - added_to(parameters, image, first + k));
      affine.gain[k] *= rstd[group];
      affine.offset[k] -= center.low[k] * affine.gain[k];
    }
  }
  for_vectors(width, [&](auto vectors, std::int64_t i) {
    constexpr int W = vectors;
    for (std::int64_t p = 0; p < pixels; ++p) {
      for (int w = 0; w < W; ++w) {
        const std::int64_t k = i + 8 * w;
        const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(in + p * row + k), _mm256_load_ps(center.high + k));
        __m256 v = _mm256_fmadd_ps(d, _mm256_load_ps(affine.gain + k), _mm256_load_ps(affine.offset + k));
        if (parameters.silu) v = _mm256_mul_ps(v, sigmoid(v));
        _mm256_storeu_ps(out + p * row + k, v);
      }
    }
  });
}

void backward(const Shape& shape, const Parameters& parameters, std::int64_t image, std::int64_t first,
              std::int64_t last, const float* dy, const float* x, const double* mean, const float* rstd, float* dx,
              float* sums) {
  const std::int64_t width = last - first, row = shape.channels, pixels = shape.pixels;
  const std::int64_t per_group = shape.channels / shape.groups, plane = shape.batch * shape.channels;
  const double n = static_cast<double>(per_group) * static_cast<double>(pixels);
  const std::int64_t begin = image * pixels * row + first;
  const float *const in = x + begin, *const gradient = dy + begin;
  float* const out = dx + begin;

  Center center;
  const Affine affine(parameters, image, first, last);
  alignas(32) float inverse[kMaxChannels], rest[kMaxChannels], scale[kMaxChannels], slope[kMaxChannels],
      constant[kMaxChannels];
  for (std::int64_t k = 0; k < width; ++k) {
    const std::int64_t group = image * shape.groups + (first + k) / per_group;
    center.set(k, mean[group] - added_to(parameters, image, first + k));
    inverse[k] = rstd[group];
    rest[k] = center.low[k] * inverse[k];
  }
  alignas(32) double totals[kMaxChannels], products[kMaxChannels];
  simd::fill(totals, width, 0.0);
  simd::fill(products, width, 0.0);
  const __m256 one = _mm256_set1_ps(1.0f);
  // g goes to dx until the sums over the group are known.
  for_vectors(width, [&](auto vectors, std::int64_t i) {
    constexpr int W = vectors;
    for (std::int64_t start = 0; start < pixels; start += kRun) {
      const std::int64_t stop = simd::min(pixels, start + kRun);
      __m256 total[W], product[W];
      for (int w = 0; w < W; ++w) total[w] = product[w] = _mm256_setzero_ps();
      for (std::int64_t p = start; p < stop; ++p) {
        for (int w = 0; w < W; ++w) {
          const std::int64_t k = i + 8 * w;
          const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(in + p * row + k), _mm256_load_ps(center.high + k));
          const __m256 xhat = _mm256_fmsub_ps(d, _mm256_load_ps(inverse + k), _mm256_load_ps(rest + k));
          __m256 g = _mm256_loadu_ps(gradient + p * row + k);
          if (parameters.silu) {
            const __m256 v = _mm256_fmadd_ps(xhat, _mm256_load_ps(affine.gain + k), _mm256_load_ps(affine.offset + k));
            const __m256 s = sigmoid(v);
            g = _mm256_mul_ps(g, _mm256_mul_ps(s, _mm256_fmadd_ps(v, _mm256_sub_ps(one, s), one)));
          }
          total[w] = _mm256_add_ps(total[w], g);
          product[w] = _mm256_fmadd_ps(g, xhat, product[w]);
          _mm256_storeu_ps(out + p * row + k, g);
        }
      }
      for (int w = 0; w < W; ++w) {
        add_to(totals + i + 8 * w, total[w]);
        add_to(products + i + 8 * w, product[w]);
      }
    }
  });
  // dx = rstd·(g·gain − c1 − x̂·c2) = g·scale − (x − high)·slope − constant
  for (std::int64_t i = 0; i < width; i += per_group) {
    double of_g = 0, of_product = 0;
    for (std::int64_t k = i; k < i + per_group; ++k) {
      of_g += affine.gain[k] * totals[k];
      of_product += affine.gain[k] * products[k];
    }
    for (std::int64_t k = i; k < i + per_group; ++k) {
      const std::int64_t at = image * row + first + k;
      sums[at] = static_cast<float>(totals[k]);
      sums[plane + at] = static_cast<float>(products[k]);
      scale[k] = affine.gain[k] * inverse[k];
      slope[k] = static_cast<float>(of_product / n * inverse[k] * inverse[k]);
      constant[k] = static_cast<float>(of_g / n * inverse[k]) - center.low[k] * slope[k];
      totals[k] = 0;
    }
  }
  for_vectors(width, [&](auto vectors, std::int64_t i) {
    constexpr int W = vectors;
    for (std::int64_t start = 0; start < pixels; start += kRun) {
      const std::int64_t stop = simd::min(pixels, start + kRun);
      __m256 total[W];
      for (auto& each : total) each = _mm256_setzero_ps();
      for (std::int64_t p = start; p < stop; ++p) {
        for (int w = 0; w < W; ++w) {
          const std::int64_t k = i + 8 * w;
          const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(in + p * row + k), _mm256_load_ps(center.high + k));
          const __m256 g = _mm256_loadu_ps(out + p * row + k);
          const __m256 result =
              _mm256_fnmadd_ps(d, _mm256_load_ps(slope + k),
                               _mm256_fmsub_ps(g, _mm256_load_ps(scale + k), _mm256_load_ps(constant + k)));
          total[w] = _mm256_add_ps(total[w], result);
          _mm256_storeu_ps(out + p * row + k, result);
        }
      }
      for (int w = 0; w < W; ++w) add_to(totals + i + 8 * w, total[w]);
    }
  });
  for (std::int64_t k = 0; k < width; ++k) sums[2 * plane + image * row + first + k] = static_cast<float>(totals[k]);
}

const Kernels kTable = {forward, backward};

}  // namespace

const Kernels* avx2_kernels() { return &kTable; }

}  // namespace diffmem::group_norm_silu

#else

namespace diffmem::group_norm_silu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace diffmem::group_norm_silu

#endif
