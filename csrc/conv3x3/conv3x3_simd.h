// Winograd F(4×4, 3×3) for every instruction set; included by the file of one, which says what its vectors are: Floats
// of kLanes numbers with load, store, set1, zero, add, sub, multiply, multiply_add (a·b + c) and negative_multiply_add
// (c − a·b), load_part and store_part of the first 8 lanes where there are more, Doubles as many as half of kLanes with
// load_doubles, …, and the sizes of its products.
//
// With the points ±a, ±b (a = 3/4, b = 3/2), 0 and ∞ the transforms are, for a row or column of 6 inputs d, 3 weights w
// and 6 products m:
//   inputs    a²b²·d0 − (a²+b²)·d2 + d4;  (d4 − b²d2) ± a·(d3 − b²d1);  (d4 − a²d2) ± b·(d3 − a²d1);
//             a²b²·d1 − (a²+b²)·d3 + d5
//   weights   w0/a²b²;  (w0 ± a·w1 + a²·w2)/(2a²(a²−b²));  (w0 ± b·w1 + b²·w2)/(2b²(b²−a²));  w2
//   outputs   y_i = [i=0]·m0 + aⁱ·(m1 ± m2) + bⁱ·(m3 ± m4) + [i=3]·m5, with + for even i and − for odd i
#include "cpu/simd.h"

