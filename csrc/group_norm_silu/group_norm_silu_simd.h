// One block of channels of one image, for every instruction set; included by the file of one, which says what its
// vectors are: Floats of kLanes numbers with load, store, load_part and store_part (8 of them), set1, zero, add, sub,
// multiply, multiply_add (a·b + c), multiply_subtract (a·b − c), their negatives (c − a·b, −a·b − c), lowest, highest,
// to_exponent (2ⁿ of n + 127 in the lowest bits), inverse_of and add_to (to doubles). A few vectors stay in registers
// while their pixels are gone through; sums over pixels are taken in runs of 64, whose results are added in double.
#include <cmath>

#include "cpu/simd.h"

namespace diffmem::group_norm_silu {

namespace {

constexpr std::int64_t kRun = 64;  // pixels that are summed in float

// 1/(1 + 2^t), t = −v·log2(e) = n + f with a whole n and |f| ≤ ½: a polynomial for 2^f (Cephes' exp2f, relative error
// 2·10^-7), and n put into the exponent. Adding 1.5·2^23 + 127 to t leaves n + 127 in the lowest bits. v is held
// between ±87, beyond which the exponent would overflow.
inline Floats sigmoid(Floats v) {
  const Floats one = set1(1.0f), log2e = set1(1.44269504088896341f);
  const Floats magic = set1(12582912.0f + 127.0f);
  // The bounds come first: where v is NaN, min and max return their second argument.
  v = highest(set1(-87.0f), lowest(set1(87.0f), v));
  const Floats shifted = negative_multiply_add(v, log2e, magic);
  const Floats f = negative_multiply_subtract(v, log2e, sub(shifted, magic));
  Floats p = set1(1.535336188319500e-4f);
  p = multiply_add(p, f, set1(1.339887440266574e-3f));
  p = multiply_add(p, f, set1(9.618437357674640e-3f));
  p = multiply_add(p, f, set1(5.550332471162809e-2f));
  p = multiply_add(p, f, set1(2.402264791363012e-1f));
  p = multiply_add(p, f, set1(6.931472028550421e-1f));
  p = multiply_add(p, f, one);
  return inverse_of(multiply_add(p, to_exponent(shifted), one));
}

// Per channel of a block. The deviation of x from the group's mean, z − mean = (x − high) − low, is a float and what
// the float could not hold; `low` is folded into whatever is added to x − high afterwards.
struct Center {
  alignas(64) float high[kMaxChannels], low[kMaxChannels];

  void set(std::int64_t i, double value) {
    high[i] = static_cast<float>(value);
    low[i] = static_cast<float>(value - high[i]);
  }
};

struct Affine {
  alignas(64) float gain[kMaxChannels], offset[kMaxChannels];

  Affine(const Parameters& p, std::int64_t image, std::int64_t first, std::int64_t last) {
    for (std::int64_t c = first; c < last; ++c) {
      const float factor = p.scale == nullptr ? 1.0f : 1.0f + p.scale[image * p.scale_stride + c];
      const float shift = p.scale == nullptr ? 0.0f : p.shift[image * p.shift_stride + c];
      gain[c - first] = p.weight[c] * factor;
      offset[c - first] = p.bias[c] * factor + shift;
    }
  }
};

// Vectors that are gone through together, and whether they are 8 channels instead of kLanes.
template <int COUNT, bool PART>
struct Vectors {
  static constexpr int kCount = COUNT;
  static constexpr bool kPart = PART;
};

template <bool PART>
inline Floats read(const float* p) {
  if constexpr (PART) return load_part(p);
  return load(p);
}

template <bool PART>
inline void write(float* p, Floats value) {
  if constexpr (PART) return store_part(p, value);
  store(p, value);
}

// Calls work(Vectors<W, PART>(), i) for the channels from i on, several (W) vectors at once while there are as many:
// enough independent sums to keep the adders busy, and whole cache lines.
template <class Work>
inline void for_vectors(std::int64_t width, const Work& work) {
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) work(Vectors<4, false>(), i);
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) work(Vectors<2, false>(), i);
  for (; i + kLanes <= width; i += kLanes) work(Vectors<1, false>(), i);
  if (i < width) work(Vectors<1, true>(), i);
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

