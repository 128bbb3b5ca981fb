// The loops of linear_logprob and linear_sample; what they compute is in logprob.h and kernels/linear_logprob.py.
#include "logprob.h"

#ifdef ENGINE_CLASS

#include "gemm_fma.h"
#include "vec.h"

namespace engine::ENGINE_CLASS {

constexpr int64_t kMostRows = 96;  // whose logits of a block stay in the second cache

static int64_t rows_at_once(const Head& head) { return head.weight.arithmetic == Arithmetic::tiles ? 32 : kMostRows; }

ENGINE_INLINE float exp_of(float x) { return vexp(splat(x))[0]; }

// z of rows [row0, row1) and columns [col0, col1), `stride` apart, filled up with -inf.
static void block_logits(const Head& head, const Part& part, bool cached, float* z, int64_t stride = kVocabularyBlock) {
  const int64_t cols = part.col1 - part.col0, padded = (cols + kLanes - 1) / kLanes * kLanes;
  Right weight = head.weight;
  weight.cached = cached;
  float* origin = z - part.row0 * stride - part.col0;
  product(head.hidden, weight, head.depth, part, {origin, false, stride, false, head.bias});
  for (int64_t r = 0; r < part.row1 - part.row0; ++r) {
    float* row = z + r * stride;
    for (int64_t j = cols; j < padded; ++j) row[j] = -kInf;
    for (int64_t j = 0; j < padded; j += kLanes) store(row + j, load(row + j) * head.inverse_temperature);
  }
}

// e^(z - m) below every z that is -inf is 0, and adds 0: also where all are (m = -inf). NaN stays NaN.
static BlockStatistics row_statistics(const float* z, int64_t cols) {
  vfloat most = splat(-kInf);
  for (int64_t j = 0; j < cols; j += kLanes) most = vmax(most, load(z + j));
  const float max = hmax(most), shift = max == -kInf ? 0.0f : max;
  vfloat sum{}, weighted{};
  for (int64_t j = 0; j < cols; j += kLanes) {
    const vfloat below = load(z + j) - shift, e = vexp(below);
    const vfloat product = e * below;
    sum += e;
    weighted += e == 0.0f ? vfloat{} : product;
  }
  return {max, hsum(sum), hsum(weighted)};
}

void logprob_statistics(const Head& head, int64_t row0, int64_t row1, int64_t block0, int64_t block1,
                        const int64_t* targets, BlockStatistics* statistics, float* target_z, float* kept) {
  alignas(64) float room[kMostRows * kVocabularyBlock];
  const int64_t stride = kept ? kKeptStride : kVocabularyBlock;
  const int64_t step = rows_at_once(head), blocks = vocabulary_blocks(head.vocabulary);
  for (int64_t b = block0; b < block1; ++b) {
    const int64_t col0 = b * kVocabularyBlock, col1 = smaller(col0 + kVocabularyBlock, head.vocabulary);
    for (int64_t row = row0; row < row1; row += step) {
      const int64_t end = smaller(row + step, row1);
      float* z = kept ? kept + (b * (row1 - row0) + row - row0) * stride : room;
      block_logits(head, {row, end, col0, col1}, row > row0, z, stride);
      for (int64_t r = row; r < end; ++r) {
        const float* logits = z + (r - row) * stride;
        statistics[(r - row0) * blocks + b] = row_statistics(logits, col1 - col0);
        if (targets && targets[r] >= col0 && targets[r] < col1) target_z[r - row0] = logits[targets[r] - col0];
      }
    }
  }
}

// Starts from (-inf, 0, 0); a block without probability changes nothing.
static void merge(BlockStatistics& all, const BlockStatistics& block) {
  if (block.max == -kInf && block.sum == 0.0f) return;
  if (block.max > all.max) {
    const float scale = exp_of(all.max - block.max);
    if (scale == 0.0f)
      all.sum = all.weighted = 0.0f;
    else
      all.weighted = scale * (all.weighted + all.sum * (all.max - block.max)), all.sum *= scale;
    all.max = block.max;
    all.sum += block.sum;
    all.weighted += block.weighted;
    return;
  }
  const float scale = exp_of(block.max - all.max);
  if (scale == 0.0f) return;
  all.sum += scale * block.sum;
  all.weighted += scale * (block.weighted + block.sum * (block.max - all.max));
}

void logprob_finish(const BlockStatistics* statistics, int64_t blocks, int64_t rows, const float* target_z,
                    const RowResults& results) {
  for (int64_t r = 0; r < rows; ++r, statistics += blocks) {
    BlockStatistics all{-kInf, 0.0f, 0.0f};
    for (int64_t b = 0; b < blocks; ++b) merge(all, statistics[b]);
    const float log_sum = __builtin_logf(all.sum);
    results.logprob[r] = (target_z[r] - all.max) - log_sum;
    results.entropy[r] = log_sum - all.weighted / all.sum;
    if (results.max) results.max[r] = all.max;
    if (results.log_sum) results.log_sum[r] = log_sum;
  }
}

// dz_j = [ g_lp (1{j = y} - p_j) - g_ent p_j (log p_j + entropy) ] / temperature, over z; y outside [0, cols) is elsewhere.
static void row_gradient(float* z, int64_t cols, const RowGradients& rows, int64_t r, int64_t y, float scale) {
  const float g_logprob = rows.grad_logprob[r] * scale, g_entropy = rows.grad_entropy[r] * scale;
  const float max = rows.max[r], log_sum = rows.log_sum[r], entropy = rows.entropy[r];
  const bool here = y >= 0 && y < cols;
  const float z_y = here ? z[y] : 0.0f;
  for (int64_t j = 0; j < cols; j += kLanes) {
    const vfloat log_p = (load(z + j) - max) - log_sum, p = vexp(log_p);
    const vfloat slope = p * (g_logprob + g_entropy * (log_p + entropy));
    store(z + j, p == 0.0f ? vfloat{} : -slope);
  }
  if (!here) return;
  // 1 - p before the product: where p is 1 the gradient is 0, whatever the compiler fuses.
  const float log_p = (z_y - max) - log_sum, p = exp_of(log_p);
  z[y] = g_logprob * (1.0f - p) - (p == 0.0f ? 0.0f : g_entropy * (p * (log_p + entropy)));
}

void logprob_gradient(const Head& head, const Part& part, const RowGradients& rows, const Out& dz, int64_t dz_col,
                      float* bias_sums) {
  alignas(64) float z[kMostRows * kVocabularyBlock];
  const int64_t step = rows_at_once(head);
  for (int64_t col = part.col0; col < part.col1; col += kVocabularyBlock) {
    const int64_t last = smaller(col + kVocabularyBlock, part.col1), cols = last - col;
    if (bias_sums)
      for (int64_t j = col; j < last; ++j) bias_sums[j] = 0.0f;
    for (int64_t row = part.row0; row < part.row1; row += step) {
      const int64_t end = smaller(row + step, part.row1);
      block_logits(head, {row, end, col, last}, row > part.row0, z);
      for (int64_t r = row; r < end; ++r) {
        float* one = z + (r - row) * kVocabularyBlock;
        row_gradient(one, cols, rows, r, rows.target[r] - col, head.inverse_temperature);
        store_sums(one, kVocabularyBlock, dz, {r, r + 1, col - dz_col, last - dz_col});
        if (bias_sums)
          for (int64_t j = 0; j < cols; ++j) bias_sums[col + j] += one[j];
      }
    }
  }
}

int64_t kept_width(int64_t depth) { return (depth + kPanel - 1) / kPanel * kPanel; }

constexpr int64_t kRowsOfWeight = 128;  // at once: a panel's part of them leaves room in the first cache

// dH += dz W of some of a block: the weight's rows are read as they lie; those columns that do not fill a panel are copied out.
template <class B>
static void add_kept_hidden(const Head& head, int64_t rows, const float* dz, int64_t col0, int64_t cols, bool first,
                            const KeptGradients& to) {
  constexpr int64_t size = B::kDepthBytes / kPanel;
  const int64_t depth = head.depth, width = kept_width(depth), whole = depth / kPanel * kPanel;
  const char* weight = static_cast<const char*>(to.weight) + col0 * depth * size;
  const int64_t passes = (rows + kFmaRows - 1) / kFmaRows, calls = passes * (width / kPanel);
  const int64_t behind = col0 + cols < head.vocabulary ? cols * depth * size : 0;  // the next block, fetched meanwhile
  alignas(64) char tail[kRowsOfWeight * B::kDepthBytes];
  if (whole < depth) {
    std::memset(tail, 0, sizeof(tail));
    for (int64_t j = 0; j < cols; ++j)
      std::memcpy(tail + j * B::kDepthBytes, weight + (j * depth + whole) * size, (depth - whole) * size);
  }
  FmaArguments f{};
  f.row = kKeptStride, f.step = 1, f.depth = cols, f.stride = width, f.load_c = !first;
  int64_t call = 0;
  for (int64_t col = 0; col < width; col += kPanel) {
    f.b = col < whole ? weight + col * size : tail;
    f.b_step = col < whole ? depth * size : B::kDepthBytes;
    for (int64_t row = 0, n; row < rows; row += n, ++call) {
      n = smaller(kFmaRows, rows - row);
      f.a = dz + row * kKeptStride;
      f.c = to.hidden + row * width + col;
      f.ahead = weight + behind + behind * call / calls, f.ahead_step = behind / calls / cols;
      fma_kernel<B>(n)(f);
    }
  }
}

// dW (+)= dz^T H of a block. Its rows go to memory and come back with every few rows of H: the next are fetched meanwhile.
static void add_kept_weight(const Head& head, int64_t rows, const float* dz, int64_t col0, int64_t cols,
                            const KeptGradients& to) {
  const int64_t depth = head.depth, panels = (depth + kPanel - 1) / kPanel;
  const Out out{to.dw + col0 * depth, false, depth, to.accumulate, nullptr};
  FmaArguments f{};
  f.row = 1, f.step = kKeptStride, f.depth = rows;
  for (int64_t j = 0, n; j < cols; j += n) {
    n = smaller(kFmaRows, cols - j);
    const bool fetch = to.accumulate && col0 + j + 2 * n <= head.vocabulary;
    const char* next = reinterpret_cast<const char*>(to.dw + (col0 + j + (fetch ? n : 0)) * depth);
    f.a = dz + j;
    f.ahead_step = fetch ? n * kPanel * 4 / rows : 0;
    for (int64_t panel = 0; panel < panels; ++panel) {
      f.ahead = next + (fetch ? panel * n * kPanel * 4 : 0);
      const Part pass{j, j + n, panel * kPanel, smaller((panel + 1) * kPanel, depth)};
      fma_pass<FloatPanel>(fma_kernel<FloatPanel>(n), f, to.activations, out, pass, 1);
    }
  }
}

void kept_gradients(const Head& head, int64_t rows, int64_t block0, int64_t block1, float* kept, const RowGradients& of,
                    const KeptGradients& to) {
  for (int64_t b = block0; b < block1; ++b) {
    const int64_t col0 = b * kVocabularyBlock, cols = smaller(kVocabularyBlock, head.vocabulary - col0);
    float* dz = kept + b * rows * kKeptStride;
    for (int64_t r = 0; r < rows; ++r)
      row_gradient(dz + r * kKeptStride, cols, of, r, of.target[r] - col0, head.inverse_temperature);
    if (to.db)
      for (int64_t j = 0; j < cols; ++j) {
        float sum = to.accumulate ? to.db[col0 + j] : 0.0f;
        for (int64_t r = 0; r < rows; ++r) sum += dz[r * kKeptStride + j];
        to.db[col0 + j] = sum;
      }
    for (int64_t j = 0; to.hidden && j < cols; j += kRowsOfWeight) {
      const auto add = head.weight.arithmetic == Arithmetic::f32 ? add_kept_hidden<FloatRows> : add_kept_hidden<PairRows>;
      add(head, rows, dz + j, col0 + j, smaller(kRowsOfWeight, cols - j), b == block0 && j == 0, to);
    }
    if (to.dw) add_kept_weight(head, rows, dz, col0, cols, to);
  }
}

// Row `row` of dH: the groups' shares in order, and the columns back in theirs.
void sum_kept_hidden(const float* parts, int64_t groups, int64_t rows, int64_t depth, bool pairs, int64_t row,
                     float* dh) {
  const int64_t width = kept_width(depth);
  for (int64_t col = 0; col < width; col += kPanel) {
    vfloat low{}, high{};
    for (int64_t g = 0; g < groups; ++g) {
      const float* from = parts + (g * rows + row) * width + col;
      low += load(from), high += load(from + kLanes);
    }
    float sums[kPanel];
    store(sums, low), store(sums + kLanes, high);
    for (int64_t j = 0; j < kPanel && col + j < depth; ++j)
      dh[col + j] = pairs ? sums[j % 2 * kLanes + j / 2] : sums[j];
  }
}

// The block by the blocks' masses, then the token within it: both in float64, in order.
static int64_t pick_block(const BlockStatistics* statistics, int64_t blocks, double uniform, double& fraction) {
  float max = -kInf;
  for (int64_t b = 0; b < blocks; ++b) max = statistics[b].max > max ? statistics[b].max : max;
  double total = 0.0;
  for (int64_t b = 0; b < blocks; ++b) total += double{statistics[b].sum} * exp_of(statistics[b].max - max);
  if (!(total > 0.0)) return -1;
  const double wanted = uniform * total;
  double cumulated = 0.0;
  int64_t chosen = -1;
  for (int64_t b = 0; b < blocks; ++b) {
    const double mass = double{statistics[b].sum} * exp_of(statistics[b].max - max);
    if (!(mass > 0.0)) continue;
    chosen = b;
    fraction = (wanted - cumulated) / mass;
    cumulated += mass;
    if (cumulated > wanted) break;
  }
  return chosen;
}

int64_t sample_token(const Head& head, int64_t row, int64_t rows, const BlockStatistics* statistics, double uniform,
                     float* token_z) {
  double fraction = 0.0;
  const int64_t block = pick_block(statistics, vocabulary_blocks(head.vocabulary), uniform, fraction);
  if (block < 0) return -1;
  alignas(64) float z[16 * kVocabularyBlock];
  const int64_t height = head.weight.arithmetic == Arithmetic::tiles ? 16 : 1, row0 = row / height * height;
  const int64_t col0 = block * kVocabularyBlock, col1 = smaller(col0 + kVocabularyBlock, head.vocabulary);
  block_logits(head, {row0, smaller(row0 + height, rows), col0, col1}, false, z);
  float* logits = z + (row - row0) * kVocabularyBlock;
  float mass[kVocabularyBlock];
  const int64_t cols = col1 - col0;
  for (int64_t j = 0; j < cols; j += kLanes) store(mass + j, vexp(load(logits + j) - statistics[block].max));
  double total = 0.0, cumulated = 0.0;
  for (int64_t j = 0; j < cols; ++j) total += mass[j];
  int64_t chosen = -1;
  for (int64_t j = 0; j < cols; ++j) {
    if (!(mass[j] > 0.0f)) continue;
    chosen = j;
    cumulated += mass[j];
    if (cumulated > fraction * total) break;
  }
  *token_z = logits[chosen];
  return col0 + chosen;
}

}  // namespace engine::ENGINE_CLASS
#endif
