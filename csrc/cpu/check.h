// Checks at an operator's border. Messages say: what was given, what is wanted.
#pragma once

#include "tensors.h"

namespace engine {

inline void check_cpu_contiguous(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": got device ", t.device(), ", want cpu");
  TORCH_CHECK_VALUE(t.is_contiguous(), name, ": got strides ", t.strides(), " for shape ", t.sizes(),
                    ", want a contiguous tensor; call .contiguous()");
}

inline void check_dtype(const at::Tensor& t, at::ScalarType want, const char* name) {
  TORCH_CHECK_VALUE(t.scalar_type() == want, name, ": got dtype ", t.scalar_type(), ", want ", want);
}

// float32 or bfloat16: what activations and weights may be.
inline void check_activation(const at::Tensor& t, const char* name) {
  const auto dtype = t.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16, name, ": got dtype ", dtype,
                    ", want float32 or bfloat16 (float64 runs on the reference backend)");
}

inline void check_float_vector(const at::Tensor& t, int64_t size, const char* name) {
  check_cpu_contiguous(t, name);
  check_dtype(t, at::kFloat, name);
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == size, name, ": got shape ", t.sizes(), ", want (", size, ",)");
}

// Offsets: int32 (S+1,), first 0, never decreasing, last = total.
inline void check_offsets(const at::Tensor& cu, int64_t total, const char* name, const char* counted = "tokens") {
  check_cpu_contiguous(cu, name);
  check_dtype(cu, at::kInt, name);
  TORCH_CHECK_VALUE(cu.dim() == 1 && cu.size(0) >= 1, name, ": got shape ", cu.sizes(), ", want (S+1,)");
  const int32_t* offset = cu.const_data_ptr<int32_t>();
  const int64_t last = cu.size(0) - 1;
  TORCH_CHECK_VALUE(offset[0] == 0, name, "[0]: got ", offset[0], ", want 0");
  for (int64_t s = 0; s < last; ++s)
    TORCH_CHECK_VALUE(offset[s] <= offset[s + 1], name, ": got ", offset[s], " before ", offset[s + 1], " at ", s,
                      ", want offsets that never decrease");
  TORCH_CHECK_VALUE(offset[last] == total, name, "[-1]: got ", offset[last], ", want the number of ", counted, " ",
                    total);
}

}  // namespace engine
