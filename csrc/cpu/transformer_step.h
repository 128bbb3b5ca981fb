// What transformer_step reads, checked once a call and then held as plain pointers. Host half only.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "attention_host.h"
#include "gemm_at.h"
#include "logprob.h"
#include "tensors.h"

namespace engine {

using Weights = c10::List<std::optional<at::Tensor>>;

constexpr int64_t kMaxHeads = 256;

// Rows of float32 or bfloat16, `stride` elements apart; memory for whole tiles of 16 rows.
struct Activation {
  at::Tensor memory;
  char* data = nullptr;
  int64_t width = 0, stride = 0;
  bool bf16 = false;

  Activation() = default;
  Activation(int64_t rows, int64_t width, int64_t stride, bool bf16) : width(width), stride(stride), bf16(bf16) {
    const auto options = at::TensorOptions().dtype(bf16 ? at::kBFloat16 : at::kFloat);
    const int64_t whole = (rows + 15) / 16 * 16;
    // A row's padding takes part in products with weights of 0, and 0 times nan is nan.
    memory = stride > width ? at::zeros({whole, stride}, options) : at::empty({whole, stride}, options);
    data = static_cast<char*>(memory.data_ptr());
  }
  char* at(int64_t row, int64_t column = 0) const { return data + (row * stride + column) * (bf16 ? 2 : 4); }
  int64_t bytes() const { return width * (bf16 ? 2 : 4); }
  Left left(int64_t rows, Arithmetic arithmetic) const {
    if (arithmetic != Arithmetic::tiles) return {data, stride, 1, stride, rows, nullptr, 0};
    return {data, stride, 32, stride, (rows + 15) / 16 * 16, nullptr, 0};
  }
  at::Tensor copy(int64_t rows) const {  // not by torch's copy_, whose code a step has driven from the caches
    at::Tensor out = at::empty({rows, width}, memory.options());
    for (int64_t r = 0; r < rows; ++r) std::memcpy(static_cast<char*>(out.data_ptr()) + r * bytes(), at(r), bytes());
    return out;
  }
};

// Rows that a product reads: for tiles, whole steps of the depth, and not all rows in one set of the cache.
inline Activation operand_rows(int64_t rows, int64_t width, bool bf16, Arithmetic arithmetic) {
  if (arithmetic != Arithmetic::tiles) return Activation(rows, width, width, bf16);
  const int64_t whole = (width + 31) / 32 * 32;
  return Activation(rows, width, whole % 2048 == 0 ? whole + 32 : whole, bf16);
}

struct Linear {
  Right right;
  int64_t cols, depth;
  const float* bias;
};
struct Norm {
  const float *weight, *bias;
};
struct Layer {
  Norm input, inner;
  Linear q, k, v, o, gate, up, down;
  const float *q_norm, *k_norm;
  void *keys, *values;
};

// Rows of an embedding in the storage dtype.
struct Table {
  const at::Tensor* rows = nullptr;
  template <typename Put>
  void each(int64_t row, Put put) const {
    const int64_t width = rows->size(1);
    if (rows->scalar_type() == at::kBFloat16) {
      const at::BFloat16* from = rows->const_data_ptr<at::BFloat16>() + row * width;
      for (int64_t i = 0; i < width; ++i) put(i, static_cast<float>(from[i]));
    } else {
      const float* from = rows->const_data_ptr<float>() + row * width;
      for (int64_t i = 0; i < width; ++i) put(i, from[i]);
    }
  }
};

struct Network {
  int64_t hidden, vocabulary, query_heads, key_heads, head_size, inner, rotated;
  bool rms, gated, gelu_tanh, parallel_residual;
  float eps;
  Arithmetic arithmetic;
  bool bf16, pages_bf16;  // activations between products, and pages of keys and values
  at::Tensor tokens, angles;
  std::optional<at::Tensor> positions;
  Norm last;
  Right head;
  std::vector<Layer> layers;
  Heads heads() const { return {bf16, query_heads, key_heads, head_size}; }
};

// The new rows, packed by sequence; each sequence's keys lie in its pages, at its rows' positions.
struct Sequences {
  const int64_t *token, *position;
  const int32_t *offset, *table;
  int64_t count, most_pages;
  std::vector<int32_t> owner;  // of each row

  int64_t rows() const { return offset[count]; }
  int64_t begin(int64_t s) const { return offset[s]; }
  int64_t new_rows(int64_t s) const { return offset[s + 1] - offset[s]; }
  int64_t start(int64_t s) const { return position[offset[s]]; }
  const int32_t* pages(int64_t s) const { return table + s * most_pages; }
  int64_t page_of(int64_t row) const { return pages(owner[row])[position[row] / kPage]; }
};

// Where the time of a step goes, as kernels/transformer_step.py names it.
enum Phase : int { kRows = 0, kProducts, kAttention, kHead, kSampling, kPhases };

// Adds up seconds by phase, on the first thread: each phase ends with a barrier. Nothing is read where nothing is asked.
class Watch {
 public:
  Watch(double* seconds, int thread) : seconds_(thread == 0 ? seconds : nullptr) {
    if (seconds_) last_ = std::chrono::steady_clock::now();
  }
  void mark(Phase phase) {
    if (!seconds_) return;
    const auto now = std::chrono::steady_clock::now();
    seconds_[phase] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  double* seconds_;
  std::chrono::steady_clock::time_point last_;
};

struct Drawn {
  const double* uniform;
  BlockStatistics* statistics;  // (rows, blocks)
  int64_t* token;
  float *logprob, *entropy;
};

// ValueError where a tensor does not fit; `shape` and the order of `weights` are kernels/transformer_step.py's.
Network network_of(const Weights& weights, at::IntArrayRef shape, double eps, at::TensorList keys,
                   at::TensorList values);
Sequences sequences_of(const at::Tensor& tokens, const at::Tensor& positions, const at::Tensor& cu,
                       const at::Tensor& page_table, const Network& network, int64_t pages);
double* phase_seconds(const std::optional<at::Tensor>& seconds);  // nullptr for none
void check_uniform(const at::Tensor& uniform, int64_t rows, double temperature);

}  // namespace engine
