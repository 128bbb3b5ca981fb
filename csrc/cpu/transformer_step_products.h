// A phase of products of transformer_step as tasks. Host half only.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"

namespace engine {

struct ProductTask {
  size_t weight;  // which of the phase's
  Part part;
};

// Products of the same rows with weights of `columns` each. Columns rather than rows are shared out, so that each thread
// reads weights of its own; each task is a share of what is left, so that the last ones are small and no thread waits
// long for another.
inline std::vector<ProductTask> cut_products(int64_t rows, const std::vector<int64_t>& columns, Arithmetic arithmetic,
                                             int64_t threads) {
  const int64_t pair = 2 * pick_panel_columns()(), height = 32 * pick_block_rows()(arithmetic);
  const int64_t row_parts = (rows + height - 1) / height, least = rows <= 3 ? 3 : 1;
  const auto pairs_of = [&](int64_t cols) { return (cols + pair - 1) / pair; };
  int64_t left = 0;
  for (const int64_t cols : columns) left += pairs_of(cols);
  std::vector<ProductTask> tasks;
  for (size_t w = 0; w < columns.size(); ++w)
    for (int64_t col = 0, end; col < columns[w]; col = end) {
      const int64_t pairs = std::max(least, left / (2 * threads));
      end = std::min(col + pairs * pair, columns[w]);
      left -= pairs_of(end - col);
      for (int64_t r = 0; r < row_parts; ++r)
        tasks.push_back({w, {r * height, std::min((r + 1) * height, rows), col, end}});
    }
  return tasks;
}

}  // namespace engine
