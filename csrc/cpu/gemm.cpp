// The products and packings of every class; what they mean is in gemm.h.
#include "gemm.h"

#ifdef ENGINE_CLASS

#include "activation.h"
#include "gemm_fma.h"
#include "gemm_pack.h"
#if defined(ENGINE_TILES)
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
#if defined(ENGINE_TILES)
  else
    tile_product(left, right, depth, part, out);
#endif
}

template <bool past>
static void pack_panel(const Matrix& source, int64_t cols, int64_t depth, Arithmetic arithmetic, int64_t panel,
                       void* out) {
  if (arithmetic == Arithmetic::f32)
    pack_columns_f32<past>(source, cols, depth, panel, static_cast<float*>(out));
  else if (arithmetic == Arithmetic::pairs)
    pack_columns_pairs<past>(source, cols, depth, panel, static_cast<uint32_t*>(out));
  else
    pack_columns_tiles<past>(source, cols, depth, panel, static_cast<uint32_t*>(out));
}

void pack_panel_from_columns(const Matrix& source, int64_t cols, int64_t depth, Arithmetic arithmetic, int64_t panel,
                             void* out) {
  pack_panel<false>(source, cols, depth, arithmetic, panel, out);
}

// A panel of the master is rounded and packed while it lies in the cache; both results are read by the next forward
// only, when the rest of the model has gone through the caches.
void refresh_panel(const float* master, int64_t cols, int64_t depth, Arithmetic arithmetic, int64_t panel, void* dense,
                   bool bf16, void* out) {
  const int64_t begin = panel * kPanel * depth, end = smaller((panel + 1) * kPanel, cols) * depth;
  if (dense != master)  // a float32 copy may be the master's own memory
    with_type(bf16, [&]<typename T>(T*) {
      T* to = static_cast<T*>(dense) + begin;
      each_vector(end - begin, [&](int64_t i, int64_t count) {
        const vfloat v = load_up_to(master + begin + i, count);
        count < kLanes ? store_part(to + i, v, count) : stream(to + i, v);
      });
    });
  // pairs and tiles are bf16 whatever the source; float32 panels of a bf16 weight need its rounded values
  const bool from_dense = bf16 && arithmetic == Arithmetic::f32;
  if (from_dense) stream_fence();
  const Matrix rounded{dense, bf16, depth}, own{master, false, depth};
  pack_panel<true>(from_dense ? rounded : own, cols, depth, arithmetic, panel, out);
  stream_fence();
}

void pack_chunk_from_rows(const Matrix& source, int64_t cols, int64_t depth, Arithmetic arithmetic, int64_t chunk,
                          int64_t panel_bytes, void* out) {
  const int64_t k0 = chunk * kRowsOfChunk, k1 = smaller(k0 + kRowsOfChunk, depth);
  char* to = static_cast<char*>(out) + k0 * kPanel * (arithmetic == Arithmetic::f32 ? 4 : 2);
  for (int64_t panel = 0; panel * kPanel < cols; ++panel, to += panel_bytes) {
    if (arithmetic == Arithmetic::f32)
      pack_rows_f32(source, cols, panel, k0, k1, reinterpret_cast<float*>(to));
    else if (arithmetic == Arithmetic::pairs)
      pack_rows_pairs(source, cols, panel, k0, k1, reinterpret_cast<uint32_t*>(to));
    else
      pack_rows_tiles(source, cols, panel, k0, k1, reinterpret_cast<uint32_t*>(to));
  }
}

void stage_block(const Matrix& source, int64_t rows, int64_t depth, Arithmetic arithmetic, int64_t block, void* out) {
  stage_rows(source, rows, depth, arithmetic == Arithmetic::tiles, block, out);
}

