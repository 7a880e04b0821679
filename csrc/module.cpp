// The Python face of the compiled core: diffmem._C. The only file that includes pybind11.
//
// Arrays come in as addresses (integers) with sizes and strides; the Python side checks them and owns the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "cpu/features.h"
#include "nearest/nearest.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// diffmem::nearest: exact nearest rows (nearest.h says what each array holds).
void bind_nearest(py::module_& m) {
  namespace nearest = diffmem::nearest;
  using Address = std::uintptr_t;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();

  py::enum_<nearest::Type>(m, "NearestType")
      .value("u8", nearest::Type::u8)
      .value("f32", nearest::Type::f32)
      .value("f64", nearest::Type::f64);
  py::class_<nearest::Rows>(m, "NearestRows")
      .def(py::init([](Address data, std::int64_t count, std::int64_t stride, std::int64_t d, nearest::Type type) {
             return nearest::Rows{at<const void>(data), count, stride, d, type};
           }),
           py::arg("data"), py::arg("count"), py::arg("stride"), py::arg("d"), py::arg("type"));
  py::class_<nearest::Code>(m, "NearestCode")
      .def(py::init([](Address coarse, Address fine, Address sq, Address error) {
             return nearest::Code{at<std::int16_t>(coarse), at<std::int16_t>(fine), at<std::int32_t>(sq),
                                  at<float>(error)};
           }),
           py::arg("coarse"), py::arg("fine"), py::arg("sq"), py::arg("error"));
  py::class_<nearest::Basis>(m, "NearestBasis")
      .def(py::init([](int steps, int levels, Address p, Address shift, Address mean, double factor, double scale) {
             return nearest::Basis{{steps, levels},          at<const std::int16_t>(p),   at<const std::int64_t>(shift),
                                   at<const std::uint8_t>(mean), factor,                      scale};
           }),
           py::arg("steps"), py::arg("levels"), py::arg("p"), py::arg("shift"), py::arg("mean"), py::arg("factor"),
           py::arg("scale"));
  py::class_<nearest::Index>(m, "NearestIndex")
      .def(py::init([](const nearest::Rows& rows, int steps, int levels, Address panels, Address bias, Address fine,
                       Address order, Address error, double scale, int clusters, Address centroids,
                       Address centroid_bias, Address starts) {
             nearest::Index index;
             index.rows = rows;
             index.shape = {steps, levels};
             index.panels = at<const std::int16_t>(panels);
             index.bias = at<const std::int32_t>(bias);
             index.fine = at<const std::int16_t>(fine);
             index.order = at<const std::int64_t>(order);
             index.error = at<const float>(error);
             index.scale = scale;
             index.clusters = clusters;
             index.centroids = at<const std::int16_t>(centroids);
             index.centroid_bias = at<const std::int32_t>(centroid_bias);
             index.starts = at<const std::int64_t>(starts);
             return index;
           }),
           py::arg("rows"), py::arg("steps"), py::arg("levels"), py::arg("panels"), py::arg("bias"), py::arg("fine"),
           py::arg("order"), py::arg("error"), py::arg("scale"), py::arg("clusters"), py::arg("centroids"),
           py::arg("centroid_bias"), py::arg("starts"));
  py::class_<nearest::Work>(m, "NearestWork")
      .def_readonly("bounded", &nearest::Work::bounded)
      .def_readonly("fine", &nearest::Work::fine)
      .def_readonly("refined", &nearest::Work::refined)
      .def_readonly("seed_seconds", &nearest::Work::seed_seconds)
      .def_readonly("scan_seconds", &nearest::Work::scan_seconds)
      .def_readonly("gave_up", &nearest::Work::gave_up);

  m.def("nearest_encode_bytes", &nearest::encode_bytes, unlocked, py::arg("rows"), py::arg("basis"),
        py::arg("queries"), py::arg("code"), py::arg("threads"), "Codes of uint8 rows.");
  m.def(
      "nearest_encode_coordinates",
      [](Address coordinates, Address squared_norms, std::int64_t count, int steps, int levels, double scale,
         bool queries, const nearest::Code& code, int threads) {
        nearest::encode_coordinates(at<const double>(coordinates), at<const double>(squared_norms), count,
                                    {steps, levels}, scale, queries, code, threads);
      },
      unlocked, py::arg("coordinates"), py::arg("squared_norms"), py::arg("count"), py::arg("steps"),
      py::arg("levels"), py::arg("scale"), py::arg("queries"), py::arg("code"), py::arg("threads"),
      "Codes of float rows, from their float64 coordinates.");
  m.def(
      "nearest_search_filtered",
      [](const nearest::Index& index, const nearest::Rows& queries, const nearest::Code& code, int k,
         double allowance, Address distances, Address indices, int threads) {
        const nearest::Answer answer{at<std::int64_t>(distances), at<double>(distances), at<std::int64_t>(indices)};
        return nearest::search_filtered(index, queries, code, k, allowance, answer, threads);
      },
      unlocked, py::arg("index"), py::arg("queries"), py::arg("code"), py::arg("k"), py::arg("allowance"),
      py::arg("distances"), py::arg("indices"), py::arg("threads"), "Exact k nearest rows by bounds.");
  m.def(
      "nearest_search_dense",
      [](const nearest::Rows& rows, const nearest::Rows& queries, int k, Address distances, Address indices,
         int threads) {
        const nearest::Answer answer{at<std::int64_t>(distances), at<double>(distances), at<std::int64_t>(indices)};
        nearest::search_dense(rows, queries, k, answer, threads);
      },
      unlocked, py::arg("rows"), py::arg("queries"), py::arg("k"), py::arg("distances"), py::arg("indices"),
      py::arg("threads"), "Exact k nearest rows by all pairs.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of diffmem; use it through diffmem.ops and diffmem.search.";

  m.def(
      "cpu_level", [] { return std::string(diffmem::cpu::name(diffmem::cpu::level())); },
      "Instruction set in use: portable, avx2 or avx512 (DIFFMEM_CPU lowers it).");
  m.def("cpu_features", &diffmem::cpu::features, "Relevant processor features found.");
  bind_nearest(m);
#ifdef DIFFMEM_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
