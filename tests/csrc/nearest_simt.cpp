// The launchers of nearest_cuda.cu on the host stand-in, as C functions for test_nearest_cuda.py (ctypes); with
// -DNEAREST_SIMT_MAIN a program that sends one small problem through every kernel, for ThreadSanitizer.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "nearest/nearest_cuda.h"
#include "simt/simt.h"

namespace nearest = diffmem::nearest::cuda;
using std::int64_t;

namespace {

std::string broken_rule;  // of the stand-in, while the last call ran

template <class Function>
int guarded(Function function) {
  broken_rule.clear();
  try {
    return function();
  } catch (const std::exception& error) {
    broken_rule = error.what();
    return -1000;
  }
}

}  // namespace

extern "C" {

const char* simt_error(int code) { return code == -1000 ? broken_rule.c_str() : nearest::error_string(code); }

int64_t simt_centered_row(int64_t d) { return nearest::centered_row(d); }

int simt_center(const std::uint8_t* images, int64_t n, int64_t d, std::int8_t* centered, int64_t* norms, void* stream) {
  return guarded([&] { return nearest::center(images, n, d, centered, norms, stream); });
}

int simt_search_workspace(int64_t queries, int64_t n, int64_t d, int k, int64_t* bytes) {
  return guarded([&] { return nearest::search_workspace(queries, n, d, k, bytes); });
}

int simt_search(const std::int8_t* query_images, const int64_t* query_norms, int64_t queries,
                const std::int8_t* training_images, const int64_t* training_norms, int64_t n, int64_t d, int k,
                void* workspace, int64_t workspace_bytes, int64_t* indices, int64_t* squared_distances, void* stream) {
  return guarded([&] {
    return nearest::search(query_images, query_norms, queries, training_images, training_norms, n, d, k, workspace,
                           workspace_bytes, indices, squared_distances, stream);
  });
}

int simt_refine(const std::uint8_t* query_images, int64_t queries, const std::uint8_t* training_images, int64_t n,
                int64_t d, const int64_t* candidates, const int64_t* offsets, int k, int64_t* indices,
                int64_t* squared_distances, void* stream) {
  return guarded([&] {
    return nearest::refine(query_images, queries, training_images, n, d, candidates, offsets, k, indices,
                           squared_distances, stream);
  });
}

}  // extern "C"

#ifdef NEAREST_SIMT_MAIN
namespace {

template <class Type>
struct Array {  // 64-byte aligned, full of garbage
  explicit Array(int64_t count)
      : bytes(count * static_cast<int64_t>(sizeof(Type))), memory(simt::Block::allocate(bytes)) {}
  operator Type*() const { return reinterpret_cast<Type*>(memory.get()); }
  int64_t bytes;
  simt::Block::Memory memory;
};

}  // namespace

int main() {
  setenv("DIFFMEM_SIMT_MULTIPROCESSORS", "1", 1);  // one split: a block meets more than one tile
  const int64_t queries = 2, n = 300, d = 68;
  const int k = 3;
  Array<std::uint8_t> query_images(queries * d), training_images(n * d);
  unsigned state = 1;
  for (auto* array : {&query_images, &training_images})
    for (int64_t i = 0; i < array->bytes; ++i)
      (*array)[i] = static_cast<std::uint8_t>((state = state * 1664525u + 1013904223u) >> 28);

  std::vector<int64_t> candidates, offsets{0}, expected;
  for (int64_t q = 0; q < queries; ++q) {
    std::vector<std::pair<int64_t, int64_t>> all;
    for (int64_t i = 0; i < n; ++i) {
      int64_t distance = 0;
      for (int64_t j = 0; j < d; ++j) {
        const int difference = query_images[q * d + j] - training_images[i * d + j];
        distance += difference * difference;
      }
      all.emplace_back(distance, i);
    }
    std::sort(all.begin(), all.end());
    for (int i = 0; i < k; ++i) expected.push_back(all[i].second);
    for (int i = 11; i >= 0; --i) candidates.push_back(all[i].second);
    offsets.push_back(static_cast<int64_t>(candidates.size()));
  }

  const int64_t row = nearest::centered_row(d);
  Array<std::int8_t> centered_queries(queries * row), centered_training(n * row);
  Array<int64_t> query_norms(queries), training_norms(n), indices(queries * k), distances(queries * k);
  int64_t workspace_bytes = 0;
  if (nearest::search_workspace(queries, n, d, k, &workspace_bytes) != 0) return 3;
  Array<char> workspace(workspace_bytes);
  if (nearest::center(query_images, queries, d, centered_queries, query_norms, nullptr) != 0 ||
      nearest::center(training_images, n, d, centered_training, training_norms, nullptr) != 0 ||
      nearest::search(centered_queries, query_norms, queries, centered_training, training_norms, n, d, k, workspace,
                      workspace_bytes, indices, distances, nullptr) != 0 ||
      !std::equal(expected.begin(), expected.end(), static_cast<int64_t*>(indices)))
    return 4;
  if (nearest::refine(query_images, queries, training_images, n, d, candidates.data(), offsets.data(), k, indices,
                      distances, nullptr) != 0 ||
      !std::equal(expected.begin(), expected.end(), static_cast<int64_t*>(indices)))
    return 5;
  std::puts("every kernel agrees with the definition");
  return 0;
}
#endif