void stage_chunk_transposed(const Matrix& source, int64_t rows, int64_t depth, Arithmetic arithmetic, int64_t chunk,
                            int64_t block_bytes, void* out) {
  const int64_t k0 = chunk * kRowsOfChunk, k1 = smaller(k0 + kRowsOfChunk, depth), height = block_rows(arithmetic);
  const bool tiles = arithmetic == Arithmetic::tiles;
  char* to = static_cast<char*>(out) + k0 * height * (tiles ? 2 : 4);
  for (int64_t block = 0; block * height < rows; ++block, to += block_bytes) {
    if (tiles)
      stage_columns_tiles(source, rows, block, k0, k1, reinterpret_cast<uint16_t*>(to));
    else
      stage_columns_f32(source, rows, block, k0, k1, reinterpret_cast<float*>(to));
  }
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "gemm_at.h"
#include "team.h"

namespace engine {
namespace {

// Less than some 10 microseconds of work is not worth a thread.
constexpr int64_t kFlopsPerTask = 1 << 20, kBytesPerTask = 1 << 17;
constexpr int64_t kRowsPerTask = 96;  // a multiple of every class's blocks of rows
constexpr int64_t kStagedRows = 48;  // of a transposed operand at once: 200 KB for 1,024 tokens

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

// The last rows, less than a tile of 16, filled up with zeros.
void stage_tail(const at::Tensor& a, LeftOperand& left) {
  const int64_t depth = a.size(1), first = left.view.rows, rows = a.size(0) - first;
  left.tail = bytes(16 * depth * 2);
  char* tail = static_cast<char*>(left.tail.data_ptr());
  const char* source = static_cast<const char*>(a.const_data_ptr()) + first * a.stride(0) * 2;
  for (int64_t r = 0; r < rows; ++r) std::memcpy(tail + r * depth * 2, source + r * a.stride(0) * 2, depth * 2);
  std::memset(tail + rows * depth * 2, 0, (16 - rows) * depth * 2);
  left.view.tail = tail, left.view.tail_row = depth;
}

// Memory for all blocks of rows, and where they lie; `row` and `depth` of f32 are the caller's to say.
LeftOperand staged(int64_t rows, int64_t depth, Arithmetic arithmetic) {
  const bool tiles = arithmetic == Arithmetic::tiles;
  const int64_t height = pick_block_rows()(arithmetic), blocks = (rows + height - 1) / height;
  const int64_t padded = tiles ? (depth + 31) / 32 * 32 : depth;
  LeftOperand left{{}, bytes(blocks * height * padded * (tiles ? 2 : 4)), {}};
  left.view = {left.staged.const_data_ptr(), 32, 512, padded, blocks * height, nullptr, 0};
  return left;
}

int64_t block_bytes_of(const LeftOperand& left, Arithmetic arithmetic) {
  return pick_block_rows()(arithmetic) * left.view.block * (arithmetic == Arithmetic::tiles ? 2 : 4);
}

RightOperand unpacked(int64_t cols, int64_t depth, Arithmetic arithmetic) {
  const int64_t panel_bytes = packed_panel_bytes(arithmetic, depth);
  RightOperand right{{}, bytes(panels_of(cols) * panel_bytes)};
  right.view = {right.packed.const_data_ptr(), panel_bytes, arithmetic};
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
  if (readable_in_place(a, arithmetic)) {
    if (arithmetic != Arithmetic::tiles) return {{a.const_data_ptr(), stride, 1, stride, rows, nullptr, 0}, {}, {}};
    LeftOperand left{{a.const_data_ptr(), stride, 32, stride, rows / 16 * 16, nullptr, 0}, {}, {}};
    if (left.view.rows < rows) stage_tail(a, left);
    return left;
  }
  LeftOperand left = staged(rows, depth, arithmetic);
  if (arithmetic != Arithmetic::tiles) left.view.row = depth, left.view.depth = 1;
  const int64_t block_bytes = block_bytes_of(left, arithmetic), height = pick_block_rows()(arithmetic);
  char* data = static_cast<char*>(left.staged.data_ptr());
  const Matrix source = matrix_of(a);
  const auto one_block = pick_stage_block();
  at::parallel_for(0, (rows + height - 1) / height, tasks_of(block_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) one_block(source, rows, depth, arithmetic, b, data + b * block_bytes);
  });
  return left;
}

RightOperand right_from_columns(const at::Tensor& b, Arithmetic arithmetic) {
  const int64_t cols = b.size(0), depth = b.size(1);
  RightOperand right = unpacked(cols, depth, arithmetic);
  const int64_t panel_bytes = right.view.panel_bytes, used = unpadded_panel_bytes(arithmetic, depth);
  char* data = static_cast<char*>(right.packed.data_ptr());
  const Matrix source = matrix_of(b);
  const auto one_panel = pick_pack_panel_from_columns();
  at::parallel_for(0, panels_of(cols), tasks_of(panel_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      one_panel(source, cols, depth, arithmetic, p, data + p * panel_bytes);
      std::memset(data + p * panel_bytes + used, 0, panel_bytes - used);  // the same weight, the same bytes
    }
  });
  return right;
}

void refresh_columns(const at::Tensor& master, const at::Tensor& dense, const Right& right, char* data) {
  const int64_t cols = dense.size(0), depth = dense.size(1);
  const bool bf16 = dense.scalar_type() == at::kBFloat16;
  const auto one_panel = pick_refresh_panel();
  at::parallel_for(0, panels_of(cols), tasks_of(right.panel_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      one_panel(master.const_data_ptr<float>(), cols, depth, right.arithmetic, p, dense.data_ptr(), bf16,
                data + p * right.panel_bytes);
  });
}

RightOperand right_from_rows(const at::Tensor& b, Arithmetic arithmetic) {
  const int64_t depth = b.size(0), cols = b.size(1);
  RightOperand right = unpacked(cols, depth, arithmetic);
  const Matrix source = matrix_of(b);
  const auto one_chunk = pick_pack_chunk_from_rows();
  at::parallel_for(0, (depth + 31) / 32, tasks_of(cols * 32 * 4), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      one_chunk(source, cols, depth, arithmetic, c, right.view.panel_bytes, right.packed.data_ptr());
  });
  return right;
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

// Tasks of some rows and a thread's own columns, whose panels it then reads alone; rows only where there are too few panels
// to share out. A thread that is done takes tasks of a slower one: a core that others use too was seen at 60 % of its rate.
void multiply(const Left& left, const Right& right, int64_t rows, int64_t cols, int64_t depth, const Out& out) {
  if (rows == 0 || cols == 0) return;
  const auto run = pick_product();
  const int64_t width = pick_panel_columns()(), panels = panels_of(cols);
  const int64_t worth = std::max(2 * rows * cols * depth / kFlopsPerTask, panels * right.panel_bytes / kBytesPerTask);
  const int64_t threads = std::clamp<int64_t>(worth, 1, at::get_num_threads());
  if (threads == 1) return run(left, right, depth, {0, rows, 0, cols}, out);
  const int64_t row_parts = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t shares = row_parts < 4 ? 4 * threads : threads;  // few rows: enough tasks to take from
  const int64_t fewest = row_parts < threads ? std::min(threads, panels) : 1;
  const int64_t col_parts = panels >= 8 * shares ? shares : fewest;
  Team::each(row_parts * col_parts, threads, [&](int64_t, int64_t i) {
    const int64_t c = i / row_parts, r = i % row_parts;
    const Part part{r * kRowsPerTask, std::min((r + 1) * kRowsPerTask, rows), panels * c / col_parts * width,
                    std::min(panels * (c + 1) / col_parts * width, cols)};
    run(left, right, depth, part, out);
  });
}

// A is staged some blocks of rows at a time, by the thread that multiplies them, while they are in its cache: the whole of A
// staged ahead goes to memory and back, an eighth of the time of a weight gradient.
void multiply_transposed(const at::Tensor& a, const Right& right, int64_t cols, const Out& out) {
  const int64_t depth = a.size(0), rows = a.size(1), panels = panels_of(cols), width = pick_panel_columns()();
  if (rows == 0 || cols == 0) return;
  const Matrix source = matrix_of(a);
  const Arithmetic arithmetic = right.arithmetic;
  const bool tiles = arithmetic == Arithmetic::tiles;
  const int64_t height = pick_block_rows()(arithmetic), together = std::max<int64_t>(kStagedRows / height, 1) * height;
  const int64_t tasks = (rows + together - 1) / together, threads = std::min<int64_t>(at::get_num_threads(), tasks);
  const auto stage = pick_stage_chunk_transposed();
  const auto run = pick_product();
  std::vector<LeftOperand> blocks;  // a thread's own
  for (int64_t t = 0; t < threads; ++t) {
    blocks.push_back(staged(together, depth, arithmetic));
    if (!tiles) blocks.back().view.row = 1, blocks.back().view.depth = height;
  }
  Team::each(tasks, threads, [&](int64_t thread, int64_t i) {
    const LeftOperand& left = blocks[static_cast<size_t>(thread)];
    const int64_t first = i * together, n = std::min(together, rows - first), block_bytes = block_bytes_of(left, arithmetic);
    const Matrix some{static_cast<const char*>(source.data) + first * (source.bf16 ? 2 : 4), source.bf16, source.stride};
    for (int64_t chunk = 0; chunk < (depth + 31) / 32; ++chunk)
      stage(some, n, depth, arithmetic, chunk, block_bytes, left.staged.data_ptr());
    const Out to{static_cast<float*>(out.data) + first * out.stride, false, out.stride, out.accumulate, nullptr};
    run(left.view, right, depth, {0, n, 0, std::min(panels * width, cols)}, to);
  });
}

}  // namespace engine
#endif
