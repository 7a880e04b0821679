// The loops of posterior_mean.h with AVX-512/VNNI; elsewhere there are none, and `available` says so.
//
// Both products keep a tile of sums in registers: 4 vectors of 16 columns by 6 rows, 24 sums, 4 + 1 registers for the
// operands. A step (4 bytes of K) is 24 multiply-adds and 10 loads. scores() broadcasts 4 bytes of a row and holds the
// columns in panels; a block of rows stays in the cache while all columns pass by. weighted_sums() broadcasts the
// weights of 4 images and holds 64 pixels of 4 images interleaved, packed once for all columns.
//
// Measured on one core of an AMD EPYC (Zen 4, 2.6 GHz, float32 peak 116 Gop/s, 8-bit peak 462): the tile loop runs at
// 415–425 Gop/s; 5x5, 9x3 and 12x2 tiles at 380–425; with rows straight from memory instead of blocks that stay in the
// cache 140–220. Cutting K to keep the panel in the first-level cache gained nothing.
//
// The instructions are turned on for the functions of this file only, after all headers: what is instantiated from
// those (std::vector, the sharing of work) may be linked into code for older processors.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "cpu/features.h"
#include "cpu/share.h"
#include "posterior_mean/posterior_mean.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
#endif

namespace diffmem::posterior_mean {

namespace {

using cpu::share;

constexpr std::int64_t kRowBlock = 48;     // rows that stay in the cache while the columns pass by
constexpr std::int64_t kImageChunk = 512;  // images packed at a time in weighted_sums
constexpr std::int64_t kPixelBlock = 256;  // pixels packed at a time
constexpr std::int64_t kStrip = 512;       // rows of scores per work item

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int32_t four_bytes(const std::uint8_t* p) {
  std::int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return bytes;
}

struct ScoreRow {
  std::int64_t columns;
  const float* half_norms;
  const float* weight;
  float* out;
};

template <int R, int V>
void score_tile(const Term& term, bool first, std::int64_t row, std::int64_t column, const ScoreRow& to) {
  const std::int64_t whole = term.k / 4, rest = term.k - 4 * whole;
  // The bytes beyond the last whole step, with zeros after them: memory may end where the last row does.
  std::uint8_t ends[4 * R] = {};
  if (rest > 0)
    for (int r = 0; r < R; ++r)
      std::memcpy(ends + 4 * r, term.rows + (row + r) * term.stride + 4 * whole, static_cast<std::size_t>(rest));
  const std::int8_t* panel = term.panel + column * 4 * (whole + (rest > 0));
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
    const __m512i shift = _mm512_loadu_si512(term.shift + c);
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
void score_rows(const Term& term, bool first, std::int64_t row, std::int64_t end, std::int64_t column,
                const ScoreRow& to) {
  constexpr int R = V == 4 ? 6 : V == 3 ? 8 : V == 2 ? 12 : 16;
  for (; row + R <= end; row += R) score_tile<R, V>(term, first, row, column, to);
  for (; row < end; ++row) score_tile<1, V>(term, first, row, column, to);
}

// e^x within 2e-7 of itself, 0 for x < −87.
__m512 exponential(__m512 x) {
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // x − whole·ln 2 in two parts, so that large x lose nothing.
  const __m512 f = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f),
                                    _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x));
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  const __mmask16 large = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
  return _mm512_maskz_scalef_ps(large, p, whole);
}

}  // namespace

bool available() { return cpu::level() >= cpu::Level::avx512; }

void scores(const std::vector<Term>& terms, std::int64_t n, std::int64_t columns, const float* half_norms,
            const float* weight, bool add, float* out, int threads) {
  const ScoreRow to{columns, half_norms, weight, out};
  share(divide_up(n, kRowBlock), threads, [&] {
    return [&](std::int64_t block) {
      const std::int64_t row = block * kRowBlock, end = std::min(n, row + kRowBlock);
      for (const Term& term : terms) {
        const bool first = !add && &term == &terms.front();
        std::int64_t c = 0;
        for (; c + 64 <= columns; c += 64) score_rows<4>(term, first, row, end, c, to);
        switch ((columns - c) / kLanes) {
          case 3: score_rows<3>(term, first, row, end, c, to); break;
          case 2: score_rows<2>(term, first, row, end, c, to); break;
          case 1: score_rows<1>(term, first, row, end, c, to); break;
          default: break;
        }
      }
    };
  });
}

