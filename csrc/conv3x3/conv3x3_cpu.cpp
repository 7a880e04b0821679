// Sharing a convolution's tiles among threads; conv3x3_avx2.cpp does the arithmetic.
#include <algorithm>
#include <memory>

#include "conv3x3/conv3x3.h"
#include "cpu/aligned.h"
#include "cpu/features.h"
#include "cpu/share.h"

namespace diffmem::conv3x3 {

namespace {

using cpu::share;

// Of one thread; shared, so that the worker that holds it can be copied.
std::shared_ptr<cpu::Aligned<float>> scratch_memory(std::int64_t count) {
  return std::make_shared<cpu::Aligned<float>>(static_cast<std::size_t>(count));
}

}  // namespace

bool available() { return avx2::compiled() && cpu::level() >= cpu::Level::avx2; }

std::int64_t packed_size(std::int64_t channels, std::int64_t outputs) { return 36 * channels * outputs; }

void pack(const float* weight, const std::int64_t strides[4], std::int64_t channels, std::int64_t outputs,
          float* packed, int threads) {
  share(outputs / 16, threads, [&] {
    return [&](std::int64_t panel) { avx2::pack_panels(weight, strides, channels, outputs, panel, panel + 1, packed); };
  });
}

void forward(const Shape& shape, const float* x, const float* packed, const float* bias, float* y, int threads) {
  const std::int64_t count = shape.batch * ((shape.height + 3) / 4) * ((shape.width + 3) / 4);
  const std::int64_t blocks = (count + avx2::block_tiles - 1) / avx2::block_tiles;
  share(blocks, threads, [&] {
    const auto scratch = scratch_memory(avx2::scratch_size(shape));
    return [&, scratch](std::int64_t block) {
      const std::int64_t first = block * avx2::block_tiles;
      avx2::tiles(shape, x, packed, bias, first, std::min(count, first + avx2::block_tiles), y, scratch->data());
    };
  });
}

void weight_sums(const Shape& shape, const float* x, const float* y_gradient, std::int64_t splits, float* sums,
                 int threads) {
  using avx2::slice_channels, avx2::slice_outputs;
  const std::int64_t tiles = shape.batch * ((shape.height + 3) / 4) * ((shape.width + 3) / 4);
  const std::int64_t c_slices = (shape.channels + slice_channels - 1) / slice_channels;
  const std::int64_t o_slices = (shape.outputs + slice_outputs - 1) / slice_outputs;
  share(splits * c_slices * o_slices, threads, [&] {
    const auto scratch = scratch_memory(avx2::slice_scratch);
    return [&, scratch](std::int64_t item) {
      const std::int64_t split = item / (c_slices * o_slices);
      const std::int64_t c = item / o_slices % c_slices * slice_channels, o = item % o_slices * slice_outputs;
      avx2::weight_sums(shape, x, y_gradient, tiles * split / splits, tiles * (split + 1) / splits, c,
                        std::min(shape.channels, c + slice_channels), o, std::min(shape.outputs, o + slice_outputs),
                        sums + split * 36 * shape.channels * shape.outputs, scratch->data());
    };
  });
}

}  // namespace diffmem::conv3x3
