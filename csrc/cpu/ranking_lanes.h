// Prompts of few answers, one a lane: laying them side by side, the sums over their pairs, and putting gradients back.
// Only for files compiled with ENGINE_CLASS.
//
// e^s is computed once an answer, and a pair's x = e^s_l / e^s_w is a product: sigmoid(s_l - s_w) = x / (1 + x), and the
// sum of -log sigmoid is log of the product of all 1 + x. What is tracked is that product less 1, u = u (1 + x) + x: all
// its terms are positive, so its float32 digits are right whether nearly nothing is left of the loss or hundreds of nats.
#pragma once

#include "vec_double.h"

namespace engine::ENGINE_CLASS {

constexpr int kMost = 9;      // answers of a prompt, the paper's most
constexpr int kRoom = 12;     // the same in whole quarters
constexpr float kNear = 8.0;  // of each score to that of the best rank
constexpr int32_t kNearBits = 0x41000000;
// Of so many pairs the product of 1 + x, at most (1 + e^(2 kNear))^5, is far within float32.
constexpr int kChunk = 5;

struct Lanes {
  vfloat score[kRoom], rank[kRoom];  // an answer that is not there has rank inf, and no pair
  // Of the prompts: the undivided gradient, e^loss and the same less 1 by halves, the pairs and those in order of score.
  vfloat grad[kMost];
  struct Product {
    vwide p, u;
  } product[2];
  vint pairs, correct;
  vint apart;  // its scores are too far from each other: it has been left out
};

ENGINE_INLINE bool any_lane(vint mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t lanes[kLanes], any = 0;
  std::memcpy(lanes, &mask, sizeof(mask));
  for (int lane = 0; lane < kLanes; ++lane) any |= lanes[lane];
  return any != 0;
#endif
}

// Within each quarter (4 lanes): ENGINE_QUARTERS(a, b, c, d) are the places a .. d of every quarter.
#define ENGINE_QUARTER(q, a, b, c, d) (a) + 4 * (q), (b) + 4 * (q), (c) + 4 * (q), (d) + 4 * (q)
#if ENGINE_LANES == 16
#define ENGINE_QUARTERS(...) \
  ENGINE_QUARTER(0, __VA_ARGS__), ENGINE_QUARTER(1, __VA_ARGS__), ENGINE_QUARTER(2, __VA_ARGS__), \
      ENGINE_QUARTER(3, __VA_ARGS__)
#elif ENGINE_LANES == 8
#define ENGINE_QUARTERS(...) ENGINE_QUARTER(0, __VA_ARGS__), ENGINE_QUARTER(1, __VA_ARGS__)
#else
#define ENGINE_QUARTERS(...) ENGINE_QUARTER(0, __VA_ARGS__)
#endif

// Four rows of each quarter become its four columns, and back.
ENGINE_INLINE void transpose_quarters(const vfloat* row, vfloat* column) {
  constexpr int second = kLanes;
  const vfloat low01 = __builtin_shufflevector(row[0], row[1], ENGINE_QUARTERS(0, second, 1, second + 1));
  const vfloat low23 = __builtin_shufflevector(row[2], row[3], ENGINE_QUARTERS(0, second, 1, second + 1));
  const vfloat high01 = __builtin_shufflevector(row[0], row[1], ENGINE_QUARTERS(2, second + 2, 3, second + 3));
  const vfloat high23 = __builtin_shufflevector(row[2], row[3], ENGINE_QUARTERS(2, second + 2, 3, second + 3));
  column[0] = __builtin_shufflevector(low01, low23, ENGINE_QUARTERS(0, 1, second, second + 1));
  column[1] = __builtin_shufflevector(low01, low23, ENGINE_QUARTERS(2, 3, second + 2, second + 3));
  column[2] = __builtin_shufflevector(high01, high23, ENGINE_QUARTERS(0, 1, second, second + 1));
  column[3] = __builtin_shufflevector(high01, high23, ENGINE_QUARTERS(2, 3, second + 2, second + 3));
}

// The four floats at of(0), of(4), ...: a quarter each; and where each quarter goes.
template <typename Of>
ENGINE_INLINE vfloat join_quarters(const Of& of) {
#if defined(__AVX2__)
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(of(0))), _mm_loadu_ps(of(4)), 1);
#if defined(__AVX512F__)
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(of(8))), _mm_loadu_ps(of(12)), 1);
  return (vfloat)_mm512_insertf32x8(_mm512_zextps256_ps512(low), high, 1);
#else
  return (vfloat)low;
#endif
#else
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; lane += 4) std::memcpy(lanes + lane, of(lane), 16);
  return load(lanes);
#endif
}
template <typename Of>
ENGINE_INLINE void part_quarters(vfloat v, const Of& of) {
  float lanes[kLanes];
  store(lanes, v);
  for (int lane = 0; lane < kLanes; lane += 4) std::memcpy(of(lane), lanes + lane, 16);
}

