// The posterior mean's kernels with AVX2: bytes are widened to 16 bits, of which VPMADDWD multiplies 16 pairs (one of
// bytes would saturate).
#include "cpu/simd.h"
#include "posterior_mean/posterior_mean.h"

#ifdef DIFFMEM_AVX2
#include <immintrin.h>

#include <cstring>

namespace diffmem::posterior_mean {
namespace {

std::int32_t four_bytes(const void* p) {
  std::int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return bytes;
}

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
struct Mask {
  __m256 low, high;
};
using Packed = std::int16_t;
using Weight = std::int16_t;
using Sum = double;

constexpr std::int64_t kSumPixels = 64;
constexpr std::int64_t kWeightRows = 6;
constexpr int kFloatRows = 6;  // of a tile of vectors in registers

Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
Ints all_ints(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
Floats floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
Floats load_bytes(const std::uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return floats({_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))});
}
void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
__m256i load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store_ints(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
void store(std::int32_t* p, Ints x) {
  store_ints(p, x.low);
  store_ints(p + 8, x.high);
}
Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
Floats multiply_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
Ints subtract(Ints a, Ints b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
Ints either(Ints a, Ints b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
Ints left(Ints a, int bits) { return {_mm256_slli_epi32(a.low, bits), _mm256_slli_epi32(a.high, bits)}; }
Ints right(Ints a, int bits) { return {_mm256_srli_epi32(a.low, bits), _mm256_srli_epi32(a.high, bits)}; }
Ints smaller(Ints a, std::int32_t b) {
  return {_mm256_min_epi32(a.low, _mm256_set1_epi32(b)), _mm256_min_epi32(a.high, _mm256_set1_epi32(b))};
}
Ints truncated(Floats a) { return {_mm256_cvttps_epi32(a.low), _mm256_cvttps_epi32(a.high)}; }
Mask above(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ)};
}
Mask at_least(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ)};
}
Floats choose(Mask m, Floats a, Floats b) {
  return {_mm256_blendv_ps(b.low, a.low, m.low), _mm256_blendv_ps(b.high, a.high, m.high)};
}
Ints choose(Mask m, Ints a, Ints b) {
  return {_mm256_blendv_epi8(b.low, a.low, _mm256_castps_si256(m.low)),
          _mm256_blendv_epi8(b.high, a.high, _mm256_castps_si256(m.high))};
}
std::uint32_t bits(Mask m) {
  return static_cast<std::uint32_t>(_mm256_movemask_ps(m.low)) | static_cast<std::uint32_t>(_mm256_movemask_ps(m.high))
                                                                     << 8;
}

Floats nearest_whole(Floats a) {
  return {_mm256_round_ps(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
__m256 power_of_two(__m256 power) {  // whole, at least −126
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23));
}
Floats times_power_of_two(Floats a, Floats power) {
  return multiply(a, {power_of_two(power.low), power_of_two(power.high)});
}

// Keeps a sum in its register: nothing that comes later in the source is loaded before it is there.
#if defined(__GNUC__)
void keep(__m256i& sum) { asm volatile("" : "+x"(sum)); }
void keep(Floats& sum) { asm volatile("" : "+x"(sum.low), "+x"(sum.high)); }
#else
void keep(__m256i&) {}
void keep(Floats&) {}
#endif

double dot(const double* u, const std::uint8_t* y, const std::uint8_t* center, std::int64_t d) {
  __m256d sum[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
  std::int64_t j = 0;
  for (; j + 16 <= d; j += 16) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const auto wide = [&](const std::uint8_t* bytes) {
        return _mm_cvtepu8_epi32(_mm_cvtsi32_si128(four_bytes(bytes + j + 4 * part)));
      };
      const __m256d z = _mm256_cvtepi32_pd(_mm_sub_epi32(wide(y), wide(center)));
      sum[part] = _mm256_fmadd_pd(_mm256_loadu_pd(u + j + 4 * part), z, sum[part]);
    }
  }
  alignas(32) double parts[4];
  _mm256_store_pd(parts, _mm256_add_pd(_mm256_add_pd(sum[0], sum[1]), _mm256_add_pd(sum[2], sum[3])));
  double product = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  for (; j < d; ++j) product += u[j] * (static_cast<int>(y[j]) - static_cast<int>(center[j]));
  return product;
}

