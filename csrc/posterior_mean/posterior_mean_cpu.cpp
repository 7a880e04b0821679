// Cutting the work of posterior_mean.h into items, and sharing these among threads; the kernels of an instruction set
// do them. Where there are none `available` says so.
//
// Both products keep a tile of sums in registers, with AVX-512 4 vectors of 16 columns by 6 rows: 24 sums, 4 + 1
// registers for the operands. A step (4 bytes of K) is 24 multiply-adds and 10 loads. scores() broadcasts 4 bytes of a
// row and holds the columns in panels; a block of rows stays in the cache while all columns pass by. weighted_sums()
// broadcasts the weights of 4 images and holds 64 pixels of 4 images interleaved, packed once for all columns. With
// AVX2 it is 2 vectors of 8 columns by 6 rows of 16-bit numbers, two of K at a time.
// The compiler is kept from loading ahead there (`keep`): it would spill sums for it.
//
// Measured on one core of an AMD EPYC (Zen 4, 2.6 GHz, float32 peak 116 Gop/s, 8-bit peak 462): the tile loop runs at
// 415–425 Gop/s; 5x5, 9x3 and 12x2 tiles at 380–425; with rows straight from memory instead of blocks that stay in the
// cache 140–220. Cutting K to keep the panel in the first-level cache gained nothing. AVX2: 187 Gop/s of 230 (112 with
// sums that are spilled), 3x4 and 4x3 tiles the same; there K has to be cut, and the panels stay in the first cache.
//
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

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

int digit_bits() { return static_cast<int>(8 * kernels()->digit_bytes); }

