// The micro-kernel on fused multiply-adds: ROWS x PANELS panels of float accumulators in registers. Class half only.
#pragma once

#include "gemm.h"
#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace engine::ENGINE_CLASS {

constexpr int kPanel = 2 * kLanes;  // columns

// Rows of one pass: what the registers hold beside two vectors of B and a broadcast.
#if ENGINE_LANES == 16
constexpr int kFmaRows = 12;
#elif ENGINE_LANES == 8
constexpr int kFmaRows = 6;
#else
constexpr int kFmaRows = 4;
#endif

// One rounding on every class that has the instruction, whatever the compiler would contract.
ENGINE_INLINE vfloat fmadd(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// kPiece: depths summed in registers before they are added to C. In float32 one chain over a whole depth loses digits that
// a blocked sum keeps (SmolLM2's logits: 3.7e-4 from torch's instead of below 1e-4), and costs 3 % less; with weights
// rounded to bf16 the digits are not there. The pieces start at fixed depths: the same bits in every pass.
struct FloatPanel {
  static constexpr int64_t kPiece = 128;
  static constexpr int64_t kDepthBytes = 4 * kPanel;
  static constexpr bool kInRows = false;
  ENGINE_INLINE void read(const char* p, vfloat& low, vfloat& high) {
    low = load(reinterpret_cast<const float*>(p));
    high = load(reinterpret_cast<const float*>(p) + kLanes);
  }
};

struct PairPanel {
  static constexpr int64_t kPiece = 1024;
  static constexpr int64_t kDepthBytes = 2 * kPanel;
  static constexpr bool kInRows = false;
  ENGINE_INLINE void read(const char* p, vfloat& low, vfloat& high) {
    vuint words;
    std::memcpy(&words, p, sizeof(words));
    const vuint shifted = words << 16, masked = words & 0xffff0000u;
    low = reinterpret_cast<vfloat>(shifted);
    high = reinterpret_cast<vfloat>(masked);
  }
};

// The same columns read from the rows of a matrix (K, N) as they lie, without packing. Of bf16 a word holds two columns side
// by side: a panel's sums come out with the even columns first.
struct FloatRows : FloatPanel {
  static constexpr bool kInRows = true;
};
struct PairRows : PairPanel {
  static constexpr bool kInRows = true;
};

struct FmaArguments {
  const float* a;
  int64_t row, step;  // of A: floats to the next row, to the next depth; one of them is 1
  const char* b;
  int64_t panel_bytes, depth;
  float* c;
  int64_t stride;  // of C
  bool load_c;
  const char* ahead;  // memory that will be read next, fetched by and by
  int64_t ahead_step;
  int64_t turn;  // depth from which on memory is fetched from `then` on; several panels only
  const char* then;
  int64_t b_step;  // bytes from a depth of B to the next, where it lies in rows
};

// Depths of one turn of the loop over a panel. A core that is shared with a neighbour's thread takes 3 instructions a cycle
// of ours: what turns the loop costs as much there as what multiplies. One depth a turn: 28 for 12 multiply-adds, eight: 23.
// Several panels beside each other would not fit the registers that way.
template <int ROWS, int PANELS>
constexpr int kTogether = ENGINE_LANES == 8 && PANELS == 1 && ROWS > 2 ? 8 : 1;

// One multiply-add of that loop. As the compiler's own, eight depths of them would change which register is written from
// one to the next, and leave some sums in memory.
template <bool kWritten>
ENGINE_INLINE void add_product(vfloat& sum, vfloat a, vfloat b) {
#if ENGINE_LANES == 8
  if constexpr (kWritten) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return;
  }
#endif
  sum = fmadd(a, b, sum);
}

// A pointer whose next places the compiler cannot foresee: it would hold eight depths' distances of each row in memory.
template <typename T>
ENGINE_INLINE void unforeseen(T*& p) {
  asm("" : "+r"(p));
}

