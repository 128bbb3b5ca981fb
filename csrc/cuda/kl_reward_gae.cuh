// Rewards with a KL penalty and generalised advantage estimation in one go; the contract is in
// kernels/kl_reward_gae.py, the equations in kernels/kl_reward.py and kernels/gae.py.
//
//     reward_t = -beta kl_t + score_s [t is the last token of segment s]
//     delta_t = reward_t + gamma value_{t+1} - value_t,   advantage_t = delta_t + gamma lam advantage_{t+1}
//
// Within a segment this is a scan with one coefficient, c = gamma lam: the composition of n tokens multiplies what
// comes from the right by c^n, so that a tile of tokens is summed up by one number. Segments are cut in tiles of
// kTile tokens *from their ends*, and a warp scans a tile: a token's result depends on its own segment alone, to the
// bit. Sums are in float64, as in C++: in float32 the rounding of c alone would add up over an answer's length.
//
// Three kernels, a warp a window of kTile tokens of the packed axis; no atomics, no shared memory. A window's tiles
// are those that end in it: at most one of them has kTile tokens, so a number a window is room enough.
//   tile_sums      the sum of a tile that has an earlier tile of its segment to its left
//   tile_carries   for the windows that hold the last tile of a segment: walks the segment's tiles to the left
//   apply          all outputs
// Traffic: 28 bytes a token, and 12 more (from the L2 cache, up to some million tokens) for those in tiles that
// are summed beforehand: none in segments of at most kTile tokens.
#pragma once

#include "platform.cuh"

