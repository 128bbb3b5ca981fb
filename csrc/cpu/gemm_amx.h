// The micro-kernel on AMX tiles: 16 or 32 rows times 32 columns of bf16 products in float sums. Class `amx` only.
#pragma once

#include "gemm.h"
#include "gemm_fma.h"

namespace engine::ENGINE_CLASS {

constexpr int64_t kTileRows = 16, kTileDepth = 32;

struct TileArguments {
  const uint16_t* a[2];  // two blocks of 16 rows
  int64_t a_bytes[2];    // from a row to the next
  int64_t a_step;        // elements from 32 depth to the next
  const char* b;
  int64_t panel_bytes, steps;  // steps of 32 depth
  const float* from;           // sums so far, or nullptr for none
  float* to;
  int64_t from_stride, to_stride;
  const char* ahead;    // memory that will be read next
  int64_t ahead_lines;  // of 64 bytes, a step
};

constexpr int64_t kStepBytes = kTileDepth * 2 * kPanel;  // of a panel

ENGINE_INLINE void fetch_ahead(const char*& ahead, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
}

// Where a panel comes from memory, both operands are fetched into the first cache two steps before they are loaded.
ENGINE_INLINE void fetch_panel(const char* b) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm_prefetch(b + 64 * i, _MM_HINT_T0);
}
ENGINE_INLINE void fetch_rows(const uint16_t* a, int64_t row_bytes) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) _mm_prefetch(reinterpret_cast<const char*>(a) + i * row_bytes, _MM_HINT_T0);
}

