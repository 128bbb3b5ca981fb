// The sums over the pairs of prompts that lie side by side, one a lane (ranking_layout.h). Only for files compiled with
// ENGINE_CLASS.
//
// Answers stand best rank first, so that of a pair i < j the first wins (or it is a tie). With e_i = e^s_i, an exponential
// an answer and none a pair:
//
//   wrong = sigmoid(s_j - s_i) = e_j / (e_i + e_j); grad_i loses it, grad_j gets it
//   loss  = log of the product of all e_i + e_j - sum of b_i s_i, where answer i beats b_i others
//
// Where little is left of the loss that difference has no digits. It is then the log of the product of all 1 + x with
// x = e_j / e_i; what is tracked is that product less 1, u = u (1 + x) + x, whose terms are all positive.
#pragma once

#include "ranking_layout.h"
#include "vec_double.h"

namespace engine::ENGINE_CLASS {

constexpr float kReach = 11.0;       // of an e to that of answer 0, in powers of 2
constexpr float kFarthest = 8192.0;  // |s_0|; n ln 2 is exact up to there
// Products of so many numbers are far within float32: of e_i + e_j < 2^(kReach + 3/2), of 1 + x < 2^(2 kReach + 1).
constexpr int kSumsInChunk = 10, kQuotientsInChunk = 5;
constexpr int kFew = 3;  // of so few answers the loss is always made from quotients
constexpr double kLog2 = 0.6931471805599453;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
constexpr int32_t kMantissa = 0x007fffff, kOne = 0x3f800000;

#define ENGINE_APART static __attribute__((noinline))

// log(2^whole mantissa) + rest, left to a block's end: one after the other each would wait for its own last step.
struct Logarithm {
  vfloat mantissa, whole, rest;  // mantissa in [1, 32)
};

struct Lanes {
  vfloat score[kRoom], rank[kRoom];  // an answer that is not there has rank inf, and no pair
  vfloat grad[kMost];                // of the prompts, undivided
  Logarithm loss;
  vint pairs, correct;  // the pairs, and those in order of score
  vint apart;  // its scores are too far from each other or from 0, or nan: it has been left out
};

// a where the mask (-1 or 0) is set, else b. GCC would compare a mask from memory with 0 first.
ENGINE_INLINE vfloat select(vint mask, vfloat a, vfloat b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  vfloat chosen;
  asm("vblendvps %3, %2, %1, %0" : "=x"(chosen) : "x"(b), "xm"(a), "x"(mask));
  return chosen;
#else
  return mask ? a : b;
#endif
}

// What GCC shall not join with a later sum to one rounding: it would do so in one of two loops whose bits are the same.
ENGINE_INLINE vfloat rounded(vfloat product) {
#if defined(__AVX2__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// Compares and swaps that bring up to nine numbers into order; those above K fall away, as if they were infinite.
constexpr int kSwaps = 25;
constexpr int8_t kSwap[kSwaps][2] = {{0, 3}, {1, 7}, {2, 5}, {4, 8}, {0, 7}, {2, 4}, {3, 8}, {5, 6}, {0, 2},
                                     {1, 3}, {4, 5}, {7, 8}, {1, 4}, {3, 6}, {5, 7}, {0, 1}, {2, 4}, {3, 5},
                                     {6, 8}, {2, 3}, {4, 5}, {6, 7}, {1, 2}, {3, 4}, {5, 6}};

// `swapped` brings scores into the same order, and gradients back.
template <int K>
ENGINE_INLINE void sort_ranks(vfloat* rank, vint* swapped) {
#pragma GCC unroll 25
  for (int k = 0; k < kSwaps; ++k) {
    const int a = kSwap[k][0], b = kSwap[k][1];
    if (b >= K) continue;
    const vfloat rank_a = rank[a], rank_b = rank[b];
    swapped[k] = rank_b < rank_a;
    rank[a] = vmin(rank_a, rank_b);
    rank[b] = vmax(rank_a, rank_b);
  }
}
template <int K, bool back>
ENGINE_INLINE void swap_alike(const vint* swapped, vfloat* v) {
#pragma GCC unroll 25
  for (int step = 0; step < kSwaps; ++step) {
    const int k = back ? kSwaps - 1 - step : step, a = kSwap[k][0], b = kSwap[k][1];
    if (b >= K) continue;
    const vfloat v_a = v[a], v_b = v[b];
    v[a] = select(swapped[k], v_b, v_a);
    v[b] = select(swapped[k], v_a, v_b);
  }
}

// x - n ln 2, |x| < kFarthest: one product and difference where an instruction rounds them once.
ENGINE_INLINE vfloat less_powers(vfloat x, vfloat n) {
#if defined(__AVX512F__)
  return _mm512_fnmadd_ps(n, splat(0.69314718f), x);
#elif defined(__AVX2__)
  return _mm256_fnmadd_ps(n, splat(0.69314718f), x);
#else
  return (x - n * 0.693359375f) - n * -2.12194440e-4f;
#endif
}

// s = n ln 2 + r with |r| <= ln 2 / 2, and e = e^s / (2^shared kScale): n goes to the exponent, and the polynomial, whose
// error is 2e-9 of e^r, has the leading coefficient 1. It is 2^9.497 e^r then, of which the exponent takes 2^9.
constexpr double kScaleLog2 = 9 - 9.497274559303031;
struct Exponentials {
  vfloat e[kMost], shared;
  vfloat n, r;  // sums of beaten * n and of beaten * r
  vint apart;   // but for nan, which is in all sums
};
template <int K>
ENGINE_INLINE Exponentials exponentials(const vfloat* score, const vfloat* beaten) {
  constexpr float coefficient[] = {30.11407712f, 120.45000798f, 361.35532150f, 722.71078416f, 722.71075823f};
  constexpr float log2e = 1.44269504f, start = kMagic - 9;
  Exponentials all;
  all.shared = (score[0] * log2e + kMagic) - kMagic;
  const vfloat magic = start - all.shared;
  vfloat least = splat(start), most = least;
  all.n = all.r = vfloat{};
  // So many step by step: one after the other each would wait for its own last step.
  constexpr int at_once = K == 2 ? 2 : K == 5 || K % 3 == 0 ? 3 : 4;
#define ENGINE_EACH _Pragma("GCC unroll 4") for (int c = 0; c < at_once; ++c)
#pragma GCC unroll 5
  for (int i = 0; i < K; i += at_once) {
    vfloat s[at_once], shifted[at_once], n[at_once], r[at_once], e[at_once];
    ENGINE_EACH s[c] = score[i + c < K ? i + c : K - 1];
    ENGINE_EACH shifted[c] = s[c] * log2e + magic;
    ENGINE_EACH least = vmin(least, shifted[c]);
    ENGINE_EACH most = vmax(most, shifted[c]);
    ENGINE_EACH n[c] = shifted[c] - magic;
    ENGINE_EACH r[c] = less_powers(s[c], n[c]);
    ENGINE_EACH if (i + c < K) all.n += beaten[i + c] * n[c];
    ENGINE_EACH if (i + c < K) all.r += beaten[i + c] * r[c];
    ENGINE_EACH e[c] = r[c] + 6.05259930f;
#pragma GCC unroll 5
    for (int k = 0; k < 5; ++k) ENGINE_EACH e[c] = e[c] * r[c] + coefficient[k];
    ENGINE_EACH if (i + c < K) all.e[i + c] = (vfloat)((vuint)e[c] + ((vuint)shifted[c] << 23));
  }
#undef ENGINE_EACH
  const vfloat size = (vfloat)((vint)score[0] & INT32_MAX);
  all.apart = ~((vmax(most - start, start - least) <= kReach) & (size < kFarthest));
  return all;
}

// A product of many positive numbers: a mantissa times 2^exponent.
struct Product {
  vfloat mantissa = splat(1.0f);
  vint exponent{};
};
ENGINE_INLINE void multiply_in(vfloat factor, Product& product) {
  const vint bits = (vint)factor;
  product.exponent += (bits >> 23) - (kOne >> 23);
  product.mantissa *= (vfloat)((bits & kMantissa) | kOne);
}

// That of 2^k m with m in [0.707, 1.414) by its series in (m - 1) / (m + 1).
ENGINE_INLINE vfloat value_of(const Logarithm& log) {
  const vint k = ((vint)log.mantissa - 0x3f3504f3) >> 23;  // less the bits of the root of 1/2
  const vfloat m = (vfloat)((vint)log.mantissa - (k << 23));
  const vfloat s = (m - 1.0f) / (m + 1.0f), square = s * s;
  vfloat tail = splat(1.0f / 9);
#pragma GCC unroll 4
  for (int odd = 7; odd > 0; odd -= 2) tail = tail * square + 1.0f / odd;
  const vfloat powers = __builtin_convertvector(k, vfloat) + log.whole;
  return powers * static_cast<float>(kLog2) + (2.0f * s * tail + log.rest);
}
// At most 0.06 less: a mantissa's fraction for its logarithm.
ENGINE_INLINE vfloat nearly(const Logarithm& log) {
  const vfloat fraction = __builtin_convertvector((vint)log.mantissa - kOne, vfloat);
  return (fraction * 0x1p-23f + log.whole) * static_cast<float>(kLog2) + log.rest;
}

// log p for p = 1 + u, u >= 0, with u's digits.
ENGINE_INLINE vwide log_of(vwide p, vwide u) {
  const vwide_bits k = ((vwide_bits)p - 0x3fe6a09e667f3bcd) >> 52;
  const vwide m = (vwide)((vwide_bits)p - (k << 52));
  const vwide s = (k == 0 ? u : m - 1.0) / (m + 1.0), square = s * s;
  vwide tail = splat_wide(1.0 / 11);  // the rest is below 1e-10 of the whole
#pragma GCC unroll 5
  for (int odd = 9; odd > 0; odd -= 2) tail = tail * square + 1.0 / odd;
  const vwide exponent = (vwide)(k | 0x4330000000000000) - 4503599627370496.0;  // 2^52 + k, less 2^52
  return exponent * kLog2 + 2.0 * s * tail;
}

// The gradients of the pairs whose ranks differ, and the product of their e_i + e_j. Two pairs share a division. Where
// nothing is tied nothing is masked out; what a prompt gets has the same bits.
template <int K, bool ties>
ENGINE_INLINE Product add_pairs(const vfloat* e, const vfloat* rank, vfloat* grad) {
  vfloat sum[K], chunk{};
  for (int i = 0; i < K; ++i) sum[i] = vfloat{};
  Product product;
  int open = 0;
#pragma GCC unroll 8
  for (int j = 1; j < K; ++j) {
    vfloat own[2];
#pragma GCC unroll 8
    for (int i = 0; i < j; i += 2) {
      const bool two = i + 1 < j;
      vfloat left = e[i] + e[j], right = two ? e[i + 1] + e[j] : splat(1.0f);
      const vfloat both = two ? left * right : left, quotient = e[j] / both;
      vfloat factor = both;
      if (ties) {
        const vint pair = rank[i] < rank[j], next = two ? rank[i + 1] < rank[j] : vint{};
        factor = select(pair, left, splat(1.0f)) * select(next, right, splat(1.0f));
        right = (vfloat)((vint)right & pair);
        left = (vfloat)((vint)left & next);
      }
      const vfloat added = two ? left + right : right;
      own[i / 2 % 2] = i < 4 ? rounded(quotient * added) : own[i / 2 % 2] + quotient * added;
      sum[i] -= quotient * right;
      if (two) sum[i + 1] -= quotient * left;
      chunk = open == 0 ? factor : chunk * factor;
      open += two ? 2 : 1;
      if (open >= kSumsInChunk - 1) {
        multiply_in(chunk, product);
        open = 0;
      }
    }
    sum[j] = j > 2 ? own[0] + own[1] : own[0];
  }
  if (open > 0) multiply_in(chunk, product);
  for (int i = 0; i < K; ++i) grad[i] = sum[i];
  return product;
}

struct Wide {
  vwide p, u;  // a product and the same less 1
};
ENGINE_INLINE void multiply_in(const float* u, Wide& product) {
  const vwide wide = load_wide(u);
  product.u += product.p * wide;
  product.p += product.p * wide;
}

// The loss from the pairs' e_j / e_i. Seldom, and so apart: what it is given would lie in memory else.
template <int K>
ENGINE_APART vfloat loss_of_quotients(const vfloat* e, const vfloat* rank) {
  Wide half[2] = {{splat_wide(1.0), vwide{}}, {splat_wide(1.0), vwide{}}};
  float chunk[kLanes];
  vfloat u{};
  int open = 0;
  const auto close = [&] {
    store(chunk, u);
    for (int h = 0; h < 2; ++h) multiply_in(chunk + h * kHalf, half[h]);
    u = vfloat{};
    open = 0;
  };
#pragma GCC unroll 8
  for (int i = 0; i < K - 1; ++i) {
    const vfloat inverse = 1.0f / e[i];
#pragma GCC unroll 8
    for (int j = i + 1; j < K; ++j) {
      const vfloat x = (vfloat)((vint)(e[j] * inverse) & (rank[i] < rank[j]));
      u = u * (x + 1.0f) + x;
      if (++open == kQuotientsInChunk) close();
    }
  }
  if (open > 0) close();
  for (int h = 0; h < 2; ++h) store_narrow(chunk + h * kHalf, log_of(half[h].p, half[h].u));
  return load(chunk);
}

// beaten[i] are the answers after i of a higher rank.
template <int K, bool ties>
ENGINE_INLINE void count_pairs(Lanes& lanes, vfloat* beaten) {
  vint correct[2]{};  // two chains: each waits for its last step
  lanes.pairs = vint{};
#pragma GCC unroll 9
  for (int i = 0; i < K; ++i) {
    vint worse{};
#pragma GCC unroll 8
    for (int j = i + 1; j < K; ++j) {
      vint in_order = lanes.score[i] > lanes.score[j];
      if (ties) {
        const vint pair = lanes.rank[i] < lanes.rank[j];
        worse -= pair;  // a mask is -1
        in_order &= pair;
      }
      correct[j % 2] -= in_order;
    }
    beaten[i] = ties ? __builtin_convertvector(worse, vfloat) : splat(static_cast<float>(K - 1 - i));
    lanes.pairs += worse;
  }
  if (!ties) lanes.pairs += K * (K - 1) / 2;
  lanes.correct = correct[0] + correct[1];
}

// All of the lanes' sums, of K answers in order of rank.
template <int K, bool ties>
ENGINE_INLINE void sum_sorted(Lanes& lanes) {
  vfloat beaten[K];
  count_pairs<K, ties>(lanes, beaten);
  const Exponentials exp = exponentials<K>(lanes.score, beaten);
  const Product product = add_pairs<K, ties>(exp.e, lanes.rank, lanes.grad);
  const vfloat pairs = __builtin_convertvector(lanes.pairs, vfloat);
  // Each e_i + e_j is too small by 2^shared kScale: the half is taken from the powers of 2, which are exact.
  const vfloat whole = __builtin_convertvector(product.exponent, vfloat) + pairs * (exp.shared - 0.5f) - exp.n;
  lanes.loss = {product.mantissa, whole, pairs * static_cast<float>((kScaleLog2 + 0.5) * kLog2) - exp.r};
  lanes.apart = exp.apart | (exp.r != exp.r);
  const vint few_digits = ~(nearly(lanes.loss) > pairs * (1.0f / 9) + 0.5f) | lanes.apart;
  if (K <= kFew || any_lane(few_digits)) {
    vfloat e[K], rank[K];
    for (int i = 0; i < K; ++i) e[i] = exp.e[i], rank[i] = ties ? lanes.rank[i] : splat(static_cast<float>(i));
    const vfloat loss = loss_of_quotients<K>(e, rank);
    lanes.loss.mantissa = K <= kFew ? splat(1.0f) : select(few_digits, splat(1.0f), lanes.loss.mantissa);
    lanes.loss.whole = K <= kFew ? vfloat{} : select(few_digits, vfloat{}, lanes.loss.whole);
    lanes.loss.rest = K <= kFew ? loss : select(few_digits, loss, lanes.loss.rest);
    lanes.loss.rest = select(lanes.apart, vfloat{}, lanes.loss.rest);
  }
  lanes.pairs &= ~lanes.apart;
  lanes.correct &= ~lanes.apart;
}

// The same with ties perhaps, an answer that is not there last.
template <int K>
ENGINE_INLINE void sum_tied(Lanes& lanes) {
  vint tied = lanes.rank[K - 1] == kInf;
  for (int i = 1; i < K; ++i) tied |= ~(lanes.rank[i - 1] < lanes.rank[i]);
  if (!any_lane(tied)) return sum_sorted<K, false>(lanes);
  for (int i = 0; i < K; ++i) lanes.rank[i] = select(lanes.rank[i] == kInf, splat(__builtin_nanf("")), lanes.rank[i]);
  sum_sorted<K, true>(lanes);
}

// The same in any order.
template <int K>
ENGINE_APART void sum_lanes(Lanes& lanes) {
  vint falls{};
  for (int i = 1; i < K; ++i) falls |= lanes.rank[i] < lanes.rank[i - 1];
  const bool unsorted = any_lane(falls);
  vint swapped[kSwaps];
  if (unsorted) {
    sort_ranks<K>(lanes.rank, swapped);
    swap_alike<K, false>(swapped, lanes.score);
  }
  sum_tied<K>(lanes);
  if (unsorted) swap_alike<K, true>(swapped, lanes.grad);
}

}  // namespace engine::ENGINE_CLASS
