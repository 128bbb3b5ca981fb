"""linear on packed weights: against F.linear and oneDNN's prepacked product; packing itself against a plain copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.suite import work
from engine.kernels._backend import cpu_class
from engine.kernels.linear import linear, pack_weight, refresh_weight

SHAPES = {
    "qkv-part": (576, 576),
    "gate": (1536, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}  # (N, K)
ACTIVATIONS = torch.bfloat16 if cpu_class() == "amx" else torch.float32
NAMES = ("engine", "torch-fp32", "torch-bf16", "onednn-fp32", "onednn-bf16")


def slow_or_large(name: str, rows: int, shape: str) -> bool:
    """The head has at most 64 rows (its training goes through linear_logprob); without bf16 instructions torch's bf16
    product crawls, and oneDNN's refuses."""
    if shape == "head" and rows > 64:
        return True
    if not name.endswith("bf16") or cpu_class() not in ("avx2", "plain"):
        return False
    return rows > 64 or name.startswith("onednn")


def prepacked(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """oneDNN with its weight reordered beforehand, where this torch has it."""
    mkldnn = torch.ops.mkldnn
    if not hasattr(mkldnn, "_reorder_linear_weight"):
        pytest.skip("this torch has no prepacked oneDNN product")
    packed = mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 16, 64, 512, 2048])
@pytest.mark.parametrize("name", NAMES)
def test_linear(benchmark, name, rows, shape):
    if slow_or_large(name, rows, shape):
        pytest.skip("not what anyone runs")
    n, k = SHAPES[shape]
    x, master = torch.randn(rows, k), torch.randn(n, k) * k**-0.5
    packed, operand = pack_weight(master, torch.bfloat16), x.to(ACTIVATIONS)
    want = F.linear(operand.float(), packed.dense.float())
    torch.testing.assert_close(linear(operand, packed).float(), want, rtol=2e-2, atol=2e-2)
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    runs: dict[str, Callable[[], Tensor]] = {
        "engine": lambda: linear(operand, packed),
        "torch": lambda: F.linear(x.to(dtype), weight),
    }
    if name != "engine":
        x, weight = x.to(dtype), master.to(dtype)
    with torch.no_grad():
        run = prepacked(x, weight) if name.startswith("onednn") else runs[name.split("-")[0]]
        torch.testing.assert_close(run().float(), want, rtol=3e-2, atol=3e-2)
        size = 2 * n * k + rows * (n + k) * operand.itemsize
        work(benchmark, size, 2 * rows * n * k, bf16=True)
        benchmark(run)


@pytest.mark.parametrize("shape", ["gate", "down"])
@pytest.mark.parametrize("name", ["engine", "torch-fp32", "torch-bf16"])
def test_linear_backward(benchmark, name, shape):
    """Forward, and gradients of x and of the weight's float32 master, for 2,048 tokens."""
    if slow_or_large(name, 2048, shape):
        pytest.skip("not what anyone runs")
    (n, k), dtype = SHAPES[shape], torch.bfloat16 if name.endswith("bf16") else torch.float32
    x, master = torch.randn(2048, k), (torch.randn(n, k) * k**-0.5).requires_grad_()
    packed, grad = pack_weight(master, torch.bfloat16), torch.randn(2048, n)

    def engine_run() -> tuple[Tensor, ...]:
        own = x.to(ACTIVATIONS).requires_grad_()
        out = linear(own, packed, None, master)
        return torch.autograd.grad(out, (own, master), grad.to(out.dtype))

    def torch_run() -> tuple[Tensor, ...]:
        own, weight = x.to(dtype).requires_grad_(), master.to(dtype)
        return torch.autograd.grad(F.linear(own, weight), (own, master), grad.to(dtype))

    for ours, theirs in zip(engine_run(), torch_run(), strict=True):
        scale = theirs.float().abs().max().item()
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=3e-2, atol=1e-2 * scale)
    work(benchmark, flop=6 * 2048 * n * k, bf16=True)
    benchmark(engine_run if name == "engine" else torch_run)


@pytest.mark.parametrize("what", ["pack", "refresh"])
@pytest.mark.parametrize("name", ["engine", "torch", "copy"])
def test_linear_pack(benchmark, name, what):
    """A head's weight packed from its storage dtype, and anew from its float32 master: bytes against a copy's.

    torch: only rounds, or copies, row-major. copy: torch copies as many bytes as must be read and written here.
    """
    master = torch.randn(49152, 576)
    weight = pack_weight(master, torch.bfloat16)
    assert weight.data is not None
    refresh_weight(weight, master)
    assert torch.equal(weight.data, pack_weight(master, torch.bfloat16).data)
    assert torch.equal(weight.dense, master.bfloat16())
    copy = torch.empty_like(weight.dense)
    moved = (
        4 if what == "pack" else 8
    )  # bytes of an element: in and out; float32 in, row-major and packed out
    half = torch.randn(moved * master.numel() // 8)  # float32, so that reading and writing it is `moved` an element
    other_half = torch.empty_like(half)
    runs = {
        ("engine", "pack"): lambda: torch.ops.engine.pack_weight(weight.dense),
        ("engine", "refresh"): lambda: refresh_weight(weight, master),
        ("torch", "pack"): lambda: copy.copy_(weight.dense),
        ("torch", "refresh"): lambda: copy.copy_(master),
        ("copy", what): lambda: other_half.copy_(half),
    }
    work(benchmark, moved * master.numel())
    benchmark(runs[name, what])
