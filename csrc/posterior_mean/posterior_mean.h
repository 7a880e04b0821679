// The posterior mean of uint8 rows: its two matrix products in integers, and the pairs that need more.
//
// diffmem/ops/posterior_mean/native.py says how these steps make a posterior mean and what their rounding may be. Here:
//
//   scores        s[i][c] = Σ_t scale_t[c]·Σ_j (row_t[i][j] − offset_t[j])·column_t[c][j] − weight[c]·half_norm[i]
//   column_top    the largest score of each column, and where
//   column_mass   Σ_i exp(s[i][c] − top[c])
//   select        the pairs with s[i][c] + reach[c]·slack[i] >= threshold[c]
//   pair_logits   (u_c·z_i − ‖z_i‖²/2)·weight[c] in float64 for listed pairs, z_i = y_i − center
//   pair_sums     Σ over listed pairs of a column of weight·z_i, in float64
//   round_weights exp(s[i][c] − limit[c]) in 8, 15 or 16 bits
//   weighted_sums Σ_i w[c][i]·(y_i − 128), exact
//
// All scores are float32, a row of `columns` of them per image; `columns` is a multiple of 16. Needs AVX2 or NEON
// (`available`), and gains from AVX-512 with VNNI: VPDPBUSD multiplies 64 pairs of bytes where a float32 instruction
// multiplies 16 pairs of numbers; |u8·s8| summed over at most 65,536 terms fits int32. In AVX2 bytes have to be widened
// to 16 bits, which leaves twice float32's rate; but then the other factor may have 16 bits at no cost. So columns and
// weights are digits of `digit_bits()` bits, 8 or 16: what takes two products of bytes takes one there. Sums of such
// products fit int32 for 256 pixels or 512 images at a time, which are added up in float32 (scores) and float64
// (weighted sums).
#pragma once

#include <cstdint>
#include <vector>

namespace diffmem::posterior_mean {

inline constexpr std::int64_t kLargestSum = 65536;  // terms of a product of bytes
inline constexpr int kLanes = 16;

bool available();
int digit_bits();  // of a column's numbers, and of weights (16: 15 of them)

// One product of uint8 rows, less an offset, with columns of whole numbers −128 … 127 or −32,767 … 32,767.
struct Term {
  const std::uint8_t* rows = nullptr;
  std::int64_t stride = 0;
  std::int64_t k = 0;  // <= kLargestSum
  std::int64_t count = 0;
  const std::int16_t* values = nullptr;  // [count][k], the first `count` of all columns
  const std::uint8_t* offset = nullptr;  // [k]
  const float* scale = nullptr;          // [columns]
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
// half a unit. (In 15 bits those of 16 units and more are rounded to the nearest.) high [chosen][4·ceil(n / 4)], zero
// beyond n, uint8 or (where digits have 16 bits) uint16; sum [chosen] = Σ ŵ. In 16 bits largest = 32,767 and high[r][i]
// = ŵ; so in 8 without `low`, with largest = 255. With `low` largest = 65,280, high = floor((ŵ + 128) / 256) and low =
// ŵ − 256·high + 128. high_sum [chosen]: Σ high.
void round_weights(const float* scores, std::int64_t n, std::int64_t columns, const float* limit,
                   const std::int32_t* chosen, std::int64_t count, void* high, std::uint8_t* low, std::int64_t* sum,
                   std::int64_t* high_sum, int threads);

// out [count][k] = Σ_i weights[r][i]·(rows[i][j] − 128) for n <= kLargestSum rows; weights as round_weights makes them.
void weighted_sums(const std::uint8_t* rows, std::int64_t stride, std::int64_t k, std::int64_t n, const void* weights,
                   std::int64_t count, double* out, int threads);

// All of it at once, in float32, for small sets: the logits of every image, weights, and their sum, with nothing
// dropped but what is proven to hold less than exp(−reach) of the largest weight each.
//
// Products are float32 sums of kFloatChunk terms, which are added up in float32. So a logit is off by at most
//
//   E = (kFloatChunk + d / kFloatChunk + 6)·2^-24·(‖u‖ + ‖z‖)·‖z‖/σ²
//
// and by e = 2^-24·R·(4‖u‖/√d + (1 + √(d / kFloatChunk) / 2)·R)/σ² as a rule (R: rms of ‖z‖), as roundings that are
// independent make. Where E is above 1/4 all images within reach + 2E of the top are computed in float64, and the
// others are left out. Elsewhere errors of weights w are taken as independent, so that the mean is off by e·√Σw²/Σw
// times the spread of the images; where this is above the tolerance, weights w > θ·Σw are computed in float64, θ =
// (tolerance / e)²: what is left obeys it.
struct SmallSet {
  ByteRows rows;
  std::int64_t n = 0;
  const double* half_norms = nullptr;
  double spread = 0, longest = 0;  // rms and largest of ‖z‖
};
struct SmallQueries {
  const void* x = nullptr;  // [count][d] float32 or float64: u = unit·x + shift − center
  bool wide = false;        // x and out are float64
  std::int64_t count = 0;
  double unit = 1, shift = 0;
  const double* sigma = nullptr;      // [count], in units of the rows
  const double* tolerance = nullptr;  // [count] of the mean, relative to the spread
  double reach = 0;
  bool exact = false;  // all logits in float64, pair by pair: for few of them, or few queries
};
enum class Checked : int { good = 0, bad_x = 1, bad_sigma = 2 };
// out [count][d]: the mean in the units of x. log_sum, dropped [count]; may be null.
Checked small_means(const SmallSet& set, const SmallQueries& queries, void* out, double* log_sum, double* dropped,
                    int threads);

// ------------------------------------------------------------------------------------------------ instruction sets
//
// Each kernel does one item of work, on one thread, in memory that it is given. posterior_mean_simd.h has the loops
// that are the same for every instruction set, over the vectors that the file of each, posterior_mean_<set>.cpp,
// defines; each also has products of its own.

inline constexpr std::int64_t kRowBlock = 48;     // rows that stay in the cache while the columns pass by
inline constexpr std::int64_t kImageChunk = 512;  // images packed at a time in weighted_sums
inline constexpr std::int64_t kPixelBlock = 256;  // pixels packed at a time
inline constexpr std::int64_t kPixelChunk =
    256;  // pixels of a row whose products of 16-bit digits are added up in int32

inline constexpr std::int64_t kFloatChunk = 128;  // terms of a float32 sum
inline constexpr std::int64_t kFloatPixels = 64;  // pixels converted at a time

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
  void* high;
  std::uint8_t* low;
};

struct WeightedSums {  // the arguments of weighted_sums
  const std::uint8_t* rows;
  std::int64_t stride, k, n;
  const void* weights;
  double* out;
};

struct Kernels {
  std::int64_t digit_bytes;   // 1, or 2
  std::int64_t number_bytes;  // of a digit as it is multiplied: 2 where bytes are widened first

