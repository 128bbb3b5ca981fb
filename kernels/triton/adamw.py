"""adamw on a GPU: one pass over the flat elements; and sums of squares, a partial sum a program, added in order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adamw import SQUARES
from ._blocks import load_block, store_block
from ._launch import Config, cdiv, config, launch


@triton.jit
def _step(
    master,
    grad,
    exp_avg,
    exp_avg_sq,
    copy,
    ema,
    clip,
    n,
    step_size,
    decay,
    gain1,  # 1 - beta1
    beta2,
    gain2,  # 1 - beta2
    inverse_correction2,
    eps,
    clip_scale,
    ema_gain,  # 1 - ema_decay
    HAS_CLIP: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_EMA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.cast(clip_scale, tl.float32)
    if HAS_CLIP:
        scale = tl.load(clip).to(tl.float32)
        if scale == 0.0:
            return
    first = tl.program_id(0).to(tl.int64) * BLOCK
    w = load_block(master, first, n, BLOCK)
    g = load_block(grad, first, n, BLOCK).to(tl.float32) * scale
    m = load_block(exp_avg, first, n, BLOCK)
    v = load_block(exp_avg_sq, first, n, BLOCK)
    m += tl.cast(gain1, tl.float32) * (g - m)
    v = tl.cast(beta2, tl.float32) * v + tl.cast(gain2, tl.float32) * g * g
    denominator = tl.sqrt_rn(v) * tl.cast(inverse_correction2, tl.float32)
    denominator += tl.cast(eps, tl.float32)
    update = tl.cast(step_size, tl.float32) * tl.div_rn(m, denominator)
    w -= tl.cast(decay, tl.float32) * w + update
    store_block(exp_avg, first, n, m, BLOCK)
    store_block(exp_avg_sq, first, n, v, BLOCK)
    store_block(master, first, n, w, BLOCK)
    if HAS_COPY:
        store_block(copy, first, n, w, BLOCK)
    if HAS_EMA:
        average = load_block(ema, first, n, BLOCK)
        average += tl.cast(ema_gain, tl.float32) * (w - average)
        store_block(ema, first, n, average, BLOCK)


@triton.jit
def _squares(x, sums, n, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    end = tl.minimum(n, (program + 1) * CHUNK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, CHUNK, BLOCK):
        element = load_block(x, program * CHUNK + start, end, BLOCK).to(tl.float64)
        total += element * element
    tl.store(sums + program, tl.sum(total, axis=0))


@triton.jit
def _ordered_sum(x, out, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < n, other=0.0)
    tl.store(out, tl.sum(total, axis=0))


def adamw_step(
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
    clip_scale: float,
    clip: Tensor | None,
    ema_decay: float,
    tuned: Config | None = None,
) -> None:
    """Size of the table: the number of elements. Constants are made in float64 and handed over in float32."""
    n = master.numel()
    tuned = tuned or config("adamw", n, master.device)
    launch(
        _step,
        (cdiv(n, tuned.blocks["BLOCK"]),),
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        master if copy is None else copy,
        master if ema is None else ema,
        master if clip is None else clip,
        n,
        lr / bias_correction1,
        lr * weight_decay,
        1.0 - beta1,
        float(beta2),
        1.0 - beta2,
        1.0 / bias_correction2_sqrt,
        float(eps),
        float(clip_scale),
        1.0 - ema_decay,
        config=tuned,
        HAS_CLIP=clip is not None,
        HAS_COPY=copy is not None,
        HAS_EMA=ema is not None,
    )


def adamw_steps(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    data: Sequence[Tensor | None],  # of None: nothing is packed on a GPU
    emas: Sequence[Tensor | None],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: Sequence[float],
    bias_correction1: float,
    bias_correction2_sqrt: float,
    clip_scale: float,
    clip: Tensor | None,
    ema_decay: float,
) -> None:
    """A launch for each weight."""
    corrections = (bias_correction1, bias_correction2_sqrt)
    for i, (master, grad) in enumerate(zip(masters, grads, strict=True)):
        tensors = (master, grad, exp_avgs[i], exp_avg_sqs[i], copies[i], emas[i])
        given = (*tensors, lr, beta1, beta2, eps, weight_decays[i], *corrections, clip_scale, clip, ema_decay)
        adamw_step(*given)


def square_sums(x: Tensor, tuned: Config | None = None) -> Tensor:  # (cdiv(numel, SQUARES),)
    n = x.numel()
    sums = x.new_empty(cdiv(n, SQUARES), dtype=torch.float64)
    tuned = tuned or config("adamw", n, x.device)
    launch(_squares, tuple(sums.shape), x, sums, n, config=tuned, CHUNK=SQUARES)
    return sums


def ordered_sum(x: Tensor, tuned: Config | None = None) -> Tensor:  # ()
    out = x.new_empty((), dtype=torch.float64)
    tuned = tuned or config("adamw", x.numel(), x.device)
    launch(_ordered_sum, (1,), x, out, x.numel(), config=tuned)
    return out
