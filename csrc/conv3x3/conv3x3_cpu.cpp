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

std::int64_t packed_size(const Shape& shape) {
  return (is_direct(shape) ? 9 : 36) * packed_point(shape.channels, shape.outputs);
}

void pack(const Shape& shape, const float* weight, const std::int64_t strides[4], float* packed, int threads) {
  const Kernels& kernel = *kernels();
  share(shape.outputs / 16, threads, [&] {
    return [&](std::int64_t panel) {
      kernel.pack_panel(weight, strides, shape.channels, shape.outputs, panel, is_direct(shape), packed);
    };
  });
}

void forward(const Shape& shape, const float* x, const float* packed, const Epilogue& epilogue, float* y, int threads) {
  const Kernels& kernel = *kernels();
  if (is_direct(shape)) {
    const std::int64_t pixels = shape.height * shape.width;
    const std::int64_t parts = (shape.batch + kBlockTiles - 1) / kBlockTiles;
    share(parts * pixels, threads, [&] {
      return [&](std::int64_t item) {
        const std::int64_t part = item / pixels;
        kernel.pixel(shape, x, packed, epilogue, shape.batch * part / parts, shape.batch * (part + 1) / parts,
                     item % pixels, y);
      };
    });
    return;
  }
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

namespace {

// Channels in parts of about 64, whole eights, for sums that are shared among threads by their channels.
struct ChannelParts {
  std::int64_t eights, count;

  explicit ChannelParts(std::int64_t channels) : eights(channels / 8), count((eights + 7) / 8) {}
  std::int64_t first(std::int64_t part) const { return eights * part / count * 8; }
};

void direct_sums(const Shape& shape, const float* x, const float* y_gradient, float* sums, int threads) {
  const Kernels& kernel = *kernels();
  const std::int64_t pixels = shape.height * shape.width, point = packed_point(shape.channels, shape.outputs);
  const ChannelParts parts(shape.channels);
  share(9 * parts.count, threads, [&] {
    return [&](std::int64_t item) {
      const std::int64_t tap = item / parts.count, part = item % parts.count;
      bool begins = true;
      for (std::int64_t from = 0; from < pixels; ++from) {
        for (std::int64_t to = 0; to < pixels; ++to) {
          if (tap_between(shape, from, to) != tap) continue;
          kernel.accumulate(shape.batch, begins, shape, parts.first(part), parts.first(part + 1),
                            x + from * shape.channels, pixels * shape.channels, y_gradient + to * shape.outputs,
                            pixels * shape.outputs, sums + tap * point);
          begins = false;
        }
      }
      if (begins && part == 0) std::fill_n(sums + tap * point, point, 0.0f);  // a tap that is always outside
    };
  });
}

void winograd_sums(const Shape& shape, const float* x, const float* y_gradient, float* sums, int threads) {
  const Kernels& kernel = *kernels();
  const std::int64_t channels = shape.channels, outputs = shape.outputs, count = tile_count(shape);
  const std::int64_t held = std::max<std::int64_t>(kBlockTiles, kSummed / (36 * (channels + outputs)));
  const std::int64_t chunks = (count + held - 1) / held, rows = (count + chunks - 1) / chunks;
  Points inputs = layout(rows, channels), gradients = layout(rows, outputs);
  const std::int64_t longest = std::max(inputs.row, gradients.row);
  cpu::Aligned<float> scratch(static_cast<std::size_t>(36 * (inputs.point + gradients.point) + longest));
  inputs.values = scratch.data();
  gradients.values = inputs.values + 36 * inputs.point;
  float* const zeros = gradients.values + 36 * gradients.point;
  std::fill_n(zeros, longest, 0.0f);
  const ChannelParts parts(channels);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t first = count * chunk / chunks, last = count * (chunk + 1) / chunks;
    const std::int64_t blocks = (last - first + kBlocksOfTiles - 1) / kBlocksOfTiles;
    share(2 * blocks, threads, [&] {
      return [&](std::int64_t item) {
        const std::int64_t from = item / 2 * kBlocksOfTiles, to = std::min(last - first, from + kBlocksOfTiles);
        const Points& into = item % 2 == 0 ? inputs : gradients;
        const Points block = {into.values + from * into.row, into.row, into.point};
        if (item % 2 == 0) {
          kernel.transform_images(shape, x, first + from, first + to, block, zeros);
        } else {
          kernel.transform_gradients(shape, y_gradient, first + from, first + to, block, zeros);
        }
      };
    });
    share(36 * parts.count, threads, [&] {
      return [&](std::int64_t item) {
        const std::int64_t point = item / parts.count, part = item % parts.count;
        kernel.accumulate(last - first, chunk == 0, shape, parts.first(part), parts.first(part + 1),
                          inputs.values + point * inputs.point, inputs.row, gradients.values + point * gradients.point,
                          gradients.row, sums + point * packed_point(channels, outputs));
      };
    });
  }
}

}  // namespace

void weight_gradient(const Shape& shape, const float* x, const float* y_gradient, float* gradient,
                     const std::int64_t strides[4], int threads) {
  cpu::Aligned<float> sums(static_cast<std::size_t>(packed_size(shape)));
  const bool direct = is_direct(shape);
  (direct ? direct_sums : winograd_sums)(shape, x, y_gradient, sums.data(), threads);
  const Kernels& kernel = *kernels();
  share(shape.outputs / 16, threads, [&] {
    return [&](std::int64_t panel) {
      kernel.weight_gradient(sums.data(), shape.channels, shape.outputs, panel, direct, gradient, strides);
    };
  });
}

}  // namespace diffmem::conv3x3