// column[i] has the answers i of all lanes; of(lane) are a lane's answers, K of them, with room to read kRoom.
template <int K, typename Of>
ENGINE_INLINE void lay(const Of& of, vfloat* column) {
#pragma GCC unroll 3
  for (int i = 0; i < K; i += 4) {
    vfloat row[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) row[r] = join_quarters([&](int lane) { return of(lane + r) + i; });
    transpose_quarters(row, column + i);
  }
}
// The reverse, into prompts that follow each other; nothing is written beyond their K answers.
template <int K>
ENGINE_INLINE void put_back(const vfloat* column, float* out) {
  constexpr int whole = K / 4 * 4;
#pragma GCC unroll 2
  for (int i = 0; i < whole; i += 4) {
    vfloat row[4];
    transpose_quarters(column + i, row);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) part_quarters(row[r], [&](int lane) { return out + (lane + r) * K + i; });
  }
  for (int i = whole; i < K; ++i) {
    float lanes[kLanes];
    store(lanes, column[i]);
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) out[lane * K + i] = lanes[lane];
  }
}

// Four numbers at a time, step by step: one after the other each would wait for its own last step.
constexpr int kAtOnce = 4;
#define ENGINE_EACH _Pragma("GCC unroll 4") for (int c = 0; c < kAtOnce; ++c)

// a - b = high + low exactly: else far scores would lose the digits in which they differ.
ENGINE_INLINE void differences(const vfloat* a, vfloat b, vfloat* high, vfloat* low) {
  vfloat part[kAtOnce];
  ENGINE_EACH high[c] = a[c] - b;
  ENGINE_EACH part[c] = high[c] - a[c];
  ENGINE_EACH low[c] = b + part[c];
  ENGINE_EACH part[c] = high[c] - part[c];
  ENGINE_EACH part[c] = a[c] - part[c];
  ENGINE_EACH low[c] = part[c] - low[c];
}

// e^(x + low) for x of at most kNear (else: any number): x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of relative error
// 4e-9 with e^0 = 1 exactly, and n added to the exponent.
ENGINE_INLINE void exp_near(const vfloat* x, const vfloat* low, vfloat* e) {
  constexpr float coefficient[] = {8.3687352e-3f, 4.1668389e-2f, 1.6666521e-1f, 4.9999994e-1f, 1.0f, 1.0f};
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
  vfloat shifted[kAtOnce], n[kAtOnce], r[kAtOnce];
  ENGINE_EACH shifted[c] = x[c] * 1.44269504088896341f + magic;
  ENGINE_EACH n[c] = shifted[c] - magic;
  ENGINE_EACH r[c] = x[c] - n[c] * 0.693359375f;
  ENGINE_EACH n[c] = low[c] - n[c] * -2.12194440e-4f;
  ENGINE_EACH r[c] += n[c];
  ENGINE_EACH e[c] = r[c] * 1.3814559e-3f + coefficient[0];
#pragma GCC unroll 5
  for (int k = 1; k < 6; ++k) ENGINE_EACH e[c] = e[c] * r[c] + coefficient[k];
  ENGINE_EACH e[c] = (vfloat)((vuint)e[c] + ((vuint)shifted[c] << 23));
}

// log p for p = 1 + u, u >= 0, with u's digits: p = 2^k m with m in [0.707, 1.414), log m = 2 atanh((m - 1) / (m + 1)).
ENGINE_INLINE vwide log_of(vwide p, vwide u) {
  const vwide_bits k = ((vwide_bits)p - 0x3fe6a09e667f3bcd) >> 52;  // less the bits of the root of 1/2
  const vwide m = (vwide)((vwide_bits)p - (k << 52));
  const vwide s = (k == 0 ? u : m - 1.0) / (m + 1.0), square = s * s;
  vwide tail = splat_wide(1.0 / 11);  // the rest is below 1e-10 of the whole
#pragma GCC unroll 5
  for (int odd = 9; odd > 0; odd -= 2) tail = tail * square + 1.0 / odd;
  const vwide exponent = (vwide)(k | 0x4330000000000000) - 4503599627370496.0;  // 2^52 + k, less 2^52
  return exponent * 0.6931471805599453 + 2.0 * s * tail;
}

// Compares and swaps that bring up to nine numbers into order; those above K fall away, as if they were infinite.
constexpr int kSwaps = 25;
constexpr int8_t kSwap[kSwaps][2] = {{0, 3}, {1, 7}, {2, 5}, {4, 8}, {0, 7}, {2, 4}, {3, 8}, {5, 6}, {0, 2},
                                     {1, 3}, {4, 5}, {7, 8}, {1, 4}, {3, 6}, {5, 7}, {0, 1}, {2, 4}, {3, 5},
                                     {6, 8}, {2, 3}, {4, 5}, {6, 7}, {1, 2}, {3, 4}, {5, 6}};