// Rows of A that one pointer reaches: an address adds nothing, once or twice the distance of two rows. With a distance of
// its own for each of 12 rows GCC runs out of registers, keeps some in vectors and moves them back in the loop, through the
// ports of the multiply-adds: 2 moves to 24 of them. Rows at constant distances, and few, need one pointer.
template <int ROWS, bool kAlong>
constexpr int kReach = ENGINE_LANES == 16 && kAlong ? 3 : ROWS;

// acc += a depth of A, of rows `row` apart, times one of B. Every loop over registers is unrolled completely, or the
// accumulators would live in memory.
template <int ROWS, int PANELS, class B, int kRows>
ENGINE_INLINE void add_depth(const float* const* a, int64_t row, const char* b, int64_t panel_bytes,
                             vfloat (&acc)[ROWS][2 * PANELS]) {
  vfloat column[2 * PANELS];
#pragma GCC unroll 16
  for (int p = 0; p < PANELS; ++p) B::read(b + p * panel_bytes, column[2 * p], column[2 * p + 1]);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    const vfloat x = splat(a[r / kRows][r % kRows * row]);
#pragma GCC unroll 16
    for (int v = 0; v < 2 * PANELS; ++v) add_product<(kTogether<ROWS, PANELS> > 1)>(acc[r][v], x, column[v]);
  }
}

// kAlong: the depths of A lie side by side (step 1), else its rows.
template <int ROWS, int PANELS, class B, bool kAlong>
static void fma_loop(const FmaArguments& f) {
  float* const c = f.c;  // not through f, which the stores below might change for all GCC knows
  const int64_t stride = f.stride, depth = f.depth, panel_bytes = f.panel_bytes;
  const int64_t row = kAlong ? f.row : 1, step = kAlong ? 1 : f.step;
  const int64_t ahead_step = f.ahead_step, turn = f.turn, b_step = B::kInRows ? f.b_step : B::kDepthBytes;
  constexpr int kRows = kReach<ROWS, kAlong>, kPointers = (ROWS + kRows - 1) / kRows;
  const float* a[kPointers];
#pragma GCC unroll 16
  for (int i = 0; i < kPointers; ++i) a[i] = f.a + i * kRows * row;
  const auto next_depth = [&](bool hidden) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kPointers; ++i) {
      a[i] += step;
      if (hidden) unforeseen(a[i]);
    }
  };
  const char *b = f.b, *ahead = f.ahead;
  constexpr int kTurn = kTogether<ROWS, PANELS>;
  constexpr int kFetched = kTurn > 1 && B::kDepthBytes < 64 ? 2 : 1;  // depths of a line of memory
  bool add = f.load_c;
  int64_t k = 0;
  do {
    const int64_t end = k + B::kPiece < depth ? k + B::kPiece : depth;
    vfloat acc[ROWS][2 * PANELS] = {};
    for (; k + kTurn <= end; k += kTurn) {
      if constexpr (PANELS > 1) ahead = k == turn ? f.then : ahead;
#pragma GCC unroll 8
      for (int i = 0; i < kTurn; ++i) {
        if (i % kFetched == 0) {
#pragma GCC unroll 16
          for (int p = 0; p < PANELS; ++p) __builtin_prefetch(ahead + p * panel_bytes);
          ahead += kFetched * ahead_step;
        }
        add_depth<ROWS, PANELS, B, kRows>(a, row, b, panel_bytes, acc);
        next_depth(kPointers > 1 || (kTurn > 1 && !kAlong));
        b += b_step;
        if (kTurn > 1 && B::kInRows) unforeseen(b);
      }
    }
    for (; k < end; ++k, b += b_step) {
      add_depth<ROWS, PANELS, B, kRows>(a, row, b, panel_bytes, acc);
      next_depth(kPointers > 1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < 2 * PANELS; ++v) {
        float* const to = c + r * stride + v * kLanes;
        store(to, add ? load(to) + acc[r][v] : acc[r][v]);
      }
    add = true;
  } while (k < depth);
}

