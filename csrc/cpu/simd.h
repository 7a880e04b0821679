// For the files that are compiled for one instruction set, in place of the standard library's templates: their
// instances are one for the whole program, and the linker could hand that of a newer instruction set to an older
// processor. So everything here is in an anonymous namespace, and these files use nothing of the standard library but
// types and C functions (tests/csrc/test_sanitizers.py looks at their symbols).
#pragma once

#include <cstdint>

// What the file that includes this is compiled for. MSVC has no macros for FMA, BMI2, VNNI and the products of bytes:
// it compiles every instruction that it is asked for, and CMakeLists.txt asks in the files of a set only.
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#if defined(__AVX2__)
#define DIFFMEM_AVX2 1
#endif
#if defined(__AVX512F__)
#define DIFFMEM_AVX512 1
#endif
#if defined(_M_ARM64)
#define DIFFMEM_NEON 1
#define DIFFMEM_NEON_DOTPROD 1
#endif
#else
#if defined(__AVX2__) && defined(__FMA__) && defined(__BMI2__)
#define DIFFMEM_AVX2 1
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512VNNI__)
#define DIFFMEM_AVX512 1
#endif
#if defined(__aarch64__) && defined(__ARM_NEON)
#define DIFFMEM_NEON 1
#endif
#if defined(DIFFMEM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define DIFFMEM_NEON_DOTPROD 1
#endif
#endif

namespace diffmem::simd {
namespace {

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

template <class T>
constexpr T divide_up(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
inline void fill(T* to, std::int64_t count, T value) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = value;
}

template <class T>
inline void copy(const T* from, std::int64_t count, T* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
}

#if defined(_MSC_VER) && !defined(__clang__)
inline int trailing_zeros(std::uint32_t bits) {  // of bits that are not all 0
  unsigned long place;
  _BitScanForward(&place, bits);
  return static_cast<int>(place);
}
inline void prefetch(const void* p) {
#if defined(_M_ARM64)
  __prefetch(p);
#else
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
#endif
}
#else
inline int trailing_zeros(std::uint32_t bits) { return __builtin_ctz(bits); }
inline void prefetch(const void* p) { __builtin_prefetch(p); }
#endif

// Makes the compiler forget what it knows of a number.
#if defined(__GNUC__)
inline void hide(std::int64_t& number) { asm("" : "+r"(number)); }
#else
inline void hide(std::int64_t&) {}
#endif

inline int count_bits(std::uint32_t bits) {  // compilers know this one
  bits -= bits >> 1 & 0x55555555u;
  bits = (bits & 0x33333333u) + (bits >> 2 & 0x33333333u);
  return static_cast<int>(((bits + (bits >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}

}  // namespace
}  // namespace diffmem::simd
