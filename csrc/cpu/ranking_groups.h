// A block of prompts: those of few answers in groups, one a lane (ranking_lanes.h), the others one by one. Only for
// ranking_loss.cpp, whose Prompts and RankingSums these are.
#pragma once

#include "ranking_lanes.h"

namespace engine::ENGINE_CLASS {

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
  // no zeros for what is written first
  Block(const Prompts& prompts, const T* rank, int64_t reduction, double total, double* sum, float* grad)
      : prompts(prompts), rank(rank), reduction(reduction), total(total), sum(sum), grad(grad) {}
  const Prompts& prompts;
  const T* rank;
  int64_t reduction;
  double total;
  double* sum;
  float* grad;
  RankingSums sums{0.0, 0, 0, 0, true};
  vint pairs{}, paired{}, correct{};
  vfloat odd{};  // nan where a rank is not finite
  Logarithm loss[kPromptsPerBlock / kLanes];
  vwide weight[kPromptsPerBlock / kHalf];
  int groups = 0;
};

// Takes a group's sums; what they count for is in halves.
template <typename T>
ENGINE_INLINE void keep(Block<T>& block, const Lanes& lanes, const vwide* weight) {
  block.pairs += lanes.pairs;
  block.paired -= lanes.pairs > 0;  // a mask is -1
  block.correct += lanes.correct;
  block.loss[block.groups] = lanes.loss;
  for (int h = 0; h < 2; ++h) block.weight[2 * block.groups + h] = weight[h];
  ++block.groups;
}

