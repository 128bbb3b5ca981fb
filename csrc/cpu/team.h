// Threads that go through the phases of one long job together: one parallel region for all of it, tasks handed out one by
// one. A phase is over when its tasks are done, not when every thread has come: a thread that another process keeps from
// its core delays the others by the task it holds, if any, and skips what was done without it. Which thread runs a task
// changes nothing: tasks write to places of their own.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

namespace engine {

class Team {
 public:
  // One thread's view: every thread calls the same phases in the same order.
  class Member {
   public:
    Member(Team& team, int thread) : team_(team), thread_(thread) {}
    int thread() const { return thread_; }
    int64_t size() const { return team_.size_; }

    // task(i) for i = 0 ... count - 1, each by a thread that is free; returns when all are done.
    template <typename Task>
    void each(int64_t count, Task task) {
      if (count == 0) return;
      const uint64_t phase = phase_++;
      for (uint64_t i; team_.take(phase, count, i);) {
        task(static_cast<int64_t>(i));
        team_.finish(phase, count);
      }
    }

   private:
    Team& team_;
    const int thread_;
    uint64_t phase_ = 0;
  };

  // run(member) on every thread of the team; inside another parallel region, on the caller alone.
  template <typename Run>
  static void gather(Run run) {
    const int wanted = at::in_parallel_region() ? 1 : at::get_num_threads();
    Team team(wanted);
#pragma omp parallel num_threads(wanted)
    {
      Member member(team, omp_get_thread_num());
      run(member);
    }
  }

 private:
  static constexpr int kSpins = 2000;  // some 50 us: then other processes may have the core
  static constexpr int kTaskBits = 32;
  static constexpr uint64_t kTasks = (uint64_t{1} << kTaskBits) - 1;

  explicit Team(int size) : size_(size) {}

  // The phase's next task; false when the phase is over, which is waited for.
  bool take(uint64_t phase, uint64_t count, uint64_t& task) {
    uint64_t state = state_.load(std::memory_order_acquire);
    for (int spins = 0; state >> kTaskBits == phase;) {
      task = state & kTasks;
      if (task < count) {
        if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
        continue;
      }
      if (++spins < kSpins)
        relax();
      else
        sched_yield();
      state = state_.load(std::memory_order_acquire);
    }
    return false;
  }

  void finish(uint64_t phase, uint64_t count) {
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 < count) return;
    done_.store(0, std::memory_order_relaxed);
    state_.store((phase + 1) << kTaskBits, std::memory_order_release);
  }

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  alignas(64) std::atomic<uint64_t> state_{0};  // the phase, and its next task in the low bits
  alignas(64) std::atomic<uint64_t> done_{0};   // tasks of the phase
  alignas(64) const int64_t size_;
};

}  // namespace engine
