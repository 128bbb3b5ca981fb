"""Matrix product with a weight that is packed once and read by generation, scoring and training alike.

    y = x W^T + bias

M rows, N columns (outputs), K depth. A weight is packed for the class of CPU at hand (docs/design.md section 6); every
element of y sums over K in order in one accumulator, so it is a function of its own row of x alone: the same bits
for any number of rows, any place among them and any number of threads. Gradients of the weight go to its float32
master (N, K). With bfloat16 storage on class `amx` the products take bfloat16 operands (x and the gradient are rounded)
and accumulate in float32; elsewhere x stays as it is and only the weight is bfloat16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in its storage dtype, twice: row-major, and in the layout of one class of CPU."""

    dense: Tensor  # (N, K) storage dtype: embedding look-ups, gradients of x, the torch definitions
    data: Tensor | None  # bytes in the layout of `cpu_class`; None where the C++ kernels are not used
    cpu_class: str  # "amx", "avx512", "avx2", "plain", or "reference" without packed data

    @property
    def rows(self) -> int:
        return self.dense.shape[0]

    @property
    def cols(self) -> int:
        return self.dense.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.dense.dtype


def pack_weight(
    master: Tensor,  # (N, K)
    dtype: torch.dtype,
) -> PackedWeight:
    """The compute copy of a weight: rounded to nearest even in `dtype`, and packed for this CPU.

    Where `master` already has `dtype`, `dense` shares its memory: pack again after a change.
    """
    if master.dim() != 2:
        raise ValueError(f"master: got shape {tuple(master.shape)}, want (N, K)")
    return PackedWeight(master.detach().to(dtype).contiguous(), None, "reference")


def linear_reference(
    x: Tensor,  # (M, K)
    weight: PackedWeight,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    master: Tensor | None = None,  # (N, K)
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # (M, N)
    """The definition: the product in the storage dtype; with `master`, of its rounding to that dtype."""
    dense = weight.dense if master is None else master.to(weight.dtype)
    y = F.linear(x.to(weight.dtype), dense).to(out_dtype or x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def linear(
    x: Tensor,  # (M, K) bfloat16 or float32
    weight: PackedWeight,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    master: Tensor | None = None,  # (N, K) float32
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # (M, N) in out_dtype (None: the dtype of x)
    """y = x W^T + bias; gradients to x, to bias, and to `master` (float32), which stands for the weight.

    Without `master` the weight is frozen. Raises ValueError on shapes that do not fit.
    """
    if x.dim() != 2 or x.shape[1] != weight.cols:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (M, {weight.cols}) for this weight")
    if bias is not None and bias.shape != (weight.rows,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, want ({weight.rows},)")
    if master is not None and master.shape != weight.dense.shape:
        raise ValueError(
            f"master: got shape {tuple(master.shape)}, want {tuple(weight.dense.shape)}"
        )
    return linear_reference(x, weight, bias, master, out_dtype)
