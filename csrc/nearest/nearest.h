// Exact k nearest training rows: the contract of the CPU (and CUDA) search.
//
// Rows are uint8 (distances are int64 and exact), float32 or float64 (distances are float64: eight running sums, value
// j going to sum j mod 8, added as ((0+1)+(2+3))+((4+5)+(6+7)), without fused multiply-add). Equal distances go to the
// lower index. Every pointer is to memory of the caller; nothing here keeps one after it returns.
//
// The bound. Let A be an m x d matrix with ||A|| <= 1 (spectral norm) and z = x - mu. Then I - A'A is positive
// semidefinite, rho(z) = sqrt(||z||^2 - ||Az||^2) is a seminorm, and by its triangle inequality
//
//   ||x - y||^2 = ||A(x - y)||^2 + rho(x - y)^2 >= ||A(x - y)||^2 + (rho(x - mu) - rho(y - mu))^2 = ||x' - y'||^2
//
// with x' = (A(x - mu), rho(x - mu)) in R^(m+1). A needs not be orthonormal, only of norm <= 1; the rows of A are
// leading principal components, so that the bound is tight, but no accuracy of theirs is assumed. The same holds for
// any leading rows of A alone. ||x'|| = ||x - mu|| for each such choice ("level").
//
// What the code holds is v^ = round(scale * x') in int16 with one scale for all points, chosen so that
// scale * ||x - mu|| <= 32767 - 1 for every admissible row. e(x) = ||v^ - scale * x'|| is measured for each point, as
// the index or the query is encoded, against x' as computed, and
//
//   ||x - y|| <= t   implies   ||x^ - y^|| <= R := scale * t * (1 + r) + e(x) + max_y e(y) + slack.           (1)
//
// `slack` covers the difference between x' as computed and as defined. With z = x - mu, in units of ||z|| and u =
// 2^-53:
//   uint8 rows: A = P / s with integer P, whose product with a row is exact in int32 (the index builder keeps
//     128 * sum_j |P_ij| < 2^31); ||z||^2 is an exact integer; what follows is a few float64 operations per coordinate.
//   float rows: products in float64, |fl(a.z) - a.z| <= (d + 2) u ||a|| ||z||; with ||A||_F <= sqrt(m) the coordinates
//   are
//     together off by at most e = (d + 2) sqrt(m) u, their squared length by 2 e + (m + 8) u, and ||z||^2 by (d + 2) u.
// So rho^2 is off by at most delta = 4 (d + m + 8) sqrt(m + 1) u, hence rho by at most sqrt(delta), since |sqrt(a) -
// sqrt(b)| <= sqrt|a - b|, and the coordinates by less. Both points have scale * ||z|| <= 32767, so that
// slack = 4 * 32767 * sqrt(delta). And r = (d + 16) 2^-52 covers the rounding of float64 squared distances (relative
// error
// <= (d + 2) u) and of their square root.
//
// In integers: ||x^ - y^||^2 = |x^|^2 + |y^|^2 - 2 x^.y^, so a pair within t has
//
//   x^.y^ - |y^|^2 / 2 >= (|x^|^2 - R^2) / 2,  hence  x^.y^ + bias(y) > floor((|x^|^2 - R^2) / 2) - 1 =: threshold(x)
//
// with bias(y) = -floor(|y^|^2 / 2); the 1 absorbs the rounding of R^2. Pairs that fail are not in the answer, ties
// included. No overflow: |x^|, |y^| <= 32767 + sqrt(m + 1) / 2 < 32800 (for m < 4096), so |x^.y^| and |y^|^2 are below
// 1.08e9, and the sum above -1.7e9. Multiply-adds of partial sums may wrap; their total, taken modulo 2^32, is right.
#pragma once

#include <cstddef>
#include <cstdint>

