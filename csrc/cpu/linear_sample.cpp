// One token a row by inverse transform sampling; the contract is in kernels/linear_sample.py, the loops in logprob.cpp.
#ifndef ENGINE_CLASS

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "check.h"
#include "logprob_at.h"

namespace engine {
namespace {

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Three linear_sample(const at::Tensor& hidden, const at::Tensor& dense, const at::Tensor& data,
                    const at::Tensor& uniform, double temperature, const std::optional<at::Tensor>& bias) {
  const HeadOperand head = head_of(hidden, dense, data, bias, temperature);
  const int64_t rows = hidden.size(0), blocks = vocabulary_blocks(head.view.vocabulary);
  check_cpu_contiguous(uniform, "uniform");
  check_dtype(uniform, at::kDouble, "uniform");
  TORCH_CHECK_VALUE(uniform.dim() == 1 && uniform.size(0) == rows, "uniform: got shape ", uniform.sizes(), ", want (",
                    rows, ",)");
  const auto options = hidden.options().dtype(at::kFloat);
  at::Tensor token = at::empty({rows}, options.dtype(at::kLong)), token_z = at::empty({rows}, options);
  at::Tensor logprob = at::empty({rows}, options), entropy = at::empty({rows}, options);
  const at::Tensor statistics = statistics_of(head.view, 0, rows, nullptr, nullptr);
  const auto* of_rows = reinterpret_cast<const BlockStatistics*>(statistics.const_data_ptr<float>());
  const double* u = uniform.const_data_ptr<double>();
  int64_t* tokens = token.data_ptr<int64_t>();
  float* z = token_z.data_ptr<float>();
  const auto sample = pick_sample_token();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) tokens[r] = sample(head.view, r, rows, of_rows + r * blocks, u[r], z + r);
  });
  for (int64_t r = 0; r < rows; ++r)
    TORCH_CHECK_VALUE(tokens[r] >= 0, "hidden[", r, "]: its logits are all -inf or hold nan, want a distribution");
  pick_logprob_finish()(of_rows, blocks, rows, z,
                        {logprob.data_ptr<float>(), entropy.data_ptr<float>(), nullptr, nullptr});
  return {token, logprob, entropy};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("linear_sample", &engine::linear_sample); }
#endif
