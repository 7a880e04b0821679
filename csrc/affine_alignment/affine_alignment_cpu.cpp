// One pair at a time: read the image and its gradient under the map, sum the products of all derivatives, solve seven
// equations, move on.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "affine_alignment/affine_alignment.h"
#include "cpu/features.h"
#include "cpu/share.h"

namespace diffmem::affine_alignment {

namespace {

using Map = std::array<double, 6>;  // A_xx, A_xy, b_x, A_yx, A_yy, b_y

double remainder_of(double correlation, const Map& map) {
  const double a = map[0], b = map[1], c = map[3], d = map[4];
  const double same = std::hypot((a + d) / 2, (c - b) / 2), other = std::hypot((a - d) / 2, (c + b) / 2);
  const double largest = same + other, least = same - other;  // singular values
  if (!(least > 1e-3)) return std::numeric_limits<double>::infinity();
  const double deformation = std::log(largest / least) + std::abs(std::atan2(c - b, a + d));
  const double scaling = std::abs(std::log(largest * least)) / 2;
  return std::sqrt(std::max(0.0, 1 - correlation)) * std::exp(kDeformation * deformation + kScaling * scaling);
}

// Solves the symmetric, positive definite system a·x = b in place of b; false where it is not definite.
bool solve(double (&a)[kColumns][kColumns], double (&b)[kColumns]) {
  for (int j = 0; j < kColumns; ++j) {  // a = LLᵀ, L in the lower half
    for (int k = 0; k < j; ++k) a[j][j] -= a[j][k] * a[j][k];
    if (!(a[j][j] > 0)) return false;
    a[j][j] = std::sqrt(a[j][j]);
    for (int i = j + 1; i < kColumns; ++i) {
      for (int k = 0; k < j; ++k) a[i][j] -= a[i][k] * a[j][k];
      a[i][j] /= a[j][j];
    }
  }
  for (int i = 0; i < kColumns; ++i) {
    for (int k = 0; k < i; ++k) b[i] -= a[i][k] * b[k];
    b[i] /= a[i][i];
  }
  for (int i = kColumns - 1; i >= 0; --i) {
    for (int k = i + 1; k < kColumns; ++k) b[i] -= a[k][i] * b[k];
    b[i] /= a[i][i];
  }
  return true;
}

// The sums, pixel by pixel; kernels sum in this order too.
void sum_plainly(const Job& job, Moments& moments) {
  const std::int64_t width = job.width, channels = job.channels, pixels = job.h * job.w;
  const double last_x = static_cast<double>(width - 1), last_y = static_cast<double>(job.height - 1);
  const double center_x = last_x / 2, center_y = last_y / 2;
  const double* const map = job.map;
  std::fill_n(moments.columns, channels * kColumns, 0.0);
  std::fill_n(&moments.products[0][0], 6 * 8, 0.0);
  moments.value_wanted = 0;
  for (std::int64_t row = 0; row < job.h; ++row) {
    const double y = static_cast<double>(row) - static_cast<double>(job.h - 1) / 2;
    for (std::int64_t column = 0; column < job.w; ++column) {
      const double x = static_cast<double>(column) - static_cast<double>(job.w - 1) / 2;
      const double at_x = std::clamp(map[0] * x + map[1] * y + map[2] + center_x, 0.0, last_x);
      const double at_y = std::clamp(map[3] * x + map[4] * y + map[5] + center_y, 0.0, last_y);
      const auto left = static_cast<std::int64_t>(at_x), top = static_cast<std::int64_t>(at_y);
      const auto u = static_cast<float>(at_x - static_cast<double>(left));
      const auto v = static_cast<float>(at_y - static_cast<double>(top));
      const std::int64_t right = left + 1 < width ? kStacked * channels : 0;
      const std::int64_t below = top + 1 < job.height ? kStacked * channels * width : 0;
      const float* corner = job.stacked + (top * width + left) * kStacked * channels;
      const float weights[4] = {(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u};
      const float* wanted = job.wanted + row * job.w + column;
      float products[8] = {}, with_wanted = 0;
      double* columns = moments.columns;
      for (std::int64_t c = 0; c < channels; ++c, corner += kStacked, wanted += pixels, columns += kColumns) {
        float read[3];
        for (int i = 0; i < 3; ++i)
          read[i] = weights[0] * corner[i] + weights[1] * corner[right + i] + weights[2] * corner[below + i] +
                    weights[3] * corner[below + right + i];
        const float value = read[0], gx = read[1], gy = read[2], t = *wanted;
        const float of[8] = {gx * gx, gx * gy, gy * gy, gx * value, gy * value, gx * t, gy * t, value * value};
        for (int i = 0; i < 8; ++i) products[i] += of[i];
        with_wanted += value * t;
        const auto dx = static_cast<double>(gx), dy = static_cast<double>(gy);
        columns[0] += static_cast<double>(value);
        columns[1] += dx;
        columns[2] += dy;
        columns[3] += dx * x;
        columns[4] += dx * y;
        columns[5] += dy * x;
        columns[6] += dy * y;
      }
      const double of[6] = {1, x, y, x * x, x * y, y * y};
      for (int j = 0; j < 6; ++j)
        for (int i = 0; i < 8; ++i) moments.products[j][i] += static_cast<double>(products[i]) * of[j];
      moments.value_wanted += static_cast<double>(with_wanted);
    }
  }
}

class Aligner {
 public:
  explicit Aligner(const Shape& shape)
      : shape_(shape),
        pixels_(shape.h * shape.w),
        stacked_(static_cast<std::size_t>(shape.channels * shape.height * shape.width * kStacked)),
        wanted_(static_cast<std::size_t>(shape.channels * shape.h * shape.w)),
        means_(static_cast<std::size_t>(shape.channels)),
        sums_(static_cast<std::size_t>(shape.channels) * kColumns) {}

  void operator()(const float* image, const float* goal, const float* start, int iterations, float* remainder,
                  float* map) {
    Map current, best;
    std::copy_n(start, 6, current.begin());
    best = current;
    double least = std::numeric_limits<double>::infinity();
    if (set_template(goal)) {
      stack(image);
      for (int iteration = 0; iteration <= iterations; ++iteration) {
        if (!sum(current)) break;
        const double length = std::sqrt(normal_[0][0]);
        const double found = remainder_of(products_[0] / length, current);
        if (found < least) {
          least = found;
          best = current;
        }
        if (iteration == iterations || !step(current)) break;
      }
    }
    *remainder = static_cast<float>(std::min(least, 1.0));
    std::copy(best.begin(), best.end(), map);
  }

 private:
  // The template less the mean of each channel, of length 1; false where it has no variance.
  bool set_template(const float* from) {
    double squared = 0, total = 0;
    for (std::int64_t c = 0; c < shape_.channels; ++c) {
      const float* const channel = from + c * pixels_;
      double mean = 0;
      for (std::int64_t i = 0; i < pixels_; ++i) mean += static_cast<double>(channel[i]);
      mean /= static_cast<double>(pixels_);
      for (std::int64_t i = 0; i < pixels_; ++i) {
        const double value = static_cast<double>(channel[i]);
        wanted_[static_cast<std::size_t>(c * pixels_ + i)] = static_cast<float>(value - mean);
        squared += (value - mean) * (value - mean);
        total += value * value;
      }
    }
    if (!(squared > kFlat * total)) return false;
    const auto inverse = static_cast<float>(1 / std::sqrt(squared));
    for (float& value : wanted_) value *= inverse;
    return true;
  }

  // Values less their channel's mean (for less rounding) and central differences across and down side by side, for each
  // pixel and channel.
  void stack(const float* image) {
    const std::int64_t height = shape_.height, width = shape_.width;
    for (std::int64_t c = 0; c < shape_.channels; ++c) {
      const float* const from = image + c * height * width;
      double mean = 0;
      for (std::int64_t i = 0; i < height * width; ++i) mean += static_cast<double>(from[i]);
      mean /= static_cast<double>(height * width);
      means_[static_cast<std::size_t>(c)] = mean;
      for (std::int64_t y = 0; y < height; ++y) {
        const float *const row = from + y * width, *const above = from + std::max<std::int64_t>(y - 1, 0) * width,
                           *const below = from + std::min(y + 1, height - 1) * width;
        for (std::int64_t x = 0; x < width; ++x) {
          float* const to = stacked_.data() + ((y * width + x) * shape_.channels + c) * kStacked;
          to[0] = static_cast<float>(static_cast<double>(row[x]) - mean);
          to[1] = (row[std::min(x + 1, width - 1)] - row[std::max<std::int64_t>(x - 1, 0)]) / 2;
          to[2] = (below[x] - above[x]) / 2;
        }
      }
    }
  }

  // The products of all columns with each other and with the template, under a map; false where the values have no
  // variance. Products of derivatives are moments of products of gradients: Σ g·g′·{1, x, y, x², xy, y²}.
  bool sum(const Map& map) {
    if (!std::all_of(map.begin(), map.end(), [](double each) { return std::isfinite(each); })) return false;
    Moments moments{sums_.data(), {}, 0};
    const Job job{stacked_.data(), wanted_.data(), shape_.channels, shape_.height,
                  shape_.width,    shape_.h,       shape_.w,        map.data()};
    if (kernels_ == nullptr || !kernels_->sum(job, moments)) sum_plainly(job, moments);
    const auto& products = moments.products;
    // Columns: gradient 0 or 1, times 1, x or y.
    static constexpr int gradient[kColumns] = {0, 0, 1, 0, 0, 1, 1}, times[kColumns] = {0, 0, 0, 1, 2, 1, 2};
    static constexpr int moment[3][3] = {{0, 1, 2}, {1, 3, 4}, {2, 4, 5}};
    normal_[0][0] = products[0][7];
    products_[0] = moments.value_wanted;
    for (int j = 1; j < kColumns; ++j) {
      products_[j] = products[times[j]][5 + gradient[j]];
      normal_[j][0] = products[times[j]][3 + gradient[j]];
      for (int k = 1; k <= j; ++k) normal_[j][k] = products[moment[times[j]][times[k]]][gradient[j] + gradient[k]];
    }
    // Less the means of each channel; the template has none.
    double total = products[0][7];  // Σx² of the values as they came
    for (std::int64_t c = 0; c < shape_.channels; ++c) {
      const double* const of = sums_.data() + c * kColumns;
      const double mean = means_[static_cast<std::size_t>(c)];
      total += 2 * mean * of[0] + mean * mean * static_cast<double>(pixels_);
      for (int j = 0; j < kColumns; ++j)
        for (int k = 0; k <= j; ++k) normal_[j][k] -= of[j] * of[k] / static_cast<double>(pixels_);
    }
    return normal_[0][0] > kFlat * total;
  }

  // The next map; false where no step leads on.
  bool step(Map& map) {
    double damped[kColumns][kColumns], solution[kColumns];
    const double floor = 1e-6 * normal_[0][0] / static_cast<double>(pixels_ * shape_.channels);
    for (int j = 0; j < kColumns; ++j) {
      for (int k = 0; k <= j; ++k) damped[j][k] = normal_[j][k];
      damped[j][j] += kDamping * normal_[j][j] + floor;
      solution[j] = products_[j];
    }
    if (!solve(damped, solution) || !(solution[0] > 0)) return false;
    const auto bounded = [&](int column, double longest) {
      return std::clamp(solution[column] / solution[0], -longest, longest);
    };
    map[2] += bounded(1, kLongestShift);
    map[5] += bounded(2, kLongestShift);
    map[0] += bounded(3, kLongestStep);
    map[1] += bounded(4, kLongestStep);
    map[3] += bounded(5, kLongestStep);
    map[4] += bounded(6, kLongestStep);
    return true;
  }

  const Shape shape_;
  const Kernels* const kernels_ = cpu::best<Kernels>({.avx2 = avx2_kernels(), .avx512 = avx512_kernels()});
  const std::int64_t pixels_;
  std::vector<float> stacked_, wanted_;
  std::vector<double> means_, sums_;  // of the image, of each column, per channel
  double normal_[kColumns][kColumns] = {}, products_[kColumns] = {};
};

}  // namespace

void align(const Shape& shape, const float* images, const float* templates, const float* start, int iterations,
           float* remainders, float* maps, int threads) {
  const std::int64_t image = shape.channels * shape.height * shape.width, goal = shape.channels * shape.h * shape.w;
  cpu::share(shape.pairs, threads, [&] {
    const auto aligner = std::make_shared<Aligner>(shape);
    return [&, image, goal, aligner](std::int64_t pair) {
      (*aligner)(images + pair * image, templates + pair * goal, start + pair * 6, iterations, remainders + pair,
                 maps + pair * 6);
    };
  });
}

}  // namespace diffmem::affine_alignment
