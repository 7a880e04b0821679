// The portable instance of the scan's inner loops (vector_scan_simd.h): plain C++, for every processor.
#include <cstring>

#include "vector_scan/vector_scan.h"

namespace {

template <class T>
struct Lanes {
  T lane[8];
};

struct V {
  static constexpr int kLanes = 8;
  static constexpr int kStripRows = 2;
  static constexpr int kTilePanels = 1;
  static constexpr int kLevels = 127;
  using Int = Lanes<std::int32_t>;
  using Float = Lanes<float>;

  static Int zero() { return {}; }
  static Int load(const void* p) {
    Int a;
    std::memcpy(a.lane, p, sizeof a.lane);
    return a;
  }
  static Float load(const float* p) {
    Float a;
    std::memcpy(a.lane, p, sizeof a.lane);
    return a;
  }
  static Int broadcast(std::int32_t a) {
    Int r;
    for (std::int32_t& lane : r.lane) lane = a;
    return r;
  }
  static Float all(float a) {
    Float r;
    for (float& lane : r.lane) lane = a;
    return r;
  }
  // Whole numbers wrap (vector_scan.h), so they are added as unsigned ones.
  static Int add(Int a, const Int& b) {
    for (int i = 0; i < kLanes; ++i) {
      a.lane[i] =
          static_cast<std::int32_t>(static_cast<std::uint32_t>(a.lane[i]) + static_cast<std::uint32_t>(b.lane[i]));
    }
    return a;
  }
  static Int left(Int a, int bits) {
    for (std::int32_t& lane : a.lane) lane = static_cast<std::int32_t>(static_cast<std::uint32_t>(lane) << bits);
    return a;
  }
  static Int dot4(const Int& acc, const Int& rows, const Int& query) {
    std::uint8_t x[4 * kLanes];
    std::int8_t y[4 * kLanes];
    std::memcpy(x, rows.lane, sizeof x);
    std::memcpy(y, query.lane, sizeof y);
    Int four;
    for (int i = 0; i < kLanes; ++i) {
      four.lane[i] =
          x[4 * i] * y[4 * i] + x[4 * i + 1] * y[4 * i + 1] + x[4 * i + 2] * y[4 * i + 2] + x[4 * i + 3] * y[4 * i + 3];
    }
    return add(acc, four);
  }
  static std::int32_t sum(const Int& a) {
    std::uint32_t total = 0;
    for (const std::int32_t lane : a.lane) total += static_cast<std::uint32_t>(lane);
    return static_cast<std::int32_t>(total);
  }
  static Float real(const Int& a) {
    Float r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = static_cast<float>(a.lane[i]);
    return r;
  }
  static Float multiply(Float a, const Float& b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static Float multiply_add(const Float& a, const Float& b, Float c) {
    for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static std::uint32_t at_least(const Float& a, const Float& b) {
    std::uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<std::uint32_t>(a.lane[i] >= b.lane[i]) << i;
    return bits;
  }
  static void transpose16(const std::uint8_t* points, std::size_t stride, std::uint8_t* panel) {
    for (std::size_t i = 0; i < 16; ++i) {
      for (std::size_t s = 0; s < 16; ++s) std::memcpy(panel + 64 * s + 4 * i, points + i * stride + 4 * s, 4);
    }
  }
};

}  // namespace

#include "vector_scan/vector_scan_simd.h"

namespace diffmem::vector_scan {
const Kernels* portable_kernels() { return &kTable; }
}  // namespace diffmem::vector_scan
