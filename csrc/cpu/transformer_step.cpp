// All layers of the network for the new rows of some sequences over cache pages, the head and the sampler: one parallel
// region. The contract is in kernels/transformer_step.py; every piece of arithmetic is an op's own row function.
#ifndef ENGINE_CLASS

#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "attention_host.h"
#include "logprob_at.h"
#include "team.h"
#include "transformer_step.h"
#include "transformer_step_inner.h"
#include "transformer_step_products.h"

namespace engine {
namespace {

constexpr int64_t kLogitBlocksPerTask = 2;

// What a step reads and writes, and the phases that every thread goes through. Of prompts only the last rows go on behind
// the last layer's attention.
class Step {
 public:
  Step(const Network& network, const Sequences& sequences)
      : net_(network), seq_(sequences), rows_(sequences.rows()), bf16_(network.bf16),
        prompts_(sequences.rows() > sequences.count), all_(network, rows_), last_(network, prompts_ ? seq_.count : 0),
        query_(plain(net_.query_heads)), key_(plain(net_.key_heads)), value_(plain(net_.key_heads)),
        qkv_(rows_, net_.hidden, {query_.width, key_.width, key_.width}, net_.arithmetic),
        scratch_(InnerRows::floats(at::get_num_threads(), (attention_decode_scratch(net_.heads()) + 15) / 16 * 16)) {
    share_attention();
  }

  // The rows through all layers; `out` gets the final norm of each sequence's last row.
  void run(Team::Member& team, const Activation& out, Watch& watch) {
    embed(team);
    const int64_t layers = static_cast<int64_t>(net_.layers.size());
    for (int64_t i = 0; i + 1 < layers; ++i) {
      attend(team, i, all_, attention_, watch);
      all_.run(team, net_.layers[i], first_of_layer(team, net_.layers[i + 1]), watch);
    }
    const InnerRows& last = prompts_ ? last_ : all_;
    attend(team, layers - 1, last, prompts_ ? last_attention_ : attention_, watch);
    last.run(team, net_.layers.back(), static_cast<const char*>(net_.head.data), watch);
    team.each(seq_.count, [&](int64_t s) {
      last.add_to_residual(s);
      norm_row(net_, net_.last, last.residual.at(s), out.at(s));
    });
    watch.mark(kRows);
  }

