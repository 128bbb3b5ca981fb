#include "kl_reward_gae.cuh"

// nvcc reads this file once for the host and once for each GPU, for which torch's headers are nothing but time; kernels
// that only the host's part names are therefore made explicitly.
namespace engine_cuda {
template __global__ void tile_sums<kKlRewardGaeStripes>(KlRewardGae, double*);
template __global__ void tile_carries<kKlRewardGaeStripes>(KlRewardGae, const double*, double*);
template __global__ void apply<kKlRewardGaeStripes>(KlRewardGae, const double*);
}  // namespace engine_cuda

#ifndef __CUDA_ARCH__
#include <tuple>

#include "border.cuh"

namespace engine_cuda {
namespace {

constexpr unsigned kThreads = 128;

std::tuple<Tensor, Tensor, Tensor, Tensor> kl_reward_gae(const Tensor& logprob, const Tensor& ref_logprob,
                                                         const Tensor& score, const Tensor& value, const Tensor& cu,
                                                         const Tensor& bootstrap, double beta, double gamma, double lam,
                                                         int64_t estimator) {
  const int64_t tokens = logprob.numel();
  check_vector(logprob, tokens, ScalarType::Float, logprob, "logprob");
  check_vector(ref_logprob, tokens, ScalarType::Float, logprob, "ref_logprob");
  check_vector(value, tokens, ScalarType::Float, logprob, "value");
  const int64_t segments = check_offsets(cu, tokens, logprob);
  check_vector(score, segments, ScalarType::Float, logprob, "score");
  check_vector(bootstrap, segments, ScalarType::Float, logprob, "bootstrap");
  STD_TORCH_CHECK(estimator >= k1 && estimator <= k3, "estimator: got ", estimator, ", want 0, 1 or 2");

  const OnDeviceOf device(logprob);
  Tensor advantage = torch::stable::empty_like(logprob), returns = torch::stable::empty_like(logprob);
  Tensor reward = torch::stable::empty_like(logprob), kl = torch::stable::empty_like(logprob);
  Tensor scratch = new_vector(logprob, 2 * kl_reward_gae_windows(tokens), ScalarType::Double);
  const KlRewardGae problem{tokens,
                            segments,
                            logprob.const_data_ptr<float>(),
                            ref_logprob.const_data_ptr<float>(),
                            value.const_data_ptr<float>(),
                            score.const_data_ptr<float>(),
                            bootstrap.const_data_ptr<float>(),
                            cu.const_data_ptr<int32_t>(),
                            static_cast<float>(beta),
                            gamma,
                            lam,
                            static_cast<int>(estimator),
                            advantage.mutable_data_ptr<float>(),
                            returns.mutable_data_ptr<float>(),
                            reward.mutable_data_ptr<float>(),
                            kl.mutable_data_ptr<float>()};
  launch_kl_reward_gae(problem, scratch.mutable_data_ptr<double>(), kThreads, device.stream(),
                       [] { STD_CUDA_KERNEL_LAUNCH_CHECK(); });
  return {advantage, returns, reward, kl};
}

}  // namespace
}  // namespace engine_cuda

STABLE_TORCH_LIBRARY_FRAGMENT(engine_cuda, m) {
  m.def(
      "kl_reward_gae(Tensor logprob, Tensor ref_logprob, Tensor score, Tensor value, Tensor cu, Tensor bootstrap,"
      " float beta, float gamma, float lam, int estimator)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(engine_cuda, ENGINE_DEVICE, m) {
  m.impl("kl_reward_gae", TORCH_BOX(&engine_cuda::kl_reward_gae));
}
#endif
