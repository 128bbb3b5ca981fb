// What rows of attention have seen so far, and what a block of keys does to it. Only with ENGINE_CLASS.
#pragma once

#include "attention_pages.h"
#include "attention_tiles.h"

namespace engine::ENGINE_CLASS {

// The rows of a chunk, in tiles of kTile: what they are and what they have seen so far.
struct Chunk {
  int64_t count, size, wide;
  float* query;    // [tile][size][kTile]: transposed, times 1 / sqrt(size)
  float* sum;      // [row][wide]: sum of e^(score - most) v
  float* weight;   // [row][kLanes]: sum of e^(score - most), by lane
  float* most;     // [row]: largest score
  int32_t* sees;   // [row]: number of keys

  // `most_rows`: what the scratch memory is for, whole tiles.
  Chunk(int64_t rows, int64_t most_rows, int64_t size, float* scratch)
      : count((rows + kTile - 1) / kTile * kTile), size(size), wide(padded(size)) {
    query = scratch;
    sum = query + most_rows * wide;
    weight = sum + most_rows * wide;
    most = weight + most_rows * 16;
    sees = reinterpret_cast<int32_t*>(most + most_rows);
  }
};

// One row over one block of keys: scores -> e^(score - most), with the sums so far brought to the new maximum.
ENGINE_INLINE void soften_row(float* score, int64_t keys, int64_t seen, const Chunk& chunk, int64_t r) {
  const vint lanes = lane_numbers();
  vfloat top = splat(-kInf);
  for (int64_t j = 0; j < keys; j += kLanes) {
    vfloat s = load(score + j);
    if (seen < j + kLanes) {
      s = lanes < static_cast<int32_t>(seen - j) ? s : splat(-kInf);
      store(score + j, s);
    }
    top = vmax(s, top);
  }
  const float before = chunk.most[r], block_most = largest_lane(top);
  const float most = block_most > before ? block_most : before;
  vfloat weight = load(chunk.weight + r * kLanes);
  if (most != before) {
    const vfloat shrink = exp_below(splat(before - most));
    weight = weight * shrink;
    float* sum = chunk.sum + r * chunk.wide;
    for (int64_t d = 0; d < chunk.wide; d += kLanes) store(sum + d, load(sum + d) * shrink);
    chunk.most[r] = most;
  }
  for (int64_t j = 0; j < keys; j += kLanes) {
    const vfloat p = exp_below(load(score + j) - most);
    weight += p;
    store(score + j, p);
  }
  store(chunk.weight + r * kLanes, weight);
}

// The query of one row in its tile, times 1 / sqrt(size), and nothing seen yet.
template <typename T>
ENGINE_INLINE void start_row(const Chunk& chunk, int64_t r, const T* query) {
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(chunk.size));
  chunk.most[r] = -kInf;
  store(chunk.weight + r * kLanes, vfloat{});
  for (int64_t d = 0; d < chunk.wide; d += kLanes) store(chunk.sum + r * chunk.wide + d, vfloat{});
  float* to = chunk.query + r / kTile * chunk.size * kTile + r % kTile;
  for (int64_t d = 0; d < chunk.size; ++d) {
    if constexpr (sizeof(T) == 2)
      to[d * kTile] = from_bf16(query[d]) * scale;
    else
      to[d * kTile] = query[d] * scale;
  }
}

template <typename T>
ENGINE_INLINE void start_chunk(const Attention& job, const Heads& heads, const Rows& rows, int64_t key_head,
                               const Chunk& chunk) {
  const int64_t num_rows = rows.tokens * heads.group();
  for (int64_t r = 0; r < chunk.count; ++r) {
    chunk.sees[r] = r < num_rows ? static_cast<int32_t>(rows.visible + r / heads.group()) : 0;
    const int64_t row = query_row(rows, heads, key_head, r < num_rows ? r : 0);
    start_row(chunk, r, static_cast<const T*>(job.q) + row * chunk.size);
  }
}

