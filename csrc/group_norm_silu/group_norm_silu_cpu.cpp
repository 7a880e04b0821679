// Cutting maps into blocks of channels that stay in cache, and sharing the blocks among threads; the
// kernels of an instruction set do the arithmetic.
#include <algorithm>
#include <numeric>

#include "cpu/features.h"
#include "cpu/share.h"
#include "group_norm_silu/group_norm_silu.h"

namespace diffmem::group_norm_silu {

namespace {

const Kernels* kernels() { return cpu::best<Kernels>({.avx2 = avx2_kernels(), .avx512 = avx512_kernels()}); }

constexpr std::int64_t kCached = 128 * 1024;  // bytes of a block: a part of the second-level cache

// Channels of a block: whole groups, a multiple of a cache line's 16 floats where that divides the channels.
std::int64_t block_channels(const Shape& shape) {
  const std::int64_t unit = std::lcm<std::int64_t>(shape.channels / shape.groups, 8);
  const std::int64_t fitting = kCached / (shape.pixels * static_cast<std::int64_t>(sizeof(float)));
  std::int64_t block = std::clamp(fitting / unit * unit, unit, std::max(unit, kMaxChannels / unit * unit));
  if (block % 16 != 0 && block + unit <= kMaxChannels) block += unit;
  return std::min(block, shape.channels);
}

template <class Work>
void share_blocks(const Shape& shape, int threads, const Work& work) {
  const std::int64_t block = block_channels(shape);
  const std::int64_t blocks = (shape.channels + block - 1) / block;
  cpu::share(shape.batch * blocks, threads, [&] {
    return [&](std::int64_t item) {
      const std::int64_t first = item % blocks * block;
      work(item / blocks, first, std::min(shape.channels, first + block));
    };
  });
}

}  // namespace

bool available() { return kernels() != nullptr; }

void forward(const Shape& shape, const Parameters& parameters, const float* x, float* y, double* mean, float* rstd,
             int threads) {
  const Kernels& kernel = *kernels();
  share_blocks(shape, threads, [&](std::int64_t image, std::int64_t first, std::int64_t last) {
    kernel.forward(shape, parameters, image, first, last, x, y, mean, rstd);
  });
}

void backward(const Shape& shape, const Parameters& parameters, const float* dy, const float* x, const double* mean,
              const float* rstd, float* dx, float* sums, int threads) {
  const Kernels& kernel = *kernels();
  share_blocks(shape, threads, [&](std::int64_t image, std::int64_t first, std::int64_t last) {
    kernel.backward(shape, parameters, image, first, last, dy, x, mean, rstd, dx, sums);
  });
}

}  // namespace diffmem::group_norm_silu
