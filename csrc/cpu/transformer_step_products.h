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
// reads weights of its own: few panels a task, so that no thread waits long for another, and as many as one pass over few
// rows reads.
inline std::vector<ProductTask> cut_products(int64_t rows, const std::vector<int64_t>& columns, Arithmetic arithmetic) {
  const int64_t panels = rows <= 3 ? 6 : rows < 16 ? 4 : 2;
  const int64_t width = panels * pick_panel_columns()(), height = 32 * pick_block_rows()(arithmetic);
  std::vector<ProductTask> tasks;
  for (size_t w = 0; w < columns.size(); ++w)
    for (int64_t col = 0; col < columns[w]; col += width)
      for (int64_t row = 0; row < rows; row += height)
        tasks.push_back({w, {row, std::min(row + height, rows), col, std::min(col + width, columns[w])}});
  return tasks;
}

}  // namespace engine
