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

// The means of planes that lie one after the other. A sum waits for the one before it: those of four planes side by
// side keep the processor busy.
void means_of(const float* planes, std::int64_t count, std::int64_t area, double* means) {
  std::int64_t plane = 0;
  for (; plane + 4 <= count; plane += 4) {
    const float* const from = planes + plane * area;
    double sums[4] = {};
    for (std::int64_t i = 0; i < area; ++i)
      for (int k = 0; k < 4; ++k) sums[k] += static_cast<double>(from[k * area + i]);
    for (int k = 0; k < 4; ++k) means[plane + k] = sums[k] / static_cast<double>(area);
  }
  for (; plane < count; ++plane) {
    double sum = 0;
    for (std::int64_t i = 0; i < area; ++i) sum += static_cast<double>(planes[plane * area + i]);
    means[plane] = sum / static_cast<double>(area);
  }
}

// A template less the means of its channels, of length 1, into lane `lane` of a panel.
void pack(const Shape& shape, const float* values, const double* means, std::int64_t lane, std::int64_t lanes,
          float* panel) {
  const std::int64_t pixels = shape.h * shape.w;
  double squared = 0, total = 0;
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const float* const from = values + c * pixels;
    const double mean = means[c];
    for (std::int64_t i = 0; i < pixels; ++i) {
      const double value = static_cast<double>(from[i]);
      squared += (value - mean) * (value - mean);
      total += value * value;
    }
  }
  const double inverse = squared <= total * static_cast<double>(kFlat) ? 0.0 : 1 / std::sqrt(squared);
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const double mean = means[c];
    for (std::int64_t i = 0; i < pixels; ++i)
      panel[(c * pixels + i) * lanes + lane] =
          static_cast<float>((static_cast<double>(values[c * pixels + i]) - mean) * inverse);
  }
}

// `count` rows from y on of a channel less its mean: values, and the sums of values and of squares over all rectangles
// that begin at the corner: at (y, x) those of the rows < y and columns < x. Rows side by side, as above.
template <int COUNT>
void integrate_rows(const Shape& shape, const float* channel, double mean, std::int64_t y, float* values, double* sums,
                    double* square_sums) {
  const std::int64_t row = shape.width + 1;
  double sum[COUNT] = {}, square_sum[COUNT] = {};
  for (int k = 0; k < COUNT; ++k) sums[(y + k + 1) * row] = square_sums[(y + k + 1) * row] = 0;
  for (std::int64_t x = 0; x < shape.width; ++x) {
    double above = sums[y * row + x + 1], squares_above = square_sums[y * row + x + 1];
    for (int k = 0; k < COUNT; ++k) {
      const std::int64_t pixel = (y + k) * shape.width + x, corner = (y + k + 1) * row + x + 1;
      const double value = static_cast<double>(channel[pixel]) - mean;
      values[pixel] = static_cast<float>(value);
      sum[k] += value;
      square_sum[k] += value * value;
      sums[corner] = above = above + sum[k];
      square_sums[corner] = squares_above = squares_above + square_sum[k];
    }
  }
}

void integrate(const Shape& shape, const float* channel, double mean, float* values, double* sums,
               double* square_sums) {
  std::fill_n(sums, shape.width + 1, 0.0);
  std::fill_n(square_sums, shape.width + 1, 0.0);
  std::int64_t y = 0;
  for (; y + 4 <= shape.height; y += 4) integrate_rows<4>(shape, channel, mean, y, values, sums, square_sums);
  for (; y < shape.height; ++y) integrate_rows<1>(shape, channel, mean, y, values, sums, square_sums);
}

// One thread's memory.
struct Scratch {
  cpu::Aligned<float> panel, values, inverse_lengths;
  std::vector<double> means, sums, square_sums, of_squares, of_values;

  explicit Scratch(const Shape& shape)
      : panel(static_cast<std::size_t>(shape.template_size() * kPanel)),
        values(static_cast<std::size_t>(shape.variants * shape.channels * shape.area())),
        inverse_lengths(static_cast<std::size_t>(shape.variants * shape.down() * shape.across())),
        means(static_cast<std::size_t>(std::max(shape.variants, kPanel) * shape.channels)),
        sums(static_cast<std::size_t>((shape.height + 1) * (shape.width + 1))),
        square_sums(sums.size()),
        of_squares(static_cast<std::size_t>(shape.down() * shape.across())),
        of_values(of_squares.size()) {}
};

