// What linear_logprob and linear_sample share on tensors. Host half only.
#pragma once

#include "gemm_at.h"
#include "logprob.h"
#include "tensors.h"

namespace engine {

// The head and the memory it points into.
struct HeadOperand {
  Head view;
  LeftOperand hidden;
};

// hidden (N, H), the packed weight of dense (V, H), bias (V,) float or none; ValueError where they do not fit.
HeadOperand head_of(const at::Tensor& hidden, const at::Tensor& dense, const at::Tensor& data,
                    const std::optional<at::Tensor>& bias, double temperature);

// Statistics of rows [row0, row1), on threads: (rows, blocks, 3) floats; z of the targets into target_z, all of it into kept.
at::Tensor statistics_of(const Head& head, int64_t row0, int64_t row1, const int64_t* targets, float* target_z,
                         float* kept = nullptr);

}  // namespace engine
