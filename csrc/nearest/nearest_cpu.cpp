// The CPU search: encoding, the filtered search and the dense search over the inner loops of nearest.h's
// table.
//
// What it should cost, written down before tuning. Two Zen 3 cores at 3.2 GHz (AVX2), Q = 10,000 queries, N = 50,000
// images, d = 3072. VPMADDWD: 2 per cycle and core x 16 products = 206 GMAC/s (float32 FMA: 103). 12 of them with 12
// adds and 6 broadcasts take 6.0 cycles in isolation, so the adds and loads are free.
//
//   dense    Q N d = 1.54 TMAC / 206 G                                    7.5 s (any float32 product: 14.9 s)
//   encode   Q d 180 = 5.5 GMAC                                           0.03 s
//   scan     Q N 32 = 16 GMAC                                             0.08 s
//   filter   3 % of the pairs, ~8 cycles each                             0.02 s
//   refine   0.1 % of the pairs, 3 KB each = 1.8 GB from L3 or memory     0.1 s
//   index    N d 180 = 28 GMAC, and the principal components (~10 GMAC)   0.25 s
//
// What was measured (CPU seconds of both cores / 2, CIFAR-10): scan 0.10, filter 0.06, refine 0.10, lists and
// thresholds 0.05, seeds 0.03, encode 0.05: 0.4 s in all. dense: 10.5 s, `tile` runs at 81 of 103 GMAC/s a core. The
// index takes 1 s, half of it LAPACK's QR and eigenvalues, which two cores hardly share.
//
// What was tried, and what it gave:
//   `tile` from intrinsics 48 GMAC/s a core (GCC spills accumulators); with the multiply-add in assembly 73; strips and
//     panels on cache lines 81; unrolled twice 60, four times 72.
//   values of the coarse code 20, 24, 28, 32, 40: search in 0.38, 0.39, 0.37, 0.35, 0.38 s. 5.8 to 1.8 % of the pairs
//   pass. fine coordinates 120, 180, 240: 0.24, 0.12, 0.07 % refined, search 0.35, 0.32, 0.29 s, encode 0.03, 0.06,
//   0.08 s;
//     180 is best with few queries, whose refinements come from memory.
//   the remainder's length by image regions instead of as a whole: at 60 coordinates 0.67 % pass, with 4 x 4 regions
//   0.47 %,
//     with 8 x 8 0.37 %. Costs a reconstruction per image; as many further coordinates do the same.
//   first limits (mean ratio to the true squared distance, 256 clusters): the nearest cluster's points 1.12, two
//   clusters
//     1.065, four 1.04; a random sample of 8192 points 1.15; the 8 smallest 15-dimensional bounds of all points 1.15.
//   skipping whole clusters by the triangle inequality: 8 to 11 % of the pairs, less than its bookkeeping.
//   queries per chunk 512, 1024, 2048, 5000: 0.39, 0.37, 0.34, 0.355 s (a chunk's images and a block's must fit the
//   L3). prefetching the next candidate's first 0, 8, 16, 48 lines: 0.41, 0.40, 0.37, 0.37 s. two accumulators in
//   distance_u8: nothing, it waits for the L3 (27 GB/s a core).
#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/features.h"
#include "cpu/share.h"
#include "cpu/simd.h"
#include "nearest/nearest.h"

