// silu(gate) * up; the equation is in kernels/swiglu.py.
#include "activation.h"
#include "row_kernels.h"

ENGINE_KERNEL(void, swiglu_elements_backward,
              (const void* grad, const void* gate, const void* up, int64_t size, bool bf16, void* grad_gate,
               void* grad_up))

#ifdef ENGINE_CLASS
namespace engine::ENGINE_CLASS {

void swiglu_elements(const void* gate, const void* up, int64_t size, bool bf16, void* out) {
  with_type(bf16, [&]<typename T>(T*) {
    each_vector(size, [&](int64_t i, int64_t count) {
      const vfloat g = load_up_to(static_cast<const T*>(gate) + i, count);
      const vfloat u = load_up_to(static_cast<const T*>(up) + i, count);
      store_up_to(static_cast<T*>(out) + i, g / (1.0f + vexp(-g)) * u, count);
    });
  });
}

// With s = sigmoid(g): d gate = d u s (1 + g (1 - s)), d up = d g s.
void swiglu_elements_backward(const void* grad, const void* gate, const void* up, int64_t size, bool bf16,
                              void* grad_gate, void* grad_up) {
  with_type(bf16, [&]<typename T>(T*) {
    each_vector(size, [&](int64_t i, int64_t count) {
      const vfloat d = load_up_to(static_cast<const T*>(grad) + i, count);
      const vfloat g = load_up_to(static_cast<const T*>(gate) + i, count);
      const vfloat u = load_up_to(static_cast<const T*>(up) + i, count);
      // 1 - s from e^-g: the difference itself would lose the digits of a large g.
      const vfloat e = vexp(-g), s = 1.0f / (1.0f + e);
      const vfloat rest = e > 1e38f ? splat(1.0f) : e * s;
      store_up_to(static_cast<T*>(grad_gate) + i, d * u * s * (1.0f + g * rest), count);
      store_up_to(static_cast<T*>(grad_up) + i, d * g * s, count);
    });
  });
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>
#include <torch/library.h>

namespace engine {
namespace {

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  check_cpu_contiguous(gate, "gate");
  check_activation(gate, "gate");
  check_activation_like(up, gate, "up");
  at::Tensor out = at::empty_like(gate);
  const auto run = pick_swiglu_elements();
  const bool bf16 = is_bf16(gate);
  const int64_t width = gate.element_size();
  const char *g = static_cast<const char*>(gate.const_data_ptr()), *u = static_cast<const char*>(up.const_data_ptr());
  char* o = static_cast<char*>(out.data_ptr());
  at::parallel_for(0, gate.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * width;
    run(g + at, u + at, end - begin, bf16, o + at);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& grad, const at::Tensor& gate,
                                                   const at::Tensor& up) {
  check_cpu_contiguous(gate, "gate");
  check_activation(gate, "gate");
  check_activation_like(up, gate, "up");
  check_activation_like(grad, gate, "grad");
  at::Tensor grad_gate = at::empty_like(gate), grad_up = at::empty_like(gate);
  const auto run = pick_swiglu_elements_backward();
  const bool bf16 = is_bf16(gate);
  const int64_t width = gate.element_size();
  const char *d = static_cast<const char*>(grad.const_data_ptr()), *g = static_cast<const char*>(gate.const_data_ptr());
  const char* u = static_cast<const char*>(up.const_data_ptr());
  char *dg = static_cast<char*>(grad_gate.data_ptr()), *du = static_cast<char*>(grad_up.data_ptr());
  at::parallel_for(0, gate.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * width;
    run(d + at, g + at, u + at, end - begin, bf16, dg + at, du + at);
  });
  return {grad_gate, grad_up};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) {
  m.impl("swiglu", &engine::swiglu);
  m.impl("swiglu_backward", &engine::swiglu_backward);
}
#endif
