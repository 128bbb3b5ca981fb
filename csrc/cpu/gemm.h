// Matrix products C (M, N) = A (M, K) B (K, N): the operands' layouts and the functions of each class. M rows, N columns,
// K depth. Every element of C sums over the depth in order, in pieces at fixed depths, wherever the product is cut: into rows,
// columns or threads.
//
// B lies in panels of panel_columns() columns, whose depth is contiguous:
//   f32    [K][columns] floats
//   pairs  [K][columns / 2] 32-bit words: column j is the low bf16, column j + columns / 2 the high one; a shift and a
//          mask give two float vectors
//   tiles  [K / 32][2][16][16][2] bf16: AMX tiles of 32 depth by 16 columns, two consecutive depths a word; the depth
//          is padded to a multiple of 32 with zeros
// The columns of the last panel beyond N are zero. A is float for f32 and pairs, bf16 for tiles.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace engine {

enum class Arithmetic : int { f32 = 0, pairs = 1, tiles = 2 };

// A row-major matrix of float or bf16.
struct Matrix {
  const void* data;
  bool bf16;
  int64_t stride;  // elements from a row to the next
};

// A: the element (r, k) of the block of rows that starts at b lies at data + b * block + (r - b) * row + k * depth
// (tiles: at data + b * block + (r - b) * row + k / 32 * depth + k % 32). Blocks start at multiples of block_rows(),
// of one row where row == block and the arithmetic is not tiles.
struct Left {
  const void* data;
  int64_t row, depth, block;
  int64_t rows;         // tiles: rows from here on lie in `tail`, 16 rows filled up with zeros
  const void* tail;
  int64_t tail_row;
};

struct Right {
  const void* data;
  int64_t panel_bytes;
  Arithmetic arithmetic;
  bool cached = false;  // read a moment ago: not worth fetching ahead
};

// C: row-major, float or bf16; C = A B + bias, or C += A B (float only, without a bias).
struct Out {
  void* data;
  bool bf16;
  int64_t stride;
  bool accumulate;
  const float* bias;  // (N,), or nullptr
};

struct Part {
  int64_t row0, row1, col0, col1;  // row0: start of a block of rows, col0: of a panel
  const char* then = nullptr;      // panels that the thread reads after these, to be fetched; null: those behind them
};

}  // namespace engine

ENGINE_TILED_KERNEL(int64_t, panel_columns, ())
ENGINE_TILED_KERNEL(int64_t, block_rows, (engine::Arithmetic arithmetic))
ENGINE_TILED_KERNEL(void, product,
                    (const engine::Left& left, const engine::Right& right, int64_t depth, const engine::Part& part,
                     const engine::Out& out))

// B: one panel from a weight (N, K), or 32 rows of a matrix (K, N) to their places in all panels.
ENGINE_TILED_KERNEL(void, pack_panel_from_columns,
                    (const engine::Matrix& source, int64_t cols, int64_t depth, engine::Arithmetic arithmetic,
                     int64_t panel, void* out))
// One panel of a weight anew from its float master (N, K): `dense` gets the rounded rows, `out` the panel of them.
ENGINE_TILED_KERNEL(void, refresh_panel,
                    (const float* master, int64_t cols, int64_t depth, engine::Arithmetic arithmetic, int64_t panel,
                     void* dense, bool bf16, void* out))
ENGINE_TILED_KERNEL(void, pack_chunk_from_rows,
                    (const engine::Matrix& source, int64_t cols, int64_t depth, engine::Arithmetic arithmetic,
                     int64_t chunk, int64_t panel_bytes, void* out))

// A, rounded to bf16 for tiles: one block of rows from a matrix (M, K), or 32 rows of a matrix (K, M) to their places in
// all blocks.
ENGINE_TILED_KERNEL(void, stage_block,
                    (const engine::Matrix& source, int64_t rows, int64_t depth, engine::Arithmetic arithmetic,
                     int64_t block, void* out))
ENGINE_TILED_KERNEL(void, stage_chunk_transposed,
                    (const engine::Matrix& source, int64_t rows, int64_t depth, engine::Arithmetic arithmetic,
                     int64_t chunk, int64_t block_bytes, void* out))
