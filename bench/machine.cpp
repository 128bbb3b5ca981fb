// The limits of this machine, for bench/machine.py, which compiles it here with -march=native: one JSON object on stdout.
// Usage: machine THREADS
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The best of several timings of run(), which every thread of a team enters.
template <typename Run>
double best(int threads, int repeats, Run run) {
  double least = 1e9;
  for (int i = 0; i < repeats; ++i) {
    double begin = 0, end = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp barrier
#pragma omp master
      begin = now();
#pragma omp barrier
      run(omp_get_thread_num());
#pragma omp barrier
#pragma omp master
      end = now();
    }
    least = std::min(least, end - begin);
  }
  return least;
}

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));

float sink[1024];

void multiply_add(int64_t rounds, int thread) {
  Vector s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, a, b;
  for (int i = 0; i < kLanes; ++i) a[i] = 1.0f + 1e-7f * thread, b[i] = 1e-9f * i;
  for (int64_t r = 0; r < rounds; ++r) {
    s0 = s0 * a + b, s1 = s1 * a + b, s2 = s2 * a + b, s3 = s3 * a + b, s4 = s4 * a + b;
    s5 = s5 * a + b, s6 = s6 * a + b, s7 = s7 * a + b, s8 = s8 * a + b, s9 = s9 * a + b;
    asm volatile("" : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7), "+v"(s8),
                 "+v"(s9));  // or the ten would be one
  }
  sink[thread] += s0[0] + s1[0] + s2[0] + s3[0] + s4[0] + s5[0] + s6[0] + s7[0] + s8[0] + s9[0];
}

#if defined(__AMX_BF16__)
bool amx_allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

void tiles(int64_t rounds) {
  alignas(64) static uint8_t config[64];
  alignas(64) static char zeros[1024];
  config[0] = 1;
  for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;
  _tile_loadconfig(config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  for (int64_t r = 0; r < rounds; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}
#endif

double read_rate(int threads, int64_t bytes) {
  const int64_t each = bytes / threads / 256 * 256, rounds = std::max<int64_t>(1, (int64_t{1} << 30) / bytes);
  std::vector<char*> memory(threads);
#pragma omp parallel num_threads(threads)
  {
    char*& own = memory[omp_get_thread_num()];
    own = static_cast<char*>(std::aligned_alloc(4096, (each + 4095) / 4096 * 4096));
    std::memset(own, 1, each);
  }
  const double seconds = best(threads, 5, [&](int thread) {
    Vector sums[4] = {};
    for (int64_t r = 0; r < rounds; ++r) {
      const char* p = memory[thread];
      for (int64_t i = 0; i < each; i += 16 * kLanes) {
        for (int j = 0; j < 4; ++j) sums[j] += *reinterpret_cast<const Vector*>(p + i + 4 * kLanes * j);
      }
      asm volatile("" ::: "memory");
    }
    sink[thread] += sums[0][0] + sums[1][0] + sums[2][0] + sums[3][0];
  });
  for (char* own : memory) std::free(own);
  return static_cast<double>(each) * threads * rounds / seconds;
}

double copy_rate(int threads, int64_t bytes) {
  const int64_t each = bytes / threads / 4096 * 4096, rounds = std::max<int64_t>(1, (int64_t{1} << 29) / bytes);
  std::vector<char*> from(threads), to(threads);
#pragma omp parallel num_threads(threads)
  {
    const int t = omp_get_thread_num();
    from[t] = static_cast<char*>(std::aligned_alloc(4096, each)), to[t] = static_cast<char*>(std::aligned_alloc(4096, each));
    std::memset(from[t], 1, each), std::memset(to[t], 2, each);
  }
  const double seconds = best(threads, 5, [&](int t) {
    for (int64_t r = 0; r < rounds; ++r) std::memcpy(to[t], from[t], each);
  });
  for (int t = 0; t < threads; ++t) std::free(from[t]), std::free(to[t]);
  return 2.0 * each * threads * rounds / seconds;  // read and written
}

double barrier_seconds(int threads) {
  constexpr int kRounds = 20000;
  return best(threads, 5, [&](int) {
           for (int i = 0; i < kRounds; ++i) {
#pragma omp barrier
           }
         }) / kRounds;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  constexpr int64_t kRounds = 20'000'000;
  std::printf("{\"threads\": %d", threads);
  const double fma = best(threads, 5, [&](int t) { multiply_add(kRounds, t); });
  std::printf(", \"fma_gflops\": %.1f", 2.0 * 10 * kLanes * kRounds * threads / fma * 1e-9);
#if defined(__AMX_BF16__)
  if (amx_allowed()) {
    constexpr int64_t kTileRounds = 2'000'000;
    const double seconds = best(threads, 5, [&](int) { tiles(kTileRounds); });
    std::printf(", \"amx_bf16_gflops\": %.1f", 4.0 * 2 * 16 * 16 * 32 * kTileRounds * threads / seconds * 1e-9);
  }
#endif
  for (const char* what : {"read", "copy"}) {
    std::printf(", \"%s_gb_per_s\": {", what);
    const char* comma = "";
    for (int64_t kib : {32, 512, 4096, 32768, 262144, 1048576}) {
      const double rate = what[0] == 'r' ? read_rate(threads, kib << 10) : copy_rate(threads, kib << 10);
      std::printf("%s\"%ld KiB\": %.1f", comma, static_cast<long>(kib), rate * 1e-9);
      comma = ", ";
    }
    std::printf("}");
  }
  std::printf(", \"barrier_us\": %.3f}\n", barrier_seconds(threads) * 1e6);
}
