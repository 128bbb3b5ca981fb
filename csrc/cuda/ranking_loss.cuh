// The pairwise ranking loss of a prompt's K answers and its gradient; the contract is in kernels/ranking_loss.py.
//
//     L_p = sum over pairs of softplus(-margin),   dL_p / dscore_i = sum_j sigmoid(score_i - score_j) - [i beats j]
//
// A warp a prompt: lane i owns answer i (and i + 32, ...), the others come by shuffles, in order; no pair is stored,
// nothing is shared, and a prompt's sums depend on nothing but the prompt. In float64, as in C++: a few dozen pairs.
// A second kernel adds up the prompts in a fixed order and scales the gradients by the batch's own count, which is
// not known before.
#pragma once

#include "platform.cuh"

namespace engine_cuda {

enum Reduction : int { prompt_mean_valid = 0, prompt_mean_allpairs = 1, pair_mean = 2 };

struct Ranking {
  int64_t answers, prompts;  // with answers there are prompts
  const float* score;        // (answers,)
  const double* rank;        // (answers,) finite; lower is better, equal ranks give no pair
  const int32_t* cu;         // (prompts + 1,) as kernels/_check.py wants it
};

// What a prompt's warp leaves for the second kernel.
struct RankingScratch {
  double* slope;                // (answers,) gradient of the prompt's sum of losses
  double* loss;                 // (prompts,) that sum
  int64_t *pairs, *correct;     // (prompts,)
};

struct RankingResult {
  float* loss;                        // ()
  int64_t *num_pairs, *num_correct;   // ()
  float* grad;                        // (answers,)
};

// Where a prompt's answers are; offsets that do not fit give wrong numbers, never a wrong address.
struct Answers {
  int64_t begin, count;
};

__device__ __forceinline__ Answers answers_of(const Ranking& p, int64_t prompt) {
  const int64_t begin = min(max(static_cast<int64_t>(p.cu[prompt]), int64_t{0}), p.answers);
  const int64_t end = min(max(static_cast<int64_t>(p.cu[prompt + 1]), begin), p.answers);
  return {begin, end - begin};
}

__global__ void rank_prompts(Ranking p, RankingScratch scratch) {
  const int64_t prompt = warp_of_grid();
  if (prompt >= p.prompts) return;
  const Answers own = answers_of(p, prompt);
  const float* score = p.score + own.begin;
  const double* rank = p.rank + own.begin;
  double loss = 0.0;
  int64_t pairs = 0, correct = 0;
  for (int64_t first = 0; first < own.count; first += kWarp) {
    const int64_t i = first + lane();
    const bool mine = i < own.count;
    const double score_i = mine ? score[i] : 0.0f, rank_i = mine ? rank[i] : 0.0;
    double slope = 0.0;
    for (int64_t others = 0; others < own.count; others += kWarp) {
      const int count = static_cast<int>(min(own.count - others, int64_t{kWarp}));
      const float held_score = lane() < count ? score[others + lane()] : 0.0f;
      const double held_rank = lane() < count ? rank[others + lane()] : 0.0;
      for (int j = 0; j < count; ++j) {
        const double score_j = __shfl_sync(kAllLanes, held_score, j);
        const double rank_j = __shfl_sync(kAllLanes, held_rank, j);
        const bool wins = rank_i < rank_j, loses = rank_j < rank_i;
        if (!mine || !(wins || loses)) continue;
        const double margin = wins ? score_i - score_j : score_j - score_i;
        const double e = exp(-fabs(margin));  // in (0, 1]: nothing overflows
        const double wrong = (margin > 0 ? e : 1.0) / (1.0 + e);  // sigmoid(-margin)
        slope += wins ? -wrong : wrong;
        if (!wins) continue;
        loss += (margin < 0 ? -margin : 0.0) + log1p(e);
        pairs += 1;
        correct += margin > 0;
      }
    }
    if (mine) scratch.slope[own.begin + i] = slope;
  }
  loss = warp_sum(loss);
  pairs = warp_sum(pairs);
  correct = warp_sum(correct);
  if (lane() != 0) return;
  scratch.loss[prompt] = loss;
  scratch.pairs[prompt] = pairs;
  scratch.correct[prompt] = correct;
}

// What a prompt adds to the batch's denominator, and what its own sum is divided by.
__device__ __forceinline__ int64_t count_of(int reduction, int64_t answers, int64_t pairs) {
  if (reduction == prompt_mean_valid) return pairs > 0;
  return reduction == prompt_mean_allpairs ? answers > 1 : pairs;
}
__device__ __forceinline__ double divisor_of(int reduction, int64_t answers, int64_t pairs) {
  if (reduction == prompt_mean_valid) return static_cast<double>(pairs);
  return reduction == prompt_mean_allpairs ? static_cast<double>(answers * (answers - 1) / 2) : 1.0;
}

// Over the block's threads, whole warps, in the order of their numbers; every thread gets it.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* partial) {  // partial: (warps of the block,) in shared memory
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (lane() == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < warps; ++w) total += partial[w];
  __syncthreads();  // before the next sum writes there
  return total;
}

