// The posterior mean's kernels with NEON: bytes are widened to 16 bits, of which SMLAL multiplies four by one and adds
// to four sums. Sums are the same whole numbers as everywhere.
#include "cpu/simd.h"
#include "posterior_mean/posterior_mean.h"

#ifdef DIFFMEM_NEON

#include <cstring>

#include "posterior_mean/posterior_mean_neon.h"

namespace diffmem::posterior_mean {
namespace {

using Packed = std::int16_t;
using Weight = std::uint8_t;
using Sum = std::int32_t;

constexpr int kFloatRows = 4;  // of a tile of vectors in registers
void keep(Floats&) {}          // there are registers enough

// One row's sums with 16 columns. Each with a name: those of an array GCC keeps in memory.
struct Sums {
  Ints of;

  template <int LANE>
  void add(int16x4_t row, int16x8_t low, int16x8_t high) {
    of.a = vmlal_lane_s16(of.a, vget_low_s16(low), row, LANE);
    of.b = vmlal_high_lane_s16(of.b, low, row, LANE);
    of.c = vmlal_lane_s16(of.c, vget_low_s16(high), row, LANE);
    of.d = vmlal_high_lane_s16(of.d, high, row, LANE);
  }
};

// Four rows against `fours` times four of K, added to four sums; columns [k][16].
void multiply_rows(const std::int16_t* rows, std::int64_t stride, const std::int16_t* columns, std::int64_t fours,
                   Sums& s0, Sums& s1, Sums& s2, Sums& s3) {
  Sums a = s0, b = s1, c = s2, d = s3;
  for (std::int64_t s = 0; s < fours; ++s, rows += 4, columns += 64) {
    const int16x4_t r0 = vld1_s16(rows), r1 = vld1_s16(rows + stride);
    const int16x4_t r2 = vld1_s16(rows + 2 * stride), r3 = vld1_s16(rows + 3 * stride);
    const auto at = [&]<int LANE>() {
      const int16x8_t low = vld1q_s16(columns + 16 * LANE), high = vld1q_s16(columns + 16 * LANE + 8);
      a.add<LANE>(r0, low, high);
      b.add<LANE>(r1, low, high);
      c.add<LANE>(r2, low, high);
      d.add<LANE>(r3, low, high);
    };
    at.template operator()<0>();
    at.template operator()<1>();
    at.template operator()<2>();
    at.template operator()<3>();
  }
  s0 = a, s1 = b, s2 = c, s3 = d;
}

void multiply_row(const std::int16_t* row, const std::int16_t* columns, std::int64_t fours, Sums& sums) {
  Sums a = sums;
  for (std::int64_t s = 0; s < fours; ++s, row += 4, columns += 64) {
    const int16x4_t r = vld1_s16(row);
    a.add<0>(r, vld1q_s16(columns), vld1q_s16(columns + 8));
    a.add<1>(r, vld1q_s16(columns + 16), vld1q_s16(columns + 24));
    a.add<2>(r, vld1q_s16(columns + 32), vld1q_s16(columns + 40));
    a.add<3>(r, vld1q_s16(columns + 48), vld1q_s16(columns + 56));
  }
  sums = a;
}

// A term's columns as [columns / 16][4 * ceil(k / 4)][16] 16-bit numbers.
void pack(const Term& term, std::int64_t, std::int64_t first, std::int64_t last, void* panel, std::int32_t* shift) {
  const std::int64_t stride = 4 * simd::divide_up<std::int64_t>(term.k, 4);
  for (std::int64_t c = first; c < last; ++c) {
    std::int16_t* to = static_cast<std::int16_t*>(panel) + c / kLanes * kLanes * stride + c % kLanes;
    const std::int16_t* from = term.values + c * term.k;
    shift[c] = 0;
    for (std::int64_t j = 0; j < stride; ++j) {
      const bool given = c < term.count && j < term.k;
      to[kLanes * j] = given ? from[j] : std::int16_t{0};
      if (given) shift[c] += from[j] * term.offset[j];
    }
  }
}

void widen(const std::uint8_t* from, std::int64_t count, std::int16_t* to) {
  std::int64_t j = 0;
  for (; j + 8 <= count; j += 8) vst1q_s16(to + j, vreinterpretq_s16_u16(vmovl_u8(vld1_u8(from + j))));
  for (; j < count; ++j) to[j] = from[j];
}

void scores(const Term& term, const void* panel, const std::int32_t* shift, bool first, std::int64_t row,
            std::int64_t end, const ScoreRows& to, void* memory) {
  auto* const scratch = static_cast<std::int16_t*>(memory);
  const std::int64_t fours = simd::divide_up<std::int64_t>(term.k, 4), stride = 4 * fours;
  for (std::int64_t r = row; r < end; ++r) {
    std::int16_t* line = scratch + (r - row) * stride;
    widen(term.rows + r * term.stride, term.k, line);
    simd::fill(line + term.k, stride - term.k, std::int16_t{0});
  }
  for (std::int64_t c = 0; c < to.columns; c += kLanes) {
    const std::int16_t* columns = static_cast<const std::int16_t*>(panel) + c * stride;
    std::int64_t r = row;
    for (; r + 4 <= end; r += 4) {
      Sums s0{all_ints(0)}, s1 = s0, s2 = s0, s3 = s0;
      multiply_rows(scratch + (r - row) * stride, stride, columns, fours, s0, s1, s2, s3);
      put_scores(term, shift, s0.of, first, r, c, to);
      put_scores(term, shift, s1.of, first, r + 1, c, to);
      put_scores(term, shift, s2.of, first, r + 2, c, to);
      put_scores(term, shift, s3.of, first, r + 3, c, to);
    }
    for (; r < end; ++r) {
      Sums sums{all_ints(0)};
      multiply_row(scratch + (r - row) * stride, columns, fours, sums);
      put_scores(term, shift, sums.of, first, r, c, to);
    }
  }
}

struct WeightRows {
  const std::int16_t* weights;
  std::int64_t stride;
};

WeightRows weight_rows(const std::uint8_t* weights, std::int64_t stride, std::int64_t count, std::int64_t images,
                       Packed* wide) {
  for (std::int64_t c = 0; c < count; ++c) widen(weights + c * stride, images, wide + c * kImageChunk);
  return {wide, kImageChunk};
}

std::int64_t place_in_strip(std::int64_t j) { return j; }

constexpr std::int64_t kQuarter = kImageChunk * 16;  // numbers of 16 pixels' part of a strip: [images][16]

// 64 pixels of 4 rows, less 128.
void interleave(const std::uint8_t* const (&rows)[4], std::int64_t pixels, Packed* strip, std::int64_t four) {
  const uint8x16_t middle = vdupq_n_u8(128);
  for (std::int64_t part = 0; 16 * part < pixels; ++part) {
    for (int i = 0; i < 4; ++i) {
      std::uint8_t end[16] = {};
      const std::uint8_t* from = rows[i] + 16 * part;
      if (pixels < 16 * part + 16) {
        std::memcpy(end, from, static_cast<std::size_t>(pixels - 16 * part));
        from = end;
      }
      const uint8x16_t bytes = vld1q_u8(from);
      Packed* to = strip + part * kQuarter + (4 * four + i) * 16;
      vst1q_s16(to, vreinterpretq_s16_u16(vsubl_u8(vget_low_u8(bytes), vget_low_u8(middle))));
      vst1q_s16(to + 8, vreinterpretq_s16_u16(vsubl_high_u8(bytes, middle)));
    }
  }
}

template <int R>
void weight_tile(const WeightRows& from, std::int64_t first, const Packed* panel, std::int64_t fours,
                 std::int32_t* sums) {
  static_assert(R == 1 || R == 4);
  const std::int16_t* weights = from.weights + first * from.stride;
  for (std::int64_t part = 0; part < 4; ++part) {
    const Packed* columns = panel + part * kQuarter;
    std::int32_t* at = sums + 16 * part;
    Sums s0{load_ints(at)};
    if constexpr (R == 1) {
      multiply_row(weights, columns, fours, s0);
    } else {
      Sums s1{load_ints(at + kPixelBlock)}, s2{load_ints(at + 2 * kPixelBlock)}, s3{load_ints(at + 3 * kPixelBlock)};
      multiply_rows(weights, from.stride, columns, fours, s0, s1, s2, s3);
      store(at + kPixelBlock, s1.of);
      store(at + 2 * kPixelBlock, s2.of);
      store(at + 3 * kPixelBlock, s3.of);
    }
    store(at, s0.of);
  }
}

}  // namespace
}  // namespace diffmem::posterior_mean

#include "posterior_mean/posterior_mean_simd.h"

namespace diffmem::posterior_mean {
namespace {
const Kernels kTable = {sizeof(Weight), sizeof(Packed), pack,        scores,    column_top,
                        column_mass,    select,         pair_logits, pair_sums, round_weights,
                        weighted_sums,  float_scores,   weigh,       float_sums};
}  // namespace

const Kernels* neon_kernels() { return &kTable; }
}  // namespace diffmem::posterior_mean

#else

namespace diffmem::posterior_mean {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace diffmem::posterior_mean

#endif
