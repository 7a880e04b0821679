// The host stand-in itself: threads of a block, barriers, shared memory, warp collectives, intrinsics, and the few
// runtime calls that launchers make. Included by simt.h, which says what is modeled and what is not.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#else
#include <setjmp.h>
#endif

// ---- vocabulary of the language and the runtime --------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
  }
  return "unrecognized error code";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

namespace simt {

inline constexpr int kWarp = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;
inline constexpr unsigned char kPoison = 0xCD;
inline constexpr std::size_t kSharedLimit = 227 * 1024;  // the most that any of our architectures gives to one block
inline constexpr std::size_t kGuard = 256;  // poisoned bytes behind dynamic shared memory, checked after a block

// A kernel broke a rule; `launch` throws this on to its caller.
[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("simt: " + what); }

// ---- threads of a block: fibers ------------------------------------------------------------------------------------

// Under ThreadSanitizer the stand-in's own bookkeeping, which all fibers share on one OS thread, is not looked at.
#ifdef __SANITIZE_THREAD__
#define SIMT_UNWATCHED __attribute__((no_sanitize("thread")))
#else
#define SIMT_UNWATCHED
#endif

#ifdef __SANITIZE_THREAD__

// ThreadSanitizer knows a fiber as a thread of its own. They are dear to make, so the lanes of all blocks share one
// set. Switches order nothing; barriers do, and the start and the end of a block.
class FiberIdentities {
 public:
  ~FiberIdentities() {
    for (void* each : identities_) __tsan_destroy_fiber(each);
  }
  void* get(std::size_t index) {
    while (identities_.size() <= index) identities_.push_back(__tsan_create_fiber(0));
    return identities_[index];
  }

 private:
  std::vector<void*> identities_;
};
inline thread_local FiberIdentities fiber_identities;

struct Fiber {
  ucontext_t context = {};
  void* identity = nullptr;
  void prepare(std::size_t index) { identity = fiber_identities.get(index); }
  void prepare_scheduler() { identity = __tsan_get_current_fiber(); }
};

SIMT_UNWATCHED inline void switch_fiber(Fiber& from, Fiber& to) {
  __tsan_switch_to_fiber(to.identity, __tsan_switch_to_fiber_no_sync);
  swapcontext(&from.context, &to.context);
}

inline void comes_before(void* place) { __tsan_release(place); }  // what was done so far …
inline void comes_after(void* place) { __tsan_acquire(place); }   // … and what is done from now on

#else

// A context is needed to enter a new stack; from then on _setjmp and _longjmp switch without the system call that
// swapcontext makes.
struct Fiber {
  ucontext_t context = {};
  jmp_buf place = {};
  bool entered = false;
  void prepare(std::size_t) {}
  void prepare_scheduler() { entered = true; }
};

inline void switch_fiber(Fiber& from, Fiber& to) {
  if (_setjmp(from.place) != 0) return;
  if (to.entered) _longjmp(to.place, 1);
  to.entered = true;
  setcontext(&to.context);
}

inline void comes_before(void*) {}
inline void comes_after(void*) {}

#endif

// `wait` hands control to the scheduler until all members have arrived; members that leave are waited for no longer.
// For ThreadSanitizer, what comes before an arrival happens before what comes after the waits of that phase; a fiber
// may arrive at the next phase before another has left this one, so each of the two has an address of its own.
class Barrier {
 public:
  explicit Barrier(int members) : members_(members) {}
  void wait();
  SIMT_UNWATCHED void leave() {
    --members_;
    if (members_ > 0 && arrived_ == members_) next_phase();
  }
  SIMT_UNWATCHED unsigned phase() const { return phase_; }

