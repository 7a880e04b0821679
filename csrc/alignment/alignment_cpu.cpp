// What surrounds the products of the alignment: templates of length 1 side by side, windows' lengths, threads.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "alignment/alignment.h"
#include "cpu/aligned.h"
#include "cpu/features.h"
#include "cpu/share.h"

namespace diffmem::alignment {

namespace {

const Kernels* kernels() {
  return cpu::best<Kernels>({.avx2 = avx2_kernels(), .avx512 = avx512_kernels(), .neon = neon_kernels()});
}

double mean_of(const float* values, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]);
  return sum / static_cast<double>(count);
}

// A template less the means of its channels, of length 1, into lane `lane` of a panel.
void pack(const Shape& shape, const float* values, std::int64_t lane, std::int64_t lanes, float* panel) {
  const std::int64_t pixels = shape.h * shape.w;
  std::vector<double> means(static_cast<std::size_t>(shape.channels));
  double squared = 0, total = 0;
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const float* const from = values + c * pixels;
    const double mean = means[static_cast<std::size_t>(c)] = mean_of(from, pixels);
    for (std::int64_t i = 0; i < pixels; ++i) {
      const double value = static_cast<double>(from[i]);
      squared += (value - mean) * (value - mean);
      total += value * value;
    }
  }
  const double inverse = squared <= total * static_cast<double>(kFlat) ? 0.0 : 1 / std::sqrt(squared);
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const double mean = means[static_cast<std::size_t>(c)];
    for (std::int64_t i = 0; i < pixels; ++i)
      panel[(c * pixels + i) * lanes + lane] =
          static_cast<float>((static_cast<double>(values[c * pixels + i]) - mean) * inverse);
  }
}

// Sums over all rectangles that begin at the corner: at (y, x) that of the rows < y and columns < x.
void integrate(const Shape& shape, const double* values, double* sums) {
  const std::int64_t row = shape.width + 1;
  std::fill_n(sums, row, 0.0);
  for (std::int64_t y = 0; y < shape.height; ++y) {
    double sum = 0;
    sums[(y + 1) * row] = 0;
    for (std::int64_t x = 0; x < shape.width; ++x) {
      sum += values[y * shape.width + x];
      sums[(y + 1) * row + x + 1] = sums[y * row + x + 1] + sum;
    }
  }
}

// One thread's memory.
struct Scratch {
  cpu::Aligned<float> panel, values, inverse_lengths;
  std::vector<double> centered, squared, sums, square_sums, of_squares, of_values;

  explicit Scratch(const Shape& shape)
      : panel(static_cast<std::size_t>(shape.template_size() * kPanel)),
        values(static_cast<std::size_t>(shape.variants * shape.channels * shape.area())),
        inverse_lengths(static_cast<std::size_t>(shape.variants * shape.down() * shape.across())),
        centered(static_cast<std::size_t>(shape.area())),
        squared(centered.size()),
        sums(static_cast<std::size_t>((shape.height + 1) * (shape.width + 1))),
        square_sums(sums.size()),
        of_squares(static_cast<std::size_t>(shape.down() * shape.across())),
        of_values(of_squares.size()) {}
};

// A variant less the mean of each channel, and the inverse lengths of its windows.
void prepare(const Shape& shape, const float* variant, Scratch& scratch, float* values, float* inverse_lengths) {
  const std::int64_t area = shape.area(), windows = shape.down() * shape.across(), row = shape.width + 1;
  const double pixels = static_cast<double>(shape.h * shape.w);
  std::fill(scratch.of_squares.begin(), scratch.of_squares.end(), 0.0);  // Σ(x − mean)² and Σx² of the windows
  std::fill(scratch.of_values.begin(), scratch.of_values.end(), 0.0);
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const double mean = mean_of(variant + c * area, area);
    for (std::int64_t i = 0; i < area; ++i) {
      const double value = static_cast<double>(variant[c * area + i]) - mean;
      values[c * area + i] = static_cast<float>(value);
      scratch.centered[static_cast<std::size_t>(i)] = value;
      scratch.squared[static_cast<std::size_t>(i)] = value * value;
    }
    integrate(shape, scratch.centered.data(), scratch.sums.data());
    integrate(shape, scratch.squared.data(), scratch.square_sums.data());
    for (std::int64_t y = 0; y < shape.down(); ++y) {
      for (std::int64_t x = 0; x < shape.across(); ++x) {
        const auto rectangle = [&](const std::vector<double>& sums) {
          const double* const top = sums.data() + y * row + x;
          const double* const bottom = top + shape.h * row;
          return bottom[shape.w] - bottom[0] - top[shape.w] + top[0];
        };
        const double sum = rectangle(scratch.sums), squares = rectangle(scratch.square_sums);
        const auto window = static_cast<std::size_t>(y * shape.across() + x);
        scratch.of_squares[window] += squares - sum * sum / pixels;
        scratch.of_values[window] += squares + 2 * mean * sum + pixels * mean * mean;
      }
    }
  }
  for (std::int64_t i = 0; i < windows; ++i) {
    const auto window = static_cast<std::size_t>(i);
    const bool flat = scratch.of_squares[window] <= scratch.of_values[window] * static_cast<double>(kFlat);
    inverse_lengths[i] = flat ? 0.0f : static_cast<float>(1 / std::sqrt(scratch.of_squares[window]));
  }
}

}  // namespace

bool available() { return kernels() != nullptr; }

void align(const Shape& shape, const float* searched, const float* templates, float* correlations,
           std::int64_t* positions, int threads) {
  const Kernels& kernel = *kernels();
  const std::int64_t size = shape.channels * shape.area(), windows = shape.down() * shape.across();
  cpu::share(shape.queries, threads, [&] {
    const auto scratch = std::make_shared<Scratch>(shape);
    return [&, scratch](std::int64_t query) {
      for (std::int64_t v = 0; v < shape.variants; ++v)
        prepare(shape, searched + (query * shape.variants + v) * size, *scratch, scratch->values.data() + v * size,
                scratch->inverse_lengths.data() + v * windows);
      for (std::int64_t first = 0; first < shape.count; first += kPanel) {
        const std::int64_t count = std::min(kPanel, shape.count - first), lanes = (count + 7) / 8 * 8;
        float* const panel = scratch->panel.data();
        if (lanes != count) std::fill_n(panel, shape.template_size() * lanes, 0.0f);
        for (std::int64_t i = 0; i < count; ++i)
          pack(shape, templates + (query * shape.count + first + i) * shape.template_size(), i, lanes, panel);
        alignas(64) float best[kPanel];
        alignas(64) std::int32_t position[kPanel];
        std::fill_n(best, kPanel, -2.0f);
        std::fill_n(position, kPanel, 0);
        for (std::int64_t v = 0; v < shape.variants; ++v)
          kernel.search(shape,
                        {scratch->values.data() + v * size, scratch->inverse_lengths.data() + v * windows,
                         static_cast<std::int32_t>(v * windows)},
                        {panel, lanes}, best, position);
        for (std::int64_t i = 0; i < count; ++i) {
          correlations[query * shape.count + first + i] = std::clamp(best[i], -1.0f, 1.0f);
          positions[query * shape.count + first + i] = position[i];
        }
      }
    };
  });
}

}  // namespace diffmem::alignment