// denominator 0: the batch's own count. Every block finds the count for itself: integers, the same in any order.
__global__ void rank_batch(Ranking p, RankingScratch scratch, int reduction, double denominator, RankingResult result) {
  SHARED_ARRAY(int64_t, counts, kWarp);
  SHARED_ARRAY(double, losses, kWarp);
  double total = denominator;
  if (denominator == 0) {
    int64_t own = 0;
    for (int64_t s = threadIdx.x; s < p.prompts; s += blockDim.x)
      own += count_of(reduction, answers_of(p, s).count, scratch.pairs[s]);
    total = static_cast<double>(block_sum(own, &counts[0]));
  }
  if (blockIdx.x == 0) {
    double loss = 0.0;
    int64_t pairs = 0, correct = 0;
    for (int64_t s = threadIdx.x; s < p.prompts; s += blockDim.x) {
      if (scratch.pairs[s] == 0) continue;
      loss += 1.0 / (divisor_of(reduction, answers_of(p, s).count, scratch.pairs[s]) * total) * scratch.loss[s];
      pairs += scratch.pairs[s];
      correct += scratch.correct[s];
    }
    loss = block_sum(loss, &losses[0]);
    pairs = block_sum(pairs, &counts[0]);
    correct = block_sum(correct, &counts[0]);
    if (threadIdx.x == 0) {
      *result.loss = static_cast<float>(loss);
      *result.num_pairs = pairs;
      *result.num_correct = correct;
    }
  }
  for (int64_t s = warp_of_grid(); s < p.prompts; s += warps_of_grid()) {
    const Answers own = answers_of(p, s);
    const int64_t pairs = scratch.pairs[s];
    const double weight = pairs == 0 ? 0.0 : 1.0 / (divisor_of(reduction, own.count, pairs) * total);
    for (int64_t i = lane(); i < own.count; i += kWarp)
      result.grad[own.begin + i] = pairs == 0 ? 0.0f : static_cast<float>(weight * scratch.slope[own.begin + i]);
  }
}

// `check` is called after each launch. The count of blocks bounds how often the prompts' counts are read.
template <class Check>
void launch_ranking_loss(const Ranking& p, const RankingScratch& scratch, int reduction, double denominator,
                         const RankingResult& result, unsigned threads, cudaStream_t stream, Check check) {
  constexpr int64_t kMostBlocks = 128;
  const int64_t blocks = ceil_div(p.prompts * kWarp, threads);
  const dim3 block(threads);
  if (p.prompts > 0) {
    KERNEL_LAUNCH(rank_prompts, dim3(static_cast<unsigned>(blocks)), block, 0, stream, p, scratch);
    check();
  }
  const dim3 few(static_cast<unsigned>(blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks));
  KERNEL_LAUNCH(rank_batch, few, block, 0, stream, p, scratch, reduction, denominator, result);
  check();
}

}  // namespace engine_cuda