namespace diffmem::nearest {

const Kernels& best_kernels() {
  return *cpu::best<Kernels>({.portable = portable_kernels(),
                              .avx2 = avx2_kernels(),
                              .avx512 = avx512_kernels(),
                              .neon = neon_kernels(),
                              .neon_dotprod = neon_dotprod_kernels()});
}

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

using cpu::Aligned;

// Runs task(0) .. task(count - 1) on up to `threads` threads.
template <class Task>
void parallel(std::int64_t count, int threads, const Task& task) {
  cpu::share(count, threads, [&task] { return [&task](std::int64_t i) { task(i); }; });
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------------- distances

template <class Row>
using DistanceOf = std::conditional_t<std::is_same_v<Row, std::uint8_t>, std::int64_t, double>;

std::int64_t distance(const Kernels& k, const std::uint8_t* x, const std::uint8_t* y, std::size_t d, std::int64_t t) {
  return k.distance_u8(x, y, d, t);
}
double distance(const Kernels& k, const float* x, const float* y, std::size_t d, double t) {
  return k.distance_f32(x, y, d, t);
}
double distance(const Kernels& k, const double* x, const double* y, std::size_t d, double t) {
  return k.distance_f64(x, y, d, t);
}

template <class Row>
const Row* row(const Rows& rows, std::int64_t i) {
  return static_cast<const Row*>(rows.data) + i * rows.stride;
}

// The best k pairs seen, by (distance, index).
template <class Distance>
struct Best {
  Distance* distance;
  std::int64_t* index;
  int k;
  int count = 0;

  bool full() const { return count == k; }
  Distance worst() const { return full() ? distance[k - 1] : std::numeric_limits<Distance>::max(); }
  bool offer(Distance value, std::int64_t i) {
    if (full() && (value > distance[k - 1] || (value == distance[k - 1] && i > index[k - 1]))) return false;
    int at = full() ? k - 1 : count++;
    for (; at > 0 && (distance[at - 1] > value || (distance[at - 1] == value && index[at - 1] > i)); --at) {
      distance[at] = distance[at - 1];
      index[at] = index[at - 1];
    }
    distance[at] = value;
    index[at] = i;
    return true;
  }
};

// One list of the best k per (range of the training set, query), merged at the end.
template <class Distance>
class Lists {
 public:
  Lists(std::int64_t ranges, std::int64_t queries, int k)
      : ranges_(ranges),
        queries_(queries),
        k_(k),
        distance_(ranges * queries * k),
        index_(ranges * queries * k),
        count_(ranges * queries, 0) {}

  Best<Distance> get(std::int64_t range, std::int64_t query) {
    const std::int64_t list = range * queries_ + query;
    return {distance_.data() + list * k_, index_.data() + list * k_, k_, count_[list]};
  }
  void put(std::int64_t range, std::int64_t query, const Best<Distance>& best) {
    count_[range * queries_ + query] = best.count;
  }
  void merge(Distance* distance, std::int64_t* index) {
    for (std::int64_t q = 0; q < queries_; ++q) {
      Best<Distance> merged{distance + q * k_, index + q * k_, k_};
      for (std::int64_t range = 0; range < ranges_; ++range) {
        const Best<Distance> part = get(range, q);
        for (int i = 0; i < part.count; ++i) merged.offer(part.distance[i], part.index[i]);
      }
    }
  }

 private:
  std::int64_t ranges_;
  std::int64_t queries_;
  int k_;
  std::vector<Distance> distance_;
  std::vector<std::int64_t> index_;
  std::vector<int> count_;
};

// How Q x N is cut into equal parts for the threads: by queries, or, where those are few, by ranges of the training
// set, which is counted in `units` that stay whole.
struct Cut {
  static constexpr std::int64_t kFew = 128;
  std::int64_t chunk;
  std::int64_t chunks = 1;
  std::int64_t range;
  std::int64_t ranges = 1;

  Cut(std::int64_t queries, std::int64_t largest_chunk, std::int64_t units, int threads) {
    if (queries >= kFew * threads) {
      chunks = divide_up(divide_up(queries, largest_chunk), threads) * threads;
    } else {
      ranges = std::clamp<std::int64_t>(threads, 1, units);
    }
    chunk = std::max<std::int64_t>(divide_up(queries, chunks), 1);
    range = divide_up(units, ranges);
  }
};

// ----------------------------------------------------------------------------------------------------- encoding

std::int16_t rounded(double value) {
  return static_cast<std::int16_t>(std::clamp(value + (value < 0 ? -0.5 : 0.5), -32767.0, 32767.0));
}

// Writes one point's code from scaled coordinates v and squared norm.
class Encoder {
 public:
  Encoder(CodeShape shape, std::int64_t count, bool queries, const Code& out)
      : shape_(shape), count_(count), queries_(queries), out_(out) {}

  void point(std::int64_t i, const double* v, double squared_norm) const {
    const int values = 2 * shape_.steps;
    std::int16_t* coarse = out_.coarse + i * values;
    std::int32_t* sq = out_.sq + i * (1 + shape_.levels);
    float* error = out_.error + i * (1 + shape_.levels);
    double energy = 0;  // ||scaled coordinates||^2 so far
    double miss = 0;    // their squared rounding errors
    std::int64_t size = 0;
    for (int j = 0; j + 1 < values; ++j) add(v[j], coarse[j], energy, miss, size);
    close(squared_norm, energy, miss, size, coarse[values - 1], sq[0], error[0]);
    energy = miss = 0;
    size = 0;
    std::int16_t before = 0;
    for (int l = 0; l < shape_.levels; ++l) {
      std::int16_t* fine = out_.fine + (l * count_ + i) * kRow;
      for (int j = 0; j < kLevelCoordinates; ++j) {
        add(v[l * kLevelCoordinates + j], fine[j], energy, miss, size);
      }
      close(squared_norm, energy, miss, size, fine[60], sq[1 + l], error[1 + l]);
      fine[61] = queries_ ? static_cast<std::int16_t>(-before) : before;
      before = fine[60];
      const std::int32_t bias = queries_ ? 0 : -(sq[1 + l] >> 1);
      std::memcpy(fine + 62, &bias, sizeof bias);
    }
  }

 private:
  static void add(double value, std::int16_t& code, double& energy, double& miss, std::int64_t& size) {
    code = rounded(value);
    energy += value * value;
    miss += (code - value) * (code - value);
    size += static_cast<std::int32_t>(code) * code;
  }
  static void close(double squared_norm, double energy, double miss, std::int64_t size, std::int16_t& rho,
                    std::int32_t& sq, float& error) {
    double unused = 0;
    add(std::sqrt(std::max(0.0, squared_norm - energy)), rho, unused, miss, size);
    sq = static_cast<std::int32_t>(size);
    error = std::nextafter(static_cast<float>(std::sqrt(miss)), std::numeric_limits<float>::max());
  }

  CodeShape shape_;
  std::int64_t count_;
  bool queries_;
  Code out_;
};

// Points side by side in strips (nearest.h), from rows of 2 * steps values.
void pack_strip(const std::int16_t* rows, std::size_t stride, std::size_t count, std::size_t steps, int strip_rows,
                std::int16_t* strip) {
  const std::size_t there = std::min<std::size_t>(count, strip_rows);
  if (there < static_cast<std::size_t>(strip_rows)) std::fill_n(strip, steps * 2 * strip_rows, std::int16_t{0});
  for (std::size_t s = 0; s < steps; ++s) {
    for (std::size_t i = 0; i < there; ++i) {
      std::memcpy(strip + 2 * (s * strip_rows + i), rows + i * stride + 2 * s, 2 * sizeof(std::int16_t));
    }
  }
}

constexpr std::size_t kDepth = 256;  // coordinate pairs per pass of a product: a panel's part stays in the L1 cache

// C[strips * strip_rows][panels * 16] = strips . panels over `steps` pairs. Strips lie `steps` apart, as do panels.
void product(const Kernels& k, std::size_t steps, const std::int16_t* strips, std::size_t strip_count,
             const std::int16_t* panels, std::size_t panel_count, std::int32_t* c) {
  const std::size_t ldc = panel_count * kPanel;
  for (std::size_t from = 0; from < steps; from += kDepth) {
    const std::size_t depth = std::min(kDepth, steps - from);
    for (std::size_t p = 0; p < panel_count; ++p) {
      const std::int16_t* panel = panels + (p * steps + from) * 2 * kPanel;
      for (std::size_t s = 0; s < strip_count; ++s) {
        k.tile(depth, strips + (s * steps + from) * 2 * k.strip_rows, panel, c + s * k.strip_rows * ldc + p * kPanel,
               ldc, from > 0);
      }
    }
  }
}

}  // namespace

void encode_bytes(const Rows& rows, const Basis& basis, bool queries, const Code& out, int threads) {
  const Kernels& k = best_kernels();
  const std::size_t d = rows.d;
  const std::size_t steps = divide_up(d, 2);
  const int m = basis.shape.coordinates();
  const std::size_t strips = divide_up(m, k.strip_rows);
  Aligned<std::int16_t> packed(strips * steps * 2 * k.strip_rows);
  std::vector<std::int16_t> even(d % 2 ? (d + 1) * static_cast<std::size_t>(m) : 0);  // rows padded to whole pairs
  const std::int16_t* p = basis.p;
  if (d % 2) {
    for (int i = 0; i < m; ++i) std::copy_n(basis.p + i * d, d, even.data() + i * (d + 1));
    p = even.data();
  }
  parallel(strips, threads, [&](std::int64_t s) {
    pack_strip(p + s * k.strip_rows * 2 * steps, 2 * steps, m - s * k.strip_rows, steps, k.strip_rows,
               packed.data() + s * steps * 2 * k.strip_rows);
  });
  const Encoder encoder(basis.shape, rows.count, queries, out);
  constexpr std::int64_t kPanels = 4;
  parallel(divide_up(rows.count, kPanels * kPanel), threads, [&](std::int64_t block) {
    const std::int64_t first = block * kPanels * kPanel;
    const std::int64_t count = std::min(rows.count - first, kPanels * kPanel);
    const std::int64_t panels = divide_up(count, kPanel);
    thread_local Aligned<std::int16_t> points;
    thread_local Aligned<std::int32_t> c;
    points.resize(panels * steps * 2 * kPanel);
    c.resize(strips * k.strip_rows * panels * kPanel);
    for (std::int64_t i = 0; i < panels; ++i) {
      k.pack_panel(row<std::uint8_t>(rows, first + i * kPanel), rows.stride,
                   std::min<std::int64_t>(kPanel, count - i * kPanel), d, points.data() + i * steps * 2 * kPanel);
    }
    product(k, steps, packed.data(), strips, points.data(), panels, c.data());
    std::vector<double> v(m);
    for (std::int64_t i = 0; i < count; ++i) {
      for (int j = 0; j < m; ++j) {
        v[j] = static_cast<double>(c[j * panels * kPanel + i] - basis.shift[j]) * basis.factor;
      }
      const std::int64_t norm =
          k.distance_u8(row<std::uint8_t>(rows, first + i), basis.mean, d, std::numeric_limits<std::int64_t>::max());
      encoder.point(first + i, v.data(), static_cast<double>(norm) * basis.scale * basis.scale);
    }
  });
}

void encode_coordinates(const double* coordinates, const double* squared_norms, std::int64_t count, CodeShape shape,
                        double scale, bool queries, const Code& out, int threads) {
  const Encoder encoder(shape, count, queries, out);
  const int m = shape.coordinates();
  constexpr std::int64_t kBlock = 256;
  parallel(divide_up(count, kBlock), threads, [&](std::int64_t block) {
    std::vector<double> v(m);
    for (std::int64_t i = block * kBlock; i < std::min(count, (block + 1) * kBlock); ++i) {
      for (int j = 0; j < m; ++j) v[j] = coordinates[i * m + j] * scale;
      encoder.point(i, v.data(), squared_norms[i] * scale * scale);
    }
  });
}

// ----------------------------------------------------------------------------------------------- filtered search

namespace {

constexpr std::int64_t kBlockPanels = 64;   // 1024 points: their coarse code and finest rows fit the L2 cache
constexpr std::int64_t kQueryChunk = 2048;  // queries that meet a block, and its rows in the L3 cache, at a time
constexpr std::int64_t kSeedMembers = 512;  // points of the nearest clusters whose bounds pick the seeds
constexpr int kSeeds = 8;

template <class Row>
class Filtered {
 public:
  using Distance = DistanceOf<Row>;
  static constexpr Distance kFar = std::numeric_limits<Distance>::max();

