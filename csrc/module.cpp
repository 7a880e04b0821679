// The Python face of the compiled core: diffmem._C. The only file that includes pybind11.
//
// Arrays come in as addresses (integers) with sizes and strides; the Python side checks them and owns the memory. What
// can be told from the numbers alone is checked here: ValueError, before anything is read.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "affine_alignment/affine_alignment.h"
#include "alignment/alignment.h"
#include "conv3x3/conv3x3.h"
#include "cpu/features.h"
#include "group_norm_silu/group_norm_silu.h"
#include "nearest/nearest.h"
#include "posterior_mean/posterior_mean.h"
#include "tile_max/tile_max.h"
#include "vector_scan/vector_scan.h"
#ifdef DIFFMEM_WITH_CUDA
#include "nearest/nearest_cuda.h"
#endif

namespace py = pybind11;

namespace {

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// Every size at least 1, and no product of them beyond what an address can reach.
template <class Sizes>
void require_sizes(const Sizes& sizes, const char* what) {
  double product = 8;
  for (const std::int64_t size : sizes) {
    require(size >= 1, what);
    product *= static_cast<double>(size);
  }
  require(product < 9e18, what);
}

void require_threads(int threads) { require(threads >= 1, "threads must be at least 1"); }

template <class... Address>
void require_addresses(Address... addresses) {
  require(((addresses != 0) && ...), "an address is null");
}

// diffmem::conv3x3: Winograd convolution (conv3x3.h says what each array holds).
void bind_conv3x3(py::module_& m) {
  namespace conv3x3 = diffmem::conv3x3;
  using Address = std::uintptr_t;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();

  m.def("conv3x3_available", &conv3x3::available, "Whether this processor and build have the Winograd convolution.");
  static const auto check = [](std::int64_t channels, std::int64_t outputs) {
    require_sizes(std::array<std::int64_t, 2>{channels, outputs}, "conv3x3: channels and outputs must be at least 1");
    require(channels % 8 == 0 && outputs % 16 == 0, "conv3x3: channels in multiples of 8 and outputs of 16 are needed");
    require(conv3x3::available(), "conv3x3: this processor or build has no AVX2 or NEON");
  };
  static const auto check_shape = [](const std::array<std::int64_t, 5>& shape, int threads) {
    require_sizes(shape, "conv3x3: shape must hold sizes of at least 1");
    check(shape[3], shape[4]);
    require_threads(threads);
  };
  m.def(
      "conv3x3_packed_size",
      [](std::array<std::int64_t, 5> shape) {
        check_shape(shape, 1);
        return conv3x3::packed_size({shape[0], shape[1], shape[2], shape[3], shape[4]});
      },
      py::arg("shape"));
  m.def(
      "conv3x3_pack",
      [](std::array<std::int64_t, 5> shape, Address weight, std::array<std::int64_t, 4> strides, Address packed,
         int threads) {
        check_shape(shape, threads);
        require_addresses(weight, packed);
        conv3x3::pack({shape[0], shape[1], shape[2], shape[3], shape[4]}, reinterpret_cast<const float*>(weight),
                      strides.data(), reinterpret_cast<float*>(packed), threads);
      },
      unlocked, py::arg("shape"), py::arg("weight"), py::arg("strides"), py::arg("packed"), py::arg("threads"),
      "Transforms weights.");
  m.def(
      "conv3x3_forward",
      [](std::array<std::int64_t, 5> shape, Address x, Address packed, Address bias, Address residual, float scale,
         Address y, int threads) {
        check_shape(shape, threads);
        require_addresses(x, packed, y);
        const conv3x3::Epilogue epilogue = {reinterpret_cast<const float*>(bias),
                                            reinterpret_cast<const float*>(residual), scale};
        conv3x3::forward({shape[0], shape[1], shape[2], shape[3], shape[4]}, reinterpret_cast<const float*>(x),
                         reinterpret_cast<const float*>(packed), epilogue, reinterpret_cast<float*>(y), threads);
      },
      unlocked, py::arg("shape"), py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("residual"),
      py::arg("scale"), py::arg("y"), py::arg("threads"), "Convolves.");
  m.def(
      "conv3x3_weight_gradient",
      [](std::array<std::int64_t, 5> shape, Address x, Address y_gradient, Address gradient,
         std::array<std::int64_t, 4> strides, int threads) {
        check_shape(shape, threads);
        require_addresses(x, y_gradient, gradient);
        conv3x3::weight_gradient({shape[0], shape[1], shape[2], shape[3], shape[4]}, reinterpret_cast<const float*>(x),
                                 reinterpret_cast<const float*>(y_gradient), reinterpret_cast<float*>(gradient),
                                 strides.data(), threads);
      },
      unlocked, py::arg("shape"), py::arg("x"), py::arg("y_gradient"), py::arg("gradient"), py::arg("strides"),
      py::arg("threads"), "The weights' gradient.");
}

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// diffmem::affine_alignment: maps of pairs (affine_alignment.h says what each array holds).
void bind_affine_alignment(py::module_& m) {
  namespace affine_alignment = diffmem::affine_alignment;
  using Address = std::uintptr_t;
  m.def(
      "affine_alignment",
      [](std::array<std::int64_t, 6> sizes, Address images, Address templates, Address start, int iterations,
         Address remainders, Address maps, int threads) {
        require_sizes(sizes, "affine_alignment: shape must hold sizes of at least 1");
        require(iterations >= 0, "affine_alignment: iterations must be at least 0");
        require_threads(threads);
        require_addresses(images, templates, start, remainders, maps);
        affine_alignment::align({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]}, at<const float>(images),
                                at<const float>(templates), at<const float>(start), iterations, at<float>(remainders),
                                at<float>(maps), threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("shape"), py::arg("images"), py::arg("templates"),
      py::arg("start"), py::arg("iterations"), py::arg("remainders"), py::arg("maps"), py::arg("threads"),
      "The best affine map of each pair; shape: pairs, channels, height, width, h, w.");
}

// diffmem::alignment: best correlations (alignment.h says what each array holds).
void bind_alignment(py::module_& m) {
  namespace alignment = diffmem::alignment;
  using Address = std::uintptr_t;
  m.def("alignment_available", &alignment::available, "Whether this processor and build have it.");
  m.def(
      "alignment",
      [](std::array<std::int64_t, 8> sizes, Address searched, Address templates, Address correlations,
         Address positions, int threads) {
        require_sizes(sizes, "alignment: shape must hold sizes of at least 1");
        const alignment::Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
        require(shape.h <= shape.height && shape.w <= shape.width,
                "alignment: templates must fit into what is searched");
        require(shape.down() * shape.across() <= (std::int64_t{1} << 31) / shape.variants - 1,
                "alignment: a query must have fewer than 2^31 windows");
        require(alignment::available(), "alignment: this processor or build has no AVX2 or NEON");
        require_threads(threads);
        require_addresses(searched, templates, correlations, positions);
        alignment::align(shape, at<const float>(searched), at<const float>(templates), at<float>(correlations),
                         at<std::int64_t>(positions), threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("shape"), py::arg("searched"), py::arg("templates"),
      py::arg("correlations"), py::arg("positions"), py::arg("threads"),
      "The best correlation of each template, and where; shape: queries, variants, channels, height, width, count, h, "
      "w.");
  m.def(
      "alignment_variants",
      [](std::array<std::int64_t, 5> sizes, Address images, std::array<Address, 3> down, std::array<Address, 3> across,
         Address variants, int threads) {
        require_sizes(sizes, "alignment_variants: shape must hold sizes of at least 1");
        require(sizes[2] > 1 && sizes[3] > 1, "alignment_variants: images must have at least two lines and columns");
        require(alignment::available(), "alignment_variants: this processor or build has neither AVX2 nor NEON");
        require_threads(threads);
        require_addresses(images, down[0], down[1], down[2], across[0], across[1], across[2], variants);
        const auto lines = [](const std::array<Address, 3>& of) {
          return alignment::Resampling{at<const std::int32_t>(of[0]), at<const float>(of[1]), at<const float>(of[2])};
        };
        alignment::make_variants({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], lines(down), lines(across)},
                                 at<const float>(images), at<float>(variants), threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("shape"), py::arg("images"), py::arg("down"), py::arg("across"),
      py::arg("variants"), py::arg("threads"),
      "Images and their mirror images, enlarged by linear interpolation; shape: images, channels, height, width, "
      "scales; down, across: the line or column below each place (int32), its weight and that of the next (float32).");
  m.def(
      "pool_bytes",
      [](std::array<std::int64_t, 5> sizes, std::int64_t held, Address images, Address rows, Address pooled,
         int threads) {
        require_sizes(sizes, "pool_bytes: shape must hold sizes of at least 1");
        require(sizes[2] % sizes[4] == 0 && sizes[3] % sizes[4] == 0, "pool_bytes: factor must divide both sides");
        require_threads(threads);
        require_addresses(images, rows, pooled);
        const auto* const wanted = at<const std::int64_t>(rows);
        for (std::int64_t i = 0; i < sizes[0]; ++i)
          require(wanted[i] >= 0 && wanted[i] < held, "pool_bytes: rows must be of the images");
        alignment::pool({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]}, at<const std::uint8_t>(images), wanted,
                        at<float>(pooled), threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("shape"), py::arg("held"), py::arg("images"), py::arg("rows"),
      py::arg("pooled"), py::arg("threads"),
      "Means of squares of pixels of some of the `held` images; shape: rows, channels, height, width, factor.");
}

// diffmem::group_norm_silu: the normalization of CPUs (group_norm_silu.h says what each array holds).
void bind_group_norm_silu(py::module_& m) {
  namespace op = diffmem::group_norm_silu;
  using Address = std::uintptr_t;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  // weight, bias, scale, shift, added; their strides; 0 for what is not there.
  using Addresses = std::array<Address, 5>;
  using Strides = std::array<std::int64_t, 3>;
  static const auto parameters = [](const Addresses& from, const Strides& strides, float eps, bool silu) {
    return op::Parameters{at<const float>(from[0]),
                          at<const float>(from[1]),
                          at<const float>(from[2]),
                          at<const float>(from[3]),
                          at<const float>(from[4]),
                          strides[0],
                          strides[1],
                          strides[2],
                          eps,
                          silu};
  };

  static const auto check = [](const std::array<std::int64_t, 4>& shape, const Addresses& from, int threads) {
    require_sizes(shape, "group_norm_silu: shape must hold sizes of at least 1");
    const std::int64_t channels = shape[2], groups = shape[3];
    require(
        channels % groups == 0 && channels % 8 == 0 && std::lcm(channels / groups, std::int64_t{8}) <= op::kMaxChannels,
        "group_norm_silu: channels must be a multiple of the groups and of 8, in blocks of at most 1024");
    require((from[2] == 0) == (from[3] == 0), "group_norm_silu: scale and shift go together");
    require(op::available(), "group_norm_silu: this processor or build has no AVX2 or NEON");
    require_threads(threads);
    require_addresses(from[0], from[1]);
  };

  m.def("group_norm_silu_available", &op::available, "Whether this processor and build have it.");
  m.def(
      "group_norm_silu_forward",
      [](std::array<std::int64_t, 4> shape, Addresses from, Strides strides, float eps, bool silu, Address x, Address y,
         Address mean, Address rstd, int threads) {
        check(shape, from, threads);
        require_addresses(x, y, mean, rstd);
        op::forward({shape[0], shape[1], shape[2], shape[3]}, parameters(from, strides, eps, silu), at<const float>(x),
                    at<float>(y), at<double>(mean), at<float>(rstd), threads);
      },
      unlocked, py::arg("shape"), py::arg("parameters"), py::arg("strides"), py::arg("eps"), py::arg("silu"),
      py::arg("x"), py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("threads"), "Normalizes.");
  m.def(
      "group_norm_silu_backward",
      [](std::array<std::int64_t, 4> shape, Addresses from, Strides strides, bool silu, Address dy, Address x,
         Address mean, Address rstd, Address dx, Address sums, int threads) {
        check(shape, from, threads);
        require_addresses(dy, x, mean, rstd, dx, sums);
        op::backward({shape[0], shape[1], shape[2], shape[3]}, parameters(from, strides, 0.0f, silu),
                     at<const float>(dy), at<const float>(x), at<const double>(mean), at<const float>(rstd),
                     at<float>(dx), at<float>(sums), threads);
      },
      unlocked, py::arg("shape"), py::arg("parameters"), py::arg("strides"), py::arg("silu"), py::arg("dy"),
      py::arg("x"), py::arg("mean"), py::arg("rstd"), py::arg("dx"), py::arg("sums"), py::arg("threads"),
      "The gradients.");
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
             require(count >= 0 && stride >= 0 && d >= 1, "nearest: rows need count >= 0, stride >= 0 and d >= 1");
             require(count == 0 || data != 0, "an address is null");
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
             return nearest::Basis{{steps, levels},
                                   at<const std::int16_t>(p),
                                   at<const std::int64_t>(shift),
                                   at<const std::uint8_t>(mean),
                                   factor,
                                   scale};
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

  static const auto check_search = [](const nearest::Rows& rows, const nearest::Rows& queries, int k, Address distances,
                                      Address indices, int threads) {
    require(rows.d == queries.d && rows.type == queries.type, "nearest: rows and queries must have one d and one type");
    require(k >= 1 && k <= rows.count, "nearest: k must be from 1 to the number of rows");
    require_threads(threads);
    if (queries.count > 0) require_addresses(distances, indices);
  };
  static const auto check_code = [](const nearest::CodeShape& shape) {
    require(shape.steps >= 1 && shape.levels >= 0, "nearest: a code has steps >= 1 and levels >= 0");
  };

  m.def(
      "nearest_encode_bytes",
      [](const nearest::Rows& rows, const nearest::Basis& basis, bool queries, const nearest::Code& code, int threads) {
        require(rows.type == nearest::Type::u8, "nearest: rows must be uint8");
        check_code(basis.shape);
        require_threads(threads);
        require_addresses(basis.p, basis.shift, basis.mean);
        if (rows.count > 0) require_addresses(code.coarse, code.sq, code.error);
        nearest::encode_bytes(rows, basis, queries, code, threads);
      },
      unlocked, py::arg("rows"), py::arg("basis"), py::arg("queries"), py::arg("code"), py::arg("threads"),
      "Codes of uint8 rows.");
  m.def(
      "nearest_encode_coordinates",
      [](Address coordinates, Address squared_norms, std::int64_t count, int steps, int levels, double scale,
         bool queries, const nearest::Code& code, int threads) {
        require(count >= 0, "nearest: count must be at least 0");
        check_code({steps, levels});
        require_threads(threads);
        if (count > 0) require_addresses(squared_norms, code.coarse, code.sq, code.error);
        nearest::encode_coordinates(at<const double>(coordinates), at<const double>(squared_norms), count,
                                    {steps, levels}, scale, queries, code, threads);
      },
      unlocked, py::arg("coordinates"), py::arg("squared_norms"), py::arg("count"), py::arg("steps"), py::arg("levels"),
      py::arg("scale"), py::arg("queries"), py::arg("code"), py::arg("threads"),
      "Codes of float rows, from their float64 coordinates.");
  m.def(
      "nearest_search_filtered",
      [](const nearest::Index& index, const nearest::Rows& queries, const nearest::Code& code, int k, double allowance,
         Address distances, Address indices, int threads) {
        check_search(index.rows, queries, k, distances, indices, threads);
        check_code(index.shape);
        require_addresses(index.panels, index.bias, index.order, index.error);
        require(index.clusters >= 0, "nearest: clusters must be at least 0");
        const nearest::Answer answer{at<std::int64_t>(distances), at<double>(distances), at<std::int64_t>(indices)};
        return nearest::search_filtered(index, queries, code, k, allowance, answer, threads);
      },
      unlocked, py::arg("index"), py::arg("queries"), py::arg("code"), py::arg("k"), py::arg("allowance"),
      py::arg("distances"), py::arg("indices"), py::arg("threads"), "Exact k nearest rows by bounds.");
  m.def(
      "nearest_search_dense",
      [](const nearest::Rows& rows, const nearest::Rows& queries, int k, Address distances, Address indices,
         int threads) {
        check_search(rows, queries, k, distances, indices, threads);
        const nearest::Answer answer{at<std::int64_t>(distances), at<double>(distances), at<std::int64_t>(indices)};
        nearest::search_dense(rows, queries, k, answer, threads);
      },
      unlocked, py::arg("rows"), py::arg("queries"), py::arg("k"), py::arg("distances"), py::arg("indices"),
      py::arg("threads"), "Exact k nearest rows by all pairs.");
}

// diffmem::tile_max: the row whose largest tile distance is least (tile_max.h says what each array holds).
void bind_tile_max(py::module_& m) {
  namespace nearest = diffmem::nearest;
  using Address = std::uintptr_t;
  static const auto check = [](const nearest::Rows& rows, const nearest::Rows& queries, std::int64_t tiles) {
    require(rows.d == queries.d && rows.type == queries.type,
            "tile_max: rows and queries must have one d and one type");
    require(tiles >= 1 && rows.d % tiles == 0, "tile_max: d must be a multiple of tiles");
  };
  m.def(
      "tile_max_search",
      [](const nearest::Rows& rows, const nearest::Rows& queries, std::int64_t tiles, Address order,
         std::int64_t first_row, Address near, Address distances, Address indices, int threads) {
        check(rows, queries, tiles);
        if (queries.count == 0 || rows.count == 0) return;
        require_addresses(order, distances, indices);
        diffmem::tile_max::search({rows, queries, tiles, at<const std::int32_t>(order), first_row, at<const bool>(near),
                                   at<std::int64_t>(distances), at<double>(distances), at<std::int64_t>(indices)},
                                  threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("rows"), py::arg("queries"), py::arg("tiles"), py::arg("order"),
      py::arg("first_row"), py::arg("near"), py::arg("distances"), py::arg("indices"), py::arg("threads"),
      "Lowers each query's least tile maximum by some rows.");
  m.def(
      "tile_max_pairs",
      [](const nearest::Rows& rows, const nearest::Rows& queries, std::int64_t tiles, Address some, Address others,
         std::int64_t count, Address distances, int threads) {
        check(rows, queries, tiles);
        if (count <= 0) return;
        require_addresses(some, others, distances);
        diffmem::tile_max::pairs({rows, queries, tiles, at<const std::int64_t>(some), at<const std::int64_t>(others),
                                  count, at<std::int64_t>(distances), at<double>(distances)},
                                 threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("rows"), py::arg("queries"), py::arg("tiles"), py::arg("some"),
      py::arg("others"), py::arg("count"), py::arg("distances"), py::arg("threads"), "Tile maxima of pairs.");
}

// diffmem::vector_scan: bounds from codes of float vectors (vector_scan.h says what each array holds).
void bind_vector_scan(py::module_& m) {
  namespace vs = diffmem::vector_scan;
  using Address = std::uintptr_t;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  static const auto check = [](int width, int shift, int threads) {
    require(width >= vs::kLead && width % vs::kWidthUnit == 0 && width <= vs::kLargestWidth,
            "vector_scan: width must be a multiple of 64 from 64 to 4096");
    require(shift >= 0 && shift <= vs::kLargestShift && shift % 2 == 0,
            "vector_scan: shift must be even, from 0 to 10");
    require_threads(threads);
  };
  py::class_<vs::Work>(m, "VectorScanWork")
      .def_readonly("bounded", &vs::Work::bounded)
      .def_readonly("fine", &vs::Work::fine)
      .def_readonly("dense", &vs::Work::dense)
      .def_property_readonly("found", [](const vs::Work& work) { return work.query.size(); })
      .def(
          "copy",
          [](const vs::Work& work, Address query, Address row, Address lower) {
            std::copy(work.query.begin(), work.query.end(), at<std::int32_t>(query));
            std::copy(work.row.begin(), work.row.end(), at<std::int64_t>(row));
            std::copy(work.lower.begin(), work.lower.end(), at<float>(lower));
          },
          py::arg("query"), py::arg("row"), py::arg("lower"));
  m.def(
      "vector_scan_encode",
      [](Address v, std::int64_t count, std::int64_t d, int width, int shift, bool queries, double eta, Address code,
         Address terms, int threads) {
        check(width, shift, threads);
        require(count >= 0 && d >= 1 && d <= width, "vector_scan: count must be at least 0 and d from 1 to width");
        if (count == 0) return;
        require_addresses(v, code, terms);
        vs::encode(at<const float>(v), count, d, {width, shift}, queries, eta, at<std::uint8_t>(code),
                   at<vs::Terms>(terms), threads);
      },
      unlocked, py::arg("v"), py::arg("count"), py::arg("d"), py::arg("width"), py::arg("shift"), py::arg("queries"),
      py::arg("eta"), py::arg("code"), py::arg("terms"), py::arg("threads"), "Codes of rotated vectors.");
  m.def(
      "vector_scan",
      [](Address code, Address terms, std::int64_t count, std::int64_t first, Address query_code, Address query_terms,
         std::int64_t queries, int width, int shift, double stretch, int k, Address upper, int threads) {
        check(width, shift, threads);
        require(count >= 0 && queries >= 0 && queries < (std::int64_t{1} << 31),
                "vector_scan: count and queries must be at least 0");
        require(k >= 1 && stretch >= 1, "vector_scan: k and stretch must be at least 1");
        if (count == 0 || queries == 0) return vs::Work{};
        require_addresses(code, terms, query_code, query_terms, upper);
        return vs::scan({at<const std::uint8_t>(code), at<const vs::Terms>(terms), count}, first,
                        {at<const std::uint8_t>(query_code), at<const vs::Terms>(query_terms), queries}, {width, shift},
                        stretch, k, at<double>(upper), threads);
      },
      unlocked, py::arg("code"), py::arg("terms"), py::arg("count"), py::arg("first"), py::arg("query_code"),
      py::arg("query_terms"), py::arg("queries"), py::arg("width"), py::arg("shift"), py::arg("stretch"), py::arg("k"),
      py::arg("upper"), py::arg("threads"), "Pairs that may be within reach.");
}

// diffmem::posterior_mean: integer products and exact pairs (posterior_mean.h says what each array holds).
void bind_posterior_mean(py::module_& m) {
  namespace pm = diffmem::posterior_mean;
  using std::int32_t, std::int64_t, std::uint8_t;
  using Address = std::uintptr_t;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();

  py::class_<pm::Term>(m, "PosteriorTerm")
      .def(py::init([](Address rows, int64_t stride, int64_t k, int64_t count, Address values, Address offset,
                       Address scale) {
             require(stride >= 0 && k >= 1 && k <= pm::kLargestSum, "posterior_mean: k must be from 1 to 65536");
             require(count >= 0, "posterior_mean: count must be at least 0");
             require_addresses(rows, values, offset, scale);
             return pm::Term{
                 at<const uint8_t>(rows), stride, k, count, at<const std::int16_t>(values), at<const uint8_t>(offset),
                 at<const float>(scale)};
           }),
           py::arg("rows"), py::arg("stride"), py::arg("k"), py::arg("count"), py::arg("values"), py::arg("offset"),
           py::arg("scale"));
  py::class_<pm::ByteRows>(m, "PosteriorRows")
      .def(py::init([](Address data, int64_t stride, int64_t d, Address center) {
             require(stride >= 0 && d >= 1, "posterior_mean: rows need stride >= 0 and d >= 1");
             require_addresses(data, center);
             return pm::ByteRows{at<const uint8_t>(data), stride, d, at<const uint8_t>(center)};
           }),
           py::arg("data"), py::arg("stride"), py::arg("d"), py::arg("center"));
  py::class_<pm::Pairs>(m, "PosteriorPairs")
      .def_readonly("complete", &pm::Pairs::complete)
      .def_readonly("total", &pm::Pairs::total)
      .def(
          "copy",
          [](const pm::Pairs& pairs, Address starts, Address images) {
            std::copy(pairs.starts.begin(), pairs.starts.end(), at<int64_t>(starts));
            std::copy(pairs.images.begin(), pairs.images.end(), at<int32_t>(images));
          },
          py::arg("starts"), py::arg("images"));

  // Scores [n][columns].
  static const auto check = [](int64_t n, int64_t columns, int threads) {
    require_sizes(std::array<int64_t, 2>{n, columns}, "posterior_mean: n and columns must be at least 1");
    require(columns % pm::kLanes == 0, "posterior_mean: columns must be a multiple of 16");
    require(pm::available(), "posterior_mean: this processor or build has no AVX2 or NEON");
    require_threads(threads);
  };

  m.attr("posterior_largest_sum") = pm::kLargestSum;
  m.def("posterior_available", &pm::available, "Whether this processor and build have the integer products.");
  m.def(
      "posterior_digit_bits",
      [] {
        require(pm::available(), "posterior_mean: this processor or build has no AVX2 or NEON");
        return pm::digit_bits();
      },
      "Bits of the numbers that rows are multiplied by.");
  m.def(
      "posterior_scores",
      [](const std::vector<pm::Term>& terms, int64_t n, int64_t columns, Address half_norms, Address weight, bool add,
         Address out, int threads) {
        check(n, columns, threads);
        require_addresses(half_norms, weight, out);
        for (const pm::Term& term : terms) require(term.count <= columns, "posterior_mean: more values than columns");
        pm::scores(terms, n, columns, at<const float>(half_norms), at<const float>(weight), add, at<float>(out),
                   threads);
      },
      unlocked, py::arg("terms"), py::arg("n"), py::arg("columns"), py::arg("half_norms"), py::arg("weight"),
      py::arg("add"), py::arg("out"), py::arg("threads"));
  m.def(
      "posterior_column_top",
      [](Address scores, int64_t n, int64_t columns, Address top, Address where, int threads) {
        check(n, columns, threads);
        require_addresses(scores, top, where);
        pm::column_top(at<const float>(scores), n, columns, at<float>(top), at<int64_t>(where), threads);
      },
      unlocked, py::arg("scores"), py::arg("n"), py::arg("columns"), py::arg("top"), py::arg("where"),
      py::arg("threads"));
  m.def(
      "posterior_column_mass",
      [](Address scores, int64_t n, int64_t columns, Address top, Address mass, int threads) {
        check(n, columns, threads);
        require_addresses(scores, top, mass);
        pm::column_mass(at<const float>(scores), n, columns, at<const float>(top), at<double>(mass), threads);
      },
      unlocked, py::arg("scores"), py::arg("n"), py::arg("columns"), py::arg("top"), py::arg("mass"),
      py::arg("threads"));
  m.def(
      "posterior_select",
      [](Address scores, int64_t n, int64_t columns, Address threshold, Address reach, Address slack, int64_t limit,
         int threads) {
        check(n, columns, threads);
        require_addresses(scores, threshold, reach, slack);
        return pm::select(at<const float>(scores), n, columns, at<const float>(threshold), at<const float>(reach),
                          at<const float>(slack), limit, threads);
      },
      unlocked, py::arg("scores"), py::arg("n"), py::arg("columns"), py::arg("threshold"), py::arg("reach"),
      py::arg("slack"), py::arg("limit"), py::arg("threads"));
  m.def(
      "posterior_pair_logits",
      [](const pm::ByteRows& rows, Address queries, Address half_norms, Address weight, Address starts, Address images,
         int64_t columns, Address out, int threads) {
        require(columns >= 0, "posterior_mean: columns must be at least 0");
        require_threads(threads);
        require_addresses(queries, half_norms, weight, starts);
        pm::pair_logits(rows, at<const double>(queries), at<const double>(half_norms), at<const double>(weight),
                        at<const int64_t>(starts), at<const int32_t>(images), columns, at<double>(out), threads);
      },
      unlocked, py::arg("rows"), py::arg("queries"), py::arg("half_norms"), py::arg("weight"), py::arg("starts"),
      py::arg("images"), py::arg("columns"), py::arg("out"), py::arg("threads"));
  m.def(
      "posterior_pair_sums",
      [](const pm::ByteRows& rows, Address weights, Address starts, Address images, int64_t columns, Address out,
         int threads) {
        require(columns >= 0, "posterior_mean: columns must be at least 0");
        require_threads(threads);
        require_addresses(starts, out);
        pm::pair_sums(rows, at<const double>(weights), at<const int64_t>(starts), at<const int32_t>(images), columns,
                      at<double>(out), threads);
      },
      unlocked, py::arg("rows"), py::arg("weights"), py::arg("starts"), py::arg("images"), py::arg("columns"),
      py::arg("out"), py::arg("threads"));
  m.def(
      "posterior_round_weights",
      [](Address scores, int64_t n, int64_t columns, Address limit, Address chosen, int64_t count, Address high,
         Address low, Address sum, Address high_sum, int threads) {
        check(n, columns, threads);
        require(count >= 0 && count <= columns, "posterior_mean: count must be from 0 to columns");
        require_addresses(scores, limit, chosen, high, sum, high_sum);
        pm::round_weights(at<const float>(scores), n, columns, at<const float>(limit), at<const int32_t>(chosen), count,
                          at<void>(high), at<uint8_t>(low), at<int64_t>(sum), at<int64_t>(high_sum), threads);
      },
      unlocked, py::arg("scores"), py::arg("n"), py::arg("columns"), py::arg("limit"), py::arg("chosen"),
      py::arg("count"), py::arg("high"), py::arg("low"), py::arg("sum"), py::arg("high_sum"), py::arg("threads"));
  m.def(
      "posterior_small_means",
      [](const pm::ByteRows& rows, int64_t n, Address half_norms, double spread, double longest, Address x, bool wide,
         int64_t count, double unit, double shift, Address sigma, Address tolerance, double reach, bool exact,
         Address out, Address log_sum, Address dropped, int threads) {
        require_sizes(std::array<int64_t, 2>{n, count}, "posterior_mean: n and count must be at least 1");
        require(pm::available(), "posterior_mean: this processor or build has no AVX2 or NEON");
        require_threads(threads);
        require_addresses(half_norms, x, sigma, tolerance, out);
        const pm::SmallSet set{rows, n, at<const double>(half_norms), spread, longest};
        const pm::SmallQueries queries{at<const void>(x),           wide,  count, unit, shift, at<const double>(sigma),
                                       at<const double>(tolerance), reach, exact};
        return static_cast<int>(
            pm::small_means(set, queries, at<void>(out), at<double>(log_sum), at<double>(dropped), threads));
      },
      unlocked, py::arg("rows"), py::arg("n"), py::arg("half_norms"), py::arg("spread"), py::arg("longest"),
      py::arg("x"), py::arg("wide"), py::arg("count"), py::arg("unit"), py::arg("shift"), py::arg("sigma"),
      py::arg("tolerance"), py::arg("reach"), py::arg("exact"), py::arg("out"), py::arg("log_sum"), py::arg("dropped"),
      py::arg("threads"), "0, or what is wrong: 1 of x, 2 of sigma.");
  m.def(
      "posterior_weighted_sums",
      [](Address rows, int64_t stride, int64_t k, int64_t n, Address weights, int64_t count, Address out, int threads) {
        require(stride >= 0 && k >= 1 && n >= 1 && n <= pm::kLargestSum && count >= 0,
                "posterior_mean: k and n must be at least 1, n at most 65536, count and stride at least 0");
        require_threads(threads);
        require_addresses(rows, weights, out);
        pm::weighted_sums(at<const uint8_t>(rows), stride, k, n, at<const void>(weights), count, at<double>(out),
                          threads);
      },
      unlocked, py::arg("rows"), py::arg("stride"), py::arg("k"), py::arg("n"), py::arg("weights"), py::arg("count"),
      py::arg("out"), py::arg("threads"));
}

#ifdef DIFFMEM_WITH_CUDA
void bind_nearest_cuda(py::module_& m) {
  namespace cuda = diffmem::nearest::cuda;
  using std::int64_t;
  using Address = std::uintptr_t;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  const auto check = [](int code) {
    if (code != cuda::kOk) throw std::runtime_error(std::string("nearest (CUDA): ") + cuda::error_string(code));
  };

  m.attr("nearest_cuda_max_neighbors") = cuda::kMaxNeighbors;
  m.def("nearest_cuda_centered_row", &cuda::centered_row, py::arg("d"), "Bytes of one centered image of d values.");
  m.def(
      "nearest_cuda_center",
      [check](Address images, int64_t n, int64_t d, Address centered, Address norms, Address stream) {
        check(cuda::center(at<const std::uint8_t>(images), n, d, at<std::int8_t>(centered), at<int64_t>(norms),
                           at<void>(stream)));
      },
      py::arg("images"), py::arg("n"), py::arg("d"), py::arg("centered"), py::arg("norms"), py::arg("stream"),
      Unlocked(), "uint8 [n, d] -> int8 [n, centered_row(d)] and int64 norms [n]; see nearest_cuda.h.");
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
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of diffmem; use it through diffmem.ops and diffmem.search.";

  m.def(
      "cpu_level", [] { return std::string(diffmem::cpu::name(diffmem::cpu::level())); },
      "Instruction set in use, one of cpu_levels (DIFFMEM_CPU lowers it).");
  m.def(
      "cpu_levels",
      [] {
        std::vector<std::string> names;
        for (const diffmem::cpu::Level level : diffmem::cpu::levels()) names.emplace_back(diffmem::cpu::name(level));
        return names;
      },
      "Instruction sets that this processor supports, lowest first: portable, then avx2 and avx512, or neon and "
      "neon-dotprod.");
  m.def("cpu_features", &diffmem::cpu::features, "Relevant processor features found.");
  bind_affine_alignment(m);
  bind_alignment(m);
  bind_conv3x3(m);
  bind_group_norm_silu(m);
  bind_nearest(m);
  bind_posterior_mean(m);
  bind_tile_max(m);
  bind_vector_scan(m);
#ifdef DIFFMEM_WITH_CUDA
  m.attr("with_cuda") = true;
  bind_nearest_cuda(m);
#else
  m.attr("with_cuda") = false;
#endif
}
