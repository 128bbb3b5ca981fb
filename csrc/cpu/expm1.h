// e^x - 1 - x without the loss of digits near 0. Only for files compiled with ENGINE_CLASS.
#pragma once

#include "vec.h"

namespace engine::ENGINE_CLASS {

// Below 1 in size the series x^2/2 + x^3/6 + ... to x^12, whose rest is under 2^-27 of the result; above it e^x itself,
// whose rounding is small against the result there. e^x - 1 is this plus x.
ENGINE_INLINE vfloat vexpm1_minus(vfloat x) {
  vfloat tail = splat(1.0f);
  for (int k = 12; k > 2; --k) tail = tail * (x * (1.0f / k)) + 1.0f;
  const vfloat series = x * x * 0.5f * tail;
  const vfloat direct = vexp(x) - 1.0f - x;
  return (x < 1.0f) & (x > -1.0f) ? series : direct;
}

}  // namespace engine::ENGINE_CLASS