 private:
  SIMT_UNWATCHED void next_phase() {
    arrived_ = 0;
    ++phase_;
  }
  int members_;
  int arrived_ = 0;
  unsigned phase_ = 0;
  char order_[2] = {};
};

enum class Collective : int { none, sync, shuffle, ballot, matrix_load, matrix_product };

struct Slot {
  Collective collective = Collective::none;
  unsigned turn = 0;  // the number of the exchange that wrote it, from 1
  alignas(16) unsigned char bytes[32] = {};
};

// Lanes exchange values through two sets of slots, used in turn: one barrier per exchange is enough, because a set is
// written again only after the barrier of the exchange in between, which every lane reaches after its last read.
struct Warp {
  Barrier barrier{kWarp};
  Slot slots[2][kWarp];
};

struct Block {
  Block(dim3 index_, dim3 shape_, dim3 grid_, std::size_t dynamic_bytes, std::size_t static_bytes)
      : index(index_),
        shape(shape_),
        grid(grid_),
        threads(static_cast<int>(shape_.x * shape_.y * shape_.z)),
        barrier(threads),
        dynamic_size(dynamic_bytes),
        dynamic_shared(allocate(dynamic_bytes)),
        static_shared(allocate(static_bytes)) {
    for (int w = 0; w < threads / kWarp; ++w) warps.push_back(std::make_unique<Warp>());
  }

  bool guard_is_intact() const {
    const unsigned char* guard = dynamic_shared.get() + dynamic_size;
    return std::all_of(guard, guard + kGuard, [](unsigned char byte) { return byte == kPoison; });
  }

  dim3 index, shape, grid;
  int threads;
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::atomic<int> votes[3] = {0, 0, 0};  // used in turn by __syncthreads_or and __syncthreads_count

  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<unsigned char, Free>;
  static Memory allocate(std::size_t bytes) {
    const std::size_t size = (bytes + kGuard + 127) / 128 * 128;
    Memory memory(static_cast<unsigned char*>(std::aligned_alloc(128, size)));
    std::memset(memory.get(), kPoison, size);
    return memory;
  }
  std::size_t dynamic_size;
  Memory dynamic_shared, static_shared;
};

struct PendingCopy {
  void* to;
  const void* from;  // null: zeros
  std::size_t bytes;
};

struct Lane {
  dim3 thread;
  int number = 0;  // in its warp
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned exchanges = 0;
  unsigned block_votes = 0;
  std::vector<PendingCopy> copies;       // asynchronous copies not yet delivered, oldest first
  std::vector<std::size_t> copy_groups;  // where each committed group ends in `copies`
  Fiber fiber;
  const Barrier* waiting_for = nullptr;
  unsigned waiting_phase = 0;
  bool finished = false;
};

inline thread_local Lane* running_lane = nullptr;
SIMT_UNWATCHED inline Lane& lane() { return *running_lane; }  // the CUDA thread that is running

// Offsets of static shared variables: one per SIMT_STATIC_SHARED in the program, fixed before main.
inline std::size_t static_shared_bytes = 0;
inline std::size_t reserve_static_shared(std::size_t bytes) {
  const std::size_t offset = static_shared_bytes;
  static_shared_bytes += (bytes + 127) / 128 * 128;
  return offset;
}
template <class Type, class Place>
struct StaticShared {
  static_assert(std::is_trivially_default_constructible_v<Type>, "shared variables are not initialized");
  static inline const std::size_t offset = reserve_static_shared(sizeof(Type));
  static Type& get() { return *reinterpret_cast<Type*>(lane().block->static_shared.get() + offset); }
};

template <class Type>
Type& dynamic_shared() {
  if (lane().block->dynamic_size < sizeof(Type))
    fail("the launch gives less dynamic shared memory than the kernel uses");
  return *reinterpret_cast<Type*>(lane().block->dynamic_shared.get());
}

inline constexpr std::size_t kStackBytes = 256 * 1024;
inline thread_local Fiber scheduler;
inline thread_local const std::function<void()>* running_kernel = nullptr;
inline thread_local std::exception_ptr failure;

SIMT_UNWATCHED inline void Barrier::wait() {
  const unsigned phase = phase_;
  comes_before(&order_[phase % 2]);
  if (++arrived_ == members_) {
    next_phase();
  } else {
    Lane& self = lane();
    self.waiting_for = this;
    self.waiting_phase = phase;
    switch_fiber(self.fiber, scheduler);
  }
  comes_after(&order_[phase % 2]);
}

inline thread_local char block_start, block_end;

SIMT_UNWATCHED inline void finish_lane() {
  Lane& self = lane();
  self.finished = true;
  comes_before(&block_end);
  switch_fiber(self.fiber, scheduler);
}

inline void fiber_main() {
  comes_after(&block_start);
  try {
    (*running_kernel)();
    lane().warp->barrier.leave();
    lane().block->barrier.leave();
  } catch (...) {
    failure = std::current_exception();
  }
  finish_lane();
}

inline void make_fiber(Fiber& fiber, std::size_t index, unsigned char* stack) {
  fiber.prepare(index);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

// Lets a lane run until it waits or ends. False if it still waits or had ended before.
SIMT_UNWATCHED inline bool run_lane(Lane& next) {
  if (next.finished || (next.waiting_for && next.waiting_for->phase() == next.waiting_phase)) return false;
  next.waiting_for = nullptr;
  running_lane = &next;
  switch_fiber(scheduler, next.fiber);
  return true;
}

SIMT_UNWATCHED inline bool has_finished(const Lane& lane) { return lane.finished; }

inline void run_block(std::vector<Lane>& lanes, const std::function<void()>& kernel) {
  const std::unique_ptr<unsigned char[]> stacks(new unsigned char[lanes.size() * kStackBytes]);
  running_kernel = &kernel;
  failure = nullptr;
  scheduler.prepare_scheduler();
  for (std::size_t i = 0; i < lanes.size(); ++i) make_fiber(lanes[i].fiber, i, stacks.get() + i * kStackBytes);
  comes_before(&block_start);
  std::size_t unfinished = lanes.size();
  for (bool ascending = true; unfinished > 0; ascending = !ascending) {
    bool progress = false;
    for (std::size_t i = 0; i < lanes.size(); ++i) {
      Lane& next = lanes[ascending ? i : lanes.size() - 1 - i];
      if (!run_lane(next)) continue;
      progress = true;
      if (failure) std::rethrow_exception(failure);
      unfinished -= has_finished(next);
    }
    if (!progress) fail("the threads of a block wait at different barriers, and none can go on");
  }
  comes_after(&block_end);
}

// Runs the kernel for every block of the grid, one block after the other, and returns when all is done.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > kSharedLimit) return cudaErrorInvalidValue;
  if (threads % kWarp != 0) fail("block sizes are multiples of 32 here");
  const std::function<void()> call = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        Block state(dim3(x, y, z), block, grid, shared_bytes, static_shared_bytes);
        std::vector<Lane> lanes(threads);
        for (std::size_t i = 0; i < threads; ++i) {
          lanes[i].thread = dim3(static_cast<unsigned>(i) % block.x, static_cast<unsigned>(i) / block.x % block.y,
                                 static_cast<unsigned>(i) / (block.x * block.y));
          lanes[i].number = static_cast<int>(i % kWarp);
          lanes[i].block = &state;
          lanes[i].warp = state.warps[i / kWarp].get();
        }
        run_block(lanes, call);
        if (!state.guard_is_intact()) fail("a store went past the end of dynamic shared memory");
      }
  return cudaSuccess;
}

