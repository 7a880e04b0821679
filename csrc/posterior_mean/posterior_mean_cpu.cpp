// Cutting the work of posterior_mean.h into items, and sharing these among threads; the kernels of an instruction set
// do them. Where there are none `available` says so.
//
// Both products keep a tile of sums in registers, with AVX-512 4 vectors of 16 columns by 6 rows: 24 sums, 4 + 1
// registers for the operands. A step (4 bytes of K) is 24 multiply-adds and 10 loads. scores() broadcasts 4 bytes of a
// row and holds the columns in panels; a block of rows stays in the cache while all columns pass by. weighted_sums()
// broadcasts the weights of 4 images and holds 64 pixels of 4 images interleaved, packed once for all columns. With
// AVX2 it is 2 vectors of 8 columns by 6 rows of 16-bit numbers, two of K at a time.
//
// Measured on one core of an AMD EPYC (Zen 4, 2.6 GHz, float32 peak 116 Gop/s, 8-bit peak 462): the tile loop runs at
// 415–425 Gop/s; 5x5, 9x3 and 12x2 tiles at 380–425; with rows straight from memory instead of blocks that stay in the
// cache 140–220. Cutting K to keep the panel in the first-level cache gained nothing.
//
#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu/aligned.h"
#include "cpu/features.h"
#include "cpu/share.h"
#include "posterior_mean/posterior_mean.h"

