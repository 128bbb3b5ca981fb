// The head's distribution a block of the vocabulary at a time: statistics that merge in order, and what is made of them.
// Used by linear_logprob and linear_sample, so that the log-probability that is sampled is the one that is scored.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "gemm.h"

namespace engine {

constexpr int64_t kVocabularyBlock = 256;  // columns; fixed, since the sums of a row are merged block after block

// z = (hidden W^T + bias) * inverse_temperature
struct Head {
  Left hidden;
  Right weight;
  int64_t depth, vocabulary;
  const float* bias;
  float inverse_temperature;
};

// Of one row and block, or of all blocks so far: m = max z, sum e^(z - m), sum e^(z - m) (z - m).
struct BlockStatistics {
  float max, sum, weighted;
};

struct RowResults {
  float *logprob, *entropy, *max, *log_sum;  // the last two may be nullptr
};

struct RowGradients {
  const int64_t* target;
  const float *max, *log_sum, *entropy, *grad_logprob, *grad_entropy;
};

inline int64_t vocabulary_blocks(int64_t vocabulary) { return (vocabulary + kVocabularyBlock - 1) / kVocabularyBlock; }

}  // namespace engine

// Statistics of rows [row0, row1) and blocks [block0, block1): statistics[row - row0][all blocks]; target_z[row - row0]
// is set where the row's target (may be nullptr) lies in these blocks.
ENGINE_KERNEL(void, logprob_statistics,
              (const engine::Head& head, int64_t row0, int64_t row1, int64_t block0, int64_t block1,
               const int64_t* targets, engine::BlockStatistics* statistics, float* target_z))
// Row r's blocks merged in order, and the results at index r.
ENGINE_KERNEL(void, logprob_finish,
              (const engine::BlockStatistics* statistics, int64_t blocks, int64_t rows, const float* target_z,
               const engine::RowResults& results))
// d loss / d (hidden W^T + bias) of a part, in dz at (row, col - dz_col), and its sums over the rows (may be nullptr).
ENGINE_KERNEL(void, logprob_gradient,
              (const engine::Head& head, const engine::Part& part, const engine::RowGradients& rows,
               const engine::Out& dz, int64_t dz_col, float* bias_sums))
// The first token whose cumulated probability exceeds `uniform`, and its z; -1 where no token has a probability.
ENGINE_KERNEL(int64_t, sample_token,
              (const engine::Head& head, int64_t row, int64_t rows, const engine::BlockStatistics* statistics,
               double uniform, float* token_z))