// Sums in tiles 0-3, A in 4-5, B in 6-7. The number of a tile is part of the instruction.
template <bool kFetch>
static void tile_block_2x1(const TileArguments& t) {
  if (t.from) {
    _tile_loadd(0, t.from, t.from_stride * 4);
    _tile_loadd(1, t.from + 16, t.from_stride * 4);
    _tile_loadd(2, t.from + 16 * t.from_stride, t.from_stride * 4);
    _tile_loadd(3, t.from + 16 * t.from_stride + 16, t.from_stride * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint16_t *a0 = t.a[0], *a1 = t.a[1];
  const char *b = t.b, *ahead = t.ahead;
  for (int64_t k = 0; k < t.steps; ++k, a0 += t.a_step, a1 += t.a_step, b += kStepBytes) {
    if constexpr (kFetch) {
      fetch_rows(a0 + 2 * t.a_step, t.a_bytes[0]);
      fetch_rows(a1 + 2 * t.a_step, t.a_bytes[1]);
      fetch_panel(b + 2 * kStepBytes);
      fetch_panel(b + 2 * kStepBytes + 1024);
      fetch_ahead(ahead, t.ahead_lines);
    }
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a0, t.a_bytes[0]);
    _tile_loadd(7, b + 1024, 64);
    _tile_loadd(5, a1, t.a_bytes[1]);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, t.to, t.to_stride * 4);
  _tile_stored(1, t.to + 16, t.to_stride * 4);
  _tile_stored(2, t.to + 16 * t.to_stride, t.to_stride * 4);
  _tile_stored(3, t.to + 16 * t.to_stride + 16, t.to_stride * 4);
}

static void tile_block_1x1(const TileArguments& t) {
  if (t.from) {
    _tile_loadd(0, t.from, t.from_stride * 4);
    _tile_loadd(1, t.from + 16, t.from_stride * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  const uint16_t* a0 = t.a[0];
  const char *b = t.b, *ahead = t.ahead;
  for (int64_t k = 0; k < t.steps; ++k, a0 += t.a_step, b += kStepBytes) {
    _tile_loadd(4, a0, t.a_bytes[0]);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + 1024, 64);
    fetch_ahead(ahead, t.ahead_lines);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, t.to, t.to_stride * 4);
  _tile_stored(1, t.to + 16, t.to_stride * 4);
}

// 16 rows, two panels: with one, the two chains of sums would wait for each other.
static void tile_block_1x2(const TileArguments& t) {
  if (t.from) {
    _tile_loadd(0, t.from, t.from_stride * 4);
    _tile_loadd(1, t.from + 16, t.from_stride * 4);
    _tile_loadd(2, t.from + 32, t.from_stride * 4);
    _tile_loadd(3, t.from + 48, t.from_stride * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint16_t* a0 = t.a[0];
  const char *b = t.b, *second = t.b + t.panel_bytes, *ahead = t.ahead, *ahead2 = t.ahead + t.panel_bytes;
  for (int64_t k = 0; k < t.steps; ++k, a0 += t.a_step, b += kStepBytes, second += kStepBytes) {
    _tile_loadd(4, a0, t.a_bytes[0]);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + 1024, 64);
    fetch_ahead(ahead, t.ahead_lines);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, second, 64);
    _tile_loadd(6, second + 1024, 64);
    fetch_ahead(ahead2, t.ahead_lines);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, t.to, t.to_stride * 4);
  _tile_stored(1, t.to + 16, t.to_stride * 4);
  _tile_stored(2, t.to + 32, t.to_stride * 4);
  _tile_stored(3, t.to + 48, t.to_stride * 4);
}

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

ENGINE_INLINE void configure_tiles() {
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = kTileRows;
  _tile_loadconfig(&config);
}

ENGINE_INLINE void point_at_rows(TileArguments& t, int which, const Left& left, int64_t row) {
  const bool tail = row >= left.rows;
  t.a[which] = static_cast<const uint16_t*>(tail ? left.tail : left.data) + (tail ? 0 : row * left.block);
  t.a_bytes[which] = 2 * (tail ? left.tail_row : left.row);
}

// The lines of C, while the products that they will hold are made.
ENGINE_INLINE void fetch_target(const Out& out, const Part& pass) {
  const int64_t size = out.bf16 ? 2 : 4, row_bytes = (pass.col1 - pass.col0) * size;
  for (int64_t row = pass.row0; row < pass.row1; ++row) {
    const char* c = static_cast<const char*>(out.data) + (row * out.stride + pass.col0) * size;
    for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(c + i, 1);
  }
}

// Sums of a pass between the pieces of its depth, and which piece this is.
struct Piece {
  float* sums;
  bool first, last;
};

// The block of rows that starts at pass.row0 times the panels of the pass.
ENGINE_INLINE void tile_pass(TileArguments& t, const Out& out, const Part& pass, int64_t tiles, int64_t panels,
                             const Piece& piece, bool fetch) {
  const int64_t width = panels * kPanel, height = tiles * kTileRows;
  const bool direct = !out.bf16 && !out.bias && pass.col1 - pass.col0 == width && pass.row1 - pass.row0 == height;
  float* const c = static_cast<float*>(out.data) + pass.row0 * out.stride + pass.col0;
  const bool from_c = piece.first && direct, to_c = piece.last && direct;
  if (piece.first && !direct && out.accumulate) load_sums(piece.sums, width, width, out, pass);
  t.from = piece.first && !out.accumulate ? nullptr : from_c ? c : piece.sums;
  t.from_stride = from_c ? out.stride : width;
  t.to = to_c ? c : piece.sums;
  t.to_stride = to_c ? out.stride : width;
  if (piece.last) fetch_target(out, pass);
  // Rows beyond the last hold what the sums before left there: they are summed and never stored.
  asm volatile("" ::: "memory");  // GCC's tile loads do not tell it that they read memory
  if (tiles == 2)
    fetch ? tile_block_2x1<true>(t) : tile_block_2x1<false>(t);
  else if (panels == 2)
    tile_block_1x2(t);
  else
    tile_block_1x1(t);
  if (piece.last && !direct) store_sums(piece.sums, width, out, pass);
}

// Few rows: every panel comes from memory once, the next one is fetched meanwhile.
static void tile_product_few(const Left& left, const Right& right, int64_t depth, const Part& part, const Out& out) {
  alignas(64) float sums[2 * kTileRows * 2 * kPanel];
  const int64_t rows = part.row1 - part.row0, blocks = (rows + 2 * kTileRows - 1) / (2 * kTileRows);
  TileArguments t{};
  t.a_step = left.depth, t.panel_bytes = right.panel_bytes, t.steps = (depth + kTileDepth - 1) / kTileDepth;
  t.ahead_lines = right.cached ? 0 : kStepBytes / 64 / blocks;
  const int64_t group = (rows <= kTileRows ? 2 : 1) * kPanel;
  for (int64_t first = part.col0; first < part.col1; first += group) {
    const int64_t last = smaller(first + group, part.col1);
    for (int64_t row = part.row0, block = 0; row < part.row1; row += 2 * kTileRows, ++block) {
      const int64_t end = smaller(row + 2 * kTileRows, part.row1), tiles = end - row > kTileRows ? 2 : 1;
      point_at_rows(t, 0, left, row);
      if (tiles == 2) point_at_rows(t, 1, left, row + kTileRows);
      for (int64_t col = first; col < last;) {
        const int64_t panels = tiles == 1 && last - col > kPanel ? 2 : 1, stop = smaller(col + panels * kPanel, last);
        t.b = static_cast<const char*>(right.data) + col / kPanel * right.panel_bytes;
        t.ahead = behind(right, part, stop) + t.steps * t.ahead_lines * 64 * block;
        tile_pass(t, out, {row, end, col, stop}, tiles, panels, {sums, true, true}, true);
        col = stop;
      }
    }
  }
}

constexpr int64_t kStepsOfPiece = 10;  // of a panel's depth: 20 KiB stay in the first cache while the rows go by
constexpr int64_t kBlocksOfPass = 16;  // of 32 rows: they stay in the second cache while the panels go by

static void tile_product_many(const Left& left, const Right& right, int64_t depth, const Part& part, const Out& out) {
  constexpr int64_t kHeight = 2 * kTileRows;
  alignas(64) float sums[kBlocksOfPass * kHeight * kPanel];
  TileArguments t{};
  t.a_step = left.depth, t.panel_bytes = right.panel_bytes;
  const int64_t steps = (depth + kTileDepth - 1) / kTileDepth;
  const int64_t pieces = steps > kStepsOfPiece ? (steps + kStepsOfPiece - 1) / kStepsOfPiece : 1;
  for (int64_t first = part.row0; first < part.row1; first += kBlocksOfPass * kHeight) {
    const int64_t last = smaller(first + kBlocksOfPass * kHeight, part.row1);
    for (int64_t col = part.col0; col < part.col1; col += kPanel)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t step = steps * piece / pieces;
        t.steps = steps * (piece + 1) / pieces - step;
        t.b = static_cast<const char*>(right.data) + col / kPanel * right.panel_bytes + step * kStepBytes;
        for (int64_t row = first; row < last; row += kHeight) {
          const int64_t end = smaller(row + kHeight, last), tiles = end - row > kTileRows ? 2 : 1;
          for (int64_t i = 0; i < tiles; ++i) {
            point_at_rows(t, i, left, row + i * kTileRows);
            t.a[i] += step * left.depth;
          }
          tile_pass(t, out, {row, end, col, smaller(col + kPanel, part.col1)}, tiles, 1,
                    {sums + (row - first) * kPanel, piece == 0, piece == pieces - 1}, false);
        }
      }
  }
}

static void tile_product(const Left& left, const Right& right, int64_t depth, const Part& part, const Out& out) {
  configure_tiles();
  if (part.row1 - part.row0 <= 4 * kTileRows)
    tile_product_few(left, right, depth, part, out);
  else
    tile_product_many(left, right, depth, part, out);
  _tile_release();
}

}  // namespace engine::ENGINE_CLASS
