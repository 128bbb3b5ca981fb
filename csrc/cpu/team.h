// Threads that go through the phases of one long job together: one parallel region for all of it. Of each phase's tasks a
// thread owns a share, side by side, and takes it from the front: what it reads next lies behind what it reads now, and in
// the next layer the same rows and columns are its own again. A thread that is done takes from the end of others' shares,
// so that a slow one keeps nobody. A phase is over when its tasks are done, not when every thread has come: a thread that
// another process keeps from its core delays the others by the task it holds, if any, and skips what was done without it.
// Which thread runs a task changes nothing: tasks write to places of their own.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

namespace engine {

class Team {
 public:
  // One thread's view: every thread calls the same phases in the same order.
  class Member {
   public:
    Member(Team& team, int64_t thread) : team_(team), thread_(thread) {}
    int64_t thread() const { return thread_; }
    // Where this thread's share of `count` tasks ends.
    int64_t end_of_share(int64_t count) const { return team_.bound(thread_ + 1, count); }
    int64_t start_of_share(int64_t count) const { return team_.bound(thread_, count); }

    // task(i) for i = 0 ... count - 1, each by one thread; returns when all are done.
    template <typename Task>
    void each(int64_t count, Task task) {
      if (count == 0) return;
      const uint64_t phase = phase_++;
      for (int64_t other = 0; other < team_.size_; ++other) {
        const int64_t owner = (thread_ + other) % team_.size_;
        for (int64_t i; team_.take(owner, owner != thread_, phase, count, i);) {
          task(i);
          team_.finish(phase, count);
        }
      }
      team_.wait_for_end(phase);
    }

   private:
    Team& team_;
    const int64_t thread_;
    uint64_t phase_ = 0;
  };

  // task(thread, i) for i = 0 ... count - 1, on at most `threads` of them. A task must not throw.
  template <typename Task>
  static void each(int64_t count, int64_t threads, Task task) {
    if (std::min(count, threads) <= 1) {
      for (int64_t i = 0; i < count; ++i) task(int64_t{0}, i);
      return;
    }
    const auto all = [&](Member& member) { member.each(count, [&](int64_t i) { task(member.thread(), i); }); };
    gather(all, std::min(count, threads));
  }

  // run(member) on every thread of the team, at most `most`; inside another parallel region, on the caller alone.
  template <typename Run>
  static void gather(Run run, int64_t most = std::numeric_limits<int>::max()) {
    const int wanted = at::in_parallel_region() ? 1 : static_cast<int>(std::min<int64_t>(at::get_num_threads(), most));
    Team team(wanted);
#pragma omp parallel num_threads(wanted)
    {
      Member member(team, omp_get_thread_num());
      run(member);
    }
  }

 private:
  static constexpr int kSpins = 2000;  // some 50 us: then other processes may have the core
  static constexpr int kTaskBits = 22;
  static constexpr uint64_t kTasks = (uint64_t{1} << kTaskBits) - 1;

  // What was taken from a share's end (low bits) and front (middle) in a phase (high). An older phase: nothing yet.
  struct alignas(64) Share {
    std::atomic<uint64_t> taken{0};
  };

  explicit Team(int64_t size) : size_(size), shares_(static_cast<size_t>(size)) {}

  int64_t bound(int64_t thread, int64_t count) const { return count * thread / size_; }

  // A task of a share; false when there is none left. A thread that comes late finds the share taken, or in a later phase.
  bool take(int64_t owner, bool from_end, uint64_t phase, int64_t count, int64_t& task) {
    std::atomic<uint64_t>& taken = shares_[static_cast<size_t>(owner)].taken;
    const int64_t begin = bound(owner, count), end = bound(owner + 1, count);
    uint64_t state = taken.load(std::memory_order_acquire);
    for (;;) {
      if (state >> 2 * kTaskBits > phase) return false;
      const uint64_t now = state >> 2 * kTaskBits == phase ? state : phase << 2 * kTaskBits;
      const int64_t front = begin + static_cast<int64_t>(now >> kTaskBits & kTasks);
      const int64_t back = end - static_cast<int64_t>(now & kTasks);
      if (front >= back) return false;
      const uint64_t next = now + (from_end ? 1 : uint64_t{1} << kTaskBits);
      task = from_end ? back - 1 : front;
      if (taken.compare_exchange_weak(state, next, std::memory_order_acq_rel)) return true;
    }
  }

  void finish(uint64_t phase, int64_t count) {
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 < count) return;
    done_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
  }

  void wait_for_end(uint64_t phase) const {
    for (int spins = 0; phase_.load(std::memory_order_acquire) <= phase;) {
      if (++spins < kSpins)
        relax();
      else
        sched_yield();
    }
  }

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  alignas(64) std::atomic<uint64_t> phase_{0};
  alignas(64) std::atomic<int64_t> done_{0};  // tasks of the phase
  alignas(64) const int64_t size_;
  std::vector<Share> shares_;
};

}  // namespace engine
