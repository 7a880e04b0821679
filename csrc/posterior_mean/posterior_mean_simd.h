// The loops of the posterior mean's table that are the same for every instruction set (see posterior_mean.h for what
// they do). Included once by each posterior_mean_<set>.cpp after it defines, in an anonymous namespace, the numbers
// that it computes with: Floats and Ints (16 lanes), Mask, and what is called on them here, and the products: Weight (a
// digit), Packed (a digit as it is multiplied), Sum, WeightRows, weight_rows, interleave, weight_tile (of 1 or
// kWeightRows rows), place_in_strip; kFloatRows vectors that stay in registers, and keep.
#include <cmath>
#include <cstring>

#include "cpu/simd.h"
#include "posterior_mean/posterior_mean.h"

namespace diffmem::posterior_mean {
namespace {

// e^x within 2e-7 of itself, 0 for x < −87.
Floats exponential(Floats x) {
  const Floats whole = nearest_whole(multiply(x, all(1.44269504f)));
  // x − whole·ln 2 in two parts, so that large x lose nothing.
  const Floats f = multiply_add(whole, all(2.12194440e-4f), multiply_add(whole, all(-0.693359375f), x));
  Floats p = all(1.0f / 720);
  constexpr float kCoefficients[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float c : kCoefficients) p = multiply_add(p, f, all(c));
  return choose(at_least(x, all(-87.0f)), times_power_of_two(p, whole), all(0));
}

void column_top(const float* scores, std::int64_t begin, std::int64_t end, std::int64_t columns, float* top,
                std::int32_t* where) {
  for (std::int64_t c = 0; c < columns; c += kLanes) {
    Floats highest = all(-INFINITY);
    Ints at = all_ints(0);
    for (std::int64_t i = begin; i < end; ++i) {
      const Floats s = load(scores + i * columns + c);
      const Mask higher = above(s, highest);
      highest = choose(higher, s, highest);
      at = choose(higher, all_ints(static_cast<std::int32_t>(i)), at);
    }
    store(top + c, highest);
    store(where + c, at);
  }
}

void column_mass(const float* scores, std::int64_t begin, std::int64_t end, std::int64_t columns, const float* top,
                 float* sum) {
  for (std::int64_t c = 0; c < columns; c += kLanes) {
    const Floats highest = load(top + c);
    Floats total = all(0);
    for (std::int64_t i = begin; i < end; ++i)
      total = add(total, exponential(subtract(load(scores + i * columns + c), highest)));
    store(sum + c, total);
  }
}

std::int64_t select(const float* scores, std::int64_t begin, std::int64_t end, std::int64_t columns,
                    const float* threshold, const float* reach, const float* slack, Pair* out, std::int64_t room,
                    std::int64_t* listed, std::int64_t* count) {
  std::int64_t taken = 0, kept_pairs = 0, i = begin;
  for (; i < end && taken + columns <= room; ++i) {
    const Floats loose = all(slack[i]);
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      const Floats highest = multiply_add(load(reach + c), loose, load(scores + i * columns + c));
      std::uint32_t kept = bits(at_least(highest, load(threshold + c)));
      kept_pairs += simd::count_bits(kept);
      if (out == nullptr) continue;
      for (; kept; kept &= kept - 1)
        out[taken++] = {static_cast<std::int32_t>(c + simd::trailing_zeros(kept)), static_cast<std::int32_t>(i)};
    }
  }
  *listed = taken;
  *count += kept_pairs;
  return i;
}

void pair_logits(const ByteRows& rows, const double* u, const double* half_norms, double weight,
                 const std::int32_t* images, std::int64_t begin, std::int64_t end, double* out) {
  for (std::int64_t p = begin; p < end; ++p) {
    const std::uint8_t* y = rows.data + images[p] * rows.stride;
    if (p + 1 < end) {
      const std::uint8_t* following = rows.data + images[p + 1] * rows.stride;
      for (std::int64_t j = 0; j < rows.d; j += 64) simd::prefetch(following + j);
    }
    const double product = dot(u, y, rows.center, rows.d);
    out[p] = (product - half_norms[images[p]]) * weight;
  }
}

void pair_sums(const ByteRows& rows, const double* weights, const std::int32_t* images, std::int64_t begin,
               std::int64_t last, double* sum) {
  constexpr std::int64_t kPixels = kSumPixels, kPart = 128;  // float32 sums of so many rows are added up in float64
  const std::int64_t pixel_blocks = simd::divide_up(rows.d, kPixels);
  simd::fill(sum, rows.d, 0.0);
  for (std::int64_t part = begin; part < last; part += kPart) {
    const std::int64_t end = simd::min(last, part + kPart);
    for (std::int64_t block = 0; block < pixel_blocks; ++block) {
      const std::int64_t j = block * kPixels, width = simd::min(kPixels, rows.d - j);
      if (width == kPixels) {
        Floats acc[kPixels / kLanes], center[kPixels / kLanes];
#pragma GCC unroll 8
        for (int v = 0; v < kPixels / kLanes; ++v) {
          acc[v] = all(0);
          center[v] = load_bytes(rows.center + j + kLanes * v);
        }
        for (std::int64_t p = part; p < end; ++p) {
          const Floats w = all(static_cast<float>(weights[p]));
          const std::uint8_t* y = rows.data + images[p] * rows.stride + j;
#pragma GCC unroll 8
          for (int v = 0; v < kPixels / kLanes; ++v)
            acc[v] = multiply_add(w, subtract(load_bytes(y + kLanes * v), center[v]), acc[v]);
        }
        alignas(64) float found[kPixels];
        for (int v = 0; v < kPixels / kLanes; ++v) store(found + kLanes * v, acc[v]);
        for (std::int64_t v = 0; v < kPixels; ++v) sum[j + v] += found[v];
      } else {
        for (std::int64_t p = part; p < end; ++p)
          for (std::int64_t k = j; k < j + width; ++k)
            sum[k] += weights[p] *
                      (static_cast<int>(rows.data[images[p] * rows.stride + k]) - static_cast<int>(rows.center[k]));
      }
    }
  }
}

// A point of the unit interval for each image, evenly spread over any run of them (multiples of the golden ratio).
float dither(std::int64_t i) {
  const auto spread = static_cast<std::uint32_t>(static_cast<std::uint64_t>(i) * 2654435769u);
  return static_cast<float>(spread >> 8) * (1.0f / (1 << 24));
}

// 64 images of the chosen columns, a lane each, packed several to a word: words[w][lane]: those from 64 / count · w on.
void put_words(const Rounding& of, std::int64_t first, std::int64_t last, const std::int32_t (*words)[kLanes],
               std::int64_t count, std::uint8_t* to, std::int64_t stride, std::int64_t bytes) {
  const std::int64_t column = of.chosen[first] / kLanes * kLanes;
  for (std::int64_t r = first; r < last; ++r) {
    alignas(64) std::int32_t line[32];
    for (std::int64_t w = 0; w < count; ++w) line[w] = words[w][of.chosen[r] - column];
    std::memcpy(to + r * stride, line, static_cast<std::size_t>(bytes));
  }
}

// ŵ of image i in the columns of a vector: 0 where the image is above the limit. It is rounded up or down by the
// dither, or, in 15 bits, to the nearest where that leaves less than a thirtieth of it.
Ints rounded_weight(const Rounding& of, std::int64_t i, std::int64_t column, Floats top, std::int32_t largest) {
  const Floats s = subtract(load(of.scores + i * of.columns + column), top);
  const Floats w = multiply(exponential(s), all(static_cast<float>(largest)));
  Floats up = all(dither(i));
  if (sizeof(Weight) > 1) up = choose(at_least(w, all(16)), all(0.5f), up);
  return choose(at_least(all(0), s), smaller(truncated(add(w, up)), largest), all_ints(0));
}

void round_weights(const Rounding& of, std::int64_t begin, std::int64_t end, std::int64_t first, std::int64_t last,
                   std::int64_t* sum, std::int64_t* high_sum) {
  constexpr std::int64_t kImages = 64, kDigit = sizeof(Weight), kInWord = 4 / kDigit, kWords = kImages / kInWord;
  const std::int64_t stride = 4 * simd::divide_up<std::int64_t>(of.n, 4);
  alignas(64) std::int32_t highs[kWords][kLanes], lows[kWords][kLanes];
  const std::int64_t column = of.chosen[first] / kLanes * kLanes;
  const Floats top = load(of.limit + column);
  const std::int32_t largest = kDigit > 1 ? 32767 : of.low ? 65280 : 255;
  Ints total = all_ints(0), high_total = total;  // at most 512·65,280
  for (std::int64_t i0 = begin; i0 < end; i0 += kImages) {
    for (std::int64_t word = 0; word < kWords; ++word) {
      Ints h = all_ints(0), l = h;
      for (std::int64_t part = 0; part < kInWord; ++part) {
        const std::int64_t i = i0 + kInWord * word + part;
        if (i >= of.n) break;
        const Ints rounded = rounded_weight(of, i, column, top, largest);
        total = add(total, rounded);
        const int place = static_cast<int>(8 * kDigit * part);
        if (kDigit == 1 && of.low) {
          const Ints upper = right(add(rounded, all_ints(128)), 8);
          const Ints lower = add(subtract(rounded, left(upper, 8)), all_ints(128));
          high_total = add(high_total, upper);
          h = either(h, left(upper, place));
          l = either(l, left(lower, place));
        } else {
          high_total = add(high_total, rounded);
          h = either(h, left(rounded, place));
        }
      }
      store(highs[word], h);
      store(lows[word], l);
    }
    const std::int64_t bytes = kDigit * simd::min(kImages, stride - i0);
    put_words(of, first, last, highs, kWords, static_cast<std::uint8_t*>(of.high) + kDigit * i0, kDigit * stride,
              bytes);
    if (of.low) put_words(of, first, last, lows, kWords, of.low + i0, stride, bytes);
  }
  alignas(64) std::int32_t totals[kLanes], high_totals[kLanes];
  store(totals, total);
  store(high_totals, high_total);
  for (std::int64_t r = first; r < last; ++r) {
    sum[r - first] = totals[of.chosen[r] - column];
    high_sum[r - first] = high_totals[of.chosen[r] - column];
  }
}

void weighted_sums(const WeightedSums& of, std::int64_t pixel, std::int64_t begin, std::int64_t end, void* memory,
                   void* sums_memory, void* scratch) {
  auto* const panel = static_cast<Packed*>(memory);
  auto* const sums = static_cast<Sum*>(sums_memory);
  const std::int64_t weight_stride = 4 * simd::divide_up<std::int64_t>(of.n, 4);
  const std::int64_t width = simd::min(kPixelBlock, of.k - pixel);
  const std::int64_t strips = simd::divide_up<std::int64_t>(width, 64);
  std::memset(sums, 0, static_cast<std::size_t>((end - begin) * kPixelBlock) * sizeof(Sum));
  for (std::int64_t i0 = 0; i0 < of.n; i0 += kImageChunk) {
    std::int64_t fours = simd::divide_up<std::int64_t>(simd::min(kImageChunk, of.n - i0), 4);
    simd::hide(fours);  // where GCC 12 knows that it is not 0, it keeps the sums of weight_tile in memory
    for (std::int64_t four = 0; four < fours; ++four) {
      const std::uint8_t* four_rows[4];
      // Beyond the last row its weights are 0: any row will do.
      for (int i = 0; i < 4; ++i) {
        four_rows[i] = of.rows + simd::min(i0 + 4 * four + i, of.n - 1) * of.stride + pixel;
        // Short pieces far apart, which the processor does not foresee. Addresses beyond the rows do no harm.
        for (std::int64_t j = 0; j < width; j += 64) simd::prefetch(four_rows[i] + kImageChunk * of.stride + j);
      }
      for (std::int64_t strip = 0; strip < strips; ++strip) {
        const std::uint8_t* at[4] = {four_rows[0] + 64 * strip, four_rows[1] + 64 * strip, four_rows[2] + 64 * strip,
                                     four_rows[3] + 64 * strip};
        interleave(at, simd::min<std::int64_t>(64, width - 64 * strip), panel + strip * 64 * kImageChunk, four);
      }
    }
    const WeightRows from = weight_rows(static_cast<const Weight*>(of.weights) + begin * weight_stride + i0,
                                        weight_stride, end - begin, 4 * fours, static_cast<Packed*>(scratch));
    for (std::int64_t strip = 0; strip < strips; ++strip) {
      const Packed* packed = panel + strip * 64 * kImageChunk;
      Sum* to = sums + 64 * strip;
      std::int64_t c = 0;
      for (; c + kWeightRows <= end - begin; c += kWeightRows)
        weight_tile<kWeightRows>(from, c, packed, fours, to + c * kPixelBlock);
      for (; c < end - begin; ++c) weight_tile<1>(from, c, packed, fours, to + c * kPixelBlock);
    }
  }
  for (std::int64_t c = begin; c < end; ++c)
    for (std::int64_t j = 0; j < width; ++j)
      of.out[c * of.k + pixel + j] =
          static_cast<double>(sums[(c - begin) * kPixelBlock + j / 64 * 64 + place_in_strip(j % 64)]);
}

// A term's columns as signed bytes: 64 at a time, and then the rest (16, 32 or 48) at once: [ceil(k / 4)][columns][4],
// zeros beyond k.
[[maybe_unused]] void pack_bytes(const Term& term, std::int64_t columns, std::int64_t first, std::int64_t last,
                                 void* panel, std::int32_t* shift) {
  const std::int64_t steps = simd::divide_up<std::int64_t>(term.k, 4);
  for (std::int64_t c = first; c < last; ++c) {
    const std::int64_t group = c / 64 * 64, width = simd::min<std::int64_t>(64, columns - group);
    std::int8_t* to = static_cast<std::int8_t*>(panel) + 4 * (steps * group + (c - group));
    const std::int16_t* from = term.values + c * term.k;
    std::int32_t sum = 0;
    for (std::int64_t s = 0; s < steps; ++s)
      for (std::int64_t j = 4 * s; j < 4 * s + 4; ++j) {
        const bool given = c < term.count && j < term.k;
        to[4 * width * s + j % 4] = given ? static_cast<std::int8_t>(from[j]) : std::int8_t{0};
        if (given) sum += from[j] * term.offset[j];
      }
    shift[c] = sum;
  }
}

// ------------------------------------------------------------------------------------------------ float32, small sets

// `count` numbers of a row less the center, in float32.
void narrow(const std::uint8_t* from, const std::uint8_t* center, std::int64_t count, float* to) {
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(to + j, subtract(load_bytes(from + j), load_bytes(center + j)));
  for (; j < count; ++j) to[j] = static_cast<float>(from[j] - center[j]);
}

template <int R>
void float_score_tile(const float* rows, const float* columns, std::int64_t width, bool first, const double* half_norms,
                      const float* weight, float* out, std::int64_t stride) {
  Floats acc[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r] = all(0);
  for (std::int64_t k = 0; k < width; ++k) {
    const Floats b = load(columns + kLanes * k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      acc[r] = multiply_add(all(rows[r * kFloatChunk + k]), b, acc[r]);
      keep(acc[r]);
    }
  }
  const Floats scale = load(weight);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Floats before = first ? multiply(scale, all(static_cast<float>(-half_norms[r]))) : load(out + r * stride);
    store(out + r * stride, multiply_add(acc[r], scale, before));
  }
}

