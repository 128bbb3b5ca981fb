// Operands of products made from tensors, and products on threads. Host half only; the layouts are in gemm.h.
#pragma once

#include "gemm.h"
#include "tensors.h"

namespace engine {

// Products with bf16 weights take tiles on class amx and pairs elsewhere; with float weights, f32.
Arithmetic weight_arithmetic(at::ScalarType storage);
// Products of two activations (weight gradients): tiles where the weight's are, otherwise f32.
Arithmetic activation_arithmetic(at::ScalarType storage);

Matrix matrix_of(const at::Tensor& t);

struct LeftOperand {
  Left view;
  at::Tensor staged, tail;  // memory that `view` points into
};
struct RightOperand {
  Right view;
  at::Tensor packed;
};

int64_t panels_of(int64_t cols);
int64_t packed_panel_bytes(Arithmetic arithmetic, int64_t depth);

LeftOperand left_from(const at::Tensor& a, Arithmetic arithmetic);             // (M, K)
RightOperand right_from_columns(const at::Tensor& b, Arithmetic arithmetic);   // (N, K)
RightOperand right_from_rows(const at::Tensor& b, Arithmetic arithmetic);      // (K, N)
Right right_of(const at::Tensor& packed, at::ScalarType storage, int64_t cols, int64_t depth);

// dense and the packed bytes at `data`, which `right` describes, anew from the float master of the same shape.
void refresh_columns(const at::Tensor& master, const at::Tensor& dense, const Right& right, char* data);

Out out_of(const at::Tensor& c, bool accumulate = false, const float* bias = nullptr);

// C (rows, cols), cut into parts for the threads at hand.
void multiply(const Left& left, const Right& right, int64_t rows, int64_t cols, int64_t depth, const Out& out);

// C (M, N) = A^T B for A (K, M), on threads; C is float.
void multiply_transposed(const at::Tensor& a, const Right& right, int64_t cols, const Out& out);

}  // namespace engine
