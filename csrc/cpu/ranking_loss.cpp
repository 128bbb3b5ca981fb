// The pairwise ranking loss of a prompt's K answers; the equations are in kernels/ranking_loss.py.
#include <cstdint>

#include "dispatch.h"

namespace engine {

enum Reduction : int64_t { prompt_mean_valid = 0, prompt_mean_allpairs = 1, pair_mean = 2 };

// What a prompt's own sum is divided by.
static inline double divisor_of(int64_t reduction, int64_t answers, int64_t pairs) {
  switch (reduction) {
    case prompt_mean_valid: return static_cast<double>(pairs);
    case prompt_mean_allpairs: return static_cast<double>(answers * (answers - 1) / 2);
    default: return 1.0;
  }
}

// Prompts side by side: the answers of prompt s are offset[s] .. offset[s + 1]. Ranks are float64 or float32.
struct Prompts {
  const float* score;
  const void* rank;
  bool wide_rank;
  const int32_t* offset;
  int64_t number;
  int64_t answers;  // of the whole batch
};

struct RankingSums {
  double loss;  // divided
  int64_t pairs, correct;
  int64_t paired;  // prompts that have a pair
  bool finite;  // all ranks
};

constexpr int64_t kPromptsPerBlock = 64;  // sums are added block by block, in order

}  // namespace engine

// The prompts' pairs.
ENGINE_KERNEL(int64_t, ranking_count, (const Prompts& prompts))
// The part in the loss and the gradient of a block of prompts at most. `sum` has room for the answers of one prompt.
ENGINE_KERNEL(RankingSums, ranking_prompts,
              (const Prompts& prompts, int64_t reduction, double total, double* sum, float* grad))

#ifdef ENGINE_CLASS
#include "ranking_groups.h"

