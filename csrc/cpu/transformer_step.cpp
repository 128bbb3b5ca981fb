// All layers of the network for the new rows of some sequences over cache pages, the head and the sampler: one parallel
// region. The contract is in kernels/transformer_step.py; every piece of arithmetic is an op's own row function.
#ifndef ENGINE_CLASS

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
    const int64_t threads = at::get_num_threads();
    const auto cut = [&](std::vector<int64_t> columns) {
      return cut_products(rows_, columns, net_.arithmetic, threads);
    };
    cut_qkv_ = cut({heads, keys, keys}), cut_o_ = cut({net_.hidden}), cut_inner_ = cut({net_.inner});
    cut_down_ = cut({net_.hidden});
    scratch_ = floats(threads, (attention_decode_scratch(net_.heads()) + 15) / 16 * 16);
  }

  // The rows through all layers; `last` gets the final norm of each sequence's last row.
  void run(Team::Member& team, const Activation& last, Watch& watch) {
    embed(team);
    for (const Layer& layer : net_.layers) {
      rows(team, [&](int64_t r) {
        if (&layer != &net_.layers.front()) add_to_residual(r);
        norm(layer.input, residual_.at(r), normed_.at(r));
      });
      watch.mark(kRows);
      products(team, cut_qkv_, normed_, {{&layer.q, &query_}, {&layer.k, &key_}, {&layer.v, &value_}});
      watch.mark(kProducts);
      attend(team, layer);
      watch.mark(kAttention);
      const bool in_place = readable(attended_);
      if (!in_place) rows(team, [&](int64_t r) { std::memcpy(mixed_.at(r), attended_.at(r), attended_.bytes()); });
      watch.mark(kRows);
      products(team, cut_o_, in_place ? attended_ : mixed_, {{&layer.o, &addend_}});
      watch.mark(kProducts);
      rows(team, [&](int64_t r) {
        if (!net_.parallel_residual) add_to_residual(r);
        norm(layer.inner, residual_.at(r), normed_.at(r));
        if (net_.parallel_residual) add_to_residual(r);
      });
      watch.mark(kRows);
      inner_products(team, layer);
      watch.mark(kProducts);
      products(team, cut_down_, inner_, {{&layer.down, &addend_}});
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
    bool decoding;                   // one row, not rotated yet; otherwise rows of a prompt and one head
    Rows rows;
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

  // A decoding row's heads are one task, or one each where there are few rows; a prompt's are cut by rows too.
  void share_attention() {
    const Heads shape = net_.heads();
    const int64_t heads = seq_.count >= 2 * at::get_num_threads() ? net_.key_heads : 1;
    for (int64_t s = 0; s < seq_.count; ++s) {
      const bool decoding = seq_.new_rows(s) == 1;
      if (!decoding) prompts_ = true;
      const int64_t each = decoding ? heads : 1;
      for (int64_t h = 0; h < net_.key_heads; h += each)
        for (int64_t t = 0; t < seq_.new_rows(s); t += shape.chunk_tokens()) {
          const int64_t tokens = std::min(shape.chunk_tokens(), seq_.new_rows(s) - t);
          attention_.push_back({s, h, h + each, decoding, Rows{seq_.begin(s) + t, tokens, seq_.start(s) + t + 1}});
        }
    }
    const auto work = [&](const AttentionTask& t) { return t.rows.tokens * (t.rows.visible + t.rows.tokens / 2); };
    std::stable_sort(attention_.begin(), attention_.end(),
                     [&](const AttentionTask& a, const AttentionTask& b) { return work(a) > work(b); });
  }

  void run_product(const Activation& from, const Target& to, const Part& part) const {
    pick_product()(from.left(rows_, net_.arithmetic), to.weight->right, to.weight->depth, part,
                   {to.out->data, to.out->bf16, to.out->stride, false, to.weight->bias});
  }

  void products(Team::Member& team, const std::vector<ProductTask>& tasks, const Activation& from,
                std::initializer_list<Target> targets) const {
    team.each(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
      run_product(from, targets.begin()[tasks[i].weight], tasks[i].part);
    });
  }

  // gate and up, and their activation while they are in the cache.
  void inner_products(Team::Member& team, const Layer& layer) const {
    team.each(static_cast<int64_t>(cut_inner_.size()), [&](int64_t i) {
      const Part& part = cut_inner_[i].part;
      if (net_.gated) run_product(normed_, {&layer.gate, &gate_}, part);
      run_product(normed_, {&layer.up, &up_}, part);
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
    team.each(static_cast<int64_t>(attention_.size()), [&](int64_t i) {
      const AttentionTask& task = attention_[i];
      const Keys keys{net_.pages_bf16, 0, 0, 0, seq_.pages(task.sequence)};
      if (!task.decoding) {
        pick_attention_rows()(job, shape, keys, task.rows, task.head0, scratch);
        return;
      }
      rotate_and_store(layer, task.rows.token, task.head0, task.head1);
      pick_attention_decode_row()(job, shape, keys, task.rows.token, task.rows.visible, task.head0, task.head1, scratch);
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

Four transformer_step(const at::Tensor& tokens, const at::Tensor& positions, const at::Tensor& cu,
                      const at::Tensor& page_table, at::TensorList keys, at::TensorList values,
                      const Weights& weights, at::IntArrayRef shape, double eps,
                      const std::optional<at::Tensor>& uniform, double temperature,
                      const std::optional<at::Tensor>& seconds) {
  const Network net = network_of(weights, shape, eps, keys, values);
  const Sequences sequences = sequences_of(tokens, positions, cu, page_table, net, keys[0].size(0));
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

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) { m.impl("transformer_step", &engine::transformer_step); }
#endif
