// The exact k nearest training images of uint8 images on a CUDA device: the contract.
//
// Squared Euclidean distances between uint8 images are integers and are computed as integers; equal distances go to the
// lower training index. The answer does not depend on how the work is split or on the order in which threads run.
//
// All pointers are device memory of the current device unless said otherwise; sizes are counts, never bytes, unless the
// name says so; arrays are C-contiguous. Every function enqueues work on `stream` (a cudaStream_t), allocates nothing
// and waits for nothing, so inputs, outputs and workspace must live until the stream has passed. It returns 0, one of
// the errors below (nothing was enqueued), or the positive cudaError_t of a launch that failed.
//
// Two ways to search:
//   center + search   brute force on int8 tensor cores. 128 is subtracted from every gray level, which changes no
//                     distance, and ‖x − y‖² = ‖x‖² + ‖y‖² − 2 x·y with exact integer products.
//   refine            exact distances of listed pairs only: what a filter (a lower bound, an approximate index) left
//   over.
#pragma once

#include <cstdint>

namespace diffmem::nearest::cuda {

inline constexpr int kMaxNeighbors = 64;

enum Error : int {
  kOk = 0,
  kBadSize = -1,       // a negative count, d < 1, or more queries than one call takes (2³¹ − 1)
  kBadNeighbors = -2,  // k < 1, k > 64 or k > N
  kBadDimension = -3,  // search: d > 16,909,060 (a squared distance would exceed 40 bits)
  kMisaligned = -4,    // a centered array that does not start at a multiple of 16 bytes, or int64 data not at one of 8
  kNullPointer = -5,
  kSmallWorkspace = -6,
};

// One line for a code that a function below returned (also for positive ones).
const char* error_string(int code);

// Bytes of one centered image: d rounded up to a multiple of 64; the bytes behind the image are zero.
std::int64_t centered_row(std::int64_t d);

// images uint8 [n, d] -> centered int8 [n, centered_row(d)] (gray level − 128), norms int64 [n] (sum of the squares).
int center(const std::uint8_t* images, std::int64_t n, std::int64_t d, std::int8_t* centered, std::int64_t* norms,
           void* stream);

// Bytes of workspace that `search` needs on the current device; 0 or an error (negative or, by cudaGetDevice,
// positive).
int search_workspace(std::int64_t queries, std::int64_t n, std::int64_t d, int k, std::int64_t* bytes);

// The k nearest of n training images for each query. query_images and training_images as `center` writes them.
// indices int64 [queries, k], squared_distances int64 [queries, k], nearest first.
int search(const std::int8_t* query_images, const std::int64_t* query_norms, std::int64_t queries,
           const std::int8_t* training_images, const std::int64_t* training_norms, std::int64_t n, std::int64_t d,
           int k, void* workspace, std::int64_t workspace_bytes, std::int64_t* indices, std::int64_t* squared_distances,
           void* stream);

// The k nearest of each query's candidates. query_images uint8 [queries, d], training_images uint8 [n, d];
// the candidates of query q are candidates[offsets[q]] … candidates[offsets[q + 1] − 1], indices into the training
// images; offsets int64 [queries + 1], ascending. A candidate listed twice counts once; one outside 0 … n − 1 is passed
// over, never read. Where a query has fewer than k candidates the rest is index −1 at distance INT64_MAX.
int refine(const std::uint8_t* query_images, std::int64_t queries, const std::uint8_t* training_images, std::int64_t n,
           std::int64_t d, const std::int64_t* candidates, const std::int64_t* offsets, int k, std::int64_t* indices,
           std::int64_t* squared_distances, void* stream);

}  // namespace diffmem::nearest::cuda
