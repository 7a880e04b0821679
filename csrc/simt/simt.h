// One include for kernels that must run on a GPU and, in tests, on a CPU.
//
// Under nvcc this file adds a few names to CUDA. Under a plain C++20 compiler (g++ -x c++ kernel.cu) it brings
// host.h, a stand-in for the part of CUDA that our kernels use, and the very same source runs on the CPU, block after
// block. Everything that exists in only one of the two worlds is behind one of these names:
//
//   SIMT_STATIC_SHARED(Type, name)   a __shared__ variable of a trivial type (an alias, for an array)
//
//   SIMT_DYNAMIC_SHARED(Type, name)  a reference to the launch's dynamic shared memory, seen as one Type
//
//   simt::launch(...)                a checked kernel launch; returns the error of this launch, never an older one
//
//   matrix.h                         tensor-core products and the loads of their fragments
//
//   async_copy.h                     copies from global to shared memory that run beside the arithmetic
//
// What the stand-in models. Grid, block and thread indices; static and dynamic shared memory; __syncthreads and its
// votes; __syncwarp, shuffles and ballots; integer intrinsics; atomics; tensor-core fragments lane by lane. Shared
// memory starts every block as 0xCD bytes, so missing initialization shows. An asynchronous copy turns its target into
// 0xCD when it is issued and delivers at the last moment that the program allows, so a missing wait shows. Stores
// behind the end of dynamic shared memory, lanes of a warp that meet in different collectives, and barriers that some
// threads never reach are reported. The threads of a block are fibers on one OS thread, run alternately in ascending
// and descending order, so that a dependence on order shows.
//
// Compiled with -fsanitize=thread, every CUDA thread is a thread to ThreadSanitizer, ordered by the barriers of the
// block and of the warp alone: a missing __syncthreads or __syncwarp is reported as a data race, whatever the order in
// which the fibers happened to run. Lanes of a warp race as well: nothing is implicitly synchronous. (OS threads and
// std::barrier were tried: a hundred times slower, and blind, because libstdc++ lets all barriers wait on a few shared
// counters, and every touch of such a counter counts as synchronization.)
//
// What it cannot. Inline PTX (it is behind wrappers with a plain equivalent); races between blocks, which run one after
// the other; the weaknesses of the GPU's memory model beyond C++'s; partial warp masks and collectives after some lanes
// have returned (both are refused); block sizes that are no multiple of 32 (refused); clusters, cooperative launches,
// textures, streams (a launch returns when it has finished); register limits, bank conflicts and time. For
// these there are `nvcc -Xptxas -v` and a GPU.
//
// How to use it: g++ -std=c++20 -Wno-unknown-pragmas -Icsrc -x c++ kernel.cu test.cpp (tests/csrc/simt_build.py).
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define SIMT_STATIC_SHARED(Type, name) __shared__ Type name
#define SIMT_DYNAMIC_SHARED(Type, name)                                 \
  extern __shared__ __align__(128) unsigned char simt_dynamic_shared[]; \
  Type& name = *reinterpret_cast<Type*>(simt_dynamic_shared)

namespace simt {

inline constexpr std::size_t kDefaultSharedLimit = 48 * 1024;  // more has to be asked for

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (shared_bytes > kDefaultSharedLimit) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace simt

#else
#include "simt/host.h"
#endif
