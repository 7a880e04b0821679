// Winograd F(4×4, 3×3) with AVX2 and FMA: input transform, 36 small matrix products, output transform, per block of
// tiles.
//
// With the points ±a, ±b (a = 3/4, b = 3/2), 0 and ∞ the transforms are, for a row or column of 6 inputs d, 3 weights w
// and 6 products m:
//   inputs    a²b²·d0 − (a²+b²)·d2 + d4;  (d4 − b²d2) ± a·(d3 − b²d1);  (d4 − a²d2) ± b·(d3 − a²d1);
//             a²b²·d1 − (a²+b²)·d3 + d5
//   weights   w0/a²b²;  (w0 ± a·w1 + a²·w2)/(2a²(a²−b²));  (w0 ± b·w1 + b²·w2)/(2b²(b²−a²));  w2
//   outputs   y_i = [i=0]·m0 + aⁱ·(m1 ± m2) + bⁱ·(m3 ± m4) + [i=3]·m5, with + for even i and − for odd i
#include "conv3x3/conv3x3.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>

#include "cpu/simd.h"

namespace diffmem::conv3x3 {

namespace {

constexpr float a = 0.75f, b = 1.5f;
constexpr float a2 = a * a, b2 = b * b;
constexpr int kRowBlock = 6;  // tiles of one micro-kernel; with 16 outputs that makes 12 accumulators

inline __m256 constant(float value) { return _mm256_set1_ps(value); }

inline void transform_inputs(const __m256 d[6], __m256 r[6]) {
  const __m256 even_b = _mm256_fnmadd_ps(constant(b2), d[2], d[4]), odd_b = _mm256_fnmadd_ps(constant(b2), d[1], d[3]);
  const __m256 even_a = _mm256_fnmadd_ps(constant(a2), d[2], d[4]), odd_a = _mm256_fnmadd_ps(constant(a2), d[1], d[3]);
  r[0] = _mm256_fmadd_ps(constant(a2 * b2), d[0], _mm256_fnmadd_ps(constant(a2 + b2), d[2], d[4]));
  r[1] = _mm256_fmadd_ps(constant(a), odd_b, even_b);
  r[2] = _mm256_fnmadd_ps(constant(a), odd_b, even_b);
  r[3] = _mm256_fmadd_ps(constant(b), odd_a, even_a);
  r[4] = _mm256_fnmadd_ps(constant(b), odd_a, even_a);
  r[5] = _mm256_fmadd_ps(constant(a2 * b2), d[1], _mm256_fnmadd_ps(constant(a2 + b2), d[3], d[5]));
}

inline void transform_products(const __m256 m[6], __m256 y[4]) {
  const __m256 plus_a = _mm256_add_ps(m[1], m[2]), minus_a = _mm256_sub_ps(m[1], m[2]);
  const __m256 plus_b = _mm256_add_ps(m[3], m[4]), minus_b = _mm256_sub_ps(m[3], m[4]);
  y[0] = _mm256_add_ps(m[0], _mm256_add_ps(plus_a, plus_b));
  y[1] = _mm256_fmadd_ps(constant(a), minus_a, _mm256_mul_ps(constant(b), minus_b));
  y[2] = _mm256_fmadd_ps(constant(a2), plus_a, _mm256_mul_ps(constant(b2), plus_b));
  y[3] = _mm256_fmadd_ps(constant(a2 * a), minus_a, _mm256_fmadd_ps(constant(b2 * b), minus_b, m[5]));
}

// Weights are transformed in double: once per call, and their rounding would enter every product.
inline void transform_weights(const double w[3], double u[6]) {
  constexpr double A = a, B = b, A2 = A * A, B2 = B * B;
  constexpr double na = 1 / (2 * A2 * (A2 - B2)), nb = 1 / (2 * B2 * (B2 - A2));
  u[0] = w[0] * (1 / (A2 * B2));
  u[1] = (w[0] + A2 * w[2] + A * w[1]) * na;
  u[2] = (w[0] + A2 * w[2] - A * w[1]) * na;
  u[3] = (w[0] + B2 * w[2] + B * w[1]) * nb;
  u[4] = (w[0] + B2 * w[2] - B * w[1]) * nb;
  u[5] = w[2];
}

// products[r][0..15] = Σ_k inputs[r][k]·panel[k][0..15] for six rows.
inline void multiply(std::int64_t channels, const float* inputs, std::int64_t input_stride, const float* panel,
                     float* products, std::int64_t product_stride) {
  __m256 sum[kRowBlock][2];
  for (auto& row : sum) row[0] = row[1] = _mm256_setzero_ps();
  for (std::int64_t k = 0; k < channels; ++k) {
    const __m256 low = _mm256_loadu_ps(panel + 16 * k), high = _mm256_loadu_ps(panel + 16 * k + 8);
#pragma GCC unroll 6
    for (int r = 0; r < kRowBlock; ++r) {
      const __m256 value = _mm256_broadcast_ss(inputs + r * input_stride + k);
      sum[r][0] = _mm256_fmadd_ps(value, low, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(value, high, sum[r][1]);
    }
  }
  for (int r = 0; r < kRowBlock; ++r) {
    _mm256_storeu_ps(products + r * product_stride, sum[r][0]);
    _mm256_storeu_ps(products + r * product_stride + 8, sum[r][1]);
  }
}

struct Tile {
  std::int64_t image, row, column;  // its first output pixel
};

Tile tile_at(const Shape& shape, std::int64_t index) {
  const std::int64_t across = (shape.width + 3) / 4, down = (shape.height + 3) / 4;
  return {index / (across * down), index / across % down * 4, index % across * 4};
}

// Transformed channels [c_first, c_last) of tiles [first, last): inputs (36, rows, c_last − c_first), rows ≥ last −
// first.
void transform_images(const Shape& shape, const float* x, std::int64_t first, std::int64_t last, std::int64_t c_first,
                      std::int64_t c_last, std::int64_t rows, float* inputs) {
  const std::int64_t width = c_last - c_first;
  for (std::int64_t t = 0; t < last - first; ++t) {
    const Tile tile = tile_at(shape, first + t);
    const float* pixel[6][6];  // null outside of the image
    for (int i = 0; i < 6; ++i) {
      for (int j = 0; j < 6; ++j) {
        const std::int64_t r = tile.row + i - 1, q = tile.column + j - 1;
        const bool inside = 0 <= r && r < shape.height && 0 <= q && q < shape.width;
        pixel[i][j] = inside ? x + ((tile.image * shape.height + r) * shape.width + q) * shape.channels : nullptr;
      }
    }
    for (std::int64_t c = c_first; c < c_last; c += 8) {
      __m256 half[6][6], line[6], out[6];
      for (int j = 0; j < 6; ++j) {
        for (int i = 0; i < 6; ++i) line[i] = pixel[i][j] ? _mm256_loadu_ps(pixel[i][j] + c) : _mm256_setzero_ps();
        transform_inputs(line, out);
        for (int i = 0; i < 6; ++i) half[i][j] = out[i];
      }
      for (int i = 0; i < 6; ++i) {
        transform_inputs(half[i], out);
        for (int j = 0; j < 6; ++j) _mm256_storeu_ps(inputs + ((6 * i + j) * rows + t) * width + c - c_first, out[j]);
      }
    }
  }
}

// The adjoint of transform_products.
inline void transform_gradients(const __m256 g[4], __m256 r[6]) {
  const __m256 even_a = _mm256_fmadd_ps(constant(a2), g[2], g[0]), odd_a = _mm256_fmadd_ps(constant(a2), g[3], g[1]);
  const __m256 even_b = _mm256_fmadd_ps(constant(b2), g[2], g[0]), odd_b = _mm256_fmadd_ps(constant(b2), g[3], g[1]);
  r[0] = g[0];
  r[1] = _mm256_fmadd_ps(constant(a), odd_a, even_a);
  r[2] = _mm256_fnmadd_ps(constant(a), odd_a, even_a);
  r[3] = _mm256_fmadd_ps(constant(b), odd_b, even_b);
  r[4] = _mm256_fnmadd_ps(constant(b), odd_b, even_b);
  r[5] = g[3];
}

// sums[r][0..15] += Σ_t inputs[t][r]·gradients[t][0..15] for four rows.
inline void accumulate(std::int64_t count, const float* inputs, std::int64_t input_stride, const float* gradients,
                       std::int64_t gradient_stride, float* sums, std::int64_t sum_stride) {
  __m256 sum[4][2];
  for (int r = 0; r < 4; ++r) {
    sum[r][0] = _mm256_loadu_ps(sums + r * sum_stride);
    sum[r][1] = _mm256_loadu_ps(sums + r * sum_stride + 8);
  }
  for (std::int64_t t = 0; t < count; ++t) {
    const __m256 low = _mm256_loadu_ps(gradients + t * gradient_stride);
    const __m256 high = _mm256_loadu_ps(gradients + t * gradient_stride + 8);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m256 value = _mm256_broadcast_ss(inputs + t * input_stride + r);
      sum[r][0] = _mm256_fmadd_ps(value, low, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(value, high, sum[r][1]);
    }
  }
  for (int r = 0; r < 4; ++r) {
    _mm256_storeu_ps(sums + r * sum_stride, sum[r][0]);
    _mm256_storeu_ps(sums + r * sum_stride + 8, sum[r][1]);
  }
}

void pack_panel(const float* weight, const std::int64_t strides[4], std::int64_t channels, std::int64_t outputs,
                std::int64_t panel, float* packed) {
  for (std::int64_t c = 0; c < channels; ++c) {
    alignas(64) float u[36][16];
    for (int o = 0; o < 16; ++o) {
      const float* w = weight + (16 * panel + o) * strides[0] + c * strides[1];
      double half[3][6], row[6], column[3];
      for (int j = 0; j < 3; ++j) {
        for (int i = 0; i < 3; ++i) column[i] = w[i * strides[2] + j * strides[3]];
        transform_weights(column, half[j]);
      }
      for (int i = 0; i < 6; ++i) {
        for (int j = 0; j < 3; ++j) column[j] = half[j][i];
        transform_weights(column, row);
        for (int j = 0; j < 6; ++j) u[6 * i + j][o] = static_cast<float>(row[j]);
      }
    }
    for (int point = 0; point < 36; ++point) {
      float* target = packed + ((point * (outputs / 16) + panel) * channels + c) * 16;
      simd::copy(u[point], 16, target);
    }
  }
}

void tiles(const Shape& shape, const float* x, const float* packed, const float* bias, std::int64_t first,
           std::int64_t last, float* y, float* scratch) {
  const std::int64_t channels = shape.channels, outputs = shape.outputs, count = last - first;
  const std::int64_t rows = (count + kRowBlock - 1) / kRowBlock * kRowBlock;
  float* const inputs = scratch;                                  // (36, rows, channels)
  float* const products = scratch + 36 * kBlockTiles * channels;  // (36, rows, outputs)

  transform_images(shape, x, first, last, 0, channels, rows, inputs);
  for (int point = 0; point < 36; ++point) {
    float* row = inputs + (point * rows + count) * channels;
    simd::fill(row, (rows - count) * channels, 0.0f);
  }

  for (int point = 0; point < 36; ++point) {
    for (std::int64_t o = 0; o < outputs; o += 16) {
      const float* panel = packed + (point * outputs + o) * channels;
      for (std::int64_t t = 0; t < rows; t += kRowBlock) {
        multiply(channels, inputs + (point * rows + t) * channels, channels, panel,
                 products + (point * rows + t) * outputs + o, outputs);
      }
    }
  }

  for (std::int64_t t = 0; t < count; ++t) {
    const Tile tile = tile_at(shape, first + t);
    const int height = static_cast<int>(simd::min<std::int64_t>(4, shape.height - tile.row));
    const int width = static_cast<int>(simd::min<std::int64_t>(4, shape.width - tile.column));
    for (std::int64_t o = 0; o < outputs; o += 8) {
      __m256 half[4][6], line[6], out[4];
      for (int j = 0; j < 6; ++j) {
        for (int i = 0; i < 6; ++i) line[i] = _mm256_loadu_ps(products + ((6 * i + j) * rows + t) * outputs + o);
        transform_products(line, out);
        for (int i = 0; i < 4; ++i) half[i][j] = out[i];
      }
      const __m256 offset = bias ? _mm256_loadu_ps(bias + o) : _mm256_setzero_ps();
      for (int i = 0; i < height; ++i) {
        transform_products(half[i], out);
        float* target = y + ((tile.image * shape.height + tile.row + i) * shape.width + tile.column) * outputs + o;
        for (int j = 0; j < width; ++j) _mm256_storeu_ps(target + j * outputs, _mm256_add_ps(out[j], offset));
      }
    }
  }
}

void weight_sums(const Shape& shape, const float* x, const float* y_gradient, std::int64_t first, std::int64_t last,
                 std::int64_t c_first, std::int64_t c_last, std::int64_t o_first, std::int64_t o_last, float* sums,
                 float* scratch) {
  const std::int64_t channels = c_last - c_first, outputs = o_last - o_first;
  float* const inputs = scratch;                                         // (36, count, channels)
  float* const gradients = scratch + 36 * kBlockTiles * kSliceChannels;  // (36, count, outputs)
  for (std::int64_t start = first; start < last; start += kBlockTiles) {
    const std::int64_t count = simd::min(kBlockTiles, last - start);
    transform_images(shape, x, start, start + count, c_first, c_last, count, inputs);
    for (std::int64_t t = 0; t < count; ++t) {
      const Tile tile = tile_at(shape, start + t);
      const float* origin =
          y_gradient + ((tile.image * shape.height + tile.row) * shape.width + tile.column) * shape.outputs;
      for (std::int64_t o = o_first; o < o_last; o += 8) {
        __m256 half[6][4], line[4], out[6];
        for (int j = 0; j < 4; ++j) {
          for (int i = 0; i < 4; ++i) {
            const bool inside = tile.row + i < shape.height && tile.column + j < shape.width;
            line[i] =
                inside ? _mm256_loadu_ps(origin + (i * shape.width + j) * shape.outputs + o) : _mm256_setzero_ps();
          }
          transform_gradients(line, out);
          for (int i = 0; i < 6; ++i) half[i][j] = out[i];
        }
        for (int i = 0; i < 6; ++i) {
          transform_gradients(half[i], out);
          for (int j = 0; j < 6; ++j) {
            _mm256_storeu_ps(gradients + ((6 * i + j) * count + t) * outputs + o - o_first, out[j]);
          }
        }
      }
    }
    for (int point = 0; point < 36; ++point) {
      for (std::int64_t o = 0; o < outputs; o += 16) {
        for (std::int64_t c = 0; c < channels; c += 4) {
          accumulate(count, inputs + point * count * channels + c, channels, gradients + point * count * outputs + o,
                     outputs, sums + (point * shape.channels + c_first + c) * shape.outputs + o_first + o,
                     shape.outputs);
        }
      }
    }
  }
}

const Kernels kTable = {pack_panel, tiles, weight_sums};

}  // namespace

const Kernels* avx2_kernels() { return &kTable; }

}  // namespace diffmem::conv3x3

#else

namespace diffmem::conv3x3 {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace diffmem::conv3x3

#endif
