// PPO's clipped value loss; the equations are in kernels/ppo_value_loss.py.
#include <cstdint>

#include "dispatch.h"

// sums: squared errors (the larger of the two), clipped tokens. scale is 1 / denominator.
ENGINE_KERNEL(void, value_tokens,
              (const float* value, const float* old_value, const float* returns, int64_t n, float clip, float scale,
               float* grad, double* sums))

#ifdef ENGINE_CLASS
#include "vec_double.h"

namespace engine::ENGINE_CLASS {

struct ValueSums {
  vdouble error{}, clipped{};
};

// Adds one vector of tokens to the sums; returns value - returns, 0 where the loss is clipped.
ENGINE_INLINE vfloat value_step(vfloat value, vfloat old_value, vfloat returns, float clip, ValueSums& sums) {
  const vfloat zero = splat(0.0f), one = splat(1.0f);
  const vfloat bounded = vmin(old_value + clip, vmax(old_value - clip, value));  // in this order nan stays nan
  const vfloat error = value - returns, bounded_error = bounded - returns;
  const vfloat squared = error * error, bounded_squared = bounded_error * bounded_error;
  sums.error += widen(bounded_squared > squared ? bounded_squared : squared);
  sums.clipped += widen(bounded_squared > squared ? one : zero);
  return bounded_squared > squared ? zero : error;
}

void value_tokens(const float* value, const float* old_value, const float* returns, int64_t n, float clip,
                  float scale, float* grad, double* sums) {
  ValueSums all;
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes)
    store(grad + t, scale * value_step(load(value + t), load(old_value + t), load(returns + t), clip, all));
  if (t < n) {  // lanes beyond the end hold three zeros and add nothing
    const int64_t rest = n - t;
    store_part(grad + t,
               scale * value_step(load_part(value + t, rest, 0), load_part(old_value + t, rest, 0),
                                  load_part(returns + t, rest, 0), clip, all),
               rest);
  }
  sums[0] = hsum(all.error);
  sums[1] = hsum(all.clipped);
}

}  // namespace engine::ENGINE_CLASS
#else

#include <torch/library.h>

#include "blocks.h"
#include "check.h"

namespace engine {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> ppo_value_loss(const at::Tensor& value, const at::Tensor& old_value,
                                                              const at::Tensor& returns, double clip,
                                                              double denominator) {
  const int64_t num_tokens = value.numel();
  check_float_vector(value, num_tokens, "value");
  check_float_vector(old_value, num_tokens, "old_value");
  check_float_vector(returns, num_tokens, "returns");
  at::Tensor grad = at::empty_like(value);
  const auto run = pick_value_tokens();
  const float *v = value.const_data_ptr<float>(), *old = old_value.const_data_ptr<float>();
  const float* target = returns.const_data_ptr<float>();
  float* g = grad.data_ptr<float>();
  const float bound = static_cast<float>(clip), scale = static_cast<float>(1 / denominator);
  const auto total = sum_blocks<2>(num_tokens, [&](int64_t at, int64_t count, double* out) {
    run(v + at, old + at, target + at, count, bound, scale, g + at, out);
  });
  at::Tensor sums = at::empty({2}, value.options().dtype(at::kDouble));
  sums.data_ptr<double>()[0] = static_cast<double>(num_tokens);
  sums.data_ptr<double>()[1] = total[1];
  return {at::scalar_tensor(total[0] / 2 / denominator, value.options()), sums, grad};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("ppo_value_loss", &engine::ppo_value_loss); }
#endif
