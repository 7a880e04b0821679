// Exact nearest training images on the GPU: the kernels behind nearest_cuda.h.
//
// search. A block of 8 warps holds a tile of queries and walks over a range of training images. Each tile of products,
// 128 queries × 256 images, is accumulated in registers: a warp owns 64 × 64 of it as 4 × 8 tensor-core products of
// 16 × 8 × 32 bytes. Both operands pass through a ring of three stages of 64 bytes per row in shared memory, filled by
// asynchronous copies two stages ahead (also across tiles, so that memory works during the epilogue), with the
// 16-byte chunks of a row permuted so that neither the copies nor the fragment loads conflict in a bank.
//
// The epilogue turns products into distances in registers and compares each with its query's k-th best distance so far.
// Almost none passes: of N images in random order about k·ln(N/k) ever do. Those that pass go, as 64-bit keys
// (distance, position) that order by distance, then index, to a short buffer per query; each warp then takes the
// buffers of its queries into sorted lists that lie across the lanes of the warp. No distance matrix is ever stored.
// The training set is split between blocks along N, and `merge` joins the lists of the splits. Keys are distinct and
// totally ordered, so the result does not depend on the order of anything.
//
// Exactness. Products of centered bytes are at most 2¹⁴, a sum over d of them stays inside int32 for d < 131,072. Up to
// d = 66,051 the distance is below 2³² and is computed modulo 2³² (`Narrow`); beyond, sums are moved to 64 bits every
// 65,536 bytes and distances have 40 bits (`Wide`, smaller tiles because the wide sums need registers).
//
// Floors, for Q queries, N images of d bytes: 2·Q·N·d operations, and N·d bytes from memory where the queries stay in
// L2. Dense int8 peak and memory by NVIDIA's data sheets: A100 SXM 80 GB 624·10¹²/s, 2.04·10¹² B/s; H100 SXM 1979
// and 3.35.
//
//   10,000 queries in 50,000 images, d = 3072: 3.07·10¹² operations, A100 4.9 ms, H100 1.6 ms;
//   154 MB, A100 0.08 ms, H100 0.05 ms: arithmetic decides.
//
//   32 queries, where a tile of 128 is computed: 0.04·10¹² operations, A100 0.06 ms, H100 0.02 ms;
//   154 MB as above: memory decides.
//
// Predictions, not measurements: 60–70 % of the peak on A100 (7–8 ms). mma.sync reaches about 60 % of what wgmma does
// on Hopper, so 35–45 % there (3.5–4.5 ms). From sm_100 on, int8 products of this kind are legacy instructions: how
// fast they are is to be measured. The epilogue costs about 3 instructions per sum: 2 % of the time at d = 3072, half
// of it at d = 64. Small batches: 60–70 % of the bandwidth.
//
// refine. One block per query, one candidate per warp at a time; absolute differences of four bytes at once
// (__vabsdiffu4, one instruction up to sm_100, several on sm_120) squared and added by __dp4a. The floor is d bytes per
// pair: 6.6·10⁸ pairs/s on A100 and 1.1·10⁹ on H100 at d = 3072. Prediction: 70 % of that for lists of some hundred
// candidates, less for very short ones.
#include "nearest/nearest_cuda.h"
#include "simt/async_copy.h"
#include "simt/matrix.h"
#include "simt/simt.h"

