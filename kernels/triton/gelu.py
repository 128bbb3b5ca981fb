"""gelu on a GPU: one pass forward, one pass backward, over the flat elements.

The equations, and the form of Phi that keeps its digits in the left tail, are those of csrc/cpu/gelu.cpp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, cdiv, config, launch


@triton.jit
def _normal(x):
    """(Phi(x), phi(x)). Phi(-a) = e^(-a^2/2) t p(t), t = 1 / (1 + 0.3 a), a >= 0, with p a fitted polynomial: relative
    error 3.4e-9 up to a = 13.3, from where on it is 0 in float32. 1 + erf has no digits there.
    """
    a = tl.abs(x)
    e = tl.exp(-0.5 * (a * a))
    t = 1.0 / (1.0 + 0.3 * a)
    p = -2.058472671e-02 * t + 1.122175083e-01
    p = p * t - 2.276804745e-01
    p = p * t + 1.910432875e-01
    p = p * t - 7.877875865e-02
    p = p * t + 9.579380602e-02
    p = p * t + 7.852168381e-02
    p = p * t + 1.102055833e-01
    p = p * t + 1.195756122e-01
    p = p * t + 1.196864843e-01
    tail = e * t * p
    return tl.where(x < 0.0, tail, 1.0 - tail), e * 0.398942280401432678


@triton.jit
def _tanh_gate(x):
    """(g, x g'), g = 1 / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).

    g' = g (1 - g) (2u)', where 1 - g would lose its digits as g goes to 1: from e = e^(-|2u|) both are exact.
    """
    scale = 1.59576912160573071
    twice = scale * x * (1.0 + 0.044715 * (x * x))
    steep = scale * (1.0 + 3.0 * 0.044715 * (x * x))
    e = tl.exp(-tl.abs(twice))
    r = 1.0 / (1.0 + e)
    return tl.where(twice < 0.0, e * r, r), x * (e * r * r) * steep


@triton.jit
def _forward(x, out, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if TANH:
        g, bend = _tanh_gate(a)
        y = a * g
    else:
        below, density = _normal(a)
        y = a * below
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad, x, d_x, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """none: d x = grad (Phi(x) + x phi(x)). tanh, with g the gate: d x = grad (g + x g')."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if TANH:
        g, bend = _tanh_gate(a)
        slope = g + bend
    else:
        below, density = _normal(a)
        slope = below + a * density
    tl.store(d_x + at, (dy * slope).to(d_x.dtype.element_ty), mask=inside)


def gelu(x: Tensor, tanh: bool, tuned: Config | None = None) -> Tensor:
    """Size of the table: the number of elements."""
    out, n = torch.empty_like(x), x.numel()
    tuned = tuned or config("gelu", n, x.device)
    launch(_forward, (cdiv(n, tuned.blocks["BLOCK"]),), x, out, n, config=tuned, TANH=tanh)
    return out


def gelu_backward(grad: Tensor, x: Tensor, tanh: bool, tuned: Config | None = None) -> Tensor:
    d_x, n = torch.empty_like(x), x.numel()
    tuned = tuned or config("gelu", n, x.device)
    grid = (cdiv(n, tuned.blocks["BLOCK"]),)
    launch(_backward, grid, grad, x, d_x, n, config=tuned, TANH=tanh)
    return d_x