// All rows over the block of keys that starts at `first`. keys [size][kKeyBlock], values [kKeyBlock][wide].
ENGINE_INLINE void over_block(const Chunk& chunk, int64_t num_rows, int64_t first, const float* keys,
                              const float* values, float* score) {
  for (int64_t r = 0; r < num_rows; r += kTile) {
    const int64_t rows = num_rows - r < kTile ? num_rows - r : kTile;
    int64_t seen = chunk.sees[r + rows - 1] - first;  // the last row of a tile sees most
    if (seen <= 0) continue;
    const int64_t count = seen >= kKeyBlock ? kKeyBlock : padded(seen);
    product<1, kTile, false>(rows, score, kKeyBlock, chunk.query + r * chunk.size, keys, kKeyBlock, chunk.size, count);
    for (int64_t i = 0; i < rows; ++i) {
      seen = chunk.sees[r + i] - first;
      if (seen > 0) {
        soften_row(score + i * kKeyBlock, count, seen, chunk, r + i);
      } else {
        for (int64_t j = 0; j < count; j += kLanes) store(score + i * kKeyBlock + j, vfloat{});
      }
    }
    product<kKeyBlock, 1, true>(rows, chunk.sum + r * chunk.wide, chunk.wide, score, values, chunk.wide, count,
                                chunk.wide);
  }
}

// The keys [size][kKeyBlock] and values [kKeyBlock][wide] of the block that starts at `first`, from rows or from pages.
template <typename S>
ENGINE_INLINE void read_block(const Attention& job, const Heads& heads, const Keys& keys, int64_t key_head,
                              int64_t first, int64_t count, float* key_block, float* value_block) {
  const int64_t size = heads.size;
  if (!keys.pages) {
    int64_t offset[kKeyBlock];
    key_offsets(keys, heads, key_head, first, count, offset);
    pack_columns(Stored<S>{static_cast<const S*>(job.k), offset, count, size}, key_block);
    pack_rows(Stored<S>{static_cast<const S*>(job.v), offset, count, size}, value_block);
    return;
  }
  const int64_t region = page_head_bytes(size, keys.bf16);
  for (int64_t i = 0; i < count; i += kPage) {
    const int64_t at = (keys.pages[(first + i) / kPage] * heads.key_heads + key_head) * region, left = count - i;
    unpack_keys<S>(static_cast<const char*>(job.k) + at, size, key_block + i);
    unpack_values<S>(static_cast<const char*>(job.v) + at, size, left, value_block + i * padded(size));
  }
}

// The rows of one key head over their keys [0, last), and what they have seen then.
template <typename T, typename S>
ENGINE_INLINE Chunk rows_over_first_keys(const Attention& job, const Heads& heads, const Keys& keys, const Rows& rows,
                                         int64_t key_head, int64_t last, float* scratch) {
  const int64_t size = heads.size, wide = padded(size), num_rows = rows.tokens * heads.group();
  float *key_block = scratch, *value_block = key_block + kKeyBlock * wide, *score = value_block + kKeyBlock * wide;
  const Chunk chunk(num_rows, heads.chunk_rows(), size, score + kMaxTile * kKeyBlock);
  start_chunk<T>(job, heads, rows, key_head, chunk);
  for (int64_t first = 0; first < last; first += kKeyBlock) {
    const int64_t count = last - first < kKeyBlock ? last - first : kKeyBlock;
    read_block<S>(job, heads, keys, key_head, first, count, key_block, value_block);
    over_block(chunk, num_rows, first, key_block, value_block, score);
  }
  return chunk;
}

template <typename T>
ENGINE_INLINE void finish_chunk(const Attention& job, const Heads& heads, const Rows& rows, int64_t key_head,
                                const Chunk& chunk) {
  for (int64_t r = 0; r < rows.tokens * heads.group(); ++r) {
    const int64_t row = query_row(rows, heads, key_head, r);
    const float weight = hsum(load(chunk.weight + r * kLanes)), share = 1.0f / weight;
    T* out = static_cast<T*>(job.out) + row * chunk.size;
    for (int64_t d = 0; d < chunk.size; d += kLanes)
      store_up_to(out + d, load(chunk.sum + r * chunk.wide + d) * share, chunk.size - d);
    if (job.lse) job.lse[row] = chunk.most[r] + __builtin_logf(weight);
  }
}

}  // namespace engine::ENGINE_CLASS
