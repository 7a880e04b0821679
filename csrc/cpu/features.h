// Which instruction sets the kernels may use on this processor, and the one way in which an op picks its kernels.
//
// An op's header has a table of functions, `Kernels`; each of its files <op>_portable.cpp, <op>_avx2.cpp and
// <op>_avx512.cpp, as far as it has them, fills one (csrc/README.md). The op calls `cpu::best` once per call: the table
// of the best level that the processor and the operating system support and that this build contains, lowered by
// DIFFMEM_CPU=portable|avx2|avx512.
#pragma once

#include <string>
#include <vector>

namespace diffmem::cpu {

// avx2 means AVX2, FMA and BMI2; avx512 besides F, BW, VL, DQ and VNNI: what CMakeLists.txt compiles their files with.
enum class Level : int { portable = 0, avx2 = 1, avx512 = 2 };

Level supported();  // what the processor and the operating system can run
Level level();      // what is used: `supported()`, lowered by DIFFMEM_CPU; throws std::invalid_argument
                    // for an unknown name or for a level that the processor lacks
const char* name(Level level);
std::vector<std::string> features();  // the relevant features found, for `diffmem info`

// The table of the highest level up to `level()` for which there is one; null where there is none.
template <class Kernels>
const Kernels* best(const Kernels* portable, const Kernels* avx2, const Kernels* avx512) {
  const Level highest = level();
  if (highest >= Level::avx512 && avx512 != nullptr) return avx512;
  if (highest >= Level::avx2 && avx2 != nullptr) return avx2;
  return portable;
}

}  // namespace diffmem::cpu
