// Sharing a convolution's tiles among threads, and its memory; the kernels of an instruction set do the arithmetic.
#include <algorithm>
#include <memory>

#include "conv3x3/conv3x3.h"
#include "cpu/aligned.h"
#include "cpu/features.h"
#include "cpu/share.h"

namespace diffmem::conv3x3 {

namespace {

using cpu::share;

const Kernels* kernels() { return cpu::best<Kernels>({.avx2 = avx2_kernels(), .avx512 = avx512_kernels()}); }

constexpr std::int64_t kBlockTiles = 56;    // of one thread at a time: all weights are read for each such block
constexpr std::int64_t kBlocksOfTiles = 8;  // no thread gets fewer tiles than these
constexpr std::int64_t kSummed = 2 << 20;   // numbers of transformed inputs and gradients that are held at a time

std::int64_t tile_count(const Shape& shape) { return shape.batch * ((shape.height + 3) / 4) * ((shape.width + 3) / 4); }

// Rows of `width` numbers: whole cache lines, an odd number of them per point.
Points layout(std::int64_t rows, std::int64_t width) {
  const std::int64_t row = (width + 15) / 16 * 16;
  return {nullptr, row, (rows * row / 16 | 1) * 16};
}

}  // namespace

bool available() { return kernels() != nullptr; }

std::int64_t packed_size(std::int64_t channels, std::int64_t outputs) { return 36 * packed_point(channels, outputs); }

void pack(const float* weight, const std::int64_t strides[4], std::int64_t channels, std::int64_t outputs,
          float* packed, int threads) {
  const Kernels& kernel = *kernels();
  share(outputs / 16, threads, [&] {
    return [&](std::int64_t panel) { kernel.pack_panel(weight, strides, channels, outputs, panel, packed); };
  });
}

void forward(const Shape& shape, const float* x, const float* packed, const Epilogue& epilogue, float* y, int threads) {
  const Kernels& kernel = *kernels();
  // As many blocks for each thread, of nearly the same size.
  const std::int64_t count = tile_count(shape), together = kBlockTiles * threads;
  const std::int64_t blocks =
      std::min((count + together - 1) / together * threads, (count + kBlocksOfTiles - 1) / kBlocksOfTiles);
  const std::int64_t rows = (count + blocks - 1) / blocks;
  share(blocks, threads, [&] {
    Points inputs = layout(rows, shape.channels), products = layout(rows, shape.outputs);
    const auto scratch = std::make_shared<cpu::Aligned<float>>(
        static_cast<std::size_t>(36 * (inputs.point + products.point) + inputs.row));
    inputs.values = scratch->data();
    products.values = inputs.values + 36 * inputs.point;
    float* const zeros = products.values + 36 * products.point;
    std::fill_n(zeros, inputs.row, 0.0f);
    return [&, scratch, inputs, products, zeros](std::int64_t block) {
      kernel.tiles(shape, x, packed, epilogue, count * block / blocks, count * (block + 1) / blocks, y, inputs,
                   products, zeros);
    };
  });
}

void weight_gradient(const Shape& shape, const float* x, const float* y_gradient, float* gradient,
                     const std::int64_t strides[4], int threads) {
  const Kernels& kernel = *kernels();
  const std::int64_t channels = shape.channels, outputs = shape.outputs, count = tile_count(shape);
  const std::int64_t held = std::max<std::int64_t>(kBlockTiles, kSummed / (36 * (channels + outputs)));
  const std::int64_t chunks = (count + held - 1) / held, rows = (count + chunks - 1) / chunks;
  Points inputs = layout(rows, channels), gradients = layout(rows, outputs);
  const std::int64_t longest = std::max(inputs.row, gradients.row);
  cpu::Aligned<float> scratch(static_cast<std::size_t>(36 * (inputs.point + gradients.point) + longest));
  cpu::Aligned<float> sums(static_cast<std::size_t>(packed_size(channels, outputs)));
  inputs.values = scratch.data();
  gradients.values = inputs.values + 36 * inputs.point;
  float* const zeros = gradients.values + 36 * gradients.point;
  std::fill_n(zeros, longest, 0.0f);
  const std::int64_t eights = (channels + 7) / 8, c_parts = (eights + 7) / 8;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t first = count * chunk / chunks, last = count * (chunk + 1) / chunks;
    const std::int64_t parts = (last - first + kBlocksOfTiles - 1) / kBlocksOfTiles;
    share(2 * parts, threads, [&] {
      return [&](std::int64_t item) {
        const std::int64_t from = item / 2 * kBlocksOfTiles, to = std::min(last - first, from + kBlocksOfTiles);
        const Points& into = item % 2 == 0 ? inputs : gradients;
        const Points rows_of_it = {into.values + from * into.row, into.row, into.point};
        if (item % 2 == 0) {
          kernel.transform_images(shape, x, first + from, first + to, rows_of_it, zeros);
        } else {
          kernel.transform_gradients(shape, y_gradient, first + from, first + to, rows_of_it, zeros);
        }
      };
    });
    share(36 * c_parts, threads, [&] {
      return [&](std::int64_t item) {
        const std::int64_t point = item / c_parts, part = item % c_parts;
        const Points in = {inputs.values + point * inputs.point, inputs.row, inputs.point};
        const Points out = {gradients.values + point * gradients.point, gradients.row, gradients.point};
        kernel.accumulate(last - first, chunk == 0, shape, eights * part / c_parts * 8,
                          eights * (part + 1) / c_parts * 8, in, out,
                          sums.data() + point * packed_point(channels, outputs));
      };
    });
  }
  share(outputs / 16, threads, [&] {
    return
        [&](std::int64_t panel) { kernel.weight_gradient(sums.data(), channels, outputs, panel, gradient, strides); };
  });
}

}  // namespace diffmem::conv3x3
