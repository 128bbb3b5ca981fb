// Attention's forward; the equation is in kernels/attention.py, the order of its sums in attention_rows.h.
#include "attention_rows.h"

#ifdef ENGINE_CLASS
#include "attention_chunk.h"
#include "attention_pages.h"

namespace engine::ENGINE_CLASS {
namespace {

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

template <typename T, typename S>
ENGINE_INLINE void run_chunk(const Attention& job, const Heads& heads, const Keys& keys, const Rows& rows,
                             int64_t key_head, float* scratch) {
  const int64_t size = heads.size, wide = padded(size);
  float *key_block = scratch, *value_block = key_block + kKeyBlock * wide, *score = value_block + kKeyBlock * wide;
  const int64_t num_rows = rows.tokens * heads.group(), last = rows.visible + rows.tokens - 1;
  const Chunk chunk(num_rows, heads.chunk_rows(), size, score + kMaxTile * kKeyBlock);
  start_chunk<T>(job, heads, rows, key_head, chunk);
  for (int64_t first = 0; first < last; first += kKeyBlock) {
    const int64_t count = last - first < kKeyBlock ? last - first : kKeyBlock;
    read_block<S>(job, heads, keys, key_head, first, count, key_block, value_block);
    over_block(chunk, num_rows, first, key_block, value_block, score);
  }
  finish_chunk<T>(job, heads, rows, key_head, chunk);
}

}  // namespace

void attention_rows(const Attention& job, const Heads& heads, const Keys& keys, const Rows& rows, int64_t key_head,
                    float* scratch) {
  with_type(heads.bf16, [&]<typename T>(T*) {
    with_type(keys.bf16, [&]<typename S>(S*) {
      if constexpr (sizeof(S) <= sizeof(T)) run_chunk<T, S>(job, heads, keys, rows, key_head, scratch);
    });
  });
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
  const Heads heads = check_heads(q, k, v);
  TORCH_CHECK_VALUE(q.size(0) == k.size(0), "k: got ", k.size(0), " rows, want ", q.size(0));
  const Segments segments = check_segments(cu, prefix, q.size(0), heads.bf16);
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
