"""linear_sample: against logits, softmax and multinomial, and against the same draw by cumulated sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.suite import work
from engine.kernels._backend import cpu_class
from engine.kernels.linear import pack_weight
from engine.kernels.linear_sample import linear_sample, linear_sample_reference

VOCABULARY, HIDDEN = 49152, 576  # SmolLM2-135M
ACTIVATIONS = torch.bfloat16 if cpu_class() == "amx" else torch.float32


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("name", ["engine", "multinomial", "cumulated"])
def test_linear_sample(benchmark, name, rows):
    """torch in its faster dtype; what it draws with `multinomial` comes without the entropy."""
    weight = torch.randn(VOCABULARY, HIDDEN) * HIDDEN**-0.5
    packed, hidden = pack_weight(weight, torch.bfloat16), torch.randn(rows, HIDDEN)
    hidden = hidden.bfloat16().float()  # so that both sides see the same rows
    uniform, operand = torch.rand(rows, dtype=torch.float64), hidden.to(ACTIVATIONS)
    own, theirs = operand, packed.dense.to(ACTIVATIONS)

    def multinomial() -> tuple[Tensor, Tensor]:
        logp = F.linear(own, theirs).float().log_softmax(-1)
        token = torch.multinomial(logp.exp(), 1)
        return token.squeeze(-1), logp.gather(-1, token).squeeze(-1)

    def cumulated() -> tuple[Tensor, Tensor]:
        logp = F.linear(own, theirs).float().log_softmax(-1)
        sums = logp.exp().cumsum(-1)
        token = torch.searchsorted(sums, (uniform[:, None] * sums[:, -1:]).float(), right=True)
        token = token.clamp(max=VOCABULARY - 1)
        return token.squeeze(-1), logp.gather(-1, token).squeeze(-1)

    token, logprob, _entropy = linear_sample(operand, packed, uniform)
    want, want_logprob, _ = linear_sample_reference(hidden, packed, uniform)
    same = (
        token == want
    )  # sums of 49,152 numbers differ in their last digits, and a draw may sit on an edge
    assert same.sum() >= rows - 1 - rows // 16
    torch.testing.assert_close(logprob[same], want_logprob[same], rtol=1e-3, atol=1e-2)
    runs = {
        "engine": lambda: linear_sample(operand, packed, uniform),
        "multinomial": multinomial,
        "cumulated": cumulated,
    }
    work(benchmark, 2 * weight.numel(), 2 * rows * weight.numel(), bf16=True)
    with torch.no_grad():
        benchmark(runs[name])