namespace diffmem::nearest::cuda {
namespace {

using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint32_t;
using std::uint8_t;
using Key = unsigned long long;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRowBytes = 64;  // of one stage; centered rows are padded to a multiple of it
constexpr int kStages = 3;
constexpr int kBuffer = 16;          // keys that a query's buffer takes before it has to be emptied
constexpr int kSharedNeighbors = 4;  // lists of up to this length lie in shared memory, longer ones in the workspace
constexpr int kChunksPerSum = 1024;  // stages after which Wide moves its sums, 65,536 products ≤ 2¹⁴, to 64 bits
constexpr Key kNoKey = ~Key{0};
constexpr int64_t kNoDistance = 0x7fffffffffffffff;

template <int kQueries_, int kImages_, int kWarpQueries_, int kWarpImages_, class Distance_, int kIndexBits_>
struct Tiling {
  static constexpr int kQueries = kQueries_, kImages = kImages_;                  // of a block
  static constexpr int kWarpQueries = kWarpQueries_, kWarpImages = kWarpImages_;  // of a warp
  static constexpr int kIndexBits = kIndexBits_;  // of a key: position within the split; the distance is above them
  using Distance = Distance_;
  static constexpr bool kWide = sizeof(Distance) == 8;
  static_assert(kQueries / kWarpQueries * (kImages / kWarpImages) == kWarps);
  static_assert(kWarpImages / 8 * 2 <= 32, "a thread's columns must fit a mask");
};
using Narrow = Tiling<128, 256, 64, 64, uint32_t, 32>;
using Wide = Tiling<64, 128, 32, 32, Key, 24>;

constexpr int64_t kMaxNarrow = 66051;   // floor((2³² − 1) / 255²)
constexpr int64_t kMaxWide = 16909060;  // floor((2⁴⁰ − 1) / 255²)
constexpr int64_t kMaxQueries = 0x7fffffff;

// ---- sorted lists across the lanes of a warp -----------------------------------------------------------------------

struct Ranked {
  int64_t distance, index;
};
__device__ __forceinline__ bool operator<(const Ranked& a, const Ranked& b) {
  return a.distance < b.distance || (a.distance == b.distance && a.index < b.index);
}
__device__ __forceinline__ bool operator==(const Ranked& a, const Ranked& b) {
  return a.distance == b.distance && a.index == b.index;
}

__device__ __forceinline__ Key shuffle(Key value, int from) { return __shfl_sync(kAllLanes, value, from); }
__device__ __forceinline__ Key shuffle_up(Key value) { return __shfl_up_sync(kAllLanes, value, 1); }
__device__ __forceinline__ Ranked shuffle(const Ranked& value, int from) {
  return {__shfl_sync(kAllLanes, value.distance, from), __shfl_sync(kAllLanes, value.index, from)};
}
__device__ __forceinline__ Ranked shuffle_up(const Ranked& value) {
  return {__shfl_up_sync(kAllLanes, value.distance, 1), __shfl_up_sync(kAllLanes, value.index, 1)};
}

// Up to 64 entries in ascending order: lane i holds entries i and 32 + i. Every member is called by the whole warp with
// the same arguments.
template <class Entry>
struct WarpList {
  Entry low, high;
  int lane;

  __device__ __forceinline__ void insert(const Entry& entry, int k) {
    const int before = __popc(__ballot_sync(kAllLanes, low < entry)) + __popc(__ballot_sync(kAllLanes, high < entry));
    if (before >= k) return;
    const Entry carried = shuffle(low, kWarp - 1);
    const Entry low_shifted = shuffle_up(low);
    Entry high_shifted = shuffle_up(high);
    if (lane == 0) high_shifted = carried;
    if (lane >= before) low = lane == before ? entry : low_shifted;
    if (lane + kWarp >= before) high = lane + kWarp == before ? entry : high_shifted;
  }
  __device__ __forceinline__ bool contains(const Entry& entry) const {
    return __any_sync(kAllLanes, low == entry || high == entry);
  }
  __device__ __forceinline__ Entry at(int position) const {
    const Entry in_low = shuffle(low, position % kWarp), in_high = shuffle(high, position % kWarp);
    return position < kWarp ? in_low : in_high;
  }
};

__device__ __forceinline__ void write_list(const WarpList<Ranked>& list, int k, int64_t* indices, int64_t* distances) {
  if (list.lane < k) {
    indices[list.lane] = list.low.index;
    distances[list.lane] = list.low.distance;
  }
  if (list.lane + kWarp < k) {
    indices[list.lane + kWarp] = list.high.index;
    distances[list.lane + kWarp] = list.high.distance;
  }
}

__device__ __forceinline__ int lane_number() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_number() { return static_cast<int>(threadIdx.x) / kWarp; }

// ---- search: the products and their epilogue -----------------------------------------------------------------------

struct SearchArguments {
  const int8_t* queries;
  const int64_t* query_norms;
  const int8_t* images;
  const int64_t* image_norms;
  int64_t query_count, image_count, row_bytes;
  int64_t images_per_split;  // a multiple of the tile
  int splits, k;
  Key* lists;  // [query_count, splits, k]: keys within the split, ascending, then kNoKey
};

template <class Tile>
struct SearchMemory {
  alignas(128) uint8_t queries[kStages][Tile::kQueries * kRowBytes];
  alignas(128) uint8_t images[kStages][Tile::kImages * kRowBytes];
  Key buffer[Tile::kQueries][kBuffer];
  Key lists[Tile::kQueries][kSharedNeighbors];
  Key threshold[Tile::kQueries];  // k-th best key so far; 0 for rows behind the last query, which nothing beats
  typename Tile::Distance query_norm[Tile::kQueries];
  typename Tile::Distance image_norm[3][Tile::kImages];  // three tiles: the loads are up to two tiles ahead
  uint32_t buffered[Tile::kQueries];                     // keys offered to `buffer` since it was last emptied
};

static_assert(sizeof(SearchMemory<Narrow>) <= 99 * 1024 && sizeof(SearchMemory<Wide>) <= 99 * 1024,
              "what one block can have on the smallest architecture in use (sm_86, sm_89, sm_120)");

// Byte offset of 16-byte chunk `chunk` of row `row` in a stage. What eight threads touch at once, eight rows at one
// chunk (fragment loads) or two rows at all chunks (copies), falls into eight different groups of four banks.
__host__ __device__ constexpr int swizzled(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ ((row >> 1) & 3)) * 16);
}
constexpr bool free_of_bank_conflicts() {
  for (int start = 0; start < 64; ++start) {
    int loaded = 0, copied = 0;
    for (int i = 0; i < 8; ++i) {
      loaded |= 1 << swizzled(start / 4 * 8 + i, start % 4) / 16 % 8;
      copied |= 1 << swizzled(start * 2 + i / 4, i % 4) / 16 % 8;
    }
    if (loaded != 255 || copied != 255) return false;
  }
  return true;
}
static_assert(free_of_bank_conflicts());

