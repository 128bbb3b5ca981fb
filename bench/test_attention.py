"""attention: C++ against torch, a sequence at a time; and a prompt shared or repeated."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.suite import work
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

    def forward_only(of: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return of(q, k, v, cu)

    def forward_and_backward(of: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(of(q, k, v, cu), (q, k, v), grad)

    if backward:
        for own, other in zip(
            forward_and_backward(attention), forward_and_backward(torch_attention), strict=True
        ):
            torch.testing.assert_close(own.float(), other.float(), rtol=5e-2, atol=5e-2)
    flop = 4 * HEADS * SIZE * sum(n * (n + 1) // 2 for n in lengths)
    size = 2 * (q.nbytes + k.nbytes) * (2 if backward else 1)
    work(benchmark, size, flop * (3.5 if backward else 1), bf16=dtype == torch.bfloat16)
    benchmark(forward_and_backward if backward else forward_only, run)


@pytest.mark.parametrize("name", ["engine", "whole sequences"])
def test_attention_of_eight_answers_to_a_prompt(benchmark, name):
    """512 tokens of prompt, 64 of each answer: as one prompt and 8 answers, or as 8 whole sequences."""
    prompt, answers, prefix = 512, [64] * 8, torch.zeros(9, dtype=torch.int32)
    q, k, v = inputs(prompt + sum(answers), torch.float32)
    at = torch.arange(512 + 512)
    rows = torch.cat([torch.cat([at[:512], at[512 + 64 * i :][:64]]) for i in range(8)])
    given = {
        "engine": (q, k, v, offsets([prompt, *answers]), prefix),
        "whole sequences": (q[rows], k[rows], v[rows], offsets([576] * 8)),
    }
    with torch.no_grad():
        shared, apart = (attention(*given[n]) for n in given)
        torch.testing.assert_close(shared[rows], apart, rtol=1e-4, atol=1e-5)
        pairs = 512 * 513 // 2 + 8 * (64 * 512 + 64 * 65 // 2)
        work(benchmark, 2 * (q.nbytes + k.nbytes), 4 * HEADS * SIZE * pairs)
        benchmark(attention, *given[name])
