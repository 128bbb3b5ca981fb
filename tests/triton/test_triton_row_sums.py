"""Sums over rows in parts: the partition, and the kernel that adds the parts."""

import pytest
import torch
from guards import guarded
from launching import DEVICE
from mutations import mutations

from engine.kernels import _backend
from engine.kernels.triton import _row_sums
from engine.kernels.triton._launch import Config

SMALL = Config({"PARTS": 4, "BLOCK": 8})


def test_every_row_is_in_one_part_and_parts_are_at_most_256():
    for rows in (1, 7, 8, 9, 2047, 2048, 2049, 8192, 100_003):
        parts, span = _row_sums.row_partition(rows)
        assert (parts - 1) * span < rows <= parts * span and parts <= 256 and span % 8 == 0
    assert _row_sums.row_partition(0)[0] == 0


def check(tuned=SMALL):
    module = _backend.triton_kernels("_row_sums")  # the changed one
    for count, P, H in ((1, 1, 5), (2, 9, 19), (1, 8, 8)):
        parts = torch.randn(count, P, H, device=DEVICE)
        with guarded() as guards:
            sums = module.sum_parts(guards.place(parts), tuned)
        torch.testing.assert_close(torch.stack(sums), parts.sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tuned", [SMALL, None])
def test_sums(tuned):
    check(tuned)
    assert torch.equal(_row_sums.sum_parts(torch.empty(2, 0, 3))[1], torch.zeros(3))


DEFECTS = {
    "the last parts only": ("total += tl.sum(", "total = tl.sum("),
    "a part too many": ("inside = (p < P)", "inside = (p <= P)"),
    "columns without a mask": ("(columns < H)[None, :]", "(columns < BLOCK)[None, :]"),
    "parts of the first sum": ("at = (k * P + p[:, None])", "at = (p[:, None])"),
    "sums swapped": ("if k == 0:", "if k == 1:"),
    "the first block's columns": ("tl.program_id(0) * BLOCK", "0 * BLOCK"),
}


@mutations(_row_sums, DEFECTS)
def test_defects_are_caught():
    check()
