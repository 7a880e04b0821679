// Holds the kernels of every instruction set that this processor has against plain loops, on hostile inputs: extremes,
// odd sizes, ties, memory that ends where the last value does. No Python, so that it runs where there is none: built
// for 64-bit ARM by a cross-compiler it runs under qemu (test_core_check.py).
//
// Prints the levels and what was checked; its status is 1 where something differs. Arguments: the levels to check, for
// all of them none.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "affine_alignment/affine_alignment.h"
#include "alignment/alignment.h"
#include "cpu/features.h"
#include "nearest/nearest.h"
#include "posterior_mean/posterior_mean.h"
#include "tile_max/tile_max.h"
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

using diffmem::cpu::Level;

std::string where;  // what is being checked
int failures = 0;

void fail(const std::string& what) {
  if (++failures <= 20) std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
}

void expect(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

template <class T>
void expect_equal(const T* found, const T* wanted, std::size_t count, const std::string& what) {
  for (std::size_t i = 0; i < count; ++i) {
    if (std::memcmp(found + i, wanted + i, sizeof(T)) == 0) continue;
    return fail(what + ": value " + std::to_string(i) + " is " + std::to_string(found[i]) + ", not " +
                std::to_string(wanted[i]));
  }
}

template <class T>
void expect_near(T found, double wanted, double tolerance, const std::string& what) {
  if (!(std::abs(static_cast<double>(found) - wanted) <= tolerance))
    fail(what + ": " + std::to_string(found) + ", not " + std::to_string(wanted));
}

// Memory that ends at a page which cannot be read: who reads past the end, or writes, ends the process.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::size_t count) : count_(count) {
#if defined(__unix__) || defined(__APPLE__)
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = (count * sizeof(T) + page - 1) / page * page;
    size_ = bytes + page;
    memory_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (memory_ == MAP_FAILED || mprotect(static_cast<char*>(memory_) + bytes, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(static_cast<char*>(memory_) + bytes - count * sizeof(T));
#else
    memory_ = std::calloc(count + 1, sizeof(T));
    data_ = static_cast<T*>(memory_);
#endif
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
#if defined(__unix__) || defined(__APPLE__)
    munmap(memory_, size_);
#else
    std::free(memory_);
#endif
  }
  T* data() { return data_; }
  T& operator[](std::size_t i) { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }
  std::size_t size() const { return count_; }

 private:
  std::size_t count_, size_ = 0;
  void* memory_ = nullptr;
  T* data_ = nullptr;
};

std::mt19937_64 generator(1);

std::int64_t random_integer(std::int64_t low, std::int64_t high) {  // both included
  return low + static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(high - low + 1));
}

double random_real() { return static_cast<double>(generator() >> 11) * 0x1p-52 - 1; }  // in [-1, 1)

// Random values, every fourth of them an extreme.
template <class T>
void fill_integers(T* data, std::size_t count, std::int64_t low, std::int64_t high) {
  for (std::size_t i = 0; i < count; ++i) {
    const bool extreme = random_integer(0, 3) == 0;
    data[i] = static_cast<T>(extreme ? (random_integer(0, 1) ? low : high) : random_integer(low, high));
  }
}

template <class T>
void fill_reals(T* data, std::size_t count, double scale = 1, double shift = 0) {
  for (std::size_t i = 0; i < count; ++i) data[i] = static_cast<T>(random_real() * scale + shift);
}

void use(Level level) {
#if defined(_WIN32)
  _putenv_s("DIFFMEM_CPU", diffmem::cpu::name(level));
#else
  setenv("DIFFMEM_CPU", diffmem::cpu::name(level), 1);
#endif
}

// ------------------------------------------------------------------------------------------------------------ nearest

namespace nearest = diffmem::nearest;

void check_tile(const nearest::Kernels& k) {
  const int rows = k.strip_rows;
  for (const std::size_t steps : {1, 2, 3, 7, 33, 256}) {
    Guarded<std::int16_t> strip(steps * 2 * rows), panel(steps * 2 * nearest::kPanel);
    fill_integers(strip.data(), strip.size(), -32767, 32767);
    fill_integers(panel.data(), panel.size(), -32768, 32767);
    for (const std::size_t ldc : {16, 48}) {
      for (const bool accumulate : {false, true}) {
        Guarded<std::int32_t> c((rows - 1) * ldc + nearest::kPanel);
        fill_integers(c.data(), c.size(), std::numeric_limits<std::int32_t>::min(),
                      std::numeric_limits<std::int32_t>::max());
        std::vector<std::int32_t> wanted(c.begin(), c.end());
        for (int i = 0; i < rows; ++i) {
          for (std::size_t j = 0; j < nearest::kPanel; ++j) {
            auto sum = accumulate ? static_cast<std::uint32_t>(wanted[i * ldc + j]) : 0u;
            for (std::size_t s = 0; s < 2 * steps; ++s)
              sum += static_cast<std::uint32_t>(strip[s / 2 * 2 * rows + 2 * i + s % 2] *
                                                panel[s / 2 * 2 * nearest::kPanel + 2 * j + s % 2]);
            wanted[i * ldc + j] = static_cast<std::int32_t>(sum);
          }
        }
        k.tile(steps, strip.data(), panel.data(), c.data(), ldc, accumulate);
        expect_equal(c.data(), wanted.data(), c.size(), "tile");
      }
    }
  }
}

