// All layers of the network for the new rows of some sequences over cache pages, the head and the sampler: one parallel
// region. The contract is in kernels/transformer_step.py; every piece of arithmetic is an op's own row function.
#ifndef ENGINE_CLASS

#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "attention_host.h"
#include "logprob_at.h"
#include "row_kernels.h"
#include "team.h"
#include "transformer_step.h"
#include "transformer_step_products.h"

namespace engine {
namespace {

constexpr int64_t kRowsPerTask = 4, kBlocksPerTask = 2;

// What a step reads and writes, and the phases that every thread goes through.
class Step {
 public:
  Step(const Network& network, const Sequences& sequences)
      : net_(network), seq_(sequences), rows_(sequences.rows()), bf16_(network.bf16) {
    const int64_t heads = net_.query_heads * net_.head_size, keys = net_.key_heads * net_.head_size;
    residual_ = floats(rows_, net_.hidden), addend_ = floats(rows_, net_.hidden);
    normed_ = operand(rows_, net_.hidden), inner_ = operand(rows_, net_.inner), mixed_ = operand(rows_, heads);
    query_ = plain(rows_, heads), key_ = plain(rows_, keys), value_ = plain(rows_, keys);
    attended_ = plain(rows_, heads);
    up_ = plain(rows_, net_.inner);
    if (net_.gated) gate_ = plain(rows_, net_.inner);
    share_attention();
    const auto cut = [&](int64_t depth, std::vector<int64_t> columns) {
      return cut_products(rows_, depth, columns, net_.arithmetic);
    };
    cut_qkv_ = cut(net_.hidden, {heads, keys, keys}), cut_o_ = cut(heads, {net_.hidden});
    cut_inner_ = cut(net_.hidden, {net_.inner}), cut_down_ = cut(net_.inner, {net_.hidden});
    scratch_ = floats(at::get_num_threads(), (attention_decode_scratch(net_.heads()) + 15) / 16 * 16);
  }

  // The rows through all layers; `last` gets the final norm of each sequence's last row.
  void run(Team::Member& team, const Activation& last, Watch& watch) {
    embed(team);
    for (size_t i = 0; i < net_.layers.size(); ++i) {
      const Layer& layer = net_.layers[i];
      const bool is_last = i + 1 == net_.layers.size();
      rows(team, [&](int64_t r) {
        if (i > 0) add_to_residual(r);
        norm(layer.input, residual_.at(r), normed_.at(r));
      });
      watch.mark(kRows);
      products(team, cut_qkv_, normed_, {{&layer.q, &query_}, {&layer.k, &key_}, {&layer.v, &value_}},
               first_of_share(team, cut_o_, layer.o));
      watch.mark(kProducts);
      attend(team, layer);
      watch.mark(kAttention);
      const bool in_place = readable(attended_);
      if (!in_place) rows(team, [&](int64_t r) { std::memcpy(mixed_.at(r), attended_.at(r), attended_.bytes()); });
      watch.mark(kRows);
      products(team, cut_o_, in_place ? attended_ : mixed_, {{&layer.o, &addend_}},
               first_of_share(team, cut_inner_, net_.gated ? layer.gate : layer.up));
      watch.mark(kProducts);
      rows(team, [&](int64_t r) {
        if (!net_.parallel_residual) add_to_residual(r);
        norm(layer.inner, residual_.at(r), normed_.at(r));
        if (net_.parallel_residual) add_to_residual(r);
      });
      watch.mark(kRows);
      inner_products(team, layer);
      watch.mark(kProducts);
      products(team, cut_down_, inner_, {{&layer.down, &addend_}},
               is_last ? static_cast<const char*>(net_.head.data) : first_of_layer(team, net_.layers[i + 1]));
      watch.mark(kProducts);
    }
    team.each(seq_.count, [&](int64_t s) {
      const int64_t r = seq_.begin(s + 1) - 1;
      add_to_residual(r);
      norm(net_.last, residual_.at(r), last.at(s));
    });
    watch.mark(kRows);
  }