namespace diffmem::posterior_mean {

namespace {

using cpu::share;

constexpr std::int64_t kStrip = 512;  // rows of scores per work item

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

const Kernels* kernels() {
  return cpu::best<Kernels>({.avx2 = avx2_kernels(),
                             .avx512 = avx512_kernels(),
                             .neon = neon_kernels(),
                             .neon_dotprod = neon_dotprod_kernels()});
}

// Scratch memory of one thread; shared, so that the worker that holds it can be copied.
template <class T>
std::shared_ptr<cpu::Aligned<T>> aligned(std::int64_t count) {
  return std::make_shared<cpu::Aligned<T>>(static_cast<std::size_t>(count));
}

}  // namespace

bool available() { return kernels() != nullptr; }

void scores(const std::vector<Term>& terms, std::int64_t n, std::int64_t columns, const float* half_norms,
            const float* weight, bool add, float* out, int threads) {
  const Kernels& kernel = *kernels();
  const ScoreRows to{columns, half_norms, weight, out};
  std::vector<cpu::Aligned<std::int16_t>> panels(kernel.widen_panel == nullptr ? 0 : terms.size());
  std::int64_t longest = 0;  // of the rows that are widened
  for (std::size_t t = 0; t < panels.size(); ++t) {
    const std::int64_t stride = 4 * divide_up(terms[t].k, 4);
    panels[t].resize(static_cast<std::size_t>(stride * columns));
    kernel.widen_panel(terms[t], columns, panels[t].data());
    longest = std::max(longest, stride);
  }
  share(divide_up(n, kRowBlock), threads, [&] {
    const auto scratch = aligned<std::int16_t>(kRowBlock * longest);
    return [&, scratch](std::int64_t block) {
      const std::int64_t row = block * kRowBlock, end = std::min(n, row + kRowBlock);
      for (std::size_t t = 0; t < terms.size(); ++t)
        kernel.scores(terms[t], panels.empty() ? nullptr : panels[t].data(), !add && t == 0, row, end, to,
                      scratch->data());
    };
  });
}

void column_top(const float* scores, std::int64_t n, std::int64_t columns, float* top, std::int64_t* where,
                int threads) {
  const Kernels& kernel = *kernels();
  const std::int64_t strips = divide_up(n, kStrip);
  std::vector<float> best(static_cast<std::size_t>(strips * columns));
  std::vector<std::int32_t> place(best.size());
  share(strips, threads, [&] {
    return [&](std::int64_t strip) {
      kernel.column_top(scores, strip * kStrip, std::min(n, (strip + 1) * kStrip), columns, &best[strip * columns],
                        &place[strip * columns]);
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
  const Kernels& kernel = *kernels();
  const std::int64_t strips = divide_up(n, kStrip);
  std::vector<float> sums(static_cast<std::size_t>(strips * columns));
  share(strips, threads, [&] {
    return [&](std::int64_t strip) {
      kernel.column_mass(scores, strip * kStrip, std::min(n, (strip + 1) * kStrip), columns, top,
                         &sums[strip * columns]);
    };
  });
  for (std::int64_t c = 0; c < columns; ++c) {
    mass[c] = 0;
    for (std::int64_t s = 0; s < strips; ++s) mass[c] += sums[s * columns + c];
  }
}

Pairs select(const float* scores, std::int64_t n, std::int64_t columns, const float* threshold, const float* reach,
             const float* slack, std::int64_t limit, int threads) {
  const Kernels& kernel = *kernels();
  const std::int64_t strips = divide_up(n, kStrip), room = columns + 4096;
  std::vector<std::vector<Pair>> found(static_cast<std::size_t>(strips));
  std::atomic<std::int64_t> total{0};
  share(strips, threads, [&] {
    const auto part = aligned<Pair>(room);
    return [&, part](std::int64_t strip) {
      const std::int64_t end = std::min(n, (strip + 1) * kStrip);
      const bool list = total <= limit;
      std::int64_t count = 0, listed = 0;
      for (std::int64_t row = strip * kStrip; row < end;) {
        row = kernel.select(scores, row, end, columns, threshold, reach, slack, list ? part->data() : nullptr, room,
                            &listed, &count);
        if (list) found[strip].insert(found[strip].end(), part->data(), part->data() + listed);
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
    for (const Pair& pair : strip) ++pairs.starts[pair.column + 1];
  for (std::int64_t c = 0; c < columns; ++c) pairs.starts[c + 1] += pairs.starts[c];
  pairs.images.resize(static_cast<std::size_t>(pairs.starts.back()));
  std::vector<std::int64_t> next(pairs.starts.begin(), pairs.starts.end() - 1);
  for (const auto& strip : found)
    for (const Pair& pair : strip) pairs.images[next[pair.column]++] = pair.image;
  return pairs;
}

void pair_logits(const ByteRows& rows, const double* queries, const double* half_norms, const double* weight,
                 const std::int64_t* starts, const std::int32_t* images, std::int64_t columns, double* out,
                 int threads) {
  constexpr std::int64_t kPart = 256;  // pairs per work item
  const Kernels& kernel = *kernels();
  std::vector<std::int64_t> column, begin;
  for (std::int64_t c = 0; c < columns; ++c)
    for (std::int64_t p = starts[c]; p < starts[c + 1]; p += kPart) column.push_back(c), begin.push_back(p);
  share(static_cast<std::int64_t>(column.size()), threads, [&] {
    return [&](std::int64_t item) {
      const std::int64_t c = column[item], end = std::min(starts[c + 1], begin[item] + kPart);
      kernel.pair_logits(rows, queries + c * rows.d, half_norms, weight[c], images, begin[item], end, out);
    };
  });
}

void pair_sums(const ByteRows& rows, const double* weights, const std::int64_t* starts, const std::int32_t* images,
               std::int64_t columns, double* out, int threads) {
  const Kernels& kernel = *kernels();
  share(columns, threads, [&] {
    return [&](std::int64_t c) { kernel.pair_sums(rows, weights, images, starts[c], starts[c + 1], out + c * rows.d); };
  });
}

void round_weights(const float* scores, std::int64_t n, std::int64_t columns, const float* limit,
                   const std::int32_t* chosen, std::int64_t count, std::uint8_t* high, std::uint8_t* low,
                   std::int64_t* sum, std::int64_t* high_sum, int threads) {
  const Kernels& kernel = *kernels();
  const Rounding of{scores, n, columns, limit, chosen, high, low};
  const std::int64_t strips = divide_up(n, kStrip);
  // Chosen columns that share a vector are handled together.
  std::vector<std::int64_t> group_begin{0};
  for (std::int64_t r = 1; r < count; ++r)
    if (chosen[r] / kLanes != chosen[r - 1] / kLanes) group_begin.push_back(r);
  group_begin.push_back(count);
  std::vector<std::int64_t> sums(static_cast<std::size_t>(strips * count)), high_sums(sums.size());
  share(strips, threads, [&] {
    return [&](std::int64_t strip) {
      const std::int64_t end = std::min(n, (strip + 1) * kStrip);
      for (std::size_t g = 0; g + 1 < group_begin.size(); ++g) {
        const std::int64_t at = strip * count + group_begin[g];
        kernel.round_weights(of, strip * kStrip, end, group_begin[g], group_begin[g + 1], &sums[at], &high_sums[at]);
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

void weighted_sums(const std::uint8_t* rows, std::int64_t stride, std::int64_t k, std::int64_t n,
                   const std::uint8_t* weights, std::int64_t count, std::int32_t* out, int threads) {
  const Kernels& kernel = *kernels();
  const WeightedSums of{rows, stride, k, n, weights, out};
  const std::int64_t pixel_blocks = divide_up(k, kPixelBlock);
  // Where there are more threads than blocks of pixels, columns are divided among them too (and pixels packed twice).
  const std::int64_t splits = std::clamp<std::int64_t>(2 * threads / pixel_blocks, 1, divide_up(count, 48));
  const std::int64_t most = divide_up(count, splits);
  share(pixel_blocks * splits, threads, [&] {
    const auto panel = aligned<std::uint8_t>(kPixelBlock * kImageChunk * kernel.number_bytes);
    const auto sums = aligned<std::int32_t>(most * kPixelBlock);
    const auto scratch = aligned<std::uint8_t>(kernel.number_bytes == 1 ? 0 : most * kImageChunk * kernel.number_bytes);
    return [&, panel, sums, scratch](std::int64_t item) {
      const std::int64_t begin = item % splits * most, end = std::min(count, begin + most);
      kernel.weighted_sums(of, item / splits * kPixelBlock, begin, end, panel->data(), sums->data(), scratch->data());
    };
  });
}

}  // namespace diffmem::posterior_mean
