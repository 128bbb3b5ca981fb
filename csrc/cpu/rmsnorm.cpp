// Root-mean-square normalisation; the equation is in kernels/rmsnorm.py.
#include "activation.h"
#include "row_kernels.h"

ENGINE_KERNEL(void, rmsnorm_rows_backward,
              (const void* grad, bool grad_bf16, const void* x, bool x_bf16, const float* weight, const float* rstd,
               int64_t rows, int64_t width, void* grad_x, float* grad_weight))

#ifdef ENGINE_CLASS
namespace engine::ENGINE_CLASS {

void rmsnorm_rows(const void* x, bool x_bf16, const float* weight, int64_t rows, int64_t width, float eps, void* out,
                  bool out_bf16, float* rstd) {
  with_type(x_bf16, [&]<typename X>(X*) {
    with_type(out_bf16, [&]<typename Y>(Y*) {
      for (int64_t r = 0; r < rows; ++r) {
        const X* in = static_cast<const X*>(x) + r * width;
        Y* to = static_cast<Y*>(out) + r * width;
        vfloat squares = {};
        each_vector(width, [&](int64_t i, int64_t count) {
          const vfloat a = load_up_to(in + i, count);
          squares += a * a;
        });
        const float scale = 1.0f / __builtin_sqrtf(hsum(squares) / static_cast<float>(width) + eps);
        rstd[r] = scale;
        each_vector(width, [&](int64_t i, int64_t count) {
          store_up_to(to + i, load_up_to(in + i, count) * scale * load_up_to(weight + i, count), count);
        });
      }
    });
  });
}

// With n = x rstd and m = grad weight: d x = rstd (m - n mean(m n)), d weight += grad n.
void rmsnorm_rows_backward(const void* grad, bool grad_bf16, const void* x, bool x_bf16, const float* weight,
                           const float* rstd, int64_t rows, int64_t width, void* grad_x, float* grad_weight) {
  with_type(x_bf16, [&]<typename X>(X*) {
    with_type(grad_bf16, [&]<typename Y>(Y*) {
      for (int64_t r = 0; r < rows; ++r) {
        const X* in = static_cast<const X*>(x) + r * width;
        const Y* up = static_cast<const Y*>(grad) + r * width;
        X* to = static_cast<X*>(grad_x) + r * width;
        const float scale = rstd[r];
        vfloat products = {};
        each_vector(width, [&](int64_t i, int64_t count) {
          const vfloat n = load_up_to(in + i, count) * scale, g = load_up_to(up + i, count);
          products += g * load_up_to(weight + i, count) * n;
          store_up_to(grad_weight + i, load_up_to(grad_weight + i, count) + g * n, count);
        });
        const float mean = hsum(products) / static_cast<float>(width);
        each_vector(width, [&](int64_t i, int64_t count) {
          const vfloat n = load_up_to(in + i, count) * scale;
          const vfloat m = load_up_to(up + i, count) * load_up_to(weight + i, count);
          store_up_to(to + i, scale * (m - n * mean), count);
        });
      }
    });
  });
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "row_sums.h"

namespace engine {
namespace {

void check_rmsnorm(const at::Tensor& x, const at::Tensor& weight) {
  check_cpu_contiguous(x, "x");
  check_activation(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 2, "x: got shape ", x.sizes(), ", want (N, H)");
  check_float_vector(weight, x.size(1), "weight");
}

std::tuple<at::Tensor, at::Tensor> rmsnorm(const at::Tensor& x, const at::Tensor& weight, double eps,
                                           at::ScalarType out_dtype) {
  check_rmsnorm(x, weight);
  const int64_t rows = x.size(0), width = x.size(1);
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(out_dtype));
  check_activation(out, "out_dtype");
  at::Tensor rstd = at::empty({rows}, x.options().dtype(at::kFloat));
  const auto run = pick_rmsnorm_rows();
  const RowsIn from(x), to(out);
  const float* w = weight.const_data_ptr<float>();
  float* scale = rstd.data_ptr<float>();
  at::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
    run(from.row(begin), from.bf16, w, end - begin, width, static_cast<float>(eps), to.row(begin), to.bf16,
        scale + begin);
  });
  return {out, rstd};
}

std::tuple<at::Tensor, at::Tensor> rmsnorm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                    const at::Tensor& weight, const at::Tensor& rstd) {
  check_rmsnorm(x, weight);
  check_cpu_contiguous(grad, "grad");
  check_activation(grad, "grad");
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "grad: got shape ", grad.sizes(), ", want ", x.sizes());
  check_float_vector(rstd, x.size(0), "rstd");
  at::Tensor grad_x = at::empty_like(x);
  const auto run = pick_rmsnorm_rows_backward();
  const RowsIn from(x), up(grad), to(grad_x);
  const float *w = weight.const_data_ptr<float>(), *scale = rstd.const_data_ptr<float>();
  const int64_t width = x.size(1);
  at::Tensor grad_weight = sum_over_rows(x.size(0), width, [&](int64_t begin, int64_t end, float* partial) {
    run(up.row(begin), up.bf16, from.row(begin), from.bf16, w, scale + begin, end - begin, width, to.row(begin),
        partial);
  });
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) {
  m.impl("rmsnorm", &engine::rmsnorm);
  m.impl("rmsnorm_backward", &engine::rmsnorm_backward);
}
#endif