  Filtered(const Index& index, const Rows& queries, const Code& code, int k, double allowance)
      : index_(index),
        queries_(queries),
        code_(code),
        k_(k),
        allowance_(allowance),
        kernels_(best_kernels()),
        levels_(1 + index.shape.levels) {
    const double d = static_cast<double>(index.rows.d);
    const double m = index.shape.coordinates();
    const double unit = std::ldexp(1.0, -53);
    slack_ = index.scale == 0 ? 0 : 4 * 32767 * std::sqrt(4 * (d + m + 8) * std::sqrt(m + 1) * unit);
    relative_ = (d + 16) * 2 * unit;
  }

  Work run(Distance* out, std::int64_t* out_index, int threads) {
    const Clock::time_point start = Clock::now();
    const std::int64_t count = queries_.count;
    limit_.assign(count, kFar);
    const std::int64_t rows = kernels_.strip_rows;
    parallel(divide_up(count, rows), threads,
             [&](std::int64_t strip) { seed(strip * rows, std::min(rows, count - strip * rows)); });
    Work work;
    work.seed_seconds = seconds_since(start);
    const std::int64_t panels = divide_up(index_.rows.count, kPanel);
    const Cut cut(count, kQueryChunk, divide_up(panels, kBlockPanels), threads);
    Lists<Distance> lists(cut.ranges, count, k_);
    parallel(cut.chunks * cut.ranges, threads, [&](std::int64_t item) {
      const std::int64_t first = item % cut.chunks * cut.chunk;
      const std::int64_t range = item / cut.chunks;
      scan(first, std::min(cut.chunk, count - first), range * cut.range * kBlockPanels,
           std::min((range + 1) * cut.range * kBlockPanels, panels), range, lists);
    });
    work.scan_seconds = seconds_since(start) - work.seed_seconds;
    work.bounded = bounded_;
    work.fine = fine_;
    work.refined = refined_;
    work.gave_up = gave_up_;
    if (!gave_up_) lists.merge(out, out_index);
    return work;
  }

