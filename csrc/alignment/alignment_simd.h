// The products of the alignment for every instruction set; included by the file of one, which says what its vectors
// are: Wide and Narrow with kLanes, load, set1, zero, multiply_add, multiply and raise (best, position where a value is
// higher), the number of windows kWindows whose sums stay in registers, and whether a panel of 16 lanes and more begins
// with a Wide.
#include <cmath>

#include "alignment/alignment.h"

namespace diffmem::alignment {

namespace {

// Windows (y, x), (y, x + 1), …, kWindows of them, against a panel of WIDE wide and NARROW narrow vectors.
template <int WIDE, int NARROW, int WINDOWS>
void windows(const Shape& shape, const Variant& variant, const Panel& panel, std::int64_t y, std::int64_t x,
             float* best, std::int32_t* position) {
  constexpr std::int64_t lanes = WIDE * Wide::kLanes + NARROW * Narrow::kLanes;
  constexpr int wides = WIDE > 0 ? WIDE : 1, narrows = NARROW > 0 ? NARROW : 1;  // no arrays of length 0
  typename Wide::Floats wide[wides][WINDOWS];
  typename Narrow::Floats narrow[narrows][WINDOWS];
#pragma GCC unroll 9
  for (int s = 0; s < WINDOWS; ++s) {
#pragma GCC unroll 9
    for (int i = 0; i < WIDE; ++i) wide[i][s] = Wide::zero();
#pragma GCC unroll 9
    for (int i = 0; i < NARROW; ++i) narrow[i][s] = Narrow::zero();
  }
  const float* t = panel.values;
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    for (std::int64_t row = 0; row < shape.h; ++row) {
      const float* q = variant.values + c * shape.area() + (y + row) * shape.width + x;
      for (std::int64_t column = 0; column < shape.w; ++column, ++q, t += lanes) {
#pragma GCC unroll 9
        for (int i = 0; i < WIDE; ++i) {
          const auto values = Wide::load(t + i * Wide::kLanes);
#pragma GCC unroll 9
          for (int s = 0; s < WINDOWS; ++s) wide[i][s] = Wide::multiply_add(Wide::set1(q[s]), values, wide[i][s]);
        }
#pragma GCC unroll 9
        for (int i = 0; i < NARROW; ++i) {
          const auto values = Narrow::load(t + WIDE * Wide::kLanes + i * Narrow::kLanes);
#pragma GCC unroll 9
          for (int s = 0; s < WINDOWS; ++s)
            narrow[i][s] = Narrow::multiply_add(Narrow::set1(q[s]), values, narrow[i][s]);
        }
      }
    }
  }
#pragma GCC unroll 9
  for (int s = 0; s < WINDOWS; ++s) {
    const auto window = static_cast<std::int32_t>(y * shape.across() + x + s);
    const float inverse = variant.inverse_lengths[window];
#pragma GCC unroll 9
    for (int i = 0; i < WIDE; ++i)
      Wide::raise(Wide::multiply(wide[i][s], Wide::set1(inverse)), variant.first + window, best + i * Wide::kLanes,
                  position + i * Wide::kLanes);
#pragma GCC unroll 9
    for (int i = 0; i < NARROW; ++i) {
      const std::int64_t lane = WIDE * Wide::kLanes + i * Narrow::kLanes;
      Narrow::raise(Narrow::multiply(narrow[i][s], Narrow::set1(inverse)), variant.first + window, best + lane,
                    position + lane);
    }
  }
}

// `count` windows from x on, at most WINDOWS.
template <int WIDE, int NARROW, int WINDOWS>
void up_to(std::int64_t count, const Shape& shape, const Variant& variant, const Panel& panel, std::int64_t y,
           std::int64_t x, float* best, std::int32_t* position) {
  if constexpr (WINDOWS > 1) {
    if (count < WINDOWS) return up_to<WIDE, NARROW, WINDOWS - 1>(count, shape, variant, panel, y, x, best, position);
  }
  windows<WIDE, NARROW, WINDOWS>(shape, variant, panel, y, x, best, position);
}

// A row of windows is cut into pieces of about the same length: short ones leave registers idle.
template <int WIDE, int NARROW>
void search_panel(const Shape& shape, const Variant& variant, const Panel& panel, float* best, std::int32_t* position) {
  const std::int64_t across = shape.across(), pieces = (across + kWindows - 1) / kWindows;
  for (std::int64_t y = 0; y < shape.down(); ++y) {
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
      const std::int64_t x = across * piece / pieces, end = across * (piece + 1) / pieces;
      up_to<WIDE, NARROW, kWindows>(end - x, shape, variant, panel, y, x, best, position);
    }
  }
}

void search_variant(const Shape& shape, const Variant& variant, const Panel& panel, float* best,
                    std::int32_t* position) {
  constexpr int wide = kUsesWide ? 1 : 0, eights = 8 / Narrow::kLanes;
  switch (panel.lanes) {
    case 8: return search_panel<0, eights>(shape, variant, panel, best, position);
    case 16: return search_panel<wide, (2 - 2 * wide) * eights>(shape, variant, panel, best, position);
    default: return search_panel<wide, (3 - 2 * wide) * eights>(shape, variant, panel, best, position);
  }
}

void resample(std::int64_t height, std::int64_t width, const Resampling& down, const Resampling& across,
              const float* plane, float* lines, float* resampled) {
  for (std::int64_t y = 0; y < height; ++y) {
    const float* const line = plane + y * width;
    float* const to = lines + y * width;
    for (std::int64_t x = 0; x < width; ++x) {
      const float* const at = line + across.below[x];
      to[x] = std::fma(across.upper[x], at[1], across.lower[x] * at[0]);
    }
  }
  for (std::int64_t y = 0; y < height; ++y) {
    const float *const above = lines + down.below[y] * width, *const under = above + width;
    const float lower = down.lower[y], upper = down.upper[y];
    float* const to = resampled + y * width;
    for (std::int64_t x = 0; x < width; ++x) to[x] = std::fma(upper, under[x], lower * above[x]);
  }
}

const Kernels kTable = {search_variant, resample};

}  // namespace

}  // namespace diffmem::alignment
