// The micro-kernel on AMX tiles: 16 or 32 rows times 32 columns of bf16 products in float sums. Class `amx` only.
#pragma once

#include <immintrin.h>

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
  float* c;
  int64_t stride;  // of C
  bool load_c;
  const char* ahead;  // memory that will be read next
  int64_t ahead_lines;  // of 64 bytes, a step
};

constexpr int64_t kStepBytes = kTileDepth * 2 * kPanel;  // of a panel

ENGINE_INLINE void fetch_ahead(const char*& ahead, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
}

// The second level of the cache answers too slowly for 16 loads of a line in a row: both operands are fetched into the
// first one two steps before they are loaded.
ENGINE_INLINE void fetch_panel(const char* b) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm_prefetch(b + 64 * i, _MM_HINT_T0);
}
ENGINE_INLINE void fetch_rows(const uint16_t* a, int64_t row_bytes) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) _mm_prefetch(reinterpret_cast<const char*>(a) + i * row_bytes, _MM_HINT_T0);
}

// Sums in tiles 0-3, A in 4-5, B in 6-7. The number of a tile is part of the instruction.
static void tile_block_2x1(const TileArguments& t) {
  const int64_t c_bytes = t.stride * 4;
  if (t.load_c) {
    _tile_loadd(0, t.c, c_bytes);
    _tile_loadd(1, t.c + 16, c_bytes);
    _tile_loadd(2, t.c + 16 * t.stride, c_bytes);
    _tile_loadd(3, t.c + 16 * t.stride + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint16_t *a0 = t.a[0], *a1 = t.a[1];
  const char *b = t.b, *ahead = t.ahead;
  for (int64_t k = 0; k < t.steps; ++k, a0 += t.a_step, a1 += t.a_step, b += kStepBytes) {
    fetch_rows(a0 + 2 * t.a_step, t.a_bytes[0]);
    fetch_rows(a1 + 2 * t.a_step, t.a_bytes[1]);
    _tile_loadd(6, b, 64);
    fetch_panel(b + 2 * kStepBytes);
    _tile_loadd(4, a0, t.a_bytes[0]);
    _tile_loadd(7, b + 1024, 64);
    fetch_panel(b + 2 * kStepBytes + 1024);
    _tile_loadd(5, a1, t.a_bytes[1]);
    fetch_ahead(ahead, t.ahead_lines);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, t.c, c_bytes);
  _tile_stored(1, t.c + 16, c_bytes);
  _tile_stored(2, t.c + 16 * t.stride, c_bytes);
  _tile_stored(3, t.c + 16 * t.stride + 16, c_bytes);
}

static void tile_block_1x1(const TileArguments& t) {
  const int64_t c_bytes = t.stride * 4;
  if (t.load_c) {
    _tile_loadd(0, t.c, c_bytes);
    _tile_loadd(1, t.c + 16, c_bytes);
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
  _tile_stored(0, t.c, c_bytes);
  _tile_stored(1, t.c + 16, c_bytes);
}

// 16 rows, two panels: with one, the two chains of sums would wait for each other.
static void tile_block_1x2(const TileArguments& t) {
  const int64_t c_bytes = t.stride * 4;
  if (t.load_c) {
    _tile_loadd(0, t.c, c_bytes);
    _tile_loadd(1, t.c + 16, c_bytes);
    _tile_loadd(2, t.c + 32, c_bytes);
    _tile_loadd(3, t.c + 48, c_bytes);
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
  _tile_stored(0, t.c, c_bytes);
  _tile_stored(1, t.c + 16, c_bytes);
  _tile_stored(2, t.c + 32, c_bytes);
  _tile_stored(3, t.c + 48, c_bytes);
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

// The block of rows that starts at pass.row0 times the panels of the pass.
ENGINE_INLINE void tile_pass(TileArguments& t, const Out& out, const Part& pass, int64_t tiles, int64_t panels) {
  alignas(64) float sums[2 * kTileRows * 2 * kPanel];
  const int64_t width = panels * kPanel, height = tiles * kTileRows;
  const bool direct = !out.bf16 && !out.bias && pass.col1 - pass.col0 == width && pass.row1 - pass.row0 == height;
  t.load_c = out.accumulate;
  t.c = direct ? static_cast<float*>(out.data) + pass.row0 * out.stride + pass.col0 : sums;
  t.stride = direct ? out.stride : width;
  if (!direct && out.accumulate) load_sums(sums, width, width, out, pass);
  fetch_target(out, pass);
  // Rows beyond the last hold what the sums before left there: they are summed and never stored.
  asm volatile("" ::: "memory");  // GCC's tile loads do not tell it that they read memory
  if (tiles == 2)
    tile_block_2x1(t);
  else if (panels == 2)
    tile_block_1x2(t);
  else
    tile_block_1x1(t);
  if (!direct) store_sums(sums, width, out, pass);
}

static void tile_product(const Left& left, const Right& right, int64_t depth, const Part& part, const Out& out) {
  const int64_t rows = part.row1 - part.row0, blocks = (rows + 2 * kTileRows - 1) / (2 * kTileRows);
  TileArguments t{};
  t.a_step = left.depth, t.panel_bytes = right.panel_bytes, t.steps = (depth + kTileDepth - 1) / kTileDepth;
  const bool few = blocks <= 2;  // a panel is read once from memory: fetch the next one meanwhile
  const int64_t fit = few ? 1 : kGroupBytes / (right.panel_bytes + 1);
  const int64_t wide = rows <= kTileRows ? 2 : 1, group = (fit < wide ? wide : fit) * kPanel;
  t.ahead_lines = few && !right.cached ? kStepBytes / 64 / blocks : 0;
  configure_tiles();
  for (int64_t first = part.col0; first < part.col1; first += group) {
    const int64_t last = smaller(first + group, part.col1);
    for (int64_t row = part.row0, block = 0; row < part.row1; row += 2 * kTileRows, ++block) {
      const int64_t end = smaller(row + 2 * kTileRows, part.row1), tiles = end - row > kTileRows ? 2 : 1;
      point_at_rows(t, 0, left, row);
      if (tiles == 2) point_at_rows(t, 1, left, row + kTileRows);
      for (int64_t col = first; col < last;) {
        const int64_t panels = tiles == 1 && last - col > kPanel ? 2 : 1, stop = smaller(col + panels * kPanel, last);
        t.b = static_cast<const char*>(right.data) + col / kPanel * right.panel_bytes;
        t.ahead = t.b + panels * right.panel_bytes + t.steps * t.ahead_lines * 64 * block;
        tile_pass(t, out, {row, end, col, stop}, tiles, panels);
        col = stop;
      }
    }
  }
  _tile_release();
}

}  // namespace engine::ENGINE_CLASS
