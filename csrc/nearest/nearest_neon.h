// The vector of the search's inner loops (nearest_simd.h) for 64-bit ARM processors; included by nearest_neon.cpp and
// nearest_neon_dotprod.cpp, which differ in the squares of bytes alone.
//
// NEON has no multiply-add of pairs. But SMLAL multiplies four int16 by one of a register's lanes and adds to four
// int32: with the even and the odd coordinates of a panel apart (LD2) a step of a tile of 4 x 16 takes 32 of them and
// nothing else but two LD2 and the load of the strip, where products of pairs (SMULL twice, ADDP, ADD) would take 64
// instructions.
#include <arm_neon.h>

#include "nearest/nearest.h"

namespace {

struct V {
  using Int = int32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kStripRows = 4;  // 16 accumulators + 4 of the panel + 1 of the strip, of 32 registers
  static constexpr std::size_t kBytes = 16;

  static Int zero() { return vdupq_n_s32(0); }
  static Int load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const std::uint8_t*>(p))); }
  static void store(void* p, Int a) { vst1q_u8(static_cast<std::uint8_t*>(p), vreinterpretq_u8_s32(a)); }
  static Int add(Int a, Int b) { return vaddq_s32(a, b); }
  static Int broadcast(std::int32_t a) { return vdupq_n_s32(a); }
  static Int madd(Int acc, Int a, Int b) {
    const int16x8_t x = vreinterpretq_s16_s32(a);
    const int16x8_t y = vreinterpretq_s16_s32(b);
    return vmlal_high_s16(vmlal_s16(acc, vget_low_s16(x), vget_low_s16(y)), x, y);
  }
  static void multiply(Int (&acc)[kStripRows][4], std::size_t steps, const std::int16_t* strip,
                       const std::int16_t* panel) {
    // Each row with a name: the sums of an array of rows GCC stores at every step.
    Row row0(acc[0]), row1(acc[1]), row2(acc[2]), row3(acc[3]);
    for (std::size_t s = 0; s < steps; ++s, strip += 2 * kStripRows, panel += 32) {
      const int16x8_t rows = vld1q_s16(strip);
      const int16x8x2_t first = vld2q_s16(panel);
      const int16x8x2_t second = vld2q_s16(panel + 16);
      row0.add<0>(rows, first, second);
      row1.add<1>(rows, first, second);
      row2.add<2>(rows, first, second);
      row3.add<3>(rows, first, second);
    }
    row0.put(acc[0]);
    row1.put(acc[1]);
    row2.put(acc[2]);
    row3.put(acc[3]);
  }
  static std::uint32_t greater(Int a, Int b) {
    const std::uint32_t places[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgtq_s32(a, b), vld1q_u32(places)));
  }
  static std::int32_t sum(Int a) { return vaddvq_s32(a); }
  static void sum4(Int a, Int b, Int c, Int d, std::int32_t* out) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
  }
  static Int square_difference(Int acc, const std::uint8_t* x, const std::uint8_t* y) {
    const uint8x16_t gap = vabdq_u8(vld1q_u8(x), vld1q_u8(y));
    uint32x4_t sums = vreinterpretq_u32_s32(acc);
#ifdef DIFFMEM_NEON_DOTPROD
    sums = vdotq_u32(sums, gap, gap);
#else
    sums = vpadalq_u16(sums, vmull_u8(vget_low_u8(gap), vget_low_u8(gap)));
    sums = vpadalq_u16(sums, vmull_high_u8(gap, gap));
#endif
    return vreinterpretq_s32_u32(sums);
  }
  // 16 values of 16 points into 8 coordinate pairs of a panel: two 8 x 8 transposes of pairs of bytes.
  static void pack16x16(const std::uint8_t* points, std::size_t stride, std::int16_t* panel) {
    for (int half = 0; half < 2; ++half) {
      uint16x8_t r[8];
      for (int i = 0; i < 8; ++i) r[i] = vreinterpretq_u16_u8(vld1q_u8(points + (8 * half + i) * stride));
      uint32x4_t t[8];
      for (int i = 0; i < 8; i += 2) {
        t[i] = vreinterpretq_u32_u16(vtrn1q_u16(r[i], r[i + 1]));
        t[i + 1] = vreinterpretq_u32_u16(vtrn2q_u16(r[i], r[i + 1]));
      }
      uint64x2_t u[8];
      for (int i = 0; i < 8; i += 4) {
        for (int odd = 0; odd < 2; ++odd) {
          u[i + odd] = vreinterpretq_u64_u32(vtrn1q_u32(t[i + odd], t[i + odd + 2]));
          u[i + odd + 2] = vreinterpretq_u64_u32(vtrn2q_u32(t[i + odd], t[i + odd + 2]));
        }
      }
      for (int j = 0; j < 4; ++j) {
        store_pairs(panel + 32 * j + 16 * half, vtrn1q_u64(u[j], u[j + 4]));
        store_pairs(panel + 32 * (j + 4) + 16 * half, vtrn2q_u64(u[j], u[j + 4]));
      }
    }
  }
  static float64x2_t wide(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
  static float64x2_t wide(const double* p) { return vld1q_f64(p); }
  template <class Real>
  static void accumulate(double* sums, const Real* x, const Real* y, std::size_t count) {
    float64x2_t total[4];
    for (int v = 0; v < 4; ++v) total[v] = vld1q_f64(sums + 2 * v);
    for (std::size_t j = 0; j < count; j += 8) {  // no FMA: the product is rounded, as on every other path
      for (int v = 0; v < 4; ++v) {
        const float64x2_t a = vsubq_f64(wide(x + j + 2 * v), wide(y + j + 2 * v));
        total[v] = vaddq_f64(total[v], vmulq_f64(a, a));
      }
    }
    for (int v = 0; v < 4; ++v) vst1q_f64(sums + 2 * v, total[v]);
  }

 private:
  struct Row {
    Int a, b, c, d;

    explicit Row(const Int (&sums)[4]) : a(sums[0]), b(sums[1]), c(sums[2]), d(sums[3]) {}
    void put(Int (&sums)[4]) const {
      sums[0] = a;
      sums[1] = b;
      sums[2] = c;
      sums[3] = d;
    }
    template <int I>
    void add(int16x8_t rows, const int16x8x2_t& first, const int16x8x2_t& second) {
      coordinate<2 * I>(rows, first.val[0], second.val[0]);
      coordinate<2 * I + 1>(rows, first.val[1], second.val[1]);
    }
    template <int LANE>
    void coordinate(int16x8_t rows, int16x8_t first, int16x8_t second) {
      a = vmlal_laneq_s16(a, vget_low_s16(first), rows, LANE);
      b = vmlal_high_laneq_s16(b, first, rows, LANE);
      c = vmlal_laneq_s16(c, vget_low_s16(second), rows, LANE);
      d = vmlal_high_laneq_s16(d, second, rows, LANE);
    }
  };
  static void store_pairs(std::int16_t* to, uint64x2_t bytes) {  // as value - 128
    const uint8x16_t values = vreinterpretq_u8_u64(bytes);
    const uint8x16_t middle = vdupq_n_u8(128);
    vst1q_s16(to, vreinterpretq_s16_u16(vsubl_u8(vget_low_u8(values), vget_low_u8(middle))));
    vst1q_s16(to + 8, vreinterpretq_s16_u16(vsubl_high_u8(values, middle)));
  }
};

}  // namespace
