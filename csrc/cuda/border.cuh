// An operator's border in torch's stable ABI: checks, the current device and stream, launch checks.
//
// The operators are those of the library `engine_cuda`, with the schemas of kernels/<op>.py; kernels/_cuda.py says
// when they run. ENGINE_EMULATED compiles the same launchers for tensors on the CPU: see emulated/launchers.cpp.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

#include "platform.cuh"

#ifdef ENGINE_EMULATED
#define ENGINE_DEVICE CPU
#else
#define ENGINE_DEVICE CUDA
#endif

namespace engine_cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device of an operator's tensors as the current one, and its current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : index_(x.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index_, &guard_));
  }
  ~OnDeviceOf() { aoti_torch_delete_cuda_guard(guard_); }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  CUDAGuardHandle guard_ = nullptr;
};

// A contiguous vector of this size and dtype, on the device of the operator's first tensor.
inline void check_vector(const Tensor& x, int64_t size, ScalarType dtype, const Tensor& first, const char* name) {
#ifdef ENGINE_EMULATED
  STD_TORCH_CHECK(x.is_cpu(), name, ": not on the CPU, where the emulated kernels run");
#else
  STD_TORCH_CHECK(x.is_cuda(), name, ": not on a CUDA device");
#endif
  STD_TORCH_CHECK(x.get_device_index() == first.get_device_index(), name, ": got device ", x.get_device_index(),
                  ", want that of the first tensor, ", first.get_device_index());
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": got dtype ", torch::headeronly::toString(x.scalar_type()),
                  ", want ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(x.dim() == 1 && x.numel() == size, name, ": got ", x.dim(), " dimensions and ", x.numel(),
                  " elements, want (", size, ",)");
  STD_TORCH_CHECK(x.is_contiguous(), name, ": got a strided vector, want a contiguous one; call .contiguous()");
}

// Offsets of at least one segment where there are tokens; their values are not read (that would wait for the GPU).
inline int64_t check_offsets(const Tensor& cu, int64_t total, const Tensor& first) {
  STD_TORCH_CHECK(cu.numel() >= 1, "cu: got no elements, want (S+1,)");
  check_vector(cu, cu.numel(), ScalarType::Int, first, "cu");
  STD_TORCH_CHECK(cu.numel() > 1 || total == 0, "cu: got no segment for ", total, " tokens");
  return cu.numel() - 1;
}

inline Tensor new_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  const std::array<int64_t, 1> shape{size};
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

inline Tensor new_scalar(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, {static_cast<const int64_t*>(nullptr), size_t{0}}, dtype);
}

}  // namespace engine_cuda
