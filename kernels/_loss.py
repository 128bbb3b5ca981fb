"""What the losses share: the denominator they take, and gradients that their forward computes."""

import math
from typing import Any

import torch
from torch import Tensor


def check_denominator(denominator: Tensor | float | None) -> float | None:
    """A positive number, from a float or a tensor of one element; None stays None (the own count).

    The global count of a batch that was cut in micro-batches makes the sum of their losses, and of
    their gradients, that of the whole batch.
    """
    if denominator is None:
        return None
    if isinstance(denominator, Tensor) and denominator.numel() != 1:
        raise ValueError(
            f"denominator: got a tensor of shape {tuple(denominator.shape)}, want one number"
        )
    value = float(denominator)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"denominator: got {value}, want the (positive) count over the whole batch;"
            " a batch without any has no loss: skip it"
        )
    return value


def divided_later(denominator: Tensor | float | None, dtype: torch.dtype) -> bool:
    """Is the denominator a number on a GPU, by which the undivided loss is divided there?

    Reading it would wait for all that was launched before; so its value is not checked. In float32 only: the undivided
    sum of a half could overflow, and the number is read after all.
    """
    if not isinstance(denominator, Tensor) or denominator.device.type == "cpu":
        return False
    return denominator.numel() == 1 and dtype == torch.float32


def divided(loss: Tensor, denominator: Tensor | float | None) -> Tensor:
    """loss / denominator for a denominator that is `divided_later`, in the dtype of the loss."""
    assert isinstance(denominator, Tensor)
    return (loss / denominator.reshape(())).to(loss.dtype)


def refuse_second_gradient(op: str) -> None:
    """In a backward: the C++ gradients have no gradient of their own (create_graph=True asks)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"op {op!r}: a gradient of its gradient was asked for, C++ has the first one only;"
            " use `with backend('reference')`"
        )


def register_loss(op: str) -> None:
    """Autograd of an op whose first output is the loss and whose last one is the loss's gradient.

    The gradient is that of the first input; the other inputs are constants.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.constants = len(inputs) - 1
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[-1])

    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_gradient(op)
        (grad,) = ctx.saved_tensors
        return grad_loss * grad, *(None,) * ctx.constants

    torch.library.register_autograd(f"engine::{op}", backward, setup_context=setup_context)
