// One block of CUDA threads on one CPU thread: a fiber a CUDA thread, and the scheduler that switches between them.
//
// A fiber runs until it comes to a barrier or to an operation of its warp; then the scheduler takes another one that
// can run: the lowest, the highest, or one drawn by a seeded generator. A kernel that lacks a barrier gives other
// results in another order. What no GPU promises to run (a barrier that some threads do not reach, a shuffle whose
// lanes disagree, a lane that reads one that does not take part) ends the process with a message.
#pragma once

#include <ucontext.h>
#include <unistd.h>

#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "shared_memory.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulated {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = size_t{64} << 10;
constexpr int kExitCode = 86;  // of a kernel that a GPU need not run as written

enum class Order { forward, reverse, random };
enum class State { ready, waiting, finished };
enum class Operation { none, barrier, barrier_count, sync_warp, shuffle, ballot, reduce_add, reduce_min, reduce_max };

inline const char* name_of(Operation operation) {
  constexpr const char* kNames[] = {"nothing",     "__syncthreads", "__syncthreads_count", "__syncwarp",
                                    "__shfl_sync", "__ballot_sync", "__reduce_add_sync",   "__reduce_min_sync",
                                    "__reduce_max_sync"};
  return kNames[static_cast<int>(operation)];
}

// What a thread waits for. Threads that wait together must agree in operation, mask and line.
struct Wait {
  Operation operation = Operation::none;
  unsigned mask = 0;
  int line = 0;
  uint64_t value = 0;   // what the lane gives
  unsigned source = 0;  // the lane whose value it takes
  bool meets(const Wait& other) const {
    return operation == other.operation && mask == other.mask && line == other.line;
  }
};

// Where a fiber, or the scheduler, goes on: of the compiler's own setjmp, which makes no system call and which the
// sanitizers leave alone. ucontext only brings a fiber onto its stack, once.
using Jump = void*[5];

struct Fiber {
  ucontext_t context;
  Jump jump;
  bool started = false;  // it then runs a body a block, for good
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::finished;
  unsigned index = 0;
  dim3 thread;
  Wait wait;
  uint64_t received = 0;
  unsigned lane() const { return index % kLanes; }
  unsigned warp() const { return index / kLanes; }
};

class Block {
 public:
  Order order = Order::forward;
  uint64_t seed = 1;  // of the random order
  std::string kernel;
  dim3 grid, block, at;
  size_t dynamic_bytes = 0;
  SharedMemory shared;

  Fiber& current() { return *current_; }

  [[noreturn]] void fail(const char* format, ...) {
    std::fflush(stdout);
    std::fprintf(stderr, "emulated CUDA: kernel %s, block (%u, %u, %u): ", kernel.c_str(), at.x, at.y, at.z);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::fflush(stderr);
    _exit(kExitCode);
  }

  void run(const std::function<void()>& body) {
    body_ = &body;
    threads_ = block.x * block.y * block.z;
    while (fibers_.size() < threads_) fibers_.push_back(std::make_unique<Fiber>());
    ready_.fill(0);
    for (unsigned i = 0; i < threads_; ++i) start(i);
    for (int next; (next = choose()) >= 0;) enter(*fibers_[static_cast<unsigned>(next)]);
    for (unsigned i = 0; i < threads_; ++i)
      if (fibers_[i]->state != State::finished) deadlock();
    const size_t bytes = shared.bytes(), limit = SharedMemory::kLimit;
    if (bytes > limit) fail("%zu bytes of shared memory, over %zu", bytes, limit);
    const std::string broken = shared.end_block();
    if (!broken.empty()) fail("wrote outside the shared array %s", broken.c_str());
  }

  // The current thread comes to an operation of its warp or to a barrier; back when all that take part have come.
  uint64_t meet(const Wait& wait) {
    Fiber& self = *current_;
    self.wait = wait;
    self.state = State::waiting;
    ready_[self.index / 64] &= ~(uint64_t{1} << self.index % 64);
    const bool whole_block = wait.operation == Operation::barrier || wait.operation == Operation::barrier_count;
    if (whole_block ? block_has_come(self) : warp_has_come(self)) whole_block ? release_block() : release_warp(self);
    leave();
    return self.received;
  }

