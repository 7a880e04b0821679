// The Python face of the compiled core: diffmem._C. The only file that includes pybind11.
//
// Arrays come in as addresses (integers) with sizes and strides; the Python side checks them and owns the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/features.h"
#ifdef DIFFMEM_WITH_CUDA
#include "nearest/nearest_cuda.h"
#endif

namespace py = pybind11;

#ifdef DIFFMEM_WITH_CUDA
namespace {

// Addresses arrive as integers; 0 is a null pointer.
template <class Type>
Type* at(std::uintptr_t address) {
  return reinterpret_cast<Type*>(address);
}

void bind_nearest_cuda(py::module_& m) {
  namespace cuda = diffmem::nearest::cuda;
  using std::int64_t;
  using Address = std::uintptr_t;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  const auto check = [](int code) {
    if (code != cuda::kOk) throw std::runtime_error(std::string("nearest (CUDA): ") + cuda::error_string(code));
  };

  m.attr("nearest_cuda_max_neighbors") = cuda::kMaxNeighbors;
  m.def("nearest_cuda_centred_row", &cuda::centred_row, py::arg("d"), "Bytes of one centred image of d values.");
  m.def(
      "nearest_cuda_centre",
      [check](Address images, int64_t n, int64_t d, Address centred, Address norms, Address stream) {
        check(cuda::centre(at<const std::uint8_t>(images), n, d, at<std::int8_t>(centred), at<int64_t>(norms),
                           at<void>(stream)));
      },
      py::arg("images"), py::arg("n"), py::arg("d"), py::arg("centred"), py::arg("norms"), py::arg("stream"),
      Unlocked(), "uint8 [n, d] -> int8 [n, centred_row(d)] and int64 norms [n]; see nearest_cuda.h.");
  m.def(
      "nearest_cuda_search_workspace",
      [check](int64_t queries, int64_t n, int64_t d, int k) {
        int64_t bytes = 0;
        check(cuda::search_workspace(queries, n, d, k, &bytes));
        return bytes;
      },
      py::arg("queries"), py::arg("n"), py::arg("d"), py::arg("k"), Unlocked(),
      "Bytes of workspace that nearest_cuda_search needs on the current device.");
  m.def(
      "nearest_cuda_search",
      [check](Address query_images, Address query_norms, int64_t queries, Address training_images,
              Address training_norms, int64_t n, int64_t d, int k, Address workspace, int64_t workspace_bytes,
              Address indices, Address squared_distances, Address stream) {
        check(cuda::search(at<const std::int8_t>(query_images), at<const int64_t>(query_norms), queries,
                           at<const std::int8_t>(training_images), at<const int64_t>(training_norms), n, d, k,
                           at<void>(workspace), workspace_bytes, at<int64_t>(indices), at<int64_t>(squared_distances),
                           at<void>(stream)));
      },
      py::arg("query_images"), py::arg("query_norms"), py::arg("queries"), py::arg("training_images"),
      py::arg("training_norms"), py::arg("n"), py::arg("d"), py::arg("k"), py::arg("workspace"),
      py::arg("workspace_bytes"), py::arg("indices"), py::arg("squared_distances"), py::arg("stream"), Unlocked(),
      "Brute force on int8 tensor cores; see nearest_cuda.h.");
  m.def(
      "nearest_cuda_refine",
      [check](Address query_images, int64_t queries, Address training_images, int64_t n, int64_t d, Address candidates,
              Address offsets, int k, Address indices, Address squared_distances, Address stream) {
        check(cuda::refine(at<const std::uint8_t>(query_images), queries, at<const std::uint8_t>(training_images), n, d,
                           at<const int64_t>(candidates), at<const int64_t>(offsets), k, at<int64_t>(indices),
                           at<int64_t>(squared_distances), at<void>(stream)));
      },
      py::arg("query_images"), py::arg("queries"), py::arg("training_images"), py::arg("n"), py::arg("d"),
      py::arg("candidates"), py::arg("offsets"), py::arg("k"), py::arg("indices"), py::arg("squared_distances"),
      py::arg("stream"), Unlocked(), "Exact distances of listed pairs; see nearest_cuda.h.");
}

}  // namespace
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of diffmem; use it through diffmem.ops and diffmem.search.";

  m.def(
      "cpu_level", [] { return std::string(diffmem::cpu::name(diffmem::cpu::level())); },
      "Instruction set in use: portable, avx2 or avx512 (DIFFMEM_CPU lowers it).");
  m.def("cpu_features", &diffmem::cpu::features, "Relevant processor features found.");
#ifdef DIFFMEM_WITH_CUDA
  m.attr("with_cuda") = true;
  bind_nearest_cuda(m);
#else
  m.attr("with_cuda") = false;
#endif
}