  // Statistics of the head's blocks, then a token, its log-prob and entropy for each row of `hidden`.
  void sample(Team::Member& team, const Head& head, const Drawn& drawn, Watch& watch) const {
    const int64_t count = seq_.count, blocks = vocabulary_blocks(head.vocabulary);
    const auto statistics = pick_logprob_statistics();
    team.each((blocks + kBlocksPerTask - 1) / kBlocksPerTask, [&](int64_t i) {
      const int64_t begin = i * kBlocksPerTask, end = std::min(begin + kBlocksPerTask, blocks);
      statistics(head, 0, count, begin, end, nullptr, drawn.statistics, nullptr);
    });
    watch.mark(kHead);
    const auto draw = pick_sample_token();
    const auto finish = pick_logprob_finish();
    team.each(count, [&](int64_t r) {
      const BlockStatistics* of_row = drawn.statistics + r * blocks;
      float z = 0.0f;
      drawn.token[r] = draw(head, r, count, of_row, drawn.uniform[r], &z);
      finish(of_row, blocks, 1, &z, {drawn.logprob + r, drawn.entropy + r, nullptr, nullptr});
    });
    watch.mark(kSampling);
  }

 private:
  struct AttentionTask {
    int64_t sequence, head0, head1;  // key heads
    RowGroup decoding;               // rows that are not rotated yet, or none: then `rows` of a prompt and one head
    Rows rows;
    int64_t work() const {
      return decoding.rows > 0 ? decoding.rows * (decoding.position[0] + 1) * (head1 - head0)
                               : rows.tokens * (rows.visible + rows.tokens / 2);
    }
  };
  struct Target {
    const Linear* weight;
    const Activation* out;
  };

  Activation plain(int64_t rows, int64_t width) const { return Activation(rows, width, width, bf16_); }
  Activation operand(int64_t rows, int64_t width) const { return operand_rows(rows, width, bf16_, net_.arithmetic); }
  static Activation floats(int64_t rows, int64_t width) { return Activation(rows, width, width, false); }

  // Rows that lie as they come can be read by tiles if they are whole steps of the depth, and not all in one cache set.
  bool readable(const Activation& a) const {
    return net_.arithmetic != Arithmetic::tiles || (a.width % 32 == 0 && a.stride % 2048 != 0);
  }

  template <typename Run>
  void rows(Team::Member& team, Run run) const {
    team.each((rows_ + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t i) {
      for (int64_t r = i * kRowsPerTask; r < std::min((i + 1) * kRowsPerTask, rows_); ++r) run(r);
    });
  }

  void embed(Team::Member& team) const {
    rows(team, [&](int64_t r) {
      float* x = reinterpret_cast<float*>(residual_.at(r));
      const Table tokens{&net_.tokens};
      tokens.each(seq_.token[r], [&](int64_t i, float value) { x[i] = value; });
      if (!net_.positions) return;
      const Table positions{&*net_.positions};
      positions.each(seq_.position[r], [&](int64_t i, float value) { x[i] += value; });
    });
  }

  void add_to_residual(int64_t r) const {
    float* x = reinterpret_cast<float*>(residual_.at(r));
    const float* more = reinterpret_cast<const float*>(addend_.at(r));
    for (int64_t i = 0; i < net_.hidden; ++i) x[i] += more[i];
  }

  void norm(const Norm& norm, const void* x, void* out) const {
    float mean, rstd;
    if (net_.rms)
      pick_rmsnorm_rows()(x, false, norm.weight, 1, net_.hidden, net_.eps, out, bf16_, &rstd);
    else
      pick_layernorm_rows()(x, false, norm.weight, norm.bias, 1, net_.hidden, net_.eps, out, bf16_, &mean, &rstd);
  }

