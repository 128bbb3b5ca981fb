// One pass of AdamW over a tensor, with the compute copy and the average; and sums of squares for the global norm. The
// equations are in kernels/adamw.py.
#include "gemm.h"

namespace engine {

// One step's numbers, rounded to float once.
struct AdamW {
  float gain1, beta2, gain2;         // 1 - beta1, beta2, 1 - beta2
  float inverse_correction2, eps;    // 1 / sqrt(1 - beta2^t)
  float step_size, decay;            // lr / (1 - beta1^t), lr * weight_decay
  float clip_scale, ema_gain;        // what the gradient is multiplied by, 1 - ema_decay
};

// Elements side by side. `copy` and `ema` may be null.
struct AdamWElements {
  float* master;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  void* copy;
  bool copy_bf16;
  float* ema;

  AdamWElements from(int64_t i) const {
    char* bytes = static_cast<char*>(copy);
    return {master + i,
            grad + i,
            exp_avg + i,
            exp_avg_sq + i,
            bytes == nullptr ? nullptr : bytes + i * (copy_bf16 ? 2 : 4),
            copy_bf16,
            ema == nullptr ? nullptr : ema + i};
  }
};

}  // namespace engine

ENGINE_KERNEL(void, adamw_elements, (const engine::AdamW& step, const engine::AdamWElements& all, int64_t n))
ENGINE_KERNEL(double, square_sum, (const float* x, int64_t n))

#ifdef ENGINE_CLASS

// A multiplication and an addition stay two roundings: the average is EMA.update's to the bit, and all of a step the same
// on every class.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "activation.h"
#include "vec_double.h"

namespace engine::ENGINE_CLASS {

ENGINE_INLINE vfloat vsqrt(vfloat v) {
#if ENGINE_LANES == 16 && defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)v);
#elif ENGINE_LANES == 8 && defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)v);
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) lanes[i] = __builtin_sqrtf(lanes[i]);
  return load(lanes);
#endif
}

// Copy is the type of the copy's elements; has_copy, has_ema: whether there are any.
template <typename Copy, bool has_copy, bool has_ema>
static void step_elements(AdamW step, AdamWElements all, int64_t n) {  // by value: to stay in registers
  Copy* copy = static_cast<Copy*>(all.copy);
  each_vector(n, [&](int64_t i, int64_t count) {
    const vfloat g = load_up_to(all.grad + i, count) * step.clip_scale;
    vfloat w = load_up_to(all.master + i, count);
    vfloat m = load_up_to(all.exp_avg + i, count), v = load_up_to(all.exp_avg_sq + i, count);
    m += step.gain1 * (g - m);
    v = step.beta2 * v + step.gain2 * (g * g);
    w -= step.decay * w + step.step_size * (m / (vsqrt(v) * step.inverse_correction2 + step.eps));
    store_up_to(all.exp_avg + i, m, count);
    store_up_to(all.exp_avg_sq + i, v, count);
    store_up_to(all.master + i, w, count);
    if constexpr (has_ema) {
      const vfloat average = load_up_to(all.ema + i, count);
      store_up_to(all.ema + i, average + step.ema_gain * (w - average), count);
    }
    if constexpr (has_copy)  // read by the next forward only, when the rest of the model has gone through the caches
      count < kLanes ? store_part(copy + i, w, count) : stream(copy + i, w);
  });
  if constexpr (has_copy) stream_fence();
}

void adamw_elements(const AdamW& step, const AdamWElements& all, int64_t n) {
  with_type(all.copy_bf16, [&]<typename Copy>(Copy*) {
    if (all.copy == nullptr)
      all.ema == nullptr ? step_elements<float, false, false>(step, all, n)
                         : step_elements<float, false, true>(step, all, n);
    else
      all.ema == nullptr ? step_elements<Copy, true, false>(step, all, n)
                         : step_elements<Copy, true, true>(step, all, n);
  });
}

constexpr int kChains = 4;  // one chain alone waits for its own additions

ENGINE_INLINE vwide squares(const float* x) {
  const vwide wide = load_wide(x);
  return wide * wide;
}

double square_sum(const float* x, int64_t n) {
  vwide sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kHalf <= n; i += kChains * kHalf)
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) sums[chain] += squares(x + i + chain * kHalf);
  double rest = 0.0;
  for (; i < n; ++i) rest += static_cast<double>(x[i]) * x[i];
  return hsum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

}  // namespace engine::ENGINE_CLASS
#else

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "activation.h"
#include "gemm_at.h"

namespace engine {
namespace {

constexpr int64_t kSquares = 16384;  // kernels/adamw.py: SQUARES
using OptionalTensors = c10::List<std::optional<at::Tensor>>;

void check_moment(const at::Tensor& t, const at::Tensor& master, const char* name) {
  check_cpu_contiguous(t, name);
  check_dtype(t, at::kFloat, name);
  TORCH_CHECK_VALUE(t.sizes() == master.sizes(), name, ": got shape ", t.sizes(), ", want ", master.sizes(),
                    " as master");
}

// `grad` as floats (made of a shorter dtype without a rounding), which must live as long as the elements are used.
AdamWElements elements_of(const at::Tensor& master, const at::Tensor& grad, const at::Tensor& exp_avg,
                          const at::Tensor& exp_avg_sq, const std::optional<at::Tensor>& copy,
                          const std::optional<at::Tensor>& ema) {
  check_moment(master, master, "master");
  check_moment(grad, master, "grad");
  check_moment(exp_avg, master, "exp_avg");
  check_moment(exp_avg_sq, master, "exp_avg_sq");
  if (ema) check_moment(*ema, master, "ema");
  if (copy) {
    check_cpu_contiguous(*copy, "copy");
    check_activation(*copy, "copy");
    TORCH_CHECK_VALUE(copy->sizes() == master.sizes(), "copy: got shape ", copy->sizes(), ", want ", master.sizes(),
                      " as master");
  }
  // A float32 copy may be the master's own memory.
  const bool apart = copy && copy->data_ptr() != master.data_ptr();
  return {master.data_ptr<float>(),
          grad.const_data_ptr<float>(),
          exp_avg.data_ptr<float>(),
          exp_avg_sq.data_ptr<float>(),
          apart ? copy->data_ptr() : nullptr,
          apart && copy->scalar_type() == at::kBFloat16,
          ema ? ema->data_ptr<float>() : nullptr};
}

struct Hyperparameters {
  double lr, beta1, beta2, eps, bias_correction1, bias_correction2_sqrt, clip_scale, ema_decay;

