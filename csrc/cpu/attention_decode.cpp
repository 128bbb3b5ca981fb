// Attention of one new row a sequence over pages: the row function of attention.cpp, its keys addressed by page.
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
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads.key_heads; ++h) work.push_back(length[r] * heads.size * (heads.group() * 2 + 16));
  const auto run = pick_attention_rows();
  share_out(work, attention_scratch(heads), [&](int64_t i, float* scratch) {
    const int64_t r = i / heads.key_heads;
    const Keys keys{0, 0, 0, table + r * page_table.size(1), page};
    run(job, heads, keys, Rows{r, 1, length[r]}, i % heads.key_heads, scratch);
  });
  return out;
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("attention_decode", &engine::attention_decode); }
