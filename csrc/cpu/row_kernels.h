// The row functions that an op shares with the step of the whole network (transformer_step.cpp), so that both run the
// same arithmetic. Each is defined in the file of its op.
#pragma once

#include <cstdint>

#include "dispatch.h"

ENGINE_KERNEL(void, rmsnorm_rows,
              (const void* x, bool x_bf16, const float* weight, int64_t rows, int64_t width, float eps, void* out,
               bool out_bf16, float* rstd))

ENGINE_KERNEL(void, layernorm_rows,
              (const void* x, bool x_bf16, const float* weight, const float* bias, int64_t rows, int64_t width,
               float eps, void* out, bool out_bf16, float* mean, float* rstd))

ENGINE_KERNEL(void, rope_token,
              (const void* x, bool bf16, const float* angles, int64_t heads, int64_t size, int64_t rot, float sign,
               void* out))

ENGINE_KERNEL(void, swiglu_elements, (const void* gate, const void* up, int64_t size, bool bf16, void* out))

ENGINE_KERNEL(void, gelu_elements, (const void* x, int64_t size, bool bf16, bool tanh, void* out))