  // Decoding rows that share keys are a task a head, another's heads are one task, or one each where there are few rows;
  // a prompt is cut by heads and rows.
  void share_attention() {
    const Heads shape = net_.heads();
    const int64_t heads = seq_.count >= 2 * at::get_num_threads() ? net_.key_heads : 1;
    const int64_t most = most_rows_of_group(seq_.count, shape);
    for (int64_t s = 0; s < seq_.count;) {
      if (seq_.new_rows(s) > 1) {
        share_prompt(s++, shape);
        continue;
      }
      int64_t end = s + 1;
      while (end < seq_.count && seq_.new_rows(end) == 1) ++end;
      const int64_t r = seq_.begin(s);
      const RowGroup group = first_group({r, end - s, 0, seq_.position + r, seq_.pages(s), seq_.most_pages}, most);
      const int64_t each = group.rows > 1 ? 1 : heads;
      for (int64_t h = 0; h < net_.key_heads; h += each) attention_.push_back({s, h, h + each, group, {}});
      s += group.rows;
    }
    std::stable_sort(attention_.begin(), attention_.end(),
                     [](const AttentionTask& a, const AttentionTask& b) { return a.work() > b.work(); });
  }

  void share_prompt(int64_t s, const Heads& shape) {
    prompts_ = true;
    for (int64_t h = 0; h < net_.key_heads; ++h)
      for (int64_t t = 0; t < seq_.new_rows(s); t += shape.chunk_tokens()) {
        const int64_t tokens = std::min(shape.chunk_tokens(), seq_.new_rows(s) - t);
        attention_.push_back({s, h, h + 1, {}, Rows{seq_.begin(s) + t, tokens, seq_.start(s) + t + 1}});
      }
  }

  void run_product(const Activation& from, const Target& to, Part part, const char* then) const {
    part.then = then;
    pick_product()(from.left(rows_, net_.arithmetic), to.weight->right, to.weight->depth, part,
                   {to.out->data, to.out->bf16, to.out->stride, false, to.weight->bias});
  }

  static const char* panels_at(const Linear& weight, int64_t column) {
    return static_cast<const char*>(weight.right.data) + column / pick_panel_columns()() * weight.right.panel_bytes;
  }

  // What this thread reads first of a phase, to be fetched at the end of the phase before.
  static const char* first_of_share(const Team::Member& team, const std::vector<ProductTask>& tasks,
                                    const Linear& weight) {
    const int64_t count = static_cast<int64_t>(tasks.size()), first = team.start_of_share(count);
    return first < count ? panels_at(weight, tasks[first].part.col0) : nullptr;
  }
  const char* first_of_layer(const Team::Member& team, const Layer& layer) const {
    const int64_t count = static_cast<int64_t>(cut_qkv_.size()), first = team.start_of_share(count);
    if (first >= count) return nullptr;
    const Linear* const weights[] = {&layer.q, &layer.k, &layer.v};
    return panels_at(*weights[cut_qkv_[first].weight], cut_qkv_[first].part.col0);
  }

  void products(Team::Member& team, const std::vector<ProductTask>& tasks, const Activation& from,
                std::initializer_list<Target> targets, const char* then) const {
    const int64_t count = static_cast<int64_t>(tasks.size()), end = team.end_of_share(count);
    team.each(count, [&](int64_t i) {
      const auto start = [&](const ProductTask& t) { return panels_at(*targets.begin()[t.weight].weight, t.part.col0); };
      run_product(from, targets.begin()[tasks[i].weight], tasks[i].part, i + 1 == end || i + 1 == count ? then : start(tasks[i + 1]));
    });
  }