  alignas(64) double totals[kMaxChannels], squares[kMaxChannels];
  simd::fill(totals, width, 0.0);
  simd::fill(squares, width, 0.0);
  Center center;
  for_vectors(width, [&](auto vectors, std::int64_t i) {
    constexpr int W = vectors.kCount;
    constexpr bool PART = vectors.kPart;
    for (std::int64_t start = 0; start < pixels; start += kRun) {
      const std::int64_t stop = simd::min(pixels, start + kRun);
      Floats sum[W];
      for (auto& each : sum) each = zero();
      for (std::int64_t p = start; p < stop; ++p) {
        for (int w = 0; w < W; ++w) sum[w] = add(sum[w], read<PART>(in + p * row + i + kLanes * w));
      }
      for (int w = 0; w < W; ++w) add_to(totals + i + kLanes * w, sum[w]);
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
    constexpr int W = vectors.kCount;
    constexpr bool PART = vectors.kPart;
    for (std::int64_t start = 0; start < pixels; start += kRun) {
      const std::int64_t stop = simd::min(pixels, start + kRun);
      Floats sum[W], square[W];
      for (int w = 0; w < W; ++w) sum[w] = square[w] = zero();
      for (std::int64_t p = start; p < stop; ++p) {
        for (int w = 0; w < W; ++w) {
          const Floats value = read<PART>(in + p * row + i + kLanes * w);
          const Floats d = sub(value, load(center.high + i + kLanes * w));
          sum[w] = add(sum[w], d);
          square[w] = multiply_add(d, d, square[w]);
        }
      }
      for (int w = 0; w < W; ++w) {
        add_to(totals + i + kLanes * w, sum[w]);
        add_to(squares + i + kLanes * w, square[w]);
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
    constexpr int W = vectors.kCount;
    constexpr bool PART = vectors.kPart;
    for (std::int64_t p = 0; p < pixels; ++p) {
      for (int w = 0; w < W; ++w) {
        const std::int64_t k = i + kLanes * w;
        const Floats d = sub(read<PART>(in + p * row + k), load(center.high + k));
        Floats v = multiply_add(d, load(affine.gain + k), load(affine.offset + k));
        if (parameters.silu) v = multiply(v, sigmoid(v));
        write<PART>(out + p * row + k, v);
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
  alignas(64) float inverse[kMaxChannels], rest[kMaxChannels], scale[kMaxChannels], slope[kMaxChannels],
      constant[kMaxChannels];
  for (std::int64_t k = 0; k < width; ++k) {
    const std::int64_t group = image * shape.groups + (first + k) / per_group;
    center.set(k, mean[group] - added_to(parameters, image, first + k));
    inverse[k] = rstd[group];
    rest[k] = center.low[k] * inverse[k];
  }
  alignas(64) double totals[kMaxChannels], products[kMaxChannels];
  simd::fill(totals, width, 0.0);
  simd::fill(products, width, 0.0);
  const Floats one = set1(1.0f);
  // g goes to dx until the sums over the group are known.
  for_vectors(width, [&](auto vectors, std::int64_t i) {
    constexpr int W = vectors.kCount;
    constexpr bool PART = vectors.kPart;
    for (std::int64_t start = 0; start < pixels; start += kRun) {
      const std::int64_t stop = simd::min(pixels, start + kRun);
      Floats total[W], product[W];
      for (int w = 0; w < W; ++w) total[w] = product[w] = zero();
      for (std::int64_t p = start; p < stop; ++p) {
        for (int w = 0; w < W; ++w) {
          const std::int64_t k = i + kLanes * w;
          const Floats d = sub(read<PART>(in + p * row + k), load(center.high + k));
          const Floats xhat = multiply_subtract(d, load(inverse + k), load(rest + k));
          Floats g = read<PART>(gradient + p * row + k);
          if (parameters.silu) {
            const Floats v = multiply_add(xhat, load(affine.gain + k), load(affine.offset + k));
            const Floats s = sigmoid(v);
            g = multiply(g, multiply(s, multiply_add(v, sub(one, s), one)));
          }
          total[w] = add(total[w], g);
          product[w] = multiply_add(g, xhat, product[w]);
          write<PART>(out + p * row + k, g);
        }
      }
      for (int w = 0; w < W; ++w) {
        add_to(totals + i + kLanes * w, total[w]);
        add_to(products + i + kLanes * w, product[w]);
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
    constexpr int W = vectors.kCount;
    constexpr bool PART = vectors.kPart;
    for (std::int64_t start = 0; start < pixels; start += kRun) {
      const std::int64_t stop = simd::min(pixels, start + kRun);
      Floats total[W];
      for (auto& each : total) each = zero();
      for (std::int64_t p = start; p < stop; ++p) {
        for (int w = 0; w < W; ++w) {
          const std::int64_t k = i + kLanes * w;
          const Floats d = sub(read<PART>(in + p * row + k), load(center.high + k));
          const Floats g = read<PART>(out + p * row + k);
          const Floats result =
              negative_multiply_add(d, load(slope + k), multiply_subtract(g, load(scale + k), load(constant + k)));
          total[w] = add(total[w], result);
          write<PART>(out + p * row + k, result);
        }
      }
      for (int w = 0; w < W; ++w) add_to(totals + i + kLanes * w, total[w]);
    }
  });
  for (std::int64_t k = 0; k < width; ++k) sums[2 * plane + image * row + first + k] = static_cast<float>(totals[k]);
}

const Kernels kTable = {forward, backward};

}  // namespace

}  // namespace diffmem::group_norm_silu