template <int ROWS, int PANELS, class B>
static void fma_block(const FmaArguments& f) {
  f.step == 1 ? fma_loop<ROWS, PANELS, B, true>(f) : fma_loop<ROWS, PANELS, B, false>(f);
}

// One element of C, in C's type.
ENGINE_INLINE void store_one(const Out& out, int64_t at, float value) {
  if (out.bf16)
    static_cast<uint16_t*>(out.data)[at] = to_bf16(value);
  else
    static_cast<float*>(out.data)[at] = value;
}

ENGINE_INLINE void store_bf16(uint16_t* p, vfloat v) {
#if defined(ENGINE_TILES)
  const __m256bh half = _mm512_cvtneps_pbh(v);  // as store(), except that denormals become zero, as in the tiles
  std::memcpy(p, &half, sizeof(half));
#else
  store(p, v);
#endif
}

// Sums of a block, (rows, kPanel * panels) with `stride`, to C (with the bias, in C's type) and from C.
static void store_sums(const float* sums, int64_t stride, const Out& out, const Part& part) {
  for (int64_t row = part.row0; row < part.row1; ++row, sums += stride) {
    const int64_t at = row * out.stride;
    int64_t j = part.col0;
    for (; j + kLanes <= part.col1; j += kLanes) {
      vfloat v = load(sums + j - part.col0);
      if (out.bias) v += load(out.bias + j);
      if (out.bf16)
        store_bf16(static_cast<uint16_t*>(out.data) + at + j, v);
      else
        store(static_cast<float*>(out.data) + at + j, v);
    }
    for (; j < part.col1; ++j) store_one(out, at + j, sums[j - part.col0] + (out.bias ? out.bias[j] : 0.0f));
  }
}

ENGINE_INLINE void load_sums(float* sums, int64_t stride, int64_t width, const Out& out, const Part& part) {
  const int64_t cols = part.col1 - part.col0;
  for (int64_t row = part.row0; row < part.row1; ++row, sums += stride) {
    const float* c = static_cast<const float*>(out.data) + row * out.stride + part.col0;
    for (int64_t j = 0; j < width; ++j) sums[j] = j < cols ? c[j] : 0.0f;
  }
}

ENGINE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What is read after the panels before column `col` of a part.
ENGINE_INLINE const char* behind(const Right& right, const Part& part, int64_t col) {
  if (part.then && col >= part.col1) return part.then;
  return static_cast<const char*>(right.data) + (col + kPanel - 1) / kPanel * right.panel_bytes;
}

using FmaKernel = void (*)(const FmaArguments&);

template <class B, int ROWS = 1>
static FmaKernel fma_kernel(int64_t rows) {
  if constexpr (ROWS == kFmaRows)
    return &fma_block<ROWS, 1, B>;
  else
    return rows == ROWS ? &fma_block<ROWS, 1, B> : fma_kernel<B, ROWS + 1>(rows);
}

// At 1 to 3 rows one panel has too few chains to hide the latency of a multiply-add, and one stream of memory.
template <class B>
static FmaKernel fma_wide_kernel(int64_t rows, int& panels) {
  panels = rows == 1 ? 6 : rows == 2 ? 3 : 2;
  if (rows == 1) return &fma_block<1, 6, B>;
  if (rows == 2) return &fma_block<2, 3, B>;
  return &fma_block<3, 2, B>;
}

// Few rows are cut evenly (13 = 5 + 4 + 4): a pass of 1 to 3 rows waits for its own sums. Staged blocks are whole.
ENGINE_INLINE int64_t rows_of_pass(const Left& left, int64_t remaining) {
  if (left.row != left.block || remaining >= 4 * kFmaRows) return smaller(kFmaRows, remaining);
  const int64_t passes = (remaining + kFmaRows - 1) / kFmaRows;
  return (remaining + passes - 1) / passes;
}

