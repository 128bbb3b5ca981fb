// The AMX instructions of gemm_amx.h in plain C++, for tests on machines without them. Every one touches the memory that
// the instruction touches, and no other, so that an address sanitizer sees what a kernel reads and writes; what the
// instruction would refuse ends the process. Only for files compiled with ENGINE_CLASS and ENGINE_TILES.
#pragma once

#include <xmmintrin.h>  // prefetches and the modes of rounding: in every x86-64

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace engine::ENGINE_CLASS {

constexpr int kTiles = 8, kMostTileRows = 16, kMostRowBytes = 64;

// What a thread's tile registers hold, and the configuration that says how much of each is in use.
struct TileRegisters {
  bool configured;
  int rows[kTiles], row_bytes[kTiles];
  alignas(64) char data[kTiles][kMostTileRows][kMostRowBytes];
};

static thread_local TileRegisters tile_registers;

static inline void refuse_tile(const char* why) {
  std::fprintf(stderr, "tiles: %s\n", why);
  std::abort();
}

static inline TileRegisters& tiles_in_use(int tile) {
  TileRegisters& registers = tile_registers;
  if (!registers.configured) refuse_tile("used without a configuration; call _tile_loadconfig first");
  if (tile < 0 || tile >= kTiles) refuse_tile("there are tiles 0 to 7");
  return registers;
}

// 64 bytes: palette, start row, 14 unused, 16 x bytes a row (16 bits), 16 x rows.
static inline void _tile_loadconfig(const void* config) {
  unsigned char bytes[64];
  std::memcpy(bytes, config, sizeof(bytes));
  if (bytes[0] != 1) refuse_tile("the configuration's palette is not 1");
  TileRegisters& registers = tile_registers;
  std::memset(&registers, 0, sizeof(registers));
  registers.configured = true;
  for (int i = 0; i < kTiles; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    registers.row_bytes[i] = row_bytes;
    registers.rows[i] = bytes[48 + i];
    if (row_bytes > kMostRowBytes || registers.rows[i] > kMostTileRows) refuse_tile("a tile has 16 rows of 64 bytes");
  }
}

static inline void _tile_release() { tile_registers.configured = false; }

static inline void _tile_zero(int tile) { std::memset(tiles_in_use(tile).data[tile], 0, sizeof(tile_registers.data[tile])); }

static inline void _tile_loadd(int tile, const void* base, int64_t stride) {
  TileRegisters& registers = tiles_in_use(tile);
  std::memset(registers.data[tile], 0, sizeof(registers.data[tile]));
  for (int r = 0; r < registers.rows[tile]; ++r)
    std::memcpy(registers.data[tile][r], static_cast<const char*>(base) + r * stride, registers.row_bytes[tile]);
}

static inline void _tile_stored(int tile, void* base, int64_t stride) {
  TileRegisters& registers = tiles_in_use(tile);
  for (int r = 0; r < registers.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, registers.data[tile][r], registers.row_bytes[tile]);
}

typedef float TileFloats __attribute__((vector_size(64)));
typedef uint32_t TileWords __attribute__((vector_size(64)));

// A word of `a` against a row of words of `b`: the low halves, then the high ones. The product of two bf16 is exact in
// float, so that adding it rounds once, as the instruction does. Registers only: nothing here for a sanitizer to see.
__attribute__((noinline, no_sanitize("address", "undefined"))) static void add_tile_products(
    TileRegisters& registers, int to, int a, int b) {
  for (int m = 0; m < registers.rows[to]; ++m) {
    TileFloats sum;
    std::memcpy(&sum, registers.data[to][m], sizeof(sum));
    for (int k = 0; k < registers.row_bytes[a] / 4; ++k) {
      uint32_t pair;
      std::memcpy(&pair, registers.data[a][m] + 4 * k, 4);
      TileWords words;
      std::memcpy(&words, registers.data[b][k], sizeof(words));
      const TileWords low = words << 16, high = words & 0xffff0000u;
      const TileWords pair_low = TileWords{} + (pair << 16), pair_high = TileWords{} + (pair & 0xffff0000u);
      sum = sum + (TileFloats)pair_low * (TileFloats)low;
      sum = sum + (TileFloats)pair_high * (TileFloats)high;
    }
    std::memcpy(registers.data[to][m], &sum, registers.row_bytes[to]);
  }
}

static inline void _tile_dpbf16ps(int to, int a, int b) {
  TileRegisters& registers = tiles_in_use(to);
  const auto &rows = registers.rows, &row_bytes = registers.row_bytes;
  if (to == a || to == b || a == b) refuse_tile("a product wants three different tiles");
  if (rows[to] != rows[a] || row_bytes[to] != row_bytes[b] || row_bytes[a] != 4 * rows[b])
    refuse_tile("the shapes of a product's tiles do not fit");
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // denormals are zero, in and out; to nearest even; no exceptions: whatever the thread's modes are
  add_tile_products(registers, to, a, b);
  _mm_setcsr(before);
}

// The conversion that goes with the tiles: to nearest even, denormals are zero, a NaN keeps its sign and upper bits.
struct alignas(32) __m256bh {
  uint16_t lanes[16];
};

static inline __m256bh _mm512_cvtneps_pbh(TileFloats v) {
  __m256bh half;
  for (int i = 0; i < 16; ++i) {
    const float lane = v[i];
    uint32_t bits;
    std::memcpy(&bits, &lane, 4);
    if (lane != lane)
      bits |= 0x400000;
    else if ((bits & 0x7f800000) == 0)
      bits &= 0x80000000;
    else
      bits += 0x7fff + ((bits >> 16) & 1);
    half.lanes[i] = static_cast<uint16_t>(bits >> 16);
  }
  return half;
}

}  // namespace engine::ENGINE_CLASS
