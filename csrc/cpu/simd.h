// For the files that are compiled for one instruction set, in place of the standard library's templates: their
// instances are one for the whole program, and the linker could hand that of a newer instruction set to an older
// processor. So everything here is in an anonymous namespace, and these files use nothing of the standard library but
// types and C functions (tests/csrc/test_sanitizers.py looks at their symbols).
#pragma once

#include <cstdint>

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

}  // namespace
}  // namespace diffmem::simd
