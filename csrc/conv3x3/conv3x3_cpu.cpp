// Sharing a convolution's tiles among threads; the kernels of an instruction set do the arithmetic.
#include <algorithm>
#include <memory>

#include "conv3x3/conv3x3.h"
#include "cpu/aligned.h"
#include "cpu/features.h"
#include "cpu/share.h"

namespace diffmem::conv3x3 {

namespace {

using cpu::share;

const Kernels* kernels() { return cpu::best<Kernels>(nullptr, avx2_kernels(), nullptr); }

// Of one thread; shared, so that the worker that holds it can be copied.
std::shared_ptr<cpu::Aligned<float>> scratch_memory(std::int64_t count) {
  return std::make_shared<cpu::Aligned<float>>(static_cast<std::size_t>(count));
}

}  // namespace

bool available() { return kernels() != nullptr; }

std::int64_t packed_size(std::int64_t channels, std::int64_t outputs) { return 36 * channels * outputs; }

void pack(const float* weight, const std::int64_t strides[4], std::int64_t channels, std::int64_t outputs,
          float* packed, int threads) {
  const Kernels& kernel = *kernels();
  share(outputs / 16, threads, [&] {
    return [&](std::int64_t panel) { kernel.pack_panel(weight, strides, channels, outputs, panel, packed); };
  });
}

void forward(const Shape& shape, const float* x, const float* packed, const float* bias, float* y, int threads) {
  const Kernels& kernel = *kernels();
  const std::int64_t count = shape.batch * ((shape.height + 3) / 4) * ((shape.width + 3) / 4);
  const std::int64_t blocks = (count + kBlockTiles - 1) / kBlockTiles;
  share(blocks, threads, [&] {
    const auto scratch = scratch_memory(36 * kBlockTiles * (shape.channels + shape.outputs));
    return [&, scratch](std::int64_t block) {
      const std::int64_t first = block * kBlockTiles;
      kernel.tiles(shape, x, packed, bias, first, std::min(count, first + kBlockTiles), y, scratch->data());
    };
  });
}

void weight_sums(const Shape& shape, const float* x, const float* y_gradient, std::int64_t splits, float* sums,
                 int threads) {
  const Kernels& kernel = *kernels();
  const std::int64_t tiles = shape.batch * ((shape.height + 3) / 4) * ((shape.width + 3) / 4);
  const std::int64_t c_slices = (shape.channels + kSliceChannels - 1) / kSliceChannels;
  const std::int64_t o_slices = (shape.outputs + kSliceOutputs - 1) / kSliceOutputs;
  share(splits * c_slices * o_slices, threads, [&] {
    const auto scratch = scratch_memory(36 * kBlockTiles * (kSliceChannels + kSliceOutputs));
    return [&, scratch](std::int64_t item) {
      const std::int64_t split = item / (c_slices * o_slices);
      const std::int64_t c = item / o_slices % c_slices * kSliceChannels, o = item % o_slices * kSliceOutputs;
      kernel.weight_sums(shape, x, y_gradient, tiles * split / splits, tiles * (split + 1) / splits, c,
                         std::min(shape.channels, c + kSliceChannels), o, std::min(shape.outputs, o + kSliceOutputs),
                         sums + split * 36 * shape.channels * shape.outputs, scratch->data());
    };
  });
}

}  // namespace diffmem::conv3x3
