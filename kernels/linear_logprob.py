"""Log-probability of one token a row, and the entropy of the row's distribution, from hidden states.

    z = (hidden W^T + bias) / temperature,  p = softmax(z)
    logprob_n = z_{n, target_n} - log sum_j exp(z_nj),  entropy_n = -sum_j p_nj log p_nj   (p = 0 adds 0)

N rows, H hidden, V vocabulary. The N x V logits never exist: the vocabulary is walked in blocks whose (max, sum,
weighted sum) are merged in order, forward and backward. Arithmetic is float32 from the accumulators on; the result of
a row does not depend on the other rows.
"""

import torch
from torch import Tensor

from .linear import PackedWeight


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
        raise ValueError("master: got one beside a plain weight, want it beside a PackedWeight only")
    if master is not None and master.shape != dense.shape:
        raise ValueError(f"master: got shape {tuple(master.shape)}, want {tuple(dense.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, want a number above 0")


def check_targets(targets: Tensor, rows: int, vocabulary: int) -> None:
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: got {targets.dtype} of shape {tuple(targets.shape)}, want int64 ({rows},)"
        )
    outside = (targets < 0) | (targets >= vocabulary)
    if targets.device.type != "meta" and bool(outside.any()):
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
    """logprob_n = z_{n,y_n} - log sum_j exp z_nj and the entropy, z = (hidden W^T + bias) / temperature.

    Gradients to hidden, bias, and the weight: a plain weight gets its own, a PackedWeight's goes to `master` (float32).
    Raises ValueError on shapes that do not fit and on a target outside [0, V).
    Source: InstructGPT C.4 uses these for the KL term and the ratio; formulas in docs/spec of the op.
    """
    check_head(hidden, weight, temperature, bias, master)
    vocabulary = weight.shape[0] if isinstance(weight, Tensor) else weight.rows
    check_targets(targets, hidden.shape[0], vocabulary)
    return linear_logprob_reference(hidden, weight, targets, temperature, bias, master=master)