void column_top(const float* scores, std::int64_t n, std::int64_t columns, float* top, std::int64_t* where,
                int threads) {
  const std::int64_t groups = columns / kLanes, strips = divide_up(n, kStrip);
  std::vector<float> best(static_cast<std::size_t>(strips * columns));
  std::vector<std::int32_t> place(best.size());
  share(strips, threads, [&] {
    return [&](std::int64_t strip) {
      const std::int64_t end = std::min(n, (strip + 1) * kStrip);
      for (std::int64_t g = 0; g < groups; ++g) {
        __m512 highest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        __m512i at = _mm512_setzero_si512();
        for (std::int64_t i = strip * kStrip; i < end; ++i) {
          const __m512 s = _mm512_loadu_ps(scores + i * columns + g * kLanes);
          const __mmask16 higher = _mm512_cmp_ps_mask(s, highest, _CMP_GT_OQ);
          highest = _mm512_mask_mov_ps(highest, higher, s);
          at = _mm512_mask_set1_epi32(at, higher, static_cast<std::int32_t>(i));
        }
        _mm512_storeu_ps(&best[strip * columns + g * kLanes], highest);
        _mm512_storeu_si512(&place[strip * columns + g * kLanes], at);
      }
    };
  });
  for (std::int64_t c = 0; c < columns; ++c) {
    std::int64_t winner = 0;
    for (std::int64_t s = 1; s < strips; ++s)
      if (best[s * columns + c] > best[winner * columns + c]) winner = s;
    top[c] = best[winner * columns + c];
    where[c] = place[winner * columns + c];
  }
}

void column_mass(const float* scores, std::int64_t n, std::int64_t columns, const float* top, double* mass,
                 int threads) {
  const std::int64_t groups = columns / kLanes, strips = divide_up(n, kStrip);
  std::vector<float> sums(static_cast<std::size_t>(strips * columns));
  share(strips, threads, [&] {
    return [&](std::int64_t strip) {
      const std::int64_t end = std::min(n, (strip + 1) * kStrip);
      for (std::int64_t g = 0; g < groups; ++g) {
        const __m512 highest = _mm512_loadu_ps(top + g * kLanes);
        __m512 sum = _mm512_setzero_ps();
        for (std::int64_t i = strip * kStrip; i < end; ++i)
          sum = _mm512_add_ps(sum,
                              exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i * columns + g * kLanes), highest)));
        _mm512_storeu_ps(&sums[strip * columns + g * kLanes], sum);
      }
    };
  });
  for (std::int64_t c = 0; c < columns; ++c) {
    mass[c] = 0;
    for (std::int64_t s = 0; s < strips; ++s) mass[c] += sums[s * columns + c];
  }
}

