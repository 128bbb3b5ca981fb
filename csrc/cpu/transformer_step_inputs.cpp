// Checks at the border of transformer_step, and its inputs as plain pointers.
#ifndef ENGINE_CLASS

#include "transformer_step.h"

#include <torch/library.h>

namespace engine {
namespace {

constexpr int64_t kOfNetwork = 6, kOfLayer = 20;  // tensors
constexpr int64_t kNumbers = 12;                  // of `shape`

// Takes one tensor after the other, each under its name.
class Reader {
 public:
  explicit Reader(const Weights& weights) : weights_(weights) {}

  std::optional<at::Tensor> tensor() { return weights_.get(next_++); }

  const at::Tensor needed(const char* name) {
    const std::optional<at::Tensor> given = tensor();
    TORCH_CHECK_VALUE(given.has_value(), "weights[", next_ - 1, "]: got None, want ", name);
    return *given;
  }

  const float* vector(int64_t size, const char* name) {
    const at::Tensor given = needed(name);
    check_float_vector(given, size, name);
    return given.const_data_ptr<float>();
  }

  const float* optional_vector(int64_t size, const char* name) {
    const std::optional<at::Tensor> given = tensor();
    if (!given) return nullptr;
    check_float_vector(*given, size, name);
    return given->const_data_ptr<float>();
  }

  Norm norm(int64_t size, const char* name) {
    const float* weight = vector(size, name);
    return {weight, optional_vector(size, name)};
  }

  Linear linear(int64_t cols, int64_t depth, at::ScalarType storage, const char* name) {
    const Right right = right_of(needed(name), storage, cols, depth);
    return {right, cols, depth, optional_vector(cols, name)};
  }

