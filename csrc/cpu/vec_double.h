// float64 accumulators for vectors of float32. Only for files compiled with ENGINE_CLASS.
#pragma once

#include "vec.h"

namespace engine::ENGINE_CLASS {

typedef double vdouble __attribute__((vector_size(8 * ENGINE_LANES)));

ENGINE_INLINE vdouble widen(vfloat v) { return __builtin_convertvector(v, vdouble); }
ENGINE_INLINE vfloat narrow(vdouble v) { return __builtin_convertvector(v, vfloat); }

// Always in the same order (a tree over the lanes).
ENGINE_INLINE double hsum(vdouble v) {
  double lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace engine::ENGINE_CLASS
