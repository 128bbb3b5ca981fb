// Per-token rewards with a KL penalty; the equations are in kernels/kl_reward.py.
#include <cstdint>

#include "dispatch.h"

// kl and -beta * kl of n tokens; estimator 0, 1, 2 is k1, k2, k3. Scores are added by the caller.
ENGINE_KERNEL(void, kl_tokens,
              (const float* logprob, const float* ref_logprob, int64_t n, int estimator, float beta, float* reward,
               float* kl))
// With g = grad_kl - beta * grad_reward and d = logprob - ref_logprob: d logprob = g * dk/dd = -d ref_logprob.
ENGINE_KERNEL(void, kl_tokens_backward,
              (const float* grad_reward, const float* grad_kl, const float* logprob, const float* ref_logprob,
               int64_t n, int estimator, float beta, float* grad_logprob, float* grad_ref_logprob))

#ifdef ENGINE_CLASS
#include "expm1.h"

namespace engine::ENGINE_CLASS {

ENGINE_INLINE vfloat kl_of(vfloat d, int estimator) {
  if (estimator == 0) return d;
  if (estimator == 1) return d * d * 0.5f;
  return vexpm1_minus(-d);
}

// dk/dd: 1, d, 1 - e^-d.
ENGINE_INLINE vfloat kl_slope(vfloat d, int estimator) {
  if (estimator == 0) return splat(1.0f);
  if (estimator == 1) return d;
  return -vexpm1(-d);
}

ENGINE_INLINE void tokens(const float* logprob, const float* ref_logprob, int64_t n, int estimator, float beta,
                          float* reward, float* kl) {
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes) {
    const vfloat k = kl_of(load(logprob + t) - load(ref_logprob + t), estimator);
    store(kl + t, k);
    store(reward + t, -beta * k);
  }
  if (t == n) return;
  const vfloat k = kl_of(load_part(logprob + t, n - t, 0) - load_part(ref_logprob + t, n - t, 0), estimator);
  store_part(kl + t, k, n - t);
  store_part(reward + t, -beta * k, n - t);
}

ENGINE_INLINE void tokens_backward(const float* grad_reward, const float* grad_kl, const float* logprob,
                                   const float* ref_logprob, int64_t n, int estimator, float beta,
                                   float* grad_logprob, float* grad_ref_logprob) {
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes) {
    const vfloat g = load(grad_kl + t) - beta * load(grad_reward + t);
    const vfloat slope = g * kl_slope(load(logprob + t) - load(ref_logprob + t), estimator);
    store(grad_logprob + t, slope);
    store(grad_ref_logprob + t, -slope);
  }
  if (t == n) return;
  const int64_t rest = n - t;
  const vfloat g = load_part(grad_kl + t, rest, 0) - beta * load_part(grad_reward + t, rest, 0);
  const vfloat d = load_part(logprob + t, rest, 0) - load_part(ref_logprob + t, rest, 0);
  const vfloat slope = g * kl_slope(d, estimator);
  store_part(grad_logprob + t, slope, rest);
  store_part(grad_ref_logprob + t, -slope, rest);
}

// The estimator as a constant of each copy of the loop.
void kl_tokens(const float* logprob, const float* ref_logprob, int64_t n, int estimator, float beta, float* reward,
               float* kl) {
  switch (estimator) {
    case 0: return tokens(logprob, ref_logprob, n, 0, beta, reward, kl);
    case 1: return tokens(logprob, ref_logprob, n, 1, beta, reward, kl);
    default: return tokens(logprob, ref_logprob, n, 2, beta, reward, kl);
  }
}