void scores(const std::vector<Term>& terms, std::int64_t n, std::int64_t columns, const float* half_norms,
            const float* weight, bool add, float* out, int threads) {
  const Kernels& kernel = *kernels();
  const ScoreRows to{columns, half_norms, weight, out};
  std::vector<cpu::Aligned<std::uint8_t>> panels(terms.size());
  std::vector<std::int32_t> shifts(terms.size() * static_cast<std::size_t>(columns));
  for (std::size_t t = 0; t < terms.size(); ++t)
    panels[t].resize(static_cast<std::size_t>(4 * divide_up(terms[t].k, 4) * columns * kernel.number_bytes));
  std::int64_t longest = kPixelChunk;
  for (const Term& term : terms) longest = std::max(longest, 4 * divide_up(term.k, 4));
  const auto parts = static_cast<std::int64_t>(terms.size()), groups = divide_up(columns, 64);
  share(parts * groups, threads, [&] {
    return [&](std::int64_t item) {
      const std::int64_t t = item / groups, first = item % groups * 64;
      kernel.pack(terms[t], columns, first, std::min(columns, first + 64), panels[t].data(), &shifts[t * columns]);
    };
  });
  share(divide_up(n, kRowBlock), threads, [&] {
    const auto scratch = aligned<std::uint8_t>(kRowBlock * longest * kernel.number_bytes);
    return [&, scratch](std::int64_t block) {
      const std::int64_t row = block * kRowBlock, end = std::min(n, row + kRowBlock);
      for (std::size_t t = 0; t < terms.size(); ++t)
        kernel.scores(terms[t], panels[t].data(), &shifts[t * columns], !add && t == 0, row, end, to, scratch->data());
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
                   const std::int32_t* chosen, std::int64_t count, void* high, std::uint8_t* low, std::int64_t* sum,
                   std::int64_t* high_sum, int threads) {
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

void weighted_sums(const std::uint8_t* rows, std::int64_t stride, std::int64_t k, std::int64_t n, const void* weights,
                   std::int64_t count, double* out, int threads) {
  const Kernels& kernel = *kernels();
  const WeightedSums of{rows, stride, k, n, weights, out};
  const std::int64_t pixel_blocks = divide_up(k, kPixelBlock);
  // Where there are more threads than blocks of pixels, columns are divided among them too (and pixels packed twice).
  const std::int64_t splits = std::clamp<std::int64_t>(2 * threads / pixel_blocks, 1, divide_up(count, 48));
  const std::int64_t most = divide_up(count, splits);
  share(pixel_blocks * splits, threads, [&] {
    const auto panel = aligned<std::uint8_t>(kPixelBlock * kImageChunk * kernel.number_bytes);
    const auto sums = aligned<double>(most * kPixelBlock);
    const bool widened = kernel.number_bytes > kernel.digit_bytes;
    const auto scratch = aligned<std::uint8_t>(widened ? most * kImageChunk * kernel.number_bytes : 0);
    return [&, panel, sums, scratch](std::int64_t item) {
      const std::int64_t begin = item % splits * most, end = std::min(count, begin + most);
      kernel.weighted_sums(of, item / splits * kPixelBlock, begin, end, panel->data(), sums->data(), scratch->data());
    };
  });
}

namespace {

// Threads for so many multiplications: waking one costs as much as a million of them.
int useful(std::int64_t multiplications, int threads) {
  return static_cast<int>(std::clamp<std::int64_t>(multiplications >> 20, 1, threads));
}

// Queries about the center, and what comes of them.
struct Small {
  const SmallSet& set;
  const SmallQueries& queries;
  std::int64_t count, d, columns;
  std::vector<double> u, weight, length, top, mass;
  std::vector<float> panel;  // u for float_scores
  void* out;
  double* dropped;
  int threads;
};

template <class T>
bool prepare_columns(Small& to, const double* offset, std::int64_t first, std::int64_t last) {
  bool good = true;
  for (std::int64_t c = first; c < last; ++c) {
    const T* x = static_cast<const T*>(to.queries.x) + c * to.d;
    double* u = &to.u[c * to.d];
    for (std::int64_t j = 0; j < to.d; ++j) u[j] = to.queries.unit * static_cast<double>(x[j]) + offset[j];
    double squared[4] = {};
    std::int64_t j = 0;
    for (; j + 4 <= to.d; j += 4)
      for (int part = 0; part < 4; ++part) squared[part] += u[j + part] * u[j + part];
    for (; j < to.d; ++j) squared[0] += u[j] * u[j];
    const double total = (squared[0] + squared[1]) + (squared[2] + squared[3]);
    to.length[c] = std::sqrt(total);
    good = good && std::isfinite(total);
    if (to.panel.empty()) continue;
    float* panel = &to.panel[c / kLanes * kLanes * to.d + c % kLanes];
    for (j = 0; j < to.d; ++j) panel[kLanes * j] = static_cast<float>(u[j]);
  }
  return good;
}

Checked prepare(Small& to) {
  const SmallQueries& queries = to.queries;
  for (std::int64_t c = 0; c < to.count; ++c) {
    const double sigma = queries.sigma[c];
    if (!(sigma > 0 && std::isfinite(sigma))) return Checked::bad_sigma;
    to.weight[c] = 1 / (sigma * sigma);
  }
  to.u.resize(static_cast<std::size_t>(to.count * to.d));
  std::vector<double> offset(static_cast<std::size_t>(to.d));
  for (std::int64_t j = 0; j < to.d; ++j) offset[j] = queries.shift - to.set.rows.center[j];
  std::atomic<bool> good{true};
  share(divide_up(to.count, kLanes), useful(32 * to.count * to.d, to.threads), [&] {
    return [&](std::int64_t vector) {
      const std::int64_t first = kLanes * vector, last = std::min(to.count, first + kLanes);
      const auto columns = queries.wide ? prepare_columns<double> : prepare_columns<float>;
      if (!columns(to, offset.data(), first, last)) good = false;
    };
  });
  return good ? Checked::good : Checked::bad_x;
}

// The mean of query c, pixels [pixel, pixel + width), from the sums of weighted rows.
template <class T>
void put_as(const Small& of, std::int64_t c, std::int64_t pixel, std::int64_t width, const double* sums) {
  T* out = static_cast<T*>(of.out) + c * of.d + pixel;
  const double factor = 1 / (of.mass[c] * of.queries.unit), unit = 1 / of.queries.unit;
  const std::uint8_t* center = of.set.rows.center + pixel;
  for (std::int64_t j = 0; j < width; ++j)
    out[j] = static_cast<T>(factor * sums[j] + unit * (center[j] - of.queries.shift));
}

void put(const Small& of, std::int64_t c, std::int64_t pixel, std::int64_t width, const double* sums) {
  (of.queries.wide ? put_as<double> : put_as<float>)(of, c, pixel, width, sums);
}

// Logits of listed pairs in float64.
std::vector<double> exact(const Small& of, const Pairs& pairs) {
  std::vector<double> logits(pairs.images.size());
  pair_logits(of.set.rows, of.u.data(), of.set.half_norms, of.weight.data(), pairs.starts.data(), pairs.images.data(),
              of.count, logits.data(), useful(static_cast<std::int64_t>(logits.size()) * of.d, of.threads));
  return logits;
}

// Takes the listed pairs of a column for all there are: top and mass; pairs beyond the reach are struck from the list.
// weights: of those that stay.
void weigh_pairs(Small& of, Pairs& pairs, const std::vector<double>& logits, std::vector<double>& weights) {
  std::int64_t kept = 0, begin = 0;
  weights.resize(logits.size());
  for (std::int64_t c = 0; c < of.count; ++c) {
    const std::int64_t end = pairs.starts[c + 1];
    if (begin < end) {
      of.top[c] = *std::max_element(&logits[begin], &logits[begin] + (end - begin));
      of.mass[c] = 0;
    }
    const std::int64_t first = kept;
    for (std::int64_t p = begin; p < end; ++p) {
      if (logits[p] < of.top[c] - of.queries.reach) continue;
      pairs.images[kept] = pairs.images[p];
      of.mass[c] += weights[kept++] = std::exp(logits[p] - of.top[c]);
    }
    if (begin < end && of.dropped != nullptr)
      of.dropped[c] = static_cast<double>(of.set.n - (kept - first)) * std::exp(-of.queries.reach) / of.mass[c];
    begin = end;
    pairs.starts[c + 1] = kept;
  }
}

// The means of queries whose listed pairs are all that there is.
void put_pairs(const Small& of, const Pairs& pairs, const std::vector<double>& weights) {
  constexpr std::int64_t kPart = 512;
  const Kernels& kernel = *kernels();
  std::vector<std::int64_t> column, begin;
  for (std::int64_t c = 0; c < of.count; ++c)
    for (std::int64_t p = pairs.starts[c]; p < pairs.starts[c + 1]; p += kPart) column.push_back(c), begin.push_back(p);
  std::vector<double> sums(column.size() * static_cast<std::size_t>(of.d));
  share(static_cast<std::int64_t>(column.size()), useful(pairs.starts[of.count] * of.d, of.threads), [&] {
    return [&](std::int64_t item) {
      kernel.pair_sums(of.set.rows, weights.data(), pairs.images.data(), begin[item],
                       std::min(pairs.starts[column[item] + 1], begin[item] + kPart), &sums[item * of.d]);
    };
  });
  for (std::size_t item = 0; item < column.size();) {
    double* sum = &sums[item * of.d];
    const std::int64_t c = column[item];
    for (++item; item < column.size() && column[item] == c; ++item)
      for (std::int64_t j = 0; j < of.d; ++j) sum[j] += sums[item * of.d + j];
    put(of, c, 0, of.d, sum);
  }
}

void score_small(const Small& of, const float* narrow_weight, float* scores) {
  const Kernels& kernel = *kernels();
  share(divide_up(of.set.n, kRowBlock), useful(of.set.n * of.columns * of.d, of.threads), [&] {
    const auto scratch = aligned<float>(kRowBlock * kFloatChunk);
    return [&, scratch](std::int64_t block) {
      kernel.float_scores(of.set.rows, of.panel.data(), block * kRowBlock, std::min(of.set.n, (block + 1) * kRowBlock),
                          of.set.half_norms, narrow_weight, of.columns, scores, scratch->data());
    };
  });
}

void put_sums(const Small& of, const float* weights) {
  const Kernels& kernel = *kernels();
  const int threads = useful(of.set.n * of.columns * of.d, of.threads);
  const std::int64_t blocks = divide_up(of.d, kFloatPixels);
  const std::int64_t splits = std::clamp<std::int64_t>(2 * threads / blocks, 1, divide_up(of.count, 48));
  const std::int64_t most = divide_up(of.count, splits);
  share(blocks * splits, threads, [&] {
    const auto scratch = aligned<float>(kImageChunk * kFloatPixels);
    const auto sums = aligned<double>(most * kFloatPixels);
    return [&, scratch, sums](std::int64_t item) {
      const std::int64_t begin = item % splits * most, end = std::min(of.count, begin + most);
      const std::int64_t pixel = item / splits * kFloatPixels;
      kernel.float_sums(of.set.rows, of.set.n, weights, of.columns, pixel, begin, end, scratch->data(), sums->data());
      for (std::int64_t c = begin; c < end; ++c)
        put(of, c, pixel, std::min(kFloatPixels, of.d - pixel), sums->data() + (c - begin) * kFloatPixels);
    };
  });
}

}  // namespace

Checked small_means(const SmallSet& set, const SmallQueries& queries, void* out, double* log_sum, double* dropped,
                    int threads) {
  constexpr double kExact = 0.25;  // error of a logit from which all that matter are computed in float64
  constexpr double kHuge = 1e30;   // logits beyond which float32 may overflow
  const Kernels& kernel = *kernels();
  const std::int64_t count = queries.count, d = set.rows.d, n = set.n, columns = divide_up(count, kLanes) * kLanes;
  const auto size = static_cast<std::size_t>(columns);
  Small state{set, queries, count, d, columns, {}, {}, {}, {}, {}, {}, out, dropped, threads};
  for (auto* each : {&state.weight, &state.length, &state.top, &state.mass}) each->resize(size);
  if (!queries.exact) state.panel.resize(static_cast<std::size_t>(columns * d));
  if (const Checked checked = prepare(state); checked != Checked::good) return checked;
  if (dropped != nullptr) std::fill_n(dropped, count, 0.0);
  const auto finish = [&] {
    for (std::int64_t c = 0; log_sum != nullptr && c < count; ++c)
      log_sum[c] = state.top[c] + std::log(state.mass[c]) - state.length[c] * state.length[c] * state.weight[c] / 2;
    return Checked::good;
  };
  std::vector<double> weights;
  bool exactly = queries.exact;
  for (std::int64_t c = 0; c < count; ++c)
    exactly = exactly || state.length[c] * set.longest * std::max(1.0, state.weight[c]) > kHuge;
  if (exactly) {
    Pairs pairs;
    pairs.starts.resize(size + 1, n * count);
    for (std::int64_t c = 0; c <= count; ++c) pairs.starts[c] = n * c;
    pairs.images.resize(static_cast<std::size_t>(n * count));
    for (std::int64_t c = 0; c < count; ++c) std::iota(&pairs.images[n * c], &pairs.images[n * c] + n, 0);
    weigh_pairs(state, pairs, exact(state, pairs), weights);
    put_pairs(state, pairs, weights);
    return finish();
  }
  const auto scores = std::make_unique<cpu::Aligned<float>>(static_cast<std::size_t>(n * columns));
  float* const s = scores->data();
  std::vector<float> narrow_weight(size), top(size), limit(size), zeros(static_cast<std::size_t>(n));
  for (std::int64_t c = 0; c < count; ++c) narrow_weight[c] = static_cast<float>(state.weight[c]);
  score_small(state, narrow_weight.data(), s);
  const int pass_threads = useful(32 * n * columns, threads);
  {
    std::vector<std::int64_t> where(size);
    column_top(s, n, columns, top.data(), where.data(), pass_threads);
  }
  constexpr double kUnit = 1.0 / (1 << 24);
  const double terms = static_cast<double>(kFloatChunk) + static_cast<double>(d) / kFloatChunk + 6;
  const double depth = 1 + std::sqrt(static_cast<double>(d) / kFloatChunk) / 2;
  std::vector<double> typical(size);
  std::vector<char> searched(size);
  bool all_searched = true, any_searched = false;
  for (std::int64_t c = 0; c < count; ++c) {
    const double error = terms * kUnit * (state.length[c] + set.longest) * set.longest * state.weight[c];
    typical[c] = kUnit * set.spread * state.weight[c] *
                 (4 * state.length[c] / std::sqrt(static_cast<double>(d)) + depth * set.spread);
    searched[c] = error > kExact;
    (searched[c] ? any_searched : all_searched) = searched[c];
    limit[c] = searched[c] ? std::nextafter(static_cast<float>(top[c] - 2 * error - queries.reach),
                                            -std::numeric_limits<float>::infinity())
                           : std::numeric_limits<float>::infinity();
    state.top[c] = top[c];
  }
  std::fill(limit.begin() + count, limit.end(), std::numeric_limits<float>::infinity());
  const std::vector<float> no_reach(size);
  const auto chosen = [&] {
    return select(s, n, columns, limit.data(), no_reach.data(), zeros.data(), n * columns, pass_threads);
  };
  Pairs found;
  std::vector<double> found_weights;
  if (any_searched) {
    found = chosen();
    weigh_pairs(state, found, exact(state, found), found_weights);
    if (all_searched && found.starts[count] <= n * count / 16) {
      put_pairs(state, found, found_weights);
      return finish();
    }
    for (std::int64_t c = 0; c < count; ++c)
      if (searched[c]) top[c] = std::numeric_limits<float>::max();  // the weights of all others become 0
  }
  std::vector<double> mass(size), squares(size);
  share(columns / kLanes, pass_threads, [&] {
    return [&](std::int64_t vector) {
      const std::int64_t c = kLanes * vector;
      kernel.weigh(s + c, n, columns, &top[c], &mass[c], &squares[c]);
    };
  });
  bool again = false;
  for (std::int64_t c = 0; c < count; ++c) {
    limit[c] = std::numeric_limits<float>::infinity();
    if (searched[c]) {
      for (std::int64_t p = found.starts[c]; p < found.starts[c + 1]; ++p)
        s[found.images[p] * columns + c] = static_cast<float>(found_weights[p]);
      continue;
    }
    state.mass[c] = mass[c];
    const double allowed = queries.tolerance[c] / typical[c];
    if (std::sqrt(squares[c]) <= allowed * mass[c]) continue;
    limit[c] = static_cast<float>(allowed * allowed * mass[c]);
    again = true;
  }
  if (again) {
    const Pairs heavy = chosen();
    const std::vector<double> logits = exact(state, heavy);
    for (std::int64_t c = 0; c < count; ++c)
      for (std::int64_t p = heavy.starts[c]; p < heavy.starts[c + 1]; ++p) {
        float& w = s[heavy.images[p] * columns + c];
        const double right = std::exp(logits[p] - state.top[c]);
        state.mass[c] += right - w;
        w = static_cast<float>(right);
      }
  }
  put_sums(state, s);
  return finish();
}

}  // namespace diffmem::posterior_mean