// The same of prompts that have or do not have all their pairs; returns what their gradients are multiplied by.
template <typename T>
ENGINE_INLINE vfloat keep_each(Block<T>& block, const Lanes& lanes, vint possible_pairs) {
  int32_t pairs[kLanes], possible[kLanes];
  float share[kLanes];
  std::memcpy(pairs, &lanes.pairs, sizeof(pairs));
  std::memcpy(possible, &possible_pairs, sizeof(possible));
  vwide weight[2];
  for (int h = 0; h < 2; ++h) {
    const vwide found = load_wide(pairs + h * kHalf);
    const vwide divisor = block.reduction == prompt_mean_valid      ? found
                          : block.reduction == prompt_mean_allpairs ? load_wide(possible + h * kHalf)
                                                                    : splat_wide(1.0);
    weight[h] = found > 0.0 ? 1.0 / (divisor * block.total) : vwide{};
    store_narrow(share + h * kHalf, weight[h]);
  }
  keep(block, lanes, weight);
  return load(share);
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

// Gradients of K answers each to the prompts from `first` on.
template <int K>
ENGINE_INLINE void give_back(Block<float>& block, const Lanes& lanes, vfloat share, int64_t first) {
  vfloat scaled[kRoom];
  for (int i = 0; i < K; ++i) scaled[i] = lanes.grad[i] * share;
  float* grad = block.grad + block.prompts.offset[first];
  put_back<K>(scaled, [=](int lane) { return grad + lane * K; });
}
// Prompts that the lanes left out, one by one.
template <typename T>
ENGINE_APART void redo(Block<T>& block, vint apart, int64_t first) {
  int32_t lanes[kLanes];
  std::memcpy(lanes, &apart, sizeof(lanes));
  for (int lane = 0; lane < kLanes; ++lane)
    if (lanes[lane]) alone(block, first + lane);
}

template <int K>
ENGINE_INLINE void lay_even(const float* from, vfloat* column) {
  lay<K>([=](int lane) { return from + lane * K; }, column);
}

// K where kLanes prompts from `first` on have K answers each that may be laid as they are, 0 elsewhere.
ENGINE_INLINE int64_t even_answers(const Prompts& prompts, int64_t first) {
  const int32_t* offset = prompts.offset + first;
  if (first + kLanes > prompts.number) return 0;
  const int32_t n = offset[1] - offset[0];
  vint begin, end;
  std::memcpy(&begin, offset, sizeof(begin));
  std::memcpy(&end, offset + 1, sizeof(end));
  return !any_lane((end - begin) ^ n) && offset[kLanes - 1] + kRoom <= prompts.answers ? n : 0;
}

// Groups of kLanes prompts of K answers each, best rank first, as long as there are any; returns the first prompt of others.
template <int K>
static int64_t ordered_groups(Block<float>& block, int64_t first) {
  const double weight = weight_of(block.reduction, K, K * (K - 1) / 2, block.total);
  const vwide halves[2] = {splat_wide(weight), splat_wide(weight)};
  const vfloat share = splat(static_cast<float>(weight));
  for (; even_answers(block.prompts, first) == K; first += kLanes) {
    const int64_t at = block.prompts.offset[first];
    const float* rank = block.rank + at;
    if (!increase<K>(rank)) break;
    vfloat odd[3]{};
#pragma GCC unroll 9
    for (int i = 0; i < K; ++i) odd[i % 3] += load(rank + i * kLanes) * 0.0f;
    block.odd += odd[0] + odd[1] + odd[2];
    Lanes lanes;
    lay_even<K>(block.prompts.score + at, lanes.score);
    sum_sorted<K, false>(lanes);
    give_back<K>(block, lanes, share, first);
    keep(block, lanes, halves);
    if (any_lane(lanes.apart)) redo(block, lanes.apart, first);
  }
  return first;
}

template <int K>
ENGINE_APART void unordered_group(Block<float>& block, int64_t first) {
  const int64_t at = block.prompts.offset[first];
  Lanes lanes;
  lay_even<K>(block.rank + at, lanes.rank);
  lay_even<K>(block.prompts.score + at, lanes.score);
  for (int i = 0; i < K; ++i) block.odd += lanes.rank[i] * 0.0f;
  sum_lanes<K>(lanes);
  give_back<K>(block, lanes, keep_each(block, lanes, vint{} + K * (K - 1) / 2), first);
  if (any_lane(lanes.apart)) redo(block, lanes.apart, first);
}

template <int K>
ENGINE_INLINE int64_t even_groups(Block<float>& block, int64_t first) {
  const int64_t next = ordered_groups<K>(block, first);
  if (next > first) return next;
  unordered_group<K>(block, first);
  return first + kLanes;
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

// `most` answers, which only the lanes know.
static void sum_any(Lanes& lanes, int most) {
  switch (most) {
    case 9: return sum_lanes<9>(lanes);
    case 8: return sum_lanes<8>(lanes);
    case 7: return sum_lanes<7>(lanes);
    case 6: return sum_lanes<6>(lanes);
    case 5: return sum_lanes<5>(lanes);
    case 4: return sum_lanes<4>(lanes);
    case 3: return sum_lanes<3>(lanes);
    default: return sum_lanes<2>(lanes);
  }
}

// Up to kLanes prompts of any sizes, `count` of them.
template <typename T>
static void any_group(Block<T>& block, int64_t first, int count) {
  float score[kRoom][kLanes], rank[kRoom][kLanes], grad[kMost][kLanes];
  int64_t answers[kLanes];
  int32_t pairs[kLanes];
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
    pairs[lane] = static_cast<int32_t>(answers[lane] * (answers[lane] - 1) / 2);
    if (answers[lane] > most) most = static_cast<int>(answers[lane]);
  }
  Lanes lanes;
  std::memcpy(lanes.score, score, sizeof(score));
  std::memcpy(lanes.rank, rank, sizeof(rank));
  sum_any(lanes, most);
  vint possible;
  std::memcpy(&possible, pairs, sizeof(possible));
  const vfloat share = keep_each(block, lanes, possible);
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

// The prompts from `first` on that go together; returns the first of the others.
template <typename T>
ENGINE_INLINE int64_t next_groups(Block<T>& block, int64_t first) {
  if constexpr (sizeof(T) == sizeof(float)) switch (even_answers(block.prompts, first)) {
      case 2: return even_groups<2>(block, first);
      case 3: return even_groups<3>(block, first);
      case 4: return even_groups<4>(block, first);
      case 5: return even_groups<5>(block, first);
      case 6: return even_groups<6>(block, first);
      case 7: return even_groups<7>(block, first);
      case 8: return even_groups<8>(block, first);
      case 9: return even_groups<9>(block, first);
      default: break;
    }
  const int64_t left = block.prompts.number - first;
  any_group(block, first, static_cast<int>(left < kLanes ? left : kLanes));
  return first + kLanes;
}

template <typename T>
ENGINE_INLINE RankingSums prompts_of(const T* rank, const Prompts& prompts, int64_t reduction, double total,
                                     double* sum, float* grad) {
  Block<T> block(prompts, rank, reduction, total, sum, grad);
  for (int64_t first = 0; first < prompts.number;) first = next_groups(block, first);
  vwide loss{};
#pragma GCC unroll 2
  for (int g = 0; g < block.groups; ++g) {
    float values[kLanes];
    store(values, value_of(block.loss[g]));
    for (int h = 0; h < 2; ++h) loss += block.weight[2 * g + h] * load_wide(values + h * kHalf);
  }
  RankingSums all = block.sums;
  all.loss += hsum(loss);
  int32_t pairs[kLanes], paired[kLanes], correct[kLanes];
  std::memcpy(pairs, &block.pairs, sizeof(pairs));
  std::memcpy(paired, &block.paired, sizeof(paired));
  std::memcpy(correct, &block.correct, sizeof(correct));
  for (int lane = 0; lane < kLanes; ++lane) {
    all.pairs += pairs[lane];
    all.paired += paired[lane];
    all.correct += correct[lane];
  }
  all.finite &= !any_lane(block.odd != block.odd);
  return all;
}

}  // namespace engine::ENGINE_CLASS
