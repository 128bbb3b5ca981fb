// Prompts of few answers side by side, one a lane: column[i] has the answers i of all lanes. Transposed in registers, four
// answers at a time. Only for files compiled with ENGINE_CLASS.
#pragma once

#include "vec.h"

namespace engine::ENGINE_CLASS {

constexpr int kMost = 9;   // answers of a prompt, the paper's most
constexpr int kRoom = 12;  // the same in whole quarters: so many are read

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

template <typename Of>
ENGINE_INLINE vfloat gather(const Of& of) {
#if ENGINE_LANES == 8 && defined(__AVX2__)
  return (vfloat)_mm256_setr_ps(of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7));
#else
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = of(lane);
  return load(lanes);
#endif
}

// of(lane) are a lane's answers, K of them, with room to read kRoom.
template <int K, typename Of>
ENGINE_INLINE void lay(const Of& of, vfloat* column) {
  constexpr int whole = K % 4 == 1 ? K - 1 : K;  // a last one alone is gathered by itself
#pragma GCC unroll 3
  for (int i = 0; i < whole; i += 4) {
    vfloat row[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) row[r] = join_quarters([&](int lane) { return of(lane + r) + i; });
    transpose_quarters(row, column + i);
  }
  if (whole < K) {
    column[K - 1] = gather([&](int lane) { return of(lane)[K - 1]; });
  }
}
// The reverse; nothing is written beyond a lane's K answers.
template <int K, typename Of>
ENGINE_INLINE void put_back(const vfloat* column, const Of& of) {
  constexpr int whole = K / 4 * 4;
#pragma GCC unroll 2
  for (int i = 0; i < whole; i += 4) {
    vfloat row[4];
    transpose_quarters(column + i, row);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) part_quarters(row[r], [&](int lane) { return of(lane + r) + i; });
  }
#pragma GCC unroll 3
  for (int i = whole; i < K; ++i) {
    float lanes[kLanes];
    store(lanes, column[i]);
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) of(lane)[i] = lanes[lane];
  }
}

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

// Whether the numbers of each lane increase: K of a lane, the lanes one after the other; the next number is read too.
template <int K>
ENGINE_INLINE bool increase(const float* numbers) {
  struct LastOnes {
    int32_t mask[K * kLanes];
    constexpr LastOnes() : mask() {
      for (int at = K - 1; at < K * kLanes; at += K) mask[at] = -1;
    }
  };
  static constexpr LastOnes last;
  vint down{};
#pragma GCC unroll 9
  for (int at = 0; at < K * kLanes; at += kLanes) {
    vint between;
    std::memcpy(&between, last.mask + at, sizeof(between));
    down |= ~((load(numbers + at) < load(numbers + at + 1)) | between);
  }
  return !any_lane(down);
}

}  // namespace engine::ENGINE_CLASS
