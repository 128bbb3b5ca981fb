"""linear_logprob_loss, forward and backward: against cross_entropy of F.linear, and that in chunks of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.suite import work
from engine.kernels._backend import cpu_class
from engine.kernels.linear import pack_weight
from engine.kernels.linear_logprob_loss import linear_logprob_loss

VOCABULARY, HIDDEN, CHUNK = 49152, 576, 128  # SmolLM2-135M
ACTIVATIONS = torch.bfloat16 if cpu_class() == "amx" else torch.float32


def negative_sum(logprob: Tensor, _entropy: Tensor, _rows: slice) -> Tensor:
    return -logprob.sum()


@pytest.mark.parametrize("rows", [64, 512])
@pytest.mark.parametrize("name", ["engine", "torch", "torch in chunks"])
def test_linear_logprob_loss(benchmark, name, rows):
    master = (torch.randn(VOCABULARY, HIDDEN) * HIDDEN**-0.5).requires_grad_()
    packed, targets = pack_weight(master, torch.bfloat16), torch.randint(VOCABULARY, (rows,))
    base = torch.randn(rows, HIDDEN)

    def engine_run() -> tuple[Tensor, ...]:
        hidden = base.to(ACTIVATIONS).requires_grad_()
        loss, *_ = linear_logprob_loss(hidden, packed, targets, negative_sum, master=master)
        return torch.autograd.grad(loss, (hidden, master))

    def torch_run(at_once: int = rows) -> tuple[Tensor, ...]:
        hidden, gradients = base.clone().requires_grad_(), []
        for part, y in zip(hidden.split(at_once), targets.split(at_once), strict=True):
            loss = F.cross_entropy(F.linear(part, master), y, reduction="sum")
            gradients.append(torch.autograd.grad(loss, (part, master)))
        of_hidden, of_master = zip(*gradients, strict=True)
        return torch.cat(of_hidden), sum(of_master[1:], of_master[0])

    for ours, theirs in zip(engine_run(), torch_run(), strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.float(), theirs, rtol=3e-2, atol=3e-2 * scale)
    work(benchmark, 2 * master.numel(), 6 * rows * master.numel(), bf16=True)
    benchmark({"engine": engine_run, "torch": torch_run}.get(name, lambda: torch_run(CHUNK)))
