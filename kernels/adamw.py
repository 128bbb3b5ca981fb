"""One pass of Adam with decoupled weight decay over one tensor (Loshchilov and Hutter 2019), and the global norm.

    g = clip_scale grad
    m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
    w <- w - lr (weight_decay w + (m / bias_correction1) / (sqrt(v) / bias_correction2_sqrt + eps))
    copy <- round(w)                    ema <- ema + (1 - ema_decay) (w - ema)

torch.optim.AdamW's arithmetic. `w` is the float32 master, `copy` what products read (on the CPU row-major and packed),
`ema` the average of the masters (InstructGPT C.4). Separate passes read and write 28 bytes an element, then 6 for the
copy (8 with the packed one) and 16 for the average; one pass has the master in registers, or in the cache, for all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._backend import choose, define, kernel
from .linear import PackedWeight, packed_data, refresh_weight

SQUARES = 16384  # elements of a tensor that one partial sum of squares takes, in order


def bias_corrections(beta1: float, beta2: float, step: int) -> tuple[float, float]:
    """1 - beta1^step and sqrt(1 - beta2^step), in float64; the first step is 1."""
    return 1 - beta1**step, math.sqrt(1 - beta2**step)


@torch.no_grad()
def adamw_step_reference(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    ema: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2_sqrt: float,
    clip_scale: float | Tensor = 1.0,
    ema_decay: float = 0.0,
) -> None:
    """The definition, in the dtype of `master`: the operations of torch.optim.AdamW in their order."""
    if float(clip_scale) == 0.0:
        return
    g = grad.to(master.dtype) * clip_scale
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / bias_correction2_sqrt).add_(eps)
    master.mul_(1 - lr * weight_decay)
    master.addcdiv_(exp_avg, denominator, value=-lr / bias_correction1)
    if copy is not None:
        copy.copy_(master)
    if ema is not None:
        ema.add_((master - ema).mul_(1 - ema_decay))


def _check(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    ema: Tensor | None,
) -> None:
    if master.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"master: got {master.dtype}, want float32: shorter ones lose updates")
    given = {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "copy": copy, "ema": ema}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.shape != master.shape:
            want = tuple(master.shape)
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, want {want} as master")
        if name not in ("grad", "copy") and tensor.dtype != master.dtype:
            raise ValueError(f"{name}: got {tensor.dtype}, want {master.dtype} as master")
    for name, tensor in {"master": master, **given}.items():
        if name != "grad" and tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: got strides {tensor.stride()}, want a contiguous tensor")


@dataclass(frozen=True)
class Stepped:
    """One weight and what a step reads and writes beside it; shapes and dtypes as in `adamw_step`."""

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | PackedWeight | None
    ema: Tensor | None
    weight_decay: float

    @property
    def dense(self) -> Tensor | None:
        return self.copy.dense if isinstance(self.copy, PackedWeight) else self.copy

    @property
    def packed(self) -> PackedWeight | None:
        return self.copy if isinstance(self.copy, PackedWeight) and self.copy.data is not None else None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.master, self.grad, self.exp_avg, self.exp_avg_sq, self.dense, self.ema


@torch.no_grad()
def adamw_step(
    master: Tensor,  # any shape, float32
    grad: Tensor,  # that shape, any floating dtype
    exp_avg: Tensor,  # float32
    exp_avg_sq: Tensor,  # float32
    copy: Tensor | PackedWeight | None,  # float32 or bfloat16, on a GPU float16 too; not packed on a GPU
    ema: Tensor | None,  # float32
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,  # 1 - beta1^t
    bias_correction2_sqrt: float,  # sqrt(1 - beta2^t)
    clip_scale: float | Tensor = 1.0,  # or 0-dim, on the device: nothing waits for its value
    ema_decay: float = 0.0,
) -> None:
    """One step of AdamW in place: moments, master, and where given the compute copy (rounded to nearest even) and the
    average. `grad` stays as it is. On the CPU the same bits for any number of threads, on every class.

    A `clip_scale` of 0 moves nothing, moments included: `clip_scale_of` gives it for a norm that is not finite.
    Raises ValueError on shapes and dtypes that do not fit. Source: Loshchilov and Hutter 2019, algorithm 2.
    """
    one = Stepped(master, grad, exp_avg, exp_avg_sq, copy, ema, weight_decay)
    adamw_steps([one], lr, beta1, beta2, eps, bias_correction1, bias_correction2_sqrt, clip_scale, ema_decay)


@torch.no_grad()
def adamw_steps(
    weights: Sequence[Stepped],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    bias_correction1: float,
    bias_correction2_sqrt: float,
    clip_scale: float | Tensor = 1.0,
    ema_decay: float = 0.0,
) -> None:
    """`adamw_step` for each weight, in order; C++ is entered once for all, since a model has hundreds of small ones.

    All are looked at before the first is moved: one that does not fit leaves the others as they are.
    """
    for weight in weights:
        _check(*weight.tensors)
    scale, clip = (1.0, clip_scale) if isinstance(clip_scale, Tensor) else (clip_scale, None)
    if scale == 0.0 or not weights:
        return
    # What the dispatcher does not do for an op that is registered from Python: autograd, and whoever watches for
    # stale copies, sees that these are written to, also where the step breaks off.
    written = [t for w in weights for t in (w.master, w.exp_avg, w.exp_avg_sq, w.dense, w.ema) if t is not None]
    torch.autograd.graph.increment_version(written)
    corrections = (bias_correction1, bias_correction2_sqrt)
    backend = choose("adamw", *(tensor for weight in weights for tensor in weight.tensors))
    if backend == "reference":
        for weight in weights:
            numbers = (lr, beta1, beta2, eps, weight.weight_decay, *corrections)
            adamw_step_reference(*weight.tensors, *numbers, clip_scale, ema_decay)
    else:
        columns = zip(*(weight.tensors for weight in weights), strict=True)
        masters, grads, exp_avgs, exp_avg_sqs, copies, averages = (list(column) for column in columns)
        packed = [weight.packed if backend == "cpp" else None for weight in weights]
        data = [None if one is None else packed_data(one) for one in packed]
        grads, decays = [grad.contiguous() for grad in grads], [weight.weight_decay for weight in weights]
        given = (masters, grads, exp_avgs, exp_avg_sqs, copies, data, averages, lr, beta1, beta2, eps, decays)
        kernel("adamw_steps")(*given, *corrections, scale, clip, ema_decay)
    stale = [(one, w.master) for w in weights if (one := w.packed) is not None and backend != "cpp"]  # not on a GPU
    if stale and float(clip_scale) != 0.0:
        for copy, master in stale:
            refresh_weight(copy, master)


def _blocks(x: Tensor) -> Tensor:
    """Sums of blocks of SQUARES elements: short enough that torch does not split one between threads."""
    whole = -(-x.numel() // SQUARES) * SQUARES
    return torch.nn.functional.pad(x, (0, whole - x.numel())).view(-1, SQUARES).sum(1)


def grad_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    """The definition; the same bits for any number of threads."""
    sums = [_blocks(t.detach().reshape(-1).double().square()) for t in tensors]
    total = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64)
    while total.numel() > 1:
        total = _blocks(total)
    return total.sum().sqrt()


@torch.no_grad()
def grad_norm(tensors: Sequence[Tensor]) -> Tensor:  # (), float64, on their device
    """sqrt(sum of squares) over all elements of all tensors; nothing waits for its value.

    float64 throughout, in a fixed order: a float32 square cannot overflow, and the norm is not finite only where an
    element is not.
    """
    if not tensors or choose("adamw", *tensors) == "reference":
        return grad_norm_reference(tensors)
    squares = [kernel("square_sums")(t.detach().contiguous()) for t in tensors]
    return kernel("ordered_sum")(torch.cat(squares)).sqrt()


def clip_scale_of(norm: Tensor, max_norm: float | None) -> Tensor:  # () -> (), float32
    """min(1, max_norm / norm), and 0 where the norm is not finite. `max_norm` None: 1 in place of the minimum."""
    scale = torch.ones_like(norm) if max_norm is None else (max_norm / norm).clamp(max=1.0)
    return torch.where(torch.isfinite(norm), scale, 0.0).float()


define(
    "adamw_steps(Tensor(a!)[] masters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor?[] copies, Tensor?[] data, Tensor?[] emas, float lr, float beta1, float beta2, float eps,"
    " float[] weight_decays, float bias_correction1, float bias_correction2_sqrt, float clip_scale,"
    " Tensor? clip, float ema_decay) -> ()",
    lambda *arguments: None,
)
define(
    "square_sums(Tensor x) -> Tensor",
    lambda x: x.new_empty(-(-x.numel() // SQUARES), dtype=torch.float64),
)
define("ordered_sum(Tensor x) -> Tensor", lambda x: x.new_empty((), dtype=torch.float64))
