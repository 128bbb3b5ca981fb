"""Golden cases that the definition or the trainer alone would meet, on the kernels: pairs of a ranking, the average."""

from itertools import combinations

import pytest
import torch
from golden_cases import GROUPS, golden_cases, offsets

from engine.kernels.adamw import adamw_step
from engine.kernels.ranking_loss import ranking_loss


@golden_cases("rank_to_pairs", "pairwise_ranking_prompt")
def test_golden_pairs_of_a_ranking(case, precision):
    """Two answers at a time: a tie is no pair; else the better score is right, and equal scores part evenly."""
    ranks, found = case["inputs"]["ranks"], []
    for i, j in combinations(range(len(ranks)), 2):
        rank, cu = torch.tensor([ranks[i], ranks[j]]), offsets([2])
        score = torch.zeros(2, dtype=precision.dtype, requires_grad=True)
        loss, pairs, _ = ranking_loss(score, rank, cu)
        loss.backward()
        if int(pairs) == 0:
            assert float(loss.detach()) == 0.0 and score.grad.tolist() == [0.0, 0.0]
            continue
        higher = torch.tensor([1.0, 0.0], dtype=precision.dtype)
        _, _, right = ranking_loss(higher, rank, cu)
        found.append([i, j] if int(right) else [j, i])
        assert score.grad.tolist() == ([-0.5, 0.5] if int(right) else [0.5, -0.5])
    assert sorted(found) == sorted(case["outputs"]["pairs"])


def test_golden_average_of_a_step(precision):
    """Steps that move nothing but the average, towards the weights of the case."""
    (case,) = GROUPS["ema"]
    given, dtype = case["inputs"], precision.dtype
    ema = torch.full((19,), given["init"], dtype=dtype)
    for weight, want in zip(given["weights"], case["outputs"]["ema"], strict=True):
        master, zeros = torch.full((19,), weight, dtype=dtype), torch.zeros(3, 19, dtype=dtype)
        numbers = (0.0, 0.9, 0.95, 1e-8, 0.0, 1.0, 1.0)
        adamw_step(master, *zeros, None, ema, *numbers, ema_decay=given["decay"])
        precision.assert_close(ema, torch.full_like(ema, want), "average")
        assert master.tolist() == pytest.approx([weight] * 19)
