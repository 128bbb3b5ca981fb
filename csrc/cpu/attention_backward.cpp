// Attention's backward: the probabilities again from the saved log-sum-exp, block of keys by block of keys.
//
// With scores s = q . k / sqrt(D), p = e^(s - lse), and delta = sum_d grad out:
//     d v_j += p grad,    d s = p (grad . v_j - delta),    d q += d s k_j / sqrt(D),    d k_j += d s q / sqrt(D)
#include "attention_rows.h"

namespace engine {

struct AttentionGradient {
  const void *grad, *q, *k, *v, *out;
  const float* lse;        // (rows, query heads)
  void* grad_q;
  float *grad_k, *grad_v;  // (rows, key heads, size), added to
};

constexpr int64_t kRowBlock = 32;  // rows whose probabilities over a block of keys are held together

// Floats of scratch memory for attention_rows_backward.
ENGINE_EVERYWHERE int64_t attention_backward_scratch(const Heads& heads) {
  const int64_t rows = heads.chunk_rows() + kRowBlock;
  return 5 * kKeyBlock * padded(heads.size) + 2 * kRowBlock * kKeyBlock + rows * (5 * padded(heads.size) + 3);
}

}  // namespace engine

// The chunk's share of all gradients; grad_q of its rows is complete afterwards.
ENGINE_KERNEL(void, attention_rows_backward,
              (const engine::AttentionGradient& job, const engine::Heads& heads, const engine::Keys& keys,
               const engine::Rows& rows, int64_t key_head, float* scratch))

#ifdef ENGINE_CLASS
#include "attention_tiles.h"

namespace engine::ENGINE_CLASS {
namespace {

struct Chunk {
  int64_t num_rows, count, size, wide;  // count: rows filled up to whole tiles with rows that see nothing
  float scale;
  float *query_columns, *grad_columns;  // [tile][size][kTile]
  float *query, *grad, *grad_query;     // [row][wide]; query times scale
  float *lse, *delta;                   // [row]
  int32_t* sees;                        // [row]

