// The posterior mean's kernels with AVX-512 and VNNI: VPDPBUSD multiplies 64 pairs of bytes.
#include "cpu/simd.h"
#include "posterior_mean/posterior_mean.h"

#ifdef DIFFMEM_AVX512
#include <immintrin.h>

#include <cstring>

namespace diffmem::posterior_mean {
namespace {

std::int32_t four_bytes(const void* p) {
  std::int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return bytes;
}

using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;
using Packed = std::int8_t;
using Weight = std::uint8_t;
using Sum = std::int32_t;

constexpr std::int64_t kSumPixels = 128;
constexpr std::int64_t kWeightRows = 6;
constexpr int kFloatRows = 12;  // of a tile of vectors in registers

Floats all(float x) { return _mm512_set1_ps(x); }
Ints all_ints(std::int32_t x) { return _mm512_set1_epi32(x); }
Floats load(const float* p) { return _mm512_loadu_ps(p); }
Floats load_bytes(const std::uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
void store(std::int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
Ints left(Ints a, int bits) { return _mm512_slli_epi32(a, static_cast<unsigned>(bits)); }
Ints right(Ints a, int bits) { return _mm512_srli_epi32(a, static_cast<unsigned>(bits)); }
Ints smaller(Ints a, std::int32_t b) { return _mm512_min_epi32(a, _mm512_set1_epi32(b)); }
Ints truncated(Floats a) { return _mm512_cvttps_epi32(a); }
Mask above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
Floats choose(Mask m, Floats a, Floats b) { return _mm512_mask_mov_ps(b, m, a); }
Ints choose(Mask m, Ints a, Ints b) { return _mm512_mask_mov_epi32(b, m, a); }
std::uint32_t bits(Mask m) { return m; }

Floats nearest_whole(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Floats times_power_of_two(Floats a, Floats power) { return _mm512_scalef_ps(a, power); }

void keep(Floats&) {}  // there are registers enough

double dot(const double* u, const std::uint8_t* y, const std::uint8_t* center, std::int64_t d) {
  __m512d sum[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
  std::int64_t j = 0;
  for (; j + 32 <= d; j += 32) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const auto wide = [&](const std::uint8_t* bytes) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + j + 8 * part)));
      };
      const __m512d z = _mm512_cvtepi32_pd(_mm256_sub_epi32(wide(y), wide(center)));
      sum[part] = _mm512_fmadd_pd(_mm512_loadu_pd(u + j + 8 * part), z, sum[part]);
    }
  }
  double product = _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(sum[0], sum[1]), _mm512_add_pd(sum[2], sum[3])));
  for (; j < d; ++j) product += u[j] * (static_cast<int>(y[j]) - static_cast<int>(center[j]));
  return product;
}

struct Columns {
  const std::int8_t* panel;
  const std::int32_t* shift;
};

template <int R, int V>
void score_tile(const Term& term, const Columns& columns, bool first, std::int64_t row, std::int64_t column,
                const ScoreRows& to) {
  const std::int64_t whole = term.k / 4, rest = term.k - 4 * whole;
  // The bytes beyond the last whole step, with zeros after them: memory may end where the last row does.
  std::uint8_t ends[4 * R] = {};
  if (rest > 0)
    for (int r = 0; r < R; ++r)
      std::memcpy(ends + 4 * r, term.rows + (row + r) * term.stride + 4 * whole, static_cast<std::size_t>(rest));
  const std::int8_t* panel = columns.panel + column * 4 * (whole + (rest > 0));
  __m512i acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_si512();
  for (int part = 0; part < 2; ++part) {
    const std::uint8_t* bytes = part ? ends : term.rows + row * term.stride;
    const std::int64_t stride = part ? 4 : term.stride, steps = part ? rest > 0 : whole;
    for (std::int64_t s = 0; s < steps; ++s, bytes += 4, panel += 64 * V) {
      __m512i b[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) b[v] = _mm512_loadu_si512(panel + 64 * v);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512i a = _mm512_set1_epi32(four_bytes(bytes + r * stride));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], a, b[v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const std::int64_t c = column + kLanes * v;
    const __m512i shift = _mm512_loadu_si512(columns.shift + c);
    const __m512 scale = _mm512_loadu_ps(term.scale + c);
    const __m512 weight = _mm512_loadu_ps(to.weight + c);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* out = to.out + (row + r) * to.columns + c;
      const __m512 before =
          first ? _mm512_mul_ps(weight, _mm512_set1_ps(-to.half_norms[row + r])) : _mm512_loadu_ps(out);
      _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][v], shift)), scale, before));
    }
  }
}

