// What a layer of transformer_step does behind its attention, for some rows: the attention's output and the inner layer.
// Host half only.
#pragma once

#include <cstring>

#include "row_kernels.h"
#include "team.h"
#include "transformer_step.h"
#include "transformer_step_products.h"

namespace engine {

constexpr int64_t kStepRowsPerTask = 4;

template <typename Run>
void each_row(Team::Member& team, int64_t rows, Run run) {
  team.each((rows + kStepRowsPerTask - 1) / kStepRowsPerTask, [&](int64_t i) {
    for (int64_t r = i * kStepRowsPerTask; r < std::min((i + 1) * kStepRowsPerTask, rows); ++r) run(r);
  });
}

inline void norm_row(const Network& net, const Norm& norm, const void* x, void* out) {
  float mean, rstd;
  if (net.rms)
    pick_rmsnorm_rows()(x, false, norm.weight, 1, net.hidden, net.eps, out, net.bf16, &rstd);
  else
    pick_layernorm_rows()(x, false, norm.weight, norm.bias, 1, net.hidden, net.eps, out, net.bf16, &mean, &rstd);
}

class InnerRows {
 public:
  InnerRows(const Network& net, int64_t rows)
      : residual(floats(rows, net.hidden)), normed(operand(net, rows, net.hidden)),
        attended(plain(net, rows, net.query_heads * net.head_size)), rows(rows), net_(net),
        addend_(floats(rows, net.hidden)), up_(plain(net, rows, net.inner)),
        gate_(plain(net, net.gated ? rows : 0, net.inner)), inner_(operand(net, rows, net.inner)),
        mixed_(operand(net, readable(attended) ? 0 : rows, attended.width)),
        o_(rows, attended.width, {net.hidden}, net.arithmetic),
        up_products_(rows, net.hidden, {net.inner}, net.arithmetic),
        down_(rows, net.inner, {net.hidden}, net.arithmetic) {}

  const Activation residual, normed, attended;
  const int64_t rows;

  static Activation floats(int64_t rows, int64_t width) { return Activation(rows, width, width, false); }
  static Activation plain(const Network& net, int64_t rows, int64_t width) {
    return Activation(rows, width, width, net.bf16);
  }
  static Activation operand(const Network& net, int64_t rows, int64_t width) {
    return operand_rows(rows, width, net.bf16, net.arithmetic);
  }

  // What the thread reads first of these rows' part of a layer.
  const char* first(const Team::Member& team, const Layer& layer) const {
    return first_of_share(team, o_.tasks, {&layer.o});
  }

  // From `attended` and `residual` on; the last addend is left for what follows. `then`: what the thread reads next.
  void run(Team::Member& team, const Layer& layer, const char* then, Watch& watch) const {
    const bool in_place = readable(attended);
    if (!in_place)
      each_row(team, rows, [&](int64_t r) { std::memcpy(mixed_.at(r), attended.at(r), attended.bytes()); });
    watch.mark(kRows);
    const Linear& next = net_.gated ? layer.gate : layer.up;
    o_.run(team, in_place ? attended : mixed_, {{&layer.o, &addend_}},
           first_of_share(team, up_products_.tasks, {&next}));
    watch.mark(kProducts);
    each_row(team, rows, [&](int64_t r) {
      if (!net_.parallel_residual) add_to_residual(r);
      norm_row(net_, layer.inner, residual.at(r), normed.at(r));
      if (net_.parallel_residual) add_to_residual(r);
    });
    watch.mark(kRows);
    gate_and_up(team, layer);
    watch.mark(kProducts);
    down_.run(team, inner_, {{&layer.down, &addend_}}, then);
    watch.mark(kProducts);
  }

  void add_to_residual(int64_t r) const {
    float* x = reinterpret_cast<float*>(residual.at(r));
    const float* more = reinterpret_cast<const float*>(addend_.at(r));
    for (int64_t i = 0; i < net_.hidden; ++i) x[i] += more[i];
  }

 private:
  // Rows that lie as they come can be read by tiles if they are whole steps of the depth, and not all in one cache set.
  bool readable(const Activation& a) const {
    return net_.arithmetic != Arithmetic::tiles || (a.width % 32 == 0 && a.stride % 2048 != 0);
  }

  // ... and their activation while they are in the cache.
  void gate_and_up(Team::Member& team, const Layer& layer) const {
    const Linear& first = net_.gated ? layer.gate : layer.up;
    up_products_.each(team, [&](int64_t i, bool ends) {
      const Part& part = up_products_.tasks[i].part;
      if (net_.gated) up_products_.run(normed, {&layer.gate, &gate_}, part, panels_at(layer.up, part.col0));
      up_products_.run(normed, {&layer.up, &up_}, part,
                       ends ? first_of_share(team, down_.tasks, {&layer.down})
                            : panels_at(first, up_products_.tasks[i + 1].part.col0));
      for (int64_t r = part.row0; r < part.row1; ++r) activate(r, part.col0, part.col1 - part.col0);
    });
  }

  void activate(int64_t r, int64_t first, int64_t count) const {
    if (net_.gated)
      pick_swiglu_elements()(gate_.at(r, first), up_.at(r, first), count, net_.bf16, inner_.at(r, first));
    else
      pick_gelu_elements()(up_.at(r, first), count, net_.bf16, net_.gelu_tanh, inner_.at(r, first));
  }

  const Network& net_;
  const Activation addend_, up_, gate_, inner_, mixed_;
  const Products o_, up_products_, down_;
};

}  // namespace engine
