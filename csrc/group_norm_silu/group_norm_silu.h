// GroupNorm, scale and shift, SiLU of channels_last float32 maps, forward and backward.
//
//   z = x + added        x̂ = (z − mean)·rstd        v = x̂·gain + offset        y = silu ? v·sigmoid(v) : v
//   gain = weight·(1 + scale)        offset = bias·(1 + scale) + shift
//
// mean and rstd = 1/√(variance + eps) are those of an image's group of channels. A few channels of an image at a time,
// whole groups of them and few enough to stay in cache, are read for the mean, for the variance, and for the result.
//
// Layouts (float32, tightly packed):
//   x, y, dy, dx   (batch, pixels, channels)
//   weight, bias   (channels)
//   scale, shift, added   (batch or 1, channels), rows apart by the given stride, 0 where one row serves all images;
//                  null where there are none (scale and shift go together)
//   mean           (batch, groups) double: one float is not enough where it is far from zero
//   rstd           (batch, groups)
//   sums           (3, batch, channels): per image and channel, with g = dy·silu'(v), Σ g, Σ g·x̂ and Σ dx
// Needs an instruction set that has kernels here (`available`), and channels in multiples of 8.
#pragma once

#include <cstdint>

namespace diffmem::group_norm_silu {

bool available();

struct Shape {
  std::int64_t batch, pixels, channels, groups;
};

struct Parameters {
  const float *weight, *bias, *scale, *shift, *added;
  std::int64_t scale_stride, shift_stride, added_stride;
  float eps;
  bool silu;
};

void forward(const Shape& shape, const Parameters& parameters, const float* x, float* y, double* mean, float* rstd,
             int threads);

void backward(const Shape& shape, const Parameters& parameters, const float* dy, const float* x, const double* mean,
              const float* rstd, float* dx, float* sums, int threads);

// ------------------------------------------------------------------------------------------------ instruction sets

inline constexpr std::int64_t kMaxChannels = 1024;  // of a block

// Channels [first, last), whole groups, multiples of 8, of one image.
struct Kernels {
  void (*forward)(const Shape& shape, const Parameters& parameters, std::int64_t image, std::int64_t first,
                  std::int64_t last, const float* x, float* y, double* mean, float* rstd);
  void (*backward)(const Shape& shape, const Parameters& parameters, std::int64_t image, std::int64_t first,
                   std::int64_t last, const float* dy, const float* x, const double* mean, const float* rstd, float* dx,
                   float* sums);
};

const Kernels* avx2_kernels();  // null where this build lacks the instructions
const Kernels* avx512_kernels();

}  // namespace diffmem::group_norm_silu