// ---- warp collectives ----------------------------------------------------------------------------------------------

// Every lane gives a value; afterwards each may read any lane's value with `peek` until its next exchange but one.
template <class Type>
const Slot* exchange(Collective collective, const Type& value) {
  static_assert(std::is_trivially_copyable_v<Type> && sizeof(Type) <= sizeof(Slot::bytes));
  const unsigned turn = ++lane().exchanges;
  Slot* slots = lane().warp->slots[turn % 2];
  Slot& mine = slots[lane().number];
  mine.collective = collective;
  mine.turn = turn;
  std::memcpy(mine.bytes, &value, sizeof(Type));
  lane().warp->barrier.wait();
  for (int other = 0; other < kWarp; ++other) {
    if (slots[other].turn != turn) fail("a warp collective was not reached by all lanes of the warp");
    if (slots[other].collective != collective) fail("lanes of one warp met in different collectives");
  }
  return slots;
}

template <class Type>
Type peek(const Slot* slots, int from) {
  Type value;
  std::memcpy(&value, slots[from].bytes, sizeof(Type));
  return value;
}

inline void require_full(unsigned mask) {
  if (mask != kFullMask) fail("warp collectives take the full mask here");
}

template <class Type>
Type shuffle(unsigned mask, Type value, int from) {
  require_full(mask);
  const Slot* slots = exchange(Collective::shuffle, value);
  return from < 0 || from >= kWarp ? value : peek<Type>(slots, from);
}

