"""swiglu on a GPU: one pass forward, one pass backward, over the flat elements."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, cdiv, config, launch


@triton.jit
def _forward(gate, up, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    h = g * tl.sigmoid(g) * u
    tl.store(out + at, h.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad, gate, up, d_gate, d_up, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    dh = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    dg = dh * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    du = dh * g * sigmoid
    tl.store(d_gate + at, dg.to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + at, du.to(d_up.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor, tuned: Config | None = None) -> Tensor:
    """Size of the table: the number of elements."""
    out, n = torch.empty_like(gate), gate.numel()
    tuned = tuned or config("swiglu", n, gate.device)
    launch(_forward, (cdiv(n, tuned.blocks["BLOCK"]),), gate, up, out, n, config=tuned)
    return out


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, tuned: Config | None = None
) -> tuple[Tensor, Tensor]:
    d_gate, d_up, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    tuned = tuned or config("swiglu", n, gate.device)
    grid = (cdiv(n, tuned.blocks["BLOCK"]),)
    launch(_backward, grid, grad, gate, up, d_gate, d_up, n, config=tuned)
    return d_gate, d_up