namespace diffmem::nearest {

enum class Type : int { u8 = 0, f32 = 1, f64 = 2 };

struct Rows {
  const void* data = nullptr;
  std::int64_t count = 0;
  std::int64_t stride = 0;  // values from one row to the next
  std::int64_t d = 0;
  Type type = Type::u8;
};

inline constexpr int kLevelCoordinates = 60;

// Shape of the code: level "coarse" has 2 * steps values (2 * steps - 1 coordinates and rho); fine level l = 0.. has
// 60 (l + 1) coordinates and rho, of which row l of the level holds the last 60:
//   slots 0-59 coordinates, 60 rho_l, 61 rho_(l-1) (negated for queries; 0 at l = 0), 62-63 bias_l (0 for queries).
// The products of rows 0..l therefore add up to x^.y^ of level l: slot 61 takes back the earlier level's rho.
struct CodeShape {
  int steps = 0;
  int levels = 0;
  int coordinates() const { return levels * kLevelCoordinates; }
};

// Code of `count` points. sq and error: [count][1 + levels], |v^|^2 and e, coarse first.
struct Code {
  std::int16_t* coarse = nullptr;  // [count][2 * steps]
  std::int16_t* fine = nullptr;    // [levels][count][64]
  std::int32_t* sq = nullptr;
  float* error = nullptr;
};

// Encodes uint8 rows: coordinates (P (x - 128) - shift) * factor, where shift = P (mu - 128) and
// factor = scale / s, and norms from mu.
struct Basis {
  CodeShape shape;
  const std::int16_t* p = nullptr;      // [coordinates][d]
  const std::int64_t* shift = nullptr;  // [coordinates]
  const std::uint8_t* mean = nullptr;   // [d]
  double factor = 0;
  double scale = 0;
};
void encode_bytes(const Rows& rows, const Basis& basis, bool queries, const Code& out, int threads);

// The same from float64 coordinates A(x - mu) [count][coordinates] and squared norms [count], times `scale`.
void encode_coordinates(const double* coordinates, const double* squared_norms, std::int64_t count, CodeShape shape,
                        double scale, bool queries, const Code& out, int threads);

// The index: a code in cluster order. Panels as below, with zeros after the last point.
struct Index {
  Rows rows;
  CodeShape shape;
  const std::int16_t* panels = nullptr;  // [ceil(count / 16)][steps][16][2]
  const std::int32_t* bias = nullptr;    // [16 * ceil(count / 16)]
  const std::int16_t* fine = nullptr;    // [levels][count][64]
  const std::int64_t* order = nullptr;   // [count]: position in the code -> row
  const float* error = nullptr;          // [1 + levels]: the largest of all points
  double scale = 0;
  int clusters = 0;
  const std::int16_t* centroids = nullptr;  // panels of the clusters' centers, coded as points
  const std::int32_t* centroid_bias = nullptr;
  const std::int64_t* starts = nullptr;  // [clusters + 1]: positions where clusters begin
};

struct Answer {
  std::int64_t* integer = nullptr;  // squared distances [Q][k] for uint8 rows,
  double* real = nullptr;           // or for float rows
  std::int64_t* index = nullptr;    // [Q][k]
};

struct Work {
  std::int64_t bounded = 0;  // pairs put to the coarse bound
  std::int64_t fine = 0;     // of these, pairs put to finer bounds
  std::int64_t refined = 0;  // of these, pairs whose distance was computed (seeds included)
  double seed_seconds = 0;
  double scan_seconds = 0;
  bool gave_up = false;
};

// Filtered search. `code` is the queries' own (row layout as encoded). Gives up, leaving the answer undefined, once
// more than `allowance` of the pairs seen so far (and a few per query) had to be refined; an infinite one never does.
Work search_filtered(const Index& index, const Rows& queries, const Code& code, int k, double allowance,
                     const Answer& out, int threads);

// Dense search: integer products of all pairs of uint8 rows, differences of all pairs where they would not fit int32
// (d > 65,536) and of float rows.
void search_dense(const Rows& rows, const Rows& queries, int k, const Answer& out, int threads);

// ------------------------------------------------------------------------------------------------ instruction sets
//
// The inner loops as a table of functions, one table per instruction set: nearest_simd.h defines the loops once over a
// small vector type, and the file of each set, nearest_<set>.cpp, instantiates them with its own. Layouts shared by all
// of them:
//
//   panel     `kPanel` = 16 points side by side: for each pair of coordinates (2j, 2j+1), 16 x (int16, int16). One
//             32-bit lane therefore holds one point's pair, and one multiply-add instruction advances 8 or 16 points by
//             two coordinates.
//   strip     the same for the other operand, `rows` (= strip_rows of the table) points side by side.
//   fine row  `kRow` = 64 int16 of one point: 60 coordinates, see CodeShape.

inline constexpr int kPanel = 16;
inline constexpr int kRow = 64;

struct Kernels {
  int strip_rows;  // points per strip

  // C[i * ldc + j] (+)= sum over 2 * steps coordinates of strip point i times panel point j, in int32 (modulo 2^32).
  void (*tile)(std::size_t steps, const std::int16_t* strip, const std::int16_t* panel, std::int32_t* c,
               std::size_t ldc, bool accumulate);

  // For every panel p < panels and strip point i: bit j of masks[i * mask_stride + p] says whether
  // dot(strip point i, panel point j) + bias[16 p + j] > thresholds[i].
  void (*scan)(std::size_t steps, const std::int16_t* strip, const std::int32_t* thresholds, const std::int16_t* panels,
               const std::int32_t* bias, std::size_t count, std::uint16_t* masks, std::size_t mask_stride);

  // Keeps of `count` candidates those whose dots[c] + dot(query, row) + bias(row) > threshold; candidates (row numbers)
  // and dots (running sums) are compacted in place, in order. Returns how many are kept. The bias is the int32 in the
  // last two slots of the row, where the query holds zeros.
  std::size_t (*filter)(const std::int16_t* query, const std::int16_t* rows, std::int32_t* candidates,
                        std::int32_t* dots, std::size_t count, std::int32_t threshold);

  // scores[r] = dot(query, row r) + bias(row r) for `count` consecutive rows.
  void (*score)(const std::int16_t* query, const std::int16_t* rows, std::size_t count, std::int32_t* scores);

  // Panels of `rows` <= 16 points of d bytes, as value - 128; missing points and the odd coordinate are zeros.
  void (*pack_panel)(const std::uint8_t* points, std::size_t stride, std::size_t rows, std::size_t d,
                     std::int16_t* panel);

  // Squared distance of two byte vectors, exact; may stop early and return any partial sum that exceeds `limit`.
  std::int64_t (*distance_u8)(const std::uint8_t* x, const std::uint8_t* y, std::size_t d, std::int64_t limit);

  // Squared distance in float64, summed in the order of nearest.h; may stop early as above.
  double (*distance_f32)(const float* x, const float* y, std::size_t d, double limit);
  double (*distance_f64)(const double* x, const double* y, std::size_t d, double limit);
};

// Null where this build lacks the instructions.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();
const Kernels* neon_dotprod_kernels();

const Kernels& best_kernels();  // of those that cpu/features.h allows

}  // namespace diffmem::nearest
