// Sharing the items of a loop among threads.
#pragma once

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace diffmem::cpu {

// The OpenMP runtime that is already in the process, PyTorch's as a rule. Its idle threads spin for a while before they
// sleep, so that threads of our own would have to share the cores with them: convolutions alternate with PyTorch's
// operations within milliseconds. Null where there is none.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline OpenMpParallel open_mp_parallel() {
#if defined(__linux__) || defined(__APPLE__)
  static const auto found = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

// Calls work(item) for all items in 0 … count − 1 on up to `threads` threads, the caller's among them. Each thread
// makes its own `work`.
template <class MakeWorker>
void share(std::int64_t count, int threads, const MakeWorker& make_worker) {
  std::atomic<std::int64_t> next{0};
  auto run = [&] {
    auto work = make_worker();
    for (std::int64_t item = next++; item < count; item = next++) work(item);
  };
  const auto wanted = static_cast<unsigned>(std::min<std::int64_t>(threads, count));
  if (wanted <= 1) {
    run();
  } else if (const OpenMpParallel parallel = open_mp_parallel()) {
    parallel([](void* body) { (*static_cast<decltype(run)*>(body))(); }, &run, wanted, 0);
  } else {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < wanted; ++i) others.emplace_back(run);
    run();
    for (std::thread& thread : others) thread.join();
  }
}

}  // namespace diffmem::cpu
