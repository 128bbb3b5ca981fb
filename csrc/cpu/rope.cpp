// Rotary position embedding; the equation is in kernels/rope.py.
#include "activation.h"
#include "row_kernels.h"

#ifdef ENGINE_CLASS
namespace engine::ENGINE_CLASS {

// All heads of one token; angles holds rot/2 cosines, then rot/2 sines; sign -1 rotates back.
void rope_token(const void* x, bool bf16, const float* angles, int64_t heads, int64_t size, int64_t rot, float sign,
                void* out) {
  const int64_t half = rot / 2;
  with_type(bf16, [&]<typename T>(T*) {
    for (int64_t h = 0; h < heads; ++h) {
      const T* in = static_cast<const T*>(x) + h * size;
      T* to = static_cast<T*>(out) + h * size;
      each_vector(half, [&](int64_t i, int64_t count) {
        const vfloat a = load_up_to(in + i, count), b = load_up_to(in + half + i, count);
        const vfloat cos = load_up_to(angles + i, count), sin = load_up_to(angles + half + i, count) * sign;
        store_up_to(to + i, a * cos - b * sin, count);
        store_up_to(to + half + i, b * cos + a * sin, count);
      });
      __builtin_memcpy(to + rot, in + rot, (size - rot) * sizeof(T));
    }
  });
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>
#include <torch/library.h>

namespace engine {
namespace {

void check_positions(const at::Tensor& positions, int64_t rows, int64_t num_positions) {
  check_cpu_contiguous(positions, "positions");
  check_dtype(positions, at::kLong, "positions");
  TORCH_CHECK_VALUE(positions.dim() == 1 && positions.size(0) == rows, "positions: got shape ", positions.sizes(),
                    ", want (", rows, ",)");
  const int64_t* position = positions.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    TORCH_CHECK_VALUE(position[i] >= 0 && position[i] < num_positions, "positions[", i, "]: got ", position[i],
                      ", want 0 ... ", num_positions - 1, ", the rows of the table");
}

at::Tensor rope(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& table, bool inverse) {
  check_cpu_contiguous(x, "x");
  check_activation(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 3, "x: got shape ", x.sizes(), ", want (N, heads, D)");
  check_cpu_contiguous(table, "table");
  check_dtype(table, at::kFloat, "table");
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) % 2 == 0 && table.size(1) <= x.size(2), "table: got shape ",
                    table.sizes(), ", want (P, rot), rot even, at most ", x.size(2));
  check_positions(positions, x.size(0), table.size(0));
  at::Tensor out = at::empty_like(x);
  const int64_t heads = x.size(1), size = x.size(2), rot = table.size(1);
  const auto run = pick_rope_token();
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const float* angles = table.const_data_ptr<float>();
  const int64_t stride = heads * size * x.element_size();
  const bool bf16 = is_bf16(x);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  at::parallel_for(0, x.size(0), rows_per_task(heads * size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      run(from + i * stride, bf16, angles + position[i] * rot, heads, size, rot, inverse ? -1.0f : 1.0f,
          to + i * stride);
  });
  return out;
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("rope", &engine::rope); }
#endif
