// Packing of both operands of a product: layouts in gemm.h. Class half only.
#pragma once

#include "gemm.h"
#include "gemm_fma.h"

namespace engine::ENGINE_CLASS {

// The halves of two vectors, word by word: a0 b0 a1 b1 ...
#if ENGINE_LANES == 16
#define ENGINE_LOW {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define ENGINE_HIGH {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#elif ENGINE_LANES == 8
#define ENGINE_LOW {0, 8, 1, 9, 2, 10, 3, 11}
#define ENGINE_HIGH {4, 12, 5, 13, 6, 14, 7, 15}
#else
#define ENGINE_LOW {0, 4, 1, 5}
#define ENGINE_HIGH {2, 6, 3, 7}
#endif

ENGINE_INLINE vuint interleave_low(vuint a, vuint b) {
#if defined(__clang__)
  constexpr int order[] = ENGINE_LOW;
  vuint v;
  for (int i = 0; i < kLanes; ++i) v[i] = order[i] < kLanes ? a[order[i]] : b[order[i] - kLanes];
  return v;
#else
  return __builtin_shuffle(a, b, vuint ENGINE_LOW);
#endif
}
ENGINE_INLINE vuint interleave_high(vuint a, vuint b) {
#if defined(__clang__)
  constexpr int order[] = ENGINE_HIGH;
  vuint v;
  for (int i = 0; i < kLanes; ++i) v[i] = order[i] < kLanes ? a[order[i]] : b[order[i] - kLanes];
  return v;
#else
  return __builtin_shuffle(a, b, vuint ENGINE_HIGH);
#endif
}

// kLanes x kLanes words: interleaving the two halves log2(kLanes) times exchanges rows and columns.
ENGINE_INLINE void transpose(vuint* v) {
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    vuint mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = interleave_low(v[i], v[i + kLanes / 2]);
      mixed[2 * i + 1] = interleave_high(v[i], v[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = mixed[i];
  }
}

ENGINE_INLINE vuint words_of(const void* p) {
  vuint v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
ENGINE_INLINE void store_words(void* p, vuint v) { std::memcpy(p, &v, sizeof(v)); }
// To stay in the caches, or past them.
template <bool past>
ENGINE_INLINE void put_words(void* p, vuint v) {
  past ? stream(p, v) : store_words(p, v);
}

ENGINE_INLINE vuint round_words(vfloat v) {
  const vuint bits = reinterpret_cast<vuint>(v);
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return v == v ? rounded : vuint{} + 0x7fc0;
}

// The first n elements of a row from `col` on as floats, the rest 0. Out of line: the edge of every packing.
static __attribute__((noinline)) vfloat float_words_part(const Matrix& m, int64_t row, int64_t col, int64_t n) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n && i < kLanes; ++i) {
    const int64_t at = row * m.stride + col + i;
    lanes[i] = m.bf16 ? from_bf16(static_cast<const uint16_t*>(m.data)[at]) : static_cast<const float*>(m.data)[at];
  }
  return load(lanes);
}

ENGINE_INLINE vfloat float_words(const Matrix& m, int64_t row, int64_t col, int64_t n) {
  if (n < kLanes) return float_words_part(m, row, col, n);
  const int64_t at = row * m.stride + col;
  return m.bf16 ? load(static_cast<const uint16_t*>(m.data) + at) : load(static_cast<const float*>(m.data) + at);
}

// The same as bf16 in the low halves of words.
ENGINE_INLINE vuint bf16_words(const Matrix& m, int64_t row, int64_t col, int64_t n) {
  if (n < kLanes) return round_words(float_words_part(m, row, col, n));
  const int64_t at = row * m.stride + col;
  if (!m.bf16) return round_words(load(static_cast<const float*>(m.data) + at));
  return widen(static_cast<const uint16_t*>(m.data) + at);
}

// 2 * kLanes consecutive elements of a row as bf16, two a word.
ENGINE_INLINE vuint bf16_pairs(const Matrix& m, int64_t row, int64_t col, int64_t n) {
  if (m.bf16 && n >= 2 * kLanes) return words_of(static_cast<const uint16_t*>(m.data) + row * m.stride + col);
  uint16_t lanes[2 * kLanes];
  narrow(lanes, bf16_words(m, row, col, n));
  narrow(lanes + kLanes, bf16_words(m, row, col + kLanes, n - kLanes));
  return words_of(lanes);
}

template <bool past>
static void pack_columns_f32(const Matrix& source, int64_t cols, int64_t depth, int64_t panel, float* out) {
  for (int64_t k = 0; k < depth; k += kLanes)
    for (int half = 0; half < 2; ++half) {
      vuint v[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const int64_t col = panel * kPanel + half * kLanes + j;
        v[j] = reinterpret_cast<vuint>(col < cols ? float_words(source, col, k, depth - k) : vfloat{});
      }
      transpose(v);
      for (int i = 0; i < kLanes && k + i < depth; ++i) put_words<past>(out + (k + i) * kPanel + half * kLanes, v[i]);
    }
}

template <bool past>
static void pack_columns_pairs(const Matrix& source, int64_t cols, int64_t depth, int64_t panel, uint32_t* out) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    vuint v[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      const int64_t low = panel * kPanel + j, high = low + kLanes;
      v[j] = low < cols ? bf16_words(source, low, k, depth - k) : vuint{};
      if (high < cols) v[j] |= bf16_words(source, high, k, depth - k) << 16;
    }
    transpose(v);
    for (int i = 0; i < kLanes && k + i < depth; ++i) put_words<past>(out + (k + i) * kLanes, v[i]);
  }
}

