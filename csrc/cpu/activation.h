// Activations are float32 or bfloat16: one loop serves both, chosen by a flag at the border of a kernel.
#pragma once

#include <cstdint>

#ifdef ENGINE_CLASS
#include "vec.h"

namespace engine::ENGINE_CLASS {

// f's argument only names the element type: with_type(bf16, [&]<typename T>(T*) { ... }).
template <typename F>
ENGINE_INLINE void with_type(bool bf16, F f) {
  if (bf16)
    f(static_cast<uint16_t*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}

// A whole vector, or its first `count` lanes and zeros: what is computed in a lane is the same.
template <typename T>
ENGINE_INLINE vfloat load_up_to(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_part(p, count, 0.0f);
}
template <typename T>
ENGINE_INLINE void store_up_to(T* p, vfloat v, int64_t count) {
  if (count >= kLanes)
    store(p, v);
  else
    store_part(p, v, count);
}

// f(offset, count) over [0, size), a vector at a time; only the last count may be below kLanes.
template <typename F>
ENGINE_INLINE void each_vector(int64_t size, F f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(i, static_cast<int64_t>(kLanes));
  if (i < size) f(i, size - i);
}

}  // namespace engine::ENGINE_CLASS
#else

#include "check.h"

namespace engine {

constexpr int64_t kElementsPerTask = 16384;  // some 10 us of work: less is not worth a thread

inline int64_t rows_per_task(int64_t width) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(width, 1));
}

inline bool is_bf16(const at::Tensor& t) { return t.scalar_type() == at::kBFloat16; }

inline void check_activation_like(const at::Tensor& t, const at::Tensor& like, const char* name) {
  check_cpu_contiguous(t, name);
  check_dtype(t, like.scalar_type(), name);
  TORCH_CHECK_VALUE(t.sizes() == like.sizes(), name, ": got shape ", t.sizes(), ", want ", like.sizes());
}

}  // namespace engine
#endif
