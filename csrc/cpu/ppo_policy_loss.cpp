// PPO's clipped policy loss; the equations are in kernels/ppo_policy_loss.py.
#include <cstdint>

#include "dispatch.h"

// sums: the loss, then those of kernels/ppo_policy_loss.py without the number of tokens. scale is 1 / denominator.
ENGINE_KERNEL(void, policy_tokens,
              (const float* logprob, const float* old_logprob, const float* advantage, int64_t n, float low,
               float high, float log_ratio_clamp, float scale, float* grad, double* sums))

#ifdef ENGINE_CLASS
#include "expm1.h"
#include "vec_double.h"

namespace engine::ENGINE_CLASS {

struct PolicySums {
  vdouble loss{}, clipped{}, k1{}, twice_k2{}, k3{}, excess{}, excess_squared{};
};

// Adds one vector of tokens to the sums; returns -A rho where the gradient lives, 0 where the loss is clipped.
ENGINE_INLINE vfloat policy_step(vfloat logprob, vfloat old_logprob, vfloat advantage, float low, float high,
                                 float log_ratio_clamp, PolicySums& sums) {
  const vfloat limit = splat(log_ratio_clamp), zero = splat(0.0f), one = splat(1.0f);
  const vfloat change = logprob - old_logprob;
  const vfloat u = vmin(limit, vmax(-limit, change));  // in this order nan stays nan
  const vfloat rho = vexp(u);
  const vfloat free = -advantage * rho;
  const vfloat bounded = -advantage * vmin(splat(high), vmax(splat(low), rho));
  const vfloat rest = vexpm1_minus(u);
  const vdouble excess = widen(vexpm1(u)), wide = widen(u);
  sums.loss += widen(bounded > free ? bounded : free);
  sums.clipped += widen(bounded > free ? one : zero);
  sums.k1 -= wide;
  sums.twice_k2 += wide * wide;
  sums.k3 += widen(rest);
  sums.excess += excess;
  sums.excess_squared += excess * excess;
  const vfloat inside = u == change ? free : zero;
  return bounded > free ? zero : (change == change ? inside : change);
}

void policy_tokens(const float* logprob, const float* old_logprob, const float* advantage, int64_t n, float low,
                   float high, float log_ratio_clamp, float scale, float* grad, double* sums) {
  PolicySums all;
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes)
    store(grad + t, scale * policy_step(load(logprob + t), load(old_logprob + t), load(advantage + t), low, high,
                                        log_ratio_clamp, all));
  if (t < n) {  // lanes beyond the end hold rho = 1, A = 0 and add nothing
    const int64_t rest = n - t;
    store_part(grad + t,
               scale * policy_step(load_part(logprob + t, rest, 0), load_part(old_logprob + t, rest, 0),
                                   load_part(advantage + t, rest, 0), low, high, log_ratio_clamp, all),
               rest);
  }
  const vdouble each[] = {all.loss, all.clipped, all.k1, all.twice_k2, all.k3, all.excess, all.excess_squared};
  for (int i = 0; i < 7; ++i) sums[i] = hsum(each[i]);
}

}  // namespace engine::ENGINE_CLASS
#else

#include <torch/library.h>

#include "blocks.h"
#include "check.h"

namespace engine {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> ppo_policy_loss(const at::Tensor& logprob,
                                                               const at::Tensor& old_logprob,
                                                               const at::Tensor& advantage, double clip,
                                                               double denominator, double log_ratio_clamp) {
  const int64_t num_tokens = logprob.numel();
  check_float_vector(logprob, num_tokens, "logprob");
  check_float_vector(old_logprob, num_tokens, "old_logprob");
  check_float_vector(advantage, num_tokens, "advantage");
  at::Tensor grad = at::empty_like(logprob);
  const auto run = pick_policy_tokens();
  const float *lp = logprob.const_data_ptr<float>(), *old = old_logprob.const_data_ptr<float>();
  const float* adv = advantage.const_data_ptr<float>();
  float* g = grad.data_ptr<float>();
  const float low = static_cast<float>(1 - clip), high = static_cast<float>(1 + clip);
  const float limit = static_cast<float>(log_ratio_clamp), scale = static_cast<float>(1 / denominator);
  const auto total = sum_blocks<7>(num_tokens, [&](int64_t at, int64_t count, double* out) {
    run(lp + at, old + at, adv + at, count, low, high, limit, scale, g + at, out);
  });
  at::Tensor sums = at::empty({7}, logprob.options().dtype(at::kDouble));
  double* out = sums.data_ptr<double>();
  out[0] = static_cast<double>(num_tokens);
  for (int i = 1; i < 7; ++i) out[i] = total[i];
  return {at::scalar_tensor(total[0] / denominator, logprob.options()), sums, grad};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("ppo_policy_loss", &engine::ppo_policy_loss); }
#endif
