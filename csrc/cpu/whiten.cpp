// Whitening to mean 0 and variance 1; the equations are in kernels/whiten.py.
#include <cstdint>

#include "dispatch.h"

ENGINE_KERNEL(double, sum_of, (const float* x, int64_t n))
ENGINE_KERNEL(double, sum_of_squares, (const float* x, int64_t n, double mean))
ENGINE_KERNEL(double, sum_of_products, (const float* x, const float* grad, int64_t n, double mean))
// y = (x - mean) * scale + shift.
ENGINE_KERNEL(void, scale_tokens, (const float* x, int64_t n, double mean, double scale, double shift, float* y))
// grad_x = scale * grad + slope * (x - mean) + shift.
ENGINE_KERNEL(void, scale_tokens_backward,
              (const float* x, const float* grad, int64_t n, double mean, double scale, double slope, double shift,
               float* grad_x))

#ifdef ENGINE_CLASS
#include "vec_double.h"

namespace engine::ENGINE_CLASS {

double sum_of(const float* x, int64_t n) {
  vdouble sum{};
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes) sum += widen(load(x + t));
  if (t < n) sum += widen(load_part(x + t, n - t, 0));
  return hsum(sum);
}

double sum_of_squares(const float* x, int64_t n, double mean) {
  vdouble sum{};
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes) {
    const vdouble centred = widen(load(x + t)) - mean;
    sum += centred * centred;
  }
  double rest = 0.0;  // lanes beyond the end would add the square of the mean
  for (; t < n; ++t) rest += (x[t] - mean) * (x[t] - mean);
  return hsum(sum) + rest;
}

double sum_of_products(const float* x, const float* grad, int64_t n, double mean) {
  vdouble sum{};
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes) sum += (widen(load(x + t)) - mean) * widen(load(grad + t));
  if (t < n) sum += (widen(load_part(x + t, n - t, 0)) - mean) * widen(load_part(grad + t, n - t, 0));
  return hsum(sum);
}

void scale_tokens(const float* x, int64_t n, double mean, double scale, double shift, float* y) {
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes) store(y + t, narrow((widen(load(x + t)) - mean) * scale + shift));
  if (t < n) store_part(y + t, narrow((widen(load_part(x + t, n - t, 0)) - mean) * scale + shift), n - t);
}

void scale_tokens_backward(const float* x, const float* grad, int64_t n, double mean, double scale, double slope,
                           double shift, float* grad_x) {
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes)
    store(grad_x + t,
          narrow(widen(load(grad + t)) * scale + (widen(load(x + t)) - mean) * slope + shift));
  if (t == n) return;
  const vdouble g = widen(load_part(grad + t, n - t, 0)), centred = widen(load_part(x + t, n - t, 0)) - mean;
  store_part(grad_x + t, narrow(g * scale + centred * slope + shift), n - t);
}

}  // namespace engine::ENGINE_CLASS
#else

#include <torch/library.h>

#include <cmath>

#include "blocks.h"
#include "check.h"

namespace engine {
namespace {

constexpr double kEps = 1e-8;

struct Statistics {
  double mean, scale;  // scale = 1 / sqrt(variance + eps)
};

Statistics statistics(const float* x, int64_t num_tokens) {
  const auto sum = pick_sum_of();
  const auto squares = pick_sum_of_squares();
  const double count = static_cast<double>(num_tokens);
  const double mean = sum_blocks<1>(num_tokens, [&](int64_t at, int64_t n, double* out) {
    *out = sum(x + at, n);
  })[0] / count;
  const double variance = sum_blocks<1>(num_tokens, [&](int64_t at, int64_t n, double* out) {
    *out = squares(x + at, n, mean);
  })[0] / count;
  return {mean, 1.0 / std::sqrt(variance + kEps)};
}

at::Tensor whiten(const at::Tensor& x, bool shift_mean) {
  const int64_t num_tokens = x.numel();
  check_float_vector(x, num_tokens, "x");
  at::Tensor y = at::empty_like(x);
  const float* in = x.const_data_ptr<float>();
  float* out = y.data_ptr<float>();
  const Statistics s = statistics(in, num_tokens);
  const double shift = shift_mean ? 0.0 : s.mean;
  const auto run = pick_scale_tokens();
  at::parallel_for(0, num_tokens, kBlocksPerTask * kBlockTokens, [&](int64_t begin, int64_t end) {
    run(in + begin, end - begin, s.mean, s.scale, shift, out + begin);
  });
  return y;
}

// With c = x - mean, r = scale, g = grad: grad_x = r (g - mean(g)) - r^3 c mean(g c), plus mean(g) where the mean was
// added back.
at::Tensor whiten_backward(const at::Tensor& grad, const at::Tensor& x, bool shift_mean) {
  const int64_t num_tokens = x.numel();
  check_float_vector(x, num_tokens, "x");
  check_float_vector(grad, num_tokens, "grad");
  at::Tensor grad_x = at::empty_like(x);
  const float *in = x.const_data_ptr<float>(), *g = grad.const_data_ptr<float>();
  float* out = grad_x.data_ptr<float>();
  const Statistics s = statistics(in, num_tokens);
  const auto sum = pick_sum_of();
  const auto products = pick_sum_of_products();
  const double count = static_cast<double>(num_tokens);
  const auto total = sum_blocks<2>(num_tokens, [&](int64_t at, int64_t n, double* part) {
    part[0] = sum(g + at, n);
    part[1] = products(in + at, g + at, n, s.mean);
  });
  const double mean_grad = total[0] / count;
  const double slope = -s.scale * s.scale * s.scale * total[1] / count;
  const double shift = -s.scale * mean_grad + (shift_mean ? 0.0 : mean_grad);
  const auto run = pick_scale_tokens_backward();
  at::parallel_for(0, num_tokens, kBlocksPerTask * kBlockTokens, [&](int64_t begin, int64_t end) {
    run(in + begin, g + begin, end - begin, s.mean, s.scale, slope, shift, out + begin);
  });
  return grad_x;
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) {
  m.impl("whiten", &engine::whiten);
  m.impl("whiten_backward", &engine::whiten_backward);
}
#endif