  // Statistics of the head's blocks, then a token, its log-prob and entropy for each row of `hidden`.
  void sample(Team::Member& team, const Head& head, const Drawn& drawn, Watch& watch) const {
    const int64_t count = seq_.count, blocks = vocabulary_blocks(head.vocabulary);
    const auto statistics = pick_logprob_statistics();
    team.each((blocks + kLogitBlocksPerTask - 1) / kLogitBlocksPerTask, [&](int64_t i) {
      const int64_t begin = i * kLogitBlocksPerTask, end = std::min(begin + kLogitBlocksPerTask, blocks);
      statistics(head, 0, count, begin, end, nullptr, drawn.statistics, nullptr, nullptr);
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
  Activation plain(int64_t heads) const { return InnerRows::plain(net_, rows_, heads * net_.head_size); }

  void embed(Team::Member& team) const {
    each_row(team, rows_, [&](int64_t r) {
      float* x = reinterpret_cast<float*>(all_.residual.at(r));
      const Table tokens{&net_.tokens};
      tokens.each(seq_.token[r], [&](int64_t i, float value) { x[i] = value; });
      if (!net_.positions) return;
      const Table positions{&*net_.positions};
      positions.each(seq_.position[r], [&](int64_t i, float value) { x[i] += value; });
    });
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
      for (int64_t h = 0; h < net_.key_heads; h += each)
        for (auto* tasks : {&attention_, &last_attention_}) tasks->push_back({s, h, h + each, group, {}});
      s += group.rows;
    }
    for (auto* tasks : {&attention_, &last_attention_})
      std::stable_sort(tasks->begin(), tasks->end(),
                       [](const AttentionTask& a, const AttentionTask& b) { return a.work() > b.work(); });
  }

  void share_prompt(int64_t s, const Heads& shape) {
    const int64_t length = seq_.new_rows(s), begin = seq_.begin(s), visible = seq_.start(s) + 1;
    for (int64_t h = 0; h < net_.key_heads; ++h) {
      for (int64_t t = 0; t < length; t += shape.chunk_tokens())
        attention_.push_back({s, h, h + 1, {}, {begin + t, std::min(shape.chunk_tokens(), length - t), visible + t}});
      last_attention_.push_back({s, h, h + 1, {}, {begin + length - 1, 1, visible + length - 1}});
    }
  }

  const char* first_of_layer(const Team::Member& team, const Layer& layer) const {
    return first_of_share(team, qkv_.tasks, {&layer.q, &layer.k, &layer.v});
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

  // The rows of layer `index` up to their attention, which `to` goes on from.
  void attend(Team::Member& team, int64_t index, const InnerRows& to, const std::vector<AttentionTask>& tasks,
              Watch& watch) const {
    const Layer& layer = net_.layers[index];
    each_row(team, rows_, [&](int64_t r) {
      if (index > 0) all_.add_to_residual(r);
      norm_row(net_, layer.input, all_.residual.at(r), all_.normed.at(r));
    });
    watch.mark(kRows);
    qkv_.run(team, all_.normed, {{&layer.q, &query_}, {&layer.k, &key_}, {&layer.v, &value_}}, to.first(team, layer));
    watch.mark(kProducts);
    if (prompts_)  // a row of a prompt sees rows that other tasks rotate
      each_row(team, rows_, [&](int64_t r) {
        if (seq_.new_rows(seq_.owner[r]) > 1) rotate_and_store(layer, r, 0, net_.key_heads);
      });
    run_attention(team, layer, tasks);
    if (&to != &all_)
      team.each(seq_.count, [&](int64_t s) {
        const int64_t r = seq_.begin(s + 1) - 1;
        std::memcpy(to.residual.at(s), all_.residual.at(r), to.residual.bytes());
        std::memcpy(to.attended.at(s), all_.attended.at(r), to.attended.bytes());
      });
    watch.mark(kAttention);
  }

  void run_attention(Team::Member& team, const Layer& layer, const std::vector<AttentionTask>& tasks) const {
    const Attention job{query_.data, layer.keys, layer.values, all_.attended.data, nullptr};
    const Heads shape = net_.heads();
    float* scratch = reinterpret_cast<float*>(scratch_.at(team.thread()));
    const int64_t count = static_cast<int64_t>(tasks.size());
    team.each(count, [&](int64_t i) {
      const AttentionTask& task = tasks[i];
      const RowGroup& group = task.decoding;
      Keys keys{net_.pages_bf16, 0, 0, 0, seq_.pages(task.sequence)};
      if (i + 1 < count && tasks[i + 1].decoding.rows == 1) {
        const AttentionTask& next = tasks[i + 1];
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

  const Network& net_;
  const Sequences& seq_;
  const int64_t rows_;
  const bool bf16_, prompts_;
  const InnerRows all_, last_;
  const Activation query_, key_, value_;
  const Products qkv_;
  const Activation scratch_;
  std::vector<AttentionTask> attention_, last_attention_;
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
  return {last.copy(count), token, logprob, entropy};
}

using Tensors = c10::List<at::Tensor>;

// A network over a cache, looked at once: 600 tensors for 30 layers, which a step's weights have driven from the cache.
class TransformerStep : public torch::CustomClassHolder {
 public:
  TransformerStep(const Weights& weights, const std::vector<int64_t>& shape, double eps, const Tensors& keys,
                  const Tensors& values)
      : weights_(weights), keys_(keys.vec()), values_(values.vec()),
        network_(network_of(weights_, shape, eps, keys_, values_)), class_(current_class()) {}

  Four run(const at::Tensor& tokens, const at::Tensor& positions, const at::Tensor& cu, const at::Tensor& page_table,
           const std::optional<at::Tensor>& uniform, double temperature, const std::optional<at::Tensor>& seconds) {
    TORCH_CHECK_VALUE(current_class() == class_, "transformer_step: got weights packed for class ", class_name(class_),
                      ", want ", class_name(current_class()), ", which is in use now; make the step anew");
    const Sequences sequences = sequences_of(tokens, positions, cu, page_table, network_, keys_[0].size(0));
    return step_of(network_, sequences, uniform, temperature, seconds);
  }

 private:
  const Weights weights_;  // what the network's pointers point to
  const std::vector<at::Tensor> keys_, values_;
  const Network network_;
  const CpuClass class_;
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