void check_scan(const nearest::Kernels& k) {
  const int rows = k.strip_rows;
  for (const std::size_t steps : {1, 5, 16, 17}) {
    for (const std::size_t panels : {1, 3, 64}) {
      Guarded<std::int16_t> strip(steps * 2 * rows), points(panels * steps * 2 * nearest::kPanel);
      Guarded<std::int32_t> bias(panels * nearest::kPanel), thresholds(rows);
      Guarded<std::uint16_t> masks((rows - 1) * (panels + 1) + panels);
      fill_integers(strip.data(), strip.size(), -3000, 3000);
      fill_integers(points.data(), points.size(), -3000, 3000);
      fill_integers(bias.data(), bias.size(), -1'000'000'000, 0);
      fill_integers(thresholds.data(), thresholds.size(), -1'000'000'000, 100'000'000);
      thresholds[0] = std::numeric_limits<std::int32_t>::min();
      thresholds[rows - 1] = std::numeric_limits<std::int32_t>::max();
      std::vector<std::int32_t> dots(rows * panels * nearest::kPanel);
      for (int i = 0; i < rows; ++i) {
        for (std::size_t j = 0; j < panels * nearest::kPanel; ++j) {
          std::int32_t& dot = dots[i * panels * nearest::kPanel + j];
          dot = bias[j];
          for (std::size_t s = 0; s < 2 * steps; ++s)
            dot += strip[s / 2 * 2 * rows + 2 * i + s % 2] *
                   points[(j / 16 * steps + s / 2) * 2 * nearest::kPanel + j % 16 * 2 + s % 2];
        }
      }
      if (rows > 1) thresholds[1 % rows] = dots[1 * panels * nearest::kPanel + 3];  // not above itself
      k.scan(steps, strip.data(), thresholds.data(), points.data(), bias.data(), panels, masks.data(), panels + 1);
      for (int i = 0; i < rows; ++i) {
        for (std::size_t j = 0; j < panels * nearest::kPanel; ++j) {
          const bool above = dots[i * panels * nearest::kPanel + j] > thresholds[i];
          expect(((masks[i * (panels + 1) + j / 16] >> j % 16) & 1) == above, "scan");
        }
      }
    }
  }
}

void check_rows(const nearest::Kernels& k) {
  for (const std::size_t count : {1, 2, 3, 4, 5, 8, 31}) {
    Guarded<std::int16_t> query(nearest::kRow), rows(count * nearest::kRow);
    fill_integers(query.data(), query.size(), -4000, 4000);
    fill_integers(rows.data(), rows.size(), -4000, 4000);
    query[62] = query[63] = 0;
    std::vector<std::int32_t> wanted(count);
    for (std::size_t r = 0; r < count; ++r) {
      const auto bias = static_cast<std::int32_t>(random_integer(-500'000'000, 0));
      std::memcpy(&rows[r * nearest::kRow + 62], &bias, sizeof bias);
      wanted[r] = bias;
      for (int j = 0; j < 62; ++j) wanted[r] += query[j] * rows[r * nearest::kRow + j];
    }
    Guarded<std::int32_t> scores(count);
    k.score(query.data(), rows.data(), count, scores.data());
    expect_equal(scores.data(), wanted.data(), count, "score");

    Guarded<std::int32_t> candidates(count), dots(count);
    std::vector<std::int32_t> before(count), kept_candidates, kept_dots;
    for (std::size_t c = 0; c < count; ++c) {
      candidates[c] = static_cast<std::int32_t>((c * 7) % count);
      dots[c] = before[c] = static_cast<std::int32_t>(random_integer(-1'000'000, 1'000'000));
    }
    const std::int32_t threshold = wanted[0] + before[0];  // one that is not above
    for (std::size_t c = 0; c < count; ++c) {
      const std::int32_t r = candidates[c];
      std::int32_t bias;
      std::memcpy(&bias, &rows[r * nearest::kRow + 62], sizeof bias);
      if (before[c] + wanted[r] <= threshold) continue;
      kept_candidates.push_back(r);
      kept_dots.push_back(before[c] + wanted[r] - bias);
    }
    const std::size_t kept = k.filter(query.data(), rows.data(), candidates.data(), dots.data(), count, threshold);
    expect(kept == kept_candidates.size(), "filter: number kept");
    if (kept != kept_candidates.size()) continue;
    expect_equal(candidates.data(), kept_candidates.data(), kept, "filter: candidates");
    expect_equal(dots.data(), kept_dots.data(), kept, "filter: dots");
  }
}

void check_packing(const nearest::Kernels& k) {
  for (const std::size_t d : {1, 2, 15, 16, 17, 31, 32, 33, 100}) {
    for (const std::size_t rows : {1, 2, 15, 16}) {
      const std::size_t stride = d + 3, steps = (d + 1) / 2;
      Guarded<std::uint8_t> points((rows - 1) * stride + d);
      fill_integers(points.data(), points.size(), 0, 255);
      Guarded<std::int16_t> panel(steps * 2 * nearest::kPanel);
      std::fill(panel.begin(), panel.end(), std::int16_t{99});
      std::vector<std::int16_t> wanted(panel.size(), 0);
      for (std::size_t i = 0; i < rows; ++i)
        for (std::size_t j = 0; j < d; ++j)
          wanted[j / 2 * 2 * nearest::kPanel + 2 * i + j % 2] = static_cast<std::int16_t>(points[i * stride + j] - 128);
      k.pack_panel(points.data(), stride, rows, d, panel.data());
      expect_equal(panel.data(), wanted.data(), wanted.size(), "pack_panel");
    }
  }
}

double distance_in_order(const auto* x, const auto* y, std::size_t d) {
  double sums[8] = {};
  for (std::size_t j = 0; j < d; ++j) {
    const double difference = static_cast<double>(x[j]) - static_cast<double>(y[j]);
    const double square = difference * difference;
    sums[j % 8] += square;
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

void check_distances(const nearest::Kernels& k) {
  std::vector<std::size_t> sizes{127, 128, 129, 511, 512, 513, 544, 1029, 3072};
  for (std::size_t d = 1; d < 70; ++d) sizes.push_back(d);
  for (const std::size_t d : sizes) {
    Guarded<std::uint8_t> x(d), y(d);
    fill_integers(x.data(), d, 0, 255);
    fill_integers(y.data(), d, 0, 255);
    if (d % 3 == 0) {  // the largest
      std::fill(x.begin(), x.end(), std::uint8_t{0});
      std::fill(y.begin(), y.end(), std::uint8_t{255});
    }
    std::int64_t wanted = 0;
    for (std::size_t j = 0; j < d; ++j) wanted += (x[j] - y[j]) * (x[j] - y[j]);
    for (const std::int64_t limit : {std::numeric_limits<std::int64_t>::max(), wanted})
      expect(k.distance_u8(x.data(), y.data(), d, limit) == wanted, "distance_u8, d = " + std::to_string(d));
    if (wanted > 0) expect(k.distance_u8(x.data(), y.data(), d, wanted - 1) >= wanted, "distance_u8 beyond a limit");
    Guarded<float> xf(d), yf(d);
    Guarded<double> xd(d), yd(d);
    fill_reals(xf.data(), d, 1e3, 1e5);
    fill_reals(yf.data(), d, 1e3);
    fill_reals(xd.data(), d, 1e-3, 1);
    fill_reals(yd.data(), d, 1e-3);
    const double float_distance = distance_in_order(xf.data(), yf.data(), d);
    const double double_distance = distance_in_order(xd.data(), yd.data(), d);
    const double infinity = std::numeric_limits<double>::infinity();
    const double found[2] = {k.distance_f32(xf.data(), yf.data(), d, infinity),
                             k.distance_f64(xd.data(), yd.data(), d, double_distance)};
    expect_equal(&found[0], &float_distance, 1, "distance_f32, d = " + std::to_string(d));
    expect_equal(&found[1], &double_distance, 1, "distance_f64, d = " + std::to_string(d));
  }
}

void check_nearest(const nearest::Kernels& k) {
  check_tile(k);
  check_scan(k);
  check_rows(k);
  check_packing(k);
  check_distances(k);
}

// The dense search of the level in use, with ties, against all distances.
void check_search() {
  for (const std::int64_t d : {1, 3, 48, 75}) {
    for (const std::int64_t queries : {1, 9, 140}) {
      const std::int64_t n = 300, k = 3, stride = d + 1;
      Guarded<std::uint8_t> rows((n - 1) * stride + d), asked((queries - 1) * d + d);
      fill_integers(rows.data(), rows.size(), d == 48 ? 0 : 120, d == 48 ? 255 : 123);  // many ties
      fill_integers(asked.data(), asked.size(), d == 48 ? 0 : 119, d == 48 ? 255 : 123);
      std::vector<std::int64_t> distances(queries * k), indices(queries * k);
      nearest::search_dense({rows.data(), n, stride, d, nearest::Type::u8},
                            {asked.data(), queries, d, d, nearest::Type::u8}, k,
                            {distances.data(), nullptr, indices.data()}, 2);
      for (std::int64_t q = 0; q < queries; ++q) {
        std::vector<std::pair<std::int64_t, std::int64_t>> all(n);
        for (std::int64_t i = 0; i < n; ++i) {
          all[i].second = i;
          for (std::int64_t j = 0; j < d; ++j) {
            const int difference = asked[q * d + j] - rows[i * stride + j];
            all[i].first += difference * difference;
          }
        }
        std::sort(all.begin(), all.end());
        for (std::int64_t i = 0; i < k; ++i)
          expect(distances[q * k + i] == all[i].first && indices[q * k + i] == all[i].second, "search_dense");
      }
    }
  }
}

// The code of images, which all levels have to agree on.
std::vector<std::int64_t> code_of_images() {
  generator.seed(7);
  const nearest::CodeShape shape{16, 1};
  const std::int64_t count = 70, d = 75, m = shape.coordinates();
  Guarded<std::uint8_t> rows(count * d), mean(d);
  Guarded<std::int16_t> p(m * d);
  fill_integers(rows.data(), rows.size(), 0, 255);
  fill_integers(mean.data(), mean.size(), 100, 150);
  fill_integers(p.data(), p.size(), -2000, 2000);
  std::vector<std::int64_t> shift(m, 0);
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < d; ++j) shift[i] += p[i * d + j] * (mean[j] - 128);
  std::vector<std::int16_t> coarse(count * 2 * shape.steps), fine(count * nearest::kRow);
  std::vector<std::int32_t> sq(2 * count);
  std::vector<float> error(2 * count);
  nearest::encode_bytes({rows.data(), count, d, d, nearest::Type::u8},
                        {shape, p.data(), shift.data(), mean.data(), 1e-5, 20.0}, false,
                        {coarse.data(), fine.data(), sq.data(), error.data()}, 2);
  std::vector<std::int64_t> all(coarse.begin(), coarse.end());
  all.insert(all.end(), fine.begin(), fine.end());
  all.insert(all.end(), sq.begin(), sq.end());
  for (const float each : error) all.push_back(static_cast<std::int64_t>(static_cast<double>(each) * 0x1p40));
  return all;
}

// The tile maximum of the level in use.
void check_tile_max() {
  const std::int64_t n = 90, queries = 70, tiles = 3, values = 19, d = tiles * values;
  Guarded<std::uint8_t> rows(n * d), asked(queries * d);
  fill_integers(rows.data(), rows.size(), 100, 104);
  fill_integers(asked.data(), asked.size(), 100, 104);
  std::vector<std::int32_t> order(queries * tiles);
  for (std::int64_t i = 0; i < queries * tiles; ++i) order[i] = static_cast<std::int32_t>((i + i / tiles) % tiles);
  std::vector<std::int64_t> best(queries, std::numeric_limits<std::int64_t>::max()), index(queries, -1);
  diffmem::tile_max::Search search;
  search.rows = {rows.data(), n, d, d, nearest::Type::u8};
  search.queries = {asked.data(), queries, d, d, nearest::Type::u8};
  search.tiles = tiles;
  search.order = order.data();
  search.integer = best.data();
  search.index = index.data();
  diffmem::tile_max::search(search, 2);
  for (std::int64_t q = 0; q < queries; ++q) {
    std::int64_t least = std::numeric_limits<std::int64_t>::max(), row = -1;
    for (std::int64_t i = 0; i < n; ++i) {
      std::int64_t largest = 0;
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        std::int64_t sum = 0;
        for (std::int64_t j = tile * values; j < (tile + 1) * values; ++j) {
          const int difference = asked[q * d + j] - rows[i * d + j];
          sum += difference * difference;
        }
        largest = std::max(largest, sum);
      }
      if (largest < least) least = largest, row = i;
    }
    expect(best[q] == least && index[q] == row, "tile_max");
  }
}

// A smooth image and its own middle under a small shift and scaling: the map has to be found.
void check_affine_alignment() {
  const std::int64_t size = 24, inner = 12;
  std::vector<float> image(size * size), part(inner * inner), maps(6);
  const auto value = [](double x, double y) {
    return static_cast<float>(std::sin(0.5 * x) + std::cos(0.4 * y) + std::sin(0.3 * (x + y)));
  };
  const double middle = (static_cast<double>(size) - 1) / 2, part_middle = (static_cast<double>(inner) - 1) / 2;
  for (std::int64_t y = 0; y < size; ++y)
    for (std::int64_t x = 0; x < size; ++x)
      image[y * size + x] = value(static_cast<double>(x) - middle, static_cast<double>(y) - middle);
  for (std::int64_t y = 0; y < inner; ++y)
    for (std::int64_t x = 0; x < inner; ++x)
      part[y * inner + x] = value(1.04 * (static_cast<double>(x) - part_middle) + 0.6,
                                  1.04 * (static_cast<double>(y) - part_middle) - 0.4);
  const std::vector<float> start{1, 0, 0, 0, 1, 0};
  float remainder = -1;
  diffmem::affine_alignment::align({1, 1, size, size, inner, inner}, image.data(), part.data(), start.data(), 20,
                                   &remainder, maps.data(), 1);
  expect(remainder >= 0 && remainder < 0.2f, "affine_alignment: remainder " + std::to_string(remainder));
  const double wanted[6] = {1.04, 0, 0.6, 0, 1.04, -0.4};
  for (int i = 0; i < 6; ++i) expect_near(maps[i], wanted[i], 0.05, "affine_alignment: map");
}

// ----------------------------------------------------------------------------------------------------- posterior_mean

namespace pm = diffmem::posterior_mean;

void check_scores() {
  for (const std::int64_t k : {1, 3, 4, 15, 16, 17, 31, 64, 203}) {
    for (const std::int64_t columns : {16, 48, 64, 80, 112}) {
      const std::int64_t n = k % 2 ? 101 : 50, stride = k + 5;
      Guarded<std::uint8_t> rows((n - 1) * stride + k);
      const std::int64_t count = columns - 3;
      Guarded<std::int16_t> values(count * k);
      Guarded<std::uint8_t> offset(k);
      fill_integers(rows.data(), rows.size(), 0, 255);
      fill_integers(offset.data(), k, 0, 255);
      const int largest = pm::digit_bits() == 8 ? 127 : 32767;
      fill_integers(values.data(), values.size(), -largest, largest);
      if (k == 203) std::fill(rows.begin(), rows.end(), std::uint8_t{255});
      Guarded<float> scale(columns), weight(columns), half_norms(n), out(n * columns);
      fill_reals(scale.data(), columns);
      fill_reals(weight.data(), columns);
      fill_reals(half_norms.data(), n, 100, 100);
      std::fill(out.begin(), out.end(), std::numeric_limits<float>::quiet_NaN());
      const pm::Term term{rows.data(), stride, k, count, values.data(), offset.data(), scale.data()};
      std::vector<float> wanted(n * columns);
      for (const bool add : {false, true}) {
        for (std::int64_t i = 0; i < n; ++i) {
          for (std::int64_t c = 0; c < columns; ++c) {
            std::int64_t sum = 0;
            for (std::int64_t j = 0; c < count && j < k; ++j)
              sum += (rows[i * stride + j] - offset[j]) * values[c * k + j];
            float& to = wanted[i * columns + c];
            to = std::fma(static_cast<float>(sum), scale[c], add ? to : weight[c] * -half_norms[i]);
          }
        }
        pm::scores({term}, n, columns, half_norms.data(), weight.data(), add, out.data(), 2);
        expect_equal(out.data(), wanted.data(), wanted.size(), "scores, k = " + std::to_string(k));
      }
    }
  }
}

void check_columns() {
  const std::int64_t n = 1100, columns = 48;
  Guarded<float> scores(n * columns), top(columns), threshold(columns), reach(columns), slack(n);
  Guarded<std::int64_t> at(columns);
  Guarded<double> mass(columns);
  fill_reals(scores.data(), scores.size(), 30, 10);
  for (std::int64_t i = 0; i < n; ++i) scores[i * columns + 3] = static_cast<float>(i % 7);            // ties
  for (std::int64_t i = 0; i < n; ++i) scores[i * columns + 5] = i == n - 1 ? -1e30f : -HUGE_VALF;     // nearly nothing
  for (std::int64_t i = 0; i < n; ++i) scores[i * columns + 6] = static_cast<float>(i == 700) * 1e4f;  // one image
  pm::column_top(scores.data(), n, columns, top.data(), at.data(), 2);
  pm::column_mass(scores.data(), n, columns, top.data(), mass.data(), 2);
  for (std::int64_t c = 0; c < columns; ++c) {
    std::int64_t first = 0;
    for (std::int64_t i = 1; i < n; ++i)
      if (scores[i * columns + c] > scores[first * columns + c]) first = i;
    expect(at[c] == first && top[c] == scores[first * columns + c], "column_top");
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i)
      sum += std::exp(static_cast<double>(scores[i * columns + c]) - static_cast<double>(top[c]));
    expect_near(mass[c], sum, 2e-6 * sum, "column_mass");
  }
  fill_reals(threshold.data(), columns, 10, 30);
  fill_reals(reach.data(), columns, 1, 1);
  fill_reals(slack.data(), n, 1, 1);
  threshold[3] = std::fma(reach[3], slack[6], scores[6 * columns + 3]);  // exactly reached
  std::vector<std::int64_t> starts{0};
  std::vector<std::int32_t> images;
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t i = 0; i < n; ++i)
      if (std::fma(reach[c], slack[i], scores[i * columns + c]) >= threshold[c])
        images.push_back(static_cast<std::int32_t>(i));
    starts.push_back(static_cast<std::int64_t>(images.size()));
  }
  const auto total = static_cast<std::int64_t>(images.size());
  for (const std::int64_t limit : {total, total - 1}) {
    const pm::Pairs pairs =
        pm::select(scores.data(), n, columns, threshold.data(), reach.data(), slack.data(), limit, 2);
    expect(pairs.complete == (limit == total), "select: complete");
    if (pairs.complete) expect(pairs.starts == starts && pairs.images == images && pairs.total == total, "select");
  }

  for (const bool two : {false, true}) {
    const bool wide = pm::digit_bits() == 16;
    if (wide && two) continue;
    const std::vector<std::int32_t> chosen{0, 3, 5, 15, 16, 47};
    const std::int64_t count = 6, stride = (n + 3) / 4 * 4;
    Guarded<std::uint8_t> high(wide ? 0 : count * stride), low(count * stride);
    Guarded<std::uint16_t> high_wide(wide ? count * stride : 0);
    std::fill(high.begin(), high.end(), std::uint8_t{77});
    std::fill(high_wide.begin(), high_wide.end(), std::uint16_t{77});
    std::vector<std::int64_t> sum(count), high_sum(count);
    pm::round_weights(scores.data(), n, columns, top.data(), chosen.data(), count,
                      wide ? static_cast<void*>(high_wide.data()) : high.data(), two ? low.data() : nullptr, sum.data(),
                      high_sum.data(), 2);
    const double largest = wide ? 32767 : two ? 65280 : 255;
    for (std::int64_t r = 0; r < count; ++r) {
      std::int64_t all = 0, highs = 0;
      for (std::int64_t i = 0; i < stride; ++i) {
        std::int64_t w = wide ? high_wide[r * stride + i] : high[r * stride + i];
        highs += w;
        if (two) w = i < n ? 256 * w + low[r * stride + i] - 128 : w;
        all += w;
        const double s =
            i < n ? static_cast<double>(scores[i * columns + chosen[r]]) - static_cast<double>(top[chosen[r]])
                  : -HUGE_VAL;
        const double exact = largest * std::exp(s);
        expect(std::abs(static_cast<double>(w) - exact) < 1.02 && (i < n || w == 0), "round_weights");
      }
      expect(all == sum[r] && highs == high_sum[r], "round_weights: sums");
    }
  }
}