 private:
  const std::int16_t* fine_query(int level, std::int64_t q) const {
    return code_.fine + (level * queries_.count + q) * kRow;
  }
  const std::int16_t* fine_rows(int level) const { return index_.fine + level * index_.rows.count * kRow; }

  Distance exact(std::int64_t q, std::int64_t position, Distance limit) const {
    return distance(kernels_, row<Row>(queries_, q), row<Row>(index_.rows, index_.order[position]), index_.rows.d,
                    limit);
  }

  // threshold(x) of nearest.h for a squared distance `limit`.
  std::int32_t threshold(std::int64_t q, int level, Distance limit) const {
    if (limit == kFar) return std::numeric_limits<std::int32_t>::min();
    // 1e-150: differences whose squares underflow in float64.
    const double radius = index_.scale * (std::sqrt(static_cast<double>(limit)) * (1 + relative_) + 1e-150) +
                          code_.error[q * levels_ + level] + index_.error[level] + slack_;
    const double value = std::floor((code_.sq[q * levels_ + level] - radius * radius) / 2) - 1;
    return static_cast<std::int32_t>(std::clamp(value, -2147483648.0, 2147483647.0));
  }

  // A first limit per query: the k-th smallest distance among the points of the nearest clusters that look nearest.
  void seed(std::int64_t first, std::int64_t count) {
    const std::size_t steps = index_.shape.steps;
    const std::size_t panels = divide_up(index_.clusters, kPanel);
    const std::size_t stride = panels * kPanel;
    Aligned<std::int16_t> strip(steps * 2 * kernels_.strip_rows);
    Aligned<std::int32_t> near(kernels_.strip_rows * stride);
    pack_strip(code_.coarse + first * 2 * steps, 2 * steps, count, steps, kernels_.strip_rows, strip.data());
    product(kernels_, steps, strip.data(), 1, index_.centroids, panels, near.data());
    const std::int64_t wanted = std::max<std::int64_t>(kSeedMembers, 4 * k_);
    const std::size_t seeds = std::max(kSeeds, k_ + 2);
    std::vector<std::int32_t> scores;
    std::vector<std::int64_t> positions;
    std::vector<std::pair<std::int32_t, std::int64_t>> best;
    std::int64_t refined = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      std::int32_t* score = near.data() + i * stride;
      for (int c = 0; c < index_.clusters; ++c) score[c] += index_.centroid_bias[c];
      best.clear();
      std::int32_t worst = std::numeric_limits<std::int32_t>::min();
      std::int64_t members = 0;
      for (int taken = 0; taken < index_.clusters && members < wanted; ++taken) {
        std::int32_t* nearest = std::max_element(score, score + index_.clusters);
        const std::int64_t from = index_.starts[nearest - score];
        const std::int64_t size = index_.starts[nearest - score + 1] - from;
        *nearest = std::numeric_limits<std::int32_t>::min();
        members += size;
        scores.resize(size);
        kernels_.score(fine_query(0, first + i), fine_rows(0) + from * kRow, size, scores.data());
        for (std::int64_t j = 0; j < size; ++j) {
          if (best.size() == seeds && scores[j] <= worst) continue;
          if (best.size() == seeds) best.pop_back();
          auto at = best.end();
          while (at != best.begin() && (at - 1)->first < scores[j]) --at;
          best.insert(at, {scores[j], from + j});
          worst = best.back().first;
        }
      }
      if (best.size() < static_cast<std::size_t>(k_)) continue;
      std::vector<Distance> distances(k_);
      std::vector<std::int64_t> indices(k_);
      Best<Distance> nearest{distances.data(), indices.data(), k_};
      for (const auto& [score_of, position] : best) {
        nearest.offer(exact(first + i, position, nearest.worst()), position);
      }
      limit_[first + i] = nearest.worst();
      refined += static_cast<std::int64_t>(best.size());
    }
    refined_ += refined;
  }

