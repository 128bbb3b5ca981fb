// Sums over the rows of a batch (the gradients of a norm's weights) that do not depend on the number of threads.
#pragma once

#include "tensors.h"

namespace engine {

// Rows of an activation as bytes.
struct RowsIn {
  char* base;
  int64_t stride;
  bool bf16;
  explicit RowsIn(const at::Tensor& t)
      : base(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))),
        stride(t.size(-1) * t.element_size()),
        bf16(t.scalar_type() == at::kBFloat16) {}
  char* row(int64_t r) const { return base + r * stride; }
};

// run(begin, end, partial) adds its rows to partial (width,). The cut into partial sums follows from the number of
// rows alone, and they are added in order.
template <typename Run>
at::Tensor sum_over_rows(int64_t rows, int64_t width, Run run) {
  constexpr int64_t kMaxParts = 64, kMinRows = 32;
  const int64_t part_rows = std::max(kMinRows, (rows + kMaxParts - 1) / kMaxParts);
  const int64_t parts = (rows + part_rows - 1) / part_rows;
  at::Tensor partial = at::zeros({parts, width}, at::kFloat);
  float* p = partial.data_ptr<float>();
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      run(i * part_rows, std::min(rows, (i + 1) * part_rows), p + i * width);
  });
  at::Tensor total = at::zeros({width}, at::kFloat);
  float* sum = total.data_ptr<float>();
  for (int64_t i = 0; i < parts; ++i)
    for (int64_t c = 0; c < width; ++c) sum[c] += p[i * width + c];
  return total;
}

}  // namespace engine
