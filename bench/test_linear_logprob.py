"""linear_logprob: against F.linear, log_softmax and gather, which hold rows x vocabulary; forward and with backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.suite import work
from engine.kernels._backend import cpu_class
from engine.kernels.linear import pack_weight
from engine.kernels.linear_logprob import linear_logprob

VOCABULARY, HIDDEN = 49152, 576  # SmolLM2-135M
ACTIVATIONS = torch.bfloat16 if cpu_class() == "amx" else torch.float32


def expression(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("rows", [64, 512])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["engine", "torch-fp32", "torch-bf16"])
def test_linear_logprob(benchmark, name, backward, rows):
    if name == "torch-bf16" and cpu_class() in ("avx2", "plain"):
        pytest.skip("torch's bf16 product is an order slower than its fp32 one here")
    master = (torch.randn(VOCABULARY, HIDDEN) * HIDDEN**-0.5).requires_grad_()
    packed, targets = pack_weight(master, torch.bfloat16), torch.randint(VOCABULARY, (rows,))
    dtype = torch.bfloat16 if name == "torch-bf16" else torch.float32
    base, grad = torch.randn(rows, HIDDEN), torch.randn(rows)

    def engine_run() -> tuple[Tensor, ...]:
        hidden = base.to(ACTIVATIONS).requires_grad_(backward)
        out = linear_logprob(hidden, packed, targets, master=master if backward else None)
        return torch.autograd.grad(out[0], (hidden, master), grad) if backward else out

    def torch_run() -> tuple[Tensor, ...]:
        hidden = base.to(dtype).requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            out = expression(hidden, master.to(dtype), targets)
        return torch.autograd.grad(out[0], (hidden, master), grad) if backward else out

    for ours, theirs in zip(engine_run(), torch_run(), strict=True):
        scale = theirs.float().abs().max().item()
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=3e-2, atol=3e-2 * scale)
    work(benchmark, 2 * master.numel(), (6 if backward else 2) * rows * master.numel(), bf16=True)
    benchmark(engine_run if name == "engine" else torch_run)
