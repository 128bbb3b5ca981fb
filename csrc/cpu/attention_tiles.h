// The pieces of attention's loops: products of tiles held in registers, and packing of keys. Only with ENGINE_CLASS.
#pragma once

#include "activation.h"
#include "attention_rows.h"

namespace engine::ENGINE_CLASS {

// Where row r of a chunk (token, then query head of the key head's group) lies in (rows, query heads).
ENGINE_INLINE int64_t query_row(const Rows& rows, const Heads& heads, int64_t key_head, int64_t r) {
  return (rows.token + r / heads.group()) * heads.query_heads + key_head * heads.group() + r % heads.group();
}

// Rows of a register tile: with two vectors a row, enough sums in flight, and few enough for the registers.
constexpr int kTile = kLanes == 16 ? 8 : 4;
constexpr int64_t kBlockVectors = kKeyBlock / kLanes;

// C (R, V vectors) (+)= A (R, depth) B (depth, V vectors); the strides of A are constants so that they become offsets
// of one pointer. Every element is one chain over the depth, in order: its bits do not depend on R and V.
template <int R, int V, int kRowStride, int kDepthStride, bool kAdd>
static void tile_product(float* c, int64_t c_stride, const float* a, const float* b, int64_t b_stride, int64_t depth) {
  vfloat sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = kAdd ? load(c + r * c_stride + v * kLanes) : vfloat{};
  for (int64_t k = 0; k < depth; ++k) {
    vfloat row[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vfloat x = splat(a[r * kRowStride]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += x * row[v];
    }
    a += kDepthStride;
    b += b_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
}

// The same for any number of columns (whole vectors), two vectors at a time.
template <int R, int kRowStride, int kDepthStride, bool kAdd>
static void wide_product(float* c, int64_t c_stride, const float* a, const float* b, int64_t b_stride, int64_t depth,
                         int64_t columns) {
  int64_t n = 0;
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes)
    tile_product<R, 2, kRowStride, kDepthStride, kAdd>(c + n, c_stride, a, b + n, b_stride, depth);
  if (n < columns) tile_product<R, 1, kRowStride, kDepthStride, kAdd>(c + n, c_stride, a, b + n, b_stride, depth);
}

// ... and for up to kTile rows: 1, 2, 4 or 8, with what is left over computed in vain.
template <int kRowStride, int kDepthStride, bool kAdd>
static void product(int64_t rows, float* c, int64_t c_stride, const float* a, const float* b, int64_t b_stride,
                    int64_t depth, int64_t columns) {
  if (rows > 4)
    wide_product<kTile, kRowStride, kDepthStride, kAdd>(c, c_stride, a, b, b_stride, depth, columns);
  else if (rows > 2)
    wide_product<4, kRowStride, kDepthStride, kAdd>(c, c_stride, a, b, b_stride, depth, columns);
  else if (rows > 1)
    wide_product<2, kRowStride, kDepthStride, kAdd>(c, c_stride, a, b, b_stride, depth, columns);
  else
    wide_product<1, kRowStride, kDepthStride, kAdd>(c, c_stride, a, b, b_stride, depth, columns);
}

// Lanes i of a and i ^ H of b (low), or the other way round: the step of a transposition.
#define ENGINE_LOW(k) (((k) & H) ? kLanes + (k)-H : (k))
#define ENGINE_HIGH(k) (((k) & H) ? kLanes + (k) : (k) + H)
#define ENGINE_4(f, k) f(k), f(k + 1), f(k + 2), f(k + 3)
#if ENGINE_LANES == 16
#define ENGINE_ALL(f) ENGINE_4(f, 0), ENGINE_4(f, 4), ENGINE_4(f, 8), ENGINE_4(f, 12)
#elif ENGINE_LANES == 8
#define ENGINE_ALL(f) ENGINE_4(f, 0), ENGINE_4(f, 4)
#else
#define ENGINE_ALL(f) ENGINE_4(f, 0)
#endif

template <int H>
ENGINE_INLINE void transpose_step(vfloat (&row)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & H) continue;
    const vfloat a = row[i], b = row[i + H];
    row[i] = __builtin_shufflevector(a, b, ENGINE_ALL(ENGINE_LOW));
    row[i + H] = __builtin_shufflevector(a, b, ENGINE_ALL(ENGINE_HIGH));
  }
}

ENGINE_INLINE void transpose(vfloat (&row)[kLanes]) {
  transpose_step<1>(row);
  transpose_step<2>(row);
  if constexpr (kLanes >= 8) transpose_step<4>(row);
  if constexpr (kLanes >= 16) transpose_step<8>(row);
}

