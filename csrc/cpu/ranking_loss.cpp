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
#include "ranking_lanes.h"

namespace engine::ENGINE_CLASS {

template <typename T>
ENGINE_INLINE int64_t count_of(const T* rank, const Prompts& prompts) {
  int64_t pairs = 0;
  for (int64_t s = 0; s < prompts.number; ++s)
    for (int64_t i = prompts.offset[s]; i < prompts.offset[s + 1]; ++i)
      for (int64_t j = prompts.offset[s]; j < prompts.offset[s + 1]; ++j) pairs += rank[i] < rank[j];
  return pairs;
}

// One prompt of any size and with scores of any size: its undivided sums. `sum` holds the gradient.
template <typename T>
ENGINE_INLINE RankingSums one_prompt(const float* score, const T* rank, int64_t n, double* sum) {
  RankingSums all{};
  for (int64_t i = 0; i < n; ++i) sum[i] = 0.0;
  for (int64_t w = 0; w < n; ++w)
    for (int64_t l = 0; l < n; ++l) {
      if (!(rank[w] < rank[l])) continue;
      const double margin = static_cast<double>(score[w]) - static_cast<double>(score[l]);
      const double e = __builtin_exp(-__builtin_fabs(margin));  // in (0, 1]: nothing overflows
      all.loss += (margin < 0 ? -margin : 0.0) + __builtin_log1p(e);
      const double wrong = (margin > 0 ? e : 1.0) / (1.0 + e);  // sigmoid(-margin)
      sum[w] -= wrong;
      sum[l] += wrong;
      ++all.pairs;
      all.correct += margin > 0;
    }
  return all;
}

ENGINE_INLINE double weight_of(int64_t reduction, int64_t answers, int64_t pairs, double total) {
  return pairs > 0 ? 1.0 / (divisor_of(reduction, answers, pairs) * total) : 0.0;
}

// Most prompts have few answers, with scores that are not far apart. They lie side by side, one a lane
// (ranking_lanes.h); the others are done one by one. The way that a prompt goes follows from that prompt alone.
template <typename T>
struct Block {
  // no zeros for products and weights, which are written first
  Block(const Prompts& prompts, const T* rank, int64_t reduction, double total, double* sum, float* grad)
      : prompts(prompts), rank(rank), reduction(reduction), total(total), sum(sum), grad(grad) {}
  const Prompts& prompts;
  const T* rank;
  int64_t reduction;
  double total;
  double* sum;
  float* grad;
  RankingSums sums{0.0, 0, 0, 0, true};
  vint pairs{}, correct{};
  vfloat odd{};  // nan where a rank is not finite
  // Logarithms are left to the end: one after the other each would wait for its own last step.
  Lanes::Product product[kPromptsPerBlock / kHalf];
  vwide weight[kPromptsPerBlock / kHalf];
  int halves = 0;
};

// Takes a group's sums; returns what its gradients are multiplied by. Its prompts have answers[lane] answers each; where
// all_pairs, the same number, and all pairs that there can be.
template <typename T>
ENGINE_INLINE vfloat keep(Block<T>& block, const Lanes& lanes, bool all_pairs, const int64_t* answers) {
  double weights[kLanes];
  float narrow[kLanes];
  int32_t pairs[kLanes];
  std::memcpy(pairs, &lanes.pairs, sizeof(pairs));
  const double same = weight_of(block.reduction, answers[0], pairs[0], block.total);
  if (all_pairs) block.sums.paired += kLanes;
  for (int lane = 0; lane < kLanes && !all_pairs; ++lane) {
    weights[lane] = weight_of(block.reduction, answers[lane], pairs[lane], block.total);
    narrow[lane] = static_cast<float>(weights[lane]);
    block.sums.paired += pairs[lane] > 0;
  }
  block.pairs += lanes.pairs;
  block.correct += lanes.correct;
  for (int h = 0; h < 2; ++h, ++block.halves) {
    block.product[block.halves] = lanes.product[h];
    if (all_pairs)
      block.weight[block.halves] = splat_wide(same);
    else
      std::memcpy(&block.weight[block.halves], weights + h * kHalf, sizeof(vwide));
  }
  return all_pairs ? splat(static_cast<float>(same)) : load(narrow);
}

template <typename T>
static void alone(Block<T>& block, int64_t s) {
  const int64_t at = block.prompts.offset[s], n = block.prompts.offset[s + 1] - at;
  const RankingSums own = one_prompt(block.prompts.score + at, block.rank + at, n, block.sum);
  const double weight = weight_of(block.reduction, n, own.pairs, block.total);
  for (int64_t i = 0; i < n; ++i) block.grad[at + i] = static_cast<float>(weight * block.sum[i]);
  block.sums.loss += weight * own.loss;
  block.sums.pairs += own.pairs;
  block.sums.correct += own.correct;
  block.sums.paired += own.pairs > 0;
}

// kLanes prompts of K answers each.
template <int K, typename T>
static void even_group(Block<T>& block, int64_t first) {
  const int64_t at = block.prompts.offset[first];
  const float *score = block.prompts.score + at, *rank = static_cast<const float*>(block.prompts.rank) + at;
  float* grad = block.grad + at;
  Lanes lanes;
  lay<K>([=](int lane) { return score + lane * K; }, lanes.score);
  lay<K>([=](int lane) { return rank + lane * K; }, lanes.rank);
  for (int i = 0; i < K; ++i) block.odd += lanes.rank[i] * 0.0f;
  const bool all_pairs = sum_lanes<K>(lanes);
  int64_t answers[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) answers[lane] = K;
  const vfloat share = keep(block, lanes, all_pairs, answers);
  for (int i = 0; i < K; ++i) lanes.grad[i] *= share;
  put_back<K>(lanes.grad, grad);
  if (any_lane(lanes.apart)) {
    int32_t apart[kLanes];
    std::memcpy(apart, &lanes.apart, sizeof(apart));
    for (int lane = 0; lane < kLanes; ++lane)
      if (apart[lane]) alone(block, first + lane);
  }
}

// Ranks as float32 of the same order: themselves where they fit, else how many are less.
ENGINE_INLINE void narrow_ranks(const float* rank, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = rank[i];  // no memcpy: of a batch without answers there is no memory
}
ENGINE_INLINE void narrow_ranks(const double* rank, int64_t n, float* out) {
  bool fit = true;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<float>(rank[i]);
    fit &= out[i] == rank[i];
  }
  for (int64_t i = 0; i < n && !fit; ++i) {
    int64_t less = 0;
    for (int64_t j = 0; j < n; ++j) less += rank[j] < rank[i];
    out[i] = static_cast<float>(less);
  }
}

