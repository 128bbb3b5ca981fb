// Generalised advantage estimation over packed episodes; the equation is in kernels/gae.py.
#include <cstdint>

#include "dispatch.h"

// One episode, from its last token to its first: two dependent multiply-adds a token, so there is nothing to
// vectorise within an episode; threads take episodes. In float64: in float32 the rounding of gamma * lam alone would
// add up over an answer's length.
ENGINE_KERNEL(void, gae_episode,
              (const float* reward, const float* value, int64_t length, double gamma, double lam, float bootstrap,
               float* advantage, float* returns))
ENGINE_KERNEL(void, gae_episode_backward,
              (const float* grad_advantage, const float* grad_returns, int64_t length, double gamma, double lam,
               float* grad_reward, float* grad_value, float* grad_bootstrap))

#ifdef ENGINE_CLASS
namespace engine::ENGINE_CLASS {

void gae_episode(const float* reward, const float* value, int64_t length, double gamma, double lam, float bootstrap,
                 float* advantage, float* returns) {
  double next_value = bootstrap, next_advantage = 0.0;
  for (int64_t t = length - 1; t >= 0; --t) {
    const double delta = reward[t] + gamma * next_value - value[t];
    next_advantage = delta + gamma * lam * next_advantage;
    next_value = value[t];
    advantage[t] = static_cast<float>(next_advantage);
    returns[t] = static_cast<float>(next_advantage + next_value);
  }
}

// With g = grad_advantage + grad_returns and G_k = g_k + gamma lam G_{k-1} (the gradient of delta_k):
// d reward_k = G_k, d value_k = grad_returns_k - G_k + gamma G_{k-1}, d bootstrap = gamma G_last.
void gae_episode_backward(const float* grad_advantage, const float* grad_returns, int64_t length, double gamma,
                          double lam, float* grad_reward, float* grad_value, float* grad_bootstrap) {
  double grad_delta = 0.0;
  for (int64_t t = 0; t < length; ++t) {
    const double previous = grad_delta;
    grad_delta = grad_advantage[t] + grad_returns[t] + gamma * lam * previous;
    grad_reward[t] = static_cast<float>(grad_delta);
    grad_value[t] = static_cast<float>(grad_returns[t] - grad_delta + gamma * previous);
  }
  *grad_bootstrap = static_cast<float>(gamma * grad_delta);
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "check.h"

namespace engine {
namespace {

constexpr int64_t kTokensPerTask = 8192;  // about 20 us of work: less is not worth a thread

int64_t episodes_per_task(int64_t num_tokens, int64_t num_episodes) {
  return std::max<int64_t>(1, num_episodes * kTokensPerTask / std::max<int64_t>(num_tokens, 1));
}

std::tuple<at::Tensor, at::Tensor> gae(const at::Tensor& reward, const at::Tensor& value, const at::Tensor& cu,
                                       const at::Tensor& bootstrap, double gamma, double lam) {
  const int64_t num_tokens = reward.numel(), num_episodes = cu.numel() - 1;
  check_float_vector(reward, num_tokens, "reward");
  check_float_vector(value, num_tokens, "value");
  check_offsets(cu, num_tokens, "cu");
  check_float_vector(bootstrap, num_episodes, "bootstrap");
  at::Tensor advantage = at::empty_like(value), returns = at::empty_like(value);
  const auto run = pick_gae_episode();
  const int32_t* offset = cu.const_data_ptr<int32_t>();
  const float *r = reward.const_data_ptr<float>(), *v = value.const_data_ptr<float>();
  const float* last = bootstrap.const_data_ptr<float>();
  float *a = advantage.data_ptr<float>(), *ret = returns.data_ptr<float>();
  at::parallel_for(0, num_episodes, episodes_per_task(num_tokens, num_episodes), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t at = offset[s];
      run(r + at, v + at, offset[s + 1] - at, gamma, lam, last[s], a + at, ret + at);
    }
  });
  return {advantage, returns};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gae_backward(const at::Tensor& grad_advantage,
                                                            const at::Tensor& grad_returns, const at::Tensor& cu,
                                                            double gamma, double lam) {
  const int64_t num_tokens = grad_advantage.numel(), num_episodes = cu.numel() - 1;
  check_float_vector(grad_advantage, num_tokens, "grad_advantage");
  check_float_vector(grad_returns, num_tokens, "grad_returns");
  check_offsets(cu, num_tokens, "cu");
  at::Tensor grad_reward = at::empty_like(grad_advantage), grad_value = at::empty_like(grad_advantage);
  at::Tensor grad_bootstrap = at::empty({num_episodes}, grad_advantage.options());
  const auto run = pick_gae_episode_backward();
  const int32_t* offset = cu.const_data_ptr<int32_t>();
  const float *ga = grad_advantage.const_data_ptr<float>(), *gr = grad_returns.const_data_ptr<float>();
  float *dr = grad_reward.data_ptr<float>(), *dv = grad_value.data_ptr<float>();
  float* db = grad_bootstrap.data_ptr<float>();
  at::parallel_for(0, num_episodes, episodes_per_task(num_tokens, num_episodes), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t at = offset[s];
      run(ga + at, gr + at, offset[s + 1] - at, gamma, lam, dr + at, dv + at, db + s);
    }
  });
  return {grad_reward, grad_value, grad_bootstrap};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) {
  m.impl("gae", &engine::gae);
  m.impl("gae_backward", &engine::gae_backward);
}
#endif
