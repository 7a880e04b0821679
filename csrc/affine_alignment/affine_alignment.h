// The affine map under which an image fits a template best, near a first guess: what the op of that name describes.
//
// A map (A, b) takes the template's pixel p, counted from its center, to A·p + b, counted from the image's center,
// where the image is read by linear interpolation; beyond its border the nearest pixel continues. One step solves, by
// least squares, t ≈ gain·w + Σ_j step_j·∂w/∂map_j for the template t of length 1 and the image's values w, the mean of
// each channel removed from all of them.
//
// Layouts (float32, tightly packed):
//   images     (pairs, channels, height, width)
//   templates  (pairs, channels, h, w)
//   start      (pairs, 2, 3), A beside b, x before y
//   remainders (pairs), √(1 − correlation)·e^(deformation), at most 1
//   maps       (pairs, 2, 3), the best one on the way
// Sums in double. With AVX2 and AVX-512, images of one and of three channels are summed by vectors, to the same bits.
#pragma once

#include <cstdint>

namespace diffmem::affine_alignment {

struct Shape {
  std::int64_t pairs, channels, height, width, h, w;
};

void align(const Shape& shape, const float* images, const float* templates, const float* start, int iterations,
           float* remainders, float* maps, int threads);

// diffmem/ops/affine_alignment/arguments.py has the same.
inline constexpr double kDeformation = 3.0, kScaling = 0.5;
inline constexpr double kDamping = 1e-2;
inline constexpr double kLongestShift = 1.0, kLongestStep = 0.1;
inline constexpr double kFlat = 1e-6;

inline constexpr int kColumns = 7;           // the values, and their derivatives by b_x, b_y, A_xx, A_xy, A_yx, A_yy
inline constexpr std::int64_t kStacked = 4;  // floats for each pixel and channel: value, gradient (x, y), 0

// What is summed under one map; finite, all of it.
struct Job {
  const float* stacked;  // (height, width, channels, kStacked)
  const float* wanted;   // (channels, h, w), the template
  std::int64_t channels, height, width, h, w;
  const double* map;
};

// Over all pixels (x, y) of the template, counted from its center.
struct Moments {
  double* columns;        // (channels, kColumns), of each column
  double products[6][8];  // of xx, xy, yy, xv, yv, xt, yt, vv times 1, x, y, x², xy, y², where x, y are the gradient,
                          // v the value and t the template's
  double value_wanted;    // of v·t
};

struct Kernels {
  bool (*sum)(const Job& job, Moments& moments);  // false: not for so many channels
};

// Null where this build lacks the instructions.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace diffmem::affine_alignment
