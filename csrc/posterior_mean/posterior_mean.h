// The posterior mean of uint8 rows: its two matrix products in 8-bit integers, and the pairs that need more.
//
// diffmem/ops/posterior_mean/native.py says how these steps make a posterior mean and what their rounding may be. Here:
//
//   scores        s[i][c] = Σ_t scale_t[c]·(Σ_j row_t[i][j]·column_t[c][j] − shift_t[c]) − weight[c]·half_norm[i]
//   column_top    the largest score of each column, and where
//   column_mass   Σ_i exp(s[i][c] − top[c])
//   select        the pairs with s[i][c] + reach[c]·slack[i] >= threshold[c]
//   pair_logits   (u_c·z_i − ‖z_i‖²/2)·weight[c] in float64 for listed pairs, z_i = y_i − center
//   pair_sums     Σ over listed pairs of a column of weight·z_i, in float64
//   round_weights exp(s[i][c] − limit[c]) in 8 or 16 bits
//   weighted_sums Σ_i w[c][i]·(y_i − 128), exact in int32
//
// The integer products are exact: |u8·s8| summed over at most 65,536 terms fits int32. All scores are float32, a row of
// `columns` of them per image; `columns` is a multiple of 16. Needs AVX2 or NEON (`available`), and gains from AVX-512
// with VNNI: VPDPBUSD multiplies 64 pairs of bytes where a float32 instruction multiplies 16 pairs of numbers; in AVX2
// bytes have to be widened, which leaves twice float32's rate. Both give the same whole numbers.
#pragma once

#include <cstdint>
#include <vector>

namespace diffmem::posterior_mean {

inline constexpr std::int64_t kLargestSum = 65536;  // terms of a product of bytes
inline constexpr int kLanes = 16;

bool available();

// One product of uint8 rows with int8 columns. panel: 64 columns at a time, and then the rest (16, 32 or 48) at once:
// [ceil(k / 4)][columns][4], zeros beyond k.
struct Term {
  const std::uint8_t* rows = nullptr;
  std::int64_t stride = 0;
  std::int64_t k = 0;  // <= kLargestSum
  const std::int8_t* panel = nullptr;
  const std::int32_t* shift = nullptr;  // [columns]
  const float* scale = nullptr;         // [columns]
};

// add: to what `out` holds from before, instead of −weight·half_norm.
void scores(const std::vector<Term>& terms, std::int64_t n, std::int64_t columns, const float* half_norms,
            const float* weight, bool add, float* out, int threads);

void column_top(const float* scores, std::int64_t n, std::int64_t columns, float* top, std::int64_t* where,
                int threads);

void column_mass(const float* scores, std::int64_t n, std::int64_t columns, const float* top, double* mass,
                 int threads);

// Listed pairs, column by column: images[starts[c]] … images[starts[c + 1] − 1], ascending.
struct Pairs {
  std::vector<std::int64_t> starts;
  std::vector<std::int32_t> images;
  std::int64_t total = 0;  // how many there are; where this is more than `limit`, none is listed
  bool complete = true;
};
Pairs select(const float* scores, std::int64_t n, std::int64_t columns, const float* threshold, const float* reach,
             const float* slack, std::int64_t limit, int threads);

struct ByteRows {
  const std::uint8_t* data = nullptr;
  std::int64_t stride = 0;
  std::int64_t d = 0;
  const std::uint8_t* center = nullptr;  // [d]
};

// queries: u [columns][d]; half_norms ‖z_i‖²/2.
void pair_logits(const ByteRows& rows, const double* queries, const double* half_norms, const double* weight,
                 const std::int64_t* starts, const std::int32_t* images, std::int64_t columns, double* out,
                 int threads);

// out [columns][d].
void pair_sums(const ByteRows& rows, const double* weights, const std::int64_t* starts, const std::int32_t* images,
               std::int64_t columns, double* out, int threads);

// ŵ = largest·exp(s − limit), rounded, 0 where s > limit, for the columns listed in `chosen` (ascending). It is rounded
// up or down by a fixed sequence over the images that is uniform and makes the mean error 0: many weights may be below
// half a unit. Without `low`, largest = 255 and high[r][i] = ŵ. With it, largest = 65,280, high = floor((ŵ + 128) /
// 256) and low = ŵ − 256·high + 128. high, low: [chosen][4·ceil(n / 4)], zero beyond n. sum, high_sum [chosen]: Σ ŵ and
// Σ high.
void round_weights(const float* scores, std::int64_t n, std::int64_t columns, const float* limit,
                   const std::int32_t* chosen, std::int64_t count, std::uint8_t* high, std::uint8_t* low,
                   std::int64_t* sum, std::int64_t* high_sum, int threads);

// out [count][k] = Σ_i weights[r][i]·(rows[i][j] − 128) for n <= kLargestSum rows; weights as round_weights makes them.
void weighted_sums(const std::uint8_t* rows, std::int64_t stride, std::int64_t k, std::int64_t n,
                   const std::uint8_t* weights, std::int64_t count, std::int32_t* out, int threads);

// ------------------------------------------------------------------------------------------------ instruction sets
//
// Each kernel does one item of work, on one thread, in memory that it is given. posterior_mean_simd.h has the loops
// that are the same for every instruction set, over the vectors that the file of each, posterior_mean_<set>.cpp,
// defines; each also has products of its own.

inline constexpr std::int64_t kRowBlock = 48;     // rows that stay in the cache while the columns pass by
inline constexpr std::int64_t kImageChunk = 512;  // images packed at a time in weighted_sums
inline constexpr std::int64_t kPixelBlock = 256;  // pixels packed at a time

struct ScoreRows {
  std::int64_t columns;
  const float* half_norms;
  const float* weight;
  float* out;
};

struct Pair {
  std::int32_t column, image;
};

struct Rounding {  // the arguments of round_weights
  const float* scores;
  std::int64_t n, columns;
  const float* limit;
  const std::int32_t* chosen;
  std::uint8_t *high, *low;
};

struct WeightedSums {  // the arguments of weighted_sums
  const std::uint8_t* rows;
  std::int64_t stride, k, n;
  const std::uint8_t* weights;
  std::int32_t* out;
};

struct Kernels {
  // Bytes of a number as it is multiplied: 1, or 2 where bytes are widened first.
  std::int64_t number_bytes;

