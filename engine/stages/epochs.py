"""The loop that SFT and the reward model share: epochs over rows, one optimizer step a batch, cosine schedule.

Every step is addressed by its number alone (rows, dropout, learning rate), so a resumed run needs the masters, the
optimizer and the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from engine.config import EpochConfig
from engine.data.pack import epoch_steps, step_rows
from engine.run.flops import Work
from engine.run.optim import Optimizer, OptimizerConfig
from engine.run.schedule import cosine_to_floor
from engine.run.session import Session, peak_memory_gb

TrainStep = Callable[[Sequence[int], int], dict[str, float]]
WorkOf = Callable[[Sequence[int], int], Work]
Evaluate = Callable[[], dict[str, float]]


class Trainable(Protocol):
    """What Model and ScalarModel share."""

    def parameters(self) -> dict[str, Parameter]: ...
    def refresh(self) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: dict[str, Tensor]) -> None: ...


def total_steps(config: EpochConfig, num_rows: int) -> int:
    steps = epoch_steps(num_rows, config.batch_size) * config.num_train_epochs
    return min(steps, config.max_steps) if config.max_steps else steps


def run_epochs(
    session: Session,
    config: EpochConfig,
    model: Trainable,
    num_rows: int,
    train_step: TrainStep,
    work: WorkOf,
    evaluate: Evaluate,
) -> None:
    """Trains `model` in place. `train_step(rows, step)` adds gradients of a loss over the whole batch and returns its
    metrics, `work(rows, step)` counts its operations; `evaluate()` returns metrics of the validation set (empty without
    one)."""
    adam = OptimizerConfig(
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        eps_style=config.adam_eps_style,
        weight_decay=config.weight_decay,
    )
    optimizer = Optimizer(model.parameters(), adam)
    per_epoch, total = epoch_steps(num_rows, config.batch_size), total_steps(config, num_rows)
    start, tokens_seen = restore(session, model, optimizer)
    if start == 0:
        log_evaluation(session, evaluate, 0)
    for step in range(start, total):
        began = time.perf_counter()
        rows = step_rows(num_rows, config.batch_size, config.seed, step)
        optimizer.zero_grad()
        metrics = train_step(rows, step)
        lr = cosine_to_floor(
            step, total, config.learning_rate, config.lr_floor, config.warmup_steps
        )
        result = optimizer.step(lr, config.max_grad_norm or None)
        if not result.skipped:
            model.refresh()
        seconds = time.perf_counter() - began
        tokens_seen += int(metrics["num_tokens"])
        done = step + 1
        metrics |= {
            "learning_rate": lr,
            "grad_norm": result.grad_norm,
            "skipped_steps": float(optimizer.skipped),
            "epoch": done / per_epoch,
            "timing/step": seconds,
            "perf/tokens_per_s": metrics["num_tokens"] / seconds,
            "perf/peak_memory_gb": peak_memory_gb(),
            "num_tokens": float(tokens_seen),
            **session.totals.add("training", work(rows, step), seconds),
        }
        if done % config.logging_steps == 0 or done == total:
            session.log.metrics(done, metrics)
        if done == total or is_due(done, config.eval_steps, per_epoch):
            log_evaluation(session, evaluate, done)
        if done == total or is_due(done, config.save_steps, per_epoch) or session.stop_requested:
            state = {"tokens_seen": tokens_seen}
            session.save(done, {"model": model.state(), "optimizer": optimizer.state()}, state)
            session.stop_if_asked(done)
    optimizer.zero_grad()


def is_due(done: int, every: int | None, per_epoch: int) -> bool:
    return done % (every or per_epoch) == 0


def restore(session: Session, model: Trainable, optimizer: Optimizer) -> tuple[int, int]:
    """(step to go on with, tokens seen so far), from the checkpoint that the config asks for, if any."""
    found = session.resume()
    if found is None:
        return 0, 0
    model.load_state(found.tensors["model"])
    optimizer.load_state(found.tensors["optimizer"])
    return int(found.state["step"]), int(found.state["tokens_seen"])


def log_evaluation(session: Session, evaluate: Evaluate, step: int) -> None:
    began = time.perf_counter()
    metrics = evaluate()
    if metrics:
        session.log.metrics(step, metrics | {"timing/evaluate": time.perf_counter() - began})
