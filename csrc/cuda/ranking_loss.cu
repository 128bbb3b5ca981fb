#include "ranking_loss.cuh"

#ifndef __CUDA_ARCH__  // torch's headers are nothing but time where nvcc reads this file for a GPU
#include <optional>
#include <tuple>

#include "border.cuh"

namespace engine_cuda {
namespace {

constexpr unsigned kThreads = 256;

std::tuple<Tensor, Tensor, Tensor, Tensor> ranking_loss(const Tensor& score, const Tensor& rank, const Tensor& cu,
                                                        int64_t reduction, std::optional<double> denominator) {
  const int64_t answers = score.numel();
  check_vector(score, answers, ScalarType::Float, score, "score");
  check_vector(rank, answers, ScalarType::Double, score, "rank");
  const int64_t prompts = check_offsets(cu, answers, score);
  STD_TORCH_CHECK(reduction >= prompt_mean_valid && reduction <= pair_mean, "reduction: got ", reduction,
                  ", want 0, 1 or 2");
  STD_TORCH_CHECK(!denominator || *denominator > 0, "denominator: got ", denominator.value_or(0), ", want more than 0");

  const OnDeviceOf device(score);
  Tensor loss = new_scalar(score, ScalarType::Float), grad = torch::stable::empty_like(score);
  Tensor num_pairs = new_scalar(score, ScalarType::Long), num_correct = new_scalar(score, ScalarType::Long);
  Tensor sums = new_vector(score, answers + prompts, ScalarType::Double);
  Tensor counts = new_vector(score, 2 * prompts, ScalarType::Long);
  double* slope = sums.mutable_data_ptr<double>();
  int64_t* pairs = counts.mutable_data_ptr<int64_t>();
  const Ranking problem{answers, prompts, score.const_data_ptr<float>(), rank.const_data_ptr<double>(),
                        cu.const_data_ptr<int32_t>()};
  launch_ranking_loss(problem, {slope, slope + answers, pairs, pairs + prompts}, static_cast<int>(reduction),
                      denominator.value_or(0.0),
                      {loss.mutable_data_ptr<float>(), num_pairs.mutable_data_ptr<int64_t>(),
                       num_correct.mutable_data_ptr<int64_t>(), grad.mutable_data_ptr<float>()},
                      kThreads, device.stream(), [] { STD_CUDA_KERNEL_LAUNCH_CHECK(); });
  return {loss, num_pairs, num_correct, grad};
}

}  // namespace
}  // namespace engine_cuda

STABLE_TORCH_LIBRARY_FRAGMENT(engine_cuda, m) {
  m.def(
      "ranking_loss(Tensor score, Tensor rank, Tensor cu, int reduction, float? denominator)"
      " -> (Tensor loss, Tensor num_pairs, Tensor num_correct, Tensor grad)");
}

STABLE_TORCH_LIBRARY_IMPL(engine_cuda, ENGINE_DEVICE, m) {
  m.impl("ranking_loss", TORCH_BOX(&engine_cuda::ranking_loss));
}
#endif
