// The posterior mean's kernels for ARM processors with products of bytes: SDOT and UDOT add the products of four bytes
// by four to each of four sums. Both operands of one have the same sign, so unsigned bytes are taken less 128 where
// they meet signed ones, and what that changes is known from the sums of the others.
#include "cpu/simd.h"
#include "posterior_mean/posterior_mean.h"

#ifdef DIFFMEM_NEON_DOTPROD

#include <cstring>

#include "posterior_mean/posterior_mean_neon.h"

namespace diffmem::posterior_mean {
namespace {

using Packed = std::uint8_t;
using Weight = std::uint8_t;
using Sum = std::int32_t;

constexpr int kFloatRows = 4;  // of a tile of vectors in registers
void keep(Floats&) {}          // there are registers enough

// One row's sums with 16 columns, of which a vector holds four bytes of four.
struct Sums {
  Ints of;

  template <int LANE>
  void add(int8x16_t row, const int8x16_t (&columns)[4]) {
    of.a = vdotq_laneq_s32(of.a, columns[0], row, LANE);
    of.b = vdotq_laneq_s32(of.b, columns[1], row, LANE);
    of.c = vdotq_laneq_s32(of.c, columns[2], row, LANE);
    of.d = vdotq_laneq_s32(of.d, columns[3], row, LANE);
  }
};

// 16 bytes of a row less 128, from its byte 16·block on; zeros instead of what is beyond its end.
int8x16_t row_bytes(const Term& term, std::int64_t row, std::int64_t block) {
  const std::uint8_t* from = term.rows + row * term.stride + 16 * block;
  const std::int64_t rest = term.k - 16 * block;
  std::uint8_t end[16] = {};
  if (rest < 16) {
    std::memcpy(end, from, static_cast<std::size_t>(rest));
    from = end;
  }
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from), vdupq_n_u8(128)));
}

// R rows (1 or 4) and 16 columns: panel is their first step of `steps`, which lie `step` bytes apart. start: 128 times
// the sum of each column.
template <int R>
void score_tile(const Term& term, const std::int32_t* shift, const std::int8_t* panel, std::int64_t step,
                std::int64_t steps, Ints start, bool first, std::int64_t row, std::int64_t column,
                const ScoreRows& to) {
  Sums s0{start}, s1 = s0, s2 = s0, s3 = s0;
  for (std::int64_t block = 0; 4 * block < steps; ++block) {
    const std::int64_t here = simd::min<std::int64_t>(4, steps - 4 * block);
    const int8x16_t r0 = row_bytes(term, row, block);
    int8x16_t r1 = r0, r2 = r0, r3 = r0;
    if constexpr (R == 4) {
      r1 = row_bytes(term, row + 1, block);
      r2 = row_bytes(term, row + 2, block);
      r3 = row_bytes(term, row + 3, block);
    }
    const auto at = [&]<int LANE>() {
      if (LANE >= here) return;
      const int8x16_t columns[4] = {vld1q_s8(panel), vld1q_s8(panel + 16), vld1q_s8(panel + 32), vld1q_s8(panel + 48)};
      panel += step;
      s0.add<LANE>(r0, columns);
      if constexpr (R == 4) {
        s1.add<LANE>(r1, columns);
        s2.add<LANE>(r2, columns);
        s3.add<LANE>(r3, columns);
      }
    };
    at.template operator()<0>();
    at.template operator()<1>();
    at.template operator()<2>();
    at.template operator()<3>();
  }
  put_scores(term, shift, s0.of, first, row, column, to);
  if constexpr (R == 4) {
    put_scores(term, shift, s1.of, first, row + 1, column, to);
    put_scores(term, shift, s2.of, first, row + 2, column, to);
    put_scores(term, shift, s3.of, first, row + 3, column, to);
  }
}

void scores(const Term& term, const void* packed, const std::int32_t* shift, bool first, std::int64_t row,
            std::int64_t end, const ScoreRows& to, void*) {
  const std::int64_t steps = simd::divide_up<std::int64_t>(term.k, 4);
  for (std::int64_t c = 0; c < to.columns; c += kLanes) {
    const std::int64_t group = c / 64 * 64, step = 4 * simd::min<std::int64_t>(64, to.columns - group);
    const std::int8_t* panel = static_cast<const std::int8_t*>(packed) + 4 * (steps * group + (c - group));
    // Once for the block of rows: as much work as one row.
    Sums start{all_ints(0)};
    const int8x16_t ones = vdupq_n_s8(1);
    for (std::int64_t s = 0; s < steps; ++s) {
      const std::int8_t* p = panel + s * step;
      const int8x16_t columns[4] = {vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)};
      start.add<0>(ones, columns);
    }
    start.of = left(start.of, 7);
    std::int64_t r = row;
    for (; r + 4 <= end; r += 4) score_tile<4>(term, shift, panel, step, steps, start.of, first, r, c, to);
    for (; r < end; ++r) score_tile<1>(term, shift, panel, step, steps, start.of, first, r, c, to);
  }
}

