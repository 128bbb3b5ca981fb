// Whitening to mean 0 and variance 1; the equations are in kernels/whiten.py.
#include <cstdint>

#include "dispatch.h"

// Of one block: its sum, and the sum of the squares around its own mean. Both passes run while it lies in the cache.
ENGINE_KERNEL(void, block_moments, (const float* x, int64_t n, double* moments))
// Of one block: the sum of grad, and that of (x - mean) * grad.
ENGINE_KERNEL(void, block_products, (const float* x, const float* grad, int64_t n, double mean, double* products))
// y = (x - mean) * scale + shift.
ENGINE_KERNEL(void, scale_tokens, (const float* x, int64_t n, double mean, double scale, double shift, float* y))
// grad_x = scale * grad + slope * (x - mean) + shift.
ENGINE_KERNEL(void, scale_tokens_backward,
              (const float* x, const float* grad, int64_t n, double mean, double scale, double slope, double shift,
               float* grad_x))

#ifdef ENGINE_CLASS
#include "vec_double.h"

namespace engine::ENGINE_CLASS {

constexpr int kChains = 4;  // one chain alone waits for its own additions

ENGINE_INLINE double sum_of_chains(const vwide* sums) { return hsum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

void block_moments(const float* x, int64_t n, double* moments) {
  vwide sums[kChains] = {}, squares[kChains] = {};
  double sum = 0.0, square = 0.0;  // of the tokens behind the last whole vectors
  int64_t t = 0;
  for (; t + kChains * kHalf <= n; t += kChains * kHalf)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) sums[chain] += load_wide(x + t + chain * kHalf);
  const int64_t whole = t;
  for (; t < n; ++t) sum += x[t];
  moments[0] = sum_of_chains(sums) + sum;
  const double mean = moments[0] / static_cast<double>(n);
  for (t = 0; t < whole; t += kChains * kHalf)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const vwide centred = load_wide(x + t + chain * kHalf) - mean;
      squares[chain] += centred * centred;
    }
  for (; t < n; ++t) square += (x[t] - mean) * (x[t] - mean);
  moments[1] = sum_of_chains(squares) + square;
}

void block_products(const float* x, const float* grad, int64_t n, double mean, double* products) {
  vwide sums[kChains] = {}, crosses[kChains] = {};
  double sum = 0.0, cross = 0.0;
  int64_t t = 0;
  for (; t + kChains * kHalf <= n; t += kChains * kHalf)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const int64_t at = t + chain * kHalf;
      const vwide g = load_wide(grad + at);
      sums[chain] += g;
      crosses[chain] += (load_wide(x + at) - mean) * g;
    }
  for (; t < n; ++t) {
    sum += grad[t];
    cross += (x[t] - mean) * grad[t];
  }
  products[0] = sum_of_chains(sums) + sum;
  products[1] = sum_of_chains(crosses) + cross;
}

void scale_tokens(const float* x, int64_t n, double mean, double scale, double shift, float* y) {
  int64_t t = 0;
  for (; t + kHalf <= n; t += kHalf) store_narrow(y + t, (load_wide(x + t) - mean) * scale + shift);
  for (; t < n; ++t) y[t] = static_cast<float>((x[t] - mean) * scale + shift);
}

void scale_tokens_backward(const float* x, const float* grad, int64_t n, double mean, double scale, double slope,
                           double shift, float* grad_x) {
  int64_t t = 0;
  for (; t + kHalf <= n; t += kHalf)
    store_narrow(grad_x + t, load_wide(grad + t) * scale + (load_wide(x + t) - mean) * slope + shift);
  for (; t < n; ++t) grad_x[t] = static_cast<float>(grad[t] * scale + (x[t] - mean) * slope + shift);
}

}  // namespace engine::ENGINE_CLASS
#else

#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "blocks.h"
#include "check.h"

namespace engine {
namespace {

constexpr double kEps = 1e-8;

struct Statistics {
  double mean, scale;  // scale = 1 / sqrt(variance + eps)
};

// One read of x: the squares around each block's mean, moved to the mean of all (Chan et al. 1979).
Statistics statistics(const float* x, int64_t num_tokens) {
  const auto run = pick_block_moments();
  const auto blocks = each_block<2>(num_tokens, [&](int64_t at, int64_t n, double* out) { run(x + at, n, out); });
  double sum = 0.0, squares = 0.0;
  for (const auto& block : blocks) sum += block[0];
  const double mean = sum / static_cast<double>(num_tokens);
  for (size_t b = 0; b < blocks.size(); ++b) {
    const int64_t begin = static_cast<int64_t>(b) * kBlockTokens;
    const double count = static_cast<double>(std::min(kBlockTokens, num_tokens - begin));
    const double apart = blocks[b][0] / count - mean;
    squares += blocks[b][1] + count * apart * apart;
  }
  return {mean, 1.0 / std::sqrt(squares / static_cast<double>(num_tokens) + kEps)};
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
  const auto products = pick_block_products();
  const double count = static_cast<double>(num_tokens);
  const auto total = sum_blocks<2>(num_tokens, [&](int64_t at, int64_t n, double* part) {
    products(in + at, g + at, n, s.mean, part);
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
