"""linear_logprob: N tokens of width H against V rows of the head; 2 N H V FLOPs forward.

The backward makes the gradient of the logits again (2 N H V) and writes it, a slab of the vocabulary at a time, for the
library's two products with it (4 N H V), whose own traffic is not counted.
"""

import torch
from torch import Tensor

from bench.gpu import Case, Variation

TEMPERATURE = 0.7


def make(device: str, dtype: torch.dtype, N: int, V: int, H: int) -> tuple[Tensor, ...]:
    hidden = torch.randn(N, H, device=device).to(dtype)
    weight = (torch.randn(V, H, device=device) * H**-0.5).to(dtype)
    return hidden, weight, torch.arange(N, device=device) % V


def make_backward(device: str, dtype: torch.dtype, N: int, V: int, H: int) -> tuple[Tensor, ...]:
    """With the results of a forward whose logits were all 0: any numbers that could be."""
    log_sum = torch.full((N,), float(torch.tensor(float(V)).log()), device=device)
    return (*make(device, dtype, N, V, H), torch.zeros_like(log_sum), log_sum, log_sum.clone())


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> object:
    from engine.kernels.triton.linear_logprob import linear_logprob

    data = weight.new_empty(0, dtype=torch.uint8)
    return linear_logprob(hidden, weight, data, targets, TEMPERATURE, bias, None)


def backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    bias: Tensor | None = None,
) -> object:
    from engine.kernels.triton.linear_logprob import linear_logprob_backward

    data = weight.new_empty(0, dtype=torch.uint8)
    grads, results = (log_sum, entropy), (row_max, log_sum, entropy)
    wanted = (True, True, bias is not None)
    return linear_logprob_backward(
        *grads, hidden, weight, data, targets, TEMPERATURE, bias, *results, *wanted
    )


def make_biased(device: str, dtype: torch.dtype, N: int, V: int, H: int) -> tuple[Tensor, ...]:
    return *make(device, dtype, N, V, H), torch.randn(V, device=device)


def make_biased_backward(device: str, dtype: torch.dtype, **shape: int) -> tuple[Tensor, ...]:
    return *make_backward(device, dtype, **shape), make_biased(device, dtype, **shape)[-1]


def compulsory(size: int, N: int, V: int, H: int) -> float:
    """Hidden states, weight and targets in; logprob, entropy, row_max, log_sum out."""
    return size * (N * H + V * H) + 8 * N + 16 * N


def compulsory_backward(size: int, N: int, V: int, H: int) -> float:
    """Of the kernel: hidden states, weight, targets and 5 numbers a row in; the gradient of the logits out."""
    return size * (N * H + V * H) + 8 * N + 20 * N + size * N * V


def product(size: int, N: int, V: int, H: int) -> float:
    return 2.0 * N * V * H


def exponentials(size: int, N: int, V: int, H: int) -> float:
    return float(N * V)


SMOLLM2 = {"N": 8192, "V": 49152, "H": 576}
LLAMA_8B = {"N": 2048, "V": 128256, "H": 4096}
UNEVEN = {"N": 8192, "V": 50257, "H": 1000}  # GPT-2's vocabulary: fills no tile, nor does H
SMALL, SMALLER = {"N": 30, "V": 600, "H": 576}, {"N": 30, "V": 300, "H": 256}
WHY = (
    "each tile loads its hidden states and its rows of the weight: N V H size (1 / BLOCK_M + 1 / BLOCK_N) bytes in all,"
    " of which the second cache serves all but the compulsory ones while ROWS hidden states fit it; forward, 3 numbers"
    " a row and half of a tile (of many rows in 16 bits: a row and 2,048 columns) are stored and loaded"
)


def _case(name: str, full: dict[str, int], small: dict[str, int]) -> Case:
    if name.startswith("forward"):
        build, run, count, products, most = make, forward, compulsory, 1, 1.25
    else:
        build, run, count, products, most = make_backward, backward, compulsory_backward, 3, 1.2
    return Case(
        "linear_logprob",
        name,
        build,
        run,
        full,
        small,
        bytes=count,
        flops=lambda size, **shape: products * product(size, **shape),
        exponentials=exponentials,
        most_traffic=most,
        why=WHY,
    )


CASES = [
    _case(f"{name}{of}", full, small)
    for of, full, small in (("", SMOLLM2, SMALL), (", Llama-8B", LLAMA_8B, SMALLER))
    for name in ("forward", "backward")
]
VARIATIONS = [
    Variation("linear_logprob", "forward, bias, uneven", make_biased, forward, UNEVEN),
    Variation("linear_logprob", "backward, bias, uneven", make_biased_backward, backward, UNEVEN),
]