// Rows [row0, row0 + rows) times `panels` panels from `panel` on.
template <class B>
static void fma_pass(FmaKernel kernel, FmaArguments& f, const Right& right, const Out& out, const Part& pass,
                     int panels) {
  alignas(64) float sums[12 * kPanel];  // the most rows times panels of any kernel
  const int64_t width = panels * kPanel;
  f.b = static_cast<const char*>(right.data) + pass.col0 / kPanel * right.panel_bytes;
  const bool direct = !out.bf16 && !out.bias && pass.col1 - pass.col0 == width;
  f.load_c = out.accumulate;
  f.c = direct ? static_cast<float*>(out.data) + pass.row0 * out.stride + pass.col0 : sums;
  f.stride = direct ? out.stride : width;
  if (!direct && out.accumulate) load_sums(sums, width, width, out, pass);
  kernel(f);
  if (!direct) store_sums(sums, width, out, pass);
}

constexpr int64_t kDepthsAhead = 64;  // of several panels: 12 KiB under way, more than the memory's time of response

// Panel by panel, all rows over one while it is in the first cache; the next one is fetched meanwhile, a share with each
// pass of rows. Few rows take several panels at once, each fetched some depths ahead.
template <class B>
static void fma_panels(const Left& left, const Right& right, int64_t depth, const Part& part, const Out& out) {
  const int64_t rows = part.row1 - part.row0, passes = (rows + kFmaRows - 1) / kFmaRows;
  FmaArguments f{};
  f.row = left.row, f.step = left.depth, f.depth = depth, f.panel_bytes = right.panel_bytes;
  int wide = 1;
  const FmaKernel wide_kernel = rows <= 3 ? fma_wide_kernel<B>(rows, wide) : nullptr;
  for (int64_t col = part.col0; col < part.col1;) {
    if (wide_kernel && part.col1 - col >= wide * kPanel) {
      const int64_t near = smaller(kDepthsAhead, depth);
      f.a = static_cast<const float*>(left.data) + part.row0 * left.block;
      f.ahead = static_cast<const char*>(right.data) + col / kPanel * right.panel_bytes + near * B::kDepthBytes;
      f.ahead_step = B::kDepthBytes;
      f.turn = depth - near, f.then = behind(right, part, col + wide * kPanel);
      fma_pass<B>(wide_kernel, f, right, out, {part.row0, part.row1, col, col + wide * kPanel}, wide);
      col += wide * kPanel;
      continue;
    }
    const char* next = behind(right, part, col + kPanel);
    f.ahead_step = B::kDepthBytes / passes;
    for (int64_t row = part.row0, pass = 0, n; row < part.row1; row += n, ++pass) {
      n = rows_of_pass(left, part.row1 - row);
      f.a = static_cast<const float*>(left.data) + row * left.block;
      f.ahead = next + depth * B::kDepthBytes / passes * pass;
      fma_pass<B>(fma_kernel<B>(n), f, right, out, {row, row + n, col, smaller(col + kPanel, part.col1)}, 1);
    }
    col += kPanel;
  }
}

// Many rows go over the panels a few passes at a time, which lie in the second cache with what they read next: all rows of a
// training batch would come from the third for every panel (7 to 10 % more time on AVX2). A decode step's panels come from
// memory, and its rows fit: there it is the panels that are read once.
constexpr int64_t kManyRows = 96, kRowsTogether = 4 * kFmaRows;

template <class B>
static void fma_product(const Left& left, const Right& right, int64_t depth, const Part& part, const Out& out) {
  const int64_t together = part.row1 - part.row0 < kManyRows ? part.row1 - part.row0 : kRowsTogether;
  for (Part some = part; some.row0 < part.row1; some.row0 = some.row1) {
    some.row1 = smaller(some.row0 + together, part.row1);
    fma_panels<B>(left, right, depth, some, out);
  }
}

}  // namespace engine::ENGINE_CLASS
