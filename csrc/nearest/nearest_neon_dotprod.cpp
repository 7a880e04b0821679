// Instance of the search's inner loops for ARM processors with products of bytes (UDOT); compiles to nothing without
// the instructions.
#include "cpu/simd.h"
#include "nearest/nearest.h"

#ifdef DIFFMEM_NEON_DOTPROD

#include "nearest/nearest_neon.h"
//
#include "nearest/nearest_simd.h"

namespace diffmem::nearest {
const Kernels* neon_dotprod_kernels() { return &kTable; }
}  // namespace diffmem::nearest

#else

namespace diffmem::nearest {
const Kernels* neon_dotprod_kernels() { return nullptr; }
}  // namespace diffmem::nearest

#endif