Pairs select(const float* scores, std::int64_t n, std::int64_t columns, const float* threshold, const float* reach,
             const float* slack, std::int64_t limit, int threads) {
  const std::int64_t groups = columns / kLanes, strips = divide_up(n, kStrip);
  struct Found {
    std::int32_t column, image;
  };
  std::vector<std::vector<Found>> found(static_cast<std::size_t>(strips));
  std::atomic<std::int64_t> total{0};
  share(strips, threads, [&] {
    return [&](std::int64_t strip) {
      const std::int64_t end = std::min(n, (strip + 1) * kStrip);
      std::vector<Found>& mine = found[strip];
      std::int64_t count = 0;
      const bool list = total <= limit;
      for (std::int64_t i = strip * kStrip; i < end; ++i) {
        const __m512 loose = _mm512_set1_ps(slack[i]);
        for (std::int64_t g = 0; g < groups; ++g) {
          const __m512 highest = _mm512_fmadd_ps(_mm512_loadu_ps(reach + g * kLanes), loose,
                                                 _mm512_loadu_ps(scores + i * columns + g * kLanes));
          std::uint32_t kept = _mm512_cmp_ps_mask(highest, _mm512_loadu_ps(threshold + g * kLanes), _CMP_GE_OQ);
          count += __builtin_popcount(kept);
          if (!list) continue;
          for (; kept; kept &= kept - 1)
            mine.push_back({static_cast<std::int32_t>(g * kLanes + __builtin_ctz(kept)), static_cast<std::int32_t>(i)});
        }
      }
      total += count;
    };
  });
  Pairs pairs;
  pairs.starts.assign(static_cast<std::size_t>(columns) + 1, 0);
  pairs.total = total;
  pairs.complete = total <= limit;
  if (!pairs.complete) return pairs;
  for (const auto& strip : found)
    for (const Found& pair : strip) ++pairs.starts[pair.column + 1];
  for (std::int64_t c = 0; c < columns; ++c) pairs.starts[c + 1] += pairs.starts[c];
  pairs.images.resize(static_cast<std::size_t>(pairs.starts.back()));
  std::vector<std::int64_t> next(pairs.starts.begin(), pairs.starts.end() - 1);
  for (const auto& strip : found)
    for (const Found& pair : strip) pairs.images[next[pair.column]++] = pair.image;
  return pairs;
}

void pair_logits(const ByteRows& rows, const double* queries, const double* half_norms, const double* weight,
                 const std::int64_t* starts, const std::int32_t* images, std::int64_t columns, double* out,
                 int threads) {
  constexpr std::int64_t kPart = 256;  // pairs per work item
  std::vector<std::int64_t> column, begin;
  for (std::int64_t c = 0; c < columns; ++c)
    for (std::int64_t p = starts[c]; p < starts[c + 1]; p += kPart) column.push_back(c), begin.push_back(p);
  share(static_cast<std::int64_t>(column.size()), threads, [&] {
    return [&](std::int64_t item) {
      const std::int64_t c = column[item], end = std::min(starts[c + 1], begin[item] + kPart);
      const double* u = queries + c * rows.d;
      for (std::int64_t p = begin[item]; p < end; ++p) {
        const std::uint8_t* y = rows.data + images[p] * rows.stride;
        if (p + 1 < end) {
          const std::uint8_t* following = rows.data + images[p + 1] * rows.stride;
          for (std::int64_t j = 0; j < rows.d; j += 64) _mm_prefetch(following + j, _MM_HINT_T0);
        }
        __m512d sum[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
        std::int64_t j = 0;
        for (; j + 32 <= rows.d; j += 32) {
#pragma GCC unroll 4
          for (int part = 0; part < 4; ++part) {
            const auto wide = [&](const std::uint8_t* bytes) {
              return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + j + 8 * part)));
            };
            const __m512d z = _mm512_cvtepi32_pd(_mm256_sub_epi32(wide(y), wide(rows.centre)));
            sum[part] = _mm512_fmadd_pd(_mm512_loadu_pd(u + j + 8 * part), z, sum[part]);
          }
        }
        double product =
            _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(sum[0], sum[1]), _mm512_add_pd(sum[2], sum[3])));
        for (; j < rows.d; ++j) product += u[j] * (static_cast<int>(y[j]) - static_cast<int>(rows.centre[j]));
        out[p] = (product - half_norms[images[p]]) * weight[c];
      }
    };
  });
}

