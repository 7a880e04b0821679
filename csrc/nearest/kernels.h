// The inner loops of the nearest-neighbor search as a table of functions, one table per instruction set.
//
// nearest_simd.h defines the loops once over a small vector type; nearest_cpu.cpp (portable), nearest_avx2.cpp and
// nearest_avx512.cpp each instantiate them with their own. Layouts shared by all of them:
//
//   panel     `kPanel` = 16 points side by side: for each pair of coordinates (2j, 2j+1), 16 x (int16, int16). One
//   32-bit
//             lane therefore holds one point's pair, and one multiply-add instruction advances 8 or 16 points by two
//             coordinates.
//   strip     the same for the other operand, `rows` (= strip_rows of the table) points side by side.
//   fine row  `kRow` = 64 int16 of one point: 60 coordinates, see nearest.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace diffmem::nearest {

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

const Kernels& portable_kernels();
const Kernels* avx2_kernels();    // null where this build lacks them
const Kernels* avx512_kernels();  // null where this build lacks them

}  // namespace diffmem::nearest
