// The pairwise ranking loss of a prompt's K answers; the equations are in kernels/ranking_loss.py.
#include <cstdint>

#include "dispatch.h"

// Pairs (i, j) with rank[i] < rank[j] among one prompt's n answers.
ENGINE_KERNEL(int64_t, ranking_pairs, (const double* rank, int64_t n))
// weight * loss and weight * gradient of one prompt, and its correctly ordered pairs. `sum` has room for n. A few dozen
// pairs a prompt, in float64: exact to the last bit of float32, and far from being what a step waits for.
ENGINE_KERNEL(double, ranking_prompt,
              (const float* score, const double* rank, int64_t n, double weight, double* sum, float* grad,
               int64_t* correct))

#ifdef ENGINE_CLASS
namespace engine::ENGINE_CLASS {

int64_t ranking_pairs(const double* rank, int64_t n) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) pairs += rank[i] < rank[j];
  return pairs;
}

double ranking_prompt(const float* score, const double* rank, int64_t n, double weight, double* sum, float* grad,
                      int64_t* correct) {
  double loss = 0.0;
  int64_t num_correct = 0;
  for (int64_t i = 0; i < n; ++i) sum[i] = 0.0;
  for (int64_t w = 0; w < n; ++w)
    for (int64_t l = 0; l < n; ++l) {
      if (!(rank[w] < rank[l])) continue;
      const double margin = static_cast<double>(score[w]) - static_cast<double>(score[l]);
      const double e = __builtin_exp(-__builtin_fabs(margin));  // in (0, 1]: nothing overflows
      loss += (margin < 0 ? -margin : 0.0) + __builtin_log1p(e);
      const double wrong = (margin > 0 ? e : 1.0) / (1.0 + e);  // sigmoid(-margin)
      sum[w] -= wrong;
      sum[l] += wrong;
      num_correct += margin > 0;
    }
  for (int64_t i = 0; i < n; ++i) grad[i] = static_cast<float>(weight * sum[i]);
  *correct = num_correct;
  return weight * loss;
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "check.h"

namespace engine {
namespace {

constexpr int64_t kPromptsPerTask = 16;
enum Reduction : int64_t { prompt_mean_valid = 0, prompt_mean_allpairs = 1, pair_mean = 2 };

// What the prompt adds to the denominator of the batch, and what its own sum is divided by.
struct Share {
  int64_t count;
  double divisor;
};

Share share_of(int64_t reduction, int64_t answers, int64_t pairs) {
  switch (reduction) {
    case prompt_mean_valid: return {pairs > 0, static_cast<double>(pairs)};
    case prompt_mean_allpairs: return {answers > 1, static_cast<double>(answers * (answers - 1) / 2)};
    default: return {pairs, 1.0};
  }
}

struct Prompts {
  const double* rank;
  const int32_t* offset;
  int64_t number;
  int64_t answers(int64_t s) const { return offset[s + 1] - offset[s]; }
};

std::vector<int64_t> count_pairs(const Prompts& prompts) {
  std::vector<int64_t> pairs(prompts.number);
  const auto run = pick_ranking_pairs();
  at::parallel_for(0, prompts.number, kPromptsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) pairs[s] = run(prompts.rank + prompts.offset[s], prompts.answers(s));
  });
  return pairs;
}

at::Tensor scalar(int64_t x) { return at::scalar_tensor(x, at::kLong); }

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ranking_loss(const at::Tensor& score,
                                                                        const at::Tensor& rank, const at::Tensor& cu,
                                                                        int64_t reduction,
                                                                        std::optional<double> denominator) {
  const int64_t num_answers = score.numel();
  check_float_vector(score, num_answers, "score");
  check_cpu_contiguous(rank, "rank");
  check_dtype(rank, at::kDouble, "rank");
  TORCH_CHECK_VALUE(rank.sizes() == score.sizes(), "rank: got shape ", rank.sizes(), ", want ", score.sizes());
  check_offsets(cu, num_answers, "cu");
  const Prompts prompts{rank.const_data_ptr<double>(), cu.const_data_ptr<int32_t>(), cu.numel() - 1};
  const std::vector<int64_t> pairs = count_pairs(prompts);
  int64_t num_pairs = 0, num_correct = 0, own = 0;
  for (int64_t s = 0; s < prompts.number; ++s) {
    num_pairs += pairs[s];
    own += share_of(reduction, prompts.answers(s), pairs[s]).count;
  }
  const double total = denominator.value_or(static_cast<double>(own));

  at::Tensor grad = at::zeros_like(score);
  at::Tensor sum = at::empty({num_answers}, score.options().dtype(at::kDouble));
  std::vector<double> losses(prompts.number, 0.0);
  std::vector<int64_t> correct(prompts.number, 0);
  const auto run = pick_ranking_prompt();
  const float* values = score.const_data_ptr<float>();
  float* gradients = grad.data_ptr<float>();
  double* room = sum.data_ptr<double>();
  at::parallel_for(0, prompts.number, kPromptsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      if (pairs[s] == 0) continue;
      const int64_t at = prompts.offset[s], answers = prompts.answers(s);
      const double weight = 1.0 / (share_of(reduction, answers, pairs[s]).divisor * total);
      losses[s] = run(values + at, prompts.rank + at, answers, weight, room + at, gradients + at, &correct[s]);
    }
  });
  double loss = 0.0;
  for (int64_t s = 0; s < prompts.number; ++s) {
    loss += losses[s];
    num_correct += correct[s];
  }
  return {at::scalar_tensor(loss, score.options()), scalar(num_pairs), scalar(num_correct), grad};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("ranking_loss", &engine::ranking_loss); }
#endif
