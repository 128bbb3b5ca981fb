"""One token a row drawn from the softmax of the logits, its log-probability, the row's entropy.

    z = (hidden W^T + bias) / temperature,  token_r = min {j : sum_{i <= j} p_ri > uniform_r}

R rows, H hidden, V vocabulary: inverse transform sampling from one float64 uniform number in [0, 1)
a row, in two levels: the block of the vocabulary, then the token within it. The log-probability and
the entropy are those of `linear_logprob` for the drawn token, bit for bit.
"""

import torch
from torch import Tensor

from ._backend import choose, define, kernel
from .linear import PackedWeight
from .linear_logprob import check_head, head_operands, linear_logits, linear_logprob_reference


def linear_sample_reference(
    hidden: Tensor,  # (R, H)
    weight: Tensor | PackedWeight,  # (V, H)
    uniform: Tensor,  # (R,) float64
    temperature: float = 1.0,
    bias: Tensor | None = None,  # (V,)
) -> tuple[Tensor, Tensor, Tensor]:  # token (R,), logprob (R,), entropy (R,)
    """The definition: the first token whose cumulated probability exceeds the uniform number."""
    p = torch.softmax(linear_logits(hidden, weight, temperature, bias).double(), dim=-1)
    cumulated = p.cumsum(-1)
    reached = cumulated > (uniform * cumulated[:, -1])[:, None]
    order = torch.arange(p.shape[-1], device=p.device)
    last_with_mass = torch.where(p > 0, order, 0).amax(-1)
    token = torch.where(reached.any(-1), reached.int().argmax(-1), last_with_mass)
    return token, *linear_logprob_reference(hidden, weight, token, temperature, bias)


def linear_sample(
    hidden: Tensor,  # (R, H) bfloat16 or float32
    weight: Tensor | PackedWeight,  # (V, H)
    uniform: Tensor,  # (R,) float64 in [0, 1)
    temperature: float = 1.0,
    bias: Tensor | None = None,  # (V,)
) -> tuple[Tensor, Tensor, Tensor]:  # token (R,) int64, logprob (R,), entropy (R,) float32
    """token_r = min {j : sum_{i <= j} p_ri > uniform_r}; never a token of probability 0.

    Not differentiable. Raises ValueError on shapes that do not fit, on uniform numbers outside
    [0, 1), and on a row without a distribution (all logits -inf). A GPU's values are not read: there
    such a row has a token of the vocabulary, and nan for its log-probability and entropy.
    """
    check_head(hidden, weight, temperature, bias, None)
    if uniform.shape != (hidden.shape[0],) or uniform.dtype != torch.float64:
        raise ValueError(
            f"uniform: got {uniform.dtype} of shape {tuple(uniform.shape)}, "
            f"want float64 ({hidden.shape[0]},)"
        )
    on_cpu = uniform.device.type == "cpu"
    if on_cpu and uniform.numel() and not (uniform.min() >= 0 and uniform.max() < 1):
        raise ValueError(
            f"uniform: got {uniform.min():.17g} ... {uniform.max():.17g}, want numbers in [0, 1)"
        )
    dense = weight if isinstance(weight, Tensor) else weight.dense
    with torch.no_grad():
        chosen = choose("linear_sample", hidden, dense)
        if chosen == "reference":
            return linear_sample_reference(hidden, weight, uniform, temperature, bias)
        return kernel("linear_sample")(
            hidden.contiguous(),
            *head_operands(weight, chosen),
            uniform.contiguous(),
            temperature,
            None if bias is None else bias.float().contiguous(),
        )


define(
    "linear_sample(Tensor hidden, Tensor dense, Tensor data, Tensor uniform, float temperature,"
    " Tensor? bias) -> (Tensor, Tensor, Tensor)",
    lambda hidden, dense, data, uniform, temperature, bias: (
        uniform.new_empty(uniform.shape, dtype=torch.int64),
        uniform.new_empty(uniform.shape, dtype=torch.float32),
        uniform.new_empty(uniform.shape, dtype=torch.float32),
    ),
)