namespace engine_cuda {

enum Estimator : int { k1 = 0, k2 = 1, k3 = 2 };

struct KlRewardGae {
  int64_t tokens, segments;   // with tokens there are segments
  const float *logprob, *ref_logprob, *value;  // (tokens,)
  const float *score, *bootstrap;              // (segments,)
  const int32_t* cu;                           // (segments + 1,) as kernels/_check.py wants it
  float beta;
  double gamma, lam;
  int estimator;
  float *advantage, *returns, *reward, *kl;  // (tokens,)
};

// Offsets that do not fit (nobody reads them before a launch on a GPU) give wrong numbers, never a wrong address.
struct Tile {
  int64_t segment, segment_begin, segment_end;
  int64_t begin, end;
  __device__ bool is_last_of_segment() const { return end == segment_end; }
  __device__ bool is_first_of_segment() const { return begin == segment_begin; }
};

// The last s with cu[s] <= token, by all lanes together: 31 probes a round. cu[0] <= token < cu[segments].
__device__ __forceinline__ int64_t segment_of(const int32_t* cu, int64_t segments, int64_t token) {
  int64_t low = 0, high = segments;
  while (high - low > 1) {
    const int64_t step = (high - low + kWarp - 1) / kWarp;
    const int64_t probe = low + step * lane();
    const bool before = lane() == 0 || (probe < high && cu[probe] <= token);
    const int64_t passed = __popc(__ballot_sync(kAllLanes, before));
    high = min(high, low + step * passed);
    low = low + step * (passed - 1);
  }
  return low;
}

template <int kTile>
__device__ __forceinline__ Tile tile_in(const KlRewardGae& p, int64_t segment, int64_t token) {
  Tile tile;
  tile.segment = segment;
  tile.segment_begin = min(max(static_cast<int64_t>(p.cu[segment]), int64_t{0}), token);
  tile.segment_end = min(max(static_cast<int64_t>(p.cu[segment + 1]), token + 1), p.tokens);
  tile.end = tile.segment_end - (tile.segment_end - token - 1) / kTile * kTile;
  tile.begin = max(tile.segment_begin, tile.end - kTile);
  return tile;
}

template <int kTile>
__device__ __forceinline__ Tile tile_of(const KlRewardGae& p, int64_t token) {
  return tile_in<kTile>(p, segment_of(p.cu, p.segments, token), token);
}

// The tile that ends where `right` begins.
template <int kTile>
__device__ __forceinline__ Tile tile_before(const KlRewardGae& p, const Tile& right) {
  const int64_t token = right.begin - 1;
  if (!right.is_first_of_segment()) return tile_in<kTile>(p, right.segment, token);
  const int64_t previous = right.segment - 1;  // nearly always it
  if (previous >= 0 && p.cu[previous] <= token) return tile_in<kTile>(p, previous, token);
  return tile_of<kTile>(p, token);
}

// c^1, c^2, c^4, ..., and c^(lane + 1). Powers of a c > 0 stay above 0: 0 * inf would be nan where c * inf is inf.
struct Powers {
  double step[5], reach, whole;  // whole = c^32
};

__device__ __forceinline__ double power(double product, double c) { return c > 0 ? fmax(product, DBL_MIN) : product; }

__device__ __forceinline__ Powers powers_of(double c) {
  Powers powers;
  double square = c, reach = 1;
#pragma unroll
  for (int d = 0; d < 5; ++d) {
    powers.step[d] = square;
    if ((lane() + 1) >> d & 1) reach = power(reach * square, c);
    square = power(square * square, c);
  }
  powers.whole = square;
  powers.reach = lane() == kWarp - 1 ? square : reach;
  return powers;
}

// y_i = x_i + c y_{i-1} along the lanes, y_{-1} = carry.
__device__ __forceinline__ double decayed_sum(double x, double carry, const Powers& c) {
#pragma unroll
  for (int d = 0; d < 5; ++d) {
    const double lower = __shfl_up_sync(kAllLanes, x, 1u << d);
    if (lane() >= 1 << d) x = fma(c.step[d], lower, x);
  }
  return fma(c.reach, carry, x);
}

// e^x - 1 - x: a series to x^12 where the digits would go (csrc/cpu/expm1.h).
__device__ __forceinline__ float expm1_minus(float x) {
  if (!(fabsf(x) < 1.0f)) return expf(x) - 1.0f - x;
  float tail = 1.0f;
#pragma unroll
  for (int k = 12; k > 2; --k) tail = fmaf(tail, x * (1.0f / static_cast<float>(k)), 1.0f);
  return x * x * 0.5f * tail;
}

__device__ __forceinline__ float kl_estimate(float difference, int estimator) {
  if (estimator == k1) return difference;
  if (estimator == k2) return difference * difference * 0.5f;
  return expm1_minus(-difference);
}

// The advantage of the tile's first token, with `carry` that of the token after its end. Lane i of stripe j has the
// token 32 j + i before the last one, so that loads are side by side and sums run from the end.
template <int kStripes, bool kStore>
__device__ __forceinline__ double scan_tile(const KlRewardGae& p, const Tile& tile, double carry, const Powers& c) {
  float logprob[kStripes], ref_logprob[kStripes], value[kStripes];
#pragma unroll
  for (int j = 0; j < kStripes; ++j) {
    const int64_t t = tile.end - 1 - (j * kWarp + lane());
    const bool inside = t >= tile.begin;
    logprob[j] = inside ? p.logprob[t] : 0.0f;
    ref_logprob[j] = inside ? p.ref_logprob[t] : 0.0f;
    value[j] = inside ? p.value[t] : 0.0f;
  }
  const bool last = tile.is_last_of_segment();
  float value_after = last ? p.bootstrap[tile.segment] : p.value[tile.end];
#pragma unroll
  for (int j = 0; j < kStripes; ++j) {
    if (j * kWarp >= tile.end - tile.begin) break;
    const int64_t t = tile.end - 1 - (j * kWarp + lane());
    const float kl = kl_estimate(logprob[j] - ref_logprob[j], p.estimator);
    float reward = -p.beta * kl;
    if (last && j == 0 && lane() == 0) reward += p.score[tile.segment];
    const float neighbour = __shfl_up_sync(kAllLanes, value[j], 1);
    const double next_value = lane() == 0 ? value_after : neighbour;
    const double delta = reward + p.gamma * next_value - value[j];
    const double advantage = decayed_sum(delta, carry, c);
    value_after = __shfl_sync(kAllLanes, value[j], kWarp - 1);
    carry = __shfl_sync(kAllLanes, advantage, kWarp - 1);
    if (kStore && t >= tile.begin) {
      p.advantage[t] = static_cast<float>(advantage);
      p.returns[t] = static_cast<float>(advantage + value[j]);
      p.reward[t] = reward;
      p.kl[t] = kl;
    }
  }
  return carry;
}

template <int kStripes>
__global__ void tile_sums(KlRewardGae p, double* __restrict__ sum) {  // (windows,)
  constexpr int kTile = kStripes * kWarp;
  const int64_t window = warp_of_grid();
  if (window * kTile >= p.tokens) return;
  const Tile tile = tile_of<kTile>(p, window * kTile);  // of a window's tiles only this one can be whole
  if (tile.is_first_of_segment()) return;
  const double total = scan_tile<kStripes, false>(p, tile, 0.0, powers_of(p.gamma * p.lam));
  if (lane() == 0) sum[window] = total;
}

template <int kStripes>
__global__ void tile_carries(KlRewardGae p, const double* __restrict__ sum, double* __restrict__ carry) {
  constexpr int kTile = kStripes * kWarp;
  const int64_t window = warp_of_grid();
  if (window * kTile >= p.tokens) return;
  const Tile tile = tile_of<kTile>(p, window * kTile);
  if (tile.is_first_of_segment() || !tile.is_last_of_segment()) return;
  const double c = p.gamma * p.lam;
  double of_tile = powers_of(c).whole;
#pragma unroll
  for (int n = 1; n < kStripes; n *= 2) of_tile = power(of_tile * of_tile, c);
  const Powers powers = powers_of(of_tile);
  const int64_t summed = min((tile.segment_end - tile.segment_begin - 1) / kTile, window);
  double running = 0.0;
  double ahead = lane() < summed ? sum[window - lane()] : 0.0;
  for (int64_t first = 0; first < summed; first += kWarp) {
    const int64_t k = first + lane();  // tiles to the left of the segment's last one
    const double own = ahead;
    ahead = k + kWarp < summed ? sum[window - k - kWarp] : 0.0;
    const double total = decayed_sum(own, running, powers);
    if (k < summed) carry[window - k - 1] = total;
    running = __shfl_sync(kAllLanes, total, kWarp - 1);
  }
}

template <int kStripes>
__global__ void apply(KlRewardGae p, const double* __restrict__ carry) {
  constexpr int kTile = kStripes * kWarp;
  const int64_t window = warp_of_grid();
  if (window * kTile >= p.tokens) return;
  const int64_t left = tile_of<kTile>(p, window * kTile).begin;
  const int64_t next = (window + 1) * kTile;
  const int64_t right = next < p.tokens ? tile_of<kTile>(p, next).begin : p.tokens;
  if (right <= left) return;
  const Powers powers = powers_of(p.gamma * p.lam);
  Tile tile = tile_of<kTile>(p, right - 1);
  while (true) {
    scan_tile<kStripes, true>(p, tile, tile.is_last_of_segment() ? 0.0 : carry[window], powers);
    if (tile.begin <= left) return;
    tile = tile_before<kTile>(p, tile);
  }
}

constexpr int kKlRewardGaeStripes = 8;

template <int kStripes = kKlRewardGaeStripes>
int64_t kl_reward_gae_windows(int64_t tokens) {
  return ceil_div(tokens, kStripes * kWarp);
}

// scratch (2, windows). `check` is called after each launch.
template <int kStripes = kKlRewardGaeStripes, class Check>
void launch_kl_reward_gae(const KlRewardGae& p, double* scratch, unsigned threads, cudaStream_t stream, Check check) {
  const int64_t windows = kl_reward_gae_windows<kStripes>(p.tokens);
  if (windows == 0) return;
  double *sum = scratch, *carry = scratch + windows;
  const dim3 grid(static_cast<unsigned>(ceil_div(windows * kWarp, threads))), block(threads);
  if (windows > 1) {  // otherwise no segment has two tiles
    KERNEL_LAUNCH(tile_sums<kStripes>, grid, block, 0, stream, p, sum);
    check();
    KERNEL_LAUNCH(tile_carries<kStripes>, grid, block, 0, stream, p, sum, carry);
    check();
  }
  KERNEL_LAUNCH(apply<kStripes>, grid, block, 0, stream, p, carry);
  check();
}

}  // namespace engine_cuda