void pair_sums(const ByteRows& rows, const double* weights, const std::int64_t* starts, const std::int32_t* images,
               std::int64_t columns, double* out, int threads) {
  constexpr std::int64_t kPixels = 128, kPart = 128;  // float32 sums of so many rows are added up in float64
  const std::int64_t pixel_blocks = divide_up(rows.d, kPixels);
  share(columns, threads, [&] {
    return [&](std::int64_t c) {
      double* sum = out + c * rows.d;
      std::fill(sum, sum + rows.d, 0.0);
      for (std::int64_t part = starts[c]; part < starts[c + 1]; part += kPart) {
        const std::int64_t end = std::min(starts[c + 1], part + kPart);
        for (std::int64_t block = 0; block < pixel_blocks; ++block) {
          const std::int64_t j = block * kPixels, width = std::min(kPixels, rows.d - j);
          if (width == kPixels) {
            __m512 acc[kPixels / kLanes], centre[kPixels / kLanes];
#pragma GCC unroll 8
            for (int v = 0; v < kPixels / kLanes; ++v) {
              acc[v] = _mm512_setzero_ps();
              centre[v] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
                  _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.centre + j + kLanes * v))));
            }
            for (std::int64_t p = part; p < end; ++p) {
              const __m512 w = _mm512_set1_ps(static_cast<float>(weights[p]));
              const std::uint8_t* y = rows.data + images[p] * rows.stride + j;
#pragma GCC unroll 8
              for (int v = 0; v < kPixels / kLanes; ++v) {
                const __m512 z = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
                                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(y + kLanes * v)))),
                                               centre[v]);
                acc[v] = _mm512_fmadd_ps(w, z, acc[v]);
              }
            }
            for (int v = 0; v < kPixels / kLanes; ++v)
              for (int half = 0; half < 2; ++half) {
                const __m256 eight = half ? _mm512_extractf32x8_ps(acc[v], 1) : _mm512_castps512_ps256(acc[v]);
                double* to = sum + j + kLanes * v + 8 * half;
                _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), _mm512_cvtps_pd(eight)));
              }
          } else {
            for (std::int64_t p = part; p < end; ++p)
              for (std::int64_t k = j; k < j + width; ++k)
                sum[k] += weights[p] *
                          (static_cast<int>(rows.data[images[p] * rows.stride + k]) - static_cast<int>(rows.centre[k]));
          }
        }
      }
    };
  });
}

// A point of the unit interval for each image, evenly spread over any run of them (multiples of the golden ratio).
static float dither(std::int64_t i) {
  const auto spread = static_cast<std::uint32_t>(static_cast<std::uint64_t>(i) * 2654435769u);
  return static_cast<float>(spread >> 8) * (1.0f / (1 << 24));
}