  Chunk(int64_t num_rows, const Heads& heads, float* scratch)
      : num_rows(num_rows),
        count((num_rows + kTile - 1) / kTile * kTile),
        size(heads.size),
        wide(padded(heads.size)),
        scale(1.0f / __builtin_sqrtf(static_cast<float>(heads.size))) {
    const int64_t rows = heads.chunk_rows() + kRowBlock;
    query_columns = scratch;
    grad_columns = query_columns + rows * wide;
    query = grad_columns + rows * wide;
    grad = query + rows * wide;
    grad_query = grad + rows * wide;
    lse = grad_query + rows * wide;
    delta = lse + rows;
    sees = reinterpret_cast<int32_t*>(delta + rows);
  }
};

// One block of keys: what is read of it, and its gradients so far from this chunk.
struct Block {
  float *key_columns, *value_columns;     // [size][kKeyBlock]
  float *key, *grad_key, *grad_value;     // [kKeyBlock][wide]
  float *probability, *grad_score;        // [kRowBlock][kKeyBlock]
};

template <typename T>
ENGINE_INLINE void start_chunk(const AttentionGradient& job, const Heads& heads, const Rows& rows, int64_t key_head,
                               const Chunk& chunk) {
  const int64_t wide = chunk.wide, size = chunk.size;
  for (int64_t r = 0; r < chunk.count; ++r) {
    float *query = chunk.query + r * wide, *grad = chunk.grad + r * wide;
    for (int64_t d = 0; d < wide; d += kLanes) store(chunk.grad_query + r * wide + d, vfloat{});
    const bool real = r < chunk.num_rows;
    const int64_t row = query_row(rows, heads, key_head, real ? r : 0);
    // A row that only fills its tile: all zeros.
    pack_row(static_cast<const T*>(job.q) + row * size, size, real ? chunk.scale : 0.0f, query);
    pack_row(static_cast<const T*>(job.grad) + row * size, size, real ? 1.0f : 0.0f, grad);
    vfloat delta = {};
    for (int64_t d = 0; d < size; d += kLanes)
      delta += load(grad + d) * load_up_to(static_cast<const T*>(job.out) + row * size + d, size - d);
    chunk.delta[r] = hsum(delta);
    chunk.lse[r] = real ? job.lse[row] : 0.0f;
    chunk.sees[r] = real ? static_cast<int32_t>(rows.visible + r / heads.group()) : 0;
    float* query_columns = chunk.query_columns + r / kTile * size * kTile + r % kTile;
    float* grad_columns = chunk.grad_columns + r / kTile * size * kTile + r % kTile;
    for (int64_t d = 0; d < size; ++d) {
      query_columns[d * kTile] = query[d];
      grad_columns[d * kTile] = grad[d];
    }
  }
}

// Scores and grad . v of one row -> its probabilities and the gradients of its scores.
ENGINE_INLINE void row_gradient(float* probability, float* grad_score, int64_t keys, int64_t seen, float lse,
                                float delta) {
  const vint lanes = lane_numbers();
  for (int64_t j = 0; j < keys; j += kLanes) {
    const vfloat p = exp_below(load(probability + j) - lse), ds = p * (load(grad_score + j) - delta);
    const int32_t left = static_cast<int32_t>(seen - j < 0 ? 0 : seen - j < kLanes ? seen - j : kLanes);
    store(probability + j, lanes < left ? p : vfloat{});
    store(grad_score + j, lanes < left ? ds : vfloat{});
  }
}

// Rows r ... r + rows (whole tiles) over one block, of which the last row sees `keys` (filled up to 16).
ENGINE_INLINE void over_rows(const Chunk& chunk, const Block& block, int64_t r, int64_t rows, int64_t first,
                             int64_t keys) {
  const int64_t wide = chunk.wide, size = chunk.size;
  for (int64_t i = 0; i < rows; i += kTile) {
    float *p = block.probability + i * kKeyBlock, *ds = block.grad_score + i * kKeyBlock;
    const float *q = chunk.query_columns + (r + i) * size, *g = chunk.grad_columns + (r + i) * size;
    wide_product<kTile, 1, kTile, false>(p, kKeyBlock, q, block.key_columns, kKeyBlock, size, keys);
    wide_product<kTile, 1, kTile, false>(ds, kKeyBlock, g, block.value_columns, kKeyBlock, size, keys);
    for (int64_t n = 0; n < kTile; ++n)
      row_gradient(p + n * kKeyBlock, ds + n * kKeyBlock, keys, chunk.sees[r + i + n] - first, chunk.lse[r + i + n],
                   chunk.delta[r + i + n]);
    wide_product<kTile, kKeyBlock, 1, true>(chunk.grad_query + (r + i) * wide, wide, ds, block.key, wide, keys, wide);
  }
  for (int64_t j = 0; j < keys; j += kTile) {
    wide_product<kTile, 1, kKeyBlock, true>(block.grad_value + j * wide, wide, block.probability + j,
                                            chunk.grad + r * wide, wide, rows, wide);
    wide_product<kTile, 1, kKeyBlock, true>(block.grad_key + j * wide, wide, block.grad_score + j,
                                            chunk.query + r * wide, wide, rows, wide);
  }
}

template <typename T>
ENGINE_INLINE void load_block(const AttentionGradient& job, int64_t size, const int64_t* offset, int64_t count,
                              const Block& block) {
  const Stored<T> keys{static_cast<const T*>(job.k), offset, count, size};
  pack_columns(keys, block.key_columns);
  pack_columns(Stored<T>{static_cast<const T*>(job.v), offset, count, size}, block.value_columns);
  pack_rows(keys, block.key);
  for (int64_t i = 0; i < padded(count) * padded(size); i += kLanes) {
    store(block.grad_key + i, vfloat{});
    store(block.grad_value + i, vfloat{});
  }
}

ENGINE_INLINE void add_row(const float* from, int64_t size, float* to) {
  each_vector(size, [&](int64_t d, int64_t n) { store_up_to(to + d, load_up_to(to + d, n) + load(from + d), n); });
}

template <typename T>
ENGINE_INLINE void run_chunk(const AttentionGradient& job, const Heads& heads, const Keys& keys, const Rows& rows,
                             int64_t key_head, float* scratch) {
  const int64_t size = heads.size, wide = padded(size), area = kKeyBlock * wide;
  float* scores = scratch + 5 * area;
  const Block block{scratch,           scratch + area, scratch + 2 * area, scratch + 3 * area,
                    scratch + 4 * area, scores,         scores + kRowBlock * kKeyBlock};
  const Chunk chunk(rows.tokens * heads.group(), heads, scores + 2 * kRowBlock * kKeyBlock);
  int64_t offset[kKeyBlock];
  start_chunk<T>(job, heads, rows, key_head, chunk);
  const int64_t last = rows.visible + rows.tokens - 1;
  for (int64_t first = 0; first < last; first += kKeyBlock) {
    const int64_t count = last - first < kKeyBlock ? last - first : kKeyBlock;
    key_offsets(keys, heads, key_head, first, count, offset);
    load_block<T>(job, size, offset, count, block);
    for (int64_t r = 0; r < chunk.count; r += kRowBlock) {
      const int64_t num_rows = chunk.count - r < kRowBlock ? chunk.count - r : kRowBlock;
      const int64_t end = r + num_rows < chunk.num_rows ? r + num_rows : chunk.num_rows;
      const int64_t seen = chunk.sees[end - 1] - first;
      if (seen > 0) over_rows(chunk, block, r, num_rows, first, seen < kKeyBlock ? padded(seen) : kKeyBlock);
    }
    for (int64_t j = 0; j < count; ++j) {
      add_row(block.grad_key + j * wide, size, job.grad_k + offset[j]);
      add_row(block.grad_value + j * wide, size, job.grad_v + offset[j]);
    }
  }
  for (int64_t r = 0; r < chunk.num_rows; ++r) {
    T* to = static_cast<T*>(job.grad_q) + query_row(rows, heads, key_head, r) * size;
    each_vector(size, [&](int64_t d, int64_t n) {
      store_up_to(to + d, load(chunk.grad_query + r * wide + d) * chunk.scale, n);
    });
  }
}

}  // namespace

void attention_rows_backward(const AttentionGradient& job, const Heads& heads, const Keys& keys, const Rows& rows,
                             int64_t key_head, float* scratch) {
  with_type(heads.bf16, [&]<typename T>(T*) { run_chunk<T>(job, heads, keys, rows, key_head, scratch); });
}

}  // namespace engine::ENGINE_CLASS
#else