void kl_tokens_backward(const float* grad_reward, const float* grad_kl, const float* logprob,
                        const float* ref_logprob, int64_t n, int estimator, float beta, float* grad_logprob,
                        float* grad_ref_logprob) {
  const float *gr = grad_reward, *gk = grad_kl, *lp = logprob, *ref = ref_logprob;
  switch (estimator) {
    case 0: return tokens_backward(gr, gk, lp, ref, n, 0, beta, grad_logprob, grad_ref_logprob);
    case 1: return tokens_backward(gr, gk, lp, ref, n, 1, beta, grad_logprob, grad_ref_logprob);
    default: return tokens_backward(gr, gk, lp, ref, n, 2, beta, grad_logprob, grad_ref_logprob);
  }
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "check.h"

namespace engine {
namespace {

constexpr int64_t kKlTokensPerTask = 16384;  // about 10 us of work: less is not worth a thread

// after_end: the last slot of a segment stands after its tokens and has no KL (score_at="eos_plus_one").
std::tuple<at::Tensor, at::Tensor> kl_reward(const at::Tensor& logprob, const at::Tensor& ref_logprob,
                                             const at::Tensor& score, const at::Tensor& cu, double beta,
                                             int64_t estimator, bool after_end) {
  const int64_t num_tokens = logprob.numel(), num_segments = cu.numel() - 1;
  check_float_vector(logprob, num_tokens, "logprob");
  check_float_vector(ref_logprob, num_tokens, "ref_logprob");
  check_offsets(cu, num_tokens, "cu");
  check_float_vector(score, num_segments, "score");
  at::Tensor reward = at::empty_like(logprob), kl = at::empty_like(logprob);
  const auto run = pick_kl_tokens();
  const float *lp = logprob.const_data_ptr<float>(), *ref = ref_logprob.const_data_ptr<float>();
  float *r = reward.data_ptr<float>(), *k = kl.data_ptr<float>();
  at::parallel_for(0, num_tokens, kKlTokensPerTask, [&](int64_t begin, int64_t end) {
    run(lp + begin, ref + begin, end - begin, static_cast<int>(estimator), static_cast<float>(beta), r + begin,
        k + begin);
  });
  const int32_t* offset = cu.const_data_ptr<int32_t>();
  const float* paid = score.const_data_ptr<float>();
  for (int64_t s = 0; s < num_segments; ++s) {
    if (offset[s] == offset[s + 1]) continue;
    const int64_t last = offset[s + 1] - 1;
    if (after_end) k[last] = r[last] = 0.0f;
    r[last] += paid[s];
  }
  return {reward, kl};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> kl_reward_backward(const at::Tensor& grad_reward,
                                                                  const at::Tensor& grad_kl,
                                                                  const at::Tensor& logprob,
                                                                  const at::Tensor& ref_logprob, const at::Tensor& cu,
                                                                  double beta, int64_t estimator, bool after_end) {
  const int64_t num_tokens = logprob.numel(), num_segments = cu.numel() - 1;
  check_float_vector(grad_reward, num_tokens, "grad_reward");
  check_float_vector(grad_kl, num_tokens, "grad_kl");
  check_float_vector(logprob, num_tokens, "logprob");
  check_float_vector(ref_logprob, num_tokens, "ref_logprob");
  check_offsets(cu, num_tokens, "cu");
  at::Tensor grad_logprob = at::empty_like(logprob), grad_ref_logprob = at::empty_like(logprob);
  at::Tensor grad_score = at::zeros({num_segments}, logprob.options());
  const auto run = pick_kl_tokens_backward();
  const float *gr = grad_reward.const_data_ptr<float>(), *gk = grad_kl.const_data_ptr<float>();
  const float *lp = logprob.const_data_ptr<float>(), *ref = ref_logprob.const_data_ptr<float>();
  float *dlp = grad_logprob.data_ptr<float>(), *dref = grad_ref_logprob.data_ptr<float>();
  float* dscore = grad_score.data_ptr<float>();
  at::parallel_for(0, num_tokens, kKlTokensPerTask, [&](int64_t begin, int64_t end) {
    run(gr + begin, gk + begin, lp + begin, ref + begin, end - begin, static_cast<int>(estimator),
        static_cast<float>(beta), dlp + begin, dref + begin);
  });
  const int32_t* offset = cu.const_data_ptr<int32_t>();
  for (int64_t s = 0; s < num_segments; ++s) {
    if (offset[s] == offset[s + 1]) continue;
    const int64_t last = offset[s + 1] - 1;
    if (after_end) dlp[last] = dref[last] = 0.0f;
    dscore[s] = gr[last];
  }
  return {grad_logprob, grad_ref_logprob, grad_score};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) {
  m.impl("kl_reward", &engine::kl_reward);
  m.impl("kl_reward_backward", &engine::kl_reward_backward);
}
#endif