void round_weights(const float* scores, std::int64_t n, std::int64_t columns, const float* limit,
                   const std::int32_t* chosen, std::int64_t count, std::uint8_t* high, std::uint8_t* low,
                   std::int64_t* sum, std::int64_t* high_sum, int threads) {
  constexpr std::int64_t kImages = 64;
  const std::int64_t stride = 4 * divide_up(n, 4), strips = divide_up(n, kStrip);
  // Chosen columns that share a vector are handled together.
  std::vector<std::int64_t> group_begin{0};
  for (std::int64_t r = 1; r < count; ++r)
    if (chosen[r] / kLanes != chosen[r - 1] / kLanes) group_begin.push_back(r);
  group_begin.push_back(count);
  const auto groups = static_cast<std::int64_t>(group_begin.size()) - 1;
  std::vector<std::int64_t> sums(static_cast<std::size_t>(strips * count)), high_sums(sums.size());
  share(strips, threads, [&] {
    return [&](std::int64_t strip) {
      alignas(64) std::int32_t highs[16][kLanes], lows[16][kLanes];
      for (std::int64_t g = 0; g < groups; ++g) {
        const std::int64_t column = chosen[group_begin[g]] / kLanes * kLanes;
        const __m512 top = _mm512_loadu_ps(limit + column);
        __m512i total = _mm512_setzero_si512(), high_total = total;  // at most 512·65,280
        for (std::int64_t i0 = strip * kStrip; i0 < std::min(n, (strip + 1) * kStrip); i0 += kImages) {
          for (std::int64_t four = 0; four < 16; ++four) {
            __m512i h = _mm512_setzero_si512(), l = _mm512_setzero_si512();
            for (std::int64_t part = 0; part < 4; ++part) {
              const std::int64_t i = i0 + 4 * four + part;
              if (i >= n) break;
              const __m512 s = _mm512_sub_ps(_mm512_loadu_ps(scores + i * columns + column), top);
              const __mmask16 small = _mm512_cmp_ps_mask(s, _mm512_setzero_ps(), _CMP_LE_OQ);
              const __m512 w = _mm512_maskz_mul_ps(small, exponential(s), _mm512_set1_ps(low ? 65280.0f : 255.0f));
              const __m512i rounded =
                  _mm512_min_epi32(_mm512_cvttps_epi32(_mm512_mask_add_ps(w, small, w, _mm512_set1_ps(dither(i)))),
                                   _mm512_set1_epi32(low ? 65280 : 255));
              total = _mm512_add_epi32(total, rounded);
              const auto bits = static_cast<unsigned>(8 * part);
              if (low) {
                const __m512i upper = _mm512_srli_epi32(_mm512_add_epi32(rounded, _mm512_set1_epi32(128)), 8);
                const __m512i lower =
                    _mm512_add_epi32(_mm512_sub_epi32(rounded, _mm512_slli_epi32(upper, 8)), _mm512_set1_epi32(128));
                high_total = _mm512_add_epi32(high_total, upper);
                h = _mm512_or_si512(h, _mm512_slli_epi32(upper, bits));
                l = _mm512_or_si512(l, _mm512_slli_epi32(lower, bits));
              } else {
                high_total = _mm512_add_epi32(high_total, rounded);
                h = _mm512_or_si512(h, _mm512_slli_epi32(rounded, bits));
              }
            }
            _mm512_store_si512(highs[four], h);
            _mm512_store_si512(lows[four], l);
          }
          const auto bytes = static_cast<std::size_t>(std::min(kImages, stride - i0));
          for (std::int64_t r = group_begin[g]; r < group_begin[g + 1]; ++r) {
            alignas(64) std::int32_t line[16];
            const std::int64_t lane = chosen[r] - column;
            for (int four = 0; four < 16; ++four) line[four] = highs[four][lane];
            std::memcpy(high + r * stride + i0, line, bytes);
            if (!low) continue;
            for (int four = 0; four < 16; ++four) line[four] = lows[four][lane];
            std::memcpy(low + r * stride + i0, line, bytes);
          }
        }
        alignas(64) std::int32_t totals[kLanes], high_totals[kLanes];
        _mm512_store_si512(totals, total);
        _mm512_store_si512(high_totals, high_total);
        for (std::int64_t r = group_begin[g]; r < group_begin[g + 1]; ++r) {
          sums[strip * count + r] = totals[chosen[r] - column];
          high_sums[strip * count + r] = high_totals[chosen[r] - column];
        }
      }
    };
  });
  for (std::int64_t r = 0; r < count; ++r) {
    sum[r] = high_sum[r] = 0;
    for (std::int64_t s = 0; s < strips; ++s) {
      sum[r] += sums[s * count + r];
      high_sum[r] += high_sums[s * count + r];
    }
  }
}

namespace {

// 64 pixels of 4 rows interleaved, less 128: vector v, lane l, place t holds pixel 16·l + 4·v + t of the four rows.
void interleave(const std::uint8_t* const (&rows)[4], __mmask64 width, std::int8_t* to) {
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
void weight_tile(const std::uint8_t* weights, std::int64_t stride, const std::int8_t* panel, std::int64_t fours,
                 std::int32_t* sums, std::int64_t sums_stride) {
  __m512i acc[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[r][v] = _mm512_load_si512(sums + r * sums_stride + kLanes * v);
  for (std::int64_t s = 0; s < fours; ++s) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) b[v] = _mm512_load_si512(panel + 256 * s + 64 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i a = _mm512_set1_epi32(four_bytes(weights + r * stride + 4 * s));
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) _mm512_store_si512(sums + r * sums_stride + kLanes * v, acc[r][v]);
}

struct Aligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

template <class T>
std::shared_ptr<T> aligned(std::int64_t count) {
  return {static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{64})),
          Aligned{}};
}

}  // namespace

