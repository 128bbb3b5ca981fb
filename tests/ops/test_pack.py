"""pack and unpack: masks on any side, empty rows, trailing dimensions, gradients."""

import pytest
import torch
from golden_cases import offsets
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.pack import pack, unpack

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]],
    "holes": [[0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]],
}


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_tokens_row_by_row_and_back(side, dtype):
    mask = torch.tensor(MASKS[side], dtype=dtype)
    padded = torch.arange(16).view(4, 4)
    packed, cu = pack(padded, mask)
    want = [b * 4 + t for b in range(4) for t in range(4) if MASKS[side][b][t]]
    assert packed.tolist() == want
    assert torch.equal(cu, offsets([sum(row) for row in MASKS[side]])) and cu.dtype == torch.int32
    assert torch.equal(unpack(packed, cu, mask, fill=-1), torch.where(mask.bool(), padded, -1))


def test_without_a_mask_rows_start_at_the_left():
    packed = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    rows = unpack(packed, offsets([2, 0, 3, 1]), fill=9.0)
    assert rows.tolist() == [[1, 2, 9], [9, 9, 9], [3, 4, 5], [6, 9, 9]]


@given(
    lengths=st.lists(st.integers(0, 6), max_size=5),
    tail=st.lists(st.integers(0, 3), max_size=2),
)
def test_packing_what_was_unpacked_gives_it_back(lengths, tail):
    packed, cu = torch.randn(sum(lengths), *tail), offsets(lengths)
    padded = unpack(packed, cu)
    mask = torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    again, offsets_again = pack(padded, mask)
    assert torch.equal(again, packed) and torch.equal(offsets_again, cu)


def test_gradients_of_both():
    mask = torch.tensor(MASKS["holes"])
    padded = torch.randn(4, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack(x, mask)[0], padded)
    packed = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    cu = pack(padded, mask)[1]
    assert torch.autograd.gradcheck(lambda x: unpack(x, cu, mask), packed)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"mask\[0, 1\]: got 2, want 0 or 1"):
        pack(torch.zeros(1, 2), torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"padded: got shape \(1, 2\), want \(2, 1, ...\)"):
        pack(torch.zeros(1, 2), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"mask: got shape \(3,\), want \(B, T\)"):
        pack(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"rows of \[1, 2\] tokens, want those of cu, \[2, 1\]"):
        unpack(torch.zeros(3), offsets([2, 1]), torch.tensor([[1, 0], [1, 1]]))
    with pytest.raises(ValueError, match="cu: got"):
        unpack(torch.zeros(4), offsets([2, 1]))
