// logprob and entropy of the head's softmax, forward and backward, a slab of the vocabulary at a time; the contract is in
// kernels/linear_logprob.py, the loops in logprob.cpp.
#ifndef ENGINE_CLASS

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "check.h"
#include "logprob_at.h"
#include "team.h"

namespace engine {

HeadOperand head_of(const at::Tensor& hidden, const at::Tensor& dense, const at::Tensor& data,
                    const std::optional<at::Tensor>& bias, double temperature) {
  check_cpu_contiguous(hidden, "hidden");
  check_activation(hidden, "hidden");
  check_activation(dense, "weight");
  TORCH_CHECK_VALUE(hidden.dim() == 2 && dense.dim() == 2 && hidden.size(1) == dense.size(1), "hidden: got shape ",
                    hidden.sizes(), ", want (N, H) for a weight (V, H) ", dense.sizes());
  TORCH_CHECK_VALUE(dense.size(0) > 0, "weight: got no rows, want a vocabulary of one token or more");
  TORCH_CHECK_VALUE(temperature > 0, "temperature: got ", temperature, ", want a number above 0");
  const int64_t vocabulary = dense.size(0), depth = dense.size(1);
  if (bias) check_float_vector(*bias, vocabulary, "bias");
  const Right weight = right_of(data, dense.scalar_type(), vocabulary, depth);
  HeadOperand head{{}, left_from(hidden, weight.arithmetic)};
  head.view = {head.hidden.view,
               weight,
               depth,
               vocabulary,
               bias ? bias->const_data_ptr<float>() : nullptr,
               static_cast<float>(1.0 / temperature)};
  return head;
}

at::Tensor statistics_of(const Head& head, int64_t row0, int64_t row1, const int64_t* targets, float* target_z,
                         float* kept) {
  const int64_t blocks = vocabulary_blocks(head.vocabulary);
  at::Tensor statistics = at::empty({row1 - row0, blocks, 3}, at::TensorOptions().dtype(at::kFloat));
  auto* out = reinterpret_cast<BlockStatistics*>(statistics.data_ptr<float>());
  const auto run = pick_logprob_statistics();
  Team::each(blocks, at::get_num_threads(), [&](int64_t, int64_t block) {
    run(head, row0, row1, block, block + 1, targets, out, target_z, kept);
  });
  return statistics;
}

namespace {

constexpr int64_t kRowsPerPiece = 2048;  // statistics, or a slab's gradients, of so many rows are held at once
constexpr int64_t kSlab = 768;           // columns of the vocabulary whose gradients are held at once; of fewer rows, more
constexpr int64_t kLongestSlab = 4096;
constexpr int64_t kSharedColumns = 128;  // of a slab that a thread takes at once; a multiple of every class's panels

void check_targets(const at::Tensor& targets, int64_t rows, int64_t vocabulary) {
  check_cpu_contiguous(targets, "targets");
  check_dtype(targets, at::kLong, "targets");
  TORCH_CHECK_VALUE(targets.dim() == 1 && targets.size(0) == rows, "targets: got shape ", targets.sizes(), ", want (",
                    rows, ",)");
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows; ++r)
    TORCH_CHECK_VALUE(target[r] >= 0 && target[r] < vocabulary, "targets[", r, "]: got ", target[r],
                      ", want a token in [0, ", vocabulary, "); leave rows without a target out");
}

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Four linear_logprob(const at::Tensor& hidden, const at::Tensor& dense, const at::Tensor& data,
                    const at::Tensor& targets, double temperature, const std::optional<at::Tensor>& bias,
                    const std::optional<at::Tensor>& /*master: autograd only*/) {
  const HeadOperand head = head_of(hidden, dense, data, bias, temperature);
  const int64_t rows = hidden.size(0), blocks = vocabulary_blocks(head.view.vocabulary);
  check_targets(targets, rows, head.view.vocabulary);
  const auto options = hidden.options().dtype(at::kFloat);
  at::Tensor logprob = at::empty({rows}, options), entropy = at::empty({rows}, options);
  at::Tensor max = at::empty({rows}, options), log_sum = at::empty({rows}, options);
  at::Tensor target_z = at::empty({std::min(rows, kRowsPerPiece)}, options);
  for (int64_t first = 0; first < rows; first += kRowsPerPiece) {
    const int64_t last = std::min(first + kRowsPerPiece, rows);
    const at::Tensor statistics =
        statistics_of(head.view, first, last, targets.const_data_ptr<int64_t>(), target_z.data_ptr<float>());
    const RowResults results{logprob.data_ptr<float>() + first, entropy.data_ptr<float>() + first,
                             max.data_ptr<float>() + first, log_sum.data_ptr<float>() + first};
    pick_logprob_finish()(reinterpret_cast<const BlockStatistics*>(statistics.const_data_ptr<float>()), blocks,
                          last - first, target_z.const_data_ptr<float>(), results);
  }
  return {logprob, entropy, max, log_sum};
}

// One piece of the rows, slab after slab: the slab's dz, then dH += dz W_slab and dW_slab (+)= dz^T H.
struct Backward {
  const Head& head;
  const at::Tensor &hidden, &dense;
  at::Tensor dh, dw, db;  // float; undefined where not wanted
  Arithmetic weight, activation;