namespace diffmem::conv3x3 {

namespace {

constexpr float a = 0.75f, b = 1.5f;
constexpr float a2 = a * a, b2 = b * b;
constexpr std::int64_t kRun = 64;  // tiles whose products are summed in registers
constexpr int kTransposed = 16;    // channels that are brought into another order at a time: a cache line

inline void transform_inputs(const Floats d[6], Floats r[6]) {
  const Floats even_b = negative_multiply_add(set1(b2), d[2], d[4]);
  const Floats odd_b = negative_multiply_add(set1(b2), d[1], d[3]);
  const Floats even_a = negative_multiply_add(set1(a2), d[2], d[4]);
  const Floats odd_a = negative_multiply_add(set1(a2), d[1], d[3]);
  r[0] = multiply_add(set1(a2 * b2), d[0], negative_multiply_add(set1(a2 + b2), d[2], d[4]));
  r[1] = multiply_add(set1(a), odd_b, even_b);
  r[2] = negative_multiply_add(set1(a), odd_b, even_b);
  r[3] = multiply_add(set1(b), odd_a, even_a);
  r[4] = negative_multiply_add(set1(b), odd_a, even_a);
  r[5] = multiply_add(set1(a2 * b2), d[1], negative_multiply_add(set1(a2 + b2), d[3], d[5]));
}

inline void transform_products(const Floats m[6], Floats y[4]) {
  const Floats plus_a = add(m[1], m[2]), minus_a = sub(m[1], m[2]);
  const Floats plus_b = add(m[3], m[4]), minus_b = sub(m[3], m[4]);
  y[0] = add(m[0], add(plus_a, plus_b));
  y[1] = multiply_add(set1(a), minus_a, multiply(set1(b), minus_b));
  y[2] = multiply_add(set1(a2), plus_a, multiply(set1(b2), plus_b));
  y[3] = multiply_add(set1(a2 * a), minus_a, multiply_add(set1(b2 * b), minus_b, m[5]));
}

// The adjoint of transform_products.
inline void transform_gradients(const Floats g[4], Floats r[6]) {
  const Floats even_a = multiply_add(set1(a2), g[2], g[0]), odd_a = multiply_add(set1(a2), g[3], g[1]);
  const Floats even_b = multiply_add(set1(b2), g[2], g[0]), odd_b = multiply_add(set1(b2), g[3], g[1]);
  r[0] = g[0];
  r[1] = multiply_add(set1(a), odd_a, even_a);
  r[2] = negative_multiply_add(set1(a), odd_a, even_a);
  r[3] = multiply_add(set1(b), odd_b, even_b);
  r[4] = negative_multiply_add(set1(b), odd_b, even_b);
  r[5] = g[3];
}

// Weights are transformed in double: once per call, and their rounding would enter every product.
constexpr double kA = a, kB = b, kA2 = kA * kA, kB2 = kB * kB;
constexpr double kNa = 1 / (2 * kA2 * (kA2 - kB2)), kNb = 1 / (2 * kB2 * (kB2 - kA2));

inline void transform_weights(const Doubles w[3], Doubles u[6]) {
  const Doubles even_a = multiply_add(set1(kA2), w[2], w[0]), even_b = multiply_add(set1(kB2), w[2], w[0]);
  u[0] = multiply(set1(1 / (kA2 * kB2)), w[0]);
  u[1] = multiply(set1(kNa), multiply_add(set1(kA), w[1], even_a));
  u[2] = multiply(set1(kNa), negative_multiply_add(set1(kA), w[1], even_a));
  u[3] = multiply(set1(kNb), multiply_add(set1(kB), w[1], even_b));
  u[4] = multiply(set1(kNb), negative_multiply_add(set1(kB), w[1], even_b));
  u[5] = w[2];
}

// The adjoint of transform_weights.
inline void transform_sums(const Floats s[6], Floats w[3]) {
  constexpr float na = static_cast<float>(kNa), nb = static_cast<float>(kNb);
  const Floats plus_a = multiply(set1(na), add(s[1], s[2])), minus_a = multiply(set1(na), sub(s[1], s[2]));
  const Floats plus_b = multiply(set1(nb), add(s[3], s[4])), minus_b = multiply(set1(nb), sub(s[3], s[4]));
  w[0] = multiply_add(set1(1 / (a2 * b2)), s[0], add(plus_a, plus_b));
  w[1] = multiply_add(set1(a), minus_a, multiply(set1(b), minus_b));
  w[2] = multiply_add(set1(a2), plus_a, multiply_add(set1(b2), plus_b, s[5]));
}

// ---------------------------------------------------------------------------------------------------- small products

// What is multiplied and summed: `count` pairs of a matrix of inputs and one of weights, so far from the first ones.
struct Terms {
  int count;
  std::int64_t input[4], panel[4];
};

// products[r][…] = Σ over terms and k of inputs[r][k]·panels[k][…] for ROWS rows and PANELS panels of 16 outputs.
template <int ROWS, int PANELS>
void multiply_rows(const Terms& terms, std::int64_t channels, const float* inputs, std::int64_t input_stride,
                   const float* panels, float* products, std::int64_t product_stride) {
  constexpr int vectors = PANELS * 16 / kLanes, each = 16 / kLanes;
  Floats sum[ROWS][vectors];
  for (auto& row : sum) {
    for (Floats& one : row) one = zero();
  }
  for (int term = 0; term < terms.count; ++term) {
    const float* const in = inputs + terms.input[term];
    const float* const panel = panels + terms.panel[term];
    for (std::int64_t k = 0; k < channels; ++k) {
      Floats weights[vectors];
#pragma GCC unroll 8
      for (int p = 0; p < PANELS; ++p) prefetch(panel + ((p + PANELS) * channels + k) * 16);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) weights[v] = load(panel + (v / each * channels + k) * 16 + v % each * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const Floats value = set1(in[r * input_stride + k]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[r][v] = multiply_add(value, weights[v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < vectors; ++v) store(products + r * product_stride + v * kLanes, sum[r][v]);
  }
}

// `rows` of them, at most ROWS.
template <int ROWS, int PANELS>
inline void multiply_up_to(std::int64_t rows, const Terms& terms, std::int64_t channels, const float* inputs,
                           std::int64_t input_stride, const float* panels, float* products,
                           std::int64_t product_stride) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      return multiply_up_to<ROWS - 1, PANELS>(rows, terms, channels, inputs, input_stride, panels, products,
                                              product_stride);
    }
  }
  multiply_rows<ROWS, PANELS>(terms, channels, inputs, input_stride, panels, products, product_stride);
}

// All rows, in parts of nearly equal size.
template <int PANELS>
inline void multiply_panels(std::int64_t rows, const Terms& terms, std::int64_t channels, const float* inputs,
                            std::int64_t input_stride, const float* panels, float* products,
                            std::int64_t product_stride) {
  const std::int64_t parts = simd::divide_up<std::int64_t>(rows, kRows);
  for (std::int64_t part = 0; part < parts; ++part) {
    const std::int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
    multiply_up_to<kRows, PANELS>(last - first, terms, channels, inputs + first * input_stride, input_stride, panels,
                                  products + first * product_stride, product_stride);
  }
}

// All outputs.
inline void multiply(std::int64_t rows, const Terms& terms, const Shape& shape, const float* inputs,
                     std::int64_t input_stride, const float* panels, float* products, std::int64_t product_stride) {
  std::int64_t o = 0;
  for (; o + 16 * kPanels <= shape.outputs; o += 16 * kPanels) {
    multiply_panels<kPanels>(rows, terms, shape.channels, inputs, input_stride, panels + o * shape.channels,
                             products + o, product_stride);
  }
  for (; o < shape.outputs; o += 16) {
    multiply_panels<1>(rows, terms, shape.channels, inputs, input_stride, panels + o * shape.channels, products + o,
                       product_stride);
  }
}

// sums[panel][r][…] (+)= Σ_t inputs[t][r]·gradients[t][16·panel …] for ROWS channels and PANELS panels of 16 outputs.
// The sum of each run of kRun tiles starts from zero, so that the error grows with its root only: 8 instead of 36
// epsilons where 2,048 tiles are summed.
template <int ROWS, int PANELS>
void accumulate_rows(std::int64_t count, bool begins, const float* inputs, std::int64_t input_stride,
                     const float* gradients, std::int64_t gradient_stride, float* sums, std::int64_t panel_stride) {
  constexpr int vectors = PANELS * 16 / kLanes, each = 16 / kLanes;
  for (std::int64_t start = 0; start < count; start += kRun) {
    const std::int64_t stop = simd::min(count, start + kRun);
    Floats sum[ROWS][vectors];
    for (auto& row : sum) {
      for (Floats& one : row) one = zero();
    }
    for (std::int64_t t = start; t < stop; ++t) {
      Floats gradient[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) gradient[v] = load(gradients + t * gradient_stride + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const Floats value = set1(inputs[t * input_stride + r]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[r][v] = multiply_add(value, gradient[v], sum[r][v]);
      }
    }
    const bool stored = begins && start == 0;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        float* const total = sums + v / each * panel_stride + r * 16 + v % each * kLanes;
        store(total, stored ? sum[r][v] : add(load(total), sum[r][v]));
      }
    }
  }
}

// --------------------------------------------------------------------------------------------------------- transforms

struct Tile {
  std::int64_t image, row, column;  // its first output pixel
};

inline Tile tile_at(const Shape& shape, std::int64_t index) {
  const std::int64_t across = (shape.width + 3) / 4, down = (shape.height + 3) / 4;
  return {index / (across * down), index / across % down * 4, index % across * 4};
}

// Eight numbers more than whole vectors hold are half a vector, or there are none.
template <class Work>
inline void for_vectors(std::int64_t count, const Work& work) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) work(i, [](const float* p) { return load(p); });
  if (i < count) work(i, [](const float* p) { return load_part(p); });
}