  void scan(std::int64_t first, std::int64_t count, std::int64_t from_panel, std::int64_t to_panel, std::int64_t range,
            Lists<Distance>& lists) {
    const int rows = kernels_.strip_rows;
    const std::size_t steps = index_.shape.steps;
    const std::int64_t strips = divide_up(count, rows);
    Aligned<std::int16_t> packed(strips * steps * 2 * rows);
    std::vector<std::int32_t> thresholds(strips * rows, std::numeric_limits<std::int32_t>::max());
    for (std::int64_t s = 0; s < strips; ++s) {
      pack_strip(code_.coarse + (first + s * rows) * 2 * steps, 2 * steps, count - s * rows, steps, rows,
                 packed.data() + s * steps * 2 * rows);
    }
    std::vector<std::int32_t> fine_thresholds(count * index_.shape.levels);
    const auto set_thresholds = [&](std::int64_t q, Distance limit) {
      thresholds[q] = threshold(first + q, 0, limit);
      for (int l = 0; l < index_.shape.levels; ++l) {
        fine_thresholds[q * index_.shape.levels + l] = threshold(first + q, 1 + l, limit);
      }
    };
    for (std::int64_t q = 0; q < count; ++q) set_thresholds(q, limit_[first + q]);
    std::vector<std::uint16_t> masks(rows * kBlockPanels);
    std::vector<std::int32_t> candidates(kBlockPanels * kPanel);
    std::vector<std::int32_t> dots(kBlockPanels * kPanel);
    for (std::int64_t block = from_panel; block < to_panel; block += kBlockPanels) {
      const std::int64_t panels = std::min(kBlockPanels, to_panel - block);
      const std::int64_t base = block * kPanel;
      const std::int64_t points = std::min(panels * kPanel, index_.rows.count - base);
      std::int64_t fine = 0;
      std::int64_t refined = 0;
      for (std::int64_t s = 0; s < strips && !gave_up_; ++s) {
        kernels_.scan(steps, packed.data() + s * steps * 2 * rows, thresholds.data() + s * rows,
                      index_.panels + block * steps * 2 * kPanel, index_.bias + base, panels, masks.data(),
                      kBlockPanels);
        for (std::int64_t q = s * rows; q < std::min<std::int64_t>(count, (s + 1) * rows); ++q) {
          std::size_t kept = list(masks.data() + (q - s * rows) * kBlockPanels, panels, points, candidates.data());
          if (kept == 0) continue;
          fine += static_cast<std::int64_t>(kept);
          std::fill_n(dots.begin(), kept, 0);
          for (int l = 0; l < index_.shape.levels && kept > 0; ++l) {
            kept = kernels_.filter(fine_query(l, first + q), fine_rows(l) + base * kRow, candidates.data(), dots.data(),
                                   kept, fine_thresholds[q * index_.shape.levels + l]);
          }
          if (kept == 0) continue;
          refined += static_cast<std::int64_t>(kept);
          Best<Distance> best = lists.get(range, first + q);
          Distance limit = std::min(best.worst(), limit_[first + q]);
          bool nearer = false;
          for (std::size_t c = 0; c < kept; ++c) {
            const std::int64_t position = base + candidates[c];
            if (c + 1 < kept) prefetch(row<Row>(index_.rows, index_.order[base + candidates[c + 1]]));
            const Distance value = exact(first + q, position, limit);
            if (value > limit || !best.offer(value, index_.order[position])) continue;
            if (best.worst() < limit) {
              limit = best.worst();
              nearer = true;
            }
          }
          lists.put(range, first + q, best);
          if (nearer) set_thresholds(q, limit);
        }
      }
      bounded_ += count * points;
      fine_ += fine;
      refined_ += refined;
      // A few blocks' worth of grace: the first ones are seen with the loosest limits.
      if (static_cast<double>(refined_) > allowance_ * static_cast<double>(bounded_ + 4 * kBlockPanels * kPanel))
        gave_up_ = true;
      if (gave_up_) return;
    }
  }

