// Layer normalisation; the equation is in kernels/layernorm.py.
#include "activation.h"
#include "row_kernels.h"

ENGINE_KERNEL(void, layernorm_rows_backward,
              (const void* grad, bool grad_bf16, const void* x, bool x_bf16, const float* weight, const float* mean,
               const float* rstd, int64_t rows, int64_t width, void* grad_x, float* grad_weight))

#ifdef ENGINE_CLASS
namespace engine::ENGINE_CLASS {

// bias may be null.
void layernorm_rows(const void* x, bool x_bf16, const float* weight, const float* bias, int64_t rows, int64_t width,
                    float eps, void* out, bool out_bf16, float* mean, float* rstd) {
  with_type(x_bf16, [&]<typename X>(X*) {
    with_type(out_bf16, [&]<typename Y>(Y*) {
      for (int64_t r = 0; r < rows; ++r) {
        const X* in = static_cast<const X*>(x) + r * width;
        Y* to = static_cast<Y*>(out) + r * width;
        vfloat sum = {}, squares = {};
        each_vector(width, [&](int64_t i, int64_t count) { sum += load_up_to(in + i, count); });
        const float centre = hsum(sum) / static_cast<float>(width);
        each_vector(width, [&](int64_t i, int64_t count) {
          const vfloat a = (count >= kLanes ? load(in + i) : load_part(in + i, count, centre)) - centre;
          squares += a * a;
        });
        const float scale = 1.0f / __builtin_sqrtf(hsum(squares) / static_cast<float>(width) + eps);
        mean[r] = centre;
        rstd[r] = scale;
        each_vector(width, [&](int64_t i, int64_t count) {
          vfloat y = (load_up_to(in + i, count) - centre) * scale * load_up_to(weight + i, count);
          if (bias) y += load_up_to(bias + i, count);
          store_up_to(to + i, y, count);
        });
      }
    });
  });
}

// With n = (x - mean) rstd and m = grad weight: d x = rstd (m - mean(m) - n mean(m n)), d weight += grad n,
// d bias += grad. grad_weight holds d weight and behind it d bias.
void layernorm_rows_backward(const void* grad, bool grad_bf16, const void* x, bool x_bf16, const float* weight,
                             const float* mean, const float* rstd, int64_t rows, int64_t width, void* grad_x,
                             float* grad_weight) {
  float* grad_bias = grad_weight + width;
  with_type(x_bf16, [&]<typename X>(X*) {
    with_type(grad_bf16, [&]<typename Y>(Y*) {
      for (int64_t r = 0; r < rows; ++r) {
        const X* in = static_cast<const X*>(x) + r * width;
        const Y* up = static_cast<const Y*>(grad) + r * width;
        X* to = static_cast<X*>(grad_x) + r * width;
        const float centre = mean[r], scale = rstd[r];
        vfloat sum = {}, products = {};
        each_vector(width, [&](int64_t i, int64_t count) {
          const vfloat n = (load_up_to(in + i, count) - centre) * scale, g = load_up_to(up + i, count);
          const vfloat m = g * load_up_to(weight + i, count);
          sum += m;
          products += m * n;
          store_up_to(grad_weight + i, load_up_to(grad_weight + i, count) + g * n, count);
          store_up_to(grad_bias + i, load_up_to(grad_bias + i, count) + g, count);
        });
        const float mean_m = hsum(sum) / static_cast<float>(width);
        const float mean_mn = hsum(products) / static_cast<float>(width);
        each_vector(width, [&](int64_t i, int64_t count) {
          const vfloat n = (load_up_to(in + i, count) - centre) * scale;
          const vfloat m = load_up_to(up + i, count) * load_up_to(weight + i, count);
          store_up_to(to + i, scale * (m - mean_m - n * mean_mn), count);
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

void check_layernorm(const at::Tensor& x, const at::Tensor& weight) {
  check_cpu_contiguous(x, "x");
  check_activation(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 2, "x: got shape ", x.sizes(), ", want (N, H)");
  check_float_vector(weight, x.size(1), "weight");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layernorm(const at::Tensor& x, const at::Tensor& weight,
                                                         const std::optional<at::Tensor>& bias, double eps,
                                                         at::ScalarType out_dtype) {
  check_layernorm(x, weight);
  if (bias) check_float_vector(*bias, x.size(1), "bias");
  const int64_t rows = x.size(0), width = x.size(1);
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(out_dtype));
  check_activation(out, "out_dtype");
  at::Tensor mean = at::empty({rows}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
  const auto run = pick_layernorm_rows();
  const RowsIn from(x), to(out);
  const float *w = weight.const_data_ptr<float>(), *b = bias ? bias->const_data_ptr<float>() : nullptr;
  float *centre = mean.data_ptr<float>(), *scale = rstd.data_ptr<float>();
  at::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
    run(from.row(begin), from.bf16, w, b, end - begin, width, static_cast<float>(eps), to.row(begin), to.bf16,
        centre + begin, scale + begin);
  });
  return {out, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layernorm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                  const at::Tensor& weight, const at::Tensor& mean,
                                                                  const at::Tensor& rstd) {
  check_layernorm(x, weight);
  check_cpu_contiguous(grad, "grad");
  check_activation(grad, "grad");
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "grad: got shape ", grad.sizes(), ", want ", x.sizes());
  check_float_vector(mean, x.size(0), "mean");
  check_float_vector(rstd, x.size(0), "rstd");
  at::Tensor grad_x = at::empty_like(x);
  const auto run = pick_layernorm_rows_backward();
  const RowsIn from(x), up(grad), to(grad_x);
  const float* w = weight.const_data_ptr<float>();
  const float *centre = mean.const_data_ptr<float>(), *scale = rstd.const_data_ptr<float>();
  const int64_t width = x.size(1);
  const at::Tensor sums = sum_over_rows(x.size(0), 2 * width, [&](int64_t begin, int64_t end, float* partial) {
    run(up.row(begin), up.bf16, from.row(begin), from.bf16, w, centre + begin, scale + begin, end - begin, width,
        to.row(begin), partial);
  });
  return {grad_x, sums.narrow(0, 0, width).clone(), sums.narrow(0, width, width).clone()};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) {
  m.impl("layernorm", &engine::layernorm);
  m.impl("layernorm_backward", &engine::layernorm_backward);
}
#endif