ENGINE_INLINE float largest_lane(vfloat v) {
#define ENGINE_ACROSS(H) v = vmax(v, __builtin_shufflevector(v, v, ENGINE_ALL(ENGINE_XOR)))
#define ENGINE_XOR(k) ((k) ^ (kLanes / 2))
  ENGINE_ACROSS();
#undef ENGINE_XOR
#define ENGINE_XOR(k) ((k) ^ (kLanes / 4))
  ENGINE_ACROSS();
#undef ENGINE_XOR
#define ENGINE_XOR(k) ((k) ^ (kLanes / 8))
  if constexpr (kLanes >= 8) ENGINE_ACROSS();
#undef ENGINE_XOR
#define ENGINE_XOR(k) ((k) ^ (kLanes / 16))
  if constexpr (kLanes >= 16) ENGINE_ACROSS();
#undef ENGINE_XOR
  return v[0];
}

ENGINE_INLINE vint lane_numbers() {
#define ENGINE_SAME(k) (k)
  return vint{ENGINE_ALL(ENGINE_SAME)};
}

// vexp for a score less a maximum or less a log-sum-exp: x <= 0 but for rounding (right up to 88), with fewer steps.
// exp(0) = 1 and exp(-inf) = 0 exactly; NaN stays NaN.
ENGINE_INLINE vfloat exp_below(vfloat x) {
  const vfloat low = splat(-87.33654f);
  const vfloat inside = low > x ? low : x;
  const float magic = 12582912.0f;  // as in vexp
  const vfloat n = (inside * 1.44269504088896341f + magic) - magic;
  const vfloat r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const vint scale = (__builtin_convertvector(n, vint) + 127) << 23;
  return x < low ? vfloat{} : p * (vfloat)scale;
}

// A block of keys or values as stored: row i of `count` starts at base + offset[i].
template <typename T>
struct Stored {
  const T* base;
  const int64_t* offset;
  int64_t count, size;
};

// Transposed: to[d * kKeyBlock + i] = row i [d], with zeros for the rows from `count` to padded(count).
template <typename T>
ENGINE_INLINE void pack_columns(const Stored<T>& rows, float* to) {
  const auto square = [&](int64_t first, int64_t d, int64_t height, int64_t width) {
    vfloat row[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      row[i] = i < height ? load_up_to(rows.base + rows.offset[first + i] + d, width) : vfloat{};
    transpose(row);
    float* out = to + d * kKeyBlock + first;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (i < width) store(out + i * kKeyBlock, row[i]);
  };
  for (int64_t first = 0; first < padded(rows.count); first += kLanes) {
    const int64_t height = rows.count - first;
    int64_t d = 0;
    if (height >= kLanes)
      for (; d + kLanes <= rows.size; d += kLanes) square(first, d, kLanes, kLanes);
    for (; d < rows.size; d += kLanes) square(first, d, height, rows.size - d);
  }
}

// One row, times scale, with zeros up to padded(size).
template <typename T>
ENGINE_INLINE void pack_row(const T* from, int64_t size, float scale, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(to + d, load(from + d) * scale);
  for (; d < padded(size); d += kLanes)
    store(to + d, d < size ? load_part(from + d, size - d, 0.0f) * scale : vfloat{});
}

// As stored, with zeros for the rows from `count` to padded(count): to[i * padded(size) + d] = row i [d].
template <typename T>
ENGINE_INLINE void pack_rows(const Stored<T>& rows, float* to) {
  const int64_t wide = padded(rows.size);
  for (int64_t i = 0; i < rows.count; ++i) pack_row(rows.base + rows.offset[i], rows.size, 1.0f, to + i * wide);
  for (int64_t at = rows.count * wide; at < padded(rows.count) * wide; at += kLanes) store(to + at, vfloat{});
}

// Where the keys first ... first + count of one key head start, in elements.
ENGINE_INLINE void key_offsets(const Keys& keys, const Heads& heads, int64_t key_head, int64_t first, int64_t count,
                               int64_t* offset) {
  const int64_t stride = heads.key_heads * heads.size;
  for (int64_t i = 0; i < count;) {
    const Run run = keys.run(first + i);
    const int64_t end = i + run.length < count ? i + run.length : count;
    for (int64_t row = run.row; i < end; ++i, ++row) offset[i] = row * stride + key_head * heads.size;
  }
}

}  // namespace engine::ENGINE_CLASS
