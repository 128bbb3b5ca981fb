// A phase of products of transformer_step as tasks. Host half only.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "team.h"
#include "transformer_step.h"

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

// A product of a phase: its weight and where it goes.
struct Target {
  const Linear* weight;
  const Activation* out;
};

inline const char* panels_at(const Linear& weight, int64_t column) {
  return static_cast<const char*>(weight.right.data) + column / pick_panel_columns()() * weight.right.panel_bytes;
}

// What this thread reads first of a phase, to be fetched at the end of the phase before.
inline const char* first_of_share(const Team::Member& team, const std::vector<ProductTask>& tasks,
                                  std::initializer_list<const Linear*> weights) {
  const int64_t count = static_cast<int64_t>(tasks.size()), first = team.start_of_share(count);
  if (first >= count) return nullptr;
  return panels_at(*weights.begin()[tasks[first].weight], tasks[first].part.col0);
}

// Products of `rows` rows, cut for all threads.
class Products {
 public:
  Products(int64_t rows, int64_t depth, const std::vector<int64_t>& columns, Arithmetic arithmetic)
      : tasks(cut_products(rows, depth, columns, arithmetic)), rows_(rows), arithmetic_(arithmetic) {}

  const std::vector<ProductTask> tasks;

  void run(const Activation& from, const Target& to, Part part, const char* then) const {
    part.then = then;
    pick_product()(from.left(rows_, arithmetic_), to.weight->right, to.weight->depth, part,
                   {to.out->data, to.out->bf16, to.out->stride, false, to.weight->bias});
  }

  // `then`: what the thread reads behind its share.
  void run(Team::Member& team, const Activation& from, std::initializer_list<Target> targets, const char* then) const {
    each(team, [&](int64_t i, bool ends) {
      const auto start = [&](const ProductTask& t) { return panels_at(*targets.begin()[t.weight].weight, t.part.col0); };
      run(from, targets.begin()[tasks[i].weight], tasks[i].part, ends ? then : start(tasks[i + 1]));
    });
  }

  // task(i, whether the thread's share ends with it)
  template <typename Task>
  void each(Team::Member& team, Task task) const {
    const int64_t count = static_cast<int64_t>(tasks.size()), end = team.end_of_share(count);
    team.each(count, [&](int64_t i) { task(i, i + 1 == end || i + 1 == count); });
  }

 private:
  const int64_t rows_;
  const Arithmetic arithmetic_;
};

}  // namespace engine
