"""The loop that SFT and the reward model share: epochs over rows, one optimizer step a batch, cosine schedule.

Every step is addressed by its number alone (rows, dropout, learning rate), so a resumed run needs the masters, the
optimizer and the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from engine.config import EpochConfig, RunConfig, require
from engine.data.pack import epoch_steps, step_rows
from engine.errors import EngineError
from engine.model.storage import Weights
from engine.run.checkpoint import Checkpoint
from engine.run.flops import Work
from engine.run.optim import Optimizer, OptimizerConfig, StepResult
from engine.run.schedule import cosine_to_floor
from engine.run.session import Session, peak_memory_gb

TrainStep = Callable[[Sequence[int], int], dict[str, float]]
WorkOf = Callable[[Sequence[int], int], Work]
Evaluate = Callable[[], dict[str, float]]


class Trainable(Protocol):
    """What Model and ScalarModel share."""

    @property
    def weights(self) -> Weights: ...
    def parameters(self) -> dict[str, Parameter]: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: dict[str, Tensor]) -> None: ...


def total_steps(config: EpochConfig, num_rows: int) -> int:
    """Optimizer steps of the run.

    Raises:
        ConfigError: the learning rate would rise until its end.
    """
    steps = epoch_steps(num_rows, config.batch_size) * config.num_train_epochs
    steps = min(steps, config.max_steps) if config.max_steps else steps
    require(config.warmup_steps < steps, "warmup_steps", config.warmup_steps, f"fewer than the run's {steps} steps")
    return steps


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
    optimizer = Optimizer(model.parameters(), adam_settings(config), model.weights)
    per_epoch, total = epoch_steps(num_rows, config.batch_size), total_steps(config, num_rows)
    found = session.resume({"model": model.state(), "optimizer": optimizer.state()})
    start, tokens_seen, in_a_row = restore(found, model, optimizer)
    if found is None:
        log_evaluation(session, evaluate, 0)
    saved: dict[str, float] = {}  # until a line is written
    for step in range(start, total):
        saved |= session.check()
        began = time.perf_counter()
        rows = step_rows(num_rows, config.batch_size, config.seed, step)
        optimizer.zero_grad()
        metrics = train_step(rows, step)
        lr = scheduled_rate(config, step, total)
        result = guarded_step(optimizer, metrics["loss"], lr, config.max_grad_norm or None)
        in_a_row = in_a_row + 1 if result.skipped else 0
        seconds = time.perf_counter() - began
        tokens_seen += int(metrics["num_tokens"])
        done = step + 1
        metrics |= saved | {
            "learning_rate": lr,
            "grad_norm": result.grad_norm,
            "skipped_steps": float(optimizer.skipped),
            "epoch": done / per_epoch,
            "timing/step": seconds,
            "perf/tokens_per_s": metrics["num_tokens"] / seconds,
            "perf/peak_memory_gb": session.ranks.largest(peak_memory_gb()),
            "num_tokens": float(tokens_seen),
            **session.totals.add("training", work(rows, step), seconds),
        }
        if done % config.logging_steps == 0 or done == total:
            session.log.metrics(done, metrics)
            saved = {}
        if done == total or is_due(done, config.eval_steps, per_epoch):
            log_evaluation(session, evaluate, done)
        on_schedule = done == total or is_due(done, config.save_steps, per_epoch)
        stuck = in_a_row >= config.max_skipped_steps
        if on_schedule or session.stop_requested or stuck:
            optimizer.zero_grad()  # its memory is the copy's
            tensors = {"model": model.state(), "optimizer": optimizer.state()}
            state = {"tokens_seen": tokens_seen, "skipped_in_a_row": in_a_row}
            session.save(done, tensors, state, interim=not on_schedule)
        if stuck:
            session.wait_for_save()
            raise stuck_error(done, in_a_row)
        session.stop_if_asked(done)
    optimizer.zero_grad()


def scheduled_rate(config: EpochConfig, step: int, total: int) -> float:
    return cosine_to_floor(step, total, config.learning_rate, config.lr_floor, config.warmup_steps)


def adam_settings(config: RunConfig) -> OptimizerConfig:
    return OptimizerConfig(
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        eps_style=config.adam_eps_style,
        weight_decay=config.weight_decay,
    )


def is_due(done: int, every: int | None, per_epoch: int) -> bool:
    return done % (every or per_epoch) == 0


def guarded_step(
    optimizer: Optimizer, loss: float, lr: float, max_grad_norm: float | None
) -> StepResult:
    """The optimizer's step, which skips a gradient that is not finite; so is a loss that is not."""
    if math.isfinite(loss):
        return optimizer.step(lr, max_grad_norm)
    optimizer.skipped += 1
    return StepResult(optimizer.grad_norm(), skipped=True)


def stuck_error(step: int, in_a_row: int) -> EngineError:
    """What ends a run that only skips."""
    return EngineError(
        f"step {step}: {in_a_row} optimizer steps in a row had a loss or gradient that is not finite and were skipped"
        " (max_skipped_steps); the state is saved, none of them moved a weight. Look at the data of these steps, or"
        " lower the learning rate and go on with --resume_from_checkpoint true --allow_config_change learning_rate"
    )


def restore(
    found: Checkpoint | None, model: Trainable, optimizer: Optimizer
) -> tuple[int, int, int]:
    """(step to go on with, tokens seen so far, steps skipped in a row), from the checkpoint, if any."""
    if found is None:
        return 0, 0, 0
    model.load_state(found.group("model"))
    optimizer.load_state(found.group("optimizer"))
    return found.step, int(found.number("tokens_seen")), int(found.number("skipped_in_a_row"))


def log_evaluation(session: Session, evaluate: Evaluate, step: int) -> None:
    began = time.perf_counter()
    metrics = evaluate()
    if metrics:
        session.log.metrics(step, metrics | {"timing/evaluate": time.perf_counter() - began})