  void slab_gradient(const RowGradients& rows, int64_t row0, const at::Tensor& dz, int64_t col0, bool accumulate) {
    const int64_t n = dz.size(0), col1 = col0 + dz.size(1);
    const Out out{dz.data_ptr(), dz.scalar_type() == at::kBFloat16, dz.stride(0), false, nullptr};
    at::Tensor sums = db.defined() ? at::empty({dz.size(1)}, db.options()) : at::Tensor();
    float* bias_sums = db.defined() ? sums.data_ptr<float>() - col0 : nullptr;
    Head piece = head;
    const auto run = pick_logprob_gradient();
    constexpr int64_t step = kSharedColumns;
    Team::each((dz.size(1) + step - 1) / step, at::get_num_threads(), [&](int64_t, int64_t i) {
      run(piece, {row0, row0 + n, col0 + i * step, std::min(col0 + (i + 1) * step, col1)}, rows,
          {static_cast<char*>(out.data) - row0 * out.stride * (out.bf16 ? 2 : 4), out.bf16, out.stride, false, nullptr},
          col0, bias_sums);
    });
    if (!db.defined()) return;
    at::Tensor slab = db.narrow(0, col0, dz.size(1));
    if (accumulate)
      slab.add_(sums);
    else
      slab.copy_(sums);
  }

  void run(const RowGradients& rows, int64_t row0, int64_t row1) {
    const int64_t n = row1 - row0, depth = head.depth;
    const auto dz_options = hidden.options().dtype(activation == Arithmetic::tiles ? at::kBFloat16 : at::kFloat);
    const int64_t slab = std::min(kRowsPerPiece * kSlab / n / kVocabularyBlock * kVocabularyBlock, kLongestSlab);
    const at::Tensor memory = at::empty({n, slab + 32}, dz_options);  // not a multiple of 4 KiB from row to row
    const bool first = row0 == 0;
    RightOperand h;
    if (dw.defined()) h = right_from_rows(hidden.narrow(0, row0, n), activation);
    for (int64_t col = 0; col < head.vocabulary; col += slab) {
      const int64_t width = std::min(slab, head.vocabulary - col);
      const at::Tensor dz = memory.narrow(1, 0, width);
      slab_gradient(rows, row0, dz, col, !first);
      if (dh.defined()) {
        const RightOperand w = right_from_rows(dense.narrow(0, col, width), weight);
        multiply(left_from(dz, weight).view, w.view, n, depth, width, out_of(dh.narrow(0, row0, n), col > 0));
      }
      if (dw.defined())
        multiply_transposed(dz, h.view, depth, out_of(dw.narrow(0, col, width), !first));
    }
  }
};

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Three linear_logprob_backward(const at::Tensor& grad_logprob, const at::Tensor& grad_entropy, const at::Tensor& hidden,
                              const at::Tensor& dense, const at::Tensor& data, const at::Tensor& targets,
                              double temperature, const std::optional<at::Tensor>& bias, const at::Tensor& max,
                              const at::Tensor& log_sum, const at::Tensor& entropy, bool need_hidden,
                              bool need_weight, bool need_bias) {
  const HeadOperand head = head_of(hidden, dense, data, bias, temperature);
  check_cpu_contiguous(dense, "weight");
  const int64_t rows = hidden.size(0), vocabulary = head.view.vocabulary;
  check_targets(targets, rows, vocabulary);
  for (const auto* t : {&grad_logprob, &grad_entropy, &max, &log_sum, &entropy})
    check_float_vector(*t, rows, "a row's gradient or statistic");
  const auto options = hidden.options().dtype(at::kFloat);
  const auto zeros = [&](at::IntArrayRef shape) { return rows ? at::empty(shape, options) : at::zeros(shape, options); };
  Backward backward{head.view, hidden, dense, {}, {}, {}, weight_arithmetic(dense.scalar_type()),
                    activation_arithmetic(dense.scalar_type())};
  if (need_hidden) backward.dh = at::empty({rows, head.view.depth}, options);
  if (need_weight) backward.dw = zeros({vocabulary, head.view.depth});
  if (need_bias) backward.db = zeros({vocabulary});
  const RowGradients all{targets.const_data_ptr<int64_t>(), max.const_data_ptr<float>(),
                         log_sum.const_data_ptr<float>(),   entropy.const_data_ptr<float>(),
                         grad_logprob.const_data_ptr<float>(), grad_entropy.const_data_ptr<float>()};
  for (int64_t first = 0; first < rows; first += kRowsPerPiece)
    backward.run(all, first, std::min(first + kRowsPerPiece, rows));
  const at::Tensor none = at::empty({0}, options);
  return {need_hidden ? backward.dh.to(hidden.scalar_type()) : none, need_weight ? backward.dw : none,
          need_bias ? backward.db : none};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) {
  m.impl("linear_logprob", &engine::linear_logprob);
  m.impl("linear_logprob_backward", &engine::linear_logprob_backward);
}
#endif