  // gate and up, and their activation while they are in the cache.
  void inner_products(Team::Member& team, const Layer& layer) const {
    const int64_t count = static_cast<int64_t>(cut_inner_.size()), end = team.end_of_share(count);
    const Linear& first = net_.gated ? layer.gate : layer.up;
    team.each(count, [&](int64_t i) {
      const Part& part = cut_inner_[i].part;
      if (net_.gated) run_product(normed_, {&layer.gate, &gate_}, part, panels_at(layer.up, part.col0));
      run_product(normed_, {&layer.up, &up_}, part,
                  i + 1 == end || i + 1 == count ? first_of_share(team, cut_down_, layer.down)
                                                 : panels_at(first, cut_inner_[i + 1].part.col0));
      for (int64_t r = part.row0; r < part.row1; ++r) activate(r, part.col0, part.col1 - part.col0);
    });
  }

  // Queries and keys of some key heads of a row are rotated; keys and values go into their page.
  void rotate_and_store(const Layer& layer, int64_t r, int64_t head0, int64_t head1) const {
    const int64_t size = net_.head_size, heads = head1 - head0, group = net_.heads().group();
    const Heads part{bf16_, heads * group, heads, size};
    char *q = query_.at(r, head0 * group * size), *k = key_.at(r, head0 * size), *v = value_.at(r, head0 * size);
    float rstd[kMaxHeads];
    if (layer.q_norm) {
      pick_rmsnorm_rows()(q, bf16_, layer.q_norm, heads * group, size, net_.eps, q, bf16_, rstd);
      pick_rmsnorm_rows()(k, bf16_, layer.k_norm, heads, size, net_.eps, k, bf16_, rstd);
    }
    if (net_.rotated > 0) {
      const float* angles = net_.angles.const_data_ptr<float>() + seq_.position[r] * net_.rotated;
      pick_rope_token()(q, bf16_, angles, heads * group, size, net_.rotated, 1.0f, q);
      pick_rope_token()(k, bf16_, angles, heads, size, net_.rotated, 1.0f, k);
    }
    const int64_t place = (seq_.page_of(r) * net_.key_heads + head0) * page_head_bytes(size, net_.pages_bf16);
    pick_attention_page_write()(k, v, part, net_.pages_bf16, seq_.position[r] % kPage,
                                static_cast<char*>(layer.keys) + place, static_cast<char*>(layer.values) + place);
  }

  void attend(Team::Member& team, const Layer& layer) const {
    if (prompts_)  // a row of a prompt sees rows that other tasks rotate
      rows(team, [&](int64_t r) {
        if (seq_.new_rows(seq_.owner[r]) > 1) rotate_and_store(layer, r, 0, net_.key_heads);
      });
    const Attention job{query_.data, layer.keys, layer.values, attended_.data, nullptr};
    const Heads shape = net_.heads();
    float* scratch = reinterpret_cast<float*>(scratch_.at(team.thread()));
    const int64_t count = static_cast<int64_t>(attention_.size());
    team.each(count, [&](int64_t i) {
      const AttentionTask& task = attention_[i];
      const RowGroup& group = task.decoding;
      Keys keys{net_.pages_bf16, 0, 0, 0, seq_.pages(task.sequence)};
      if (i + 1 < count && attention_[i + 1].decoding.rows == 1) {
        const AttentionTask& next = attention_[i + 1];
        keys.then = seq_.pages(next.sequence);
        keys.then_pages = next.decoding.position[0] / kPage + 1;
      }
      if (group.rows == 0) {
        pick_attention_rows()(job, shape, keys, task.rows, task.head0, scratch);
        return;
      }
      for (int64_t r = 0; r < group.rows; ++r) rotate_and_store(layer, group.token + r, task.head0, task.head1);
      if (group.rows > 1)
        pick_attention_decode_group()(job, shape, net_.pages_bf16, group, task.head0, scratch);
      else
        pick_attention_decode_row()(job, shape, keys, group.token, group.position[0] + 1, task.head0, task.head1,
                                    scratch);
    });
  }