void check_pairs() {
  for (const std::int64_t d : {1, 7, 8, 15, 16, 31, 33, 64, 131}) {
    const std::int64_t n = 9, columns = 3, stride = d + 2;
    Guarded<std::uint8_t> rows((n - 1) * stride + d), center(d);
    fill_integers(rows.data(), rows.size(), 0, 255);
    fill_integers(center.data(), center.size(), 0, 255);
    std::vector<std::int64_t> starts{0};
    std::vector<std::int32_t> images;
    for (const std::int64_t count : {0, 300, 5}) {  // more than one item of work; the same image again
      for (std::int64_t p = 0; p < count; ++p) images.push_back(static_cast<std::int32_t>(p * n / count));
      starts.push_back(static_cast<std::int64_t>(images.size()));
    }
    Guarded<double> queries(columns * d), half_norms(n), weight(columns), weights(images.size()), logits(images.size()),
        sums(columns * d);
    fill_reals(queries.data(), queries.size(), 100);
    fill_reals(half_norms.data(), n, 1e4, 1e4);
    fill_reals(weight.data(), columns);
    fill_reals(weights.data(), weights.size(), 0.5, 0.5);
    std::fill(sums.begin(), sums.end(), std::numeric_limits<double>::quiet_NaN());
    const pm::ByteRows of{rows.data(), stride, d, center.data()};
    pm::pair_logits(of, queries.data(), half_norms.data(), weight.data(), starts.data(), images.data(), columns,
                    logits.data(), 2);
    pm::pair_sums(of, weights.data(), starts.data(), images.data(), columns, sums.data(), 2);
    for (std::int64_t c = 0; c < columns; ++c) {
      std::vector<double> total(d, 0.0);
      for (std::int64_t p = starts[c]; p < starts[c + 1]; ++p) {
        double dot = 0;
        for (std::int64_t j = 0; j < d; ++j) {
          const int z = rows[images[p] * stride + j] - center[j];
          dot += queries[c * d + j] * z;
          total[j] += weights[p] * z;
        }
        expect_near(logits[p], (dot - half_norms[images[p]]) * weight[c], 1e-7, "pair_logits");
      }
      for (std::int64_t j = 0; j < d; ++j) expect_near(sums[c * d + j], total[j], 0.05, "pair_sums");
    }
  }
}

