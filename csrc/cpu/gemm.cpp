// The products and packings of every class; what they mean is in gemm.h.
#include "gemm.h"

#ifdef ENGINE_CLASS

#include "gemm_fma.h"
#include "gemm_pack.h"
#include "vec.h"
#if defined(__AMX_BF16__)
#include "gemm_amx.h"
#endif

namespace engine::ENGINE_CLASS {

int64_t panel_columns() { return kPanel; }

int64_t block_rows(Arithmetic arithmetic) { return arithmetic == Arithmetic::tiles ? 16 : kFmaRows; }

void product(const Left& left, const Right& right, int64_t depth, const Part& part, const Out& out) {
  if (right.arithmetic == Arithmetic::f32)
    fma_product<FloatPanel>(left, right, depth, part, out);
  else if (right.arithmetic == Arithmetic::pairs)
    fma_product<PairPanel>(left, right, depth, part, out);
#if defined(__AMX_BF16__)
  else
    tile_product(left, right, depth, part, out);
#endif
}

void pack_panel_from_columns(const Matrix& source, int64_t cols, int64_t depth, Arithmetic arithmetic, int64_t panel,
                             void* out) {
  if (arithmetic == Arithmetic::f32)
    pack_columns_f32(source, cols, depth, panel, static_cast<float*>(out));
  else if (arithmetic == Arithmetic::pairs)
    pack_columns_pairs(source, cols, depth, panel, static_cast<uint32_t*>(out));
  else
    pack_columns_tiles(source, cols, depth, panel, static_cast<uint32_t*>(out));
}

void pack_panel_from_rows(const Matrix& source, int64_t cols, int64_t depth, Arithmetic arithmetic, int64_t panel,
                          void* out) {
  if (arithmetic == Arithmetic::f32)
    pack_rows_f32(source, cols, depth, panel, static_cast<float*>(out));
  else if (arithmetic == Arithmetic::pairs)
    pack_rows_pairs(source, cols, depth, panel, static_cast<uint32_t*>(out));
  else
    pack_rows_tiles(source, cols, depth, panel, static_cast<uint32_t*>(out));
}

void stage_block(const Matrix& source, int64_t rows, int64_t depth, Arithmetic arithmetic, int64_t block, void* out) {
  stage_rows(source, rows, depth, arithmetic == Arithmetic::tiles, block, out);
}

void stage_block_transposed(const Matrix& source, int64_t rows, int64_t depth, Arithmetic arithmetic, int64_t block,
                            void* out) {
  stage_columns(source, rows, depth, arithmetic == Arithmetic::tiles, block, out);
}

void convert(const void* from, bool from_bf16, void* to, bool to_bf16, int64_t n) {
  const Out target{to, to_bf16, n, false, nullptr};
  const Matrix source{from, from_bf16, n};
  for (int64_t i = 0; i < n; i += kLanes) {
    float lanes[kLanes];
    store(lanes, float_words(source, 0, i, n - i));
    store_sums(lanes, kLanes, target, {0, 1, i, smaller(i + kLanes, n)});
  }
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "gemm_at.h"

namespace engine {
namespace {

// Less than some 10 microseconds of work is not worth a thread.
constexpr int64_t kFlopsPerTask = 1 << 20, kBytesPerTask = 1 << 17;

at::Tensor bytes(int64_t n) { return at::empty({n}, at::TensorOptions().dtype(at::kByte)); }

int64_t tasks_of(int64_t bytes_each) { return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(bytes_each, 1)); }

int64_t unpadded_panel_bytes(Arithmetic arithmetic, int64_t depth) {
  const int64_t width = pick_panel_columns()();
  if (arithmetic == Arithmetic::tiles) return (depth + 31) / 32 * 32 * width * 2;
  return depth * width * (arithmetic == Arithmetic::f32 ? 4 : 2);
}

// Rows of A as they are where the product can read them so: floats, or bf16 in whole steps of the depth whose rows do not
// all fall into one set of the cache.
bool readable_in_place(const at::Tensor& a, Arithmetic arithmetic) {
  if (arithmetic != Arithmetic::tiles) return a.scalar_type() == at::kFloat;
  return a.scalar_type() == at::kBFloat16 && a.size(1) % 32 == 0 && a.stride(0) % 2048 != 0;
}

template <class Stage>
LeftOperand stage(const at::Tensor& a, int64_t rows, int64_t depth, Arithmetic arithmetic, Stage one_block) {
  const bool tiles = arithmetic == Arithmetic::tiles;
  const int64_t height = pick_block_rows()(arithmetic), blocks = (rows + height - 1) / height;
  const int64_t padded = tiles ? (depth + 31) / 32 * 32 : depth, block_bytes = height * padded * (tiles ? 2 : 4);
  LeftOperand left{{}, bytes(blocks * block_bytes), {}};
  char* data = static_cast<char*>(left.staged.data_ptr());
  const Matrix source = matrix_of(a);
  at::parallel_for(0, blocks, tasks_of(block_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) one_block(source, rows, depth, arithmetic, b, data + b * block_bytes);
  });
  left.view = {data, 32, 512, padded, blocks * height, nullptr, 0};
  return left;
}

template <class Pack>
RightOperand pack(const at::Tensor& b, int64_t cols, int64_t depth, Arithmetic arithmetic, Pack one_panel) {
  const int64_t panel_bytes = packed_panel_bytes(arithmetic, depth), panels = panels_of(cols);
  RightOperand right{{}, bytes(panels * panel_bytes)};
  char* data = static_cast<char*>(right.packed.data_ptr());
  const Matrix source = matrix_of(b);
  const int64_t used = unpadded_panel_bytes(arithmetic, depth);
  at::parallel_for(0, panels, tasks_of(panel_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      one_panel(source, cols, depth, arithmetic, p, data + p * panel_bytes);
      std::memset(data + p * panel_bytes + used, 0, panel_bytes - used);  // the same weight, the same bytes
    }
  });
  right.view = {data, panel_bytes, arithmetic};
  return right;
}

}  // namespace

