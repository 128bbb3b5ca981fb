// Attention's forward; the equation is in kernels/attention.py, the order of its sums in attention_rows.h.
#include "attention_rows.h"

#ifdef ENGINE_CLASS
#include "attention_chunk.h"

namespace engine::ENGINE_CLASS {
namespace {

template <typename T, typename S>
ENGINE_INLINE void run_chunk(const Attention& job, const Heads& heads, const Keys& keys, const Rows& rows,
                             int64_t key_head, float* scratch) {
  const int64_t last = rows.visible + rows.tokens - 1;
  finish_chunk<T>(job, heads, rows, key_head,
                  rows_over_first_keys<T, S>(job, heads, keys, rows, key_head, last, scratch));
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

struct QueryTask {
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
  std::vector<QueryTask> tasks;
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