// Up to kLanes prompts of any sizes, `count` of them.
template <typename T>
static void any_group(Block<T>& block, int64_t first, int count) {
  float score[kRoom][kLanes], rank[kRoom][kLanes], grad[kMost][kLanes];
  int64_t answers[kLanes];
  int most = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t at = block.prompts.offset[first + (lane < count ? lane : 0)];
    const int64_t n = lane < count ? block.prompts.offset[first + lane + 1] - at : 0;
    for (int64_t i = 0; i < n; ++i) block.sums.finite &= block.rank[at + i] - block.rank[at + i] == 0;
    answers[lane] = n > kMost ? 0 : n;
    float narrow[kMost];
    narrow_ranks(block.rank + at, answers[lane], narrow);
    for (int64_t i = 0; i < kRoom; ++i) {
      score[i][lane] = i < answers[lane] ? block.prompts.score[at + i] : answers[lane] > 0 ? score[0][lane] : 0.0f;
      rank[i][lane] = i < answers[lane] ? narrow[i] : kInf;
    }
    if (answers[lane] > most) most = static_cast<int>(answers[lane]);
  }
  Lanes lanes;
  std::memcpy(lanes.score, score, sizeof(score));
  std::memcpy(lanes.rank, rank, sizeof(rank));
  const bool all_pairs = sum_any(lanes, most);
  const vfloat share = keep(block, lanes, all_pairs, answers);
  for (int i = 0; i < most; ++i) lanes.grad[i] *= share;
  std::memcpy(grad, lanes.grad, sizeof(grad));
  int32_t apart[kLanes];
  std::memcpy(apart, &lanes.apart, sizeof(apart));
  for (int lane = 0; lane < count; ++lane) {
    const int64_t at = block.prompts.offset[first + lane];
    for (int64_t i = 0; i < answers[lane]; ++i) block.grad[at + i] = grad[i][lane];
    if (apart[lane] || block.prompts.offset[first + lane + 1] - at > kMost) alone(block, first + lane);
  }
}

// K where kLanes prompts from `first` on have K answers each that may be laid as they are, 0 elsewhere.
ENGINE_INLINE int64_t even_answers(const Prompts& prompts, int64_t first) {
  const int32_t* offset = prompts.offset + first;
  if (prompts.wide_rank || first + kLanes > prompts.number) return 0;
  const int32_t n = offset[1] - offset[0];
  vint begin, end;
  std::memcpy(&begin, offset, sizeof(begin));
  std::memcpy(&end, offset + 1, sizeof(end));
  return !any_lane((end - begin) ^ n) && offset[kLanes - 1] + kRoom <= prompts.answers ? n : 0;
}

template <typename T>
ENGINE_INLINE RankingSums prompts_of(const T* rank, const Prompts& prompts, int64_t reduction, double total,
                                     double* sum, float* grad) {
  Block<T> block(prompts, rank, reduction, total, sum, grad);
  for (int64_t first = 0; first < prompts.number; first += kLanes) {
    switch (even_answers(prompts, first)) {
      case 2: even_group<2>(block, first); break;
      case 3: even_group<3>(block, first); break;
      case 4: even_group<4>(block, first); break;
      case 5: even_group<5>(block, first); break;
      case 6: even_group<6>(block, first); break;
      case 7: even_group<7>(block, first); break;
      case 8: even_group<8>(block, first); break;
      case 9: even_group<9>(block, first); break;
      default: {
        const int64_t left = prompts.number - first;
        any_group(block, first, static_cast<int>(left < kLanes ? left : kLanes));
      }
    }
  }
  vwide loss{};
  for (int h = 0; h < block.halves; ++h) loss += block.weight[h] * log_of(block.product[h].p, block.product[h].u);
  RankingSums all = block.sums;
  all.loss += hsum(loss);
  int32_t pairs[kLanes], correct[kLanes];
  std::memcpy(pairs, &block.pairs, sizeof(pairs));
  std::memcpy(correct, &block.correct, sizeof(correct));
  for (int lane = 0; lane < kLanes; ++lane) {
    all.pairs += pairs[lane];
    all.correct += correct[lane];
  }
  all.finite &= !any_lane(block.odd != block.odd);
  return all;
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

namespace engine {
namespace {

constexpr int64_t kBlocksPerTask = 16;

// run(block, prompts of the block, room) for all blocks, on all threads; `room` is for so many numbers.
template <typename Run>
void in_blocks(const Prompts& all, int64_t numbers, const Run& run) {
  const int64_t blocks = (all.number + kPromptsPerBlock - 1) / kPromptsPerBlock;
  at::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    std::vector<double> room(numbers);
    for (int64_t b = begin; b < end; ++b) {
      Prompts some = all;
      some.offset += b * kPromptsPerBlock;
      some.number = std::min(kPromptsPerBlock, all.number - b * kPromptsPerBlock);
      run(b, some, room.data());
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