template <int V>
void score_rows(const Term& term, const Columns& columns, bool first, std::int64_t row, std::int64_t end,
                std::int64_t column, const ScoreRows& to) {
  constexpr int R = V == 4 ? 6 : V == 3 ? 8 : V == 2 ? 12 : 16;
  for (; row + R <= end; row += R) score_tile<R, V>(term, columns, first, row, column, to);
  for (; row < end; ++row) score_tile<1, V>(term, columns, first, row, column, to);
}

void scores(const Term& term, const void* panel, const std::int32_t* shift, bool first, std::int64_t row,
            std::int64_t end, const ScoreRows& to, void*) {
  const Columns columns{static_cast<const std::int8_t*>(panel), shift};
  std::int64_t c = 0;
  for (; c + 64 <= to.columns; c += 64) score_rows<4>(term, columns, first, row, end, c, to);
  switch ((to.columns - c) / kLanes) {
    case 3: score_rows<3>(term, columns, first, row, end, c, to); break;
    case 2: score_rows<2>(term, columns, first, row, end, c, to); break;
    case 1: score_rows<1>(term, columns, first, row, end, c, to); break;
    default: break;
  }
}

struct WeightRows {
  const Weight* weights;
  std::int64_t stride;
};

WeightRows weight_rows(const Weight* weights, std::int64_t stride, std::int64_t, std::int64_t, Packed*) {
  return {weights, stride};
}

std::int64_t place_in_strip(std::int64_t j) { return j % 16 / 4 * 16 + j / 16 * 4 + j % 4; }

// 64 pixels of 4 rows interleaved, less 128: vector v, lane l, place t holds pixel 16·l + 4·v + t of the four rows.
void interleave(const std::uint8_t* const (&rows)[4], std::int64_t pixels, Packed* strip, std::int64_t four) {
  const __mmask64 width = pixels >= 64 ? ~__mmask64{0} : (__mmask64{1} << pixels) - 1;
  Packed* to = strip + 256 * four;
  __m512i row[4];
  for (int i = 0; i < 4; ++i)
    row[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(width, rows[i]), _mm512_set1_epi8(-128));
  const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
  _mm512_store_si512(to, _mm512_unpacklo_epi16(low01, low23));
  _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(low01, low23));
  _mm512_store_si512(to + 128, _mm512_unpacklo_epi16(high01, high23));
  _mm512_store_si512(to + 192, _mm512_unpackhi_epi16(high01, high23));
}

template <int R>
void weight_tile(const WeightRows& from, std::int64_t first, const Packed* panel, std::int64_t fours,
                 std::int32_t* sums) {
  const std::uint8_t* weights = from.weights + first * from.stride;
  __m512i acc[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[r][v] = _mm512_load_si512(sums + r * kPixelBlock + kLanes * v);
  for (std::int64_t s = 0; s < fours; ++s) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) b[v] = _mm512_load_si512(panel + 256 * s + 64 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i a = _mm512_set1_epi32(four_bytes(weights + r * from.stride + 4 * s));
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_store_si512(sums + r * kPixelBlock + kLanes * v, acc[r][v]);
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

const Kernels* avx512_kernels() { return &kTable; }
}  // namespace diffmem::posterior_mean

#else

namespace diffmem::posterior_mean {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace diffmem::posterior_mean

#endif
