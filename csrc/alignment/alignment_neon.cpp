// The products of the alignment with NEON: six vectors of four templates against four windows at a time, 24
// of 32 registers.
#include "alignment/alignment.h"
#include "cpu/simd.h"

#ifdef DIFFMEM_NEON

#include <arm_neon.h>

namespace diffmem::alignment {

namespace {

struct Narrow {
  using Floats = float32x4_t;
  static constexpr int kLanes = 4;
  static Floats load(const float* p) { return vld1q_f32(p); }
  static Floats set1(float value) { return vdupq_n_f32(value); }
  static Floats zero() { return vdupq_n_f32(0); }
  static Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static void raise(Floats values, std::int32_t window, float* best, std::int32_t* position) {
    const Floats before = vld1q_f32(best);
    const uint32x4_t higher = vcgtq_f32(values, before);
    vst1q_f32(best, vbslq_f32(higher, values, before));
    vst1q_s32(position, vbslq_s32(higher, vdupq_n_s32(window), vld1q_s32(position)));
  }
};

using Wide = Narrow;
constexpr bool kUsesWide = false;
constexpr int kWindows = 4;

}  // namespace

}  // namespace diffmem::alignment

#include "alignment/alignment_simd.h"

namespace diffmem::alignment {
const Kernels* neon_kernels() { return &kTable; }
}  // namespace diffmem::alignment

#else

namespace diffmem::alignment {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace diffmem::alignment

#endif