  AdamW rounded(double weight_decay) const {
    const double numbers[] = {1.0 - beta1, beta2, 1.0 - beta2, 1.0 / bias_correction2_sqrt, eps, lr / bias_correction1,
                              lr * weight_decay, clip_scale, 1.0 - ema_decay};
    float single[std::size(numbers)];
    std::copy(std::begin(numbers), std::end(numbers), single);
    return {single[0], single[1], single[2], single[3], single[4], single[5], single[6], single[7], single[8]};
  }
};

void step_all(const AdamWElements& all, const AdamW& step, int64_t size) {
  const auto run = pick_adamw_elements();
  at::parallel_for(0, size, kElementsPerTask,
                   [&](int64_t begin, int64_t end) { run(step, all.from(begin), end - begin); });
}

// Panel after panel: the packed panel is made while its rows of the master lie in the cache.
void step_panels(const AdamWElements& all, const AdamW& step, const Right& right, int64_t cols, int64_t depth) {
  char* packed = const_cast<char*>(static_cast<const char*>(right.data));
  const int64_t rows = pick_panel_columns()();
  const int64_t panels_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, rows * depth));
  const auto run = pick_adamw_elements();
  const auto one_panel = pick_refresh_panel();
  at::parallel_for(0, panels_of(cols), panels_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * rows, last = std::min(first + rows, cols);
      run(step, all.from(first * depth), (last - first) * depth);
      one_panel(all.master, cols, depth, right.arithmetic, p, all.master, false, packed + p * right.panel_bytes);
    }
  });
}

// Lists of one length; `data` are the bytes of packed copies, or nothing.
void adamw_steps(at::TensorList masters, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                 const OptionalTensors& copies, const OptionalTensors& data, const OptionalTensors& emas, double lr,
                 double beta1, double beta2, double eps, at::ArrayRef<double> weight_decays, double bias_correction1,
                 double bias_correction2_sqrt, double clip_scale, const std::optional<at::Tensor>& clip,
                 double ema_decay) {
  const size_t count = masters.size();
  for (const size_t length : {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), copies.size(), data.size(),
                              emas.size(), weight_decays.size()})
    TORCH_CHECK_VALUE(length == count, "adamw_steps: got lists of ", length, " and ", count, ", want one length");
  const Hyperparameters numbers{lr, beta1, beta2, eps, bias_correction1, bias_correction2_sqrt,
                                clip ? clip->item<double>() : clip_scale, ema_decay};
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& master = masters[i];
    const std::optional<at::Tensor> copy = copies.get(i), bytes = data.get(i);
    const at::Tensor wide = grads[i].to(at::kFloat);
    const AdamWElements all = elements_of(master, wide, exp_avgs[i], exp_avg_sqs[i], copy, emas.get(i));
    const AdamW step = numbers.rounded(weight_decays[i]);
    if (step.clip_scale == 0.0f) continue;
    if (!bytes) {
      step_all(all, step, master.numel());
      continue;
    }
    TORCH_CHECK_VALUE(copy && master.dim() == 2, "data: got bytes for a master of shape ", master.sizes(),
                      copy ? "" : " without a copy", ", want (N, K) with one");
    const int64_t cols = master.size(0), depth = master.size(1);
    step_panels(all, step, right_of(*bytes, copy->scalar_type(), cols, depth), cols, depth);
  }
}

at::Tensor square_sums(const at::Tensor& x) {
  const at::Tensor wide = x.to(at::kFloat);
  check_cpu_contiguous(wide, "x");
  const int64_t size = wide.numel(), blocks = (size + kSquares - 1) / kSquares;
  at::Tensor sums = at::empty({blocks}, x.options().dtype(at::kDouble));
  const float* from = wide.const_data_ptr<float>();
  double* to = sums.data_ptr<double>();
  const auto run = pick_square_sum();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) to[b] = run(from + b * kSquares, std::min(kSquares, size - b * kSquares));
  });
  return sums;
}

at::Tensor ordered_sum(const at::Tensor& x) {
  check_cpu_contiguous(x, "x");
  check_dtype(x, at::kDouble, "x");
  const double* from = x.const_data_ptr<double>();
  double total = 0.0;
  for (int64_t i = 0; i < x.numel(); ++i) total += from[i];
  return at::scalar_tensor(total, x.options());
}

}  // namespace
}  // namespace engine

TORCH_LIBRARY_IMPL(engine, CPU, m) {
  m.impl("adamw_steps", &engine::adamw_steps);
  m.impl("square_sums", &engine::square_sums);
  m.impl("ordered_sum", &engine::ordered_sum);
}
#endif
