// Which instruction sets the kernels may use on this processor.
//
// Every op with more than one CPU path asks `cpu::level()` once per call. The level is the best one that the processor
// and the operating system support and that this build contains, lowered by DIFFMEM_CPU=portable|avx2|avx512.
#pragma once

#include <string>
#include <vector>

namespace diffmem::cpu {

enum class Level : int { portable = 0, avx2 = 1, avx512 = 2 };  // avx512 means F, BW, VL, DQ and VNNI together

Level supported();  // what the processor and the operating system can run
Level level();      // what is used: `supported()`, lowered by DIFFMEM_CPU; throws std::invalid_argument
                    // for an unknown name or for a level that the processor lacks
const char* name(Level level);
std::vector<std::string> features();  // the relevant features found, for `diffmem info`

}  // namespace diffmem::cpu