// Windows of kSize × kSize pixels, the first of them `before` pixels up and left of each tile's, as 6 × 6 points:
// `apply` along the columns, then along the rows. Pixels outside the image are zeros.
template <int kSize, class Apply>
inline void transform_windows(const Shape& shape, const float* x, std::int64_t channels, int before, std::int64_t first,
                              std::int64_t last, const Points& out, const float* zeros, const Apply& apply) {
  for (std::int64_t t = 0; t < last - first; ++t) {
    const Tile tile = tile_at(shape, first + t);
    const float* pixel[kSize][kSize];
    for (int i = 0; i < kSize; ++i) {
      for (int j = 0; j < kSize; ++j) {
        const std::int64_t r = tile.row + i - before, q = tile.column + j - before;
        const bool inside = 0 <= r && r < shape.height && 0 <= q && q < shape.width;
        pixel[i][j] = inside ? x + ((tile.image * shape.height + r) * shape.width + q) * channels : zeros;
      }
    }
    for_vectors(channels, [&](std::int64_t c, auto read) {
      Floats half[6][kSize], line[kSize], result[6];
      float* target = out.values + t * out.row + c;
#pragma GCC unroll 6
      for (int j = 0; j < kSize; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < kSize; ++i) line[i] = read(pixel[i][j] + c);
        apply(line, result);
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) half[i][j] = result[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        apply(half[i], result);
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store(target + (6 * i + j) * out.point, result[j]);
      }
    });
  }
}

