"""Log-probability of one token a row, and the entropy of the row's distribution.

    z = (hidden W^T + bias) / temperature,  p = softmax(z)
    logprob_n = z_{n, target_n} - log sum_j exp(z_nj)
    entropy_n = -sum_j p_nj log p_nj   (p = 0 adds 0)

N rows, H hidden, V vocabulary. The N x V logits never exist: the vocabulary is walked in blocks
whose (max, sum, weighted sum) are merged in order; the backward pass makes the logits again, slab
by slab. Memory: O(N H + V H) and the scratch of one slab. Arithmetic is float32 from the sums of
products on; a row's result does not depend on the other rows. Formulas: InstructGPT's C.4 needs the
log-probabilities for its KL term and the ratio; the gradients are those of log-softmax.
"""

from typing import Any

import torch
from torch import Tensor

from ._backend import choose, define, kernel
from .linear import PackedWeight, packed_data


def _dense(weight: Tensor | PackedWeight, master: Tensor | None) -> Tensor:  # (V, H)
    if isinstance(weight, Tensor):
        return weight
    return weight.dense if master is None else master.to(weight.dtype)


def linear_logits(
    hidden: Tensor,  # (N, H)
    weight: Tensor | PackedWeight,  # (V, H)
    temperature: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    master: Tensor | None = None,  # (V, H)
) -> Tensor:  # (N, V) float32, float64 for float64
    """z of the definition, whole: for the torch definitions and for tests."""
    dense = _dense(weight, master)
    wide = torch.float64 if torch.float64 in (hidden.dtype, dense.dtype) else torch.float32
    logits = hidden.to(dense.dtype).to(wide) @ dense.to(wide).T
    return (logits if bias is None else logits + bias.to(wide)) / temperature


def linear_logprob_reference(
    hidden: Tensor,  # (N, H)
    weight: Tensor | PackedWeight,  # (V, H)
    targets: Tensor,  # (N,)
    temperature: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    *,
    master: Tensor | None = None,  # (V, H)
) -> tuple[Tensor, Tensor]:  # logprob (N,), entropy (N,)
    """The definition; masked entries (-inf) have probability 0 and add 0 to the entropy."""
    logp = torch.log_softmax(linear_logits(hidden, weight, temperature, bias, master), dim=-1)
    finite = logp.masked_fill(logp == -torch.inf, 0.0)
    entropy = -(logp.exp() * finite).sum(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


def check_head(
    hidden: Tensor,  # (N, H)
    weight: Tensor | PackedWeight,  # (V, H)
    temperature: float,
    bias: Tensor | None,  # (V,)
    master: Tensor | None,  # (V, H)
) -> None:
    dense = weight if isinstance(weight, Tensor) else weight.dense
    if dense.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(dense.shape)}, want (V, H)")
    if hidden.dim() != 2 or hidden.shape[1] != dense.shape[1]:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, want (N, {dense.shape[1]}) for this weight"
        )
    if bias is not None and bias.shape != dense.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, want ({dense.shape[0]},)")
    if master is not None and isinstance(weight, Tensor):
        raise ValueError("master: got one beside a plain weight, want it beside a PackedWeight")
    if master is not None and master.shape != dense.shape:
        raise ValueError(f"master: got shape {tuple(master.shape)}, want {tuple(dense.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, want a number above 0")


def check_targets(targets: Tensor, rows: int, vocabulary: int) -> None:
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: got {targets.dtype} of shape {tuple(targets.shape)}, want int64 ({rows},)"
        )
    if targets.device.type != "cpu":  # reading a GPU's values waits for it: see linear_logprob
        return
    outside = (targets < 0) | (targets >= vocabulary)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"targets[{at}]: got {int(targets[at])}, want a token in [0, {vocabulary}); "
            "leave rows without a target out"
        )