// Two 16-bit numbers as one lane.
__m256i all_pairs(const std::int16_t* p) { return _mm256_set1_epi32(four_bytes(p)); }

// R rows of [pairs][2] against 16 columns of [pairs][16][2].
template <int R>
void multiply_pairs(const std::int16_t* rows, std::int64_t stride, const std::int16_t* columns, std::int64_t pairs,
                    __m256i (&acc)[R][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  for (std::int64_t s = 0; s < pairs; ++s) {
    const __m256i low = load_ints(columns + 32 * s), high = load_ints(columns + 32 * s + 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256i a = all_pairs(rows + r * stride + 2 * s);
      acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(a, low));
      acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(a, high));
      keep(acc[r][0]);
      keep(acc[r][1]);
    }
  }
}

// [columns / 16][pairs][16][2].
void pack(const Term& term, std::int64_t, std::int64_t first, std::int64_t last, void* panel, std::int32_t*) {
  const std::int64_t pairs = 2 * simd::divide_up<std::int64_t>(term.k, 4);
  for (std::int64_t group = first; group < last; group += kLanes) {
    std::int16_t* to = static_cast<std::int16_t*>(panel) + 2 * pairs * group;
    simd::fill(to, 2 * pairs * kLanes, std::int16_t{0});
    for (std::int64_t c = group; c < simd::min(group + kLanes, term.count); ++c) {
      const std::int16_t* from = term.values + c * term.k;
      for (std::int64_t j = 0; j < term.k; ++j) to[j / 2 * 32 + (c - group) * 2 + j % 2] = from[j];
    }
  }
}

void widen(const std::uint8_t* from, const std::uint8_t* offset, std::int64_t count, std::int16_t* to) {
  const auto wide = [](const std::uint8_t* bytes) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  };
  std::int64_t j = 0;
  for (; j + 16 <= count; j += 16) store_ints(to + j, _mm256_sub_epi16(wide(from + j), wide(offset + j)));
  for (; j < count; ++j) to[j] = static_cast<std::int16_t>(from[j] - offset[j]);
}

template <int R>
void score_tile(const Term& term, const std::int16_t* columns, const std::int16_t* rows, std::int64_t pairs, bool first,
                std::int64_t row, std::int64_t column, const ScoreRows& to) {
  __m256i acc[R][2];
  multiply_pairs<R>(rows, kPixelChunk, columns, pairs, acc);
  const Floats scale = load(term.scale + column), weight = load(to.weight + column);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* out = to.out + (row + r) * to.columns + column;
    const Floats before = first ? multiply(weight, all(-to.half_norms[row + r])) : load(out);
    store(out, multiply_add(floats(Ints{acc[r][0], acc[r][1]}), scale, before));
  }
}

