"""One pass of a model over prompts and their answers: log-probs, values, scores at the answer's positions.

Called without gradient by score.py and with it by update.py, so that old and new log-probs come from the same kernels.
A prompt is one segment and its answers attend to it: it is computed once, however many answers it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.deal import Pass, own_passes
from engine.data.pack import Packed, Shift, cut_by_tokens, last_rows, pack_groups, predictions
from engine.kernels.linear_logprob_loss import Loss
from engine.model import heads, transformer
from engine.model.checkpointing import Checkpointing
from engine.run.distributed import Ranks
from engine.stages.ppo.batch import Rollouts


@dataclass(frozen=True)
class Answers:
    """A micro-batch: some of the prompts with all their answers."""

    batch: Packed
    segments: list[int]  # of the answers, in episode order
    shift: Shift  # answer tokens and the rows that predict them
    episodes: list[int]  # which episodes of the rollouts these are, in the same order

    @property
    def last_rows(self) -> Tensor:  # (episodes,)
        """Of each answer's last token."""
        return last_rows(self.batch, self.segments)


def pack_answers(rollouts: Rollouts, prompts: Sequence[int]) -> Answers:
    """The chosen prompts, by index, with their answers."""
    n, groups = rollouts.num_samples, rollouts.groups
    batch = pack_groups([groups[i] for i in prompts])
    segments = [at * (n + 1) + 1 + k for at in range(len(prompts)) for k in range(n)]
    episodes = [i * n + k for i in prompts for k in range(n)]
    return Answers(batch, segments, predictions(batch, segments), episodes)


def micro_batches(rollouts: Rollouts, prompts: Sequence[int], budget: int) -> list[Answers]:
    """Cut by a budget of tokens; what is computed for an episode does not depend on the cut."""
    cuts = cut_by_tokens(token_counts(rollouts, prompts), budget)
    return [pack_answers(rollouts, [prompts[i] for i in cut]) for cut in cuts]


def training_passes(
    rollouts: Rollouts, prompts: Sequence[int], budget: int, ranks: Ranks
) -> list[tuple[Pass, Answers]]:
    """This rank's micro-batches of a minibatch, as many as every other rank has."""
    passes = own_passes(token_counts(rollouts, prompts), budget, ranks)
    return [(one, pack_answers(rollouts, [prompts[i] for i in one.items])) for one in passes]


def token_counts(rollouts: Rollouts, prompts: Sequence[int]) -> list[int]:
    """Tokens of each prompt with all its answers."""
    groups = rollouts.groups
    return [len(groups[i][0]) + sum(len(a) for a in groups[i][1]) for i in prompts]


def answer_logprobs(
    model: transformer.Model,
    answers: Answers,
    temperature: float,
    checkpointing: Checkpointing = "selective",
) -> tuple[Tensor, Tensor]:
    """Log-prob of each answer token and entropy of the distribution it came from: (M,), (M,) float32.

    The same temperature as in sampling: sampled law = scored law.
    """
    predicting = transformer.forward(
        model, answers.batch, rows=answers.shift.rows, checkpointing=checkpointing
    )  # (M, H)
    return transformer.logprobs(model, predicting, answers.shift.targets, temperature)


def answer_loss(
    model: transformer.Model,
    answers: Answers,
    loss: Loss,
    temperature: float,
    checkpointing: Checkpointing = "selective",
) -> tuple[Tensor, Tensor, Tensor]:  # (), (M,), (M,)
    """A loss that is a sum over answer tokens, differentiable, with `answer_logprobs`' two without gradient."""
    predicting = transformer.forward(
        model, answers.batch, rows=answers.shift.rows, checkpointing=checkpointing
    )  # (M, H)
    return transformer.logprob_loss(model, predicting, answers.shift.targets, loss, temperature)


def answer_values(
    model: heads.ScalarModel, answers: Answers, checkpointing: Checkpointing = "selective"
) -> Tensor:  # (M,)
    """Value of the state before each answer token."""
    rows = answers.shift.rows
    hidden = transformer.forward(model, answers.batch, rows=rows, checkpointing=checkpointing)
    return heads.scores(model, hidden)


def all_values(model: heads.ScalarModel, answers: Answers) -> tuple[Tensor, Tensor]:
    """Value of the state before each answer token (M,), and after the last one (episodes,)."""
    rows = torch.cat([answers.shift.rows, answers.last_rows])
    values = heads.scores(model, transformer.forward(model, answers.batch, rows=rows))
    count = len(answers.shift.rows)
    return values[:count], values[count:]


def answer_scores(model: heads.ScalarModel, answers: Answers) -> Tensor:  # (episodes,)
    """The reward model's score, read at each answer's last real token."""
    return heads.scores(model, transformer.forward(model, answers.batch, rows=answers.last_rows))
