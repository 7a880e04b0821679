// The Python face of the compiled core: diffmem._C. The only file that includes pybind11.
//
// Arrays come in as addresses (integers) with sizes and strides; the Python side checks them and owns the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/features.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of diffmem; use it through diffmem.ops and diffmem.search.";

  m.def(
      "cpu_level", [] { return std::string(diffmem::cpu::name(diffmem::cpu::level())); },
      "Instruction set in use: portable, avx2 or avx512 (DIFFMEM_CPU lowers it).");
  m.def("cpu_features", &diffmem::cpu::features, "Relevant processor features found.");
#ifdef DIFFMEM_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
