// The host's half of attention: checks at the border, and work shared out over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "activation.h"
#include "attention_rows.h"

namespace engine {

// q (rows, Hq, D) and k, v (rows, Hk, D), all of one dtype.
inline Heads check_heads(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  check_cpu_contiguous(q, "q");
  check_activation(q, "q");
  check_cpu_contiguous(k, "k");
  check_dtype(k, q.scalar_type(), "k");
  check_activation_like(v, k, "v");
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3, "q, k: got shapes ", q.sizes(), ", ", k.sizes(),
                    ", want (N, Hq, D), (N, Hk, D)");
  const Heads heads{is_bf16(q), q.size(1), k.size(1), q.size(2)};
  TORCH_CHECK_VALUE(k.size(2) == heads.size && heads.size > 0, "k: got head size ", k.size(2), ", want ", heads.size,
                    ", above 0");
  TORCH_CHECK_VALUE(heads.key_heads > 0 && heads.query_heads % heads.key_heads == 0, "q: got ", heads.query_heads,
                    " heads, want a multiple of the ", heads.key_heads, " key heads");
  return heads;
}

// Pages of keys (P, Hk, D / w, 16, w) and of values (P, Hk, 16 / w, D, w), w = 1 float32 or 2 bfloat16.
inline void check_pages_of_heads(const at::Tensor& keys, const at::Tensor& values, const Heads& heads) {
  check_cpu_contiguous(keys, "k_pages");
  check_activation(keys, "k_pages");
  check_cpu_contiguous(values, "v_pages");
  check_dtype(values, keys.scalar_type(), "v_pages");
  const int64_t w = is_bf16(keys) ? 2 : 1, count = keys.dim() > 0 ? keys.size(0) : 0;
  TORCH_CHECK_VALUE(heads.size % w == 0, "k_pages: got head size ", heads.size, ", want an even one for bfloat16 pages");
  TORCH_CHECK_VALUE(!heads.bf16 || w == 2, "k_pages: got float32, want bfloat16 as the queries");
  const std::vector<int64_t> of_keys{count, heads.key_heads, heads.size / w, kPage, w};
  const std::vector<int64_t> of_values{count, heads.key_heads, kPage / w, heads.size, w};
  TORCH_CHECK_VALUE(keys.sizes() == at::IntArrayRef(of_keys), "k_pages: got shape ", keys.sizes(), ", want ",
                    at::IntArrayRef(of_keys));
  TORCH_CHECK_VALUE(values.sizes() == at::IntArrayRef(of_values), "v_pages: got shape ", values.sizes(), ", want ",
                    at::IntArrayRef(of_values));
}

// The segments of a batch and whose keys each one sees before its own.
struct Segments {
  const int32_t* offset;
  const int32_t* prefix;  // or null
  int64_t count;
  bool bf16;
  int64_t begin(int64_t s) const { return offset[s]; }
  int64_t length(int64_t s) const { return offset[s + 1] - offset[s]; }
  int64_t owner(int64_t s) const { return prefix ? prefix[s] : s; }
  int64_t shared(int64_t s) const { return owner(s) == s ? 0 : length(owner(s)); }
  Keys keys(int64_t s) const { return Keys{bf16, begin(owner(s)), shared(s), begin(s), nullptr}; }
  // Scores of a key head and one query head.
  int64_t work(int64_t s) const { return length(s) * (shared(s) + (length(s) + 1) / 2); }
};

inline Segments check_segments(const at::Tensor& cu, const std::optional<at::Tensor>& prefix, int64_t rows,
                               bool bf16) {
  check_offsets(cu, rows, "cu");
  const int64_t count = cu.size(0) - 1;
  if (!prefix) return {cu.const_data_ptr<int32_t>(), nullptr, count, bf16};
  check_cpu_contiguous(*prefix, "prefix");
  check_dtype(*prefix, at::kInt, "prefix");
  TORCH_CHECK_VALUE(prefix->dim() == 1 && prefix->size(0) == count, "prefix: got shape ", prefix->sizes(), ", want (",
                    count, ",)");
  const int32_t* owner = prefix->const_data_ptr<int32_t>();
  for (int64_t s = 0; s < count; ++s)
    TORCH_CHECK_VALUE(owner[s] >= 0 && owner[s] <= s && owner[owner[s]] == owner[s], "prefix[", s, "]: got ", owner[s],
                      ", want ", s, " (no prefix) or an earlier segment without a prefix");
  return {cu.const_data_ptr<int32_t>(), owner, count, bf16};
}

// The first of some decoding rows, and those behind it that lie in the same pages with as many whole blocks of keys as the
// second: at most `most` rows.
inline RowGroup first_group(const RowGroup& rows, int64_t most) {
  const auto shared_with = [&](int64_t row) {
    const int32_t* const pages = rows.pages + row * rows.most_pages;
    const int64_t blocks = (std::min(rows.position[0], rows.position[row]) + 1) / kKeyBlock;
    return std::mismatch(pages, pages + blocks * kBlockPages, rows.pages).first - pages;
  };
  const int64_t shared = rows.rows > 1 ? shared_with(1) / kBlockPages * kKeyBlock : 0;
  RowGroup group = rows;
  group.rows = 1, group.shared = shared;
  if (shared > 0)
    while (group.rows < std::min(rows.rows, most) && shared_with(group.rows) * kPage >= shared) ++group.rows;
  return group;
}

// Rows that are worth one task: several tasks a thread, and what the kernel takes.
inline int64_t most_rows_of_group(int64_t rows, const Heads& heads) {
  return std::clamp<int64_t>(rows * heads.key_heads / (4 * at::get_num_threads()), 2, heads.chunk_tokens());
}

// run(task, scratch) for every task, the largest first, each thread taking the next one when it is free. Which thread
// runs a task changes nothing: tasks write to places of their own.
template <typename Run>
void share_out(const std::vector<int64_t>& work, int64_t scratch_floats, Run run) {
  constexpr int64_t kWorkPerThread = 1 << 19;  // multiply-adds, some 20 us: less is not worth a thread
  const int64_t tasks = static_cast<int64_t>(work.size());
  const int64_t total = std::accumulate(work.begin(), work.end(), int64_t{0});
  const int64_t useful = std::max<int64_t>(1, std::min(tasks, total / kWorkPerThread));
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), useful);
  std::vector<int64_t> order(work.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work[a] > work[b]; });
  const int64_t stride = (scratch_floats + 15) / 16 * 16;
  at::Tensor scratch = at::empty({threads, stride}, at::kFloat);
  float* base = scratch.data_ptr<float>();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) run(order[i], base + begin * stride);
  });
}

}  // namespace engine