void check_weighted_sums() {
  for (const std::int64_t n : {1, 4, 5, 511, 513, 1030}) {
    for (const std::int64_t k : {1, 15, 17, 64, 65, 257, 300}) {
      const std::int64_t count = n % 3 + 4 * (n % 2) + 1 + k % 4, stride = k + 1, weight_stride = (n + 3) / 4 * 4;
      Guarded<std::uint8_t> rows((n - 1) * stride + k);
      std::vector<std::int32_t> values(count * weight_stride);
      const int largest = pm::digit_bits() == 8 ? 255 : 32767;
      fill_integers(rows.data(), rows.size(), 0, 255);
      fill_integers(values.data(), values.size(), 0, largest);
      for (std::int64_t r = 0; r < count; ++r)
        for (std::int64_t i = n; i < weight_stride; ++i) values[r * weight_stride + i] = 0;
      if (n == 1030 && k == 300) {  // the largest sums
        std::fill(rows.begin(), rows.end(), std::uint8_t{0});
        std::fill_n(values.begin(), n, largest);
      }
      Guarded<std::uint8_t> bytes(largest == 255 ? values.size() : 0);
      Guarded<std::uint16_t> words(largest == 255 ? 0 : values.size());
      for (std::size_t i = 0; i < values.size(); ++i) {
        if (largest == 255)
          bytes[i] = static_cast<std::uint8_t>(values[i]);
        else
          words[i] = static_cast<std::uint16_t>(values[i]);
      }
      Guarded<double> out(count * k);
      std::vector<double> wanted(count * k, 0);
      for (std::int64_t r = 0; r < count; ++r)
        for (std::int64_t i = 0; i < n; ++i)
          for (std::int64_t j = 0; j < k; ++j)
            wanted[r * k + j] += values[r * weight_stride + i] * (rows[i * stride + j] - 128);
      const void* weights = largest == 255 ? static_cast<const void*>(bytes.data()) : words.data();
      pm::weighted_sums(rows.data(), stride, k, n, weights, count, out.data(), 2);
      expect_equal(out.data(), wanted.data(), wanted.size(), "weighted_sums, n = " + std::to_string(n));
    }
  }
}

