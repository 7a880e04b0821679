// Sharing a convolution's tiles among threads; conv3x3_avx2.cpp does the arithmetic.
#include <algorithm>
#include <memory>
#include <new>

#include "conv3x3/conv3x3.h"
#include "cpu/features.h"
#include "cpu/share.h"

namespace diffmem::conv3x3 {

namespace {

using cpu::share;

struct Aligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

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
    std::shared_ptr<float[]> scratch(new (std::align_val_t{64}) float[avx2::scratch_size(shape)], Aligned{});
    return [&, scratch](std::int64_t block) {
      const std::int64_t first = block * avx2::block_tiles;
      avx2::tiles(shape, x, packed, bias, first, std::min(count, first + avx2::block_tiles), y, scratch.get());
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
    std::shared_ptr<float[]> scratch(new (std::align_val_t{64}) float[avx2::slice_scratch], Aligned{});
    return [&, scratch](std::int64_t item) {
      const std::int64_t split = item / (c_slices * o_slices);
      const std::int64_t c = item / o_slices % c_slices * slice_channels, o = item % o_slices * slice_outputs;
      avx2::weight_sums(shape, x, y_gradient, tiles * split / splits, tiles * (split + 1) / splits, c,
                        std::min(shape.channels, c + slice_channels), o, std::min(shape.outputs, o + slice_outputs),
                        sums + split * 36 * shape.channels * shape.outputs, scratch.get());
    };
  });
}

}  // namespace diffmem::conv3x3
