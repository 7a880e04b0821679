// The inner loops of the nearest-neighbor search, written once over a vector type `V` (see nearest.h for what they
// do).
//
// Included once by each nearest_<set>.cpp after it defines `V`.
// Everything is in an anonymous namespace, so that no inline function compiled for a newer processor can be linked into
// an older path.
//
// `V` provides: `Int` (`kLanes` int32), `kStripRows`; zero, load, store, broadcast (one int32), add,
// madd(acc, a, b) (acc + the products of int16 pairs, summed in each int32 lane), greater (bit mask), sum; transpose
// for packing; square_difference(acc, x, y) over kBytes bytes; and the float64 sums of distance_f32 and distance_f64.
// Where a tile's products have another way than `madd`, of which then only the total of the lanes counts: multiply.
#include <cstring>

#include "nearest/nearest.h"

namespace diffmem::nearest {
namespace {

inline constexpr int kVectors = kPanel / V::kLanes;  // vectors per panel and coordinate pair

inline std::int32_t pair_at(const std::int16_t* values) {
  std::int32_t pair;
  std::memcpy(&pair, values, sizeof pair);
  return pair;
}

// acc[i][v] += strip point i times the points of vector v, for `steps` pairs of coordinates.
template <class Vector, class Tile>
inline void multiply(Tile& acc, std::size_t steps, const std::int16_t* strip, const std::int16_t* panel) {
  if constexpr (requires { Vector::multiply(acc, steps, strip, panel); }) {
    Vector::multiply(acc, steps, strip, panel);
  } else {
    for (std::size_t s = 0; s < steps; ++s, strip += 2 * Vector::kStripRows, panel += 2 * kPanel) {
      typename Vector::Int b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = Vector::load(panel + 2 * v * Vector::kLanes);
      for (int i = 0; i < Vector::kStripRows; ++i) {
        const typename Vector::Int a = Vector::broadcast(pair_at(strip + 2 * i));
        for (int v = 0; v < kVectors; ++v) acc[i][v] = Vector::madd(acc[i][v], a, b[v]);
      }
    }
  }
}

void tile(std::size_t steps, const std::int16_t* strip, const std::int16_t* panel, std::int32_t* c, std::size_t ldc,
          bool accumulate) {
  typename V::Int acc[V::kStripRows][kVectors];
  for (int i = 0; i < V::kStripRows; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = accumulate ? V::load(c + i * ldc + v * V::kLanes) : V::zero();
  }
  multiply<V>(acc, steps, strip, panel);
  for (int i = 0; i < V::kStripRows; ++i) {
    for (int v = 0; v < kVectors; ++v) V::store(c + i * ldc + v * V::kLanes, acc[i][v]);
  }
}

void scan(std::size_t steps, const std::int16_t* strip, const std::int32_t* thresholds, const std::int16_t* panels,
          const std::int32_t* bias, std::size_t count, std::uint16_t* masks, std::size_t mask_stride) {
  for (std::size_t p = 0; p < count; ++p) {
    typename V::Int acc[V::kStripRows][kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const typename V::Int start = V::load(bias + p * kPanel + v * V::kLanes);
      for (int i = 0; i < V::kStripRows; ++i) acc[i][v] = start;
    }
    multiply<V>(acc, steps, strip, panels);
    panels += 2 * kPanel * steps;
    for (int i = 0; i < V::kStripRows; ++i) {
      const typename V::Int threshold = V::broadcast(thresholds[i]);
      std::uint32_t bits = 0;
      for (int v = 0; v < kVectors; ++v) bits |= V::greater(acc[i][v], threshold) << (v * V::kLanes);
      masks[i * mask_stride + p] = static_cast<std::uint16_t>(bits);
    }
  }
}

// A query's fine row, held in registers while it meets many points' rows.
class QueryRow {
 public:
  explicit QueryRow(const std::int16_t* query) {
    for (int j = 0; j < kParts; ++j) part_[j] = V::load(query + 2 * V::kLanes * j);
  }
  typename V::Int products(const std::int16_t* row) const {
    typename V::Int acc = V::zero();
    for (int j = 0; j < kParts; ++j) acc = V::madd(acc, part_[j], V::load(row + 2 * V::kLanes * j));
    return acc;
  }

