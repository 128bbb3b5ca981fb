"""How a step's items are dealt: every item on one rank, as many passes on each, and with one process nothing new."""

import pytest
import torch

from engine.data.deal import Pass, own_passes
from engine.data.pack import cut_by_tokens
from engine.run.distributed import ALONE, Ranks

LENGTHS = [5, 3, 9, 1, 7, 2, 2, 11, 4]


def dealt(size: int, lengths: list[int], budget: int) -> list[list[Pass]]:
    return [own_passes(lengths, budget, Ranks(rank, size, size, None)) for rank in range(size)]


def test_alone_it_is_the_cut():
    passes = own_passes(LENGTHS, 10, ALONE)
    assert [one.items for one in passes] == cut_by_tokens(LENGTHS, 10)
    assert all(one.counts for one in passes)


@pytest.mark.parametrize("size", [2, 3, 4, 16])
@pytest.mark.parametrize("budget", [1, 10, 1000])
def test_every_item_counts_once_and_on_its_own_rank(size, budget):
    ranks = dealt(size, LENGTHS, budget)
    assert len({len(passes) for passes in ranks}) == 1
    seen = [(i, rank) for rank, passes in enumerate(ranks) for one in passes if one.counts for i in one.items]
    assert sorted(seen) == [(i, i % size) for i in range(len(LENGTHS))]
    fillers = [one.items for passes in ranks for one in passes if not one.counts]
    assert all(items == [3] for items in fillers)  # the shortest
    assert size <= len(LENGTHS) or fillers


def test_without_items_nobody_passes():
    assert dealt(3, [], 10) == [[], [], []]


def test_a_filler_has_a_gradient_of_zeros():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    Pass([0], False).loss(x.square().sum()).backward()
    assert x.grad.tolist() == [0.0, 0.0]
    x.grad = None
    Pass([0], True).loss(x.square().sum()).backward()
    assert x.grad.tolist() == [4.0, 6.0]
