// The head's distribution a block of the vocabulary at a time: statistics that merge in order, and what is made of them.
// Used by linear_logprob, linear_logprob_loss and linear_sample, so that the log-probability that is sampled is the one that is scored.
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

// Logits that are kept from the forward to the backward of a few rows: [block][row][kKeptStride]. Rows a multiple of 1 KiB
// apart would share few sets of the first cache.
constexpr int64_t kKeptStride = kVocabularyBlock + 16;

struct RowResults {
  float *logprob, *entropy, *max, *log_sum;  // the last two may be nullptr
};

struct RowGradients {
  const int64_t* target;
  const float *max, *log_sum, *entropy, *grad_logprob, *grad_entropy;
};

// What the gradients of logits are multiplied with and added to, all of it of rows [0, rows). Each may be nullptr.
struct KeptGradients {
  const void* weight;    // (V, H) rows as they lie, bf16 for pairs, else float: for `hidden`
  Right activations;     // hidden (rows, H) in panels of f32: for `dw`
  float* hidden;         // (rows, kept_width): a group's share of dH; a panel's even columns first where weights are pairs
  float *dw, *db;        // (V, H), (V,)
  bool accumulate;       // dw and db; `hidden` begins anew with the group
};

inline int64_t vocabulary_blocks(int64_t vocabulary) { return (vocabulary + kVocabularyBlock - 1) / kVocabularyBlock; }

}  // namespace engine

// Statistics of rows [row0, row1) and blocks [block0, block1): statistics[row - row0][all blocks]; target_z[row - row0]
// is set where the row's target (may be nullptr) lies in these blocks. `kept` gets the logits (may be nullptr).
ENGINE_TILED_KERNEL(void, logprob_statistics,
                    (const engine::Head& head, int64_t row0, int64_t row1, int64_t block0, int64_t block1,
                     const int64_t* targets, engine::BlockStatistics* statistics, float* target_z, float* kept))
// Row r's blocks merged in order, and the results at index r.
ENGINE_TILED_KERNEL(void, logprob_finish,
                    (const engine::BlockStatistics* statistics, int64_t blocks, int64_t rows, const float* target_z,
                     const engine::RowResults& results))
// d loss / d (hidden W^T + bias) of a part, in dz at (row, col - dz_col), and its sums over the rows (may be nullptr).
ENGINE_TILED_KERNEL(void, logprob_gradient,
                    (const engine::Head& head, const engine::Part& part, const engine::RowGradients& rows,
                     const engine::Out& dz, int64_t dz_col, float* bias_sums))
// dH, dW and db of blocks [block0, block1) from kept logits, which become their gradients; the sums into one dH.
ENGINE_TILED_KERNEL(void, kept_gradients,
                    (const engine::Head& head, int64_t rows, int64_t block0, int64_t block1, float* kept,
                     const engine::RowGradients& of, const engine::KeptGradients& to))
ENGINE_TILED_KERNEL(int64_t, kept_width, (int64_t depth))
ENGINE_TILED_KERNEL(void, sum_kept_hidden,
                    (const float* parts, int64_t groups, int64_t rows, int64_t depth, bool pairs, int64_t row, float* dh))
// The first token whose cumulated probability exceeds `uniform`, and its z; -1 where no token has a probability.
ENGINE_TILED_KERNEL(int64_t, sample_token,
                    (const engine::Head& head, int64_t row, int64_t rows, const engine::BlockStatistics* statistics,
                     double uniform, float* token_z))
