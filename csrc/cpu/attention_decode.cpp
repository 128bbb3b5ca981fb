// Attention of one new row a sequence over pages: every sum of attention.cpp, in its order. With one row a sequence
// reading the keys is the work: all heads go over a block together, which is fetched while they go over the one before,
// and nothing is copied but the keys' transposition.
#include "attention_rows.h"

#ifdef ENGINE_CLASS
#include "attention_chunk.h"

namespace engine::ENGINE_CLASS {
namespace {

constexpr int kRowsAtOnce = 4;                      // query heads of one key head
constexpr int kVectors = kLanes == 16 ? 4 : 2;      // beside them in registers
constexpr int64_t kMostOffsets = kKeyBlock;

// Keys as 32-bit words, one channel or two of bf16, transposed: to[word * kKeyBlock + i] of row i.
template <typename T>
ENGINE_INLINE void pack_words(const Stored<T>& rows, float* to) {
  const int64_t words = rows.size * static_cast<int64_t>(sizeof(T)) / 4;
  for (int64_t first = 0; first < padded(rows.count); first += kLanes)
    for (int64_t w = 0; w < words; w += kLanes) {
      vfloat row[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        row[i] = vfloat{};
        if (first + i < rows.count)
          std::memcpy(&row[i], reinterpret_cast<const char*>(rows.base + rows.offset[first + i]) + 4 * w, sizeof(vfloat));
      }
      transpose(row);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (w + i) * kKeyBlock + first, row[i]);
    }
}

// Scores of R rows with V vectors of keys: a chain over the channels in order, as tile_product's.
template <typename T, int R, int V>
static void score_keys(const float* query, const float* keys, int64_t size, float* score) {
  vfloat sum[R][V] = {};
  for (int64_t d = 0; d < size; d += 4 / sizeof(T), keys += kKeyBlock) {
    vfloat low[V], high[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      low[v] = high[v] = load(keys + v * kLanes);
      if constexpr (sizeof(T) == 2) {
        const vuint words = (vuint)low[v], up = words << 16, down = words & 0xffff0000u;
        low[v] = (vfloat)up, high[v] = (vfloat)down;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vfloat x = splat(query[d * kTile + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += x * low[v];
    }
    if constexpr (sizeof(T) == 2) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vfloat x = splat(query[(d + 1) * kTile + r]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] += x * high[v];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(score + r * kKeyBlock + v * kLanes, sum[r][v]);
}

// sum (R, V vectors) += weights (R, count) values (count, V vectors), a chain over the keys in order.
template <typename T, int R, int V>
static void add_values(const float* weight, const Stored<T>& values, int64_t channel, float* sum, int64_t wide) {
  vfloat acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = load(sum + r * wide + v * kLanes);
  for (int64_t i = 0; i < values.count; ++i) {
    const T* row = values.base + values.offset[i] + channel;
    vfloat x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(row + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vfloat p = splat(weight[r * kKeyBlock + i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += p * x[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sum + r * wide + v * kLanes, acc[r][v]);
}

// R rows of a chunk, from `r` on, over one block of keys.
template <typename T, int R>
static void rows_over_block(const Chunk& chunk, int64_t r, int64_t seen, const float* keys, const Stored<T>& values,
                            float* score) {
  const int64_t count = padded(values.count);
  const float* query = chunk.query + r / kTile * chunk.size * kTile + r % kTile;
  int64_t n = 0;
  for (; n + kVectors * kLanes <= count; n += kVectors * kLanes)
    score_keys<T, R, kVectors>(query, keys + n, chunk.size, score + n);
  for (; n < count; n += kLanes) score_keys<T, R, 1>(query, keys + n, chunk.size, score + n);
  for (int i = 0; i < R; ++i) soften_row(score + i * kKeyBlock, count, seen, chunk, r + i);
  float* sum = chunk.sum + r * chunk.wide;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= chunk.size; d += kVectors * kLanes)
    add_values<T, R, kVectors>(score, values, d, sum + d, chunk.wide);
  for (; d < chunk.size; d += kLanes) add_values<T, R, 1>(score, values, d, sum + d, chunk.wide);
}

template <typename T>
ENGINE_INLINE void head_over_block(const Chunk& chunk, int64_t group, int64_t seen, const float* keys,
                                   const Stored<T>& values, float* score) {
  for (int64_t r = 0; r < group; r += kRowsAtOnce) {
    switch (group - r) {
      case 1: rows_over_block<T, 1>(chunk, r, seen, keys, values, score); break;
      case 2: rows_over_block<T, 2>(chunk, r, seen, keys, values, score); break;
      case 3: rows_over_block<T, 3>(chunk, r, seen, keys, values, score); break;
      default: rows_over_block<T, 4>(chunk, r, seen, keys, values, score);
    }
  }
}

// The lines of some heads' keys or values of a block: they come from memory.
template <typename T>
ENGINE_INLINE void fetch_rows(const Stored<T>& rows) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const char* row = reinterpret_cast<const char*>(rows.base + rows.offset[i]);
    for (int64_t at = 0; at < rows.size * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

template <typename T>
ENGINE_INLINE void run_row(const Attention& job, const Heads& heads, const Keys& keys, int64_t token, int64_t visible,
                           int64_t head0, int64_t head1, float* scratch) {
  const int64_t size = heads.size, group = heads.group(), most_rows = (group + kMaxTile - 1) / kMaxTile * kMaxTile;
  float *words = scratch, *score = words + kKeyBlock * padded(size), *states = score + kMaxTile * kKeyBlock;
  const int64_t state = most_rows * (2 * padded(size) + 16 + 2);
  const auto chunk_of = [&](int64_t h) { return Chunk(group, most_rows, size, states + (h - head0) * state); };
  const T *k = static_cast<const T*>(job.k), *v = static_cast<const T*>(job.v);
  const T* query = static_cast<const T*>(job.q) + token * heads.query_heads * size;
  int64_t offset[2][kMostOffsets];
  key_offsets(keys, heads, 0, 0, visible < kKeyBlock ? visible : kKeyBlock, offset[0]);
  for (int64_t h = head0; h < head1; ++h) {
    const Chunk chunk = chunk_of(h);
    for (int64_t r = 0; r < group; ++r) start_row(chunk, r, query + (h * group + r) * size);
  }
  for (int64_t first = 0, side = 0; first < visible; first += kKeyBlock, side = 1 - side) {
    const int64_t seen = visible - first, count = seen < kKeyBlock ? seen : kKeyBlock;
    const int64_t left = seen - count, next = left < kKeyBlock ? left : kKeyBlock;
    if (next > 0) key_offsets(keys, heads, 0, first + kKeyBlock, next, offset[1 - side]);
    for (int64_t h = head0; h < head1; ++h) {
      fetch_rows(Stored<T>{k + h * size, offset[1 - side], next, size});
      fetch_rows(Stored<T>{v + h * size, offset[1 - side], next, size});
      pack_words(Stored<T>{k + h * size, offset[side], count, size}, words);
      head_over_block(chunk_of(h), group, seen, words, Stored<T>{v + h * size, offset[side], count, size}, score);
    }
  }
  for (int64_t h = head0; h < head1; ++h) finish_chunk<T>(job, heads, {token, 1, visible}, h, chunk_of(h));
}

}  // namespace

void attention_decode_row(const Attention& job, const Heads& heads, const Keys& keys, int64_t token, int64_t visible,
                          int64_t head0, int64_t head1, float* scratch) {
  const int64_t words = heads.size * (heads.bf16 ? 2 : 4) / 4;
  if (words * 4 != heads.size * (heads.bf16 ? 2 : 4) || words % kLanes != 0) {  // heads that do not fill vectors
    for (int64_t h = head0; h < head1; ++h) attention_rows(job, heads, keys, {token, 1, visible}, h, scratch);
    return;
  }
  with_type(heads.bf16, [&]<typename T>(T*) { run_row<T>(job, heads, keys, token, visible, head0, head1, scratch); });
}

}  // namespace engine::ENGINE_CLASS
#else

#include <torch/library.h>

#include "attention_host.h"

namespace engine {
namespace {

// page_table (R, max pages), lengths (R,): every page that a length reaches exists.
void check_pages(const at::Tensor& page_table, const at::Tensor& lengths, int64_t rows, int64_t pages, int64_t page) {
  check_cpu_contiguous(page_table, "page_table");
  check_dtype(page_table, at::kInt, "page_table");
  check_cpu_contiguous(lengths, "lengths");
  check_dtype(lengths, at::kInt, "lengths");
  TORCH_CHECK_VALUE(page_table.dim() == 2 && page_table.size(0) == rows, "page_table: got shape ", page_table.sizes(),
                    ", want (", rows, ", max pages)");
  TORCH_CHECK_VALUE(lengths.dim() == 1 && lengths.size(0) == rows, "lengths: got shape ", lengths.sizes(), ", want (",
                    rows, ",)");
  const int64_t most = page_table.size(1);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t length = lengths.const_data_ptr<int32_t>()[r];
    TORCH_CHECK_VALUE(length >= 1 && length <= most * page, "lengths[", r, "]: got ", length, ", want 1 ... ",
                      most * page, " (pages x page)");
    const int32_t* table = page_table.const_data_ptr<int32_t>() + r * most;
    for (int64_t i = 0; i * page < length; ++i)
      TORCH_CHECK_VALUE(table[i] >= 0 && table[i] < pages, "page_table[", r, "][", i, "]: got ", table[i],
                        ", want 0 ... ", pages - 1);
  }
}

at::Tensor attention_decode(const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& v_pages,
                            const at::Tensor& page_table, const at::Tensor& lengths) {
  const Heads heads = check_heads(q, k_pages, v_pages, 4);
  const int64_t rows = q.size(0), page = k_pages.size(1);
  TORCH_CHECK_VALUE(page > 0, "k_pages: got pages of 0 keys, want 1 or more");
  check_pages(page_table, lengths, rows, k_pages.size(0), page);
  at::Tensor out = at::empty_like(q);
  const Attention job{q.const_data_ptr(), k_pages.const_data_ptr(), v_pages.const_data_ptr(), out.data_ptr(), nullptr};
  const int32_t *table = page_table.const_data_ptr<int32_t>(), *length = lengths.const_data_ptr<int32_t>();
  std::vector<int64_t> work;
  const int64_t parts = rows >= 2 * at::get_num_threads() ? 1 : heads.key_heads, each = heads.key_heads / parts;
  for (int64_t i = 0; i < rows * parts; ++i)
    work.push_back(length[i / parts] * each * heads.size * (heads.group() * 2 + 16));
  const auto run = pick_attention_decode_row();
  share_out(work, attention_decode_scratch(heads), [&](int64_t i, float* scratch) {
    const int64_t r = i / parts, head = i % parts * each;
    const Keys keys{0, 0, 0, table + r * page_table.size(1), page};
    run(job, heads, keys, r, length[r], head, head + each, scratch);
  });
  return out;
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("attention_decode", &engine::attention_decode); }
#endif