struct WeightRows {
  const std::uint8_t* weights;
  std::int64_t stride;
};

WeightRows weight_rows(const std::uint8_t* weights, std::int64_t stride, std::int64_t, std::int64_t, Packed*) {
  return {weights, stride};
}

std::int64_t place_in_strip(std::int64_t j) { return j; }

// 64 pixels of 4 rows, as bytes: [four][64][4].
void interleave(const std::uint8_t* const (&rows)[4], std::int64_t pixels, Packed* strip, std::int64_t four) {
  for (std::int64_t j = 0; j < pixels; j += 16) {
    uint8x16x4_t of;
    for (int i = 0; i < 4; ++i) {
      std::uint8_t end[16] = {};
      const std::uint8_t* from = rows[i] + j;
      if (pixels < j + 16) {
        std::memcpy(end, from, static_cast<std::size_t>(pixels - j));
        from = end;
      }
      of.val[i] = vld1q_u8(from);
    }
    vst4q_u8(strip + 256 * four + 4 * j, of);
  }
}

// 128 times the sum of a row's weights, which the pixels have too much.
std::int32_t surplus(const std::uint8_t* weights, std::int64_t fours) {
  std::uint32_t sum = 0;
  for (std::int64_t i = 0; i < 4 * fours; ++i) sum += weights[i];
  return static_cast<std::int32_t>(128 * sum);  // at most 512 of 255
}

template <int R>
void weight_tile(const WeightRows& from, std::int64_t first, const Packed* panel, std::int64_t fours,
                 std::int32_t* sums) {
  static_assert(R == 1 || R == 4);
  const std::uint8_t* const weights = from.weights + first * from.stride;
  Ints less[R];
  for (int r = 0; r < R; ++r) less[r] = all_ints(surplus(weights + r * from.stride, fours));
  for (std::int64_t part = 0; part < 4; ++part) {
    std::int32_t* const at = sums + 16 * part;
    const auto begin = [&](int r) { return subtract(load_ints(at + r * kPixelBlock), less[r]); };
    Sums s0{begin(0)}, s1 = s0, s2 = s0, s3 = s0;
    if constexpr (R == 4) s1 = {begin(1)}, s2 = {begin(2)}, s3 = {begin(3)};
    for (std::int64_t s = 0; s < fours; ++s) {
      const Packed* p = panel + 256 * s + 64 * part;
      const uint8x16_t pixels[4] = {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
      const auto add = [&](Sums& to, int r) {
        std::uint32_t four;
        std::memcpy(&four, weights + r * from.stride + 4 * s, sizeof four);
        const uint8x16_t w = vreinterpretq_u8_u32(vdupq_n_u32(four));
        const auto dot = [&](int32x4_t sum, uint8x16_t values) {
          return vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(sum), w, values));
        };
        to.of = {dot(to.of.a, pixels[0]), dot(to.of.b, pixels[1]), dot(to.of.c, pixels[2]), dot(to.of.d, pixels[3])};
      };
      add(s0, 0);
      if constexpr (R == 4) {
        add(s1, 1);
        add(s2, 2);
        add(s3, 3);
      }
    }
    store(at, s0.of);
    if constexpr (R == 4) {
      store(at + kPixelBlock, s1.of);
      store(at + 2 * kPixelBlock, s2.of);
      store(at + 3 * kPixelBlock, s3.of);
    }
  }
}

}  // namespace
}  // namespace diffmem::posterior_mean

#include "posterior_mean/posterior_mean_simd.h"

namespace diffmem::posterior_mean {
namespace {
const Kernels kTable = {sizeof(Weight), sizeof(Packed), pack_bytes,  scores,    column_top,
                        column_mass,    select,         pair_logits, pair_sums, round_weights,
                        weighted_sums,  float_scores,   weigh,       float_sums};
}  // namespace

const Kernels* neon_dotprod_kernels() { return &kTable; }
}  // namespace diffmem::posterior_mean

#else

namespace diffmem::posterior_mean {
const Kernels* neon_dotprod_kernels() { return nullptr; }
}  // namespace diffmem::posterior_mean

#endif
