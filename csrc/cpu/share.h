// The one way in which the loops of all ops are shared among threads.
#pragma once

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace diffmem::cpu {

// The OpenMP runtime that is already in the process, PyTorch's as a rule. Its idle threads spin for a while before they
// sleep, so that threads of our own would have to share the cores with them: convolutions alternate with PyTorch's
// operations within milliseconds. Null where there is none, and in a process that was forked from the one that loaded
// this: the runtime's threads are not there, and it would wait for them forever.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__) || defined(__APPLE__)
inline const pid_t kLoadedIn = getpid();
#endif

inline OpenMpParallel open_mp_parallel() {
#if defined(__linux__) || defined(__APPLE__)
  static const auto found = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return kLoadedIn == getpid() ? found : nullptr;
#else
  return nullptr;
#endif
}

// Calls work(item) for all items in 0 … count − 1 on up to `threads` threads, the caller's among them. Each thread
// makes its own `work`. The first exception is passed on, and no further items are begun after it.
template <class MakeWorker>
void share(std::int64_t count, int threads, const MakeWorker& make_worker) {
  std::atomic<std::int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_lock;
  auto run = [&] {
    try {
      if (next >= count) return;
      auto work = make_worker();
      for (std::int64_t item = next++; item < count; item = next++) work(item);
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> guard(failure_lock);
      if (!failure) failure = std::current_exception();
    }
  };
  const auto wanted = static_cast<unsigned>(std::min<std::int64_t>(threads, count));
  if (wanted <= 1) {
    run();
  } else if (const OpenMpParallel parallel = open_mp_parallel()) {
    parallel([](void* body) { (*static_cast<decltype(run)*>(body))(); }, &run, wanted, 0);
  } else {
    std::vector<std::thread> others;
    try {
      for (unsigned i = 1; i < wanted; ++i) others.emplace_back(run);
    } catch (const std::system_error&) {  // the system gives no more threads: those there are do the work
    }
    run();
    for (std::thread& thread : others) thread.join();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace diffmem::cpu
