// The loops of posterior_mean.h with AVX-512/VNNI and with AVX2; elsewhere there are none, and `available` says so.
//
// Both products keep a tile of sums in registers, with AVX-512 4 vectors of 16 columns by 6 rows: 24 sums, 4 + 1
// registers for the operands. A step (4 bytes of K) is 24 multiply-adds and 10 loads. scores() broadcasts 4 bytes of a
// row and holds the columns in panels; a block of rows stays in the cache while all columns pass by. weighted_sums()
// broadcasts the weights of 4 images and holds 64 pixels of 4 images interleaved, packed once for all columns. With
// AVX2 it is 2 vectors of 8 columns by 6 rows of 16-bit numbers, two of K at a time.
//
// Measured on one core of an AMD EPYC (Zen 4, 2.6 GHz, float32 peak 116 Gop/s, 8-bit peak 462): the tile loop runs at
// 415–425 Gop/s; 5x5, 9x3 and 12x2 tiles at 380–425; with rows straight from memory instead of blocks that stay in the
// cache 140–220. Cutting K to keep the panel in the first-level cache gained nothing.
//
// The instructions are turned on for the functions of this file only, after all headers: what is instantiated from
// those (std::vector, the sharing of work) may be linked into code for older processors.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu/aligned.h"
#include "cpu/features.h"
#include "cpu/share.h"
#include "posterior_mean/posterior_mean.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

namespace diffmem::posterior_mean {

namespace {

using cpu::share;

constexpr std::int64_t kRowBlock = 48;     // rows that stay in the cache while the columns pass by
constexpr std::int64_t kImageChunk = 512;  // images packed at a time in weighted_sums
constexpr std::int64_t kPixelBlock = 256;  // pixels packed at a time
constexpr std::int64_t kStrip = 512;       // rows of scores per work item

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int32_t four_bytes(const void* p) {
  std::int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return bytes;
}

struct ScoreRow {
  std::int64_t columns;
  const float* half_norms;
  const float* weight;
  float* out;
};

// Scratch memory of one thread; shared, so that the worker that holds it can be copied.
template <class T>
std::shared_ptr<cpu::Aligned<T>> aligned(std::int64_t count) {
  return std::make_shared<cpu::Aligned<T>>(static_cast<std::size_t>(count));
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
#endif
namespace avx512 {
namespace {
#include "posterior_mean/avx512.inc"
#include "posterior_mean/loops.inc"
}  // namespace
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
namespace {
#include "posterior_mean/avx2.inc"
#include "posterior_mean/loops.inc"
}  // namespace
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

bool available() { return cpu::level() >= cpu::Level::avx2; }

#define DIFFMEM_BEST(function) (cpu::level() >= cpu::Level::avx512 ? avx512::function : avx2::function)

void scores(const std::vector<Term>& terms, std::int64_t n, std::int64_t columns, const float* half_norms,
            const float* weight, bool add, float* out, int threads) {
  DIFFMEM_BEST(scores)(terms, n, columns, half_norms, weight, add, out, threads);
}

void column_top(const float* scores, std::int64_t n, std::int64_t columns, float* top, std::int64_t* where,
                int threads) {
  DIFFMEM_BEST(column_top)(scores, n, columns, top, where, threads);
}

void column_mass(const float* scores, std::int64_t n, std::int64_t columns, const float* top, double* mass,
                 int threads) {
  DIFFMEM_BEST(column_mass)(scores, n, columns, top, mass, threads);
}

Pairs select(const float* scores, std::int64_t n, std::int64_t columns, const float* threshold, const float* reach,
             const float* slack, std::int64_t limit, int threads) {
  return DIFFMEM_BEST(select)(scores, n, columns, threshold, reach, slack, limit, threads);
}

void pair_logits(const ByteRows& rows, const double* queries, const double* half_norms, const double* weight,
                 const std::int64_t* starts, const std::int32_t* images, std::int64_t columns, double* out,
                 int threads) {
  DIFFMEM_BEST(pair_logits)(rows, queries, half_norms, weight, starts, images, columns, out, threads);
}

void pair_sums(const ByteRows& rows, const double* weights, const std::int64_t* starts, const std::int32_t* images,
               std::int64_t columns, double* out, int threads) {
  DIFFMEM_BEST(pair_sums)(rows, weights, starts, images, columns, out, threads);
}

void round_weights(const float* scores, std::int64_t n, std::int64_t columns, const float* limit,
                   const std::int32_t* chosen, std::int64_t count, std::uint8_t* high, std::uint8_t* low,
                   std::int64_t* sum, std::int64_t* high_sum, int threads) {
  DIFFMEM_BEST(round_weights)(scores, n, columns, limit, chosen, count, high, low, sum, high_sum, threads);
}

void weighted_sums(const std::uint8_t* rows, std::int64_t stride, std::int64_t k, std::int64_t n,
                   const std::uint8_t* weights, std::int64_t count, std::int32_t* out, int threads) {
  DIFFMEM_BEST(weighted_sums)(rows, stride, k, n, weights, count, out, threads);
}

}  // namespace diffmem::posterior_mean

#else

namespace diffmem::posterior_mean {

bool available() { return false; }
void scores(const std::vector<Term>&, std::int64_t, std::int64_t, const float*, const float*, bool, float*, int) {}
void column_top(const float*, std::int64_t, std::int64_t, float*, std::int64_t*, int) {}
void column_mass(const float*, std::int64_t, std::int64_t, const float*, double*, int) {}
Pairs select(const float*, std::int64_t, std::int64_t, const float*, const float*, const float*, std::int64_t, int) {
  return {};
}
void pair_logits(const ByteRows&, const double*, const double*, const double*, const std::int64_t*, const std::int32_t*,
                 std::int64_t, double*, int) {}
void pair_sums(const ByteRows&, const double*, const std::int64_t*, const std::int32_t*, std::int64_t, double*, int) {}
void round_weights(const float*, std::int64_t, std::int64_t, const float*, const std::int32_t*, std::int64_t,
                   std::uint8_t*, std::uint8_t*, std::int64_t*, std::int64_t*, int) {}
void weighted_sums(const std::uint8_t*, std::int64_t, std::int64_t, std::int64_t, const std::uint8_t*, std::int64_t,
                   std::int32_t*, int) {}

}  // namespace diffmem::posterior_mean

#endif
