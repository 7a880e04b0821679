// The training row whose largest tile distance to a query is least: the contract of the CPU search.
//
// Rows are cut into `tiles` tiles of `values` values each, tile after tile. The tile maximum of a pair is the largest
// of the squared distances of its tiles; each distance is that of nearest.h (exact int64 for uint8, float64 sums in a
// fixed order for floats). Equal tile maxima go to the lower row. Every pointer is to memory of the caller.
//
// In a search a pair is given up at its first tile beyond the query's limit, the least tile maximum so far. So the
// order in which a query's tiles are visited decides what it costs: the tile that is least like those of other images
// comes first.
#pragma once

#include <cstdint>

#include "nearest/nearest.h"

namespace diffmem::tile_max {

struct Search {
  nearest::Rows rows;     // d = tiles * values
  nearest::Rows queries;  // likewise
  std::int64_t tiles = 0;
  const std::int32_t* order = nullptr;  // [queries][tiles], a permutation for each query
  std::int64_t first_row = 0;           // what row 0 is called in `index`
  const bool* near = nullptr;           // [queries][rows]: the pairs that are looked at; null for all
  // In and out, [queries]: the least tile maximum so far, and of which row; a row replaces it where it is less, or
  // equal with a lower index.
  std::int64_t* integer = nullptr;  // for uint8 rows,
  double* real = nullptr;           // or for float rows
  std::int64_t* index = nullptr;
};

void search(const Search& search, int threads);

// The tile maximum of `count` pairs (queries[some[i]], rows[others[i]]), into `integer` or `real`.
struct Pairs {
  nearest::Rows rows;
  nearest::Rows queries;
  std::int64_t tiles = 0;
  const std::int64_t* some = nullptr;
  const std::int64_t* others = nullptr;
  std::int64_t count = 0;
  std::int64_t* integer = nullptr;
  double* real = nullptr;
};

void pairs(const Pairs& pairs, int threads);

}  // namespace diffmem::tile_max