void scores(const Term& term, const void* panel, const std::int32_t*, bool first, std::int64_t row, std::int64_t end,
            const ScoreRows& to, void* scratch) {
  const std::int64_t all_pairs = 2 * simd::divide_up<std::int64_t>(term.k, 4);
  auto* const rows = static_cast<std::int16_t*>(scratch);
  for (std::int64_t k = 0; k < term.k; k += kPixelChunk, first = false) {
    const std::int64_t width = simd::min(kPixelChunk, term.k - k);
    std::int64_t pairs = simd::divide_up<std::int64_t>(width, 2);
    simd::hide(pairs);  // as in weighted_sums
    for (std::int64_t r = row; r < end; ++r) {
      std::int16_t* line = rows + (r - row) * kPixelChunk;
      const std::uint8_t* from = term.rows + r * term.stride + k;
      // The next part of the row, or the first of the row that takes its place: short pieces far apart, which the
      // processor does not foresee. Addresses beyond the rows do no harm.
      const std::int64_t following = k + width < term.k ? width : kRowBlock * term.stride - k;
      for (std::int64_t j = 0; j < simd::min(kPixelChunk, term.k); j += 64)
        _mm_prefetch(reinterpret_cast<const char*>(from) + following + j, _MM_HINT_T1);
      widen(from, term.offset + k, width, line);
      if (width % 2 != 0) line[width] = 0;
    }
    for (std::int64_t c = 0; c < to.columns; c += kLanes) {
      const std::int16_t* columns = static_cast<const std::int16_t*>(panel) + 2 * all_pairs * c + kLanes * k;
      std::int64_t r = row;
      for (; r + 6 <= end; r += 6) score_tile<6>(term, columns, rows + (r - row) * kPixelChunk, pairs, first, r, c, to);
      for (; r < end; ++r) score_tile<1>(term, columns, rows + (r - row) * kPixelChunk, pairs, first, r, c, to);
    }
  }
}

struct WeightRows {
  const Weight* weights;
  std::int64_t stride;
};

WeightRows weight_rows(const Weight* weights, std::int64_t stride, std::int64_t, std::int64_t, Packed*) {
  return {weights, stride};
}

std::int64_t place_in_strip(std::int64_t j) { return j; }

constexpr std::int64_t kQuarter = kImageChunk * 16;  // numbers of 16 pixels' part of a strip: [pairs][16][2]

// 64 pixels of 4 rows, less 128, as two pairs of rows.
void interleave(const std::uint8_t* const (&rows)[4], std::int64_t pixels, Packed* strip, std::int64_t four) {
  for (std::int64_t part = 0; 16 * part < pixels; ++part) {
    __m256i row[4];
    for (int i = 0; i < 4; ++i) {
      alignas(16) std::uint8_t end[16] = {};
      const std::uint8_t* from = rows[i] + 16 * part;
      if (pixels < 16 * part + 16) {
        std::memcpy(end, from, static_cast<std::size_t>(pixels - 16 * part));
        from = end;
      }
      row[i] = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                                _mm256_set1_epi16(128));
    }
    for (int pair = 0; pair < 2; ++pair) {
      const __m256i low = _mm256_unpacklo_epi16(row[2 * pair], row[2 * pair + 1]);
      const __m256i high = _mm256_unpackhi_epi16(row[2 * pair], row[2 * pair + 1]);
      Packed* to = strip + part * kQuarter + (2 * four + pair) * 32;
      store_ints(to, _mm256_permute2x128_si256(low, high, 0x20));
      store_ints(to + 16, _mm256_permute2x128_si256(low, high, 0x31));
    }
  }
}

// Adds whole numbers to float64 sums.
void add_to(double* sums, __m256i whole) {
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtepi32_pd(_mm256_castsi256_si128(whole))));
  _mm256_storeu_pd(sums + 4,
                   _mm256_add_pd(_mm256_loadu_pd(sums + 4), _mm256_cvtepi32_pd(_mm256_extracti128_si256(whole, 1))));
}

template <int R>
void weight_tile(const WeightRows& from, std::int64_t first, const Packed* panel, std::int64_t fours, Sum* sums) {
  for (std::int64_t part = 0; part < 4; ++part) {
    __m256i acc[R][2];
    multiply_pairs<R>(from.weights + first * from.stride, from.stride, panel + part * kQuarter, 2 * fours, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      add_to(sums + 16 * part + r * kPixelBlock, acc[r][0]);
      add_to(sums + 16 * part + r * kPixelBlock + 8, acc[r][1]);
    }
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

const Kernels* avx2_kernels() { return &kTable; }
}  // namespace diffmem::posterior_mean

#else

namespace diffmem::posterior_mean {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace diffmem::posterior_mean

#endif
