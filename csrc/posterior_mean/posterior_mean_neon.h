// The numbers that the posterior mean's loops (posterior_mean_simd.h) compute with on 64-bit ARM processors; included
// by posterior_mean_neon.cpp and posterior_mean_neon_dotprod.cpp, which have products of their own.
#include <arm_neon.h>

#include <cstdint>

namespace diffmem::posterior_mean {
namespace {

// Four vectors of four numbers.
struct Floats {
  float32x4_t a, b, c, d;
};
struct Ints {
  int32x4_t a, b, c, d;
};
struct Mask {
  uint32x4_t a, b, c, d;
};

constexpr std::int64_t kSumPixels = 32;  // 8 sums + 8 vectors of the center + what is loaded, of 32 registers
constexpr std::int64_t kWeightRows = 4;  // 16 sums

Floats all(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {v, v, v, v};
}
Ints all_ints(std::int32_t x) {
  const int32x4_t v = vdupq_n_s32(x);
  return {v, v, v, v};
}
Floats load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
Ints load_ints(const std::int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}; }
Floats floats(Ints x) { return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b), vcvtq_f32_s32(x.c), vcvtq_f32_s32(x.d)}; }
Floats load_bytes(const std::uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
          vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))};
}
void store(float* p, Floats x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
  vst1q_f32(p + 8, x.c);
  vst1q_f32(p + 12, x.d);
}
void store(std::int32_t* p, Ints x) {
  vst1q_s32(p, x.a);
  vst1q_s32(p + 4, x.b);
  vst1q_s32(p + 8, x.c);
  vst1q_s32(p + 12, x.d);
}
Floats add(Floats x, Floats y) {
  return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)};
}
Floats subtract(Floats x, Floats y) {
  return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b), vsubq_f32(x.c, y.c), vsubq_f32(x.d, y.d)};
}
Floats multiply(Floats x, Floats y) {
  return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)};
}
Floats multiply_add(Floats x, Floats y, Floats z) {
  return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
Ints add(Ints x, Ints y) {
  return {vaddq_s32(x.a, y.a), vaddq_s32(x.b, y.b), vaddq_s32(x.c, y.c), vaddq_s32(x.d, y.d)};
}
Ints subtract(Ints x, Ints y) {
  return {vsubq_s32(x.a, y.a), vsubq_s32(x.b, y.b), vsubq_s32(x.c, y.c), vsubq_s32(x.d, y.d)};
}
Ints either(Ints x, Ints y) {
  return {vorrq_s32(x.a, y.a), vorrq_s32(x.b, y.b), vorrq_s32(x.c, y.c), vorrq_s32(x.d, y.d)};
}
Ints left(Ints x, int bits) {
  const int32x4_t by = vdupq_n_s32(bits);
  return {vshlq_s32(x.a, by), vshlq_s32(x.b, by), vshlq_s32(x.c, by), vshlq_s32(x.d, by)};
}
Ints right(Ints x, int bits) {  // of numbers that are not negative
  const int32x4_t by = vdupq_n_s32(-bits);
  return {vshlq_s32(x.a, by), vshlq_s32(x.b, by), vshlq_s32(x.c, by), vshlq_s32(x.d, by)};
}
Ints smaller(Ints x, std::int32_t most) {
  const int32x4_t y = vdupq_n_s32(most);
  return {vminq_s32(x.a, y), vminq_s32(x.b, y), vminq_s32(x.c, y), vminq_s32(x.d, y)};
}
Ints truncated(Floats x) { return {vcvtq_s32_f32(x.a), vcvtq_s32_f32(x.b), vcvtq_s32_f32(x.c), vcvtq_s32_f32(x.d)}; }
Mask above(Floats x, Floats y) {
  return {vcgtq_f32(x.a, y.a), vcgtq_f32(x.b, y.b), vcgtq_f32(x.c, y.c), vcgtq_f32(x.d, y.d)};
}
Mask at_least(Floats x, Floats y) {
  return {vcgeq_f32(x.a, y.a), vcgeq_f32(x.b, y.b), vcgeq_f32(x.c, y.c), vcgeq_f32(x.d, y.d)};
}
Floats choose(Mask m, Floats x, Floats y) {
  return {vbslq_f32(m.a, x.a, y.a), vbslq_f32(m.b, x.b, y.b), vbslq_f32(m.c, x.c, y.c), vbslq_f32(m.d, x.d, y.d)};
}
Ints choose(Mask m, Ints x, Ints y) {
  return {vbslq_s32(m.a, x.a, y.a), vbslq_s32(m.b, x.b, y.b), vbslq_s32(m.c, x.c, y.c), vbslq_s32(m.d, x.d, y.d)};
}
std::uint32_t bits(Mask m) {
  const std::uint16_t places[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint16x8_t low = vcombine_u16(vmovn_u32(m.a), vmovn_u32(m.b));
  const uint16x8_t high = vcombine_u16(vmovn_u32(m.c), vmovn_u32(m.d));
  const uint16x8_t place = vld1q_u16(places);
  return vaddvq_u16(vandq_u16(low, place)) | static_cast<std::uint32_t>(vaddvq_u16(vandq_u16(high, place))) << 8;
}

Floats nearest_whole(Floats x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b), vrndnq_f32(x.c), vrndnq_f32(x.d)}; }
float32x4_t power_of_two(float32x4_t power) {  // whole, at least −126
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(power), vdupq_n_s32(127)), 23));
}
Floats times_power_of_two(Floats x, Floats power) {
  return multiply(x, {power_of_two(power.a), power_of_two(power.b), power_of_two(power.c), power_of_two(power.d)});
}

double dot(const double* u, const std::uint8_t* y, const std::uint8_t* center, std::int64_t d) {
  float64x2_t s0 = vdupq_n_f64(0), s1 = s0, s2 = s0, s3 = s0;
  std::int64_t j = 0;
  for (; j + 8 <= d; j += 8) {
    const int16x8_t z = vreinterpretq_s16_u16(vsubl_u8(vld1_u8(y + j), vld1_u8(center + j)));
    const int32x4_t low = vmovl_s16(vget_low_s16(z)), high = vmovl_high_s16(z);
    s0 = vfmaq_f64(s0, vld1q_f64(u + j), vcvtq_f64_s64(vmovl_s32(vget_low_s32(low))));
    s1 = vfmaq_f64(s1, vld1q_f64(u + j + 2), vcvtq_f64_s64(vmovl_high_s32(low)));
    s2 = vfmaq_f64(s2, vld1q_f64(u + j + 4), vcvtq_f64_s64(vmovl_s32(vget_low_s32(high))));
    s3 = vfmaq_f64(s3, vld1q_f64(u + j + 6), vcvtq_f64_s64(vmovl_high_s32(high)));
  }
  double product = vaddvq_f64(vaddq_f64(vaddq_f64(s0, s1), vaddq_f64(s2, s3)));
  for (; j < d; ++j) product += u[j] * (static_cast<int>(y[j]) - static_cast<int>(center[j]));
  return product;
}

// The scores of one row and 16 columns from the sums of their products.
void put_scores(const Term& term, const std::int32_t* shift, Ints sums, bool first, std::int64_t row,
                std::int64_t column, const ScoreRows& to) {
  float* out = to.out + row * to.columns + column;
  const Floats before = first ? multiply(load(to.weight + column), all(-to.half_norms[row])) : load(out);
  store(out, multiply_add(floats(subtract(sums, load_ints(shift + column))), load(term.scale + column), before));
}

}  // namespace
}  // namespace diffmem::posterior_mean