def linear_logprob(
    hidden: Tensor,  # (N, H) bfloat16 or float32
    weight: Tensor | PackedWeight,  # (V, H)
    targets: Tensor,  # (N,) int64
    temperature: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    *,
    master: Tensor | None = None,  # (V, H) float32
) -> tuple[Tensor, Tensor]:  # logprob (N,), entropy (N,), float32
    """logprob_n = z_{n,y_n} - log sum_j exp z_nj, and the entropy of softmax(z_n).

    z = (hidden W^T + bias) / temperature. Gradients to hidden, bias, and the weight: a plain weight
    gets its own in its dtype, a PackedWeight's goes to `master` (float32). Raises ValueError on
    shapes that do not fit and on a target outside [0, V); on a GPU, whose values are not read, such a
    target's log-probability is nan.
    """
    check_head(hidden, weight, temperature, bias, master)
    dense = weight if isinstance(weight, Tensor) else weight.dense
    chosen = choose("linear_logprob", hidden, dense)
    if chosen != "cpp":  # C++ looks at each target itself
        check_targets(targets, hidden.shape[0], dense.shape[0])
    if chosen == "reference":
        return linear_logprob_reference(hidden, weight, targets, temperature, bias, master=master)
    dense, data = head_operands(weight, chosen)
    logprob, entropy, _max, _log_sum = kernel("linear_logprob")(
        hidden.contiguous(),
        dense,
        data,
        targets.contiguous(),
        temperature,
        None if bias is None else bias.float().contiguous(),
        weight if isinstance(weight, Tensor) else master,
    )
    return logprob, entropy


def head_operands(weight: Tensor | PackedWeight, chosen: str) -> tuple[Tensor, Tensor]:
    """The weight row-major, and packed where C++ is chosen: a plain one is packed on the fly."""
    dense = weight.dense if isinstance(weight, PackedWeight) else weight.detach().contiguous()
    if chosen != "cpp":
        return dense, dense.new_empty(0, dtype=torch.uint8)
    if isinstance(weight, PackedWeight):
        return dense, packed_data(weight)
    return dense, torch.ops.engine.pack_weight(dense)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, dense, data, targets, ctx.temperature, bias, master = inputs
    _logprob, entropy, row_max, log_sum = output
    ctx.master_dtype = None if master is None else master.dtype
    ctx.mark_non_differentiable(row_max, log_sum)
    ctx.save_for_backward(hidden, dense, data, targets, bias, row_max, log_sum, entropy)


def _backward(
    ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _grad_max: Any, _grad_log_sum: Any
) -> tuple[Tensor | None, ...]:
    hidden, dense, data, targets, bias, row_max, log_sum, entropy = ctx.saved_tensors
    need_hidden, _, _, _, _, need_bias, need_master = ctx.needs_input_grad
    dh, dw, db = kernel("linear_logprob_backward")(
        grad_logprob.contiguous(),
        grad_entropy.contiguous(),
        hidden,
        dense,
        data,
        targets,
        ctx.temperature,
        bias,
        row_max,
        log_sum,
        entropy,
        need_hidden,
        need_master,
        need_bias,
    )
    grad_master = dw.to(ctx.master_dtype) if need_master else None
    grad_hidden, grad_bias = dh if need_hidden else None, db if need_bias else None
    return grad_hidden, None, None, None, None, grad_bias, grad_master


def _fake(hidden: Tensor, *_others: Any) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4))


def _fake_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, dense = inputs[2:4]
    need_hidden, need_weight, need_bias = inputs[-3:]
    wide = torch.float32
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0, dtype=wide),
        dense.new_empty(dense.shape if need_weight else (0,), dtype=wide),
        dense.new_empty(dense.shape[0] if need_bias else 0, dtype=wide),
    )


define(
    "linear_logprob(Tensor hidden, Tensor dense, Tensor data, Tensor targets, float temperature,"
    " Tensor? bias, Tensor? master) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
define(
    "linear_logprob_backward(Tensor grad_logprob, Tensor grad_entropy, Tensor hidden, Tensor dense,"
    " Tensor data, Tensor targets, float temperature, Tensor? bias, Tensor row_max,"
    " Tensor log_sum, Tensor entropy, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
torch.library.register_autograd("engine::linear_logprob", _backward, setup_context=_setup_context)
