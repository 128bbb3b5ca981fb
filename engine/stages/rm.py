"""Reward model on rankings of K answers [InstructGPT 3.5, C.2].

    loss = -(1 / pairs) sum over pairs (i better than j) of log sigmoid(r_i - r_j)      (Eq. 1; ties dropped)

All K answers of a prompt are one batch element: K answer segments that share the prompt's keys go through one forward
pass, and C(K,2) pairs through one ranking_loss. The score is read at the last real token. After training a constant
is added so that demonstrations score 0 on average; the loss does not see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine import ops
from engine.config import RMConfig
from engine.data.deal import own_passes
from engine.data.pack import cut_by_tokens, last_rows, pack_groups
from engine.data.rankings import RankedGroup
from engine.data.tokenizer import load_tokenizer
from engine.model import heads, transformer
from engine.model.checkpointing import Checkpointing
from engine.model.heads import ScalarModel
from engine.model.weights import save_scalar, scalar_from_policy
from engine.run.device import to_device, to_host
from engine.run.distributed import ALONE, Ranks, join
from engine.run.flops import Work, forward_flops, grouped, padded_tokens
from engine.run.session import Session, settle_cpu
from engine.stages.epochs import run_epochs, total_steps
from engine.stages.estimates import describe
from engine.stages.inputs import RMData, check_vocabulary, group_lengths, identities, load_rm_data
from engine.stages.resources import settle_epochs
from engine.stages.rm_metrics import count_pairs, ranking_metrics


def train_reward_model(config: RMConfig) -> Path:
    """Runs the stage; the final AutoModelForSequenceClassification folder is `config.output_dir`."""
    ranks = join(config.device, config.replicate)
    settle_cpu(config, ranks)
    context = describe(config.model_name_or_path, "lm_head").architecture.max_positions
    tokenizer = load_tokenizer(config.model_name_or_path)
    data = load_rm_data(config, tokenizer, context)
    config, chosen = settle_epochs(config, "score", data.lengths, ranks=ranks)
    model = scalar_from_policy(
        config.model_name_or_path,
        seed=config.seed,
        dtype=config.dtype,
        trainable=True,
        device=config.device,
        ranks=ranks,
    )
    vocabulary = {config.model_name_or_path: model.architecture.vocab_size}
    check_vocabulary(config, data, tokenizer, vocabulary)
    stage = RMStage(config, model, data, ranks)
    live = ("loss", "accuracy", "margin", "perf/tokens_per_s", "eval/accuracy")
    with Session(config, "rm", total_steps(config, len(data.train)), live, ranks) as session:
        session.start(identities(config, data), (*data.reports, chosen))
        run_epochs(session, config, model, len(data.train), stage.train_step, stage.work, stage.evaluate)
        constant = -stage.demonstration_mean()
        model = model.with_constant(model.constant + constant)
        session.log.event(f"constant {constant:+.4f}: demonstrations now score 0 on average")
        with session.publishing() as folder:
            session.export(transformer.whole(model), lambda whole: save_scalar(whole, folder, tokenizer=tokenizer))
        session.log.event(f"model: {config.output_dir}")
        session.say_totals()
    return Path(config.output_dir)


class RMStage:
    """The batch of a step, its loss and gradients, and the metrics on train and validation rankings."""

    def __init__(
        self, config: RMConfig, model: ScalarModel, data: RMData, ranks: Ranks = ALONE
    ) -> None:
        self.config, self.model, self.data, self.ranks = config, model, data, ranks

    def train_step(self, rows: Sequence[int], step: int) -> dict[str, float]:
        """Adds the gradient of the ranking loss over all prompts of the batch."""
        groups = [self.data.train[i] for i in rows]
        total = sum(self.weight(group) for group in groups)
        seen = []  # read when all is launched
        for one in own_passes(group_lengths(groups), self.config.token_budget, self.ranks):
            chosen = [groups[i] for i in one.items]
            score = group_scores(self.model, chosen, self.config.activation_checkpointing)
            ranks = to_device(ranks_of(chosen), score.device)
            cu = to_device(answer_offsets(chosen), score.device)
            loss, _, _ = ops.ranking_loss(score, ranks, cu, self.config.loss_reduction)
            loss = one.loss(loss * (sum(self.weight(group) for group in chosen) / max(total, 1)))
            loss.backward()  # type: ignore[no-untyped-call]
            if one.counts:
                seen.append((one.items, loss.detach(), score.detach()))
        own = {
            i: part
            for items, _, score in seen
            for i, part in zip(items, split(to_host(score), [groups[i] for i in items]), strict=True)
        }
        metrics = ranking_metrics(groups, self.all_scores(own, len(groups)), self.config.calibration_bins)
        (loss_sum,) = self.ranks.sums([sum((float(loss) for _, loss, _ in seen), 0.0)])
        return {
            "loss": loss_sum,
            "num_tokens": float(sum(group_lengths(groups))),
            **{name: metrics[name] for name in TRAIN_METRICS if name in metrics},
        }

    def work(self, rows: Sequence[int], step: int) -> Work:
        """Of a step: three forwards' operations; padded, each answer is a row that repeats its prompt."""
        groups, a = [self.data.train[i] for i in rows], self.model.architecture
        answers = [[len(r) for r in g.responses] for g in groups]
        segments = grouped([len(g.prompt) for g in groups], answers)
        whole = [len(g.prompt) + len(r) for g in groups for r in g.responses]
        forward = forward_flops(a, segments, len(whole), 1)
        return Work(3 * forward, sum(group_lengths(groups)), padded_tokens(whole))

    def weight(self, group: RankedGroup) -> int:
        """What a prompt counts for in the loss's mean: the reduction's own denominator."""
        pairs = count_pairs(group.ranks)
        if self.config.loss_reduction == "pair_mean":
            return pairs
        return 1 if self.config.loss_reduction == "prompt_mean_allpairs" else int(pairs > 0)

    def all_scores(self, own: Mapping[int, Tensor], count: int) -> list[Tensor]:
        """The K scores of every group of 0 .. count - 1, from those that this rank has made."""
        return [part.float() for part in self.ranks.ragged([own[i] for i in sorted(own)], count)]

    @torch.no_grad()
    def scores(self, groups: Sequence[RankedGroup]) -> list[Tensor]:
        """The K scores of every group."""
        model, share, own = transformer.whole(self.model), self.ranks.share(len(groups)), {}
        budget = self.config.token_budget
        for cut in cut_by_tokens(group_lengths([groups[i] for i in share]), budget):
            chosen = [groups[share[i]] for i in cut]
            found = to_host(group_scores(model, chosen))
            for i, part in zip(cut, split(found, chosen), strict=True):
                own[share[i]] = part
        return self.all_scores(own, len(groups))

    def evaluate(self) -> dict[str, float]:
        """Accuracy with its standard error, log loss, by K and by source, calibration: on validation rankings."""
        groups = self.data.validation
        if not groups:
            return {}
        metrics = ranking_metrics(groups, self.scores(groups), self.config.calibration_bins)
        return {f"eval/{name}": value for name, value in metrics.items()}

    @torch.no_grad()
    def demonstration_mean(self) -> float:
        """Mean score of demonstrations: SFT rows where given, else each prompt's best-ranked answer."""
        groups = self.data.demonstrations
        scores = torch.cat(self.scores(groups))
        return float(scores.double().mean())


