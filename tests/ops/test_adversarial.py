"""Every op with arguments that are wrong in one place or two: refused or done, never more memory than its own."""

import random

import adversarial
import pytest
import torch

# What an op may say; a SystemError, or no process at all, would be a finding.
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError, OverflowError)
ROUNDS = 150


def test_every_op_with_a_cpu_kernel_is_here():
    assert adversarial.every_op() == sorted(adversarial.CALLS)


def outcome(op, arguments):
    """What it returned, and its arguments behind the call, where some are written to."""
    given = adversarial.copied(arguments)
    returned = getattr(torch.ops.engine, op)(*given)
    return returned, [x for x in given if not isinstance(x, torch.dtype)]


@torch.no_grad()
@pytest.mark.parametrize("op", sorted(adversarial.CALLS))
def test_a_hostile_call_harms_nothing(cpu_class, op):
    r = random.Random(op)
    right = adversarial.CALLS[op]()
    before = outcome(op, right)
    refused = 0
    for _ in range(ROUNDS):
        arguments = list(right)
        for at in r.sample(range(len(right)), min(len(right), r.choice([1, 1, 2]))):
            arguments[at] = adversarial.broken(arguments[at], r)
        try:
            outcome(op, arguments)
        except REFUSALS as refusal:
            assert str(refusal)
            refused += 1
    assert refused or op == "square_sums", "nothing was refused; want the op to look at what it is given"
    torch.testing.assert_close(outcome(op, right), before, rtol=0, atol=0, equal_nan=True)
