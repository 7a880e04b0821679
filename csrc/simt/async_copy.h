// Copies from global to shared memory that run beside the arithmetic (cp.async, from sm_80 on).
//
// A thread issues copies, closes them into a group with `copy_async_commit`, and `copy_async_wait<n>` returns when all
// but its n newest groups have arrived; a barrier then makes them visible to the other threads. The plain equivalent is
// as unhelpful as the hardware may be: the target turns to garbage at once, and the data arrive only in the wait.
#pragma once

#include "simt/simt.h"

namespace simt {

// Copies `kBytes` (4, 8 or 16; both addresses aligned to that), or writes zeros where `valid` is false (then `from`
// is not read, but must be an address of global memory).
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDACC__
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // past L1: a tile is read once per block
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
#else
  if (reinterpret_cast<std::uintptr_t>(to) % kBytes != 0 || reinterpret_cast<std::uintptr_t>(from) % kBytes != 0)
    fail("copy_async: an address is not aligned to the size of the copy");
  std::memset(to, kPoison, kBytes);
  lane().copies.push_back({to, valid ? from : nullptr, kBytes});
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  lane().copy_groups.push_back(lane().copies.size());
#endif
}

template <int kNewest>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#else
  const std::size_t groups = lane().copy_groups.size();
  if (groups <= kNewest) return;
  const std::size_t arrived = lane().copy_groups[groups - kNewest - 1];
  for (std::size_t i = 0; i < arrived; ++i) {
    const PendingCopy& copy = lane().copies[i];
    if (copy.from)
      std::memcpy(copy.to, copy.from, copy.bytes);
    else
      std::memset(copy.to, 0, copy.bytes);
  }
  lane().copies.erase(lane().copies.begin(), lane().copies.begin() + static_cast<std::ptrdiff_t>(arrived));
  lane().copy_groups.erase(lane().copy_groups.begin(), lane().copy_groups.end() - kNewest);
  for (std::size_t& end : lane().copy_groups) end -= arrived;
#endif
}

}  // namespace simt
