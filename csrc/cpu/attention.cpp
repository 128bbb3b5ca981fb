// Attention's forward; the equation is in kernels/attention.py, the order of its sums in attention_rows.h.
#include "attention_rows.h"

#ifdef ENGINE_CLASS
#include "attention_tiles.h"

namespace engine::ENGINE_CLASS {
namespace {

// The rows of a chunk, in tiles of kTile: what they are and what they have seen so far.
struct Chunk {
  int64_t count, size, wide;
  float* query;    // [tile][size][kTile]: transposed, times 1 / sqrt(size)
  float* sum;      // [row][wide]: sum of e^(score - most) v
  float* weight;   // [row][kLanes]: sum of e^(score - most), by lane
  float* most;     // [row]: largest score
  int32_t* sees;   // [row]: number of keys

  Chunk(int64_t rows, const Heads& heads, float* scratch)
      : count((rows + kTile - 1) / kTile * kTile), size(heads.size), wide(padded(heads.size)) {
    const int64_t most_rows = heads.chunk_rows();
    query = scratch;
    sum = query + most_rows * wide;
    weight = sum + most_rows * wide;
    most = weight + most_rows * 16;
    sees = reinterpret_cast<int32_t*>(most + most_rows);
  }
};

template <typename T>
ENGINE_INLINE void start_chunk(const Attention& job, const Heads& heads, const Rows& rows, int64_t key_head,
                               const Chunk& chunk) {
  const int64_t num_rows = rows.tokens * heads.group();
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(chunk.size));
  for (int64_t r = 0; r < chunk.count; ++r) {
    chunk.most[r] = -kInf;
    chunk.sees[r] = r < num_rows ? static_cast<int32_t>(rows.visible + r / heads.group()) : 0;
    store(chunk.weight + r * kLanes, vfloat{});
    for (int64_t d = 0; d < chunk.wide; d += kLanes) store(chunk.sum + r * chunk.wide + d, vfloat{});
    float* to = chunk.query + r / kTile * chunk.size * kTile + r % kTile;
    const T* from = static_cast<const T*>(job.q) + query_row(rows, heads, key_head, r < num_rows ? r : 0) * chunk.size;
    for (int64_t d = 0; d < chunk.size; ++d) {
      if constexpr (sizeof(T) == 2)
        to[d * kTile] = from_bf16(from[d]) * scale;
      else
        to[d * kTile] = from[d] * scale;
    }
  }
}

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

template <typename T>
ENGINE_INLINE void run_chunk(const Attention& job, const Heads& heads, const Keys& keys, const Rows& rows,
                             int64_t key_head, float* scratch) {
  const int64_t size = heads.size, wide = padded(size);
  float *key_block = scratch, *value_block = key_block + kKeyBlock * wide, *score = value_block + kKeyBlock * wide;
  const int64_t num_rows = rows.tokens * heads.group(), last = rows.visible + rows.tokens - 1;
  const Chunk chunk(num_rows, heads, score + kMaxTile * kKeyBlock);
  int64_t offset[kKeyBlock];
  start_chunk<T>(job, heads, rows, key_head, chunk);
  for (int64_t first = 0; first < last; first += kKeyBlock) {
    const int64_t count = last - first < kKeyBlock ? last - first : kKeyBlock;
    key_offsets(keys, heads, key_head, first, count, offset);
    pack_columns(Stored<T>{static_cast<const T*>(job.k), offset, count, size}, key_block);
    pack_rows(Stored<T>{static_cast<const T*>(job.v), offset, count, size}, value_block);
    over_block(chunk, num_rows, first, key_block, value_block, score);
  }
  finish_chunk<T>(job, heads, rows, key_head, chunk);
}

}  // namespace

void attention_rows(const Attention& job, const Heads& heads, const Keys& keys, const Rows& rows, int64_t key_head,
                    float* scratch) {
  with_type(heads.bf16, [&]<typename T>(T*) { run_chunk<T>(job, heads, keys, rows, key_head, scratch); });
}

}  // namespace engine::ENGINE_CLASS
#else

#include <torch/library.h>

#include "attention_host.h"

namespace engine {
namespace {

struct Task {
  int64_t segment, key_head;
  Rows rows;
};

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const at::Tensor& cu, const std::optional<at::Tensor>& prefix) {
  const Heads heads = check_heads(q, k, v, 3);
  TORCH_CHECK_VALUE(q.size(0) == k.size(0), "k: got ", k.size(0), " rows, want ", q.size(0));
  const Segments segments = check_segments(cu, prefix, q.size(0));
  at::Tensor out = at::empty_like(q);
  at::Tensor lse = at::empty({q.size(0), heads.query_heads}, q.options().dtype(at::kFloat));
  const Attention job{q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), out.data_ptr(),
                      lse.data_ptr<float>()};
  std::vector<Task> tasks;
  std::vector<int64_t> work;
  for (int64_t s = 0; s < segments.count; ++s)
    for (int64_t h = 0; h < heads.key_heads; ++h)
      for (int64_t t = 0; t < segments.length(s); t += heads.chunk_tokens()) {
        const int64_t tokens = std::min(heads.chunk_tokens(), segments.length(s) - t);
        const int64_t visible = segments.shared(s) + t + 1;
        tasks.push_back({s, h, Rows{segments.begin(s) + t, tokens, visible}});
        work.push_back(tokens * (visible + tokens / 2) * heads.group() * heads.size * 2);
      }
  const auto run = pick_attention_rows();
  share_out(work, attention_scratch(heads), [&](int64_t i, float* scratch) {
    run(job, heads, segments.keys(tasks[i].segment), tasks[i].rows, tasks[i].key_head, scratch);
  });
  return {out, lse};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("attention", &engine::attention); }
#endif
