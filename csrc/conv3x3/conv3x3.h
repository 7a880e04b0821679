// 3×3 convolution, stride 1, zero padding 1, by Winograd's minimal filtering F(4×4, 3×3) (Lavin and Gray, CVPR 2016).
//
// An output tile of 4×4 pixels costs 36 products per pair of channels instead of 144. The interpolation points are
// 0, ±3/4, ±3/2 and ∞ (not the textbook's 0, ±1, ±2, ∞), which halve the rounding error: it stays within twice that of
// the direct sum in float32.
//
// Images of at most 2×2 pixels are convolved directly: each output pixel sees every input pixel, 16 products instead
// of 36.
//
// Layouts (float32, tightly packed unless strides are given):
//   x    (batch, height, width, channels)          images, channels last
//   y    (batch, height, width, outputs)
//   packed (36, outputs/16, channels, 16)          transformed weights, made by `pack` (9 taps for direct sums); 16
//   more after each point's weights with element strides (outputs, channels, 3, 3); negative strides flip the kernel
// Needs an instruction set that has kernels here (`available`); channels a multiple of 8, outputs a multiple of 16.
#pragma once

#include <cstdint>

namespace diffmem::conv3x3 {

bool available();

struct Shape {
  std::int64_t batch, height, width, channels, outputs;
};

static constexpr bool is_direct(const Shape& shape) { return shape.height <= 2 && shape.width <= 2; }

// Elements of `packed`.
std::int64_t packed_size(const Shape& shape);

void pack(const Shape& shape, const float* weight, const std::int64_t strides[4], float* packed, int threads);

// y = (x convolved with the weights + bias + residual)·scale.
struct Epilogue {
  const float* bias;      // (outputs), or null
  const float* residual;  // like y, or null
  float scale;
};

void forward(const Shape& shape, const float* x, const float* packed, const Epilogue& epilogue, float* y, int threads);

// The gradient of the weights, from that of y: written to (outputs, channels, 3, 3) with element strides.
void weight_gradient(const Shape& shape, const float* x, const float* y_gradient, float* gradient,
                     const std::int64_t strides[4], int threads);

// ------------------------------------------------------------------------------------------------ instruction sets

// 36 matrices, one per point of the transforms, with a row per tile, rows and matrices the given numbers apart: rows
// begin at a cache line, and the same element of all points lies in different sets of the cache.
struct Points {
  float* values;
  std::int64_t row, point;
};

// Numbers from one point's transformed weights, or sums, to the next one's: an odd number of cache lines.
static constexpr std::int64_t packed_point(std::int64_t channels, std::int64_t outputs) {
  return channels * outputs + 16;
}

// The tap that takes pixel `from` to pixel `to` of images convolved directly.
static constexpr std::int64_t tap_between(const Shape& shape, std::int64_t from, std::int64_t to) {
  return 3 * (from / shape.width - to / shape.width + 1) + from % shape.width - to % shape.width + 1;
}

struct Kernels {
  // The weights of output panel `panel`, 16 outputs, transformed or, for direct sums, as they are.
  void (*pack_panel)(const float* weight, const std::int64_t strides[4], std::int64_t channels, std::int64_t outputs,
                     std::int64_t panel, bool direct, float* packed);

  // The outputs of tiles [first, last) in row-major order of (image, tile row, tile column); `inputs` and `products`
  // hold a row for each, `zeros` as many as there are channels.
  void (*tiles)(const Shape& shape, const float* x, const float* packed, const Epilogue& epilogue, std::int64_t first,
                std::int64_t last, float* y, const Points& inputs, const Points& products, const float* zeros);

  // Pixel `number` of images [first, last) by direct sums.
  void (*pixel)(const Shape& shape, const float* x, const float* packed, const Epilogue& epilogue, std::int64_t first,
                std::int64_t last, std::int64_t number, float* y);

  // The transformed inputs of tiles [first, last), from row 0 of `inputs` on, and the (adjointly) transformed
  // gradients.
  void (*transform_images)(const Shape& shape, const float* x, std::int64_t first, std::int64_t last,
                           const Points& inputs, const float* zeros);
  void (*transform_gradients)(const Shape& shape, const float* y_gradient, std::int64_t first, std::int64_t last,
                              const Points& gradients, const float* zeros);

  // Sums over rows [0, count), their rows so far apart, for channels [c_first, c_last) in multiples of 8; `begins`: the
  // sums hold nothing yet. They are laid out as one point's packed weights.
  void (*accumulate)(std::int64_t count, bool begins, const Shape& shape, std::int64_t c_first, std::int64_t c_last,
                     const float* inputs, std::int64_t input_stride, const float* gradients,
                     std::int64_t gradient_stride, float* sums);

  // The gradient of the weights of output panel `panel`, 16 outputs, from the sums of all points or taps.
  void (*weight_gradient)(const float* sums, std::int64_t channels, std::int64_t outputs, std::int64_t panel,
                          bool direct, float* gradient, const std::int64_t strides[4]);
};

const Kernels* avx2_kernels();  // null where this build lacks the instructions
const Kernels* avx512_kernels();

}  // namespace diffmem::conv3x3
