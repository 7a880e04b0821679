// Bounds on the distances of float vectors from one byte per coordinate: the contract of the CPU scan.
//
// A code stands for v = A (x - mu) u, as computed in float32, with ||A|| <= 1 (spectral norm), all d rows of A nearly
// orthonormal and u a power of two. The first `kLead` coordinates are leading principal components, the others a random
// rotation of what these leave, so that no coordinate of the tail stands out and one step fits all of them. With one
// step s per point and one shift for all points, v is held as
//
//   v^ = s (2^shift b_lead, b_tail),   b in [-127, 127].
//
// Let w be A (x - mu) u without rounding, and ||v - w|| <= eta ||v||. As a point is encoded, e2 >= ||v^ - v|| + eta
// ||v|| and e1, the same of (v_lead, ||v_tail||), are measured, so that for two points (x as a query's, y as a training
// row's)
//
//   level 1:  u ||x - y|| >= sqrt(||x^_lead - y^_lead||^2 + (r_x - r_y)^2) - e1_x - e1_y,    r = ||v_tail||,
//   level 2:  u ||x - y|| >= ||x^ - y^|| - e2_x - e2_y,
//             u ||x - y|| <= stretch (||x^ - y^|| + e2_x + e2_y),    stretch >= 1 / (least singular value of A).
//
// Level 1 is the triangle inequality in R^65: | ||w_tail|| - r | <= ||w_tail - v_tail||, and ||w_x - w_y||^2 >=
// ||lead||^2 + (||tail_x|| - ||tail_y||)^2. So neither ties nor copies are lost: a pair that is left out is farther
// than `reach`, the largest distance (times u) that the query still looks for.
//
// A pair is within reach at level l only if, with t = reach + e_x and sq = ||v^||^2 (level 1: of lead, plus r^2),
//
//   2 s_x s_y dot + 2 r_x r_y + 2 t e_y + (e_y^2 - sq_y)  >=  sq_x - t^2,
//
// which is evaluated in float32: at most 12 roundings of sums whose terms are together at most 2 (sq_x + sq_y + t^2 +
// e_y^2). kRounding = 2^-19 of (sq_x + sq_y + t^2 + e_y^2) covers them. dot is a whole number, exact modulo 2^32:
// |dot| < 64 * 127^2 * 2^10 + width * 127^2 < 2^31 for width <= 4096 and shift <= 10.
//
// Every pointer is to memory of the caller; nothing here keeps one after it returns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace diffmem::vector_scan {

inline constexpr int kLead = 64;       // coordinates of level 1
inline constexpr int kWidthUnit = 64;  // widths are multiples of it; coordinates beyond d are zeros
inline constexpr int kLargestWidth = 4096;
inline constexpr int kLargestShift = 10;
inline constexpr int kPanel = 16;  // points side by side
inline constexpr float kRounding = 1.0F / (1 << 19);
inline constexpr float kLargestNorm = 1e12F;  // of v; longer ones get a code that bounds nothing
inline constexpr float kNothing = 1e15F;      // the error of such a code

// What is known of a point beside its bytes.
struct Terms {
  float s;
  float r;
  float e1;
  float sq1;
  float e2;
  float sq2;
};

// Training rows: bytes are b + 128. Queries: bytes are b, as int8.
struct Points {
  const std::uint8_t* code = nullptr;  // [count][width]
  const Terms* terms = nullptr;        // [count]
  std::int64_t count = 0;
};

struct Shape {
  int width = 0;
  int shift = 0;  // of the lead's products: twice that of its steps
};

// Encodes v [count][d], d <= width. `levels` of queries are what `query_levels` says, of training rows 127.
void encode(const float* v, std::int64_t count, std::int64_t d, Shape shape, bool queries, double eta,
            std::uint8_t* code, Terms* terms, int threads);

struct Work {
  std::int64_t bounded = 0;         // pairs put to level 1
  std::int64_t fine = 0;            // pairs put to level 2
  std::int64_t dense = 0;           // of these, those of products of all pairs
  std::vector<std::int32_t> query;  // the pairs that may be within reach, with their lower bounds
  std::vector<std::int64_t> row;    // (counted from `first`)
  std::vector<float> lower;
};

// All pairs of the rows and queries that may be within reach, given what is known of other rows.
//
// upper [queries][k], ascending: upper bounds, times u, on the distances of k rows that were scanned before (or a
// number beyond every distance); out: the same with these rows. The last one is the query's reach.
Work scan(const Points& rows, std::int64_t first, const Points& queries, Shape shape, double stretch, int k,
          double* upper, int threads);

// ------------------------------------------------------------------------------------------------ instruction sets

// A panel: for each 4 coordinates ("step"), 16 points x 4 bytes. A strip: the same of `strip_rows` queries.
struct Kernels {
  int strip_rows;
  int tile_panels;  // panels that `scan` takes at a time
  int levels;       // largest |b| of queries

  // One level's test over `panels` panels (a multiple of tile_panels): bit j of masks[i * mask_stride + p] for point j
  // of panel p and query i of the strip. Lead steps come first; `panel_stride` bytes from one panel to the next, in
  // both. factors: scale, r, e, g of the panels' points, [4][points]; query: [strip_rows][8], see QueryFactors.
  struct Strip {
    const std::int8_t* lead = nullptr;         // [kLead / 4][strip_rows][4]
    const std::int8_t* tail = nullptr;         // [tail steps][strip_rows][4]
    const std::int32_t* lead_start = nullptr;  // [strip_rows]: -128 * the sum of the query's bytes
    const std::int32_t* tail_start = nullptr;
    const float* a = nullptr;  // 2 s_x
    const float* b = nullptr;  // 2 r_x, 0 at level 2
    const float* c = nullptr;  // 2 t
    const float* threshold = nullptr;
  };
  struct Block {
    const std::uint8_t* lead = nullptr;  // [panels][kLead / 4][16][4]
    const std::uint8_t* tail = nullptr;  // [panels][tail steps][16][4]
    std::size_t tail_steps = 0;          // 0: level 1
    const float* s = nullptr;
    const float* r = nullptr;
    const float* e = nullptr;
    const float* g = nullptr;
    std::size_t panels = 0;
    int shift = 0;
  };
  void (*scan)(const Strip& strip, const Block& block, std::uint16_t* masks, std::size_t mask_stride);

  // dot of a query's and a row's bytes, as above.
  std::int32_t (*dot)(const std::int8_t* query, const std::uint8_t* row, std::size_t width, int shift,
                      std::int32_t lead_start, std::int32_t tail_start);

  // Steps `from` … `from + steps` - 1 of 16 points `stride` bytes apart into a panel.
  void (*pack)(const std::uint8_t* points, std::size_t stride, std::size_t from, std::size_t steps,
               std::uint8_t* panel);

  void (*encode)(const float* v, std::size_t d, std::size_t width, int shift, int levels, int offset, double eta,
                 std::uint8_t* code, Terms* terms);
};

// Null where this build lacks the instructions.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace diffmem::vector_scan