 private:
  const Weights& weights_;
  int64_t next_ = 0;
};

at::Tensor table(const at::Tensor& given, int64_t rows, int64_t width, const char* name) {
  check_cpu_contiguous(given, name);
  check_activation(given, name);
  TORCH_CHECK_VALUE(given.dim() == 2 && given.size(1) == width && (rows == 0 || given.size(0) == rows), name,
                    ": got shape ", given.sizes(), ", want (", rows, ", ", width, ")");
  return given;
}

Layer layer_of(Reader& read, const Network& n, at::ScalarType storage) {
  const int64_t heads = n.query_heads * n.head_size, keys = n.key_heads * n.head_size;
  Layer layer{};
  layer.input = read.norm(n.hidden, "input_layernorm");
  layer.q = read.linear(heads, n.hidden, storage, "q_proj");
  layer.k = read.linear(keys, n.hidden, storage, "k_proj");
  layer.v = read.linear(keys, n.hidden, storage, "v_proj");
  layer.q_norm = read.optional_vector(n.head_size, "q_norm");
  layer.k_norm = read.optional_vector(n.head_size, "k_norm");
  layer.o = read.linear(n.hidden, heads, storage, "o_proj");
  layer.inner = read.norm(n.hidden, "post_attention_layernorm");
  if (n.gated) {
    layer.gate = read.linear(n.inner, n.hidden, storage, "gate_proj");
  } else {
    read.tensor(), read.tensor();
  }
  layer.up = read.linear(n.inner, n.hidden, storage, "up_proj");
  layer.down = read.linear(n.hidden, n.inner, storage, "down_proj");
  TORCH_CHECK_VALUE(!layer.q_norm == !layer.k_norm, "q_norm, k_norm: got one, want both or none");
  return layer;
}

void put_cache(Network& n, at::TensorList keys, at::TensorList values, at::ScalarType storage) {
  const auto layers = n.layers.size();
  TORCH_CHECK_VALUE(keys.size() == layers && values.size() == layers && layers > 0, "keys, values: got ", keys.size(),
                    " and ", values.size(), ", want one a layer, ", layers);
  for (size_t i = 0; i < layers; ++i) {
    check_dtype(keys[i], storage, "cache");
    check_pages_of_heads(keys[i], values[i], n.heads());
    TORCH_CHECK_VALUE(keys[i].size(0) == keys[0].size(0), "cache: got ", keys[i].size(0), " pages, want ",
                      keys[0].size(0), " in every layer");
    n.layers[i].keys = keys[i].data_ptr(), n.layers[i].values = values[i].data_ptr();
  }
}

void check_ids(const at::Tensor& ids, int64_t rows, int64_t below, const char* name) {
  check_cpu_contiguous(ids, name);
  check_dtype(ids, at::kLong, name);
  TORCH_CHECK_VALUE(ids.dim() == 1 && ids.size(0) == rows, name, ": got shape ", ids.sizes(), ", want (", rows, ",)");
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    TORCH_CHECK_VALUE(id[i] >= 0 && id[i] < below, name, "[", i, "]: got ", id[i], ", want 0 ... ", below - 1);
}

}  // namespace

Network network_of(const Weights& weights, at::IntArrayRef shape, double eps, at::TensorList keys,
                   at::TensorList values) {
  TORCH_CHECK_VALUE(shape.size() == kNumbers, "shape: got ", shape.size(), " numbers, want ", kNumbers);
  const int64_t layers = shape[2];
  TORCH_CHECK_VALUE(static_cast<int64_t>(weights.size()) == kOfNetwork + kOfLayer * layers, "weights: got ",
                    weights.size(), " tensors, want ", kOfNetwork + kOfLayer * layers);
  Network n{};
  n.hidden = shape[0], n.vocabulary = shape[1], n.query_heads = shape[3], n.key_heads = shape[4];
  n.head_size = shape[5], n.inner = shape[6], n.rotated = shape[7];
  n.rms = shape[8], n.gated = shape[9], n.gelu_tanh = shape[10], n.parallel_residual = shape[11];
  n.eps = static_cast<float>(eps);
  TORCH_CHECK_VALUE(n.key_heads > 0 && n.query_heads % n.key_heads == 0 && n.query_heads <= kMaxHeads,
                    "shape: got ", n.query_heads, " query and ", n.key_heads, " key heads, want a multiple, at most ",
                    kMaxHeads);
  Reader read(weights);
  n.tokens = table(read.needed("embed_tokens"), n.vocabulary, n.hidden, "embed_tokens");
  const at::ScalarType storage = n.tokens.scalar_type();
  n.arithmetic = weight_arithmetic(storage);
  n.bf16 = n.arithmetic == Arithmetic::tiles, n.pages_bf16 = storage == at::kBFloat16;
  n.positions = read.tensor();
  if (n.positions) table(*n.positions, 0, n.hidden, "embed_positions");
  const std::optional<at::Tensor> angles = read.tensor();
  TORCH_CHECK_VALUE(angles.has_value() == (n.rotated > 0) && n.rotated <= n.head_size, "rope table: want one where ",
                    n.rotated, " channels rotate");
  if (angles) n.angles = table(*angles, 0, n.rotated, "rope table");
  n.last = read.norm(n.hidden, "norm");
  n.head = right_of(read.needed("head"), storage, n.vocabulary, n.hidden);
  for (int64_t i = 0; i < layers; ++i) n.layers.push_back(layer_of(read, n, storage));
  put_cache(n, keys, values, storage);
  return n;
}

Sequences sequences_of(const at::Tensor& tokens, const at::Tensor& positions, const at::Tensor& cu,
                       const at::Tensor& page_table, const Network& network, int64_t pages) {
  const int64_t rows = tokens.dim() == 1 ? tokens.size(0) : 0;
  check_ids(tokens, rows, network.vocabulary, "tokens");
  const int64_t most = page_table.dim() == 2 ? page_table.size(1) : 0;
  int64_t positions_known = most * kPage;
  if (network.angles.defined()) positions_known = std::min(positions_known, network.angles.size(0));
  if (network.positions) positions_known = std::min(positions_known, network.positions->size(0));
  check_ids(positions, rows, positions_known, "positions");
  check_offsets(cu, rows, "cu");
  check_cpu_contiguous(page_table, "page_table");
  check_dtype(page_table, at::kInt, "page_table");
  const int64_t count = cu.size(0) - 1;
  TORCH_CHECK_VALUE(page_table.dim() == 2 && page_table.size(0) == count, "page_table: got shape ", page_table.sizes(),
                    ", want (", count, ", pages)");
  Sequences s{tokens.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>(), cu.const_data_ptr<int32_t>(),
              page_table.const_data_ptr<int32_t>(), count, most, std::vector<int32_t>(rows)};
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(s.new_rows(i) > 0, "cu: sequence ", i, " has no new row, want 1 or more");
    for (int64_t r = s.begin(i); r < s.begin(i + 1); ++r) {
      s.owner[r] = static_cast<int32_t>(i);
      TORCH_CHECK_VALUE(s.position[r] == s.start(i) + r - s.begin(i), "positions[", r, "]: got ", s.position[r],
                        ", want ", s.start(i) + r - s.begin(i), ", one after the other");
    }
    for (int64_t p = 0; p * kPage <= s.position[s.begin(i + 1) - 1]; ++p)
      TORCH_CHECK_VALUE(s.pages(i)[p] >= 0 && s.pages(i)[p] < pages, "page_table[", i, "][", p, "]: got ",
                        s.pages(i)[p], ", want 0 ... ", pages - 1);
  }
  return s;
}

double* phase_seconds(const std::optional<at::Tensor>& seconds) {
  if (!seconds) return nullptr;
  check_cpu_contiguous(*seconds, "seconds");
  check_dtype(*seconds, at::kDouble, "seconds");
  TORCH_CHECK_VALUE(seconds->dim() == 1 && seconds->size(0) == kPhases, "seconds: got shape ", seconds->sizes(),
                    ", want (", static_cast<int>(kPhases), ",)");
  return seconds->data_ptr<double>();
}

void check_uniform(const at::Tensor& uniform, int64_t rows, double temperature) {
  check_cpu_contiguous(uniform, "uniform");
  check_dtype(uniform, at::kDouble, "uniform");
  TORCH_CHECK_VALUE(uniform.dim() == 1 && uniform.size(0) == rows, "uniform: got shape ", uniform.sizes(), ", want (",
                    rows, ",)");
  TORCH_CHECK_VALUE(temperature > 0, "temperature: got ", temperature, ", want a number above 0");
}

}  // namespace engine
#endif
