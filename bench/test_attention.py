"""attention: C++ against torch, a sequence at a time; and a prompt shared or repeated."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.kernels.attention import attention

HEADS, KEY_HEADS, SIZE = 9, 3, 64  # SmolLM2-135M


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(tokens, h, SIZE) for h in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def torch_attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    bounds = cu.tolist()
    rows = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        part = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        out = scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["engine", "torch"])
def test_attention(benchmark, name, backward, length, dtype):
    lengths = [length] * (2048 // length)
    cu, (q, k, v) = offsets(lengths), inputs(2048, dtype)
    run = attention if name == "engine" else torch_attention
    ours, theirs = attention(q, k, v, cu).float(), torch_attention(q, k, v, cu).float()
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)
    grad = torch.randn_like(q)

    def forward_only() -> None:
        with torch.no_grad():
            run(q, k, v, cu)

    def forward_and_backward() -> None:
        torch.autograd.grad(run(q, k, v, cu), (q, k, v), grad)

    scores = 4 * HEADS * SIZE * sum(n * (n + 1) // 2 for n in lengths)
    benchmark.extra_info["flop"] = scores * (3.5 if backward else 1)
    benchmark(forward_and_backward if backward else forward_only)


@pytest.mark.parametrize("shared", [True, False])
def test_eight_answers_to_a_prompt(benchmark, shared):
    """512 tokens of prompt, 64 of each answer: as one prompt and 8 answers, or as 8 whole sequences."""
    lengths = [512] + [64] * 8 if shared else [576] * 8
    prefix = torch.zeros(9, dtype=torch.int32) if shared else None
    q, k, v = inputs(sum(lengths), torch.float32)
    with torch.no_grad():
        benchmark(attention, q, k, v, offsets(lengths), prefix)
