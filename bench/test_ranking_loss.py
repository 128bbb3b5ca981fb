"""ranking_loss: C++ against the definition and a table of pairs, forward and backward."""

import pytest
import torch

from engine.kernels._backend import backend
from engine.kernels.ranking_loss import ranking_loss

PROMPTS, ANSWERS = 64, 9  # the paper's batch


def table_of_pairs(score: torch.Tensor, rank: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    """What reward-model trainers run: gather the two sides of every pair of the batch."""
    grid, ranks = score.view(PROMPTS, ANSWERS), rank.view(PROMPTS, ANSWERS)
    prompt, winner, loser = (ranks[:, :, None] < ranks[:, None, :]).nonzero(as_tuple=True)
    margin = grid[prompt, winner] - grid[prompt, loser]
    return -torch.nn.functional.logsigmoid(margin).mean()


@pytest.mark.parametrize("name", ["cpp", "reference", "table_of_pairs"])
def test_ranking_loss(benchmark, name):
    score = torch.randn(PROMPTS * ANSWERS, requires_grad=True)
    rank = torch.stack([torch.randperm(ANSWERS) for _ in range(PROMPTS)]).flatten()
    cu = torch.arange(0, PROMPTS * ANSWERS + 1, ANSWERS, dtype=torch.int32)
    torch.testing.assert_close(ranking_loss(score, rank, cu)[0], table_of_pairs(score, rank, cu))
    if name == "table_of_pairs":
        benchmark(lambda: table_of_pairs(score, rank, cu).backward())
        return
    with backend(name):
        benchmark(lambda: ranking_loss(score, rank, cu)[0].backward())