// Everything at once, against the formula.
void check_small_means() {
  for (const std::int64_t d : {1, 17, 130, 300}) {
    for (const std::int64_t count : {1, 5, 23}) {
      for (const double sigma : {1000.0, 100.0, 10.0, 0.5}) {
        const std::int64_t n = 700, stride = d + 3;
        Guarded<std::uint8_t> rows((n - 1) * stride + d), center(d);
        fill_integers(rows.data(), rows.size(), 0, 255);
        std::fill(center.begin(), center.end(), std::uint8_t{127});
        Guarded<double> x(count * d), half_norms(n), levels(count), allowed(count), out(count * d);
        fill_reals(x.data(), x.size(), sigma, 127);
        double longest = 0, squared = 0;
        for (std::int64_t i = 0; i < n; ++i) {
          half_norms[i] = 0;
          for (std::int64_t j = 0; j < d; ++j) half_norms[i] += std::pow(rows[i * stride + j] - 127.0, 2) / 2;
          longest = std::max(longest, std::sqrt(2 * half_norms[i]));
          squared += 2 * half_norms[i] / n;
        }
        std::fill(levels.begin(), levels.end(), sigma);
        std::fill(allowed.begin(), allowed.end(), 1e-6);
        const pm::SmallSet set{
            {rows.data(), stride, d, center.data()}, n, half_norms.data(), std::sqrt(squared), longest};
        const pm::SmallQueries queries{x.data(),      true,           count, 1.0,       0.0,
                                       levels.data(), allowed.data(), 25.0,  count == 1};
        expect(pm::small_means(set, queries, out.data(), nullptr, nullptr, 2) == pm::Checked::good, "small_means");
        for (std::int64_t c = 0; c < count; ++c) {
          std::vector<double> logits(n), mean(d, 0.0);
          for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = 0; j < d; ++j)
              logits[i] -= std::pow(x[c * d + j] - rows[i * stride + j], 2) / (2 * sigma * sigma);
          const double top = *std::max_element(logits.begin(), logits.end());
          double mass = 0, error = 0;
          for (std::int64_t i = 0; i < n; ++i) {
            mass += std::exp(logits[i] - top);
            for (std::int64_t j = 0; j < d; ++j) mean[j] += std::exp(logits[i] - top) * rows[i * stride + j];
          }
          for (std::int64_t j = 0; j < d; ++j) error += std::pow(mean[j] / mass - out[c * d + j], 2);
          expect(std::sqrt(error) <= 1e-5 * std::sqrt(squared), "small_means: error");
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- alignment

void check_alignment() {
  for (const std::int64_t count : {1, 8, 9, 16, 17, 24, 25}) {
    const diffmem::alignment::Shape shape{2, 2, 2, 9, 12, count, 5, count % 2 ? 12 : 6};
    const std::int64_t area = shape.area(), size = shape.h * shape.w, windows = shape.down() * shape.across();
    Guarded<float> searched(shape.queries * shape.variants * shape.channels * area);
    Guarded<float> templates(shape.queries * count * shape.template_size()), correlations(shape.queries * count);
    Guarded<std::int64_t> positions(shape.queries * count);
    fill_reals(searched.data(), searched.size(), 50, 128);
    fill_reals(templates.data(), templates.size(), 50, 128);
    std::fill_n(templates.begin(), shape.template_size(), 7.0f);  // without variance
    diffmem::alignment::align(shape, searched.data(), templates.data(), correlations.data(), positions.data(), 2);
    for (std::int64_t pair = 0; pair < shape.queries * count; ++pair) {
      std::vector<double> all;
      for (std::int64_t v = 0; v < shape.variants; ++v) {
        for (std::int64_t window = 0; window < windows; ++window) {
          double product = 0, squares = 0, template_squares = 0;
          for (std::int64_t c = 0; c < shape.channels; ++c) {
            const float* t = templates.data() + (pair * shape.channels + c) * size;
            const float* image = searched.data() + ((pair / count * shape.variants + v) * shape.channels + c) * area +
                                 window / shape.across() * shape.width + window % shape.across();
            const auto at = [&](std::int64_t i) {
              return static_cast<double>(image[i / shape.w * shape.width + i % shape.w]);
            };
            double mean = 0, template_mean = 0;
            for (std::int64_t i = 0; i < size; ++i) mean += at(i) / static_cast<double>(size);
            for (std::int64_t i = 0; i < size; ++i)
              template_mean += static_cast<double>(t[i]) / static_cast<double>(size);
            for (std::int64_t i = 0; i < size; ++i) {
              const double a = at(i) - mean, b = static_cast<double>(t[i]) - template_mean;
              product += a * b;
              squares += a * a;
              template_squares += b * b;
            }
          }
          all.push_back(template_squares < 1e-9 ? 0 : product / std::sqrt(squares * template_squares));
        }
      }
      const double best = *std::max_element(all.begin(), all.end());
      expect_near(correlations[pair], best, 1e-5, "alignment");
      expect_near(all[positions[pair]], best, 1e-5, "alignment: position");
    }
    expect(correlations[0] == 0 && positions[0] == 0, "alignment: without variance, the first of equals");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<Level> levels = diffmem::cpu::levels();
  const std::vector<std::string> asked(argv + 1, argv + argc);
  std::printf("levels:");
  for (const Level level : levels) std::printf(" %s", diffmem::cpu::name(level));
  std::printf("\n");
  std::vector<std::int64_t> code;
  for (const Level level : levels) {
    use(level);
    const std::string name = diffmem::cpu::name(level);
    where = "nearest " + name;
    std::vector<std::int64_t> here = code_of_images();
    if (level == Level::portable) code = here;
    expect(here == code, "encode_bytes differs from portable's");
    if (!asked.empty() && std::find(asked.begin(), asked.end(), name) == asked.end()) continue;
    check_nearest(nearest::best_kernels());
    check_search();
    where = "tile_max " + name;
    check_tile_max();
    where = "affine_alignment";
    check_affine_alignment();
    where = "posterior_mean " + name;
    expect(pm::available() == (level != Level::portable), "available");
    if (pm::available()) {
      check_scores();
      check_columns();
      check_pairs();
      check_weighted_sums();
      check_small_means();
    }
    where = "alignment " + name;
    expect(diffmem::alignment::available() == (level != Level::portable), "available");
    if (diffmem::alignment::available()) check_alignment();
    std::printf("checked %s\n", name.c_str());
  }
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
