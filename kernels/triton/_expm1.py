"""e^x - 1 and e^x - 1 - x without the loss of digits near 0, in float32."""

import triton
import triton.language as tl


@triton.jit
def expm1_series(x):
    """x^2/2 + x^3/6 + ... to x^12: below 1 in size the rest is under 2^-27 of the result."""
    tail = tl.zeros_like(x) + 1.0
    for k in tl.static_range(12, 2, -1):
        tail = tail * (x * (1.0 / k)) + 1.0
    return x * x * 0.5 * tail


@triton.jit
def expm1_minus(x):
    """e^x - 1 - x. Above 1 in size the rounding of e^x is small against the result."""
    return tl.where(tl.abs(x) < 1.0, expm1_series(x), tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 1.0, expm1_series(x) + x, tl.exp(x) - 1.0)