TRAIN_METRICS = (
    "accuracy",
    "log_loss",
    "margin",
    "min_reward",
    "mean_reward",
    "max_reward",
    "num_pairs",
)


def group_scores(
    model: ScalarModel, groups: Sequence[RankedGroup], checkpointing: Checkpointing = "selective"
) -> Tensor:  # (sum of K,)
    """One score an answer: each prompt goes through the network once, each answer once."""
    batch = pack_groups([(g.prompt, g.responses) for g in groups])
    segments: list[int] = []
    at = 0
    for group in groups:
        segments += range(at + 1, at + 1 + len(group.responses))
        at += 1 + len(group.responses)
    rows = last_rows(batch, segments)
    return heads.scores(
        model, transformer.forward(model, batch, rows=rows, checkpointing=checkpointing)
    )


def ranks_of(groups: Sequence[RankedGroup]) -> Tensor:  # (sum of K,) float32
    """Each answer's place among its prompt's ranks: in float32 ranks themselves could become ties."""
    ranks = [torch.tensor(g.ranks, dtype=torch.float64) for g in groups]
    places = [r.unique(return_inverse=True)[1] for r in ranks]  # type: ignore[no-untyped-call]
    return torch.cat(places).float()


def answer_offsets(groups: Sequence[RankedGroup]) -> Tensor:  # (groups + 1,) int32
    counts = torch.tensor([0] + [len(g.responses) for g in groups])
    return counts.cumsum(0).to(torch.int32)


def split(scores: Tensor, groups: Sequence[RankedGroup]) -> list[Tensor]:
    return list(torch.split(scores, [len(g.responses) for g in groups]))
