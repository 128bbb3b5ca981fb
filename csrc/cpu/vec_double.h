// float64 accumulators for vectors of float32. Only for files compiled with ENGINE_CLASS.
#pragma once

#include "vec.h"

namespace engine::ENGINE_CLASS {

typedef double vdouble __attribute__((vector_size(8 * ENGINE_LANES)));

ENGINE_INLINE vdouble widen(vfloat v) { return __builtin_convertvector(v, vdouble); }
ENGINE_INLINE vfloat narrow(vdouble v) { return __builtin_convertvector(v, vfloat); }

// Doubles of a register's size, and the floats that they hold: GCC keeps sums of larger vectors in memory.
typedef double vwide __attribute__((vector_size(4 * ENGINE_LANES)));
typedef int64_t vwide_int __attribute__((vector_size(4 * ENGINE_LANES)));
typedef uint64_t vwide_bits __attribute__((vector_size(4 * ENGINE_LANES)));
typedef float vhalf __attribute__((vector_size(2 * ENGINE_LANES)));
constexpr int kHalf = kLanes / 2;

// One instruction each, where __builtin_convertvector makes two halves and joins them.
ENGINE_INLINE vwide load_wide(const float* p) {
#if defined(__AVX512F__)
  return (vwide)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
  return (vwide)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  vhalf v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, vwide);
#endif
}
ENGINE_INLINE vwide load_wide(const int32_t* p) {
  typedef int32_t half_int __attribute__((vector_size(2 * ENGINE_LANES)));
  half_int v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, vwide);
}
ENGINE_INLINE void store_narrow(float* p, vwide v) {
  const vhalf narrow = __builtin_convertvector(v, vhalf);
  std::memcpy(p, &narrow, sizeof(narrow));
}
ENGINE_INLINE vwide splat_wide(double x) { return x - vwide{}; }

// Lanes from, from + 1, ... of a's lanes followed by b's.
#if ENGINE_LANES == 16
#define ENGINE_WINDOW(from) from, from + 1, from + 2, from + 3, from + 4, from + 5, from + 6, from + 7
#elif ENGINE_LANES == 8
#define ENGINE_WINDOW(from) from, from + 1, from + 2, from + 3
#else
#define ENGINE_WINDOW(from) from, from + 1
#endif
template <int from>
ENGINE_INLINE vwide window(vwide a, vwide b) {
  return __builtin_shufflevector(a, b, ENGINE_WINDOW(from));
}

// Always in the same order (a tree over the lanes).
ENGINE_INLINE double hsum(vwide v) {
  double lanes[kHalf];
  std::memcpy(lanes, &v, sizeof(v));
  for (int half = kHalf / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
ENGINE_INLINE double hsum(vdouble v) {
  double lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace engine::ENGINE_CLASS
