// Small kernels that prove the shim: driver NAME ORDER SEED prints what the kernel computed, or ends with a message.
#include <map>

#include "cases.h"

namespace {

using emulated::Guarded;
constexpr unsigned kAll = 0xffffffffu;

// Right: the sum of the block's values, by shuffles, shared memory and barriers.
void block_sum(int* out) {
  SHARED_ARRAY(int, partial, 4);
  int x = static_cast<int>(threadIdx.x);
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kAll, x, bits);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  int total = 0;
  for (const int each : partial) total += each;
  out[threadIdx.x] = total;
}

void without_barrier(int* out) {
  SHARED_ARRAY(int, held, 64);
  held[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = held[63 - threadIdx.x];
}

void fresh_shared(int* out) {
  SHARED_ARRAY(int, held, 64);
  out[threadIdx.x] = held[threadIdx.x];
  __syncthreads();
  held[threadIdx.x] = 1;  // the next block does not see it
}

void dynamic_shared(int* out) {
  DYNAMIC_SHARED(int, held);
  held[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = held[63 - threadIdx.x];
}

void outside_static(int* out) {
  SHARED_ARRAY(int, held, 64);
  int* first = held.data();
  first[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 0;
}

void outside_dynamic(int* out) {
  DYNAMIC_SHARED(int, held);
  held[static_cast<int>(threadIdx.x) - 1] = 1;
  out[threadIdx.x] = 0;
}

void outside_output(int* out) { out[threadIdx.x + 1] = 0; }

void barriers_of_two_branches(int* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0;
}

void returns_before_a_barrier(int* out) {
  out[threadIdx.x] = 0;
  if (threadIdx.x == 5) return;
  __syncthreads();
}

void waits_for_each_other(int* out) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncwarp();
  out[threadIdx.x] = 0;
}

void mask_without_itself(int* out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1, 0); }
void masks_that_differ(int* out) { out[threadIdx.x] = __shfl_sync(threadIdx.x == 3 ? 0xffu : kAll, 1, 0); }
void reads_a_lane_apart(int* out) {
  out[threadIdx.x] = threadIdx.x % 32 < 16 ? __shfl_sync(0xffffu, 1, 20) : 0;
}
void operations_that_differ(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(kAll, 1, 0) : static_cast<int>(__ballot_sync(kAll, 1));
}
void lane_that_has_returned(int* out) {
  out[threadIdx.x] = 0;
  if (threadIdx.x % 32 == 7) return;
  __syncwarp();
}

// Right: two halves of a warp, each with its own mask, apart from each other.
void halves(int* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
  int x = static_cast<int>(threadIdx.x);
  if (threadIdx.x % 32 < 16) {
    x = __shfl_sync(mask, x, 3);
  } else {
    __syncwarp(mask);
    x = __shfl_sync(mask, x, 20);
  }
  out[threadIdx.x] = x;
}

// Right: each operation against what the lane can work out alone; out is 1 where all hold.
void operations(int* out) {
  const int i = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  bool right = __shfl_up_sync(kAll, i, 3) == (i < 3 ? i : i - 3);
  right &= __shfl_down_sync(kAll, double(i), 5) == (i > 26 ? i : i + 5);
  right &= __shfl_xor_sync(kAll, int64_t{i} << 40, 9) == int64_t{i ^ 9} << 40;
  right &= __shfl_sync(kAll, float(i), 2, 8) == float(i / 8 * 8 + 2);
  right &= __shfl_up_sync(kAll, i, 1, 16) == (i % 16 == 0 ? i : i - 1);
  right &= __ballot_sync(kAll, i % 3 == 0) == 0x49249249u;
  right &= __any_sync(kAll, i == 31) && !__any_sync(kAll, 0) && __all_sync(kAll, 1) && !__all_sync(kAll, i != 4);
  right &= __reduce_add_sync(kAll, i - 40) == 496 - 32 * 40 && __reduce_min_sync(kAll, -i) == -31;
  right &= __reduce_max_sync(kAll, -i - 2) == -2;
  right &= __syncthreads_count(warp == 0) == 32;
  out[threadIdx.x] = right;
}

void counts(int* out) {
  atomicAdd(&out[0], 1);
  atomicMax(&out[1], static_cast<int>(threadIdx.x));
}

void of_blocks(int* out) {
  out[(blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x * blockDim.y + threadIdx.y * blockDim.x + threadIdx.x] =
      static_cast<int>(1000 * blockIdx.y + 100 * blockIdx.x + 10 * threadIdx.y + threadIdx.x);
}

struct Start {
  void (*kernel)(int*);
  dim3 grid = 1, block = 64;
  size_t dynamic = 0;
  size_t results = 64;
};

const std::map<std::string, Start> kStarts = {
    {"block_sum", {block_sum, 1, 128, 0, 128}},
    {"without_barrier", {without_barrier}},
    {"fresh_shared", {fresh_shared, 2}},
    {"dynamic_shared", {dynamic_shared, 1, 64, 256}},
    {"outside_static", {outside_static}},
    {"outside_dynamic", {outside_dynamic, 1, 64, 256}},
    {"outside_output", {outside_output}},
    {"barriers_of_two_branches", {barriers_of_two_branches}},
    {"returns_before_a_barrier", {returns_before_a_barrier}},
    {"waits_for_each_other", {waits_for_each_other, 1, 32}},
    {"mask_without_itself", {mask_without_itself}},
    {"masks_that_differ", {masks_that_differ}},
    {"reads_a_lane_apart", {reads_a_lane_apart}},
    {"operations_that_differ", {operations_that_differ}},
    {"lane_that_has_returned", {lane_that_has_returned}},
    {"lane_that_is_not_there", {operations, 1, 48}},
    {"halves", {halves, 1, 32, 0, 32}},
    {"operations", {operations}},
    {"counts", {counts, 3}},
    {"of_blocks", {of_blocks, dim3(2, 2), dim3(4, 2), 0, 32}},
    {"no_blocks", {of_blocks, 0}},
    {"too_many_threads", {of_blocks, 1, 1025}},
    {"too_many_bytes", {of_blocks, 1, 1, size_t{64} << 10}},
};

}  // namespace

int main(int, char** arguments) {
  const Start& start = kStarts.at(arguments[1]);
  emulated::machine().order = static_cast<emulated::Order>(std::atoi(arguments[2]));
  emulated::machine().seed = static_cast<uint64_t>(std::atoi(arguments[3]));
  Guarded<int> out(start.results);
  std::memset(out.data(), 0, start.results * sizeof(int));
  KERNEL_LAUNCH(start.kernel, start.grid, start.block, start.dynamic, nullptr, out.data());
  out.check("the results");
  for (size_t i = 0; i < start.results; ++i) std::printf("%d ", out.data()[i]);
}
