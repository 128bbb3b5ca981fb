// e^x - 1 and e^x - 1 - x without the loss of digits near 0. Only for files compiled with ENGINE_CLASS.
#pragma once

#include "vec.h"

namespace engine::ENGINE_CLASS {

// x^2/2 + x^3/6 + ... to x^12: below 1 in size the rest is under 2^-27 of the result.
ENGINE_INLINE vfloat expm1_series(vfloat x) {
  vfloat tail = splat(1.0f);
  for (int k = 12; k > 2; --k) tail = tail * (x * (1.0f / k)) + 1.0f;
  return x * x * 0.5f * tail;
}

// Above 1 in size the rounding of e^x is small against either result.
ENGINE_INLINE vfloat vexpm1_minus(vfloat x) {
  return (x < 1.0f) & (x > -1.0f) ? expm1_series(x) : vexp(x) - 1.0f - x;
}
ENGINE_INLINE vfloat vexpm1(vfloat x) {
  return (x < 1.0f) & (x > -1.0f) ? expm1_series(x) + x : vexp(x) - 1.0f;
}

}  // namespace engine::ENGINE_CLASS