  void prefetch(const Row* next) const {
    // The first KiB; from there on the processor's own prefetcher sees the stream.
    const std::int64_t bytes = std::min<std::int64_t>(1024, index_.rows.d * sizeof(Row));
    for (std::int64_t at = 0; at < bytes; at += 64) simd::prefetch(reinterpret_cast<const char*>(next) + at);
  }

  // Positions of the set bits of `panels` masks, below `points`.
  static std::size_t list(const std::uint16_t* masks, std::int64_t panels, std::int64_t points, std::int32_t* out) {
    std::size_t found = 0;
    for (std::int64_t p = 0; p < panels; p += 4) {
      std::uint64_t word = 0;
      for (std::int64_t i = 0; i < std::min<std::int64_t>(4, panels - p); ++i) {
        word |= static_cast<std::uint64_t>(masks[p + i]) << (16 * i);
      }
      for (; word != 0; word &= word - 1) {
        out[found++] = static_cast<std::int32_t>(p * kPanel + std::countr_zero(word));
      }
    }
    while (found > 0 && out[found - 1] >= points) --found;  // the zeros that fill the last panel
    return found;
  }

  const Index& index_;
  const Rows& queries_;
  const Code& code_;
  int k_;
  double allowance_;
  const Kernels& kernels_;
  int levels_;
  double slack_;
  double relative_;
  std::vector<Distance> limit_;
  std::atomic<std::int64_t> bounded_{0};
  std::atomic<std::int64_t> fine_{0};
  std::atomic<std::int64_t> refined_{0};
  std::atomic<bool> gave_up_{false};
};

// -------------------------------------------------------------------------------------------------- dense search

constexpr std::int64_t kLargestProduct = 1 << 16;  // d up to which 128^2 d + 128^2 d / 2 fits int32
constexpr std::int64_t kDenseChunk = 1536;         // queries whose strips share a block of packed panels
constexpr std::int64_t kDenseStrips = 16;
constexpr std::int64_t kDensePanels = 16;

template <class Row>
class Dense {
 public:
  using Distance = DistanceOf<Row>;