void transform_images(const Shape& shape, const float* x, std::int64_t first, std::int64_t last, const Points& out,
                      const float* zeros) {
  transform_windows<6>(shape, x, shape.channels, 1, first, last, out, zeros,
                       [](const Floats* line, Floats* result) { transform_inputs(line, result); });
}

void transform_gradients(const Shape& shape, const float* gradient, std::int64_t first, std::int64_t last,
                         const Points& out, const float* zeros) {
  transform_windows<4>(shape, gradient, shape.outputs, 0, first, last, out, zeros,
                       [](const Floats* line, Floats* result) { transform_gradients(line, result); });
}

void write_outputs(const Shape& shape, const Epilogue& epilogue, std::int64_t first, std::int64_t last,
                   const Points& products, float* y) {
  for (std::int64_t t = 0; t < last - first; ++t) {
    const Tile tile = tile_at(shape, first + t);
    const int height = static_cast<int>(simd::min<std::int64_t>(4, shape.height - tile.row));
    const int width = static_cast<int>(simd::min<std::int64_t>(4, shape.width - tile.column));
    const std::int64_t origin = ((tile.image * shape.height + tile.row) * shape.width + tile.column) * shape.outputs;
    for (std::int64_t o = 0; o < shape.outputs; o += kLanes) {
      Floats half[4][6], line[6], result[4];
      const float* source = products.values + t * products.row + o;
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) line[i] = load(source + (6 * i + j) * products.point);
        transform_products(line, result);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) half[i][j] = result[i];
      }
      const Floats offset = epilogue.bias ? load(epilogue.bias + o) : zero(), scale = set1(epilogue.scale);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (i == height) break;
        transform_products(half[i], result);
        const std::int64_t at = origin + i * shape.width * shape.outputs + o;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          if (j >= width) break;
          Floats value = add(result[j], offset);
          if (epilogue.residual) value = add(value, load(epilogue.residual + at + j * shape.outputs));
          store(y + at + j * shape.outputs, multiply(value, scale));
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- items

void pack_panel(const float* weight, const std::int64_t strides[4], std::int64_t channels, std::int64_t outputs,
                std::int64_t panel, bool direct, float* packed) {
  alignas(64) float taps[9][kTransposed][16];
  for (std::int64_t first = 0; first < channels; first += kTransposed) {
    const std::int64_t count = simd::min<std::int64_t>(kTransposed, channels - first);
    for (int o = 0; o < 16; ++o) {
      for (int tap = 0; tap < 9; ++tap) {
        const float* w =
            weight + (16 * panel + o) * strides[0] + first * strides[1] + tap / 3 * strides[2] + tap % 3 * strides[3];
        for (std::int64_t c = 0; c < count; ++c) taps[tap][c][o] = w[c * strides[1]];
      }
    }
    for (std::int64_t c = 0; c < count; ++c) {
      float* const target = packed + (panel * channels + first + c) * 16;
      if (direct) {
        for (int tap = 0; tap < 9; ++tap) simd::copy(taps[tap][c], 16, target + tap * packed_point(channels, outputs));
        continue;
      }
      for (int o = 0; o < 16; o += kLanes / 2) {
        Doubles half[3][6], line[3], row[6];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
#pragma GCC unroll 3
          for (int i = 0; i < 3; ++i) line[i] = load_doubles(&taps[3 * i + j][c][o]);
          transform_weights(line, half[j]);
        }
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 3
          for (int j = 0; j < 3; ++j) line[j] = half[j][i];
          transform_weights(line, row);
#pragma GCC unroll 6
          for (int j = 0; j < 6; ++j) store_floats(target + (6 * i + j) * packed_point(channels, outputs) + o, row[j]);
        }
      }
    }
  }
}

void tiles(const Shape& shape, const float* x, const float* packed, const Epilogue& epilogue, std::int64_t first,
           std::int64_t last, float* y, const Points& inputs, const Points& products, const float* zeros) {
  const std::int64_t rows = last - first;
  transform_images(shape, x, first, last, inputs, zeros);
  for (int point = 0; point < 36; ++point) {
    multiply(rows, {1, {}, {}}, shape, inputs.values + point * inputs.point, inputs.row,
             packed + point * packed_point(shape.channels, shape.outputs), products.values + point * products.point,
             products.row);
  }
  write_outputs(shape, epilogue, first, last, products, y);
}

