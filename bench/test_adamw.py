"""adamw: a whole optimizer step of SmolLM2-135M in one pass, against torch's fused AdamW with a refresh of the compute
copy and an update of the average behind it; and the global norm."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.suite import work
from engine.kernels.adamw import (
    adamw_step_reference,
    bias_corrections,
    grad_norm,
    grad_norm_reference,
)
from engine.model.names import Spec
from engine.model.storage import Weights
from engine.run.ema import EMA
from engine.run.optim import Optimizer, OptimizerConfig

LAYER = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
    "input_layernorm": (576,),
    "post_attention_layernorm": (576,),
}
LR, DECAY, BETAS, EPS, AVERAGE = 1e-3, 0.1, (0.9, 0.95), 1e-8, 0.992
SEEN = "layers.3.mlp.up_proj.weight"  # whose first step is compared with the definition


def smollm2() -> Weights:
    shapes = {f"layers.{i}.{name}.weight": shape for i in range(30) for name, shape in LAYER.items()}
    shapes |= {"embed_tokens.weight": (49152, 576), "norm.weight": (576,)}  # read as the head too
    specs = {n: Spec(s, "matrix" if len(s) == 2 else "vector") for n, s in shapes.items()}
    weights = Weights(specs, lambda name: torch.randn(shapes[name]) * 0.04, torch.bfloat16, True)
    for master in weights.masters.values():
        master.grad = torch.randn_like(master) * 1e-3
    return weights


def separate_passes(weights: Weights, average: EMA | None) -> Callable[[], None]:
    masters = weights.masters.values()
    groups = [{"params": [p for p in masters if p.dim() == 2]},
              {"params": [p for p in masters if p.dim() == 1], "weight_decay": 0.0}]  # fmt: skip
    adam = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)

    def step() -> None:
        adam.step()
        weights.refresh()
        if average is not None:
            average.update()

    return step


def first_step(master: Tensor, grad: Tensor) -> Tensor:
    """The definition in float64."""
    w, g = master.detach().double(), grad.double()
    zeros = torch.zeros_like(w), torch.zeros_like(w)
    adamw_step_reference(w, g, *zeros, None, None, LR, *BETAS, EPS, DECAY, *bias_corrections(*BETAS, 1))
    return w


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("name", ["engine", "torch"])
def test_adamw(benchmark, name, ema):
    """Without the norm, which both sides need: read master, gradient and moments, write master, moments and both
    copies; read and write the average."""
    weights = smollm2()
    average = EMA(weights.masters, AVERAGE) if ema else None
    optimizer = Optimizer(weights.masters, OptimizerConfig(BETAS, EPS, weight_decay=DECAY), weights, average)
    run = separate_passes(weights, average) if name == "torch" else lambda: optimizer.move(LR, 1.0)
    seen = weights.masters[SEEN]
    assert seen.grad is not None
    want = first_step(seen, seen.grad)
    run()
    torch.testing.assert_close(seen.detach().double(), want, rtol=1e-6, atol=1e-7)
    assert torch.equal(weights.packed(SEEN).dense, seen.detach().bfloat16()) and weights.version == 1
    work(benchmark, sum(p.numel() for p in weights.masters.values()) * (16 + 12 + 4 + 8 * ema))
    benchmark.pedantic(run, rounds=9, warmup_rounds=1)


@pytest.mark.parametrize("name", ["engine", "torch"])
def test_adamw_norm(benchmark, name):
    """torch: as in torch.nn.utils.clip_grad_norm_, without the pass that scales."""
    grads = [p.grad for p in smollm2().masters.values() if p.grad is not None]
    runs = {"engine": lambda: grad_norm(grads), "torch": lambda: torch.nn.utils.get_total_norm(grads)}
    torch.testing.assert_close(grad_norm(grads), grad_norm_reference(grads), rtol=1e-12, atol=0)
    torch.testing.assert_close(runs["torch"]().double(), grad_norm(grads), rtol=1e-3, atol=0)  # float32 sums
    work(benchmark, sum(grad.nbytes for grad in grads))
    benchmark(runs[name])