  Dense(const Rows& rows, const Rows& queries, int k)
      : rows_(rows), queries_(queries), k_(k), kernels_(best_kernels()) {}

  void run(Distance* out, std::int64_t* out_index, int threads) {
    const std::int64_t unit = kDensePanels * kPanel;
    const Cut cut(queries_.count, kDenseChunk, divide_up(rows_.count, unit), threads);
    Lists<Distance> lists(cut.ranges, queries_.count, k_);
    parallel(cut.chunks * cut.ranges, threads, [&](std::int64_t item) {
      const std::int64_t first = item % cut.chunks * cut.chunk;
      const std::int64_t count = std::min(cut.chunk, queries_.count - first);
      const std::int64_t range = item / cut.chunks;
      const std::int64_t from = range * cut.range * unit;
      const std::int64_t to = std::min((range + 1) * cut.range * unit, rows_.count);
      if constexpr (std::is_same_v<Row, std::uint8_t>) {
        if (rows_.d <= kLargestProduct && queries_.count > kernels_.strip_rows / 2) {
          by_products(first, count, from, to, range, lists);
          return;
        }
      }
      by_differences(first, count, from, to, range, lists);
    });
    lists.merge(out, out_index);
  }

 private:
  void by_differences(std::int64_t first, std::int64_t count, std::int64_t from, std::int64_t to, std::int64_t range,
                      Lists<Distance>& lists) {
    constexpr std::int64_t kBytes = 1 << 17;  // of training rows that all queries of the chunk meet in the L2 cache
    const std::int64_t block = std::clamp<std::int64_t>(kBytes / (rows_.d * sizeof(Row)), 1, 64);
    for (std::int64_t i = from; i < to; i += block) {
      for (std::int64_t q = first; q < first + count; ++q) {
        Best<Distance> best = lists.get(range, q);
        for (std::int64_t j = i; j < std::min(to, i + block); ++j) {
          best.offer(distance(kernels_, row<Row>(queries_, q), row<Row>(rows_, j), rows_.d, best.worst()), j);
        }
        lists.put(range, q, best);
      }
    }
  }