  // A term's columns [first, last), whole vectors, as `scores` reads them. panel: 4 * ceil(k / 4) * columns numbers;
  // shift [columns]: Σ_j offset[j]·column[c][j], where that is subtracted from products (digits of a byte).
  void (*pack)(const Term& term, std::int64_t columns, std::int64_t first, std::int64_t last, void* panel,
               std::int32_t* shift);
  // Rows [row, end), at most kRowBlock, of a term; `first`: −weight·half_norm is put before it, else it is added to
  // what is there. scratch: kRowBlock * max(kPixelChunk, 4 * ceil(k / 4)) numbers.
  void (*scores)(const Term& term, const void* panel, const std::int32_t* shift, bool first, std::int64_t row,
                 std::int64_t end, const ScoreRows& to, void* scratch);

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
  // sums: (end − begin) * kPixelBlock numbers of 8 bytes; scratch: (end − begin) * kImageChunk numbers.
  void (*weighted_sums)(const WeightedSums& of, std::int64_t pixel, std::int64_t begin, std::int64_t end, void* panel,
                        void* sums, void* scratch);

  // Scores of rows [row, end), at most kRowBlock, in float32. panel [columns / 16][d][16]; scratch: kRowBlock *
  // kFloatChunk numbers.
  void (*float_scores)(const ByteRows& rows, const float* panel, std::int64_t row, std::int64_t end,
                       const double* half_norms, const float* weight, std::int64_t columns, float* out, float* scratch);
  // Of one vector of columns: scores become exp(s − top); mass and squares [16], the sums of these and of their
  // squares.
  void (*weigh)(float* scores, std::int64_t n, std::int64_t columns, const float* top, double* mass, double* squares);
  // sums [end − begin][kFloatPixels] = Σ_i weights[i][c]·z_i over pixels [pixel, pixel + kFloatPixels) or up to d.
  // scratch: kImageChunk * kFloatPixels numbers.
  void (*float_sums)(const ByteRows& rows, std::int64_t n, const float* weights, std::int64_t columns,
                     std::int64_t pixel, std::int64_t begin, std::int64_t end, float* scratch, double* sums);
};

// Null where this build lacks the instructions.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();
const Kernels* neon_dotprod_kernels();

}  // namespace diffmem::posterior_mean
