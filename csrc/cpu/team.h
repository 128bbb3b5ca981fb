// Threads that go through the phases of one long job together: one parallel region for all of it, tasks handed out one by
// one, a barrier after each phase. Which thread runs a task changes nothing: tasks write to places of their own.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <atomic>

namespace engine {

class Team {
 public:
  // run(thread) on every thread of the team; inside another parallel region, on the caller alone.
  template <typename Run>
  static void gather(Run run) {
    const int wanted = at::in_parallel_region() ? 1 : at::get_num_threads();
    Team team;
#pragma omp parallel num_threads(wanted)
    {
#pragma omp single
      team.size_ = omp_get_num_threads();  // the region may get fewer threads; `single` ends with a barrier
      run(team, omp_get_thread_num());
    }
  }

  int64_t size() const { return size_; }

  // task(i) for i = 0 ... count - 1, each by the thread that is free; returns when all are done. Every thread calls it.
  template <typename Task>
  void each(int64_t count, Task task) {
    for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next_.fetch_add(1, std::memory_order_relaxed))
      task(i);
    wait();
  }

 private:
  static constexpr int kSpins = 2000;  // some 50 us: then other processes may have the core

  void wait() {
    const int64_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins < kSpins)
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

  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> generation_{0};
  int64_t size_ = 1;
};

}  // namespace engine
