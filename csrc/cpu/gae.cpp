// Generalised advantage estimation over packed episodes; the equation is in kernels/gae.py.
#include <cstdint>

#include "dispatch.h"

// One episode, from its last token to its first; threads take episodes. In float64: in float32 the rounding of
// gamma * lam alone would add up over an answer's length.
ENGINE_KERNEL(void, gae_episode,
              (const float* reward, const float* value, int64_t length, double gamma, double lam, float bootstrap,
               float* advantage, float* returns))
ENGINE_KERNEL(void, gae_episode_backward,
              (const float* grad_advantage, const float* grad_returns, int64_t length, double gamma, double lam,
               float* grad_reward, float* grad_value, float* grad_bootstrap))

#ifdef ENGINE_CLASS
#include "vec_double.h"

namespace engine::ENGINE_CLASS {

// x_t = delta_t + c x_{t+1} over a vector of H tokens, in log2(H) steps (Hillis and Steele 1986): after the step of
// width w a lane holds the terms of w more tokens. What comes from beyond the vector is `carry`, times a power of c:
// from one vector to the next there is one multiply-add to wait for, not one a token.
struct Discount {
  double once;           // c
  double twice, fourth;  // c^2, c^4
  double all;            // c^H
  vwide before, after;   // lane i: c^(H-i), of the carry from behind; c^(i+1), of the carry from in front
};

ENGINE_INLINE Discount powers_of(double c) {
  double before[kHalf], after[kHalf], power = 1.0;
  for (int i = 0; i < kHalf; ++i) before[kHalf - 1 - i] = after[i] = power *= c;
  Discount out{c, c * c, (c * c) * (c * c), power, {}, {}};
  std::memcpy(&out.before, before, sizeof(before));
  std::memcpy(&out.after, after, sizeof(after));
  return out;
}

// Sums over the lanes behind each lane, and over those in front of it.
ENGINE_INLINE vwide scan_back(vwide x, const Discount& c) {
  const vwide none{};
  x += c.once * window<1>(x, none);
  if constexpr (kHalf > 2) x += c.twice * window<2 % kHalf>(x, none);
  if constexpr (kHalf > 4) x += c.fourth * window<4 % kHalf>(x, none);
  return x;
}
ENGINE_INLINE vwide scan_forward(vwide x, const Discount& c) {
  const vwide none{};
  x += c.once * window<kHalf - 1>(none, x);
  if constexpr (kHalf > 2) x += c.twice * window<kHalf - 2>(none, x);
  if constexpr (kHalf > 4) x += c.fourth * window<(kHalf > 4 ? kHalf - 4 : 0)>(none, x);
  return x;
}

void gae_episode(const float* reward, const float* value, int64_t length, double gamma, double lam, float bootstrap,
                 float* advantage, float* returns) {
  const Discount discount = powers_of(gamma * lam);
  double next_value = bootstrap, next_advantage = 0.0;
  int64_t t = length;
  while (t > 0 && (t == length || t % kHalf != 0)) {  // so that a vector's last token has a value behind it
    --t;
    const double delta = reward[t] + gamma * next_value - value[t];
    next_advantage = delta + discount.once * next_advantage;
    next_value = value[t];
    advantage[t] = static_cast<float>(next_advantage);
    returns[t] = static_cast<float>(next_advantage + next_value);
  }
  while (t > 0) {
    t -= kHalf;
    const vwide v = load_wide(value + t);
    const vwide delta = load_wide(reward + t) + gamma * load_wide(value + t + 1) - v;
    const vwide own = scan_back(delta, discount);
    const vwide all = own + discount.before * next_advantage;
    next_advantage = own[0] + discount.all * next_advantage;
    store_narrow(advantage + t, all);
    store_narrow(returns + t, all + v);
  }
}

// With g = grad_advantage + grad_returns and G_k = g_k + gamma lam G_{k-1} (the gradient of delta_k):
// d reward_k = G_k, d value_k = grad_returns_k - G_k + gamma G_{k-1}, d bootstrap = gamma G_last.
void gae_episode_backward(const float* grad_advantage, const float* grad_returns, int64_t length, double gamma,
                          double lam, float* grad_reward, float* grad_value, float* grad_bootstrap) {
  const Discount discount = powers_of(gamma * lam);
  double grad_delta = 0.0;
  int64_t t = 0;
  for (; t + kHalf <= length; t += kHalf) {
    const vwide g = load_wide(grad_returns + t);
    const vwide own = scan_forward(load_wide(grad_advantage + t) + g, discount);
    const vwide all = own + discount.after * grad_delta;
    const vwide previous = window<kHalf - 1>(splat_wide(grad_delta), all);
    grad_delta = own[kHalf - 1] + discount.all * grad_delta;
    store_narrow(grad_reward + t, all);
    store_narrow(grad_value + t, g - all + gamma * previous);
  }
  for (; t < length; ++t) {
    const double previous = grad_delta;
    grad_delta = grad_advantage[t] + grad_returns[t] + discount.once * previous;
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

constexpr int64_t kGaeTokensPerTask = 8192;  // about 20 us of work: less is not worth a thread

int64_t episodes_per_task(int64_t num_tokens, int64_t num_episodes) {
  return std::max<int64_t>(1, num_episodes * kGaeTokensPerTask / std::max<int64_t>(num_tokens, 1));
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