// All threads of the block add; the sum is returned to all. A slot is cleared one vote after its use: by then everybody
// has read it, and nobody can be two votes further on.
inline int block_vote(int value) {
  Block& block = *lane().block;
  const unsigned turn = lane().block_votes++;
  block.votes[turn % 3].fetch_add(value, std::memory_order_relaxed);
  block.barrier.wait();
  block.votes[(turn + 2) % 3].store(0, std::memory_order_relaxed);
  return block.votes[turn % 3].load(std::memory_order_relaxed);
}

}  // namespace simt

#define threadIdx (::simt::lane().thread)
#define blockIdx (::simt::lane().block->index)
#define blockDim (::simt::lane().block->shape)
#define gridDim (::simt::lane().block->grid)

#define SIMT_STATIC_SHARED(Type, name) \
  struct name##_place {};              \
  Type& name = ::simt::StaticShared<Type, name##_place>::get()
#define SIMT_DYNAMIC_SHARED(Type, name) Type& name = ::simt::dynamic_shared<Type>()

// DIFFMEM_SIMT_MULTIPROCESSORS (default 4) steers how launchers split their work.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* text = std::getenv("DIFFMEM_SIMT_MULTIPROCESSORS");
  *value = text ? std::atoi(text) : 4;
  return cudaSuccess;
}

inline void __syncthreads() { simt::lane().block->barrier.wait(); }
inline int __syncthreads_or(int predicate) { return simt::block_vote(predicate != 0) != 0; }
inline int __syncthreads_count(int predicate) { return simt::block_vote(predicate != 0); }
inline void __syncwarp(unsigned mask = simt::kFullMask) {
  simt::require_full(mask);
  simt::exchange(simt::Collective::sync, 0);
}

template <class Type>
Type __shfl_sync(unsigned mask, Type value, int from) {
  return simt::shuffle(mask, value, from % simt::kWarp);
}
template <class Type>
Type __shfl_xor_sync(unsigned mask, Type value, int bits) {
  return simt::shuffle(mask, value, simt::lane().number ^ bits);
}
template <class Type>
Type __shfl_up_sync(unsigned mask, Type value, unsigned by) {
  return simt::shuffle(mask, value, simt::lane().number - static_cast<int>(by));
}
template <class Type>
Type __shfl_down_sync(unsigned mask, Type value, unsigned by) {
  return simt::shuffle(mask, value, simt::lane().number + static_cast<int>(by));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  simt::require_full(mask);
  const simt::Slot* slots = simt::exchange(simt::Collective::ballot, static_cast<int>(predicate != 0));
  unsigned result = 0;
  for (int other = 0; other < simt::kWarp; ++other)
    result |= static_cast<unsigned>(simt::peek<int>(slots, other)) << other;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == simt::kFullMask; }

// ---- intrinsics ----------------------------------------------------------------------------------------------------

using std::max;
using std::min;

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }

inline int __dp4a(int a, int b, int c) {
  auto sum = static_cast<unsigned>(c);
  for (int byte = 0; byte < 4; ++byte)
    sum += static_cast<unsigned>(static_cast<std::int8_t>(static_cast<unsigned>(a) >> (8 * byte)) *
                                 static_cast<std::int8_t>(static_cast<unsigned>(b) >> (8 * byte)));
  return static_cast<int>(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int byte = 0; byte < 4; ++byte) c += ((a >> (8 * byte)) & 255u) * ((b >> (8 * byte)) & 255u);
  return c;
}
inline unsigned __vabsdiffu4(unsigned a, unsigned b) {
  unsigned result = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const unsigned x = (a >> (8 * byte)) & 255u, y = (b >> (8 * byte)) & 255u;
    result |= (x > y ? x - y : y - x) << (8 * byte);
  }
  return result;
}

template <class Type>
Type __ldg(const Type* address) {
  return *address;
}

template <class Type>
Type atomicAdd(Type* address, Type value) {
  return std::atomic_ref<Type>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <class Type>
Type atomicMin(Type* address, Type value) {
  std::atomic_ref<Type> target(*address);
  Type seen = target.load(std::memory_order_relaxed);
  while (value < seen && !target.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
  return seen;
}
template <class Type>
Type atomicMax(Type* address, Type value) {
  std::atomic_ref<Type> target(*address);
  Type seen = target.load(std::memory_order_relaxed);
  while (seen < value && !target.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
  return seen;
}
