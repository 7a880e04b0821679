// Which instruction sets the kernels may use on this processor, and the one way in which an op picks its kernels.
//
// An op's header has a table of functions, `Kernels`; each of its files <op>_<set>.cpp, as far as it has them, fills
// one (csrc/README.md). The op calls `cpu::best` once per call: the table of the best level that the processor and the
// operating system support and that this build contains, lowered by DIFFMEM_CPU=<name of a level>.
#pragma once

#include <string>
#include <vector>

namespace diffmem::cpu {

// avx2 means AVX2, FMA and BMI2; avx512 besides F, BW, VL, DQ and VNNI; neon what every 64-bit ARM processor has;
// neon_dotprod besides its products of bytes: what CMakeLists.txt compiles their files with.
enum class Level { portable, avx2, avx512, neon, neon_dotprod };

std::vector<Level> levels();  // what the processor and the operating system can run, lowest first: portable, …
Level level();                // what is used: the last of them, lowered by DIFFMEM_CPU; throws std::invalid_argument
                              // for an unknown name or for a level that the processor lacks
const char* name(Level level);
std::vector<std::string> features();  // the relevant features found, for `diffmem info`

// An op's tables; null where it has none, or where this build lacks the instructions.
template <class Kernels>
struct Tables {
  const Kernels* portable = nullptr;
  const Kernels* avx2 = nullptr;
  const Kernels* avx512 = nullptr;
  const Kernels* neon = nullptr;
  const Kernels* neon_dotprod = nullptr;
};

// The table of the highest level up to `level()` for which there is one; null where there is none.
template <class Kernels>
const Kernels* best(const Tables<Kernels>& tables) {
  const Level highest = level();
  if (highest == Level::avx512 && tables.avx512 != nullptr) return tables.avx512;
  if ((highest == Level::avx512 || highest == Level::avx2) && tables.avx2 != nullptr) return tables.avx2;
  if (highest == Level::neon_dotprod && tables.neon_dotprod != nullptr) return tables.neon_dotprod;
  if ((highest == Level::neon_dotprod || highest == Level::neon) && tables.neon != nullptr) return tables.neon;
  return tables.portable;
}

}  // namespace diffmem::cpu
