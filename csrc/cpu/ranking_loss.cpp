// The pairwise ranking loss of a prompt's K answers; the equations are in kernels/ranking_loss.py.
#include <cstdint>

#include "dispatch.h"

namespace engine {

enum Reduction : int64_t { prompt_mean_valid = 0, prompt_mean_allpairs = 1, pair_mean = 2 };

// What the prompt adds to the denominator of the batch, and what its own sum is divided by.
struct Share {
  int64_t count;
  double divisor;
};

static inline Share share_of(int64_t reduction, int64_t answers, int64_t pairs) {
  switch (reduction) {
    case prompt_mean_valid: return {pairs > 0, static_cast<double>(pairs)};
    case prompt_mean_allpairs: return {answers > 1, static_cast<double>(answers * (answers - 1) / 2)};
    default: return {pairs, 1.0};
  }
}

// Prompts side by side: the answers of prompt s are offset[s] .. offset[s + 1]. Ranks are float64 or float32.
struct Prompts {
  const float* score;
  const void* rank;
  bool wide_rank;
  const int32_t* offset;
  int64_t number;
};

struct RankingSums {
  double loss;  // divided
  int64_t pairs, correct;
};

}  // namespace engine

// What the prompts add to the denominator.
ENGINE_KERNEL(int64_t, ranking_count, (const Prompts& prompts, int64_t reduction))
ENGINE_KERNEL(bool, ranks_are_finite, (const Prompts& prompts))
// The prompts' part of the loss and its gradient. `sum` has room for the answers of one prompt.
ENGINE_KERNEL(RankingSums, ranking_prompts,
              (const Prompts& prompts, int64_t reduction, double total, double* sum, float* grad))

#ifdef ENGINE_CLASS
#include "vec_double.h"

namespace engine::ENGINE_CLASS {

template <typename T>
ENGINE_INLINE int64_t pairs_of(const T* rank, int64_t n) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) pairs += rank[i] < rank[j];
  return pairs;
}

// Of prompt_mean_valid the denominator asks only whether there is a pair: whether two ranks differ.
template <typename T>
ENGINE_INLINE int64_t count_of(const T* rank, const Prompts& prompts, int64_t reduction) {
  int64_t count = 0;
  for (int64_t s = 0; s < prompts.number; ++s) {
    const int64_t at = prompts.offset[s], n = prompts.offset[s + 1] - at;
    int64_t pairs = 0;
    if (reduction == pair_mean) pairs = pairs_of(rank + at, n);
    if (reduction == prompt_mean_valid)
      for (int64_t i = 1; i < n && pairs == 0; ++i) pairs = rank[at + i] != rank[at];
    count += share_of(reduction, n, pairs).count;
  }
  return count;
}

