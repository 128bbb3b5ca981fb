"""attention_decode: C++ over pages against torch's scaled_dot_product_attention over keys that lie in one piece."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.suite import work
from engine.kernels._backend import cpu_class
from engine.kernels.attention_decode import PAGE, attention_decode, page_shapes, write_pages

HEADS, KEY_HEADS, SIZE = 9, 3, 64  # SmolLM2-135M
ACTIVATIONS = torch.bfloat16 if cpu_class() == "amx" else torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [128, 512, 2048])
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("name", ["engine", "torch", "torch-fp32"])
def test_attention_decode(benchmark, name, rows, context, dtype):
    """`dtype` is that of keys and values; torch wants queries of the same, and is also given float32 copies."""
    if name == "torch-fp32" and dtype == torch.float32:
        pytest.skip("the same as torch")
    count = rows * context // PAGE
    q = torch.randn(rows, HEADS, SIZE).to(ACTIVATIONS if dtype == torch.bfloat16 else dtype)
    k, v = (torch.randn(rows * context, KEY_HEADS, SIZE).to(dtype) for _ in range(2))
    pages = [torch.zeros(count, *s, dtype=dtype) for s in page_shapes(KEY_HEADS, SIZE, dtype)]
    write_pages(*pages, torch.arange(rows * context), k, v)
    table = torch.arange(count, dtype=torch.int32).view(rows, -1)
    lengths = torch.full((rows,), context, dtype=torch.int32)
    own = torch.float32 if name == "torch-fp32" else dtype
    query = q[:, :, None].to(own)
    whole = [x.view(rows, context, KEY_HEADS, SIZE).transpose(1, 2).to(own) for x in (k, v)]

    def torch_decode() -> torch.Tensor:
        return scaled_dot_product_attention(query, *whole, enable_gqa=True)[:, :, 0]

    ours = attention_decode(q, *pages, table, lengths)
    torch.testing.assert_close(ours.float(), torch_decode().float(), rtol=3e-2, atol=3e-2)
    work(
        benchmark,
        k.nbytes + v.nbytes,
        4 * rows * context * HEADS * SIZE,
        bf16=q.dtype == torch.bfloat16,
    )
    if name == "engine":
        benchmark(attention_decode, q, *pages, table, lengths)
    else:
        benchmark(torch_decode)
