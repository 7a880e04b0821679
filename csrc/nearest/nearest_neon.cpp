// NEON instance of the search's inner loops; compiles to nothing without the instructions.
#include "cpu/simd.h"
#include "nearest/nearest.h"

#ifdef DIFFMEM_NEON

#include "nearest/nearest_neon.h"
//
#include "nearest/nearest_simd.h"

namespace diffmem::nearest {
const Kernels* neon_kernels() { return &kTable; }
}  // namespace diffmem::nearest

#else

namespace diffmem::nearest {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace diffmem::nearest

#endif