template <bool past>
static void pack_columns_tiles(const Matrix& source, int64_t cols, int64_t depth, int64_t panel, uint32_t* out) {
  for (int64_t k = 0; k < depth; k += 2 * kLanes)
    for (int half = 0; half < 2; ++half) {
      vuint v[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const int64_t col = panel * kPanel + half * kLanes + j;
        v[j] = col < cols ? bf16_pairs(source, col, k, depth - k) : vuint{};
      }
      transpose(v);
      for (int i = 0; i < kLanes; ++i) put_words<past>(out + (k + half * kLanes + i) * kLanes, v[i]);
    }
}

// Operands whose source has the depth in its rows are packed 32 of these rows at a time, all columns: rows are read from
// end to end, where a panel alone would touch another page with each row.
constexpr int64_t kRowsOfChunk = 32;

static void pack_rows_f32(const Matrix& source, int64_t cols, int64_t panel, int64_t k0, int64_t k1, float* out) {
  const int64_t first = panel * kPanel;
  for (int64_t k = k0; k < k1; ++k, out += kPanel) {
    __builtin_prefetch(static_cast<const char*>(source.data) + (k * source.stride + first + 4 * kPanel) * (source.bf16 ? 2 : 4));
    store(out, float_words(source, k, first, cols - first));
    store(out + kLanes, float_words(source, k, first + kLanes, cols - first - kLanes));
  }
}

static void pack_rows_pairs(const Matrix& source, int64_t cols, int64_t panel, int64_t k0, int64_t k1, uint32_t* out) {
  const int64_t first = panel * kPanel;
  for (int64_t k = k0; k < k1; ++k, out += kLanes) {
    const vuint low = bf16_words(source, k, first, cols - first);
    store_words(out, low | bf16_words(source, k, first + kLanes, cols - first - kLanes) << 16);
  }
}

static void pack_rows_tiles(const Matrix& source, int64_t cols, int64_t panel, int64_t k0, int64_t k1, uint32_t* out) {
  for (int half = 0; half < 2; ++half)
    for (int64_t even = k0; even < k0 + 32; even += 2, out += kLanes) {
      const int64_t col = panel * kPanel + half * kLanes;
      const vuint low = even < k1 ? bf16_words(source, even, col, cols - col) : vuint{};
      const vuint high = even + 1 < k1 ? bf16_words(source, even + 1, col, cols - col) : vuint{};
      store_words(out, low | high << 16);
    }
}

// A from a matrix (M, K): for tiles rows of bf16 filled up with zeros, 16 a block, [K / 32][16][32]; floats otherwise.
static void stage_rows(const Matrix& source, int64_t rows, int64_t depth, bool tiles, int64_t block, void* out) {
  if (!tiles) {
    float* to = static_cast<float*>(out);
    for (int64_t r = block * kFmaRows; r < rows && r < (block + 1) * kFmaRows; ++r, to += depth)
      for (int64_t k = 0; k < depth; k += kLanes) {
        const vfloat v = float_words(source, r, k, depth - k);
        depth - k >= kLanes ? store(to + k, v) : store_part(to + k, v, depth - k);
      }
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int64_t k = 0; k < depth; k += 32)
    for (int64_t r = block * 16; r < (block + 1) * 16; ++r)
      for (int part = 0; part < 32; part += 2 * kLanes, to += 2 * kLanes)
        store_words(to, r < rows ? bf16_pairs(source, r, k + part, depth - k - part) : vuint{});
}

// A from a matrix (K, M), a chunk of its rows: [K][rows of a block] floats, or tiles as above from transposed pairs.
static void stage_columns_f32(const Matrix& source, int64_t rows, int64_t block, int64_t k0, int64_t k1, float* out) {
  const int64_t first = block * kFmaRows;
  const bool whole = first + kFmaRows <= rows && !source.bf16;
  for (int64_t k = k0; k < k1; ++k, out += kFmaRows) {
    const int64_t at = k * source.stride + first;
    if (whole) {
      __builtin_prefetch(static_cast<const float*>(source.data) + at + 16 * source.stride);  // rows are pages apart
      std::memcpy(out, static_cast<const float*>(source.data) + at, sizeof(float) * kFmaRows);
      continue;
    }
    for (int r = 0; r < kFmaRows; ++r) {
      if (first + r >= rows)
        out[r] = 0.0f;
      else if (source.bf16)
        out[r] = from_bf16(static_cast<const uint16_t*>(source.data)[at + r]);
      else
        out[r] = static_cast<const float*>(source.data)[at + r];
    }
  }
}

static void stage_columns_tiles(const Matrix& source, int64_t rows, int64_t block, int64_t k0, int64_t k1,
                                uint16_t* out) {
  const int64_t first = block * kLanes;
  for (int64_t k = k0; k < k0 + 32; k += 2 * kLanes) {
    vuint v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const int64_t even = k + 2 * i;
      v[i] = even < k1 ? bf16_words(source, even, first, rows - first) : vuint{};
      if (even + 1 < k1) v[i] |= bf16_words(source, even + 1, first, rows - first) << 16;
    }
    transpose(v);
    for (int r = 0; r < kLanes; ++r, out += 2 * kLanes) store_words(out, v[r]);
  }
}

}  // namespace engine::ENGINE_CLASS
