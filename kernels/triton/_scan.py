"""What the ops that run along a segment share: recurrences as scans, with the lanes in the order of the recurrence.

    y_i = a_i y_{i-1} + b_i;    first (a, b), then (a', b') is (a a', a' b + b')

In float64, as in C++: where values are large against advantages, what telescopes away in exact arithmetic would stay as
rounding errors of the values; and so would the rounding of a float32 decay, over an answer's length. Memory is what
these kernels wait for. Lanes run forward: a walk from the end reads with a reversed index, because
associative_scan(reverse=True) has an open bug for maps that do not commute (triton-lang/triton#4362).
"""

import struct

import triton
import triton.language as tl


def halves(number: float) -> tuple[float, float]:
    """As two float32, all that Triton passes of a Python float; `wide` adds them up again."""
    (high,) = struct.unpack("f", struct.pack("f", number))
    return high, number - high


@triton.jit
def wide(high, low):
    return tl.cast(high, tl.float64) + tl.cast(low, tl.float64)


@triton.jit
def then(a, b, a_next, b_next):
    return a * a_next, a_next * b + b_next


@triton.jit
def recurrence(inside, decay, b, before):
    """y_i = decay y_{i-1} + b_i from y_{-1} = before; lanes that are not inside pass y on as it is."""
    a, b = tl.associative_scan(
        (tl.where(inside, decay, 1.0), tl.where(inside, b, 0.0)), 0, combine_fn=then
    )
    return a * before + b


@triton.jit
def previous(x, before, LANES: tl.constexpr):
    """x of the lane before, from registers; `before` in the first lane."""
    lane = tl.arange(0, LANES)
    return tl.where(lane == 0, before, tl.gather(x, tl.maximum(lane - 1, 0), 0))


@triton.jit
def last(x, LANES: tl.constexpr):
    """x of the last lane, as a number."""
    return tl.sum(tl.where(tl.arange(0, LANES) == LANES - 1, x, 0.0), 0)
