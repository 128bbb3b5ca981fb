// Attention of one new row a sequence over pages: every sum of attention.cpp, in its order. With one row a sequence
// reading the keys is the work: all heads go over a block together, and while one region of memory is read the next is
// fetched, line for line (a head's keys and values of a page are regions of one size).
#include "attention_rows.h"

#ifdef ENGINE_CLASS
#include "attention_chunk.h"

namespace engine::ENGINE_CLASS {
namespace {

constexpr int kRowsAtOnce = 4;  // query heads of one key head
constexpr int64_t kLine = 64;

constexpr int kPageVectors = static_cast<int>(kPage / kLanes);

// Vectors beside R rows in registers, with enough sums in flight. With 8 lanes there are 16 registers, and a sum of 3 rows
// by 4 vectors that lies in memory instead doubles the loop's time.
constexpr int vectors_beside(int R) { return kLanes != 8 ? 4 : R == 1 ? 8 : R == 2 ? 4 : R == 3 ? 3 : 2; }

// One head's keys and values of a block, by page, and the keys that will be read next.
struct BlockOfHead {
  const char *keys[kBlockPages], *values[kBlockPages], *next[kBlockPages];
  int64_t count;  // keys
};

// Scores of R rows with V vectors of keys from vector `first` on, its place in its page kPlace: a chain over the channels
// in order, as tile_product's.
template <typename S, int R, int V, int kPlace = 0>
static void score_keys(const float* query, const BlockOfHead& block, int64_t first, int64_t size, float* score) {
  constexpr int w = kOfWord<S>, kPages = (kPlace + V + kPageVectors - 1) / kPageVectors;
  const char *page[kPages], *ahead[kPages];
#pragma GCC unroll 4
  for (int g = 0; g < kPages; ++g)
    page[g] = block.keys[first / kPageVectors + g], ahead[g] = block.values[first / kPageVectors + g];
  vfloat sum[R][V] = {};
  for (int64_t word = 0, at = 0; word < size / w; ++word, at += 4 * kPage) {
#pragma GCC unroll 4
    for (int g = 0; g < kPages; ++g) __builtin_prefetch(ahead[g] + at);
#pragma GCC unroll 2
    for (int part = 0; part < w; ++part, query += kTile) {
      vfloat x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = splat(query[r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const int place = kPlace + v;
        const vfloat key = part_of<S>(page[place / kPageVectors] + at + place % kPageVectors * 4 * kLanes, part);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][v] += x[r] * key;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(score + r * kKeyBlock + v * kLanes, sum[r][v]);
}

// Scores of R rows with `vectors` vectors of keys, whole pages, V at a time.
template <typename S, int R, int V>
ENGINE_INLINE void score_block(const float* query, const BlockOfHead& block, int64_t vectors, int64_t size,
                               float* score) {
  int64_t n = 0;
  for (; n + V <= vectors; n += V) {
    if (n % kPageVectors == 0)
      score_keys<S, R, V>(query, block, n, size, score + n * kLanes);
    else
      score_keys<S, R, V, V % kPageVectors>(query, block, n, size, score + n * kLanes);
  }
  for (; n < vectors; n += n % kPageVectors == 0 ? kPageVectors : 1) {
    if (n % kPageVectors == 0)
      score_keys<S, R, kPageVectors>(query, block, n, size, score + n * kLanes);
    else
      score_keys<S, R, 1, V % kPageVectors>(query, block, n, size, score + n * kLanes);
  }
}

// sum[r] += weight[r] * (V vectors of one value), w values a word.
template <typename S, int R, int V, int kParts>
ENGINE_INLINE void add_word(const float* weight, const char* words, vfloat (&sum)[R][V]) {
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    vfloat p[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) p[r] = splat(weight[r * kKeyBlock + part]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const vfloat value = part_of<S>(words + 4 * kLanes * v, part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][v] += p[r] * value;
    }
  }
}

// sum (R, V vectors from `channel` on) += weights (R, count) values: a chain over the keys in order.
template <typename S, int R, int V>
static void add_values(const float* weight, const BlockOfHead& block, int64_t channel, int64_t size, float* sum,
                       int64_t wide) {
  constexpr int w = kOfWord<S>;
  vfloat acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = load(sum + r * wide + v * kLanes);
  for (int64_t first = 0, left = block.count; left > 0; first += kPage, left -= kPage, weight += kPage) {
    const char *page = block.values[first / kPage], *ahead = block.next[first / kPage];
    const int64_t count = left < kPage ? left : kPage;
    int64_t i = 0, at = 4 * channel;
    for (; i + w <= count; i += w, at += 4 * size) {
#pragma GCC unroll 8
      for (int64_t line = 0; line < 4 * kLanes * V; line += kLine) __builtin_prefetch(ahead + at + line);
      add_word<S, R, V, w>(weight + i, page + at, acc);
    }
    if (i < count) add_word<S, R, V, 1>(weight + i, page + at, acc);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(sum + r * wide + v * kLanes, acc[r][v]);
}

// R rows of a chunk, from `r` on, over one block of keys.
template <typename S, int R>
static void rows_over_block(const Chunk& chunk, int64_t r, int64_t seen, const BlockOfHead& block, float* score) {
  constexpr int V = vectors_beside(R);
  const int64_t count = padded(block.count);
  const float* query = chunk.query + r / kTile * chunk.size * kTile + r % kTile;
  score_block<S, R, V>(query, block, count / kLanes, chunk.size, score);
  for (int i = 0; i < R; ++i) soften_row(score + i * kKeyBlock, count, seen, chunk, r + i);
  float* sum = chunk.sum + r * chunk.wide;
  int64_t d = 0;
  for (; d + V * kLanes <= chunk.size; d += V * kLanes)
    add_values<S, R, V>(score, block, d, chunk.size, sum + d, chunk.wide);
  if constexpr (V > 2)
    for (; d + 2 * kLanes <= chunk.size; d += 2 * kLanes)
      add_values<S, R, 2>(score, block, d, chunk.size, sum + d, chunk.wide);
  for (; d < chunk.size; d += kLanes) add_values<S, R, 1>(score, block, d, chunk.size, sum + d, chunk.wide);
}

template <typename S>
ENGINE_INLINE void head_over_block(const Chunk& chunk, int64_t group, int64_t seen, const BlockOfHead& block,
                                   float* score) {
  for (int64_t r = 0; r < group; r += kRowsAtOnce) {
    switch (group - r) {
      case 1: rows_over_block<S, 1>(chunk, r, seen, block, score); break;
      case 2: rows_over_block<S, 2>(chunk, r, seen, block, score); break;
      case 3: rows_over_block<S, 3>(chunk, r, seen, block, score); break;
      default: rows_over_block<S, 4>(chunk, r, seen, block, score);
    }
  }
}

// The states of one row's heads, one after the other.
struct States {
  int64_t group, most_rows, size, head0;
  float* scratch;
  States(const Heads& heads, int64_t head0, float* scratch)
      : group(heads.group()), most_rows((group + kMaxTile - 1) / kMaxTile * kMaxTile), size(heads.size), head0(head0),
        scratch(scratch) {}
  Chunk of(int64_t h) const {
    return Chunk(group, most_rows, size, scratch + (h - head0) * most_rows * (2 * padded(size) + 16 + 2));
  }
};

template <typename T>
ENGINE_INLINE void start_head(const Attention& job, const Heads& heads, int64_t token, int64_t h, const Chunk& chunk) {
  const T* query = static_cast<const T*>(job.q) + (token * heads.query_heads + h * heads.group()) * heads.size;
  for (int64_t r = 0; r < heads.group(); ++r) start_row(chunk, r, query + r * heads.size);
}

// One row's heads [head0, head1) over its keys from `from` on, the start of a block.
template <typename S>
ENGINE_INLINE void row_over_blocks(const Attention& job, const Heads& heads, const Keys& keys, int64_t from,
                                   int64_t visible, int64_t head0, int64_t head1, const States& states, float* score) {
  const int64_t region = page_head_bytes(heads.size, sizeof(S) == 2), pages = (visible + kPage - 1) / kPage;
  const auto place = [&](const void* base, int64_t page, int64_t h) {  // behind the last page: what is read next
    const int64_t behind = page - (pages + kBlockPages - 1) / kBlockPages * kBlockPages;
    const int64_t number = page < pages                               ? keys.pages[page]
                           : behind >= 0 && behind < keys.then_pages ? keys.then[behind]
                                                                     : keys.pages[pages - 1];
    return static_cast<const char*>(base) + (number * heads.key_heads + h) * region;
  };
  for (int64_t i = from / kPage; i < from / kPage + kBlockPages && i < pages; ++i)
    for (int64_t at = 0; at < region; at += kLine) __builtin_prefetch(place(job.k, i, head0) + at);
  for (int64_t first = from; first < visible; first += kKeyBlock) {
    const int64_t seen = visible - first, page = first / kPage;
    for (int64_t h = head0; h < head1; ++h) {
      BlockOfHead block;
      block.count = seen < kKeyBlock ? seen : kKeyBlock;
      const int64_t next_head = h + 1 < head1 ? h + 1 : head0, next_page = h + 1 < head1 ? page : page + kBlockPages;
      for (int64_t i = 0; i < kBlockPages; ++i) {
        block.keys[i] = place(job.k, page + i, h), block.values[i] = place(job.v, page + i, h);
        block.next[i] = place(job.k, next_page + i, next_head);
      }
      head_over_block<S>(states.of(h), heads.group(), seen, block, score);
    }
  }
}

template <typename T, typename S>
ENGINE_INLINE void run_row(const Attention& job, const Heads& heads, const Keys& keys, int64_t token, int64_t visible,
                           int64_t head0, int64_t head1, float* scratch) {
  const States states(heads, head0, scratch + kMaxTile * kKeyBlock);
  for (int64_t h = head0; h < head1; ++h) start_head<T>(job, heads, token, h, states.of(h));
  row_over_blocks<S>(job, heads, keys, 0, visible, head0, head1, states, scratch);
  for (int64_t h = head0; h < head1; ++h) finish_chunk<T>(job, heads, {token, 1, visible}, h, states.of(h));
}

template <typename T, typename S>
ENGINE_INLINE void run_group(const Attention& job, const Heads& heads, const RowGroup& group, int64_t h,
                             float* scratch) {
  const int64_t each = heads.group(), wide = padded(heads.size);
  const Keys common{sizeof(S) == 2, 0, 0, 0, group.pages};
  const Chunk shared = rows_over_first_keys<T, S>(job, heads, common, {group.token, group.rows, group.shared}, h,
                                                  group.shared, scratch);
  float* const score = scratch + attention_scratch(heads);
  const States states(heads, h, score + kMaxTile * kKeyBlock);
  const Chunk own = states.of(h);
  for (int64_t i = 0; i < group.rows; ++i) {
    const int64_t token = group.token + i, visible = group.position[i] + 1;
    start_head<T>(job, heads, token, h, own);
    const float* const sum = shared.sum + i * each * wide;  // goes on from what the row has seen so far
    for (int64_t j = 0; j < each * wide; j += kLanes) store(own.sum + j, load(sum + j));
    for (int64_t j = 0; j < each * kLanes; j += kLanes)
      store(own.weight + j, load(shared.weight + i * each * kLanes + j));
    for (int64_t r = 0; r < each; ++r) own.most[r] = shared.most[i * each + r];
    const Keys keys{sizeof(S) == 2, 0, 0, 0, group.pages + i * group.most_pages};
    row_over_blocks<S>(job, heads, keys, group.shared, visible, h, h + 1, states, score);
    finish_chunk<T>(job, heads, {token, 1, visible}, h, own);
  }
}

}  // namespace

void attention_decode_row(const Attention& job, const Heads& heads, const Keys& keys, int64_t token, int64_t visible,
                          int64_t head0, int64_t head1, float* scratch) {
  if (heads.size % kLanes != 0) {  // channels that do not fill vectors
    for (int64_t h = head0; h < head1; ++h) attention_rows(job, heads, keys, {token, 1, visible}, h, scratch);
    return;
  }
  with_type(heads.bf16, [&]<typename T>(T*) {
    with_type(keys.bf16, [&]<typename S>(S*) {
      if constexpr (sizeof(S) <= sizeof(T))
        run_row<T, S>(job, heads, keys, token, visible, head0, head1, scratch);
    });
  });
}

void attention_decode_group(const Attention& job, const Heads& heads, bool pages_bf16, const RowGroup& group,
                            int64_t key_head, float* scratch) {
  if (heads.size % kLanes != 0) {
    for (int64_t i = 0; i < group.rows; ++i) {
      const Keys keys{pages_bf16, 0, 0, 0, group.pages + i * group.most_pages};
      attention_rows(job, heads, keys, {group.token + i, 1, group.position[i] + 1}, key_head, scratch);
    }
    return;
  }
  with_type(heads.bf16, [&]<typename T>(T*) {
    with_type(pages_bf16, [&]<typename S>(S*) {
      if constexpr (sizeof(S) <= sizeof(T)) run_group<T, S>(job, heads, group, key_head, scratch);
    });
  });
}

void attention_page_write(const void* k, const void* v, const Heads& heads, bool pages_bf16, int64_t slot,
                          void* k_page, void* v_page) {
  with_type(heads.bf16, [&]<typename T>(T*) {
    with_type(pages_bf16, [&]<typename S>(S*) {
      for (int64_t h = 0; h < heads.key_heads; ++h) {
        const int64_t from = h * heads.size, to = from * kPage;
        write_head(static_cast<const T*>(k) + from, static_cast<const T*>(v) + from, heads.size, slot,
                   static_cast<S*>(k_page) + to, static_cast<S*>(v_page) + to);
      }
    });
  });
}

}  // namespace engine::ENGINE_CLASS
#else

#include <torch/library.h>

#include "attention_host.h"

namespace engine {
namespace {

// page_table (R, max pages), lengths (R,): every page that a length reaches exists.
void check_pages(const at::Tensor& page_table, const at::Tensor& lengths, int64_t rows, int64_t pages) {
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
    TORCH_CHECK_VALUE(length >= 1 && length <= most * kPage, "lengths[", r, "]: got ", length, ", want 1 ... ",
                      most * kPage, " (pages x page)");
    const int32_t* table = page_table.const_data_ptr<int32_t>() + r * most;
    for (int64_t i = 0; i * kPage < length; ++i)
      TORCH_CHECK_VALUE(table[i] >= 0 && table[i] < pages, "page_table[", r, "][", i, "]: got ", table[i],
                        ", want 0 ... ", pages - 1);
  }
}

struct HeadTask {
  RowGroup group;
  int64_t head0, head1;
};

std::vector<int64_t> positions_of(const at::Tensor& lengths) {
  const int32_t* const length = lengths.const_data_ptr<int32_t>();
  std::vector<int64_t> positions(length, length + lengths.size(0));
  for (int64_t& position : positions) --position;
  return positions;
}

// Rows that share keys go together, head by head; another row is one task, or one a head where there are few.
std::vector<HeadTask> tasks_of(const at::Tensor& page_table, const std::vector<int64_t>& positions, const Heads& heads) {
  const int64_t rows = page_table.size(0), most_pages = page_table.size(1), most = most_rows_of_group(rows, heads);
  const int64_t each = rows >= 2 * at::get_num_threads() ? heads.key_heads : 1;
  std::vector<HeadTask> tasks;
  for (int64_t r = 0; r < rows;) {
    const int32_t* const pages = page_table.const_data_ptr<int32_t>() + r * most_pages;
    const RowGroup group = first_group({r, rows - r, 0, positions.data() + r, pages, most_pages}, most);
    const int64_t heads_of_task = group.rows > 1 ? 1 : each;
    for (int64_t h = 0; h < heads.key_heads; h += heads_of_task) tasks.push_back({group, h, h + heads_of_task});
    r += group.rows;
  }
  return tasks;
}

at::Tensor attention_decode(const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& v_pages,
                            const at::Tensor& page_table, const at::Tensor& lengths) {
  check_cpu_contiguous(q, "q");
  check_activation(q, "q");
  TORCH_CHECK_VALUE(q.dim() == 3 && k_pages.dim() == 5, "q, k_pages: got shapes ", q.sizes(), ", ", k_pages.sizes(),
                    ", want (R, Hq, D), (P, Hk, D / w, 16, w)");
  const Heads heads{is_bf16(q), q.size(1), k_pages.size(1), q.size(2)};
  TORCH_CHECK_VALUE(heads.size > 0 && heads.key_heads > 0 && heads.query_heads % heads.key_heads == 0, "q: got shape ",
                    q.sizes(), ", want a multiple of the ", heads.key_heads, " key heads");
  check_pages_of_heads(k_pages, v_pages, heads);
  const int64_t rows = q.size(0);
  check_pages(page_table, lengths, rows, k_pages.size(0));
  at::Tensor out = at::empty_like(q);
  const Attention job{q.const_data_ptr(), k_pages.const_data_ptr(), v_pages.const_data_ptr(), out.data_ptr(), nullptr};
  const std::vector<int64_t> positions = positions_of(lengths);
  const std::vector<HeadTask> tasks = tasks_of(page_table, positions, heads);
  std::vector<int64_t> work;
  for (const HeadTask& t : tasks)
    work.push_back(t.group.rows * (t.group.position[0] + 1) * (t.head1 - t.head0) * heads.size *
                   (heads.group() * 2 + 4));
  share_out(work, attention_decode_scratch(heads), [&](int64_t i, float* scratch) {
    const auto& [group, head0, head1] = tasks[i];
    if (group.rows > 1) {
      pick_attention_decode_group()(job, heads, is_bf16(k_pages), group, head0, scratch);
      return;
    }
    const Keys keys{is_bf16(k_pages), 0, 0, 0, group.pages};
    pick_attention_decode_row()(job, heads, keys, group.token, group.position[0] + 1, head0, head1, scratch);
  });
  return out;
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("attention_decode", &engine::attention_decode); }
#endif