  // A term's panel in 16 bits, 4 * ceil(k / 4) * columns numbers; null where number_bytes is 1.
  void (*widen_panel)(const Term& term, std::int64_t columns, std::int16_t* to);
  // Rows [row, end), at most kRowBlock, of a term; `first`: −weight·half_norm is put before it, else it is added to
  // what is there. panel: what widen_panel made; scratch: kRowBlock * 4 * ceil(k / 4) numbers; both null where it is
  // null.
  void (*scores)(const Term& term, const std::int16_t* panel, bool first, std::int64_t row, std::int64_t end,
                 const ScoreRows& to, std::int16_t* scratch);

  // Of rows [begin, end): top and where [columns], where the largest score is; sum [columns].
  void (*column_top)(const float* scores, std::int64_t begin, std::int64_t end, std::int64_t columns, float* top,
                     std::int32_t* where);
  void (*column_mass)(const float* scores, std::int64_t begin, std::int64_t end, std::int64_t columns, const float* top,
                      float* sum);

  // Of rows [begin, end): adds up in `count` how many pairs are selected, and lists them in `out`, unless that is null,
  // by row and column. Returns the row that it has come to: it stops where fewer than `columns` of the `room` places
  // are left; `listed`: how many it has taken.
  std::int64_t (*select)(const float* scores, std::int64_t begin, std::int64_t end, std::int64_t columns,
                         const float* threshold, const float* reach, const float* slack, Pair* out, std::int64_t room,
                         std::int64_t* listed, std::int64_t* count);

  // out[p] for pairs p of [begin, end), all of the column that has the query u and the weight.
  void (*pair_logits)(const ByteRows& rows, const double* u, const double* half_norms, double weight,
                      const std::int32_t* images, std::int64_t begin, std::int64_t end, double* out);
  // sum [d] over pairs [begin, end).
  void (*pair_sums)(const ByteRows& rows, const double* weights, const std::int32_t* images, std::int64_t begin,
                    std::int64_t end, double* sum);

  // Images [begin, end), begin a multiple of 64, for chosen columns [first, last), which share a vector; sum and
  // high_sum [last − first].
  void (*round_weights)(const Rounding& of, std::int64_t begin, std::int64_t end, std::int64_t first, std::int64_t last,
                        std::int64_t* sum, std::int64_t* high_sum);

  // Pixels [pixel, pixel + kPixelBlock) or up to k, for weights [begin, end). panel: kPixelBlock * kImageChunk numbers;
  // sums [end − begin][kPixelBlock]; scratch: (end − begin) * kImageChunk numbers, null where number_bytes is 1.
  void (*weighted_sums)(const WeightedSums& of, std::int64_t pixel, std::int64_t begin, std::int64_t end, void* panel,
                        std::int32_t* sums, void* scratch);
};

// Null where this build lacks the instructions.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();
const Kernels* neon_dotprod_kernels();

}  // namespace diffmem::posterior_mean