  void activate(int64_t r, int64_t first, int64_t count) const {
    if (net_.gated)
      pick_swiglu_elements()(gate_.at(r, first), up_.at(r, first), count, bf16_, inner_.at(r, first));
    else
      pick_gelu_elements()(up_.at(r, first), count, bf16_, net_.gelu_tanh, inner_.at(r, first));
  }

  const Network& net_;
  const Sequences& seq_;
  int64_t rows_;
  bool bf16_;
  Activation residual_, addend_, normed_, inner_, mixed_, query_, key_, value_, attended_, up_, gate_, scratch_;
  bool prompts_ = false;
  std::vector<AttentionTask> attention_;
  std::vector<ProductTask> cut_qkv_, cut_o_, cut_inner_, cut_down_;
};

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Four step_of(const Network& net, const Sequences& sequences, const std::optional<at::Tensor>& uniform,
             double temperature, const std::optional<at::Tensor>& seconds) {
  const int64_t count = sequences.count;
  const auto options = at::TensorOptions().dtype(at::kFloat);
  const Activation last = operand_rows(count, net.hidden, net.bf16, net.arithmetic);
  const int64_t drawn = uniform ? count : 0;
  at::Tensor token = at::empty({drawn}, at::kLong), logprob = at::empty({drawn}, options);
  at::Tensor entropy = at::empty({drawn}, options), statistics;
  double* by_phase = phase_seconds(seconds);
  Step step(net, sequences);
  Drawn results{};
  Head head{last.left(count, net.arithmetic), net.head, net.hidden, net.vocabulary, nullptr,
            static_cast<float>(1.0 / temperature)};
  if (uniform) {
    check_uniform(*uniform, count, temperature);
    statistics = at::empty({count, vocabulary_blocks(net.vocabulary), 3}, options);
    results = {uniform->const_data_ptr<double>(), reinterpret_cast<BlockStatistics*>(statistics.data_ptr<float>()),
               token.data_ptr<int64_t>(), logprob.data_ptr<float>(), entropy.data_ptr<float>()};
  }
  if (count > 0)
    Team::gather([&](Team::Member& team) {
      Watch watch(by_phase, team.thread());
      step.run(team, last, watch);
      if (uniform) step.sample(team, head, results, watch);
    });
  for (int64_t r = 0; r < drawn; ++r)
    TORCH_CHECK_VALUE(results.token[r] >= 0, "row ", r, ": its logits are all -inf or hold nan, want a distribution");
  return {last.tensor(count).clone(), token, logprob, entropy};
}

using Tensors = c10::List<at::Tensor>;

// A network over a cache, looked at once: 600 tensors for 30 layers, which a step's weights have driven from the cache.
class TransformerStep : public torch::CustomClassHolder {
 public:
  TransformerStep(const Weights& weights, const std::vector<int64_t>& shape, double eps, const Tensors& keys,
                  const Tensors& values)
      : weights_(weights), keys_(keys.vec()), values_(values.vec()),
        network_(network_of(weights_, shape, eps, keys_, values_)) {}

  Four run(const at::Tensor& tokens, const at::Tensor& positions, const at::Tensor& cu, const at::Tensor& page_table,
           const std::optional<at::Tensor>& uniform, double temperature, const std::optional<at::Tensor>& seconds) {
    const Sequences sequences = sequences_of(tokens, positions, cu, page_table, network_, keys_[0].size(0));
    return step_of(network_, sequences, uniform, temperature, seconds);
  }

 private:
  const Weights weights_;  // what the network's pointers point to
  const std::vector<at::Tensor> keys_, values_;
  const Network network_;
};

}  // namespace
}  // namespace engine

TORCH_LIBRARY_FRAGMENT(engine, m) {
  m.class_<engine::TransformerStep>("TransformerStep")
      .def(torch::init<const engine::Weights&, const std::vector<int64_t>&, double, const engine::Tensors&,
                       const engine::Tensors&>())
      .def("run", &engine::TransformerStep::run);
}
#endif
