"""The products and attention at the edges of their blocks: on whole numbers, where every sum is exact in any order.

Rows and columns just below, at and above 16, 32, 48, 64 and 128, depths around 32 and 64 and in several pieces. A row
too many, a tail left out or a padding that is not zero is then a difference, however small its share.
"""

import pytest
import torch
from gradients import check_against_float64
from test_attention_decode import batch, paged
from test_linear_logprob import check_against_float64 as check_logprob

from engine.kernels.attention import attention, attention_reference
from engine.kernels.attention_decode import attention_decode
from engine.kernels.linear import linear, pack_weight
from engine.kernels.linear_logprob import linear_logits, linear_logprob
from engine.kernels.linear_sample import linear_sample

STORAGES = [torch.float32, torch.bfloat16]
ROWS = (0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 129)
COLUMNS = (1, 31, 32, 33, 63, 65, 95, 97, 127, 129, 64)
DEPTHS = (1, 31, 32, 33, 63, 64, 577, 1537, 96, 1536, 2048, 65, 127)
# 15, 11 and 13 of them: going through all three in step, they meet in other company each time.


def whole(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).float()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("x_dtype", STORAGES)
def test_products_of_whole_numbers_are_exact(cpu_class, storage, x_dtype):
    for i in range(4 * len(ROWS)):
        m, n, k = ROWS[i % len(ROWS)], COLUMNS[i % len(COLUMNS)], DEPTHS[i % len(DEPTHS)]
        x, bias, master, grad = whole(m, k), whole(n), whole(n, k), whole(m, n)
        leaves = [t.requires_grad_() for t in (x.to(x_dtype), bias.clone(), master.clone())]
        y = linear(leaves[0], pack_weight(master, storage), *leaves[1:], torch.float32)
        y.backward(grad)
        assert torch.equal(y, x @ master.T + bias), (m, n, k)
        dx = (grad @ master).to(x_dtype)
        for leaf, want in zip(leaves, (dx, grad.sum(0), grad.T @ x), strict=True):
            assert torch.equal(leaf.grad, want), (m, n, k)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(17, 64, 33), (31, 2144, 31), (49, 96, 40), (145, 32, 33)])
def test_gradients_of_logits_that_are_read_in_place(cpu_class, storage, shape):
    """Whole steps of columns: all rows but the last ones lie further apart than these, which are copied."""
    check_logprob(cpu_class, shape, storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_vocabularies_that_are_multiples_of_nothing(cpu_class, storage):
    for i, v in enumerate((1, 2, 31, 33, 255, 256, 257, 511, 515, 1025)):
        n, h = (1, 2, 15, 17, 32, 33, 37, 65)[i % 8], (1, 31, 32, 33, 65)[i % 5]
        hidden, weight, u = whole(n, h) / 8, pack_weight(whole(v, h), storage), torch.rand(n)
        tokens, *results = linear_sample(hidden, weight, u.double())
        assert all(map(torch.equal, results, linear_logprob(hidden, weight, tokens)))
        law = linear_logits(hidden.double(), weight.dense.double()).log_softmax(-1)
        want = law.gather(-1, tokens[:, None])[:, 0], -(law.exp() * law).sum(-1)
        for ours, truth in zip(results, want, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("size", [8, 10, 16, 64, 80])
def test_attention_over_empty_and_short_sequences(cpu_class, dtype, size):
    lengths = [0, 1, 0, 0, 1, 2, 15, 16, 17, 1, 63, 64, 65, 0]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.randn(int(cu[-1]), heads, size).to(dtype) for heads in (6, 2, 2))
    check_against_float64(
        lambda *x: attention(*x, cu),
        lambda *x: attention_reference(*x, cu),
        (q, k, v),
        torch.randn_like(q),
        units=16,
    )


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("heads,size", [((6, 2), 8), ((3, 1), 10), ((2, 2), 16), ((7, 1), 80)])
def test_decoding_is_the_row_of_attention(cpu_class, dtype, heads, size):
    lengths = [1, 15, 16, 17, 64, 65, 129]
    q, k, v = batch(lengths, heads, size, dtype)
    out = attention_decode(q, *paged(k, v), torch.tensor(lengths, dtype=torch.int32))
    for r, n in enumerate(lengths):
        queries = torch.cat([torch.zeros(n - 1, heads[0], size, dtype=dtype), q[r : r + 1]])
        rows = attention(queries, k[r], v[r], torch.tensor([0, n], dtype=torch.int32))
        assert torch.equal(out[r], rows[-1]), n
