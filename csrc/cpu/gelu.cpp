// The Gaussian error linear unit; the equations are in kernels/gelu.py.
#include "activation.h"
#include "row_kernels.h"

ENGINE_KERNEL(void, gelu_elements_backward,
              (const void* grad, const void* x, int64_t size, bool bf16, bool tanh, void* grad_x))

#ifdef ENGINE_CLASS
namespace engine::ENGINE_CLASS {

struct Normal {
  vfloat below;    // Phi(x)
  vfloat density;  // phi(x)
};

// Phi(-a) = e^(-a^2/2) t p(t), t = 1 / (1 + 0.3 a), a >= 0: one polynomial for the whole axis, fitted with relative
// error 3.4e-9 up to a = 13.3 (e^(-a^2/2) is 0 in float32 from 13.2 on). Phi(a) = 1 - Phi(-a).
ENGINE_INLINE Normal normal(vfloat x) {
  const vfloat a = x < 0.0f ? -x : x;
  const vfloat e = vexp(-0.5f * (a * a));
  const vfloat t = 1.0f / (1.0f + 0.3f * a);
  vfloat p = splat(-2.058472671e-02f);
  p = p * t + 1.122175083e-01f;
  p = p * t + -2.276804745e-01f;
  p = p * t + 1.910432875e-01f;
  p = p * t + -7.877875865e-02f;
  p = p * t + 9.579380602e-02f;
  p = p * t + 7.852168381e-02f;
  p = p * t + 1.102055833e-01f;
  p = p * t + 1.195756122e-01f;
  p = p * t + 1.196864843e-01f;
  const vfloat tail = e * t * p;
  return {x < 0.0f ? tail : 1.0f - tail, e * 0.398942280401432678f};
}

constexpr float kTwoRootTwoOverPi = 1.59576912160573071f, kCubic = 0.044715f;

// 1 / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
ENGINE_INLINE vfloat tanh_gate(vfloat x) {
  return 1.0f / (1.0f + vexp(-kTwoRootTwoOverPi * x * (1.0f + kCubic * (x * x))));
}

template <typename T>
ENGINE_INLINE void forward(const T* x, int64_t size, bool tanh, T* out) {
  each_vector(size, [&](int64_t i, int64_t count) {
    const vfloat a = load_up_to(x + i, count);
    store_up_to(out + i, a * (tanh ? tanh_gate(a) : normal(a).below), count);
  });
}

// none: d x = d (Phi(x) + x phi(x)); tanh, with g the gate: d x = d (g + x g (1 - g) (2u)').
template <typename T>
ENGINE_INLINE void backward(const T* grad, const T* x, int64_t size, bool tanh, T* grad_x) {
  each_vector(size, [&](int64_t i, int64_t count) {
    const vfloat a = load_up_to(x + i, count);
    vfloat slope;
    if (tanh) {
      const vfloat g = tanh_gate(a), steep = kTwoRootTwoOverPi * (1.0f + 3.0f * kCubic * (a * a));
      slope = g + a * (g * (1.0f - g)) * steep;
    } else {
      const Normal n = normal(a);
      slope = n.below + a * n.density;
    }
    store_up_to(grad_x + i, load_up_to(grad + i, count) * slope, count);
  });
}

void gelu_elements(const void* x, int64_t size, bool bf16, bool tanh, void* out) {
  with_type(bf16, [&]<typename T>(T*) { forward(static_cast<const T*>(x), size, tanh, static_cast<T*>(out)); });
}

void gelu_elements_backward(const void* grad, const void* x, int64_t size, bool bf16, bool tanh, void* grad_x) {
  with_type(bf16, [&]<typename T>(T*) {
    backward(static_cast<const T*>(grad), static_cast<const T*>(x), size, tanh, static_cast<T*>(grad_x));
  });
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>
#include <torch/library.h>

namespace engine {
namespace {

at::Tensor gelu(const at::Tensor& x, bool tanh) {
  check_cpu_contiguous(x, "x");
  check_activation(x, "x");
  at::Tensor out = at::empty_like(x);
  const auto run = pick_gelu_elements();
  const bool bf16 = is_bf16(x);
  const int64_t width = x.element_size();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  at::parallel_for(0, x.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
    run(from + begin * width, end - begin, bf16, tanh, to + begin * width);
  });
  return out;
}

at::Tensor gelu_backward(const at::Tensor& grad, const at::Tensor& x, bool tanh) {
  check_cpu_contiguous(x, "x");
  check_activation(x, "x");
  check_activation_like(grad, x, "grad");
  at::Tensor grad_x = at::empty_like(x);
  const auto run = pick_gelu_elements_backward();
  const bool bf16 = is_bf16(x);
  const int64_t width = x.element_size();
  const char *up = static_cast<const char*>(grad.const_data_ptr()), *in = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(grad_x.data_ptr());
  at::parallel_for(0, x.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
    run(up + begin * width, in + begin * width, end - begin, bf16, tanh, to + begin * width);
  });
  return grad_x;
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) {
  m.impl("gelu", &engine::gelu);
  m.impl("gelu_backward", &engine::gelu_backward);
}
#endif
