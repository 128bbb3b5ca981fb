// Sums over tokens that do not depend on the number of threads: blocks of a fixed size, added in order.
#pragma once

#include <ATen/Parallel.h>

#include <array>
#include <vector>

namespace engine {

constexpr int64_t kBlockTokens = 4096, kBlocksPerTask = 2;  // a task is about 10 us of work

// run(begin, count, out) writes the `width` sums of tokens begin .. begin+count; the result is those of each block.
template <size_t width, typename Run>
std::vector<std::array<double, width>> each_block(int64_t num_tokens, const Run& run) {
  const int64_t num_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
  std::vector<std::array<double, width>> partial(num_blocks);
  at::parallel_for(0, num_blocks, kBlocksPerTask, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * kBlockTokens;
      run(begin, std::min(kBlockTokens, num_tokens - begin), partial[b].data());
    }
  });
  return partial;
}

// The sum of all blocks' sums.
template <size_t width, typename Run>
std::array<double, width> sum_blocks(int64_t num_tokens, const Run& run) {
  std::array<double, width> total{};
  for (const auto& block : each_block<width>(num_tokens, run))
    for (size_t i = 0; i < width; ++i) total[i] += block[i];
  return total;
}

}  // namespace engine