Arithmetic weight_arithmetic(at::ScalarType storage) {
  if (storage == at::kFloat) return Arithmetic::f32;
  return current_class() == CpuClass::amx ? Arithmetic::tiles : Arithmetic::pairs;
}

Arithmetic activation_arithmetic(at::ScalarType storage) {
  const Arithmetic weight = weight_arithmetic(storage);
  return weight == Arithmetic::pairs ? Arithmetic::f32 : weight;
}

Matrix matrix_of(const at::Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == at::kBFloat16, t.stride(0)}; }

int64_t panels_of(int64_t cols) {
  const int64_t width = pick_panel_columns()();
  return (cols + width - 1) / width;
}

int64_t packed_panel_bytes(Arithmetic arithmetic, int64_t depth) {
  const int64_t size = unpadded_panel_bytes(arithmetic, depth);
  // Panels a multiple of 4 KiB apart would share one set of the first cache.
  return size > 0 && size % 4096 == 0 ? size + 64 : size;
}

LeftOperand left_from(const at::Tensor& a, Arithmetic arithmetic) {
  const int64_t rows = a.size(0), depth = a.size(1), stride = a.stride(0);
  if (!readable_in_place(a, arithmetic)) {
    LeftOperand left = stage(a, rows, depth, arithmetic, pick_stage_block());
    if (arithmetic != Arithmetic::tiles) left.view.row = left.view.block = depth, left.view.depth = 1;
    return left;
  }
  if (arithmetic != Arithmetic::tiles) return {{a.const_data_ptr(), stride, 1, stride, rows, nullptr, 0}, {}, {}};
  const int64_t whole = rows / 16 * 16;
  LeftOperand left{{a.const_data_ptr(), stride, 32, stride, whole, nullptr, 0}, {}, {}};
  if (whole == rows) return left;
  left.tail = bytes(16 * depth * 2);
  char* tail = static_cast<char*>(left.tail.data_ptr());
  const char* source = static_cast<const char*>(a.const_data_ptr()) + whole * stride * 2;
  for (int64_t r = 0; r < rows - whole; ++r) std::memcpy(tail + r * depth * 2, source + r * stride * 2, depth * 2);
  std::memset(tail + (rows - whole) * depth * 2, 0, (16 - rows + whole) * depth * 2);
  left.view.tail = tail, left.view.tail_row = depth;
  return left;
}

LeftOperand left_from_transposed(const at::Tensor& a, Arithmetic arithmetic) {
  LeftOperand left = stage(a, a.size(1), a.size(0), arithmetic, pick_stage_block_transposed());
  if (arithmetic != Arithmetic::tiles) left.view.row = 1, left.view.depth = pick_block_rows()(arithmetic);
  return left;
}

RightOperand right_from_columns(const at::Tensor& b, Arithmetic arithmetic) {
  return pack(b, b.size(0), b.size(1), arithmetic, pick_pack_panel_from_columns());
}

RightOperand right_from_rows(const at::Tensor& b, Arithmetic arithmetic) {
  return pack(b, b.size(1), b.size(0), arithmetic, pick_pack_panel_from_rows());
}

Right right_of(const at::Tensor& packed, at::ScalarType storage, int64_t cols, int64_t depth) {
  const Arithmetic arithmetic = weight_arithmetic(storage);
  const int64_t panel_bytes = packed_panel_bytes(arithmetic, depth), want = panels_of(cols) * panel_bytes;
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.numel() == want && packed.is_contiguous(),
                    "weight: got ", packed.numel(), " packed bytes, want ", want, " for (", cols, ", ", depth,
                    ") on class ", class_name(current_class()), "; pack it again with pack_weight");
  return {packed.const_data_ptr(), panel_bytes, arithmetic};
}

Out out_of(const at::Tensor& c, bool accumulate, const float* bias) {
  return {c.data_ptr(), c.scalar_type() == at::kBFloat16, c.stride(0), accumulate, bias};
}

void multiply(const Left& left, const Right& right, int64_t rows, int64_t cols, int64_t depth, const Out& out) {
  if (rows == 0 || cols == 0) return;
  const auto run = pick_product();
  const int64_t width = pick_panel_columns()(), panels = panels_of(cols), height = 32 * pick_block_rows()(right.arithmetic);
  const int64_t tasks = std::max(2 * rows * cols * depth / kFlopsPerTask, panels * right.panel_bytes / kBytesPerTask);
  const int64_t parts = std::clamp<int64_t>(tasks, 1, at::get_num_threads());
  // Columns first: a thread then reads its own panels only. Rows where there are too few panels to share out evenly.
  const int64_t row_parts = panels >= 8 * parts ? 1 : std::clamp<int64_t>((rows + height - 1) / height, 1, parts);
  const int64_t col_parts = std::min((parts + row_parts - 1) / row_parts, panels);
  const int64_t blocks = (rows + height - 1) / height;
  at::parallel_for(0, row_parts * col_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / col_parts, c = i % col_parts;
      const Part part{blocks * r / row_parts * height, std::min(blocks * (r + 1) / row_parts * height, rows),
                      panels * c / col_parts * width, std::min(panels * (c + 1) / col_parts * width, cols)};
      if (part.row0 < part.row1 && part.col0 < part.col1) run(left, right, depth, part, out);
    }
  });
}

}  // namespace engine
#endif