// A variant less the means of its channels, and the inverse lengths of its windows.
void prepare(const Shape& shape, const float* variant, const double* means, Scratch& scratch, float* values,
             float* inverse_lengths) {
  const std::int64_t area = shape.area(), windows = shape.down() * shape.across(), row = shape.width + 1;
  const double pixels = static_cast<double>(shape.h * shape.w);
  std::fill(scratch.of_squares.begin(), scratch.of_squares.end(), 0.0);  // Σ(x − mean)² and Σx² of the windows
  std::fill(scratch.of_values.begin(), scratch.of_values.end(), 0.0);
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const double mean = means[c];
    integrate(shape, variant + c * area, mean, values + c * area, scratch.sums.data(), scratch.square_sums.data());
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
      double* const means = scratch->means.data();
      const float* const searched_here = searched + query * shape.variants * size;
      means_of(searched_here, shape.variants * shape.channels, shape.area(), means);
      for (std::int64_t v = 0; v < shape.variants; ++v)
        prepare(shape, searched_here + v * size, means + v * shape.channels, *scratch,
                scratch->values.data() + v * size, scratch->inverse_lengths.data() + v * windows);
      for (std::int64_t first = 0; first < shape.count; first += kPanel) {
        const std::int64_t count = std::min(kPanel, shape.count - first), lanes = (count + 7) / 8 * 8;
        float* const panel = scratch->panel.data();
        if (lanes != count) std::fill_n(panel, shape.template_size() * lanes, 0.0f);
        const float* const goals = templates + (query * shape.count + first) * shape.template_size();
        means_of(goals, count * shape.channels, shape.h * shape.w, means);
        for (std::int64_t i = 0; i < count; ++i)
          pack(shape, goals + i * shape.template_size(), means + i * shape.channels, i, lanes, panel);
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

void make_variants(const Variants& how, const float* images, float* variants, int threads) {
  const Kernels& kernel = *kernels();
  const std::int64_t area = how.height * how.width, size = how.channels * area;
  cpu::share(how.images, threads, [&] {
    const auto scratch = std::make_shared<std::vector<float>>(static_cast<std::size_t>(2 * area));
    return [&, area, size, scratch](std::int64_t image) {
      float *const mirrored = scratch->data(), *const lines = mirrored + area;
      for (std::int64_t c = 0; c < how.channels; ++c) {
        const float* const plane = images + image * size + c * area;
        for (std::int64_t y = 0; y < how.height; ++y)
          std::reverse_copy(plane + y * how.width, plane + (y + 1) * how.width, mirrored + y * how.width);
        for (std::int64_t variant = 0; variant < 2 * how.scales; ++variant) {
          const std::int64_t scale = variant % how.scales;
          const auto at = [scale](const Resampling& all, std::int64_t length) {
            const std::int64_t first = scale * length;
            return Resampling{all.below + first, all.lower + first, all.upper + first};
          };
          kernel.resample(how.height, how.width, at(how.down, how.height), at(how.across, how.width),
                          variant < how.scales ? plane : mirrored, lines,
                          variants + (image * 2 * how.scales + variant) * size + c * area);
        }
      }
    };
  });
}

void pool(const Pooling& how, const std::uint8_t* images, const std::int64_t* rows, float* pooled, int threads) {
  const std::int64_t lines = how.channels * how.height / how.factor, across = how.width / how.factor;
  const auto area = static_cast<float>(how.factor * how.factor);
  cpu::share(how.count, threads, [&] {
    const auto scratch = std::make_shared<std::vector<std::int32_t>>(static_cast<std::size_t>(how.width));
    return [&, area, lines, across, scratch](std::int64_t image) {
      const std::uint8_t* from = images + rows[image] * lines * how.factor * how.width;
      float* to = pooled + image * lines * across;
      std::int32_t* const sums = scratch->data();
      for (std::int64_t line = 0; line < lines; ++line, to += across, from += how.factor * how.width) {
        if (how.factor == 2) {
          for (std::int64_t x = 0; x < across; ++x) {
            const std::uint8_t *const above = from + 2 * x, *const under = above + how.width;
            to[x] = static_cast<float>(above[0] + above[1] + under[0] + under[1]) / area;
          }
          continue;
        }
        for (std::int64_t x = 0; x < how.width; ++x) sums[x] = from[x];
        for (std::int64_t y = 1; y < how.factor; ++y)
          for (std::int64_t x = 0; x < how.width; ++x) sums[x] += from[y * how.width + x];
        for (std::int64_t x = 0; x < across; ++x) {
          std::int64_t sum = 0;
          for (std::int64_t i = 0; i < how.factor; ++i) sum += sums[x * how.factor + i];
          to[x] = static_cast<float>(sum) / area;
        }
      }
    };
  });
}

}  // namespace diffmem::alignment
