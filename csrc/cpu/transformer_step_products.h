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

constexpr int64_t kWhole = 96;               // rows that are not cut: weights come from memory once
constexpr int64_t kCachedBytes = 200 << 10;  // of rows, in a second cache of 512 KiB

// Products of the same rows with weights of `columns` each. Columns rather than rows are shared out, so that each thread
// reads weights of its own: few panels a task, so that no thread waits long for another, and as many as one pass over few
// rows reads. Many rows are cut so that a part of them stays in the second cache while its columns go by.
inline std::vector<ProductTask> cut_products(int64_t rows, int64_t depth, const std::vector<int64_t>& columns,
                                             Arithmetic arithmetic) {
  const int64_t panels = rows <= 3 ? 6 : rows < 16 || rows > kWhole ? 4 : 2, width = panels * pick_panel_columns()();
  const int64_t block = pick_block_rows()(arithmetic), row_bytes = depth * (arithmetic == Arithmetic::tiles ? 2 : 4);
  const int64_t height = rows <= kWhole ? rows : std::max(kCachedBytes / row_bytes / block, int64_t{4}) * block;
  std::vector<ProductTask> tasks;
  for (int64_t row = 0; row < rows; row += height)
    for (size_t w = 0; w < columns.size(); ++w)
      for (int64_t col = 0; col < columns[w]; col += width)
        tasks.push_back({w, {row, std::min(row + height, rows), col, std::min(col + width, columns[w])}});
  return tasks;
}

}  // namespace engine