// Starts copying 64 bytes of each of kRows rows; rows from `valid_rows` on become zero.
template <int kRows>
__device__ __forceinline__ void load_rows(uint8_t* stage, const int8_t* first, int64_t row_bytes, int64_t valid_rows) {
  const int chunk = static_cast<int>(threadIdx.x) % 4;
  static_assert(kRows % (kThreads / 4) == 0);
#pragma unroll
  for (int i = 0; i < kRows / (kThreads / 4); ++i) {
    const int row = i * (kThreads / 4) + static_cast<int>(threadIdx.x) / 4;
    const bool valid = row < valid_rows;
    simt::copy_async<16>(stage + swizzled(row, chunk), first + (valid ? row : 0) * row_bytes + chunk * 16, valid);
  }
}

template <class Tile>
struct Accumulator {
  static constexpr int kRows = Tile::kWarpQueries / 16;   // 16-row fragments
  static constexpr int kColumns = Tile::kWarpImages / 8;  // 8-column fragments
  int32_t sum[kRows][kColumns][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = 0;
  }

  // Adds the products of this warp's rows of one stage.
  __device__ __forceinline__ void add(const uint8_t* queries, const uint8_t* images, int warp_query, int warp_image) {
    const int lane = lane_number();
#pragma unroll
    for (int step = 0; step < kRowBytes / 32; ++step) {
      uint32_t a[kRows][4];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        simt::load_matrix_x4(a[i], queries + swizzled(warp_query + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        uint32_t b[4];
        simt::load_matrix_x4(b,
                             images + swizzled(warp_image + j * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          simt::multiply_add_s8(sum[i][j], a[i], b[0], b[1]);
          simt::multiply_add_s8(sum[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
};

// Moves the buffered keys of this warp's queries into their lists. The same lanes always handle the same entries of
// a list, so lists need no synchronization.
template <class Tile>
__device__ __forceinline__ void empty_buffers(SearchMemory<Tile>& memory, Key* lists, int64_t list_stride, int k) {
  const int lane = lane_number();
  for (int row = warp_number(); row < Tile::kQueries; row += kWarps) {
    const int count = min(static_cast<int>(memory.buffered[row]), kBuffer);
    if (count == 0) continue;
    Key* entries = lists + row * list_stride;
    WarpList<Key> list{lane < k ? entries[lane] : kNoKey, lane + kWarp < k ? entries[lane + kWarp] : kNoKey, lane};
    for (int i = 0; i < count; ++i) list.insert(memory.buffer[row][i], k);
    if (lane < k) entries[lane] = list.low;
    if (lane + kWarp < k) entries[lane + kWarp] = list.high;
    const Key last = list.at(k - 1);
    if (lane == 0) {
      memory.threshold[row] = last;
      memory.buffered[row] = 0;
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, 1) search_kernel(const SearchArguments arguments) {
  using Distance = typename Tile::Distance;
  using Sums = Accumulator<Tile>;
  SIMT_DYNAMIC_SHARED(SearchMemory<Tile>, memory);
  const int lane = lane_number(), warp = warp_number();
  const int warp_query = warp % (Tile::kQueries / Tile::kWarpQueries) * Tile::kWarpQueries;
  const int warp_image = warp / (Tile::kQueries / Tile::kWarpQueries) * Tile::kWarpImages;
  const int k = arguments.k;

  const int64_t first_query = static_cast<int64_t>(blockIdx.x) * Tile::kQueries;
  const int64_t valid_queries = arguments.query_count - first_query;
  const int8_t* const queries = arguments.queries + first_query * arguments.row_bytes;
  const int64_t first_image = static_cast<int64_t>(blockIdx.y) * arguments.images_per_split;
  const int64_t valid_images = min(arguments.images_per_split, arguments.image_count - first_image);
  const int8_t* const images = arguments.images + first_image * arguments.row_bytes;
  const int64_t* const image_norms = arguments.image_norms + first_image;
  const int tiles = static_cast<int>((valid_images + Tile::kImages - 1) / Tile::kImages);
  const int chunks = static_cast<int>(arguments.row_bytes / kRowBytes);

  // Each call starts the copies of one more stage, across tiles, and closes a group even when nothing is left.
  int load_tile = 0, load_chunk = 0, load_stage = 0;
  const auto load_next_stage = [&] {
    if (load_tile < tiles) {
      const int64_t row = static_cast<int64_t>(load_tile) * Tile::kImages,
                    byte = static_cast<int64_t>(load_chunk) * kRowBytes;
      load_rows<Tile::kQueries>(memory.queries[load_stage], queries + byte, arguments.row_bytes, valid_queries);
      load_rows<Tile::kImages>(memory.images[load_stage], images + row * arguments.row_bytes + byte,
                               arguments.row_bytes, valid_images - row);
      if (load_chunk == 0) {  // Narrow takes the low half of a norm: it computes modulo 2³²
        for (int i = static_cast<int>(threadIdx.x); i < Tile::kImages; i += kThreads) {
          const bool valid = row + i < valid_images;
          simt::copy_async<sizeof(Distance)>(&memory.image_norm[load_tile % 3][i], image_norms + (valid ? row + i : 0),
                                             valid);
        }
      }
      if (++load_chunk == chunks) load_chunk = 0, ++load_tile;
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    }
    simt::copy_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) load_next_stage();

  const bool lists_are_shared = k <= kSharedNeighbors;
  const int64_t list_stride = lists_are_shared ? kSharedNeighbors : static_cast<int64_t>(arguments.splits) * k;
  Key* const split_lists = arguments.lists + (first_query * arguments.splits + static_cast<int64_t>(blockIdx.y)) * k;
  Key* const lists = lists_are_shared ? &memory.lists[0][0] : split_lists;
  for (int row = warp; row < Tile::kQueries; row += kWarps) {
    const bool valid = row < valid_queries;
    if (lane == 0) {
      memory.threshold[row] = valid ? kNoKey : 0;
      memory.query_norm[row] = valid ? static_cast<Distance>(arguments.query_norms[first_query + row]) : 0;
      memory.buffered[row] = 0;
    }
    if (valid)
      for (int i = lane; i < k; i += kWarp) lists[row * list_stride + i] = kNoKey;
  }

  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    Sums sums;
    sums.clear();
    Distance value[Sums::kRows][Sums::kColumns][4];  // products, then distances; Narrow needs them only at the end
    if constexpr (Tile::kWide) {
#pragma unroll
      for (int i = 0; i < Sums::kRows; ++i)
#pragma unroll
        for (int j = 0; j < Sums::kColumns; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) value[i][j][e] = 0;
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      simt::copy_async_wait<kStages - 2>();
      __syncthreads();  // this stage has arrived for all, and nobody reads the one that is filled next any more
      load_next_stage();
      sums.add(memory.queries[stage], memory.images[stage], warp_query, warp_image);
      stage = stage + 1 == kStages ? 0 : stage + 1;
      if constexpr (Tile::kWide) {
        if (chunk % kChunksPerSum == kChunksPerSum - 1 || chunk == chunks - 1) {
#pragma unroll
          for (int i = 0; i < Sums::kRows; ++i)
#pragma unroll
            for (int j = 0; j < Sums::kColumns; ++j)
#pragma unroll
              for (int e = 0; e < 4; ++e)
                value[i][j][e] += static_cast<Distance>(static_cast<int64_t>(sums.sum[i][j][e]));
          sums.clear();
        }
      }
    }

    // Distances, and for each of this thread's rows a mask of the columns below the threshold. An image as far away as
    // the k-th best of the earlier tiles loses the tie, for its index is higher: duplicates cost nothing.
    uint32_t pending[Sums::kRows][2];
    Distance image_norm[Sums::kColumns][2];
#pragma unroll
    for (int j = 0; j < Sums::kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) image_norm[j][e] = memory.image_norm[tile % 3][warp_image + j * 8 + lane % 4 * 2 + e];
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_query + i * 16 + half * 8 + lane / 4;
        const Distance query_norm = memory.query_norm[row];
        const auto limit = static_cast<Distance>(memory.threshold[row] >> Tile::kIndexBits);
        uint32_t mask = 0;
#pragma unroll
        for (int j = 0; j < Sums::kColumns; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            Distance& distance = value[i][j][half * 2 + e];
            if constexpr (!Tile::kWide) distance = static_cast<Distance>(sums.sum[i][j][half * 2 + e]);
            distance = query_norm + image_norm[j][e] - 2 * distance;
            mask |= static_cast<uint32_t>(distance < limit) << (j * 2 + e);
          }
        pending[i][half] = mask;
      }

    // Offer them to the buffers, empty the buffers, and offer again what found its buffer full and still counts.
    const auto valid_columns = static_cast<int64_t>(valid_images - static_cast<int64_t>(tile) * Tile::kImages);
    while (true) {
      bool offered = false;
      uint32_t left = 0;
#pragma unroll
      for (int i = 0; i < Sums::kRows; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_query + i * 16 + half * 8 + lane / 4;
          uint32_t kept = 0;
          for (uint32_t mask = pending[i][half]; mask != 0; mask &= mask - 1) {
            const int bit = __ffs(static_cast<int>(mask)) - 1;
            Distance distance = 0;
#pragma unroll
            for (int j = 0; j < Sums::kColumns; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                if (bit == j * 2 + e) distance = value[i][j][half * 2 + e];
            const int column = warp_image + bit / 2 * 8 + lane % 4 * 2 + bit % 2;
            const Key key = static_cast<Key>(distance) << Tile::kIndexBits |
                            static_cast<Key>(static_cast<int64_t>(tile) * Tile::kImages + column);
            if (column >= valid_columns || !(key < memory.threshold[row])) continue;
            const uint32_t place = atomicAdd(&memory.buffered[row], 1u);
            if (place < kBuffer) {
              memory.buffer[row][place] = key;
              offered = true;
            } else {
              kept |= 1u << bit;
            }
          }
          pending[i][half] = kept;
          left |= kept;
        }
      if (!__syncthreads_or(offered)) break;  // a full buffer means that somebody's offer was taken
      empty_buffers(memory, lists, list_stride, k);
      if (!__syncthreads_or(left != 0)) break;
    }
  }

  if (lists_are_shared)
    for (int row = warp; row < Tile::kQueries && row < valid_queries; row += kWarps)
      for (int i = lane; i < k; i += kWarp)
        split_lists[row * static_cast<int64_t>(arguments.splits) * k + i] = lists[row * list_stride + i];
}

// ---- search: joining the splits ------------------------------------------------------------------------------------

struct MergeArguments {
  const Key* lists;
  int64_t query_count, images_per_split;
  int splits, k, index_bits;
  int64_t* indices;
  int64_t* distances;
};

// One warp per query.
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeArguments arguments) {
  const int lane = lane_number(), k = arguments.k;
  const int64_t query = static_cast<int64_t>(blockIdx.x) * kWarps + warp_number();
  if (query >= arguments.query_count) return;  // a whole warp; there are no block barriers here
  const Ranked none{kNoDistance, kNoDistance};
  WarpList<Ranked> best{none, none, lane};
  const Key* const keys = arguments.lists + query * arguments.splits * k;
  for (int split = 0; split < arguments.splits; ++split)
    for (int start = 0; start < k; start += kWarp) {
      const Key key = start + lane < k ? keys[static_cast<int64_t>(split) * k + start + lane] : kNoKey;
      Ranked mine = none;
      if (key != kNoKey) {
        mine.distance = static_cast<int64_t>(key >> arguments.index_bits);
        mine.index =
            split * arguments.images_per_split + static_cast<int64_t>(key & ((Key{1} << arguments.index_bits) - 1));
      }
      const Ranked last = best.at(k - 1);
      for (uint32_t better = __ballot_sync(kAllLanes, mine < last); better != 0; better &= better - 1)
        best.insert(shuffle(mine, __ffs(static_cast<int>(better)) - 1), k);
    }
  write_list(best, k, arguments.indices + query * k, arguments.distances + query * k);
}

// ---- centering ------------------------------------------------------------------------------------------------------

// One warp per image. Word is uint32_t where every image starts and ends at a multiple of 4 bytes, else uint8_t.
template <class Word>
__global__ void __launch_bounds__(kThreads)
    center_kernel(const uint8_t* images, int64_t n, int64_t d, int64_t row_bytes, int8_t* centered, int64_t* norms) {
  const int64_t image = static_cast<int64_t>(blockIdx.x) * kWarps + warp_number();
  if (image >= n) return;
  const uint8_t* const from = images + image * d;
  auto* const to = reinterpret_cast<uint32_t*>(centered + image * row_bytes);
  int64_t norm = 0;
  for (int64_t at = lane_number(); at < row_bytes / 4; at += kWarp) {
    uint32_t word = 0;
    if constexpr (sizeof(Word) == 4) {
      if (at * 4 < d) word = __ldg(reinterpret_cast<const uint32_t*>(from) + at) ^ 0x80808080u;  // −128 in every byte
    } else {
      for (int byte = 0; byte < 4; ++byte)
        if (at * 4 + byte < d) word |= static_cast<uint32_t>(__ldg(from + at * 4 + byte) ^ 0x80u) << (8 * byte);
    }
    to[at] = word;
    norm += __dp4a(static_cast<int>(word), static_cast<int>(word), 0);
  }
  for (int other = kWarp / 2; other > 0; other /= 2) norm += __shfl_xor_sync(kAllLanes, norm, other);
  if (lane_number() == 0) norms[image] = norm;
}

// ---- refinement ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t squared_difference(uint32_t a, uint32_t b, uint32_t sum) {
  const uint32_t difference = __vabsdiffu4(a, b);
  return __dp4a(difference, difference, sum);
}
__device__ __forceinline__ uint32_t squared_difference(uint8_t a, uint8_t b, uint32_t sum) {
  const int difference = static_cast<int>(a) - static_cast<int>(b);
  return sum + static_cast<uint32_t>(difference * difference);
}
__device__ __forceinline__ uint32_t squared_difference(const uint4& a, const uint4& b, uint32_t sum) {
  sum = squared_difference(a.x, b.x, sum);
  sum = squared_difference(a.y, b.y, sum);
  sum = squared_difference(a.z, b.z, sum);
  return squared_difference(a.w, b.w, sum);
}

// The squared distance of two images, by a warp; every lane returns it.
template <class Word>
__device__ __forceinline__ int64_t squared_distance(const Word* a, const Word* b, int64_t words) {
  constexpr int64_t kSpan = 65536 / sizeof(Word) * kWarp;  // 65,536 bytes per lane: 65,536 · 255² < 2³²
  int64_t total = 0;
  for (int64_t start = 0; start < words; start += kSpan) {
    const int64_t end = min(words, start + kSpan);
    uint32_t sum = 0;
#pragma unroll 4
    for (int64_t at = start + lane_number(); at < end; at += kWarp)
      sum = squared_difference(__ldg(a + at), __ldg(b + at), sum);
    total += sum;
  }
  for (int other = kWarp / 2; other > 0; other /= 2) total += __shfl_xor_sync(kAllLanes, total, other);
  return total;
}

struct RefineArguments {
  const uint8_t* queries;
  const uint8_t* images;
  int64_t image_count, dimension;
  const int64_t* candidates;
  const int64_t* offsets;
  int k;
  int64_t* indices;
  int64_t* distances;
};

// One block per query; its warps take candidates in turn. Word is the widest type to which every image is aligned.
template <class Word>
__global__ void __launch_bounds__(kThreads, 3) refine_kernel(const RefineArguments arguments) {
  using Lists = Ranked[kWarps][kMaxNeighbors];
  SIMT_STATIC_SHARED(Lists, lists);
  const int lane = lane_number(), warp = warp_number(), k = arguments.k;
  const auto query = static_cast<int64_t>(blockIdx.x);
  const int64_t d = arguments.dimension, words = d / static_cast<int64_t>(sizeof(Word));
  const auto* const image = reinterpret_cast<const Word*>(arguments.queries + query * d);
  const Ranked none{kNoDistance, -1};
  WarpList<Ranked> best{none, none, lane};
  const int64_t end = arguments.offsets[query + 1];
  for (int64_t at = arguments.offsets[query] + warp; at < end; at += kWarps) {
    const int64_t candidate = arguments.candidates[at];
    if (candidate < 0 || candidate >= arguments.image_count) continue;
    const Ranked found{squared_distance(image, reinterpret_cast<const Word*>(arguments.images + candidate * d), words),
                       candidate};
    if (!best.contains(found)) best.insert(found, k);
  }
  lists[warp][lane] = best.low;
  lists[warp][lane + kWarp] = best.high;
  __syncthreads();
  if (warp != 0) return;
  for (int other = 1; other < kWarps; ++other)
    for (int i = 0; i < k; ++i) {
      const Ranked entry = lists[other][i];
      if (entry.index < 0) break;
      if (!best.contains(entry)) best.insert(entry, k);
    }
  write_list(best, k, arguments.indices + query * k, arguments.distances + query * k);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

bool aligned(const void* pointer, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Plan {
  int64_t query_tiles, images_per_split;
  int splits;
};

// How many ways to split the training images: what takes the fewest rounds of tiles when every multiprocessor runs one
// block, counting a block's start and its first epilogues, where many candidates pass, as one tile more.
template <class Tile>
Plan plan(int64_t queries, int64_t n, int multiprocessors) {
  const int64_t query_tiles = (queries + Tile::kQueries - 1) / Tile::kQueries;
  const int64_t tiles = (n + Tile::kImages - 1) / Tile::kImages;
  // Positions within a split must fit their bits of a key, and tile numbers an int.
  const int64_t most_tiles = (int64_t{1} << min(Tile::kIndexBits, 31)) / Tile::kImages;
  const int64_t fewest_splits = (tiles + most_tiles - 1) / most_tiles;
  int64_t best = fewest_splits, best_cost = INT64_MAX;
  for (int64_t splits = fewest_splits; splits <= min(tiles, fewest_splits + 4 * multiprocessors); ++splits) {
    const int64_t rounds = (query_tiles * splits + multiprocessors - 1) / multiprocessors;
    const int64_t cost = rounds * ((tiles + splits - 1) / splits + 1);
    if (cost < best_cost) best = splits, best_cost = cost;
  }
  const int64_t tiles_per_split = (tiles + best - 1) / best;
  return {query_tiles, tiles_per_split * Tile::kImages,
          static_cast<int>((tiles + tiles_per_split - 1) / tiles_per_split)};
}

int make_plan(int64_t queries, int64_t n, int64_t d, Plan* result) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  *result = d <= kMaxNarrow ? plan<Narrow>(queries, n, multiprocessors) : plan<Wide>(queries, n, multiprocessors);
  return result->splits > 65535 ? kBadSize : kOk;
}

int check_search(int64_t queries, int64_t n, int64_t d, int k) {
  if (queries < 0 || queries > kMaxQueries || n < 0 || d < 1) return kBadSize;
  if (d > kMaxWide) return kBadDimension;
  if (k < 1 || k > kMaxNeighbors || k > n) return kBadNeighbors;
  return kOk;
}

template <class Tile>
int launch_search(const SearchArguments& arguments, const Plan& plan, cudaStream_t stream) {
  return simt::launch(search_kernel<Tile>,
                      dim3(static_cast<unsigned>(plan.query_tiles), static_cast<unsigned>(plan.splits)), dim3(kThreads),
                      sizeof(SearchMemory<Tile>), stream, arguments);
}

dim3 one_warp_each(int64_t items) { return dim3(static_cast<unsigned>((items + kWarps - 1) / kWarps)); }

}  // namespace

const char* error_string(int code) {
  switch (code) {
    case kOk: return "no error";
    case kBadSize: return "a size is negative or too large, or images have no values";
    case kBadNeighbors: return "k must be at least 1, at most 64 and at most the number of training images";
    case kBadDimension: return "images have more values than the search can count (16,909,060)";
    case kMisaligned: return "centered images must start at a multiple of 16 bytes, 64-bit arrays at a multiple of 8";
    case kNullPointer: return "an array is missing (null pointer)";
    case kSmallWorkspace: return "the workspace is smaller than search_workspace says";
    default: return code > 0 ? cudaGetErrorString(static_cast<cudaError_t>(code)) : "unknown error";
  }
}

int64_t centered_row(int64_t d) { return round_up(d, kRowBytes); }

int center(const uint8_t* images, int64_t n, int64_t d, int8_t* centered, int64_t* norms, void* stream) {
  if (n < 0 || d < 1 || n / kWarps >= 0x7fffffff) return kBadSize;
  if (n == 0) return kOk;
  if (!images || !centered || !norms) return kNullPointer;
  if (!aligned(centered, 16) || !aligned(norms, 8)) return kMisaligned;
  const auto kernel = d % 4 == 0 && aligned(images, 4) ? center_kernel<uint32_t> : center_kernel<uint8_t>;
  return simt::launch(kernel, one_warp_each(n), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), images, n, d,
                      centered_row(d), centered, norms);
}

int search_workspace(int64_t queries, int64_t n, int64_t d, int k, int64_t* bytes) {
  if (!bytes) return kNullPointer;
  *bytes = 0;
  if (const int error = check_search(queries, n, d, k)) return error;
  Plan plan;
  if (const int error = make_plan(queries, n, d, &plan)) return error;
  *bytes = queries * plan.splits * k * static_cast<int64_t>(sizeof(Key));
  return kOk;
}

int search(const int8_t* query_images, const int64_t* query_norms, int64_t queries, const int8_t* training_images,
           const int64_t* training_norms, int64_t n, int64_t d, int k, void* workspace, int64_t workspace_bytes,
           int64_t* indices, int64_t* squared_distances, void* stream) {
  if (const int error = check_search(queries, n, d, k)) return error;
  if (queries == 0) return kOk;
  if (!query_images || !query_norms || !training_images || !training_norms || !workspace || !indices ||
      !squared_distances)
    return kNullPointer;
  for (const void* array : {static_cast<const void*>(query_images), static_cast<const void*>(training_images)})
    if (!aligned(array, 16)) return kMisaligned;
  for (const void* array : {static_cast<const void*>(query_norms), static_cast<const void*>(training_norms),
                            static_cast<const void*>(workspace), static_cast<const void*>(indices),
                            static_cast<const void*>(squared_distances)})
    if (!aligned(array, 8)) return kMisaligned;
  Plan plan;
  if (const int error = make_plan(queries, n, d, &plan)) return error;
  if (workspace_bytes < queries * plan.splits * k * static_cast<int64_t>(sizeof(Key))) return kSmallWorkspace;

  auto* const lists = static_cast<Key*>(workspace);
  const bool narrow = d <= kMaxNarrow;
  const SearchArguments arguments{query_images,
                                  query_norms,
                                  training_images,
                                  training_norms,
                                  queries,
                                  n,
                                  centered_row(d),
                                  plan.images_per_split,
                                  plan.splits,
                                  k,
                                  lists};
  const auto on = static_cast<cudaStream_t>(stream);
  if (const int error = narrow ? launch_search<Narrow>(arguments, plan, on) : launch_search<Wide>(arguments, plan, on))
    return error;
  const MergeArguments merge{
      lists,   queries,          plan.images_per_split, plan.splits, k, narrow ? Narrow::kIndexBits : Wide::kIndexBits,
      indices, squared_distances};
  return simt::launch(merge_kernel, one_warp_each(queries), dim3(kThreads), 0, on, merge);
}

int refine(const uint8_t* query_images, int64_t queries, const uint8_t* training_images, int64_t n, int64_t d,
           const int64_t* candidates, const int64_t* offsets, int k, int64_t* indices, int64_t* squared_distances,
           void* stream) {
  if (queries < 0 || queries > kMaxQueries || n < 0 || d < 1) return kBadSize;
  if (k < 1 || k > kMaxNeighbors) return kBadNeighbors;
  if (queries == 0) return kOk;
  if (!query_images || !offsets || !indices || !squared_distances || (n > 0 && !training_images)) return kNullPointer;
  for (const int64_t* array :
       {candidates, offsets, static_cast<const int64_t*>(indices), static_cast<const int64_t*>(squared_distances)})
    if (!aligned(array, 8)) return kMisaligned;
  const auto fits = [&](int bytes) {
    return d % bytes == 0 && aligned(query_images, bytes) && aligned(training_images, bytes);
  };
  const auto kernel = fits(16) ? refine_kernel<uint4> : fits(4) ? refine_kernel<uint32_t> : refine_kernel<uint8_t>;
  const RefineArguments arguments{query_images, training_images,  n, d, candidates, offsets, k,
                                  indices,      squared_distances};
  return simt::launch(kernel, dim3(static_cast<unsigned>(queries)), dim3(kThreads), 0,
                      static_cast<cudaStream_t>(stream), arguments);
}

}  // namespace diffmem::nearest::cuda
