// The portable instance of the search's inner loops (nearest_simd.h): plain C++, for every processor.
#include <cstring>

#include "nearest/nearest.h"

namespace {

// The portable vector: eight int32 lanes in plain C++.
struct V {
  static constexpr int kLanes = 8;
  struct Int {
    std::int32_t lane[kLanes];
  };
  static constexpr int kStripRows = 2;
  static constexpr std::size_t kBytes = 16;

  static Int zero() { return {}; }
  static Int load(const void* p) {
    Int a;
    std::memcpy(a.lane, p, sizeof a.lane);
    return a;
  }
  static void store(void* p, const Int& a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static Int add(Int a, const Int& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Int broadcast(std::int32_t a) {
    Int r;
    for (std::int32_t& lane : r.lane) lane = a;
    return r;
  }
  static Int madd(Int acc, const Int& a, const Int& b) {
    std::int16_t x[2 * kLanes];
    std::int16_t y[2 * kLanes];
    std::memcpy(x, a.lane, sizeof x);
    std::memcpy(y, b.lane, sizeof y);
    for (int i = 0; i < kLanes; ++i) {  // unsigned: partial sums may wrap (nearest.h)
      const auto pair =
          static_cast<std::uint32_t>(x[2 * i] * y[2 * i]) + static_cast<std::uint32_t>(x[2 * i + 1] * y[2 * i + 1]);
      acc.lane[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(acc.lane[i]) + pair);
    }
    return acc;
  }
  static std::uint32_t greater(const Int& a, const Int& b) {
    std::uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<std::uint32_t>(a.lane[i] > b.lane[i]) << i;
    return bits;
  }
  static std::int32_t sum(const Int& a) {
    std::uint32_t total = 0;
    for (std::int32_t lane : a.lane) total += static_cast<std::uint32_t>(lane);
    return static_cast<std::int32_t>(total);
  }
  static void sum4(const Int& a, const Int& b, const Int& c, const Int& d, std::int32_t* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }
  static Int square_difference(Int acc, const std::uint8_t* x, const std::uint8_t* y) {
    for (std::size_t j = 0; j < kBytes; ++j) {
      const int difference = static_cast<int>(x[j]) - static_cast<int>(y[j]);
      acc.lane[j % kLanes] += difference * difference;
    }
    return acc;
  }
  static void pack16x16(const std::uint8_t* points, std::size_t stride, std::int16_t* panel) {
    for (std::size_t i = 0; i < 16; ++i) {
      for (std::size_t j = 0; j < 8; ++j) {
        panel[32 * j + 2 * i] = static_cast<std::int16_t>(points[i * stride + 2 * j] - 128);
        panel[32 * j + 2 * i + 1] = static_cast<std::int16_t>(points[i * stride + 2 * j + 1] - 128);
      }
    }
  }
  template <class Real>
  static void accumulate(double* sums, const Real* x, const Real* y, std::size_t count) {
    for (std::size_t j = 0; j < count; ++j) {
      const double difference = static_cast<double>(x[j]) - static_cast<double>(y[j]);
      sums[j % 8] += difference * difference;
    }
  }
};

}  // namespace

#include "nearest/nearest_simd.h"

namespace diffmem::nearest {
const Kernels* portable_kernels() { return &kTable; }
}  // namespace diffmem::nearest