template <typename T, typename Count>
ENGINE_INLINE bool all_finite(const T* rank, int64_t n) {
  Count odd = 0;
  for (int64_t i = 0; i < n; ++i) odd |= !(rank[i] - rank[i] == 0);
  return odd == 0;
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

// Most prompts have few answers, with scores that are not far apart. They lie side by side, one a lane. Then
// e^s is computed once an answer, sigmoid(s_l - s_w) = e^s_l / (e^s_l + e^s_w), and the sum of -log sigmoid is one
// logarithm: of the product over all pairs, which is above 1e-250 (and each factor below 1 by 1e-7 at least).
constexpr int kMost = 9;       // answers of a prompt, the paper's most
constexpr double kNear = 8.0;  // of each score to the prompt's first

struct Lanes {
  double score[kMost][kHalf], rank[kMost][kHalf];  // an answer that is not there has rank nan: no pair
  bool together[kHalf];
  int64_t answers[kHalf];
  int most;
};

template <typename T>
ENGINE_INLINE void lay(const Prompts& prompts, const T* rank, int64_t first, Lanes& lanes) {
  lanes.most = 0;
  for (int lane = 0; lane < kHalf; ++lane) {
    const int64_t s = first + lane, at = s < prompts.number ? prompts.offset[s] : 0;
    const int64_t n = s < prompts.number ? prompts.offset[s + 1] - at : 0;
    bool together = n <= kMost;
    for (int64_t i = 0; together && i < n; ++i) {
      const double score = prompts.score[at + i], apart = score - prompts.score[at];
      together = apart >= -kNear && apart <= kNear;  // not where one is nan
      lanes.score[i][lane] = score;
      lanes.rank[i][lane] = rank[at + i];
    }
    lanes.together[lane] = together;
    lanes.answers[lane] = n;
    if (together && n > lanes.most) lanes.most = static_cast<int>(n);
  }
  for (int lane = 0; lane < kHalf; ++lane)
    for (int64_t i = lanes.together[lane] ? lanes.answers[lane] : 0; i < lanes.most; ++i) {
      lanes.score[i][lane] = i == 0 || !lanes.together[lane] ? 0.0 : lanes.score[0][lane];
      lanes.rank[i][lane] = __builtin_nan("");
    }
}

ENGINE_INLINE vwide load_lanes(const double* p) {
  vwide v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// e^x for |x| <= kNear: x = n ln 2 + r, Taylor to r^11 (the rest is below 7e-15), n added to the exponent.
ENGINE_INLINE vwide exp_near(vwide x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, in the lowest bits
  const vwide shifted = x * 1.4426950408889634 + magic;
  const vwide r = x - (shifted - magic) * 0.6931471805599453;
  vwide p = splat_wide(1.0);
#pragma GCC unroll 11
  for (int k = 11; k > 0; --k) p = p * (r * (1.0 / k)) + 1.0;
  return (vwide)((vwide_bits)p + ((vwide_bits)shifted << 52));
}

// log x for normal x > 0: x = 2^k m with m in [0.707, 1.414), log m = 2 atanh((m - 1) / (m + 1)) to its 17th power.
ENGINE_INLINE vwide log_of(vwide x) {
  const vwide_int above = (vwide_int)x - 0x3fe6a09e667f3bcd;  // the bits of the root of 1/2
  const vwide_int k = above >> 52;
  const vwide m = (vwide)((vwide_bits)x - ((vwide_bits)k << 52));
  const vwide s = (m - 1.0) / (m + 1.0), square = s * s;
  vwide p = splat_wide(1.0 / 17);
#pragma GCC unroll 8
  for (int odd = 15; odd > 0; odd -= 2) p = p * square + 1.0 / odd;
  return __builtin_convertvector(k, vwide) * 0.6931471805599453 + 2.0 * s * p;
}

struct LaneSums {
  double grad[kMost][kHalf], loss[kHalf];
  int64_t pairs[kHalf], correct[kHalf];
};

ENGINE_INLINE void add_pairs(const Lanes& lanes, LaneSums& out) {
  vwide e[kMost], score[kMost], rank[kMost], grad[kMost];
  for (int i = 0; i < lanes.most; ++i) {
    score[i] = load_lanes(lanes.score[i]);
    rank[i] = load_lanes(lanes.rank[i]);
    e[i] = exp_near(score[i] - score[0]);
    grad[i] = vwide{};
  }
  vwide product = splat_wide(1.0);
  vwide_int pairs{}, correct{};
  for (int i = 0; i < lanes.most; ++i) {
    vwide own = grad[i];
    for (int j = i + 1; j < lanes.most; ++j) {
      // e of the loser: positive where i wins, negative where j wins, 0 where there is no pair
      const vwide_int first = rank[i] < rank[j], second = rank[j] < rank[i];
      const vwide loser = (vwide)((vwide_int)e[j] & first) - (vwide)((vwide_int)e[i] & second);
      const vwide wrong = loser / (e[i] + e[j]);
      own -= wrong;
      grad[j] += wrong;
      product -= product * (wrong < 0.0 ? -wrong : wrong);
      pairs -= loser != 0.0;  // a mask is -1
      correct -= loser * (score[i] - score[j]) > 0.0;
    }
    grad[i] = own;
  }
  const vwide loss = -log_of(product);
  for (int i = 0; i < lanes.most; ++i) std::memcpy(out.grad[i], &grad[i], sizeof(vwide));
  std::memcpy(out.loss, &loss, sizeof(loss));
  std::memcpy(out.pairs, &pairs, sizeof(pairs));
  std::memcpy(out.correct, &correct, sizeof(correct));
}

template <typename T>
ENGINE_INLINE RankingSums prompts_of(const T* rank, const Prompts& prompts, int64_t reduction, double total,
                                     double* sum, float* grad) {
  RankingSums all{};
  Lanes lanes;
  LaneSums sums;
  for (int64_t first = 0; first < prompts.number; first += kHalf) {
    lay(prompts, rank, first, lanes);
    add_pairs(lanes, sums);
    for (int lane = 0; lane < kHalf && first + lane < prompts.number; ++lane) {
      const int64_t at = prompts.offset[first + lane], n = lanes.answers[lane];
      const bool apart = !lanes.together[lane];
      RankingSums own{sums.loss[lane], sums.pairs[lane], sums.correct[lane]};
      if (apart) own = one_prompt(prompts.score + at, rank + at, n, sum);
      const double weight = own.pairs > 0 ? 1.0 / (share_of(reduction, n, own.pairs).divisor * total) : 0.0;
      const double* from = apart ? sum : &sums.grad[0][lane];
      const int64_t step = apart ? 1 : kHalf;
      for (int64_t i = 0; i < n; ++i) grad[at + i] = static_cast<float>(weight * from[i * step]);
      all.loss += weight * own.loss;
      all.pairs += own.pairs;
      all.correct += own.correct;
    }
  }
  return all;
}

int64_t ranking_count(const Prompts& prompts, int64_t reduction) {
  return prompts.wide_rank ? count_of(static_cast<const double*>(prompts.rank), prompts, reduction)
                           : count_of(static_cast<const float*>(prompts.rank), prompts, reduction);
}

bool ranks_are_finite(const Prompts& prompts) {
  const int64_t at = prompts.offset[0], n = prompts.offset[prompts.number] - at;
  return prompts.wide_rank ? all_finite<double, int64_t>(static_cast<const double*>(prompts.rank) + at, n)
                           : all_finite<float, int32_t>(static_cast<const float*>(prompts.rank) + at, n);
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
#include <optional>
#include <vector>

#include "check.h"

namespace engine {
namespace {

constexpr int64_t kPromptsPerBlock = 64, kBlocksPerTask = 16;  // sums are added block by block, in order

// run(block, prompts of the block) for all blocks, on all threads.
template <typename Run>
void in_blocks(const Prompts& all, const Run& run) {
  const int64_t blocks = (all.number + kPromptsPerBlock - 1) / kPromptsPerBlock;
  at::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Prompts some = all;
      some.offset += b * kPromptsPerBlock;
      some.number = std::min(kPromptsPerBlock, all.number - b * kPromptsPerBlock);
      run(b, some);
    }
  });
}

// Raises ValueError at the first rank that is not finite.
void refuse_ranks(const at::Tensor& rank) {
  const at::Tensor wide = rank.to(at::kDouble);
  const double* value = wide.const_data_ptr<double>();
  for (int64_t i = 0; i < wide.numel(); ++i)
    TORCH_CHECK_VALUE(std::isfinite(value[i]), "rank[", i, "]: got ", value[i],
                      ", want a finite number; leave an answer without a rank out of the batch");
}

// The batch's own denominator: prompts with a pair, prompts with K >= 2, or pairs.
double own_denominator(const Prompts& prompts, int64_t reduction, int64_t num_blocks) {
  std::vector<int64_t> counts(num_blocks);
  const auto count = pick_ranking_count();
  in_blocks(prompts, [&](int64_t b, const Prompts& some) { counts[b] = count(some, reduction); });
  int64_t total = 0;
  for (int64_t each : counts) total += each;
  return static_cast<double>(total);
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
  check_offsets(cu, num_answers, "cu");
  const Prompts prompts{score.const_data_ptr<float>(), rank.const_data_ptr(), rank.scalar_type() == at::kDouble,
                        cu.const_data_ptr<int32_t>(), cu.numel() - 1};
  const int64_t num_blocks = (prompts.number + kPromptsPerBlock - 1) / kPromptsPerBlock;
  const double total = denominator ? *denominator : own_denominator(prompts, reduction, num_blocks);

  at::Tensor grad = at::empty_like(score);
  float* gradients = grad.data_ptr<float>();
  std::vector<RankingSums> sums(num_blocks);
  std::vector<char> finite(num_blocks);
  const auto run = pick_ranking_prompts();
  const auto check = pick_ranks_are_finite();
  in_blocks(prompts, [&](int64_t b, const Prompts& some) {
    int64_t longest = 0;
    for (int64_t s = 0; s < some.number; ++s)
      longest = std::max<int64_t>(longest, some.offset[s + 1] - some.offset[s]);
    std::vector<double> room(longest);
    finite[b] = check(some);
    sums[b] = run(some, reduction, total, room.data(), gradients);
  });
  if (std::find(finite.begin(), finite.end(), 0) != finite.end()) refuse_ranks(rank);
  RankingSums all{};
  for (const RankingSums& each : sums) {
    all.loss += each.loss;
    all.pairs += each.pairs;
    all.correct += each.correct;
  }
  return {at::scalar_tensor(all.loss, score.options()), scalar(all.pairs), scalar(all.correct), grad};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("ranking_loss", &engine::ranking_loss); }
#endif
