// The inner loops of the scan, written once over a small vector type `V` (vector_scan.h says what they do). Included by
// each file of an instruction set after it defines `V`: `Int` and `Float` of kLanes 32-bit lanes, kStripRows,
// kTilePanels, kLevels; dot4(acc, rows, query) adds four products of uint8 and int8 to each lane.
#include <math.h>

#include <cstring>

#include "vector_scan/vector_scan.h"

namespace diffmem::vector_scan {
namespace {

inline constexpr int kVectors = V::kTilePanels * kPanel / V::kLanes;  // of a tile, per step and per factor
inline constexpr std::size_t kStepBytes = std::size_t{4} * kPanel;

inline std::int32_t four_at(const std::int8_t* values) {
  std::int32_t four;
  std::memcpy(&four, values, sizeof four);
  return four;
}

// Vector v of a tile's step: which panel of the tile, and where in it.
inline const std::uint8_t* part(const std::uint8_t* tile, std::size_t panel_bytes, int v) {
  constexpr int kPerPanel = kPanel / V::kLanes;
  return tile + static_cast<std::size_t>(v / kPerPanel) * panel_bytes + std::size_t{4} * V::kLanes * (v % kPerPanel);
}

[[gnu::always_inline]] inline void steps(typename V::Int (&acc)[V::kStripRows][kVectors], std::size_t count,
                                         const std::int8_t* strip, const std::uint8_t* tile) {
  const std::size_t panel_bytes = count * kStepBytes;
  for (std::size_t s = 0; s < count; ++s, strip += 4 * V::kStripRows, tile += kStepBytes) {
    typename V::Int points[kVectors];
    for (int v = 0; v < kVectors; ++v) points[v] = V::load(part(tile, panel_bytes, v));
    for (int i = 0; i < V::kStripRows; ++i) {
      const typename V::Int query = V::broadcast(four_at(strip + 4 * i));
      for (int v = 0; v < kVectors; ++v) acc[i][v] = V::dot4(acc[i][v], points[v], query);
    }
  }
}

void scan(const Kernels::Strip& q, const Kernels::Block& block, std::uint16_t* masks, std::size_t mask_stride) {
  constexpr std::size_t kLeadSteps = kLead / 4;
  for (std::size_t p = 0; p < block.panels; p += V::kTilePanels) {
    typename V::Int acc[V::kStripRows][kVectors];
    for (int i = 0; i < V::kStripRows; ++i) {
      for (int v = 0; v < kVectors; ++v) acc[i][v] = V::broadcast(q.lead_start[i]);
    }
    steps(acc, kLeadSteps, q.lead, block.lead + p * kLeadSteps * kStepBytes);
    if (block.shift != 0) {
      for (int i = 0; i < V::kStripRows; ++i) {
        for (int v = 0; v < kVectors; ++v) acc[i][v] = V::left(acc[i][v], block.shift);
      }
    }
    if (block.tail_steps > 0) {
      for (int i = 0; i < V::kStripRows; ++i) {
        const typename V::Int start = V::broadcast(q.tail_start[i]);
        for (int v = 0; v < kVectors; ++v) acc[i][v] = V::add(acc[i][v], start);
      }
      steps(acc, block.tail_steps, q.tail, block.tail + p * block.tail_steps * kStepBytes);
    }
    const std::size_t at = p * kPanel;
    for (int v = 0; v < kVectors; ++v) {
      const typename V::Float s = V::load(block.s + at + v * V::kLanes);
      const typename V::Float r = V::load(block.r + at + v * V::kLanes);
      const typename V::Float e = V::load(block.e + at + v * V::kLanes);
      const typename V::Float g = V::load(block.g + at + v * V::kLanes);
      constexpr int kPerPanel = kPanel / V::kLanes;
      for (int i = 0; i < V::kStripRows; ++i) {
        typename V::Float sum = V::multiply_add(V::multiply(V::real(acc[i][v]), s), V::all(q.a[i]), g);
        sum = V::multiply_add(r, V::all(q.b[i]), sum);
        sum = V::multiply_add(e, V::all(q.c[i]), sum);
        const std::uint32_t bits = V::at_least(sum, V::all(q.threshold[i])) << (V::kLanes * (v % kPerPanel));
        std::uint16_t& mask = masks[i * mask_stride + p + v / kPerPanel];
        mask = static_cast<std::uint16_t>(v % kPerPanel == 0 ? bits : mask | bits);
      }
    }
  }
}

std::int32_t dot(const std::int8_t* query, const std::uint8_t* row, std::size_t width, int shift,
                 std::int32_t lead_start, std::int32_t tail_start) {
  constexpr std::size_t kBytes = std::size_t{4} * V::kLanes;
  typename V::Int lead = V::zero();
  for (std::size_t j = 0; j < kLead; j += kBytes) lead = V::dot4(lead, V::load(row + j), V::load(query + j));
  typename V::Int even = V::zero();
  typename V::Int odd = V::zero();
  std::size_t j = kLead;
  for (; j + 2 * kBytes <= width; j += 2 * kBytes) {
    even = V::dot4(even, V::load(row + j), V::load(query + j));
    odd = V::dot4(odd, V::load(row + j + kBytes), V::load(query + j + kBytes));
  }
  for (; j < width; j += kBytes) even = V::dot4(even, V::load(row + j), V::load(query + j));
  // Unsigned: partial sums may wrap.
  const auto first = (static_cast<std::uint32_t>(V::sum(lead)) + static_cast<std::uint32_t>(lead_start)) << shift;
  const auto second = static_cast<std::uint32_t>(V::sum(V::add(even, odd))) + static_cast<std::uint32_t>(tail_start);
  return static_cast<std::int32_t>(first + second);
}

void pack(const std::uint8_t* points, std::size_t stride, std::size_t from, std::size_t count, std::uint8_t* panel) {
  std::size_t s = 0;
  for (; s + 16 <= count; s += 16) V::transpose16(points + 4 * (from + s), stride, panel + s * kStepBytes);
  for (; s < count; ++s) {
    for (std::size_t i = 0; i < kPanel; ++i) {
      std::memcpy(panel + s * kStepBytes + 4 * i, points + i * stride + 4 * (from + s), 4);
    }
  }
}

// Sums in lanes, which the compiler makes vectors of.
inline constexpr std::size_t kSums = 16;

struct Sums {
  float error[kSums] = {};
  float square[kSums] = {};
  std::int32_t code[kSums] = {};
  double error_total() const { return total(error); }
  double square_total() const { return total(square); }
  double code_total() const {
    double sum = 0;
    for (const std::int32_t lane : code) sum += lane;
    return sum;
  }
  static double total(const float* lanes) {
    double sum = 0;
    for (std::size_t i = 0; i < kSums; ++i) sum += lanes[i];
    return sum;
  }
};

inline float absolute(float a) { return a < 0 ? -a : a; }

inline float largest(const float* v, std::size_t from, std::size_t to) {
  float lanes[kSums] = {};
  std::size_t j = from;
  for (; j + kSums <= to; j += kSums) {
    for (std::size_t i = 0; i < kSums; ++i) {
      const float a = absolute(v[j + i]);
      lanes[i] = a > lanes[i] ? a : lanes[i];
    }
  }
  for (; j < to; ++j) lanes[0] = absolute(v[j]) > lanes[0] ? absolute(v[j]) : lanes[0];
  float most = 0;
  for (const float lane : lanes) most = lane > most ? lane : most;
  return most;
}

inline void quantize(const float* v, std::size_t from, std::size_t to, float step, int levels, int offset,
                     std::uint8_t* code, Sums& sums) {
  const float inverse = 1 / step;
  const auto most = static_cast<float>(levels);
  const auto one = [&](std::size_t j, std::size_t lane) {
    float scaled = v[j] * inverse;
    scaled = scaled > most ? most : scaled < -most ? -most : scaled;
    const auto b = static_cast<std::int32_t>(scaled + (scaled < 0 ? -0.5F : 0.5F));
    const float miss = v[j] - step * static_cast<float>(b);
    sums.error[lane] += miss * miss;
    sums.square[lane] += v[j] * v[j];
    sums.code[lane] += b * b;
    code[j] = static_cast<std::uint8_t>(b + offset);
  };
  std::size_t j = from;
  for (; j + kSums <= to; j += kSums) {
    for (std::size_t i = 0; i < kSums; ++i) one(j + i, i);
  }
  for (std::size_t lane = 0; j < to; ++j, ++lane) one(j, lane);
}

void encode(const float* v, std::size_t d, std::size_t width, int shift, int levels, int offset, double eta,
            std::uint8_t* code, Terms* terms) {
  const std::size_t lead = d < kLead ? d : kLead;
  std::memset(code + d, offset, width - d);
  const auto up = static_cast<float>(1 << (shift / 2));
  const float most_lead = largest(v, 0, lead);
  const float most_tail = largest(v, lead, d);
  const float most = most_lead / up > most_tail ? most_lead / up : most_tail;
  Sums first;
  Sums second;
  // A step below 1e-18 would lose its square; a point so small is a zero with an error.
  const float step = most < kLargestNorm ? (most > 1e-16F ? most : 1e-16F) / static_cast<float>(levels) : 1;
  if (most < kLargestNorm) {
    quantize(v, 0, lead, step * up, levels, offset, code, first);
    quantize(v, lead, d, step, levels, offset, code, second);
  }
  const double norm = sqrt(first.square_total() + second.square_total());
  if (!(most < kLargestNorm && norm < kLargestNorm)) {
    std::memset(code, offset, width);
    *terms = {step, 0, kNothing, 0, kNothing, 0};
    return;
  }
  // Of float32: sums of `width` terms, steps' products, and the terms themselves.
  const double rounding = (eta * norm + 1e-15) * (1 + 1e-6);
  const double slack = 1 + 2e-6 + static_cast<double>(width) * 2.4e-7 / kSums;
  const double square = static_cast<double>(step) * step;
  const double lead_square = square * up * up * first.code_total();
  const double tail = second.square_total();
  terms->s = step;
  terms->r = static_cast<float>(sqrt(tail));
  terms->e1 = static_cast<float>(sqrt(first.error_total()) * slack + sqrt(tail) * (slack - 1) + rounding);
  terms->sq1 = static_cast<float>(lead_square + static_cast<double>(terms->r) * terms->r);
  terms->e2 = static_cast<float>(sqrt(first.error_total() + second.error_total()) * slack + rounding);
  terms->sq2 = static_cast<float>(lead_square + square * second.code_total());
}

const Kernels kTable = {V::kStripRows, V::kTilePanels, V::kLevels, scan, dot, pack, encode};

}  // namespace
}  // namespace diffmem::vector_scan