void pixel(const Shape& shape, const float* x, const float* packed, const Epilogue& epilogue, std::int64_t first,
           std::int64_t last, std::int64_t number, float* y) {
  const std::int64_t pixels = shape.height * shape.width;
  Terms terms = {static_cast<int>(pixels), {}, {}};
  for (std::int64_t other = 0; other < pixels; ++other) {
    terms.input[other] = other * shape.channels;
    terms.panel[other] = tap_between(shape, other, number) * packed_point(shape.channels, shape.outputs);
  }
  const std::int64_t begin = (first * pixels + number) * shape.outputs, stride = pixels * shape.outputs;
  multiply(last - first, terms, shape, x + first * pixels * shape.channels, pixels * shape.channels, packed, y + begin,
           stride);
  const Floats scale = set1(epilogue.scale);
  for (std::int64_t image = 0; image < last - first; ++image) {
    const std::int64_t at = begin + image * stride;
    for (std::int64_t o = 0; o < shape.outputs; o += kLanes) {
      Floats value = load(y + at + o);
      if (epilogue.bias) value = add(value, load(epilogue.bias + o));
      if (epilogue.residual) value = add(value, load(epilogue.residual + at + o));
      store(y + at + o, multiply(value, scale));
    }
  }
}

void accumulate(std::int64_t count, bool begins, const Shape& shape, std::int64_t c_first, std::int64_t c_last,
                const float* inputs, std::int64_t input_stride, const float* gradients, std::int64_t gradient_stride,
                float* sums) {
  const std::int64_t outputs = shape.outputs, panel = 16 * shape.channels;
  for (std::int64_t c = c_first; c < c_last; c += 8) {
    for (std::int64_t part = 0; part < 8; part += kSumRows) {
      const float* in = inputs + c + part;
      float* const out = sums + (c + part) * 16;
      std::int64_t o = 0;
      for (; o + 16 * kPanels <= outputs; o += 16 * kPanels) {
        accumulate_rows<kSumRows, kPanels>(count, begins, in, input_stride, gradients + o, gradient_stride,
                                           out + o / 16 * panel, panel);
      }
      for (; o < outputs; o += 16) {
        accumulate_rows<kSumRows, 1>(count, begins, in, input_stride, gradients + o, gradient_stride,
                                     out + o / 16 * panel, panel);
      }
    }
  }
}

void weight_gradient(const float* sums, std::int64_t channels, std::int64_t outputs, std::int64_t panel, bool direct,
                     float* gradient, const std::int64_t strides[4]) {
  alignas(64) float taps[9][kTransposed][16];
  for (std::int64_t first = 0; first < channels; first += kTransposed) {
    const std::int64_t count = simd::min<std::int64_t>(kTransposed, channels - first);
    for (std::int64_t c = 0; c < count; ++c) {
      for (int o = 0; o < 16; o += kLanes) {
        const float* source = sums + (panel * channels + first + c) * 16 + o;
        if (direct) {
          for (int tap = 0; tap < 9; ++tap) {
            store(&taps[tap][c][o], load(source + tap * packed_point(channels, outputs)));
          }
          continue;
        }
        Floats half[3][6], line[6], row[3];
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) {
#pragma GCC unroll 6
          for (int i = 0; i < 6; ++i) line[i] = load(source + (6 * i + j) * packed_point(channels, outputs));
          transform_sums(line, row);
#pragma GCC unroll 3
          for (int i = 0; i < 3; ++i) half[i][j] = row[i];
        }
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          transform_sums(half[i], row);
#pragma GCC unroll 3
          for (int j = 0; j < 3; ++j) store(&taps[3 * i + j][c][o], row[j]);
        }
      }
    }
    for (int o = 0; o < 16; ++o) {
      for (int tap = 0; tap < 9; ++tap) {
        float* g =
            gradient + (16 * panel + o) * strides[0] + first * strides[1] + tap / 3 * strides[2] + tap % 3 * strides[3];
        for (std::int64_t c = 0; c < count; ++c) g[c * strides[1]] = taps[tap][c][o];
      }
    }
  }
}

const Kernels kTable = {pack_panel, tiles, pixel, transform_images, transform_gradients, accumulate, weight_gradient};

}  // namespace

}  // namespace diffmem::conv3x3