void float_scores(const ByteRows& rows, const float* panel, std::int64_t row, std::int64_t end,
                  const double* half_norms, const float* weight, std::int64_t columns, float* out, float* scratch) {
  for (std::int64_t k = 0; k < rows.d; k += kFloatChunk) {
    std::int64_t width = simd::min(kFloatChunk, rows.d - k);
    for (std::int64_t r = row; r < end; ++r)
      narrow(rows.data + r * rows.stride + k, rows.center + k, width, scratch + (r - row) * kFloatChunk);
    simd::hide(width);  // as in weighted_sums
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      const float* at = panel + rows.d * c + kLanes * k;
      std::int64_t r = row;
      for (; r + kFloatRows <= end; r += kFloatRows)
        float_score_tile<kFloatRows>(scratch + (r - row) * kFloatChunk, at, width, k == 0, half_norms + r, weight + c,
                                     out + r * columns + c, columns);
      for (; r < end; ++r)
        float_score_tile<1>(scratch + (r - row) * kFloatChunk, at, width, k == 0, half_norms + r, weight + c,
                            out + r * columns + c, columns);
    }
  }
}

void weigh(float* scores, std::int64_t n, std::int64_t columns, const float* top, double* mass, double* squares) {
  constexpr std::int64_t kPart = 512;  // float32 sums of so many are added up in float64
  const Floats highest = load(top);
  for (int lane = 0; lane < kLanes; ++lane) mass[lane] = squares[lane] = 0;
  for (std::int64_t begin = 0; begin < n; begin += kPart) {
    Floats total = all(0), square = all(0);
    for (std::int64_t i = begin; i < simd::min(n, begin + kPart); ++i) {
      const Floats w = exponential(subtract(load(scores + i * columns), highest));
      store(scores + i * columns, w);
      total = add(total, w);
      square = multiply_add(w, w, square);
    }
    alignas(64) float totals[kLanes], found[kLanes];
    store(totals, total);
    store(found, square);
    for (int lane = 0; lane < kLanes; ++lane) mass[lane] += totals[lane], squares[lane] += found[lane];
  }
}

