// logprob and entropy of a few rows with their logits kept, and the backward from those: the contract is in
// kernels/linear_logprob_loss.py, the loops in logprob.cpp.
#ifndef ENGINE_CLASS

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "check.h"
#include "logprob_at.h"
#include "team.h"

namespace engine {
namespace {

constexpr int64_t kGroups = 16;  // of the vocabulary; each sums a share of dH, so that threads change nothing

void check_piece(const Head& head, int64_t rows, const at::Tensor& targets, const at::Tensor& kept) {
  TORCH_CHECK_VALUE(head.weight.arithmetic != Arithmetic::tiles,
                    "linear_logprob_kept: got a bfloat16 weight on class amx, want linear_logprob there");
  check_cpu_contiguous(targets, "targets");
  check_dtype(targets, at::kLong, "targets");
  TORCH_CHECK_VALUE(targets.dim() == 1 && targets.size(0) == rows, "targets: got shape ", targets.sizes(), ", want (",
                    rows, ",)");
  check_float_vector(kept, vocabulary_blocks(head.vocabulary) * rows * kKeptStride, "kept");
}

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Four linear_logprob_kept(const at::Tensor& hidden, const at::Tensor& dense, const at::Tensor& data,
                         const at::Tensor& targets, double temperature, const std::optional<at::Tensor>& bias,
                         const at::Tensor& kept) {
  const HeadOperand head = head_of(hidden, dense, data, bias, temperature);
  const int64_t rows = hidden.size(0), blocks = vocabulary_blocks(head.view.vocabulary);
  check_piece(head.view, rows, targets, kept);
  const auto options = hidden.options().dtype(at::kFloat);
  const at::Tensor results = at::empty({4, rows}, options), target_z = at::empty({rows}, options);
  const at::Tensor statistics = statistics_of(head.view, 0, rows, targets.const_data_ptr<int64_t>(),
                                              target_z.data_ptr<float>(), kept.data_ptr<float>());
  float* out = results.data_ptr<float>();
  pick_logprob_finish()(reinterpret_cast<const BlockStatistics*>(statistics.const_data_ptr<float>()), blocks, rows,
                        target_z.const_data_ptr<float>(), {out, out + rows, out + 2 * rows, out + 3 * rows});
  return {results[0], results[1], results[2], results[3]};
}

// Groups of blocks, each with its own share of dH.
void gradients_of(const Head& head, int64_t rows, float* kept, const RowGradients& of, const KeptGradients& to) {
  const int64_t blocks = vocabulary_blocks(head.vocabulary), groups = std::min(kGroups, blocks);
  const int64_t share = rows * pick_kept_width()(head.depth);
  const auto run = pick_kept_gradients();
  Team::each(groups, at::get_num_threads(), [&](int64_t, int64_t g) {
    KeptGradients own = to;
    if (own.hidden) own.hidden += g * share;
    run(head, rows, blocks * g / groups, blocks * (g + 1) / groups, kept, of, own);
  });
}

void linear_logprob_kept_backward(const at::Tensor& grad_logprob, const at::Tensor& grad_entropy,
                                  const at::Tensor& hidden, const at::Tensor& dense, const at::Tensor& data,
                                  const at::Tensor& targets, double temperature, const std::optional<at::Tensor>& bias,
                                  const at::Tensor& max, const at::Tensor& log_sum, const at::Tensor& entropy,
                                  const at::Tensor& kept, const std::optional<at::Tensor>& dh,
                                  const std::optional<at::Tensor>& dw, const std::optional<at::Tensor>& db,
                                  bool accumulate) {
  const HeadOperand head = head_of(hidden, dense, data, bias, temperature);
  const int64_t rows = hidden.size(0), depth = head.view.depth, vocabulary = head.view.vocabulary;
  check_piece(head.view, rows, targets, kept);
  check_cpu_contiguous(dense, "weight");
  for (const auto* t : {&grad_logprob, &grad_entropy, &max, &log_sum, &entropy})
    check_float_vector(*t, rows, "a row's gradient or statistic");
  if (dh) check_float_vector(dh->view({-1}), rows * depth, "dh");
  if (dw) check_float_vector(dw->view({-1}), vocabulary * depth, "dw");
  if (db) check_float_vector(*db, vocabulary, "db");
  if (rows == 0) return;
  const int64_t groups = std::min(kGroups, vocabulary_blocks(vocabulary));
  const auto options = hidden.options().dtype(at::kFloat);
  const at::Tensor shares = at::empty({dh ? groups * rows * pick_kept_width()(depth) : 0}, options);
  RightOperand activations;
  if (dw) activations = right_from_rows(hidden, Arithmetic::f32);
  const RowGradients of{targets.const_data_ptr<int64_t>(), max.const_data_ptr<float>(),
                        log_sum.const_data_ptr<float>(), entropy.const_data_ptr<float>(),
                        grad_logprob.const_data_ptr<float>(), grad_entropy.const_data_ptr<float>()};
  const KeptGradients to{dense.const_data_ptr(), activations.view, dh ? shares.data_ptr<float>() : nullptr,
                         dw ? dw->data_ptr<float>() : nullptr, db ? db->data_ptr<float>() : nullptr, accumulate};
  gradients_of(head.view, rows, kept.data_ptr<float>(), of, to);
  if (!dh) return;
  const auto sum = pick_sum_kept_hidden();
  const bool pairs = head.view.weight.arithmetic == Arithmetic::pairs;
  at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      sum(shares.const_data_ptr<float>(), groups, rows, depth, pairs, r, dh->data_ptr<float>() + r * depth);
  });
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) {
  m.impl("linear_logprob_kept", &engine::linear_logprob_kept);
  m.impl("linear_logprob_kept_backward", &engine::linear_logprob_kept_backward);
}
#endif