namespace engine::ENGINE_CLASS {

template <typename T>
ENGINE_INLINE int64_t count_of(const T* rank, const Prompts& prompts) {
  int64_t pairs = 0;
  for (int64_t s = 0; s < prompts.number; ++s)
    for (int64_t i = prompts.offset[s]; i < prompts.offset[s + 1]; ++i)
      for (int64_t j = prompts.offset[s]; j < prompts.offset[s + 1]; ++j) pairs += rank[i] < rank[j];
  return pairs;
}

int64_t ranking_count(const Prompts& prompts) {
  return prompts.wide_rank ? count_of(static_cast<const double*>(prompts.rank), prompts)
                           : count_of(static_cast<const float*>(prompts.rank), prompts);
}

RankingSums ranking_prompts(const Prompts& prompts, int64_t reduction, double total, double* sum, float* grad) {
  return prompts.wide_rank
             ? prompts_of(static_cast<const double*>(prompts.rank), prompts, reduction, total, sum, grad)
             : prompts_of(static_cast<const float*>(prompts.rank), prompts, reduction, total, sum, grad);
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "check.h"
#include "team.h"

namespace engine {
namespace {

constexpr int64_t kPromptBlocksPerTask = 16;

// run(block, prompts of the block, room) for all blocks, on all threads; `room` is for so many numbers.
template <typename Run>
void in_blocks(const Prompts& all, int64_t numbers, const Run& run) {
  const int64_t blocks = (all.number + kPromptsPerBlock - 1) / kPromptsPerBlock, threads = at::get_num_threads();
  const int64_t tasks = (blocks + kPromptBlocksPerTask - 1) / kPromptBlocksPerTask;
  std::vector<double> room(numbers * threads);
  Team::each(tasks, threads, [&](int64_t thread, int64_t task) {
    for (int64_t b = task * kPromptBlocksPerTask; b < std::min(blocks, (task + 1) * kPromptBlocksPerTask); ++b) {
      Prompts some = all;
      some.offset += b * kPromptsPerBlock;
      some.number = std::min(kPromptsPerBlock, all.number - b * kPromptsPerBlock);
      run(b, some, room.data() + numbers * thread);
    }
  });
}

struct Lengths {
  int64_t longest;  // answers of a prompt
  int64_t several;  // prompts with two answers or more
};

// Offsets are checked here at the speed of vectors; check_offsets says what is wrong.
Lengths lengths_of(const at::Tensor& cu, int64_t total) {
  if (!cu.device().is_cpu() || cu.scalar_type() != at::kInt || !cu.is_contiguous() || cu.dim() != 1 || cu.numel() < 1)
    check_offsets(cu, total, "cu", "answers");  // raises
  const int32_t* offset = cu.const_data_ptr<int32_t>();
  const int64_t last = cu.numel() - 1;
  int32_t falls = 0, longest = 0, several = 0;
  for (int64_t s = 0; s < last; ++s) {
    falls |= offset[s] > offset[s + 1];
    const int32_t n = static_cast<int32_t>(static_cast<uint32_t>(offset[s + 1]) - static_cast<uint32_t>(offset[s]));
    longest = n > longest ? n : longest;
    several += n > 1;
  }
  if (falls != 0 || offset[0] != 0 || offset[last] != total) check_offsets(cu, total, "cu", "answers");  // raises
  return {longest, several};
}

// Raises ValueError at the first rank that is not finite.
void refuse_ranks(const at::Tensor& rank) {
  const at::Tensor wide = rank.to(at::kDouble);
  const double* value = wide.const_data_ptr<double>();
  for (int64_t i = 0; i < wide.numel(); ++i)
    TORCH_CHECK_VALUE(std::isfinite(value[i]), "rank[", i, "]: got ", value[i],
                      ", want a finite number; leave an answer without a rank out of the batch");
}

int64_t pairs_of_all(const Prompts& prompts, int64_t num_blocks) {
  std::vector<int64_t> counts(num_blocks);
  const auto count = pick_ranking_count();
  in_blocks(prompts, 0, [&](int64_t b, const Prompts& some, double*) { counts[b] = count(some); });
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

RankingSums sums_of_all(const Prompts& prompts, int64_t num_blocks, int64_t longest, int64_t reduction, double total,
                        float* grad) {
  std::vector<RankingSums> sums(num_blocks);
  in_blocks(prompts, longest, [&](int64_t b, const Prompts& some, double* room) {
    sums[b] = pick_ranking_prompts()(some, reduction, total, room, grad);
  });
  RankingSums all{0.0, 0, 0, 0, true};
  for (const RankingSums& each : sums) {
    all.loss += each.loss;
    all.pairs += each.pairs;
    all.correct += each.correct;
    all.paired += each.paired;
    all.finite &= each.finite;
  }
  return all;
}

at::Tensor scalar(int64_t x) { return at::scalar_tensor(x, at::kLong); }

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ranking_loss(const at::Tensor& score,
                                                                        const at::Tensor& rank, const at::Tensor& cu,
                                                                        int64_t reduction,
                                                                        std::optional<double> denominator) {
  const int64_t num_answers = score.numel();
  check_float_vector(score, num_answers, "score");
  check_cpu_contiguous(rank, "rank");
  TORCH_CHECK_VALUE(rank.scalar_type() == at::kDouble || rank.scalar_type() == at::kFloat, "rank: got dtype ",
                    rank.scalar_type(), ", want float32 or float64");
  TORCH_CHECK_VALUE(rank.sizes() == score.sizes(), "rank: got shape ", rank.sizes(), ", want ", score.sizes());
  const Lengths lengths = lengths_of(cu, num_answers);
  const Prompts prompts{score.const_data_ptr<float>(), rank.const_data_ptr(), rank.scalar_type() == at::kDouble,
                        cu.const_data_ptr<int32_t>(), cu.numel() - 1, num_answers};
  const int64_t num_blocks = (prompts.number + kPromptsPerBlock - 1) / kPromptsPerBlock;
  at::Tensor grad = at::empty_like(score);
  const auto divided_by = [&](double total) {
    return sums_of_all(prompts, num_blocks, lengths.longest, reduction, total, grad.data_ptr<float>());
  };
  // All ranks of a prompt are seldom equal: that each has a pair is supposed, and seldom done again.
  const auto supposed = [&] { return reduction == pair_mean ? pairs_of_all(prompts, num_blocks) : lengths.several; };
  RankingSums all = divided_by(denominator ? *denominator : static_cast<double>(supposed()));
  if (!denominator && reduction == prompt_mean_valid && all.paired != lengths.several) all = divided_by(all.paired);
  if (!all.finite) refuse_ranks(rank);
  return {at::scalar_tensor(all.loss, score.options()), scalar(all.pairs), scalar(all.correct), grad};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("ranking_loss", &engine::ranking_loss); }
#endif
