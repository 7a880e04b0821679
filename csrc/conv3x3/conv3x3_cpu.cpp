// Sharing a convolution's tiles among threads; conv3x3_avx2.cpp does the arithmetic.
#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "conv3x3/conv3x3.h"
#include "cpu/features.h"

namespace diffmem::conv3x3 {

namespace {

// The OpenMP runtime that is already in the process, PyTorch's as a rule. Its idle threads spin for a while before they
// sleep, so that threads of our own would have to share the cores with them: convolutions alternate with PyTorch's
// operations within milliseconds. Null where there is none.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMpParallel open_mp_parallel() {
#if defined(__linux__) || defined(__APPLE__)
  static const auto found = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

// Calls work(item) for all items in 0 … count − 1 on up to `threads` threads, the caller's among them. Each thread
// makes its own `work`.
template <class MakeWorker>
void share(std::int64_t count, int threads, const MakeWorker& make_worker) {
  std::atomic<std::int64_t> next{0};
  auto run = [&] {
    auto work = make_worker();
    for (std::int64_t item = next++; item < count; item = next++) work(item);
  };
  const auto wanted = static_cast<unsigned>(std::min<std::int64_t>(threads, count));
  if (wanted <= 1) {
    run();
  } else if (const OpenMpParallel parallel = open_mp_parallel()) {
    parallel([](void* body) { (*static_cast<decltype(run)*>(body))(); }, &run, wanted, 0);
  } else {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < wanted; ++i) others.emplace_back(run);
    run();
    for (std::thread& thread : others) thread.join();
  }
}

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