// Best rank first, so that of each pair the first wins (or it is a tie). `swapped` leads back.
template <int K>
ENGINE_INLINE void sort_by_rank(Lanes& lanes, vint* swapped) {
#pragma GCC unroll 25
  for (int k = 0; k < kSwaps; ++k) {
    const int a = kSwap[k][0], b = kSwap[k][1];
    if (b >= K) continue;
    const vfloat rank_a = lanes.rank[a], rank_b = lanes.rank[b], score_a = lanes.score[a], score_b = lanes.score[b];
    const vint swap = rank_b < rank_a;
    lanes.rank[a] = vmin(rank_a, rank_b);
    lanes.rank[b] = vmax(rank_a, rank_b);
    lanes.score[a] = swap ? score_b : score_a;
    lanes.score[b] = swap ? score_a : score_b;
    swapped[k] = swap;
  }
}
template <int K>
ENGINE_INLINE void sort_back(const vint* swapped, vfloat* grad) {
#pragma GCC unroll 25
  for (int k = kSwaps - 1; k >= 0; --k) {
    const int a = kSwap[k][0], b = kSwap[k][1];
    if (b >= K) continue;
    const vfloat grad_a = grad[a], grad_b = grad[b];
    grad[a] = swapped[k] ? grad_b : grad_a;
    grad[b] = swapped[k] ? grad_a : grad_b;
  }
}

// e^(s - s_0) of all answers, and its inverse; the farthest |s - s_0|, whose bits order as it does (and nan is beyond all).
template <int K>
ENGINE_INLINE vint exponentials(const vfloat* score, vfloat* e, vfloat* inverse) {
  vint farthest{};
  vfloat high[kAtOnce], low[kAtOnce];
  e[0] = inverse[0] = splat(1.0f);
#pragma GCC unroll 2
  for (int i = 1; i < K; i += kAtOnce) {
    differences(score + i, score[0], high, low);
    exp_near(high, low, e + i);
    ENGINE_EACH inverse[i + c] = 1.0f / e[i + c];
    ENGINE_EACH if (i + c < K) {
      const vint size = (vint)high[c] & 0x7fffffff;
      farthest = size > farthest ? size : farthest;
    }
  }
  return farthest;
}

ENGINE_INLINE void multiply_in(vfloat chunk, Lanes& lanes) {
  float u[kLanes];
  store(u, chunk);
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    Lanes::Product& half = lanes.product[h];
    const vwide wide = load_wide(u + h * kHalf);
    half.u += half.p * wide;
    half.p += half.p * wide;
  }
}

// The pairs of K sorted answers. Where all ranks of all lanes differ (distinct) nothing is masked out; what a prompt gets
// has the same bits.
template <int K, bool distinct>
ENGINE_INLINE void add_pairs(const vfloat* e, const vfloat* inverse, Lanes& lanes) {
  vfloat grad[K], u{};
  for (int i = 0; i < K; ++i) grad[i] = vfloat{};
  for (int h = 0; h < 2; ++h) lanes.product[h] = {splat_wide(1.0), vwide{}};
  vint pairs{}, correct{};
  int open = 0;
#pragma GCC unroll 8
  for (int i = 0; i < K - 1; ++i) {
    const vfloat score = lanes.score[i], rank = lanes.rank[i];
    vfloat own = grad[i];
#pragma GCC unroll 8
    for (int j = i + 1; j < K; ++j) {
      vint in_order = score > lanes.score[j];
      vfloat x = e[j] * inverse[i];
      if (!distinct) {
        const vint pair = rank < lanes.rank[j];
        x = (vfloat)((vint)x & pair);
        in_order &= pair;
        pairs -= pair;  // a mask is -1
      }
      const vfloat over = x + 1.0f, wrong = x / over;
      own -= wrong;
      grad[j] += wrong;
      u = u * over + x;
      correct -= in_order;
      if (++open == kChunk) {
        multiply_in(u, lanes);
        u = vfloat{};
        open = 0;
      }
    }
    grad[i] = own;
  }
  if (open > 0) multiply_in(u, lanes);
  for (int i = 0; i < K; ++i) lanes.grad[i] = grad[i];
  lanes.pairs = distinct ? vint{} + K * (K - 1) / 2 : pairs;
  lanes.correct = correct;
}

// All of the lanes' sums, the gradient in the prompts' own order. True where each prompt has K (K - 1) / 2 pairs.
template <int K>
static bool sum_lanes(Lanes& lanes) {
  vint swapped[kSwaps];
  vfloat e[kRoom], inverse[kRoom];
  sort_by_rank<K>(lanes, swapped);
  lanes.apart = exponentials<K>(lanes.score, e, inverse) > kNearBits;
  if (any_lane(lanes.apart | (lanes.rank[K - 1] == kInf)))  // no pairs there
    for (int i = 0; i < K; ++i)
      lanes.rank[i] = lanes.apart | (lanes.rank[i] == kInf) ? splat(__builtin_nanf("")) : lanes.rank[i];
  vint tied{};
  for (int i = 1; i < K; ++i) tied |= ~(lanes.rank[i - 1] < lanes.rank[i]);
  const bool distinct = !any_lane(tied);
  if (distinct)
    add_pairs<K, true>(e, inverse, lanes);
  else
    add_pairs<K, false>(e, inverse, lanes);
  sort_back<K>(swapped, lanes.grad);
  return distinct;
}

// The same for `most` answers, which only the lanes know.
static bool sum_any(Lanes& lanes, int most) {
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

}  // namespace engine::ENGINE_CLASS
