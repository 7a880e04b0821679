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
// Needs an instruction set that has kernels here (`available`); channels a multiple of 8, outputs a multiple of 16.
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

// ------------------------------------------------------------------------------------------------ instruction sets

inline constexpr std::int64_t kBlockTiles = 48;
inline constexpr std::int64_t kSliceChannels = 64, kSliceOutputs = 128;

struct Kernels {
  // The transformed weights of output panel `panel`, 16 outputs.
  void (*pack_panel)(const float* weight, const std::int64_t strides[4], std::int64_t channels, std::int64_t outputs,
                     std::int64_t panel, float* packed);

  // Tiles [first, last) in row-major order of (image, tile row, tile column), at most kBlockTiles; `scratch` holds 36 *
  // kBlockTiles * (channels + outputs) floats, aligned to 64 bytes.
  void (*tiles)(const Shape& shape, const float* x, const float* packed, const float* bias, std::int64_t first,
                std::int64_t last, float* y, float* scratch);

  // weight_sums for tiles [first, last), channels [c_first, c_last) and outputs [o_first, o_last), at most
  // kSliceChannels and kSliceOutputs of them; `scratch` holds 36 * kBlockTiles * (kSliceChannels + kSliceOutputs)
  // floats.
  void (*weight_sums)(const Shape& shape, const float* x, const float* y_gradient, std::int64_t first,
                      std::int64_t last, std::int64_t c_first, std::int64_t c_last, std::int64_t o_first,
                      std::int64_t o_last, float* sums, float* scratch);
};

const Kernels* avx2_kernels();  // null where this build lacks the instructions

}  // namespace diffmem::conv3x3
