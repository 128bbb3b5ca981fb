"""attention_decode: C++ over pages against torch's scaled_dot_product_attention over keys that lie in one piece."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.suite import work
from engine.kernels.attention_decode import attention_decode

HEADS, KEY_HEADS, SIZE, PAGE = 9, 3, 64, 16  # SmolLM2-135M


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [128, 512, 2048])
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("name", ["engine", "torch"])
def test_attention_decode(benchmark, name, rows, context, dtype):
    pages = rows * context // PAGE
    q = torch.randn(rows, HEADS, SIZE).to(dtype)
    k, v = (torch.randn(pages, PAGE, KEY_HEADS, SIZE).to(dtype) for _ in range(2))
    table = torch.arange(pages, dtype=torch.int32).view(rows, -1)
    lengths = torch.full((rows,), context, dtype=torch.int32)
    whole = [x.view(rows, context, KEY_HEADS, SIZE).transpose(1, 2) for x in (k, v)]

    def torch_decode() -> torch.Tensor:
        return scaled_dot_product_attention(q[:, :, None], *whole, enable_gqa=True)[:, :, 0]

    ours = attention_decode(q, k, v, table, lengths)
    torch.testing.assert_close(ours.float(), torch_decode().float(), rtol=3e-2, atol=3e-2)
    flop = 4 * rows * context * HEADS * SIZE
    work(benchmark, 2 * k.nbytes, flop, bf16=dtype == torch.bfloat16)
    if name == "engine":
        benchmark(attention_decode, q, k, v, table, lengths)
    else:
        benchmark(torch_decode)