  // dist = |x|^2 + |y|^2 - 2 x.y with x, y the bytes less 128: all exact in int32 / int64. A pair is looked at when
  // x.y - floor(|y|^2 / 2) > threshold(x), the same inequality as in nearest.h with no rounding in it.
  void by_products(std::int64_t first, std::int64_t count, std::int64_t from, std::int64_t to, std::int64_t range,
                   Lists<std::int64_t>& lists) {
    const std::size_t d = rows_.d;
    const std::size_t steps = divide_up(d, 2);
    const int strip_rows = kernels_.strip_rows;
    const std::int64_t strips = divide_up(count, strip_rows);
    const std::vector<std::uint8_t> center(d, 128);
    const auto norm = [&](const Rows& rows, std::int64_t i) {
      return kernels_.distance_u8(row<std::uint8_t>(rows, i), center.data(), d,
                                  std::numeric_limits<std::int64_t>::max());
    };
    Aligned<std::int16_t> packed(strips * steps * 2 * strip_rows);
    std::vector<std::int64_t> query_norm(count);
    std::vector<std::int32_t> threshold(count, std::numeric_limits<std::int32_t>::min());
    {
      std::vector<std::int16_t> wide(strip_rows * 2 * steps, 0);
      for (std::int64_t s = 0; s < strips; ++s) {
        const std::int64_t here = std::min<std::int64_t>(strip_rows, count - s * strip_rows);
        for (std::int64_t i = 0; i < here; ++i) {
          const std::uint8_t* query = row<std::uint8_t>(queries_, first + s * strip_rows + i);
          for (std::size_t j = 0; j < d; ++j) wide[i * 2 * steps + j] = static_cast<std::int16_t>(query[j] - 128);
          query_norm[s * strip_rows + i] = norm(queries_, first + s * strip_rows + i);
        }
        pack_strip(wide.data(), 2 * steps, here, steps, strip_rows, packed.data() + s * steps * 2 * strip_rows);
      }
    }
    Aligned<std::int16_t> panels(kDensePanels * steps * 2 * kPanel);
    Aligned<std::int32_t> c(kDenseStrips * strip_rows * kDensePanels * kPanel);
    std::vector<std::int64_t> norms(kDensePanels * kPanel);
    std::vector<std::int32_t> bias(kDensePanels * kPanel);
    for (std::int64_t base = from; base < to; base += kDensePanels * kPanel) {
      const std::int64_t points = std::min(kDensePanels * kPanel, to - base);
      const std::int64_t panel_count = divide_up(points, kPanel);
      for (std::int64_t p = 0; p < panel_count; ++p) {
        kernels_.pack_panel(row<std::uint8_t>(rows_, base + p * kPanel), rows_.stride,
                            std::min<std::int64_t>(kPanel, points - p * kPanel), d,
                            panels.data() + p * steps * 2 * kPanel);
      }
      for (std::int64_t j = 0; j < points; ++j) {
        norms[j] = norm(rows_, base + j);
        bias[j] = -static_cast<std::int32_t>(norms[j] >> 1);
      }
      const std::int64_t ldc = panel_count * kPanel;
      for (std::int64_t s = 0; s < strips; s += kDenseStrips) {
        const std::int64_t here = std::min(kDenseStrips, strips - s);
        product(kernels_, steps, packed.data() + s * steps * 2 * strip_rows, here, panels.data(), panel_count,
                c.data());
        for (std::int64_t i = 0; i < std::min(here * strip_rows, count - s * strip_rows); ++i) {
          const std::int64_t q = s * strip_rows + i;
          std::int32_t* dots = c.data() + i * ldc;
          for (std::int64_t j = 0; j < points; ++j) {
            if (dots[j] + bias[j] <= threshold[q]) continue;
            Best<std::int64_t> best = lists.get(range, first + q);
            if (!best.offer(query_norm[q] + norms[j] - 2 * static_cast<std::int64_t>(dots[j]), base + j)) continue;
            lists.put(range, first + q, best);
            if (!best.full()) continue;
            // floor((|x|^2 - t) / 2) - 1; the shift rounds toward minus infinity.
            threshold[q] = static_cast<std::int32_t>(std::max<std::int64_t>(((query_norm[q] - best.worst()) >> 1) - 1,
                                                                            std::numeric_limits<std::int32_t>::min()));
          }
        }
      }
    }
  }

  const Rows& rows_;
  const Rows& queries_;
  int k_;
  const Kernels& kernels_;
};

}  // namespace

Work search_filtered(const Index& index, const Rows& queries, const Code& code, int k, double allowance,
                     const Answer& out, int threads) {
  switch (index.rows.type) {
    case Type::u8:
      return Filtered<std::uint8_t>(index, queries, code, k, allowance).run(out.integer, out.index, threads);
    case Type::f32: return Filtered<float>(index, queries, code, k, allowance).run(out.real, out.index, threads);
    default: return Filtered<double>(index, queries, code, k, allowance).run(out.real, out.index, threads);
  }
}

void search_dense(const Rows& rows, const Rows& queries, int k, const Answer& out, int threads) {
  switch (rows.type) {
    case Type::u8: return Dense<std::uint8_t>(rows, queries, k).run(out.integer, out.index, threads);
    case Type::f32: return Dense<float>(rows, queries, k).run(out.real, out.index, threads);
    default: return Dense<double>(rows, queries, k).run(out.real, out.index, threads);
  }
}

}  // namespace diffmem::nearest
