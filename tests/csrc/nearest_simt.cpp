// C entry points to the launchers of nearest_cuda.cu on the host stand-in, called by test_nearest_cuda.py through
// ctypes and, under ThreadSanitizer, by the main function below (-DNEAREST_SIMT_MAIN).
//
// Every intermediate array starts as garbage, has exactly the size that the contract says, and is checked for stores
// behind its end. Returns the launcher's code; a rule of the stand-in that was broken is printed and returned as 1000.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "nearest/nearest_cuda.h"
#include "simt/simt.h"

namespace nearest = diffmem::nearest::cuda;

namespace {

class Garbage {
 public:
  explicit Garbage(std::int64_t bytes) : bytes_(bytes), memory_(static_cast<std::size_t>(bytes) + 128, 0xCD) {}
  template <class Type>
  Type* as() {
    return reinterpret_cast<Type*>(start());
  }
  void check() {
    for (unsigned char* at = start() + bytes_; at < memory_.data() + memory_.size(); ++at)
      if (*at != 0xCD) throw std::runtime_error("a store went past the end of an array");
  }

 private:
  unsigned char* start() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(memory_.data()) + 63) / 64 * 64);
  }
  std::int64_t bytes_;
  std::vector<unsigned char> memory_;
};

template <class Function>
int guarded(Function function) {
  try {
    return function();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1000;
  }
}

}  // namespace

extern "C" const char* nearest_error(int code) { return nearest::error_string(code); }

extern "C" int nearest_search(const std::uint8_t* queries, std::int64_t query_count, const std::uint8_t* images,
                              std::int64_t n, std::int64_t d, int k, int multiprocessors, std::int64_t* indices,
                              std::int64_t* distances) {
  return guarded([&] {
    simt::multiprocessors = multiprocessors;
    std::int64_t workspace_bytes = 0;
    if (const int error = nearest::search_workspace(query_count, n, d, k, &workspace_bytes)) return error;
    const std::int64_t row = nearest::centred_row(d);
    Garbage centred_queries(query_count * row), query_norms(query_count * 8), centred_images(n * row), norms(n * 8);
    Garbage workspace(workspace_bytes);
    if (const int error = nearest::centre(queries, query_count, d, centred_queries.as<std::int8_t>(),
                                          query_norms.as<std::int64_t>(), nullptr))
      return error;
    if (const int error =
            nearest::centre(images, n, d, centred_images.as<std::int8_t>(), norms.as<std::int64_t>(), nullptr))
      return error;
    const int error = nearest::search(centred_queries.as<std::int8_t>(), query_norms.as<std::int64_t>(), query_count,
                                      centred_images.as<std::int8_t>(), norms.as<std::int64_t>(), n, d, k,
                                      workspace.as<void>(), workspace_bytes, indices, distances, nullptr);
    for (Garbage* array : {&centred_queries, &query_norms, &centred_images, &norms, &workspace}) array->check();
    return error;
  });
}

extern "C" int nearest_refine(const std::uint8_t* queries, std::int64_t query_count, const std::uint8_t* images,
                              std::int64_t n, std::int64_t d, const std::int64_t* candidates,
                              const std::int64_t* offsets, int k, std::int64_t* indices, std::int64_t* distances) {
  return guarded([&] {
    return nearest::refine(queries, query_count, images, n, d, candidates, offsets, k, indices, distances, nullptr);
  });
}

#ifdef NEAREST_SIMT_MAIN
// One small problem through every kernel, checked against the definition.
int main() {
  const std::int64_t query_count = 2, n = 300, d = 66;
  const int k = 3;
  std::vector<std::uint8_t> queries(query_count * d), images(n * d);
  unsigned state = 1;
  for (auto* array : {&queries, &images})
    for (auto& value : *array) value = static_cast<std::uint8_t>((state = state * 1664525u + 1013904223u) >> 28);
  std::vector<std::int64_t> candidates, offsets{0}, expected;
  for (std::int64_t q = 0; q < query_count; ++q) {
    std::vector<std::pair<std::int64_t, std::int64_t>> all;
    for (std::int64_t i = 0; i < n; ++i) {
      std::int64_t distance = 0;
      for (std::int64_t j = 0; j < d; ++j) {
        const int difference = queries[q * d + j] - images[i * d + j];
        distance += difference * difference;
      }
      all.emplace_back(distance, i);
    }
    std::sort(all.begin(), all.end());
    for (int i = 0; i < k; ++i) expected.push_back(all[i].second);
    for (int i = 11; i >= 0; --i) candidates.push_back(all[i].second);
    offsets.push_back(static_cast<std::int64_t>(candidates.size()));
  }
  std::vector<std::int64_t> indices(query_count * k), distances(query_count * k);
  if (nearest_search(queries.data(), query_count, images.data(), n, d, k, 1, indices.data(), distances.data()) != 0 ||
      indices != expected)
    return 3;
  indices.assign(indices.size(), 0);
  if (nearest_refine(queries.data(), query_count, images.data(), n, d, candidates.data(), offsets.data(), k,
                     indices.data(), distances.data()) != 0 ||
      indices != expected)
    return 4;
  std::puts("all kernels agree with the definition");
  return 0;
}
#endif
