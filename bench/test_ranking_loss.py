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


@pytest.mark.parametrize("name", ["engine", "torch", "table of pairs"])
def test_ranking_loss(benchmark, name):
    score = torch.randn(PROMPTS * ANSWERS, requires_grad=True)
    rank = torch.stack([torch.randperm(ANSWERS) for _ in range(PROMPTS)]).flatten()
    cu = torch.arange(0, PROMPTS * ANSWERS + 1, ANSWERS, dtype=torch.int32)
    torch.testing.assert_close(ranking_loss(score, rank, cu)[0], table_of_pairs(score, rank, cu))

    def run(of: str) -> torch.Tensor:
        if of == "table of pairs":
            return torch.autograd.grad(table_of_pairs(score, rank, cu), score)[0]
        with backend("cpp" if of == "engine" else "reference"):
            return torch.autograd.grad(ranking_loss(score, rank, cu)[0], score)[0]

    torch.testing.assert_close(run("engine"), run(name), rtol=1e-4, atol=1e-7)
    benchmark(run, name)  # no limit noted: 576 numbers cost less than any call
