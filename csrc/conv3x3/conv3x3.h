// 3×3 convolution, stride 1, zero padding 1, by Winograd's minimal filtering F(4×4, 3×3) (Lavin and Gray, CVPR 2016).
//
// An output tile of 4×4 pixels costs 36 products per pair of channels instead of 144. The interpolation points are
// 0, ±3/4, ±3/2 and ∞ (not the textbook's 0, ±1, ±2, ∞), which halve the rounding error: it stays within twice that of
// the direct sum in float32.
//
// Layouts (float32, tightly packed unless strides are given):
//   x    (batch, height, width, channels)          images, channels last
//   y    (batch, height, width, outputs)
//   packed (36, outputs/16, channels, 16)          transformed weights, made by `pack`
//   weights with element strides (outputs, channels, 3, 3); negative strides flip the kernel
// Needs AVX2 (`available`); channels a multiple of 8, outputs a multiple of 16.
#pragma once

#include <cstdint>

namespace diffmem::conv3x3 {

bool available();

struct Shape {
  std::int64_t batch, height, width, channels, outputs;
};

// Elements of `packed`.
std::int64_t packed_size(std::int64_t channels, std::int64_t outputs);

void pack(const float* weight, const std::int64_t strides[4], std::int64_t channels, std::int64_t outputs,
          float* packed, int threads);

// `bias` (outputs) may be null.
void forward(const Shape& shape, const float* x, const float* packed, const float* bias, float* y, int threads);

// Gradient of the weights in the transformed domain: sums (splits, 36, channels, outputs), zero when it comes in, gets
// Σ over tiles of (transformed x)·(adjointly transformed gradient of y), each split the sum over its share of the
// tiles. The gradient of weight (o, c, i, j) is Σ over points p of G(p / 6, i)·G(p % 6, j)·Σ over splits of sums(p, c,
// o).
void weight_sums(const Shape& shape, const float* x, const float* y_gradient, std::int64_t splits, float* sums,
                 int threads);

namespace avx2 {  // conv3x3_avx2.cpp
bool compiled();
// The transformed weights of output panels [first, last), 16 outputs each.
void pack_panels(const float* weight, const std::int64_t strides[4], std::int64_t channels, std::int64_t outputs,
                 std::int64_t first, std::int64_t last, float* packed);
// Tiles [first, last) in row-major order of (image, tile row, tile column), at most `block_tiles`; `scratch` holds
// scratch_size(shape) floats, aligned to 64 bytes.
inline constexpr std::int64_t block_tiles = 48;
std::int64_t scratch_size(const Shape& shape);
void tiles(const Shape& shape, const float* x, const float* packed, const float* bias, std::int64_t first,
           std::int64_t last, float* y, float* scratch);

// weight_sums for tiles [first, last), channels [c_first, c_last) and outputs [o_first, o_last), at most
// slice_channels and slice_outputs of them; `scratch` holds slice_scratch floats.
inline constexpr std::int64_t slice_channels = 64, slice_outputs = 128;
inline constexpr std::int64_t slice_scratch = 36 * block_tiles * (slice_channels + slice_outputs);
void weight_sums(const Shape& shape, const float* x, const float* y_gradient, std::int64_t first, std::int64_t last,
                 std::int64_t c_first, std::int64_t c_last, std::int64_t o_first, std::int64_t o_last, float* sums,
                 float* scratch);
}  // namespace avx2

}  // namespace diffmem::conv3x3
