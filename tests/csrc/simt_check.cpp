// Small kernels that show what the host stand-in for CUDA models and what it refuses; called by test_simt.py through
// ctypes and, under ThreadSanitizer (-DSIMT_CHECK_MAIN), as a program that is told which barriers to leave out.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "simt/async_copy.h"
#include "simt/matrix.h"
#include "simt/simt.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// out [blocks.y, blocks.x, 64, 8]
__global__ void collectives_kernel(int* out) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int votes = __syncthreads_count(thread < 40);
  const int any = __syncthreads_or(thread == 63);
  const int none = __syncthreads_or(0);
  int* mine = out + ((blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  mine[0] = __shfl_xor_sync(kAll, thread, 5);
  mine[1] = __shfl_up_sync(kAll, thread, 3);
  mine[2] = __shfl_down_sync(kAll, thread, 3);
  mine[3] = __shfl_sync(kAll, thread, 7);
  mine[4] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  mine[5] = __any_sync(kAll, thread == 40) * 2 + __all_sync(kAll, thread < 32);
  mine[6] = votes * 4 + any * 2 + none;
  mine[7] = static_cast<int>(blockIdx.x + 10 * blockIdx.y);
}

// out [8]: atomics over two blocks of 64 threads, which start at 0, 100, 0; then plain intrinsics
__global__ void intrinsics_kernel(int* out) {
  const int number = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&out[0], number);
  atomicMin(&out[1], 50 - number);
  atomicMax(&out[2], number);
  if (number == 0) {
    out[3] = __dp4a(static_cast<int>(0x80ff7f01u), static_cast<int>(0x80020305u), 7);
    out[4] = static_cast<int>(__dp4a(0x80ff7f01u, 0x80020305u, 7u));
    out[5] = static_cast<int>(__vabsdiffu4(0x00ff7f01u, 0xff000280u));
    out[6] = __popc(0xf0f0u) * 100 + __clz(0x00ff) + __clz(0);
    out[7] = __ffs(8) * 100 + __ffs(0) + min(3, max(1, 2));
  }
}

// a int8 [16, 32], b int8 [8, 32], c int32 [16, 8]: c += a bᵀ
__global__ void product_kernel(const unsigned char* a, const unsigned char* b, int* c) {
  struct Tile {
    alignas(16) unsigned char a[16][32], b[16][32];  // load_matrix_x4 reads 16 rows; the last 8 of b are not used
  };
  SIMT_STATIC_SHARED(Tile, tile);
  const int lane = static_cast<int>(threadIdx.x);
  simt::copy_async<16>(&tile.a[lane / 2][lane % 2 * 16], a + lane * 16, true);
  simt::copy_async<16>(&tile.b[lane / 2][lane % 2 * 16], b + lane % 16 * 16, lane < 16);
  simt::copy_async_commit();
  simt::copy_async_wait<0>();
  __syncwarp();
  std::uint32_t rows[4], columns[4];
  simt::load_matrix_x4(rows, &tile.a[lane % 16][lane / 16 * 16]);
  simt::load_matrix_x4(columns, &tile.b[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 16]);
  int sum[4];
  int* place[4];
  for (int e = 0; e < 4; ++e) {
    place[e] = c + (lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2;
    sum[e] = *place[e];
  }
  simt::multiply_add_s8(sum, rows, columns[0], columns[1]);
  for (int e = 0; e < 4; ++e) *place[e] = sum[e];
}

// out [4]: static and dynamic shared memory as a block finds it, a copy that was not waited for, one that was not valid
__global__ void garbage_kernel(const unsigned* in, unsigned* out) {
  SIMT_STATIC_SHARED(unsigned, fixed);
  using Three = unsigned[3];
  SIMT_DYNAMIC_SHARED(Three, dynamic);
  if (threadIdx.x == 0) {
    out[0] = fixed;
    out[1] = dynamic[0];
    dynamic[1] = 1;
    simt::copy_async<4>(&dynamic[2], in, false);
    simt::copy_async_commit();
    simt::copy_async<4>(&dynamic[1], in, true);
    simt::copy_async_commit();
    simt::copy_async_wait<1>();
    out[2] = dynamic[1];
    out[3] = dynamic[2];
    simt::copy_async_wait<0>();
    fixed = dynamic[1];  // what the next block must not see
  }
}

__global__ void rule_kernel(int rule) {
  using Four = int[4];
  SIMT_DYNAMIC_SHARED(Four, shared);
  const int lane = static_cast<int>(threadIdx.x);
  if (rule == 0 && lane < 16) __syncthreads();
  if (rule == 0 && lane >= 16) __syncwarp();
  if (rule == 1) lane < 16 ? (void)__ballot_sync(kAll, 1) : (void)__shfl_sync(kAll, 1, 0);
  if (rule == 2 && lane > 0) __syncwarp();
  if (rule == 3) (void)__any_sync(0xffffu, 1);
  if (rule == 4) (&shared[0])[4 + lane] = 0;
  if (rule == 5) {
    std::uint32_t parts[4];
    simt::load_matrix_x4(parts, &shared[1]);
  }
}

#ifdef SIMT_CHECK_MAIN
// Sums 64 numbers; leaves out the barrier that it is told to leave out. The total is right whenever fibers run in
// order.
__global__ void sum_kernel(const int* in, int* out, bool syncthreads, bool syncwarp) {
  using Values = int[64];
  using Sums = int[2];
  SIMT_STATIC_SHARED(Values, values);
  SIMT_STATIC_SHARED(Sums, sums);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  values[thread] = in[thread];
  if (syncwarp) __syncwarp();
  if (thread % 32 == 31) {
    sums[warp] = 0;
    for (int i = 0; i < 32; ++i) sums[warp] += values[warp * 32 + i];
  }
  if (syncthreads) __syncthreads();
  if (thread == 63) *out = sums[0] + sums[1];
}
#endif

std::string message;

template <class... Arguments>
const char* launch(Arguments... arguments) {
  try {
    message = cudaGetErrorString(simt::launch(arguments...));
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" {

const char* check_collectives(int* out) { return launch(collectives_kernel, dim3(2, 2), dim3(64), 0, nullptr, out); }

const char* check_intrinsics(int* out) { return launch(intrinsics_kernel, dim3(2), dim3(64), 0, nullptr, out); }

const char* check_product(const unsigned char* a, const unsigned char* b, int* c) {
  return launch(product_kernel, dim3(1), dim3(32), 0, nullptr, a, b, c);
}

const char* check_garbage(const unsigned* in, unsigned* out) {
  return launch(garbage_kernel, dim3(2), dim3(32), 12, nullptr, in, out);
}

const char* check_rule(int rule, int threads, int shared_bytes) {
  return launch(rule_kernel, dim3(1), dim3(static_cast<unsigned>(threads)), static_cast<std::size_t>(shared_bytes),
                nullptr, rule);
}

}  // extern "C"

#ifdef SIMT_CHECK_MAIN
int main(int count, char** arguments) {
  bool syncthreads = true, syncwarp = true;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "no-syncthreads") == 0) syncthreads = false;
    if (std::strcmp(arguments[i], "no-syncwarp") == 0) syncwarp = false;
  }
  int in[64], out = 0;
  for (int i = 0; i < 64; ++i) in[i] = i;
  const char* said =
      launch(sum_kernel, dim3(1), dim3(64), 0, nullptr, static_cast<const int*>(in), &out, syncthreads, syncwarp);
  std::printf("%s, %d\n", said, out);
  return 0;
}
#endif
