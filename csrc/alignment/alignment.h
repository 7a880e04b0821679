// The best correlation of each template with any window of its query's variants: the second stage of aligned search.
//
// correlation(window, template) = Σ_c ⟨w_c − mean(w_c), t_c − mean(t_c)⟩ / (‖w − means‖·‖t − means‖), 0 where one of
// them has no variance. A template is made free of its means and of length 1 once, so that windows keep theirs in the
// products; their lengths come from sums over rectangles, in double.
//
// Layouts (float32, tightly packed):
//   searched     (queries, variants, channels, height, width)
//   templates    (queries, count, channels, h, w), h <= height and w <= width
//   correlations (queries, count), in [−1, 1]
//   positions    (queries, count) int64, (variant·(height − h + 1) + y)·(width − w + 1) + x of the best window, the
//                first of equals; fewer than 2^31 per query
// Needs AVX2 or NEON (`available`), the variants too.
#pragma once

#include <cstddef>
#include <cstdint>

namespace diffmem::alignment {

struct Shape {
  std::int64_t queries, variants, channels, height, width, count, h, w;

  std::int64_t down() const { return height - h + 1; }
  std::int64_t across() const { return width - w + 1; }
  std::int64_t area() const { return height * width; }
  std::int64_t template_size() const { return channels * h * w; }
};

bool available();

void align(const Shape& shape, const float* searched, const float* templates, float* correlations,
           std::int64_t* positions, int threads);

// Lines of `size` pixels, enlarged by linear interpolation: value i of the result is lower[i]·line[below[i]], rounded,
// plus upper[i]·line[below[i] + 1] with one rounding, as products with matrices of such weights give it.
struct Resampling {
  const std::int32_t* below;
  const float* lower;
  const float* upper;
};

// The variants of images (images, channels, height, width): (images, 2·scales, channels, height, width), each image as
// it is at all scales, then its mirror image. down and across: (scales, height) and (scales, width) of each array.
struct Variants {
  std::int64_t images, channels, height, width, scales;
  Resampling down, across;
};

void make_variants(const Variants& how, const float* images, float* variants, int threads);

// Means of squares of `factor` pixels a side, of the images `rows` (count) among bytes (…, channels, height, width):
// (count, channels, height / factor, width / factor). factor divides both sides. On any processor.
struct Pooling {
  std::int64_t count, channels, height, width, factor;
};

void pool(const Pooling& how, const std::uint8_t* images, const std::int64_t* rows, float* pooled, int threads);

inline constexpr std::int64_t kPanel = 24;  // templates side by side
inline constexpr float kFlat = 1e-6f;       // Σ(x − mean)² is at most this share of Σx²: no variance

// Up to kPanel templates side by side: values[k·lanes + i] is value k of template i, zero where there is none; lanes
// is 8, 16 or 24. Of one variant: its values less the mean of each channel, and 1/length of each window (down, across).
struct Panel {
  const float* values;
  std::int64_t lanes;
};

struct Variant {
  const float* values;
  const float* inverse_lengths;
  std::int32_t first;  // position of its first window
};

struct Kernels {
  // Raises best and position (lanes each) to what the windows of a variant give.
  void (*search)(const Shape& shape, const Variant& variant, const Panel& panel, float* best, std::int32_t* position);
  // One channel of one variant; lines: as many floats as it has.
  void (*resample)(std::int64_t height, std::int64_t width, const Resampling& down, const Resampling& across,
                   const float* plane, float* lines, float* resampled);
};

// Null where this build lacks the instructions.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace diffmem::alignment
