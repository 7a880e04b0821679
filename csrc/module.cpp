// The Python face of the compiled core: diffmem._C. The only file that includes pybind11.
//
// Arrays come in as addresses (integers) with sizes and strides; the Python side checks them and owns the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "conv3x3/conv3x3.h"
#include "cpu/features.h"

namespace py = pybind11;

namespace {

// diffmem::conv3x3: Winograd convolution (conv3x3.h says what each array holds).
void bind_conv3x3(py::module_& m) {
  namespace conv3x3 = diffmem::conv3x3;
  using Address = std::uintptr_t;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();

  m.def("conv3x3_available", &conv3x3::available, "Whether this processor and build have the Winograd convolution.");
  m.def("conv3x3_packed_size", &conv3x3::packed_size, py::arg("channels"), py::arg("outputs"));
  m.def(
      "conv3x3_pack",
      [](Address weight, std::array<std::int64_t, 4> strides, std::int64_t channels, std::int64_t outputs,
         Address packed, int threads) {
        conv3x3::pack(reinterpret_cast<const float*>(weight), strides.data(), channels, outputs,
                      reinterpret_cast<float*>(packed), threads);
      },
      unlocked, py::arg("weight"), py::arg("strides"), py::arg("channels"), py::arg("outputs"), py::arg("packed"),
      py::arg("threads"), "Transforms weights.");
  m.def(
      "conv3x3_forward",
      [](std::array<std::int64_t, 5> shape, Address x, Address packed, Address bias, Address y, int threads) {
        conv3x3::forward({shape[0], shape[1], shape[2], shape[3], shape[4]}, reinterpret_cast<const float*>(x),
                         reinterpret_cast<const float*>(packed), reinterpret_cast<const float*>(bias),
                         reinterpret_cast<float*>(y), threads);
      },
      unlocked, py::arg("shape"), py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("y"), py::arg("threads"),
      "Convolves.");
  m.def(
      "conv3x3_weight_sums",
      [](std::array<std::int64_t, 5> shape, Address x, Address y_gradient, std::int64_t splits, Address sums,
         int threads) {
        conv3x3::weight_sums({shape[0], shape[1], shape[2], shape[3], shape[4]}, reinterpret_cast<const float*>(x),
                             reinterpret_cast<const float*>(y_gradient), splits, reinterpret_cast<float*>(sums),
                             threads);
      },
      unlocked, py::arg("shape"), py::arg("x"), py::arg("y_gradient"), py::arg("splits"), py::arg("sums"),
      py::arg("threads"), "The weights' gradient in the transformed domain.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of diffmem; use it through diffmem.ops and diffmem.search.";

  m.def(
      "cpu_level", [] { return std::string(diffmem::cpu::name(diffmem::cpu::level())); },
      "Instruction set in use: portable, avx2 or avx512 (DIFFMEM_CPU lowers it).");
  m.def("cpu_features", &diffmem::cpu::features, "Relevant processor features found.");
  bind_conv3x3(m);
#ifdef DIFFMEM_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