#include <torch/library.h>

#include "attention_host.h"

namespace engine {
namespace {

// The segments of each prefix, itself first: they add to the same keys, so they are one thread's work, in order.
std::vector<std::vector<int64_t>> groups_of(const Segments& segments) {
  std::vector<std::vector<int64_t>> groups(segments.count);
  for (int64_t s = 0; s < segments.count; ++s) groups[segments.owner(s)].push_back(s);
  return groups;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu, const std::optional<at::Tensor>& prefix) {
  const Heads heads = check_heads(q, k, v);
  TORCH_CHECK_VALUE(q.size(0) == k.size(0), "k: got ", k.size(0), " rows, want ", q.size(0));
  check_activation_like(grad, q, "grad");
  check_activation_like(out, q, "out");
  check_cpu_contiguous(lse, "lse");
  check_dtype(lse, at::kFloat, "lse");
  TORCH_CHECK_VALUE(lse.dim() == 2 && lse.size(0) == q.size(0) && lse.size(1) == heads.query_heads, "lse: got shape ",
                    lse.sizes(), ", want (", q.size(0), ", ", heads.query_heads, ")");
  const Segments segments = check_segments(cu, prefix, q.size(0), heads.bf16);
  at::Tensor grad_q = at::empty_like(q);
  at::Tensor grad_k = at::zeros_like(k, k.options().dtype(at::kFloat)), grad_v = at::zeros_like(grad_k);
  const AttentionGradient job{grad.const_data_ptr(),    q.const_data_ptr(),        k.const_data_ptr(),
                              v.const_data_ptr(),       out.const_data_ptr(),      lse.const_data_ptr<float>(),
                              grad_q.data_ptr(),        grad_k.data_ptr<float>(),  grad_v.data_ptr<float>()};
  const auto groups = groups_of(segments);
  std::vector<int64_t> work;
  for (const auto& group : groups) {
    int64_t scores = 0;
    for (const int64_t s : group) scores += segments.work(s);
    work.insert(work.end(), heads.key_heads, scores * heads.group() * heads.size * 5);
  }
  const auto run = pick_attention_rows_backward();
  share_out(work, attention_backward_scratch(heads), [&](int64_t i, float* scratch) {
    for (const int64_t s : groups[i / heads.key_heads])
      for (int64_t t = 0; t < segments.length(s); t += heads.chunk_tokens()) {
        const int64_t tokens = std::min(heads.chunk_tokens(), segments.length(s) - t);
        const Rows rows{segments.begin(s) + t, tokens, segments.shared(s) + t + 1};
        run(job, heads, segments.keys(s), rows, i % heads.key_heads, scratch);
      }
  });
  return {grad_q, grad_k.to(k.scalar_type()), grad_v.to(v.scalar_type())};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("attention_backward", &engine::attention_backward); }
#endif
