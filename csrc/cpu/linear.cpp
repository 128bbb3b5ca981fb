// y = x W^T + bias on packed weights, and its gradients; the contract is in kernels/linear.py, the products in gemm.h.
#include "gemm.h"

// Sums of columns [col0, col1) over the rows, in order.
ENGINE_KERNEL(void, sum_columns,
              (const engine::Matrix& source, int64_t rows, int64_t col0, int64_t col1, float* sums))

#ifdef ENGINE_CLASS

#include "vec.h"

namespace engine::ENGINE_CLASS {

template <class T>
static void add_row(const T* row, int64_t n, float* sums) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(sums + j, load(sums + j) + load(row + j));
  for (; j < n; ++j) {
    if constexpr (sizeof(T) == 2)
      sums[j] += from_bf16(row[j]);
    else
      sums[j] += row[j];
  }
}

void sum_columns(const Matrix& source, int64_t rows, int64_t col0, int64_t col1, float* sums) {
  for (int64_t j = col0; j < col1; ++j) sums[j] = 0.0f;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * source.stride + col0;
    if (source.bf16)
      add_row(static_cast<const uint16_t*>(source.data) + at, col1 - col0, sums + col0);
    else
      add_row(static_cast<const float*>(source.data) + at, col1 - col0, sums + col0);
  }
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "check.h"
#include "gemm_at.h"

namespace engine {
namespace {

constexpr int64_t kTokensPerPiece = 1024;  // of a weight gradient's depth: its packed operand stays near 5 MB

void check_matrix(const at::Tensor& t, const char* name) {
  check_cpu_contiguous(t, name);
  check_activation(t, name);
  TORCH_CHECK_VALUE(t.dim() == 2, name, ": got shape ", t.sizes(), ", want two dimensions");
}

at::Tensor pack_weight(const at::Tensor& dense) {
  check_matrix(dense, "weight");
  return right_from_columns(dense, weight_arithmetic(dense.scalar_type())).packed;
}

void refresh_weight(const at::Tensor& master, const at::Tensor& dense, const at::Tensor& data) {
  check_matrix(dense, "dense");
  check_cpu_contiguous(master, "master");
  check_dtype(master, at::kFloat, "master");
  TORCH_CHECK_VALUE(master.sizes() == dense.sizes(), "master: got shape ", master.sizes(), ", want ", dense.sizes());
  const Right right = right_of(data, dense.scalar_type(), dense.size(0), dense.size(1));
  refresh_columns(master, dense, right, static_cast<char*>(data.data_ptr()));
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& dense, const at::Tensor& data,
                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& /*master: autograd only*/,
                  at::ScalarType out_dtype) {
  check_matrix(x, "x");
  check_matrix(dense, "weight");
  const int64_t rows = x.size(0), depth = x.size(1), cols = dense.size(0);
  TORCH_CHECK_VALUE(dense.size(1) == depth, "x: got shape ", x.sizes(), ", want (M, ", dense.size(1), ")");
  if (bias) check_float_vector(*bias, cols, "bias");
  const Right right = right_of(data, dense.scalar_type(), cols, depth);
  at::Tensor y = at::empty({rows, cols}, x.options().dtype(out_dtype));
  check_activation(y, "out_dtype");
  const LeftOperand left = left_from(x, right.arithmetic);
  multiply(left.view, right, rows, cols, depth, out_of(y, false, bias ? bias->const_data_ptr<float>() : nullptr));
  return y;
}

// dW = grad^T x, piece after piece of the tokens, each in order.
at::Tensor weight_gradient(const at::Tensor& grad, const at::Tensor& x, at::ScalarType storage) {
  const int64_t tokens = x.size(0), rows = grad.size(1), cols = x.size(1);
  const Arithmetic arithmetic = activation_arithmetic(storage);
  at::Tensor dw = tokens == 0 ? at::zeros({rows, cols}, x.options().dtype(at::kFloat))
                              : at::empty({rows, cols}, x.options().dtype(at::kFloat));
  for (int64_t first = 0; first < tokens; first += kTokensPerPiece) {
    const int64_t n = std::min(kTokensPerPiece, tokens - first);
    const RightOperand right = right_from_rows(x.narrow(0, first, n), arithmetic);
    multiply_transposed(grad.narrow(0, first, n), right.view, cols, out_of(dw, first > 0));
  }
  return dw;
}

at::Tensor bias_gradient(const at::Tensor& grad) {
  const int64_t rows = grad.size(0), cols = grad.size(1);
  at::Tensor db = at::empty({cols}, grad.options().dtype(at::kFloat));
  float* sums = db.data_ptr<float>();
  const Matrix source = matrix_of(grad);
  const auto run = pick_sum_columns();
  const int64_t columns_per_task = std::max<int64_t>(64, (1 << 16) / std::max<int64_t>(rows, 1));
  at::parallel_for(0, cols, columns_per_task,
                   [&](int64_t begin, int64_t end) { run(source, rows, begin, end, sums); });
  return db;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                                               const at::Tensor& dense, bool need_x, bool need_weight,
                                                               bool need_bias) {
  check_matrix(grad, "grad");
  check_matrix(x, "x");
  check_matrix(dense, "weight");
  const int64_t rows = x.size(0), depth = dense.size(0), cols = x.size(1);
  TORCH_CHECK_VALUE(grad.size(0) == rows && grad.size(1) == depth && dense.size(1) == cols, "grad: got shape ",
                    grad.sizes(), ", want (", rows, ", ", depth, ") for x ", x.sizes(), " and weight ", dense.sizes());
  at::Tensor dx = at::empty({0, cols}, x.options()), dw = at::empty({0, cols}, x.options().dtype(at::kFloat));
  at::Tensor db = at::empty({0}, dw.options());
  if (need_x) {
    const Arithmetic arithmetic = weight_arithmetic(dense.scalar_type());
    const RightOperand right = right_from_rows(dense, arithmetic);
    const LeftOperand left = left_from(grad, arithmetic);
    dx = at::empty({rows, cols}, x.options());
    multiply(left.view, right.view, rows, cols, depth, out_of(dx));
  }
  if (need_weight) dw = weight_gradient(grad, x, dense.scalar_type());
  if (need_bias) db = bias_gradient(grad);
  return {dx, dw, db};
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) {
  m.impl("pack_weight", &engine::pack_weight);
  m.impl("refresh_weight", &engine::refresh_weight);
  m.impl("linear", &engine::linear);
  m.impl("linear_backward", &engine::linear_backward);
}
#endif