void weighted_sums(const std::uint8_t* rows, std::int64_t stride, std::int64_t k, std::int64_t n,
                   const std::uint8_t* weights, std::int64_t count, std::int32_t* out, int threads) {
  const std::int64_t weight_stride = 4 * divide_up(n, 4), pixel_blocks = divide_up(k, kPixelBlock);
  // Where there are more threads than blocks of pixels, columns are divided among them too (and pixels packed twice).
  const std::int64_t splits = std::clamp<std::int64_t>(2 * threads / pixel_blocks, 1, divide_up(count, 48));
  share(pixel_blocks * splits, threads, [&] {
    const auto panel = aligned<std::int8_t>(kPixelBlock * kImageChunk);
    const std::int64_t most = divide_up(count, splits);
    const auto sums = aligned<std::int32_t>(most * kPixelBlock);
    return [&, panel, sums, most](std::int64_t item) {
      const std::int64_t begin = item % splits * most, end = std::min(count, begin + most);
      const std::int64_t pixel = item / splits * kPixelBlock, width = std::min(kPixelBlock, k - pixel);
      const std::int64_t strips = divide_up(width, 64);
      std::memset(sums.get(), 0, static_cast<std::size_t>(most * kPixelBlock) * sizeof(std::int32_t));
      for (std::int64_t i0 = 0; i0 < n; i0 += kImageChunk) {
        const std::int64_t fours = divide_up(std::min(kImageChunk, n - i0), 4);
        for (std::int64_t four = 0; four < fours; ++four) {
          const std::uint8_t* four_rows[4];
          // Beyond the last row its weights are 0: any row will do.
          for (int i = 0; i < 4; ++i) four_rows[i] = rows + std::min(i0 + 4 * four + i, n - 1) * stride + pixel;
          for (std::int64_t strip = 0; strip < strips; ++strip) {
            const std::int64_t left = width - 64 * strip;
            const std::uint8_t* at[4] = {four_rows[0] + 64 * strip, four_rows[1] + 64 * strip,
                                         four_rows[2] + 64 * strip, four_rows[3] + 64 * strip};
            interleave(at, left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1,
                       panel.get() + strip * 64 * kImageChunk + 256 * four);
          }
        }
        for (std::int64_t strip = 0; strip < strips; ++strip) {
          const std::int8_t* packed = panel.get() + strip * 64 * kImageChunk;
          std::int64_t c = begin;
          for (; c + 6 <= end; c += 6)
            weight_tile<6>(weights + c * weight_stride + i0, weight_stride, packed, fours,
                           sums.get() + (c - begin) * kPixelBlock + 64 * strip, kPixelBlock);
          for (; c < end; ++c)
            weight_tile<1>(weights + c * weight_stride + i0, weight_stride, packed, fours,
                           sums.get() + (c - begin) * kPixelBlock + 64 * strip, kPixelBlock);
        }
      }
      for (std::int64_t c = begin; c < end; ++c)
        for (std::int64_t j = 0; j < width; ++j) {
          const std::int64_t strip = j / 64, lane = j % 64 / 16, v = j % 16 / 4, t = j % 4;
          out[c * k + pixel + j] = sums.get()[(c - begin) * kPixelBlock + 64 * strip + 16 * v + 4 * lane + t];
        }
    };
  });
}

}  // namespace diffmem::posterior_mean

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace diffmem::posterior_mean {

bool available() { return false; }
void scores(const std::vector<Term>&, std::int64_t, std::int64_t, const float*, const float*, bool, float*, int) {}
void column_top(const float*, std::int64_t, std::int64_t, float*, std::int64_t*, int) {}
void column_mass(const float*, std::int64_t, std::int64_t, const float*, double*, int) {}
Pairs select(const float*, std::int64_t, std::int64_t, const float*, const float*, const float*, std::int64_t, int) {
  return {};
}
void pair_logits(const ByteRows&, const double*, const double*, const double*, const std::int64_t*, const std::int32_t*,
                 std::int64_t, double*, int) {}
void pair_sums(const ByteRows&, const double*, const std::int64_t*, const std::int32_t*, std::int64_t, double*, int) {}
void round_weights(const float*, std::int64_t, std::int64_t, const float*, const std::int32_t*, std::int64_t,
                   std::uint8_t*, std::uint8_t*, std::int64_t*, std::int64_t*, int) {}
void weighted_sums(const std::uint8_t*, std::int64_t, std::int64_t, std::int64_t, const std::uint8_t*, std::int64_t,
                   std::int32_t*, int) {}

}  // namespace diffmem::posterior_mean

#endif