 private:
  static constexpr int kParts = kRow / (2 * V::kLanes);
  typename V::Int part_[kParts];
};

std::size_t filter(const std::int16_t* query, const std::int16_t* rows, std::int32_t* candidates, std::int32_t* dots,
                   std::size_t count, std::int32_t threshold) {
  const QueryRow x(query);
  std::size_t kept = 0;
  std::size_t c = 0;
  const auto keep = [&](std::size_t from, std::int32_t dot, const std::int16_t* row) {
    candidates[kept] = candidates[from];
    dots[kept] = dot;
    kept += dot + pair_at(row + kRow - 2) > threshold;
  };
  for (; c + 4 <= count; c += 4) {  // four at a time: their sums across lanes share the shuffles
    const std::int16_t* row[4];
    for (int i = 0; i < 4; ++i) row[i] = rows + static_cast<std::size_t>(candidates[c + i]) * kRow;
    std::int32_t sums[4];
    V::sum4(x.products(row[0]), x.products(row[1]), x.products(row[2]), x.products(row[3]), sums);
    for (int i = 0; i < 4; ++i) keep(c + i, dots[c + i] + sums[i], row[i]);
  }
  for (; c < count; ++c) {
    const std::int16_t* row = rows + static_cast<std::size_t>(candidates[c]) * kRow;
    keep(c, dots[c] + V::sum(x.products(row)), row);
  }
  return kept;
}

void score(const std::int16_t* query, const std::int16_t* rows, std::size_t count, std::int32_t* scores) {
  const QueryRow x(query);
  std::size_t r = 0;
  for (; r + 4 <= count; r += 4, rows += 4 * kRow) {
    V::sum4(x.products(rows), x.products(rows + kRow), x.products(rows + 2 * kRow), x.products(rows + 3 * kRow),
            scores + r);
    for (int i = 0; i < 4; ++i) scores[r + i] += pair_at(rows + (i + 1) * kRow - 2);
  }
  for (; r < count; ++r, rows += kRow) scores[r] = V::sum(x.products(rows)) + pair_at(rows + kRow - 2);
}

void pack_panel(const std::uint8_t* points, std::size_t stride, std::size_t rows, std::size_t d, std::int16_t* panel) {
  std::size_t j = 0;
  if (rows == kPanel) {
    for (; j + 16 <= d; j += 16, panel += 16 * kPanel) V::pack16x16(points + j, stride, panel);
  }
  for (; j < d; j += 2, panel += 2 * kPanel) {
    for (std::size_t i = 0; i < kPanel; ++i) {
      const std::uint8_t* point = points + i * stride + j;
      panel[2 * i] = i < rows ? static_cast<std::int16_t>(point[0] - 128) : std::int16_t{0};
      panel[2 * i + 1] = i < rows && j + 1 < d ? static_cast<std::int16_t>(point[1] - 128) : std::int16_t{0};
    }
  }
}

std::int64_t distance_u8(const std::uint8_t* x, const std::uint8_t* y, std::size_t d, std::int64_t limit) {
  // 512 bytes between looks at the limit: one lane of int32 holds at most 512 * 255^2 < 2^26.
  constexpr std::size_t kStride = 512;
  std::int64_t total = 0;
  std::size_t j = 0;
  while (j + V::kBytes <= d) {
    typename V::Int even = V::zero();
    typename V::Int odd = V::zero();
    const std::size_t end = d - j < kStride ? d : j + kStride;
    for (; j + 2 * V::kBytes <= end; j += 2 * V::kBytes) {
      even = V::square_difference(even, x + j, y + j);
      odd = V::square_difference(odd, x + j + V::kBytes, y + j + V::kBytes);
    }
    if (j + V::kBytes <= end) {
      even = V::square_difference(even, x + j, y + j);
      j += V::kBytes;
    }
    total += V::sum(V::add(even, odd));
    if (total > limit) return total;
  }
  for (; j < d; ++j) {
    const int difference = static_cast<int>(x[j]) - static_cast<int>(y[j]);
    total += difference * difference;
  }
  return total;
}

template <class Real>
double distance_real(const Real* x, const Real* y, std::size_t d, double limit) {
  // Rounded addition is monotone and every term is >= 0, so a partial sum above the limit proves the whole is, too.
  constexpr std::size_t kStride = 256;
  double sums[8] = {};
  std::size_t j = 0;
  while (d - j >= 8) {
    const std::size_t whole = (d - j < kStride ? d - j : kStride) / 8 * 8;
    V::accumulate(sums, x + j, y + j, whole);
    j += whole;
    const double total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    if (total > limit) return total;
  }
  for (; j < d; ++j) {
    const double difference = static_cast<double>(x[j]) - static_cast<double>(y[j]);
    sums[j % 8] += difference * difference;
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

const Kernels kTable = {V::kStripRows,        tile, scan, filter, score, pack_panel, distance_u8, distance_real<float>,
                        distance_real<double>};

}  // namespace
}  // namespace diffmem::nearest
