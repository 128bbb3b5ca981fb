// The part of CUDA that the kernels here use, on the CPU: the .cuh files compile with g++ unchanged.
//
// Not here: tensor cores, asynchronous copies, clusters, textures, cooperative groups, and waiting for another block
// (blocks run one after the other, in the machine's order).
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <type_traits>
#include <utility>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

#define threadIdx (::emulated::machine().current().thread)
#define blockIdx (::emulated::machine().at)
#define blockDim (::emulated::machine().block)
#define gridDim (::emulated::machine().grid)

// `type name[count]` in shared memory, in both compilers; `type* name` over the launch's dynamic bytes.
#define SHARED_ARRAY(type, name, count) \
  auto& name = *static_cast<std::array<type, count>*>(::emulated::machine().shared.array(#name, sizeof(type) * (count)))
#define DYNAMIC_SHARED(type, name)                                 \
  type* name = static_cast<type*>(::emulated::machine().shared.array( \
      "the dynamic bytes", ::emulated::machine().dynamic_bytes))
#define KERNEL_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::emulated::launch(#kernel, kernel, grid, block, shared, stream, __VA_ARGS__)

using cudaStream_t = void*;

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) double2 { double x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

using std::max;
using std::min;

namespace emulated {

template <class Kernel, class... Given>
void launch(const char* name, Kernel kernel, dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t,
            Given... given) {
  Block& m = machine();
  m.kernel = name;
  m.grid = grid;
  m.block = block;
  m.at = dim3(0, 0, 0);
  m.dynamic_bytes = dynamic_bytes;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    m.fail("invalid block of %u x %u x %u threads", block.x, block.y, block.z);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    m.fail("invalid grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  if (dynamic_bytes > (size_t{48} << 10))
    m.fail("%zu dynamic bytes: over 48 KiB a kernel must ask first", dynamic_bytes);
  const std::function<void()> body = [&] { kernel(given...); };
  for (m.at.z = 0; m.at.z < grid.z; ++m.at.z)
    for (m.at.y = 0; m.at.y < grid.y; ++m.at.y)
      for (m.at.x = 0; m.at.x < grid.x; ++m.at.x) m.run(body);
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "what a shuffle can move");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The lane's value of `source` lanes; a source outside the lane's group of `width` gives back its own.
template <class T>
T shuffle(unsigned mask, T value, int64_t source, int width, int line) {
  const unsigned lane = machine().current().lane();
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0)
    machine().fail("shuffle at line %d: width %d", line, width);
  const int64_t first = lane - lane % static_cast<unsigned>(width);
  const bool inside = source >= first && source < first + width;
  const unsigned from = inside ? static_cast<unsigned>(source) : lane;
  return from_bits<T>(machine().meet({Operation::shuffle, mask, line, to_bits(value), from}));
}

inline int64_t lane() { return machine().current().lane(); }
inline int64_t group(int width) { return lane() - lane() % width; }

}  // namespace emulated

#define EMULATED_LINE int line = __builtin_LINE()

inline void __syncthreads(EMULATED_LINE) {
  emulated::machine().meet({emulated::Operation::barrier, 0, line, 0, 0});
}
inline int __syncthreads_count(int predicate, EMULATED_LINE) {
  const auto vote = static_cast<uint64_t>(predicate != 0);
  return static_cast<int>(emulated::machine().meet({emulated::Operation::barrier_count, 0, line, vote, 0}));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATED_LINE) {
  emulated::machine().meet({emulated::Operation::sync_warp, mask, line, 0, 0});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATED_LINE) {
  return emulated::shuffle(mask, value, emulated::group(width) + (source & (width - 1)), width, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATED_LINE) {
  return emulated::shuffle(mask, value, emulated::lane() - delta, width, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATED_LINE) {
  return emulated::shuffle(mask, value, emulated::lane() + delta, width, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATED_LINE) {
  return emulated::shuffle(mask, value, emulated::lane() ^ bits, width, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATED_LINE) {
  const auto vote = static_cast<uint64_t>(predicate != 0);
  return static_cast<unsigned>(emulated::machine().meet({emulated::Operation::ballot, mask, line, vote, 0}));
}
inline int __any_sync(unsigned mask, int predicate, EMULATED_LINE) { return __ballot_sync(mask, predicate, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, EMULATED_LINE) {
  return __ballot_sync(mask, predicate, line) == mask;
}

inline int __reduce_add_sync(unsigned mask, int value, EMULATED_LINE) {
  const uint64_t bits = emulated::to_bits(value);
  return static_cast<int>(emulated::machine().meet({emulated::Operation::reduce_add, mask, line, bits, 0}));
}
inline int __reduce_min_sync(unsigned mask, int value, EMULATED_LINE) {
  const uint64_t bits = emulated::to_bits(value);
  return static_cast<int>(emulated::machine().meet({emulated::Operation::reduce_min, mask, line, bits, 0}));
}
inline int __reduce_max_sync(unsigned mask, int value, EMULATED_LINE) {
  const uint64_t bits = emulated::to_bits(value);
  return static_cast<int>(emulated::machine().meet({emulated::Operation::reduce_max, mask, line, bits, 0}));
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline void __threadfence() {}

// A fiber is not interrupted between two operations of its block, so plain memory operations are atomic.
template <class T>
T atomicAdd(T* at, T value) {
  return std::exchange(*at, static_cast<T>(*at + value));
}
template <class T>
T atomicMax(T* at, T value) {
  return std::exchange(*at, std::max(*at, value));
}
template <class T>
T atomicMin(T* at, T value) {
  return std::exchange(*at, std::min(*at, value));
}
template <class T>
T atomicExch(T* at, T value) {
  return std::exchange(*at, value);
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
  const T old = *at;
  if (old == expected) *at = value;
  return old;
}
