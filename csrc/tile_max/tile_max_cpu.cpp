// The CPU search over the distance loops of nearest.h's table.
//
// What it costs: a pair that is looked at ends in its first tile nearly always (CIFAR-10, 16 tiles of 192 bytes: 6 % go
// on to the second): three vectors of AVX-512, a call, and three cache lines of a row that is not in the cache. So
// callers leave out the pairs that a cheaper bound excludes (85 % there), and put queries with the same first tile side
// by side.
#include <algorithm>
#include <cstddef>
#include <limits>

#include "cpu/share.h"
#include "nearest/nearest.h"
#include "tile_max/tile_max.h"

namespace diffmem::tile_max {

namespace {

constexpr std::int64_t kQueries = 64;  // per chunk
constexpr std::int64_t kRows = 256;    // per block
constexpr std::int64_t kPairs = 1024;  // per item of work

template <class Value, class Distance>
void search_rows(const Search& s, Distance* limits,
                 Distance (*distance)(const Value*, const Value*, std::size_t, Distance), int threads) {
  const auto values = static_cast<std::size_t>(s.rows.d / s.tiles);
  const auto* rows = static_cast<const Value*>(s.rows.data);
  const auto* queries = static_cast<const Value*>(s.queries.data);
  cpu::share((s.queries.count + kQueries - 1) / kQueries, threads, [&] {
    return [&](std::int64_t chunk) {
      const std::int64_t end = std::min(s.queries.count, (chunk + 1) * kQueries);
      for (std::int64_t block = 0; block < s.rows.count; block += kRows) {
        const std::int64_t block_end = std::min(s.rows.count, block + kRows);
        for (std::int64_t q = chunk * kQueries; q < end; ++q) {
          const Value* x = queries + q * s.queries.stride;
          const std::int32_t* order = s.order + q * s.tiles;
          const bool* near = s.near == nullptr ? nullptr : s.near + q * s.rows.count;
          Distance limit = limits[q];
          for (std::int64_t r = block; r < block_end; ++r) {
            if (near != nullptr && !near[r]) continue;
            const Value* y = rows + r * s.rows.stride;
            Distance largest = 0;
            std::int64_t rank = 0;
            for (; rank < s.tiles; ++rank) {
              const std::size_t start = static_cast<std::size_t>(order[rank]) * values;
              largest = std::max(largest, distance(x + start, y + start, values, limit));
              if (largest > limit) break;
            }
            if (rank == s.tiles && (largest < limit || s.first_row + r < s.index[q])) {
              limit = largest;
              s.index[q] = s.first_row + r;
            }
          }
          limits[q] = limit;
        }
      }
    };
  });
}

template <class Value, class Distance>
void pair_maxima(const Pairs& p, Distance* out, Distance (*distance)(const Value*, const Value*, std::size_t, Distance),
                 int threads) {
  const auto values = static_cast<std::size_t>(p.rows.d / p.tiles);
  const auto* rows = static_cast<const Value*>(p.rows.data);
  const auto* queries = static_cast<const Value*>(p.queries.data);
  cpu::share((p.count + kPairs - 1) / kPairs, threads, [&] {
    return [&](std::int64_t chunk) {
      const std::int64_t end = std::min(p.count, (chunk + 1) * kPairs);
      for (std::int64_t i = chunk * kPairs; i < end; ++i) {
        const Value* x = queries + p.some[i] * p.queries.stride;
        const Value* y = rows + p.others[i] * p.rows.stride;
        Distance largest = 0;
        for (std::int64_t tile = 0; tile < p.tiles; ++tile) {
          const std::size_t start = static_cast<std::size_t>(tile) * values;
          largest = std::max(largest, distance(x + start, y + start, values, std::numeric_limits<Distance>::max()));
        }
        out[i] = largest;
      }
    };
  });
}

}  // namespace

void search(const Search& s, int threads) {
  const nearest::Kernels& table = nearest::best_kernels();
  switch (s.rows.type) {
    case nearest::Type::u8: return search_rows<std::uint8_t>(s, s.integer, table.distance_u8, threads);
    case nearest::Type::f32: return search_rows<float>(s, s.real, table.distance_f32, threads);
    case nearest::Type::f64: return search_rows<double>(s, s.real, table.distance_f64, threads);
  }
}

void pairs(const Pairs& p, int threads) {
  const nearest::Kernels& table = nearest::best_kernels();
  switch (p.rows.type) {
    case nearest::Type::u8: return pair_maxima<std::uint8_t>(p, p.integer, table.distance_u8, threads);
    case nearest::Type::f32: return pair_maxima<float>(p, p.real, table.distance_f32, threads);
    case nearest::Type::f64: return pair_maxima<double>(p, p.real, table.distance_f64, threads);
  }
}

}  // namespace diffmem::tile_max