 private:
  std::vector<std::unique_ptr<Fiber>> fibers_;  // of the largest block so far
  std::array<uint64_t, kMaxThreads / 64> ready_{};
  const std::function<void()>* body_ = nullptr;
  Fiber* current_ = nullptr;
  Jump scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
  unsigned threads_ = 0;

  static void trampoline();

  void set_ready(Fiber& fiber) {
    fiber.state = State::ready;
    fiber.wait = {};
    ready_[fiber.index / 64] |= uint64_t{1} << fiber.index % 64;
  }

  void start(unsigned index) {
    Fiber& fiber = *fibers_[index];
    fiber.index = index;
    fiber.thread = dim3(index % block.x, index / block.x % block.y, index / (block.x * block.y));
    set_ready(fiber);
    if (fiber.stack) return;
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::trampoline, 0);
  }

  // The next fiber to run, or -1.
  int choose() {
    unsigned count = 0;
    for (const uint64_t word : ready_) count += static_cast<unsigned>(__builtin_popcountll(word));
    if (count == 0) return -1;
    unsigned skip = order == Order::forward ? 0 : order == Order::reverse ? count - 1 : draw() % count;
    for (unsigned w = 0; w < ready_.size(); ++w)
      for (uint64_t word = ready_[w]; word != 0; word &= word - 1)
        if (skip-- == 0) return static_cast<int>(w * 64 + static_cast<unsigned>(__builtin_ctzll(word)));
    return -1;
  }

  unsigned draw() {  // splitmix64
    uint64_t z = (seed += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return static_cast<unsigned>((z ^ (z >> 31)) >> 33);
  }

  __attribute__((noinline)) void enter(Fiber& fiber) {
    current_ = &fiber;
#if EMULATED_ASAN
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fiber.stack.get(), kStackBytes);
#endif
    if (__builtin_setjmp(scheduler_) == 0) go_on(fiber);
#if EMULATED_ASAN
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
    current_ = nullptr;
  }

  __attribute__((noinline)) void leave() {
#if EMULATED_ASAN
    __sanitizer_start_switch_fiber(&current_->fake_stack, scheduler_stack_, scheduler_bytes_);
#endif
    if (__builtin_setjmp(current_->jump) == 0) go_back();
#if EMULATED_ASAN
    __sanitizer_finish_switch_fiber(current_->fake_stack, &scheduler_stack_, &scheduler_bytes_);
#endif
  }

  __attribute__((noinline, no_sanitize("address"))) static void go_on(Fiber& fiber) {
    if (fiber.started) __builtin_longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  __attribute__((noinline, no_sanitize("address"))) void go_back() { __builtin_longjmp(scheduler_, 1); }

  void body() {
#if EMULATED_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_bytes_);
#endif
    while (true) {
      (*body_)();
      Fiber& self = *current_;
      self.state = State::finished;
      ready_[self.index / 64] &= ~(uint64_t{1} << self.index % 64);
      for (unsigned i = 0; i < threads_; ++i)
        if (fibers_[i]->state == State::waiting && is_barrier(fibers_[i]->wait))
          fail("divergent barrier: thread %u has returned while thread %u waits in %s at line %d", self.index, i,
               name_of(fibers_[i]->wait.operation), fibers_[i]->wait.line);
      leave();  // until the next block
    }
  }

  static bool is_barrier(const Wait& wait) {
    return wait.operation == Operation::barrier || wait.operation == Operation::barrier_count;
  }

  bool block_has_come(const Fiber& self) {
    bool all = true;
    for (unsigned i = 0; i < threads_; ++i) {
      const Fiber& other = *fibers_[i];
      if (other.state == State::finished)
        fail("divergent barrier: thread %u waits in %s at line %d, thread %u has returned", self.index,
             name_of(self.wait.operation), self.wait.line, i);
      if (other.state == State::waiting && is_barrier(other.wait) && !other.wait.meets(self.wait))
        fail("divergent barrier: thread %u waits in %s at line %d, thread %u in %s at line %d", self.index,
             name_of(self.wait.operation), self.wait.line, i, name_of(other.wait.operation), other.wait.line);
      all &= other.state == State::waiting && is_barrier(other.wait);
    }
    return all;
  }

  void release_block() {
    uint64_t count = 0;
    for (unsigned i = 0; i < threads_; ++i) count += fibers_[i]->wait.value != 0;
    for (unsigned i = 0; i < threads_; ++i) {
      fibers_[i]->received = count;
      set_ready(*fibers_[i]);
    }
  }

  Fiber* lane_of(const Fiber& self, unsigned lane) {
    const unsigned index = self.warp() * kLanes + lane;
    return index < threads_ ? fibers_[index].get() : nullptr;
  }

  bool warp_has_come(const Fiber& self) {
    const Wait& wait = self.wait;
    const char* what = name_of(wait.operation);
    if (!(wait.mask >> self.lane() & 1))
      fail("thread %u (lane %u): %s at line %d with mask 0x%08x, which lacks its own lane", self.index, self.lane(),
           what, wait.line, wait.mask);
    bool all = true;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (!(wait.mask >> lane & 1)) continue;
      const Fiber* other = lane_of(self, lane);
      if (other == nullptr || other->state == State::finished)
        fail("thread %u: %s at line %d names lane %u, which %s", self.index, what, wait.line, lane,
             other == nullptr ? "the block does not have" : "has returned");
      if (other->state == State::waiting && !is_barrier(other->wait) && !other->wait.meets(wait))
        fail("divergent warp: thread %u is in %s at line %d with mask 0x%08x, thread %u in %s at line %d with mask "
             "0x%08x", self.index, what, wait.line, wait.mask, other->index, name_of(other->wait.operation),
             other->wait.line, other->wait.mask);
      all &= other->state == State::waiting && other->wait.meets(wait);
    }
    return all;
  }

  void release_warp(const Fiber& self) {
    const Wait wait = self.wait;
    for (unsigned lane = 0; lane < kLanes; ++lane)
      if (wait.mask >> lane & 1) lane_of(self, lane)->received = result(*lane_of(self, lane));
    for (unsigned lane = 0; lane < kLanes; ++lane)
      if (wait.mask >> lane & 1) set_ready(*lane_of(self, lane));
  }

  uint64_t result(const Fiber& fiber) {
    const Wait& wait = fiber.wait;
    if (wait.operation == Operation::sync_warp) return 0;
    if (wait.operation == Operation::shuffle) {
      if (!(wait.mask >> wait.source & 1))
        fail("thread %u: __shfl_sync at line %d reads lane %u, which mask 0x%08x lacks", fiber.index, wait.line,
             wait.source, wait.mask);
      return lane_of(fiber, wait.source)->wait.value;
    }
    return over_lanes(fiber);
  }

  uint64_t over_lanes(const Fiber& fiber) {  // the reductions take int32, as the lanes gave it
    const Operation operation = fiber.wait.operation;
    int32_t sum = 0;
    uint32_t votes = 0;
    bool first = true;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (!(fiber.wait.mask >> lane & 1)) continue;
      const uint64_t given = lane_of(fiber, lane)->wait.value;
      const auto bits = static_cast<uint32_t>(given);
      const auto value = static_cast<int32_t>(bits);
      votes |= static_cast<uint32_t>(given != 0) << lane;
      if (operation == Operation::reduce_min) sum = first || value < sum ? value : sum;
      if (operation == Operation::reduce_max) sum = first || value > sum ? value : sum;
      if (operation == Operation::reduce_add) sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + bits);
      first = false;
    }
    return operation == Operation::ballot ? votes : static_cast<uint32_t>(sum);
  }

  [[noreturn]] void deadlock() {
    std::string waiting;
    for (unsigned i = 0, shown = 0; i < threads_ && shown < 4; ++i) {
      const Fiber& fiber = *fibers_[i];
      if (fiber.state != State::waiting) continue;
      waiting += (shown++ ? ", thread " : "thread ") + std::to_string(i) + " in " + name_of(fiber.wait.operation) +
                 " at line " + std::to_string(fiber.wait.line);
    }
    fail("deadlock: no thread can go on: %s", waiting.c_str());
  }
};

inline Block& machine() {
  static Block one;
  return one;
}

inline void Block::trampoline() { machine().body(); }

}  // namespace emulated
