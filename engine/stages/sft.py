"""Supervised fine-tuning on demonstrations [InstructGPT 3.5, C.1] and its RL-init variant [C.3].

    L = -(sum over answer tokens, their end-of-sequence token included, of log p(token | before)) / their number

The mean is over all tokens of the batch, however it is cut into micro-batches; prompts are context, not targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.config import SFTConfig
from engine.data.deal import own_passes
from engine.data.pack import cut_by_tokens, pack_sequences, predictions
from engine.data.text import Example
from engine.data.tokenizer import load_tokenizer
from engine.hybrid import HybridEngine
from engine.model import transformer
from engine.model.checkpointing import Checkpointing
from engine.model.dropout import Dropout
from engine.model.transformer import Model
from engine.model.weights import load_policy
from engine.run.distributed import ALONE, Ranks, join
from engine.run.flops import Work, forward_flops, padded_tokens
from engine.run.session import Session, settle_cpu
from engine.stages.epochs import run_epochs, total_steps
from engine.stages.estimates import describe
from engine.stages.inputs import SFTData, check_vocabulary, identities, load_sft_data
from engine.stages.resources import settle_epochs
from engine.stages.select import check_selection, scorer_vocabulary, select_checkpoint


@dataclass(frozen=True)
class Row:
    """A token sequence of a batch; tokens before `response_start` are context."""

    tokens: Sequence[int]
    response_start: int
    address: int  # addresses its dropout mask

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - max(self.response_start, 1)


def train_sft(config: SFTConfig) -> Path:
    """Runs the stage; the final Hugging Face folder is `config.output_dir`, which is returned."""
    ranks = join(config.device, config.replicate)
    settle_cpu(config, ranks)
    context = describe(config.model_name_or_path, "lm_head").architecture.max_positions
    tokenizer = load_tokenizer(config.model_name_or_path)
    data = load_sft_data(config, tokenizer, context)
    check_selection(config, data, context)
    config, chosen = settle_epochs(config, "lm_head", data.lengths, data.longest_prompt, ranks)
    model = load_policy(config.model_name_or_path, config.dtype, True, config.device, ranks)
    policy = HybridEngine(model, tokenizer)
    vocabulary = {config.model_name_or_path: policy.model.architecture.vocab_size}
    check_vocabulary(config, data, tokenizer, vocabulary | scorer_vocabulary(config))
    stage, counted = SFTStage(config, policy.model, data, ranks), epochs_config(config)
    total = total_steps(counted, stage.num_demonstrations_rows)
    live = ("loss", "learning_rate", "grad_norm", "perf/tokens_per_s", "eval/loss")
    with Session(config, "sft", total, live, ranks) as session:
        session.start(identities(config, data), (*data.reports, chosen))
        run_epochs(
            session,
            counted,
            policy.model,
            stage.num_demonstrations_rows,
            stage.train_step,
            stage.work,
            stage.evaluate,
        )
        if config.select_by_reward_model:
            select_checkpoint(session, config, policy, data.eval_prompts())
        with session.publishing() as folder:
            session.export(policy.whole(), lambda whole: whole.save_pretrained(folder))
        session.log.event(f"model: {config.output_dir}")
        session.say_totals()
    return Path(config.output_dir)


def epochs_config(config: SFTConfig) -> SFTConfig:
    """What steps are counted by: demonstrations alone, of which a batch with pretraining text holds fewer."""
    if not config.ptx_rows:
        return config
    return replace(
        config,
        per_device_train_batch_size=config.batch_size - config.ptx_rows,
        gradient_accumulation_steps=1,
        ptx_fraction=0.0,
        ptx_dataset_name=None,
    )


class SFTStage:
    """The batch of a step, its loss and gradients, and the validation losses."""

    def __init__(
        self, config: SFTConfig, model: Model, data: SFTData, ranks: Ranks = ALONE
    ) -> None:
        self.config, self.model, self.data, self.ranks = config, model, data, ranks
        self.num_demonstrations_rows = len(data.train)

    def batch(self, rows: Sequence[int], step: int) -> list[Row]:
        """The step's demonstrations and its share of pretraining rows."""
        chosen = [self.demonstration(self.data.train[i], at) for at, i in enumerate(rows)]
        if self.data.ptx is not None:
            first = step * self.config.ptx_rows
            texts = self.data.ptx.rows(range(first, first + self.config.texts_beside(len(rows))))
            chosen += [Row(tokens, 0, len(rows) + at) for at, tokens in enumerate(texts)]
        return chosen

    def demonstration(self, example: Example, address: int) -> Row:
        start = example.response_start if self.config.completion_only_loss else 0
        return Row(example.tokens, start, address)

    def train_step(self, rows: Sequence[int], step: int) -> dict[str, float]:
        """Adds the gradient of the batch's token-mean loss."""
        batch = self.batch(rows, step)
        count = sum(row.num_targets for row in batch)
        losses, entropies = [], []  # read when all is launched
        p = self.config.residual_dropout
        lengths = [len(row.tokens) for row in batch]
        for one in own_passes(lengths, self.config.token_budget, self.ranks):
            chosen = [batch[i] for i in one.items]
            segments = tuple((row.address, len(row.tokens)) for row in chosen)
            dropout = Dropout(p, self.config.seed, step, segments) if p > 0 else None
            keep = self.config.activation_checkpointing
            hidden, targets = predicting(self.model, chosen, dropout, keep)
            loss, _, entropy = transformer.logprob_loss(
                self.model, hidden, targets, lambda logprob, *_: -logprob.sum() / max(count, 1)
            )
            loss = one.loss(loss)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            if one.counts:
                entropies.append(entropy.sum())
        loss_sum, entropy_sum = self.ranks.sums(
            [sum(map(float, losses), 0.0), sum(map(float, entropies), 0.0)]
        )
        return {
            "loss": loss_sum,
            "entropy": entropy_sum / max(count, 1),
            "num_tokens": float(sum(lengths)),
        }

    def work(self, rows: Sequence[int], step: int) -> Work:
        """Of a step: three forwards' operations, and rows as long as the longest."""
        batch, a = self.batch(rows, step), self.model.architecture
        lengths = [len(row.tokens) for row in batch]
        targets = sum(row.num_targets for row in batch)
        forward = forward_flops(a, [(0, n) for n in lengths], targets, a.vocab_size)
        return Work(3 * forward, sum(lengths), padded_tokens(lengths))

    def evaluate(self) -> dict[str, float]:
        """Mean token loss on the validation demonstrations and, in the RL-init variant, on held-out text."""
        metrics: dict[str, float] = {}
        if not self.data.validation and not self.data.eval_ptx:
            return metrics
        model = transformer.whole(self.model)
        if self.data.validation:
            rows = [self.demonstration(example, 0) for example in self.data.validation]
            metrics["eval/loss"] = self.mean_loss(model, rows)
        if self.data.eval_ptx:
            texts = [Row(tokens, 0, 0) for tokens in self.data.eval_ptx]
            metrics["eval/ptx_loss"] = self.mean_loss(model, texts)
        return metrics

    @torch.no_grad()
    def mean_loss(self, model: Model, rows: Sequence[Row]) -> float:
        loss, count = 0.0, 0.0
        own = [rows[i] for i in self.ranks.share(len(rows))]
        for cut in cut_by_tokens([len(r.tokens) for r in own], self.config.token_budget):
            hidden, targets = predicting(model, [own[i] for i in cut], None)
            logprob, _ = transformer.logprobs(model, hidden, targets, 1.0)
            loss, count = loss - float(logprob.double().sum()), count + logprob.numel()
        loss, count = self.ranks.sums([loss, count])
        return loss / max(count, 1)


def predicting(
    model: Model,
    rows: Sequence[Row],
    dropout: Dropout | None,
    checkpointing: Checkpointing = "selective",
) -> tuple[Tensor, Tensor]:  # (M, H), (M,)
    """The hidden states that the rows' targets are predicted from, and those targets."""
    batch = pack_sequences([row.tokens for row in rows])
    shift = predictions(batch, skip_first=[row.response_start for row in rows])
    return transformer.forward(model, batch, dropout, shift.rows, checkpointing), shift.targets