template <int R>
void float_sum_tile(const float* weights, std::int64_t columns, const float* strip, std::int64_t images, double* sums) {
  Floats acc[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r] = all(0);
  for (std::int64_t i = 0; i < images; ++i) {
    const Floats b = load(strip + kLanes * i);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      acc[r] = multiply_add(all(weights[i * columns + r]), b, acc[r]);
      keep(acc[r]);
    }
  }
  alignas(64) float found[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(found, acc[r]);
    for (int lane = 0; lane < kLanes; ++lane) sums[r * kFloatPixels + lane] += found[lane];
  }
}

void float_sums(const ByteRows& rows, std::int64_t n, const float* weights, std::int64_t columns, std::int64_t pixel,
                std::int64_t begin, std::int64_t end, float* scratch, double* sums) {
  const std::int64_t width = simd::min(kFloatPixels, rows.d - pixel),
                     strips = simd::divide_up<std::int64_t>(width, kLanes);
  simd::fill(sums, (end - begin) * kFloatPixels, 0.0);
  simd::fill(scratch, kFloatPixels * kImageChunk, 0.0f);
  for (std::int64_t i0 = 0; i0 < n; i0 += kImageChunk) {
    std::int64_t images = simd::min(kImageChunk, n - i0);
    for (std::int64_t i = 0; i < images; ++i)
      for (std::int64_t strip = 0; strip < strips; ++strip) {
        const std::int64_t j = pixel + kLanes * strip;
        narrow(rows.data + (i0 + i) * rows.stride + j, rows.center + j, simd::min<std::int64_t>(kLanes, rows.d - j),
               scratch + (strip * kImageChunk + i) * kLanes);
      }
    simd::hide(images);  // as in weighted_sums
    for (std::int64_t strip = 0; strip < strips; ++strip) {
      const float* z = scratch + strip * kImageChunk * kLanes;
      const float* from = weights + i0 * columns;
      double* to = sums + kLanes * strip;
      std::int64_t c = begin;
      for (; c + kFloatRows <= end; c += kFloatRows)
        float_sum_tile<kFloatRows>(from + c, columns, z, images, to + (c - begin) * kFloatPixels);
      for (; c < end; ++c) float_sum_tile<1>(from + c, columns, z, images, to + (c - begin) * kFloatPixels);
    }
  }
}

}  // namespace
}  // namespace diffmem::posterior_mean
